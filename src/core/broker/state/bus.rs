//! Sessions of the bus: what their frames do, and what a kept group gives to whom (DESIGN §6).
//!
//! Here: publishing, subscribing, falling behind and being attached, idle and slow sessions, the
//! broker's own messages. Not here: hellos (the module above), frames as bytes
//! (`broker::frame`), the log itself (`broker::buslog`).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::core::broker::attempts::line_head;
use crate::core::broker::frame::{self, Answer, Burst, Frame, Refused};
use crate::core::bus::topic::Pattern;
use crate::core::events::{Event, SessionPhase};
use crate::core::name::VmName;

use super::group::{Group, Message, Op, Said, head_of};
use super::input::{Order, Part, Plan, Wanted};
use super::topics::{OWN, Reader, TO_VM, names_vm};
use super::{At, ConnId, Effect, Phase, Plane, State};

/// Why a session ended: the word in log, event and `close` frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Its client closed the connection.
    Disconnected,
    /// No frame for too long.
    Idle,
    /// What it sent can't be trusted any more.
    ProtocolError,
    /// The broker stops.
    ShuttingDown,
    /// It doesn't take what is delivered.
    SlowConsumer,
    /// The project has no such VM any more, or has launched it anew.
    Superseded,
}

impl Cause {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::Disconnected => "disconnected",
            Cause::Idle => "idle",
            Cause::ProtocolError => "protocol-error",
            Cause::ShuttingDown => "shutting-down",
            Cause::SlowConsumer => "slow-consumer",
            Cause::Superseded => "superseded",
        }
    }

    /// Whether the client is told by a `close` frame. One that was cut off in the middle of a
    /// delivery can't be.
    fn is_told(self) -> bool {
        matches!(self, Cause::Idle | Cause::ProtocolError | Cause::ShuttingDown)
    }
}

/// One subscription.
#[derive(Clone, Debug, PartialEq)]
pub struct Sub {
    /// Its own number, never used twice in a session.
    pub number: u64,
    /// The first message it is for.
    pub first: u64,
    /// The first message it hasn't dealt with, as of the moment its session fell behind.
    pub next: u64,
}

/// A granted session.
#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    /// Its public id.
    pub id: String,
    /// Whose it is, as the project spells it.
    pub vm: VmName,
    /// What it may read.
    pub reader: Reader,
    /// When its hello came.
    pub since_ms: u64,
    /// When its last frame came.
    pub heard_ms: u64,
    head: Vec<u8>,
    subs: BTreeMap<Pattern, Sub>,
    subs_made: u64,
    /// Its deliveries come from the log, by its own thread.
    behind: bool,
    /// Its thread waits for an order.
    asks: bool,
}

impl Session {
    /// A session that has said nothing yet.
    pub fn new(id: String, vm: VmName, plane: Plane, since_ms: u64) -> Session {
        Session {
            id,
            head: head_of(vm.as_str()),
            reader: Reader { plane, key: vm.key() },
            vm,
            since_ms,
            heard_ms: since_ms,
            subs: BTreeMap::new(),
            subs_made: 0,
            behind: false,
            asks: false,
        }
    }

    /// Whether it has any subscription.
    pub fn is_subscribed(&self) -> bool {
        !self.subs.is_empty()
    }

    fn plan(&self, upto: u64) -> Plan {
        let wanted = self.subs.iter().map(|(pattern, sub)| Wanted {
            pattern: pattern.clone(),
            number: sub.number,
            first: sub.first,
            next: sub.next,
        });
        Plan {
            upto,
            reader: self.reader.clone(),
            wanted: wanted.collect(),
        }
    }
}

/// A VM's allowance of publishes, thousandths of one.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    left: u64,
    at_ms: u64,
}

/// A refused frame, to be told.
#[derive(Clone, Debug)]
pub struct Refusal {
    vm: VmName,
    session: String,
    kind: String,
    reason: Refused,
}

/// A session opened or closed, to be told.
#[derive(Clone, Debug)]
pub struct Change {
    vm: VmName,
    session: String,
    remote: String,
    closed: Option<Cause>,
}

/// What one session gets of a group.
#[derive(Default)]
struct Outgoing {
    parts: Vec<Part>,
    acks: Vec<u8>,
}

impl Outgoing {
    fn say(&mut self, bytes: &[u8]) {
        match self.parts.last_mut() {
            Some(Part::Own(own)) => own.extend_from_slice(bytes),
            _ => self.parts.push(Part::Own(bytes.to_vec())),
        }
    }

    fn deliver(&mut self, frames: &Arc<Vec<u8>>, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        match self.parts.last_mut() {
            Some(Part::Shared(_, last)) if last.end == range.start => last.end = range.end,
            _ => self.parts.push(Part::Shared(Arc::clone(frames), range)),
        }
    }
}

impl State {
    /// Something waits for a commit.
    pub fn uncommitted(&self) -> bool {
        !self.group.is_empty()
    }

    /// The last number in the log.
    pub fn last_kept(&self) -> u64 {
        self.kept
    }

    /// What waits for a commit holds so many bytes.
    pub fn uncommitted_bytes(&self) -> usize {
        self.group.bytes()
    }

    pub(super) fn session(&self, conn: ConnId) -> Option<&Session> {
        match &self.conns.get(&conn)?.phase {
            Phase::Session(session) => Some(session),
            _ => None,
        }
    }

    fn session_mut(&mut self, conn: ConnId) -> Option<&mut Session> {
        match &mut self.conns.get_mut(&conn)?.phase {
            Phase::Session(session) => Some(session),
            _ => None,
        }
    }

    /// The open sessions of a VM.
    pub(super) fn sessions_of(&self, key: &str) -> usize {
        self.vm_sessions.get(key).map_or(0, BTreeSet::len)
    }

    /// Whether a VM has a session, and one with a subscription.
    pub(super) fn bus_flags(&self, key: &str) -> (bool, bool) {
        let Some(conns) = self.vm_sessions.get(key) else {
            return (false, false);
        };
        let subscribed = |conn: &ConnId| self.session(*conn).is_some_and(Session::is_subscribed);
        (!conns.is_empty(), conns.iter().any(subscribed))
    }

    pub(super) fn open_session(&mut self, at: At, conn: ConnId, session: Session, out: &mut Vec<Effect>) {
        let Some(known) = self.conns.get_mut(&conn) else {
            return;
        };
        let change = Change {
            vm: session.vm.clone(),
            session: session.id.clone(),
            remote: known.remote.clone(),
            closed: None,
        };
        let (key, plane) = (session.reader.key.clone(), known.plane);
        known.phase = Phase::Session(Box::new(session));
        self.vm_sessions.entry(key).or_default().insert(conn);
        let places = self.places(plane);
        places.waiting.remove(&conn);
        places.sessions += 1;
        let idle = at.boot_ms + self.rules.bus.idle_ms;
        self.idle_due = Some(self.idle_due.map_or(idle, |due| due.min(idle)));
        self.tell_change(at, change, out);
    }

    /// Ends a session: its subscriptions go, and whoever watches is told. What follows for its
    /// connection is the caller's.
    pub(super) fn end_session(&mut self, at: At, conn: ConnId, cause: Cause, out: &mut Vec<Effect>) {
        let Some(known) = self.conns.get_mut(&conn) else {
            return;
        };
        if !matches!(known.phase, Phase::Session(_)) {
            return;
        }
        let Phase::Session(session) = std::mem::replace(&mut known.phase, Phase::Answered) else {
            return;
        };
        let (plane, remote) = (known.plane, known.remote.clone());
        let places = self.places(plane);
        places.sessions -= 1;
        places.answered.insert(conn);
        for pattern in session.subs.keys() {
            self.index.remove(conn, pattern);
        }
        let key = &session.reader.key;
        if let Some(conns) = self.vm_sessions.get_mut(key) {
            conns.remove(&conn);
            if conns.is_empty() {
                self.vm_sessions.remove(key);
            }
        }
        self.refresh_record(at, key);
        let change = Change {
            vm: session.vm,
            session: session.id,
            remote,
            closed: Some(cause),
        };
        self.tell_change(at, change, out);
    }

    /// Ends a session and its connection.
    pub(super) fn close_session(&mut self, at: At, conn: ConnId, cause: Cause, out: &mut Vec<Effect>) {
        if self.session(conn).is_none() {
            return;
        }
        self.end_session(at, conn, cause, out);
        out.push(match cause {
            Cause::SlowConsumer | Cause::Superseded => Effect::Drop { conn },
            _ => Effect::End {
                conn,
                last: if cause.is_told() {
                    frame::close(cause.as_str())
                } else {
                    Vec::new()
                },
            },
        });
    }

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
            std::mem::take(&mut session.head),
            session.id.clone(),
        );
        if asks {
            self.asking.push(conn);
        }
        let Burst { text, frames, .. } = burst;
        let texts = self.group.texts.len();
        let (mut published, mut beat) = (false, None);
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
                    published = true;
                    let said = Said {
                        head: &head,
                        topic: &text[topic],
                        payload: &text[payload],
                        wall_ms: at.wall_ms,
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
                Frame::Ack { seq } => {
                    log::debug!("session {id} of vm:{vm} has dealt with {seq:?}");
                }
                Frame::Heartbeat { metrics, id } => {
                    beat = Some(metrics);
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
        if let Some(session) = self.session_mut(conn) {
            session.head = head;
        }
        self.heard_on_bus(at, &key, published, beat, out);
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
        // Those that wait in the group count too.
        let mut patterns: BTreeSet<&Pattern> = session.subs.keys().collect();
        for op in &self.group.ops {
            match op {
                Op::Subscribe {
                    conn: who, pattern, ..
                } if *who == conn => patterns.insert(pattern),
                Op::Unsubscribe {
                    conn: who, pattern, ..
                } if *who == conn => patterns.remove(pattern),
                _ => continue,
            };
        }
        let full = patterns.len() >= self.rules.bus.subscriptions_per_session && !patterns.contains(&pattern);
        let refused = if !session.reader.may_ask(&pattern) {
            Refused::Forbidden
        } else if full {
            Refused::SubscriptionLimit
        } else {
            self.group.subscribes = true;
            self.group.ops.push(Op::Subscribe {
                conn,
                pattern,
                from,
                id,
            });
            return;
        };
        self.refuse(
            at,
            conn,
            "\"subscribe\"",
            &id,
            Some(pattern.as_str()),
            refused,
            out,
        );
    }

    fn say(&mut self, conn: ConnId, answer: &Answer<'_>) {
        let mut frame = Vec::new();
        answer.render(&mut frame);
        self.group.ops.push(Op::Say { conn, frame });
    }

    #[allow(clippy::too_many_arguments)]
    fn refuse(
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

    fn tell_refusal(&mut self, at: At, conn: ConnId, kind: &str, reason: Refused, out: &mut Vec<Effect>) {
        let Some(session) = self.session(conn) else {
            return;
        };
        let refusal = Refusal {
            vm: session.vm.clone(),
            session: session.id.clone(),
            kind: kind.to_owned(),
            reason,
        };
        let told = self.refusals.note(at.boot_ms, refusal, |refusal| {
            (refusal.vm.clone(), refusal.reason)
        });
        if let Some(refusal) = told {
            say_refusal(at, &refusal, None, out);
        }
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
            head: &head_of(broker.as_str()),
            topic: topic.as_bytes(),
            payload: &fields.as_bytes()[..fields.len() - 1],
            wall_ms: at.wall_ms,
        };
        let deliver = !self.index.is_empty() || self.group.subscribes;
        self.publish(&broker, said, (None, 0, 0..0), deliver);
    }

    fn tell_change(&mut self, at: At, change: Change, out: &mut Vec<Effect>) {
        let told = self
            .changes
            .note(at.boot_ms, change, |change| (change.vm.clone(), change.closed));
        if let Some(change) = told {
            self.say_change(at, &change, None, out);
        }
    }

    fn say_change(&mut self, at: At, change: &Change, repeated: Option<u64>, out: &mut Vec<Effect>) {
        let Change {
            vm,
            session,
            remote,
            closed,
        } = change;
        let phase = if closed.is_some() {
            SessionPhase::Closed
        } else {
            SessionPhase::Opened
        };
        let mut line = format!(
            "{} session of vm:{vm} session={session}",
            line_head(at.wall_ms, "INFO")
        );
        line.push_str(match phase {
            SessionPhase::Opened => " phase=opened",
            SessionPhase::Closed => " phase=closed",
        });
        if let Some(cause) = closed {
            line.push_str(&format!(" reason={}", cause.as_str()));
        }
        line.push_str(&format!(" remote={remote}"));
        if let Some(count) = repeated {
            line.push_str(&format!(" repeated={count}"));
        }
        let event = Event::BrokerSession {
            vm: vm.clone(),
            session: session.clone(),
            phase,
            reason: closed.map(|cause| cause.as_str().to_owned()),
        };
        self.announce(at, "session", vm, &event);
        out.push(Effect::Log(line));
        out.push(Effect::Tell(event));
    }

    /// What was merged because there was too much of it.
    pub(super) fn flush_merged(&mut self, at: At, at_once: bool, out: &mut Vec<Effect>) {
        for (change, count) in self.changes.flush(at.boot_ms, at_once) {
            self.say_change(at, &change, Some(count), out);
        }
        for (refusal, count) in self.refusals.flush(at.boot_ms, at_once) {
            say_refusal(at, &refusal, Some(count), out);
        }
    }

    /// The end of its input: what it said before is answered, then it is gone.
    pub(super) fn on_ended(&mut self, conn: ConnId) {
        if self.session(conn).is_some() {
            let cause = Cause::Disconnected;
            self.group.ops.push(Op::End { conn, cause });
        }
    }

    /// Its queue is full: it is cut off, so that nobody else waits for it.
    pub(super) fn on_full(&mut self, at: At, conn: ConnId, queued_bytes: u64, out: &mut Vec<Effect>) {
        let Some(session) = self.session(conn) else {
            return;
        };
        let (vm, id) = (session.vm.clone(), session.id.clone());
        let reason = Cause::SlowConsumer.as_str();
        out.push(Effect::Log(format!(
            "{} backpressure of vm:{vm} session={id} reason={reason} queued_bytes={queued_bytes}",
            line_head(at.wall_ms, "WARN")
        )));
        out.push(Effect::Tell(Event::BrokerBackpressure {
            vm: Some(vm),
            session: Some(id),
            reason: reason.to_owned(),
            queued_bytes: Some(queued_bytes),
        }));
        self.close_session(at, conn, Cause::SlowConsumer, out);
    }

    /// A session that was behind has come to the end of the log as it knew it.
    pub(super) fn on_at_end(&mut self, conn: ConnId, next: u64, out: &mut Vec<Effect>) {
        let kept = self.kept;
        let Some(session) = self.session_mut(conn) else {
            return;
        };
        let order = if next > kept {
            session.behind = false;
            session.asks = false;
            Order::Attached
        } else {
            Order::Replay(session.plan(kept))
        };
        out.push(Effect::Order { conn, order });
    }

    pub(super) fn on_log_opened(&mut self, last: u64) {
        self.log_open = true;
        self.kept = self.kept.max(last);
        self.given = self.kept;
    }

    /// Hands the group's lines to the log, or settles a group that has none.
    pub(super) fn on_commit(&mut self, at: At, out: &mut Vec<Effect>) {
        if self.group.is_empty() {
            return;
        }
        let mut group = std::mem::take(&mut self.group);
        if group.log.is_empty() {
            return self.settle(at, group, &Arc::default(), true, out);
        }
        let lines = Arc::new(std::mem::take(&mut group.log));
        out.push(Effect::Append(Arc::clone(&lines)));
        self.committing = Some((group, lines));
    }

    /// The log has taken the group, or hasn't.
    pub(super) fn on_appended(&mut self, at: At, kept: bool, open: bool, out: &mut Vec<Effect>) {
        self.log_open = open;
        let Some((group, lines)) = self.committing.take() else {
            return;
        };
        if kept {
            self.kept = self.given;
        } else {
            // Never given: nobody was told these numbers.
            self.given = self.kept;
        }
        self.settle(at, group, &lines, kept, out);
    }

    /// Gives everybody what the group has for them, in the order in which things happened.
    fn settle(&mut self, at: At, mut group: Group, lines: &Arc<Vec<u8>>, kept: bool, out: &mut Vec<Effect>) {
        let frames = Arc::new(std::mem::take(&mut group.frames));
        let mut outgoing: BTreeMap<ConnId, Outgoing> = BTreeMap::new();
        let mut ended = Vec::new();
        let mut changed: BTreeSet<ConnId> = BTreeSet::new();
        // The last number given before the op at hand.
        let mut before = self.kept;
        if kept
            && let Some(first) = group.ops.iter().find_map(|op| match op {
                Op::Message(message) => Some(message.seq),
                _ => None,
            })
        {
            before = first - 1;
        }
        let mut rest = group.ops.as_slice();
        while let Some(op) = rest.first() {
            let mut taken = 1;
            match op {
                Op::Message(first) => {
                    let run = run_of(rest, first, lines);
                    taken = run.len();
                    if kept {
                        before = first.seq + (taken as u64 - 1);
                        self.deliver(run, lines, &frames, &mut outgoing);
                    }
                    self.acknowledge(at, run, &group.texts, kept, &mut outgoing, out);
                }
                Op::Say { conn, frame } => outgoing.entry(*conn).or_default().say(frame),
                Op::Subscribe {
                    conn,
                    pattern,
                    from,
                    id,
                } => {
                    self.subscribe(*conn, pattern, *from, before);
                    let outgoing = outgoing.entry(*conn).or_default();
                    answer_subscription("\"subscribe\"", pattern, id, Some(before), outgoing);
                    changed.insert(*conn);
                }
                Op::Unsubscribe { conn, pattern, id } => {
                    if let Some(session) = self.session_mut(*conn) {
                        session.subs.remove(pattern);
                        self.index.remove(*conn, pattern);
                    }
                    answer_subscription(
                        "\"unsubscribe\"",
                        pattern,
                        id,
                        None,
                        outgoing.entry(*conn).or_default(),
                    );
                    changed.insert(*conn);
                }
                Op::End { conn, cause } => ended.push((*conn, *cause)),
            }
            rest = &rest[taken..];
        }
        for (conn, sent) in outgoing {
            if self.session(conn).is_none() {
                continue;
            }
            let mut parts = sent.parts;
            if !sent.acks.is_empty() {
                parts.push(Part::Own(sent.acks));
            }
            out.push(Effect::Send { conn, parts });
        }
        for conn in changed {
            if let Some(session) = self.session(conn) {
                let key = session.reader.key.clone();
                self.refresh_record(at, &key);
            }
        }
        self.give_orders(out);
        for (conn, cause) in ended {
            self.close_session(at, conn, cause, out);
        }
        if kept {
            shelve(&group, lines, out);
        }
    }

    /// Every thread that waits is told how to go on, also where all it asked for was refused.
    fn give_orders(&mut self, out: &mut Vec<Effect>) {
        let kept = self.kept;
        for conn in std::mem::take(&mut self.asking) {
            if let Some(session) = self.session_mut(conn)
                && std::mem::take(&mut session.asks)
            {
                let order = if session.behind {
                    Order::Replay(session.plan(kept))
                } else {
                    Order::Attached
                };
                out.push(Effect::Order { conn, order });
            }
        }
    }

    fn subscribe(&mut self, conn: ConnId, pattern: &Pattern, from: Option<u64>, before: u64) {
        let Some(session) = self.session_mut(conn) else {
            return;
        };
        let first = from.unwrap_or(before + 1);
        if first <= before && !session.behind {
            session.behind = true;
            for sub in session.subs.values_mut() {
                sub.next = before + 1;
            }
        }
        session.subs_made += 1;
        let sub = Sub {
            number: session.subs_made,
            first,
            next: first,
        };
        session.subs.insert(pattern.clone(), sub);
        self.index.insert(conn, pattern, first);
    }

    /// One run of messages of one topic to everybody who is subscribed to it.
    fn deliver(
        &self,
        run: &[Op],
        lines: &[u8],
        frames: &Arc<Vec<u8>>,
        outgoing: &mut BTreeMap<ConnId, Outgoing>,
    ) {
        let (Some(Op::Message(first)), Some(Op::Message(last))) = (run.first(), run.last()) else {
            return;
        };
        let Ok(topic) = std::str::from_utf8(&lines[first.topic.clone()]) else {
            return;
        };
        for (conn, wanted) in self.index.matching(topic) {
            let Some(session) = self.session(conn) else {
                continue;
            };
            if session.behind || wanted > last.seq || !session.reader.may_read(topic) {
                continue;
            }
            let skipped = usize::try_from(wanted.saturating_sub(first.seq)).unwrap_or(usize::MAX);
            if let Some(Op::Message(from)) = run.get(skipped) {
                let range = from.frame.start..last.frame.end;
                outgoing.entry(conn).or_default().deliver(frames, range);
            }
        }
    }

    fn acknowledge(
        &mut self,
        at: At,
        run: &[Op],
        texts: &[Vec<u8>],
        kept: bool,
        outgoing: &mut BTreeMap<ConnId, Outgoing>,
        out: &mut Vec<Effect>,
    ) {
        let Some(Op::Message(Message { conn: Some(conn), .. })) = run.first() else {
            return;
        };
        let acks = &mut outgoing.entry(*conn).or_default().acks;
        for op in run {
            let Op::Message(message) = op else {
                continue;
            };
            let answer = Answer {
                kind: "\"publish\"",
                id: &texts[message.text][message.id.clone()],
                seq: kept.then_some(message.seq),
                refused: (!kept).then_some(Refused::StorageError),
                ..Answer::default()
            };
            answer.render(acks);
        }
        if !kept {
            for _ in run {
                self.tell_refusal(at, *conn, "\"publish\"", Refused::StorageError, out);
            }
        }
    }

    /// Sessions that must go because of what the project is now.
    pub(super) fn end_superseded(&mut self, at: At, out: &mut Vec<Effect>) {
        let Some(table) = self.table.as_ref() else {
            return;
        };
        let mut gone = Vec::new();
        for (key, conns) in &self.vm_sessions {
            if key == "host" {
                continue;
            }
            let listed = table.get(key);
            for conn in conns {
                let since = self.session(*conn).map_or(0, |session| session.since_ms);
                if listed.is_none_or(|listed| {
                    listed
                        .launched_boottime_ms
                        .is_some_and(|launched| since < launched)
                }) {
                    gone.push(*conn);
                }
            }
        }
        for conn in gone {
            self.close_session(at, conn, Cause::Superseded, out);
        }
    }

    /// Closes what was silent for too long.
    pub(super) fn end_idle(&mut self, at: At, out: &mut Vec<Effect>) {
        if self.idle_due.is_none_or(|due| at.boot_ms < due) {
            return;
        }
        let limit = self.rules.bus.idle_ms;
        let mut next: Option<u64> = None;
        let mut idle = Vec::new();
        for conn in self.vm_sessions.values().flatten() {
            let Some(session) = self.session(*conn) else {
                continue;
            };
            let due = session.heard_ms + limit;
            if at.boot_ms >= due {
                idle.push(*conn);
            } else {
                next = Some(next.map_or(due, |known| known.min(due)));
            }
        }
        self.idle_due = next;
        for conn in idle {
            self.close_session(at, conn, Cause::Idle, out);
        }
        // An allowance that is full again needs no memory.
        self.allowances
            .retain(|_, allowance| at.boot_ms < allowance.at_ms + 1000);
    }

    pub(super) fn end_all(&mut self, at: At, out: &mut Vec<Effect>) {
        let open: Vec<ConnId> = self.vm_sessions.values().flatten().copied().collect();
        for conn in open {
            self.close_session(at, conn, Cause::ShuttingDown, out);
        }
    }
}

/// The messages at the start of these ops that follow each other on one topic from one session.
fn run_of<'a>(ops: &'a [Op], first: &Message, lines: &[u8]) -> &'a [Op] {
    let topic = &lines[first.topic.clone()];
    let same = |op: &Op| match op {
        Op::Message(message) => message.conn == first.conn && &lines[message.topic.clone()] == topic,
        _ => false,
    };
    let length = ops.iter().position(|op| !same(op)).unwrap_or(ops.len());
    &ops[..length]
}

fn answer_subscription(kind: &str, pattern: &Pattern, id: &str, seq: Option<u64>, outgoing: &mut Outgoing) {
    let mut bytes = Vec::new();
    let answer = Answer {
        kind,
        id: id.as_bytes(),
        topic: Some(pattern.as_str()),
        seq,
        refused: None,
    };
    answer.render(&mut bytes);
    outgoing.say(&bytes);
}

/// Each sender's lines go to its own log too, and what a Vizier says to its service log.
fn shelve(group: &Group, lines: &Arc<Vec<u8>>, out: &mut Vec<Effect>) {
    let mut shelves: BTreeMap<&VmName, Vec<Range<usize>>> = BTreeMap::new();
    for op in &group.ops {
        let Op::Message(message) = op else {
            continue;
        };
        let vm = &group.senders[message.sender];
        let shelf = shelves.entry(vm).or_default();
        match shelf.last_mut() {
            Some(last) if last.end == message.line.start => last.end = message.line.end,
            _ => shelf.push(message.line.clone()),
        }
        if &lines[message.topic.clone()] == VIZIER_LOG && vm.key() != "host" {
            out.push(Effect::ServiceLog {
                vm: vm.clone(),
                payload: String::from_utf8_lossy(&lines[message.payload.clone()]).into_owned(),
            });
        }
    }
    for (vm, ranges) in shelves {
        out.push(Effect::Shelve {
            vm: vm.clone(),
            lines: Arc::clone(lines),
            ranges,
        });
    }
}

/// What the in-guest service's log lines come on (DESIGN §9).
const VIZIER_LOG: &[u8] = b"vizier/log";

fn say_refusal(at: At, refusal: &Refusal, repeated: Option<u64>, out: &mut Vec<Effect>) {
    let Refusal {
        vm,
        session,
        kind,
        reason,
    } = refusal;
    let kind = if kind.is_empty() { "null" } else { kind };
    let mut line = format!(
        "{} refused vm:{vm} session={session} ack={kind} reason={}",
        line_head(at.wall_ms, "WARN"),
        reason.as_str()
    );
    if let Some(count) = repeated {
        line.push_str(&format!(" repeated={count}"));
    }
    out.push(Effect::Log(line));
    if matches!(
        reason,
        Refused::RateLimit | Refused::SubscriptionLimit | Refused::StorageError
    ) {
        out.push(Effect::Tell(Event::BrokerBackpressure {
            vm: Some(vm.clone()),
            session: Some(session.clone()),
            reason: reason.as_str().to_owned(),
            queued_bytes: None,
        }));
    }
}
