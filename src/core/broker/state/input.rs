//! Inputs and effects: all that passes between `step` and the rest of the broker.
//!
//! Here: inputs, effects, the rules of one broker. Not here: what an input does (`broker::state`),
//! who makes inputs (`broker::listen`, `broker::serve`) or performs effects (`broker::effects`).

use std::ops::Range;
use std::sync::Arc;

use crate::core::broker::frame::Burst;
use crate::core::broker::guests::GuestTable;
use crate::core::broker::protocol::{DeclineReason, Hello, HelloRefusal};
use crate::core::bus::topic::Pattern;
use crate::core::config::AuthMode;
use crate::core::events::Event;
use crate::core::id::{BootId, RunId};
use crate::core::name::VmName;
use crate::core::root::handshake_record::HandshakeRecord;

use super::topics::Reader;

/// A connection, numbered from 1 in the order of accept. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(pub u64);

/// The time of an input on both clocks. All deadlines and ages are computed from `boot_ms`;
/// `wall_ms` is for people to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamp {
    /// CLOCK_BOOTTIME.
    pub boot_ms: u64,
    /// Since the epoch.
    pub wall_ms: u64,
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// It came over TCP on the loopback: a guest, or any local program.
    Guest,
    /// It came over the Unix socket: the host.
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
        peer: Peer,
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
    /// No hello came, or an invalid one.
    HelloRefused {
        /// From whom.
        conn: ConnId,
        /// Why.
        refusal: HelloRefusal,
        /// It sent at least one byte; otherwise it is answered, but not counted as an attempt.
        attempted: bool,
    },
    /// What one read of a session brought.
    Frames {
        /// From whom.
        conn: ConnId,
        /// Its frames.
        burst: Burst,
    },
    /// A session's client has closed its sending side.
    HalfClosed {
        /// Which.
        conn: ConnId,
    },
    /// The thread of a session has replayed the log up to the number it was given.
    ReplayDone {
        /// Which.
        conn: ConnId,
        /// The first number that it hasn't read.
        next: u64,
    },
    /// A session's queue has no room for what it was sent.
    QueueFull {
        /// Which.
        conn: ConnId,
        /// What is in the queue.
        queued_bytes: u64,
    },
    /// The log of the bus was opened.
    LogOpened {
        /// 0: it is empty.
        last: u64,
    },
    /// The messages since the last commit are to be written, answered and delivered.
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
        /// The connection whose hello waits for it.
        asked_by: Option<ConnId>,
        /// It is on disk now.
        made: bool,
    },
    /// The file of a record was removed.
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
    /// A VM's QEMU has ended or is paused.
    VmGone {
        /// Which VM.
        vm: VmName,
    },
    /// A deadline from [`State::due`](super::State::due) has passed.
    Tick,
    /// The broker begins to stop: no new client is admitted.
    Stop,
    /// The broker stops now: everything that was delayed is written.
    Finish,
}

/// Everything that `step` may ask for. An effect returns nothing; an answer comes as a new
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
    /// Stop waiting for its hello; its thread answers with [`Input::HelloRefused`].
    Evict {
        /// Whom.
        conn: ConnId,
        /// Why.
        reason: DeclineReason,
    },
    /// It was answered: close it.
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
    /// Send these frames to a session; a full queue answers with [`Input::QueueFull`].
    Send {
        /// To whom.
        conn: ConnId,
        /// In this order.
        parts: Vec<Chunk>,
    },
    /// Tell a session's thread how the session gets its messages from now on.
    SetDelivery {
        /// Whose.
        conn: ConnId,
        /// What.
        delivery: Delivery,
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
    /// Append lines of the log of the bus to their sender's own log.
    SenderLog {
        /// The sender.
        vm: VmName,
        /// The lines of a batch.
        lines: Arc<Vec<u8>>,
        /// Which of them.
        ranges: Vec<Range<usize>>,
    },
    /// Append what a guest's Vizier reported to that VM's service log.
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
        /// The connection whose hello waits for it.
        asked_by: Option<ConnId>,
    },
    /// A line for the log, complete.
    Log(String),
    /// A fact for the journal.
    Emit(Event),
}

/// Bytes for a session: its own, or part of a buffer that several sessions share.
#[derive(Clone, Debug, PartialEq)]
pub enum Chunk {
    /// For this session alone.
    Own(Vec<u8>),
    /// Part of a batch's deliveries.
    Shared(Arc<Vec<u8>>, Range<usize>),
}

impl Chunk {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Chunk::Own(bytes) => bytes,
            Chunk::Shared(bytes, range) => &bytes[range.clone()],
        }
    }
}

/// How a session gets its messages.
#[derive(Clone, Debug, PartialEq)]
pub enum Delivery {
    /// The state thread delivers them as they come.
    Live,
    /// The session's own thread delivers them from the log.
    Replay(ReplayPlan),
}

/// What a session's thread delivers from the log.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplayPlan {
    /// The last number to deliver; everything up to it is in the log.
    pub upto: u64,
    /// What it may read.
    pub reader: Reader,
    /// Its subscriptions.
    pub subscriptions: Vec<ReplaySubscription>,
}

/// One subscription of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplaySubscription {
    /// To what.
    pub pattern: Pattern,
    /// Tells it from an earlier subscription to the same pattern.
    pub number: u64,
    /// The number of the first message that it wants.
    pub first: u64,
    /// The first number that isn't dealt with yet.
    pub next: u64,
    /// If set, the newest message of each topic up to this number is delivered first.
    pub last: Option<u64>,
}

/// The limits of `[bus]`.
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
    pub run: RunId,
    /// This host boot.
    pub boot_id: BootId,
    /// The freshness window.
    pub freshness_ms: u64,
    /// Which guests must show a token.
    pub auth: AuthMode,
    /// Guests' connections at once.
    pub max_connections: usize,
    /// Connections of the host at once; they don't count as guests'.
    pub max_host_connections: usize,
    /// Versions of the bus spoken here.
    pub bus_versions: &'static [u32],
    /// Sessions.
    pub bus: BusRules,
}
