//! An agent's output, line by line and unchanged: `logs/harness/<thread>.jsonl`.
//!
//! Here: writing, naming and reading these files. Not here: what was made of the lines (`relay`), or the sums
//! (`ledger`).

use std::collections::VecDeque;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::line_splitter::{Line, LineSplitter, MAX_LINE_BYTES};
use crate::core::host;
use crate::core::lines::journal::{Journal, Rotation};
use crate::core::lines::line_file::LineFile;
use crate::core::lines::rotated_log;

/// Lines are written in batches of about this size; sooner when the agent falls silent.
const BATCH: usize = 64 * 1024;
/// A line longer than this is written by itself, so that the batch stays small.
const ALONE: usize = 16 * 1024;

/// The file name, without its end, that stands for a thread: its id if that is harmless, else the
/// SHA-256 of it.
pub fn name_of(thread: &str) -> String {
    let harmless = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if (1..=64).contains(&thread.len()) && thread.bytes().all(harmless) {
        return thread.to_owned();
    }
    host::hex(&Sha256::digest(thread.as_bytes()))
}

/// The file of a thread.
pub fn path_of(dir: &Path, thread: &str) -> PathBuf {
    dir.join(format!("{}.jsonl", name_of(thread)))
}

/// Writes the lines of one stream to the files of its threads.
#[derive(Debug)]
pub struct Transcript {
    dir: PathBuf,
    rotation: Rotation,
    thread: Option<String>,
    file: Option<Journal>,
    batch: Vec<u8>,
    trouble: Option<io::Error>,
}

impl Transcript {
    /// A transcript in this folder, which is made when it is needed.
    pub fn new(dir: PathBuf, rotation: Rotation) -> Transcript {
        Transcript {
            dir,
            rotation,
            thread: None,
            file: None,
            batch: Vec::new(),
            trouble: None,
        }
    }

    /// Keeps a line of this thread. Lines before the first thread wait for its name, as far as they fit into
    /// a batch. A line that is too long isn't kept.
    pub fn line(&mut self, thread: Option<&str>, line: Line<'_>) {
        if self.thread.as_deref() != thread {
            self.turn_to(thread);
        }
        let bytes = match line {
            Line::Whole(bytes) | Line::Torn(bytes) => bytes,
            Line::TooLong(..) => return,
        };
        if self.file.is_none() && (self.thread.is_some() || self.batch.len() + bytes.len() > BATCH) {
            return;
        }
        if bytes.len() > ALONE || self.batch.len() + bytes.len() >= BATCH {
            self.flush();
        }
        self.batch.extend_from_slice(bytes);
        self.batch.push(b'\n');
        if bytes.len() > ALONE {
            self.flush();
        }
    }

    fn turn_to(&mut self, thread: Option<&str>) {
        if self.thread.is_some() {
            self.flush();
        }
        self.thread = thread.map(str::to_owned);
        self.file = None;
        let Some(thread) = thread else {
            return;
        };
        match Journal::open(path_of(&self.dir, thread), self.rotation) {
            Ok(file) => self.file = Some(file),
            Err(error) => {
                self.batch.clear();
                self.trouble.get_or_insert(error);
            }
        }
    }

    /// Writes the waiting lines. Lines that can't be written are dropped, and [`Transcript::take_error`]
    /// returns the error; the stream goes on.
    pub fn flush(&mut self) {
        let Some(file) = &mut self.file else {
            return;
        };
        if !self.batch.is_empty()
            && let Err(error) = file.append_bytes(&self.batch)
        {
            self.trouble.get_or_insert(error);
        }
        self.batch.clear();
        self.batch.shrink_to(2 * BATCH);
    }

    /// The error since the last call, and its file.
    pub fn take_error(&mut self) -> Option<(PathBuf, io::Error)> {
        let error = self.trouble.take()?;
        Some((
            path_of(&self.dir, self.thread.as_deref().unwrap_or_default()),
            error,
        ))
    }
}

/// Passes on all lines of a thread, oldest first, until `take` returns false. Without a file there are none.
pub fn read(path: &Path, mut take: impl FnMut(Line<'_>) -> bool) -> io::Result<()> {
    let mut goes_on = true;
    for file in files(path)? {
        let mut lines = LineSplitter::default();
        let mut reader = file.file();
        let mut piece = vec![0; BATCH];
        while goes_on {
            let length = reader.read(&mut piece)?;
            if length == 0 {
                break;
            }
            lines.feed(&piece[..length], |line| goes_on = goes_on && take(line));
        }
        if goes_on {
            lines.end(|line| goes_on = take(line));
        }
    }
    Ok(())
}

/// Bytes of all files of a thread.
pub fn size(path: &Path) -> u64 {
    let files = files(path).unwrap_or_default();
    files.iter().filter_map(|file| file.length().ok()).sum()
}

fn files(path: &Path) -> io::Result<VecDeque<LineFile>> {
    Ok(rotated_log::files(path, MAX_LINE_BYTES, None)?.0)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::core::scratch::Scratch;

    #[test]
    fn only_harmless_ids_become_names() {
        for id in ["a", "01a1fc62-3b49-7fb2-8bfb-e3ac3d5dc254", &"x".repeat(64)] {
            assert_eq!(name_of(id), id);
        }
        for id in ["", "..", "a/b", "a.b", "a_b", "é", "a\n", &"x".repeat(65)] {
            let name = name_of(id);
            assert_eq!(name.len(), 64, "{id:?}");
            assert!(name.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id:?}");
        }
    }

    #[test]
    fn lines_go_to_the_file_of_their_thread() {
        let scratch = Scratch::new("harness-transcript");
        let dir = scratch.path("logs/harness");
        let mut transcript = Transcript::new(dir.clone(), Rotation::default());
        transcript.line(None, Line::Whole(b"early"));
        transcript.line(Some("one"), Line::Whole(b"first"));
        transcript.line(Some("one"), Line::Whole(&[b'x'; ALONE + 1]));
        transcript.line(Some("../two"), Line::TooLong(b"", 99));
        transcript.line(Some("../two"), Line::Torn(b"\xff"));
        transcript.line(Some("one"), Line::Whole(b"again"));
        transcript.flush();
        assert!(transcript.take_error().is_none());
        let one = fs::read(dir.join("one.jsonl")).unwrap();
        assert!(one.starts_with(b"early\nfirst\nxxx") && one.ends_with(b"xxx\nagain\n"));
        assert_eq!(fs::read(path_of(&dir, "../two")).unwrap(), b"\xff\n");
        let mode = fs::metadata(dir.join("one.jsonl")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn rotated_files_are_read_in_order() {
        let scratch = Scratch::new("harness-rotated");
        let rotation = Rotation {
            max_bytes: 20,
            keep: 5,
        };
        let mut transcript = Transcript::new(scratch.dir().to_owned(), rotation);
        for number in 10..20 {
            transcript.line(Some("t"), Line::Whole(format!("line {number}").as_bytes()));
            transcript.flush();
        }
        let path = path_of(scratch.dir(), "t");
        let mut seen = Vec::new();
        read(&path, |line| {
            if let Line::Whole(bytes) = line {
                seen.push(String::from_utf8_lossy(bytes).into_owned());
            }
            true
        })
        .unwrap();
        assert_eq!(seen.len(), 10, "{seen:?}");
        assert!(seen.is_sorted());
        assert_eq!(size(&path), 80);
        let mut first = 0;
        read(&path, |_| {
            first += 1;
            false
        })
        .unwrap();
        assert_eq!(first, 1);
        read(&scratch.path("none.jsonl"), |_| panic!("there is none")).unwrap();
    }

    #[test]
    fn what_cannot_be_written_is_told_once() {
        let scratch = Scratch::new("harness-unwritable");
        fs::write(scratch.path("file"), "").unwrap();
        let mut transcript = Transcript::new(scratch.path("file/harness"), Rotation::default());
        transcript.line(Some("t"), Line::Whole(b"a"));
        transcript.line(Some("t"), Line::Whole(b"b"));
        transcript.flush();
        assert!(transcript.take_error().is_some());
        assert!(transcript.take_error().is_none());
    }
}
