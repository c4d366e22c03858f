//! The timeline of a run: one row a VM, one bar a phase, a sign for each moment worth seeing.
//!
//! Here: where bars, signs and words lie, as SVG. Not here: colours and letters (`style.css`), tables
//! and logs (`super::html`).
//!
//! Names and bars are two drawings of equal height side by side: on a narrow screen the bars scroll and
//! the names stay. A bar says its state by colour, by pattern and by words.

use super::markup::Markup;
use super::model::{Mark, MarkKind, Phase, RunReport, State, VmReport};
use super::scale::TimeAxis;
use super::units;

/// Widths of the two drawings, in CSS pixels.
pub(super) const NAMES_WIDTH: u32 = 168;
pub(super) const BARS_WIDTH: u32 = 872;
/// Room behind the end of the axis, for the words behind the last bar.
const RIGHT: f64 = 148.0;
const LEFT: f64 = 10.0;
/// Room above the rows, for the numbers of the axis.
const TOP: f64 = 30.0;
/// Height of a row with one lane: signs above, bar, a gap.
const SIGNS: f64 = 13.0;
const BAR: f64 = 18.0;
const GAP: f64 = 11.0;
const LANE: f64 = BAR + 2.0;
/// Bars that overlap lie in so many lanes, the rest in the last.
const MOST_LANES: usize = 4;
/// Ends and beginnings are rounded, and nobody sees less than two pixels: that much is no overlap, as a
/// part of the whole axis and at least.
const TOUCH_PART: u64 = 350;
const TOUCH_MS: u64 = 5;
/// Width of a letter in a bar, about.
const LETTER: f64 = 6.3;
/// No bar is thinner.
const THINNEST: f64 = 2.5;

/// A row of the drawing.
struct Row<'r> {
    vm: &'r VmReport,
    /// The lane of each phase.
    lanes: Vec<usize>,
    top: f64,
    height: f64,
}

fn rows(run: &RunReport) -> (Vec<Row<'_>>, f64) {
    let (mut top, end) = (TOP, run.end_ms());
    let rows = run
        .vms
        .iter()
        .map(|vm| {
            let lanes = lanes(&vm.phases, TOUCH_MS.max(end / TOUCH_PART));
            let count = lanes.iter().max().map_or(1, |lane| lane + 1);
            let row = Row {
                vm,
                lanes,
                top,
                height: SIGNS + LANE * count as f64 + GAP,
            };
            top += row.height;
            row
        })
        .collect();
    (rows, top + 6.0)
}

/// Which lane each bar lies in: the first that is free by then.
fn lanes(phases: &[Phase], touch_ms: u64) -> Vec<usize> {
    let mut ends: Vec<u64> = Vec::new();
    phases
        .iter()
        .map(|phase| {
            let free = ends
                .iter()
                .position(|end| *end <= phase.start_ms.saturating_add(touch_ms));
            let lane = match free {
                Some(lane) => lane,
                None if ends.len() < MOST_LANES => {
                    ends.push(0);
                    ends.len() - 1
                }
                None => MOST_LANES - 1,
            };
            ends[lane] = ends[lane].max(phase.end_ms());
            lane
        })
        .collect()
}

/// Draws the timeline; `number` makes its ids unique on the page.
pub(super) fn draw(page: &mut Markup, run: &RunReport, number: usize) {
    let (rows, height) = rows(run);
    let axis = TimeAxis::new(0, run.end_ms(), LEFT, f64::from(BARS_WIDTH) - LEFT - RIGHT);
    page.open("div", &[("class", "chart")]);
    names(page, &rows, height);
    page.open(
        "div",
        &[
            ("class", "scroll"),
            ("tabindex", "0"),
            ("role", "group"),
            ("aria-label", "timeline, scrolls sideways"),
        ],
    );
    let title = format!("timeline-{number}");
    svg(page, BARS_WIDTH, height, "bars", &title);
    page.leaf(
        "title",
        &[("id", &title)],
        &format!("Timeline of `castra {}`", run.command),
    );
    page.leaf(
        "desc",
        &[],
        "One row for each VM, one bar for each phase. The tables below hold the same in numbers.",
    );
    grid(page, &axis, height);
    for row in &rows {
        draw_row(page, row, &axis);
    }
    page.close().close().close().line();
}

/// Opens a drawing of this size.
pub(super) fn svg(page: &mut Markup, width: u32, height: f64, class: &str, title: &str) {
    let (width, height) = (width.to_string(), format!("{height:.0}"));
    let view = format!("0 0 {width} {height}");
    page.open(
        "svg",
        &[
            ("xmlns", "http://www.w3.org/2000/svg"),
            ("class", class),
            ("width", &width),
            ("height", &height),
            ("viewBox", &view),
            ("role", "img"),
            ("aria-labelledby", title),
        ],
    );
}

fn names(page: &mut Markup, rows: &[Row<'_>], height: f64) {
    let size = format!("{height:.0}");
    page.open(
        "svg",
        &[
            ("xmlns", "http://www.w3.org/2000/svg"),
            ("class", "names"),
            ("width", &NAMES_WIDTH.to_string()),
            ("height", &size),
            ("aria-hidden", "true"),
        ],
    );
    for row in rows {
        rule(page, row, NAMES_WIDTH);
        let y = row.top + SIGNS + BAR / 2.0;
        let state = row.vm.state;
        page.open("g", &[("class", &format!("name s-{}", state.as_str()))]);
        page.leaf("title", &[], &format!("{}: {}", row.vm.vm, state.as_str()));
        badge(page, state, 9.0, y);
        text(page, "vm", 24.0, y + 4.0, &cut(&row.vm.vm, 20));
        page.close();
    }
    page.close();
}

/// The sign of a state: a tick, a cross, a dash, a dotted ring.
pub(super) fn badge(page: &mut Markup, state: State, x: f64, y: f64) {
    let at = |dx: f64, dy: f64| format!("{:.1} {:.1}", x + dx, y + dy);
    let path = match state {
        State::Ok => format!("M{} L{} L{}", at(-3.4, 0.3), at(-1.0, 2.8), at(3.6, -2.8)),
        State::Failed => format!(
            "M{} L{} M{} L{}",
            at(-2.8, -2.8),
            at(2.8, 2.8),
            at(2.8, -2.8),
            at(-2.8, 2.8)
        ),
        State::Skipped => format!("M{} L{}", at(-3.2, 0.0), at(3.2, 0.0)),
        State::Waiting => format!("M{} L{} L{}", at(0.0, -3.4), at(0.0, 0.4), at(2.6, 1.8)),
    };
    page.empty(
        "circle",
        &[
            ("class", "badge"),
            ("cx", &format!("{x:.1}")),
            ("cy", &format!("{y:.1}")),
            ("r", "7.5"),
        ],
    );
    page.empty("path", &[("class", "badge-sign"), ("d", &path)]);
}

/// Lines and numbers of the axis.
pub(super) fn grid(page: &mut Markup, axis: &TimeAxis, height: f64) {
    let (step, ticks) = axis.ticks(8);
    for tick in ticks {
        let x = axis.x(tick);
        let (from, to) = (TOP - 6.0, height);
        page.empty(
            "path",
            &[("class", "grid"), ("d", &format!("M{x:.1} {from:.1} V{to:.1}"))],
        );
        text(page, "tick", x, TOP - 12.0, &units::tick(tick, step));
    }
}

pub(super) fn text(page: &mut Markup, class: &str, x: f64, y: f64, words: &str) {
    let (x, y) = (format!("{x:.1}"), format!("{y:.1}"));
    page.leaf("text", &[("class", class), ("x", &x), ("y", &y)], words);
}

/// So many letters, and a sign where there were more.
pub(super) fn cut(words: &str, most: usize) -> String {
    match words.chars().count() > most {
        true => words.chars().take(most.saturating_sub(1)).chain(['…']).collect(),
        false => words.to_owned(),
    }
}

fn draw_row(page: &mut Markup, row: &Row<'_>, axis: &TimeAxis) {
    rule(page, row, BARS_WIDTH);
    let mut number = 0;
    for (phase, lane) in row.vm.phases.iter().zip(&row.lanes) {
        // Neighbours differ in shade; those that were skipped are hardly to be seen.
        number += usize::from(phase.state != State::Skipped);
        let y = row.top + SIGNS + LANE * *lane as f64;
        bar(page, phase, number, y, axis);
    }
    for mark in row.vm.marks.iter().filter(|mark| axis.holds(mark.at_ms)) {
        sign(page, mark, axis.x(mark.at_ms), row.top);
    }
    after(page, row, axis);
}

/// The line below a row.
fn rule(page: &mut Markup, row: &Row<'_>, width: u32) {
    let line = format!("M0 {:.1} H{width}", row.top + row.height - GAP / 2.0 + 1.0);
    page.empty("path", &[("class", "rule"), ("d", &line)]);
}

fn bar(page: &mut Markup, phase: &Phase, number: usize, y: f64, axis: &TimeAxis) {
    let (from, to) = (axis.x(phase.start_ms), axis.x(phase.end_ms()));
    // A hair between neighbours.
    let width = (to - from - 1.0).max(THINNEST);
    let shade = if number.is_multiple_of(2) { "" } else { " alt" };
    page.open(
        "g",
        &[("class", &format!("bar s-{}{shade}", phase.state.as_str()))],
    );
    page.leaf("title", &[], &tooltip(phase));
    let (x, wide, top) = (format!("{from:.1}"), format!("{width:.1}"), format!("{y:.1}"));
    let height = format!("{BAR}");
    page.empty(
        "rect",
        &[
            ("x", &x),
            ("y", &top),
            ("width", &wide),
            ("height", &height),
            ("rx", "2.5"),
        ],
    );
    let letters = (width - 10.0) / LETTER;
    let name = words(phase);
    if letters >= name.chars().count() as f64 {
        text(page, "in-bar", from + 5.0, y + BAR / 2.0 + 4.0, &name);
    } else if let Some(short) = name.split_once('-').map(|(_, short)| short)
        && letters >= short.chars().count() as f64
    {
        text(page, "in-bar", from + 5.0, y + BAR / 2.0 + 4.0, short);
    }
    page.close();
}

/// What a bar says inside, if there is room.
fn words(phase: &Phase) -> String {
    match phase.state {
        State::Failed => format!("✕ {}", phase.phase),
        _ => phase.phase.clone(),
    }
}

fn tooltip(phase: &Phase) -> String {
    let mut text = format!(
        "{}: {}, {} from {}",
        phase.phase,
        phase.state.as_str(),
        units::duration(phase.duration_ms),
        units::duration(phase.start_ms)
    );
    if let Some(detail) = &phase.detail {
        text.push_str("; ");
        text.push_str(&cut(detail, 200));
    }
    text
}

/// Behind the last bar: how long the VM took, or what failed.
fn after(page: &mut Markup, row: &Row<'_>, axis: &TimeAxis) {
    let Some((end, took)) = row
        .vm
        .phases
        .iter()
        .map(Phase::end_ms)
        .max()
        .zip(row.vm.took_ms())
    else {
        return;
    };
    let took = units::duration(took);
    let failed = row.vm.phases.iter().find(|phase| phase.state == State::Failed);
    let (class, words) = match (row.vm.state, failed) {
        (State::Failed, Some(phase)) => ("after bad", format!("✕ {}, {took}", cut(&phase.phase, 14))),
        (State::Failed, None) => ("after bad", format!("✕ failed, {took}")),
        (State::Waiting, _) => ("after", "no end known".to_owned()),
        _ => ("after", took),
    };
    let x = axis.x(end).max(LEFT + THINNEST) + 7.0;
    text(page, class, x, row.top + SIGNS + BAR / 2.0 + 4.0, &words);
}

fn sign(page: &mut Markup, mark: &Mark, x: f64, top: f64) {
    page.open("g", &[("class", &format!("mark {}", class_of(mark.mark)))]);
    let mut title = format!("{} at {}", mark.mark.words(), units::duration(mark.at_ms));
    if let Some(detail) = &mark.detail {
        title.push_str("; ");
        title.push_str(&cut(detail, 200));
    }
    page.leaf("title", &[], &title);
    let stem = format!("M{x:.1} {:.1} V{:.1}", top + 9.0, top + SIGNS + BAR);
    page.empty("path", &[("class", "stem"), ("d", &stem)]);
    shape(page, mark.mark, x, top + 5.5);
    page.close();
}

fn class_of(kind: MarkKind) -> &'static str {
    match kind {
        MarkKind::Launched => "m-launched",
        MarkKind::Handshake => "m-handshake",
        MarkKind::Service => "m-service",
        MarkKind::Banner => "m-banner",
        MarkKind::Exited => "m-exited",
        MarkKind::Unreachable => "m-unreachable",
    }
}

/// Each kind has a shape of its own, so that none needs its colour.
fn shape(page: &mut Markup, kind: MarkKind, x: f64, y: f64) {
    let at = |dx: f64, dy: f64| format!("{:.1} {:.1}", x + dx, y + dy);
    let path = match kind {
        MarkKind::Launched => format!("M{} L{} L{} Z", at(-4.0, -4.5), at(4.5, 0.0), at(-4.0, 4.5)),
        MarkKind::Handshake | MarkKind::Service => {
            format!(
                "M{} L{} L{} L{} Z",
                at(0.0, -5.0),
                at(5.0, 0.0),
                at(0.0, 5.0),
                at(-5.0, 0.0)
            )
        }
        MarkKind::Banner => format!(
            "M{} L{} L{} L{} Z",
            at(-4.0, -4.0),
            at(4.0, -4.0),
            at(4.0, 4.0),
            at(-4.0, 4.0)
        ),
        MarkKind::Exited => format!(
            "M{} L{} M{} L{}",
            at(-4.0, -4.0),
            at(4.0, 4.0),
            at(4.0, -4.0),
            at(-4.0, 4.0)
        ),
        MarkKind::Unreachable => format!(
            "M{} A4.2 4.2 0 1 0 {} A4.2 4.2 0 1 0 {}",
            at(-4.2, 0.0),
            at(4.2, 0.0),
            at(-4.2, 0.0)
        ),
    };
    page.empty("path", &[("class", "shape"), ("d", &path)]);
}

/// What the colours, patterns and signs of a timeline mean: only those that are on it.
pub(super) fn legend(page: &mut Markup, run: &RunReport) {
    page.open("ul", &[("class", "legend"), ("aria-label", "legend")]);
    for (state, words) in [
        (State::Ok, "done"),
        (State::Failed, "failed"),
        (State::Skipped, "skipped"),
        (State::Waiting, "waiting"),
    ] {
        if run
            .vms
            .iter()
            .flat_map(|vm| &vm.phases)
            .any(|phase| phase.state == state)
        {
            page.open("li", &[]);
            key(page, 22);
            page.open("g", &[("class", &format!("bar s-{}", state.as_str()))]);
            page.empty(
                "rect",
                &[
                    ("x", "1"),
                    ("y", "2"),
                    ("width", "20"),
                    ("height", "11"),
                    ("rx", "2.5"),
                ],
            );
            page.close().close().text(words).close();
        }
    }
    for kind in [
        MarkKind::Launched,
        MarkKind::Handshake,
        MarkKind::Service,
        MarkKind::Banner,
        MarkKind::Exited,
        MarkKind::Unreachable,
    ] {
        let end = run.end_ms();
        if run
            .vms
            .iter()
            .flat_map(|vm| &vm.marks)
            .any(|mark| mark.mark == kind && mark.at_ms <= end)
        {
            page.open("li", &[]);
            key(page, 16);
            page.open("g", &[("class", &format!("mark {}", class_of(kind)))]);
            shape(page, kind, 8.0, 7.5);
            page.close().close().text(kind.words()).close();
        }
    }
    page.close().line();
}

fn key(page: &mut Markup, width: u32) {
    let width = width.to_string();
    page.open(
        "svg",
        &[
            ("xmlns", "http://www.w3.org/2000/svg"),
            ("width", &width),
            ("height", "15"),
            ("aria-hidden", "true"),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(start_ms: u64, duration_ms: u64) -> Phase {
        Phase {
            phase: "x".into(),
            state: State::Ok,
            start_ms,
            duration_ms,
            detail: None,
        }
    }

    #[test]
    fn bars_that_overlap_lie_in_lanes_of_their_own() {
        let one_after_the_other = [phase(0, 10), phase(8, 10), phase(18, 0), phase(18, 5)];
        assert_eq!(lanes(&one_after_the_other, 5), [0, 0, 0, 0]);
        let side_by_side = [phase(0, 100), phase(10, 100), phase(105, 50), phase(109, 1)];
        assert_eq!(lanes(&side_by_side, 5), [0, 1, 0, 1]);
        let many: Vec<Phase> = (0..9).map(|start| phase(start * 10, u64::MAX)).collect();
        assert_eq!(lanes(&many, 5), [0, 1, 2, 3, 3, 3, 3, 3, 3]);
    }
}
