//! The bootstrap: configuring a guest over SSH once it is reachable (docs/BOOTSTRAP.md).
//!
//! Here: the plan, the pipeline with its eight steps, the one SSH connection they share, the run
//! log. Not here: starting VMs (`core::runtime`), in which order and how many at once
//! (`core::operations`), or the broker whose records the first step reads (`core::broker`).

mod announce;
pub mod archive;
pub mod banner;
pub mod bootstrap_plan;
pub mod bounded_lines;
pub mod context;
pub mod guest_scripts;
pub mod keys;
mod mounts;
pub mod overrides;
pub mod pipeline;
mod result;
pub mod ssh;
mod step_failure;
mod steps;
mod transfer;
mod vizier;
mod vizier_remote;
pub(crate) mod wait_for_guest;
mod watch;
