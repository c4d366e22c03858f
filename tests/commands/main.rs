//! Commands of every day, with the real binary and the stand-in for QEMU.
#![allow(clippy::unwrap_used)]

mod bootstrap;
mod clean;
mod console;
mod controls;
mod doctor;
mod logs;
mod nasty;
mod plans;
mod ports;
mod second_name;
#[path = "../support/mod.rs"]
mod support;
