//! `castra doctor`.
//!
//! Here: which projects are looked at, and findings as lines. Not here: looking (`core::doctor`).

use std::io::{self, IsTerminal};

use castra::core::config::workspace::list_workspaces;
use castra::core::doctor::{DoctorOutcome, Finding, Level};
use castra::core::failure::{Exit, Result};
use castra::core::operations::doctor::{DoctorOptions, DoctorProject, doctor};
use castra::core::reporter::Silent;
use castra::core::root::paths::{castra_home, check_utf8};

use super::context::Context;
use super::find_project::{self, Selected};
use super::style::Style;
use super::{human, terminal, width};
use crate::cli::Raw;

/// Widths of the columns for level and area, with the space after them.
const LEVEL: usize = 5;
const AREA: usize = 11;
const GAP: usize = 2;
/// Narrower terminals get no column for areas.
const ROOMY: usize = 72;
/// Least width of a text.
const NARROWEST: usize = 24;

pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let home = castra_home();
    if let Some(home) = &home {
        check_utf8(home, "the directory")?;
    }
    let options = DoctorOptions {
        home,
        projects: projects(raw)?,
        // No signal handlers: an interrupted `doctor` leaves nothing half done.
        cancel: castra::core::cancel::Cancel::new(),
    };
    let outcome = doctor(options, &mut Silent)?;
    if context.json {
        context.out.json(&outcome);
    } else {
        let layout = Layout {
            quiet: context.quiet,
            width: io::stdout().is_terminal().then(|| terminal::size().columns),
            style: context.style,
        };
        context.out.text(render(&outcome, layout));
    }
    Ok(match outcome.verdict {
        Level::Error => Exit::Failed,
        Level::Ok | Level::Warn => Exit::Done,
    })
}

fn projects(raw: &Raw) -> Result<Vec<DoctorProject>> {
    let here = match find_project::project_if_any(raw) {
        Ok(selected) => selected.map(looked_at),
        // This becomes a finding, and the other checks go on.
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
        projects.extend(others.map(|record| looked_at(find_project::of_record(record))));
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

/// How findings are shown.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// Only what isn't ok.
    quiet: bool,
    /// Columns of the terminal; `None`: it is no terminal, and a finding is one line.
    width: Option<usize>,
    style: Style,
}

impl Layout {
    /// Columns before a text: the level, and the area if there is room.
    fn indent(self) -> usize {
        match self.width {
            Some(0..ROOMY) => LEVEL + GAP,
            _ => LEVEL + GAP + AREA + GAP,
        }
    }

    /// A text behind a label of so many columns, in as many lines as it needs.
    fn wrapped(self, text: &str, label: usize) -> String {
        let Some(width) = self.width else {
            return text.to_owned();
        };
        let room = width.saturating_sub(self.indent()).max(NARROWEST);
        let mut lines = String::new();
        let mut column = label;
        for (number, word) in text.split(' ').enumerate() {
            let columns = width::of(word);
            if number > 0 && column + 1 + columns > room {
                lines.push_str(&format!("\n{:1$}", "", self.indent()));
                column = 0;
            } else if number > 0 {
                lines.push(' ');
                column += 1;
            }
            lines.push_str(word);
            column += columns;
        }
        lines
    }
}

/// A line for each finding, its remedy below it, and the totals last.
fn render(outcome: &DoctorOutcome, layout: Layout) -> String {
    let shown = outcome
        .findings
        .iter()
        .filter(|finding| !layout.quiet || finding.level != Level::Ok);
    let mut text: String = shown.map(|finding| lines(finding, layout)).collect();
    text.push_str(&summary(outcome, layout.style));
    text.push('\n');
    text
}

fn lines(finding: &Finding, layout: Layout) -> String {
    let style = layout.style;
    let level = format!("{:<LEVEL$}", finding.level.as_str());
    let level = match finding.level {
        Level::Ok => style.success(&level),
        Level::Warn => style.warning(&level),
        Level::Error => style.error(&level),
    };
    let mut text = format!("{level}{:GAP$}", "");
    if layout.indent() > LEVEL + GAP {
        let area = format!("{:<AREA$}", finding.area);
        text.push_str(&format!("{}{:GAP$}", style.dim(&area), ""));
    }
    text.push_str(&layout.wrapped(&finding.text, 0));
    text.push('\n');
    if let Some(remedy) = &finding.remediation {
        // Some findings have a note but no remedy.
        let (is_note, remedy) = match remedy.strip_prefix("note: ") {
            Some(note) => (true, note),
            None => (finding.level == Level::Ok, remedy.as_str()),
        };
        let (word, paint): (_, fn(Style, &str) -> String) = match is_note {
            true => ("note:", Style::dim),
            false => ("try:", Style::bold),
        };
        let remedy = layout.wrapped(remedy, word.len() + 1);
        text.push_str(&format!(
            "{:2$}{} {remedy}\n",
            "",
            paint(style, word),
            layout.indent()
        ));
    }
    text
}

fn summary(outcome: &DoctorOutcome, style: Style) -> String {
    let count = |level, noun| human::plural(outcome.count(level), noun);
    match outcome.verdict {
        Level::Ok => style.success("nothing is wrong"),
        Level::Warn => style.warning(&format!(
            "{}, no error: castra can work here",
            count(Level::Warn, "warning")
        )),
        Level::Error => style.error(&format!(
            "{}, {}",
            count(Level::Error, "error"),
            count(Level::Warn, "warning")
        )),
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    fn layout(quiet: bool, width: Option<usize>) -> Layout {
        Layout {
            quiet,
            width,
            style: Style::PLAIN,
        }
    }

    #[test]
    fn on_a_terminal_lines_keep_to_its_width() {
        let text = "the start of vm `db` was interrupted by somebody who was in a great hurry that day";
        let outcome = DoctorOutcome::of(vec![Finding::warn(
            "a",
            text,
            "`castra up` starts it again, `castra down db` clears what is left of it",
        )]);
        assert_eq!(
            render(&outcome, layout(false, Some(80))),
            "warn   state        the start of vm `db` was interrupted by somebody who was in\n\
             \x20                   a great hurry that day\n\
             \x20                   try: `castra up` starts it again, `castra down db` clears\n\
             \x20                   what is left of it\n\
             1 warning, no error: castra can work here\n"
        );
        let narrow = render(&outcome, layout(false, Some(40)));
        assert!(
            narrow
                .lines()
                .all(|line| width::of(line) <= 40 || line.starts_with("1 ")),
            "{narrow}"
        );
        assert!(narrow.starts_with("warn   the start of"), "{narrow}");
    }

    #[test]
    fn a_line_each_remedies_below_and_the_sum_last() {
        let outcome = DoctorOutcome::of(vec![
            Finding::ok("tool.a", "QEMU 7.2"),
            Finding::warn("state.b", "vm `x` crashed: \x1b[2J", "`castra down`"),
            Finding::error("kvm.c", "no KVM", "load it"),
            Finding::ok("image.d", "not built").hint("`castra image build`"),
        ]);
        assert_eq!(
            render(&outcome, layout(false, None)),
            "error  accelerator  no KVM\n\
             \x20                   try: load it\n\
             ok     tools        QEMU 7.2\n\
             ok     images       not built\n\
             \x20                   note: `castra image build`\n\
             warn   state        vm `x` crashed: \\x1b[2J\n\
             \x20                   try: `castra down`\n\
             1 error, 1 warning\n"
        );
        let quiet = render(&outcome, layout(true, None));
        assert!(!quiet.contains("QEMU") && quiet.contains("no KVM"), "{quiet}");
        let fine = DoctorOutcome::of(vec![Finding::ok("tool.a", "QEMU")]);
        assert!(render(&fine, layout(true, None)) == "nothing is wrong\n");
    }
}
