//! Other processes, as `/proc` shows them: command lines, and files they have open.
//!
//! Here: plain questions about all processes that this user may look at. Not here: which of them
//! are castra's (`core::runtime::lost`).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::{Holder, lock_holder_of, open_state_file};

/// What a link below `/proc/PID/fd` ends with where the file's name was removed.
const DELETED: &[u8] = b" (deleted)";

/// Every process that `/proc` shows, with its arguments, ourselves left out. Zombies and the
/// kernel's own have none and aren't in here.
pub fn command_lines() -> Vec<(u32, Vec<OsString>)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let line = line.strip_suffix(b"\0").unwrap_or(&line);
            let is_other = pid != std::process::id() && !line.is_empty();
            is_other.then(|| {
                let words = line.split(|byte| *byte == 0);
                (pid, words.map(|word| OsString::from_vec(word.to_vec())).collect())
            })
        })
        .collect()
}

/// A file that a process has open and holds a record lock on.
#[derive(Debug)]
pub struct HeldFile {
    /// The process's own file, open here too, whatever became of its name.
    pub file: File,
    /// Its name now; `None`: it was removed.
    pub path: Option<PathBuf>,
}

/// The file of this name, in whatever directory, that a process has open and that the kernel says it
/// holds a record lock on.
pub fn held_file(pid: u32, name: &OsStr) -> Option<HeldFile> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    descriptors.flatten().find_map(|entry| {
        let target = fs::read_link(entry.path()).ok()?;
        let bytes = target.as_os_str().as_bytes();
        let (bytes, is_there) = match bytes.strip_suffix(DELETED) {
            Some(bytes) => (bytes, false),
            None => (bytes, true),
        };
        let path = PathBuf::from(OsStr::from_bytes(bytes));
        if path.file_name() != Some(name) {
            return None;
        }
        let file = open_state_file(&entry.path()).ok()?;
        (lock_holder_of(&file) == Holder::Process(pid)).then_some(HeldFile {
            file,
            path: is_there.then_some(path),
        })
    })
}
