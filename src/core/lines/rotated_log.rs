//! A log and its rotated files, read as one, oldest first, and followed across rotation.
//!
//! Here: which files there are, and passing from one to the next without losing or repeating a line.
//! Not here: reading one file (`lines::line_file`), or what a line says: readers of journals
//! (`events::kept`), of the bus (`bus::log`), of text logs (`core::logs`) and of transcripts are built on this.
//!
//! What this relies on (`lines::journal`): a file is renamed under an exclusive lock, and a writer
//! that then gets its lock sees that the path leads elsewhere. So a file that the path doesn't
//! lead to any more gets no further line, and what has been read of it to the end is complete.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::core::cancel::Cancel;
use crate::core::host;
use crate::core::lines::journal::rotated;
use crate::core::lines::line_file::{Backward, Identity, LineFile, Step};

/// `log_keep` is at most 1000, so no rotated file has this number.
const MAX_ROTATED: u32 = 1001;

/// Older files than so many aren't read: each takes a descriptor, of which a process has 1024 as a rule.
/// With the usual rotation five files are all there is.
const MAX_FILES: usize = 900;

/// Behind more numbers without a file no older file is looked for.
const MAX_HOLE: u32 = 16;

/// A log that is being read.
#[derive(Debug)]
pub(crate) struct RotatedLog {
    path: PathBuf,
    max_line: usize,
    /// Oldest first; the first one is being read. All but the last are complete.
    files: VecDeque<LineFile>,
    /// Files after the first one were removed by rotation before they had been read.
    hole_ahead: bool,
    missed: bool,
    stop: Cancel,
}

/// A step of reading.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum LogStep {
    /// A line, at this place in [`RotatedLog::bytes`].
    Line(Range<usize>),
    /// Bytes that are no line: too many for one, or without an end in a file that gets no more.
    Waste,
    /// No more for now.
    End,
}

impl RotatedLog {
    /// All files of the log that `path` leads to, before the oldest line; none is fine. A line of more
    /// than `max_line` bytes is waste.
    pub(crate) fn open(path: &Path, max_line: usize) -> io::Result<RotatedLog> {
        Ok(RotatedLog {
            files: files(path, max_line, None)?.0,
            path: path.to_owned(),
            max_line,
            hole_ahead: false,
            missed: false,
            stop: Cancel::new(),
        })
    }

    /// Reading ends with an error of the kind `Interrupted` soon after this flag is raised, however
    /// long the lines are.
    pub(crate) fn until(mut self, stop: &Cancel) -> RotatedLog {
        self.stop = stop.clone();
        self.files.iter_mut().for_each(|file| file.until(stop));
        self
    }

    /// The file that is being read.
    pub(crate) fn reading(&self) -> &Path {
        self.files.front().map_or(&self.path, LineFile::path)
    }

    /// The bytes that [`LogStep::Line`] speaks of.
    pub(crate) fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.files.front().map_or(&[], |file| file.bytes(range))
    }

    /// The next line. With `follow` it looks for what has come meanwhile.
    pub(crate) fn next_line(&mut self, follow: bool) -> io::Result<LogStep> {
        loop {
            let is_complete = self.files.len() > 1;
            let Some(file) = self.files.front_mut() else {
                if follow {
                    self.files = self.files_after(None)?.0;
                }
                if self.files.is_empty() {
                    return Ok(LogStep::End);
                }
                continue;
            };
            match file.next_line()? {
                Step::Line(line) => return Ok(LogStep::Line(line)),
                Step::TooLong => return Ok(LogStep::Waste),
                Step::Pending if is_complete => {
                    let torn = file.is_torn();
                    self.files.pop_front();
                    self.missed |= std::mem::take(&mut self.hole_ahead);
                    if torn {
                        return Ok(LogStep::Waste);
                    }
                }
                Step::Pending if follow && self.find_newer()? => {}
                Step::Pending => return Ok(LogStep::End),
            }
        }
    }

    /// Whether files were removed by rotation before they had been read, since this was last asked.
    pub(crate) fn take_missed(&mut self) -> bool {
        std::mem::take(&mut self.missed)
    }

    /// Ends the reading: what stands behind the last line end.
    pub(crate) fn finish(&mut self) -> Vec<u8> {
        let unended = self.files.back().map(|file| file.unended().to_vec());
        self.files.clear();
        unended.unwrap_or_default()
    }

    /// Leaves out the lines before some place; of each file only that place is searched. `is_before` is
    /// that of [`LineFile::skip_while`].
    pub(crate) fn skip_while(&mut self, is_before: &dyn Fn(&[u8]) -> Option<bool>) -> io::Result<()> {
        for number in (0..self.files.len()).rev() {
            if self.files[number].skip_while(is_before)? {
                // Files before this one hold earlier lines alone.
                self.files.drain(..number);
                break;
            }
        }
        Ok(())
    }

    /// The lines from the last to the first. Who `follow`s reads the unended line when it has its end;
    /// for others it is the last one.
    pub(crate) fn backward(&self, follow: bool) -> io::Result<BackwardReader<'_>> {
        let mut reverse = BackwardReader {
            log: self,
            number: self.files.len(),
            lines: None,
            follow,
        };
        reverse.earlier_file()?;
        Ok(reverse)
    }

    /// Goes on from there: a place that [`RotatedLog::backward`] has shown.
    pub(crate) fn go_to(&mut self, place: Position) {
        self.files.drain(..place.number);
        if let Some(file) = self.files.front_mut() {
            file.go_to(place.position);
        }
    }

    /// At the end of the only file: whether there are newer ones, or it has grown meanwhile.
    fn find_newer(&mut self) -> io::Result<bool> {
        let Some(file) = self.files.front() else {
            return Ok(false);
        };
        if host::names_this_file(&self.path, file.file()) {
            return Ok(false);
        }
        let (newer, found) = self.files_after(Some(file.identity()?))?;
        if newer.is_empty() {
            // Rotated, and nobody has written since.
            return Ok(false);
        }
        self.hole_ahead = !found;
        self.files.extend(newer);
        // The file may have got its last lines between our last read and its rotation: the caller
        // reads it once more, and what it finds then is all.
        Ok(true)
    }

    fn files_after(&self, known: Option<Identity>) -> io::Result<(VecDeque<LineFile>, bool)> {
        let (mut files, found) = files(&self.path, self.max_line, known)?;
        files.iter_mut().for_each(|file| file.until(&self.stop));
        Ok((files, found))
    }
}

/// A place in a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    number: usize,
    position: u64,
}

/// The lines of a log from its end.
#[derive(Debug)]
pub(crate) struct BackwardReader<'l> {
    log: &'l RotatedLog,
    /// The file that is being read, counted from the oldest.
    number: usize,
    lines: Option<Backward>,
    follow: bool,
}

impl BackwardReader<'_> {
    /// The place behind the last line.
    pub(crate) fn end(&self) -> io::Result<Position> {
        let number = self.log.files.len().saturating_sub(1);
        let position = match self.log.files.back() {
            Some(file) if self.follow => file.end_of_lines()?,
            Some(file) => file.length()?,
            None => 0,
        };
        Ok(Position { number, position })
    }

    /// The line before the last one, and its place.
    pub(crate) fn next_line(&mut self) -> io::Result<Option<(Position, &[u8])>> {
        // In two steps, for a line that is handed out keeps its file's lines borrowed.
        while let Some(lines) = &mut self.lines
            && lines.next_line(&self.log.files[self.number])?.is_none()
        {
            self.earlier_file()?;
        }
        let number = self.number;
        let line = self.lines.as_ref().and_then(Backward::current);
        Ok(line.map(|(position, line)| (Position { number, position }, line)))
    }

    fn earlier_file(&mut self) -> io::Result<()> {
        self.lines = None;
        if self.number > 0 {
            self.number -= 1;
            let file = &self.log.files[self.number];
            self.lines = Some(match self.follow {
                true => Backward::whole(file)?,
                false => Backward::before(file, file.length()?),
            });
        }
        Ok(())
    }
}

/// The files of a log, oldest first: all, or those newer than `known` and whether that is
/// still among them. What is newer than the first one found is found later, from it.
pub(crate) fn files(
    path: &Path,
    max_line: usize,
    known: Option<Identity>,
) -> io::Result<(VecDeque<LineFile>, bool)> {
    let mut files = VecDeque::new();
    let mut newest_first = NewestFirst::of(path, max_line);
    while files.len() < MAX_FILES
        && let Some(file) = newest_first.next_file()?
    {
        if Some(file.identity()?) == known {
            return Ok((files, true));
        }
        files.push_front(file);
    }
    Ok((files, false))
}

/// The files of a log from the newest to the oldest, opened one after the other. Each is found from the one
/// after it, so that rotations meanwhile neither hide a file nor show one twice.
pub(crate) struct NewestFirst<'p> {
    path: &'p Path,
    max_line: usize,
    /// The number and identity of the last one.
    last: Option<(u32, Identity)>,
}

impl<'p> NewestFirst<'p> {
    /// Before the newest file of the log that `path` leads to.
    pub(crate) fn of(path: &'p Path, max_line: usize) -> NewestFirst<'p> {
        NewestFirst {
            path,
            max_line,
            last: None,
        }
    }

    /// The file before the last one.
    pub(crate) fn next_file(&mut self) -> io::Result<Option<LineFile>> {
        let found = match self.last {
            None => self.newest()?,
            Some((number, identity)) => self.older(number, identity)?,
        };
        let Some((number, file)) = found else {
            return Ok(None);
        };
        self.last = Some((number, file.identity()?));
        Ok(Some(file))
    }

    fn newest(&self) -> io::Result<Option<(u32, LineFile)>> {
        // Right after a rotation there is no newest file yet.
        for number in [0, 1] {
            if let Some(file) = LineFile::open(&rotated(self.path, number), self.max_line)? {
                return Ok(Some((number, file)));
            }
        }
        Ok(None)
    }

    /// The file that was current before this one, which is or was at `number`. Rotations only ever
    /// move a file to a higher number; while this one stays where it is, so does what is behind it,
    /// except that its neighbour may just be moving: then one number is free. More are where somebody
    /// removed files.
    fn older(&self, mut number: u32, newer: Identity) -> io::Result<Option<(u32, LineFile)>> {
        let stays_at = |number: u32| identity_at(self.path, number) == Some(newer);
        'moved: loop {
            let Some(at) = (number..MAX_ROTATED).find(|at| stays_at(*at)) else {
                // It has been removed, and so has everything before it.
                return Ok(None);
            };
            number = at;
            for behind in at + 1..=at + MAX_HOLE {
                let found = LineFile::open(&rotated(self.path, behind), self.max_line)?;
                if !stays_at(at) {
                    continue 'moved;
                }
                if let Some(found) = found {
                    return Ok(Some((behind, found)));
                }
            }
            return Ok(None);
        }
    }
}

fn identity_at(path: &Path, number: u32) -> Option<Identity> {
    let meta = fs::metadata(rotated(path, number)).ok()?;
    Some((meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::core::lines::journal::{Journal, Rotation};
    use crate::core::scratch::Scratch;

    const SMALL: Rotation = Rotation {
        max_bytes: 40,
        keep: 3,
    };

    fn open(path: &Path) -> RotatedLog {
        RotatedLog::open(path, 1000).unwrap()
    }

    fn number_of(line: &[u8]) -> u64 {
        std::str::from_utf8(line).unwrap().parse().unwrap()
    }

    fn drain(log: &mut RotatedLog, follow: bool) -> Vec<u64> {
        let mut seen = Vec::new();
        loop {
            match log.next_line(follow).unwrap() {
                LogStep::Line(line) => seen.push(number_of(log.bytes(line))),
                LogStep::Waste => panic!("{seen:?}"),
                LogStep::End => return seen,
            }
        }
    }

    #[test]
    fn rotated_files_are_passed_through_one_after_the_other() {
        let scratch = Scratch::new("rotated-log-follow");
        let path = scratch.path("x");
        let mut log = open(&path);
        assert_eq!(drain(&mut log, true), [0; 0], "no file yet");
        let mut journal = Journal::open(&path, SMALL).unwrap();
        let mut seen = Vec::new();
        for number in 1000..1100 {
            journal.append(&number.to_string()).unwrap();
            // Sometimes several files behind, never more than are kept.
            if number % 23 == 0 {
                seen.extend(drain(&mut log, true));
            }
        }
        seen.extend(drain(&mut log, true));
        assert!(seen.iter().copied().eq(1000..1100), "{seen:?}");
        assert!(!log.take_missed());
        for number in 1100..1200 {
            journal.append(&number.to_string()).unwrap();
        }
        let rest = drain(&mut log, true);
        assert!(log.take_missed() && !log.take_missed(), "{rest:?}");
        assert_eq!(rest.last(), Some(&1199));
    }

    /// The race of readers with a rotation, for all readers that are built on this.
    #[test]
    fn writers_that_rotate_all_the_time_hide_and_repeat_nothing() {
        let scratch = Scratch::new("rotated-log-race");
        let path = scratch.path("x");
        let keep_all = Rotation {
            max_bytes: 100,
            keep: 900,
        };
        const WRITERS: u64 = 3;
        const EACH: u64 = 1000;
        let mut log = open(&path);
        let mut seen = Vec::new();
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let path = &path;
                scope.spawn(move || {
                    let mut journal = Journal::open(path, keep_all).unwrap();
                    for number in 0..EACH {
                        journal.append(&(writer * EACH + number).to_string()).unwrap();
                    }
                });
            }
            let until = Instant::now() + Duration::from_secs(60);
            while seen.len() < (WRITERS * EACH) as usize && Instant::now() < until {
                seen.extend(drain(&mut log, true));
                // Whoever begins meanwhile sees a piece of it without a hole.
                let late = open(&path);
                let mut backward = late.backward(true).unwrap();
                let mut last = [u64::MAX; WRITERS as usize];
                while let Some((_, line)) = backward.next_line().unwrap() {
                    let number = number_of(line);
                    let last = &mut last[(number / EACH) as usize];
                    assert!(*last == u64::MAX || *last == number + 1, "{last} after {number}");
                    *last = number;
                }
            }
        });
        seen.extend(drain(&mut log, true));
        assert!(!log.take_missed());
        for first in (0..WRITERS).map(|writer| writer * EACH) {
            let own = first..first + EACH;
            let seen = seen.iter().copied().filter(|number| own.contains(number));
            assert!(seen.eq(own.clone()), "{own:?}");
        }
        assert_eq!(seen.len() as u64, WRITERS * EACH);
    }

    #[test]
    fn backward_is_forward_reversed() {
        let scratch = Scratch::new("rotated-log-backward");
        let path = scratch.path("x");
        let mut journal = Journal::open(&path, SMALL).unwrap();
        for number in 1000..1018 {
            journal.append(&number.to_string()).unwrap();
        }
        let text = fs::read_to_string(&path).unwrap();
        for rest in ["", "1018"] {
            fs::write(&path, text.clone() + rest).unwrap();
            for follow in [false, true] {
                let mut log = open(&path);
                let mut reverse = log.backward(follow).unwrap();
                let end = reverse.end().unwrap();
                let (mut places, mut backward) = (Vec::new(), Vec::new());
                while let Some((place, line)) = reverse.next_line().unwrap() {
                    backward.push(number_of(line));
                    places.push(place);
                }
                let last = 1018 + u64::from(!rest.is_empty() && !follow);
                assert!(backward.iter().copied().eq((1000..last).rev()), "{backward:?}");
                // The unended line isn't told forwards.
                log.go_to(places[9]);
                assert!(drain(&mut log, follow).into_iter().eq(last - 10..1018));
                assert_eq!(log.finish(), rest.as_bytes());
                let mut log = open(&path);
                log.go_to(end);
                assert_eq!(drain(&mut log, follow), [0; 0]);
            }
        }
    }

    #[test]
    fn files_before_some_place_are_left_out() {
        let scratch = Scratch::new("rotated-log-skip");
        let path = scratch.path("x");
        let mut journal = Journal::open(&path, SMALL).unwrap();
        for number in 1000..1030 {
            journal.append(&number.to_string()).unwrap();
        }
        for first in 1000..1031 {
            let mut log = open(&path);
            log.skip_while(&|line| Some(number_of(line) < first)).unwrap();
            let seen = drain(&mut log, false);
            assert!(seen.iter().copied().eq(first..1030), "{first}: {seen:?}");
        }
    }
}
