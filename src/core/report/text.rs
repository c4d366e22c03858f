//! The report as text: per run a headline, per VM one line of phases, failures with the end of their log.
//!
//! Here: words and columns. Not here: what colours a terminal has (`app`): whoever asks says how a tone
//! is painted.

use std::fmt::Write;

use crate::core::events::Severity;

use super::model::{Outcome, Report, RunReport, State, VmReport};
use super::units;

/// Lines of a log that are shown with a failure; the page and the JSON have more.
const MAX_LINES: usize = 12;

/// The meaning of a piece of text, for its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// Went well.
    Good,
    /// Failed.
    Bad,
    /// Worth a look.
    Odd,
    /// A name.
    Strong,
    /// Beside the point.
    Faint,
}

/// The whole report, each line with its end.
pub fn render(report: &Report, paint: &dyn Fn(Tone, &str) -> String) -> String {
    let mut text = String::new();
    for (number, run) in report.runs.iter().enumerate() {
        if number > 0 {
            text.push('\n');
        }
        of_run(&mut text, run, paint);
    }
    for left_out in &report.left_out {
        let _ = writeln!(
            text,
            "{}",
            paint(Tone::Faint, &format!("not in here: {left_out}"))
        );
    }
    text
}

fn of_run(text: &mut String, run: &RunReport, paint: &dyn Fn(Tone, &str) -> String) {
    let (tone, word) = match run.outcome {
        Outcome::Ok => (Tone::Good, "ok"),
        Outcome::Failed => (Tone::Bad, "failed"),
        Outcome::Interrupted => (Tone::Odd, "interrupted"),
        Outcome::Running => (Tone::Odd, "under way"),
        Outcome::Unfinished => (Tone::Odd, "no end known"),
    };
    let mut facts = vec![paint(tone, word)];
    facts.extend(run.duration_ms.map(|ms| format!("in {}", units::duration(ms))));
    facts.push(match run.vms_failed {
        0 => units::plural(run.vms_total as u64, "VM"),
        failed => format!("{failed} of {} failed", units::plural(run.vms_total as u64, "VM")),
    });
    facts.extend(run.accels().iter().map(|accel| accel.as_str().to_owned()));
    let _ = writeln!(
        text,
        "{}  {}  {}  {}",
        paint(Tone::Strong, &run.command),
        units::moment(&run.started_at),
        facts.join(", "),
        paint(Tone::Faint, &run.run)
    );
    if let Some(detail) = run.why() {
        let _ = writeln!(text, "  {detail}");
    }
    let width = run.vms.iter().map(|vm| vm.vm.len()).max().unwrap_or(0).min(24);
    for vm in &run.vms {
        of_vm(text, vm, width, paint);
    }
    for (count, what) in [
        (run.vms_untouched, "with nothing to be done"),
        (run.vms_left_out, "not shown"),
    ] {
        if count > 0 {
            let line = format!("  {} {what}", units::plural(count as u64, "VM"));
            let _ = writeln!(text, "{}", paint(Tone::Faint, &line));
        }
    }
    for note in run.notes.iter().filter(|note| note.vm.is_none()) {
        let tone = match note.severity {
            Severity::Warn => Tone::Odd,
            _ => Tone::Bad,
        };
        let word = match note.severity {
            Severity::Warn => "warning",
            Severity::Blocker => "blocker",
            _ => "error",
        };
        let _ = writeln!(text, "  {}: {}", paint(tone, word), note.text);
    }
    if let Some(bus) = &run.bus {
        let peak = bus.points.iter().map(|point| point[0]).max().unwrap_or(0);
        let peak = units::rate(peak as f64 * 1000.0 / bus.bucket_ms.max(1) as f64);
        let mut senders: Vec<String> = bus
            .senders
            .iter()
            .map(|sender| format!("{} {}", sender.sender, units::count(sender.messages)))
            .collect();
        if bus.senders_left_out > 0 {
            senders.push("others".to_owned());
        }
        let sums = format!(
            "  bus: {}, {}, peak {peak}; {}",
            units::plural(bus.messages, "message"),
            units::bytes(bus.bytes as f64),
            senders.join(", ")
        );
        let _ = writeln!(text, "{sums}");
    }
}

fn of_vm(text: &mut String, vm: &VmReport, width: usize, paint: &dyn Fn(Tone, &str) -> String) {
    let tone = match vm.state {
        State::Ok => Tone::Good,
        State::Failed => Tone::Bad,
        State::Skipped => Tone::Faint,
        State::Waiting => Tone::Odd,
    };
    let phases: Vec<String> = vm
        .phases
        .iter()
        .map(|phase| match phase.state {
            State::Skipped => paint(Tone::Faint, &format!("{} skipped", phase.phase)),
            State::Failed => paint(
                Tone::Bad,
                &format!("{} failed {}", phase.phase, units::duration(phase.duration_ms)),
            ),
            _ => format!("{} {}", phase.phase, units::duration(phase.duration_ms)),
        })
        .collect();
    let name = format!("{:<width$}", vm.vm);
    let state = paint(tone, &format!("{:<7}", vm.state.as_str()));
    let _ = writeln!(
        text,
        "  {}  {state}  {}",
        paint(Tone::Strong, &name),
        phases.join(", ")
    );
    let indent = " ".repeat(width + 4);
    if let Some(error) = &vm.error {
        let _ = writeln!(text, "{indent}{error}");
    }
    if let Some(log) = &vm.log {
        let surplus = log.lines.len().saturating_sub(MAX_LINES);
        for line in log.lines.iter().skip(surplus) {
            let _ = writeln!(text, "{indent}{} {line}", paint(Tone::Faint, "|"));
        }
        if let Some(path) = log.path.as_ref().filter(|_| log.cut || surplus > 0) {
            let _ = writeln!(
                text,
                "{indent}{}",
                paint(Tone::Faint, &format!("all of it: {path}"))
            );
        }
    }
}
