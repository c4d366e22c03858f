//! What went over the bus while the runs of a report were the last ones.
//!
//! Here: finding the part of the bus's log that is wanted, and counting it into points of time. Not
//! here: messages as such (`core::bus`), or drawing (`super::chart`).
//!
//! The log may be gigabytes long. Its times rise, so where it begins is found by bisection; of what
//! follows only the newest part up to a limit is read, and of each line only its beginning is looked at.
//! How much time a point stands for isn't known beforehand: when there are too many points, two
//! become one.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::io;

use crate::core::bus::line::BusLine;
use crate::core::bus::log::MAX_LINE_BYTES;
use crate::core::bus::message::Message;
use crate::core::failure::{Failure, Result};
use crate::core::lines::line_file::{LineFile, Step};
use crate::core::lines::rotated_log;
use crate::core::root::paths::StateRoot;

use super::model::{RunReport, Sender, Traffic};
use super::{MAX_BUS_BYTES, MAX_POINTS, MAX_SENDERS};

/// How much time a point stands for at first, milliseconds: in less, one message looks like a high rate.
const FINEST_MS: u64 = 1_000;
/// Senders that are told apart while counting.
const MAX_FOLLOWED: usize = 64;

/// Adds to each run what went over the bus from its beginning to that of the next, and says what was
/// left out. Runs stand oldest first.
pub(super) fn add(
    state: &StateRoot,
    runs: &mut [RunReport],
    begins: &[u64],
    keys: &[String],
) -> Result<Option<String>> {
    add_of(state, runs, begins, keys, MAX_BUS_BYTES)
}

fn add_of(
    state: &StateRoot,
    runs: &mut [RunReport],
    begins: &[u64],
    keys: &[String],
    most_bytes: u64,
) -> Result<Option<String>> {
    let Some(first) = begins.first() else {
        return Ok(None);
    };
    let path = state.bus_log();
    let failed = |error: io::Error| Failure::io("read", &path, &error);
    let (mut files, _) = rotated_log::files(&path, MAX_LINE_BYTES, None).map_err(failed)?;
    let cut_at = seek(&mut files, *first, most_bytes).map_err(failed)?;
    let mut counts: Vec<Option<RunTraffic>> = runs.iter().map(|_| None).collect();
    // Lines rise in time, so the run is the same as that of the line before, as a rule.
    while let Some(mut file) = files.pop_front() {
        loop {
            let line = match file.next_line().map_err(failed)? {
                Step::Line(line) => line,
                Step::TooLong => continue,
                Step::Pending => break,
            };
            let Some(seen) = MessageHead::of(file.bytes(line)) else {
                continue;
            };
            if !keys.is_empty() && !keys.iter().any(|key| seen.vm.eq_ignore_ascii_case(key)) {
                continue;
            }
            let Some(run) = begins.iter().rposition(|begin| *begin <= seen.ts) else {
                continue;
            };
            counts[run]
                .get_or_insert_with(|| RunTraffic::from(seen.ts))
                .add(&seen);
        }
    }
    // The runs whose time reaches back before what was read.
    let oldest_read = counts.iter().position(Option::is_some).unwrap_or(0);
    for (at, (run, count)) in runs.iter_mut().zip(counts).enumerate() {
        run.bus = count.map(|count| count.finish(begins[at], cut_at && at == oldest_read));
    }
    Ok(cut_at.then(|| {
        format!(
            "of the bus only the newest {} MiB of its log were read: older messages aren't counted",
            most_bytes / (1024 * 1024)
        )
    }))
}

/// Leaves out what is older than this, and what is beyond so many bytes from the end. True: the latter
/// has left something out that would have counted.
fn seek(files: &mut VecDeque<LineFile>, since: u64, most_bytes: u64) -> io::Result<bool> {
    let is_before = |line: &[u8]| Some(MessageHead::of(line)?.ts < since);
    let mut room = most_bytes;
    for at in (0..files.len()).rev() {
        let file = &mut files[at];
        let length = file.length()?;
        let has_earlier = file.skip_while(&is_before)?;
        if length.saturating_sub(file.position()) > room {
            file.go_to(length - room);
            // What stands there is the end of a line.
            file.next_line()?;
            files.drain(..at);
            return Ok(true);
        }
        if has_earlier {
            files.drain(..at);
            return Ok(false);
        }
        room -= length;
    }
    Ok(false)
}

/// What counts of a message.
#[derive(Debug, PartialEq, Eq)]
struct MessageHead<'l> {
    ts: u64,
    vm: Cow<'l, str>,
    bytes: u64,
}

impl<'l> MessageHead<'l> {
    /// By the beginning of the line, which the broker always writes alike; by its JSON where somebody
    /// else has written it. `None`: it is no message.
    fn of(line: &'l [u8]) -> Option<MessageHead<'l>> {
        if let Some(plain) = BusLine::parse(line) {
            return Some(MessageHead {
                ts: plain.ts,
                vm: plain.vm.into(),
                bytes: plain.payload.len() as u64,
            });
        }
        let message = Message::parse(line).ok()?;
        Some(MessageHead {
            ts: message.ts,
            vm: message.vm.into(),
            bytes: message.payload.get().len() as u64,
        })
    }
}

/// Messages of one run's time, counted.
struct RunTraffic {
    /// The time of the first point.
    begins: u64,
    bucket_ms: u64,
    all: Series,
    senders: HashMap<String, Series>,
    others: bool,
}

#[derive(Default)]
struct Series {
    messages: u64,
    bytes: u64,
    points: Vec<[u64; 2]>,
}

impl Series {
    fn add(&mut self, at: usize, bytes: u64) {
        if self.points.len() <= at {
            self.points.resize(at + 1, [0; 2]);
        }
        self.points[at][0] += 1;
        self.points[at][1] += bytes;
        self.messages += 1;
        self.bytes += bytes;
    }

    /// Two points become one.
    fn halve(&mut self) {
        let sum = |pair: &[[u64; 2]]| {
            pair.iter()
                .fold([0; 2], |sum, point| [sum[0] + point[0], sum[1] + point[1]])
        };
        self.points = self.points.chunks(2).map(sum).collect();
    }
}

impl RunTraffic {
    fn from(begins: u64) -> RunTraffic {
        RunTraffic {
            begins,
            bucket_ms: FINEST_MS,
            all: Series::default(),
            senders: HashMap::new(),
            others: false,
        }
    }

    fn add(&mut self, seen: &MessageHead<'_>) {
        // A clock that was set back doesn't make it earlier than the first.
        let after = seen.ts.saturating_sub(self.begins);
        while after / self.bucket_ms >= MAX_POINTS as u64 {
            self.bucket_ms *= 2;
            self.all.halve();
            self.senders.values_mut().for_each(Series::halve);
        }
        let at = (after / self.bucket_ms) as usize;
        self.all.add(at, seen.bytes);
        let has_room = self.senders.len() < MAX_FOLLOWED;
        match self.senders.get_mut(&*seen.vm) {
            Some(curve) => curve.add(at, seen.bytes),
            None if has_room => {
                let mut curve = Series::default();
                curve.add(at, seen.bytes);
                self.senders.insert(seen.vm.clone().into_owned(), curve);
            }
            None => self.others = true,
        }
    }

    fn finish(self, run_begins: u64, cut: bool) -> Traffic {
        let length = self.all.points.len();
        let mut senders: Vec<Sender> = self
            .senders
            .into_iter()
            .map(|(sender, mut curve)| {
                curve.points.resize(length, [0; 2]);
                Sender {
                    sender: super::from_events::shown(&sender),
                    messages: curve.messages,
                    bytes: curve.bytes,
                    points: curve.points,
                }
            })
            .collect();
        senders.sort_by(|one, other| {
            other
                .bytes
                .cmp(&one.bytes)
                .then_with(|| one.sender.cmp(&other.sender))
        });
        let senders_left_out = senders.len().saturating_sub(MAX_SENDERS) + usize::from(self.others);
        senders.truncate(MAX_SENDERS);
        Traffic {
            start_ms: self.begins.saturating_sub(run_begins),
            bucket_ms: self.bucket_ms,
            messages: self.all.messages,
            bytes: self.all.bytes,
            points: self.all.points,
            senders,
            senders_left_out,
            cut,
        }
    }
}

#[cfg(test)]
#[path = "traffic_tests.rs"]
mod tests;
