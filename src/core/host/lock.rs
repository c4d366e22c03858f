//! Locks: who holds one on a file, and taking one.
//!
//! Here: open-file-description locks of castra's own, questions about QEMU's record locks and about
//! the byte locks on its images. Not here: what a lock says about a VM or a broker
//! (`core::root::alive`).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::{is_absent_error, names_this_file, open_state_file, private_file, regular, tail_of};

/// Who holds a lock on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// Nobody, or there is no such file, or no regular one.
    Nobody,
    /// A process with a POSIX record lock, as QEMU on its pid file; the kernel names it.
    Process(u32),
    /// Somebody with an open-file-description lock; the kernel names nobody.
    Description,
    /// It can't be told: the file is there or not, and may not be looked at.
    Unknown,
}

/// What QEMU says about an image by the byte locks it holds on it for as long as it is open
/// (`block/file-posix.c`; the offsets are the same since QEMU 2.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageUse {
    /// Nobody has it open, or whoever has it switched the locks off.
    Unlocked,
    /// Open, but nobody writes.
    Read,
    /// Somebody writes it or may.
    Written,
}

/// Who uses a disk image. Takes nothing.
pub fn image_use(path: &Path) -> ImageUse {
    // A byte at 100 + N is locked while somebody has permission N; 1 is writing.
    const PERMISSIONS: (i64, i64) = (100, 8);
    const WRITE: (i64, i64) = (101, 1);
    let Ok(file) = open_state_file(path) else {
        return ImageUse::Unlocked;
    };
    let held = |(start, len): (i64, i64)| {
        let mut asked = whole_file(libc::F_WRLCK);
        (asked.l_start, asked.l_len) = (start, len);
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut asked)).is_ok() && i32::from(asked.l_type) != libc::F_UNLCK
    };
    match (held(WRITE), held(PERMISSIONS)) {
        (true, _) => ImageUse::Written,
        (false, true) => ImageUse::Read,
        (false, false) => ImageUse::Unlocked,
    }
}

fn whole_file(kind: i32) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).expect("lock kinds are 0 to 2"),
        l_whence: 0, // SEEK_SET
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Asks who would stand in the way of an exclusive lock. Takes nothing, changes nothing; works
/// on a read-only descriptor in about 3 µs.
pub fn lock_holder(path: &Path) -> Holder {
    ask_lock_holder(path).unwrap_or(Holder::Unknown)
}

/// As [`lock_holder`], with the error that keeps it from being told: a file that may not be opened
/// isn't one that nobody holds.
pub fn ask_lock_holder(path: &Path) -> io::Result<Holder> {
    match open_state_file(path) {
        Ok(file) => Ok(lock_holder_of(&file)),
        // Nobody can hold by this name what castra or QEMU would have locked.
        Err(error) if is_absent_error(&error) || error.kind() == io::ErrorKind::InvalidData => {
            Ok(Holder::Nobody)
        }
        Err(error) => Err(error),
    }
}

/// As [`lock_holder`], for a file already open.
pub fn lock_holder_of(file: &File) -> Holder {
    let mut asked = whole_file(libc::F_WRLCK);
    if fcntl(file, FcntlArg::F_OFD_GETLK(&mut asked)).is_err() || i32::from(asked.l_type) == libc::F_UNLCK {
        return Holder::Nobody;
    }
    match u32::try_from(asked.l_pid) {
        Ok(pid) if pid > 0 => Holder::Process(pid),
        _ => Holder::Description,
    }
}

/// The pid written in a file of ours, counted only while the file is locked (docs/ARCHITECTURE.md).
/// Numbers that no process can have (0, negative, text) are `None`.
pub fn locked_pid(path: &Path) -> Option<u32> {
    let file = open_state_file(path).ok()?;
    if lock_holder_of(&file) == Holder::Nobody {
        return None;
    }
    let mut text = String::new();
    (&file).take(64).read_to_string(&mut text).ok()?;
    let first = text.split_whitespace().next()?;
    first
        .parse::<u32>()
        .ok()
        .filter(|pid| *pid > 0 && i32::try_from(*pid).is_ok())
}

/// An exclusive open-file-description lock, held until dropped. It excludes threads of one
/// process too. The pid and a note are written into the file for whoever finds it locked.
#[derive(Debug)]
pub struct FileLock {
    file: File,
    path: PathBuf,
}

/// Why a lock was not had.
#[derive(Debug)]
pub enum LockError {
    /// Somebody else holds it; what they wrote into the file (pid, then a note).
    Held(String),
    /// The file can't be made or locked.
    Io(io::Error),
}

impl FileLock {
    /// Tries to take the lock, making the file (0600) if needed. Never waits.
    pub fn try_take(path: &Path, note: &str) -> Result<FileLock, LockError> {
        loop {
            let file = private_file()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)
                .and_then(regular)
                .map_err(LockError::Io)?;
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))) {
                Ok(_) => {}
                Err(Errno::EAGAIN | Errno::EACCES) => {
                    return Err(LockError::Held(tail_of(path, 512).trim().to_owned()));
                }
                Err(errno) => return Err(LockError::Io(errno.into())),
            }
            // The file may have been removed between open and lock; a lock on it proves nothing.
            if !names_this_file(path, &file) {
                continue;
            }
            let lock = FileLock {
                file,
                path: path.to_owned(),
            };
            lock.write_note(note).map_err(LockError::Io)?;
            return Ok(lock);
        }
    }

    fn write_note(&self, note: &str) -> io::Result<()> {
        let text = format!("{} {note}\n", std::process::id());
        // Written before it is shortened: a reader never finds an empty file under a held lock.
        self.file.write_all_at(text.as_bytes(), 0)?;
        self.file.set_len(text.len() as u64)
    }

    /// The locked file once more, for a child that is to hold the lock too: it stays held until the
    /// child has ended as well, whatever ends us. Dropping the lock ends it for both.
    pub fn share(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Whether this path leads to the locked file.
    pub fn is_at(&self, path: &Path) -> bool {
        names_this_file(path, &self.file)
    }

    /// Whether the path still names the locked file.
    pub fn still_named(&self) -> bool {
        names_this_file(&self.path, &self.file)
    }
}

impl Drop for FileLock {
    /// Closing alone isn't enough: a child that another thread is about to start has the
    /// descriptor too until it runs exec, and would keep the lock for that long.
    fn drop(&mut self) {
        unlock_open_file(&self.file);
    }
}

/// A lock on an open descriptor, for appending: shared among writers, exclusive to rotate.
/// Waits; the holders keep it for one `write` or one rename.
pub fn lock_open_file(file: &File, exclusive: bool) -> io::Result<()> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLKW(&whole_file(kind))) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Gives up a lock taken with [`lock_open_file`].
pub fn unlock_open_file(file: &File) {
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_UNLCK)));
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::core::scratch::Scratch;

    #[test]
    fn a_lock_excludes_and_names_its_holder() {
        let scratch = Scratch::new("host-lock");
        let path = scratch.path("lock");
        assert_eq!(lock_holder(&path), Holder::Nobody);
        let lock = FileLock::try_take(&path, "castra up").unwrap();
        assert_eq!(lock_holder(&path), Holder::Description);
        assert_eq!(locked_pid(&path), Some(std::process::id()));
        match FileLock::try_take(&path, "castra down") {
            Err(LockError::Held(who)) => assert_eq!(who, format!("{} castra up", std::process::id())),
            other => panic!("two took one lock: {other:?}"),
        }
        drop(lock);
        assert_eq!(lock_holder(&path), Holder::Nobody);
        assert_eq!(
            locked_pid(&path),
            None,
            "the pid of a free file counts for nothing"
        );
    }

    #[test]
    fn pids_that_no_process_has_are_none() {
        let scratch = Scratch::new("host-pid");
        let path = scratch.path("pid");
        let lock = FileLock::try_take(&path, "x").unwrap();
        for text in ["0", "-1", "", "abc", "99999999999"] {
            fs::write(&path, text).unwrap();
            assert_eq!(locked_pid(&path), None, "{text:?}");
        }
        drop(lock);
    }

    /// Nobody waits for a writer, or takes for a lock what can't be one.
    #[test]
    fn what_is_no_regular_file_is_held_by_nobody_and_never_waited_for() {
        let scratch = Scratch::new("host-lock-fifo");
        let fifo = scratch.path("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [&fifo, &scratch.dir().to_owned()] {
            assert_eq!(lock_holder(path), Holder::Nobody);
            assert_eq!(locked_pid(path), None);
            assert_eq!(tail_of(path, 100), "");
            assert!(open_state_file(path).is_err());
        }
        assert!(matches!(FileLock::try_take(&fifo, "x"), Err(LockError::Io(_))));
        assert_eq!(lock_holder(&scratch.path("file/below")), Holder::Nobody);
    }
}
