//! Who is told what happens: the reporter an operation is given, and the emitter its threads
//! share.
//!
//! Here: stamping events and handing each to the reporter and the journal. Not here: rendering
//! (`app`), the journal's files (`core::journal`).

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use crate::core::events::contract::Stamped;
use crate::core::events::{Event, Severity};
use crate::core::host;
use crate::core::journal::Journal;

/// Receives the events of one operation, in order. Implemented by embedders and by `app`.
pub trait Reporter: Send {
    /// One event. Called under a lock: return soon.
    fn report(&mut self, event: &Stamped);
}

/// A reporter that drops everything.
#[derive(Debug, Default)]
pub struct Silent;

impl Reporter for Silent {
    fn report(&mut self, _event: &Stamped) {}
}

impl Reporter for Vec<Stamped> {
    fn report(&mut self, event: &Stamped) {
        self.push(event.clone());
    }
}

impl<R: Reporter + ?Sized> Reporter for &mut R {
    fn report(&mut self, event: &Stamped) {
        (**self).report(event);
    }
}

/// Stamps events and hands them on; shared by the threads of one operation.
pub struct Emitter<'a> {
    run: String,
    began: Instant,
    inner: Mutex<Inner<'a>>,
}

struct Inner<'a> {
    seq: u64,
    reporter: &'a mut dyn Reporter,
    journal: Option<Journal>,
}

impl fmt::Debug for Emitter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Emitter")
            .field("run", &self.run)
            .finish_non_exhaustive()
    }
}

/// Wall clock as RFC 3339 with milliseconds, UTC.
pub fn wall_clock(now: SystemTime) -> String {
    humantime::format_rfc3339_millis(now).to_string()
}

impl<'a> Emitter<'a> {
    /// An emitter for a new run. Without a journal, events reach the reporter alone.
    pub fn new(reporter: &'a mut dyn Reporter) -> Emitter<'a> {
        let run = host::random_hex(8).unwrap_or_else(|_| format!("{:016x}", host::boottime().as_nanos()));
        Emitter {
            run,
            began: Instant::now(),
            inner: Mutex::new(Inner {
                seq: 0,
                reporter,
                journal: None,
            }),
        }
    }

    /// From now on events are kept in this journal too.
    pub fn attach_journal(&self, journal: Journal) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).journal = Some(journal);
    }

    /// Id of this run.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// Milliseconds since the run began.
    pub fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Tells one fact. A journal that can't be written is reported once and given up; the
    /// operation goes on.
    pub fn emit(&self, event: Event) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let stamped = self.stamp(&mut inner, event);
        inner.reporter.report(&stamped);
        let Some(journal) = inner.journal.as_mut() else {
            return;
        };
        let Err(error) = journal.append(&stamped.contract_line()) else {
            return;
        };
        let text = format!("events can't be kept in {}: {error}", journal.path().display());
        inner.journal = None;
        let notice = self.stamp(
            &mut inner,
            Event::advice(
                Severity::Warn,
                None,
                text,
                "the operation goes on; make the journal writable to keep its history",
            ),
        );
        inner.reporter.report(&notice);
    }

    /// Hands on an event that somebody else has stamped and kept, unchanged.
    pub fn pass_on(&self, stamped: &Stamped) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.reporter.report(stamped);
    }

    fn stamp(&self, inner: &mut Inner<'_>, event: Event) -> Stamped {
        let seq = inner.seq;
        inner.seq += 1;
        Stamped {
            ts: wall_clock(SystemTime::now()),
            offset_ms: self.elapsed_ms(),
            seq,
            run: self.run.clone(),
            event,
        }
    }
}
