//! The last lines of the log that explains a failure.
//!
//! Here: which log that is, and its end. Not here: logs as people follow them (`core::logs`).
//!
//! A script's output belongs to one bootstrap and stays. The guest's console and QEMU's messages are
//! begun anew by every launch, so they explain only the last run that launched the VM.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use crate::core::host;
use crate::core::name::VmName;
use crate::core::root::paths::{StateRoot, vm_file};
use crate::core::time::parse_ms;

use super::from_events::shown;
use super::model::{LogTail, MarkKind, RunReport, State, VmReport};
use super::{MAX_LINES, MAX_TEXT_BYTES};

/// Length of `20261121T100000.123Z`.
const TIMESTAMP_BYTES: usize = 20;
/// How many bytes of a log's end are read: more than the shown lines can have.
const MAX_READ: u64 = (MAX_LINES as u64 + 1) * MAX_TEXT_BYTES as u64;
/// A log may be named a little before the event that begins its bootstrap.
const SLACK_MS: u64 = 2_000;
/// How many run logs are considered; a folder with more isn't searched to its end.
const MAX_LOGS: usize = 100_000;

/// Adds to every VM that failed the end of the log that says why. Runs stand oldest first; `begins` and
/// `ends` are their wall clocks in milliseconds.
pub(super) fn explain(state: &StateRoot, runs: &mut [RunReport], begins: &[u64], ends: &[u64]) {
    let mut scripts: Option<HashMap<String, Vec<(u64, PathBuf)>>> = None;
    // VMs that a later run has launched.
    let mut launched_later: Vec<String> = Vec::new();
    for (at, run) in runs.iter_mut().enumerate().rev() {
        for vm in run.vms.iter_mut().filter(|vm| vm.state == State::Failed) {
            let Ok(name) = vm.vm.parse::<VmName>() else {
                continue;
            };
            let scripts = scripts.get_or_insert_with(|| outputs(&state.bootstrap_logs()));
            let script = scripts.get(&name.key()).and_then(|outputs| {
                let since = begins[at].saturating_sub(SLACK_MS);
                let of_run = outputs
                    .iter()
                    .filter(|(stamp, _)| (since..=ends[at]).contains(stamp));
                of_run.max_by_key(|(stamp, _)| *stamp)
            });
            let is_last_launch = !launched_later.contains(&name.key());
            vm.log = script
                .filter(|_| has_run_a_script(vm))
                .and_then(|(_, path)| tail("script", path, 0))
                .or_else(|| of_launch(state, &name, vm, begins[at]).filter(|_| is_last_launch));
        }
        launched_later.extend(
            run.vms
                .iter()
                .filter(|vm| has(vm, MarkKind::Launched))
                .map(|vm| vm.vm.to_ascii_lowercase()),
        );
    }
}

fn has(vm: &VmReport, kind: MarkKind) -> bool {
    vm.marks.iter().any(|mark| mark.mark == kind)
}

fn has_run_a_script(vm: &VmReport) -> bool {
    vm.phases
        .iter()
        .any(|phase| phase.phase == "apply" && phase.state != State::Skipped)
}

/// What the last launch has left: the guest's console where there was a guest, else QEMU's messages.
fn of_launch(state: &StateRoot, name: &VmName, vm: &VmReport, since: u64) -> Option<LogTail> {
    let paths = state.vm(name);
    let console = || tail("console", &paths.file(vm_file::SERIAL_LOG), since);
    let qemu = || tail("qemu", &paths.file(vm_file::QEMU_LOG), since);
    match has(vm, MarkKind::Exited)
        || !(has(vm, MarkKind::Launched) || vm.phases.iter().any(|phase| phase.phase == "wait-handshake"))
    {
        true => qemu().or_else(console),
        false => console(),
    }
}

/// The last lines of a file written since then; `None` where there are none.
fn tail(source: &str, path: &Path, since: u64) -> Option<LogTail> {
    let meta = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    let written = meta.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    if written < Duration::from_millis(since) {
        return None;
    }
    let text = host::tail_of(path, MAX_READ);
    let mut lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    let mut cut = meta.len() > MAX_READ;
    if cut && lines.len() > 1 {
        // Its beginning wasn't read. The end of one endless line is better than nothing.
        lines.remove(0);
    }
    while lines.last().is_some_and(|line| line.is_empty()) {
        lines.pop();
    }
    let surplus = lines.len().saturating_sub(MAX_LINES);
    cut |= surplus > 0;
    let lines: Vec<String> = lines.drain(surplus..).map(shown).collect();
    (!lines.is_empty()).then(|| LogTail {
        source: source.to_owned(),
        path: Some(shown(&path.display().to_string())),
        lines,
        cut,
    })
}

/// What scripts have printed, by VM: when their bootstrap began, and the file.
fn outputs(dir: &Path) -> HashMap<String, Vec<(u64, PathBuf)>> {
    let mut outputs: HashMap<String, Vec<(u64, PathBuf)>> = HashMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten().take(MAX_LOGS) {
        let name = entry.file_name();
        let found = name.to_str().and_then(|name| {
            let (vm, stamp) = name.strip_suffix(".out")?.rsplit_once('-')?;
            Some((vm.to_ascii_lowercase(), millis_of(stamp)?))
        });
        if let Some((vm, stamp)) = found {
            outputs.entry(vm).or_default().push((stamp, entry.path()));
        }
    }
    outputs
}

/// `20261121T100000.123Z` in milliseconds since the epoch.
fn millis_of(stamp: &str) -> Option<u64> {
    if stamp.len() != TIMESTAMP_BYTES || !stamp.is_ascii() {
        return None;
    }
    let part = |range: std::ops::Range<usize>| &stamp[range];
    let text = format!(
        "{}-{}-{}T{}:{}:{}",
        part(0..4),
        part(4..6),
        part(6..8),
        part(9..11),
        part(11..13),
        part(13..20)
    );
    parse_ms(&text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;

    #[test]
    fn the_end_of_a_log_whatever_it_holds() {
        let scratch = Scratch::new("report-tails");
        let path = scratch.dir().join("log");
        let told = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            tail("script", &path, 0).map(|tail| (tail.lines, tail.cut))
        };
        assert_eq!(told(b""), None);
        assert_eq!(told(b"\n\r\n"), None);
        assert_eq!(told(b"a\r\n\n"), Some((vec!["a".into()], false)));
        assert_eq!(told(b"a\x1b\xff"), Some((vec!["a\\x1b\u{fffd}".into()], false)));
        let many: String = (0..100).map(|number| format!("{number}\n")).collect();
        let (lines, cut) = told(many.as_bytes()).unwrap();
        assert_eq!((lines.len(), lines[0].as_str(), cut), (MAX_LINES, "60", true));
        for rest in ["", "\n", "\nlast"] {
            let endless = "x".repeat(1_000_000) + rest;
            let (lines, cut) = told(endless.as_bytes()).unwrap();
            assert!(
                cut && lines.len() == 1 && lines[0].len() <= MAX_TEXT_BYTES,
                "{rest:?}"
            );
        }
        assert_eq!(tail("script", scratch.dir(), 0), None, "no file");
        assert_eq!(tail("script", &path, u64::MAX / 2), None, "of an earlier launch");
    }

    #[test]
    fn files_are_found_by_vm_and_time() {
        let scratch = Scratch::new("report-outputs");
        for name in [
            "web-20261121T100000.123Z.out",
            "web-20261121T100000.123Z.json",
            "Web-0-20261121T100000.124Z.out",
            "web-20261199T100000.123Z.out",
            "-20261121T10é000.123Z.out",
            "x.out",
        ] {
            fs::write(scratch.dir().join(name), "x").unwrap();
        }
        let found = outputs(scratch.dir());
        let stamps =
            |vm: &str| -> Vec<u64> { found.get(vm).into_iter().flatten().map(|(at, _)| *at).collect() };
        assert_eq!(
            (stamps("web"), stamps("web-0")),
            (vec![1_795_255_200_123], vec![1_795_255_200_124])
        );
        assert_eq!(found.len(), 2);
        assert!(outputs(&scratch.dir().join("nosuch")).is_empty());
    }
}
