//! Performs the effects that `step` asks for: answers, files, log lines, events.
//!
//! Here: performing effects, and the check once a second that the broker's files still exist. Not
//! here: any decision (`broker::state`), what happens to the VMs (`broker::vm_watch`), the threads
//! (`broker::serve`).
//!
//! A full disk or a missing directory never ends the broker: lost lines are counted, and the count
//! is logged as soon as there is room again.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crate::core::bus::line::BusLine;
use crate::core::events::Event;
use crate::core::events::contract::Stamped;
use crate::core::host;
use crate::core::id::RunId;
use crate::core::lines::journal::{Journal, Rotation};
use crate::core::logs;
use crate::core::name::VmName;
use crate::core::reporter::wall_clock;
use crate::core::root::alive::qemu_pid;
use crate::core::root::paths::StateRoot;
use crate::core::root::records::{self, GuestsRecord};

use super::attempts::log_prefix;
use super::bus_log::{BusLog, last_kept};
use super::connection::Connection;
use super::guests::GuestTable;
use super::outbox::Sent;
use super::reboot_watch::RebootWatch;
use super::session_loop::Sessions;
use super::state::{Chunk, ConnId, Effect, Input, Timestamp};
use super::vm_watch::VmWatch;
use crate::core::root::handshake_record::{RecordRead, RecordWriter, read_record};
use crate::core::time::{millis, of_unix_ms};

/// How many senders' own logs are kept open.
const MAX_OPEN_SENDER_LOGS: usize = 64;

/// How long lines may wait before they are appended to their sender's own log, so that one append
/// writes many: at one publish at a time the five system calls of an append were half of all. Less
/// than it takes to start a program that reads such a log.
const SENDER_LOG_DELAY_MS: u64 = 2;

/// Bytes that may wait for all senders' logs together; more are appended at once.
const SENDER_LOG_BUFFER_BYTES: usize = 512 * 1024;

/// How many records are read at start. A folder with more files doesn't hold guests' records alone.
const MAX_RESTORED: usize = 4096;

/// A file of lines that is opened again after every error.
struct LineFile {
    path: PathBuf,
    rotation: Rotation,
    journal: Option<Journal>,
    lost: u64,
}

impl LineFile {
    fn new(path: PathBuf, rotation: Rotation) -> LineFile {
        LineFile {
            path,
            rotation,
            journal: None,
            lost: 0,
        }
    }

    /// Appends lines with one write. `Ok(n)`: written, after `n` lines before them were lost.
    fn append(&mut self, lines: &[String]) -> io::Result<u64> {
        let mut bytes = lines.join("\n").into_bytes();
        bytes.push(b'\n');
        self.append_bytes(&bytes)
    }

    /// Appends lines that have their line ends.
    fn append_bytes(&mut self, lines: &[u8]) -> io::Result<u64> {
        let outcome = self.journal().and_then(|journal| journal.append_bytes(lines));
        match outcome {
            Ok(()) => Ok(std::mem::take(&mut self.lost)),
            Err(error) => {
                // A file that couldn't be written is opened again next time, which checks its tail.
                self.journal = None;
                self.lost += lines.iter().filter(|byte| **byte == b'\n').count() as u64;
                Err(error)
            }
        }
    }

    fn journal(&mut self) -> io::Result<&mut Journal> {
        let journal = match self.journal.take() {
            Some(journal) => journal,
            None => Journal::open(&self.path, self.rotation)?,
        };
        Ok(self.journal.insert(journal))
    }

    /// Makes the file again if it was removed.
    fn check(&mut self) {
        if !host::is_there(&self.path) {
            self.journal = None;
            let _ = self.journal();
        }
    }
}

/// A reply that waits until the log lines before it are written.
enum PendingReply {
    /// The connection ends after it.
    Answer(Arc<Connection>, String),
    /// Frames follow.
    Grant(Arc<Connection>, String),
}

/// What tells whether a file was replaced or changed since it was last read.
type FileStamp = Option<(u64, i64, i64, u64)>;

/// Everything outside the state that the state thread reads or writes.
pub struct EffectHandler {
    paths: StateRoot,
    /// The state root's path as the broker opens its files, and as people know it.
    shown: [String; 2],
    run: RunId,
    began: Instant,
    seq: u64,
    rotation: Rotation,
    connections: HashMap<ConnId, Arc<Connection>>,
    sessions: Arc<Sessions>,
    bus: BusLog,
    sender_logs: BTreeMap<VmName, LineFile>,
    /// Lines that wait for their senders' own logs.
    sender_lines: BTreeMap<VmName, Vec<u8>>,
    sender_line_bytes: usize,
    /// When they have to be written.
    sender_logs_due_at: Option<u64>,
    log: LineFile,
    events: LineFile,
    writers: BTreeMap<VmName, RecordWriter>,
    guests_stamp: Option<FileStamp>,
    guests: GuestsRecord,
    vm_watch: VmWatch,
    reboot_watch: RebootWatch,
    pending_log_lines: Vec<String>,
    pending_events: Vec<String>,
    replies: Vec<PendingReply>,
    last_error_ms: Option<u64>,
}

impl EffectHandler {
    /// A handler for one run of the broker. Opens nothing yet.
    pub fn new(
        paths: StateRoot,
        shown: &Path,
        run: RunId,
        rotation: Rotation,
        bus: BusLog,
        sessions: Arc<Sessions>,
    ) -> EffectHandler {
        EffectHandler {
            rotation,
            sessions,
            bus,
            sender_logs: BTreeMap::new(),
            sender_lines: BTreeMap::new(),
            sender_line_bytes: 0,
            sender_logs_due_at: None,
            log: LineFile::new(paths.broker_log(), rotation),
            events: LineFile::new(paths.broker_events(), rotation),
            shown: [paths.dir(), shown].map(|path| path.display().to_string()),
            paths,
            run,
            began: Instant::now(),
            seq: 0,
            connections: HashMap::new(),
            writers: BTreeMap::new(),
            guests_stamp: None,
            guests: GuestsRecord::default(),
            vm_watch: VmWatch::default(),
            reboot_watch: RebootWatch::default(),
            pending_log_lines: Vec::new(),
            pending_events: Vec::new(),
            replies: Vec::new(),
            last_error_ms: None,
        }
    }

    /// Adds a connection, so that it can be answered.
    pub fn add_connection(&mut self, connection: Arc<Connection>) {
        self.connections.insert(connection.id, connection);
    }

    /// Removes a connection that is gone.
    pub fn remove_connection(&mut self, conn: ConnId) {
        self.connections.remove(&conn);
    }

    /// Ends all connections.
    pub fn close_all(&mut self) {
        for (_, connection) in self.connections.drain() {
            connection.close(&self.sessions.budget);
        }
    }

    /// Performs one effect; lines, events and answers wait for [`EffectHandler::flush`].
    pub fn perform(&mut self, at: Timestamp, effect: Effect) -> Option<Input> {
        match effect {
            Effect::Reply { conn, line } => {
                if let Some(connection) = self.connections.get(&conn) {
                    self.replies
                        .push(PendingReply::Answer(Arc::clone(connection), line));
                }
                None
            }
            Effect::Grant { conn, line } => {
                if let Some(connection) = self.connections.get(&conn) {
                    self.replies
                        .push(PendingReply::Grant(Arc::clone(connection), line));
                }
                None
            }
            Effect::Send { conn, parts } => self.send(conn, &parts),
            Effect::SetDelivery { conn, delivery } => {
                if let Some(connection) = self.connections.get(&conn) {
                    connection.set_delivery(delivery);
                }
                None
            }
            Effect::End { conn, last } => {
                let full = self.send(conn, &[Chunk::Own(last)]);
                if let Some(connection) = self.connections.get(&conn) {
                    connection.finish();
                }
                full
            }
            Effect::Append(lines) => Some(self.append(at, &lines)),
            Effect::SenderLog { vm, lines, ranges } => {
                self.buffer_sender_lines(at, vm, &lines, &ranges);
                None
            }
            Effect::ServiceLog { vm, payloads } => {
                self.service_log(at, &vm, &payloads);
                None
            }
            Effect::Evict { conn, reason } => {
                if let Some(connection) = self.connections.get(&conn) {
                    connection.evict(reason);
                }
                None
            }
            Effect::Drop { conn } => {
                if let Some(connection) = self.connections.get(&conn) {
                    connection.close(&self.sessions.budget);
                }
                None
            }
            Effect::Record { record, asked_by } => {
                let vm = record.vm.clone();
                let writer = self
                    .writers
                    .entry(vm.clone())
                    .or_insert_with(|| RecordWriter::new(self.paths.handshake(&vm)));
                let written = writer.write(&record);
                let made = written.is_ok();
                if let Err(error) = written {
                    let path = self.paths.handshake(&vm);
                    self.log_error(at, &format!("can't write {}: {error}", path.display()));
                }
                Some(Input::Recorded { vm, asked_by, made })
            }
            Effect::Log(line) => {
                self.pending_log_lines.push(line);
                None
            }
            Effect::Emit(event) => {
                self.emit(at, event);
                None
            }
        }
    }

    /// Sends to one session. If its queue is full, or all queues together are too long, the answer
    /// names the session that the state should cut off: this one, or the one with the longest
    /// queue.
    fn send(&mut self, conn: ConnId, parts: &[Chunk]) -> Option<Input> {
        let connection = self.connections.get(&conn)?;
        let sent = self.sessions.send(connection, parts);
        if let Sent::Full(queued) = sent {
            let queued_bytes = queued as u64;
            return Some(Input::QueueFull { conn, queued_bytes });
        }
        if sent == Sent::NeedsDrain || self.sessions.budget.is_exceeded() {
            return self.longest_queue();
        }
        None
    }

    fn longest_queue(&self) -> Option<Input> {
        if !self.sessions.budget.is_exceeded() {
            return None;
        }
        let waiting = self
            .connections
            .iter()
            .map(|(conn, connection)| (connection.queued_bytes(), *conn));
        let (queued, conn) = waiting.max()?;
        let queued_bytes = queued as u64;
        Some(Input::QueueFull { conn, queued_bytes })
    }

    /// Tells a connection that the state thread has processed this many of its bytes.
    pub fn return_credit(&self, conn: ConnId, bytes: usize) {
        if let Some(connection) = self.connections.get(&conn) {
            connection.return_credit(bytes);
        }
    }

    /// Opens the log of the bus if it isn't open. `floor`: the last number that was given before.
    /// `torn`: the last broker didn't stop in order, so senders' own logs may lack their last
    /// lines.
    pub fn open_bus(&mut self, at: Timestamp, floor: impl FnOnce(u64) -> u64, torn: bool) -> Option<Input> {
        if self.bus.is_open() {
            return None;
        }
        match self.bus.open() {
            Ok(opened) => {
                if opened.cut_bytes > 0 {
                    let text = format!(
                        "{}: removed {} bytes of an incomplete last message, which had no ack",
                        self.bus.path().display(),
                        opened.cut_bytes
                    );
                    self.log(at, "WARN", &text);
                }
                if torn {
                    self.complete_sender_logs(at);
                }
                let last = floor(opened.last);
                if !opened.ascending {
                    let text = format!(
                        "{}: the numbers of its messages don't rise, so the file was damaged or joined from \
                         others; new messages continue after {last}",
                        self.bus.path().display()
                    );
                    self.log(at, "WARN", &text);
                }
                let replay_log = &self.sessions.replay_log;
                replay_log.set_unordered_upto(if opened.ascending { 0 } else { opened.last });
                Some(Input::LogOpened { last })
            }
            Err(error) => {
                let text = format!(
                    "can't open {}: {error}; publishes are refused",
                    self.bus.path().display()
                );
                self.log_error(at, &text);
                None
            }
        }
    }

    fn append(&mut self, at: Timestamp, lines: &[u8]) -> Input {
        if self.bus.is_full() {
            // After a kill, lines that the senders' logs lack are looked for in the newest file
            // alone.
            self.flush_sender_logs(at);
        }
        let kept = self.bus.append(lines);
        if let Err(error) = &kept {
            let text = format!("can't write {}: {error}", self.bus.path().display());
            self.log_error(at, &text);
        }
        Input::Appended {
            kept: kept.is_ok(),
            open: self.bus.is_open(),
        }
    }

    /// Whether every session was sent all that it should get.
    pub fn all_sent(&self) -> bool {
        self.connections
            .values()
            .all(|connection| connection.queued_bytes() == 0)
    }

    /// Has the log of the bus synced; called once a second.
    pub fn sync_bus(&mut self) {
        self.bus.sync_soon();
    }

    /// True once after each rotation of the log of the bus.
    pub fn bus_rotated(&mut self) -> bool {
        self.bus.take_rotated()
    }

    fn sender_log(&mut self, vm: &VmName) -> &mut LineFile {
        // Open logs of a thousand senders would take a thousand descriptors.
        if self.sender_logs.len() >= MAX_OPEN_SENDER_LOGS && !self.sender_logs.contains_key(vm) {
            self.sender_logs.clear();
        }
        let path = self.paths.bus_log_of(vm.as_str());
        let rotation = self.rotation;
        self.sender_logs
            .entry(vm.clone())
            .or_insert_with(|| LineFile::new(path, rotation))
    }

    fn buffer_sender_lines(&mut self, at: Timestamp, vm: VmName, lines: &[u8], ranges: &[Range<usize>]) {
        let waiting = self.sender_lines.entry(vm).or_default();
        for range in ranges {
            waiting.extend_from_slice(&lines[range.clone()]);
            self.sender_line_bytes += range.len();
        }
        self.sender_logs_due_at
            .get_or_insert(at.boot_ms + SENDER_LOG_DELAY_MS);
        if self.sender_line_bytes >= SENDER_LOG_BUFFER_BYTES {
            self.flush_sender_logs(at);
        }
    }

    /// When waiting lines have to be in their senders' own logs.
    pub fn sender_logs_due(&self) -> Option<u64> {
        self.sender_logs_due_at
    }

    /// Appends all waiting lines to the senders' own logs.
    pub fn flush_sender_logs(&mut self, at: Timestamp) {
        self.sender_logs_due_at = None;
        self.sender_line_bytes = 0;
        for (vm, lines) in std::mem::take(&mut self.sender_lines) {
            if let Err(error) = self.sender_log(&vm).append_bytes(&lines) {
                let path = self.paths.bus_log_of(vm.as_str());
                self.log_error(at, &format!("can't write {}: {error}", path.display()));
            }
        }
    }

    /// Copies the lines that a killed broker had acked but not copied: each sender's lines after
    /// the last one in its own log. Only the newest file of the log can hold such lines.
    fn complete_sender_logs(&mut self, at: Timestamp) {
        let Ok(file) = host::open_state_file(self.bus.path()) else {
            return;
        };
        let mut known: BTreeMap<String, u64> = BTreeMap::new();
        let mut missing: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in BufReader::new(file).split(b'\n').map_while(Result::ok) {
            let Some(parsed) = BusLine::parse(&line) else {
                continue;
            };
            let last = known.entry(parsed.vm.to_owned()).or_insert_with(|| {
                // The sender's log may have been rotated a moment before, and be empty.
                let last = last_kept(&self.paths.bus_log_of(parsed.vm));
                last.ok().flatten().unwrap_or(0)
            });
            if parsed.seq > *last {
                let text = String::from_utf8_lossy(&line).into_owned();
                missing.entry(parsed.vm.to_owned()).or_default().push(text);
            }
        }
        for (vm, lines) in missing {
            let Ok(vm) = vm.parse::<VmName>() else {
                continue;
            };
            if let Err(error) = self.sender_log(&vm).append(&lines) {
                let path = self.paths.bus_log_of(vm.as_str());
                self.log_error(at, &format!("can't write {}: {error}", path.display()));
            }
        }
    }

    /// Appends what a Vizier reported to its service log: text, or anything else as JSON.
    fn service_log(&mut self, at: Timestamp, vm: &VmName, payloads: &[String]) {
        let told =
            |payload: &String| serde_json::from_str::<String>(payload).unwrap_or_else(|_| payload.clone());
        let text = payloads.iter().map(told).collect::<Vec<_>>().join("\n");
        let path = self.paths.vizier_log(vm);
        if let Err(error) = logs::append_escaped(&path, self.rotation, &text) {
            self.log_error(at, &format!("can't write {}: {error}", path.display()));
        }
    }

    /// Adds a line to the broker's log.
    pub fn log(&mut self, at: Timestamp, level: &str, text: &str) {
        let [named, known] = &self.shown;
        let text = text.replace(named.as_str(), known);
        self.pending_log_lines
            .push(format!("{} {text}", log_prefix(at.wall_ms, level)));
    }

    /// Logs an error that may repeat with every connection, such as a full disk: at most once in
    /// ten seconds.
    pub fn log_error(&mut self, at: Timestamp, text: &str) {
        if self.last_error_ms.is_none_or(|said| at.boot_ms >= said + 10_000) {
            self.last_error_ms = Some(at.boot_ms);
            self.log(at, "ERROR", text);
        }
    }

    /// A fact for the journal.
    pub fn emit(&mut self, at: Timestamp, event: Event) {
        let stamped = Stamped {
            ts: wall_clock(of_unix_ms(at.wall_ms)),
            offset_ms: millis(self.began.elapsed()),
            seq: self.seq,
            run: self.run.clone(),
            event,
        };
        self.seq += 1;
        self.pending_events.push(stamped.contract_line());
    }

    /// Writes events and log lines, then sends the answers: a client that reads `ok` can find it in
    /// the log.
    pub fn flush(&mut self, at: Timestamp) {
        if !self.pending_events.is_empty() {
            let told = std::mem::take(&mut self.pending_events);
            let outcome = self.events.append(&told);
            self.log_lost(at, "events", outcome);
        }
        if !self.pending_log_lines.is_empty() {
            let lines = std::mem::take(&mut self.pending_log_lines);
            let outcome = self.log.append(&lines);
            self.log_lost(at, "log lines", outcome);
            if !self.pending_log_lines.is_empty() {
                let lines = std::mem::take(&mut self.pending_log_lines);
                let _ = self.log.append(&lines);
            }
        }
        for reply in self.replies.drain(..) {
            match reply {
                PendingReply::Answer(connection, line) => connection.reply_and_close(&line),
                PendingReply::Grant(connection, line) => connection.grant(&line, &self.sessions.budget),
            }
        }
    }

    fn log_lost(&mut self, at: Timestamp, what: &str, outcome: io::Result<u64>) {
        match outcome {
            Ok(0) => {}
            Ok(lost) => self.log(
                at,
                "WARN",
                &format!("{lost} {what} before this one were lost: there was no room"),
            ),
            Err(error) => log::warn!("can't keep {what}: {error}"),
        }
    }

    /// Loads `guests.json` if it has changed. Called before every hello is judged: a guest may be
    /// up before a check once a second would notice its launch.
    pub fn load_changed_guests(&mut self, at: Timestamp) -> Option<Input> {
        let path = self.paths.guests();
        let seen = file_stamp(&path);
        if self.guests_stamp == Some(seen) {
            return None;
        }
        self.guests_stamp = Some(seen);
        let loaded = match records::load::<GuestsRecord>(&path) {
            Ok(loaded) => loaded,
            Err(failure) => {
                self.log(
                    at,
                    "ERROR",
                    &format!("{failure}; the broker keeps the guests it knew before"),
                );
                return None;
            }
        };
        let Some(record) = loaded else {
            self.guests = GuestsRecord::default();
            return Some(Input::Guests(None));
        };
        match GuestTable::from_record(&record, host::boot_id()) {
            Ok(mut table) => {
                self.reboot_watch.apply(&mut table);
                self.guests = record;
                Some(Input::Guests(Some(table)))
            }
            Err(why) => {
                let text = format!(
                    "can't use {}: {why}; the broker keeps the guests it knew before",
                    path.display()
                );
                self.log(at, "ERROR", &text);
                None
            }
        }
    }

    /// Reports guests that have rebooted since the last check; returns the new table of guests if
    /// there are any.
    pub fn check_reboots(&mut self, at: Timestamp) -> Option<Input> {
        let seen = self.reboot_watch.look(&self.paths, &self.guests, at);
        for (level, line) in &seen.lines {
            self.log(at, level, line);
        }
        for event in seen.events {
            self.emit(at, event);
        }
        if !seen.changed {
            return None;
        }
        let mut table = GuestTable::from_record(&self.guests, host::boot_id()).ok()?;
        self.reboot_watch.apply(&mut table);
        Some(Input::Guests(Some(table)))
    }

    /// The records of an earlier broker. Half-written files are removed.
    pub fn load_handshake_records(&self) -> Vec<Input> {
        let Ok(entries) = fs::read_dir(self.paths.handshakes()) else {
            return Vec::new();
        };
        entries
            .flatten()
            .inspect(|entry| {
                if entry.file_name().to_string_lossy().contains(".json.tmp-") {
                    let _ = fs::remove_file(entry.path());
                }
            })
            .take(MAX_RESTORED)
            .filter_map(|entry| {
                let name = entry.file_name();
                let vm: VmName = name.to_str()?.strip_suffix(".json")?.parse().ok()?;
                match read_record(&entry.path()) {
                    RecordRead::Record(record) if record.vm == vm => {
                        let launched = self
                            .guests
                            .guests
                            .iter()
                            .any(|guest| guest.name == vm && guest.launch_id.is_some());
                        Some(Input::Restored {
                            alive: !launched || qemu_pid(&self.paths.vm(&vm)).is_some(),
                            record: Box::new(record),
                        })
                    }
                    _ => None,
                }
            })
            .collect()
    }

    /// Reports what happened to the VMs since the last check; returns those whose QEMU has ended or
    /// is paused.
    pub fn check_vms(&mut self, at: Timestamp, first: bool) -> Vec<VmName> {
        let seen = self
            .vm_watch
            .look(&self.paths, &self.guests, at.boot_ms, self.rotation, first);
        for (level, line) in &seen.lines {
            self.log(at, level, line);
        }
        for event in seen.events {
            self.emit(at, event);
        }
        seen.silent
    }

    /// Makes removed files again; for removed records it returns inputs for the state.
    pub fn check_files<'a>(&mut self, recorded: impl Iterator<Item = &'a VmName>) -> Vec<Input> {
        self.log.check();
        self.events.check();
        self.bus.check();
        recorded
            .filter(|vm| {
                self.writers
                    .entry((*vm).clone())
                    .or_insert_with(|| RecordWriter::new(self.paths.handshake(vm)))
                    .is_there()
                    .eq(&false)
            })
            .map(|vm| Input::RecordLost { vm: vm.clone() })
            .collect()
    }
}

fn file_stamp(path: &Path) -> FileStamp {
    let meta = fs::metadata(path).ok()?;
    Some((meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len()))
}
