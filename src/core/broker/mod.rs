//! The broker: who shook hands, when, and from where (docs/PROTOCOL.md).
//!
//! Here: the protocol, the state behind it, its sockets, files and launch, one module each.
//! Not here: what a record means for a VM's state (`core::status`), or who may start a broker
//! when (`core::operations`).

pub mod attempts;
mod buslog;
mod claim;
mod converse;
mod edges;
pub mod frame;
pub mod guests;
mod lasts;
pub mod launcher;
mod link;
mod listen;
mod marks;
mod outbox;
pub mod process;
pub mod protocol;
mod reboots;
pub mod record;
mod replay;
pub mod serve;
mod signals;
pub mod state;
mod survey;
mod throttle;
mod vms;

pub use launcher::{
    BrokerHandle, BrokerLauncher, BrokerStop, ProcessBrokerLauncher, ThreadBrokerLauncher, ensure_broker,
    find_broker, stop_broker,
};
pub use process::run_process;
pub use serve::{BrokerOptions, Ready, run, run_announced};

pub(crate) use claim::room_for_guests;
