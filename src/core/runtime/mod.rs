//! VMs at run time: what QEMU is told, how it is started, spoken to and stopped.
//!
//! Here: one module per noun. Not here: images and their digests (`core::images`), what the files a
//! VM leaves behind say about it (`core::status`), or the order in which VMs are brought up
//! (`core::operations`).

pub mod accel;
pub mod attached;
pub mod binary;
pub mod broker_pipe;
pub mod cpu_load;
pub mod fault;
pub mod forwards;
pub mod launch;
pub mod launch_plan;
pub mod lost;
pub mod nocloud;
pub mod overlay;
pub mod pause;
pub mod probe;
pub mod probe_guest;
pub mod qemu;
pub mod qmp;
pub mod resets;
pub mod restart_advice;
pub mod seed;
pub mod shutdown;
