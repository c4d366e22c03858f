//! One run on the page: its sums, the timeline, warnings, each VM's table and log, the bus.
//!
//! Here: what stands there and in which order. Not here: the page around it (`super::html`), the drawings
//! (`super::timeline`, `super::chart`), colours (`style.css`).

use crate::core::events::Severity;

use super::html::{fact, took, verdict};
use super::markup::Markup;
use super::model::{LogTail, MarkKind, Note, Outcome, RunReport, State, VmReport};
use super::{chart, symbols, timeline, units};

/// Draws a run; `number` makes its ids unique on the page.
pub(super) fn draw(page: &mut Markup, run: &RunReport, number: usize) {
    let id = format!("run-{}", number + 1);
    let heading = format!("{id}-heading");
    page.open(
        "section",
        &[("class", "run"), ("id", &id), ("aria-labelledby", &heading)],
    )
    .line();
    page.open("div", &[("class", "run-head")]);
    page.leaf("h2", &[("id", &heading)], &run.command);
    verdict(page, run.outcome);
    page.leaf("span", &[("class", "when")], &units::moment(&run.started_at));
    page.close().line();
    strip(page, run);
    if let Some(detail) = run.why() {
        page.leaf("p", &[("class", "why")], detail).line();
    }
    if !run.vms.is_empty() {
        page.leaf("h3", &[], "Timeline");
        timeline::draw(page, run, number + 1);
        symbols::legend(page, run);
    }
    notes(page, run);
    if !run.vms.is_empty() {
        page.leaf("h3", &[], "VMs");
        for vm in &run.vms {
            details(page, vm, run);
        }
    }
    for (count, what) in [
        (run.vms_untouched, "with nothing to be done"),
        (run.vms_left_out, "not shown one by one"),
    ] {
        if count > 0 {
            let more = if run.vms.is_empty() { "" } else { "and " };
            let text = format!("{more}{} {what}", units::plural(count as u64, "VM"));
            page.leaf("p", &[("class", "remark and")], &text).line();
        }
    }
    bus(page, run, number);
    page.close().line();
}

/// The sums of a run.
fn strip(page: &mut Markup, run: &RunReport) {
    page.open("dl", &[("class", "strip")]);
    fact(page, "Took", &took(run));
    let vms = match (run.vms_failed, run.vms_total) {
        (_, 0) => "none".to_owned(),
        (0, total) if run.outcome == Outcome::Ok => format!("{} ok", units::count(total as u64)),
        (0, total) => units::count(total as u64),
        (failed, total) => format!(
            "{} of {} failed",
            units::count(failed as u64),
            units::count(total as u64)
        ),
    };
    fact(page, "VMs", &vms);
    let accels: Vec<String> = run
        .accels()
        .iter()
        .map(|accel| accel.as_str().to_uppercase())
        .collect();
    if !accels.is_empty() {
        fact(page, "Accelerator", &accels.join(", "));
    }
    if let Some(status) = run.exit_status {
        fact(page, "Exit code", &status.to_string());
    }
    if let Some(bus) = &run.bus {
        let text = format!(
            "{} · {}",
            units::count(bus.messages),
            units::bytes(bus.bytes as f64)
        );
        fact(page, "Bus messages", &text);
    }
    page.open("div", &[])
        .leaf("dt", &[], "Run")
        .open("dd", &[])
        .leaf("code", &[], &run.run);
    page.close().close().close().line();
}

fn notes(page: &mut Markup, run: &RunReport) {
    if run.notes.is_empty() {
        return;
    }
    page.leaf("h3", &[], "Warnings and errors");
    page.open("ul", &[("class", "notes")]).line();
    for note in &run.notes {
        note_line(page, note);
    }
    page.close();
    if run.notes_left_out > 0 {
        let text = format!("{} more: castra events --run {}", run.notes_left_out, run.run);
        page.leaf("p", &[("class", "remark")], &text);
    }
    page.line();
}

fn note_line(page: &mut Markup, note: &Note) {
    let word = match note.severity {
        Severity::Blocker => "blocker",
        Severity::Error => "error",
        _ => "warning",
    };
    page.open("li", &[("class", &format!("n-{word}"))]);
    page.leaf("span", &[("class", "at")], &units::duration(note.at_ms));
    page.leaf("span", &[("class", "sev")], word);
    page.open("div", &[]);
    if let Some(vm) = &note.vm {
        page.leaf("b", &[], vm).text(": ");
    }
    page.text(&note.text);
    if let Some(remediation) = &note.remediation {
        page.leaf("span", &[("class", "advice")], &format!("→ {remediation}"));
    }
    page.close().close().line();
}

fn details(page: &mut Markup, vm: &VmReport, run: &RunReport) {
    let class = format!("vm s-{}", vm.state.as_str());
    let mut attributes = vec![("class", class.as_str())];
    if vm.state == State::Failed {
        attributes.push(("open", "open"));
    }
    page.open("details", &attributes);
    summary(page, vm);
    if vm.phases.is_empty() {
        page.leaf("p", &[("class", "remark")], "Nothing was to be done.");
    } else {
        table(page, vm);
    }
    // Those on the timeline are there; what came behind the run's end is told here.
    let later: Vec<_> = vm.marks.iter().filter(|mark| mark.at_ms > run.end_ms()).collect();
    if !later.is_empty() {
        page.open("p", &[("class", "later")]).text("Afterwards: ");
        for (number, mark) in later.iter().enumerate() {
            let detail = mark.detail.as_deref().filter(|_| mark.mark == MarkKind::Exited);
            let detail = detail.map(|detail| format!(", {detail}")).unwrap_or_default();
            let gap = if number == 0 { "" } else { "; " };
            page.text(&format!(
                "{gap}{} after {}{detail}",
                mark.mark.words(),
                units::duration(mark.at_ms)
            ));
        }
        page.text(".").close();
    }
    if vm.left_out > 0 {
        let text = format!("{} more phases or moments aren't shown here.", vm.left_out);
        page.leaf("p", &[("class", "remark")], &text);
    }
    if let Some(log) = &vm.log {
        log_tail(page, vm, log);
    }
    page.close().line();
}

fn summary(page: &mut Markup, vm: &VmReport) {
    page.open("summary", &[]);
    page.open(
        "svg",
        &[
            ("xmlns", "http://www.w3.org/2000/svg"),
            ("width", "18"),
            ("height", "18"),
            ("aria-hidden", "true"),
            ("class", &format!("s-{}", vm.state.as_str())),
        ],
    );
    symbols::badge(page, vm.state, 9.0, 9.0);
    page.close();
    page.leaf("b", &[], &vm.vm).text(" ");
    page.leaf("span", &[("class", "state")], vm.state.as_str());
    if let Some(took) = vm.took_ms() {
        page.text(" ")
            .leaf("span", &[("class", "took")], &units::duration(took));
    }
    if let Some(error) = &vm.error {
        page.text(" ").leaf("span", &[("class", "error")], error);
    }
    page.close();
}

fn table(page: &mut Markup, vm: &VmReport) {
    page.open(
        "div",
        &[
            ("class", "scroll"),
            ("tabindex", "0"),
            ("role", "group"),
            ("aria-label", "phases"),
        ],
    );
    page.open("table", &[("class", "phases")])
        .open("thead", &[])
        .open("tr", &[]);
    for (class, name) in [
        ("", "Phase"),
        ("", "State"),
        ("num", "From"),
        ("num", "Took"),
        ("", "Detail"),
    ] {
        page.leaf("th", &[("scope", "col"), ("class", class)], name);
    }
    page.close().close().open("tbody", &[]);
    for phase in &vm.phases {
        page.open("tr", &[("class", &format!("s-{}", phase.state.as_str()))]);
        page.leaf("th", &[("scope", "row")], &phase.phase);
        page.leaf("td", &[("class", "state")], phase.state.as_str());
        page.leaf("td", &[("class", "num")], &units::duration(phase.start_ms));
        page.leaf("td", &[("class", "num")], &units::duration(phase.duration_ms));
        page.leaf(
            "td",
            &[("class", "detail")],
            phase.detail.as_deref().unwrap_or(""),
        );
        page.close().line();
    }
    page.close().close().close();
}

fn log_tail(page: &mut Markup, vm: &VmReport, log: &LogTail) {
    page.open("details", &[("class", "log"), ("open", "open")]);
    let what = match log.source.as_str() {
        "script" => "what the script printed",
        "console" => "the guest's console",
        _ => "QEMU's messages",
    };
    let before = if log.cut { "The end of " } else { "" };
    let text = match before {
        "" => {
            let mut letters = what.chars();
            letters
                .next()
                .map(|first| first.to_uppercase().chain(letters).collect::<String>())
                .unwrap_or_default()
        }
        before => format!("{before}{what}"),
    };
    page.leaf("summary", &[], &text);
    // Its style shows the end first, so the text is an element inside.
    let label = format!("{what}, {}", vm.vm);
    page.open(
        "div",
        &[
            ("class", "tail"),
            ("tabindex", "0"),
            ("role", "group"),
            ("aria-label", &label),
        ],
    );
    page.open("pre", &[]);
    for line in &log.lines {
        // A line break of ours: every other one is written out.
        page.text(line).raw("\n");
    }
    page.close().close();
    if let Some(path) = &log.path {
        page.open("p", &[("class", "path")])
            .text("All of it: ")
            .leaf("code", &[], path)
            .close();
    }
    page.close();
}

fn bus(page: &mut Markup, run: &RunReport, number: usize) {
    let Some(traffic) = &run.bus else {
        return;
    };
    page.leaf("h3", &[], "Bus");
    let secs = traffic.bucket_ms.saturating_mul(traffic.points.len() as u64);
    let text = format!(
        "{}, {} of payload, within {}, until the next run began or this report was made. Times count from this run's beginning; a point is {}.",
        units::plural(traffic.messages, "message"),
        units::bytes(traffic.bytes as f64),
        units::duration(secs),
        units::duration(traffic.bucket_ms)
    );
    page.leaf("p", &[("class", "remark")], &text).line();
    chart::draw(page, traffic, number + 1);
    if traffic.senders_left_out > 0 {
        page.leaf(
            "p",
            &[("class", "remark")],
            "Further senders are in the first curve only.",
        );
    }
    if traffic.cut {
        page.leaf(
            "p",
            &[("class", "remark")],
            "The log is too long to be read whole: older messages aren't counted.",
        );
    }
}
