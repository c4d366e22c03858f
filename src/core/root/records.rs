//! The small JSON files under a state root through which castra's processes exchange information.
//!
//! Here: their shapes, loading and saving, who writes which. Not here: the handshake records
//! (`core::root::handshake_record`), which are written in place, or what the files mean for a VM's state
//! (`core::status`). Files of a later castra may hold more fields; they are ignored.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::core::events::endings::{BootstrapStatus, OpenEnum};
use crate::core::events::{Accel, BootstrapPlanSsh, Protocol};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::id::{BootId, LaunchId, RunId};
use crate::core::name::VmName;

/// `workspace.json`: by it `--workspace` and `--all` find projects. Written by operations that
/// change something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkspaceRecord {
    /// `<slug>-<hash8>`.
    pub id: String,
    /// The project's name.
    pub project: String,
    /// The config file, canonical.
    pub config_path: PathBuf,
    /// The state root.
    pub state_root: PathBuf,
    /// State roots that the project had before its `state_dir` was changed, as long as they exist.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former_roots: Vec<PathBuf>,
    /// The castra that wrote it.
    pub version: String,
}

/// `vms/<vm>/run.json`: the last launch of a VM. Written before QEMU starts and again when it
/// answers, by the launcher; `bootstrap` by the bootstrap. Both hold the VM's lock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The VM.
    pub vm: VmName,
    /// The name of its `[[vms]]` entry.
    pub role: String,
    /// Id of this launch; `guests.json` and `stop.json` name it too.
    pub launch_id: LaunchId,
    /// How far the launch got.
    pub phase: RunPhase,
    /// CLOCK_BOOTTIME of the launch, ms.
    pub launched_boottime_ms: u64,
    /// Wall clock of the launch, RFC 3339.
    pub launched_at: String,
    /// The host boot it happened in.
    pub boot_id: BootId,
    /// The accelerator in use.
    pub accel: Accel,
    /// Why this one.
    pub accel_reason: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Forwards as allocated, the one to the guest's port 22 among them.
    pub forwards: Vec<ForwardRecord>,
    /// How `ssh` reaches it.
    pub ssh: BootstrapPlanSsh,
    /// Its overlay, if it has a disk.
    pub overlay: Option<PathBuf>,
    /// The overlay survives `down`.
    pub persist: bool,
    /// The base image under its overlay as it was when the overlay was made. Absent: it has none, or
    /// an earlier castra made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseRecord>,
    /// Last bootstrap of this launch.
    #[serde(default)]
    pub bootstrap: Option<BootstrapRecord>,
    /// The settings that this launch applied; none from an earlier version.
    #[serde(default)]
    pub settings: LaunchSettings,
}

/// Values by the names of their settings.
pub type LaunchSettings = BTreeMap<String, Value>;

/// A base image in the state that a layer was made over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseRecord {
    /// The file.
    pub path: PathBuf,
    /// Its state.
    #[serde(flatten)]
    pub stamp: Stamp,
    /// Its SHA-256, if that was known then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Its SHA-512, if that was known then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha512: Option<String>,
}

/// What tells whether a file has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    size: u64,
    mtime: i64,
    mtime_nsec: i64,
    device: u64,
    inode: u64,
}

impl Stamp {
    /// The state of the file that this was read from.
    pub fn of(meta: &Metadata) -> Stamp {
        Stamp {
            size: meta.len(),
            mtime: meta.mtime(),
            mtime_nsec: meta.mtime_nsec(),
            device: meta.dev(),
            inode: meta.ino(),
        }
    }
}

/// How far a launch got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunPhase {
    /// QEMU has not answered yet; counts only while the VM's lock is held.
    Starting,
    /// QMP has answered.
    Running,
}

/// The guest's SSH port: every VM has a forward to it.
pub const SSH_PORT: u16 = 22;

/// One forward as allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardRecord {
    /// Port on the host's loopback.
    pub host: u16,
    /// Port in the guest.
    pub guest: u16,
    /// Transport.
    pub protocol: Protocol,
}

impl ForwardRecord {
    /// Whether it leads to the guest's SSH server.
    pub fn is_ssh(&self) -> bool {
        leads_to_ssh(self.guest, self.protocol)
    }
}

/// Whether a forward to this port of a guest leads to its SSH server.
pub fn leads_to_ssh(guest: u16, protocol: Protocol) -> bool {
    guest == SSH_PORT && protocol == Protocol::Tcp
}

/// The host port that leads to the guest's SSH server.
pub fn ssh_port(forwards: &[ForwardRecord]) -> Option<u16> {
    let to_ssh = forwards.iter().find(|forward| forward.is_ssh());
    to_ssh.map(|forward| forward.host)
}

/// Outcome of a bootstrap as `status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootstrapRecord {
    /// How it stands or ended.
    pub status: OpenEnum<BootstrapStatus>,
    /// The script declared that there was nothing to change.
    pub noop: bool,
    /// How long it took; null while it runs.
    pub duration_ms: Option<u64>,
}

/// `vms/<vm>/stop.json`: somebody asked this launch to stop. Written by `down` and `restart` alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopRecord {
    /// The launch it is about.
    pub launch_id: LaunchId,
    /// Who asked: command and pid.
    pub by: String,
    /// Wall clock, RFC 3339.
    pub at: String,
}

/// `guests.json`: the guests that the broker may expect. Replaced by `up` before each launch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestsRecord {
    /// Every VM of the project.
    pub guests: Vec<GuestRecord>,
}

/// One VM in `guests.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRecord {
    /// The VM.
    pub name: VmName,
    /// Its second name, if it has one: it may use that in its hello, and it is a topic of the bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_name: Option<VmName>,
    /// Its current launch; null if it never ran, or ran before `up --broker-only` and no more.
    pub launch_id: Option<LaunchId>,
    /// CLOCK_BOOTTIME of that launch, ms; without one, of the end of the last: what was heard before
    /// it doesn't count.
    pub launched_boottime_ms: Option<u64>,
    /// The host boot of that launch.
    pub boot_id: Option<BootId>,
    /// SHA-256 of the token it was given, lower-case hex; null: it has none.
    pub token_sha256: Option<String>,
    /// castra launches this project's VMs itself and hasn't launched this one, so a hello in its
    /// name is declined. `up --broker-only` opens what `up` has closed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub closed: bool,
}

/// `broker.json`: written by the broker, removed by `clean` alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerRecord {
    /// The TCP port on 127.0.0.1; kept while any VM of the project runs.
    pub port: u16,
    /// Id of the broker's run.
    pub run: RunId,
    /// CLOCK_BOOTTIME of its start, ms.
    pub started_boottime_ms: u64,
    /// Wall clock of its start, RFC 3339.
    pub started_at: String,
    /// The host boot it started in.
    pub boot_id: BootId,
    /// The last stop was an orderly one.
    pub clean_stop: bool,
    /// It is a thread of an embedding process: only its embedder ends it.
    #[serde(default)]
    pub embedded: bool,
    /// The freshness window in force, ms.
    pub freshness_window_ms: u64,
    /// The last number of the bus when its log was last rotated or the broker stopped, in case
    /// no line of the log tells it any more.
    #[serde(default)]
    pub bus_seq: u64,
}

/// Loads a record; `None` if there is no such file. A file that isn't what it should be is a
/// failure that names it.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let bytes = match host::read_state_file(path) {
        Ok(bytes) => bytes,
        Err(error) if host::is_absent_error(&error) => return Ok(None),
        Err(error) => return Err(Failure::io("read", path, &error)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| {
        Failure::new(Exit::Io, format!("can't understand {}", path.display()))
            .because(error)
            .advice("castra wrote that file, and something has changed it: put it back as it was, or move it away")
    })
}

/// Saves a record, whole or not at all, mode 0600.
pub fn save<T: Serialize>(path: &Path, record: &T) -> Result<()> {
    // The one thing that JSON can't hold is a path that is no UTF-8.
    let mut bytes = serde_json::to_vec_pretty(record).map_err(|error| {
        Failure::new(Exit::CantCreate, format!("can't write {}", path.display())).because(error)
    })?;
    bytes.push(b'\n');
    host::replace_file(path, &bytes).map_err(|error| Failure::io("create", path, &error))
}
