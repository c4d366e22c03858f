//! Who is told what happens: the reporter an operation is given, and the emitter its threads
//! share.
//!
//! Here: stamping events and handing each to the reporter and the journal. Not here: rendering
//! (`app`), the journal's files (`core::journal`).

use std::fmt;
use std::io;
use std::path::Path;
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

    /// The same event, with its contract line where that has been made already: for reporters
    /// that hand on the line.
    fn report_line(&mut self, event: &Stamped, _line: &str) {
        self.report(event);
    }
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

    fn report_line(&mut self, event: &Stamped, line: &str) {
        (**self).report_line(event, line);
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
    said_not_kept: bool,
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

/// What is said about a journal that can't be opened or written, once a run.
pub fn not_kept(path: &Path, error: &io::Error) -> Event {
    Event::advice(
        Severity::Warn,
        None,
        format!("events can't be kept in {}: {error}", path.display()),
        "the operation goes on; make the journal writable to keep its history",
    )
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
                said_not_kept: false,
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

    /// Tells one fact: kept first, so that whoever hears of it finds it in the journal. A journal
    /// that can't be written is spoken of once; the operation goes on, and so do the tries: when a
    /// disk was full for a while, only the lines of that while are missing.
    pub fn emit(&self, event: Event) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let stamped = self.stamp(&mut inner, event);
        let Inner {
            reporter, journal, ..
        } = &mut *inner;
        let Some(journal) = journal else {
            reporter.report(&stamped);
            return;
        };
        let line = stamped.contract_line();
        let kept = journal.append(&line);
        reporter.report_line(&stamped, &line);
        let Err(error) = kept else {
            return;
        };
        let notice = not_kept(journal.path(), &error);
        if !std::mem::replace(&mut inner.said_not_kept, true) {
            let notice = self.stamp(&mut inner, notice);
            inner.reporter.report(&notice);
        }
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
