//! A broker from start to stop: it takes its lock, listens, runs the state thread's loop, stops in
//! order.
//!
//! Here: start, the state thread's loop, the stop. Not here: what an input does
//! (`broker::state`), how an effect is done (`broker::effects`), who starts a broker
//! (`broker::launcher`).

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use crate::core::cancel::Cancel;
use crate::core::config::{BrokerConfig, BusConfig, Config, SyncMode};
use crate::core::events::Event;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, FileLock};
use crate::core::id::RunId;
use crate::core::lines::journal::Journal;
use crate::core::reporter::wall_clock;
use crate::core::root::paths::StateRoot;
use crate::core::root::records::{self, BrokerRecord};
use crate::core::threads::no_thread_failure;
use crate::core::time::{millis, wall_ms};

use super::attempts::log_prefix;
use super::bus_log::{BusLog, resume_after};
use super::effects::EffectHandler;
use super::listen::{AcceptThread, ConnectionThreads, Listener, NewConnection, Wake};
use super::outbox::{Budget, Drainer};
use super::protocol::{BUS_VERSIONS, heartbeat_secs};
use super::replay::ReplayLog;
use super::resources::{HOST_CONNECTIONS, bind, bind_host, raise_descriptor_limit, take_lock};
use super::session_loop::Sessions;
use super::state::{BusRules, Input, Rules, State, Timestamp, step};

/// How many inputs are applied in one turn, so that one write serves many.
const INPUTS_PER_TURN: usize = 256;

/// How often a stopping broker checks whether every client was told.
const STOP_POLL_MS: u64 = 10;

/// A batch of this size is committed at once.
const BATCH_BYTES: usize = 1024 * 1024;

/// How often the files and the VMs' locks are checked.
const CHECK_INTERVAL_MS: u64 = 1000;

/// How long a stopping broker waits until every client was told.
const STOP_GRACE_MS: u64 = 500;

/// What a broker needs to know.
#[derive(Clone, Debug)]
pub struct BrokerOptions {
    /// Where its files are.
    pub state: StateRoot,
    /// `[broker]`.
    pub config: BrokerConfig,
    /// `[bus]`; its rotation holds for every file the broker writes.
    pub bus: BusConfig,
    /// It is a thread of another program, which alone ends it.
    pub embedded: bool,
}

impl BrokerOptions {
    /// A broker process for a project.
    pub fn of(config: &Config) -> BrokerOptions {
        BrokerOptions {
            state: config.state.clone(),
            config: config.broker.clone(),
            bus: config.bus.clone(),
            embedded: false,
        }
    }
}

/// A broker that listens.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Ready {
    /// Its process.
    pub pid: u32,
    /// Its TCP port on 127.0.0.1.
    pub port: u16,
    /// Its run.
    pub run: RunId,
}

/// Runs a broker until `stop` is requested. Returns at once with a failure if it can't start. `announce`
/// is called once, when the broker listens and `broker.json` is written.
pub fn run_announced(options: BrokerOptions, stop: Cancel, announce: impl FnOnce(&Ready)) -> Result<()> {
    let broker = Broker::start(options)?;
    announce(&broker.ready);
    broker.run_loop(&stop);
    Ok(())
}

struct Broker {
    options: BrokerOptions,
    ready: Ready,
    lock: Option<FileLock>,
    record: BrokerRecord,
    state: State,
    effects: EffectHandler,
    connection_threads: Arc<ConnectionThreads>,
    inbox: Receiver<Wake>,
    to_state: Sender<Wake>,
    guest_accept: Option<AcceptThread>,
    host_accept: Option<AcceptThread>,
    /// The previous broker didn't stop in order.
    torn: bool,
    /// Nor did the host shut down in order since then.
    host_rebooted: bool,
    /// The open state root: socket names relative to it are short, whatever its path.
    root: File,
    /// The paths of the broker's files through the open state root.
    files: StateRoot,
}

impl Broker {
    fn start(options: BrokerOptions) -> Result<Broker> {
        let paths = &options.state;
        host::ensure_private_dir(paths.dir()).map_err(|error| Failure::io("create", paths.dir(), &error))?;
        let run = host::random_hex(8)
            .map(RunId::from)
            .map_err(|error| Failure::new(Exit::Io, "can't read /dev/urandom").because(error))?;
        let lock = take_lock(paths, &run, options.embedded)?;
        let (log, rotation) = (paths.broker_log(), options.bus.rotation);
        Broker::start_locked(options, run, lock).inspect_err(|failure| {
            let line = format!(
                "{} broker didn't start: {failure}",
                log_prefix(wall_ms(), "ERROR")
            );
            if let Ok(mut journal) = Journal::open(log, rotation) {
                let _ = journal.append(&line.replace('\n', " "));
            }
        })
    }

    fn start_locked(options: BrokerOptions, run: RunId, lock: FileLock) -> Result<Broker> {
        let paths = &options.state;
        let max_connections = raise_descriptor_limit(options.config.max_connections, options.embedded);
        let listener = bind(paths, options.config.port)?;
        let port = listener
            .local_addr()
            .map_err(|error| Failure::new(Exit::Io, "can't ask for the broker's port").because(error))?
            .port();
        let root = File::open(paths.dir()).map_err(|error| Failure::io("open", paths.dir(), &error))?;
        // Paths through the open directory: files go where the state root is now, and nowhere once
        // it is removed. By its name a broker would make a deleted folder again.
        let files = StateRoot::new(host::short_path(&root, "").components().collect::<PathBuf>());
        let host_listener = bind_host(paths, &root)?;
        let boot_ms = host::boottime_ms();
        let before = records::load::<BrokerRecord>(&paths.broker_json()).ok().flatten();
        let record = BrokerRecord {
            port,
            run: run.clone(),
            started_boottime_ms: boot_ms,
            started_at: wall_clock(SystemTime::now()),
            boot_id: host::boot_id().clone(),
            clean_stop: false,
            embedded: options.embedded,
            freshness_window_ms: millis(options.config.freshness),
            bus_seq: before.as_ref().map_or(0, |before| before.bus_seq),
        };
        let (to_state, inbox) = unbounded();
        let bus = &options.bus;
        let budget = Budget::new(bus.outbound_queue_bytes, bus.total_queue_bytes);
        let drainer =
            Drainer::start(Arc::clone(&budget)).map_err(|error| no_thread_failure("broker", &error))?;
        let sessions = Arc::new(Sessions {
            max_frame: bus.max_frame_bytes,
            replay_log: ReplayLog::new(files.bus_log()),
            budget,
            drainer,
        });
        let connection_threads = ConnectionThreads::new(
            to_state.clone(),
            options.config.hello_timeout,
            Arc::clone(&sessions),
        );
        let bus_log = BusLog::new(files.bus_log(), bus.rotation, bus.sync);
        let mut broker = Broker {
            state: State::new(Rules {
                run: run.clone(),
                boot_id: record.boot_id.clone(),
                freshness_ms: record.freshness_window_ms,
                auth: options.config.auth,
                max_connections,
                max_host_connections: HOST_CONNECTIONS,
                bus_versions: BUS_VERSIONS,
                bus: BusRules {
                    idle_ms: millis(bus.session_idle),
                    sessions_per_vm: bus.sessions_per_vm,
                    subscriptions_per_session: bus.subscriptions_per_session,
                    publishes_per_sec_per_vm: bus.publishes_per_sec_per_vm,
                    heartbeat_secs: heartbeat_secs(options.config.freshness, bus.session_idle),
                },
            }),
            effects: EffectHandler::new(
                files.clone(),
                paths.dir(),
                run.clone(),
                bus.rotation,
                bus_log,
                sessions,
            ),
            torn: before.as_ref().is_some_and(|before| !before.clean_stop),
            host_rebooted: before
                .is_some_and(|before| before.boot_id != *host::boot_id() && !before.clean_stop),
            ready: Ready {
                pid: std::process::id(),
                port,
                run,
            },
            lock: Some(lock),
            record,
            connection_threads,
            inbox,
            to_state,
            guest_accept: None,
            host_accept: None,
            root,
            files,
            options,
        };
        broker.restore(max_connections);
        broker.open_doors(listener, host_listener, max_connections)?;
        records::save(&broker.files.broker_json(), &broker.record)?;
        Ok(broker)
    }

    /// Restores what an earlier broker knew, before any client can connect.
    fn restore(&mut self, max_connections: usize) {
        let at = now();
        let pid = self.ready.pid;
        let port = self.ready.port;
        self.effects.log(
            at,
            "INFO",
            &format!("broker started pid={pid} port={port} run={}", self.ready.run),
        );
        if max_connections < self.options.config.max_connections {
            let text = format!(
                "max_connections={max_connections}: the limit of open files allows no more connections"
            );
            self.effects.log(at, "WARN", &text);
        }
        self.effects.emit(at, Event::BrokerStarted { pid, port });
        self.open_bus(at);
        let guests = self.effects.load_changed_guests(at);
        self.apply(at, guests);
        let rebooted = self.effects.check_reboots(at);
        self.apply(at, rebooted);
        let restored = self.effects.load_handshake_records();
        self.apply(at, restored);
        for vm in self.effects.check_vms(at, true) {
            self.apply(at, [Input::VmGone { vm }]);
        }
        self.commit(at);
        self.effects.flush(at);
    }

    /// Opens the log of the bus and finds the last number given. After a loss of power the last
    /// lines may be missing, so numbering skips all numbers that may have been given. True: the log
    /// wasn't open before.
    fn open_bus(&mut self, at: Timestamp) -> bool {
        let jump = self.host_rebooted && self.options.bus.sync != SyncMode::Batch;
        let floor = self.record.bus_seq;
        let resume = |last: u64| resume_after(last, floor, jump);
        let opened = self.effects.open_bus(at, resume, self.torn);
        let is_new = opened.is_some();
        if is_new {
            // From now on this broker knows what is in the log.
            (self.torn, self.host_rebooted) = (false, false);
        }
        self.apply(at, opened);
        is_new
    }

    /// Saves the last number in `broker.json`, so that the next broker doesn't give it again if the
    /// log is removed.
    fn save_last_seq(&mut self) {
        self.record.bus_seq = self.state.last_kept();
        let _ = records::save(&self.files.broker_json(), &self.record);
    }

    /// Writes, answers and delivers everything that waits for the log.
    fn commit(&mut self, at: Timestamp) {
        while self.state.uncommitted() {
            self.apply(at, [Input::Commit]);
        }
        if self.effects.bus_rotated() {
            self.save_last_seq();
        }
    }

    fn open_doors(&mut self, guests: TcpListener, host: UnixListener, places: usize) -> Result<()> {
        let cant = |error: io::Error| no_thread_failure("broker", &error);
        let connection_threads = &self.connection_threads;
        self.guest_accept = Some(
            AcceptThread::start(Listener::Tcp(guests), Arc::clone(connection_threads), places)
                .map_err(cant)?,
        );
        self.host_accept = Some(
            AcceptThread::start(
                Listener::Unix(host),
                Arc::clone(connection_threads),
                HOST_CONNECTIONS,
            )
            .map_err(cant)?,
        );
        Ok(())
    }

    /// Applies inputs, and the inputs with which their effects answer.
    fn apply(&mut self, at: Timestamp, inputs: impl IntoIterator<Item = Input>) {
        let mut todo: VecDeque<Input> = inputs.into_iter().collect();
        while let Some(input) = todo.pop_front() {
            for effect in step(&mut self.state, at, input) {
                if let Some(answer) = self.effects.perform(at, effect) {
                    todo.push_front(answer);
                }
            }
        }
    }

    /// The state thread's loop: the only place that reads the clock for `step`.
    fn run_loop(mut self, stop: &Cancel) {
        let over = watch_stop(stop.clone(), self.to_state.clone());
        let mut next_look = host::boottime_ms() + CHECK_INTERVAL_MS;
        let mut stopping: Option<u64> = None;
        loop {
            let due = [
                Some(next_look),
                self.state.due(),
                self.effects.sender_logs_due(),
                stopping,
            ]
            .into_iter()
            .flatten()
            .min();
            let due = due.map(|due| {
                if stopping.is_some() {
                    due.min(host::boottime_ms() + STOP_POLL_MS)
                } else {
                    due
                }
            });
            let wait = due.map_or(CHECK_INTERVAL_MS, |due| due.saturating_sub(host::boottime_ms()));
            let first = match self.inbox.recv_timeout(Duration::from_millis(wait)) {
                Ok(wake) => Some(wake),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let more = self.inbox.try_iter().take(INPUTS_PER_TURN - 1);
            let batch: Vec<Wake> = first.into_iter().chain(more).collect();
            let at = now();
            // If the thread that waits for a stop couldn't be started, the request is seen here.
            if stopping.is_none() && stop.is_requested() {
                stopping = Some(at.boot_ms + STOP_GRACE_MS);
                self.begin_stop(at);
            }
            if batch
                .iter()
                .any(|wake| matches!(wake, Wake::Input(Input::Hello { .. })))
            {
                let changed = self.effects.load_changed_guests(at);
                self.apply(at, changed);
            }
            // After the inputs were received: connections that sent them are in the list by now.
            for new in self.connection_threads.take_new() {
                self.on_new_connection(at, new);
            }
            for wake in batch {
                match wake {
                    Wake::ConnectionsFull => {}
                    Wake::Input(input) => self.on_input(at, input),
                    Wake::Error(text) => self.effects.log_error(at, &text),
                    Wake::Stop if stopping.is_none() => {
                        stopping = Some(at.boot_ms + STOP_GRACE_MS);
                        self.begin_stop(at);
                    }
                    Wake::Stop => {}
                }
            }
            if self.state.due().is_some_and(|due| at.boot_ms >= due) {
                self.apply(at, [Input::Tick]);
            }
            if at.boot_ms >= next_look {
                next_look = at.boot_ms + CHECK_INTERVAL_MS;
                if !self.check_once_a_second(at) && stopping.is_none() {
                    stopping = Some(at.boot_ms + STOP_GRACE_MS);
                    self.begin_stop(at);
                }
            }
            self.commit(at);
            if self
                .effects
                .sender_logs_due()
                .is_some_and(|due| at.boot_ms >= due)
            {
                self.effects.flush_sender_logs(at);
            }
            self.effects.flush(at);
            let done = || self.state.all_answered() && self.effects.all_sent();
            if stopping.is_some_and(|until| at.boot_ms >= until || done()) {
                break;
            }
        }
        over.store(true, Ordering::Relaxed);
        self.end();
    }

    fn on_input(&mut self, at: Timestamp, input: Input) {
        let (closed, spent) = match &input {
            Input::Closed { conn } => (Some(*conn), None),
            Input::Frames { conn, burst } => (None, Some((*conn, burst.wire_bytes))),
            _ => (None, None),
        };
        self.apply(at, [input]);
        if let Some((conn, bytes)) = spent {
            self.effects.return_credit(conn, bytes);
        }
        if let Some(conn) = closed {
            // Its last frames are answered before its socket is closed.
            self.effects.remove_connection(conn);
        }
        if self.state.uncommitted_bytes() >= BATCH_BYTES {
            self.commit(at);
        }
    }

    fn on_new_connection(&mut self, at: Timestamp, new: NewConnection) {
        let NewConnection {
            connection,
            peer,
            remote,
        } = new;
        let conn = connection.id;
        self.effects.add_connection(connection);
        self.apply(at, [Input::Opened { conn, peer, remote }]);
    }

    /// Stops listening, and tells waiting clients.
    fn begin_stop(&mut self, at: Timestamp) {
        self.effects.log(at, "INFO", "broker stopping");
        self.guest_accept = None;
        self.host_accept = None;
        for new in self.connection_threads.take_new() {
            self.on_new_connection(at, new);
        }
        // Earlier frames are still written and answered, and a session learns that it was granted
        // before it learns of its end.
        self.commit(at);
        self.effects.flush(at);
        self.apply(at, [Input::Stop]);
    }

    fn end(mut self) {
        let at = now();
        // VMs that ended since the last check were stopped, as a rule, by the `down` that stops
        // this broker.
        for vm in self.effects.check_vms(at, false) {
            self.apply(at, [Input::VmGone { vm }]);
        }
        self.apply(at, [Input::Finish]);
        self.commit(at);
        self.effects.flush_sender_logs(at);
        let (pid, port) = (self.ready.pid, self.ready.port);
        self.effects
            .log(at, "INFO", &format!("broker stopped pid={pid} port={port}"));
        self.effects.emit(at, Event::BrokerStopped { pid, port });
        self.effects.flush(at);
        // Every client was answered, so all connections can be closed.
        self.effects.close_all();
        self.connection_threads
            .close(Duration::from_millis(STOP_GRACE_MS * 2));
        let at = self.files.broker_pid();
        let Some(lock) = self.lock.take().filter(|lock| lock.is_at(&at)) else {
            // Another broker has taken over the files.
            return;
        };
        let _ = host::remove_if_there(&self.files.broker_sock());
        self.record.clean_stop = true;
        self.record.bus_seq = self.state.last_kept();
        let _ = records::save(&self.files.broker_json(), &self.record);
        drop(lock);
    }

    /// Once a second: checks guests, VMs, and that the broker's files still exist. False: the state
    /// root is gone, or another broker runs because somebody removed the pid file.
    fn check_once_a_second(&mut self, at: Timestamp) -> bool {
        let dir = self.options.state.dir();
        if !host::names_this_file(dir, &self.root) {
            let text = format!(
                "{} was removed, moved or replaced: this broker stops",
                dir.display()
            );
            self.effects.log(at, "ERROR", &text);
            return false;
        }
        // Messages that have a number are written before the log may be opened again with another
        // count.
        self.commit(at);
        let changed = self.effects.load_changed_guests(at);
        self.apply(at, changed);
        let rebooted = self.effects.check_reboots(at);
        self.apply(at, rebooted);
        for vm in self.effects.check_vms(at, false) {
            self.apply(at, [Input::VmGone { vm }]);
        }
        if self.lock.as_ref().is_none_or(|lock| !lock.still_named()) {
            match take_lock(&self.options.state, &self.ready.run, self.options.embedded) {
                Ok(lock) => {
                    self.lock = Some(lock);
                    self.effects
                        .log(at, "WARN", "broker.pid was removed; the broker made it again");
                }
                Err(failure) if failure.exit == Exit::Busy => {
                    self.lock = None;
                    self.effects.log(
                        at,
                        "ERROR",
                        "broker.pid belongs to another broker now: this broker stops",
                    );
                    return false;
                }
                Err(failure) => self.effects.log(at, "ERROR", &failure.to_string()),
            }
        }
        if !host::is_there(&self.files.broker_json()) {
            let _ = records::save(&self.files.broker_json(), &self.record);
        }
        if self.host_accept.is_some() && !is_socket(&self.options.state) {
            self.reopen_host_socket(at);
        }
        let lost = self.effects.check_files(self.state.recorded());
        self.apply(at, lost);
        if self.open_bus(at) {
            self.save_last_seq();
        }
        self.effects.sync_bus();
        true
    }

    fn reopen_host_socket(&mut self, at: Timestamp) {
        let reopened = bind_host(&self.options.state, &self.root).and_then(|listener| {
            AcceptThread::start(
                Listener::Unix(listener),
                Arc::clone(&self.connection_threads),
                HOST_CONNECTIONS,
            )
            .map_err(|error| no_thread_failure("broker", &error))
        });
        match reopened {
            Ok(door) => {
                self.host_accept = Some(door);
                self.effects
                    .log(at, "WARN", "broker.sock was removed; the broker made it again");
            }
            Err(failure) => self.effects.log(at, "ERROR", &failure.to_string()),
        }
    }
}

fn is_socket(paths: &StateRoot) -> bool {
    use std::os::unix::fs::FileTypeExt;
    fs::symlink_metadata(paths.broker_sock()).is_ok_and(|meta| meta.file_type().is_socket())
}

fn now() -> Timestamp {
    Timestamp {
        boot_ms: host::boottime_ms(),
        wall_ms: wall_ms(),
    }
}

/// Starts a thread that tells the state thread of a request to stop. It ends soon after the
/// returned flag is set; nobody waits for it, since it holds nothing.
fn watch_stop(stop: Cancel, to_state: Sender<Wake>) -> Arc<AtomicBool> {
    let over = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&over);
    let watch = move || {
        while !seen.load(Ordering::Relaxed) {
            if stop.pause(Duration::from_secs(1)) {
                let _ = to_state.send(Wake::Stop);
                return;
            }
        }
    };
    let spawned = thread::Builder::new().name("broker-stop".to_owned()).spawn(watch);
    if let Err(error) = spawned {
        log::error!("no thread to wait for a stop: {error}");
    }
    over
}
