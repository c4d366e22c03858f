//! What the tests share; each test crate says `mod support;` and nothing more.
//!
//! Here: fresh directories, waiting, golden files, and in the modules below the real binary, a
//! project on the stand-in for QEMU, brokers, sessions, an sshd, the scripts of guests.
//! Not here: what one suite alone needs.
// No suite uses all of it.
#![allow(dead_code, unused_imports, clippy::unwrap_used)]

pub mod broker;
pub mod castra;
pub mod fleet;
pub mod guest_project;
pub mod guest_scripts;
pub mod journals;
pub mod project;
pub mod session;
pub mod sshd;

// Unit tests have these two as well.
#[path = "../../src/core/golden.rs"]
mod golden_file;
#[path = "../../src/core/scratch.rs"]
pub mod scratch;

use std::thread;
use std::time::{Duration, Instant};

pub use castra::{Castra, Ran};
pub use golden_file::check as golden;
pub use scratch::Scratch;

/// Waits for something to be so, and fails naming it.
#[track_caller]
pub fn eventually<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + limit;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < until, "waited {limit:?} in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
