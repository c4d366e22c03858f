//! A report: what the last runs of a project did, VM by VM, and what went over the bus meanwhile.
//!
//! Here: the model ([`model`]), where it comes from ([`gather`]: journals, run logs, the log of the
//! bus), and two ways to show it: a page for a browser ([`html`]) and text ([`text`]). Not here:
//! which project and how many runs (`core::operations::report`), or where it is printed (`app`).
//!
//! Everything in the sources was said by guests and scripts, so every text is cut to a length and
//! passes through `markup::escape` on its way to the page; every list has a most, and what was left
//! out is counted in the model and told by both.

mod chart;
mod from_events;
pub mod gather;
pub mod html;
mod log_tails;
mod markup;
pub mod model;
mod run_section;
mod scale;
mod symbols;
pub mod text;
mod timeline;
mod traffic;
mod units;
mod vm_history;

/// Runs in one report, at most: a page of more is slow to open and nobody reads it.
pub const MAX_RUNS: usize = 100;
/// VMs of one run that are shown one by one; failed ones come first.
const MAX_VMS: usize = 100;
/// VMs of all runs of one report that are shown one by one: about two megabytes of page.
const MAX_VMS_IN_ALL: usize = 500;
/// Phases and marks of one VM in one run: a bootstrap has ten phases, a stubborn shutdown four.
const MAX_PHASES: usize = 40;
/// Messages of one run that are shown: what went wrong says itself in the first few.
const MAX_NOTES: usize = 20;
/// Lines of a log that are shown with a failure.
const MAX_LINES: usize = 40;
/// A longer line or text is cut there, bytes.
const MAX_TEXT_BYTES: usize = 600;
/// Senders whose traffic is told apart; the others are added up.
const MAX_SENDERS: usize = 8;
/// Points of one traffic curve: a curve is about so many pixels wide.
const MAX_POINTS: usize = 240;
/// Bytes of the bus's logs that are read for one report, the newest: about a second of work.
const MAX_BUS_BYTES: u64 = 512 * 1024 * 1024;
