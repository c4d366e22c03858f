//! The broker: the host's end of handshake and bus (docs/PROTOCOL.md).
//!
//! Here: the protocol, the state, sockets, files and launch, one module each. Not here: what a
//! record means for a VM's state (`core::status`), which operation starts a broker
//! (`core::operations`).

pub mod attempts;
mod bus_log;
mod byte_scan;
mod connection;
pub mod daemon;
mod effects;
pub mod frame;
pub mod guests;
mod last_values;
pub mod launcher;
mod listen;
mod log_scan;
mod outbox;
pub mod protocol;
mod reboot_watch;
mod replay;
mod resources;
pub mod serve;
mod session_loop;
mod signals;
pub mod state;
mod throttle;
mod vm_watch;

pub use daemon::run_process;
pub use launcher::{
    BrokerHandle, BrokerLauncher, BrokerStop, ProcessBrokerLauncher, ThreadBrokerLauncher, ensure_broker,
    stop_broker,
};
pub use serve::{BrokerOptions, Ready, run_announced};

pub(crate) use resources::guest_capacity;
