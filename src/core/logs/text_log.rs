//! A text log read from its last lines on, while somebody writes it.
//!
//! Here: the last lines, those that follow, a file that is begun anew or rotated on the way. Not
//! here: which log somebody wants ([`super`]), or the bus, whose lines are numbered
//! (`core::bus::log`).
//!
//! The broker's log is rotated: the file gets the number 1 and the name leads to a new one. A
//! guest's console and QEMU's messages are begun anew by each launch, in the same file: one that has
//! become shorter is read from its start. Whoever follows holds the file open, so a rotation between
//! two looks hides nothing.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::core::host;

/// At most so much of a file's end is read for its last lines, bytes: a guest may write without ever
/// ending a line.
const MAX_READ: u64 = 16 * 1024 * 1024;
/// Read in pieces of this size.
const READ_BYTES: usize = 64 * 1024;
/// A longer line is handed over in parts: one that never ends would take all memory.
const MAX_LINE_BYTES: usize = 64 * 1024;
/// Rotated files beyond this number are not looked for: `log_keep` is never that large.
const MAX_ROTATED: u32 = 1000;
/// A line without end is handed over after so long without more of it: a prompt is one.
const PROMPT_DELAY: Duration = Duration::from_millis(500);

/// Reads one log.
#[derive(Debug)]
pub struct TextLog {
    path: PathBuf,
    rotates: bool,
    open: Option<Open>,
    /// The beginning of a line whose end isn't there yet.
    pending: Vec<u8>,
    pending_since: Instant,
}

#[derive(Debug)]
struct Open {
    file: File,
    id: (u64, u64),
    at: u64,
}

impl Open {
    /// `None`: there is no such file, or something else than a file, which could be endless.
    fn of(path: &Path) -> io::Result<Option<Open>> {
        // Looked at before it is opened: opening a pipe would wait for whoever writes it.
        match fs::metadata(path) {
            Ok(meta) if meta.is_file() => {}
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        }
        let file = match host::open_state_file(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let id = id_of(&file.metadata()?);
        Ok(Some(Open { file, id, at: 0 }))
    }
}

fn id_of(meta: &fs::Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
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
        self.open = Open::of(&self.path)?;
        let mut lines = Vec::new();
        if let Some(open) = &mut self.open {
            let (bytes, end) = end_of(&open.file, count)?;
            open.at = end;
            let whole = bytes
                .iter()
                .rposition(|byte| *byte == b'\n')
                .map_or(0, |at| at + 1);
            self.pending = bytes[whole.max(bytes.len().saturating_sub(MAX_LINE_BYTES))..].to_vec();
            self.pending_since = Instant::now();
            lines = lines_of(&bytes[..whole]);
        }
        let mut number = 1;
        while self.rotates && lines.len() < count && number < MAX_ROTATED {
            let Some(older) = Open::of(&numbered(&self.path, number))? else {
                break;
            };
            // A rotation meanwhile has given the file a number: it was read already.
            if self.open.as_ref().is_none_or(|open| open.id != older.id) {
                let (bytes, _) = end_of(&older.file, count - lines.len())?;
                let mut before = lines_of(&bytes);
                before.append(&mut lines);
                lines = before;
            }
            number += 1;
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
            let count = open.file.read_at(&mut buffer, open.at)?;
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
        let named = match fs::metadata(&self.path) {
            Ok(named) => named,
            // Between the two steps of a rotation, or there is no log yet, or no longer.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let Some(open) = &mut self.open else {
            self.open = Open::of(&self.path)?;
            return Ok(self.open.is_some());
        };
        if open.id == id_of(&named) {
            if named.len() >= open.at {
                return Ok(false);
            }
            open.at = 0;
            return Ok(self.flush(take));
        }
        // Its last lines may have come between our last read and the rotation.
        let id = open.id;
        if !self.read_on(take)? || !self.flush(take) {
            return Ok(false);
        }
        for older in self.files_between(id)? {
            self.open = Some(older);
            if !self.read_on(take)? || !self.flush(take) {
                return Ok(false);
            }
        }
        self.open = Open::of(&self.path)?;
        Ok(self.open.is_some())
    }

    /// The rotated files that are younger than the one read so far, oldest first.
    fn files_between(&self, id: (u64, u64)) -> io::Result<Vec<Open>> {
        let mut younger = Vec::new();
        let mut number = 1;
        while self.rotates && number < MAX_ROTATED {
            match Open::of(&numbered(&self.path, number))? {
                Some(open) if open.id == id => break,
                Some(open) => younger.push(open),
                None => break,
            }
            number += 1;
        }
        younger.reverse();
        Ok(younger)
    }
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

/// As much of a file's end as holds so many lines, and where it ends.
fn end_of(file: &File, count: usize) -> io::Result<(Vec<u8>, u64)> {
    let length = file.metadata()?.len();
    let mut start = length;
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    let mut line_ends = 0;
    // One line end more than lines: the one before the first.
    while start > 0 && length - start < MAX_READ && line_ends <= count && count > 0 {
        let from = start.saturating_sub(READ_BYTES as u64);
        let mut piece = vec![0; usize::try_from(start - from).unwrap_or(READ_BYTES)];
        let read = read_whole(file, &mut piece, from)?;
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

fn read_whole(file: &File, piece: &mut [u8], from: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < piece.len() {
        match file.read_at(&mut piece[read..], from + read as u64)? {
            0 => break,
            count => read += count,
        }
    }
    Ok(read)
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
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;
    use std::fs::OpenOptions;
    use std::io::Write;

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
            for old in (1..4).rev() {
                let _ = fs::rename(numbered(&path, old), numbered(&path, old + 1));
            }
            fs::rename(&path, numbered(&path, 1)).unwrap();
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
