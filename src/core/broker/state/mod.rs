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
use super::frame::Refused;
use super::guests::{Guest, GuestTable, MAX_UNLISTED, admit, is_proven};
use super::protocol::{DeclineReason, Hello, Refusal, declined_reply, negotiate, ok_reply, session_reply};
use super::throttle::Throttle;
use crate::core::root::handshake_record::HandshakeRecord;
use batch::Group;
use notices::Change;
use publishing::Allowance;
use session::{Cause, Session};
use topics::Index;

pub use input::{At, BusRules, ConnId, Effect, Input, Order, Part, Plan, Plane, Rules, Wanted};

/// How long until a record that couldn't be written is written again.
const RETRY_MS: u64 = 1000;

/// What a connection waits for.
#[derive(Clone, Debug, PartialEq)]
enum Phase {
    /// Its hello hasn't come, or hasn't been judged.
    AwaitingHello,
    /// Accepted, if the record can be made.
    Storing(Box<Pending>),
    /// It was evicted; its thread will report what the client had sent.
    Evicted,
    /// It has a session and exchanges frames.
    Session(Box<Session>),
    /// It was answered, or its session is over. It stays until the client has read that.
    Answered,
}

#[derive(Clone, Debug, PartialEq)]
struct Pending {
    attempt: Attempt,
    record: HandshakeRecord,
    session: Option<Session>,
}

#[derive(Clone, Debug)]
struct Conn {
    plane: Plane,
    remote: String,
    phase: Phase,
}

/// The connections of one listener that count against its limit, oldest first.
#[derive(Clone, Debug, Default)]
struct Places {
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
    over: BTreeMap<String, Option<u64>>,
    conns: BTreeMap<ConnId, Conn>,
    guest_places: Places,
    host_places: Places,
    attempts: Attempts,
    /// No guest leaves the freshness window before this.
    leave_due: Option<u64>,
    /// No delayed record is due before this.
    write_due: Option<u64>,
    stopping: bool,
    /// Open sessions by their VM's name in lower case.
    vm_sessions: BTreeMap<String, BTreeSet<ConnId>>,
    index: Index,
    group: Group,
    committing: Option<(Group, Arc<Vec<u8>>)>,
    /// Sessions whose threads wait to be told how they get their messages.
    asking: Vec<ConnId>,
    /// The number of the last message in the log.
    kept: u64,
    /// The last number that a message got; that message may not be in the log yet.
    given: u64,
    log_open: bool,
    /// No session exceeds the idle limit before this.
    idle_due: Option<u64>,
    allowances: BTreeMap<String, Allowance>,
    refusals: Throttle<(VmName, Refused), notices::Refusal>,
    changes: Throttle<(VmName, Option<Cause>), Change>,
    /// The sender of the broker's own messages.
    broker: VmName,
}

/// Applies one input to the state. Pure: the same state, time and input give the same effects.
pub fn step(state: &mut State, at: At, input: Input) -> Vec<Effect> {
    let mut effects = Vec::new();
    let out = &mut effects;
    match input {
        Input::Opened { conn, plane, remote } => state.on_opened(conn, plane, remote, out),
        Input::Hello { conn, hello } => state.on_hello(at, conn, hello, out),
        Input::Refused {
            conn,
            refusal,
            attempted,
        } => state.on_refused(at, conn, refusal, attempted, out),
        Input::Frames { conn, burst } => state.on_frames(at, conn, burst, out),
        Input::Ended { conn } => state.on_ended(conn),
        Input::AtEnd { conn, next } => state.on_at_end(conn, next, out),
        Input::Full { conn, queued_bytes } => state.on_full(at, conn, queued_bytes, out),
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
            over: BTreeMap::new(),
            conns: BTreeMap::new(),
            guest_places: Places::default(),
            host_places: Places::default(),
            attempts: Attempts::default(),
            leave_due: None,
            write_due: None,
            stopping: false,
            vm_sessions: BTreeMap::new(),
            index: Index::default(),
            group: Group::default(),
            committing: None,
            asking: Vec::new(),
            kept: 0,
            given: 0,
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
        [self.leave_due, self.write_due, self.idle_due]
            .into_iter()
            .chain(throttled)
            .flatten()
            .min()
    }

    /// Whether nobody waits for an answer any more.
    pub fn all_answered(&self) -> bool {
        self.conns.values().all(|conn| conn.phase == Phase::Answered)
    }

    /// The VMs that have a record.
    pub fn recorded(&self) -> impl Iterator<Item = &VmName> {
        self.guests
            .values()
            .filter(|guest| guest.written_ms.is_some())
            .map(|guest| &guest.record.vm)
    }

    fn places(&mut self, plane: Plane) -> &mut Places {
        match plane {
            Plane::Guest => &mut self.guest_places,
            Plane::Host => &mut self.host_places,
        }
    }

    fn on_opened(&mut self, conn: ConnId, plane: Plane, remote: String, out: &mut Vec<Effect>) {
        let phase = if self.stopping {
            out.push(Effect::Evict {
                conn,
                reason: DeclineReason::ShuttingDown,
            });
            Phase::Evicted
        } else {
            self.places(plane).waiting.insert(conn);
            Phase::AwaitingHello
        };
        self.conns.insert(conn, Conn { plane, remote, phase });
        self.make_room(plane, out);
    }

    /// At the limit a connection that was answered goes first, then the oldest without an answer.
    fn make_room(&mut self, plane: Plane, out: &mut Vec<Effect>) {
        let max = match plane {
            Plane::Guest => self.rules.max_connections,
            Plane::Host => self.rules.max_host_connections,
        };
        let places = self.places(plane);
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
                && evicted.phase == Phase::AwaitingHello
            {
                evicted.phase = Phase::Evicted;
            }
        }
    }

    fn on_hello(&mut self, at: At, conn: ConnId, mut hello: Hello, out: &mut Vec<Effect>) {
        let Some(known) = self.conns.get(&conn) else {
            return;
        };
        let (plane, remote) = (known.plane, known.remote.clone());
        // It was evicted, but its hello was on the way already. An answer is fine; a session is
        // not.
        let leaving = known.phase == Phase::Evicted;
        match known.phase {
            Phase::AwaitingHello | Phase::Evicted => {}
            Phase::Storing(_) | Phase::Session(_) | Phase::Answered => return,
        }
        let admitted = match plane {
            Plane::Guest => admit(self.table.as_ref(), self.rules.auth, &hello),
            // Whoever may open the host's socket is the host.
            Plane::Host if hello.vm.key() == "host" => Ok(()),
            Plane::Host => Err(DeclineReason::UnknownVm),
        };
        // From here on a VM's second name counts as its name.
        let called = self.table.as_ref().filter(|_| plane == Plane::Guest);
        let second = match called.and_then(|table| table.called(&hello.vm.key())) {
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
        let proven = plane == Plane::Guest && is_proven(self.table.as_ref(), &hello);
        let verdict = match verdict {
            Ok(Some(_)) if leaving => Err(DeclineReason::SessionLimit),
            Ok(Some(_)) if plane == Plane::Guest && !self.make_place(at, &key, proven, out) => {
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
            listed: listed.is_some() || plane == Plane::Host,
            declined: None,
            session: None,
            capabilities: hello.capabilities,
            remote,
        };
        let run: String = self.rules.run.chars().take(8).collect();
        let session = matches!(verdict, Ok(Some(_))).then(|| {
            let id = format!("s-{}.{run}", conn.0);
            let capabilities = attempt.capabilities.clone();
            let mut session = Session::new(id, spelled.clone(), plane, at.boot_ms, capabilities);
            session.reader.second = second.clone();
            Session { proven, ..session }
        });
        attempt.session = session.as_ref().map(|session| session.id.clone());
        let vm = match verdict {
            Err(reason) => {
                attempt.declined = Some(reason);
                return self.answer(at, conn, attempt, None, out);
            }
            Ok(_) if plane == Plane::Host => return self.answer(at, conn, attempt, session, out),
            Ok(_) => spelled,
        };
        let full = self.table.is_none() && self.guests.len() >= MAX_UNLISTED;
        if full && !self.guests.contains_key(&key) {
            attempt.declined = Some(DeclineReason::StorageError);
            attempt.session = None;
            return self.answer(at, conn, attempt, None, out);
        }
        let record = self.next_record(at, vm, attempt.capabilities.clone(), session.is_some());
        if let Some(guest) = self.guests.get(&key)
            && guest.written_ms.is_some()
            && guest.writable_at() > at.boot_ms
        {
            // The record was written a moment ago, so the file exists; the newer time is written
            // later.
            self.heard(at, record, false, out);
            return self.answer(at, conn, attempt, session, out);
        }
        if let Some(known) = self.conns.get_mut(&conn) {
            known.phase = Phase::Storing(Box::new(Pending {
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
    fn answer(
        &mut self,
        at: At,
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
        if let Some(evidence) = self.attempts.note(at.boot_ms, at.wall_ms, attempt) {
            // The attempt's line comes before the lines of its consequences, such as a VM that
            // became reachable.
            let position = out
                .iter()
                .position(|effect| matches!(effect, Effect::Log(_) | Effect::Tell(_)))
                .unwrap_or(out.len());
            if let Some(vm) = &evidence.known {
                self.announce(at, "handshake", vm, &evidence.event);
            }
            out.splice(
                position..position,
                [Effect::Log(evidence.line), Effect::Tell(evidence.event)],
            );
        }
        match session {
            Some(session) => {
                self.open_session(at, conn, session, out);
                out.push(Effect::Grant { conn, line });
            }
            None => self.reply(conn, line, out),
        }
    }

    fn reply(&mut self, conn: ConnId, line: String, out: &mut Vec<Effect>) {
        let Some(known) = self.conns.get_mut(&conn) else {
            return;
        };
        known.phase = Phase::Answered;
        let plane = known.plane;
        let places = self.places(plane);
        // An evicted connection no longer counts against the limit.
        if places.waiting.remove(&conn) {
            places.answered.insert(conn);
        }
        out.push(Effect::Reply { conn, line });
    }

    fn on_refused(&mut self, at: At, conn: ConnId, refusal: Refusal, attempted: bool, out: &mut Vec<Effect>) {
        let Some(known) = self.conns.get(&conn) else {
            return;
        };
        if !matches!(known.phase, Phase::AwaitingHello | Phase::Evicted) {
            return;
        }
        if !attempted {
            let line = declined_reply(refusal.reason, self.rules.bus_versions);
            return self.reply(conn, line, out);
        }
        let key = refusal.vm.as_ref().map(VmName::key);
        let listed = key.and_then(|key| self.table.as_ref()?.called(&key));
        let attempt = Attempt {
            listed: listed.is_some(),
            vm: listed.map(|listed| listed.name.clone()).or(refusal.vm),
            declined: Some(refusal.reason),
            session: None,
            capabilities: Vec::new(),
            remote: known.remote.clone(),
        };
        self.answer(at, conn, attempt, None, out);
    }

    fn on_closed(&mut self, at: At, conn: ConnId, out: &mut Vec<Effect>) {
        self.end_session(at, conn, Cause::Disconnected, out);
        let Some(known) = self.conns.get(&conn) else {
            return;
        };
        // Its hello was complete, so it counts, although the client is gone.
        if matches!(known.phase, Phase::Storing(_)) {
            return;
        }
        let plane = known.plane;
        let places = self.places(plane);
        places.waiting.remove(&conn);
        places.answered.remove(&conn);
        self.conns.remove(&conn);
    }

    fn on_recorded(
        &mut self,
        at: At,
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
        if !matches!(known.phase, Phase::Storing(_)) {
            return;
        }
        let Phase::Storing(pending) = std::mem::replace(&mut known.phase, Phase::AwaitingHello) else {
            return;
        };
        let Pending {
            mut attempt,
            record,
            mut session,
        } = *pending;
        if made {
            self.heard(at, record, true, out);
        } else {
            attempt.declined = Some(DeclineReason::StorageError);
            attempt.session = None;
            session = None;
            if let Some(guest) = self.guests.get_mut(&vm.key()) {
                guest.written_ms = None;
            }
        }
        self.answer(at, conn, attempt, session, out);
    }

    fn on_stop(&mut self, at: At, out: &mut Vec<Effect>) {
        self.stopping = true;
        self.end_all(at, out);
        for places in [&mut self.guest_places, &mut self.host_places] {
            for conn in std::mem::take(&mut places.waiting) {
                if let Some(known) = self.conns.get_mut(&conn)
                    && known.phase == Phase::AwaitingHello
                {
                    known.phase = Phase::Evicted;
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
