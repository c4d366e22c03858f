//! `bus subscribe`: messages as they come, or from a number on, until the caller has enough.
//!
//! Here: the subscriptions of one session, and the failure at its end. Not here: the session
//! (`core::bus::client`). A session that ended isn't opened again: a caller can subscribe again from the
//! number after the last one.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::payload::unknown_vm_in;
use super::{ANSWER_LIMIT, BrokerAccess, BusProject, BusSink, POLL_INTERVAL, failed};
use crate::core::broker::launcher::{self, BrokerLauncher};
use crate::core::bus::BusError;
use crate::core::bus::client::{Client, WaitEnd};
use crate::core::bus::client_frame::{Ack, Frame, Request};
use crate::core::bus::topic::Pattern;
use crate::core::cancel::Cancel;
use crate::core::events::{Event, Severity};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::name::VmName;
use crate::core::reporter::{Emitter, Reporter};

/// How long the broker's account of a session's end is waited for, and how often it is looked for.
const END_REASON_TIMEOUT: Duration = Duration::from_secs(1);
const END_REASON_POLL: Duration = Duration::from_millis(20);

/// How much of the end of the broker's journal is read.
const END_REASON_BYTES: u64 = 256 * 1024;

/// The options of `bus subscribe`.
pub struct BusSubscribeOptions {
    /// Whose bus.
    pub project: BusProject,
    /// Which messages; at least one pattern.
    pub topics: Vec<Pattern>,
    /// The first number wanted; `None`: from now on.
    pub from: Option<u64>,
    /// The newest message of each topic first, as far as the log goes back.
    pub last: bool,
    /// Share the subscriptions with whoever else names this group: each message goes to one of them.
    /// Takes neither `from` nor `last`.
    pub group: Option<VmName>,
    /// How many messages are wanted; `None`: no limit.
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
            last: false,
            group: None,
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
    /// Messages passed on.
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
    /// All wanted messages came.
    Count,
    /// Nobody wants more.
    SinkClosed,
    /// It was asked to stop.
    Cancelled,
}

/// Passes on messages until there were `count`, the sink closes or `cancel` is raised. If the broker ends the
/// session, that is a failure, which names the number to continue from.
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
    if options.group.is_some() && (options.from.is_some() || options.last) {
        return Err(
            Failure::new(Exit::Usage, "a group takes neither --from nor --last")
                .because("a group gets only new messages, and each goes to one of its members")
                .advice("read the past without --group"),
        );
    }
    let emitter = Emitter::new(reporter);
    for topic in &options.topics {
        if let Some(stranger) = unknown_vm_in(&options.project, topic.as_str()) {
            let text = format!("{topic} is for messages to vm `{stranger}`, and the project has no such VM");
            emitter.emit(Event::message(Severity::Warn, None, text));
        }
    }
    let access = BrokerAccess {
        broker,
        wait: options.wait,
        cancel: &options.cancel,
    };
    access.check(&options.project)?;
    let client = access.session(&options.project, &mut |event| emitter.emit(event))?;
    Subscriber {
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

struct Subscriber<'o, 's> {
    client: Client,
    /// The subscriptions that the broker has yet to answer.
    unacked: Vec<(u64, Pattern)>,
    outcome: BusSubscribeOutcome,
    options: &'o BusSubscribeOptions,
    sink: &'s mut dyn BusSink,
}

impl Subscriber<'_, '_> {
    fn run(mut self) -> Result<BusSubscribeOutcome> {
        for topic in &self.options.topics {
            let id = self.client.new_id();
            self.client.queue(Request::Subscribe {
                topic,
                from: self.options.from,
                last: self.options.last,
                group: self.options.group.as_ref().map(VmName::as_str),
                id,
            });
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
            // Frames of the last read come first; output is due only before a wait.
            let frame = match self.client.buffered_frame() {
                Ok(Some(frame)) => Some(frame),
                Ok(None) => {
                    self.sink.caught_up();
                    if !self.sink.is_open() {
                        return Ok(self.end(SubscriptionEnd::SinkClosed));
                    }
                    if self.options.cancel.is_requested() {
                        return Ok(self.end(SubscriptionEnd::Cancelled));
                    }
                    match self.client.wait(Instant::now() + POLL_INTERVAL, None) {
                        Ok(WaitEnd::Frame(frame)) => Some(frame),
                        Ok(WaitEnd::Other | WaitEnd::Timeout) => None,
                        Err(error) => return Err(self.failed(&error)),
                    }
                }
                Err(error) => return Err(self.failed(&error)),
            };
            if let Some(frame) = frame {
                self.on_frame(frame)?;
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

    fn on_frame(&mut self, frame: Frame) -> Result<()> {
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
                detail,
                ..
            }) => {
                let Some(at) = self.unacked.iter().position(|(asked, _)| *asked == id) else {
                    return Ok(());
                };
                let (_, topic) = self.unacked.swap_remove(at);
                if let Some(reason) = refused {
                    let what = format!("can't subscribe to {topic}");
                    let error = BusError::Refused(reason);
                    let failure = failed(&what, &self.options.project, &error);
                    return Err(match detail {
                        Some(detail) => failure.advice(detail),
                        None => failure,
                    });
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
        let failure = match error {
            // The session ended without a reason: the broker's journal has it, if the broker still runs to
            // write it.
            BusError::Ended | BusError::Broken(_) => cut_off(&what, self.options, self.client.session())
                .unwrap_or_else(|| failed(&what, &self.options.project, error)),
            _ => failed(&what, &self.options.project, error),
        };
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

/// Why the broker cut this session off, by its journal, which it writes a moment after it has closed the
/// connection.
fn cut_off(what: &str, options: &BusSubscribeOptions, session: &str) -> Option<Failure> {
    let journal = options.project.state.broker_events();
    let look = || end_of_session(&journal, session);
    let reason = options
        .cancel
        .wait_for(END_REASON_TIMEOUT, END_REASON_POLL, look)?;
    let failure = Failure::new(Exit::Failed, what);
    Some(match reason.as_str() {
        "slow-consumer" => failure
            .because(
                "the broker cut this session off as a slow consumer: more than \
                 `outbound_queue_bytes` under [bus] were waiting for it",
            )
            .advice("read faster, or raise `outbound_queue_bytes`"),
        reason => failure.because(format!("the broker ended the session: {reason}")),
    })
}

/// The reason for a session's end, from the end of the broker's journal.
fn end_of_session(journal: &Path, session: &str) -> Option<String> {
    let mut file = host::open_state_file(journal).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(END_REASON_BYTES)))
        .ok()?;
    let mut bytes = Vec::new();
    file.take(END_REASON_BYTES).read_to_end(&mut bytes).ok()?;
    let lines = bytes.split(|byte| *byte == b'\n').rev();
    let mut events = lines.filter_map(|line| serde_json::from_slice::<Value>(line).ok());
    let told = events.find(|event| {
        event["type"] == "broker.session" && event["session"] == session && event["phase"] == "closed"
    })?;
    told["reason"].as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;

    #[test]
    fn the_journal_tells_how_a_session_ended() {
        let scratch = Scratch::new("bus-account");
        let path = scratch.path("events.jsonl");
        assert_eq!(end_of_session(&path, "s-1"), None);
        let line = |session: &str, phase: &str, reason: &str| {
            format!(
                "{{\"type\":\"broker.session\",\"session\":\"{session}\",\"phase\":\"{phase}\",\"reason\":{reason}}}\n"
            )
        };
        let noise = "x".repeat(usize::try_from(END_REASON_BYTES).unwrap());
        let text = [
            line("s-0", "closed", "\"idle\""),
            noise,
            "\n".to_owned(),
            line("s-1", "opened", "null"),
            line("s-1", "closed", "\"slow-consumer\""),
            line("s-2", "closed", "\"idle\""),
            "{\"type\":\"bro".to_owned(),
        ];
        std::fs::write(&path, text.concat()).unwrap();
        assert_eq!(end_of_session(&path, "s-1").as_deref(), Some("slow-consumer"));
        assert_eq!(end_of_session(&path, "s-0"), None, "too far back");
        assert_eq!(end_of_session(&path, "s-9"), None);
    }
}
