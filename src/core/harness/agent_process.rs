//! The process of an agent, from its start until nothing of it is left.
//!
//! Here: its process group, its stdin, time limits, the steps from SIGTERM to SIGKILL, the tail of its
//! stderr, and the search for processes that it left. Not here: its output (`pump`), or which program it is
//! (`core::operations::harness`).
//!
//! The agent's own commands may have process groups of their own, so a signal to its group doesn't
//! reach them all. Everything it starts inherits a mark in the environment, and what carries the
//! mark at the end is ended too.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::pump::{Pump, Received, StreamReader};
use crate::core::cancel::Cancel;
use crate::core::events::Event;
use crate::core::host;
use crate::core::process::{AGENT_RUN_MARK, Tail, end_group};

/// Between SIGTERM and SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(5);
/// How long an agent may run on after its stdout has ended.
const LINGER: Duration = Duration::from_secs(10);
/// How long a stdout may stay open after the agent's end: a process that the agent started holds it.
const PIPE_GRACE: Duration = Duration::from_secs(1);
/// How long a pipe may stay open after SIGKILL: only a process out of castra's reach can hold it.
const KILLED_GRACE: Duration = Duration::from_secs(2);
/// How often the clock, the child and requests to stop are checked.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How many bytes of a line of stderr are kept.
const STDERR_LINE_BYTES: u64 = 4096;
/// How long processes that the agent started may take to end by themselves after it.
const OWN_GRACE: Duration = Duration::from_millis(300);
/// How long processes that are left have between SIGTERM and SIGKILL.
const LEFT_GRACE: Duration = Duration::from_millis(500);

/// What to start.
#[derive(Clone, Debug)]
pub struct AgentCommand {
    /// The program.
    pub program: OsString,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its working directory; `None`: castra's.
    pub dir: Option<PathBuf>,
    /// Writes this to its stdin and holds stdin open; closing it is the first sign to end. Otherwise stdin is
    /// empty: Codex waits for ever on one that stays open.
    pub held_stdin: Option<Vec<u8>>,
    /// The value of [`AGENT_RUN_MARK`].
    pub mark: String,
    /// It may run this long.
    pub time_limit: Option<Duration>,
    /// It may be silent this long.
    pub idle_limit: Option<Duration>,
    /// How long it has after the first sign to end.
    pub grace: Duration,
}

impl AgentCommand {
    /// A program without limits.
    pub fn new(program: impl Into<OsString>, args: Vec<OsString>, mark: &str) -> AgentCommand {
        AgentCommand {
            program: program.into(),
            args,
            dir: None,
            held_stdin: None,
            mark: mark.to_owned(),
            time_limit: None,
            idle_limit: None,
            grace: TERM_GRACE,
        }
    }
}

/// Why castra ended an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KillReason {
    /// It ran longer than this.
    TooLong(Duration),
    /// It was silent longer than this.
    TooSilent(Duration),
    /// Somebody asked to stop.
    Interrupted,
    /// It ran on after its stdout had ended.
    Lingered,
}

/// How a process ended.
#[derive(Debug)]
pub struct AgentExit {
    /// Its status; `None`: it could not be reaped.
    pub status: Option<ExitStatus>,
    /// Why castra ended it, if it did.
    pub stopped: Option<KillReason>,
    /// The last lines of its stderr.
    pub stderr_tail: String,
    /// How many processes that it left were ended.
    pub left_behind: usize,
    /// Why its stdout could not be read to the end.
    pub trouble: Option<std::io::Error>,
}

/// Where its end stands.
enum EndStage {
    Running,
    /// Asked to end; killed at this time.
    Asked(Instant),
    /// Killed at this time.
    Killed(Instant),
}

/// Runs an agent to its end and passes its output through the pump. Fails only if the agent can't be started.
pub fn run(
    start: &AgentCommand,
    cancel: &Cancel,
    pump: &mut Pump<'_>,
    emit: &mut dyn FnMut(Event),
) -> std::io::Result<AgentExit> {
    let mut command = Command::new(&start.program);
    command
        .args(&start.args)
        .env(AGENT_RUN_MARK, &start.mark)
        .process_group(0)
        .stdin(if start.held_stdin.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(dir) = &start.dir {
        command.current_dir(dir);
    }
    let mut process = Process::spawn(command, start)?;
    let (stopped, trouble) = process.attend(start, cancel, pump, emit);
    let left_behind = end_marked(&start.mark);
    Ok(AgentExit {
        status: process.status,
        stopped,
        stderr_tail: process.stderr.end(),
        left_behind,
        trouble,
    })
}

/// A running agent. It is killed if this is dropped early, for example by a panic.
struct Process {
    child: Child,
    group: Pid,
    /// Dropping this closes stdin, as soon as everything is written.
    stdin: Option<Sender<()>>,
    source: StreamReader,
    stderr: Stderr,
    status: Option<ExitStatus>,
}

impl Process {
    fn spawn(mut command: Command, start: &AgentCommand) -> std::io::Result<Process> {
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().expect("stdout was asked to be a pipe");
        let stderr = child.stderr.take().expect("stderr was asked to be a pipe");
        let pipe = child.stdin.take();
        let heard = || -> std::io::Result<_> {
            let source = StreamReader::start(stdout)?;
            let stderr = Stderr::start(stderr)?;
            let stdin = match (pipe, &start.held_stdin) {
                (Some(pipe), Some(text)) => Some(hold(pipe, text.clone())?),
                _ => None,
            };
            Ok((source, stderr, stdin))
        };
        let (source, stderr, stdin) = match heard() {
            Ok(heard) => heard,
            Err(error) => {
                // Nobody would read its output.
                end_group(&mut child);
                return Err(error);
            }
        };
        Ok(Process {
            group: Pid::from_raw(i32::try_from(child.id()).expect("pids fit in 31 bits")),
            stdin,
            source,
            stderr,
            child,
            status: None,
        })
    }

    fn attend(
        &mut self,
        start: &AgentCommand,
        cancel: &Cancel,
        pump: &mut Pump<'_>,
        emit: &mut dyn FnMut(Event),
    ) -> (Option<KillReason>, Option<std::io::Error>) {
        let began = Instant::now();
        let mut heard_at = began;
        let (mut ended_at, mut exited_at) = (None, None);
        let (mut stopped, mut trouble) = (None, None);
        let mut stage = EndStage::Running;
        loop {
            match self.next(ended_at.is_some(), pump, emit) {
                Received::Bytes(bytes) => {
                    heard_at = Instant::now();
                    pump.feed(&bytes, emit);
                    self.source.give_back(bytes);
                }
                Received::End(error) if ended_at.is_none() => {
                    ended_at = Some(Instant::now());
                    trouble = error;
                }
                Received::End(_) | Received::Nothing => {}
            }
            let now = Instant::now();
            if self.status.is_none()
                && let Ok(Some(status)) = self.child.try_wait()
            {
                self.status = Some(status);
                exited_at = Some(now);
            }
            if ended_at.is_some() && self.status.is_some() {
                break;
            }
            let since = |moment: Option<Instant>| moment.map(|moment| now.duration_since(moment));
            let over = |limit: Option<Duration>, from: Instant| limit.filter(|limit| now - from >= *limit);
            match stage {
                EndStage::Running => {
                    stopped = if cancel.is_requested() {
                        Some(KillReason::Interrupted)
                    } else if let Some(limit) = over(start.time_limit, began) {
                        Some(KillReason::TooLong(limit))
                    } else if let Some(limit) = over(start.idle_limit, heard_at) {
                        Some(KillReason::TooSilent(limit))
                    } else if since(ended_at).is_some_and(|silent| silent >= LINGER) {
                        Some(KillReason::Lingered)
                    } else {
                        None
                    };
                    if stopped.is_some() {
                        self.ask_to_end();
                        stage = EndStage::Asked(now + start.grace);
                    } else if since(exited_at).is_some_and(|gone| gone >= PIPE_GRACE) {
                        // The agent is gone and its stdout is not.
                        self.kill(&start.mark);
                        stage = EndStage::Killed(now);
                    }
                }
                EndStage::Asked(until) => {
                    let gone = since(exited_at).is_some_and(|gone| gone >= PIPE_GRACE);
                    if now >= until || gone || cancel.requests() >= 2 {
                        self.kill(&start.mark);
                        stage = EndStage::Killed(now);
                    }
                }
                EndStage::Killed(at) if now - at >= KILLED_GRACE => break,
                EndStage::Killed(_) => {}
            }
        }
        // Processes left in the group hold the agent's pipes; most often there are none.
        let _ = killpg(self.group, Signal::SIGKILL);
        (stopped, trouble)
    }

    /// The next output. Before waiting, lines so far are written out.
    fn next(&mut self, over: bool, pump: &mut Pump<'_>, emit: &mut dyn FnMut(Event)) -> Received {
        if over {
            thread::sleep(Duration::from_millis(1));
            return Received::Nothing;
        }
        match self.source.look() {
            Received::Nothing => {
                pump.idle(emit);
                self.source.wait(POLL_INTERVAL)
            }
            heard => heard,
        }
    }

    fn ask_to_end(&mut self) {
        // With stdin held open, closing it is the sign to end; a signal would only end the ssh that passes it
        // on.
        if self.stdin.take().is_none() {
            let _ = killpg(self.group, Signal::SIGTERM);
        }
    }

    fn kill(&mut self, mark: &str) {
        let _ = killpg(self.group, Signal::SIGKILL);
        for pid in host::processes_with(AGENT_RUN_MARK, mark) {
            signal(pid, Signal::SIGKILL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = killpg(self.group, Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// Writes a text and holds the pipe open until the returned end is dropped. In a thread of its own: a reader that
/// reads nothing, such as an ssh that can't log in, must not keep anybody from looking at the clock.
fn hold(mut pipe: ChildStdin, text: Vec<u8>) -> std::io::Result<Sender<()>> {
    let (release, released) = bounded::<()>(0);
    thread::Builder::new()
        .name("harness-stdin".to_owned())
        .spawn(move || {
            // If the reader is gone, its exit status tells why.
            let _ = pipe.write_all(&text).and_then(|()| pipe.flush());
            let _ = released.recv();
        })?;
    Ok(release)
}

/// Ends every process that has the mark; returns how many there were.
fn end_marked(mark: &str) -> usize {
    // Processes that are about to end by themselves don't count: Codex queries the system when it begins.
    let wait = |limit| {
        let mut left = Vec::new();
        Cancel::new().wait_until(limit, POLL_INTERVAL, || {
            left = host::processes_with(AGENT_RUN_MARK, mark);
            left.is_empty()
        });
        left
    };
    let left = wait(OWN_GRACE);
    for pid in &left {
        signal(*pid, Signal::SIGTERM);
    }
    for pid in wait(LEFT_GRACE) {
        signal(pid, Signal::SIGKILL);
    }
    left.len()
}

fn signal(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// The last lines of a stderr, read by a thread of its own.
struct Stderr {
    tail: Arc<Mutex<Tail>>,
    thread: JoinHandle<()>,
}

impl Stderr {
    fn start(stderr: impl Read + Send + 'static) -> std::io::Result<Stderr> {
        let tail = Arc::new(Mutex::new(Tail::default()));
        let shared = Arc::clone(&tail);
        let read = move || {
            let mut reader = BufReader::new(stderr);
            let mut line = Vec::new();
            loop {
                line.clear();
                match (&mut reader).take(STDERR_LINE_BYTES).read_until(b'\n', &mut line) {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {
                        let text = String::from_utf8_lossy(&line);
                        let mut tail = shared.lock().unwrap_or_else(PoisonError::into_inner);
                        tail.push(text.trim_end_matches(['\n', '\r']));
                    }
                }
            }
        };
        let thread = thread::Builder::new()
            .name("harness-stderr".to_owned())
            .spawn(read)?;
        Ok(Stderr { tail, thread })
    }

    /// The lines; waits for the rest, but not for a pipe that a process out of reach holds.
    fn end(&self) -> String {
        const EVERY: Duration = Duration::from_millis(1);
        Cancel::new().wait_until(PIPE_GRACE, EVERY, || self.thread.is_finished());
        self.tail.lock().unwrap_or_else(PoisonError::into_inner).text()
    }
}

#[cfg(test)]
mod tests {
    use super::super::codex::Codex;
    use super::super::relay::{Expected, NoStore, Relay};
    use super::*;

    fn sh(
        script: &str,
        change: impl FnOnce(&mut AgentCommand),
        cancel: &Cancel,
    ) -> (AgentExit, Vec<Event>, String) {
        let mark = host::random_hex(8).unwrap();
        let mut start = AgentCommand::new("sh", ["-c", script].map(OsString::from).to_vec(), &mark);
        start.grace = Duration::from_millis(200);
        change(&mut start);
        let mut keeper = NoStore;
        let relay = Relay::new(&Codex, &mut keeper, Expected::default());
        let mut pump = Pump::new(relay, None);
        let mut events = Vec::new();
        let ended = run(&start, cancel, &mut pump, &mut |event| events.push(event)).unwrap();
        pump.end(&mut |event| events.push(event));
        assert!(
            host::processes_with(AGENT_RUN_MARK, &mark).is_empty(),
            "something is left"
        );
        (ended, events, mark)
    }

    #[test]
    fn output_status_and_stderr_come_back() {
        let (ended, events, _) = sh(
            "cat; printf '{\"type\":\"x\"}\\nno newline'; echo oops >&2; exit 3",
            |_| {},
            &Cancel::new(),
        );
        assert_eq!(ended.status.unwrap().code(), Some(3));
        assert_eq!((ended.stopped, ended.stderr_tail.as_str()), (None, "oops"));
        assert_eq!(events.len(), 2);
        assert_eq!(ended.left_behind, 0);
    }

    #[test]
    fn limits_end_it_with_all_it_started() {
        for held in [false, true] {
            let (ended, _, _) = sh(
                "trap '' TERM; setsid sleep 1000 & sleep 1000 & while :; do echo; sleep 0.01; done",
                |start| {
                    start.time_limit = Some(Duration::from_millis(50));
                    start.held_stdin = held.then(|| b"text\n".to_vec());
                },
                &Cancel::new(),
            );
            assert_eq!(
                ended.stopped,
                Some(KillReason::TooLong(Duration::from_millis(50)))
            );
            assert!(ended.status.is_some());
        }
        let (ended, _, _) = sh(
            "echo hello; sleep 1000",
            |start| start.idle_limit = Some(Duration::from_millis(50)),
            &Cancel::new(),
        );
        assert_eq!(
            ended.stopped,
            Some(KillReason::TooSilent(Duration::from_millis(50)))
        );
    }

    #[test]
    fn a_wish_to_stop_ends_it() {
        let cancel = Cancel::new();
        cancel.request();
        let (ended, _, _) = sh("sleep 1000", |_| {}, &cancel);
        assert_eq!(ended.stopped, Some(KillReason::Interrupted));
    }

    #[test]
    fn what_it_leaves_behind_is_ended_and_counted() {
        let (ended, _, _) = sh(
            // Done only once it has a session of its own: before that it goes with the group.
            "f=$(mktemp); setsid sh -c 'echo up >\"$0\"; exec sleep 1000' \"$f\" >/dev/null 2>&1 &
             until [ -s \"$f\" ]; do sleep 0.01; done; rm \"$f\"; echo done",
            |_| {},
            &Cancel::new(),
        );
        assert_eq!((ended.stopped, ended.status.unwrap().code()), (None, Some(0)));
        assert_eq!(ended.left_behind, 1);
        // One that holds the stdout would keep it open for ever.
        let (ended, _, _) = sh("setsid sleep 1000 & echo done", |_| {}, &Cancel::new());
        assert_eq!(ended.status.unwrap().code(), Some(0));
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let start = AgentCommand::new("castra-no-such-agent", Vec::new(), "m");
        let mut keeper = NoStore;
        let relay = Relay::new(&Codex, &mut keeper, Expected::default());
        let mut pump = Pump::new(relay, None);
        assert!(run(&start, &Cancel::new(), &mut pump, &mut |_| {}).is_err());
    }
}
