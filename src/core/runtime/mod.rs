//! VMs at run time.
//!
//! Here: what a launch needs on disk. Not here: images and their digests (`core::images`).

pub mod overlay;
