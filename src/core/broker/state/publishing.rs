//! What the frames of a session do: publish, subscribe, heartbeat (docs/PROTOCOL.md).
//!
//! Here: how frames fill the batch, and the broker's own messages. Not here: frames as bytes
//! (`broker::frame`), who gets what after the commit (`super::commit`).

use std::ops::Range;

use crate::core::broker::attempts::log_prefix;
use crate::core::broker::frame::{Answer, Burst, Frame, RefusalReason, Terms};
use crate::core::bus::line::MAX_SEQ;
use crate::core::bus::topic::Pattern;
use crate::core::events::Event;
use crate::core::name::VmName;

use super::batch::{Message, Op, PublishFields, sender_fields, with_time};
use super::session::CloseReason;
use super::topics::{BROKER_PREFIX, VM_PREFIX, name_in, names_vm};
use super::{ConnId, Effect, Peer, State, Timestamp, freshness};

/// How a topic is spelled.
#[derive(PartialEq)]
enum Spelling {
    /// As it should be.
    Same,
    /// The project spells it so.
    Another(String),
    /// It names a VM that the project doesn't have.
    Unknown,
}

/// A VM's allowance of publishes, in thousandths of a publish.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    left: u64,
    pub(super) at_ms: u64,
}

impl State {
    pub(super) fn on_frames(&mut self, at: Timestamp, conn: ConnId, burst: Burst, out: &mut Vec<Effect>) {
        let deliver = !self.index.is_empty() || self.batch.subscribes;
        let mut awaits_delivery = false;
        let Some(session) = self.session_mut(conn) else {
            return;
        };
        session.heard_ms = at.boot_ms;
        session.has_sent_frame = true;
        if burst.replays() || (session.behind && burst.subscribes()) {
            session.awaits_delivery = true;
            awaits_delivery = true;
        }
        let (key, vm, head, id) = (
            session.reader.key.clone(),
            session.vm.clone(),
            with_time(&session.line_fields, at.wall_ms),
            session.id.clone(),
        );
        if awaits_delivery {
            self.awaiting_delivery.push(conn);
        }
        let Burst { text, frames, .. } = burst;
        let texts = self.batch.texts.len();
        self.batch.reserve(frames.len(), text.len(), deliver);
        let mut activity = freshness::BusActivity::default();
        for frame in frames {
            match frame {
                Frame::Publish {
                    topic,
                    payload,
                    reply,
                    id: echo,
                } => {
                    let allowed = self.may_publish(at, &key, &text[topic.clone()]);
                    let allowed = allowed.and_then(|()| self.may_ask_replies(conn, &text[reply.clone()]));
                    if let Err(reason) = allowed {
                        let answer = Answer {
                            kind: "\"publish\"",
                            id: &text[echo],
                            refused: Some(reason),
                            ..Answer::default()
                        };
                        self.queue_refusal(at, conn, &answer, out);
                        continue;
                    }
                    activity.published = true;
                    let fields = PublishFields {
                        head: &head,
                        topic: &text[topic],
                        payload: &text[payload],
                        reply: &text[reply],
                    };
                    let deliver = deliver || self.batch.subscribes;
                    let origin = (Some(conn), texts, echo);
                    self.publish(&vm, fields, origin, deliver);
                }
                Frame::Subscribe { pattern, terms, id } => {
                    self.queue_subscribe(at, conn, pattern, terms, id, out)
                }
                Frame::Unsubscribe { pattern, id } => {
                    self.batch.ops.push(Op::Unsubscribe {
                        conn,
                        pattern: self.spelled(pattern),
                        id,
                    });
                }
                Frame::Ack { seq } => activity.acked = seq.or(activity.acked),
                Frame::Heartbeat { metrics, id } => {
                    activity.heartbeat = Some(metrics);
                    let answer = Answer {
                        kind: "\"heartbeat\"",
                        id: id.as_bytes(),
                        ..Answer::default()
                    };
                    self.queue_answer(conn, &answer);
                }
                Frame::Bad {
                    kind,
                    id,
                    reason,
                    detail,
                } => {
                    let answer = Answer {
                        kind: &kind,
                        id: id.as_bytes(),
                        refused: Some(reason),
                        detail: &detail,
                        ..Answer::default()
                    };
                    self.queue_refusal(at, conn, &answer, out);
                }
                Frame::Broken { length } => {
                    out.push(Effect::Log(format!(
                        "{} frame of vm:{vm} session={id} length={length} is beyond max_frame_bytes",
                        log_prefix(at.wall_ms, "WARN")
                    )));
                    let cause = CloseReason::ProtocolError;
                    self.batch.ops.push(Op::End { conn, cause });
                }
            }
        }
        self.batch.texts.push(text);
        self.note_bus_activity(at, &key, activity, out);
    }

    /// Whether a VM may publish on this topic now.
    fn may_publish(&mut self, at: Timestamp, key: &str, topic: &[u8]) -> Result<(), RefusalReason> {
        if topic.starts_with(BROKER_PREFIX.as_bytes()) {
            return Err(RefusalReason::Forbidden);
        }
        if topic.starts_with(VM_PREFIX.as_bytes()) && !std::str::from_utf8(topic).is_ok_and(names_vm) {
            return Err(RefusalReason::BadTopic);
        }
        if !self.log_open || self.last_given_seq >= MAX_SEQ {
            return Err(RefusalReason::StorageError);
        }
        let rate = u64::from(self.rules.bus.publishes_per_sec_per_vm);
        if rate == 0 || key == "host" {
            return Ok(());
        }
        // The allowance of one second may be used at once.
        let full = rate * 1000;
        let allowance = self.allowances.entry(key.to_owned()).or_insert(Allowance {
            left: full,
            at_ms: at.boot_ms,
        });
        let earned = at.boot_ms.saturating_sub(allowance.at_ms).saturating_mul(rate);
        allowance.left = allowance.left.saturating_add(earned).min(full);
        allowance.at_ms = at.boot_ms;
        match allowance.left.checked_sub(1000) {
            Some(left) => {
                allowance.left = left;
                Ok(())
            }
            None => Err(RefusalReason::RateLimit),
        }
    }

    /// Whether replies may be asked for on this topic. A guest must name a topic of its own: who
    /// replies publishes there, and must not be led to publish where others read.
    fn may_ask_replies(&self, conn: ConnId, topic: &[u8]) -> Result<(), RefusalReason> {
        if topic.is_empty() {
            return Ok(());
        }
        let topic = std::str::from_utf8(topic).map_err(|_| RefusalReason::BadTopic)?;
        if !names_vm(topic) {
            return Err(RefusalReason::BadTopic);
        }
        let own = self.session(conn).is_some_and(|session| {
            session.reader.owns(topic)
                || (session.reader.peer == Peer::Host && !topic.starts_with(BROKER_PREFIX))
        });
        if own {
            Ok(())
        } else {
            Err(RefusalReason::Forbidden)
        }
    }

    /// Gives a message its number and puts it into the batch.
    fn publish(
        &mut self,
        vm: &VmName,
        fields: PublishFields<'_>,
        origin: (Option<ConnId>, usize, Range<usize>),
        deliver: bool,
    ) {
        let spelling = self.spelling_of(fields.topic);
        let fields = match &spelling {
            Spelling::Another(topic) => PublishFields {
                topic: topic.as_bytes(),
                ..fields
            },
            Spelling::Same | Spelling::Unknown => fields,
        };
        self.last_given_seq += 1;
        let seq = self.last_given_seq;
        let sender = self.batch.sender(vm);
        let (line, topic, payload, frame) = self.batch.lay_out(seq, fields, deliver);
        let (conn, text, id) = origin;
        self.batch.ops.push(Op::Message(Message {
            conn,
            sender,
            seq,
            topic,
            payload,
            line,
            frame,
            text,
            id,
            to_unknown_vm: spelling == Spelling::Unknown,
        }));
    }

    /// How the project spells a topic such as `vm:web-0`, whatever its case.
    fn spelling_of(&self, topic: &[u8]) -> Spelling {
        let rest = topic.strip_prefix(VM_PREFIX.as_bytes());
        let (Some(rest), Some(table)) = (rest, self.table.as_ref()) else {
            return Spelling::Same;
        };
        let Ok(rest) = std::str::from_utf8(rest) else {
            return Spelling::Same;
        };
        let name = name_in(rest);
        match table.get(&name.to_ascii_lowercase()) {
            None if name.eq_ignore_ascii_case("host") => Spelling::Same,
            None => Spelling::Unknown,
            Some(listed) if listed.name.as_str() == name => Spelling::Same,
            Some(listed) => Spelling::Another(format!("{VM_PREFIX}{}{}", listed.name, &rest[name.len()..])),
        }
    }

    fn spelled(&self, pattern: Pattern) -> Pattern {
        match self.spelling_of(pattern.as_str().as_bytes()) {
            Spelling::Another(topic) => topic.parse().unwrap_or(pattern),
            Spelling::Same | Spelling::Unknown => pattern,
        }
    }

    fn queue_subscribe(
        &mut self,
        at: Timestamp,
        conn: ConnId,
        pattern: Pattern,
        terms: Terms,
        id: String,
        out: &mut Vec<Effect>,
    ) {
        let pattern = self.spelled(pattern);
        let Some(session) = self.session(conn) else {
            return;
        };
        if session.reader.may_subscribe(&pattern) {
            self.batch.subscribes = true;
            self.batch.ops.push(Op::Subscribe {
                conn,
                pattern,
                terms,
                id,
            });
            return;
        }
        let answer = Answer {
            kind: "\"subscribe\"",
            id: id.as_bytes(),
            topic: Some(pattern.as_str()),
            refused: Some(RefusalReason::Forbidden),
            ..Answer::default()
        };
        self.queue_refusal(at, conn, &answer, out);
    }

    pub(super) fn queue_answer(&mut self, conn: ConnId, answer: &Answer<'_>) {
        let mut frame = Vec::new();
        answer.render(&mut frame);
        self.batch.ops.push(Op::Answer { conn, frame });
    }

    /// Refuses a frame: an answer to the client and a line in the log.
    pub(super) fn queue_refusal(
        &mut self,
        at: Timestamp,
        conn: ConnId,
        answer: &Answer<'_>,
        out: &mut Vec<Effect>,
    ) {
        self.queue_answer(conn, answer);
        if let Some(reason) = answer.refused {
            self.report_refusal(at, conn, answer.kind, reason, out);
        }
    }

    /// Publishes an event's fields as the broker's own message on `castra/<family>/<vm>`, for VMs
    /// that the project knows.
    pub(super) fn publish_own(&mut self, at: Timestamp, family: &str, vm: &VmName, event: &Event) {
        let known = self.table.as_ref().and_then(|table| table.get(&vm.key()));
        if known.is_none() || !self.log_open || self.last_given_seq >= MAX_SEQ {
            return;
        }
        let fields = event.fields().expect("events are plain data with text keys");
        let topic = format!("{BROKER_PREFIX}{family}/{vm}");
        let broker = self.broker.clone();
        let fields = PublishFields {
            head: &with_time(&sender_fields(broker.as_str()), at.wall_ms),
            topic: topic.as_bytes(),
            payload: fields.as_bytes(),
            reply: b"",
        };
        let deliver = !self.index.is_empty() || self.batch.subscribes;
        self.publish(&broker, fields, (None, 0, 0..0), deliver);
    }
}
