//! What castra is: it decides and does. `core` never prints, never reads argv and never exits.
//!
//! Here: the nouns of the domain, one module each. Not here: the command line (`cli`) and text
//! for people (`app`).

pub mod arch;
pub mod bootstrap;
pub mod broker;
pub mod bus;
pub mod cancel;
pub mod clean;
pub mod config;
pub mod console;
pub mod copy;
pub mod diagnostics;
pub mod doctor;
pub mod escape;
pub mod events;
pub mod failure;
#[cfg(test)]
pub(crate) mod golden;
pub mod harness;
pub mod host;
pub mod human;
pub mod id;
pub mod images;
pub mod lines;
pub mod logs;
pub mod name;
pub mod nearest;
pub mod operations;
pub mod outcome;
pub mod ports;
pub mod process;
pub mod report;
pub mod reporter;
pub mod root;
pub mod runtime;
#[cfg(test)]
pub(crate) mod scratch;
pub mod status;
pub mod threads;
pub mod time;
