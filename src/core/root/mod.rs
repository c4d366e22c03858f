//! What lies under a state root: where each file is, what it looks like, and its one reader.
//!
//! Here: paths, the small JSON records, handshake records and what they prove, run logs of bootstraps, how a launch
//! ended, who lives, the project on record, and QEMU as a process. Not here: what any of it means for a VM
//! (`core::status`), or when it is written.

pub mod alive;
pub mod ending;
pub mod freshness;
pub mod handshake_record;
pub mod paths;
pub mod project;
pub mod qemu_process;
pub mod records;
pub mod run_log;
