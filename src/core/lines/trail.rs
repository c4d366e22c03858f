//! One journal with its rotated files, oldest first, followed across rotation if asked to.
//!
//! Here: which files there are, and passing from one to the next without losing or repeating a
//! line. Not here: reading one file (`super::segment`).
//!
//! What this relies on (`core::lines::journal`): a file is renamed under an exclusive lock, and a writer
//! that then gets its lock sees that the path leads elsewhere. So a file that the path doesn't
//! lead to any more gets no further line, and what has been read of it to the end is complete.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::core::cancel::Cancel;
use crate::core::events::kept::read;
use crate::core::failure::{Failure, Result};
use crate::core::host;
use crate::core::lines::segment::{Backward, Segment, Step};

/// `log_keep` is at most 1000, so no rotated file has this number.
const MAX_ROTATED: u32 = 1001;

/// Device and inode: who a file is, whatever it is called by now.
type Identity = (u64, u64);

/// A journal that is being read.
#[derive(Debug)]
pub(crate) struct RotatedJournal {
    path: PathBuf,
    /// Oldest first. All but the last are complete.
    segments: VecDeque<Segment>,
    /// Lines, or pieces of lines, that were no events.
    pub corrupt: u64,
    /// Files were removed by rotation before they had been read.
    pub missed: bool,
    stop: Cancel,
}

impl RotatedJournal {
    /// All files of the journal that `path` leads to; none is fine.
    pub(crate) fn open(path: &Path) -> Result<RotatedJournal> {
        Ok(RotatedJournal {
            segments: files(path, None)?.0,
            path: path.to_owned(),
            corrupt: 0,
            missed: false,
            stop: Cancel::new(),
        })
    }

    /// Reading fails soon after this flag is raised, however long the lines are.
    pub(crate) fn until(mut self, stop: &Cancel) -> RotatedJournal {
        self.stop = stop.clone();
        self.segments.iter_mut().for_each(|segment| segment.until(stop));
        self
    }

    /// Hands the next event's line to `look`; its answer is handed back. `None`: no more for now.
    pub(crate) fn next<T>(
        &mut self,
        follow: bool,
        mut look: impl FnMut(&str, crate::core::events::kept::Head<'_>) -> Option<T>,
    ) -> Result<Option<T>> {
        loop {
            let is_complete = self.segments.len() > 1;
            let Some(segment) = self.segments.front_mut() else {
                if follow {
                    self.segments = files(&self.path, None)?.0;
                    let stop = &self.stop;
                    self.segments.iter_mut().for_each(|segment| segment.until(stop));
                }
                if self.segments.is_empty() {
                    return Ok(None);
                }
                continue;
            };
            let failed = |segment: &Segment, error| Failure::io("read", segment.path(), &error);
            match segment.next_line() {
                Err(error) => return Err(failed(segment, error)),
                Ok(Step::TooLong) => self.corrupt += 1,
                Ok(Step::Line(line)) => {
                    let read = read(segment.bytes(line));
                    self.corrupt += u64::from(read.corrupt);
                    if let Some((line, head)) = read.event
                        && let Some(found) = look(line, head)
                    {
                        return Ok(Some(found));
                    }
                }
                Ok(Step::Pending) if is_complete => self.drop_finished_file(),
                Ok(Step::Pending) if !follow => {
                    // Without its line end a line is torn, as a rule; if it is whole all the same,
                    // it is told.
                    let rest = segment.unended().to_vec();
                    self.segments.clear();
                    let read = read(&rest);
                    self.corrupt += u64::from(read.corrupt && !rest.is_empty());
                    return Ok(read.event.and_then(|(line, head)| look(line, head)));
                }
                Ok(Step::Pending) => {
                    if !self.find_newer()? {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// Leaves out what is older than this time; of each file only the place is searched.
    pub(crate) fn skip_before(&mut self, ts: &str) -> Result<()> {
        for number in (0..self.segments.len()).rev() {
            let segment = &mut self.segments[number];
            let skipped = segment.skip_before(ts);
            let skipped = skipped.map_err(|error| Failure::io("read", segment.path(), &error))?;
            if skipped {
                // Files before this one hold earlier lines alone.
                self.segments.drain(..number);
                break;
            }
        }
        Ok(())
    }

    /// The lines from the last to the first.
    pub(crate) fn backward(&self, follow: bool) -> Result<BackwardReader<'_>> {
        let mut reverse = BackwardReader {
            trail: self,
            number: self.segments.len(),
            lines: None,
            follow,
        };
        reverse.earlier_file()?;
        Ok(reverse)
    }

    /// Goes on from there: a place that [`RotatedJournal::backward`] has shown.
    pub(crate) fn go_to(&mut self, place: Position) {
        self.segments.drain(..place.number);
        if let Some(segment) = self.segments.front_mut() {
            segment.go_to(place.position);
        }
    }

    /// The oldest file is at its end and gets no more lines.
    fn drop_finished_file(&mut self) {
        if let Some(segment) = self.segments.pop_front() {
            self.corrupt += u64::from(!segment.unended().is_empty());
        }
    }

    /// At the end of the only file: whether there are newer ones, or it has grown meanwhile.
    fn find_newer(&mut self) -> Result<bool> {
        let Some(segment) = self.segments.front() else {
            return Ok(false);
        };
        if host::names_this_file(&self.path, segment.file()) {
            return Ok(false);
        }
        let identity = segment.identity();
        let identity = identity.map_err(|error| Failure::io("read", &self.path, &error))?;
        let (mut newer, found) = files(&self.path, Some(identity))?;
        newer.iter_mut().for_each(|segment| segment.until(&self.stop));
        if newer.is_empty() {
            // Rotated, and nobody has written since.
            return Ok(false);
        }
        self.missed |= !found;
        self.segments.extend(newer);
        // The file may have got its last lines between our last read and its rotation: the caller
        // reads it once more, and what it finds then is all.
        Ok(true)
    }
}

/// A place in a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    number: usize,
    position: u64,
}

/// The lines of a journal from its end.
#[derive(Debug)]
pub(crate) struct BackwardReader<'t> {
    trail: &'t RotatedJournal,
    /// The file that is being read, counted from the oldest.
    number: usize,
    lines: Option<Backward<'t>>,
    follow: bool,
}

impl BackwardReader<'_> {
    /// The place behind the last line.
    pub(crate) fn end(&self) -> Result<Position> {
        let number = self.trail.segments.len().saturating_sub(1);
        let position = match self.trail.segments.back() {
            Some(segment) => self.end_of(segment)?,
            None => 0,
        };
        Ok(Position { number, position })
    }

    /// Hands the event's line before the last one to `look`; its answer and the line's place.
    pub(crate) fn next<T>(
        &mut self,
        mut look: impl FnMut(&str, crate::core::events::kept::Head<'_>) -> Option<T>,
    ) -> Result<Option<(T, Position)>> {
        while let Some(lines) = self.lines.as_mut() {
            let path = self.trail.segments[self.number].path();
            let line = lines.next_line();
            match line.map_err(|error| Failure::io("read", path, &error))? {
                None => self.earlier_file()?,
                Some((position, line)) => {
                    let number = self.number;
                    if let Some((line, head)) = read(line).event
                        && let Some(found) = look(line, head)
                    {
                        return Ok(Some((found, Position { number, position })));
                    }
                }
            }
        }
        Ok(None)
    }

    fn earlier_file(&mut self) -> Result<()> {
        self.lines = None;
        if self.number > 0 {
            self.number -= 1;
            let segment = &self.trail.segments[self.number];
            self.lines = Some(Backward::before(segment, self.end_of(segment)?));
        }
        Ok(())
    }

    /// Who follows a file will read its unended line when it has its end.
    fn end_of(&self, segment: &Segment) -> Result<u64> {
        let failed = |error| Failure::io("read", segment.path(), &error);
        let length = segment.length().map_err(failed)?;
        if !self.follow {
            return Ok(length);
        }
        let mut lines = Backward::before(segment, length);
        let (place, ended) = match lines.next_line().map_err(failed)? {
            Some((place, line)) => (place, place + (line.len() as u64) < length),
            None => return Ok(length),
        };
        Ok(if ended { length } else { place })
    }
}

/// The files of a journal, oldest first: all, or those newer than `known` and whether that is
/// still among them. Each is found from the one after it, so that rotations meanwhile neither hide
/// a file nor show one twice; what is newer than the first one found is found later, from it.
pub(crate) fn files(path: &Path, known: Option<Identity>) -> Result<(VecDeque<Segment>, bool)> {
    let mut files = VecDeque::new();
    let mut number = 0;
    let mut next = open_at(path, number)?;
    if next.is_none() {
        // Right after a rotation there is no newest file yet.
        number = 1;
        next = open_at(path, number)?;
    }
    while let Some(segment) = next {
        let identity = segment.identity();
        let identity = identity.map_err(|error| Failure::io("read", segment.path(), &error))?;
        if Some(identity) == known {
            return Ok((files, true));
        }
        files.push_front(segment);
        next = older(path, identity, &mut number)?;
    }
    Ok((files, false))
}

/// The file that was current before this one, which is or was at `number`. Rotations only ever
/// move a file to a higher number; while this one stays where it is, so does what is behind it,
/// except that its neighbour may just be moving: then one number is free.
fn older(path: &Path, newer: Identity, number: &mut u32) -> Result<Option<Segment>> {
    loop {
        let Some(at) = (*number..MAX_ROTATED).find(|at| identity_at(path, *at) == Some(newer)) else {
            // It has been removed, and so has everything before it.
            return Ok(None);
        };
        *number = at;
        for behind in [at + 1, at + 2] {
            let found = open_at(path, behind)?;
            if identity_at(path, at) != Some(newer) {
                break;
            }
            if let Some(found) = found {
                *number = behind;
                return Ok(Some(found));
            }
            if behind == at + 2 {
                return Ok(None);
            }
        }
    }
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    if number > 0 {
        name.push(format!(".{number}"));
    }
    PathBuf::from(name)
}

/// The file of this number, if there is one.
fn open_at(path: &Path, number: u32) -> Result<Option<Segment>> {
    let name = numbered(path, number);
    match Segment::open(&name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map_err(|error| Failure::io("read", &name, &error)),
    }
}

fn identity_at(path: &Path, number: u32) -> Option<Identity> {
    let meta = fs::metadata(numbered(path, number)).ok()?;
    Some((meta.dev(), meta.ino()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::core::lines::journal::{Journal, Rotation};
    use crate::core::scratch::Scratch;

    fn line(number: u32) -> String {
        format!("{{\"type\":\"message\",\"ts\":\"2026-11-21T10:00:00.{number:03}Z\",\"seq\":{number}}}")
    }

    fn drain(trail: &mut RotatedJournal, follow: bool) -> Vec<u64> {
        std::iter::from_fn(|| trail.next(follow, |_, head| head.seq).unwrap()).collect()
    }

    const SMALL: Rotation = Rotation {
        max_bytes: 200,
        keep: 3,
    };

    #[test]
    fn rotated_files_are_passed_through_one_after_the_other() {
        let scratch = Scratch::new("trail-follow");
        let path = scratch.path("x.jsonl");
        let mut trail = RotatedJournal::open(&path).unwrap();
        assert_eq!(drain(&mut trail, true), [0; 0], "no file yet");
        let mut journal = Journal::open(&path, SMALL).unwrap();
        let mut seen = Vec::new();
        for number in 0..40 {
            journal.append(&line(number)).unwrap();
            // Sometimes several files behind, never more than are kept.
            if number % 9 == 0 {
                seen.extend(drain(&mut trail, true));
            }
        }
        seen.extend(drain(&mut trail, true));
        assert!(seen.iter().copied().eq(0..40), "{seen:?}");
        assert_eq!((trail.corrupt, trail.missed), (0, false));
        for number in 40..80 {
            journal.append(&line(number)).unwrap();
        }
        let rest = drain(&mut trail, true);
        assert!(trail.missed, "{rest:?}");
        assert_eq!(rest.last(), Some(&79));
    }

    #[test]
    fn several_writers_are_followed_without_loss() {
        let scratch = Scratch::new("trail-writers");
        let path = scratch.path("x.jsonl");
        let keep_all = Rotation {
            max_bytes: 2_000,
            keep: 900,
        };
        const EACH: u32 = 500;
        let mut trail = RotatedJournal::open(&path).unwrap();
        let mut seen = Vec::new();
        std::thread::scope(|scope| {
            for writer in 0..3 {
                let path = &path;
                scope.spawn(move || {
                    let mut journal = Journal::open(path, keep_all).unwrap();
                    for number in 0..EACH {
                        journal.append(&line(writer * EACH + number)).unwrap();
                    }
                });
            }
            let until = Instant::now() + Duration::from_secs(60);
            while seen.len() < 3 * EACH as usize && Instant::now() < until {
                seen.extend(drain(&mut trail, true));
            }
        });
        seen.extend(drain(&mut trail, true));
        assert_eq!((trail.corrupt, trail.missed), (0, false));
        for writer in 0..u64::from(3 * EACH) / u64::from(EACH) {
            let first = writer * u64::from(EACH);
            let own = seen
                .iter()
                .copied()
                .filter(|seq| (first..first + u64::from(EACH)).contains(seq));
            assert!(own.eq(first..first + u64::from(EACH)), "writer {writer}");
        }
    }

    #[test]
    fn backward_is_forward_reversed() {
        let scratch = Scratch::new("trail-backward");
        let path = scratch.path("x.jsonl");
        let mut journal = Journal::open(&path, SMALL).unwrap();
        for number in 0..8 {
            journal.append(&line(number)).unwrap();
        }
        for rest in ["", "{\"torn", &line(8)] {
            fs::write(
                &path,
                fs::read_to_string(&path)
                    .unwrap()
                    .trim_end_matches("{\"torn")
                    .to_owned()
                    + rest,
            )
            .unwrap();
            for follow in [false, true] {
                let mut trail = RotatedJournal::open(&path).unwrap();
                let mut reverse = trail.backward(follow).unwrap();
                let end = reverse.end().unwrap();
                let mut places = Vec::new();
                let mut backward = Vec::new();
                while let Some((seq, place)) = reverse.next(|_, head| head.seq).unwrap() {
                    backward.push(seq);
                    places.push(place);
                }
                let last = if rest.starts_with("{\"type") && !follow {
                    9
                } else {
                    8
                };
                assert!(
                    backward.iter().copied().eq((0..last).rev()),
                    "{rest} {backward:?}"
                );
                let third = places[2];
                trail.go_to(third);
                assert!(drain(&mut trail, follow).into_iter().eq(last - 3..last));
                let mut trail = RotatedJournal::open(&path).unwrap();
                trail.go_to(end);
                assert_eq!(drain(&mut trail, follow), [0; 0]);
            }
        }
    }

    #[test]
    fn files_of_an_earlier_time_are_left_out() {
        let scratch = Scratch::new("trail-since");
        let path = scratch.path("x.jsonl");
        let mut journal = Journal::open(&path, SMALL).unwrap();
        for number in 0..12 {
            journal.append(&line(number)).unwrap();
        }
        for first in 0..13 {
            let mut trail = RotatedJournal::open(&path).unwrap();
            trail
                .skip_before(&format!("2026-11-21T10:00:00.{first:03}Z"))
                .unwrap();
            let seen = drain(&mut trail, false);
            assert!(seen.iter().copied().eq(first..12), "{first}: {seen:?}");
        }
    }
}
