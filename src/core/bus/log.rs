//! Reading a log of the bus while the broker goes on writing it: the file, and the rotated ones
//! before it (docs/PROTOCOL.md).
//!
//! Here: the last messages, those that follow, rotation on the way, lines that are none. Not here:
//! writing (`core::broker`), or which log somebody wants (`core::operations::bus`).
//!
//! A log is what its name leads to, then `.1`, the youngest of the rotated files, and so on. Files
//! that are open are known by their inodes, so a rotation between two looks neither hides a line
//! nor shows one twice. Only whole lines count: what stands behind the last line end is being
//! written, or will be cut off.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::core::cancel::Cancel;

use super::client_frame::MAX_FRAME_BYTES;
use super::message::Message;
use super::topic::Pattern;

use crate::core::host;

/// Older files than so many are not looked at: each one open takes a descriptor, of which a
/// process has 1024 as a rule. With the usual rotation five files are all there is.
pub const MAX_FILES: usize = 200;

/// Read in pieces of this size.
const READ_BYTES: usize = 64 * 1024;

/// A longer line is none: no frame could have brought it.
const MAX_LINE_BYTES: usize = MAX_FRAME_BYTES;

/// How often the files are listed again when they are rotated meanwhile.
const LISTINGS: usize = 10;

/// One log, read from old to young.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    /// Looked at between two reads: a line may have gigabytes.
    stop: Cancel,
    topics: Vec<Pattern>,
    /// Oldest first; the first one is being read.
    parts: VecDeque<Part>,
    /// Bytes of the first part from its `at` on, after `taken`.
    buffer: Vec<u8>,
    taken: usize,
    /// So many of them are known to hold no line end.
    searched: usize,
    /// In the middle of a line that is too long to be one.
    in_waste: bool,
    /// Of the last message read, of any topic.
    last_seq: Option<u64>,
    /// The last bytes before the first part's `at`, to know them again when the file was cut back.
    passed: Vec<u8>,
    /// The name leads to another file than the youngest part: that one grows no more.
    is_rotated: bool,
    /// Files in between may have been dropped before they were read.
    may_have_lost: bool,
    skipped: u64,
    lost: u64,
}

/// One file of the log.
#[derive(Debug)]
struct Part {
    file: File,
    id: FileId,
    /// Where the first line not yet read begins.
    at: u64,
}

/// Device and inode.
type FileId = (u64, u64);

impl LogReader {
    /// Before the oldest message that is kept. No file is an empty log. Of topics, those that any
    /// pattern means; no pattern: all.
    pub fn open(path: impl Into<PathBuf>, topics: Vec<Pattern>) -> io::Result<LogReader> {
        let path = path.into();
        let mut parts = list(&path)?;
        parts.reverse();
        Ok(LogReader {
            path,
            stop: Cancel::new(),
            topics,
            parts: parts.into(),
            buffer: Vec::new(),
            taken: 0,
            searched: 0,
            in_waste: false,
            last_seq: None,
            passed: Vec::new(),
            is_rotated: false,
            may_have_lost: false,
            skipped: 0,
            lost: 0,
        })
    }

    /// Reading ends with an error of the kind `Interrupted` soon after this flag is raised.
    pub fn until(mut self, stop: Cancel) -> LogReader {
        self.stop = stop;
        self
    }

    /// Goes to before the last `count` messages wanted, reading from the end: what a log of many
    /// files costs is what those messages take. For a reader that has read nothing yet.
    pub fn seek_last(&mut self, count: u64) -> io::Result<()> {
        let mut left = count;
        let mut keep = 0;
        for part in self.parts.iter_mut().rev() {
            part.at = start_of_last(&part.file, &mut left, &self.topics, &self.stop)?;
            keep += 1;
            if left == 0 {
                break;
            }
        }
        while self.parts.len() > keep {
            self.parts.pop_front();
        }
        Ok(())
    }

    /// The next message wanted, `None` where the log ends for now; ask again to follow it.
    pub fn next_message(&mut self) -> io::Result<Option<Message>> {
        loop {
            if let Some(message) = self.next_in_buffer() {
                return Ok(Some(message));
            }
            if self.fill()? {
                continue;
            }
            // Half a line is read again from its start when there is more: should the broker cut
            // it off and write another there, halves of two must not meet.
            let torn = self.buffer.len() > self.taken;
            self.forget_buffer();
            if self.parts.len() > 1 {
                self.skipped += u64::from(torn || self.in_waste);
                self.in_waste = false;
                self.passed.clear();
                self.parts.pop_front();
            } else if !self.advance()? {
                return Ok(None);
            }
        }
    }

    /// Lines that were no messages and were passed over. Where only some topics are wanted, lines
    /// that name another one are not looked at any closer.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// How often files may have been rotated away before they were read.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    fn next_in_buffer(&mut self) -> Option<Message> {
        loop {
            let rest = &self.buffer[self.taken..];
            let found = rest[self.searched..].iter().position(|byte| *byte == b'\n');
            let Some(end) = found.map(|at| self.searched + at) else {
                self.searched = rest.len();
                if rest.len() > MAX_LINE_BYTES {
                    self.in_waste = true;
                    self.pass(rest.len());
                }
                return None;
            };
            let line = &rest[..end];
            let looked = match std::mem::take(&mut self.in_waste) {
                true => LineKind::NoMessage,
                false => kind_of(line, &self.topics),
            };
            self.pass(end + 1);
            let (seq, wanted) = match looked {
                LineKind::NoMessage => {
                    self.skipped += 1;
                    continue;
                }
                LineKind::Other(seq) => (seq, None),
                LineKind::Wanted(message) => (message.seq, Some(message)),
            };
            if std::mem::take(&mut self.may_have_lost) {
                let follows = self.last_seq.is_none_or(|last| last.checked_add(1) == Some(seq));
                self.lost += u64::from(!follows);
            }
            self.last_seq = Some(seq);
            if wanted.is_some() {
                return wanted;
            }
        }
    }

    /// So many bytes of the buffer are done with.
    fn pass(&mut self, count: usize) {
        self.taken += count;
        self.searched = 0;
        if let Some(part) = self.parts.front_mut() {
            part.at += count as u64;
        }
    }

    fn forget_buffer(&mut self) {
        self.buffer.clear();
        self.taken = 0;
        self.searched = 0;
    }

    /// Reads on; false at the end of the part.
    fn fill(&mut self) -> io::Result<bool> {
        if self.taken > 0 {
            self.passed.clear();
            self.passed.extend_from_slice(&self.buffer[..self.taken]);
        }
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let Some(part) = self.parts.front() else {
            return Ok(false);
        };
        go_on(&self.stop)?;
        let have = self.buffer.len();
        self.buffer.resize(have + READ_BYTES, 0);
        let read = read_at(&part.file, &mut self.buffer[have..], part.at + have as u64);
        self.buffer.truncate(have + *read.as_ref().unwrap_or(&0));
        Ok(read? > 0)
    }

    /// At the end of the youngest part: whether there is more to read after all.
    fn advance(&mut self) -> io::Result<bool> {
        let named = match fs::metadata(&self.path) {
            Ok(named) => named,
            // Between the two steps of a rotation, or there is no log yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let Some(part) = self.parts.front_mut() else {
            let mut parts = list(&self.path)?;
            parts.reverse();
            self.parts = parts.into();
            return Ok(!self.parts.is_empty());
        };
        if id_of(&named) == part.id {
            if named.len() >= part.at {
                return Ok(false);
            }
            // Cut back after a write that failed: its numbers are given again, so what comes now
            // is new even where the numbers aren't.
            part.at = still_there(part, &self.passed)?;
            self.passed.clear();
            self.in_waste = false;
            return Ok(named.len() > part.at);
        }
        if !std::mem::replace(&mut self.is_rotated, true) {
            // Its last lines may have come between our last read and the rotation.
            return Ok(true);
        }
        self.is_rotated = false;
        let id = part.id;
        let mut younger = list(&self.path)?;
        match younger.iter().position(|part| part.id == id) {
            Some(ours) => younger.truncate(ours),
            None => self.may_have_lost = true,
        }
        self.passed.clear();
        self.in_waste = false;
        self.parts.pop_front();
        self.parts.extend(younger.into_iter().rev());
        Ok(true)
    }
}

/// What a line is.
enum LineKind {
    NoMessage,
    /// A message of another topic, of which the number is all that counts.
    Other(u64),
    Wanted(Message),
}

fn kind_of(line: &[u8], topics: &[Pattern]) -> LineKind {
    let is_wanted = |topic: &str| topics.is_empty() || topics.iter().any(|pattern| pattern.matches(topic));
    // One topic among millions of messages: what is plainly of another one isn't parsed.
    if let Some((seq, topic)) = at_a_glance(line).filter(|_| !topics.is_empty())
        && !is_wanted(topic)
    {
        return LineKind::Other(seq);
    }
    match Message::parse(line) {
        Ok(message) if is_wanted(&message.topic) => LineKind::Wanted(message),
        Ok(message) => LineKind::Other(message.seq),
        Err(_) => LineKind::NoMessage,
    }
}

/// Number and topic of a line as the broker writes it. A sender's name holds nothing that could be
/// taken for the key: within a string of JSON a quote has a backslash before it.
fn at_a_glance(line: &[u8]) -> Option<(u64, &str)> {
    const KEY: &[u8] = b",\"topic\":\"";
    let rest = line.strip_prefix(b"{\"seq\":")?.strip_suffix(b"}")?;
    let digits = rest.iter().position(|byte| !byte.is_ascii_digit())?;
    let seq = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
    // Number, time and name are short: what isn't near isn't there.
    let near = &rest[..rest.len().min(256)];
    let key = near.windows(KEY.len()).position(|window| window == KEY)?;
    let topic = &rest[key + KEY.len()..];
    let end = topic.iter().position(|byte| matches!(byte, b'"' | b'\\'))?;
    let topic = std::str::from_utf8(topic.get(..end)?).ok()?;
    (rest.get(key + KEY.len() + end) == Some(&b'"')).then_some((seq, topic))
}

fn id_of(metadata: &fs::Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}

/// Where to go on in a file that was cut back: behind the last line that is still as it was read.
fn still_there(part: &Part, passed: &[u8]) -> io::Result<u64> {
    let from = part.at.saturating_sub(passed.len() as u64);
    let mut now = vec![0; passed.len()];
    let mut have = 0;
    while have < now.len() {
        match read_at(&part.file, &mut now[have..], from + have as u64)? {
            0 => break,
            more => have += more,
        }
    }
    if have == 0 {
        // Far more is gone than a failed write: it is another log by now.
        return Ok(0);
    }
    let same = passed
        .iter()
        .zip(&now[..have])
        .take_while(|(was, is)| was == is)
        .count();
    let lines = passed[..same].iter().rposition(|byte| *byte == b'\n');
    Ok(from + lines.map_or(0, |end| end as u64 + 1))
}

/// Fails if whoever reads has had enough.
fn go_on(stop: &Cancel) -> io::Result<()> {
    match stop.is_requested() {
        true => Err(io::ErrorKind::Interrupted.into()),
        false => Ok(()),
    }
}

/// A read that isn't troubled by signals.
fn read_at(file: &File, out: &mut [u8], at: u64) -> io::Result<usize> {
    loop {
        match file.read_at(out, at) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// The files of a log, youngest first. Rotation gives files higher numbers, so who goes by rising
/// numbers can meet a file twice, which its inode tells, but can't miss one. A hole is the place of
/// the file that is being renamed. Only a log that was rotated twice meanwhile is listed anew.
fn list(path: &Path) -> io::Result<Vec<Part>> {
    let mut parts = Vec::new();
    for _ in 0..LISTINGS {
        parts.clear();
        let before = named_id(path)?;
        let (mut number, mut holes) = (0, 0);
        while holes < 2 && parts.len() < MAX_FILES {
            let name = match number {
                0 => path.to_owned(),
                number => numbered(path, number),
            };
            match open_part(&name)? {
                Some(part) => {
                    holes = 0;
                    if parts.iter().all(|other: &Part| other.id != part.id) {
                        parts.push(part);
                    }
                }
                // The log itself may be missing for a moment.
                None => holes += usize::from(number > 0),
            }
            number += 1;
        }
        if named_id(path)? == before {
            break;
        }
    }
    Ok(parts)
}

fn numbered(path: &Path, number: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

fn named_id(path: &Path) -> io::Result<Option<FileId>> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Some(id_of(&metadata))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn open_part(path: &Path) -> io::Result<Option<Part>> {
    // Asked before it is opened: a pipe in its place would keep us waiting for a writer.
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Ok(None),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    }
    match host::open_state_file(path) {
        Ok(file) => {
            let id = id_of(&file.metadata()?);
            Ok(Some(Part { file, id, at: 0 }))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where the last `left` messages wanted begin in a file; `left` is reduced by those found.
fn start_of_last(file: &File, left: &mut u64, topics: &[Pattern], stop: &Cancel) -> io::Result<u64> {
    let mut start = file.metadata()?.len();
    // The beginning of a line whose end was seen already. At first that is what stands behind the
    // last line end, which is no line.
    let mut line: Vec<u8> = Vec::new();
    let mut behind_last_end = true;
    let mut end_of_lines = start;
    while start > 0 {
        if *left == 0 && !behind_last_end {
            return Ok(end_of_lines);
        }
        go_on(stop)?;
        let from = start.saturating_sub(READ_BYTES as u64);
        let mut piece = vec![0; usize::try_from(start - from).unwrap_or(READ_BYTES)];
        let mut have = 0;
        while have < piece.len() {
            match read_at(file, &mut piece[have..], from + have as u64)? {
                // Cut back meanwhile: what isn't there any more is no line.
                0 => break,
                more => have += more,
            }
        }
        piece.truncate(have);
        start = from;
        let mut rest = piece.as_slice();
        while let Some(end) = rest.iter().rposition(|byte| *byte == b'\n') {
            let (before, tail) = (&rest[..end], &rest[end + 1..]);
            let begins = from + end as u64 + 1;
            if behind_last_end {
                behind_last_end = false;
                end_of_lines = begins;
                if *left == 0 {
                    return Ok(begins);
                }
            } else if counts(tail, &line, topics) {
                *left -= 1;
                if *left == 0 {
                    return Ok(begins);
                }
            }
            line.clear();
            rest = before;
        }
        // A line that is too long to be one is not kept, only known to be.
        if line.len() <= MAX_LINE_BYTES {
            line.splice(0..0, rest.iter().copied());
        }
    }
    // The first line of the file begins where the file does.
    if !behind_last_end && *left > 0 && counts(&[], &line, topics) {
        *left -= 1;
    }
    Ok(0)
}

fn counts(head: &[u8], tail: &[u8], topics: &[Pattern]) -> bool {
    if head.len() + tail.len() > MAX_LINE_BYTES {
        return false;
    }
    let looked = match tail {
        [] => kind_of(head, topics),
        _ => kind_of(&[head, tail].concat(), topics),
    };
    matches!(looked, LineKind::Wanted(_))
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
