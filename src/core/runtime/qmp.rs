//! A small QMP client: enough to see that a QEMU lives, to ask it to power off, and to quit it.
//!
//! Here: the conversation on `qmp.sock`, each step under a deadline, each line bounded. Not here:
//! what QMP said after we left (`core::status` reads `qmp.log`), or signals ([`super::shutdown`]).

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use serde_json::{Value, json};

use crate::core::host;
use crate::core::root::paths::vm_file;

/// Longest line taken from QEMU. Its longest answers to what is asked here are some hundred
/// bytes; more means that something else sits behind the socket.
const MAX_LINE: usize = 1 << 20;

/// An open, negotiated QMP session. QEMU serves one at a time, so keep it short.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    unread: Vec<u8>,
    next_id: u64,
}

/// Why QMP gave no answer.
#[derive(Debug)]
pub enum QmpError {
    /// Nobody listens on the socket, or the connection broke: QEMU is not there (any more).
    Gone(io::Error),
    /// No answer in time. Somebody else may hold the one session there is.
    TimedOut {
        /// What was waited for.
        waiting_for: &'static str,
    },
    /// What came isn't QMP.
    NotQmp(String),
    /// QEMU refused the command; its words.
    Refused(String),
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QmpError::Gone(error) => write!(f, "the QMP connection ended: {error}"),
            QmpError::TimedOut { waiting_for } => {
                write!(f, "QMP gave no {waiting_for} in time")
            }
            QmpError::NotQmp(what) => write!(f, "the process behind qmp.sock doesn't speak QMP: {what}"),
            QmpError::Refused(words) => write!(f, "QEMU refused: {words}"),
        }
    }
}

impl std::error::Error for QmpError {}

impl Qmp {
    /// Connects to the QEMU whose working directory is `dir`, takes its greeting and negotiates.
    pub fn connect(dir: &Path, limit: Duration) -> Result<Qmp, QmpError> {
        let until = Instant::now() + limit;
        let stream = connect_within(dir, limit)?;
        let mut qmp = Qmp {
            stream,
            unread: Vec::new(),
            next_id: 1,
        };
        let greeting = qmp.read_message(until, "greeting")?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::NotQmp(excerpt(&greeting.to_string())));
        }
        qmp.execute_until("qmp_capabilities", until)?;
        Ok(qmp)
    }

    /// Sends a command without arguments and returns its answer; events in between are passed over.
    pub fn execute(&mut self, command: &'static str, limit: Duration) -> Result<Value, QmpError> {
        self.execute_until(command, Instant::now() + limit)
    }

    /// `running`, `paused`, `internal-error`, …
    pub fn query_status(&mut self, limit: Duration) -> Result<String, QmpError> {
        let answer = self.execute("query-status", limit)?;
        match answer["status"].as_str() {
            Some(status) => Ok(excerpt(status)),
            None => Err(QmpError::NotQmp(excerpt(&answer.to_string()))),
        }
    }

    /// Presses the guest's power button. Says nothing about whether the guest listens.
    pub fn system_powerdown(&mut self, limit: Duration) -> Result<(), QmpError> {
        self.execute("system_powerdown", limit).map(drop)
    }

    /// Lets a guest that is paused run on. Says nothing about whether it is stopped again at once.
    pub fn cont(&mut self, limit: Duration) -> Result<(), QmpError> {
        self.execute("cont", limit).map(drop)
    }

    /// Ends QEMU as if its plug were pulled; QEMU repeats `id` in its answer, which `qmp.log` keeps.
    pub fn quit_as(&mut self, id: String, limit: Duration) -> Result<(), QmpError> {
        match self.execute_as("quit", id, Instant::now() + limit) {
            // QEMU may have ended before it answers.
            Ok(_) | Err(QmpError::Gone(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn execute_until(&mut self, command: &'static str, until: Instant) -> Result<Value, QmpError> {
        let id = format!("castra-{}", self.next_id);
        self.next_id += 1;
        self.execute_as(command, id, until)
    }

    fn execute_as(&mut self, command: &'static str, id: String, until: Instant) -> Result<Value, QmpError> {
        let mut line = json!({ "execute": command, "id": id }).to_string();
        line.push('\n');
        self.stream
            .set_write_timeout(Some(left(until, "room for a command")?))
            .map_err(QmpError::Gone)?;
        self.stream
            .write_all(line.as_bytes())
            .map_err(|error| broken(error, "room for a command"))?;
        loop {
            let mut message = self.read_message(until, "answer")?;
            if message["id"] != id.as_str() {
                continue;
            }
            if let Some(error) = message.get("error") {
                let words = error["desc"].as_str().unwrap_or("without a reason");
                return Err(QmpError::Refused(excerpt(words)));
            }
            return Ok(message["return"].take());
        }
    }

    /// The next message that is no event.
    fn read_message(&mut self, until: Instant, waiting_for: &'static str) -> Result<Value, QmpError> {
        loop {
            let line = self.read_line(until, waiting_for)?;
            let text = String::from_utf8_lossy(&line);
            if text.trim().is_empty() {
                continue;
            }
            let message: Value = serde_json::from_str(&text).map_err(|_| QmpError::NotQmp(excerpt(&text)))?;
            if message.get("event").is_none() {
                return Ok(message);
            }
        }
    }

    fn read_line(&mut self, until: Instant, waiting_for: &'static str) -> Result<Vec<u8>, QmpError> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.unread[searched..].iter().position(|byte| *byte == b'\n') {
                let rest = self.unread.split_off(searched + end + 1);
                return Ok(std::mem::replace(&mut self.unread, rest));
            }
            searched = self.unread.len();
            if searched > MAX_LINE {
                return Err(QmpError::NotQmp("a line without end".into()));
            }
            self.stream
                .set_read_timeout(Some(left(until, waiting_for)?))
                .map_err(QmpError::Gone)?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(QmpError::Gone(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => self.unread.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(broken(error, waiting_for)),
            }
        }
    }
}

/// Opens the socket by a path short enough for any state root. Connecting to a Unix socket has no
/// deadline of its own and blocks while a stopped QEMU's queue is full, so a thread does it; it
/// ends with that QEMU at the latest.
fn connect_within(dir: &Path, limit: Duration) -> Result<UnixStream, QmpError> {
    let directory = File::open(dir).map_err(QmpError::Gone)?;
    let (tell, told) = bounded(1);
    thread::Builder::new()
        .name("qmp-connect".into())
        .spawn(move || {
            let path = host::short_path(&directory, vm_file::QMP_SOCK);
            // If nobody waits any more, the stream is closed.
            let _ = tell.send(UnixStream::connect(path));
        })
        .map_err(QmpError::Gone)?;
    match told.recv_timeout(limit) {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(QmpError::Gone(error)),
        Err(_) => Err(QmpError::TimedOut {
            waiting_for: "connection",
        }),
    }
}

/// The time left until the deadline, at least a little: a time-out of zero would mean none.
fn left(until: Instant, waiting_for: &'static str) -> Result<Duration, QmpError> {
    until
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
        .ok_or(QmpError::TimedOut { waiting_for })
}

fn broken(error: io::Error, waiting_for: &'static str) -> QmpError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => QmpError::TimedOut { waiting_for },
        _ => QmpError::Gone(error),
    }
}

fn excerpt(text: &str) -> String {
    crate::core::escape::escape_line(text.trim_end(), 200)
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
mod tests;
