//! The bootstrap: configuring a guest over SSH once it is reachable (docs/BOOTSTRAP.md).
//!
//! Here: the plan, the pipeline with its eight steps, the one SSH connection they share, the run
//! log. Not here: starting VMs (`core::runtime`), in which order and how many at once
//! (`core::operations`), or the broker whose records the first step reads (`core::broker`).

mod announce;
pub mod archive;
pub mod banner;
pub mod keys;
pub mod lines;
mod mounts;
mod outcome;
pub mod overrides;
pub mod pipeline;
pub mod plan;
pub mod remote;
pub mod runlog;
pub mod ssh;
mod steps;
mod transfer;
mod trouble;
mod vizier;
mod vizier_remote;
pub(crate) mod wait;
mod watch;
