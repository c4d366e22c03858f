//! Other processes, as `/proc` shows them: command lines, and files they have open.
//!
//! Here: plain questions about all processes that this user may look at. Not here: which of them
//! are castra's (`core::runtime::lost`).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Holder, is_absent_error, lock_holder_of, open_state_file};

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

/// Whether a process was stopped by a signal or is held by a debugger.
pub fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
    state.is_some_and(|state| state.starts_with(['T', 't']))
}

/// How often a thread has given up or lost its core so far: it rises whenever the thread does
/// anything at all. By the thread's name; a process without such a thread is asked for its first one.
pub fn context_switches_of(pid: u32, thread: &str) -> Option<u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let named = tasks
        .flatten()
        .map(|task| task.path())
        .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end() == thread));
    let task = named.unwrap_or_else(|| PathBuf::from(format!("/proc/{pid}")));
    let status = fs::read_to_string(task.join("status")).ok()?;
    let count = |key: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().parse().ok()
    };
    Some(count("voluntary_ctxt_switches:")? + count("nonvoluntary_ctxt_switches:")?)
}

/// Whether a path leads a process to the same place as us, as far as there is anything there. In a container
/// the same words may name another project. False where that can't be told.
pub fn shares_file_system(pid: u32, path: &Path) -> bool {
    let theirs = PathBuf::from(format!("/proc/{pid}/root"));
    for place in path.ancestors() {
        let inside = theirs.join(place.strip_prefix("/").unwrap_or(place));
        match (fs::metadata(place), fs::metadata(inside)) {
            (Ok(ours), Ok(theirs)) => return (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
            (Err(ours), Err(theirs)) if is_absent_error(&ours) && is_absent_error(&theirs) => {}
            _ => return false,
        }
    }
    false
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
