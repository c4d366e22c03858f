//! The broker: who shook hands, when, and from where (DESIGN §6).
//!
//! Here: the protocol, the state behind it, its sockets, files and launch, one module each.
//! Not here: what a record means for a VM's state (`core::status`), or who may start a broker
//! when (`core::operations`).

pub mod attempts;
mod claim;
mod edges;
pub mod guests;
pub mod launcher;
mod link;
mod listen;
pub mod process;
pub mod protocol;
pub mod record;
pub mod serve;
mod signals;
pub mod state;

pub use launcher::{
    BrokerHandle, BrokerLauncher, BrokerStop, ProcessBrokerLauncher, ThreadBrokerLauncher, ensure_broker,
    find_broker, stop_broker,
};
pub use process::run_process;
pub use serve::{BrokerOptions, Ready, run, run_announced};
