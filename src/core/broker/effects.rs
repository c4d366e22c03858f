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
use std::time::{Duration, Instant, UNIX_EPOCH};

use crate::core::events::Event;
use crate::core::events::contract::Stamped;
use crate::core::host;
use crate::core::lines::journal::{Journal, Rotation};
use crate::core::logs;
use crate::core::name::VmName;
use crate::core::reporter::wall_clock;
use crate::core::root::alive::qemu_pid;
use crate::core::root::paths::StateRoot;
use crate::core::root::records::{self, GuestsRecord};

use super::attempts::line_head;
use super::bus_log::{BusLog, last_kept, parse_line};
use super::connection::Link;
use super::guests::GuestTable;
use super::outbox::Sent;
use super::reboot_watch::Reboots;
use super::session_loop::Sessions;
use super::state::{At, ConnId, Effect, Input, Part};
use super::vm_watch::Vms;
use crate::core::root::handshake_record::{RecordRead, RecordWriter, read_record};
use crate::core::time::millis;

/// How many senders' own logs are kept open.
const OPEN_SHELVES: usize = 64;

/// How long lines may wait before they are appended to their sender's own log, so that one append
/// writes many: at one publish at a time the five system calls of an append were half of all. Less
/// than it takes to start a program that reads such a log.
const SHELVE_AFTER_MS: u64 = 2;

/// Bytes that may wait for all senders' logs together; more are appended at once.
const SHELVE_BYTES: usize = 512 * 1024;

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
enum Reply {
    /// The connection ends after it.
    Answer(Arc<Link>, String),
    /// Frames follow.
    Grant(Arc<Link>, String),
}

/// What tells whether a file was replaced or changed since it was last read.
type Seen = Option<(u64, i64, i64, u64)>;

/// Everything outside the state that the state thread reads or writes.
pub struct Edges {
    paths: StateRoot,
    /// The state root's path as the broker opens its files, and as people know it.
    shown: [String; 2],
    run: String,
    began: Instant,
    seq: u64,
    rotation: Rotation,
    links: HashMap<ConnId, Arc<Link>>,
    sessions: Arc<Sessions>,
    bus: BusLog,
    shelves: BTreeMap<VmName, LineFile>,
    /// Lines that wait for their senders' own logs.
    unshelved: BTreeMap<VmName, Vec<u8>>,
    unshelved_bytes: usize,
    /// When they have to be written.
    shelve_at: Option<u64>,
    log: LineFile,
    events: LineFile,
    writers: BTreeMap<VmName, RecordWriter>,
    guests_seen: Option<Seen>,
    guests: GuestsRecord,
    vms: Vms,
    reboots: Reboots,
    lines: Vec<String>,
    told: Vec<String>,
    replies: Vec<Reply>,
    trouble_said: Option<u64>,
}

impl Edges {
    /// A handler for one run of the broker. Opens nothing yet.
    pub fn new(
        paths: StateRoot,
        shown: &Path,
        run: String,
        rotation: Rotation,
        bus: BusLog,
        sessions: Arc<Sessions>,
    ) -> Edges {
        Edges {
            rotation,
            sessions,
            bus,
            shelves: BTreeMap::new(),
            unshelved: BTreeMap::new(),
            unshelved_bytes: 0,
            shelve_at: None,
            log: LineFile::new(paths.broker_log(), rotation),
            events: LineFile::new(paths.broker_events(), rotation),
            shown: [paths.dir(), shown].map(|path| path.display().to_string()),
            paths,
            run,
            began: Instant::now(),
            seq: 0,
            links: HashMap::new(),
            writers: BTreeMap::new(),
            guests_seen: None,
            guests: GuestsRecord::default(),
            vms: Vms::default(),
            reboots: Reboots::default(),
            lines: Vec::new(),
            told: Vec::new(),
            replies: Vec::new(),
            trouble_said: None,
        }
    }

    /// Adds a connection, so that it can be answered.
    pub fn adopt(&mut self, link: Arc<Link>) {
        self.links.insert(link.id, link);
    }

    /// Removes a connection that is gone.
    pub fn forget(&mut self, conn: ConnId) {
        self.links.remove(&conn);
    }

    /// Ends all connections.
    pub fn close_all(&mut self) {
        for (_, link) in self.links.drain() {
            link.close(&self.sessions.budget);
        }
    }

    /// Performs one effect; lines, events and answers wait for [`EffectHandler::flush`].
    pub fn perform(&mut self, at: At, effect: Effect) -> Option<Input> {
        match effect {
            Effect::Reply { conn, line } => {
                if let Some(link) = self.links.get(&conn) {
                    self.replies.push(Reply::Answer(Arc::clone(link), line));
                }
                None
            }
            Effect::Grant { conn, line } => {
                if let Some(link) = self.links.get(&conn) {
                    self.replies.push(Reply::Grant(Arc::clone(link), line));
                }
                None
            }
            Effect::Send { conn, parts } => self.send(conn, &parts),
            Effect::Order { conn, order } => {
                if let Some(link) = self.links.get(&conn) {
                    link.give_order(order);
                }
                None
            }
            Effect::End { conn, last } => {
                let full = self.send(conn, &[Part::Own(last)]);
                if let Some(link) = self.links.get(&conn) {
                    link.finish();
                }
                full
            }
            Effect::Append(lines) => Some(self.append(at, &lines)),
            Effect::Shelve { vm, lines, ranges } => {
                self.shelve(at, vm, &lines, &ranges);
                None
            }
            Effect::ServiceLog { vm, payloads } => {
                self.service_log(at, &vm, &payloads);
                None
            }
            Effect::Evict { conn, reason } => {
                if let Some(link) = self.links.get(&conn) {
                    link.evict(reason);
                }
                None
            }
            Effect::Drop { conn } => {
                if let Some(link) = self.links.get(&conn) {
                    link.close(&self.sessions.budget);
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
                    self.trouble(at, &format!("can't write {}: {error}", path.display()));
                }
                Some(Input::Recorded { vm, asked_by, made })
            }
            Effect::Log(line) => {
                self.lines.push(line);
                None
            }
            Effect::Tell(event) => {
                self.tell(at, event);
                None
            }
        }
    }

    /// Sends to one session. If its queue is full, or all queues together are too long, the answer
    /// names the session that the state should cut off: this one, or the one with the longest
    /// queue.
    fn send(&mut self, conn: ConnId, parts: &[Part]) -> Option<Input> {
        let link = self.links.get(&conn)?;
        let sent = self.sessions.send(link, parts);
        if let Sent::Full(queued) = sent {
            let queued_bytes = queued as u64;
            return Some(Input::Full { conn, queued_bytes });
        }
        if sent == Sent::Waits || self.sessions.budget.is_exceeded() {
            return self.longest_queue();
        }
        None
    }

    fn longest_queue(&self) -> Option<Input> {
        if !self.sessions.budget.is_exceeded() {
            return None;
        }
        let waiting = self.links.iter().map(|(conn, link)| (link.waiting(), *conn));
        let (queued, conn) = waiting.max()?;
        let queued_bytes = queued as u64;
        Some(Input::Full { conn, queued_bytes })
    }

    /// Tells a connection that the state thread has processed this many of its bytes.
    pub fn refund(&self, conn: ConnId, bytes: usize) {
        if let Some(link) = self.links.get(&conn) {
            link.refund(bytes);
        }
    }

    /// Opens the log of the bus if it isn't open. `floor`: the last number that was given before.
    /// `torn`: the last broker didn't stop in order, so senders' own logs may lack their last
    /// lines.
    pub fn open_bus(&mut self, at: At, floor: impl FnOnce(u64) -> u64, torn: bool) -> Option<Input> {
        if self.bus.is_open() {
            return None;
        }
        match self.bus.open() {
            Ok(opened) => {
                if opened.cut_bytes > 0 {
                    let text = format!(
                        "{}: cut a torn tail of {} bytes, which no ack had confirmed",
                        self.bus.path().display(),
                        opened.cut_bytes
                    );
                    self.log(at, "WARN", &text);
                }
                if torn {
                    self.complete_shelves(at);
                }
                let last = floor(opened.last);
                if !opened.rises {
                    let text = format!(
                        "{}: its numbers don't rise, it was damaged or pasted together; what is behind \
                         them goes on after {last}",
                        self.bus.path().display()
                    );
                    self.log(at, "WARN", &text);
                }
                let past = &self.sessions.past;
                past.is_tangled_upto(if opened.rises { 0 } else { opened.last });
                Some(Input::LogOpened { last })
            }
            Err(error) => {
                let text = format!(
                    "can't open {}: {error}; publishes are refused",
                    self.bus.path().display()
                );
                self.trouble(at, &text);
                None
            }
        }
    }

    fn append(&mut self, at: At, lines: &[u8]) -> Input {
        if self.bus.is_full() {
            // After a kill, lines that the senders' logs lack are looked for in the newest file
            // alone.
            self.shelve_now(at);
        }
        let kept = self.bus.append(lines);
        if let Err(error) = &kept {
            let text = format!("can't write {}: {error}", self.bus.path().display());
            self.trouble(at, &text);
        }
        Input::Appended {
            kept: kept.is_ok(),
            open: self.bus.is_open(),
        }
    }

    /// Whether every session was sent all that it should get.
    pub fn all_sent(&self) -> bool {
        self.links.values().all(|link| link.waiting() == 0)
    }

    /// Has the log of the bus synced; called once a second.
    pub fn sync_bus(&mut self) {
        self.bus.sync_soon();
    }

    /// True once after each rotation of the log of the bus.
    pub fn bus_rotated(&mut self) -> bool {
        self.bus.take_rotated()
    }

    fn shelf(&mut self, vm: &VmName) -> &mut LineFile {
        // Open logs of a thousand senders would take a thousand descriptors.
        if self.shelves.len() >= OPEN_SHELVES && !self.shelves.contains_key(vm) {
            self.shelves.clear();
        }
        let path = self.paths.bus_log_of(vm.as_str());
        let rotation = self.rotation;
        self.shelves
            .entry(vm.clone())
            .or_insert_with(|| LineFile::new(path, rotation))
    }

    fn shelve(&mut self, at: At, vm: VmName, lines: &[u8], ranges: &[Range<usize>]) {
        let waiting = self.unshelved.entry(vm).or_default();
        for range in ranges {
            waiting.extend_from_slice(&lines[range.clone()]);
            self.unshelved_bytes += range.len();
        }
        self.shelve_at.get_or_insert(at.boot_ms + SHELVE_AFTER_MS);
        if self.unshelved_bytes >= SHELVE_BYTES {
            self.shelve_now(at);
        }
    }

    /// When waiting lines have to be in their senders' own logs.
    pub fn shelves_due(&self) -> Option<u64> {
        self.shelve_at
    }

    /// Appends all waiting lines to the senders' own logs.
    pub fn shelve_now(&mut self, at: At) {
        self.shelve_at = None;
        self.unshelved_bytes = 0;
        for (vm, lines) in std::mem::take(&mut self.unshelved) {
            if let Err(error) = self.shelf(&vm).append_bytes(&lines) {
                let path = self.paths.bus_log_of(vm.as_str());
                self.trouble(at, &format!("can't write {}: {error}", path.display()));
            }
        }
    }

    /// Copies the lines that a killed broker had acked but not copied: each sender's lines after
    /// the last one in its own log. Only the newest file of the log can hold such lines.
    fn complete_shelves(&mut self, at: At) {
        let Ok(file) = host::open_state_file(self.bus.path()) else {
            return;
        };
        let mut known: BTreeMap<String, u64> = BTreeMap::new();
        let mut missing: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in BufReader::new(file).split(b'\n').map_while(Result::ok) {
            let Some(parsed) = parse_line(&line) else {
                continue;
            };
            let last = known.entry(parsed.vm.to_owned()).or_insert_with(|| {
                // The sender's log may have been rotated a moment before, and be empty.
                let last = last_kept(&self.paths.bus_log_of(parsed.vm), self.rotation.keep);
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
            if let Err(error) = self.shelf(&vm).append(&lines) {
                let path = self.paths.bus_log_of(vm.as_str());
                self.trouble(at, &format!("can't write {}: {error}", path.display()));
            }
        }
    }

    /// Appends what a Vizier reported to its service log: text, or anything else as JSON.
    fn service_log(&mut self, at: At, vm: &VmName, payloads: &[String]) {
        let told =
            |payload: &String| serde_json::from_str::<String>(payload).unwrap_or_else(|_| payload.clone());
        let text = payloads.iter().map(told).collect::<Vec<_>>().join("\n");
        let path = self.paths.vizier_log(vm);
        if let Err(error) = logs::append_escaped(&path, self.rotation, &text) {
            self.trouble(at, &format!("can't write {}: {error}", path.display()));
        }
    }

    /// Adds a line to the broker's log.
    pub fn log(&mut self, at: At, level: &str, text: &str) {
        let [named, known] = &self.shown;
        let text = text.replace(named.as_str(), known);
        self.lines
            .push(format!("{} {text}", line_head(at.wall_ms, level)));
    }

    /// Logs an error that may repeat with every connection, such as a full disk: at most once in
    /// ten seconds.
    pub fn trouble(&mut self, at: At, text: &str) {
        if self.trouble_said.is_none_or(|said| at.boot_ms >= said + 10_000) {
            self.trouble_said = Some(at.boot_ms);
            self.log(at, "ERROR", text);
        }
    }

    /// A fact for the journal.
    pub fn tell(&mut self, at: At, event: Event) {
        let stamped = Stamped {
            ts: wall_clock(UNIX_EPOCH + Duration::from_millis(at.wall_ms)),
            offset_ms: millis(self.began.elapsed()),
            seq: self.seq,
            run: self.run.clone(),
            event,
        };
        self.seq += 1;
        self.told.push(stamped.contract_line());
    }

    /// Writes events and log lines, then sends the answers: a client that reads `ok` can find it in
    /// the log.
    pub fn flush(&mut self, at: At) {
        if !self.told.is_empty() {
            let told = std::mem::take(&mut self.told);
            let outcome = self.events.append(&told);
            self.mention(at, "events", outcome);
        }
        if !self.lines.is_empty() {
            let lines = std::mem::take(&mut self.lines);
            let outcome = self.log.append(&lines);
            self.mention(at, "log lines", outcome);
            if !self.lines.is_empty() {
                let lines = std::mem::take(&mut self.lines);
                let _ = self.log.append(&lines);
            }
        }
        for reply in self.replies.drain(..) {
            match reply {
                Reply::Answer(link, line) => link.answer(&line),
                Reply::Grant(link, line) => link.grant(&line, &self.sessions.budget),
            }
        }
    }

    fn mention(&mut self, at: At, what: &str, outcome: io::Result<u64>) {
        match outcome {
            Ok(0) => {}
            Ok(lost) => self.log(
                at,
                "WARN",
                &format!("{lost} {what} before this were lost: no room"),
            ),
            Err(error) => log::warn!("can't keep {what}: {error}"),
        }
    }

    /// Loads `guests.json` if it has changed. Called before every hello is judged: a guest may be
    /// up before a check once a second would notice its launch.
    pub fn changed_guests(&mut self, at: At) -> Option<Input> {
        let path = self.paths.guests();
        let seen = look_at(&path);
        if self.guests_seen == Some(seen) {
            return None;
        }
        self.guests_seen = Some(seen);
        let loaded = match records::load::<GuestsRecord>(&path) {
            Ok(loaded) => loaded,
            Err(failure) => {
                self.log(at, "ERROR", &format!("{failure}; the guests known before stay"));
                return None;
            }
        };
        let Some(record) = loaded else {
            self.guests = GuestsRecord::default();
            return Some(Input::Guests(None));
        };
        match GuestTable::from_record(&record, host::boot_id()) {
            Ok(mut table) => {
                self.reboots.apply(&mut table);
                self.guests = record;
                Some(Input::Guests(Some(table)))
            }
            Err(why) => {
                let text = format!(
                    "can't use {}: {why}; the guests known before stay",
                    path.display()
                );
                self.log(at, "ERROR", &text);
                None
            }
        }
    }

    /// Reports guests that have rebooted since the last check; returns the new table of guests if
    /// there are any.
    pub fn rebooted(&mut self, at: At) -> Option<Input> {
        let seen = self.reboots.look(&self.paths, &self.guests, at);
        for (level, line) in &seen.lines {
            self.log(at, level, line);
        }
        for event in seen.events {
            self.tell(at, event);
        }
        if !seen.changed {
            return None;
        }
        let mut table = GuestTable::from_record(&self.guests, host::boot_id()).ok()?;
        self.reboots.apply(&mut table);
        Some(Input::Guests(Some(table)))
    }

    /// The records of an earlier broker. Half-written files are removed.
    pub fn restored(&self) -> Vec<Input> {
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
    pub fn silent_vms(&mut self, at: At, first: bool) -> Vec<VmName> {
        let seen = self
            .vms
            .look(&self.paths, &self.guests, at.boot_ms, self.rotation, first);
        for (level, line) in &seen.lines {
            self.log(at, level, line);
        }
        for event in seen.events {
            self.tell(at, event);
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

fn look_at(path: &Path) -> Seen {
    let meta = fs::metadata(path).ok()?;
    Some((meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len()))
}
