//! `bus publish`: one message, or one for each line of a stream, and their acks.
//!
//! Here: what may be published, the window of messages in flight, who was acked when it ends
//! early. Not here: the session (`core::bus::client`), reading lines (`input`).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;
use serde_json::value::RawValue;

use super::input::{Input, Line, Lines};
use super::{ANSWER_LIMIT, Access, BusProject, LOOK_EVERY, failed, interrupted, refusal};
use crate::core::broker::launcher::{self, BrokerLauncher};
use crate::core::bus::client::Woken;
use crate::core::bus::frame::{Ack, Frame, HEAD_BYTES, Request};
use crate::core::bus::message::one_line;
use crate::core::bus::topic::{MAX_TOPIC_BYTES, Topic};
use crate::core::bus::{BusError, Client};
use crate::core::cancel::Cancel;
use crate::core::events::{Event, Severity, VmCounts};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::operations::run::Operation;
use crate::core::reporter::{Emitter, Reporter};

/// Messages in flight at most. The broker's throughput grows little beyond a thousand, and the
/// acks of so many stay far below what it queues for one session.
const MOST_IN_FLIGHT: usize = 4096;

/// Their bytes. One message that is larger goes alone.
const MOST_BYTES_IN_FLIGHT: usize = 1024 * 1024;

/// So many lines that could not be published are named one by one; the others are counted.
const MOST_NAMED: usize = 20;

/// The topic where none is given (DESIGN §6).
pub const USUAL_TOPIC: &str = "broadcast";

/// What a `publish` is asked for.
pub struct BusPublishOptions {
    /// Whose bus.
    pub project: BusProject,
    /// What it is about; `None`: `broadcast`.
    pub topic: Option<String>,
    /// What is said.
    pub payload: Payload,
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

/// What became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BusPublishOutcome {
    /// The topic.
    pub topic: String,
    /// Messages that the broker has kept.
    pub acked: u64,
    /// The first number one of them got.
    pub first_seq: Option<u64>,
    /// The last.
    pub last_seq: Option<u64>,
    /// Messages sent and neither acked nor refused: they may have been kept or not.
    pub unknown: u64,
    /// Lines that were no message or were refused, the first few of them.
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

/// A line that did not become a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotPublished {
    /// Its number, counted from 1.
    pub line: u64,
    /// Why.
    pub reason: String,
}

/// Publishes and waits for the acks, each for at most [`ANSWER_LIMIT`]. What can't be published
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
    let topic = options.topic.unwrap_or_else(|| USUAL_TOPIC.to_owned());
    check_topic(&topic)?;
    let longest = project.bus().max_frame_bytes;
    let source = match options.payload {
        Payload::One(payload) => Source::One(Some(
            check_payload(payload.as_bytes(), &topic, longest).map_err(|why| not_json(&payload, &why))?,
        )),
        Payload::Lines(input) => Source::Lines(Lines::new(input, longest)),
    };
    let access = Access {
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
    let outcome = Publishing::new(client, source, &topic, longest, &options.cancel, emitter).run(project);
    let detail = match &outcome.failure {
        Some(failure) => failure.cause(),
        None => published(&outcome),
    };
    operation.end(outcome.exit, Some(detail), VmCounts::default(), 0);
    Ok(outcome)
}

/// Refuses what is no topic to publish on.
pub(super) fn check_topic(topic: &str) -> Result<()> {
    let bad = |why: String| {
        Err(
            Failure::new(Exit::Usage, format!("{topic:?} is no topic to publish on"))
                .because(why)
                .advice(
                    "use 1 to 128 of A-Z a-z 0-9 . _ : / -, such as ci/build; the usual one is broadcast",
                ),
        )
    };
    if topic.len() > MAX_TOPIC_BYTES {
        return bad(format!("it has {} bytes", topic.len()));
    }
    if !Topic::is_valid(topic) {
        let odd = topic
            .chars()
            .find(|c| !c.is_ascii() || !Topic::is_valid(&c.to_string()));
        return bad(match odd {
            Some('*') => "only subscriptions may end in `*`".to_owned(),
            Some(odd) => format!("it holds {odd:?}"),
            None => "it is empty".to_owned(),
        });
    }
    if topic.starts_with("castra/") {
        return bad("topics that begin with castra/ are the broker's own".to_owned());
    }
    Ok(())
}

fn not_json(payload: &str, why: &str) -> Failure {
    // A word that a shell has stripped of its quotes is what most get wrong.
    let shown: String = payload.chars().take(40).collect();
    let is_word = !payload.trim_start().starts_with(['{', '[', '"']) && payload.len() == shown.len();
    let failure = Failure::new(Exit::Usage, format!("the payload can't be {shown:?}")).because(why);
    if is_word && !payload.is_empty() && !payload.contains(['\'', '"', '\\']) {
        failure.advice(format!(
            "a text needs quotes of its own inside the shell's: --payload '\"{payload}\"'"
        ))
    } else {
        failure
            .advice("put it into single quotes, as in --payload '{\"state\": \"ready\", \"load\": [0.1, 2]}'")
    }
}

/// The payload on one line if it is JSON and fits into a frame; else what is wrong.
fn check_payload(bytes: &[u8], topic: &str, longest: usize) -> Result<String, String> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| format!("it is no UTF-8, from byte {} on", error.valid_up_to() + 1))?;
    serde_json::from_str::<&RawValue>(text)
        .map_err(|error| format!("it is no JSON: {}", in_words(&error)))?;
    let bytes = frame_bytes(topic, text);
    if bytes > longest {
        return Err(format!(
            "its frame has {bytes} bytes, more than the {longest} of `max_frame_bytes` under [bus]"
        ));
    }
    Ok(one_line(text.trim()).into_owned())
}

fn in_words(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let what = text.strip_suffix(&place).unwrap_or(&text);
    match error.line() {
        1 => format!("{what}, column {}", error.column()),
        line => format!("{what}, line {line} column {}", error.column()),
    }
}

/// What the frame of a publish takes, its number at its longest.
fn frame_bytes(topic: &str, payload: &str) -> usize {
    let mut empty = Vec::new();
    let (topic_bytes, id) = (topic.len(), u64::MAX);
    Request::Publish {
        topic: "",
        payload: "",
        id,
    }
    .render(&mut empty);
    empty.len() - HEAD_BYTES + topic_bytes + payload.len()
}

enum Source {
    One(Option<String>),
    Lines(Lines),
}

impl Source {
    fn is_over(&self) -> bool {
        match self {
            Source::One(payload) => payload.is_none(),
            Source::Lines(lines) => lines.is_over(),
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Source::One(_) => None,
            Source::Lines(lines) => lines.descriptor(),
        }
    }
}

/// A message that has yet to be acked.
struct InFlight {
    line: u64,
    bytes: usize,
}

/// Why it ended before everything was acked.
enum Early {
    Session(BusError),
    NoAck,
    Input(io::Error),
    Interrupted,
}

impl From<BusError> for Early {
    fn from(error: BusError) -> Early {
        Early::Session(error)
    }
}

struct Publishing<'p, 'r> {
    client: Client,
    source: Source,
    topic: &'p str,
    longest: usize,
    cancel: &'p Cancel,
    emitter: &'p Emitter<'r>,
    in_flight: BTreeMap<u64, InFlight>,
    bytes_in_flight: usize,
    /// Without an ack until then it is over.
    ack_by: Instant,
    outcome: BusPublishOutcome,
}

impl<'p, 'r> Publishing<'p, 'r> {
    fn new(
        client: Client,
        source: Source,
        topic: &'p str,
        longest: usize,
        cancel: &'p Cancel,
        emitter: &'p Emitter<'r>,
    ) -> Publishing<'p, 'r> {
        Publishing {
            // The whole of one publish, the way to the broker included, takes no longer.
            ack_by: client.began() + ANSWER_LIMIT,
            client,
            source,
            topic,
            longest,
            cancel,
            emitter,
            in_flight: BTreeMap::new(),
            bytes_in_flight: 0,
            outcome: BusPublishOutcome {
                topic: topic.to_owned(),
                acked: 0,
                first_seq: None,
                last_seq: None,
                unknown: 0,
                not_published: Vec::new(),
                not_published_count: 0,
                elapsed_ms: 0,
                exit: Exit::Done,
                failure: None,
            },
        }
    }

    fn run(mut self, project: &BusProject) -> BusPublishOutcome {
        let early = self.pump().err();
        self.outcome.unknown = self.in_flight.len() as u64;
        self.outcome.elapsed_ms = self.emitter.elapsed_ms();
        self.outcome.failure = match early {
            Some(early) => Some(self.early(&early, project)),
            None => self.incomplete(),
        };
        if let Some(failure) = &self.outcome.failure {
            self.outcome.exit = failure.exit;
        }
        if self.outcome.acked > 0 {
            let data = json!({
                "topic": self.topic,
                "acked": self.outcome.acked,
                "first_seq": self.outcome.first_seq,
                "last_seq": self.outcome.last_seq,
            });
            let mut event = Event::message(Severity::Info, None, published(&self.outcome));
            if let Event::Message { data: slot, .. } = &mut event {
                *slot = Some(data);
            }
            self.emitter.emit(event);
        }
        self.outcome
    }

    fn pump(&mut self) -> Result<(), Early> {
        loop {
            while let Some(frame) = self.client.at_hand()? {
                self.hear(frame);
            }
            self.fill();
            if self.in_flight.is_empty() && self.source.is_over() {
                return Ok(());
            }
            if self.cancel.is_requested() {
                return Err(Early::Interrupted);
            }
            let mut until = Instant::now() + LOOK_EVERY;
            if !self.in_flight.is_empty() {
                if Instant::now() >= self.ack_by {
                    return Err(Early::NoAck);
                }
                until = until.min(self.ack_by);
            }
            let other = self.source.descriptor().filter(|_| self.has_room());
            match self.client.wait(until, other)? {
                Woken::Frame(frame) => self.hear(frame),
                Woken::Other => {
                    if let Source::Lines(lines) = &mut self.source {
                        lines.read().map_err(Early::Input)?;
                    }
                }
                Woken::Time => {}
            }
        }
    }

    fn has_room(&self) -> bool {
        self.in_flight.len() < MOST_IN_FLIGHT && self.bytes_in_flight < MOST_BYTES_IN_FLIGHT
    }

    /// Puts what was read already on its way, as far as the window goes.
    fn fill(&mut self) {
        while self.has_room() {
            let (line, payload) = match &mut self.source {
                Source::One(payload) => match payload.take() {
                    Some(payload) => (1, Ok(payload)),
                    None => return,
                },
                Source::Lines(lines) => match lines.next_line() {
                    Some(Line::Whole(bytes)) => {
                        let bytes = bytes.trim_ascii();
                        if bytes.is_empty() {
                            continue;
                        }
                        (lines.number(), check_payload(bytes, self.topic, self.longest))
                    }
                    Some(Line::TooLong) => {
                        let why = format!(
                            "it is longer than the {} bytes of `max_frame_bytes` under [bus]",
                            self.longest
                        );
                        (lines.number(), Err(why))
                    }
                    None => return,
                },
            };
            match payload {
                Ok(payload) => self.send(line, &payload),
                Err(why) => self.not_published(line, why),
            }
        }
    }

    fn send(&mut self, line: u64, payload: &str) {
        if self.in_flight.is_empty() && line > 1 {
            self.ack_by = Instant::now() + ANSWER_LIMIT;
        }
        let id = self.client.new_id();
        let before = self.client.unsent();
        self.client.queue(Request::Publish {
            topic: self.topic,
            payload,
            id,
        });
        let bytes = self.client.unsent() - before;
        self.bytes_in_flight += bytes;
        self.in_flight.insert(id, InFlight { line, bytes });
    }

    fn hear(&mut self, frame: Frame) {
        let Frame::Ack(Ack {
            id: Some(id),
            seq,
            refused,
            ..
        }) = frame
        else {
            return;
        };
        let Some(InFlight { line, bytes }) = self.in_flight.remove(&id) else {
            return;
        };
        self.bytes_in_flight -= bytes;
        self.ack_by = Instant::now() + ANSWER_LIMIT;
        match refused {
            None => {
                self.outcome.acked += 1;
                self.outcome.first_seq = self.outcome.first_seq.or(seq);
                self.outcome.last_seq = seq.or(self.outcome.last_seq);
            }
            Some(reason) => {
                let why = match refusal(&reason) {
                    Some(meaning) => format!("the broker refused it: {reason} ({meaning})"),
                    None => format!("the broker refused it: {reason}"),
                };
                self.not_published(line, why);
            }
        }
    }

    fn not_published(&mut self, line: u64, reason: String) {
        self.outcome.not_published_count += 1;
        if self.outcome.not_published.len() >= MOST_NAMED {
            return;
        }
        if let Source::Lines(_) = self.source {
            let mut event = Event::message(
                Severity::Error,
                None,
                format!("line {line} was not published: {reason}"),
            );
            if let Event::Message { data, .. } = &mut event {
                *data = Some(json!({"line": line, "reason": reason}));
            }
            self.emitter.emit(event);
        }
        self.outcome.not_published.push(NotPublished { line, reason });
    }

    /// Everything was answered, but not everything was kept.
    fn incomplete(&self) -> Option<Failure> {
        let bad = self.outcome.not_published_count;
        let first = self.outcome.not_published.first()?;
        if let Source::One(_) = self.source {
            return Some(Failure::new(Exit::Failed, "the message was not published").because(&first.reason));
        }
        let failure = Failure::new(
            Exit::Failed,
            format!(
                "{} not published, {} acked",
                lines(bad),
                messages(self.outcome.acked)
            ),
        );
        Some(match bad > MOST_NAMED as u64 {
            true => failure.because(format!("the first {MOST_NAMED} of them are named above")),
            false => failure,
        })
    }

    /// What is known of each message when it ends early: that is what a sender has to know to go
    /// on without losing any.
    fn early(&self, early: &Early, project: &BusProject) -> Failure {
        let what = match self.source {
            Source::One(_) => "the message was not acked".to_owned(),
            Source::Lines(_) => format!("only {} acked", messages(self.outcome.acked)),
        };
        let failure = match early {
            Early::Session(error) => failed(&what, project, error),
            Early::NoAck => failed(&what, project, &BusError::TimedOut("ack")),
            Early::Input(error) => {
                Failure::new(Exit::Io, "can't read what is to be published").because(error)
            }
            Early::Interrupted => interrupted(),
        };
        let next = failure
            .next
            .as_ref()
            .map(|next| format!("; {next}"))
            .unwrap_or_default();
        let Source::Lines(lines) = &self.source else {
            return failure.advice(format!(
                "it may have been kept or not, `castra bus tail` shows what was{next}"
            ));
        };
        let unsure: Vec<u64> = self.in_flight.values().map(|sent| sent.line).collect();
        let last_sent = lines.number();
        let (known, go_on) = match (unsure.iter().min(), unsure.iter().max()) {
            (Some(first), Some(last)) => (
                format!(
                    "of lines {first} to {last}, {} sent and not acked: they may be kept or not; nothing behind \
                     line {last_sent} was sent",
                    messages(unsure.len() as u64)
                ),
                *first,
            ),
            _ => (format!("nothing behind line {last_sent} was sent"), last_sent + 1),
        };
        failure.advice(format!(
            "{known}. To go on: tail -n +{go_on} FILE | castra bus publish --topic {} -{next}",
            self.topic
        ))
    }
}

fn published(outcome: &BusPublishOutcome) -> String {
    let topic = &outcome.topic;
    match (outcome.acked, outcome.first_seq, outcome.last_seq) {
        (1, Some(seq), _) => format!("published on {topic} as number {seq}"),
        (count, Some(first), Some(last)) => {
            format!(
                "published {} on {topic}, numbers {first} to {last}",
                messages(count)
            )
        }
        _ => format!("nothing to publish on {topic}"),
    }
}

fn messages(count: u64) -> String {
    match count {
        1 => "1 message".to_owned(),
        count => format!("{count} messages"),
    }
}

fn lines(count: u64) -> String {
    match count {
        1 => "1 line".to_owned(),
        count => format!("{count} lines"),
    }
}

#[cfg(test)]
#[path = "publish_tests.rs"]
mod tests;
