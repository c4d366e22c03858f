//! What reaches the state and what it asks for: the words between `step` and the outside.
//!
//! Here: inputs, effects, the rules of one broker. Not here: what an input does (the module
//! above), who makes inputs (`broker::listen`, `broker::serve`) or performs effects
//! (`broker::edges`).

use crate::core::broker::guests::GuestTable;
use crate::core::broker::protocol::{DeclineReason, Hello, Refusal};
use crate::core::broker::record::HandshakeRecord;
use crate::core::config::AuthMode;
use crate::core::events::Event;
use crate::core::name::VmName;

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
    /// QEMU let its pid file go.
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
}
