//! VMs at run time: what QEMU is told, how it is started, spoken to and stopped.
//!
//! Here: one module per noun. Not here: images and their digests (`core::images`), what the files a
//! VM leaves behind say about it (`core::status`), or the order in which VMs are brought up
//! (`core::operations`).

pub mod accel;
pub mod again;
pub mod attached;
pub mod binary;
pub mod busy;
pub mod fault;
pub mod launch;
pub mod lost;
pub mod nocloud;
pub mod overlay;
pub mod pause;
pub mod pipe;
pub mod plan;
pub mod ports;
pub mod probe;
pub mod probe_guest;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod resets;
pub mod seed;
pub mod shutdown;
