//! Files of lines that are rotated by size: written by several processes, read while they grow.
//!
//! Here: appending and rotation (`journal`), one file by position (`line_file`), a log with its rotated
//! files (`rotated_log`). Not here: what a line says.

pub mod journal;
pub(crate) mod line_file;
pub(crate) mod rotated_log;
