//! `bus subscribe`: messages as they come, or from a number on, until somebody has had enough.
//!
//! Here: the subscriptions of one session, and its end in words. Not here: the session
//! (`core::bus::client`). A session that ends is not opened again: whoever wants that comes back
//! with the number after the last one.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{ANSWER_LIMIT, Access, BusProject, BusSink, LOOK_EVERY, failed};
use crate::core::broker::launcher::{self, BrokerLauncher};
use crate::core::bus::BusError;
use crate::core::bus::client::{Client, Woken};
use crate::core::bus::frame::{Ack, Frame, Request};
use crate::core::bus::topic::Pattern;
use crate::core::cancel::Cancel;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::reporter::{Emitter, Reporter};

/// What a `subscribe` is asked for.
pub struct BusSubscribeOptions {
    /// Whose bus.
    pub project: BusProject,
    /// Which messages; at least one pattern.
    pub topics: Vec<Pattern>,
    /// The first number wanted; `None`: from now on.
    pub from: Option<u64>,
    /// How many messages are enough; `None`: there are never enough.
    pub count: Option<u64>,
    /// How long to wait for a broker where none runs.
    pub wait: Option<Duration>,
    /// A castra binary, by which [`bus_subscribe`] starts a missing broker when a VM runs.
    pub cli: Option<PathBuf>,
    /// Raised to stop.
    pub cancel: Cancel,
}

impl BusSubscribeOptions {
    /// These topics from now on, for ever; without a castra binary.
    pub fn new(project: BusProject, topics: Vec<Pattern>) -> BusSubscribeOptions {
        BusSubscribeOptions {
            project,
            topics,
            from: None,
            count: None,
            wait: None,
            cli: None,
            cancel: Cancel::new(),
        }
    }
}

/// What was received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusSubscribeOutcome {
    /// Messages handed on.
    pub messages: u64,
    /// The number of the last one.
    pub last_seq: Option<u64>,
    /// Numbers that were asked for and are no longer in the log.
    pub missing: u64,
    /// Why it ended.
    pub end: SubscriptionEnd,
}

/// Why a subscription ended in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SubscriptionEnd {
    /// As many came as were wanted.
    Count,
    /// Nobody wants more.
    SinkClosed,
    /// It was asked to stop.
    Cancelled,
}

/// Hands on messages until there were `count`, the sink closes or it is told to stop. A session
/// that the broker ends is a failure, which names the number to go on with.
pub fn bus_subscribe(
    options: BusSubscribeOptions,
    sink: &mut dyn BusSink,
    reporter: &mut dyn Reporter,
) -> Result<BusSubscribeOutcome> {
    let launcher = launcher::of_cli(options.cli.as_deref());
    bus_subscribe_with_launcher(options, &*launcher, sink, reporter)
}

/// [`bus_subscribe`] with a broker launcher of the caller's.
pub fn bus_subscribe_with_launcher(
    options: BusSubscribeOptions,
    broker: &dyn BrokerLauncher,
    sink: &mut dyn BusSink,
    reporter: &mut dyn Reporter,
) -> Result<BusSubscribeOutcome> {
    if options.topics.is_empty() {
        return Err(Failure::new(Exit::Usage, "no topic to subscribe to")
            .advice("name one, such as broadcast, 'ci/*' or '*'"));
    }
    let emitter = Emitter::new(reporter);
    let access = Access {
        broker,
        wait: options.wait,
        cancel: &options.cancel,
    };
    access.check(&options.project)?;
    let client = access.session(&options.project, &mut |event| emitter.emit(event))?;
    Subscribing {
        client,
        unacked: Vec::new(),
        outcome: BusSubscribeOutcome {
            messages: 0,
            last_seq: None,
            missing: 0,
            end: SubscriptionEnd::Cancelled,
        },
        options: &options,
        sink,
    }
    .run()
}

struct Subscribing<'o, 's> {
    client: Client,
    /// The subscriptions that the broker has yet to answer.
    unacked: Vec<(u64, Pattern)>,
    outcome: BusSubscribeOutcome,
    options: &'o BusSubscribeOptions,
    sink: &'s mut dyn BusSink,
}

impl Subscribing<'_, '_> {
    fn run(mut self) -> Result<BusSubscribeOutcome> {
        for topic in &self.options.topics {
            let id = self.client.new_id();
            let from = self.options.from;
            self.client.queue(Request::Subscribe { topic, from, id });
            self.unacked.push((id, topic.clone()));
        }
        let answer_by = Instant::now() + ANSWER_LIMIT;
        loop {
            if self
                .options
                .count
                .is_some_and(|count| self.outcome.messages >= count)
            {
                return Ok(self.end(SubscriptionEnd::Count));
            }
            // Whatever came with the last read first; only before a wait is it due.
            let frame = match self.client.at_hand() {
                Ok(Some(frame)) => Some(frame),
                Ok(None) => {
                    self.sink.caught_up();
                    if !self.sink.is_open() {
                        return Ok(self.end(SubscriptionEnd::SinkClosed));
                    }
                    if self.options.cancel.is_requested() {
                        return Ok(self.end(SubscriptionEnd::Cancelled));
                    }
                    match self.client.wait(Instant::now() + LOOK_EVERY, None) {
                        Ok(Woken::Frame(frame)) => Some(frame),
                        Ok(Woken::Other | Woken::Time) => None,
                        Err(error) => return Err(self.failed(&error)),
                    }
                }
                Err(error) => return Err(self.failed(&error)),
            };
            if let Some(frame) = frame {
                self.hear(frame)?;
                if !self.sink.is_open() {
                    return Ok(self.end(SubscriptionEnd::SinkClosed));
                }
            }
            if !self.unacked.is_empty() && Instant::now() >= answer_by {
                return Err(self.failed(&BusError::TimedOut("ack")));
            }
        }
    }

    fn end(&mut self, end: SubscriptionEnd) -> BusSubscribeOutcome {
        self.sink.caught_up();
        self.outcome.end = end;
        self.outcome.clone()
    }

    fn hear(&mut self, frame: Frame) -> Result<()> {
        match frame {
            Frame::Delivery(message) => {
                self.outcome.messages += 1;
                self.outcome.last_seq = Some(message.seq);
                self.sink.message(&message);
            }
            Frame::Gap { from, to } => {
                let missing = to.saturating_sub(from).saturating_add(1);
                self.outcome.missing = self.outcome.missing.saturating_add(missing);
                self.sink.gap(from, to);
            }
            Frame::Ack(Ack {
                id: Some(id),
                seq,
                refused,
                ..
            }) => {
                let Some(at) = self.unacked.iter().position(|(asked, _)| *asked == id) else {
                    return Ok(());
                };
                let (_, topic) = self.unacked.swap_remove(at);
                if let Some(reason) = refused {
                    let what = format!("can't subscribe to {topic}");
                    let error = BusError::Refused(reason);
                    return Err(failed(&what, &self.options.project, &error));
                }
                if self.unacked.is_empty() {
                    self.sink.subscribed(seq);
                }
            }
            Frame::Ack(_) | Frame::Close { .. } | Frame::Unknown { .. } => {}
        }
        Ok(())
    }

    fn failed(&mut self, error: &BusError) -> Failure {
        self.sink.caught_up();
        let what = match self.outcome.messages {
            0 => "the subscription ended".to_owned(),
            1 => "the subscription ended after 1 message".to_owned(),
            count => format!("the subscription ended after {count} messages"),
        };
        let failure = failed(&what, &self.options.project, error);
        let Some(last) = self.outcome.last_seq else {
            return failure;
        };
        let next = failure
            .next
            .clone()
            .map(|next| format!("; {next}"))
            .unwrap_or_default();
        failure.advice(format!(
            "--from {} goes on where this ended{next}",
            last.saturating_add(1)
        ))
    }
}
