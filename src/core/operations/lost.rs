//! VMs and brokers of a project that its config doesn't lead to: under an earlier state root, or without a
//! state root.
//!
//! Here: finding them in the registry and in the process list, choosing them for an operation, refusing to
//! start others beside them, and ending lost QEMUs. Not here: the registry (`core::config::workspace`), or
//! how a lost QEMU is found (`core::runtime::lost`).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::core::cancel::{Cancel, POLL_INTERVAL};
use crate::core::config::{Config, LifecycleConfig, workspace};
use crate::core::events::endings::ShutdownEnding;
use crate::core::events::{Event, Severity};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::human::plural;
use crate::core::name::VmName;
use crate::core::reporter::Emitter;
use crate::core::root::alive::{live_broker, running_vms};
use crate::core::root::paths::StateRoot;
use crate::core::root::records::WorkspaceRecord;
use crate::core::runtime::lost::{self, LostQemu};
use crate::core::time::millis;

/// What runs under an earlier state root of the project.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunningElsewhere {
    /// That state root.
    pub state: StateRoot,
    /// Its VMs that run, with their processes.
    pub vms: Vec<(VmName, u32)>,
    /// Its broker's process.
    pub broker: Option<u32>,
}

impl RunningElsewhere {
    /// What runs there, in a few words.
    pub fn what(&self) -> String {
        let mut running: Vec<String> = self
            .vms
            .iter()
            .map(|(vm, pid)| format!("vm `{vm}` (pid {pid})"))
            .collect();
        running.extend(self.broker.map(|pid| format!("its broker (pid {pid})")));
        format!("{} under {}", running.join(", "), self.state.dir().display())
    }
}

/// What runs of this project under state roots that it had before its `state_dir` was changed.
pub fn running_elsewhere(config: &Config) -> Result<Vec<RunningElsewhere>> {
    let mut found = Vec::new();
    for root in workspace::former_roots(config) {
        let state = StateRoot::new(root);
        let vms = running_vms(&state)?;
        let broker = live_broker(&state).map(|(pid, _)| pid);
        if !vms.is_empty() || broker.is_some() {
            found.push(RunningElsewhere { state, vms, broker });
        }
    }
    Ok(found)
}

/// The config with the state root under which its VMs run, if that isn't the config's own; and what runs
/// there. While anything runs there, that is the project's state; the config's `state_dir` counts from the
/// next `up` on.
pub fn follow_running_root(mut config: Config) -> Result<(Config, Option<RunningElsewhere>)> {
    let Some(first) = running_elsewhere(&config)?.into_iter().next() else {
        return Ok((config, None));
    };
    config.state = first.state.clone();
    Ok((config, Some(first)))
}

/// Refuses to start anything while VMs run under another state root or without one.
pub fn refuse_if_running_elsewhere(config: &Config) -> Result<()> {
    if let Some(other) = running_elsewhere(config)?.into_iter().next() {
        return Err(Failure::new(
            Exit::Busy,
            format!("project `{}` runs under another state root", config.project),
        )
        .because(format!(
            "the project still has {}; castra.toml now says {}",
            other.what(),
            config.state.dir().display()
        ))
        .advice("put `state_dir` back as it was, or end what runs there with `castra down`"));
    }
    let lost = lost::of_roots(&roots_of(config));
    match lost.first() {
        Some(one) => Err(one.failure(Exit::Busy)),
        None => Ok(()),
    }
}

/// A warning about disks under the state root in the registry, if the config names another one: the VMs begin
/// without these disks, and users shouldn't find that out from the disks' contents.
pub(crate) fn disks_left_behind(config: &Config) -> Option<Event> {
    let record = workspace::record_in(config.registry.as_deref()?)?;
    if record.state_root == config.state.dir() {
        return None;
    }
    let disks = std::fs::read_dir(record.state_root.join("overlays")).ok()?;
    let disks = disks
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "qcow2"))
        .count();
    (disks > 0).then(|| {
        let text = format!(
            "the project's state root was {} until now, and {} stay there unused",
            record.state_root.display(),
            plural(disks, "disk")
        );
        let next = "put `state_dir` back to go on with them; castra doesn't remove them";
        Event::advice(Severity::Warn, None, text, next)
    })
}

/// The state roots that are or were this project's.
pub fn roots_of(config: &Config) -> Vec<PathBuf> {
    let mut roots = vec![config.state.dir().to_owned()];
    roots.extend(workspace::former_roots(config));
    roots
}

/// The projects on record, and those whose state root is gone while a QEMU runs on. By id.
pub fn workspaces(home: &Path) -> Vec<WorkspaceRecord> {
    let mut records = workspace::list_workspaces(home);
    let gone = workspace::records_without_root(home);
    if !gone.is_empty() {
        let lost = lost::find();
        let runs_on = |record: &WorkspaceRecord| {
            lost.iter()
                .any(|qemu| qemu.state_root == record.state_root && qemu.moved_with.is_none())
        };
        records.extend(gone.into_iter().filter(runs_on));
        records.sort_by(|a, b| a.id.cmp(&b.id));
    }
    records
}

/// The lost QEMUs that `castra down` of this state root ends, those of these names; none: all.
pub(crate) fn lost_to_end(state: &StateRoot, also: &[PathBuf], names: &[String]) -> Vec<LostQemu> {
    let mut roots = vec![state.dir().to_owned()];
    roots.extend_from_slice(also);
    let mut lost = lost::of_roots(&roots);
    let wanted =
        |vm: &VmName| names.is_empty() || names.iter().any(|name| vm.as_str().eq_ignore_ascii_case(name));
    lost.retain(|qemu| wanted(&qemu.vm));
    lost
}

/// Ends a lost QEMU: SIGTERM, and SIGKILL after the deadline. Its guest can't be asked to power off,
/// since its control socket went with its state root. The failure says why it still runs.
pub(crate) fn end(
    qemu: &LostQemu,
    lifecycle: &LifecycleConfig,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> (ShutdownEnding, Option<Failure>) {
    let began = Instant::now();
    let vm = &qemu.vm;
    let text = format!("it ran on as pid {}: {}", qemu.pid, qemu.fate());
    emitter.emit(Event::message(Severity::Warn, Some(vm), text));
    emitter.emit(Event::ShutdownRequested {
        vm: vm.clone(),
        pid: qemu.pid,
    });
    let rungs = [
        (
            Signal::SIGTERM,
            lifecycle.sigterm_wait,
            ShutdownEnding::Terminated,
        ),
        (Signal::SIGKILL, lifecycle.sigkill_wait, ShutdownEnding::Killed),
    ];
    let ended = rungs.into_iter().find_map(|(signal, wait, outcome)| {
        emitter.emit(Event::Escalated {
            vm: vm.clone(),
            pid: qemu.pid,
            signal: signal.to_string(),
            timeout_ms: millis(wait),
        });
        qemu.signal(signal);
        gone_within(qemu, wait, cancel).then_some(outcome)
    });
    let outcome = ended.unwrap_or(ShutdownEnding::Failed);
    emitter.emit(Event::ShutdownComplete {
        vm: vm.clone(),
        outcome: outcome.into(),
        elapsed_ms: millis(began.elapsed()),
        changed: ended.is_some(),
    });
    let error = ended.is_none().then(|| {
        Failure::new(
            Exit::Failed,
            format!("vm `{vm}` (pid {}) could not be ended", qemu.pid),
        )
        .because("it survived SIGKILL, or this user may not signal it")
        .advice("run it as the user who started the VM")
    });
    (outcome, error)
}

/// A second request to stop skips the wait.
fn gone_within(qemu: &LostQemu, limit: Duration, cancel: &Cancel) -> bool {
    let is_gone = || !qemu.is_alive() && !host::has_descriptors(qemu.pid);
    Cancel::new().wait_until(limit, POLL_INTERVAL, || is_gone() || cancel.requests() > 1);
    !qemu.is_alive()
}

/// The project of this id or name, also where its state root is gone.
pub fn find_workspace(home: &Path, wanted: &str) -> Result<WorkspaceRecord> {
    workspace::find_workspace(home, wanted).or_else(|failure| {
        let mut gone = workspace::records_without_root(home).into_iter();
        gone.find(|record| record.id == wanted || record.project == wanted)
            .ok_or(failure)
    })
}
