//! Who is told what happens: the reporter an operation is given, and the emitter its threads
//! share.
//!
//! Here: stamping events and handing each to the reporter and the journal. Not here: rendering
//! (`app`), the journal's files (`core::lines::journal`).

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::core::events::contract::Stamped;
use crate::core::events::{Event, Severity};
use crate::core::host;
use crate::core::id::RunId;
use crate::core::lines::journal::Journal;
use crate::core::time::{LAST_MS, millis, of_unix_ms};

/// Receives the events of one operation, in order. Implemented by embedders and by `app`.
pub trait Reporter: Send {
    /// One event. Called under a lock: return soon.
    fn report(&mut self, event: &Stamped);

    /// The same event, with its contract line where that has been made already: for reporters
    /// that hand on the line.
    fn report_line(&mut self, event: &Stamped, _line: &str) {
        self.report(event);
    }

    /// On whose behalf the operation runs, as `source` of its `command.*` events says.
    fn source(&self) -> &'static str {
        LIBRARY
    }
}

/// The [`Reporter::source`] of a program that embeds castra.
pub const LIBRARY: &str = "library";
/// That of castra's own command line.
pub const COMMAND_LINE: &str = "cli";

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

    fn source(&self) -> &'static str {
        (**self).source()
    }
}

/// Stamps events and hands them on; shared by the threads of one operation.
pub struct Emitter<'a> {
    run: RunId,
    source: &'static str,
    began: Instant,
    sent: AtomicU64,
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

/// Wall clock as RFC 3339 with milliseconds, UTC. A time outside the years 1970 to 9999, which a
/// clock set wrong or a typed time can be, is told as the nearest there is.
pub fn wall_clock(now: SystemTime) -> String {
    let now = now.clamp(UNIX_EPOCH, of_unix_ms(LAST_MS));
    humantime::format_rfc3339_millis(now).to_string()
}

/// An id for a run that begins.
pub fn new_run_id() -> RunId {
    let random = host::random_hex(8);
    random
        .unwrap_or_else(|_| format!("{:016x}", host::boottime().as_nanos()))
        .into()
}

/// What is said about a journal that can't be opened or written, once a run.
pub fn journal_failed(path: &Path, error: &io::Error) -> Event {
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
        Emitter {
            run: new_run_id(),
            source: reporter.source(),
            began: Instant::now(),
            sent: AtomicU64::new(0),
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
    pub fn run(&self) -> &RunId {
        &self.run
    }

    /// On whose behalf it runs.
    pub fn source(&self) -> &'static str {
        self.source
    }

    /// So many bytes more went to a guest: the run's summary adds them up.
    pub fn count_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that went to guests so far.
    pub fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Milliseconds since the run began.
    pub fn elapsed_ms(&self) -> u64 {
        millis(self.began.elapsed())
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
        let notice = journal_failed(journal.path(), &error);
        if !std::mem::replace(&mut inner.said_not_kept, true) {
            let notice = self.stamp(&mut inner, notice);
            inner.reporter.report(&notice);
        }
    }

    /// Hands on an event that somebody else has stamped and kept, with its line as it was kept.
    pub fn forward(&self, stamped: &Stamped, line: &str) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.reporter.report_line(stamped, line);
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

#[cfg(test)]
mod tests {
    use std::fs;

    use std::time::Duration;

    use super::*;
    use crate::core::lines::journal::Rotation;
    use crate::core::scratch::Scratch;

    #[test]
    fn every_clock_has_a_text() {
        assert_eq!(wall_clock(UNIX_EPOCH), "1970-01-01T00:00:00.000Z");
        let second = Duration::from_secs(1);
        assert_eq!(wall_clock(UNIX_EPOCH - second), "1970-01-01T00:00:00.000Z");
        let far = UNIX_EPOCH + Duration::from_secs(1 << 40);
        assert_eq!(wall_clock(far), "9999-12-31T23:59:59.999Z");
    }

    /// The journal's place is taken by a link to the device that is always full.
    #[test]
    fn a_journal_that_cant_be_written_is_spoken_of_once() {
        let scratch = Scratch::new("reporter-full");
        let path = scratch.path("events.jsonl");
        let mut told: Vec<Stamped> = Vec::new();
        let emitter = Emitter::new(&mut told);
        emitter.attach_journal(Journal::open(&path, Rotation::default()).unwrap());
        let say = |text: &str| emitter.emit(Event::message(Severity::Info, None, text));
        say("kept");
        fs::rename(&path, scratch.path("before")).unwrap();
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        say("lost");
        say("lost too");
        fs::remove_file(&path).unwrap();
        fs::rename(scratch.path("before"), &path).unwrap();
        say("kept again");
        drop(emitter);

        let texts = |event: &Event| match event {
            Event::Message { text, severity, .. } => format!("{severity:?} {text}"),
            _ => String::new(),
        };
        let told_texts: Vec<String> = told.iter().map(|stamped| texts(&stamped.event)).collect();
        assert!(
            told_texts[2].starts_with("Warn events can't be kept in "),
            "{told_texts:?}"
        );
        assert_eq!(told_texts[3..], ["Info lost too", "Info kept again"]);
        assert!(told.iter().map(|stamped| stamped.seq).eq(0..5));
        let kept = fs::read_to_string(&path).unwrap();
        let kept: Vec<u64> = kept
            .lines()
            .map(|line| Stamped::from_contract_line(line).unwrap().seq)
            .collect();
        assert_eq!(kept, [0, 4]);
    }
}
