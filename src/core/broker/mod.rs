//! The broker: who shook hands, when, and from where (DESIGN §6).
//!
//! Here: the protocol, the state behind it, its sockets, files and launch, one module each.
//! Not here: what a record means for a VM's state (`core::status`), or who may start a broker
//! when (`core::operations`).

pub mod record;
