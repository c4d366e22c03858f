//! The timeline of a run: one row a VM, one bar a phase, a sign for each moment worth seeing.
//!
//! Here: where bars, signs and words lie, as SVG. Not here: the signs themselves (`super::symbols`),
//! colours and letters (`style.css`), tables and logs (`super::run_section`).
//!
//! Names and bars are two drawings of equal height side by side: on a narrow screen the bars scroll and
//! the names stay. A bar says its state by colour, by pattern and by words.

use super::markup::Markup;
use super::model::{Phase, RunReport, State, VmReport};
use super::scale::TimeAxis;
use super::{symbols, units};

/// Widths of the two drawings, in CSS pixels.
pub(super) const NAMES_WIDTH: u32 = 168;
pub(super) const BARS_WIDTH: u32 = 860;
/// Room behind the end of the axis, for the words behind the last bar.
const RIGHT: f64 = 172.0;
const LEFT: f64 = 10.0;
/// Room above the rows, for the numbers of the axis.
const TOP: f64 = 30.0;
/// Height of a row with one lane: signs above, bar, a gap.
const SYMBOLS_HEIGHT: f64 = 13.0;
const BAR: f64 = 18.0;
const GAP: f64 = 11.0;
const LANE: f64 = BAR + 2.0;
/// Bars that overlap lie in so many lanes, the rest in the last.
const MAX_LANES: usize = 4;
/// Ends and beginnings are rounded, and a lane for what overlaps by some pixels would hold a splinter: that
/// much is no overlap, as a part of the whole axis and at least.
const TOUCH_PART: u64 = 90;
const TOUCH_MS: u64 = 5;
/// Width of a letter in a bar, about; of a fat one.
const LETTER: f64 = 6.3;
const FAT_LETTER: f64 = 7.4;
/// Letters of a VM's name that have room beside the bars.
const NAME_LETTERS: usize = 17;
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
                height: SYMBOLS_HEIGHT + LANE * count as f64 + GAP,
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
                None if ends.len() < MAX_LANES => {
                    ends.push(0);
                    ends.len() - 1
                }
                None => MAX_LANES - 1,
            };
            ends[lane] = ends[lane].max(phase.end_ms());
            lane
        })
        .collect()
}

/// Draws the timeline; `number` makes its ids unique on the page.
pub(super) fn draw(page: &mut Markup, run: &RunReport, number: usize) {
    let (rows, height) = rows(run);
    let axis = TimeAxis::new(
        from_ms(run),
        run.end_ms(),
        LEFT,
        f64::from(BARS_WIDTH) - LEFT - RIGHT,
    );
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

/// Where the axis begins: at 0, but when all VMs have waited for long, as for an image to be built, only the
/// end of that is drawn.
fn from_ms(run: &RunReport) -> u64 {
    let phases = run.vms.iter().flat_map(|vm| &vm.phases);
    let first = phases
        .filter(|phase| !phase.is_wait())
        .map(|phase| phase.start_ms)
        .min();
    let (first, end) = (first.unwrap_or(0), run.end_ms());
    let rest = end.saturating_sub(first);
    match first > rest / 2 && rest > 0 {
        true => first.saturating_sub(rest / 5),
        false => 0,
    }
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
        let y = row.top + SYMBOLS_HEIGHT + BAR / 2.0;
        let state = row.vm.state;
        page.open("g", &[("class", &format!("name s-{}", state.as_str()))]);
        page.leaf("title", &[], &format!("{}: {}", row.vm.vm, state.as_str()));
        symbols::badge(page, state, 9.0, y);
        text(page, "vm", 24.0, y + 4.0, &cut(&row.vm.vm, NAME_LETTERS));
        page.close();
    }
    page.close();
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
        if !axis.reaches(phase.end_ms()) {
            continue;
        }
        number += usize::from(phase.state != State::Skipped && phase.duration_ms > 0);
        let y = row.top + SYMBOLS_HEIGHT + LANE * *lane as f64;
        bar(page, phase, number, y, axis);
    }
    for mark in row.vm.marks.iter().filter(|mark| axis.holds(mark.at_ms)) {
        let bottom = row.top + SYMBOLS_HEIGHT + BAR;
        symbols::symbol(page, mark, axis.x(mark.at_ms), row.top, bottom);
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
    if let Some(words) = inside(phase, width, axis) {
        text(page, "in-bar", from + 5.0, y + BAR / 2.0 + 4.0, &words);
    }
    page.close();
}

/// What a bar says inside: its phase, or the end of that, if there is room.
fn inside(phase: &Phase, width: f64, axis: &TimeAxis) -> Option<String> {
    if !axis.holds(phase.start_ms) {
        return Some(format!(
            "‹ {} {}",
            phase.phase,
            units::duration(phase.duration_ms)
        ));
    }
    let (sign, letter) = match phase.state {
        State::Failed => ("✕ ", FAT_LETTER),
        _ => ("", LETTER),
    };
    let room = (width - 10.0) / letter;
    let short = phase.phase.split_once('-').map(|(_, short)| short);
    [Some(phase.phase.as_str()), short]
        .into_iter()
        .flatten()
        .map(|name| format!("{sign}{name}"))
        .find(|words| words.chars().count() as f64 <= room)
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
    let says_itself = |phase: &Phase| {
        let width = axis.x(phase.end_ms()) - axis.x(phase.start_ms) - 1.0;
        inside(phase, width, axis).is_some()
    };
    let (class, words) = match (row.vm.state, failed) {
        (State::Failed, Some(phase)) if says_itself(phase) => ("after bad", format!("✕ {took}")),
        (State::Failed, Some(phase)) => ("after bad", format!("✕ {}, {took}", cut(&phase.phase, 14))),
        (State::Failed, None) => ("after bad", format!("✕ failed, {took}")),
        (State::Waiting, _) => ("after", took),
        _ => ("after", took),
    };
    let x = axis.x(end).max(LEFT + THINNEST) + 7.0;
    text(page, class, x, row.top + SYMBOLS_HEIGHT + BAR / 2.0 + 4.0, &words);
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
