//! The logs of one project: which there are, and what a line of each is.
//!
//! Here: the guests' consoles, QEMU's messages, bootstraps, the broker's log, the bus. Not here:
//! reading and following the files ([`text_log`], [`bootstrap_log`], `core::bus::log`), the journal of events
//! (`core::operations::events`), or making a line fit for a terminal (`core::escape`).

pub mod bootstrap_log;
pub mod text_log;

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::core::escape::escape_line;
use crate::core::failure::Result;
use crate::core::host;
use crate::core::lines::journal::{Journal, Rotation};
use crate::core::name::VmName;
use crate::core::nearest::no_such_vm;
use crate::core::root::alive::launched_vms;
use crate::core::root::paths::{StateRoot, vm_file};

/// How much of a log's end is looked through for lines that are there already, bytes.
const LOOKED_THROUGH: u64 = 256 * 1024;

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

/// Appends those of a guest's lines that aren't among the log's last ones yet. What two channels bring is there once.
pub fn fill_in(path: &Path, rotation: Rotation, lines: &[String]) -> io::Result<()> {
    let there = host::tail_of(path, LOOKED_THROUGH);
    // A line may be cut at the beginning of what was read; then it counts as missing, and is there twice.
    let there: HashSet<&str> = there.lines().collect();
    let missing: Vec<String> = lines
        .iter()
        .map(|line| escape_line(line, LINE_BYTES))
        .filter(|line| !there.contains(line.as_str()))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Journal::open(path, rotation)?.append(&missing.join("\n"))
}

/// What a log is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The guest's console.
    Serial,
    /// QEMU's own messages.
    Qemu,
    /// The last bootstrap: its steps, and what its script printed.
    Bootstrap,
    /// `[host-broker]` lines.
    Broker,
    /// What was published on the bus.
    Bus,
}

impl Source {
    /// The word in flags and prefixes.
    pub fn as_str(self) -> &'static str {
        match self {
            Source::Serial => "serial",
            Source::Qemu => "qemu",
            Source::Bootstrap => "bootstrap",
            Source::Broker => "broker",
            Source::Bus => "bus",
        }
    }
}

/// One log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// The VM; `None`: the broker's, or the whole bus.
    pub vm: Option<VmName>,
    /// What it is of.
    pub source: Source,
    /// The file, which need not be there; of bootstraps their folder.
    pub path: PathBuf,
}

/// One line of a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// When it was written, RFC 3339, where the line says so: consoles and QEMU don't.
    pub ts: Option<String>,
    /// What it is of.
    pub source: Source,
    /// The VM; of the bus the sender, unless that is the host or the broker.
    pub vm: Option<VmName>,
    /// The line without its end, as it stands in the log: a guest's words may be in it.
    pub line: String,
}

/// The time in a `[host-broker] TIME LEVEL …` line.
pub fn time_in(line: &str) -> Option<&str> {
    let time = line.strip_prefix("[host-broker] ")?.split(' ').next()?;
    humantime::parse_rfc3339(time).ok().map(|_| time)
}

/// The logs of these VMs (none named: all that were ever launched, and the broker), of these
/// sources (none named: all). `known` are names that count although they were never launched.
pub fn logs(state: &StateRoot, vms: &[String], sources: &[Source], known: &[VmName]) -> Result<Vec<Log>> {
    let mut all = launched_vms(state)?;
    let there = all.len();
    all.extend_from_slice(known);
    let mut chosen: Vec<VmName> = Vec::new();
    for name in vms {
        let found = all.iter().find(|vm| vm.as_str().eq_ignore_ascii_case(name));
        let Some(found) = found else {
            let known: Vec<&str> = all.iter().map(VmName::as_str).collect();
            return Err(no_such_vm(name, &known));
        };
        chosen.push(found.clone());
    }
    if vms.is_empty() {
        chosen = all[..there].to_vec();
    }
    let wanted = |source| sources.is_empty() || sources.contains(&source);
    let mut logs = Vec::new();
    for vm in chosen {
        let paths = state.vm(&vm);
        let of_vm = [
            (Source::Qemu, paths.file(vm_file::QEMU_LOG)),
            (Source::Serial, paths.file(vm_file::SERIAL_LOG)),
            (Source::Bootstrap, state.bootstrap_logs()),
        ];
        // Of named VMs what they published; else the whole bus, below.
        let bus = (!vms.is_empty()).then(|| (Source::Bus, state.bus_log_of(vm.as_str())));
        for (source, path) in of_vm.into_iter().chain(bus) {
            if wanted(source) {
                logs.push(Log {
                    vm: Some(vm.clone()),
                    source,
                    path,
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
    if wanted(Source::Bus) && vms.is_empty() {
        logs.push(Log {
            vm: None,
            source: Source::Bus,
            path: state.bus_log(),
        });
    }
    Ok(logs)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::core::failure::Exit;
    use crate::core::scratch::Scratch;

    #[test]
    fn the_brokers_lines_say_when() {
        for (line, time) in [
            (
                "[host-broker] 2026-11-21T10:00:00.123Z INFO hello",
                Some("2026-11-21T10:00:00.123Z"),
            ),
            ("[host-broker] today INFO hello", None),
            ("2026-11-21T10:00:00.123Z INFO hello", None),
            ("", None),
        ] {
            assert_eq!(time_in(line), time, "{line}");
        }
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
            "db qemu, db serial, db bootstrap, web-0 qemu, web-0 serial, web-0 bootstrap, broker, bus"
        );
        assert_eq!(
            ask(&["DB"], &[]).unwrap(),
            "db qemu, db serial, db bootstrap, db bus"
        );
        assert_eq!(ask(&[], &[Source::Bus]).unwrap(), "bus");
        assert_eq!(ask(&[], &[Source::Broker]).unwrap(), "broker");
        assert_eq!(ask(&["cache"], &[Source::Serial]).unwrap(), "cache serial");
        let refused = ask(&["wbe-0"], &[]).unwrap_err();
        assert_eq!(refused.exit, Exit::Usage);
        assert!(refused.to_string().contains("web-0"), "{refused}");
    }
}
