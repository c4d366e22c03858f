//! One connection as its two sides hold it: its thread reads, the state thread answers.
//!
//! Here: the socket behind both kinds of door, and the count of those that are open. Not here:
//! what is read or answered (`broker::listen`, `broker::edges`).

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::protocol::{DeclineReason, GREETING};
use super::state::ConnId;

/// No write to a client may hold a thread up; an answer fits into an empty socket buffer.
const WRITE_TIMEOUT: Duration = Duration::from_millis(20);

/// The two kinds of socket.
#[derive(Debug)]
pub enum Stream {
    /// A guest's.
    Tcp(TcpStream),
    /// The host's.
    Unix(UnixStream),
}

impl Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(tcp) => tcp.as_fd(),
            Stream::Unix(unix) => unix.as_fd(),
        }
    }
}

/// One connection, shared by its thread (reads) and the state thread (answers).
#[derive(Debug)]
pub struct Link {
    /// Its number.
    pub id: ConnId,
    stream: Stream,
    /// 0, or one more than the index of the reason it was told to go.
    verdict: AtomicU8,
    /// The greeting has not been sent yet.
    greeting_owed: AtomicBool,
    open: Arc<Open>,
}

impl Link {
    /// A fresh connection; it counts as open until dropped.
    pub fn new(id: ConnId, stream: Stream, open: Arc<Open>) -> Link {
        let _ = match &stream {
            Stream::Tcp(tcp) => tcp
                .set_nodelay(true)
                .and_then(|()| tcp.set_write_timeout(Some(WRITE_TIMEOUT))),
            Stream::Unix(unix) => unix.set_write_timeout(Some(WRITE_TIMEOUT)),
        };
        open.add(1);
        Link {
            id,
            stream,
            verdict: AtomicU8::new(0),
            greeting_owed: AtomicBool::new(true),
            open,
        }
    }

    /// Reads what there is, waiting at most this long.
    pub fn read(&self, bytes: &mut [u8], limit: Duration) -> io::Result<usize> {
        let limit = Some(limit.max(Duration::from_millis(1)));
        match &self.stream {
            Stream::Tcp(tcp) => {
                tcp.set_read_timeout(limit)?;
                (&*tcp).read(bytes)
            }
            Stream::Unix(unix) => {
                unix.set_read_timeout(limit)?;
                (&*unix).read(bytes)
            }
        }
    }

    /// The socket, for a poll.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Sends the greeting, unless the client's first bytes are here already: then greeting and
    /// answer go out together, which saves a write and wakes the client once instead of twice.
    pub fn greet_unless_heard(&self) {
        let mut asked = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        if poll(&mut asked, PollTimeout::ZERO) == Ok(0) {
            self.greet();
        }
    }

    /// Sends the greeting if it is still owed.
    pub fn greet(&self) {
        if self.greeting_owed.swap(false, Ordering::AcqRel) {
            self.send(GREETING);
        }
    }

    /// Sends text. That the client isn't there any more is its own business.
    fn send(&self, text: &str) {
        let _ = match &self.stream {
            Stream::Tcp(tcp) => (&*tcp).write_all(text.as_bytes()),
            Stream::Unix(unix) => (&*unix).write_all(text.as_bytes()),
        };
    }

    fn shutdown(&self, how: Shutdown) {
        let _ = match &self.stream {
            Stream::Tcp(tcp) => tcp.shutdown(how),
            Stream::Unix(unix) => unix.shutdown(how),
        };
    }

    /// Sends the last line there will be.
    pub fn answer(&self, line: &str) {
        if self.greeting_owed.swap(false, Ordering::AcqRel) {
            self.send(&format!("{GREETING}{line}"));
        } else {
            self.send(line);
        }
        self.shutdown(Shutdown::Write);
    }

    /// Ends the wait for its hello; what has already come may still count.
    pub fn evict(&self, reason: DeclineReason) {
        let index = DeclineReason::ALL.iter().position(|known| *known == reason);
        let number = index.and_then(|index| u8::try_from(index + 1).ok()).unwrap_or(1);
        self.verdict.store(number, Ordering::Release);
        self.shutdown(Shutdown::Read);
    }

    /// Ends a connection that had its answer.
    pub fn close(&self) {
        self.shutdown(Shutdown::Both);
    }

    /// Why it was told to go, if it was.
    pub fn verdict(&self) -> Option<DeclineReason> {
        let number = usize::from(self.verdict.load(Ordering::Acquire));
        DeclineReason::ALL.get(number.checked_sub(1)?).copied()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.open.remove(1);
    }
}

/// A count of what is open, that can be waited on.
#[derive(Debug, Default)]
pub struct Open {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Open {
    /// Counts some in.
    pub fn add(&self, number: usize) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += number;
    }

    /// Counts some out.
    pub fn remove(&self, number: usize) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) -= number;
        self.changed.notify_all();
    }

    /// How many are open.
    pub fn count(&self) -> usize {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until fewer than `limit` are open; false if it took longer than `patience`.
    pub fn wait_below(&self, limit: usize, patience: Duration) -> bool {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, _) = self
            .changed
            .wait_timeout_while(count, patience, |count| *count >= limit)
            .unwrap_or_else(PoisonError::into_inner);
        *count < limit
    }
}
