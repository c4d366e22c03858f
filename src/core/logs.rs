//! The logs of one project: which there are, and their last lines.
//!
//! Here: the guests' consoles, QEMU's messages, the broker's log. Not here: the journal of events
//! (`core::operations::events`), or making a line fit for a terminal (`core::escape`).

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::core::escape::escape_line;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::journal::{Journal, Rotation};
use crate::core::name::VmName;
use crate::core::nearest::nearest;
use crate::core::paths::{StateRoot, vm_file};

/// At most so much of a file's end is read, bytes: a guest may write without ever ending a line.
const MOST_READ: u64 = 16 * 1024 * 1024;
/// Read in pieces of this size, from the end.
const PIECE: u64 = 64 * 1024;

/// Longest line of a guest that is kept, bytes.
const LINE_BYTES: usize = 4096;

/// Appends what a guest says to a log of its own, line by line, escaped.
pub fn append_escaped(path: &Path, rotation: Rotation, text: &str) -> io::Result<()> {
    let lines: Vec<String> = text.lines().map(|line| escape_line(line, LINE_BYTES)).collect();
    if lines.is_empty() {
        return Ok(());
    }
    Journal::open(path, rotation)?.append(&lines.join("\n"))
}

/// What a log is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The guest's console.
    Serial,
    /// QEMU's own messages.
    Qemu,
    /// `[host-broker]` lines.
    Broker,
}

impl Source {
    /// The word in flags and prefixes.
    pub fn as_str(self) -> &'static str {
        match self {
            Source::Serial => "serial",
            Source::Qemu => "qemu",
            Source::Broker => "broker",
        }
    }
}

/// One log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// The VM; `None`: the broker's.
    pub vm: Option<VmName>,
    /// What it is of.
    pub source: Source,
    /// The file; it need not be there.
    pub path: PathBuf,
}

/// The logs of these VMs (none named: all that were ever launched, and the broker), of these
/// sources (none named: all). `known` are names that count although they were never launched.
pub fn logs(state: &StateRoot, vms: &[String], sources: &[Source], known: &[VmName]) -> Result<Vec<Log>> {
    let mut all = launched_vms(state);
    let there = all.len();
    all.extend_from_slice(known);
    let mut chosen: Vec<VmName> = Vec::new();
    for name in vms {
        let found = all.iter().find(|vm| vm.as_str().eq_ignore_ascii_case(name));
        chosen.push(found.ok_or_else(|| unknown(name, &all))?.clone());
    }
    if vms.is_empty() {
        chosen = all[..there].to_vec();
    }
    let wanted = |source| sources.is_empty() || sources.contains(&source);
    let mut logs = Vec::new();
    for vm in chosen {
        let paths = state.vm(&vm);
        for (source, file) in [
            (Source::Qemu, vm_file::QEMU_LOG),
            (Source::Serial, vm_file::SERIAL_LOG),
        ] {
            if wanted(source) {
                logs.push(Log {
                    vm: Some(vm.clone()),
                    source,
                    path: paths.file(file),
                });
            }
        }
    }
    // Named VMs are asked about alone; the broker's log only if it is named too.
    if sources.contains(&Source::Broker) || (sources.is_empty() && vms.is_empty()) {
        logs.push(Log {
            vm: None,
            source: Source::Broker,
            path: state.broker_log(),
        });
    }
    Ok(logs)
}

/// The VMs that were ever launched under a state root, by name.
pub fn launched_vms(state: &StateRoot) -> Vec<VmName> {
    let mut names: Vec<VmName> = fs::read_dir(state.vms())
        .map(|entries| {
            entries
                .flatten()
                .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
                .collect()
        })
        .unwrap_or_default();
    names.sort();
    names
}

fn unknown(name: &str, known: &[VmName]) -> Failure {
    let failure = Failure::new(Exit::Usage, format!("there is no VM {name:?} in this project"));
    match nearest(name, known.iter().map(VmName::as_str)) {
        Some(near) => failure.advice(format!("`{near}` is the nearest there is")),
        None => failure.advice("`castra status` lists its VMs"),
    }
}

/// The last lines of a file, oldest first, without line ends. No file: no lines. What a later
/// read could have completed (a last line without end) counts as a line.
pub fn last_lines(path: &Path, count: usize) -> Result<Vec<String>> {
    let failed = |error: io::Error| Failure::io("read", path, &error);
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    // Something else than a file in its place could be endless.
    if !file.metadata().map_err(failed)?.is_file() || count == 0 {
        return Ok(Vec::new());
    }
    let length = file.metadata().map_err(failed)?.len();
    let mut start = length;
    let mut bytes: Vec<u8> = Vec::new();
    // One line end more than lines: the one before the first.
    while start > 0 && length - start < MOST_READ && line_ends(&bytes) <= count {
        let from = start.saturating_sub(PIECE);
        let mut piece = Vec::new();
        file.seek(SeekFrom::Start(from)).map_err(failed)?;
        (&file)
            .take(start - from)
            .read_to_end(&mut piece)
            .map_err(failed)?;
        piece.append(&mut bytes);
        bytes = piece;
        start = from;
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(count)..]
        .iter()
        .map(|line| (*line).to_owned())
        .collect())
}

fn line_ends(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte == b'\n').count()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;

    #[test]
    fn the_last_lines_of_small_and_large_files() {
        let scratch = Scratch::new("logs-tail");
        let path = scratch.path("log");
        assert!(last_lines(&path, 5).unwrap().is_empty(), "no file");
        for (text, count, expected) in [
            ("", 3, vec![]),
            ("a\nb\nc\n", 2, vec!["b", "c"]),
            ("a\nb\nc", 2, vec!["b", "c"]),
            ("a\r\nb\r\n", 9, vec!["a", "b"]),
            ("a\n", 0, vec![]),
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(last_lines(&path, count).unwrap(), expected, "{text:?}");
        }
        let many: String = (0..50_000).map(|number| format!("line {number}\n")).collect();
        fs::write(&path, many).unwrap();
        let lines = last_lines(&path, 20_000).unwrap();
        assert_eq!((lines.len(), lines[0].as_str()), (20_000, "line 30000"));
    }

    #[test]
    fn which_logs_are_meant() {
        let scratch = Scratch::new("logs-which");
        let state = StateRoot::new(scratch.dir());
        for vm in ["web-0", "db"] {
            fs::create_dir_all(state.vms().join(vm)).unwrap();
        }
        let ask = |vms: &[&str], sources: &[Source]| {
            let vms: Vec<String> = vms.iter().map(|vm| (*vm).to_owned()).collect();
            logs(&state, &vms, sources, &["cache".parse().unwrap()]).map(|logs| {
                logs.iter()
                    .map(|log| match &log.vm {
                        Some(vm) => format!("{vm} {}", log.source.as_str()),
                        None => log.source.as_str().to_owned(),
                    })
                    .collect::<Vec<_>>()
                    .join(", ")
            })
        };
        assert_eq!(
            ask(&[], &[]).unwrap(),
            "db qemu, db serial, web-0 qemu, web-0 serial, broker"
        );
        assert_eq!(ask(&["DB"], &[]).unwrap(), "db qemu, db serial");
        assert_eq!(ask(&[], &[Source::Broker]).unwrap(), "broker");
        assert_eq!(ask(&["cache"], &[Source::Serial]).unwrap(), "cache serial");
        let refused = ask(&["wbe-0"], &[]).unwrap_err();
        assert_eq!(refused.exit, Exit::Usage);
        assert!(refused.to_string().contains("web-0"), "{refused}");
    }
}
