//! What reaches the state and what it asks for: the words between `step` and the outside.
//!
//! Here: inputs, effects, the rules of one broker. Not here: what an input does (the module
//! above), who makes inputs (`broker::listen`, `broker::serve`) or performs effects
//! (`broker::effects`).

use std::ops::Range;
use std::sync::Arc;

use crate::core::broker::frame::Burst;
use crate::core::broker::guests::GuestTable;
use crate::core::broker::protocol::{DeclineReason, Hello, Refusal};
use crate::core::bus::topic::Pattern;
use crate::core::config::AuthMode;
use crate::core::events::Event;
use crate::core::name::VmName;
use crate::core::root::handshake_record::HandshakeRecord;

use super::topics::Reader;

/// A connection, numbered from 1 in the order of accept. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(pub u64);

/// When an input came, by both clocks. All deadlines and ages go by `boot_ms`; `wall_ms` is for
/// people to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// CLOCK_BOOTTIME.
    pub boot_ms: u64,
    /// Since the epoch.
    pub wall_ms: u64,
}

/// By which door a connection came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// TCP on the loopback: guests, and whoever else is there.
    Guest,
    /// The Unix socket: the host.
    Host,
}

/// Every reason the state thread wakes up. The list is closed on purpose.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// A connection was accepted.
    Opened {
        /// Its number.
        conn: ConnId,
        /// Its door.
        plane: Plane,
        /// `127.0.0.1:41000`, or `unix`.
        remote: String,
    },
    /// A whole hello came.
    Hello {
        /// From whom.
        conn: ConnId,
        /// What it says.
        hello: Hello,
    },
    /// No hello came, or none that counts.
    Refused {
        /// From whom.
        conn: ConnId,
        /// Why.
        refusal: Refusal,
        /// It sent at least one byte; otherwise it is told, but is no attempt.
        attempted: bool,
    },
    /// What one read of a session brought.
    Frames {
        /// From whom.
        conn: ConnId,
        /// Its frames.
        burst: Burst,
    },
    /// A session's client has ended its side of the connection.
    Ended {
        /// Which.
        conn: ConnId,
    },
    /// A session that is behind has read the log as far as it was told.
    AtEnd {
        /// Which.
        conn: ConnId,
        /// The first number it has not read.
        next: u64,
    },
    /// A session's queue can't take what it was sent.
    Full {
        /// Which.
        conn: ConnId,
        /// What is in the queue.
        queued_bytes: u64,
    },
    /// The log of the bus can be written; the last number in it.
    LogOpened {
        /// 0: it is empty.
        last: u64,
    },
    /// What has come since the last commit is to be kept, answered and delivered.
    Commit,
    /// Answer to [`Effect::Append`].
    Appended {
        /// All lines are in the log; otherwise none is.
        kept: bool,
        /// The log can take more.
        open: bool,
    },
    /// The connection is gone.
    Closed {
        /// Which.
        conn: ConnId,
    },
    /// Answer to [`Effect::Record`].
    Recorded {
        /// Whose record.
        vm: VmName,
        /// The hello that waits for it.
        asked_by: Option<ConnId>,
        /// It is on disk now.
        made: bool,
    },
    /// The name of a record's file was taken away.
    RecordLost {
        /// Whose.
        vm: VmName,
    },
    /// `guests.json` as it is now; `None`: there is none, names aren't checked.
    Guests(Option<GuestTable>),
    /// A record found at start, and whether its VM can still be alive.
    Restored {
        /// The record.
        record: Box<HandshakeRecord>,
        /// Its VM runs, or nobody knows.
        alive: bool,
    },
    /// QEMU let its pid file go, or executes nothing.
    VmGone {
        /// Which VM.
        vm: VmName,
    },
    /// Something was due.
    Tick,
    /// The broker shall stop: nobody new is let in.
    Stop,
    /// It stops now: whatever was held back is due.
    Finish,
}

/// Everything `step` may ask of the outside. An effect returns nothing; an answer is a new
/// [`Input`].
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Send this line, then end the sending side.
    Reply {
        /// To whom.
        conn: ConnId,
        /// With its line end.
        line: String,
    },
    /// End the wait for its hello; its thread answers with [`Input::Refused`].
    Evict {
        /// Whom.
        conn: ConnId,
        /// Why.
        reason: DeclineReason,
    },
    /// It had its answer and lingers: close it.
    Drop {
        /// Which.
        conn: ConnId,
    },
    /// Send this line; what follows are frames.
    Grant {
        /// To whom.
        conn: ConnId,
        /// With its line end.
        line: String,
    },
    /// Send these frames to a session; a full queue answers with [`Input::Full`].
    Send {
        /// To whom.
        conn: ConnId,
        /// In this order.
        parts: Vec<Part>,
    },
    /// Tell a session's thread how to go on.
    Order {
        /// Whose.
        conn: ConnId,
        /// What.
        order: Order,
    },
    /// Send this frame (none if empty), then end the sending side; the session is over.
    End {
        /// Whose.
        conn: ConnId,
        /// The last frame.
        last: Vec<u8>,
    },
    /// Append these lines to the log of the bus, all or none; answered by [`Input::Appended`].
    Append(Arc<Vec<u8>>),
    /// Append lines that are in the log of the bus to their sender's own.
    Shelve {
        /// The sender.
        vm: VmName,
        /// The lines of a group.
        lines: Arc<Vec<u8>>,
        /// Which of them.
        ranges: Vec<Range<usize>>,
    },
    /// Append what a Vizier said to its service log.
    ServiceLog {
        /// Whose.
        vm: VmName,
        /// JSON of its messages.
        payloads: Vec<String>,
    },
    /// Write this record; answered by [`Input::Recorded`].
    Record {
        /// The record.
        record: Box<HandshakeRecord>,
        /// The hello that waits for it.
        asked_by: Option<ConnId>,
    },
    /// A line for the log, complete.
    Log(String),
    /// A fact for the journal.
    Tell(Event),
}

/// Bytes for a session: its own, or a piece of what many get.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// For it alone.
    Own(Vec<u8>),
    /// A piece of a group's deliveries.
    Shared(Arc<Vec<u8>>, Range<usize>),
}

impl Part {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Part::Own(bytes) => bytes,
            Part::Shared(bytes, range) => &bytes[range.clone()],
        }
    }
}

/// How a session's thread goes on after it has asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// Deliveries come from the state thread.
    Attached,
    /// Deliver from the log.
    Replay(Plan),
}

/// What a session that is behind delivers itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Everything up to this number is in the log.
    pub upto: u64,
    /// What it may read.
    pub reader: Reader,
    /// Its subscriptions.
    pub wanted: Vec<Wanted>,
}

/// One subscription of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// To what.
    pub pattern: Pattern,
    /// Tells it from another one of the same pattern.
    pub number: u64,
    /// The first message it is for.
    pub first: u64,
    /// The first one not dealt with yet.
    pub next: u64,
    /// The newest message up to this number of each topic comes before everything else.
    pub last: Option<u64>,
}

/// What `[bus]` allows.
#[derive(Clone, Debug)]
pub struct BusRules {
    /// No frame for this long ends a session.
    pub idle_ms: u64,
    /// Sessions of one VM at once.
    pub sessions_per_vm: usize,
    /// Subscriptions of one session.
    pub subscriptions_per_session: usize,
    /// 0: no limit.
    pub publishes_per_sec_per_vm: u32,
    /// What a session's client is told.
    pub heartbeat_secs: u64,
}

/// What stays the same for a broker's whole life.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Id of this run.
    pub run: String,
    /// This host boot.
    pub boot_id: String,
    /// The freshness window.
    pub freshness_ms: u64,
    /// Who must show a token.
    pub auth: AuthMode,
    /// Guests' connections at once.
    pub max_connections: usize,
    /// Host clients at once: places of their own.
    pub max_host_connections: usize,
    /// Versions of the bus spoken here.
    pub bus_versions: &'static [u32],
    /// Sessions.
    pub bus: BusRules,
}
