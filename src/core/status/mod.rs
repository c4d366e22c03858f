//! The status contract: which VMs run and which guests are really there (docs/STATUS.md).
//!
//! Here: the object that `castra status --json` prints and embedders get, field by field; in the
//! submodules the evidence it comes from ([`evidence`]), how that is read from disk ([`read`]) and
//! what it means ([`assemble`], a pure function). Not here: waiting for a broker just started or
//! the list of all projects (`core::operations::status`), or the table for people
//! (`app::status`).
//!
//! Status reads a few small files and asks the kernel who holds their locks. It takes no lock,
//! writes nothing, never talks to the broker and so can't hang.

pub mod assemble;
pub mod evidence;
pub mod read;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use crate::core::events::{Accel, BootstrapPlanSsh};
use crate::core::name::VmName;
pub use crate::core::root::ending::{EndedStatus, VmState};
pub use crate::core::root::records::{BootstrapRecord, ForwardRecord};

/// The value of [`StatusOutcome::schema`].
pub const SCHEMA: &str = "castra.status.v1";

/// What is known of one project, from evidence, at one moment. Ages and durations are
/// milliseconds, memory is bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusOutcome {
    /// Always [`SCHEMA`]; fields are only ever added under this name.
    pub schema: String,
    /// The project's name.
    pub project: String,
    /// The project's id, `<slug>-<hash8>`: what `--workspace` takes.
    pub workspace: String,
    /// The config file, canonical. It may have been moved or removed since.
    pub config_path: PathBuf,
    /// Where the project's state is kept.
    pub state_root: PathBuf,
    /// The broker.
    pub broker: BrokerStatus,
    /// What the running VMs run under; `tcg` if only one of them does. Null: none runs.
    pub accel: Option<Accel>,
    /// At least one VM is reachable.
    pub reachable: bool,
    /// There are VMs, and each of them is reachable.
    #[serde(default)]
    pub all_reachable: bool,
    /// The VM whose proof of life is the youngest. Null: none was ever heard.
    pub last_handshake_vm: Option<VmName>,
    /// Age of that proof of life, ms. Null: none was ever heard.
    pub last_handshake_age_ms: Option<u64>,
    /// How old proof of life may be to count, ms: the running broker's window, else the config's.
    pub freshness_window_ms: u64,
    /// The config's VMs in its order, then running ones it no longer names; without a config
    /// those that were ever launched, by name.
    pub vms: Vec<VmStatus>,
    /// What could not be read and therefore isn't in the fields above. Not part of the JSON:
    /// the operation reports each as a `message` event.
    #[serde(skip)]
    pub notes: Vec<Note>,
}

/// The broker of a project.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerStatus {
    /// Whether it runs.
    pub state: BrokerState,
    /// Its process. Null: offline.
    pub pid: Option<u32>,
    /// Its TCP port on 127.0.0.1. Null: offline, or it has only just started and not yet said.
    pub port: Option<u16>,
}

/// Whether a broker runs: whether somebody holds the lock on `broker.pid`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BrokerState {
    /// It runs.
    Running,
    /// None does.
    Offline,
}

/// One VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name.
    pub name: VmName,
    /// The name of its `[[vms]]` entry.
    pub role: String,
    /// What its process does.
    pub state: VmState,
    /// The QEMU process. Null: there is none.
    pub pid: Option<u32>,
    /// Virtual CPUs of the last launch; the config's if it never ran. Null: neither can be read.
    pub cpus: Option<u32>,
    /// Memory of the last launch, bytes; the config's if it never ran. Null: neither can be read.
    pub memory_bytes: Option<u64>,
    /// Time since its launch, ms. Null: QEMU doesn't run.
    pub uptime_ms: Option<u64>,
    /// What the broker knows of it.
    pub broker: GuestState,
    /// Exactly `last_handshake_age_ms <= freshness_window_ms` while the broker and QEMU run, or the
    /// VM is `external`.
    pub reachable: bool,
    /// Age of the newest proof of life, ms: the last accepted hello or the last frame of an open
    /// session. It grows on when guest, VM or broker are gone. Null: this launch was never heard.
    pub last_handshake_age_ms: Option<u64>,
    /// What its last accepted hello offered, sorted, without repeats.
    pub capabilities: Vec<String>,
    /// It has an open bus session.
    pub bus_session: bool,
    /// One of its sessions has a subscription.
    pub bus_subscribed: bool,
    /// Age of its last accepted publish, ms. Null: none.
    pub last_publish_age_ms: Option<u64>,
    /// Age of its last heartbeat, ms. Null: none.
    pub last_heartbeat_age_ms: Option<u64>,
    /// How far it says it is: the number of its last `ack`. Null: it never said.
    pub last_acked_seq: Option<u64>,
    /// Payload of its last heartbeat that had one of at most 512 bytes: the guest's own words,
    /// any JSON. Null: none.
    pub guest_metrics: Option<Value>,
    /// Ports of the host's loopback that lead into it. Empty while it doesn't run.
    pub forwards: Vec<ForwardRecord>,
    /// How `ssh` reaches it. Null while it doesn't run.
    pub ssh: Option<BootstrapPlanSsh>,
    /// Last bootstrap of its last launch. Null: none.
    pub bootstrap: Option<BootstrapRecord>,
    /// How its last launch ended. Null: it runs, or never did.
    pub ended: Option<EndedStatus>,
    /// Why QEMU, which runs, executes nothing of it. Null: it does, or QEMU doesn't run.
    #[serde(default)]
    pub paused: Option<PausedStatus>,
    /// How often its guest has begun since its launch, reboots included. Null: QEMU doesn't run.
    #[serde(default)]
    pub boots: Option<u64>,
    /// When it was reset last, RFC 3339. Null: never since its launch, or QEMU doesn't run.
    #[serde(default)]
    pub last_reset: Option<String>,
    /// Settings in which it runs otherwise than the config says, by name: they take a restart. Empty
    /// while it doesn't run, and for a VM that the config doesn't name.
    #[serde(default)]
    pub stale_config: Vec<String>,
    /// What became of the state root under which its QEMU runs on; castra reaches it no more, and
    /// `castra down` ends it. Null: nothing happened to that.
    #[serde(default)]
    pub lost: Option<String>,
}

/// What the broker knows of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestState {
    /// No broker runs.
    Offline,
    /// A broker runs, but there is no fresh proof of life.
    Waiting,
    /// Fresh proof of life, and QEMU runs, castra's or somebody else's.
    Reachable,
}

impl GuestState {
    /// The word in JSON and table.
    pub fn as_str(self) -> &'static str {
        match self {
            GuestState::Offline => "offline",
            GuestState::Waiting => "waiting",
            GuestState::Reachable => "reachable",
        }
    }
}

/// Why a guest isn't executed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PausedStatus {
    /// QEMU's word for it: `io-error`, `paused`, `internal-error`, `guest-panicked`, `prelaunch`, …
    pub reason: String,
    /// Wall clock, RFC 3339. Null: QEMU didn't say.
    pub at: Option<String>,
    /// What it means. Null: castra doesn't know.
    pub detail: Option<String>,
    /// What to do about it.
    pub remediation: String,
}

/// Something `status` could not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// The VM it is about.
    pub vm: Option<VmName>,
    /// What happened to which file.
    pub text: String,
    /// What to do about it.
    pub advice: Option<String>,
}
