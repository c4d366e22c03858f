//! The bus as its clients see it: messages with a topic and any JSON, in one order, kept in a log
//! (docs/PROTOCOL.md).
//!
//! Here: messages, topics, the frames of a client, a client of the broker's host socket, and
//! reading the logs. Not here: the broker that delivers and keeps messages (`core::broker`), or
//! what `castra bus …` does with them (`core::operations::bus`).

pub mod client;
pub mod client_frame;
pub mod error;
mod greeting;
pub mod line;
pub mod log;
pub mod message;
pub mod topic;

pub use client::Client;
pub use error::BusError;
pub use message::Message;
