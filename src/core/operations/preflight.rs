//! What is checked before `up` and `bootstrap` touch anything, and what `--plan` tells of it.
//!
//! Here: the bootstrap plans, host ports that somebody else has, the tools that a bootstrap needs.
//! Not here: how a plan is made (`core::bootstrap::plan`) or a conflict found (`core::ports`).

use std::path::{Path, PathBuf};

use crate::core::bootstrap::keys;
use crate::core::bootstrap::overrides::Overrides;
use crate::core::bootstrap::plan;
use crate::core::config::{Config, Network, VmConfig};
use crate::core::events::{BootstrapPlan, BootstrapPlanAction, Event, Severity};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::operations::launching;
use crate::core::operations::room::Shortage;
use crate::core::operations::start;
use crate::core::operations::up::UpOutcome;
use crate::core::operations::verdict::FleetVerdict;
use crate::core::ports::PortConflict;
use crate::core::reporter::{Emitter, Reporter};
use crate::core::runtime::binary::{find_qemu, require_tool};

pub(crate) fn plans_of(config: &Config, selected: &[&VmConfig], overrides: &Overrides) -> Vec<BootstrapPlan> {
    let plan_of =
        |vm: &&VmConfig| plan::plan(vm, config, overrides.mode_for(vm), start::known_of(config, vm));
    selected.iter().map(plan_of).collect()
}

/// A plan that can't run is found before anything starts.
pub(crate) fn refuse_bad_plans(plans: &[BootstrapPlan]) -> Result<()> {
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
            .advice("correct castra.toml, or go on without with --bootstrap skip"),
    )
}

/// A port that somebody else has is found before anything starts. Nothing is wrong with the config,
/// and the same command works once the port is free: so it is `Busy`, as for the broker's port.
pub(crate) fn refuse_conflicts(conflicts: &[PortConflict]) -> Result<()> {
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
pub(crate) fn require_ssh(plans: &[BootstrapPlan]) -> Result<()> {
    if plans.iter().any(|plan| plan.action == BootstrapPlanAction::Run) {
        require_tool("ssh", keys::SSH_PACKAGE)?;
    }
    Ok(())
}

/// The programs that a launch of these VMs and the bootstraps need; which QEMU.
pub(crate) fn find_tools(
    config: &Config,
    to_launch: &[&VmConfig],
    plans: &[BootstrapPlan],
    cli: Option<&Path>,
) -> Result<PathBuf> {
    if cli.is_none()
        && let Some(vm) = to_launch.iter().find(|vm| vm.network == Network::Isolated)
    {
        return Err(launching::no_cli_for(&vm.name));
    }
    let qemu = find_qemu(&config.qemu)?;
    if !to_launch.is_empty() {
        require_tool("qemu-img", "qemu-utils")?;
    }
    require_ssh(plans)?;
    Ok(qemu)
}

pub(crate) fn show_plans(
    plans: Vec<BootstrapPlan>,
    conflicts: Vec<PortConflict>,
    short: Shortage,
    reporter: &mut dyn Reporter,
) -> UpOutcome {
    let emitter = Emitter::new(reporter);
    for conflict in &conflicts {
        emitter.emit(Event::advice(
            Severity::Error,
            Some(&conflict.vm),
            conflict.to_string(),
            conflict.advice(),
        ));
    }
    for warning in short.warnings {
        emitter.emit(warning);
    }
    if let Some(failure) = &short.refusal {
        let next = failure.next.clone().unwrap_or_default();
        emitter.emit(Event::advice(Severity::Error, None, failure.cause(), next));
    }
    for plan in &plans {
        emitter.emit(Event::BootstrapPlanned(Box::new(plan.clone())));
    }
    let bad = plans.iter().any(|plan| plan.action == BootstrapPlanAction::Error);
    let exit = if bad || !conflicts.is_empty() || short.refusal.is_some() {
        Exit::Failed
    } else {
        Exit::Done
    };
    UpOutcome {
        vms: Vec::new(),
        plans,
        port_conflicts: conflicts,
        shortage: short.refusal,
        verdict: FleetVerdict::of(0, 0),
        broker_port: None,
        exit,
        elapsed_ms: emitter.elapsed_ms(),
    }
}
