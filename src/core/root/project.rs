//! A project as the files on record tell of it, with what its config declares where that can be read.
//!
//! Here: the shape, and the rule by which a config is still that of a project on record. Not here: reading configs and
//! the register (`core::config`), or what runs of a project (`core::status`, `core::ports`).

use std::path::PathBuf;
use std::time::Duration;

use crate::core::name::VmName;
use crate::core::root::paths::StateRoot;
use crate::core::root::records::{ForwardRecord, LaunchSettings, WorkspaceRecord};

/// The project that a reading command is about.
#[derive(Clone, Debug, PartialEq)]
pub struct Project {
    /// Its name.
    pub project: String,
    /// Its id.
    pub workspace: String,
    /// The config file.
    pub config_path: PathBuf,
    /// Where its state is.
    pub state: StateRoot,
    /// The config's freshness window.
    pub freshness: Duration,
    /// The broker's port, if the config names one.
    pub broker_port: Option<u16>,
    /// The config's VMs in its order; `None`: there is no config to be had.
    pub vms: Option<Vec<Declared>>,
}

/// What the config says about a VM, as far as reading commands show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declared {
    /// The VM.
    pub name: VmName,
    /// The name of its `[[vms]]` entry.
    pub role: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Its forwards, the one to its SSH port among them; host port 0: a free one is chosen at launch.
    pub forwards: Vec<ForwardRecord>,
    /// Settings that its next launch applies.
    pub settings: LaunchSettings,
}

impl WorkspaceRecord {
    /// Whether a config with this id and state root is this project's. A config that was copied to the place of
    /// another project's may well name the same state root.
    pub fn is_of(&self, workspace: &str, state: &StateRoot) -> bool {
        self.id == workspace && self.state_root == state.dir()
    }
}
