//! The simulated outside of one broker after another: clock, disk, doors, the state thread's
//! loop, and all that can go wrong.
//!
//! Here: what happens when, how effects are done, what must hold after each turn. Not here:
//! connections (`super::thread`), clients (`super::model_client`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use crate::core::broker::bus_log::{BusLog, resume_after};
use crate::core::broker::guests::GuestTable;
use crate::core::broker::outbox::{Budget, Sent};
use crate::core::broker::replay::ReplayLog;
use crate::core::broker::state::{
    BusRules, Chunk, ConnId, ConnPhase, Effect, Input, Peer, Rules, State, Timestamp, step,
};
use crate::core::bus::line::seq_of;
use crate::core::config::{AuthMode, SyncMode};
use crate::core::lines::journal::{Rotation, rotated};
use crate::core::root::handshake_record::HandshakeRecord;
use crate::core::root::records::{GuestRecord, GuestsRecord};
use crate::core::scratch::Scratch;

use super::Dice;
use super::model_client::{Mood, SUBSCRIPTIONS, Truth};
use super::thread::{Conn, Place};

const IDLE_MS: u64 = 60_000;
const SESSIONS_PER_VM: usize = 3;
const QUEUE: usize = 60_000;
const ALL_QUEUES: usize = 90_000;

/// What happened in a schedule, so that a run of many can be seen to have done everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    sessions: u64,
    answers: u64,
    deliveries: u64,
    kept: u64,
    gaps: u64,
    failed_appends: u64,
    crashes: u64,
    reboots: u64,
    cut_off: u64,
    idle: u64,
    stops: u64,
    newest: u64,
    shared: u64,
}

impl Totals {
    /// Both together.
    pub fn add(&mut self, more: &Totals) {
        for (sum, more) in self.all().into_iter().zip((*more).clone().all()) {
            *sum += *more;
        }
    }

    fn all(&mut self) -> [&mut u64; 13] {
        [
            &mut self.sessions,
            &mut self.answers,
            &mut self.deliveries,
            &mut self.kept,
            &mut self.gaps,
            &mut self.failed_appends,
            &mut self.crashes,
            &mut self.reboots,
            &mut self.cut_off,
            &mut self.idle,
            &mut self.stops,
            &mut self.newest,
            &mut self.shared,
        ]
    }

    /// Nothing that can happen was left out.
    pub fn did_everything(mut self) -> bool {
        self.all().into_iter().all(|count| *count > 0)
    }
}

/// See the module.
pub struct World {
    dice: Dice,
    now: u64,
    boot: u64,
    runs: u64,
    state: State,
    table: Option<Vec<(&'static str, Option<u64>)>>,
    scratch: Scratch,
    rotation: Rotation,
    sync: SyncMode,
    rate: u32,
    log: BusLog,
    past: ReplayLog,
    /// `broker.json`: the last number, and whether the last broker stopped in order.
    noted: u64,
    budget: Arc<Budget>,
    conns: BTreeMap<ConnId, Conn>,
    next_conn: u64,
    inbox: VecDeque<Input>,
    replies: Vec<(ConnId, String, bool)>,
    truth: Truth,
    /// Messages that went to a group, and by which.
    taken: BTreeSet<(String, u64)>,
    records: BTreeMap<String, HandshakeRecord>,
    disk_full: bool,
    records_fail: bool,
    numbers: u64,
    stopping: bool,
    /// Somebody removed the log, and no look was had since.
    tampered: bool,
    /// The broker was killed while it wrote: nothing it still wants is done.
    dying: bool,
    /// One seed alone is told as it goes.
    talks: bool,
    totals: Totals,
}

impl World {
    /// A broker that has just started.
    pub fn new(seed: u64) -> World {
        let mut dice = Dice::new(seed);
        let scratch = Scratch::new("simulation");
        let rotation = Rotation {
            max_bytes: [900, 4000, 20_000, 10_000_000][dice.roll(4) as usize],
            keep: [1, 2, 4][dice.roll(3) as usize],
        };
        let sync = [SyncMode::None, SyncMode::Batch][usize::from(dice.one_in(5))];
        let rate = [0, 0, 0, 2][dice.roll(4) as usize];
        let log = BusLog::new(scratch.path("bus.log"), rotation, SyncMode::None);
        let mut world = World {
            state: State::new(rules("run-0", "boot-0", rate)),
            now: 1000,
            boot: 0,
            runs: 0,
            table: None,
            rotation,
            sync,
            rate,
            past: ReplayLog::new(scratch.path("bus.log")),
            log,
            scratch,
            noted: 0,
            budget: Budget::new(QUEUE, ALL_QUEUES),
            conns: BTreeMap::new(),
            next_conn: 0,
            inbox: VecDeque::new(),
            replies: Vec::new(),
            truth: Truth::default(),
            taken: BTreeSet::new(),
            records: BTreeMap::new(),
            disk_full: false,
            records_fail: false,
            numbers: 0,
            stopping: false,
            tampered: false,
            dying: false,
            talks: std::env::var_os("CASTRA_SIM_SEED").is_some(),
            totals: Totals::default(),
            dice,
        };
        world.start(false);
        world
    }

    fn path(&self) -> PathBuf {
        self.scratch.path("bus.log")
    }

    fn at(&self) -> Timestamp {
        Timestamp {
            boot_ms: self.now,
            wall_ms: 1_795_255_200_000 + self.now,
        }
    }

    /// A broker comes up, `torn` and with lines missing or not.
    fn start(&mut self, rebooted: bool) {
        self.runs += 1;
        let (run, boot) = (format!("run-{}", self.runs), format!("boot-{}", self.boot));
        self.state = State::new(rules(&run, &boot, self.rate));
        self.log = BusLog::new(self.path(), self.rotation, SyncMode::None);
        self.budget = Budget::new(QUEUE, ALL_QUEUES);
        let jump = rebooted && self.sync != SyncMode::Batch;
        let opened = self.log.open().unwrap();
        let last = resume_after(opened.last, self.noted, jump);
        self.read_log();
        assert!(
            last >= self.truth.last() || rebooted,
            "numbers would be given again after {last}"
        );
        self.take(Input::LogOpened { last });
        let table = self.guests();
        self.take(table);
        let records: Vec<_> = self.records.values().cloned().collect();
        for record in records {
            let record = Box::new(record);
            let alive = self.dice.one_in(2);
            self.take(Input::Restored { record, alive });
        }
        self.commit();
    }

    fn guests(&self) -> Input {
        let table = self.table.as_ref().map(|guests| {
            let guests = guests
                .iter()
                .map(|(name, launched)| GuestRecord {
                    closed: false,
                    name: name.parse().unwrap(),
                    second_name: None,
                    launch_id: None,
                    launched_boottime_ms: *launched,
                    boot_id: Some(format!("boot-{}", self.boot).into()),
                    token_sha256: None,
                })
                .collect();
            GuestTable::from_record(&GuestsRecord { guests }, &format!("boot-{}", self.boot).into()).unwrap()
        });
        Input::Guests(table)
    }

    // What happens

    /// One thing, whatever the dice say.
    pub fn happen(&mut self) {
        if std::mem::take(&mut self.dying) {
            self.crash();
        }
        match self.dice.roll(1000) {
            0..=59 => self.connect(),
            60..=369 => self.client_speaks(),
            370..=419 => self.client_does_something_else(),
            420..=709 => self.thread_steps(),
            710..=739 => self.drain(),
            740..=889 => self.turn(),
            890..=939 => {
                let leap = [1, 5, 20, 100, 1000, 20_000][self.dice.roll(6) as usize];
                self.now += if self.dice.one_in(30) { IDLE_MS } else { leap };
            }
            940..=959 => self.clients_read(),
            960..=979 => self.faults(),
            980..=987 => {
                self.table = match self.dice.roll(4) {
                    0 => None,
                    1 => Some(vec![("a", None), ("b", None)]),
                    2 => Some(vec![("a", Some(self.now)), ("b", None)]),
                    _ => Some(vec![("a", None), ("b", None), ("c", None)]),
                };
                let table = self.guests();
                self.take(table);
            }
            988..=989 => self.crash(),
            990 => self.reboot(),
            991 => self.log_taken_away(),
            _ => self.look(),
        }
    }

    fn someone(&mut self) -> Option<ConnId> {
        let all: Vec<ConnId> = self.conns.keys().copied().collect();
        (!all.is_empty()).then(|| all[self.dice.roll(all.len() as u64) as usize])
    }

    fn connect(&mut self) {
        if self.stopping {
            return;
        }
        self.next_conn += 1;
        let (peer, vm) = match self.dice.roll(8) {
            0..=2 => (Peer::Guest, "a"),
            3 => (Peer::Guest, "A"),
            4 => (Peer::Guest, "b"),
            5 => (Peer::Guest, "c"),
            _ => (Peer::Host, "host"),
        };
        let capabilities = if self.dice.one_in(8) { "x-none" } else { "bus-v1" };
        let room = [300, 3000, 30_000][self.dice.roll(3) as usize];
        let conn = Conn::new(self.next_conn, peer, vm, capabilities, room);
        let remote = format!("remote-{}", self.next_conn);
        self.inbox.push_back(Input::Opened {
            conn: conn.id,
            peer,
            remote,
        });
        self.conns.insert(conn.id, conn);
    }

    fn client_speaks(&mut self) {
        let Some(id) = self.someone() else {
            return;
        };
        let last = self.truth.last();
        let times = self.dice.roll(6) + 1;
        for _ in 0..times {
            let conn = self.conns.get_mut(&id).unwrap();
            if conn.converses() && !conn.half_closed && !conn.client.broke {
                let said = conn.client.say(&mut self.dice, &mut self.numbers, last);
                conn.sent.extend(said);
            }
        }
    }

    fn client_does_something_else(&mut self) {
        let Some(id) = self.someone() else {
            return;
        };
        let roll = self.dice.roll(10);
        let conn = self.conns.get_mut(&id).unwrap();
        match roll {
            0 if self.dice.one_in(2) => {
                // It is gone; what it had said may still come.
                conn.pipe.broken = true;
                conn.cut = true;
            }
            1 => conn.half_closed |= conn.converses() && self.dice.one_in(2),
            2..=4 => conn.reads = !conn.reads,
            _ => self.client_reads(id, usize::MAX),
        }
    }

    fn clients_read(&mut self) {
        let all: Vec<ConnId> = self.conns.keys().copied().collect();
        for id in all {
            if self.conns[&id].reads {
                let most = if self.dice.one_in(3) { 100 } else { usize::MAX };
                self.client_reads(id, most);
            }
        }
    }

    fn client_reads(&mut self, id: ConnId, most: usize) {
        let conn = self.conns.get_mut(&id).unwrap();
        let taken = most.min(conn.pipe.unread.len());
        let bytes: Vec<u8> = conn.pipe.unread.drain(..taken).collect();
        conn.pipe.room += taken;
        if !conn.pipe.broken {
            conn.client.hear(&bytes, &self.truth);
        }
        for taken in conn.client.taken.drain(..) {
            let what = format!("{taken:?} went to two of a group");
            assert!(self.taken.insert(taken), "{what}");
            self.totals.shared += 1;
        }
    }

    fn thread_steps(&mut self) {
        for _ in 0..=self.dice.roll(12) {
            if let Some(id) = self.someone() {
                self.step_thread(id);
            }
        }
    }

    fn step_thread(&mut self, id: ConnId) {
        let conn = self.conns.get_mut(&id).unwrap();
        let said = conn.step(&self.past, &self.budget, self.now, &mut self.dice);
        self.totals.cut_off += u64::from(matches!(said.first(), Some(Input::QueueFull { .. })));
        self.inbox.extend(said);
    }

    fn drain(&mut self) {
        if let Some(id) = self.someone() {
            let conn = self.conns.get_mut(&id).unwrap();
            if conn.outbox.length() > 0 {
                conn.outbox.drain(&mut conn.pipe, &self.budget);
            }
        }
    }

    fn faults(&mut self) {
        match self.dice.roll(4) {
            0 => self.disk_full = true,
            1 => self.records_fail = true,
            _ => (self.disk_full, self.records_fail) = (false, false),
        }
    }

    /// Everything in memory is lost, the kernel keeps what it has.
    fn crash(&mut self) {
        self.totals.crashes += 1;
        self.look_again();
        self.lose_connections();
        self.start(false);
    }

    fn append_raw(&self, bytes: &[u8]) {
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(self.path())
            .unwrap();
        file.write_all(bytes).unwrap();
    }

    fn lose_connections(&mut self) {
        let all: Vec<ConnId> = self.conns.keys().copied().collect();
        for id in all {
            self.conns.get_mut(&id).unwrap().cut = true;
            self.client_reads(id, usize::MAX);
            self.count(id);
        }
        self.conns.clear();
        self.inbox.clear();
        self.replies.clear();
        self.stopping = false;
    }

    /// Power is lost: the end of the log may be missing, unless every ack waited for the disk.
    fn reboot(&mut self) {
        self.totals.reboots += 1;
        self.look_again();
        self.lose_connections();
        if self.sync != SyncMode::Batch
            && let Ok(file) = File::options().write(true).open(self.path())
        {
            let length = file.metadata().unwrap().len();
            file.set_len(length - self.dice.roll(length.min(600) + 1))
                .unwrap();
            let (left, _) = self.lines();
            let lost = self.truth.messages.iter();
            let lost: Vec<u64> = lost
                .filter(|(seq, kept)| kept.in_log && !left.iter().any(|line| seq_of(line) == Some(**seq)))
                .map(|(seq, _)| *seq)
                .collect();
            for seq in lost {
                self.truth.lose(seq);
            }
        }
        self.boot += 1;
        self.now = 500;
        self.table = None;
        self.start(true);
    }

    fn log_taken_away(&mut self) {
        let _ = fs::remove_file(self.path());
        self.tampered = true;
        self.note_what_is_left();
    }

    /// Once a second in a real broker.
    fn look(&mut self) {
        self.commit();
        self.log.check();
        if !self.log.is_open() && !self.disk_full {
            let opened = self.log.open().unwrap();
            self.read_log();
            let last = resume_after(opened.last, self.noted, false);
            self.take(Input::LogOpened { last });
            // What was taken away must not lower the numbers of the next broker.
            self.noted = self.state.last_kept();
            self.tampered = false;
        }
    }

    /// What somebody removed and nobody saw yet is nobody's promise.
    fn look_again(&mut self) {
        if self.tampered {
            self.disk_full = false;
            self.look();
        }
    }

    // The state thread

    fn turn(&mut self) {
        let times = 1 + self.dice.roll(12);
        for _ in 0..times {
            let Some(input) = self.inbox.pop_front() else {
                break;
            };
            let closed = match &input {
                Input::Closed { conn } => Some(*conn),
                _ => None,
            };
            self.take(input);
            if let Some(conn) = closed {
                self.forget(conn);
            }
        }
        if self.state.due().is_some_and(|due| self.now >= due) {
            self.take(Input::Tick);
        }
        if !self.stopping && self.dice.one_in(1500) {
            self.begin_stop();
        }
        self.commit();
        self.flush();
        if !self.dying {
            self.check();
        }
    }

    fn begin_stop(&mut self) {
        self.totals.stops += 1;
        self.commit();
        self.flush();
        self.stopping = true;
        self.take(Input::Stop);
    }

    fn commit(&mut self) {
        while self.state.uncommitted() {
            self.take(Input::Commit);
        }
        if self.log.take_rotated() {
            self.noted = self.state.last_kept();
            self.note_what_is_left();
        }
    }

    fn flush(&mut self) {
        if self.dying {
            return;
        }
        for (id, line, granted) in std::mem::take(&mut self.replies) {
            let Some(conn) = self.conns.get_mut(&id) else {
                continue;
            };
            let sent = conn
                .outbox
                .send(&mut conn.pipe, &[Chunk::Own(line.into_bytes())], &self.budget);
            assert!(!matches!(sent, Sent::Full(_)));
            conn.granted = Some(granted);
            if !granted {
                conn.outbox.finish();
                conn.finished = true;
            }
        }
    }

    fn forget(&mut self, id: ConnId) {
        self.client_reads(id, usize::MAX);
        self.count(id);
        let conn = self.conns.remove(&id).unwrap();
        let client = &conn.client;
        // What comes when a session was idle for too long, or the broker stops, may be too late.
        let in_order = match client.closed.as_deref() {
            None => conn.half_closed && client.mood == Mood::Frames,
            Some(reason) => reason == "protocol-error",
        };
        if in_order && !conn.cut {
            client.was_answered();
        }
    }

    fn count(&mut self, id: ConnId) {
        let client = &self.conns[&id].client;
        self.totals.answers += client.answered;
        self.totals.deliveries += client.delivered;
        self.totals.gaps += client.gaps_told();
        self.totals.newest += client.newest_told;
        self.totals.idle += u64::from(client.closed.as_deref() == Some("idle"));
    }

    fn take(&mut self, input: Input) {
        let mut todo = VecDeque::from([input]);
        while let Some(input) = todo.pop_front() {
            let at = self.at();
            if self.talks {
                println!("{} {input:?}", self.now);
            }
            for effect in step(&mut self.state, at, input) {
                if self.talks {
                    println!("      {effect:?}");
                }
                if let Some(answer) = self.perform(effect) {
                    todo.push_front(answer);
                }
            }
        }
    }

    /// As `broker::effects` does it.
    fn perform(&mut self, effect: Effect) -> Option<Input> {
        if self.dying {
            return None;
        }
        match effect {
            Effect::Reply { conn, line } => self.replies.push((conn, line, false)),
            Effect::Grant { conn, line } => {
                self.totals.sessions += 1;
                self.replies.push((conn, line, true));
            }
            Effect::Send { conn, parts } => return self.send(conn, &parts),
            Effect::SetDelivery {
                conn,
                delivery: order,
            } => self.conns.get_mut(&conn)?.order = Some(order),
            Effect::End { conn, last } => {
                let full = self.send(conn, &[Chunk::Own(last)]);
                if let Some(conn) = self.conns.get_mut(&conn) {
                    conn.outbox.finish();
                    conn.finished = true;
                }
                return full;
            }
            Effect::Append(lines) => {
                let answer = self.append(&lines);
                return (!self.dying).then_some(answer);
            }
            Effect::Evict { conn, reason } => self.conns.get_mut(&conn)?.evicted = Some(reason),
            Effect::Drop { conn } => {
                let conn = self.conns.get_mut(&conn)?;
                conn.cut = true;
                conn.close(&self.budget);
            }
            Effect::Record { record, asked_by } => {
                let made = !self.records_fail;
                let vm = record.vm.clone();
                if made {
                    self.records.insert(vm.key(), *record);
                } else if !self.state.guests.contains_key(&vm.key()) {
                    // The last word on a VM that has left the project is said once.
                    self.records.remove(&vm.key());
                }
                return Some(Input::Recorded { vm, asked_by, made });
            }
            Effect::SenderLog { lines, ranges, .. } => {
                for range in ranges {
                    assert!(lines[range].ends_with(b"}\n"), "whole lines go to a sender's log");
                }
            }
            Effect::Log(_) | Effect::Emit(_) | Effect::ServiceLog { .. } => {}
        }
        None
    }

    fn send(&mut self, id: ConnId, parts: &[Chunk]) -> Option<Input> {
        let conn = self.conns.get_mut(&id)?;
        let sent = conn.outbox.send(&mut conn.pipe, parts, &self.budget);
        if let Sent::Full(queued) = sent {
            conn.cut = true;
            self.totals.cut_off += 1;
            return Some(Input::QueueFull {
                conn: id,
                queued_bytes: queued as u64,
            });
        }
        if !self.budget.is_exceeded() {
            return None;
        }
        let waiting = self.conns.iter().map(|(id, conn)| (conn.outbox.length(), *id));
        let (queued, conn) = waiting.max()?;
        self.totals.cut_off += 1;
        Some(Input::QueueFull {
            conn,
            queued_bytes: queued as u64,
        })
    }

    // The disk

    fn append(&mut self, lines: &[u8]) -> Input {
        let fails = self.disk_full || self.dice.one_in(60);
        if !fails || !self.log.is_open() {
            let kept = self.log.append(lines).is_ok();
            if kept {
                for line in lines.split_inclusive(|byte| *byte == b'\n') {
                    self.truth.add(&line[..line.len() - 1], false);
                }
                self.totals.kept += 1;
            }
            if self.tampered {
                self.note_what_is_left();
            }
            let open = self.log.is_open();
            return Input::Appended { kept, open };
        }
        self.totals.failed_appends += 1;
        // It comes so far; meanwhile others read what is there.
        let length = fs::metadata(self.path()).map_or(0, |meta| meta.len());
        let upto = self.dice.roll(lines.len() as u64 + 1) as usize;
        let named = self.log.check();
        if named {
            self.append_raw(&lines[..upto]);
        }
        self.thread_steps();
        self.thread_steps();
        if named && !self.tampered && self.dice.one_in(4) {
            self.dying = true;
        } else if named && self.dice.one_in(6) {
            // It can't be cut back.
            self.log = BusLog::new(self.path(), self.rotation, SyncMode::None);
        } else if named {
            let file = File::options().write(true).open(self.path()).unwrap();
            file.set_len(length).unwrap();
        }
        let open = self.log.is_open();
        Input::Appended { kept: false, open }
    }

    /// All whole lines that can be read, oldest first, and where files begin.
    fn lines(&self) -> (Vec<Vec<u8>>, Vec<usize>) {
        let (mut all, mut starts) = (Vec::new(), Vec::new());
        for number in (0..=self.rotation.keep).rev() {
            starts.push(all.len());
            let bytes = fs::read(rotated(&self.path(), number)).unwrap_or_default();
            let whole = bytes.split_inclusive(|byte| *byte == b'\n');
            let whole = whole.filter_map(|line| line.strip_suffix(b"\n"));
            all.extend(whole.map(<[u8]>::to_vec));
        }
        (all, starts)
    }

    /// The log was opened: what was kept must be there, and nothing but the start of what was
    /// being written when it failed.
    fn read_log(&mut self) {
        let (lines, _) = self.lines();
        let last = self.truth.last();
        let mut before = 0;
        let mut seen = 0;
        for line in &lines {
            let seq = seq_of(line).expect("every line has a number");
            assert!(seq > before, "{seq} behind {before}");
            before = seq;
            match self.truth.messages.get(&seq) {
                Some(kept) => {
                    assert_eq!(&kept.line, line, "the log has changed");
                    seen += usize::from(kept.in_log);
                }
                None => {
                    assert!(seq > last, "{seq} is from nowhere");
                    self.truth.add(line, true);
                    seen += 1;
                }
            }
        }
        let expected = self.truth.messages.values().filter(|kept| kept.in_log).count();
        assert_eq!(seen, expected, "messages that were kept are gone");
    }

    /// Rotation or somebody else took files away.
    fn note_what_is_left(&mut self) {
        let (lines, _) = self.lines();
        let left: std::collections::BTreeSet<u64> = lines.iter().filter_map(|line| seq_of(line)).collect();
        for (seq, kept) in &mut self.truth.messages {
            kept.in_log &= left.contains(seq);
        }
    }

    // What must hold

    fn check(&self) {
        let state = &self.state;
        assert!(!state.uncommitted());
        let (mut guests, mut hosts) = (0, 0);
        for (id, conn) in &state.conns {
            let listed = state.vm_sessions.values().any(|conns| conns.contains(id));
            match &conn.phase {
                ConnPhase::Session(session) => {
                    assert!(listed && state.vm_sessions[&session.reader.key].contains(id));
                    assert_eq!(state.index.mentions(*id), session.is_subscribed());
                    match conn.peer {
                        Peer::Guest => guests += 1,
                        Peer::Host => hosts += 1,
                    }
                }
                _ => assert!(!listed && !state.index.mentions(*id), "a dead session is known"),
            }
        }
        assert_eq!(state.guest_occupancy.sessions, guests);
        assert_eq!(state.host_occupancy.sessions, hosts);
        for (key, conns) in &state.vm_sessions {
            assert!(!conns.is_empty() && conns.iter().all(|conn| state.conns.contains_key(conn)));
            assert!(key == "host" || conns.len() <= SESSIONS_PER_VM);
        }
        for (key, guest) in &state.guests {
            if guest.record.broker_run == state.rules.run {
                let flags = (guest.record.bus_session, guest.record.bus_subscribed);
                assert_eq!(flags, state.bus_flags(key), "{key}'s record");
            }
        }
        let waiting: usize = self.conns.values().map(|conn| conn.outbox.length()).sum();
        let longest = self.conns.values().map(|conn| conn.outbox.length()).max();
        assert!(longest.unwrap_or(0) <= QUEUE);
        // Pieces of the past are bounded by themselves, one for each session.
        assert!(waiting <= ALL_QUEUES + QUEUE, "{waiting} bytes wait");
        assert!(self.inbox.len() < 10_000);
    }

    // The end

    /// Everything works again, everybody reads: what was promised is kept before long.
    pub fn come_to_rest(&mut self) {
        if std::mem::take(&mut self.dying) {
            self.crash();
        }
        (self.disk_full, self.records_fail) = (false, false);
        let mut quiet = 0;
        for round in 0.. {
            assert!(round < 2000, "it never comes to rest: {:?}", self.places());
            self.look();
            let all: Vec<ConnId> = self.conns.keys().copied().collect();
            for id in all {
                for _ in 0..4 {
                    self.client_reads(id, usize::MAX);
                    self.step_thread(id);
                    let conn = self.conns.get_mut(&id).unwrap();
                    if conn.outbox.length() > 0 {
                        conn.outbox.drain(&mut conn.pipe, &self.budget);
                    }
                    self.client_reads(id, usize::MAX);
                }
            }
            while !self.inbox.is_empty() {
                self.turn();
            }
            self.turn();
            if std::mem::take(&mut self.dying) {
                self.crash();
            }
            if self.inbox.is_empty() && self.conns.values().all(Conn::is_quiet) {
                quiet += 1;
                if quiet > 2 {
                    break;
                }
            } else {
                quiet = 0;
            }
            // Who lingers needs time to pass; nobody shall become idle by it.
            let lingers = |conn: &Conn| matches!(conn.place, Place::Linger(_));
            if self.conns.values().any(lingers) {
                self.now += 100;
            }
        }
        for conn in self.conns.values_mut() {
            assert_eq!(conn.client.mood, Mood::Frames);
            conn.client.was_answered();
            conn.client.owes_nothing(&self.truth);
        }
    }

    fn places(&self) -> Vec<(ConnId, Place)> {
        self.conns.iter().map(|(id, conn)| (*id, conn.place)).collect()
    }

    /// The broker stops, and nothing is left of anybody.
    pub fn end(mut self) -> Totals {
        if !self.stopping {
            self.begin_stop();
        }
        self.take(Input::Finish);
        self.commit();
        self.flush();
        if std::mem::take(&mut self.dying) {
            self.crash();
            return self.totals;
        }
        self.check();
        assert!(self.state.vm_sessions.is_empty() && self.state.index.is_empty());
        for record in self.records.values() {
            let known = record.broker_run == self.state.rules.run;
            assert!(
                !known || !(record.bus_session || record.bus_subscribed),
                "{record:?}"
            );
        }
        self.lose_connections();
        self.noted = self.state.last_kept();
        self.start(false);
        assert!(self.state.last_kept() >= self.truth.last());
        self.totals
    }
}

fn rules(run: &str, boot: &str, rate: u32) -> Rules {
    Rules {
        run: run.into(),
        boot_id: boot.into(),
        freshness_ms: 45_000,
        auth: AuthMode::Auto,
        max_connections: 8,
        max_host_connections: 3,
        bus_versions: &[1],
        bus: BusRules {
            idle_ms: IDLE_MS,
            sessions_per_vm: SESSIONS_PER_VM,
            subscriptions_per_session: SUBSCRIPTIONS,
            publishes_per_sec_per_vm: rate,
            heartbeat_secs: 15,
        },
    }
}
