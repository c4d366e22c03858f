//! What is checked before `up`, `restart` and `bootstrap` touch anything, and what `--plan` tells of it:
//! one examination, so that a plan finds what the operation would.
//!
//! Here: what is examined in which order, and the refusals. Not here: how a plan is made
//! (`core::bootstrap::bootstrap_plan`), a conflict found (`core::ports`) or one VM looked at (`operations::fleet::vm_check`).

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::bring_up::{last_launch_of, runs};
use super::fleet_outcome::UpOutcome;
use super::launch_vm::no_cli_for;
use super::memory_check::{self, Shortage};
use super::vm_check::VmCheck;
use crate::core::bootstrap::bootstrap_plan;
use crate::core::bootstrap::keys;
use crate::core::bootstrap::overrides::Overrides;
use crate::core::cancel::Cancel;
use crate::core::config::{Config, Network, VmConfig};
use crate::core::events::{BootstrapPlan, BootstrapPlanAction, Event, Severity};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::human;
use crate::core::name::VmName;
use crate::core::operations::run;
use crate::core::operations::verdict::FleetVerdict;
use crate::core::ports::{PortConflict, PortOwner, owners};
use crate::core::reporter::{Emitter, Reporter};
use crate::core::root::records::{self, RunRecord};
use crate::core::runtime::accel::{self, AccelQuestion, KVM_DEVICE};
use crate::core::runtime::binary::{find_qemu, require_tool};

/// What is to be examined.
pub(crate) struct PreflightRequest<'a> {
    pub config: &'a Config,
    /// `CASTRA_HOME`.
    pub home: &'a Path,
    /// The VMs asked for.
    pub selected: &'a [&'a VmConfig],
    /// Those of them that will be launched.
    pub launches: &'a [&'a VmConfig],
    /// Those of them whose memory isn't taken yet.
    pub grows: &'a [&'a VmConfig],
    pub overrides: &'a Overrides,
    /// A castra binary, for isolated guests.
    pub cli: Option<&'a Path>,
    /// VMs that are restarted and keep their disks.
    pub keep_disks: &'a HashSet<VmName>,
    pub cancel: &'a Cancel,
}

/// What was found.
#[derive(Default)]
pub(crate) struct Preflight {
    plans: Vec<BootstrapPlan>,
    /// What is wrong with the config, one failure each.
    refusals: Vec<Failure>,
    conflicts: Vec<PortConflict>,
    /// The QEMU that will run.
    qemu: Option<PathBuf>,
    /// What the host lacks.
    missing: Option<Failure>,
    short: Shortage,
    /// Another castra works on this project.
    busy: Option<Failure>,
    warnings: Vec<Event>,
}

/// Looks at everything and changes nothing.
pub(crate) fn examine(request: PreflightRequest<'_>) -> Preflight {
    let PreflightRequest {
        config,
        selected,
        launches,
        ..
    } = request;
    let vm_check = VmCheck::new(config, request.home, request.cancel, request.keep_disks);
    let launched = |vm: &VmConfig| launches.iter().any(|launched| launched.name == vm.name);
    let mut found = Preflight {
        plans: plans_of(config, selected, request.overrides),
        conflicts: [
            owners::conflicts(config, request.grows, request.home),
            conflicts_of_running(config, launches, request.home),
        ]
        .concat(),
        short: memory_check::shortage(config, request.grows),
        busy: run::check_project_free(config).err(),
        ..Preflight::default()
    };
    for (plan, vm) in found.plans.iter_mut().zip(selected) {
        plan.machine = Some(vm_check.plan(vm, !launched(vm)));
    }
    found.refusals.extend(refuse_bad_plans(&found.plans).err());
    for vm in launches {
        for failure in vm_check.refusals(vm) {
            // Replicas of one entry make the same mistake, which is told once.
            if !found.refusals.contains(&failure) {
                found.refusals.push(failure);
            }
        }
        found.warnings.extend(vm_check.warnings(vm));
    }
    let tools = find_tools(config, launches, &found.plans, request.cli).and_then(|qemu| {
        if !launches.is_empty() {
            accel::check(&AccelQuestion {
                choice: config.qemu.accel,
                arch: config.qemu.arch,
                binary: &qemu,
                kernel: None,
                home: Some(request.home),
                device: Path::new(KVM_DEVICE),
            })?;
        }
        Ok(qemu)
    });
    match tools {
        Ok(qemu) => found.qemu = Some(qemu),
        Err(failure) => found.missing = Some(failure),
    }
    found
}

/// The examination of `up --broker-only`: no VM is touched.
pub(crate) fn examine_broker(config: &Config) -> Preflight {
    Preflight {
        busy: run::check_project_free(config).err(),
        ..Preflight::default()
    }
}

/// The examination of a bootstrap alone: nothing is launched.
pub(crate) fn examine_bootstrap(config: &Config, selected: &[&VmConfig], overrides: &Overrides) -> Preflight {
    let plans = plans_of(config, selected, overrides);
    Preflight {
        refusals: refuse_bad_plans(&plans).err().into_iter().collect(),
        missing: require_ssh(&plans).err(),
        plans,
        busy: run::check_project_free(config).err(),
        ..Preflight::default()
    }
}

impl Preflight {
    /// The QEMU to run, if any, and what stops nobody; or the first kind of reason not to begin. The
    /// config comes first: waiting helps nobody whose config is wrong.
    pub(crate) fn into_result(self, force: bool) -> Result<(Option<PathBuf>, Vec<Event>)> {
        combine(self.refusals)?;
        refuse_conflicts(&self.conflicts)?;
        self.missing.map_or(Ok(()), Err)?;
        let mut warnings = self.warnings;
        warnings.extend(self.short.unless(force)?);
        self.busy.map_or(Ok(()), Err)?;
        Ok((self.qemu, warnings))
    }

    /// All of it, as a plan.
    pub(crate) fn into_plan(self, config: &Config, force: bool, reporter: &mut dyn Reporter) -> UpOutcome {
        let emitter = Emitter::new(reporter);
        let mut refusals = self.refusals;
        refusals.extend(self.missing);
        refusals.extend(self.busy);
        for warning in &config.warnings {
            emitter.emit(Event::message(Severity::Warn, None, warning.clone()));
        }
        let shortage = self.short.refusal.clone().filter(|_| !force);
        let short = match shortage.is_some() {
            true => self.short.warnings,
            false => self.short.unless(true).unwrap_or_default(),
        };
        for warning in self.warnings.into_iter().chain(short) {
            emitter.emit(warning);
        }
        for conflict in &self.conflicts {
            let text = conflict.to_string();
            emitter.emit(Event::advice(
                Severity::Error,
                Some(&conflict.vm),
                text,
                conflict.advice(),
            ));
        }
        for failure in refusals.iter().chain(&shortage) {
            emitter.emit(Event::of_failure(Severity::Error, None, failure));
        }
        for plan in &self.plans {
            emitter.emit(Event::BootstrapPlanned(Box::new(plan.clone())));
        }
        let refused = !refusals.is_empty() || !self.conflicts.is_empty() || shortage.is_some();
        UpOutcome {
            vms: Vec::new(),
            plans: self.plans,
            refusals,
            port_conflicts: self.conflicts,
            shortage,
            verdict: FleetVerdict::of(0, 0),
            broker_port: None,
            exit: if refused { Exit::Failed } else { Exit::Done },
            elapsed_ms: emitter.elapsed_ms(),
        }
    }
}

/// All refusals as one; its exit code is that of the first.
fn combine(mut refusals: Vec<Failure>) -> Result<()> {
    if refusals.len() < 2 {
        return refusals.pop().map_or(Ok(()), Err);
    }
    let exit = refusals[0].exit;
    let lines: Vec<String> = refusals.iter().map(Failure::to_string).collect();
    let count = human::plural(refusals.len(), "reason");
    Err(Failure::new(exit, format!("nothing was started, for {count}"))
        .because(lines.join("\n"))
        .advice("correct these first; each line says how"))
}

fn plans_of(config: &Config, selected: &[&VmConfig], overrides: &Overrides) -> Vec<BootstrapPlan> {
    let plan_of =
        |vm: &&VmConfig| bootstrap_plan::plan(vm, config, overrides.mode_for(vm), last_launch_of(config, vm));
    selected.iter().map(plan_of).collect()
}

/// A plan that can't run is found before anything starts.
fn refuse_bad_plans(plans: &[BootstrapPlan]) -> Result<()> {
    let bad: Vec<String> = plans
        .iter()
        .filter(|plan| plan.action == BootstrapPlanAction::Error)
        .map(|plan| format!("vm `{}`: {}", plan.vm, plan.reason))
        .collect();
    if bad.is_empty() {
        return Ok(());
    }
    Err(
        Failure::new(Exit::Config, "the bootstrap can't run as configured")
            .because(bad.join("; "))
            .advice("correct castra.toml, or skip the bootstrap with --bootstrap skip"),
    )
}

/// Fixed ports that VMs which run are to have from now on, and somebody else has: not one of those that
/// restart too, for they may give it up.
fn conflicts_of_running(config: &Config, selected: &[&VmConfig], home: &Path) -> Vec<PortConflict> {
    let restarts = |owner: &PortOwner| match owner {
        PortOwner::Vm { vm, workspace, .. } => {
            *workspace == config.workspace && selected.iter().any(|other| other.name == *vm)
        }
        _ => false,
    };
    let mut conflicts = Vec::new();
    for vm in selected.iter().filter(|vm| runs(config, vm)) {
        let record: Option<RunRecord> = records::load(&config.state.vm(&vm.name).run()).ok().flatten();
        let has = record.map(|record| record.forwards).unwrap_or_default();
        for wanted in vm.port_forwards.iter().filter(|wanted| wanted.host != 0) {
            let (port, protocol) = (wanted.host, wanted.protocol);
            if has.iter().any(|has| (has.host, has.protocol) == (port, protocol)) {
                continue;
            }
            let owner = owners::owner_of(protocol, port, Some(home)).filter(|owner| !restarts(owner));
            conflicts.extend(owner.map(|owner| PortConflict {
                vm: vm.name.clone(),
                port,
                protocol,
                owner,
            }));
        }
    }
    conflicts
}

/// What the config says that castra doesn't heed, and what the preflight found that stops nobody.
pub(crate) fn emit_warnings(config: &Config, found: Vec<Event>, emitter: &Emitter<'_>) {
    for warning in &config.warnings {
        emitter.emit(Event::message(Severity::Warn, None, warning.clone()));
    }
    for warning in found {
        emitter.emit(warning);
    }
}

/// A port that somebody else has is found before anything starts. Nothing is wrong with the config,
/// and the same command works once the port is free: so it is `Busy`, as for the broker's port.
fn refuse_conflicts(conflicts: &[PortConflict]) -> Result<()> {
    let Some(first) = conflicts.first() else {
        return Ok(());
    };
    let all: Vec<String> = conflicts.iter().map(PortConflict::to_string).collect();
    let what = match conflicts.len() {
        1 => "a host port is taken".to_owned(),
        count => format!("{count} host ports are taken"),
    };
    Err(Failure::new(Exit::Busy, what)
        .because(all.join("; "))
        .advice(first.advice()))
}

/// A bootstrap that can't reach its guest is found before anything starts.
fn require_ssh(plans: &[BootstrapPlan]) -> Result<()> {
    if plans.iter().any(|plan| plan.action == BootstrapPlanAction::Run) {
        require_tool("ssh", keys::SSH_PACKAGE)?;
    }
    Ok(())
}

/// The programs that a launch of these VMs and the bootstraps need; which QEMU.
fn find_tools(
    config: &Config,
    to_launch: &[&VmConfig],
    plans: &[BootstrapPlan],
    cli: Option<&Path>,
) -> Result<PathBuf> {
    if cli.is_none()
        && let Some(vm) = to_launch.iter().find(|vm| vm.network == Network::Isolated)
    {
        return Err(no_cli_for(&vm.name));
    }
    let qemu = find_qemu(&config.qemu)?;
    if !to_launch.is_empty() {
        require_tool("qemu-img", "qemu-utils")?;
    }
    require_ssh(plans)?;
    Ok(qemu)
}
