//! A text log read from its last lines on, while somebody writes it.
//!
//! Here: the last lines, those that follow, a file that is begun anew, a line that has no end yet. Not
//! here: which log somebody wants ([`super`]), rotated files (`core::lines`), or the bus, whose lines
//! are numbered (`core::bus::log`).
//!
//! The broker's log is rotated: the file gets the number 1 and the name leads to a new one. A
//! guest's console and QEMU's messages are begun anew by each launch, in the same file: one that has
//! become shorter is read from its start.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use crate::core::host;
use crate::core::lines::line_file::{Identity, LineFile, read_at};
use crate::core::lines::rotated_log;

/// At most so much of a file's end is read for its last lines, bytes: a guest may write without ever
/// ending a line.
const MAX_READ: u64 = 16 * 1024 * 1024;
/// Read in pieces of this size.
const READ_BYTES: usize = 64 * 1024;
/// A longer line is handed over in parts: one that never ends would take all memory.
const MAX_LINE_BYTES: usize = 64 * 1024;
/// A line without end is handed over after so long without more of it: a prompt is one.
const PROMPT_DELAY: Duration = Duration::from_millis(500);

/// Reads one log.
#[derive(Debug)]
pub struct TextLog {
    path: PathBuf,
    rotates: bool,
    open: Option<OpenFile>,
    /// The beginning of a line whose end isn't there yet.
    pending: Vec<u8>,
    pending_since: Instant,
}

#[derive(Debug)]
struct OpenFile {
    file: LineFile,
    /// How far it has been read.
    at: u64,
}

impl TextLog {
    /// A log at this path, which need not be there yet; `rotates`: older files have numbers.
    pub fn new(path: impl Into<PathBuf>, rotates: bool) -> TextLog {
        TextLog {
            path: path.into(),
            rotates,
            open: None,
            pending: Vec::new(),
            pending_since: Instant::now(),
        }
    }

    /// Whether the log has been written since then; one that isn't there hasn't.
    pub fn is_younger_than(&self, time: SystemTime) -> bool {
        let modified = fs::metadata(&self.path).and_then(|meta| meta.modified());
        modified.is_ok_and(|modified| modified >= time)
    }

    /// The last whole lines, oldest first; what follows is read from there on. The beginning of a
    /// line without end is kept for that, or told by [`TextLog::flush`].
    pub fn last_lines(&mut self, count: usize) -> io::Result<Vec<String>> {
        let mut files = self.files_after(None)?;
        let mut lines = Vec::new();
        if let Some(file) = files.pop_back() {
            let (bytes, end) = end_of(&file, count)?;
            let whole = bytes
                .iter()
                .rposition(|byte| *byte == b'\n')
                .map_or(0, |at| at + 1);
            self.pending = bytes[whole.max(bytes.len().saturating_sub(MAX_LINE_BYTES))..].to_vec();
            self.pending_since = Instant::now();
            lines = lines_of(&bytes[..whole]);
            self.open = Some(OpenFile { file, at: end });
        }
        for older in files.iter().rev() {
            if lines.len() >= count {
                break;
            }
            let (bytes, _) = end_of(older, count - lines.len())?;
            lines.splice(0..0, lines_of(&bytes));
        }
        let surplus = lines.len().saturating_sub(count);
        lines.drain(..surplus);
        Ok(lines)
    }

    /// Hands over what was written since; `take` says whether to go on.
    pub fn read_new(&mut self, take: &mut dyn FnMut(String) -> bool) -> io::Result<bool> {
        loop {
            if !self.read_on(take)? {
                return Ok(false);
            }
            if !self.advance(take)? {
                break;
            }
        }
        if !self.pending.is_empty() && self.pending_since.elapsed() >= PROMPT_DELAY {
            return Ok(self.flush(take));
        }
        Ok(true)
    }

    /// Hands over the beginning of a line, as if it ended here.
    pub fn flush(&mut self, take: &mut dyn FnMut(String) -> bool) -> bool {
        match self.pending.is_empty() {
            true => true,
            false => take(text_of(&std::mem::take(&mut self.pending))),
        }
    }

    /// Reads to the end of the open file.
    fn read_on(&mut self, take: &mut dyn FnMut(String) -> bool) -> io::Result<bool> {
        let mut buffer = [0; READ_BYTES];
        while let Some(open) = &mut self.open {
            let count = read_at(open.file.file(), &mut buffer, open.at)?;
            if count == 0 {
                break;
            }
            open.at += count as u64;
            for byte in &buffer[..count] {
                let ends = *byte == b'\n';
                if !ends {
                    self.pending.push(*byte);
                }
                if (ends || self.pending.len() >= MAX_LINE_BYTES)
                    && !take(text_of(&std::mem::take(&mut self.pending)))
                {
                    return Ok(false);
                }
            }
            self.pending_since = Instant::now();
        }
        Ok(true)
    }

    /// At the end of the open file: whether there is another one to read, or this one anew.
    fn advance(&mut self, take: &mut dyn FnMut(String) -> bool) -> io::Result<bool> {
        let Some(open) = &mut self.open else {
            let first = self.files_after(None)?.pop_back();
            self.open = first.map(|file| OpenFile { file, at: 0 });
            return Ok(self.open.is_some());
        };
        if host::names_this_file(&self.path, open.file.file()) {
            if open.file.length()? >= open.at {
                return Ok(false);
            }
            open.at = 0;
            return Ok(self.flush(take));
        }
        let known = open.file.identity()?;
        let mut newer = self.files_after(Some(known))?;
        let Some(next) = newer.pop_front() else {
            // Between the two steps of a rotation, or there is no longer a log.
            return Ok(false);
        };
        // Its last lines may have come between our last read and the rotation.
        if !self.read_on(take)? || !self.flush(take) {
            return Ok(false);
        }
        self.open = Some(OpenFile { file: next, at: 0 });
        Ok(true)
    }

    /// The files of the log, oldest first; those that are younger than a known one.
    fn files_after(&self, known: Option<Identity>) -> io::Result<VecDeque<LineFile>> {
        if self.rotates {
            return Ok(rotated_log::files(&self.path, MAX_LINE_BYTES, known)?.0);
        }
        Ok(LineFile::open(&self.path, MAX_LINE_BYTES)?.into_iter().collect())
    }
}

/// As much of a file's end as holds so many lines, and where it ends.
fn end_of(file: &LineFile, count: usize) -> io::Result<(Vec<u8>, u64)> {
    let length = file.length()?;
    let mut start = length;
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    let mut line_ends = 0;
    // One line end more than lines: the one before the first.
    while start > 0 && length - start < MAX_READ && line_ends <= count && count > 0 {
        let from = start.saturating_sub(READ_BYTES as u64);
        let mut piece = vec![0; usize::try_from(start - from).unwrap_or(READ_BYTES)];
        let read = read_at(file.file(), &mut piece, from)?;
        piece.truncate(read);
        // The middle of a log that grew too large was given back: what is before it is another story.
        if piece.iter().all(|byte| *byte == 0) {
            break;
        }
        line_ends += piece.iter().filter(|byte| **byte == b'\n').count();
        pieces.push(piece);
        start = from;
    }
    pieces.reverse();
    let bytes: Vec<u8> = pieces.concat();
    let first = match start {
        0 => 0,
        // The first line is cut, unless it is all there is.
        _ => bytes
            .iter()
            .position(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1),
    };
    Ok((bytes[first..].to_vec(), length))
}

fn lines_of(bytes: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(bytes)
        .lines()
        .map(str::to_owned)
        .collect()
}

fn text_of(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.strip_suffix('\r').unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::lines::journal::rotate;
    use crate::core::scratch::Scratch;
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::path::Path;

    fn last(path: &Path, rotates: bool, count: usize) -> Vec<String> {
        TextLog::new(path, rotates).last_lines(count).unwrap()
    }

    fn more(tail: &mut TextLog) -> Vec<String> {
        let mut lines = Vec::new();
        tail.read_new(&mut |line| {
            lines.push(line);
            true
        })
        .unwrap();
        lines
    }

    fn append(path: &Path, text: &str) {
        let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn the_last_lines_of_small_and_large_files() {
        let scratch = Scratch::new("tail-last");
        let path = scratch.path("log");
        assert!(last(&path, false, 5).is_empty(), "no file");
        for (text, count, expected, rest) in [
            ("", 3, vec![], ""),
            ("a\nb\nc\n", 2, vec!["b", "c"], ""),
            ("a\nb\nc", 2, vec!["a", "b"], "c"),
            ("a\r\nb\r\n", 9, vec!["a", "b"], ""),
            ("a\n", 0, vec![], ""),
            ("a", 0, vec![], ""),
        ] {
            fs::write(&path, text).unwrap();
            let mut tail = TextLog::new(&path, false);
            assert_eq!(tail.last_lines(count).unwrap(), expected, "{text:?}");
            let mut flushed = String::new();
            tail.flush(&mut |line| {
                flushed = line;
                true
            });
            assert_eq!(flushed, rest, "{text:?}");
        }
        let many: String = (0..50_000).map(|number| format!("line {number}\n")).collect();
        fs::write(&path, many).unwrap();
        let lines = last(&path, false, 20_000);
        assert_eq!((lines.len(), lines[0].as_str()), (20_000, "line 30000"));
        fs::write(&path, vec![b'x'; 20 << 20]).unwrap();
        let mut tail = TextLog::new(&path, false);
        tail.last_lines(3).unwrap();
        assert_eq!(tail.pending.len(), MAX_LINE_BYTES);
    }

    #[test]
    fn the_last_lines_reach_into_rotated_files() {
        let scratch = Scratch::new("tail-rotated");
        let path = scratch.path("log");
        fs::write(scratch.path("log.2"), "a\nb\n").unwrap();
        fs::write(scratch.path("log.1"), "c\nd\n").unwrap();
        fs::write(&path, "e\n").unwrap();
        assert_eq!(last(&path, true, 4), ["b", "c", "d", "e"]);
        assert_eq!(last(&path, true, 9), ["a", "b", "c", "d", "e"]);
        assert_eq!(last(&path, false, 9), ["e"]);
    }

    #[test]
    fn what_follows_is_handed_over_once() {
        let scratch = Scratch::new("tail-follow");
        let path = scratch.path("log");
        let mut tail = TextLog::new(&path, false);
        assert!(tail.last_lines(9).unwrap().is_empty() && more(&mut tail).is_empty());
        append(&path, "one\ntw");
        assert_eq!(more(&mut tail), ["one"]);
        append(&path, "o\r\nthree\n");
        assert_eq!(more(&mut tail), ["two", "three"]);
        assert!(more(&mut tail).is_empty());
        let mut tail = TextLog::new(&path, false);
        assert_eq!(tail.last_lines(1).unwrap(), ["three"]);
        append(&path, "four\n");
        assert_eq!(more(&mut tail), ["four"]);
    }

    #[test]
    fn a_file_that_is_begun_anew_is_read_from_its_start() {
        let scratch = Scratch::new("tail-anew");
        let path = scratch.path("serial.log");
        append(&path, "first boot, with many words\nlogin: ");
        let mut tail = TextLog::new(&path, false);
        tail.last_lines(9).unwrap();
        fs::write(&path, "second boot\n").unwrap();
        assert_eq!(more(&mut tail), ["login: ", "second boot"]);
        fs::remove_file(&path).unwrap();
        assert!(more(&mut tail).is_empty());
        append(&path, "a new file\n");
        assert_eq!(more(&mut tail), ["a new file"]);
    }

    #[test]
    fn rotations_between_two_looks_hide_nothing() {
        let scratch = Scratch::new("tail-rotations");
        let path = scratch.path("log");
        append(&path, "0\n");
        let mut tail = TextLog::new(&path, true);
        tail.last_lines(9).unwrap();
        append(&path, "1\n");
        for number in 2..5 {
            rotate(&path, 4).unwrap();
            append(&path, &format!("{number}\n"));
        }
        assert_eq!(more(&mut tail), ["1", "2", "3", "4"]);
        append(&path, "5\n");
        assert_eq!(more(&mut tail), ["5"]);
    }

    #[test]
    fn a_line_without_end_is_bounded_and_a_prompt_is_shown() {
        let scratch = Scratch::new("tail-endless");
        let path = scratch.path("log");
        append(&path, &"x".repeat(MAX_LINE_BYTES + 10));
        let mut tail = TextLog::new(&path, false);
        let lines = more(&mut tail);
        assert_eq!((lines.len(), lines[0].len()), (1, MAX_LINE_BYTES));
        tail.pending_since = Instant::now() - PROMPT_DELAY;
        assert_eq!(more(&mut tail), ["x".repeat(10)]);
        assert!(more(&mut tail).is_empty());
    }

    #[test]
    fn what_is_no_file_is_not_read() {
        let scratch = Scratch::new("tail-pipe");
        let path = scratch.path("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut tail = TextLog::new(&path, true);
        assert!(tail.last_lines(9).unwrap().is_empty() && more(&mut tail).is_empty());
    }
}
