//! `down`: takes VMs down by the shutdown ladder, discards their overlays, and stops the broker
//! when no VM of the project is left.
//!
//! Here: the order of steps. Not here: how one VM or the broker is stopped (`core::operations::fleet`).

use std::collections::HashSet;
use std::path::PathBuf;

use serde::Serialize;

use crate::core::cancel::Cancel;
use crate::core::config::{Config, LifecycleConfig, workspace};
use crate::core::events::endings::ShutdownEnding;
use crate::core::events::{Event, Severity, VmCounts};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::lines::journal::Rotation;
use crate::core::name::VmName;
use crate::core::operations::fleet::{BrokerEvents, VmStopper, stop_broker_if_last};
use crate::core::operations::lost;
use crate::core::operations::run::{self, Operation};
use crate::core::operations::select;
use crate::core::operations::verdict::FleetVerdict;
use crate::core::reporter::{Emitter, Reporter};
use crate::core::root::paths::StateRoot;
use crate::core::root::records::RunRecord;
use crate::core::runtime::lost::LostQemu;
use crate::core::runtime::seed;
use crate::core::threads;

/// The options of `down`. `down` needs only the state root, so a project whose config was changed, moved or
/// deleted can still be stopped.
#[derive(Clone, Debug)]
pub struct DownOptions {
    /// The project's name, for messages.
    pub project: String,
    /// Where its state is.
    pub state: StateRoot,
    /// The project's entry under castra's home, where its state is elsewhere.
    pub registry: Option<PathBuf>,
    /// Names of the VMs; empty: all.
    pub vms: Vec<String>,
    /// Names that the config has, though they may never have run.
    pub declared: Vec<VmName>,
    /// The ladder's deadlines.
    pub lifecycle: LifecycleConfig,
    /// Rotation of the journal.
    pub rotation: Rotation,
    /// Discard persistent overlays too.
    pub discard: bool,
    /// Raised to skip the rungs that wait for the guest.
    pub cancel: Cancel,
}

impl DownOptions {
    /// All VMs of a project, as its config says; persistent overlays stay.
    pub fn of(config: &Config) -> DownOptions {
        DownOptions {
            project: config.project.clone(),
            state: config.state.clone(),
            registry: config.registry.clone(),
            vms: Vec::new(),
            declared: config.vms.iter().map(|vm| vm.name.clone()).collect(),
            lifecycle: config.lifecycle,
            rotation: config.bus.rotation,
            discard: false,
            cancel: Cancel::new(),
        }
    }
}

/// The outcome of `down`.
#[derive(Clone, Debug, Serialize)]
pub struct DownOutcome {
    /// The VMs asked for, by name.
    pub vms: Vec<VmDown>,
    /// The broker was stopped.
    pub broker_stopped: bool,
    /// Bytes of all overlays that were discarded.
    pub reclaimed_bytes: u64,
    /// All, some or none of the VMs are as asked for.
    pub verdict: FleetVerdict,
    /// The exit code.
    pub exit: Exit,
    /// How long it took, ms.
    pub elapsed_ms: u64,
}

/// One VM after `down`.
#[derive(Clone, Debug, Serialize)]
pub struct VmDown {
    /// The VM.
    pub vm: VmName,
    /// It ran and was stopped.
    pub stopped: bool,
    /// How it was stopped.
    pub outcome: ShutdownEnding,
    /// Bytes its overlay took; 0 if it stays or there was none.
    pub reclaimed_bytes: u64,
    /// Why it failed.
    pub error: Option<Failure>,
}

/// Takes VMs down. A failure is returned only if nothing could be begun.
pub fn down(options: DownOptions, reporter: &mut dyn Reporter) -> Result<DownOutcome> {
    let state = &options.state;
    let former = options.registry.as_deref();
    let former = former.map(|entry| workspace::former_roots_of(entry, state));
    let lost = lost::lost_to_end(state, &former.unwrap_or_default(), &options.vms);
    let declared = options.declared.iter().chain(lost.iter().map(|qemu| &qemu.vm));
    let declared: Vec<&str> = declared.map(VmName::as_str).collect();
    let selected = select::launched_vms(state, &options.vms, &declared)?;
    if !host::is_there(state.dir()) {
        return Ok(without_state(&options, &lost, reporter));
    }
    let (project, unlocked) = match run::lock_project(&options.project, state, "castra down") {
        Ok(lock) => (Some(lock), None),
        // No other command can change anything there either, and running VMs must still be stopped.
        Err(failure) if matches!(failure.exit, Exit::CantCreate | Exit::Io) => (None, Some(failure)),
        Err(failure) => return Err(failure),
    };

    let detail = (!options.vms.is_empty()).then(|| options.vms.join(" "));
    let operation = Operation::accept("down", detail, state, options.rotation, reporter);
    let emitter = operation.emitter();
    if let Some(failure) = unlocked {
        let what = format!("VMs are stopped, but their disks stay: {}", failure.what);
        emitter.emit(Event::of_failure(
            Severity::Warn,
            None,
            &Failure { what, ..failure },
        ));
    }
    run::clear_abandoned(state, options.registry.as_deref(), emitter);
    // Lost QEMUs are ended first, because they have their disks open.
    let ended = end_lost(&lost, &options, emitter);
    let outcomes = threads::map_parallel(
        &selected,
        |vm| format!("down {vm}"),
        |vm| take_down(vm, &options, emitter),
    );
    let outcomes = outcomes.into_iter().zip(&selected);
    let vms: Vec<VmDown> = outcomes
        .map(|(outcome, vm)| outcome.unwrap_or_else(|_| panicked(vm)))
        .collect();
    let vms = with_lost(vms, ended);
    let relay = BrokerEvents::from_now(&state.broker_events(), HashSet::new());
    let (broker_stopped, broker_error) = relay.during(emitter, || stop_broker_if_last(state, emitter));
    drop(project);

    let failed = vms.iter().filter(|vm| vm.error.is_some()).count();
    let changed = vms
        .iter()
        .filter(|vm| vm.error.is_none() && (vm.stopped || vm.reclaimed_bytes > 0))
        .count();
    let counts = VmCounts::of(vms.len(), changed, failed);
    let reclaimed_bytes = vms.iter().map(|vm| vm.reclaimed_bytes).sum();
    let exit = if failed > 0 || broker_error.is_some() {
        Exit::Failed
    } else {
        Exit::Done
    };
    let detail = broker_error
        .map(|failure| failure.to_string())
        .or_else(|| failed_names(&vms));
    let elapsed_ms = emitter.elapsed_ms();
    operation.end(exit, detail, counts, reclaimed_bytes);
    Ok(DownOutcome {
        vms,
        broker_stopped,
        reclaimed_bytes,
        verdict: FleetVerdict::of(counts.total, failed),
        exit,
        elapsed_ms,
    })
}

/// A project without a state root, and `down` makes none: the project has never been up, or its state was
/// removed while VMs ran.
fn without_state(options: &DownOptions, lost: &[LostQemu], reporter: &mut dyn Reporter) -> DownOutcome {
    let operation = Operation::accept_unkept("down", None, reporter);
    let emitter = operation.emitter();
    if lost.is_empty() {
        let root = options.state.dir();
        let was_up = options
            .registry
            .as_deref()
            .and_then(workspace::record_in)
            .is_some_and(|record| record.state_root == root);
        let text = match was_up {
            true => format!(
                "the state root of project `{}`, {}, is gone, and nothing of it runs",
                options.project,
                root.display()
            ),
            false => format!(
                "project `{}` has never been up: there is nothing to take down",
                options.project
            ),
        };
        emitter.emit(Event::message(Severity::Info, None, text));
    }
    let vms = with_lost(Vec::new(), end_lost(lost, options, emitter));
    let failed = vms.iter().filter(|vm| vm.error.is_some()).count();
    let counts = VmCounts::of(vms.len(), vms.len() - failed, failed);
    let exit = match failed {
        0 => Exit::Done,
        _ => Exit::Failed,
    };
    let elapsed_ms = emitter.elapsed_ms();
    operation.end(exit, failed_names(&vms), counts, 0);
    DownOutcome {
        verdict: FleetVerdict::of(counts.total, failed),
        vms,
        broker_stopped: false,
        reclaimed_bytes: 0,
        exit,
        elapsed_ms,
    }
}

fn end_lost(lost: &[LostQemu], options: &DownOptions, emitter: &Emitter<'_>) -> Vec<VmDown> {
    let end = |qemu: &LostQemu| {
        let (outcome, error) = lost::end(qemu, &options.lifecycle, emitter, &options.cancel);
        VmDown {
            vm: qemu.vm.clone(),
            stopped: error.is_none(),
            outcome,
            reclaimed_bytes: 0,
            error,
        }
    };
    lost.iter().map(end).collect()
}

/// A VM that was found in both ways counts once.
fn with_lost(mut vms: Vec<VmDown>, ended: Vec<VmDown>) -> Vec<VmDown> {
    for lost in ended {
        match vms.iter_mut().find(|vm| vm.vm == lost.vm && !vm.stopped) {
            Some(vm) => {
                vm.stopped = lost.stopped;
                vm.outcome = lost.outcome;
                vm.error = vm.error.take().or(lost.error);
            }
            None => vms.push(lost),
        }
    }
    vms
}

fn panicked(vm: &VmName) -> VmDown {
    let failure = Failure::new(
        Exit::Internal,
        format!("castra failed while it took vm `{vm}` down"),
    )
    .because("a thread panicked")
    .advice("run it again with CASTRA_LOG=debug and report what it says");
    VmDown {
        vm: vm.clone(),
        stopped: false,
        outcome: ShutdownEnding::Failed,
        reclaimed_bytes: 0,
        error: Some(failure),
    }
}

fn failed_names(vms: &[VmDown]) -> Option<String> {
    let failed = vms.iter().filter(|vm| vm.error.is_some());
    run::failed_names(failed.map(|vm| &vm.vm))
}

/// Stops one VM, removes what it left, and discards its overlay.
fn take_down(vm: &VmName, options: &DownOptions, emitter: &Emitter<'_>) -> VmDown {
    let stopping = VmStopper {
        state: &options.state,
        lifecycle: &options.lifecycle,
        command: "castra down",
        emitter,
        cancel: &options.cancel,
    };
    let stopped = stopping.stop(vm);
    let mut done = VmDown {
        vm: vm.clone(),
        stopped: stopped.changed,
        outcome: stopped.ending,
        reclaimed_bytes: 0,
        error: None,
    };
    match stopped.left {
        Ok(left) => {
            if !stopped.changed
                && let Some(record) = &left.record
            {
                stopping.acknowledge_end(vm, record);
            }
            let path = what_to_discard(vm, left.record, options, emitter);
            match path.map(|path| stopping.discard(vm, &path)) {
                None => {}
                Some(Ok(bytes)) => done.reclaimed_bytes = bytes,
                Some(Err(failure)) => done.error = Some(failure),
            }
            if let Err(failure) = seed::discard_seed(&options.state.vm(vm).seed()) {
                emitter.emit(Event::of_failure(Severity::Warn, Some(vm), &failure));
            }
            drop(left.lock);
        }
        Err(failure) => done.error = Some(failure),
    }
    done
}

/// The overlay to discard, if any. Without a record nobody knows whether it was to be kept, so it
/// is, and that is said.
fn what_to_discard(
    vm: &VmName,
    record: Option<RunRecord>,
    options: &DownOptions,
    emitter: &Emitter<'_>,
) -> Option<PathBuf> {
    if let Some(record) = record {
        return record.overlay.filter(|_| options.discard || !record.persist);
    }
    let path = options.state.overlay(vm);
    if options.discard {
        return Some(path);
    }
    if host::is_there(&path) {
        let text = format!(
            "overlay {} is kept: run.json is gone, so castra can't know whether the disk is persistent",
            path.display()
        );
        let next = format!("castra down --discard {vm} removes it, castra up {vm} uses or replaces it");
        emitter.emit(Event::advice(Severity::Warn, Some(vm), text, next));
    }
    None
}
