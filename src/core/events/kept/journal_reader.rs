//! The events of one journal, read back from its files.
//!
//! Here: lines that are no events, and where a time begins. Not here: the files and their rotation
//! (`core::lines::rotated_log`).

use std::path::{Path, PathBuf};

use crate::core::cancel::Cancel;
use crate::core::failure::{Failure, Result};
use crate::core::lines::rotated_log::{self, LogStep, Position, RotatedLog};

use super::{Head, read};

/// A longer line is no event: what a journal holds is bounded far below this.
const MAX_LINE_BYTES: usize = 4 * 1024 * 1024;

/// A journal that is being read, oldest event first.
#[derive(Debug)]
pub(crate) struct JournalReader {
    path: PathBuf,
    log: RotatedLog,
    /// Lines, or pieces of lines, that were no events.
    pub corrupt: u64,
    /// Files were removed by rotation before they had been read.
    pub missed: bool,
}

impl JournalReader {
    /// The journal that `path` leads to, from its oldest event on; none is fine.
    pub(crate) fn open(path: &Path) -> Result<JournalReader> {
        let log = RotatedLog::open(path, MAX_LINE_BYTES);
        Ok(JournalReader {
            path: path.to_owned(),
            log: log.map_err(|error| Failure::io("read", path, &error))?,
            corrupt: 0,
            missed: false,
        })
    }

    /// Reading fails soon after this flag is raised, however long the lines are.
    pub(crate) fn until(mut self, stop: &Cancel) -> JournalReader {
        self.log = self.log.until(stop);
        self
    }

    /// Hands the next event's line to `look`; its answer is handed back. `None`: no more for now.
    pub(crate) fn next<T>(
        &mut self,
        follow: bool,
        mut look: impl FnMut(&str, Head<'_>) -> Option<T>,
    ) -> Result<Option<T>> {
        loop {
            let step = self.log.next_line(follow);
            let step = step.map_err(|error| Failure::io("read", self.log.reading(), &error))?;
            self.missed |= self.log.take_missed();
            let unended;
            let read = match step {
                LogStep::Waste => {
                    self.corrupt += 1;
                    continue;
                }
                LogStep::End if follow => return Ok(None),
                LogStep::End => {
                    // Without its line end a line is torn, as a rule; if it is whole all the same,
                    // it is told.
                    unended = self.log.finish();
                    if unended.is_empty() {
                        return Ok(None);
                    }
                    read(&unended)
                }
                LogStep::Line(line) => read(self.log.bytes(line)),
            };
            self.corrupt += u64::from(read.corrupt);
            if let Some((line, head)) = read.event
                && let Some(found) = look(line, head)
            {
                return Ok(Some(found));
            }
        }
    }

    /// Leaves out what is older than this time; of each file only the place is searched.
    pub(crate) fn skip_before(&mut self, ts: &str) -> Result<()> {
        let is_before = |line: &[u8]| Some(*read(line).event?.1.ts < *ts);
        self.log
            .skip_while(&is_before)
            .map_err(|error| Failure::io("read", &self.path, &error))
    }

    /// The events from the last to the first.
    pub(crate) fn backward(&self, follow: bool) -> Result<BackwardReader<'_>> {
        let lines = self.log.backward(follow);
        Ok(BackwardReader {
            path: &self.path,
            lines: lines.map_err(|error| Failure::io("read", &self.path, &error))?,
        })
    }

    /// Goes on from there: a place that [`JournalReader::backward`] has shown.
    pub(crate) fn go_to(&mut self, place: Position) {
        self.log.go_to(place);
    }
}

/// The events of a journal from its end.
#[derive(Debug)]
pub(crate) struct BackwardReader<'j> {
    path: &'j Path,
    lines: rotated_log::BackwardReader<'j>,
}

impl BackwardReader<'_> {
    /// The place behind the last line.
    pub(crate) fn end(&self) -> Result<Position> {
        self.lines
            .end()
            .map_err(|error| Failure::io("read", self.path, &error))
    }

    /// Hands the event's line before the last one to `look`; its answer and the line's place.
    pub(crate) fn next<T>(
        &mut self,
        mut look: impl FnMut(&str, Head<'_>) -> Option<T>,
    ) -> Result<Option<(T, Position)>> {
        loop {
            let line = self.lines.next_line();
            let Some((place, line)) = line.map_err(|error| Failure::io("read", self.path, &error))? else {
                return Ok(None);
            };
            if let Some((line, head)) = read(line).event
                && let Some(found) = look(line, head)
            {
                return Ok(Some((found, place)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::core::lines::journal::{Journal, Rotation, rotated};
    use crate::core::scratch::Scratch;

    fn line(number: u64) -> String {
        format!("{{\"type\":\"message\",\"ts\":\"2026-11-21T10:00:00.{number:03}Z\",\"seq\":{number}}}")
    }

    #[test]
    fn events_of_a_time_and_from_the_end_whatever_stands_between() {
        let scratch = Scratch::new("journal-reader");
        let path = scratch.path("x.jsonl");
        let small = Rotation {
            max_bytes: 200,
            keep: 30,
        };
        let mut journal = Journal::open(&path, small).unwrap();
        for number in 0..20 {
            journal.append(&line(number)).unwrap();
            if number == 10 {
                journal.append("garbage").unwrap();
            }
        }
        // A complete file with a torn end, and a whole event without a line end.
        let older = rotated(&path, 2);
        fs::write(&older, fs::read_to_string(&older).unwrap() + "{\"torn").unwrap();
        fs::write(&path, fs::read_to_string(&path).unwrap() + &line(20)).unwrap();
        let all = |reader: &mut JournalReader, follow| {
            std::iter::from_fn(|| reader.next(follow, |_, head| head.seq).unwrap()).collect::<Vec<u64>>()
        };
        for first in 0..20 {
            let mut reader = JournalReader::open(&path).unwrap();
            reader
                .skip_before(&format!("2026-11-21T10:00:00.{first:03}Z"))
                .unwrap();
            assert!(all(&mut reader, false).into_iter().eq(first..21), "{first}");
        }
        for (follow, last) in [(false, 20), (true, 19)] {
            let mut reader = JournalReader::open(&path).unwrap();
            assert!(all(&mut reader, follow).into_iter().eq(0..=last));
            assert_eq!((reader.corrupt, reader.missed), (2, false));
            let reader = JournalReader::open(&path).unwrap();
            let mut backward = reader.backward(follow).unwrap();
            for number in (0..=last).rev() {
                assert_eq!(backward.next(|_, head| head.seq).unwrap().unwrap().0, number);
            }
            assert!(backward.next(|_, head| head.seq).unwrap().is_none());
        }
    }
}
