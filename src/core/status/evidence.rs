//! What a status is concluded from: everything that was found on disk, unjudged.
//!
//! Here: plain data. Not here: how it is gathered ([`super::read`]) or what it means
//! ([`super::assemble`]).

use crate::core::id::{BootId, RunId};
use crate::core::name::VmName;
use crate::core::root::ending::Ending;
use crate::core::root::handshake_record::RecordRead;
use crate::core::root::project::{Declared, Project};
use crate::core::root::records::{BrokerRecord, GuestsRecord, RunRecord, StopRecord};
use crate::core::runtime::pause::Pause;
use crate::core::runtime::resets::Resets;

/// A small JSON file, as it was found.
#[derive(Clone, Debug, PartialEq)]
pub enum Loaded<T> {
    /// There is none.
    Absent,
    /// It says this.
    Value(T),
    /// There is one, but it can't be read; why, naming the file.
    Unreadable(String),
}

impl<T> Loaded<T> {
    /// What it says, if it says anything.
    pub fn known(&self) -> Option<&T> {
        match self {
            Loaded::Value(value) => Some(value),
            Loaded::Absent | Loaded::Unreadable(_) => None,
        }
    }
}

/// All evidence on one project.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// The project.
    pub project: Project,
    /// The clocks, read last, so that no record is younger than now.
    pub now: Now,
    /// Pid and run id of whoever holds `broker.pid`; `None`: nobody.
    pub live_broker: Option<(u32, RunId)>,
    /// `broker.json`, whether or not a broker runs.
    pub broker: Loaded<BrokerRecord>,
    /// `guests.json`; asked only where a broker or a VM runs whose `run.json` says nothing.
    pub guests: Loaded<GuestsRecord>,
    /// The VMs, in the order they are shown.
    pub vms: Vec<VmEvidence>,
}

/// One moment on the clocks that matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Now {
    /// CLOCK_BOOTTIME, ms.
    pub boottime_ms: u64,
    /// The host boot.
    pub boot_id: BootId,
    /// Wall clock, ms since 1970. Used only for what an earlier host boot has left.
    pub wall_ms: u64,
}

/// All evidence on one VM.
#[derive(Clone, Debug, PartialEq)]
pub struct VmEvidence {
    /// The VM.
    pub name: VmName,
    /// What the config says; `None`: it doesn't name this VM.
    pub declared: Option<Declared>,
    /// Which process holds the record lock on `qemu.pid`. Asked first.
    pub qemu: Option<u32>,
    /// `run.json`.
    pub run: Loaded<RunRecord>,
    /// `stop.json`, of whatever launch.
    pub stop: Loaded<StopRecord>,
    /// Somebody holds the VM's lock. Asked only where it decides something.
    pub lock_held: bool,
    /// The handshake record.
    pub record: RecordRead,
    /// Why QEMU executes nothing. Asked only of VMs that run.
    pub pause: Option<Pause>,
    /// How often its guest has begun anew. Asked only of VMs that run.
    pub resets: Option<Resets>,
    /// How QEMU's log and the console say it ended. Asked only of VMs that don't run.
    pub ending: Option<Ending>,
    /// Its pid file doesn't lead to its QEMU, which was found among all processes; what became of
    /// its state root.
    pub lost: Option<String>,
}
