//! Signs and their legend: of states, and of moments worth seeing.
//!
//! Here: shapes. Each has one of its own, so that none needs its colour. Not here: where they lie
//! (`super::timeline`).

use super::markup::Markup;
use super::model::{Mark, MarkKind, RunReport, State};
use super::timeline::cut;
use super::units;

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

/// A moment on the timeline, above a bar that ends at `bottom`.
pub(super) fn symbol(page: &mut Markup, mark: &Mark, x: f64, top: f64, bottom: f64) {
    page.open("g", &[("class", &format!("mark {}", class_of(mark.mark)))]);
    let mut title = format!("{} at {}", mark.mark.words(), units::duration(mark.at_ms));
    if let Some(detail) = &mark.detail {
        title.push_str("; ");
        title.push_str(&cut(detail, 200));
    }
    page.leaf("title", &[], &title);
    let stem = format!("M{x:.1} {:.1} V{:.1}", top + 9.0, bottom);
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
