//! `castra down`.

use castra::core::config::LifecycleConfig;
use castra::core::failure::{Exit, Result};
use castra::core::lines::journal::Rotation;
use castra::core::operations::down::{DownOptions, DownOutcome, down};

use super::context::Context;
use super::find_project::Selected;
use super::{failure, find_project, human, operands};
use crate::cli::Raw;

pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let selected = find_project::project(raw)?;
    let cancel = context.cancel_on_signals();
    let vms = find_project::vms(&selected, operands::names(&raw.operands)?)?;
    let discard = raw.discard;
    let options = match &selected {
        Selected::Config(config) => DownOptions {
            project: config.project.clone(),
            state: config.state.clone(),
            registry: config.registry.clone(),
            vms,
            declared: config.vms.iter().map(|vm| vm.name.clone()).collect(),
            lifecycle: deadlines(raw, config.lifecycle),
            rotation: config.bus.rotation,
            discard,
            cancel,
        },
        Selected::Record(record) => DownOptions {
            project: record.project.clone(),
            state: selected.state(),
            registry: None,
            vms,
            declared: Vec::new(),
            lifecycle: deadlines(raw, LifecycleConfig::default()),
            rotation: Rotation::default(),
            discard,
            cancel,
        },
    };
    let outcome = context.reporting(|reporter| down(options, reporter))?;
    if !context.json {
        show(context, &outcome);
    }
    Ok(outcome.exit)
}

/// The ladder's deadlines: as typed, else as the config says.
pub fn deadlines(raw: &Raw, config: LifecycleConfig) -> LifecycleConfig {
    LifecycleConfig {
        graceful_shutdown_wait: raw.graceful_wait.unwrap_or(config.graceful_shutdown_wait),
        sigterm_wait: raw.sigterm_wait.unwrap_or(config.sigterm_wait),
        sigkill_wait: raw.sigkill_wait.unwrap_or(config.sigkill_wait),
    }
}

fn show(context: &mut Context, outcome: &DownOutcome) {
    let failures: Vec<_> = outcome.vms.iter().filter_map(|vm| vm.error.as_ref()).collect();
    for failed in &failures {
        context.screen.say(&failure::render(failed, context.err_style));
    }
    if context.quiet {
        return;
    }
    let stopped = outcome.vms.iter().filter(|vm| vm.stopped).count();
    let mut facts = vec![match stopped {
        0 => "no VM was running".to_owned(),
        count => format!("{} down", human::plural(count, "VM")),
    }];
    if outcome.broker_stopped {
        facts.push("broker stopped".to_owned());
    }
    if outcome.reclaimed_bytes > 0 {
        facts.push(format!("{} freed", human::bytes(outcome.reclaimed_bytes)));
    }
    if !failures.is_empty() {
        facts.push(format!("{} failed", failures.len()));
    }
    context.out.line(format!(
        "{}, in {}",
        facts.join(", "),
        human::duration(outcome.elapsed_ms)
    ));
    context.out.flush();
    if !failures.is_empty() {
        context.say("next: `castra status` shows what still runs");
    }
}
