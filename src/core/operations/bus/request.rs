//! `bus request`: publishes a question on a topic, and waits for the first answer.
//!
//! Here: the topic for the answer, the question, the wait. Not here: who answers (whoever is
//! subscribed and publishes on the topic that the question names).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::payload::{check_payload, check_topic, check_vm, not_json};
use super::{ANSWER_LIMIT, BrokerAccess, BusProject, POLL_INTERVAL, failed, interrupted};
use crate::core::broker::launcher::{self, BrokerLauncher};
use crate::core::bus::client_frame::Frame;
use crate::core::bus::topic::Pattern;
use crate::core::bus::{BusError, Client, Message};
use crate::core::cancel::Cancel;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::human;
use crate::core::reporter::{Emitter, Reporter};

/// The default limit for an answer.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// The options of `bus request`.
pub struct BusRequestOptions {
    /// Whose bus.
    pub project: BusProject,
    /// The topic.
    pub topic: String,
    /// The question: JSON.
    pub payload: String,
    /// How long to wait for an answer once the question is kept.
    pub timeout: Duration,
    /// Also to `vm:NAME` where the project has no such VM.
    pub force: bool,
    /// How long to wait for a broker where none runs.
    pub wait: Option<Duration>,
    /// A castra binary, by which [`bus_request`] starts a missing broker when a VM runs.
    pub cli: Option<PathBuf>,
    /// Raised to stop.
    pub cancel: Cancel,
}

impl BusRequestOptions {
    /// A question with a payload of `null`, and 5 s for its answer; without a castra binary.
    pub fn new(project: BusProject, topic: impl Into<String>) -> BusRequestOptions {
        BusRequestOptions {
            project,
            topic: topic.into(),
            payload: "null".to_owned(),
            timeout: DEFAULT_TIMEOUT,
            force: false,
            wait: None,
            cli: None,
            cancel: Cancel::new(),
        }
    }
}

/// The outcome of `bus request`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BusRequestOutcome {
    /// The number of the question.
    pub seq: u64,
    /// The first answer.
    pub answer: Message,
}

/// Publishes the question and waits for the first answer. If none comes in time, that is a failure.
pub fn bus_request(options: BusRequestOptions, reporter: &mut dyn Reporter) -> Result<BusRequestOutcome> {
    let launcher = launcher::of_cli(options.cli.as_deref());
    bus_request_with_launcher(options, &*launcher, reporter)
}

/// [`bus_request`] with a broker launcher of the caller's.
pub fn bus_request_with_launcher(
    options: BusRequestOptions,
    broker: &dyn BrokerLauncher,
    reporter: &mut dyn Reporter,
) -> Result<BusRequestOutcome> {
    let project = &options.project;
    check_topic(&options.topic)?;
    if !options.force {
        check_vm(project, &options.topic)?;
    }
    // The topic for the answer takes room in the frame.
    let longest = project.bus().max_frame_bytes.saturating_sub(64);
    let payload = check_payload(options.payload.as_bytes(), &options.topic, longest)
        .map_err(|why| not_json(&options.payload, &why))?;
    let emitter = Emitter::new(reporter);
    let access = BrokerAccess {
        broker,
        wait: options.wait,
        cancel: &options.cancel,
    };
    access.check(project)?;
    let mut client = access.session(project, &mut |event| emitter.emit(event))?;
    let (seq, reply) = ask(&mut client, &options.topic, &payload)
        .map_err(|error| failed("the question was not asked", project, &error))?;
    let answer = wait_for(&mut client, &reply, &options)?;
    Ok(BusRequestOutcome { seq, answer })
}

/// Publishes the question with a topic of its own for the answer; returns the question's number and that
/// topic. The topic has a random number, so that others can't answer.
fn ask(client: &mut Client, topic: &str, payload: &str) -> Result<(u64, String), BusError> {
    let random = host::random_hex(8).map_err(|error| BusError::Broken(error.to_string()))?;
    let reply = format!("vm:host/reply/{random}");
    let pattern: Pattern = reply.parse().map_err(|_| BusError::BadTopic(reply.clone()))?;
    client.subscribe(&pattern, None, ANSWER_LIMIT)?;
    let seq = client.publish_with_reply(topic, payload, &reply, ANSWER_LIMIT)?;
    Ok((seq, reply))
}

fn wait_for(client: &mut Client, reply: &str, options: &BusRequestOptions) -> Result<Message> {
    let until = Instant::now() + options.timeout;
    loop {
        let now = Instant::now();
        let frame = client.next_frame(until.min(now + POLL_INTERVAL));
        match frame.map_err(|error| failed("no answer came", &options.project, &error))? {
            Some(Frame::Delivery(message)) if message.topic == reply => return Ok(message),
            _ if options.cancel.is_requested() => return Err(interrupted()),
            Some(_) => {}
            None if now < until => {}
            None => {
                return Err(Failure::new(
                    Exit::Failed,
                    format!("no answer came within {}", human::limit(options.timeout)),
                )
                .because(format!(
                    "nobody who is subscribed to {} has answered",
                    options.topic
                ))
                .advice("check in `castra bus tail` that the question is in the log, and that whoever answers is subscribed; --timeout waits longer"));
            }
        }
    }
}
