//! `bus publish`: one message, or one for each line of a stream, and their acks.
//!

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::payload::{check_payload, check_topic, check_vm, not_json};
use super::publisher::{PayloadSource, Publisher, published};
use super::stdin_lines::{Input, StdinLines};
use super::{BrokerAccess, BusProject};
use crate::core::broker::launcher::{self, BrokerLauncher};
use crate::core::cancel::Cancel;
use crate::core::events::VmCounts;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::operations::run::Operation;
use crate::core::reporter::Reporter;

/// The topic where none is given (docs/PROTOCOL.md).
pub const DEFAULT_TOPIC: &str = "broadcast";

/// The options of `bus publish`.
pub struct BusPublishOptions {
    /// Whose bus.
    pub project: BusProject,
    /// The topic; `None`: `broadcast`.
    pub topic: Option<String>,
    /// What is said.
    pub payload: Payload,
    /// Also to `vm:NAME` where the project has no such VM.
    pub force: bool,
    /// How long to wait for a broker where none runs.
    pub wait: Option<Duration>,
    /// A castra binary, by which [`bus_publish`] starts a missing broker when a VM runs.
    pub cli: Option<PathBuf>,
    /// Raised to stop early.
    pub cancel: Cancel,
}

impl BusPublishOptions {
    /// A bare signal on the usual topic: `null` on `broadcast`; without a castra binary.
    pub fn new(project: BusProject) -> BusPublishOptions {
        BusPublishOptions {
            project,
            topic: None,
            payload: Payload::One("null".to_owned()),
            force: false,
            wait: None,
            cli: None,
            cancel: Cancel::new(),
        }
    }
}

/// What is said.
#[derive(Debug)]
pub enum Payload {
    /// One message: its JSON.
    One(String),
    /// A message for each line, which is its JSON. Empty lines are none.
    Lines(Input),
}

/// The outcome of `bus publish`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BusPublishOutcome {
    /// The topic.
    pub topic: String,
    /// Messages that the broker has kept.
    pub acked: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// The first number one of them got.
    pub first_seq: Option<u64>,
    /// The last.
    pub last_seq: Option<u64>,
    /// Messages sent and neither acked nor refused: they may have been kept or not.
    pub unknown: u64,
    /// Lines that were invalid or refused, the first few of them.
    pub not_published: Vec<NotPublished>,
    /// How many there were in all.
    pub not_published_count: u64,
    /// How long it took.
    pub elapsed_ms: u64,
    /// `Done` if every message was acked.
    pub exit: Exit,
    /// Why not, in words.
    pub failure: Option<Failure>,
}

/// A line that was not published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotPublished {
    /// Its number, counted from 1.
    pub line: u64,
    /// Why.
    pub reason: String,
}

/// Publishes and waits for the acks, each for at most [`ANSWER_LIMIT`](super::ANSWER_LIMIT). What can't be published
/// at all is refused before anything is touched.
pub fn bus_publish(options: BusPublishOptions, reporter: &mut dyn Reporter) -> Result<BusPublishOutcome> {
    let launcher = launcher::of_cli(options.cli.as_deref());
    bus_publish_with_launcher(options, &*launcher, reporter)
}

/// [`bus_publish`] with a broker launcher of the caller's.
pub fn bus_publish_with_launcher(
    options: BusPublishOptions,
    broker: &dyn BrokerLauncher,
    reporter: &mut dyn Reporter,
) -> Result<BusPublishOutcome> {
    let project = &options.project;
    let topic = options.topic.unwrap_or_else(|| DEFAULT_TOPIC.to_owned());
    check_topic(&topic)?;
    if !options.force {
        check_vm(project, &topic)?;
    }
    let longest = project.bus().max_frame_bytes;
    let source = match options.payload {
        Payload::One(payload) => PayloadSource::One(Some(
            check_payload(payload.as_bytes(), &topic, longest).map_err(|why| not_json(&payload, &why))?,
        )),
        Payload::Lines(input) => PayloadSource::Lines(StdinLines::new(input, longest)),
    };
    let access = BrokerAccess {
        broker,
        wait: options.wait,
        cancel: &options.cancel,
    };
    access.check(project)?;
    let operation = Operation::accept(
        "bus publish",
        Some(topic.clone()),
        &project.state,
        project.rotation(),
        reporter,
    );
    let emitter = operation.emitter();
    let client = match access.session(project, &mut |event| emitter.emit(event)) {
        Ok(client) => client,
        Err(failure) => return Err(operation.fail(failure, VmCounts::default())),
    };
    let outcome = Publisher::new(client, source, &topic, longest, &options.cancel, emitter).run(project);
    let detail = match &outcome.failure {
        Some(failure) => failure.cause(),
        None => published(&outcome),
    };
    operation.end(outcome.exit, Some(detail), VmCounts::default(), outcome.bytes);
    Ok(outcome)
}
