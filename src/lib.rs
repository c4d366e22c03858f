#![forbid(unsafe_code)]
//! castra brings up a handful of throw-away QEMU VMs, knows which of them are really alive,
//! configures them over SSH and reports all of it as one stream of events.
//!
//! Programs that embed it start at [`core::operations`]; docs/LIBRARY.md shows how.

pub mod core;

/// The programs in docs/LIBRARY.md compile.
#[cfg(doctest)]
#[doc = include_str!("../docs/LIBRARY.md")]
struct Manual;
