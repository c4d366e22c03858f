//! Commit: a batch is written to the log, then every session gets its answers and deliveries
//! (docs/PROTOCOL.md).
//!
//! Here: the append, then answers and deliveries in the order of the frames, and when a session has
//! to read from the log. Not here: how a batch is filled (`super::publishing`, `super::batch`).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::core::broker::frame::{Answer, RefusalReason, Terms};
use crate::core::bus::topic::Pattern;
use crate::core::name::VmName;

use super::batch::{Batch, Message, Op};
use super::input::{Chunk, Delivery};
use super::session::Subscription;
use super::{ConnId, Effect, State, Timestamp};

/// The topic of the in-guest service's log lines (docs/PROTOCOL.md).
const VIZIER_LOG: &[u8] = b"vizier/log";

/// The warning for a message to a VM that the project doesn't have.
const UNKNOWN_VM: &str = "unknown-vm";

/// How many subscriptions of one session may have to be checked for each message: those with a `*`
/// in the middle and those of a group. With a handful of sessions a VM, hostile ones cost a publish
/// some microseconds.
const COSTLY_SUBSCRIPTIONS: usize = 16;

/// What one session gets from a batch.
#[derive(Default)]
struct Outgoing {
    parts: Vec<Chunk>,
    acks: Vec<u8>,
}

impl Outgoing {
    /// Appends bytes after the acks so far: answers come in the order of the frames.
    fn push(&mut self, bytes: &[u8]) {
        let acks = std::mem::take(&mut self.acks);
        if !acks.is_empty() {
            self.parts.push(Chunk::Own(acks));
        }
        match self.parts.last_mut() {
            Some(Chunk::Own(own)) => own.extend_from_slice(bytes),
            _ => self.parts.push(Chunk::Own(bytes.to_vec())),
        }
    }

    fn answer(&mut self, answer: &Answer<'_>) {
        let mut bytes = Vec::new();
        answer.render(&mut bytes);
        self.push(&bytes);
    }

    fn deliver(&mut self, frames: &Arc<Vec<u8>>, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        match self.parts.last_mut() {
            Some(Chunk::Shared(_, last)) if last.end == range.start => last.end = range.end,
            _ => self.parts.push(Chunk::Shared(Arc::clone(frames), range)),
        }
    }
}

impl State {
    /// Whether something waits for a commit.
    pub fn uncommitted(&self) -> bool {
        !self.batch.is_empty()
    }

    /// The last number in the log.
    pub fn last_kept(&self) -> u64 {
        self.last_kept_seq
    }

    /// Bytes that wait for a commit.
    pub fn uncommitted_bytes(&self) -> usize {
        self.batch.bytes()
    }

    pub(super) fn on_log_opened(&mut self, last: u64) {
        self.log_open = true;
        self.last_kept_seq = self.last_kept_seq.max(last);
        // Messages that wait for a commit have their numbers already.
        self.last_given_seq = self.last_given_seq.max(self.last_kept_seq);
    }

    /// Hands the batch's lines to the log; a batch without lines is answered at once.
    pub(super) fn on_commit(&mut self, at: Timestamp, out: &mut Vec<Effect>) {
        if self.batch.is_empty() {
            return;
        }
        let mut group = std::mem::take(&mut self.batch);
        if group.log.is_empty() {
            return self.deliver_batch(at, group, &Arc::default(), true, out);
        }
        let lines = Arc::new(std::mem::take(&mut group.log));
        out.push(Effect::Append(Arc::clone(&lines)));
        self.committing = Some((group, lines));
    }

    /// The log has taken the batch, or couldn't.
    pub(super) fn on_appended(&mut self, at: Timestamp, kept: bool, open: bool, out: &mut Vec<Effect>) {
        self.log_open = open;
        let Some((group, lines)) = self.committing.take() else {
            return;
        };
        if kept {
            self.last_kept_seq = self.last_given_seq;
        } else {
            // Nobody was told these numbers, so they are given again.
            self.last_given_seq = self.last_kept_seq;
        }
        self.deliver_batch(at, group, &lines, kept, out);
    }

    /// Sends answers and deliveries in the order of the frames.
    fn deliver_batch(
        &mut self,
        at: Timestamp,
        mut group: Batch,
        lines: &Arc<Vec<u8>>,
        kept: bool,
        out: &mut Vec<Effect>,
    ) {
        let frames = Arc::new(std::mem::take(&mut group.frames));
        let mut outgoing: BTreeMap<ConnId, Outgoing> = BTreeMap::new();
        let mut ended = Vec::new();
        let mut changed: BTreeSet<ConnId> = BTreeSet::new();
        // The last number given before the current entry.
        let mut before = self.last_kept_seq;
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
                    let run = same_topic_run(rest, first, lines);
                    taken = run.len();
                    if kept {
                        before = first.seq + (taken as u64 - 1);
                        self.deliver(run, lines, &frames, &mut outgoing);
                    }
                    self.acknowledge(at, run, &group.texts, kept, &mut outgoing, out);
                }
                Op::Answer { conn, frame } => outgoing.entry(*conn).or_default().push(frame),
                Op::Subscribe {
                    conn,
                    pattern,
                    terms,
                    id,
                } => {
                    let (refused, detail) = match self.subscribe(*conn, pattern, terms, before) {
                        Ok(()) => (None, ""),
                        Err((reason, detail)) => (Some(reason), detail),
                    };
                    if let Some(reason) = refused {
                        self.report_refusal(at, *conn, "\"subscribe\"", reason, out);
                    }
                    let answer = Answer {
                        kind: "\"subscribe\"",
                        id: id.as_bytes(),
                        topic: Some(pattern.as_str()),
                        seq: refused.is_none().then_some(before),
                        refused,
                        detail,
                        warning: None,
                    };
                    outgoing.entry(*conn).or_default().answer(&answer);
                    changed.insert(*conn);
                }
                Op::Unsubscribe { conn, pattern, id } => {
                    if let Some(session) = self.session_mut(*conn) {
                        session.subs.remove(pattern);
                        self.index.remove(*conn, pattern);
                    }
                    let answer = Answer {
                        kind: "\"unsubscribe\"",
                        id: id.as_bytes(),
                        topic: Some(pattern.as_str()),
                        ..Answer::default()
                    };
                    outgoing.entry(*conn).or_default().answer(&answer);
                    changed.insert(*conn);
                }
                Op::End { conn, cause: reason } => ended.push((*conn, *reason)),
            }
            rest = &rest[taken..];
        }
        for (conn, sent) in outgoing {
            if self.session(conn).is_none() {
                continue;
            }
            let mut parts = sent.parts;
            if !sent.acks.is_empty() {
                parts.push(Chunk::Own(sent.acks));
            }
            out.push(Effect::Send { conn, parts });
        }
        for conn in changed {
            if let Some(session) = self.session(conn) {
                let key = session.reader.key.clone();
                self.refresh_record(at, &key);
            }
        }
        self.set_deliveries(out);
        for (conn, reason) in ended {
            self.close_session(at, conn, reason, out);
        }
        if kept {
            copy_to_sender_logs(&group, lines, out);
        }
    }

    /// Tells every thread that waits how its session gets its messages, also if all it asked for
    /// was refused.
    fn set_deliveries(&mut self, out: &mut Vec<Effect>) {
        let kept = self.last_kept_seq;
        for conn in std::mem::take(&mut self.awaiting_delivery) {
            if let Some(session) = self.session_mut(conn)
                && std::mem::take(&mut session.awaits_delivery)
            {
                let delivery = if session.behind {
                    Delivery::Replay(session.plan(kept))
                } else {
                    Delivery::Live
                };
                out.push(Effect::SetDelivery { conn, delivery });
            }
        }
    }

    fn subscribe(
        &mut self,
        conn: ConnId,
        pattern: &Pattern,
        terms: &Terms,
        before: u64,
    ) -> Result<(), (RefusalReason, &'static str)> {
        let limit = self.rules.bus.subscriptions_per_session;
        let Some(session) = self.session_mut(conn) else {
            return Ok(());
        };
        let others = || session.subs.iter().filter(|(known, _)| *known != pattern);
        if others().count() >= limit {
            return Err((RefusalReason::SubscriptionLimit, ""));
        }
        let is_costly = pattern.has_inner_wildcard() || terms.group.is_some();
        let costly = others().filter(|(known, sub)| known.has_inner_wildcard() || sub.group.is_some());
        if is_costly && costly.count() >= COSTLY_SUBSCRIPTIONS {
            return Err((
                RefusalReason::SubscriptionLimit,
                "a session may have 16 subscriptions with a `*` in the middle or a group",
            ));
        }
        // While a session replays the log only its own thread sends to it, so it can't be a member
        // of a group.
        let works = others().any(|(_, sub)| sub.group.is_some());
        if (terms.replays() && works) || (terms.group.is_some() && session.behind) {
            return Err((
                RefusalReason::Forbidden,
                "one session can't use a group and also `from` or `last`",
            ));
        }
        // Numbers begin with 1; 0 means everything.
        let first = terms.from.map_or(before + 1, |from| from.max(1));
        if (first <= before || terms.last) && !session.behind {
            session.behind = true;
            for sub in session.subs.values_mut() {
                sub.next = before + 1;
            }
        }
        session.subs_made += 1;
        let sub = Subscription {
            number: session.subs_made,
            first,
            next: first,
            last: terms.last.then_some(before.min(first - 1)),
            group: terms.group.clone(),
        };
        let peer = session.reader.peer;
        session.subs.insert(pattern.clone(), sub);
        // The earlier subscription may have been of the other kind.
        self.index.remove(conn, pattern);
        match &terms.group {
            Some(name) => self.index.groups.join(conn, peer, name, pattern),
            None => self.index.insert(conn, pattern, first),
        }
        Ok(())
    }

    /// Delivers consecutive messages of one topic to its subscribers.
    fn deliver(
        &mut self,
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
        let subscribers = self.index.matching(topic);
        if !self.index.groups.is_empty() {
            self.deliver_to_groups(run, topic, &subscribers, frames, outgoing);
        }
        for (conn, wanted) in subscribers {
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

    /// Delivers each message to one member of each group, unless that member has a subscription of
    /// its own.
    fn deliver_to_groups(
        &mut self,
        run: &[Op],
        topic: &str,
        subscribers: &BTreeMap<ConnId, u64>,
        frames: &Arc<Vec<u8>>,
        outgoing: &mut BTreeMap<ConnId, Outgoing>,
    ) {
        let mut groups = std::mem::take(&mut self.index.groups);
        let is_eligible = |conn: ConnId| {
            self.session(conn)
                .is_some_and(|session| !session.behind && session.reader.may_read(topic))
        };
        for op in run {
            let Op::Message(message) = op else {
                continue;
            };
            for conn in groups.choose(topic, &is_eligible) {
                if subscribers.get(&conn).is_none_or(|first| *first > message.seq) {
                    let range = message.frame.clone();
                    outgoing.entry(conn).or_default().deliver(frames, range);
                }
            }
        }
        self.index.groups = groups;
    }

    fn acknowledge(
        &mut self,
        at: Timestamp,
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
                warning: (kept && message.to_unknown_vm).then_some(UNKNOWN_VM),
                refused: (!kept).then_some(RefusalReason::StorageError),
                ..Answer::default()
            };
            answer.render(acks);
        }
        if !kept {
            for _ in run {
                self.report_refusal(at, *conn, "\"publish\"", RefusalReason::StorageError, out);
            }
        }
    }
}

/// The messages at the start of these ops that follow each other on one topic from one session.
fn same_topic_run<'a>(ops: &'a [Op], first: &Message, lines: &[u8]) -> &'a [Op] {
    let topic = &lines[first.topic.clone()];
    let same = |op: &Op| match op {
        Op::Message(message) => message.conn == first.conn && &lines[message.topic.clone()] == topic,
        _ => false,
    };
    let length = ops.iter().position(|op| !same(op)).unwrap_or(ops.len());
    &ops[..length]
}

/// Copies each sender's lines to its own log, and a Vizier's log lines to its service log.
fn copy_to_sender_logs(group: &Batch, lines: &Arc<Vec<u8>>, out: &mut Vec<Effect>) {
    let mut by_sender: BTreeMap<&VmName, Vec<Range<usize>>> = BTreeMap::new();
    let mut service: BTreeMap<&VmName, Vec<String>> = BTreeMap::new();
    for op in &group.ops {
        let Op::Message(message) = op else {
            continue;
        };
        let vm = &group.senders[message.sender];
        let ranges = by_sender.entry(vm).or_default();
        match ranges.last_mut() {
            Some(last) if last.end == message.line.start => last.end = message.line.end,
            _ => ranges.push(message.line.clone()),
        }
        if &lines[message.topic.clone()] == VIZIER_LOG && vm.key() != "host" {
            let payload = String::from_utf8_lossy(&lines[message.payload.clone()]).into_owned();
            service.entry(vm).or_default().push(payload);
        }
    }
    for (vm, ranges) in by_sender {
        out.push(Effect::SenderLog {
            vm: vm.clone(),
            lines: Arc::clone(lines),
            ranges,
        });
    }
    for (vm, payloads) in service {
        out.push(Effect::ServiceLog {
            vm: vm.clone(),
            payloads,
        });
    }
}
