//! `logs/bootstrap/<vm>-<timestamp>.json` and `.out`: what one bootstrap did, for good (docs/BOOTSTRAP.md).
//!
//! Here: the log's shape, writing it, closing the ones that a killed castra left open. Not here:
//! the events with the same contents (`core::events`), or what is done in the steps.
//!
//! While a bootstrap runs its log is called `.open`, and each step appends the complete log as one
//! more line; the last complete line counts. A rename makes it the final log. So a `.json` is
//! always complete and final, and an `.open` of a VM whose lock nobody holds was left by a castra
//! that was killed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::core::escape::escape_line;
use crate::core::events::endings::{BootstrapStatus, OpenEnum};
use crate::core::events::{BootstrapStepStatus, BootstrapTrigger, Event, Severity};
use crate::core::failure::{Failure, Result};
use crate::core::host;
use crate::core::id::{LaunchId, RunId};
use crate::core::name::VmName;
use crate::core::reporter::{Emitter, wall_clock};
use crate::core::root::paths::StateRoot;
use crate::core::root::records::{self, RunRecord};

/// Why an abandoned bootstrap failed.
const ABANDONED: &str = "castra ended before the bootstrap did";
/// Length of `20261121T100000.123Z`.
const TIMESTAMP_BYTES: usize = 20;
/// Most bytes kept of a script's output.
const OUT_BYTES: u64 = 16 * 1024 * 1024;

/// The log as it lies on disk. Fields are only ever added.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunLog {
    /// The VM.
    pub vm: VmName,
    /// SHA-256 of script, payload, environment and metadata; null if it ended before it was known.
    pub artifact_hash: Option<String>,
    /// SHA-256 of what the guest boots from; null likewise.
    pub base_hash: Option<String>,
    /// How it ended; `running` in an open log.
    pub status: OpenEnum<BootstrapStatus>,
    /// The script declared that there was nothing to change.
    pub noop: bool,
    /// How long it took.
    pub duration_ms: u64,
    /// Every step that ended, in order; a failed log ends with the step `error`.
    pub steps: Vec<StepRecord>,
    /// Why it failed.
    pub error: Option<String>,
    /// The resolved mode.
    pub trigger: BootstrapTrigger,
    /// `CASTRA_RUN_ID` of the script.
    pub run_id: RunId,
    /// The launch of the VM it belongs to.
    pub launch_id: LaunchId,
    /// Wall clock of its start, RFC 3339.
    pub started_at: String,
    /// The castra that ran it.
    pub version: String,
    /// File name of the script's output beside this file; null if there was none.
    pub output: Option<String>,
}

/// One step in a run log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRecord {
    /// `wait-handshake`, …, or `error`.
    pub step: String,
    /// `success`, `skipped` or `failed`.
    pub status: BootstrapStepStatus,
    /// How long it took.
    pub duration_ms: u64,
    /// More about it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub detail: Option<String>,
}

/// The log of a bootstrap under way.
#[derive(Debug)]
pub struct OpenLog {
    /// What is known so far.
    pub log: RunLog,
    open: PathBuf,
    file: File,
    out: Option<OutFile>,
}

impl RunLog {
    /// The log in the bytes of a `.json` or `.open`; `None` if it isn't one.
    pub fn read(bytes: &[u8]) -> Option<RunLog> {
        serde_json::from_slice(bytes).ok().or_else(|| {
            bytes
                .rsplit(|byte| *byte == b'\n')
                .find_map(|line| serde_json::from_slice(line).ok())
        })
    }
}

impl OpenLog {
    /// Begins a log on disk. The caller holds the VM's lock, so no two begin in one millisecond.
    pub fn begin(
        state: &StateRoot,
        vm: &VmName,
        run_id: &RunId,
        launch_id: &LaunchId,
        trigger: BootstrapTrigger,
    ) -> Result<OpenLog> {
        let dir = state.bootstrap_logs();
        host::ensure_private_dir(&dir).map_err(|error| Failure::io("create", &dir, &error))?;
        let now = SystemTime::now();
        let log = RunLog {
            vm: vm.clone(),
            artifact_hash: None,
            base_hash: None,
            status: BootstrapStatus::Running.into(),
            noop: false,
            duration_ms: 0,
            steps: Vec::new(),
            error: None,
            trigger,
            run_id: run_id.clone(),
            launch_id: launch_id.clone(),
            started_at: wall_clock(now),
            version: env!("CARGO_PKG_VERSION").into(),
            output: None,
        };
        let open = dir.join(format!("{vm}-{}.open", compact(&log.started_at)));
        // The log can be read from the beginning.
        let file = host::replace_file(&open, &line_of(&log))
            .and_then(|()| host::private_file().append(true).open(&open))
            .map_err(|error| Failure::io("create", &open, &error))?;
        Ok(OpenLog {
            log,
            open,
            file,
            out: None,
        })
    }

    /// Where the final log will be.
    pub fn path(&self) -> PathBuf {
        self.open.with_extension("json")
    }

    /// Adds a step that ended. A full disk doesn't stop a bootstrap: the error is reported at its
    /// end.
    pub fn step(&mut self, step: StepRecord) {
        self.log.steps.push(step);
        // A line end comes first, in case the line before is incomplete.
        let _ = self
            .file
            .write_all(&[b"\n", line_of(&self.log).as_slice()].concat());
    }

    /// Keeps one line of the script's output.
    pub fn output(&mut self, line: &str) {
        if self.out.is_none() {
            let path = self.open.with_extension("out");
            self.log.output = path.file_name().map(|name| name.to_string_lossy().into_owned());
            self.out = Some(OutFile::make(&path));
        }
        if let Some(out) = &mut self.out {
            out.line(line);
        }
    }

    /// Ends the log: `error` is why it failed, if it did. Returns the final log's path.
    pub fn end(mut self, duration_ms: u64, noop: bool, error: Option<&str>) -> Result<PathBuf> {
        self.log.duration_ms = duration_ms;
        self.log.noop = noop;
        close(&mut self.log, error);
        let path = self.path();
        save_final(&self.open, &path, &self.log)?;
        Ok(path)
    }
}

/// Closes the logs that a killed castra left open for this VM, as failed. The caller holds the
/// VM's lock, so none of them is still being written. Returns the closed logs' paths.
pub fn close_abandoned(state: &StateRoot, vm: &VmName) -> Result<Vec<PathBuf>> {
    let dir = state.bootstrap_logs();
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::io("read", &dir, &error)),
    };
    let mut closed = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !name.to_str().is_some_and(|name| is_open_log_of(name, vm)) {
            continue;
        }
        let open = entry.path();
        let read = host::read_state_file(&open).map_err(|error| Failure::io("read", &open, &error))?;
        // A file that isn't a run log stays.
        let Some(mut log) = RunLog::read(&read) else {
            continue;
        };
        // The duration of the rest is unknown.
        log.duration_ms = log.steps.iter().map(|step| step.duration_ms).sum();
        close(&mut log, Some(ABANDONED));
        mark_bootstrap_failed(state, &log);
        let path = open.with_extension("json");
        save_final(&open, &path, &log)?;
        closed.push(path);
    }
    closed.sort();
    Ok(closed)
}

/// As `close_abandoned`, with a message for each log; a log that can't be closed is a warning.
pub fn close_abandoned_and_emit(state: &StateRoot, vm: &VmName, emitter: &Emitter<'_>) {
    let text = match close_abandoned(state, vm) {
        Ok(closed) if closed.is_empty() => return,
        Ok(closed) => {
            let names: Vec<String> = closed.iter().map(|path| path.display().to_string()).collect();
            format!(
                "an earlier bootstrap never ended and counts as failed: {}",
                names.join(", ")
            )
        }
        Err(failure) => failure.to_string(),
    };
    emitter.emit(Event::message(Severity::Warn, Some(vm), text));
}

/// Corrects `run.json`, which would say `running` for ever.
fn mark_bootstrap_failed(state: &StateRoot, log: &RunLog) {
    let path = state.vm(&log.vm).run();
    let Ok(Some(mut record)) = records::load::<RunRecord>(&path) else {
        return;
    };
    let Some(bootstrap) = &mut record.bootstrap else {
        return;
    };
    if record.launch_id == log.launch_id && bootstrap.status == BootstrapStatus::Running {
        bootstrap.status = BootstrapStatus::Failed.into();
        bootstrap.duration_ms = Some(log.duration_ms);
        // If it can't be written now, the next bootstrap does it.
        let _ = records::save(&path, &record);
    }
}

/// Whether a file name is an open log of exactly this VM: `web-0-…` is none of `web`.
fn is_open_log_of(name: &str, vm: &VmName) -> bool {
    name.strip_suffix(".open")
        .and_then(|stem| stem.strip_prefix(vm.as_str()))
        .and_then(|rest| rest.strip_prefix('-'))
        .is_some_and(|stamp| stamp.len() == TIMESTAMP_BYTES && !stamp.contains('-'))
}

fn close(log: &mut RunLog, error: Option<&str>) {
    log.status = OpenEnum::Known(match error {
        Some(_) => BootstrapStatus::Failed,
        None => BootstrapStatus::Success,
    });
    log.error = error.map(str::to_owned);
    if let Some(error) = error {
        log.steps.push(StepRecord {
            step: "error".into(),
            status: BootstrapStepStatus::Failed,
            duration_ms: 0,
            detail: Some(error.to_owned()),
        });
    }
}

fn save_final(open: &Path, path: &Path, log: &RunLog) -> Result<()> {
    host::replace_file(path, &bytes_of(log)).map_err(|error| Failure::io("create", path, &error))?;
    host::remove_if_there(open)
        .map(|_| ())
        .map_err(|error| Failure::io("remove", open, &error))
}

/// The log in one line, without a line end.
fn line_of(log: &RunLog) -> Vec<u8> {
    serde_json::to_vec(log).expect("logs are plain data with text keys")
}

fn bytes_of(log: &RunLog) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(log).expect("logs are plain data with text keys");
    bytes.push(b'\n');
    bytes
}

/// `2026-11-21T10:00:00.123Z` as `20261121T100000.123Z`, which every file system takes.
fn compact(stamp: &str) -> String {
    stamp.chars().filter(|c| !matches!(c, '-' | ':')).collect()
}

/// The script's output, line by line, bounded.
#[derive(Debug)]
struct OutFile {
    file: Option<File>,
    left: u64,
}

impl OutFile {
    /// If the file can't be made the bootstrap goes on: the events have the lines too.
    fn make(path: &Path) -> OutFile {
        OutFile {
            file: host::private_file().write(true).create_new(true).open(path).ok(),
            left: OUT_BYTES,
        }
    }

    fn line(&mut self, line: &str) {
        let Some(file) = &mut self.file else {
            return;
        };
        let mut text = escape_line(line, usize::MAX);
        text.push('\n');
        let written = match self.left.checked_sub(text.len() as u64) {
            Some(left) => {
                self.left = left;
                file.write_all(text.as_bytes())
            }
            None => {
                let note = "[castra: the rest is not kept]\n";
                let _ = file.write_all(note.as_bytes());
                Err(io::ErrorKind::StorageFull.into())
            }
        };
        if written.is_err() {
            self.file = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::events::BootstrapStepKind;
    use crate::core::scratch::Scratch;
    use serde_json::Value;

    fn begin(state: &StateRoot, vm: &str) -> OpenLog {
        let vm: VmName = vm.parse().unwrap();
        OpenLog::begin(
            state,
            &vm,
            &"run-1".into(),
            &"launch-1".into(),
            BootstrapTrigger::Auto,
        )
        .unwrap()
    }

    fn names(state: &StateRoot) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(state.bootstrap_logs())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_status_of_another_version_costs_neither_log_nor_record() {
        let log = serde_json::json!({
            "vm": "web", "artifact_hash": null, "base_hash": null, "status": "postponed", "noop": false,
            "duration_ms": 1, "steps": [], "error": null, "trigger": "auto", "run_id": "r", "launch_id": "l",
            "started_at": "", "version": "9", "output": null,
        });
        let read = RunLog::read(log.to_string().as_bytes()).unwrap();
        assert_eq!((read.status.known(), read.status.as_str()), (None, "postponed"));
        assert_eq!(serde_json::to_value(&read).unwrap(), log);
        let record = serde_json::json!({"status": "postponed", "noop": false, "duration_ms": null});
        let read: records::BootstrapRecord = serde_json::from_value(record.clone()).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), record);
    }

    #[test]
    fn a_log_ends_under_its_final_name() {
        let scratch = Scratch::new("runlog");
        let state = StateRoot::new(scratch.dir());
        let mut log = begin(&state, "web.x-0");
        log.output("a\x1b[2Jb");
        log.step(StepRecord {
            step: BootstrapStepKind::Connect.as_str().into(),
            status: BootstrapStepStatus::Success,
            duration_ms: 5,
            detail: None,
        });
        let path = log.end(12, true, None).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(name.len(), "web.x-0-20261121T100000.123Z.json".len());
        let value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(value["status"], "success");
        assert_eq!(value["noop"], true);
        assert_eq!(value["duration_ms"], 12);
        assert_eq!(
            value["steps"],
            serde_json::json!([{ "step": "connect", "status": "success", "duration_ms": 5 }])
        );
        let out = fs::read_to_string(path.with_extension("out")).unwrap();
        assert_eq!(out, "a\\x1b[2Jb\n");
        assert_eq!(names(&state).len(), 2);
    }

    #[test]
    fn a_failure_ends_with_the_step_error() {
        let scratch = Scratch::new("runlog-failed");
        let state = StateRoot::new(scratch.dir());
        let path = begin(&state, "web")
            .end(3, false, Some("ssh exited with code 255"))
            .unwrap();
        let value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(value["status"], "failed");
        assert_eq!(
            value["steps"],
            serde_json::json!([{ "step": "error", "status": "failed", "duration_ms": 0,
                "detail": "ssh exited with code 255" }])
        );
    }

    #[test]
    fn the_last_whole_line_of_an_open_log_counts() {
        let scratch = Scratch::new("runlog-lines");
        let state = StateRoot::new(scratch.dir());
        let mut log = begin(&state, "web");
        for step in [BootstrapStepKind::WaitHandshake, BootstrapStepKind::Connect] {
            log.step(StepRecord {
                step: step.as_str().into(),
                status: BootstrapStepStatus::Success,
                duration_ms: 5,
                detail: Some("two\nlines".into()),
            });
        }
        let whole = fs::read(&log.open).unwrap();
        let last = whole.iter().rposition(|byte| *byte == b'\n').unwrap();
        let first = whole.iter().position(|byte| *byte == b'\n').unwrap();
        for (length, steps) in [
            (whole.len(), 2),
            (whole.len() - 1, 1),
            (last + 1, 1),
            (last, 1),
            (last - 1, 0),
            (first, 0),
        ] {
            let read = RunLog::read(&whole[..length]).unwrap();
            assert_eq!(read.steps.len(), steps, "{length}");
        }
        assert_eq!(RunLog::read(&whole[..first - 1]), None);
        // What comes after a torn line is found.
        let torn = [&whole[..last - 1], &whole[last..]].concat();
        assert_eq!(RunLog::read(&torn).unwrap().steps.len(), 2);
        let path = log.end(1, false, None).unwrap();
        assert_eq!(RunLog::read(&fs::read(path).unwrap()).unwrap().steps.len(), 2);
    }

    #[test]
    fn what_a_killed_castra_left_is_closed_for_its_vm_alone() {
        let scratch = Scratch::new("runlog-abandoned");
        let state = StateRoot::new(scratch.dir());
        let web: VmName = "web".parse().unwrap();
        assert_eq!(close_abandoned(&state, &web).unwrap(), Vec::<PathBuf>::new());
        drop(begin(&state, "web"));
        drop(begin(&state, "web-0"));
        fs::write(state.bootstrap_logs().join("web-20261121T100000.123Z.open"), "{").unwrap();
        let closed = close_abandoned(&state, &web).unwrap();
        assert_eq!(closed.len(), 1);
        let log: RunLog = serde_json::from_slice(&fs::read(&closed[0]).unwrap()).unwrap();
        assert_eq!((log.status.as_str(), log.steps.len()), ("failed", 1));
        assert!(
            names(&state)
                .iter()
                .any(|name| name.starts_with("web-0-") && name.ends_with(".open"))
        );
    }
}
