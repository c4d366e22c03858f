//! `logs`: the last lines of a project's logs, and what is added to them.
//!
//! Here: which logs, since when, how many lines, waiting for more. Not here: reading one
//! (`core::logs::text_log`, `core::logs::bootstrap_log`, `core::bus::log`), or showing a line (`app`). A
//! reading command: it writes nothing.

use std::time::{Duration, Instant, SystemTime};

use crate::core::bus::log::LogReader;
use crate::core::cancel::Cancel;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::logs::bootstrap_log::BootstrapLog;
use crate::core::logs::text_log::TextLog;
use crate::core::logs::{self, Log, LogLine, Source};
use crate::core::name::VmName;
use crate::core::reporter::wall_clock;
use crate::core::root::paths::StateRoot;
use crate::core::time::{LAST_MS, of_unix_ms};

/// How many last lines of each log are shown by default.
pub const DEFAULT_TAIL: usize = 50;
/// How often new lines are looked for. For an unchanged log that costs one system call.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How often logs of newly launched VMs are looked for.
const LIST_INTERVAL: Duration = Duration::from_secs(1);

/// Which lines are wanted.
#[derive(Clone, Debug)]
pub struct LogsOptions {
    /// Whose logs.
    pub state: StateRoot,
    /// VMs, compared without case; none: all that were ever launched, the broker and the bus.
    pub vms: Vec<String>,
    /// Names that count although they were never launched.
    pub known: Vec<VmName>,
    /// Sources; none: all.
    pub sources: Vec<Source>,
    /// How many last lines of each log; unset: 50, all with `since`.
    pub tail: Option<usize>,
    /// Only lines from this time on. A log without times in its lines is shown whole if it was written since,
    /// else not at all.
    pub since: Option<SystemTime>,
    /// Wait for more.
    pub follow: bool,
    /// Ends the wait.
    pub cancel: Cancel,
}

impl LogsOptions {
    /// The last lines of every log of a project.
    pub fn of(state: StateRoot) -> LogsOptions {
        LogsOptions {
            state,
            vms: Vec::new(),
            known: Vec::new(),
            sources: Vec::new(),
            tail: None,
            since: None,
            follow: false,
            cancel: Cancel::new(),
        }
    }
}

/// What the caller gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogsItem {
    /// A line.
    Line(LogLine),
    /// No more lines for now.
    CaughtUp,
}

/// Counts of the lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogsOutcome {
    /// Lines.
    pub told: u64,
}

/// Passes on the last lines of each log, log by log, and with `follow` new lines as they come, until `take`
/// returns false or the operation is stopped.
pub fn logs(options: &LogsOptions, mut take: impl FnMut(LogsItem) -> bool) -> Result<LogsOutcome> {
    let mut outcome = LogsOutcome::default();
    let mut streams = Vec::new();
    // A log may be long, and a line of it longer than anybody waits.
    let mut take = |told| !options.cancel.is_requested() && take(told);
    let stopped = |failure: &Failure| failure.exit == Exit::Io && options.cancel.is_requested();
    for log in list(options)? {
        let mut stream = Stream::of(log, &options.cancel);
        match stream.history(options, &mut |line| tell(&mut take, &mut outcome, line)) {
            Ok(true) => {}
            Ok(false) => return Ok(outcome),
            Err(failure) if stopped(&failure) => return Ok(outcome),
            Err(failure) => return Err(failure),
        }
        streams.push(stream);
    }
    if !take(LogsItem::CaughtUp) || !options.follow {
        return Ok(outcome);
    }
    let mut listed = Instant::now();
    while !options.cancel.pause(POLL_INTERVAL) {
        if listed.elapsed() >= LIST_INTERVAL {
            listed = Instant::now();
            for log in list(options)? {
                if !streams.iter().any(|stream| stream.log == log) {
                    streams.push(Stream::of(log, &options.cancel));
                }
            }
        }
        for stream in &mut streams {
            match stream.more(&mut |line| tell(&mut take, &mut outcome, line)) {
                Ok(true) => {}
                Ok(false) => return Ok(outcome),
                Err(failure) if stopped(&failure) => return Ok(outcome),
                Err(failure) => return Err(failure),
            }
        }
        if !take(LogsItem::CaughtUp) {
            return Ok(outcome);
        }
    }
    Ok(outcome)
}

fn tell(take: &mut impl FnMut(LogsItem) -> bool, outcome: &mut LogsOutcome, line: LogLine) -> bool {
    outcome.told += 1;
    take(LogsItem::Line(line))
}

fn list(options: &LogsOptions) -> Result<Vec<Log>> {
    logs::logs(&options.state, &options.vms, &options.sources, &options.known)
}

/// One log being read.
struct Stream {
    log: Log,
    cancel: Cancel,
    reader: Reader,
}

enum Reader {
    Text(TextLog),
    Bootstrap(BootstrapLog),
    /// Opened when its history is read, or at the first look for more.
    Bus(Option<Box<LogReader>>),
}

impl Stream {
    fn of(log: Log, cancel: &Cancel) -> Stream {
        let reader = match (log.source, &log.vm) {
            (Source::Bootstrap, Some(vm)) => Reader::Bootstrap(BootstrapLog::new(&log.path, vm.clone())),
            (Source::Bus, _) => Reader::Bus(None),
            (source, _) => Reader::Text(TextLog::new(&log.path, source == Source::Broker)),
        };
        let cancel = cancel.clone();
        Stream { log, cancel, reader }
    }

    /// The last lines that are wanted.
    fn history(&mut self, options: &LogsOptions, take: &mut dyn FnMut(LogLine) -> bool) -> Result<bool> {
        let count = options.tail.unwrap_or(match options.since {
            Some(_) => usize::MAX,
            None => DEFAULT_TAIL,
        });
        let (log, failed) = (&self.log, |error| Failure::io("read", &self.log.path, &error));
        let mut lines: Vec<LogLine> = Vec::new();
        match &mut self.reader {
            Reader::Text(tail) => {
                let is_young = options.since.is_none_or(|since| tail.is_younger_than(since));
                let wanted = if is_young { count } else { 0 };
                let whole = tail.last_lines(wanted).map_err(failed)?;
                lines.extend(whole.into_iter().map(|line| text_line(log, line)));
                // When following, an unfinished line waits for its rest.
                if !options.follow && wanted > 0 {
                    tail.flush(&mut |line| {
                        lines.push(text_line(log, line));
                        true
                    });
                }
            }
            Reader::Bootstrap(tail) => {
                let is_young = options.since.is_none_or(|since| tail.is_younger_than(since));
                tail.more(&mut |(ts, line)| {
                    if is_young {
                        lines.push(bootstrap_line(log, ts, line));
                    }
                    true
                })
                .map_err(failed)?;
            }
            Reader::Bus(reader) => {
                let opened = LogReader::open(&log.path, Vec::new()).map_err(failed)?;
                let mut opened = opened.until(&self.cancel);
                if count != usize::MAX {
                    opened.seek_last(count as u64).map_err(failed)?;
                }
                // Passed on while reading: the bus may have more than fits into memory.
                while let Some(message) = opened.next_message().map_err(failed)? {
                    let line = bus_line(&message);
                    if is_since(options.since, &line) && !take(line) {
                        return Ok(false);
                    }
                }
                *reader = Some(Box::new(opened));
            }
        }
        lines.retain(|line| is_since(options.since, line));
        let surplus = lines.len().saturating_sub(count);
        Ok(lines.into_iter().skip(surplus).all(take))
    }

    /// Reads new lines.
    fn more(&mut self, take: &mut dyn FnMut(LogLine) -> bool) -> Result<bool> {
        let (log, failed) = (&self.log, |error| Failure::io("read", &self.log.path, &error));
        match &mut self.reader {
            Reader::Text(tail) => tail
                .read_new(&mut |line| take(text_line(log, line)))
                .map_err(failed),
            Reader::Bootstrap(tail) => tail
                .more(&mut |(ts, line)| take(bootstrap_line(log, ts, line)))
                .map_err(failed),
            Reader::Bus(reader) => {
                let reader = match reader {
                    Some(reader) => reader,
                    None => {
                        let opened = LogReader::open(&log.path, Vec::new()).map_err(failed)?;
                        reader.insert(Box::new(opened.until(&self.cancel)))
                    }
                };
                while let Some(message) = reader.next_message().map_err(failed)? {
                    if !take(bus_line(&message)) {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
        }
    }
}

fn is_since(since: Option<SystemTime>, line: &LogLine) -> bool {
    let (Some(since), Some(ts)) = (since, &line.ts) else {
        return true;
    };
    humantime::parse_rfc3339(ts).is_ok_and(|ts| ts >= since)
}

fn text_line(log: &Log, line: String) -> LogLine {
    LogLine {
        ts: match log.source {
            Source::Broker => logs::time_in(&line).map(str::to_owned),
            _ => None,
        },
        source: log.source,
        vm: log.vm.clone(),
        line,
    }
}

fn bootstrap_line(log: &Log, ts: Option<String>, line: String) -> LogLine {
    LogLine {
        ts,
        source: Source::Bootstrap,
        vm: log.vm.clone(),
        line,
    }
}

fn bus_line(message: &crate::core::bus::message::Message) -> LogLine {
    LogLine {
        // A time beyond every clock's range is refused.
        ts: (message.ts <= LAST_MS).then(|| wall_clock(of_unix_ms(message.ts))),
        source: Source::Bus,
        vm: message.vm.parse().ok().filter(|vm: &VmName| !vm.is_reserved()),
        line: message.to_json(),
    }
}
