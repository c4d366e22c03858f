//! Faults and bad input, with the real binary: each ends in a clear error or a sane result, with
//! the documented exit code and nothing half-done left unreported.
//!
//! QEMU is a stand-in that fails on demand, so no guest boots here; `tests/guests.rs` has those.
#![allow(clippy::unwrap_used)]

mod exhausted;
mod fleets;
mod hidden;
mod input;
mod killed;
mod launching;
mod leftovers;
mod paused;
mod racing;
mod reboots;
mod restarting;
mod roots;
mod stale;
#[path = "../support/mod.rs"]
mod support;
mod waiting;
