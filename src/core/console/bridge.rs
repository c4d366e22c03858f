//! Both directions of a console at once: what is typed goes to the guest, what it writes comes back.
//!
//! Here: three threads' worth of copying, so that neither direction waits for the other, and when it
//! ends. Not here: what the bytes mean ([`super::filter`]).
//!
//! - One thread reads what the guest writes, always: QEMU holds a guest up whose console nobody
//!   reads.
//! - One writes it out, as slowly as the other side takes it.
//! - The calling one hands on what is typed. A guest that takes none doesn't keep anybody from
//!   leaving: the escape is looked for first.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::backlog::Backlog;
use super::filter::TerminalFilter;
use crate::core::cancel::Cancel;
use crate::core::failure::{Exit, Failure, Result};

/// As much of the guest's output waits for a slow reader.
const BACKLOG: usize = 1 << 20;

/// As much of what was typed waits for a guest that takes none.
const TYPED: usize = 64 * 1024;

/// Bytes moved at once.
const READ_BYTES: usize = 16 * 1024;

/// How often a wait looks whether it is over.
const POLL_INTERVAL: u16 = 50;

/// How long one write to the guest may take before the rest is looked after again.
const WRITE_LIMIT: Duration = Duration::from_millis(20);

/// How long the end waits for a reader to take what is left.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What goes in and out, and when to stop.
pub struct Bridge {
    /// What is typed.
    pub input: OwnedFd,
    /// Where the guest's output goes.
    pub output: Box<dyn Write + Send>,
    /// This byte in the input ends it, and isn't handed on; none: the end of the input does, once
    /// the guest has been quiet for [`Bridge::quiet`].
    pub escape: Option<u8>,
    /// How long a guest is listened to after the end of the input.
    pub quiet: Duration,
    /// The guest's bytes as they are.
    pub raw: bool,
    /// Ends it.
    pub cancel: Cancel,
}

/// Why it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BridgeEnd {
    /// The console was closed at the other end.
    Closed,
    /// The escape was typed, or the terminal is gone.
    Left,
    /// The input has ended, and the guest has nothing more to say.
    InputEnded,
    /// Nobody reads the output any more.
    ReaderGone,
    /// It was asked to end.
    Cancelled,
}

impl Bridge {
    /// Relays until it ends. What the terminal was left in is undone.
    pub fn run(self, console: &UnixStream) -> Result<BridgeEnd> {
        let cant = |error: io::Error| Failure::new(Exit::Io, "can't relay the console").because(error);
        let backlog = Arc::new(Backlog::new(BACKLOG));
        let from_guest = console.try_clone().map_err(cant)?;
        console.set_write_timeout(Some(WRITE_LIMIT)).map_err(cant)?;
        let Bridge {
            input,
            output,
            escape,
            quiet,
            raw,
            cancel,
        } = self;
        let reader = spawn("console-read", {
            let backlog = Arc::clone(&backlog);
            move || read_guest(from_guest, &backlog, raw)
        })
        .map_err(cant)?;
        // Not joined: whoever writes to a terminal that takes nothing can't be called back.
        let _writer = spawn("console-write", {
            let backlog = Arc::clone(&backlog);
            move || write_out(output, &backlog)
        })
        .map_err(cant)?;
        let mut typed = InputBuffer {
            input: Some(File::from(input)),
            waiting: Vec::new(),
            escape,
            quiet,
        };
        let end = typed.relay(console, &backlog, &cancel);
        let _ = console.shutdown(Shutdown::Both);
        let _ = reader.join();
        backlog.wait_written(LAST_WORDS);
        end.map_err(cant)
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<thread::JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(work)
}

fn read_guest(mut console: UnixStream, backlog: &Backlog, raw: bool) {
    let mut filter = TerminalFilter::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut fit = Vec::with_capacity(READ_BYTES);
    loop {
        match console.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) if raw => backlog.put(&buffer[..count]),
            Ok(count) => {
                fit.clear();
                filter.feed(&buffer[..count], &mut fit);
                if !fit.is_empty() {
                    backlog.put(&fit);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let undo = filter.undo();
    if !undo.is_empty() {
        backlog.put(&undo);
    }
    backlog.end();
}

fn write_out(mut output: Box<dyn Write + Send>, backlog: &Backlog) {
    while let Some((dropped, bytes)) = backlog.take(READ_BYTES) {
        let note = match dropped {
            0 => String::new(),
            count => format!("\x1b[0m\r\n[castra: {count} bytes left out: they were not taken in time]\r\n"),
        };
        let written = output
            .write_all(note.as_bytes())
            .and_then(|()| output.write_all(&bytes))
            .and_then(|()| output.flush());
        if written.is_err() {
            return backlog.abandon();
        }
    }
}

/// What is typed, on its way.
struct InputBuffer {
    /// `None`: it has ended.
    input: Option<File>,
    waiting: Vec<u8>,
    escape: Option<u8>,
    quiet: Duration,
}

impl InputBuffer {
    fn relay(&mut self, console: &UnixStream, backlog: &Backlog, cancel: &Cancel) -> io::Result<BridgeEnd> {
        let mut input_ended: Option<Instant> = None;
        loop {
            if backlog.has_ended() {
                return Ok(BridgeEnd::Closed);
            }
            if cancel.is_requested() {
                return Ok(BridgeEnd::Cancelled);
            }
            if backlog.is_abandoned() {
                return Ok(BridgeEnd::ReaderGone);
            }
            if let Some(ended) = input_ended
                && self.waiting.is_empty()
                && ended.elapsed() >= self.quiet
                && backlog.quiet_for() >= self.quiet
            {
                return Ok(BridgeEnd::InputEnded);
            }
            if self.wait(console)? && !self.read()? {
                if self.escape.is_some() {
                    return Ok(BridgeEnd::Left);
                }
                self.input = None;
                input_ended = Some(Instant::now());
            }
            if !self.waiting.is_empty() {
                self.write(console);
            }
        }
    }

    /// Waits for input, or for room at the guest's side, or a moment. True: there is input.
    fn wait(&self, console: &UnixStream) -> io::Result<bool> {
        // From a terminal all is read, for the escape may be in it; from a pipe as much as fits.
        let wants_input = self.escape.is_some() || self.waiting.len() < TYPED;
        let mut asked = Vec::with_capacity(2);
        if let Some(input) = self.input.as_ref().filter(|_| wants_input) {
            asked.push(PollFd::new(input.as_fd(), PollFlags::POLLIN));
        }
        let reads = asked.len();
        if !self.waiting.is_empty() {
            asked.push(PollFd::new(console.as_fd(), PollFlags::POLLOUT));
        }
        match poll(&mut asked, PollTimeout::from(POLL_INTERVAL)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(reads > 0 && asked[0].any() == Some(true))
    }

    /// Reads some input. False: it has ended, or the escape was in it.
    fn read(&mut self) -> io::Result<bool> {
        let Some(input) = &mut self.input else {
            return Ok(true);
        };
        let mut buffer = [0; 4096];
        let count = match input.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(count) => count,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) =>
            {
                return Ok(true);
            }
            // A terminal that was hung up.
            Err(_) if self.escape.is_some() => return Ok(false),
            Err(error) => return Err(error),
        };
        let typed = &buffer[..count];
        if self.escape.is_some_and(|escape| typed.contains(&escape)) {
            return Ok(false);
        }
        let room = match self.escape {
            // More than anybody types while the guest takes nothing.
            Some(_) => TYPED.saturating_sub(self.waiting.len()).min(typed.len()),
            None => typed.len(),
        };
        self.waiting.extend_from_slice(&typed[..room]);
        Ok(true)
    }

    fn write(&mut self, mut console: &UnixStream) {
        match console.write(&self.waiting) {
            Ok(count) => drop(self.waiting.drain(..count)),
            // No room yet. Any other error means that it is closed, which the reader notices too.
            Err(error) if is_full(&error) => {}
            Err(_) => self.waiting.clear(),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
#[path = "bridge_tests.rs"]
mod tests;
