//! The master connection: a child of castra that lives exactly as long as castra wants.
//!
//! Here: opening it, checking whether it lives, ending it. Not here: the commands that run through it
//! (`ssh::channel`).
//!
//! Its remote side ends in `exec cat`, its stdin is a pipe that castra holds: the ready line
//! proves that commands run (a banner and a login don't), and however castra dies, the pipe
//! closes and the connection ends with it. `-f` and ControlPersist would leave a daemon that
//! nobody reaps.

use std::io::Read;
use std::process::{Child, ChildStdin};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, never};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::core::bootstrap::bounded_lines::LineCutter;
use crate::core::bootstrap::ssh::SshTarget;
use crate::core::bootstrap::ssh::error::{SshError, said};
use crate::core::bootstrap::watch::Watch;
use crate::core::cancel::POLL_INTERVAL;
use crate::core::host;
use crate::core::process::{Tail, ended_within, show_status};
use crate::core::root::paths::vm_file;
use crate::core::threads::no_thread_failure;

/// The line after which the connection counts as usable.
pub const READY: &str = "castra-ready";

/// How long ssh may take to end after SIGTERM.
const TERM_GRACE: Duration = Duration::from_secs(1);
/// Lines before the ready line that are kept: greetings of the login shell, and the answers.
const ANSWER_LINES: usize = 200;
const LINE_BYTES: usize = 1024;
/// Lines buffered for the reader.
const QUEUE_LINES: usize = 256;
/// How many lines are read at the end.
const CLOSING_LINES: usize = 2000;

/// An open master connection; dropping it ends it.
pub struct Master {
    target: SshTarget,
    child: Child,
    stdin: Option<ChildStdin>,
    stderr: Arc<Mutex<Tail>>,
    readers: Vec<JoinHandle<()>>,
    answer: Vec<String>,
    /// What it prints, from the ready line on; bounded, so that a guest that never stops is slowed down.
    heard: Receiver<String>,
}

impl Master {
    /// Connects, runs `command` and waits until it prints [`READY`].
    pub fn open(
        target: SshTarget,
        command: &str,
        limit: Duration,
        watch: &Watch<'_>,
    ) -> Result<Master, SshError> {
        let began = Instant::now();
        // If a killed ssh left its socket, this ssh would go on without one.
        let _ = host::remove_if_there(&target.dir.join(vm_file::SSH_CTL));
        let mut child = target
            .spawn(target.master_argv(command))
            .map_err(SshError::NoTool)?;
        let stdin = child.stdin.take();
        let stderr = Arc::new(Mutex::new(Tail::default()));
        let (tell, heard) = bounded(QUEUE_LINES);
        let mut master = Master {
            target,
            stdin,
            stderr: Arc::clone(&stderr),
            readers: Vec::new(),
            answer: Vec::new(),
            heard,
            child,
        };
        let vm = master.target.vm.clone();
        if let Some(stdout) = master.child.stdout.take() {
            let reader = spawn_reader(&format!("ssh-out {vm}"), move || read_stdout(stdout, &tell))?;
            master.readers.push(reader);
        }
        if let Some(pipe) = master.child.stderr.take() {
            let reader = spawn_reader(&format!("ssh-err {vm}"), move || read_stderr(pipe, &stderr))?;
            master.readers.push(reader);
        }
        master.wait_ready(began, limit, watch)?;
        Ok(master)
    }

    fn wait_ready(&mut self, began: Instant, limit: Duration, watch: &Watch<'_>) -> Result<(), SshError> {
        loop {
            match self.heard.recv_timeout(POLL_INTERVAL) {
                Ok(line) if line == READY => return Ok(()),
                Ok(line) if self.answer.len() < ANSWER_LINES => self.answer.push(line),
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    // Its stdout is closed: ssh is about to end, and its messages tell the reason.
                    let status = self.reap(TERM_GRACE);
                    return Err(SshError::of_ended(&status, &self.stderr_tail()));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(stop) = watch.look() {
                return Err(SshError::Stopped(stop));
            }
            if began.elapsed() >= limit {
                let complaints = self.stderr_tail();
                let words = if complaints.is_empty() {
                    complaints
                } else {
                    said(&complaints, "")
                };
                return Err(SshError::NotReady(limit, words));
            }
        }
    }

    /// The lines that came before the ready line.
    pub fn greeting_lines(&self) -> &[String] {
        &self.answer
    }

    /// Its target.
    pub fn target(&self) -> &SshTarget {
        &self.target
    }

    /// The messages of ssh and of the remote side on stderr.
    pub fn stderr_tail(&self) -> String {
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner).text()
    }

    /// Why it is gone, if it is. Waits as long as `timeout` for an end that is under way.
    pub fn lost(&mut self, timeout: Duration) -> Option<SshError> {
        let status = ended_within(&mut self.child, timeout)?;
        self.join_readers();
        Some(SshError::Lost(said(&self.stderr_tail(), &show_status(status))))
    }

    /// Takes over the readers of a channel. ssh hands a channel's pipes to the master, which
    /// holds them as long as anything in the guest does: the readers may outlive the channel.
    pub(super) fn add_readers(&mut self, readers: impl IntoIterator<Item = JoinHandle<()>>) {
        self.readers.extend(readers);
    }

    /// Closes stdin, so that the remote side ends, and returns what that prints after this line.
    pub fn read_closing_output(&mut self, mark: &str, timeout: Duration) -> Vec<String> {
        let until = Instant::now() + timeout;
        drop(self.stdin.take());
        let mut lines = Vec::new();
        let mut marked = false;
        let mut left = CLOSING_LINES;
        while left > 0
            && let Ok(line) = self.heard.recv_deadline(until)
        {
            left -= 1;
            if marked {
                lines.push(line);
            } else {
                marked = line == mark;
            }
        }
        lines
    }

    /// Ends the connection and everything that runs through it.
    pub fn end(&mut self) {
        // Closing the pipe ends the remote side, SIGTERM the local one without another round trip.
        drop(self.stdin.take());
        if matches!(self.child.try_wait(), Ok(None)) {
            let group = Pid::from_raw(i32::try_from(self.child.id()).expect("pids fit in 31 bits"));
            let _ = killpg(group, Signal::SIGTERM);
        }
        self.reap(TERM_GRACE);
        let _ = host::remove_if_there(&self.target.dir.join(vm_file::SSH_CTL));
    }

    /// Waits for the child, kills it if it takes too long, and returns how it ended.
    fn reap(&mut self, timeout: Duration) -> String {
        let group = Pid::from_raw(i32::try_from(self.child.id()).expect("pids fit in 31 bits"));
        let mut status = ended_within(&mut self.child, timeout);
        if status.is_none() {
            let _ = killpg(group, Signal::SIGKILL);
            status = self.child.wait().ok();
        }
        self.join_readers();
        status.map_or_else(|| "an unknown status".to_owned(), show_status)
    }

    fn join_readers(&mut self) {
        // The queue is dropped, so a reader that waits for room sees the end.
        self.heard = never();
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

impl Drop for Master {
    fn drop(&mut self) {
        self.end();
    }
}

pub(super) fn spawn_reader(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, SshError> {
    let started = thread::Builder::new().name(name.to_owned()).spawn(work);
    started.map_err(|error| SshError::Lost(no_thread_failure(name, &error).cause()))
}

fn read_stdout(mut stdout: impl Read, tell: &Sender<String>) {
    let mut cutter = LineCutter::new(LINE_BYTES);
    let mut buffer = [0; 4096];
    while let Ok(count) = stdout.read(&mut buffer) {
        if count == 0 {
            break;
        }
        cutter.push(&buffer[..count], |line| {
            let _ = tell.send(line.to_owned());
        });
    }
}

fn read_stderr(mut stderr: impl Read, tail: &Mutex<Tail>) {
    let mut cutter = LineCutter::new(LINE_BYTES);
    let mut buffer = [0; 4096];
    let mut keep = |line: &str| tail.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    while let Ok(count) = stderr.read(&mut buffer) {
        if count == 0 {
            break;
        }
        cutter.push(&buffer[..count], &mut keep);
    }
    cutter.finish(&mut keep);
}
