//! The broker's whole state, and `step`: what one input does to it (docs/ARCHITECTURE.md).
//!
//! Here: connections and their limits, who is admitted, what each hello is answered. In the
//! submodules: inputs and effects ([`input`]), freshness, sessions, topics, and the batch that one
//! commit writes. Not here: sockets and threads (`broker::listen`), files (`broker::effects`), the
//! protocol's text (`broker::protocol`). Nothing in this module blocks, fails or reads a clock.

mod batch;
mod commit;
mod freshness;
mod groups;
pub mod input;
mod notices;
mod publishing;
pub mod session;
pub mod topics;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::core::name::VmName;

use super::attempts::{Attempt, Attempts};
use super::frame::RefusalReason;
use super::guests::{Guest, GuestTable, MAX_UNLISTED, admit, shows_token};
use super::protocol::{
    DeclineReason, Hello, HelloRefusal, declined_reply, negotiate, ok_reply, session_reply,
};
use super::throttle::Throttle;
use crate::core::root::handshake_record::HandshakeRecord;
use batch::Batch;
use notices::SessionChange;
use publishing::Allowance;
use session::{CloseReason, Session};
use topics::Index;

pub use input::{
    BusRules, Chunk, ConnId, Delivery, Effect, Input, Peer, ReplayPlan, ReplaySubscription, Rules, Timestamp,
};

/// How long until a record that couldn't be written is written again.
const RETRY_MS: u64 = 1000;

/// What a connection waits for.
#[derive(Clone, Debug, PartialEq)]
enum ConnPhase {
    /// Its hello hasn't come, or hasn't been judged.
    AwaitingHello,
    /// Accepted, if the record can be made.
    Storing(Box<PendingHello>),
    /// It was evicted; its thread will report what the client had sent.
    Evicted,
    /// It has a session and exchanges frames.
    Session(Box<Session>),
    /// It was answered, or its session is over. It stays until the client has read that.
    Answered,
}

#[derive(Clone, Debug, PartialEq)]
struct PendingHello {
    attempt: Attempt,
    record: HandshakeRecord,
    session: Option<Session>,
}

#[derive(Clone, Debug)]
struct ConnState {
    peer: Peer,
    remote: String,
    phase: ConnPhase,
}

/// The connections of one listener that count against its limit, oldest first.
#[derive(Clone, Debug, Default)]
struct Occupancy {
    waiting: BTreeSet<ConnId>,
    answered: BTreeSet<ConnId>,
    /// Sessions are never evicted for the limit, so their number is enough.
    sessions: usize,
}

/// All the broker knows.
#[derive(Debug)]
pub struct State {
    rules: Rules,
    table: Option<GuestTable>,
    guests: BTreeMap<String, Guest>,
    /// Launches that have ended, by VM: a hello in such a VM's name doesn't prove that the VM
    /// lives.
    ended_launches: BTreeMap<String, Option<u64>>,
    conns: BTreeMap<ConnId, ConnState>,
    guest_occupancy: Occupancy,
    host_occupancy: Occupancy,
    attempts: Attempts,
    /// No guest leaves the freshness window before this.
    freshness_due: Option<u64>,
    /// No delayed record is due before this.
    write_due: Option<u64>,
    stopping: bool,
    /// Open sessions by their VM's name in lower case.
    vm_sessions: BTreeMap<String, BTreeSet<ConnId>>,
    index: Index,
    batch: Batch,
    committing: Option<(Batch, Arc<Vec<u8>>)>,
    /// Sessions whose threads wait to be told how they get their messages.
    awaiting_delivery: Vec<ConnId>,
    /// The number of the last message in the log.
    last_kept_seq: u64,
    /// The last number that a message got; that message may not be in the log yet.
    last_given_seq: u64,
    log_open: bool,
    /// No session exceeds the idle limit before this.
    idle_due: Option<u64>,
    allowances: BTreeMap<String, Allowance>,
    refusals: Throttle<(VmName, RefusalReason), notices::FrameRefusal>,
    changes: Throttle<(VmName, Option<CloseReason>), SessionChange>,
    /// The sender of the broker's own messages.
    broker: VmName,
}

/// Applies one input to the state. Pure: the same state, time and input give the same effects.
pub fn step(state: &mut State, at: Timestamp, input: Input) -> Vec<Effect> {
    let mut effects = Vec::new();
    let out = &mut effects;
    match input {
        Input::Opened { conn, peer, remote } => state.on_opened(conn, peer, remote, out),
        Input::Hello { conn, hello } => state.on_hello(at, conn, hello, out),
        Input::HelloRefused {
            conn,
            refusal,
            attempted,
        } => state.on_hello_refused(at, conn, refusal, attempted, out),
        Input::Frames { conn, burst } => state.on_frames(at, conn, burst, out),
        Input::HalfClosed { conn } => state.on_half_closed(conn),
        Input::ReplayDone { conn, next } => state.on_replay_done(conn, next, out),
        Input::QueueFull { conn, queued_bytes } => state.on_queue_full(at, conn, queued_bytes, out),
        Input::LogOpened { last } => state.on_log_opened(last),
        Input::Commit => state.on_commit(at, out),
        Input::Appended { kept, open } => state.on_appended(at, kept, open, out),
        Input::Closed { conn } => state.on_closed(at, conn, out),
        Input::Recorded { vm, asked_by, made } => state.on_recorded(at, &vm, asked_by, made, out),
        Input::RecordLost { vm } => state.on_record_lost(at, &vm, out),
        Input::Guests(table) => state.on_guests(at, table, out),
        Input::Restored { record, alive } => state.on_restored(at, *record, alive, out),
        Input::VmGone { vm } => state.on_vm_gone(at, &vm, out),
        Input::Tick => state.on_tick(at, false, out),
        Input::Stop => state.on_stop(at, out),
        Input::Finish => state.on_finish(at, out),
    }
    effects
}

impl State {
    /// A broker that has heard nobody.
    pub fn new(rules: Rules) -> State {
        State {
            rules,
            table: None,
            guests: BTreeMap::new(),
            ended_launches: BTreeMap::new(),
            conns: BTreeMap::new(),
            guest_occupancy: Occupancy::default(),
            host_occupancy: Occupancy::default(),
            attempts: Attempts::default(),
            freshness_due: None,
            write_due: None,
            stopping: false,
            vm_sessions: BTreeMap::new(),
            index: Index::default(),
            batch: Batch::default(),
            committing: None,
            awaiting_delivery: Vec::new(),
            last_kept_seq: 0,
            last_given_seq: 0,
            log_open: false,
            idle_due: None,
            allowances: BTreeMap::new(),
            refusals: Throttle::default(),
            changes: Throttle::default(),
            broker: "broker".parse().expect("a valid name"),
        }
    }

    /// When [`Input::Tick`] is next worth a call.
    pub fn due(&self) -> Option<u64> {
        let throttled = [self.attempts.due(), self.refusals.due(), self.changes.due()];
        [self.freshness_due, self.write_due, self.idle_due]
            .into_iter()
            .chain(throttled)
            .flatten()
            .min()
    }

    /// Whether nobody waits for an answer any more.
    pub fn all_answered(&self) -> bool {
        self.conns.values().all(|conn| conn.phase == ConnPhase::Answered)
    }

    /// The VMs that have a record.
    pub fn recorded(&self) -> impl Iterator<Item = &VmName> {
        self.guests
            .values()
            .filter(|guest| guest.written_ms.is_some())
            .map(|guest| &guest.record.vm)
    }

    fn occupancy(&mut self, peer: Peer) -> &mut Occupancy {
        match peer {
            Peer::Guest => &mut self.guest_occupancy,
            Peer::Host => &mut self.host_occupancy,
        }
    }

    fn on_opened(&mut self, conn: ConnId, peer: Peer, remote: String, out: &mut Vec<Effect>) {
        let phase = if self.stopping {
            out.push(Effect::Evict {
                conn,
                reason: DeclineReason::ShuttingDown,
            });
            ConnPhase::Evicted
        } else {
            self.occupancy(peer).waiting.insert(conn);
            ConnPhase::AwaitingHello
        };
        self.conns.insert(conn, ConnState { peer, remote, phase });
        self.evict_if_full(peer, out);
    }

    /// At the limit a connection that was answered goes first, then the oldest without an answer.
    fn evict_if_full(&mut self, peer: Peer, out: &mut Vec<Effect>) {
        let max = match peer {
            Peer::Guest => self.rules.max_connections,
            Peer::Host => self.rules.max_host_connections,
        };
        let places = self.occupancy(peer);
        if places.waiting.len() + places.answered.len() + places.sessions <= max {
            return;
        }
        if let Some(conn) = places.answered.pop_first() {
            out.push(Effect::Drop { conn });
        } else if let Some(conn) = places.waiting.pop_first() {
            out.push(Effect::Evict {
                conn,
                reason: DeclineReason::SessionLimit,
            });
            if let Some(evicted) = self.conns.get_mut(&conn)
                && evicted.phase == ConnPhase::AwaitingHello
            {
                evicted.phase = ConnPhase::Evicted;
            }
        }
    }

    fn on_hello(&mut self, at: Timestamp, conn: ConnId, mut hello: Hello, out: &mut Vec<Effect>) {
        let Some(known) = self.conns.get(&conn) else {
            return;
        };
        let (peer, remote) = (known.peer, known.remote.clone());
        // It was evicted, but its hello was on the way already. An answer is fine; a session is
        // not.
        let leaving = known.phase == ConnPhase::Evicted;
        match known.phase {
            ConnPhase::AwaitingHello | ConnPhase::Evicted => {}
            ConnPhase::Storing(_) | ConnPhase::Session(_) | ConnPhase::Answered => return,
        }
        let admitted = match peer {
            Peer::Guest => admit(self.table.as_ref(), self.rules.auth, &hello),
            // Whoever may open the host's socket is the host.
            Peer::Host if hello.vm.key() == "host" => Ok(()),
            Peer::Host => Err(DeclineReason::UnknownVm),
        };
        // From here on a VM's second name counts as its name.
        let called = self.table.as_ref().filter(|_| peer == Peer::Guest);
        let second = match called.and_then(|table| table.find_by_any_name(&hello.vm.key())) {
            Some(listed) => {
                hello.vm = listed.name.clone();
                listed.second_name.as_ref().map(VmName::key)
            }
            None => None,
        };
        let verdict = match admitted {
            Err(reason) => Err(reason),
            Ok(()) if self.stopping => Err(DeclineReason::ShuttingDown),
            Ok(()) => negotiate(&hello.capabilities, self.rules.bus_versions),
        };
        let key = hello.vm.key();
        let proven = peer == Peer::Guest && shows_token(self.table.as_ref(), &hello);
        let verdict = match verdict {
            Ok(Some(_)) if leaving => Err(DeclineReason::SessionLimit),
            Ok(Some(_)) if peer == Peer::Guest && !self.ensure_session_slot(at, &key, proven, out) => {
                Err(DeclineReason::SessionLimit)
            }
            other => other,
        };
        let listed = self.table.as_ref().and_then(|table| table.get(&key));
        // The name as the project spells it; without a project, as the first hello of that name
        // spelled it.
        let spelled = match (listed, self.guests.get(&key)) {
            (Some(listed), _) => listed.name.clone(),
            (None, Some(guest)) => guest.record.vm.clone(),
            (None, None) => hello.vm.clone(),
        };
        let mut attempt = Attempt {
            vm: Some(spelled.clone()),
            listed: listed.is_some() || peer == Peer::Host,
            declined: None,
            session: None,
            capabilities: hello.capabilities,
            remote,
        };
        let run: String = self.rules.run.as_str().chars().take(8).collect();
        let session = matches!(verdict, Ok(Some(_))).then(|| {
            let id = format!("s-{}.{run}", conn.0);
            let capabilities = attempt.capabilities.clone();
            let mut session = Session::new(id, spelled.clone(), peer, at.boot_ms, capabilities);
            session.reader.second = second.clone();
            Session {
                authenticated: proven,
                ..session
            }
        });
        attempt.session = session.as_ref().map(|session| session.id.clone());
        let vm = match verdict {
            Err(reason) => {
                attempt.declined = Some(reason);
                return self.answer_hello(at, conn, attempt, None, out);
            }
            Ok(_) if peer == Peer::Host => return self.answer_hello(at, conn, attempt, session, out),
            Ok(_) => spelled,
        };
        let full = self.table.is_none() && self.guests.len() >= MAX_UNLISTED;
        if full && !self.guests.contains_key(&key) {
            attempt.declined = Some(DeclineReason::StorageError);
            attempt.session = None;
            return self.answer_hello(at, conn, attempt, None, out);
        }
        let record = self.next_record(at, vm, attempt.capabilities.clone(), session.is_some());
        if let Some(guest) = self.guests.get(&key)
            && guest.written_ms.is_some()
            && guest.writable_at() > at.boot_ms
        {
            // The record was written a moment ago, so the file exists; the newer time is written
            // later.
            self.note_handshake(at, record, false, out);
            return self.answer_hello(at, conn, attempt, session, out);
        }
        if let Some(known) = self.conns.get_mut(&conn) {
            known.phase = ConnPhase::Storing(Box::new(PendingHello {
                attempt,
                record: record.clone(),
                session,
            }));
        }
        out.push(Effect::Record {
            record: Box::new(record),
            asked_by: Some(conn),
        });
    }

    /// The one answer to a hello. The log line goes out first, so that whoever reads `ok` finds it
    /// in the log.
    fn answer_hello(
        &mut self,
        at: Timestamp,
        conn: ConnId,
        attempt: Attempt,
        session: Option<Session>,
        out: &mut Vec<Effect>,
    ) {
        let line = match (attempt.declined, &session) {
            (Some(reason), _) => declined_reply(reason, self.rules.bus_versions),
            (None, Some(session)) => session_reply(&session.id, self.rules.bus.heartbeat_secs),
            (None, None) => ok_reply(),
        };
        if let Some(report) = self.attempts.note(at.boot_ms, at.wall_ms, attempt) {
            // The attempt's line comes before the lines of its consequences, such as a VM that
            // became reachable.
            let position = out
                .iter()
                .position(|effect| matches!(effect, Effect::Log(_) | Effect::Emit(_)))
                .unwrap_or(out.len());
            if let Some(vm) = &report.known {
                self.publish_own(at, "handshake", vm, &report.event);
            }
            out.splice(
                position..position,
                [Effect::Log(report.line), Effect::Emit(report.event)],
            );
        }
        match session {
            Some(session) => {
                self.open_session(at, conn, session, out);
                out.push(Effect::Grant { conn, line });
            }
            None => self.send_reply(conn, line, out),
        }
    }

    fn send_reply(&mut self, conn: ConnId, line: String, out: &mut Vec<Effect>) {
        let Some(known) = self.conns.get_mut(&conn) else {
            return;
        };
        known.phase = ConnPhase::Answered;
        let peer = known.peer;
        let places = self.occupancy(peer);
        // An evicted connection no longer counts against the limit.
        if places.waiting.remove(&conn) {
            places.answered.insert(conn);
        }
        out.push(Effect::Reply { conn, line });
    }

    fn on_hello_refused(
        &mut self,
        at: Timestamp,
        conn: ConnId,
        refusal: HelloRefusal,
        attempted: bool,
        out: &mut Vec<Effect>,
    ) {
        let Some(known) = self.conns.get(&conn) else {
            return;
        };
        if !matches!(known.phase, ConnPhase::AwaitingHello | ConnPhase::Evicted) {
            return;
        }
        if !attempted {
            let line = declined_reply(refusal.reason, self.rules.bus_versions);
            return self.send_reply(conn, line, out);
        }
        let key = refusal.vm.as_ref().map(VmName::key);
        let listed = key.and_then(|key| self.table.as_ref()?.find_by_any_name(&key));
        let attempt = Attempt {
            listed: listed.is_some(),
            vm: listed.map(|listed| listed.name.clone()).or(refusal.vm),
            declined: Some(refusal.reason),
            session: None,
            capabilities: Vec::new(),
            remote: known.remote.clone(),
        };
        self.answer_hello(at, conn, attempt, None, out);
    }

    fn on_closed(&mut self, at: Timestamp, conn: ConnId, out: &mut Vec<Effect>) {
        self.end_session(at, conn, CloseReason::Disconnected, out);
        let Some(known) = self.conns.get(&conn) else {
            return;
        };
        // Its hello was complete, so it counts, although the client is gone.
        if matches!(known.phase, ConnPhase::Storing(_)) {
            return;
        }
        let peer = known.peer;
        let places = self.occupancy(peer);
        places.waiting.remove(&conn);
        places.answered.remove(&conn);
        self.conns.remove(&conn);
    }

    fn on_recorded(
        &mut self,
        at: Timestamp,
        vm: &VmName,
        asked_by: Option<ConnId>,
        made: bool,
        out: &mut Vec<Effect>,
    ) {
        let Some(conn) = asked_by else {
            if let Some(guest) = self.guests.get_mut(&vm.key()) {
                guest.written_ms = made.then_some(at.boot_ms);
                if !made {
                    guest.dirty = true;
                    let again = at.boot_ms + RETRY_MS;
                    self.write_due = Some(self.write_due.map_or(again, |due| due.min(again)));
                }
            }
            return;
        };
        let Some(known) = self.conns.get_mut(&conn) else {
            return;
        };
        if !matches!(known.phase, ConnPhase::Storing(_)) {
            return;
        }
        let ConnPhase::Storing(pending) = std::mem::replace(&mut known.phase, ConnPhase::AwaitingHello)
        else {
            return;
        };
        let PendingHello {
            mut attempt,
            record,
            mut session,
        } = *pending;
        if made {
            self.note_handshake(at, record, true, out);
        } else {
            attempt.declined = Some(DeclineReason::StorageError);
            attempt.session = None;
            session = None;
            if let Some(guest) = self.guests.get_mut(&vm.key()) {
                guest.written_ms = None;
            }
        }
        self.answer_hello(at, conn, attempt, session, out);
    }

    fn on_stop(&mut self, at: Timestamp, out: &mut Vec<Effect>) {
        self.stopping = true;
        self.end_all(at, out);
        for places in [&mut self.guest_occupancy, &mut self.host_occupancy] {
            for conn in std::mem::take(&mut places.waiting) {
                if let Some(known) = self.conns.get_mut(&conn)
                    && known.phase == ConnPhase::AwaitingHello
                {
                    known.phase = ConnPhase::Evicted;
                    out.push(Effect::Evict {
                        conn,
                        reason: DeclineReason::ShuttingDown,
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
