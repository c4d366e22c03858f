//! The inputs of a bootstrap.
//!
//! Here: the VM and its launch, the reporter, what ends it early, and the hashes to compute. Not here: the
//! steps (`bootstrap::pipeline`), or who puts this together (`core::operations::fleet`).

use std::sync::Mutex;

use crate::core::cancel::Cancel;
use crate::core::config::{Config, VmConfig};
use crate::core::failure::Result;
use crate::core::id::LaunchId;
use crate::core::reporter::Emitter;

/// The inputs of a bootstrap. The caller holds the VM's lock from before until after.
pub struct Context<'a, 'e> {
    /// The VM.
    pub vm: &'a VmConfig,
    /// Its project.
    pub config: &'a Config,
    /// The VM's launch.
    pub launch: Launch,
    /// The broker as this guest reaches it, for `CASTRA_BROKER`.
    pub broker_address: Option<String>,
    /// Gets the events.
    pub emitter: &'a Emitter<'e>,
    /// Raised to stop early.
    pub cancel: &'a Cancel,
    /// `base_hash`, computed in a thread while the guest boots.
    pub base_hash: HashJob<'a>,
    /// `artifact_hash`, likewise.
    pub artifact_hash: HashJob<'a>,
    /// Tells why QEMU ended; called once it has.
    pub why_ended: &'a (dyn Fn() -> String + Sync),
    /// Called at the first proof of life, when another VM may be launched.
    pub on_alive: &'a (dyn Fn() + Sync),
}

/// A hash to compute in a thread of its own; taken out of the context when it runs.
pub type HashJob<'a> = Mutex<Option<Box<dyn FnOnce() -> Result<String> + Send + 'a>>>;

/// The launch a bootstrap belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Its id, as in `run.json`.
    pub launch_id: LaunchId,
    /// Its time, CLOCK_BOOTTIME ms.
    pub launched_boottime_ms: u64,
    /// This operation launched it; otherwise it was found running.
    pub started_now: bool,
}
