//! Files of lines that are rotated by size: written by several processes, read while they grow.
//!
//! Here: appending and rotation (`journal`), one file by position (`segment`), a file with its rotated ones
//! (`trail`). Not here: what a line says.

pub mod journal;
pub(crate) mod segment;
pub(crate) mod trail;
