//! What the frames of a session do: publish, subscribe, beat (DESIGN §6).
//!
//! Here: frames into the group, and the broker's own messages. Not here: frames as bytes
//! (`broker::frame`), what a kept group gives to whom (`super::settle`).

use std::ops::Range;

use crate::core::broker::attempts::line_head;
use crate::core::broker::frame::{Answer, Burst, Frame, Refused};
use crate::core::bus::topic::Pattern;
use crate::core::events::Event;
use crate::core::name::VmName;

use super::group::{Message, Op, Said, head_of, stamped};
use super::session::Cause;
use super::topics::{OWN, TO_VM, names_vm};
use super::{At, ConnId, Effect, State, heard};

/// A VM's allowance of publishes, thousandths of one.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    left: u64,
    pub(super) at_ms: u64,
}

impl State {
    pub(super) fn on_frames(&mut self, at: At, conn: ConnId, burst: Burst, out: &mut Vec<Effect>) {
        let deliver = !self.index.is_empty() || self.group.subscribes;
        let mut asks = false;
        let Some(session) = self.session_mut(conn) else {
            return;
        };
        session.heard_ms = at.boot_ms;
        if burst.replays() || (session.behind && burst.subscribes()) {
            session.asks = true;
            asks = true;
        }
        let (key, vm, head, id) = (
            session.reader.key.clone(),
            session.vm.clone(),
            stamped(&session.head, at.wall_ms),
            session.id.clone(),
        );
        if asks {
            self.asking.push(conn);
        }
        let Burst { text, frames, .. } = burst;
        let texts = self.group.texts.len();
        self.group.make_room(frames.len(), text.len(), deliver);
        let mut heard = heard::Said::default();
        for frame in frames {
            match frame {
                Frame::Publish {
                    topic,
                    payload,
                    id: echo,
                } => {
                    let refused = self.may_publish(at, &key, &text[topic.clone()]).err();
                    if let Some(reason) = refused {
                        let echo = String::from_utf8_lossy(&text[echo]).into_owned();
                        self.refuse(at, conn, "\"publish\"", &echo, None, reason, out);
                        continue;
                    }
                    heard.published = true;
                    let said = Said {
                        head: &head,
                        topic: &text[topic],
                        payload: &text[payload],
                    };
                    let deliver = deliver || self.group.subscribes;
                    let origin = (Some(conn), texts, echo);
                    self.publish(&vm, said, origin, deliver);
                }
                Frame::Subscribe { pattern, from, id } => self.ask(at, conn, pattern, from, id, out),
                Frame::Unsubscribe { pattern, id } => {
                    self.group.ops.push(Op::Unsubscribe {
                        conn,
                        pattern: self.spelled(pattern),
                        id,
                    });
                }
                Frame::Ack { seq } => heard.acked = seq.or(heard.acked),
                Frame::Heartbeat { metrics, id } => {
                    heard.beat = Some(metrics);
                    let answer = Answer {
                        kind: "\"heartbeat\"",
                        id: id.as_bytes(),
                        ..Answer::default()
                    };
                    self.say(conn, &answer);
                }
                Frame::Bad { kind, id, reason } => self.refuse(at, conn, &kind, &id, None, reason, out),
                Frame::Broken { length } => {
                    out.push(Effect::Log(format!(
                        "{} frame of vm:{vm} session={id} length={length} is beyond max_frame_bytes",
                        line_head(at.wall_ms, "WARN")
                    )));
                    let cause = Cause::ProtocolError;
                    self.group.ops.push(Op::End { conn, cause });
                }
            }
        }
        self.group.texts.push(text);
        self.heard_on_bus(at, &key, heard, out);
    }

    /// Whether a VM may publish on this topic now.
    fn may_publish(&mut self, at: At, key: &str, topic: &[u8]) -> Result<(), Refused> {
        if topic.starts_with(OWN.as_bytes()) {
            return Err(Refused::Forbidden);
        }
        if topic.starts_with(TO_VM.as_bytes()) && !std::str::from_utf8(topic).is_ok_and(names_vm) {
            return Err(Refused::BadTopic);
        }
        if !self.log_open {
            return Err(Refused::StorageError);
        }
        let rate = u64::from(self.rules.bus.publishes_per_sec_per_vm);
        if rate == 0 || key == "host" {
            return Ok(());
        }
        // A second's worth may come at once.
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
            None => Err(Refused::RateLimit),
        }
    }

    /// A message gets its number and its place in the group.
    fn publish(
        &mut self,
        vm: &VmName,
        said: Said<'_>,
        origin: (Option<ConnId>, usize, Range<usize>),
        deliver: bool,
    ) {
        let spelled = self.spelled_topic(said.topic);
        let said = match &spelled {
            Some(topic) => Said {
                topic: topic.as_bytes(),
                ..said
            },
            None => said,
        };
        self.given += 1;
        let seq = self.given;
        let sender = self.group.sender(vm);
        let (line, topic, payload, frame) = self.group.lay_out(seq, said, deliver);
        let (conn, text, id) = origin;
        self.group.ops.push(Op::Message(Message {
            conn,
            sender,
            seq,
            topic,
            payload,
            line,
            frame,
            text,
            id,
        }));
    }

    /// `vm:web-0` in the project's own spelling, so that names are the same whatever their case.
    fn spelled_topic(&self, topic: &[u8]) -> Option<String> {
        let name = std::str::from_utf8(topic.strip_prefix(TO_VM.as_bytes())?).ok()?;
        let listed = self.table.as_ref()?.get(&name.to_ascii_lowercase())?;
        (listed.name.as_str() != name).then(|| format!("{TO_VM}{}", listed.name))
    }

    fn spelled(&self, pattern: Pattern) -> Pattern {
        let spelled = self.spelled_topic(pattern.as_str().as_bytes());
        spelled.and_then(|topic| topic.parse().ok()).unwrap_or(pattern)
    }

    fn ask(
        &mut self,
        at: At,
        conn: ConnId,
        pattern: Pattern,
        from: Option<u64>,
        id: String,
        out: &mut Vec<Effect>,
    ) {
        let pattern = self.spelled(pattern);
        let Some(session) = self.session(conn) else {
            return;
        };
        if session.reader.may_ask(&pattern) {
            self.group.subscribes = true;
            self.group.ops.push(Op::Subscribe {
                conn,
                pattern,
                from,
                id,
            });
            return;
        }
        let topic = Some(pattern.as_str());
        self.refuse(at, conn, "\"subscribe\"", &id, topic, Refused::Forbidden, out);
    }

    pub(super) fn say(&mut self, conn: ConnId, answer: &Answer<'_>) {
        let mut frame = Vec::new();
        answer.render(&mut frame);
        self.group.ops.push(Op::Say { conn, frame });
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn refuse(
        &mut self,
        at: At,
        conn: ConnId,
        kind: &str,
        id: &str,
        topic: Option<&str>,
        reason: Refused,
        out: &mut Vec<Effect>,
    ) {
        let answer = Answer {
            kind,
            id: id.as_bytes(),
            topic,
            refused: Some(reason),
            ..Answer::default()
        };
        self.say(conn, &answer);
        self.tell_refusal(at, conn, kind, reason, out);
    }

    /// A message of the broker's own on `castra/<family>/<vm>`, for VMs the project knows: the
    /// fields of the event.
    pub(super) fn announce(&mut self, at: At, family: &str, vm: &VmName, event: &Event) {
        let known = self.table.as_ref().and_then(|table| table.get(&vm.key()));
        if known.is_none() || !self.log_open {
            return;
        }
        let tagged = serde_json::to_string(event).expect("events are plain data with text keys");
        let Some((_, fields)) = tagged.split_once(':') else {
            return;
        };
        let topic = format!("{OWN}{family}/{vm}");
        let broker = self.broker.clone();
        let said = Said {
            head: &stamped(&head_of(broker.as_str()), at.wall_ms),
            topic: topic.as_bytes(),
            payload: &fields.as_bytes()[..fields.len() - 1],
        };
        let deliver = !self.index.is_empty() || self.group.subscribes;
        self.publish(&broker, said, (None, 0, 0..0), deliver);
    }
}
