//! `castra up`.

use std::env;
use std::path::PathBuf;

use castra::core::events::endings::{BootstrapStatus, OpenEnum};
use castra::core::failure::{Exit, Failure, Result};
use castra::core::operations::up::{UpOptions, UpOutcome, VmUp, up};
use castra::core::root::records::ForwardRecord;
use castra::core::runtime::launch_plan::VmLaunchMode;

use super::context::Context;
use super::{find_project, human, operands, plan};
use crate::cli::Raw;

pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let options = UpOptions {
        config: find_project::config(raw)?,
        home: find_project::home()?,
        vms: operands::names(&raw.operands)?,
        bootstrap: raw.bootstrap.clone(),
        recreate: raw.recreate,
        force: raw.force,
        plan: raw.plan,
        broker_only: raw.broker_only,
        cli: Some(own_binary()?),
        launch_mode: VmLaunchMode::Daemonize,
        cancel: context.cancel_on_signals(),
    };
    context.expect(&options.config, &options.vms);
    if raw.plan && !context.json {
        // With --plan the plans are the result.
        let mut told = Vec::new();
        let outcome = up(options, &mut told)?;
        plan::show(context, &outcome, &told);
        return Ok(outcome.exit);
    }
    let outcome = context.reporting(|reporter| up(options, reporter))?;
    if !context.json {
        show(context, raw, &outcome);
    }
    Ok(outcome.exit)
}

/// The running castra binary, with which brokers and the pipes of isolated guests are started.
pub fn own_binary() -> Result<PathBuf> {
    env::current_exe()
        .map_err(|error| Failure::new(Exit::Internal, "castra can't find its own binary").because(error))
}

fn show(context: &mut Context, raw: &Raw, outcome: &UpOutcome) {
    if raw.plan || context.quiet {
        return;
    }
    let took = human::duration(outcome.elapsed_ms);
    let port = outcome
        .broker_port
        .map(|port| format!("broker on 127.0.0.1:{port}"));
    if raw.broker_only {
        context
            .out
            .line(format!("{} in {took}", port.unwrap_or_default()));
        context.out.flush();
        context.say("next: `castra status`; `castra down` stops it");
        return;
    }
    let port = port.unwrap_or_default();
    show_outcome(context, &outcome.vms, "up", &port, &took, outcome.exit);
    next(context, &outcome.vms, outcome.exit);
}

/// The outcome: all, some or none of the VMs succeeded, then each VM.
pub fn show_outcome(context: &mut Context, vms: &[VmUp], done: &str, port: &str, took: &str, exit: Exit) {
    let well = vms.iter().filter(|vm| vm.error.is_none()).count();
    let all = human::plural(vms.len(), "VM");
    let fleet = match (exit, vms, vms.len() - well) {
        (_, _, 0) => format!("{all} {done} in {took}"),
        (Exit::Interrupted, ..) => format!("interrupted after {took}: {well} of {all} {done}"),
        (_, [vm], _) => format!("{} failed after {took}", vm.vm),
        (_, _, failed) if well == 0 => format!("{failed} of {all} failed, after {took}"),
        (_, _, failed) => format!("{well} of {all} {done}, {failed} failed, after {took}"),
    };
    let port = match port {
        "" => String::new(),
        port => format!("; {port}"),
    };
    context.out.line(format!("{fleet}{port}"));
    show_vms(context, vms);
    context.out.flush();
}

/// One line per VM: its new state.
pub fn show_vms(context: &mut Context, vms: &[VmUp]) {
    let width = vms.iter().map(|vm| vm.vm.as_str().len()).max().unwrap_or(0);
    for vm in vms {
        let name = context.style.bold(&format!("{:<width$}", vm.vm.as_str()));
        let state = match &vm.error {
            Some(failure) => format!("{} {}", context.style.error("failed:"), failure.what),
            None => well(vm),
        };
        context.out.line(format!("  {name}  {state}"));
    }
}

fn well(vm: &VmUp) -> String {
    let mut facts = vec![match (&vm.stopped, vm.started) {
        (Some(how), true) => format!("restarted ({})", how.as_str()),
        (None, true) => "started".to_owned(),
        (_, false) => "was running already".to_owned(),
    }];
    if let Some(bootstrap) = &vm.bootstrap {
        facts.push(match (&bootstrap.status, bootstrap.noop) {
            (OpenEnum::Known(BootstrapStatus::Success), true) => "bootstrapped, nothing to change".to_owned(),
            (OpenEnum::Known(BootstrapStatus::Success), false) => "bootstrapped".to_owned(),
            (other, _) => format!("bootstrap {other}"),
        });
    }
    // `castra ssh` uses the forward to the guest's SSH server, so it isn't shown.
    let named = vm.forwards.iter().filter(|forward| !forward.is_ssh());
    facts.extend(named.map(forward));
    if !vm.stale_config.is_empty() {
        facts.push(format!(
            "differs from castra.toml: {}",
            vm.stale_config.join(", ")
        ));
    }
    facts.join(", ")
}

fn forward(forward: &ForwardRecord) -> String {
    let protocol = match forward.protocol {
        castra::core::config::Protocol::Tcp => "",
        castra::core::config::Protocol::Udp => "/udp",
    };
    format!(
        "127.0.0.1:{} → guest port {}{protocol}",
        forward.host, forward.guest
    )
}

/// The next useful command.
pub fn next(context: &Context, vms: &[VmUp], exit: Exit) {
    let well = vms.iter().find(|vm| vm.error.is_none());
    let failed = vms.iter().find(|vm| vm.error.is_some());
    match (exit, well, failed) {
        (Exit::Interrupted, ..) => {
            context.say("next: `castra status` shows what runs, `castra down` stops it")
        }
        (_, _, Some(failed)) => context.say(&format!(
            "next: `castra logs {}` shows what it printed, `castra status` what runs",
            failed.vm
        )),
        (_, Some(well), None) => context.say(&format!(
            "next: `castra ssh {}`, `castra status`; `castra down` stops everything",
            well.vm
        )),
        (_, None, None) => {}
    }
}
