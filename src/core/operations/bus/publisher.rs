//! The publishing loop: a window of messages in flight, and what is known of each if it ends early.
//!
//! Here: one loop over the broker's socket and the input, with bounded memory. Not here: the operation around
//! it (`publish`), valid payloads (`payload`), reading lines (`stdin_lines`).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use serde_json::json;

use super::payload::check_payload;
use super::publish::{BusPublishOutcome, NotPublished};
use super::stdin_lines::{Line, StdinLines};
use super::{ANSWER_LIMIT, BusProject, POLL_INTERVAL, failed, interrupted, refusal};
use crate::core::bus::client::WaitEnd;
use crate::core::bus::client_frame::{Ack, Frame, Request};
use crate::core::bus::{BusError, Client};
use crate::core::cancel::Cancel;
use crate::core::events::{Event, Severity};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::reporter::Emitter;

/// Messages in flight at most. The broker's throughput grows little beyond a thousand, and the
/// acks of so many stay far below what it queues for one session.
const MAX_IN_FLIGHT: usize = 4096;

/// Bytes in flight at most. A larger message is sent alone.
const MAX_BYTES_IN_FLIGHT: usize = 1024 * 1024;

/// How many lines that could not be published are named; others are counted.
const MAX_NAMED: usize = 20;

/// Where messages come from.
pub(super) enum PayloadSource {
    One(Option<String>),
    Lines(StdinLines),
}

impl PayloadSource {
    fn is_over(&self) -> bool {
        match self {
            PayloadSource::One(payload) => payload.is_none(),
            PayloadSource::Lines(lines) => lines.is_over(),
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            PayloadSource::One(_) => None,
            PayloadSource::Lines(lines) => lines.descriptor(),
        }
    }
}

/// A message that has yet to be acked.
struct InFlight {
    line: u64,
    /// Of its whole frame.
    bytes: usize,
    /// Of its payload.
    payload: usize,
}

/// Why publishing ended before everything was acked.
enum EarlyEnd {
    Session(BusError),
    NoAck,
    Input(io::Error),
    Interrupted,
}

impl From<BusError> for EarlyEnd {
    fn from(error: BusError) -> EarlyEnd {
        EarlyEnd::Session(error)
    }
}

/// The loop's state: the window, and what is known of each message.
pub(super) struct Publisher<'p, 'r> {
    client: Client,
    source: PayloadSource,
    topic: &'p str,
    longest: usize,
    cancel: &'p Cancel,
    emitter: &'p Emitter<'r>,
    in_flight: BTreeMap<u64, InFlight>,
    bytes_in_flight: usize,
    /// If no ack comes until then, publishing ends.
    ack_by: Instant,
    outcome: BusPublishOutcome,
}

impl<'p, 'r> Publisher<'p, 'r> {
    pub(super) fn new(
        client: Client,
        source: PayloadSource,
        topic: &'p str,
        longest: usize,
        cancel: &'p Cancel,
        emitter: &'p Emitter<'r>,
    ) -> Publisher<'p, 'r> {
        Publisher {
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
                bytes: 0,
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

    /// Sends everything and waits for all acks, or returns how far it came.
    pub(super) fn run(mut self, project: &BusProject) -> BusPublishOutcome {
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

    fn pump(&mut self) -> Result<(), EarlyEnd> {
        loop {
            while let Some(frame) = self.client.buffered_frame()? {
                self.on_frame(frame);
            }
            self.fill();
            if self.in_flight.is_empty() && self.source.is_over() {
                return Ok(());
            }
            if self.cancel.is_requested() {
                return Err(EarlyEnd::Interrupted);
            }
            let mut until = Instant::now() + POLL_INTERVAL;
            if !self.in_flight.is_empty() {
                if Instant::now() >= self.ack_by {
                    return Err(EarlyEnd::NoAck);
                }
                until = until.min(self.ack_by);
            }
            let other = self.source.descriptor().filter(|_| self.has_room());
            match self.client.wait(until, other)? {
                WaitEnd::Frame(frame) => self.on_frame(frame),
                WaitEnd::Other => {
                    if let PayloadSource::Lines(lines) = &mut self.source {
                        lines.read().map_err(EarlyEnd::Input)?;
                    }
                }
                WaitEnd::Timeout => {}
            }
        }
    }

    fn has_room(&self) -> bool {
        self.in_flight.len() < MAX_IN_FLIGHT && self.bytes_in_flight < MAX_BYTES_IN_FLIGHT
    }

    /// Queues lines that were read, as far as the window allows.
    fn fill(&mut self) {
        while self.has_room() {
            let (line, payload) = match &mut self.source {
                PayloadSource::One(payload) => match payload.take() {
                    Some(payload) => (1, Ok(payload)),
                    None => return,
                },
                PayloadSource::Lines(lines) => match lines.next_line() {
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
            reply: None,
            id,
        });
        let bytes = self.client.unsent() - before;
        self.bytes_in_flight += bytes;
        let payload = payload.len();
        self.in_flight.insert(id, InFlight { line, bytes, payload });
    }

    fn on_frame(&mut self, frame: Frame) {
        let Frame::Ack(Ack {
            id: Some(id),
            seq,
            refused,
            detail,
            ..
        }) = frame
        else {
            return;
        };
        let Some(InFlight { line, bytes, payload }) = self.in_flight.remove(&id) else {
            return;
        };
        self.bytes_in_flight -= bytes;
        self.ack_by = Instant::now() + ANSWER_LIMIT;
        match refused {
            None => {
                self.outcome.acked += 1;
                self.outcome.bytes += payload as u64;
                self.outcome.first_seq = self.outcome.first_seq.or(seq);
                self.outcome.last_seq = seq.or(self.outcome.last_seq);
            }
            Some(reason) => {
                let why = match detail.as_deref().or(refusal(&reason)) {
                    Some(meaning) => format!("the broker refused it: {reason} ({meaning})"),
                    None => format!("the broker refused it: {reason}"),
                };
                self.not_published(line, why);
            }
        }
    }

    fn not_published(&mut self, line: u64, reason: String) {
        self.outcome.not_published_count += 1;
        if self.outcome.not_published.len() >= MAX_NAMED {
            return;
        }
        if let PayloadSource::Lines(_) = self.source {
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

    /// The failure if everything was answered, but not everything acked.
    fn incomplete(&self) -> Option<Failure> {
        let bad = self.outcome.not_published_count;
        let first = self.outcome.not_published.first()?;
        if let PayloadSource::One(_) = self.source {
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
        Some(match bad > MAX_NAMED as u64 {
            true => failure.because(format!("the first {MAX_NAMED} of them are named above")),
            false => failure,
        })
    }

    /// The failure of an early end: it says what is known of each message, which a sender needs to go on
    /// without losing any.
    fn early(&self, early: &EarlyEnd, project: &BusProject) -> Failure {
        let what = match self.source {
            PayloadSource::One(_) => "the message was not acked".to_owned(),
            PayloadSource::Lines(_) => format!("only {} acked", messages(self.outcome.acked)),
        };
        let failure = match early {
            EarlyEnd::Session(error) => failed(&what, project, error),
            EarlyEnd::NoAck => failed(&what, project, &BusError::TimedOut("ack")),
            EarlyEnd::Input(error) => {
                Failure::new(Exit::Io, "can't read what is to be published").because(error)
            }
            EarlyEnd::Interrupted => interrupted(),
        };
        let next = failure
            .next
            .as_ref()
            .map(|next| format!("; {next}"))
            .unwrap_or_default();
        let PayloadSource::Lines(lines) = &self.source else {
            return failure.advice(format!(
                "the message may or may not be in the log; `castra bus tail` shows what the log holds{next}"
            ));
        };
        let unsure: Vec<u64> = self.in_flight.values().map(|sent| sent.line).collect();
        let last_sent = lines.number();
        let (known, go_on) = match (unsure.iter().min(), unsure.iter().max()) {
            (Some(first), Some(last)) => (
                format!(
                    "of lines {first} to {last}, {} sent and not acked: they may or may not be in the log; no line after \
                     {last_sent} was sent",
                    messages(unsure.len() as u64)
                ),
                *first,
            ),
            _ => (format!("no line after {last_sent} was sent"), last_sent + 1),
        };
        failure.advice(format!(
            "{known}. To go on: tail -n +{go_on} FILE | castra bus publish --topic {} -{next}",
            self.topic
        ))
    }
}

/// The outcome in one line.
pub(super) fn published(outcome: &BusPublishOutcome) -> String {
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
