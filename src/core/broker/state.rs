//! The broker's whole state, and `step`: what one input does to it (DESIGN §2).
//!
//! Here: connections and their places, who may come, the freshness window, when records and
//! lines are due. Not here: sockets and threads (`broker::listen`), files (`broker::edges`),
//! words on the wire (`broker::protocol`). Nothing in this module blocks, fails or asks a clock.

use std::collections::{BTreeMap, BTreeSet};

use crate::core::config::AuthMode;
use crate::core::events::Event;
use crate::core::name::VmName;
use crate::core::reporter::wall_clock;

use super::attempts::{Attempt, Attempts, line_head};
use super::guests::{Guest, GuestTable, MAX_UNLISTED, RECORD_EVERY_MS, admit};
use super::protocol::{DeclineReason, Hello, Refusal, declined_reply, negotiate, ok_reply};
use super::record::HandshakeRecord;

/// Until a record that couldn't be written is tried again.
const RETRY_MS: u64 = 1000;

/// A connection, numbered from 1 in the order of accept. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(pub u64);

/// When an input came, by both clocks. All deadlines and ages go by `boot_ms`; `wall_ms` is for
/// people to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// CLOCK_BOOTTIME.
    pub boot_ms: u64,
    /// Since the epoch.
    pub wall_ms: u64,
}

/// By which door a connection came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// TCP on the loopback: guests, and whoever else is there.
    Guest,
    /// The Unix socket: the host.
    Host,
}

/// Every reason the state thread wakes up. The list is closed on purpose.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// A connection was accepted.
    Opened {
        /// Its number.
        conn: ConnId,
        /// Its door.
        plane: Plane,
        /// `127.0.0.1:41000`, or `unix`.
        remote: String,
    },
    /// A whole hello came.
    Hello {
        /// From whom.
        conn: ConnId,
        /// What it says.
        hello: Hello,
    },
    /// No hello came, or none that counts.
    Refused {
        /// From whom.
        conn: ConnId,
        /// Why.
        refusal: Refusal,
        /// It sent at least one byte; otherwise it is told, but is no attempt.
        attempted: bool,
    },
    /// The connection is gone.
    Closed {
        /// Which.
        conn: ConnId,
    },
    /// Answer to [`Effect::Record`].
    Recorded {
        /// Whose record.
        vm: VmName,
        /// The hello that waits for it.
        asked_by: Option<ConnId>,
        /// It is on disk now.
        made: bool,
    },
    /// The name of a record's file was taken away.
    RecordLost {
        /// Whose.
        vm: VmName,
    },
    /// `guests.json` as it is now; `None`: there is none, names aren't checked.
    Guests(Option<GuestTable>),
    /// A record found at start, and whether its VM can still be alive.
    Restored {
        /// The record.
        record: Box<HandshakeRecord>,
        /// Its VM runs, or nobody knows.
        alive: bool,
    },
    /// QEMU let its pid file go.
    VmGone {
        /// Which VM.
        vm: VmName,
    },
    /// Something was due.
    Tick,
    /// The broker shall stop: nobody new is let in.
    Stop,
    /// It stops now: whatever was held back is due.
    Finish,
}

/// Everything `step` may ask of the outside. An effect returns nothing; an answer is a new
/// [`Input`].
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Send this line, then end the sending side.
    Reply {
        /// To whom.
        conn: ConnId,
        /// With its line end.
        line: String,
    },
    /// End the wait for its hello; its thread answers with [`Input::Refused`].
    Evict {
        /// Whom.
        conn: ConnId,
        /// Why.
        reason: DeclineReason,
    },
    /// It had its answer and lingers: close it.
    Drop {
        /// Which.
        conn: ConnId,
    },
    /// Write this record; answered by [`Input::Recorded`].
    Record {
        /// The record.
        record: Box<HandshakeRecord>,
        /// The hello that waits for it.
        asked_by: Option<ConnId>,
    },
    /// A line for the log, complete.
    Log(String),
    /// A fact for the journal.
    Tell(Event),
}

/// What stays the same for a broker's whole life.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Id of this run.
    pub run: String,
    /// This host boot.
    pub boot_id: String,
    /// The freshness window.
    pub freshness_ms: u64,
    /// Who must show a token.
    pub auth: AuthMode,
    /// Guests' connections at once.
    pub max_connections: usize,
    /// Host clients at once: places of their own.
    pub max_host_connections: usize,
    /// Versions of the bus spoken here.
    pub bus_versions: &'static [u32],
}

/// How far a connection is.
#[derive(Clone, Debug, PartialEq)]
enum Phase {
    /// Nothing decided.
    AwaitingHello,
    /// Accepted, if the record can be made.
    Storing(Box<Pending>),
    /// Told to go; its thread will say what it had sent.
    Evicted,
    /// Answered; it may linger until it has read that.
    Answered,
}

#[derive(Clone, Debug, PartialEq)]
struct Pending {
    attempt: Attempt,
    record: HandshakeRecord,
}

#[derive(Clone, Debug)]
struct Conn {
    plane: Plane,
    remote: String,
    phase: Phase,
}

/// Places of one door: who waits to be heard and who lingers, oldest first.
#[derive(Clone, Debug, Default)]
struct Places {
    waiting: BTreeSet<ConnId>,
    answered: BTreeSet<ConnId>,
}

/// All the broker knows.
#[derive(Debug)]
pub struct State {
    rules: Rules,
    table: Option<GuestTable>,
    guests: BTreeMap<String, Guest>,
    conns: BTreeMap<ConnId, Conn>,
    guest_places: Places,
    host_places: Places,
    attempts: Attempts,
    /// No guest leaves the window before this.
    leave_due: Option<u64>,
    /// No record held back is due before this.
    write_due: Option<u64>,
    stopping: bool,
}

/// What one input does. Pure: the same state, time and input give the same effects.
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
        Input::Closed { conn } => state.on_closed(conn),
        Input::Recorded { vm, asked_by, made } => state.on_recorded(at, &vm, asked_by, made, out),
        Input::RecordLost { vm } => state.on_record_lost(at, &vm, out),
        Input::Guests(table) => state.on_guests(at, table, out),
        Input::Restored { record, alive } => state.on_restored(at, *record, alive),
        Input::VmGone { vm } => state.on_vm_gone(at, &vm, out),
        Input::Tick => state.on_tick(at, false, out),
        Input::Stop => state.on_stop(out),
        Input::Finish => state.on_tick(at, true, out),
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
            conns: BTreeMap::new(),
            guest_places: Places::default(),
            host_places: Places::default(),
            attempts: Attempts::default(),
            leave_due: None,
            write_due: None,
            stopping: false,
        }
    }

    /// When [`Input::Tick`] is next worth a call.
    pub fn due(&self) -> Option<u64> {
        [self.attempts.due(), self.leave_due, self.write_due]
            .into_iter()
            .flatten()
            .min()
    }

    /// Nobody waits for an answer any more.
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

    /// At the cap somebody who has had an answer goes first, then the oldest without one.
    fn make_room(&mut self, plane: Plane, out: &mut Vec<Effect>) {
        let max = match plane {
            Plane::Guest => self.rules.max_connections,
            Plane::Host => self.rules.max_host_connections,
        };
        let places = self.places(plane);
        if places.waiting.len() + places.answered.len() <= max {
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

    fn on_hello(&mut self, at: At, conn: ConnId, hello: Hello, out: &mut Vec<Effect>) {
        let Some(known) = self.conns.get(&conn) else {
            return;
        };
        let (plane, remote) = (known.plane, known.remote.clone());
        match known.phase {
            // Told to go, but its hello was on its way already: it needs no place any more.
            Phase::AwaitingHello | Phase::Evicted => {}
            Phase::Storing(_) | Phase::Answered => return,
        }
        let admitted = match plane {
            Plane::Guest => admit(self.table.as_ref(), self.rules.auth, &hello),
            // Whoever may open the socket is the host, and nobody else.
            Plane::Host if hello.vm.key() == "host" => Ok(()),
            Plane::Host => Err(DeclineReason::UnknownVm),
        };
        let verdict = match admitted {
            Err(reason) => Err(reason),
            Ok(()) if self.stopping => Err(DeclineReason::ShuttingDown),
            Ok(()) => negotiate(&hello.capabilities, self.rules.bus_versions).map(|_| ()),
        };
        let key = hello.vm.key();
        let listed = self.table.as_ref().and_then(|table| table.get(&key));
        // As the project spells it; without a project, as whoever came first under that name.
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
        let vm = match verdict {
            Err(reason) => {
                attempt.declined = Some(reason);
                return self.answer(at, conn, attempt, out);
            }
            Ok(()) if plane == Plane::Host => return self.answer(at, conn, attempt, out),
            Ok(()) => spelled,
        };
        let full = self.table.is_none() && self.guests.len() >= MAX_UNLISTED;
        if full && !self.guests.contains_key(&key) {
            attempt.declined = Some(DeclineReason::StorageError);
            return self.answer(at, conn, attempt, out);
        }
        let record = self.next_record(at, vm, attempt.capabilities.clone());
        if let Some(guest) = self.guests.get(&key)
            && guest.written_ms.is_some()
            && guest.writable_at() > at.boot_ms
        {
            // Written a moment ago: the file is there, the newer time follows.
            self.heard(at, record, false, out);
            return self.answer(at, conn, attempt, out);
        }
        if let Some(known) = self.conns.get_mut(&conn) {
            known.phase = Phase::Storing(Box::new(Pending {
                attempt,
                record: record.clone(),
            }));
        }
        out.push(Effect::Record {
            record: Box::new(record),
            asked_by: Some(conn),
        });
    }

    /// What the record will say after this hello. What was told over the bus in this launch
    /// stays; a new launch begins empty.
    fn next_record(&self, at: At, vm: VmName, capabilities: Vec<String>) -> HandshakeRecord {
        let key = vm.key();
        let before = self.guests.get(&key).map(|guest| &guest.record);
        let before = before.filter(|record| self.counts(&key, record));
        HandshakeRecord {
            vm,
            boot_id: self.rules.boot_id.clone(),
            broker_run: self.rules.run.clone(),
            handshake_boottime_ms: at.boot_ms,
            heard_boottime_ms: at.boot_ms,
            heard_at: wall(at),
            capabilities,
            bus_session: false,
            bus_subscribed: false,
            last_publish_boottime_ms: before.and_then(|record| record.last_publish_boottime_ms),
            last_heartbeat_boottime_ms: before.and_then(|record| record.last_heartbeat_boottime_ms),
            guest_metrics: before.and_then(|record| record.guest_metrics.clone()),
        }
    }

    /// A record belongs to one launch: an older hand-shake is another guest's.
    fn counts(&self, key: &str, record: &HandshakeRecord) -> bool {
        let launched = self
            .table
            .as_ref()
            .and_then(|table| table.get(key)?.launched_boottime_ms);
        record.boot_id == self.rules.boot_id
            && launched.is_none_or(|launched| record.handshake_boottime_ms >= launched)
    }

    /// Takes proof of life in; `written` if it is on disk already.
    fn heard(&mut self, at: At, record: HandshakeRecord, written: bool, out: &mut Vec<Effect>) {
        let window = self.rules.freshness_ms;
        let vm = record.vm.clone();
        let guest = self.guests.entry(vm.key()).or_insert_with(|| Guest {
            record: record.clone(),
            fresh: false,
            written_ms: None,
            dirty: false,
        });
        guest.record = record;
        if written {
            guest.written_ms = Some(at.boot_ms);
        }
        guest.dirty = !written;
        let (entered, leaves_at, writable_at) = (!guest.fresh, guest.leaves_at(window), guest.writable_at());
        guest.fresh = true;
        self.leave_due = Some(self.leave_due.map_or(leaves_at, |due| due.min(leaves_at)));
        if !written {
            self.write_due = Some(self.write_due.map_or(writable_at, |due| due.min(writable_at)));
        }
        if entered {
            tell_freshness(at, &vm, true, 0, out);
        }
    }

    /// The one answer of a connection: evidence first, so that who reads `ok` finds it logged.
    fn answer(&mut self, at: At, conn: ConnId, attempt: Attempt, out: &mut Vec<Effect>) {
        let line = match attempt.declined {
            Some(reason) => declined_reply(reason, self.rules.bus_versions),
            None => ok_reply(),
        };
        if let Some(evidence) = self.attempts.note(at.boot_ms, at.wall_ms, attempt) {
            // The attempt's line comes before what it led to (a VM entering the window).
            let position = out
                .iter()
                .position(|effect| matches!(effect, Effect::Log(_) | Effect::Tell(_)))
                .unwrap_or(out.len());
            out.splice(
                position..position,
                [Effect::Log(evidence.line), Effect::Tell(evidence.event)],
            );
        }
        self.reply(conn, line, out);
    }

    fn reply(&mut self, conn: ConnId, line: String, out: &mut Vec<Effect>) {
        let Some(known) = self.conns.get_mut(&conn) else {
            return;
        };
        known.phase = Phase::Answered;
        let plane = known.plane;
        let places = self.places(plane);
        // Who was told to go has none any more.
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
        let listed = key.and_then(|key| self.table.as_ref()?.get(&key));
        let attempt = Attempt {
            listed: listed.is_some(),
            vm: listed.map(|listed| listed.name.clone()).or(refusal.vm),
            declined: Some(refusal.reason),
            session: None,
            capabilities: Vec::new(),
            remote: known.remote.clone(),
        };
        self.answer(at, conn, attempt, out);
    }

    fn on_closed(&mut self, conn: ConnId) {
        let Some(known) = self.conns.get(&conn) else {
            return;
        };
        // Its hello was whole: it counts, though nobody is left to be told.
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
        let Phase::Storing(pending) = std::mem::replace(&mut known.phase, Phase::AwaitingHello) else {
            known.phase = Phase::Answered;
            return;
        };
        let Pending { mut attempt, record } = *pending;
        if made {
            self.heard(at, record, true, out);
        } else {
            attempt.declined = Some(DeclineReason::StorageError);
            if let Some(guest) = self.guests.get_mut(&vm.key()) {
                guest.written_ms = None;
            }
        }
        self.answer(at, conn, attempt, out);
    }

    fn on_record_lost(&mut self, at: At, vm: &VmName, out: &mut Vec<Effect>) {
        if let Some(guest) = self.guests.get_mut(&vm.key()) {
            guest.written_ms = None;
            guest.dirty = false;
            out.push(Effect::Log(format!(
                "{} record of vm:{vm} was taken away, made anew",
                line_head(at.wall_ms, "WARN")
            )));
            out.push(Effect::Record {
                record: Box::new(guest.record.clone()),
                asked_by: None,
            });
        }
    }

    fn on_guests(&mut self, at: At, table: Option<GuestTable>, out: &mut Vec<Effect>) {
        self.table = table;
        let Some(table) = self.table.as_ref() else {
            return;
        };
        let mut gone = Vec::new();
        for (key, guest) in &mut self.guests {
            match table.get(key) {
                None => gone.push(key.clone()),
                // The record's file bears the name's spelling.
                Some(listed) if listed.name != guest.record.vm => {
                    guest.record.vm = listed.name.clone();
                    guest.written_ms = None;
                }
                Some(_) => {}
            }
        }
        for key in gone {
            self.leave(at, &key, out);
            self.guests.remove(&key);
        }
        let stale: Vec<String> = self
            .guests
            .iter()
            .filter(|(key, guest)| guest.fresh && !self.counts(key, &guest.record))
            .map(|(key, _)| key.clone())
            .collect();
        for key in stale {
            self.leave(at, &key, out);
        }
    }

    /// A hand-shake outlives the broker that heard it.
    fn on_restored(&mut self, at: At, record: HandshakeRecord, alive: bool) {
        let key = record.vm.key();
        let unwanted = match &self.table {
            Some(table) => table.get(&key).is_none_or(|listed| listed.name != record.vm),
            None => self.guests.len() >= MAX_UNLISTED || self.guests.contains_key(&key),
        };
        if unwanted || record.boot_id != self.rules.boot_id || record.heard_boottime_ms > at.boot_ms {
            return;
        }
        let counts = self.counts(&key, &record);
        let guest = Guest {
            record,
            fresh: false,
            written_ms: Some(at.boot_ms.saturating_sub(RECORD_EVERY_MS)),
            dirty: false,
        };
        let fresh = alive && counts && guest.age_ms(at.boot_ms) <= self.rules.freshness_ms;
        let leaves_at = guest.leaves_at(self.rules.freshness_ms);
        self.guests.insert(key, Guest { fresh, ..guest });
        if fresh {
            self.leave_due = Some(self.leave_due.map_or(leaves_at, |due| due.min(leaves_at)));
        }
    }

    fn on_vm_gone(&mut self, at: At, vm: &VmName, out: &mut Vec<Effect>) {
        self.leave(at, &vm.key(), out);
    }

    fn leave(&mut self, at: At, key: &str, out: &mut Vec<Effect>) {
        if let Some(guest) = self.guests.get_mut(key)
            && guest.fresh
        {
            guest.fresh = false;
            let age = guest.age_ms(at.boot_ms);
            tell_freshness(at, &guest.record.vm, false, age, out);
        }
    }

    fn on_tick(&mut self, at: At, at_once: bool, out: &mut Vec<Effect>) {
        for evidence in self.attempts.flush(at.boot_ms, at.wall_ms, at_once) {
            out.push(Effect::Log(evidence.line));
            out.push(Effect::Tell(evidence.event));
        }
        if self.leave_due.is_some_and(|due| at.boot_ms >= due) {
            let window = self.rules.freshness_ms;
            let late: Vec<String> = self
                .guests
                .iter()
                .filter(|(_, guest)| guest.fresh && at.boot_ms >= guest.leaves_at(window))
                .map(|(key, _)| key.clone())
                .collect();
            for key in late {
                self.leave(at, &key, out);
            }
            let fresh = self.guests.values().filter(|guest| guest.fresh);
            self.leave_due = fresh.map(|guest| guest.leaves_at(window)).min();
        }
        if self.write_due.is_some_and(|due| at_once || at.boot_ms >= due) {
            let mut next: Option<u64> = None;
            for guest in self.guests.values_mut().filter(|guest| guest.dirty) {
                let writable_at = guest.writable_at();
                if !at_once && writable_at > at.boot_ms {
                    next = Some(next.map_or(writable_at, |due| due.min(writable_at)));
                    continue;
                }
                guest.dirty = false;
                guest.written_ms = Some(at.boot_ms);
                out.push(Effect::Record {
                    record: Box::new(guest.record.clone()),
                    asked_by: None,
                });
            }
            self.write_due = next;
        }
    }

    fn on_stop(&mut self, out: &mut Vec<Effect>) {
        self.stopping = true;
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

fn wall(at: At) -> String {
    wall_clock(std::time::UNIX_EPOCH + std::time::Duration::from_millis(at.wall_ms))
}

/// Told once whenever a VM enters or leaves the window: one line, one event.
fn tell_freshness(at: At, vm: &VmName, reachable: bool, age_ms: u64, out: &mut Vec<Effect>) {
    out.push(Effect::Log(format!(
        "{} freshness of vm:{vm} reachable={reachable} last_handshake_age_ms={age_ms}",
        line_head(at.wall_ms, "INFO")
    )));
    out.push(Effect::Tell(Event::BrokerFreshness {
        vm: vm.clone(),
        reachable,
        last_handshake_age_ms: Some(age_ms),
    }));
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
