//! `wait`: waits until VMs are reachable, bootstrapped or stopped, or can't become so any more.
//!
//! Here: checking again and again the evidence that `status` uses, and what it means for the wait. Not here:
//! that evidence and its rules (`core::status`). It starts nothing, takes no lock and talks to nobody.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::core::cancel::Cancel;
use crate::core::events::endings::{BootstrapStatus, OpenEnum};
use crate::core::events::{Event, Severity, VmCounts};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::name::VmName;
use crate::core::nearest::no_such_vm;
use crate::core::operations::verdict::FleetVerdict;
use crate::core::reporter::{Emitter, Reporter};
use crate::core::root::project::Project;
use crate::core::status::assemble::assemble;
use crate::core::status::read::read;
use crate::core::status::{StatusOutcome, VmState, VmStatus};

/// The default limit.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

/// Between two looks: soon enough for whoever waits for a boot, and a thousandth of a core.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// The state to wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WaitFor {
    /// The guest was heard within the freshness window.
    #[default]
    Reachable,
    /// The last bootstrap of its launch has ended well, or there was none to run.
    Bootstrapped,
    /// QEMU doesn't run.
    Stopped,
}

impl WaitFor {
    /// All of them.
    pub const ALL: [WaitFor; 3] = [WaitFor::Reachable, WaitFor::Bootstrapped, WaitFor::Stopped];

    /// The word in options and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            WaitFor::Reachable => "reachable",
            WaitFor::Bootstrapped => "bootstrapped",
            WaitFor::Stopped => "stopped",
        }
    }
}

/// The options of `wait`.
#[derive(Clone, Debug)]
pub struct WaitOptions {
    /// The project: `Project::from(&config)`, or from its workspace record.
    pub project: Project,
    /// Names of VMs or of roles, which stand for all their replicas; empty: all VMs.
    pub vms: Vec<String>,
    /// The wanted state.
    pub wait_for: WaitFor,
    /// How long to wait; zero looks once.
    pub timeout: Duration,
    /// Raised to stop early.
    pub cancel: Cancel,
}

impl WaitOptions {
    /// Until all VMs of a project are reachable, for five minutes.
    pub fn new(project: impl Into<Project>) -> WaitOptions {
        WaitOptions {
            project: project.into(),
            vms: Vec::new(),
            wait_for: WaitFor::default(),
            timeout: DEFAULT_TIMEOUT,
            cancel: Cancel::new(),
        }
    }
}

/// How the wait ended.
#[derive(Clone, Debug, Serialize)]
pub struct WaitOutcome {
    /// The VMs waited for, in the order of `status`.
    pub vms: Vec<VmWait>,
    /// [`Exit::Done`]: all are as asked for; [`Exit::Failed`]: one can't become so any more;
    /// [`Exit::TimedOut`]; [`Exit::Interrupted`].
    pub exit: Exit,
    /// How long it took, ms.
    pub elapsed_ms: u64,
}

/// One VM at the end of a wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmWait {
    /// The VM.
    pub vm: VmName,
    /// It is in the wanted state.
    pub met: bool,
    /// Its state, as in `status`.
    pub state: VmState,
    /// What is missing, or why the VM can't get there; `None`: nothing is missing.
    pub why: Option<String>,
}

/// The result of one check of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
enum VmProgress {
    Met,
    NotYet(String),
    Never(String),
}

/// Waits. A failure is returned only where there is nothing to wait for.
pub fn wait(options: WaitOptions, reporter: &mut dyn Reporter) -> Result<WaitOutcome> {
    let emitter = Emitter::new(reporter);
    let began = Instant::now();
    let word = options.wait_for.as_str();
    let mut project = options.project;
    let mut ran: HashSet<VmName> = HashSet::new();
    let mut told: HashSet<VmName> = HashSet::new();
    loop {
        let snapshot = read(project)?;
        let status = assemble(&snapshot);
        project = snapshot.project;
        let vms = selected(&status, &options.vms)?;
        let mut looks: Vec<(&VmStatus, VmProgress)> = Vec::new();
        for vm in vms {
            let look = judge(vm, options.wait_for, ran.contains(&vm.name));
            if vm.pid.is_some() {
                ran.insert(vm.name.clone());
            }
            if look == VmProgress::Met && told.insert(vm.name.clone()) {
                emitter.emit(Event::message(
                    Severity::Info,
                    Some(&vm.name),
                    format!("is {word}"),
                ));
            }
            looks.push((vm, look));
        }
        let never = looks.iter().any(|(_, look)| matches!(look, VmProgress::Never(_)));
        let exit = if looks.iter().all(|(_, look)| *look == VmProgress::Met) {
            Exit::Done
        } else if never {
            Exit::Failed
        } else if options.cancel.is_requested() {
            Exit::Interrupted
        } else if began.elapsed() >= options.timeout {
            Exit::TimedOut
        } else {
            let left = options.timeout.saturating_sub(began.elapsed());
            options.cancel.pause(POLL_INTERVAL.min(left));
            continue;
        };
        return Ok(end(&emitter, looks, options.wait_for, exit));
    }
}

/// Reports what is missing, and the sum.
fn end(
    emitter: &Emitter<'_>,
    looks: Vec<(&VmStatus, VmProgress)>,
    wait_for: WaitFor,
    exit: Exit,
) -> WaitOutcome {
    let word = wait_for.as_str();
    let mut vms = Vec::new();
    for (vm, look) in looks {
        let (text, why) = match look {
            VmProgress::Met => (None, None),
            VmProgress::NotYet(why) => (Some(format!("is not {word}: {why}")), Some(why)),
            VmProgress::Never(why) => (Some(format!("can't become {word}: {why}")), Some(why)),
        };
        if let Some(text) = text {
            let next = format!("castra status, castra logs {}", vm.name);
            emitter.emit(Event::advice(Severity::Error, Some(&vm.name), text, next));
        }
        vms.push(VmWait {
            vm: vm.name.clone(),
            met: why.is_none(),
            state: vm.state,
            why,
        });
    }
    let met = vms.iter().filter(|vm| vm.met).count();
    let counts = VmCounts::of(vms.len(), 0, vms.len() - met);
    let elapsed_ms = emitter.elapsed_ms();
    emitter.emit(Event::Summary {
        operation: "wait".to_owned(),
        duration_ms: elapsed_ms,
        exit_status: i32::from(exit.code()),
        vms: counts,
        bytes: 0,
        verdict: FleetVerdict::in_summary(&counts).map(str::to_owned),
    });
    WaitOutcome {
        vms,
        exit,
        elapsed_ms,
    }
}

/// The VMs of these names and roles; no name: all. An unknown one is refused, naming what exists.
fn selected<'s>(status: &'s StatusOutcome, names: &[String]) -> Result<Vec<&'s VmStatus>> {
    let is = |vm: &VmStatus, name: &str| {
        vm.name.as_str().eq_ignore_ascii_case(name) || vm.role.eq_ignore_ascii_case(name)
    };
    if status.vms.is_empty() {
        return Err(Failure::new(
            Exit::Usage,
            format!("project `{}` has no VM to wait for", status.project),
        )
        .advice("declare one under [[vms]] in castra.toml"));
    }
    for name in names {
        if !status.vms.iter().any(|vm| is(vm, name)) {
            let known: Vec<&str> = status.vms.iter().map(|vm| vm.name.as_str()).collect();
            return Err(no_such_vm(name, &known));
        }
    }
    let wanted = |vm: &&VmStatus| names.is_empty() || names.iter().any(|name| is(vm, name));
    Ok(status.vms.iter().filter(wanted).collect())
}

/// Whether a VM is as asked for, isn't yet, or can't become so any more. `ran`: this wait has seen its
/// QEMU; one that has not run yet may be started by somebody.
fn judge(vm: &VmStatus, wait_for: WaitFor, ran: bool) -> VmProgress {
    let reason = || vm.ended.as_ref().map_or("unknown", |ended| ended.reason.as_str());
    if wait_for == WaitFor::Stopped {
        return match vm.state {
            VmState::Stopped | VmState::Crashed => VmProgress::Met,
            other => VmProgress::NotYet(format!("it is {}", other.as_str())),
        };
    }
    match vm.state {
        VmState::Crashed => return VmProgress::Never(format!("it crashed ({})", reason())),
        VmState::Stopped if ran => return VmProgress::Never(format!("it has stopped ({})", reason())),
        VmState::Stopped => return VmProgress::NotYet("it doesn't run".to_owned()),
        VmState::Starting | VmState::Stopping => {
            return VmProgress::NotYet(format!("it is {}", vm.state.as_str()));
        }
        VmState::Paused => {
            let paused = vm
                .paused
                .as_ref()
                .map_or("unknown", |paused| paused.reason.as_str());
            let why = format!("it is paused ({paused})");
            // Only a new launch helps these.
            return match paused {
                "internal-error" | "guest-panicked" => VmProgress::Never(why),
                _ => VmProgress::NotYet(why),
            };
        }
        VmState::External if wait_for == WaitFor::Bootstrapped => {
            return VmProgress::NotYet("castra has not launched it".to_owned());
        }
        VmState::Running | VmState::External => {}
    }
    let bootstrap = vm.bootstrap.as_ref().map(|bootstrap| &bootstrap.status);
    match (wait_for, bootstrap) {
        (WaitFor::Reachable, _) if vm.reachable => VmProgress::Met,
        (WaitFor::Reachable, _) => VmProgress::NotYet(match vm.last_handshake_age_ms {
            _ if vm.broker == crate::core::status::GuestState::Offline => "no broker runs".to_owned(),
            None => "it was not heard since its launch".to_owned(),
            Some(age) => format!("it was last heard {} ago", crate::core::human::duration(age)),
        }),
        (_, Some(OpenEnum::Known(BootstrapStatus::Success | BootstrapStatus::Skipped))) => VmProgress::Met,
        (_, Some(OpenEnum::Known(BootstrapStatus::Failed))) => {
            VmProgress::Never("its bootstrap failed".to_owned())
        }
        (_, Some(other)) => VmProgress::NotYet(format!("its bootstrap is {other}")),
        (_, None) => VmProgress::NotYet("its bootstrap has not begun".to_owned()),
    }
}

#[cfg(test)]
#[path = "wait_tests.rs"]
mod tests;
