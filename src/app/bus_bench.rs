//! `castra bus bench`.

use castra::core::failure::{Exit, Result};
use castra::core::operations::bus::{BusBenchOptions, BusBenchOutcome, Measured, bus_bench};

use super::context::Context;
use super::{bus, up};
use crate::cli::Raw;

/// Defaults of the flags.
const DEFAULT_MESSAGES: u64 = 50_000;
const DEFAULT_SIZE: usize = 200;
const DEFAULT_IN_FLIGHT: usize = 64;

/// Measures, and prints a table.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let options = BusBenchOptions {
        project: bus::project(raw)?,
        messages: raw.messages.unwrap_or(DEFAULT_MESSAGES),
        size: raw.size.unwrap_or(DEFAULT_SIZE),
        in_flight: raw.in_flight.unwrap_or(DEFAULT_IN_FLIGHT),
        publishers: raw.publishers.unwrap_or(1),
        cli: Some(up::own_binary()?),
        cancel: context.end_on_signals(),
    };
    context.say("measuring; Ctrl-C ends");
    let mut reporter = context.people_reporter();
    let outcome = bus_bench(options, &mut reporter)?;
    drop(reporter);
    if context.json {
        context.out.json(&outcome);
    } else {
        context.out.text(table(&outcome));
        context.out.flush();
    }
    if outcome.cut_short {
        context.warn("a phase reached its limit of 20 s: fewer messages were sent than asked for");
    }
    Ok(Exit::Done)
}

fn table(outcome: &BusBenchOutcome) -> String {
    let load = &outcome.throughput.load;
    let many = match load.publishers {
        1 => format!("{} in flight, to the ack", load.in_flight),
        publishers => format!("{publishers} x {} in flight, to the ack", load.in_flight),
    };
    let mut text = format!(
        "{:<34} {:>9} {:>10} {:>8} {:>9} {:>9} {:>9}\n",
        "", "messages", "msg/s", "MB/s", "p50 us", "p99 us", "p99.9 us"
    );
    for (name, measured) in [
        ("one by one, to the ack", &outcome.one_by_one),
        ("the same, to a subscriber", &outcome.to_subscriber),
        (many.as_str(), &outcome.throughput),
        ("the same messages, from the log", &outcome.replay),
    ] {
        text.push_str(&row(name, measured));
    }
    text.push_str(&format!(
        "payloads of {} bytes, sync = \"{}\", topic {}\n",
        load.size, outcome.sync, outcome.topic
    ));
    text
}

fn row(name: &str, measured: &Measured) -> String {
    let latency = |pick: fn(&castra::core::operations::bus::LatencyMicros) -> f64| {
        measured
            .latency_us
            .as_ref()
            .map_or_else(|| "-".to_owned(), |latency| format!("{:.0}", pick(latency)))
    };
    format!(
        "{name:<34} {:>9} {:>10.0} {:>8.1} {:>9} {:>9} {:>9}\n",
        measured.load.messages,
        measured.messages_per_sec,
        measured.megabytes_per_sec,
        latency(|latency| latency.p50),
        latency(|latency| latency.p99),
        latency(|latency| latency.p99_9)
    )
}
