//! `castra doctor`.
//!
//! Here: which projects are looked at, and findings as lines. Not here: looking (`core::doctor`).

use castra::core::config::workspace::list_workspaces;
use castra::core::doctor::{DoctorOutcome, Finding, Level};
use castra::core::escape::{escape_json, escape_line};
use castra::core::failure::{Exit, Result};
use castra::core::operations::doctor::{DoctorOptions, DoctorProject, doctor};
use castra::core::paths::castra_home;
use castra::core::reporter::Silent;

use super::context::Context;
use super::human;
use super::select::{self, Selected};
use super::style::Style;
use crate::cli::Raw;

/// Longest line, in bytes; the last words of a guest can be long.
const LIMIT: usize = 2000;

/// Looks, and says what was seen.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let options = DoctorOptions {
        home: castra_home(),
        projects: projects(raw)?,
        // No handlers: whoever interrupts this finds nothing half done.
        cancel: castra::core::cancel::Cancel::new(),
    };
    let outcome = doctor(options, &mut Silent)?;
    if context.json {
        let line = serde_json::to_string(&outcome).expect("findings are plain data with text keys");
        context.out.line(escape_json(&line));
    } else {
        context.out.text(render(&outcome, context.quiet, context.style));
    }
    Ok(match outcome.verdict {
        Level::Error => Exit::Failed,
        Level::Ok | Level::Warn => Exit::Done,
    })
}

fn projects(raw: &Raw) -> Result<Vec<DoctorProject>> {
    let here = match select::project_if_any(raw) {
        Ok(selected) => selected.map(looked_at),
        // That is a finding, and no reason to look no further.
        Err(failure) if failure.exit == Exit::Config => Some(DoctorProject::Broken(failure)),
        Err(failure) => return Err(failure),
    };
    let mut projects: Vec<DoctorProject> = here.into_iter().collect();
    if raw.all {
        let known: Vec<String> = projects.iter().filter_map(workspace_of).collect();
        let others = castra_home()
            .map(|home| list_workspaces(&home))
            .unwrap_or_default();
        let others = others.into_iter().filter(|record| !known.contains(&record.id));
        projects.extend(others.map(|record| looked_at(select::of_record(record))));
    }
    Ok(projects)
}

fn looked_at(selected: Selected) -> DoctorProject {
    match selected {
        Selected::Config(config) => DoctorProject::Config(config),
        Selected::Record(record) => DoctorProject::Record(record),
    }
}

fn workspace_of(project: &DoctorProject) -> Option<String> {
    match project {
        DoctorProject::Config(config) => Some(config.workspace.clone()),
        DoctorProject::Record(record) => Some(record.id.clone()),
        DoctorProject::Broken(_) => None,
    }
}

/// A line for each finding, what to do below it, and the sum of it last.
fn render(outcome: &DoctorOutcome, quiet: bool, style: Style) -> String {
    let shown = outcome
        .findings
        .iter()
        .filter(|finding| !quiet || finding.level != Level::Ok);
    let mut text: String = shown.map(|finding| lines(finding, style)).collect();
    text.push_str(&summary(outcome, style));
    text.push('\n');
    text
}

fn lines(finding: &Finding, style: Style) -> String {
    let level = format!("{:<5}", finding.level.as_str());
    let level = match finding.level {
        Level::Ok => style.good(&level),
        Level::Warn => style.odd(&level),
        Level::Error => style.bad(&level),
    };
    let area = style.faint(&format!("{:<11}", finding.area));
    let mut text = format!("{level}  {area}  {}\n", escape_line(&finding.text, LIMIT));
    if let Some(remedy) = &finding.remediation {
        let word = match finding.level {
            Level::Ok => style.faint("note:"),
            Level::Warn | Level::Error => style.strong("try:"),
        };
        text.push_str(&format!("{:20}{word} {}\n", "", escape_line(remedy, LIMIT)));
    }
    text
}

fn summary(outcome: &DoctorOutcome, style: Style) -> String {
    let count = |level, noun| human::plural(outcome.count(level), noun);
    match outcome.verdict {
        Level::Ok => style.good("nothing is wrong"),
        Level::Warn => style.odd(&format!(
            "{}, no error: castra can work here",
            count(Level::Warn, "warning")
        )),
        Level::Error => style.bad(&format!(
            "{}, {}",
            count(Level::Error, "error"),
            count(Level::Warn, "warning")
        )),
    }
}

#[cfg(test)]
mod tests {
    use castra::core::doctor::Area;

    use super::*;

    #[test]
    fn a_line_each_remedies_below_and_the_sum_last() {
        let outcome = DoctorOutcome::of(vec![
            Finding::ok("a", Area::Tools, "QEMU 7.2"),
            Finding::warn("b", Area::State, "vm `x` crashed: \x1b[2J", "`castra down`"),
            Finding::error("c", Area::Accelerator, "no KVM", "load it"),
            Finding::ok("d", Area::Images, "not built").hint("`castra image build`"),
        ]);
        assert_eq!(
            render(&outcome, false, Style::PLAIN),
            "error  accelerator  no KVM\n\
             \x20                   try: load it\n\
             ok     tools        QEMU 7.2\n\
             ok     images       not built\n\
             \x20                   note: `castra image build`\n\
             warn   state        vm `x` crashed: \\x1b[2J\n\
             \x20                   try: `castra down`\n\
             1 error, 1 warning\n"
        );
        let quiet = render(&outcome, true, Style::PLAIN);
        assert!(!quiet.contains("QEMU") && quiet.contains("no KVM"), "{quiet}");
        let fine = DoctorOutcome::of(vec![Finding::ok("a", Area::Tools, "QEMU")]);
        assert!(render(&fine, true, Style::PLAIN) == "nothing is wrong\n");
    }
}
