//! `castra report`.

use std::path::Path;

use castra::core::failure::{Exit, Failure, Result};
use castra::core::operations::report::{ReportOptions, report, save_page};
use castra::core::report::html;
use castra::core::report::model::Report;
use castra::core::report::text::{self, Tone};
use castra::core::reporter::Silent;

use super::context::Context;
use super::{find_project, human, operands};
use crate::cli::Raw;

/// Shows the last runs: as text, as JSON, or as a page.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    if raw.json && raw.html.is_some() {
        return Err(Failure::new(Exit::Usage, "--json and --html are given")
            .because("each of them selects the output")
            .advice("leave one out"));
    }
    let selected = find_project::project(raw)?;
    let project = selected.project();
    let vms = find_project::vms(&selected, operands::names(&raw.operands)?)?;
    let options = ReportOptions {
        vms: vms.clone(),
        last: raw.last,
        since: raw.since,
        ..ReportOptions::of(selected.state(), &project.project, &project.workspace)
    };
    let found = report(options, &mut Silent)?;
    if found.runs.is_empty() {
        // A name may belong to a VM that is gone but has runs; a name without runs must be a VM's.
        for vm in &vms {
            find_project::vm(&selected, vm)?;
        }
    }
    match raw.html.as_deref() {
        Some(path) if path == Path::new("-") => context.out.verbatim(html::page(&found)),
        Some(path) => {
            let bytes = save_page(&found, path)?;
            say_where(context, &found, path, bytes);
        }
        None if context.json => {
            context.out.json(&found);
        }
        None => show(context, raw, &found),
    }
    context.out.flush();
    Ok(Exit::Done)
}

fn say_where(context: &mut Context, report: &Report, path: &Path, bytes: u64) {
    let runs = human::plural(report.runs.len(), "run");
    context.say(&format!(
        "{} written: {runs}, {}",
        path.display(),
        human::bytes(bytes)
    ));
}

fn show(context: &mut Context, raw: &Raw, report: &Report) {
    let style = context.style;
    let paint = |tone: Tone, text: &str| match tone {
        Tone::Good => style.success(text),
        Tone::Bad => style.error(text),
        Tone::Odd => style.warning(text),
        Tone::Strong => style.bold(text),
        Tone::Faint => style.dim(text),
    };
    let text = text::render(report, &paint);
    context.out.text(text);
    context.out.flush();
    if !report.runs.is_empty() {
        return;
    }
    context.say(match (raw.since.is_some(), raw.operands.is_empty()) {
        (false, true) => "nothing has run here yet; `castra up` starts the VMs",
        _ => "no run matches",
    });
}
