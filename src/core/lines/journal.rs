//! Files that several processes append whole lines to, and that are rotated by size: the event
//! journals and the broker's log (docs/EVENTS.md).
//!
//! Here: appending, cutting a torn tail, rotation. Not here: what a line says.
//!
//! The rules: a writer holds a shared lock for one append and checks that the path still names
//! its file; whoever opens the file, or finds it too large, takes the lock exclusively, cuts a
//! torn tail and rotates (`x.jsonl` becomes `x.jsonl.1`, and so on up to `keep`).

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::core::host;

/// When a file is rotated and how many old ones are kept (`log_max_bytes`, `log_keep`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Rotate before an append that would find the file this large, in bytes.
    pub max_bytes: u64,
    /// How many rotated files stay.
    pub keep: u32,
}

impl Default for Rotation {
    fn default() -> Rotation {
        Rotation {
            max_bytes: 64 * 1024 * 1024,
            keep: 4,
        }
    }
}

/// Room for lines that is kept from one append to the next, bytes.
const MAX_KEPT: usize = 64 * 1024;

/// Where the next line belongs.
enum FileState {
    /// Into the open file.
    Current,
    /// Into the next, when this one has been rotated.
    Full,
    /// Into another file: the path doesn't lead to the open one any more.
    Replaced,
}

/// A line file open for appending.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    rotation: Rotation,
    /// What is being appended; kept for its room.
    bytes: Vec<u8>,
}

impl Journal {
    /// Opens the file, making it and its directory if needed, and cuts a torn tail.
    pub fn open(path: impl Into<PathBuf>, rotation: Rotation) -> io::Result<Journal> {
        let path = path.into();
        if let Some(dir) = path.parent() {
            host::ensure_private_dir(dir)?;
        }
        let file = open_for_append(&path)?;
        let mut journal = Journal {
            path,
            file,
            rotation,
            bytes: Vec::new(),
        };
        journal.repair_and_rotate()?;
        Ok(journal)
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends one line (without line end) or several joined by line feeds, whole, with one `write`.
    pub fn append(&mut self, lines: &str) -> io::Result<()> {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        bytes.extend_from_slice(lines.as_bytes());
        bytes.push(b'\n');
        let outcome = self.append_bytes(&bytes);
        // One long batch shouldn't hold its room for ever.
        if bytes.capacity() <= MAX_KEPT {
            self.bytes = bytes;
        }
        outcome
    }

    /// Appends whole lines as they are, the last line feed included, with one `write`.
    pub fn append_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        loop {
            host::lock_open_file(&self.file, false)?;
            let outcome = match self.file_state() {
                Ok(FileState::Current) => self.write_whole(bytes).map(Some),
                Ok(FileState::Full) => Ok(None),
                Ok(FileState::Replaced) => self.reopen().map(|()| None),
                Err(error) => Err(error),
            };
            // A lock on a file that was reopened went with its descriptor.
            host::unlock_open_file(&self.file);
            match outcome? {
                Some(written) if written == bytes.len() => return Ok(()),
                // A full disk cut it short: what of it is there must not stay.
                Some(_) => {
                    self.repair_and_rotate()?;
                    return Err(io::ErrorKind::StorageFull.into());
                }
                None => self.repair_and_rotate()?,
            }
        }
    }

    /// Under the shared lock: whether the next line belongs into the open file.
    fn file_state(&self) -> io::Result<FileState> {
        let open = self.file.metadata()?;
        let named = fs::metadata(&self.path);
        let here = named.is_ok_and(|named| named.ino() == open.ino() && named.dev() == open.dev());
        Ok(match here {
            false => FileState::Replaced,
            true if open.len() >= self.rotation.max_bytes => FileState::Full,
            true => FileState::Current,
        })
    }

    /// Somebody rotated the file, or removed it or the directory it was in.
    fn reopen(&mut self) -> io::Result<()> {
        self.file = match open_for_append(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(dir) = self.path.parent() {
                    host::ensure_private_dir(dir)?;
                }
                open_for_append(&self.path)?
            }
            other => other?,
        };
        Ok(())
    }

    /// One `write` under O_APPEND.
    fn write_whole(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.file.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Under the exclusive lock: cuts a torn tail, rotates what is too large.
    fn repair_and_rotate(&mut self) -> io::Result<()> {
        host::lock_open_file(&self.file, true)?;
        let outcome = self.repair_and_rotate_locked();
        host::unlock_open_file(&self.file);
        if outcome? {
            self.file = open_for_append(&self.path)?;
        }
        Ok(())
    }

    /// True if the file was rotated away, by us or before us.
    fn repair_and_rotate_locked(&mut self) -> io::Result<bool> {
        if !host::names_this_file(&self.path, &self.file) {
            return Ok(true);
        }
        let length = self.file.metadata()?.len();
        let whole = end_of_last_line(&mut self.file, length)?;
        if whole < length {
            self.file.set_len(whole)?;
        }
        if whole < self.rotation.max_bytes {
            return Ok(false);
        }
        rotate(&self.path, self.rotation.keep)?;
        Ok(true)
    }
}

/// The name of a log's file: 0 is the log itself, 1 the youngest rotated file.
pub(crate) fn rotated(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    if number > 0 {
        name.push(format!(".{number}"));
    }
    PathBuf::from(name)
}

/// Moves a file and the rotated ones before it on by one; the oldest goes.
///
/// The oldest is removed first and its last descriptor closed by a thread of its own: to give
/// 64 MiB back takes ext4 15 to 60 ms, and to rename over it longer still, because that begins to
/// write out what replaces it. The state thread of a broker has no such time.
pub(crate) fn rotate(path: &Path, keep: u32) -> io::Result<()> {
    let mut held = Vec::new();
    // Behind the oldest are those that an earlier, larger `keep` has left.
    for number in keep.. {
        let oldest = rotated(path, number);
        let file = host::open_state_file(&oldest);
        if number > keep && file.is_err() {
            break;
        }
        host::remove_if_there(&oldest)?;
        held.extend(file);
    }
    for number in (0..keep).rev() {
        match fs::rename(rotated(path, number), rotated(path, number + 1)) {
            Err(error) if number == 0 || error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    if !held.is_empty() {
        // Nobody has to wait for it: at the end of the process the kernel closes it as well. Where
        // there is no thread to be had it is closed here, with the closure that can't run.
        let let_go = std::thread::Builder::new().name("log-let-go".to_owned());
        let _ = let_go.stack_size(64 * 1024).spawn(move || drop(held));
    }
    Ok(())
}

fn open_for_append(path: &Path) -> io::Result<File> {
    host::private_file()
        .read(true)
        .append(true)
        .create(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)
        .and_then(host::regular)
}

/// Where the last whole line ends: the length up to and with the last line feed.
pub(crate) fn end_of_last_line(file: &mut File, length: u64) -> io::Result<u64> {
    const READ_BYTES: u64 = 64 * 1024;
    let mut end = length;
    while end > 0 {
        let start = end.saturating_sub(READ_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut piece = Vec::new();
        (&*file).take(end - start).read_to_end(&mut piece)?;
        if let Some(position) = piece.iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + position as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;
    use std::collections::HashSet;

    #[test]
    fn a_torn_tail_is_cut() {
        let scratch = Scratch::new("journal-torn");
        let path = scratch.path("x.jsonl");
        fs::write(&path, "one\ntwo\nthr").unwrap();
        Journal::open(&path, Rotation::default())
            .unwrap()
            .append("three")
            .unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\nthree\n");
    }

    #[test]
    fn several_writers_rotate_without_losing_a_line() {
        let scratch = Scratch::new("journal-rotate");
        let path = scratch.path("x.jsonl");
        let rotation = Rotation {
            max_bytes: 400,
            keep: 100,
        };
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let path = path.clone();
                scope.spawn(move || {
                    let mut journal = Journal::open(path, rotation).unwrap();
                    for line in 0..100 {
                        journal.append(&format!("{writer}-{line}")).unwrap();
                    }
                });
            }
        });
        let mut seen = HashSet::new();
        for entry in fs::read_dir(scratch.dir()).unwrap() {
            let text = fs::read_to_string(entry.unwrap().path()).unwrap();
            assert!(text.is_empty() || text.ends_with('\n'));
            seen.extend(text.lines().map(str::to_owned));
        }
        assert_eq!(seen.len(), 400);
    }

    #[test]
    fn old_files_beyond_keep_are_dropped() {
        let scratch = Scratch::new("journal-keep");
        let path = scratch.path("x.log");
        let mut journal = Journal::open(
            &path,
            Rotation {
                max_bytes: 4,
                keep: 2,
            },
        )
        .unwrap();
        for line in ["aaaa", "bbbb", "cccc", "dddd"] {
            journal.append(line).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "dddd\n");
        assert_eq!(fs::read_to_string(scratch.path("x.log.1")).unwrap(), "cccc\n");
        assert_eq!(fs::read_to_string(scratch.path("x.log.2")).unwrap(), "bbbb\n");
        assert!(!scratch.path("x.log.3").exists());
        // Kept fewer from now on: the next rotation removes the others.
        let fewer = Rotation {
            max_bytes: 4,
            keep: 1,
        };
        Journal::open(&path, fewer).unwrap();
        assert_eq!(fs::read_to_string(scratch.path("x.log.1")).unwrap(), "dddd\n");
        assert!(!scratch.path("x.log.2").exists());
    }
}
