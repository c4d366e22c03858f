//! Starting, finding and stopping a project's broker from outside.
//!
//! Here: `ensure_broker`, `stop_broker`, and the two ways to start a broker. Not here: when an
//! operation needs one (`core::operations`), what the started broker does (`broker::daemon`).

use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::core::cancel::Cancel;
use crate::core::config::Config;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, Holder};
use crate::core::process::{AGENT_RUN_MARK, Tail};
use crate::core::root::alive::find_broker;
use crate::core::root::paths::StateRoot;
use crate::core::threads::{FREE_RESOURCES, is_out_of_resources, no_thread_failure};

use super::daemon::Announcement;
use super::serve::{BrokerOptions, run_announced};

/// How long a started broker may take until it listens. It takes some 20 ms, and longer on a host
/// that is busy with starting guests.
const START_LIMIT: Duration = Duration::from_secs(15);

/// How often a lock that another process holds is checked.
const POLL_INTERVAL: Duration = Duration::from_millis(3);

/// How a broker is started.
pub trait BrokerLauncher: Send + Sync {
    /// Starts a broker and returns when it listens, or with the reason why it doesn't. `Exit::Busy`
    /// while a broker runs means that another caller was faster.
    fn launch(&self, config: &Config) -> Result<()>;
}

impl<L: BrokerLauncher + ?Sized> BrokerLauncher for &L {
    fn launch(&self, config: &Config) -> Result<()> {
        (**self).launch(config)
    }
}

/// Starts `castra broker` as a process that outlives the caller.
#[derive(Clone, Debug)]
pub struct ProcessBrokerLauncher {
    /// The castra binary; as a rule the running one.
    pub cli: PathBuf,
}

impl BrokerLauncher for ProcessBrokerLauncher {
    fn launch(&self, config: &Config) -> Result<()> {
        let what = "the broker didn't start";
        let cant = |error: std::io::Error| Failure::new(Exit::Internal, what).because(error);
        let (ours, theirs) = UnixStream::pair().map_err(cant)?;
        let as_stderr = theirs.try_clone().map_err(cant)?;
        // It gets no process group of its own, because its first call is setsid, which a group
        // leader may not make. It inherits no output, else `castra up --json | jq` would wait for
        // the broker's end.
        let mut child = Command::new(&self.cli)
            .args(["broker", "--quiet", "--config"])
            .arg(&config.path)
            // Started on an agent's behalf it outlives the agent.
            .env_remove(AGENT_RUN_MARK)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::from(OwnedFd::from(as_stderr)))
            .spawn()
            .map_err(|error| {
                let why = format!("{} can't be run: {error}", self.cli.display());
                match is_out_of_resources(&error) {
                    true => Failure::new(Exit::Busy, what).because(why).advice(FREE_RESOURCES),
                    false => Failure::new(Exit::Unavailable, what).because(why),
                }
            })?;
        let heard = read_announcement(ours);
        // A thread reaps it, so that it doesn't become a zombie if it ends during a long `up`.
        let reaper = thread::Builder::new()
            .name("broker-reap".to_owned())
            .spawn(move || child.wait());
        drop(reaper);
        match heard {
            Ok(Announcement::Ready(_)) => Ok(()),
            Ok(Announcement::Failed(failure)) => Err(failure),
            Err(why) => Err(Failure::new(Exit::Internal, what)
                .because(why)
                .advice(format!("see {}", config.state.broker_log().display()))),
        }
    }
}

/// The launcher that runs this castra binary; without a binary a missing broker can't be started.
pub fn of_cli(cli: Option<&Path>) -> Box<dyn BrokerLauncher> {
    match cli {
        Some(cli) => Box::new(ProcessBrokerLauncher { cli: cli.to_owned() }),
        None => Box::new(NoBrokerLauncher),
    }
}

/// Starts no broker: the caller gave neither a castra binary nor a launcher.
#[derive(Clone, Copy, Debug)]
struct NoBrokerLauncher;

impl BrokerLauncher for NoBrokerLauncher {
    fn launch(&self, config: &Config) -> Result<()> {
        Err(Failure::new(
            Exit::Usage,
            format!("no broker can be started for project `{}`", config.project),
        )
        .because("no castra binary was given to run one")
        .advice("give its path in the options' `cli`, or use an operation `…_with_launcher`"))
    }
}

/// Reads until the announcement, the end, or the limit; anything else that the broker wrote is the
/// reason.
fn read_announcement(stream: UnixStream) -> std::result::Result<Announcement, String> {
    let until = Instant::now() + START_LIMIT;
    let mut tail = Tail::default();
    let mut reader = BufReader::new(&stream);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let _ = stream.set_read_timeout(Some(left.max(Duration::from_millis(1))));
        let mut line = Vec::new();
        match (&mut reader).take(64 * 1024).read_until(b'\n', &mut line) {
            Ok(0) => {
                let said = tail.text();
                return Err(if said.is_empty() {
                    "it ended and printed nothing".to_owned()
                } else {
                    said
                });
            }
            Ok(_) => match serde_json::from_slice(&line) {
                Ok(announcement) => return Ok(announcement),
                Err(_) => tail.push(String::from_utf8_lossy(&line).trim_end()),
            },
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => {
                let said = tail.text();
                return Err(format!(
                    "it didn't listen within {} s {said}",
                    START_LIMIT.as_secs()
                ));
            }
        }
    }
}

/// Runs brokers as threads of this process, for embedders; only this launcher stops them.
#[derive(Debug, Default)]
pub struct ThreadBrokerLauncher {
    running: Mutex<Vec<(Cancel, JoinHandle<()>)>>,
}

impl ThreadBrokerLauncher {
    /// A launcher that has started nothing.
    pub fn new() -> ThreadBrokerLauncher {
        ThreadBrokerLauncher::default()
    }

    /// Stops all its brokers in order and waits for them. Dropping it does the same.
    pub fn stop(&self) {
        let mut running = self
            .running
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        for (stop, _) in running.iter() {
            stop.request();
        }
        for (_, thread) in running.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for ThreadBrokerLauncher {
    fn drop(&mut self) {
        self.stop();
    }
}

impl BrokerLauncher for ThreadBrokerLauncher {
    fn launch(&self, config: &Config) -> Result<()> {
        let options = BrokerOptions {
            embedded: true,
            ..BrokerOptions::of(config)
        };
        let stop = Cancel::new();
        let its_stop = stop.clone();
        let (tell, told) = crossbeam_channel::bounded(1);
        let thread = thread::Builder::new()
            .name("broker-state".to_owned())
            .spawn(move || {
                let ready = tell.clone();
                let outcome = run_announced(options, its_stop, |_| {
                    let _ = ready.send(Ok(()));
                });
                if let Err(failure) = outcome {
                    let _ = tell.send(Err(failure));
                }
            })
            .map_err(|error| no_thread_failure("broker", &error))?;
        let started = told.recv_timeout(START_LIMIT).unwrap_or_else(|_| {
            stop.request();
            Err(Failure::new(
                Exit::Internal,
                "the broker's thread didn't start in time",
            ))
        });
        if started.is_ok() {
            self.running
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .push((stop, thread));
        }
        started
    }
}

/// A broker that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokerHandle {
    /// Its process.
    pub pid: u32,
    /// Its TCP port on 127.0.0.1.
    pub port: u16,
    /// It was started by this call.
    pub started: bool,
}

/// The project's broker, started if none runs. Two callers at the same time end up with one broker.
pub fn ensure_broker(
    config: &Config,
    launcher: &dyn BrokerLauncher,
    limit: Duration,
    cancel: &Cancel,
) -> Result<BrokerHandle> {
    let until = Instant::now() + limit;
    let mut started = false;
    loop {
        match find_broker(&config.state) {
            Some((pid, Some(record))) => {
                return Ok(BrokerHandle {
                    pid,
                    port: record.port,
                    started,
                });
            }
            // Another process is starting or stopping it.
            Some((_, None)) => {}
            None if host::lock_holder(&config.state.broker_pid()) != Holder::Nobody => {}
            None => match launcher.launch(config) {
                Ok(()) => {
                    started = true;
                    continue;
                }
                Err(failure) if failure.exit == Exit::Busy && find_broker(&config.state).is_some() => {}
                Err(failure) => return Err(failure),
            },
        }
        if Instant::now() >= until {
            return Err(Failure::new(Exit::Busy, "the broker isn't ready")
                .because(format!(
                    "a process holds {}, but nothing listens yet",
                    config.state.broker_pid().display()
                ))
                .advice(format!("see {}", config.state.broker_log().display())));
        }
        if cancel.pause(POLL_INTERVAL) {
            return Err(Failure::new(
                Exit::Interrupted,
                "interrupted while the broker started",
            ));
        }
    }
}

/// The result of stopping a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokerStop {
    /// None ran.
    NotRunning,
    /// It stopped in order.
    Stopped {
        /// Its process.
        pid: u32,
    },
    /// It had to be killed.
    Killed {
        /// Its process.
        pid: u32,
    },
    /// It is a thread of another program, which alone may end it.
    Embedded {
        /// That program.
        pid: u32,
    },
}

/// Stops the project's broker: SIGTERM, and SIGKILL after `limit`. Only the process that holds the
/// lock on `broker.pid` is signalled, which is checked again just before.
pub fn stop_broker(state: &StateRoot, limit: Duration) -> Result<BrokerStop> {
    let path = state.broker_pid();
    let Some((pid, record)) = find_broker(state) else {
        if host::lock_holder(&path) == Holder::Nobody {
            return Ok(BrokerStop::NotRunning);
        }
        return Err(foreign(state, "it doesn't name a process"));
    };
    let note = host::tail_of(&path, 512);
    if record.is_some_and(|record| record.embedded) || note.split_whitespace().nth(4) == Some("embedded") {
        return Ok(BrokerStop::Embedded { pid });
    }
    signal(state, pid, Signal::SIGTERM)?;
    if wait_until_unlocked(state, pid, limit) {
        return Ok(BrokerStop::Stopped { pid });
    }
    signal(state, pid, Signal::SIGKILL)?;
    if wait_until_unlocked(state, pid, Duration::from_secs(5)) {
        return Ok(BrokerStop::Killed { pid });
    }
    Err(
        Failure::new(Exit::Failed, format!("the broker (pid {pid}) survived SIGKILL"))
            .because("the kernel has not ended it yet"),
    )
}

fn signal(state: &StateRoot, pid: u32, signal: Signal) -> Result<()> {
    let path = state.broker_pid();
    if host::locked_pid(&path) != Some(pid) {
        return Ok(());
    }
    // The kernel doesn't name the holder of such a lock. If another program wrote a pid into the
    // file, that process doesn't have the file open, and the broker does.
    if !host::has_open(pid, &path) {
        return Err(foreign(
            state,
            &format!("it names pid {pid}, which doesn't have it open"),
        ));
    }
    let Ok(raw) = i32::try_from(pid) else {
        return Ok(());
    };
    match kill(Pid::from_raw(raw), signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(errno) => Err(
            Failure::new(Exit::Failed, format!("can't stop the broker (pid {pid})")).because(errno.desc()),
        ),
    }
}

fn foreign(state: &StateRoot, why: &str) -> Failure {
    Failure::new(
        Exit::Failed,
        format!(
            "{} is locked, but not by a broker of castra",
            state.broker_pid().display()
        ),
    )
    .because(why)
    .advice("`fuser` names the process that holds it: end that process")
}

/// Waits until that process no longer holds the lock.
fn wait_until_unlocked(state: &StateRoot, pid: u32, limit: Duration) -> bool {
    let path = state.broker_pid();
    Cancel::new().wait_until(limit, POLL_INTERVAL, || host::locked_pid(&path) != Some(pid))
}
