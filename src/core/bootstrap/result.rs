//! How one VM's bootstrap ended, and the record of it.
//!
//! Here: the outcome, its last event, its record in `run.json`. Not here: the steps before
//! (`bootstrap::pipeline`), or the run log's own file (`root::run_log`).

use std::path::PathBuf;
use std::time::Instant;

use crate::core::bootstrap::context::Context;
use crate::core::bootstrap::step_failure::StepFailure;
use crate::core::bootstrap::watch::StopReason;
use crate::core::events::endings::BootstrapStatus;
use crate::core::events::{Event, Severity};
use crate::core::root::records::{self, BootstrapRecord, RunRecord};
use crate::core::root::run_log::{OpenLog, StepRecord};
use crate::core::time::millis;

/// Why a bootstrap didn't end well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootstrapError {
    /// A step failed.
    Failed(String),
    /// Somebody asked to stop.
    Interrupted,
}

/// The outcome of a bootstrap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapOutcome {
    /// How it ended.
    pub end: Result<BootstrapRecord, BootstrapError>,
    /// The steps that ended, in order.
    pub steps: Vec<StepRecord>,
    /// The run log, if one could be written.
    pub log: Option<PathBuf>,
}

/// Closes the log, emits the end, records the outcome.
pub(super) fn finish(
    context: &Context<'_, '_>,
    log: Option<OpenLog>,
    result: Result<bool, StepFailure>,
    began: Instant,
) -> BootstrapOutcome {
    let duration_ms = millis(began.elapsed());
    let vm = context.vm.name.clone();
    let steps = log.as_ref().map(|log| log.log.steps.clone()).unwrap_or_default();
    let error = result.as_ref().err().map(StepFailure::to_string);
    let noop = matches!(result, Ok(true));
    // The log must be on disk before its end is reported.
    let log = log.map(|log| log.end(duration_ms, noop, error.as_deref()));
    let status = match result {
        Ok(_) => BootstrapStatus::Success,
        Err(_) => BootstrapStatus::Failed,
    };
    let record = record_of(status, noop, Some(duration_ms));
    save_outcome(context, &record);
    if let Some(Err(failure)) = &log {
        context.emitter.emit(Event::advice(
            Severity::Warn,
            Some(&vm),
            format!("the bootstrap's log can't be kept: {failure}"),
            "free some space there or make it writable; the bootstrap itself is not affected",
        ));
    }
    let end = match result {
        Ok(noop) => {
            context.emitter.emit(Event::BootstrapCompleted {
                vm,
                noop,
                duration_ms,
                stamp: None,
            });
            Ok(record)
        }
        Err(failure) => {
            let error = failure.to_string();
            context.emitter.emit(Event::BootstrapFailed {
                vm,
                duration_ms,
                error: error.clone(),
            });
            Err(match failure {
                StepFailure::Stopped(StopReason::Interrupted) => BootstrapError::Interrupted,
                _ => BootstrapError::Failed(error),
            })
        }
    };
    BootstrapOutcome {
        end,
        steps,
        log: log.and_then(Result::ok),
    }
}

/// How a bootstrap stands or ended, as `run.json` tells it.
pub(super) fn record_of(status: BootstrapStatus, noop: bool, duration_ms: Option<u64>) -> BootstrapRecord {
    BootstrapRecord {
        status: status.into(),
        noop,
        duration_ms,
    }
}

/// Whether a bootstrap of this launch is on record.
pub(super) fn has_outcome(context: &Context<'_, '_>) -> bool {
    let path = context.config.state.vm(&context.vm.name).run();
    let record: Option<RunRecord> = records::load(&path).ok().flatten();
    record.is_some_and(|record| record.launch_id == context.launch.launch_id && record.bootstrap.is_some())
}

/// Records the outcome in `run.json`, where `status` reads it. It changes only the record of this launch.
pub(super) fn save_outcome(context: &Context<'_, '_>, bootstrap: &BootstrapRecord) {
    let path = context.config.state.vm(&context.vm.name).run();
    let Ok(Some(mut record)) = records::load::<RunRecord>(&path) else {
        return;
    };
    if record.launch_id != context.launch.launch_id {
        return;
    }
    record.bootstrap = Some(bootstrap.clone());
    if let Err(failure) = records::save(&path, &record) {
        context.emitter.emit(Event::message(
            Severity::Warn,
            Some(&context.vm.name),
            format!("the bootstrap's outcome can't be noted: {failure}"),
        ));
    }
}
