//! The report as one page for a browser: nothing is fetched, nothing runs.
//!
//! Here: the frame: the content policy, the head, the list of runs. Not here: one run (`super::run_section`),
//! colours (`style.css`), escaping (`super::markup`).
//!
//! The page's content policy forbids everything but its own style, so that even a hole in the escaping could
//! load and run nothing. It is well-formed XML as well, so that a test can read it.

use super::markup::Markup;
use super::model::{Outcome, Report, RunReport};
use super::{run_section, units};

const STYLE: &str = include_str!("style.css");
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

/// The whole page.
pub fn page(report: &Report) -> String {
    let mut page = Markup::default();
    page.raw("<!DOCTYPE html>\n");
    page.open(
        "html",
        &[("xmlns", "http://www.w3.org/1999/xhtml"), ("lang", "en")],
    )
    .line();
    head(&mut page, report);
    page.open("body", &[]).line();
    patterns(&mut page);
    page.open("main", &[]).line();
    header(&mut page, report);
    if report.runs.is_empty() {
        nothing(&mut page);
    }
    for (number, run) in report.runs.iter().enumerate() {
        run_section::draw(&mut page, run, number);
    }
    footer(&mut page, report);
    let mut text = page.finish();
    text.push('\n');
    text
}

fn head(page: &mut Markup, report: &Report) {
    page.open("head", &[]).line();
    page.empty("meta", &[("charset", "utf-8")]).line();
    page.empty(
        "meta",
        &[("http-equiv", "Content-Security-Policy"), ("content", POLICY)],
    )
    .line();
    page.empty(
        "meta",
        &[
            ("name", "viewport"),
            ("content", "width=device-width, initial-scale=1"),
        ],
    )
    .line();
    page.empty("meta", &[("name", "color-scheme"), ("content", "light dark")])
        .line();
    page.empty(
        "meta",
        &[
            ("name", "generator"),
            ("content", &format!("castra {}", report.version)),
        ],
    )
    .line();
    page.leaf("title", &[], &format!("{}: castra report", report.project))
        .line();
    // Ours, and without a letter that XML would read otherwise: a test holds that.
    page.open("style", &[]).raw(STYLE).close().line();
    page.close().line();
}

/// Patterns that bars are filled with, for those who don't see the colours.
fn patterns(page: &mut Markup) {
    page.open(
        "svg",
        &[
            ("xmlns", "http://www.w3.org/2000/svg"),
            ("class", "patterns"),
            ("width", "0"),
            ("height", "0"),
            ("aria-hidden", "true"),
        ],
    );
    page.open("defs", &[]);
    for (id, size, path) in [
        ("hatch-failed", "6", "M-1 1 L1 -1 M0 6 L6 0 M5 7 L7 5"),
        ("hatch-waiting", "8", "M-1 7 L1 9 M0 0 L8 8 M7 -1 L9 1"),
    ] {
        page.open(
            "pattern",
            &[
                ("id", id),
                ("width", size),
                ("height", size),
                ("patternUnits", "userSpaceOnUse"),
            ],
        );
        page.empty("rect", &[("class", "under"), ("width", size), ("height", size)]);
        page.empty("path", &[("class", "over"), ("d", path)]);
        page.close();
    }
    page.close().close().line();
}

fn header(page: &mut Markup, report: &Report) {
    page.open("header", &[("class", "top")]);
    page.open("div", &[]);
    page.leaf("p", &[("class", "eyebrow")], "castra report");
    page.leaf("h1", &[], &report.project);
    page.close();
    page.open("dl", &[("class", "meta")]);
    fact(page, "Workspace", &report.workspace);
    fact(page, "Made", &units::moment(&report.generated_at));
    fact(page, "By", &format!("castra {}", report.version));
    page.close().close().line();
    if report.runs.len() > 1 {
        overview(page, report);
    }
    for text in &report.left_out {
        page.leaf("p", &[("class", "remark")], &format!("Not in here: {text}."))
            .line();
    }
}

pub(super) fn fact(page: &mut Markup, name: &str, value: &str) {
    page.open("div", &[])
        .leaf("dt", &[], name)
        .leaf("dd", &[], value)
        .close();
}

/// One line a run, newest first, leading to it.
fn overview(page: &mut Markup, report: &Report) {
    page.open("nav", &[("aria-label", "Runs")])
        .open("table", &[("class", "runs")]);
    page.open("thead", &[]).open("tr", &[]);
    for (class, name) in [
        ("", "Run"),
        ("", "Began"),
        ("num", "Took"),
        ("num", "VMs"),
        ("num wide", "Bus messages"),
        ("", "Ended"),
    ] {
        page.leaf("th", &[("scope", "col"), ("class", class)], name);
    }
    page.close().close().open("tbody", &[]);
    for (number, run) in report.runs.iter().enumerate() {
        page.open("tr", &[]);
        page.open("td", &[]);
        page.leaf("a", &[("href", &format!("#run-{}", number + 1))], &run.command);
        page.close();
        page.leaf("td", &[("class", "time")], &units::moment(&run.started_at));
        page.leaf("td", &[("class", "num"), ("data-label", "took")], &took(run));
        page.leaf("td", &[("class", "num"), ("data-label", "VMs")], &vms(run));
        let messages = run
            .bus
            .as_ref()
            .map_or_else(|| "–".to_owned(), |bus| units::count(bus.messages));
        page.leaf("td", &[("class", "num wide")], &messages);
        page.open("td", &[]);
        verdict(page, run.outcome);
        page.close().close().line();
    }
    page.close().close().close().line();
}

pub(super) fn took(run: &RunReport) -> String {
    run.duration_ms.map_or_else(|| "–".to_owned(), units::duration)
}

/// `2`, or `1 of 2 failed`.
pub(super) fn vms(run: &RunReport) -> String {
    match run.vms_failed {
        0 => units::count(run.vms_total as u64),
        failed => format!("{failed} of {} failed", run.vms_total),
    }
}

/// Sign and word.
pub(super) fn verdict(page: &mut Markup, outcome: Outcome) {
    let (sign, word) = match outcome {
        Outcome::Ok => ("✓", "ok"),
        Outcome::Failed => ("✕", "failed"),
        Outcome::Interrupted => ("■", "interrupted"),
        Outcome::Running => ("…", "under way"),
        Outcome::Unfinished => ("?", "no end known"),
    };
    page.open("span", &[("class", &format!("verdict v-{}", outcome.as_str()))]);
    page.leaf("span", &[("aria-hidden", "true")], sign)
        .text(" ")
        .text(word)
        .close();
}

fn nothing(page: &mut Markup) {
    page.open("section", &[("class", "empty")]);
    page.leaf("h2", &[], "Nothing has run here yet");
    page.open("p", &[])
        .text("A report shows the runs of ")
        .leaf("code", &[], "castra up");
    page.text(", ")
        .leaf("code", &[], "down")
        .text(", ")
        .leaf("code", &[], "restart")
        .text(" and ");
    page.leaf("code", &[], "bootstrap")
        .text(" that were asked for.")
        .close();
    page.close().line();
}

fn footer(page: &mut Markup, report: &Report) {
    page.open("footer", &[]);
    page.text("Durations are measured by a clock that never goes back; times of day are UTC. Made from the journals of ");
    page.leaf("code", &[], &report.workspace);
    page.text("; ")
        .leaf("code", &[], "castra events")
        .text(" has every event.");
    page.close().line();
}

#[cfg(test)]
mod tests {
    use super::super::timeline::{BARS_WIDTH, NAMES_WIDTH};
    use super::STYLE;

    /// The pixels behind these words of the style.
    fn px(words: &str) -> f64 {
        let (_, rest) = STYLE.split_once(words).unwrap_or_else(|| panic!("{words}"));
        let number = rest.trim_start().split("px").next().unwrap_or_default();
        number.parse().unwrap_or_else(|_| panic!("{words}: {number}"))
    }

    /// At each width at which the drawings change their size, they fit beside a scroll bar of the
    /// page's: none of their own is needed.
    #[test]
    fn drawings_fit_into_the_card() {
        const SCROLL_BAR: f64 = 15.0;
        let drawings = f64::from(NAMES_WIDTH + BARS_WIDTH);
        let around = 2.0
            * (px("padding: 40px ") + px("padding: 24px ") + px(".run { background: var(--card); border: "));
        assert!(
            drawings + around <= px("main { max-width: "),
            "{drawings} + {around}"
        );
        let mut zoom = 1.0;
        for (width, next) in [(1152.0, 0.9), (1048.0, 0.8), (944.0, 1.0)] {
            let media = format!("@media (max-width: {width}px) {{ .chart {{ zoom: {next}; }} }}");
            let media = media.replace("zoom: 1.0", "zoom: 1");
            assert!(STYLE.contains(&media), "{media}");
            assert!(drawings * zoom + around + SCROLL_BAR <= width + 1.0, "{width}");
            zoom = next;
        }
    }

    /// What would make the page wider than a telephone is taken apart there, and a date stays whole.
    #[test]
    fn nothing_is_wider_than_a_telephone() {
        let (wide, narrow) = STYLE
            .split_once("@media (max-width: 640px) {")
            .expect("a part for telephones");
        assert!(wide.contains(".phases { font-size: 13.5px; min-width: 620px;"));
        assert!(narrow.contains(".phases, .phases tbody { display: block; min-width: 0; }"));
        let dates = STYLE.lines().find(|line| line.starts_with(".time, .when {"));
        assert!(dates.is_some_and(|line| line.contains("white-space: nowrap")));
    }
}
