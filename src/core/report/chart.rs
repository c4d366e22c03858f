//! The bus's traffic as curves: all messages, and below them each sender's.
//!
//! Here: the drawing. Not here: counting (`super::traffic`), colours (`style.css`).
//!
//! A curve is messages a second; its height is its own, and the number beside it says what the top
//! is. Bytes stand beside it in words: a second curve on a second scale would be read wrongly.

use super::markup::Markup;
use super::model::Traffic;
use super::scale::TimeAxis;
use super::timeline::{BARS_WIDTH, NAMES_WIDTH, cut, grid, svg, text};
use super::units;

const LEFT: f64 = 10.0;
const RIGHT: f64 = 172.0;
const TOP: f64 = 34.0;
/// Heights of the first curve and of the others, and the gap between them.
const ALL: f64 = 74.0;
const ONE: f64 = 34.0;
const GAP: f64 = 16.0;
/// With a shorter axis one message would fill the chart.
const SHORTEST_MS: u64 = 10_000;
/// Least height of a point that has messages.
const LOWEST: f64 = 1.5;

struct Curve<'t> {
    name: String,
    class: &'static str,
    messages: u64,
    bytes: u64,
    points: &'t [[u64; 2]],
    top: f64,
    height: f64,
}

/// Draws the curves; `number` makes the ids unique on the page.
pub(super) fn draw(page: &mut Markup, traffic: &Traffic, number: usize) {
    let curves = curves(traffic);
    let height = curves.last().map_or(TOP, |curve| curve.top + curve.height + 10.0);
    let span = traffic.bucket_ms.saturating_mul(traffic.points.len() as u64);
    let end = traffic.start_ms.saturating_add(span.max(SHORTEST_MS));
    let axis = TimeAxis::new(traffic.start_ms, end, LEFT, f64::from(BARS_WIDTH) - LEFT - RIGHT);

    page.open("div", &[("class", "chart")]);
    let (width, tall) = (NAMES_WIDTH.to_string(), format!("{height:.0}"));
    page.open(
        "svg",
        &[
            ("xmlns", "http://www.w3.org/2000/svg"),
            ("class", "names"),
            ("width", &width),
            ("height", &tall),
            ("aria-hidden", "true"),
        ],
    );
    for curve in &curves {
        let middle = curve.top + curve.height / 2.0;
        text(page, "vm", 2.0, middle + 1.0, &cut(&curve.name, 22));
        let sum = format!(
            "{} · {}",
            units::count(curve.messages),
            units::bytes(curve.bytes as f64)
        );
        text(page, "sum", 2.0, middle + 16.0, &sum);
    }
    page.close();

    page.open(
        "div",
        &[
            ("class", "scroll"),
            ("tabindex", "0"),
            ("role", "group"),
            ("aria-label", "bus traffic, scrolls sideways"),
        ],
    );
    let title = format!("bus-{number}");
    svg(page, BARS_WIDTH, height, "bus", &title);
    page.leaf("title", &[("id", &title)], "Messages a second on the bus");
    page.leaf(
        "desc",
        &[],
        "One curve for all messages, one for each sender. Times count from the run's beginning.",
    );
    grid(page, &axis, height);
    for curve in &curves {
        draw_curve(page, curve, traffic, &axis);
    }
    page.close().close().close().line();
}

fn curves(traffic: &Traffic) -> Vec<Curve<'_>> {
    let mut top = TOP;
    let all = Curve {
        name: "all senders".to_owned(),
        class: "all",
        messages: traffic.messages,
        bytes: traffic.bytes,
        points: &traffic.points,
        top,
        height: ALL,
    };
    top += ALL + GAP;
    let mut curves = vec![all];
    for sender in &traffic.senders {
        curves.push(Curve {
            name: sender.sender.clone(),
            class: "one",
            messages: sender.messages,
            bytes: sender.bytes,
            points: &sender.points,
            top,
            height: ONE,
        });
        top += ONE + GAP;
    }
    curves
}

fn draw_curve(page: &mut Markup, curve: &Curve<'_>, traffic: &Traffic, axis: &TimeAxis) {
    let most = curve
        .points
        .iter()
        .map(|point| point[0])
        .max()
        .unwrap_or(0)
        .max(1);
    let base = curve.top + curve.height;
    let y = |messages: u64| match messages {
        0 => base,
        _ => base - (curve.height * messages as f64 / most as f64).max(LOWEST),
    };
    let x = |at: usize| {
        axis.x(traffic
            .start_ms
            .saturating_add(traffic.bucket_ms.saturating_mul(at as u64)))
    };
    // Steps: a point stands for all of its time. Points of the same height are one line.
    let mut line = String::new();
    let mut height = None;
    for (at, point) in curve.points.iter().enumerate() {
        if height != Some(point[0]) {
            let command = if height.is_none() { "M" } else { "H" };
            match height {
                None => line.push_str(&format!("{command}{:.1} {:.1}", x(at), y(point[0]))),
                Some(_) => line.push_str(&format!(" {command}{:.1} V{:.1}", x(at), y(point[0]))),
            }
            height = Some(point[0]);
        }
    }
    let (from, to) = (x(0), f64::from(BARS_WIDTH) - RIGHT);
    let last = x(curve.points.len());
    line.push_str(&format!(" H{last:.1} V{base:.1}"));
    let area = format!("{line} H{from:.1} Z");

    let secs = traffic.bucket_ms as f64 / 1000.0;
    let peak = units::rate(most as f64 / secs);
    let heaviest = curve.points.iter().map(|point| point[1]).max().unwrap_or(0);
    let heaviest = format!("{}/s", units::bytes(heaviest as f64 / secs));
    page.open("g", &[("class", &format!("curve {}", curve.class))]);
    let title = format!(
        "{}: {} of {}, at most {peak} and {heaviest}",
        curve.name,
        units::plural(curve.messages, "message"),
        units::bytes(curve.bytes as f64)
    );
    page.leaf("title", &[], &title);
    page.empty("path", &[("class", "area"), ("d", &area)]);
    page.empty("path", &[("class", "line"), ("d", &line)]);
    page.empty(
        "path",
        &[
            ("class", "base"),
            ("d", &format!("M{from:.1} {base:.1} H{to:.1}")),
        ],
    );
    text(page, "peak", to + 8.0, curve.top + 9.0, &format!("peak {peak}"));
    text(page, "peak faint", to + 8.0, curve.top + 24.0, &heaviest);
    page.close();
}
