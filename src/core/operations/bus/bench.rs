//! `bus bench`: how fast this project's broker takes messages and hands them on, by its own
//! sessions on the host socket.
//!
//! Here: options, outcome and messages. Not here: the load and its clocks (`workload`), the same for other
//! systems (`scripts/bench-bus.sh`), or a table for people (`app`).
//!
//! All messages are real ones: kept in the log, on a topic of this run.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::workload::{Bench, BenchError, NUMBER_DIGITS};
use super::{BrokerAccess, BusProject, failed, interrupted};
use crate::core::broker::launcher::{self, BrokerLauncher};
use crate::core::cancel::Cancel;
use crate::core::config::SyncMode;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::reporter::{Emitter, Reporter};

/// Most messages of one run: a time is kept for each.
pub const MAX_MESSAGES: u64 = 5_000_000;

/// Most publishers: each is a session and a thread.
pub const MAX_PUBLISHERS: usize = 64;

/// Most messages in flight of each publisher.
pub const MAX_IN_FLIGHT: usize = 65_536;

/// A payload begins with its number, so it can't be shorter.
pub const MIN_SIZE: usize = NUMBER_DIGITS + 2;

/// One by one, so many are enough for a 99.9th percentile that means something.
const ONE_BY_ONE: u64 = 5000;

/// The options of `bus bench`.
pub struct BusBenchOptions {
    /// Whose broker.
    pub project: BusProject,
    /// Messages of the throughput phase, at most `MAX_MESSAGES`.
    pub messages: u64,
    /// Bytes of each payload, at least `MIN_SIZE`.
    pub size: usize,
    /// Messages in flight of each publisher.
    pub in_flight: usize,
    /// Publishers at once.
    pub publishers: usize,
    /// A castra binary, by which [`bus_bench`] starts a missing broker when a VM runs.
    pub cli: Option<PathBuf>,
    /// Raised to stop early.
    pub cancel: Cancel,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BusBenchOutcome {
    /// The topic of this run.
    pub topic: String,
    /// What an ack promises here: `[bus].sync`.
    pub sync: String,
    /// One message after the other, publish to ack.
    pub one_by_one: Measured,
    /// The same messages, publish to a subscriber.
    pub to_subscriber: Measured,
    /// Many in flight, publish to ack.
    pub throughput: Measured,
    /// The same messages from the log to a subscriber that asked for them by number; latencies
    /// mean nothing there and are null.
    pub replay: Measured,
    /// A phase was ended by its time limit of 20 s.
    pub cut_short: bool,
}

/// One phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// What was asked of the broker.
    pub load: Load,
    /// How long it took.
    pub elapsed_ms: f64,
    /// Messages a second.
    pub messages_per_sec: f64,
    /// Their payloads, in units of 1,000,000 bytes a second.
    pub megabytes_per_sec: f64,
    /// How long one message took.
    pub latency_us: Option<LatencyMicros>,
}

/// What was asked of the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Messages.
    pub messages: u64,
    /// Bytes of each payload.
    pub size: usize,
    /// In flight of each publisher.
    pub in_flight: usize,
    /// Publishers at once.
    pub publishers: usize,
}

/// Percentiles, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LatencyMicros {
    /// Half were faster.
    pub p50: f64,
    /// 99 of 100 were.
    pub p99: f64,
    /// 999 of 1000 were.
    pub p99_9: f64,
    /// The slowest.
    pub max: f64,
}

/// Measures one by one, then many in flight, then a replay of those.
pub fn bus_bench(options: BusBenchOptions, reporter: &mut dyn Reporter) -> Result<BusBenchOutcome> {
    let launcher = launcher::of_cli(options.cli.as_deref());
    bus_bench_with_launcher(options, &*launcher, reporter)
}

/// [`bus_bench`] with a broker launcher of the caller's.
pub fn bus_bench_with_launcher(
    options: BusBenchOptions,
    broker: &dyn BrokerLauncher,
    reporter: &mut dyn Reporter,
) -> Result<BusBenchOutcome> {
    let project = &options.project;
    check(&options)?;
    let emitter = Emitter::new(reporter);
    let access = BrokerAccess {
        broker,
        wait: None,
        cancel: &options.cancel,
    };
    access.check(project)?;
    let session = || access.session(project, &mut |event| emitter.emit(event));
    let run = host::random_hex(4)
        .map_err(|error| Failure::new(Exit::Internal, "the system gives no random numbers").because(error))?;
    let bench = Bench {
        topic: format!("bench/{run}"),
        size: options.size,
        cancel: &options.cancel,
    };
    let failed = |error: BenchError| match error {
        BenchError::Interrupted => interrupted(),
        BenchError::NoThread(failure) => failure,
        BenchError::Bus(error) => failed("the measurement ended early", project, &error),
    };

    let (one_by_one, to_subscriber, cut_early) = bench
        .one_by_one(session()?, session()?, options.messages.min(ONE_BY_ONE))
        .map_err(failed)?;
    let mut publishers = Vec::new();
    for _ in 0..options.publishers {
        publishers.push(session()?);
    }
    let (throughput, first, cut_late) = bench
        .throughput(publishers, options.messages, options.in_flight)
        .map_err(failed)?;
    let replay = bench
        .replay(session()?, first, throughput.load.messages)
        .map_err(failed)?;
    Ok(BusBenchOutcome {
        topic: bench.topic,
        sync: word_of(project.bus().sync).to_owned(),
        one_by_one,
        to_subscriber,
        throughput,
        replay,
        cut_short: cut_early || cut_late,
    })
}

fn check(options: &BusBenchOptions) -> Result<()> {
    let room = options.project.bus().max_frame_bytes.saturating_sub(256);
    for (flag, value, range) in [
        ("messages", options.messages, 1..=MAX_MESSAGES),
        ("size", options.size as u64, MIN_SIZE as u64..=room as u64),
        ("in-flight", options.in_flight as u64, 1..=MAX_IN_FLIGHT as u64),
        ("publishers", options.publishers as u64, 1..=MAX_PUBLISHERS as u64),
    ] {
        if !range.contains(&value) {
            return Err(
                Failure::new(Exit::Usage, format!("--{flag} can't be {value}")).because(format!(
                    "it may be {} to {} here",
                    range.start(),
                    range.end()
                )),
            );
        }
    }
    Ok(())
}

/// As castra.toml has it.
fn word_of(sync: SyncMode) -> &'static str {
    match sync {
        SyncMode::None => "none",
        SyncMode::Interval => "interval",
        SyncMode::Batch => "batch",
    }
}
