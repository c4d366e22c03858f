//! `status`: the state of a project's VMs, read from disk; and the same for all projects.
//!
//! Here: the short wait for a broker that has only just started, and reporting files that can't be read. Not
//! here: the contract and its rules (`core::status`).

use std::fs::File;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::core::cancel::Cancel;
use crate::core::events::{Event, Severity};
use crate::core::failure::{Failure, Result};
use crate::core::reporter::{Emitter, Reporter};
use crate::core::root::project::Project;
use crate::core::status::StatusOutcome;
use crate::core::status::assemble::assemble;
use crate::core::status::evidence::Snapshot;
use crate::core::status::read::read;
use crate::core::time::millis;

/// Guests come back to a broker that was started again after 0.25 s; while it is younger than
/// this, status may wait for them (docs/STATUS.md).
const YOUNG_BROKER: Duration = Duration::from_millis(400);

/// The longest wait, whatever the clocks say: with its start, reading and printing, status then takes 400 ms
/// in all.
const WAIT_LIMIT: Duration = Duration::from_millis(330);

/// How often a young broker is checked.
const POLL_INTERVAL: Duration = Duration::from_millis(25);

/// The options of `status`.
#[derive(Clone, Debug)]
pub struct StatusOptions {
    /// The project: `Project::from(&config)`, or from its workspace record.
    pub project: Project,
    /// Raised to end the wait for a young broker.
    pub cancel: Cancel,
}

/// Reports the status. It changes nothing, and waits only for a broker younger than 400 ms: until the broker
/// is that old or every running VM is reachable, and only in one caller at a time. Files that can't be read
/// are reported as messages.
pub fn status(options: StatusOptions, reporter: &mut dyn Reporter) -> Result<StatusOutcome> {
    let began = Instant::now();
    let mut snapshot = read(options.project)?;
    let mut outcome = assemble(&snapshot);
    let is_early = |snapshot: &Snapshot, outcome: &StatusOutcome| {
        broker_is_young(snapshot) && outcome.vms.iter().any(|vm| vm.pid.is_some() && !vm.reachable)
    };
    if is_early(&snapshot, &outcome)
        && let Some(_waiter) = try_become_waiter(&snapshot)
    {
        while is_early(&snapshot, &outcome) {
            let left = WAIT_LIMIT.saturating_sub(began.elapsed());
            if left.is_zero() || options.cancel.pause(POLL_INTERVAL.min(left)) {
                break;
            }
            snapshot = read(snapshot.project)?;
            outcome = assemble(&snapshot);
        }
    }
    emit_notes(&outcome, &Emitter::new(reporter));
    Ok(outcome)
}

/// Whoever has this waits for the young broker; everybody else is answered at once. A lock that the
/// kernel takes back with the file, on a file that nobody else locks; nothing is written.
fn try_become_waiter(snapshot: &Snapshot) -> Option<File> {
    let file = File::open(snapshot.project.state.broker_json()).ok()?;
    file.try_lock().is_ok().then_some(file)
}

fn broker_is_young(snapshot: &Snapshot) -> bool {
    let (Some((_, run)), Some(broker)) = (&snapshot.live_broker, snapshot.broker.known()) else {
        return false;
    };
    let age_ms = snapshot
        .now
        .boottime_ms
        .saturating_sub(broker.started_boottime_ms);
    broker.run == *run && age_ms < millis(YOUNG_BROKER)
}

fn emit_notes(outcome: &StatusOutcome, emitter: &Emitter<'_>) {
    for note in &outcome.notes {
        let (vm, text) = (note.vm.as_ref(), note.text.clone());
        emitter.emit(match &note.advice {
            Some(advice) => Event::advice(Severity::Warn, vm, text, advice.clone()),
            None => Event::message(Severity::Warn, vm, text),
        });
    }
}

/// Several projects.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusAllOutcome {
    /// In the order of the options.
    pub projects: Vec<StatusOutcome>,
}

/// Reports several projects. A project that can't be read is reported as an error and left out. Never waits.
pub fn status_all(projects: Vec<Project>, reporter: &mut dyn Reporter) -> StatusAllOutcome {
    let emitter = Emitter::new(reporter);
    let mut outcomes = Vec::new();
    for project in projects {
        let workspace = project.workspace.clone();
        match read(project) {
            Ok(snapshot) => {
                let outcome = assemble(&snapshot);
                emit_notes(&outcome, &emitter);
                outcomes.push(outcome);
            }
            Err(failure) => emitter.emit(unreadable(&workspace, &failure)),
        }
    }
    StatusAllOutcome { projects: outcomes }
}

fn unreadable(workspace: &str, failure: &Failure) -> Event {
    let what = format!("project {workspace} can't be read: {}", failure.what);
    let failure = Failure {
        what,
        ..failure.clone()
    };
    Event::of_failure(Severity::Error, None, &failure)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::root::paths::StateRoot;
    use crate::core::root::records::WorkspaceRecord;
    use crate::core::scratch::Scratch;

    #[test]
    fn one_caller_at_a_time_waits_for_a_young_broker() {
        let scratch = Scratch::new("status-waiter");
        let state = StateRoot::new(scratch.dir());
        let record = WorkspaceRecord {
            id: "demo-1a2b3c4d".into(),
            project: "demo".into(),
            config_path: scratch.path("castra.toml"),
            state_root: scratch.dir().to_owned(),
            version: "0.2.0".into(),
            former_roots: Vec::new(),
        };
        let snapshot = read(Project::from(&record)).unwrap();
        assert!(try_become_waiter(&snapshot).is_none(), "there is no broker");
        std::fs::write(state.broker_json(), "{}").unwrap();
        let first = try_become_waiter(&snapshot);
        assert!(first.is_some());
        assert!(try_become_waiter(&snapshot).is_none(), "somebody waits already");
        drop(first);
        assert!(try_become_waiter(&snapshot).is_some());
        assert_eq!(std::fs::read_to_string(state.broker_json()).unwrap(), "{}");
    }
}
