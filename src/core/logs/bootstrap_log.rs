//! The last bootstrap of a VM as lines: its steps, and what its script printed.
//!
//! Here: finding it, and the order of its lines. Not here: the run log's shape and writing it
//! (`core::root::run_log`).
//!
//! The run log has all steps so far at any time, so it is read again and the steps not told yet are
//! told. What the script prints comes as it is printed, before the end of the step `apply`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::core::events::BootstrapStepStatus;
use crate::core::events::endings::BootstrapStatus;
use crate::core::host;
use crate::core::name::VmName;
use crate::core::root::run_log::{RunLog, StepRecord};

use super::text_log::TextLog;

/// Length of `20261121T100000.123Z`.
const TIMESTAMP_BYTES: usize = 20;
/// A longer run log isn't one of castra's.
const MAX_LOG_BYTES: u64 = 4 * 1024 * 1024;

/// One line, with its time where that is known.
pub type Line = (Option<String>, String);

/// Follows the bootstraps of one VM.
#[derive(Debug)]
pub struct BootstrapLog {
    dir: PathBuf,
    vm: VmName,
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    stamp: String,
    told_start: bool,
    told_steps: usize,
    told_end: bool,
    output: TextLog,
}

impl BootstrapLog {
    /// Those of this VM; `dir` is `logs/bootstrap`.
    pub fn new(dir: impl Into<PathBuf>, vm: VmName) -> BootstrapLog {
        BootstrapLog {
            dir: dir.into(),
            vm,
            current: None,
        }
    }

    /// What is new of the last bootstrap, all of it if there is a newer one; `take` says whether to
    /// go on.
    pub fn more(&mut self, take: &mut dyn FnMut(Line) -> bool) -> io::Result<bool> {
        let Some(stamp) = newest(&self.dir, &self.vm)? else {
            return Ok(true);
        };
        if self.current.as_ref().is_none_or(|current| current.stamp != stamp) {
            let output = self.dir.join(format!("{}-{stamp}.out", self.vm));
            self.current = Some(Current {
                stamp,
                told_start: false,
                told_steps: 0,
                told_end: false,
                output: TextLog::new(output, false),
            });
        }
        let Some(current) = &mut self.current else {
            return Ok(true);
        };
        let stem = self.dir.join(format!("{}-{}", self.vm, current.stamp));
        // Read before the output: what the script printed stands before the steps told with it.
        let log = load(&stem);
        current.tell(log, take)
    }

    /// Whether the last bootstrap was written to since then.
    pub fn is_younger_than(&self, time: std::time::SystemTime) -> bool {
        let Ok(Some(stamp)) = newest(&self.dir, &self.vm) else {
            return false;
        };
        ["open", "json", "out"].iter().any(|end| {
            let path = self.dir.join(format!("{}-{stamp}.{end}", self.vm));
            let modified = fs::metadata(path).and_then(|meta| meta.modified());
            modified.is_ok_and(|modified| modified >= time)
        })
    }
}

impl Current {
    fn tell(&mut self, log: Option<RunLog>, take: &mut dyn FnMut(Line) -> bool) -> io::Result<bool> {
        if let Some(log) = &log
            && !std::mem::replace(&mut self.told_start, true)
            && !take((
                Some(log.started_at.clone()),
                format!("bootstrap {} began", log.run_id),
            ))
        {
            return Ok(false);
        }
        let steps = log.as_ref().map(|log| log.steps.as_slice()).unwrap_or_default();
        for step in steps.iter().skip(self.told_steps) {
            if step.step == "apply" && !self.output.read_new(&mut |line| take((None, line)))? {
                return Ok(false);
            }
            self.told_steps += 1;
            // The last line says it.
            if step.step != "error" && !take((None, of_step(step))) {
                return Ok(false);
            }
        }
        if !self.output.read_new(&mut |line| take((None, line)))? {
            return Ok(false);
        }
        let Some(log) = log.filter(|log| log.status != BootstrapStatus::Running && !self.told_end) else {
            return Ok(true);
        };
        self.told_end = true;
        if !self.output.flush(&mut |line| take((None, line))) {
            return Ok(false);
        }
        let noop = if log.noop { ", nothing to change" } else { "" };
        // A step that failed has said why.
        let has_failed =
            |step: &StepRecord| step.step != "error" && step.status == BootstrapStepStatus::Failed;
        let why = log.error.filter(|_| !log.steps.iter().any(has_failed));
        let why = why.map(|why| format!(": {why}")).unwrap_or_default();
        Ok(take((
            None,
            format!("bootstrap {}{noop}, {} ms{why}", log.status, log.duration_ms),
        )))
    }
}

fn of_step(step: &StepRecord) -> String {
    let status = step.status.as_str();
    let line = format!("step {} {status}, {} ms", step.step, step.duration_ms);
    match &step.detail {
        Some(detail) => format!("{line}: {detail}"),
        None => line,
    }
}

/// The timestamp of the last bootstrap of exactly this VM: `web-0-…` is none of `web`.
fn newest(dir: &Path, vm: &VmName) -> io::Result<Option<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let stamp_of = |name: &str| -> Option<String> {
        let stem = name
            .strip_suffix(".json")
            .or_else(|| name.strip_suffix(".open"))?;
        let stamp = stem.strip_prefix(vm.as_str())?.strip_prefix('-')?;
        (stamp.len() == TIMESTAMP_BYTES && !stamp.contains('-')).then(|| stamp.to_owned())
    };
    let stamps = entries.filter_map(|entry| stamp_of(entry.ok()?.file_name().to_str()?));
    Ok(stamps.max())
}

/// The run log, final or open; `None` where there is none or it isn't one.
fn load(stem: &Path) -> Option<RunLog> {
    let read = |end: &str| -> Option<RunLog> {
        let mut path = stem.as_os_str().to_owned();
        path.push(end);
        let meta = fs::metadata(&path).ok()?;
        let is_sane = meta.is_file() && meta.len() <= MAX_LOG_BYTES;
        RunLog::read(&is_sane.then(|| host::read_state_file(Path::new(&path)).ok())??)
    };
    read(".json").or_else(|| read(".open"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::events::BootstrapTrigger;
    use crate::core::root::paths::StateRoot;
    use crate::core::root::run_log::OpenLog;
    use crate::core::scratch::Scratch;

    fn more(tail: &mut BootstrapLog) -> String {
        let mut lines = Vec::new();
        tail.more(&mut |(_, line)| {
            lines.push(line);
            true
        })
        .unwrap();
        lines.join(" | ")
    }

    fn step(name: &str) -> StepRecord {
        StepRecord {
            step: name.into(),
            status: BootstrapStepStatus::Success,
            duration_ms: 7,
            detail: None,
        }
    }

    #[test]
    fn steps_and_output_come_in_their_order() {
        let scratch = Scratch::new("logs-bootstrap");
        let state = StateRoot::new(scratch.dir());
        let web: VmName = "web".parse().unwrap();
        let mut tail = BootstrapLog::new(state.bootstrap_logs(), web.clone());
        assert_eq!(more(&mut tail), "");
        let mut log =
            OpenLog::begin(&state, &web, &"r1".into(), &"l1".into(), BootstrapTrigger::Auto).unwrap();
        // Another VM's, whose name begins alike.
        OpenLog::begin(
            &state,
            &"web-9".parse().unwrap(),
            &"r9".into(),
            &"l9".into(),
            BootstrapTrigger::Auto,
        )
        .unwrap();
        assert_eq!(more(&mut tail), "bootstrap r1 began");
        log.step(step("connect"));
        log.output("hello");
        assert_eq!(more(&mut tail), "step connect success, 7 ms | hello");
        log.output("done");
        log.step(step("apply"));
        assert_eq!(more(&mut tail), "done | step apply success, 7 ms");
        log.end(40, false, None).unwrap();
        assert!(more(&mut tail).starts_with("bootstrap success, "));
        assert_eq!(more(&mut tail), "", "nothing is told twice");
        let all = more(&mut BootstrapLog::new(state.bootstrap_logs(), web));
        assert!(
            all.starts_with("bootstrap r1 began | step connect success, 7 ms | hello | done | step apply"),
            "{all}"
        );
    }
}
