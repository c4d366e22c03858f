//! How one VM's bootstrap ended, and where that is noted.
//!
//! Here: the outcome, its last event, `run.json`'s word about it. Not here: the steps before
//! (`bootstrap::pipeline`), or the run log's own file (`root::run_log`).

use std::path::PathBuf;
use std::time::Instant;

use crate::core::bootstrap::context::Context;
use crate::core::bootstrap::step_failure::StepFailure;
use crate::core::bootstrap::watch::StopReason;
use crate::core::events::{BootstrapStatus, Event, Severity};
use crate::core::root::records::{self, BootstrapRecord, RunRecord};
use crate::core::root::run_log::{OpenLog, StepRecord};
use crate::core::time::millis;

/// How a bootstrap ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootstrapEnd {
    /// All steps ended well.
    Success,
    /// Likewise, and the script had nothing to change.
    NoOp,
    /// It didn't run: mode `skip`.
    Skipped,
    /// Why it failed.
    Failed(String),
    /// Somebody asked to stop.
    Interrupted,
}

/// What a bootstrap left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapOutcome {
    /// The VM.
    pub vm: crate::core::name::VmName,
    /// How it ended.
    pub end: BootstrapEnd,
    /// How long it took.
    pub duration_ms: u64,
    /// The steps that ended, in order.
    pub steps: Vec<StepRecord>,
    /// The run log, if one could be written.
    pub log: Option<PathBuf>,
}

impl BootstrapOutcome {
    /// That of a VM on which nothing was done.
    pub(super) fn without_steps(context: &Context<'_, '_>, end: BootstrapEnd) -> BootstrapOutcome {
        BootstrapOutcome {
            vm: context.vm.name.clone(),
            end,
            duration_ms: 0,
            steps: Vec::new(),
            log: None,
        }
    }
}

/// Emits the end, closes the log, notes the outcome.
pub(super) fn finish(
    context: &Context<'_, '_>,
    log: Option<OpenLog>,
    result: Result<bool, StepFailure>,
    began: Instant,
) -> BootstrapOutcome {
    let duration_ms = millis(began.elapsed());
    let vm = &context.vm.name;
    let steps = log.as_ref().map(|log| log.log.steps.clone()).unwrap_or_default();
    let error = result.as_ref().err().map(StepFailure::to_string);
    let noop = matches!(result, Ok(true));
    // The log is on disk before anybody is told that it ended.
    let path = log.map(|log| log.end(duration_ms, noop, error.as_deref()));
    let status = if error.is_some() { "failed" } else { "success" };
    save_outcome(context, status, noop, Some(duration_ms));
    let path = match path {
        Some(Ok(path)) => Some(path),
        Some(Err(failure)) => {
            context.emitter.emit(Event::advice(
                Severity::Warn,
                Some(vm),
                format!("the bootstrap's log can't be kept: {failure}"),
                "free some space there or make it writable; the bootstrap itself is not affected",
            ));
            None
        }
        None => None,
    };
    let end = match result {
        Ok(noop) => {
            context.emitter.emit(Event::BootstrapCompleted {
                vm: vm.clone(),
                status: if noop {
                    BootstrapStatus::NoOp
                } else {
                    BootstrapStatus::Success
                },
                duration_ms,
                stamp: None,
            });
            if noop {
                BootstrapEnd::NoOp
            } else {
                BootstrapEnd::Success
            }
        }
        Err(failure) => {
            let error = failure.to_string();
            context.emitter.emit(Event::BootstrapFailed {
                vm: vm.clone(),
                duration_ms,
                error: error.clone(),
            });
            match failure {
                StepFailure::Stopped(StopReason::Interrupted) => BootstrapEnd::Interrupted,
                _ => BootstrapEnd::Failed(error),
            }
        }
    };
    BootstrapOutcome {
        vm: vm.clone(),
        end,
        duration_ms,
        steps,
        log: path,
    }
}

/// Whether a bootstrap of this launch is on record.
pub(super) fn has_outcome(context: &Context<'_, '_>) -> bool {
    let path = context.config.state.vm(&context.vm.name).run();
    let record: Option<RunRecord> = records::load(&path).ok().flatten();
    record.is_some_and(|record| record.launch_id == context.launch.launch_id && record.bootstrap.is_some())
}

/// Notes the outcome in `run.json`, where `status` finds it. Only in the record of this launch:
/// a missing or another one is left as it is.
pub(super) fn save_outcome(context: &Context<'_, '_>, status: &str, noop: bool, duration_ms: Option<u64>) {
    let path = context.config.state.vm(&context.vm.name).run();
    let Ok(Some(mut record)) = records::load::<RunRecord>(&path) else {
        return;
    };
    if record.launch_id != context.launch.launch_id {
        return;
    }
    record.bootstrap = Some(BootstrapRecord {
        status: status.to_owned(),
        noop,
        duration_ms,
    });
    if let Err(failure) = records::save(&path, &record) {
        context.emitter.emit(Event::message(
            Severity::Warn,
            Some(&context.vm.name),
            format!("the bootstrap's outcome can't be noted: {failure}"),
        ));
    }
}
