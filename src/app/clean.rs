//! `castra clean`.

use castra::core::config::workspace::{list_workspaces, unreadable_workspaces};
use castra::core::failure::{Exit, Failure, Result};
use castra::core::lines::journal::Rotation;
use castra::core::operations::clean::{CleanOptions, CleanOutcome, CleanTarget, clean};
use castra::core::root::paths::castra_home;

use super::context::Context;
use super::find_project::{self, Selected};
use super::human;
use crate::cli::Raw;

pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let home = castra_home();
    let (targets, rotation) = targets(raw)?;
    let options = CleanOptions {
        global: raw.global,
        dry_run: raw.dry_run,
        keep_logs: raw.no_logs,
        keep_handshakes: raw.no_handshakes,
        force: raw.force,
        rotation,
        ..CleanOptions::of(targets, home)
    };
    let outcome = context.reporting(|reporter| clean(options, reporter))?;
    if !context.json {
        show(context, &outcome);
    }
    Ok(outcome.exit)
}

fn targets(raw: &Raw) -> Result<(Vec<CleanTarget>, Rotation)> {
    let others = [
        raw.config.is_some(),
        raw.workspace.is_some(),
        raw.global,
        raw.state_root.is_some(),
    ];
    if others.iter().filter(|given| **given).count() > 1 {
        return Err(Failure::new(
            Exit::Usage,
            "several of --config, --workspace, --state-root and --global are given",
        )
        .because("each of them selects what to clean")
        .advice("give only one of them"));
    }
    if raw.global {
        let home = find_project::home()?;
        if let Some(failure) = unreadable_workspaces(&home).into_iter().next() {
            return Err(failure);
        }
        let records = list_workspaces(&home);
        return Ok((
            records.iter().map(CleanTarget::from).collect(),
            Rotation::default(),
        ));
    }
    if let Some(path) = &raw.state_root {
        return Ok((vec![CleanTarget::at(path)?], Rotation::default()));
    }
    Ok(match find_project::project(raw)? {
        Selected::Config(config) => (vec![CleanTarget::from(config.as_ref())], config.bus.rotation),
        Selected::Record(record) => (vec![CleanTarget::from(&record)], Rotation::default()),
    })
}

fn show(context: &mut Context, outcome: &CleanOutcome) {
    if !context.quiet {
        let width = outcome
            .removed
            .iter()
            .map(|removed| human::bytes(removed.bytes).len())
            .max()
            .unwrap_or(0);
        for removed in &outcome.removed {
            let bytes = format!("{:>width$}", human::bytes(removed.bytes));
            let line = format!("{bytes}  {:<11}  {}", removed.category, removed.path.display());
            context.out.line(line);
        }
    }
    let bytes = human::bytes(outcome.bytes);
    context
        .out
        .line(match (outcome.removed.is_empty(), outcome.dry_run) {
            (true, _) => "there is nothing to clean".to_owned(),
            (false, true) => format!("{bytes} would be freed; nothing was removed"),
            (false, false) => format!("{bytes} freed, in {}", human::duration(outcome.elapsed_ms)),
        });
    context.out.flush();
}
