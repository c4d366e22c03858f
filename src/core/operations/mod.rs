//! The verbs: one function for each thing castra does, and the way in for programs that embed it.
//!
//! Here: `pub fn NAME(options, reporter) -> Result<outcome, Failure>`, one module each. Not here:
//! how any of it is asked for (`cli`) or shown (`app`).

mod accelerator;
mod boot;
pub mod bootstrap;
pub mod down;
pub mod events;
mod identity;
pub mod image;
pub mod init;
pub mod ports;
mod relay;
mod run;
mod select;
mod start;
pub mod status;
pub mod up;
