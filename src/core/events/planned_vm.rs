//! A VM as it would be launched, as `--plan` shows it.
//!
//! Here: its fields. Not here: how they are found (`core::operations::fleet::vm_check`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::core::events::Protocol;

/// One VM as it would be launched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmPlan {
    /// It runs already, so `up` doesn't launch it; what follows is what castra.toml says.
    pub running: bool,
    /// What it boots: `default guest`, a file, an address, or `none` (an empty disk).
    pub image: String,
    /// The image has to be built or fetched first.
    pub pending: bool,
    /// Direct kernel boot.
    pub kernel: Option<PathBuf>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Size of its disk, bytes; null while the image is pending.
    pub disk_bytes: Option<u64>,
    /// The disk survives `down`.
    pub persist: bool,
    /// `user` or `isolated`.
    pub network: String,
    /// Forwards; `host` is null where a free port is chosen at launch.
    pub forwards: Vec<PlannedForward>,
    /// Shared folders.
    pub mounts: Vec<PlannedMount>,
}

/// A forward of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedForward {
    /// The port of the host's loopback.
    pub host: Option<u16>,
    /// The guest's port.
    pub guest: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

/// A shared folder of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedMount {
    /// On the host.
    pub host: PathBuf,
    /// In the guest.
    pub guest: String,
    /// The guest can't write.
    pub readonly: bool,
}
