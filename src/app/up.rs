//! `castra up`.

use std::env;
use std::path::PathBuf;

use castra::core::events::{BootstrapPlan, BootstrapPlanAction};
use castra::core::failure::{Exit, Failure, Result};
use castra::core::operations::up::{UpOptions, UpOutcome, VmUp, up};
use castra::core::records::ForwardRecord;
use castra::core::reporter::Silent;
use castra::core::runtime::plan::VmLaunchMode;

use super::context::Context;
use super::{failure, human, select, typed};
use crate::cli::Raw;

/// Brings VMs up.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let options = UpOptions {
        config: select::config(raw)?,
        home: select::home()?,
        vms: typed::names(&raw.operands)?,
        bootstrap: raw.bootstrap.clone(),
        force: raw.force,
        plan: raw.plan,
        broker_only: raw.broker_only,
        cli: Some(own_binary()?),
        launch_mode: VmLaunchMode::Daemonize,
        cancel: context.cancel_on_signals(),
    };
    context.expect(&options.config, &options.vms);
    let outcome = match raw.plan && !context.json {
        // The plans are the result: they are printed below, in full.
        true => up(options, &mut Silent)?,
        false => context.reporting(|reporter| up(options, reporter))?,
    };
    if !context.json {
        show(context, raw, &outcome);
    }
    Ok(outcome.exit)
}

/// This very binary, by which brokers and the pipes of isolated guests are started.
pub fn own_binary() -> Result<PathBuf> {
    env::current_exe()
        .map_err(|error| Failure::new(Exit::Internal, "castra can't find its own binary").because(error))
}

fn show(context: &mut Context, raw: &Raw, outcome: &UpOutcome) {
    if raw.plan {
        show_plans(context, &outcome.plans);
        for conflict in &outcome.port_conflicts {
            let error = context.err_style.bad("error:");
            let next = context.err_style.strong("try:");
            let line = format!("{error} {conflict}\n  {next} {}", conflict.advice());
            context.screen.say(&line);
        }
        if let Some(short) = &outcome.shortage {
            context.screen.say(&failure::render(short, context.err_style));
        }
        return;
    }
    if context.quiet {
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

/// How the fleet fares: all, some or none of it, then each VM.
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

/// One line per VM: what is now true of it.
pub fn show_vms(context: &mut Context, vms: &[VmUp]) {
    let width = vms.iter().map(|vm| vm.vm.as_str().len()).max().unwrap_or(0);
    for vm in vms {
        let name = context.style.strong(&format!("{:<width$}", vm.vm.as_str()));
        let state = match &vm.error {
            Some(failure) => format!("{} {}", context.style.bad("failed:"), failure.what),
            None => well(vm),
        };
        context.out.line(format!("  {name}  {state}"));
    }
}

fn well(vm: &VmUp) -> String {
    let mut facts = vec![match (&vm.stopped, vm.started) {
        (Some(how), true) => format!("restarted ({how})"),
        (None, true) => "started".to_owned(),
        (_, false) => "was running already".to_owned(),
    }];
    if let Some(bootstrap) = &vm.bootstrap {
        facts.push(match (bootstrap.status.as_str(), bootstrap.noop) {
            ("success", true) => "bootstrapped, nothing to change".to_owned(),
            ("success", false) => "bootstrapped".to_owned(),
            (other, _) => format!("bootstrap {other}"),
        });
    }
    if !vm.forwards.is_empty() {
        let forwards: Vec<String> = vm.forwards.iter().map(forward).collect();
        facts.push(forwards.join(", "));
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
            "next: `castra ssh {}` opens a shell, `castra status` shows all, `castra down` stops them",
            well.vm
        )),
        (_, None, None) => {}
    }
}

/// What `--plan` prints: every VM's bootstrap as it would run.
pub fn show_plans(context: &mut Context, plans: &[BootstrapPlan]) {
    for plan in plans {
        let action = match plan.action {
            BootstrapPlanAction::Run => context.style.good("run"),
            BootstrapPlanAction::Skip => context.style.faint("skip"),
            BootstrapPlanAction::Error => context.style.bad("error"),
        };
        let name = context.style.strong(plan.vm.as_str());
        context.out.line(format!("{name}: {action}, {}", plan.reason));
        for (word, value) in details(plan) {
            context.out.line(format!("  {word:<12} {value}"));
        }
    }
    context.out.flush();
    context.say("nothing was changed");
}

fn details(plan: &BootstrapPlan) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    let mut row = |word, value: Option<String>| rows.extend(value.map(|value| (word, value)));
    row(
        "script",
        plan.script_path.as_ref().map(|path| path.display().to_string()),
    );
    row(
        "payload",
        plan.payload_path.as_ref().map(|path| match plan.payload_bytes {
            Some(size) => format!("{} ({})", path.display(), human::bytes(size)),
            None => path.display().to_string(),
        }),
    );
    row("into", plan.remote_dir.clone());
    row(
        "ssh",
        plan.ssh.as_ref().map(|ssh| match ssh.port {
            Some(port) => format!("{}@{}:{port}", ssh.user, ssh.host),
            None => format!("{}@{}, port chosen at launch", ssh.user, ssh.host),
        }),
    );
    row(
        "variables",
        (!plan.env_keys.is_empty()).then(|| plan.env_keys.join(", ")),
    );
    if let Some(verify) = &plan.verify {
        row("verify", verify.command.clone());
        row("verify path", verify.path.clone());
    }
    row(
        "waits",
        plan.handshake_timeout_secs
            .map(|secs| format!("{} for the first proof of life", human::duration(secs * 1000))),
    );
    row(
        "metadata",
        plan.metadata_path.as_ref().map(|path| path.display().to_string()),
    );
    row("artifact", plan.artifact_hash.clone());
    for warning in &plan.warnings {
        row("warning", Some(warning.clone()));
    }
    rows
}
