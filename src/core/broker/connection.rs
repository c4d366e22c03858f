//! One connection, shared by its thread, which reads, and the state thread, which answers.
//!
//! Here: the socket, TCP or Unix, the messages between the two threads, and the count of open
//! connections. Not here: what is read or answered (`broker::listen`, `broker::session_loop`,
//! `broker::effects`), queues (`broker::outbox`).

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::outbox::{Budget, Outbox};
use super::protocol::{DeclineReason, GREETING};
use super::state::{Chunk, ConnId, Delivery};

/// A write to a client may not block a thread for longer; an answer fits into an empty socket
/// buffer.
const WRITE_TIMEOUT: Duration = Duration::from_millis(20);

/// How many bytes of one session may wait for the state thread; a client that sends faster has a
/// full socket.
const CREDIT_BYTES: usize = 128 * 1024;

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
pub struct Connection {
    /// Its number.
    pub id: ConnId,
    stream: Stream,
    /// 0, or one more than the index of the reason for which it was evicted.
    evicted: AtomicU8,
    /// The greeting has not been sent yet.
    greeting_pending: AtomicBool,
    open: Arc<OpenCount>,
    outbox: Outbox,
    mailbox: Mutex<Mailbox>,
    mail_arrived: Condvar,
    /// Bytes on their way to the state thread.
    credit_used: Mutex<usize>,
    credit_returned: Condvar,
}

/// What the state thread tells a connection's thread.
#[derive(Debug, Default)]
struct Mailbox {
    /// Whether its hello got a session; `None`: not answered yet.
    granted: Option<bool>,
    /// How its session gets its messages.
    delivery: Option<Delivery>,
    /// Its session is over; the last frame is sent or queued.
    finished: bool,
    /// The connection is closed.
    closed: bool,
}

/// The writing side of either kind of socket.
struct Writing<'a>(&'a Stream);

impl Write for Writing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0 {
            Stream::Tcp(tcp) => (&*tcp).write(bytes),
            Stream::Unix(unix) => (&*unix).write(bytes),
        }
    }

    fn write_vectored(&mut self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match self.0 {
            Stream::Tcp(tcp) => (&*tcp).write_vectored(slices),
            Stream::Unix(unix) => (&*unix).write_vectored(slices),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Connection {
    /// A fresh connection; it counts as open until dropped.
    pub fn new(id: ConnId, stream: Stream, open: Arc<OpenCount>) -> Connection {
        let _ = match &stream {
            Stream::Tcp(tcp) => tcp
                .set_nodelay(true)
                .and_then(|()| tcp.set_write_timeout(Some(WRITE_TIMEOUT))),
            Stream::Unix(unix) => unix.set_write_timeout(Some(WRITE_TIMEOUT)),
        };
        open.add(1);
        Connection {
            id,
            stream,
            evicted: AtomicU8::new(0),
            greeting_pending: AtomicBool::new(true),
            open,
            outbox: Outbox::default(),
            mailbox: Mutex::default(),
            mail_arrived: Condvar::new(),
            credit_used: Mutex::default(),
            credit_returned: Condvar::new(),
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
    pub fn greet_if_silent(&self) {
        let mut asked = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        if poll(&mut asked, PollTimeout::ZERO) == Ok(0) {
            self.greet();
        }
    }

    /// Sends the greeting if it is still owed.
    pub fn greet(&self) {
        if self.greeting_pending.swap(false, Ordering::AcqRel) {
            self.send(GREETING);
        }
    }

    /// Sends text. A client that is gone is no error.
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

    /// Sends the last line and closes the sending side.
    pub fn reply_and_close(&self, line: &str) {
        if self.greeting_pending.swap(false, Ordering::AcqRel) {
            self.send(&format!("{GREETING}{line}"));
        } else {
            self.send(line);
        }
        self.shutdown(Shutdown::Write);
        self.mailbox().granted = Some(false);
        self.mail_arrived.notify_all();
    }

    /// Turns the connection into a session: this line, then frames. From now on its socket doesn't
    /// block.
    pub fn grant(&self, line: &str, budget: &Budget) {
        let _ = match &self.stream {
            Stream::Tcp(tcp) => tcp.set_nonblocking(true),
            Stream::Unix(unix) => unix.set_nonblocking(true),
        };
        let owed = self.greeting_pending.swap(false, Ordering::AcqRel);
        let words = format!("{}{line}", if owed { GREETING } else { "" });
        // A fresh socket has room for a line.
        let _ = self.send_frames(&[Chunk::Own(words.into_bytes())], budget);
        self.mailbox().granted = Some(true);
        self.mail_arrived.notify_all();
    }

    /// Sends frames as far as the client takes them, and queues the rest.
    pub fn send_frames(&self, parts: &[Chunk], budget: &Budget) -> super::outbox::Sent {
        self.outbox.send(Writing(&self.stream), parts, budget)
    }

    /// Sends what is queued, as far as the client takes it. False: nothing is left to send.
    pub fn drain(&self, budget: &Budget) -> bool {
        let more = self.outbox.drain(Writing(&self.stream), budget);
        if !more && self.outbox.is_finished() {
            self.shutdown(Shutdown::Write);
        }
        more
    }

    /// Bytes that are queued.
    pub fn queued_bytes(&self) -> usize {
        self.outbox.length()
    }

    /// Waits until the queue is empty; false if that takes too long or won't happen.
    pub fn wait_until_sent(&self, timeout: Duration) -> bool {
        self.outbox.wait_until_sent(timeout)
    }

    /// The session is over: nothing comes after what is queued, and its thread may leave.
    pub fn finish(&self) {
        if self.outbox.finish() {
            self.shutdown(Shutdown::Write);
        }
        self.mailbox().finished = true;
        self.mail_arrived.notify_all();
        // Wakes its thread if the thread waits for more.
        self.shutdown(Shutdown::Read);
    }

    /// Reads what there is, without waiting.
    pub fn read_now(&self, bytes: &mut [u8]) -> io::Result<usize> {
        match &self.stream {
            Stream::Tcp(tcp) => (&*tcp).read(bytes),
            Stream::Unix(unix) => (&*unix).read(bytes),
        }
    }

    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn await_mail<T>(&self, mut take: impl FnMut(&mut Mailbox) -> Option<T>) -> Option<T> {
        let mut taken = None;
        let wanting = |mailbox: &mut Mailbox| {
            taken = take(mailbox);
            taken.is_none() && !mailbox.closed
        };
        drop(
            self.mail_arrived
                .wait_while(self.mailbox(), wanting)
                .unwrap_or_else(PoisonError::into_inner),
        );
        taken
    }

    /// Waits for the answer to a hello that asked for a session: true if it is granted.
    pub fn await_grant(&self) -> bool {
        self.await_mail(|mailbox| mailbox.granted).unwrap_or(false)
    }

    /// Tells its thread how the session gets its messages.
    pub fn set_delivery(&self, delivery: Delivery) {
        self.mailbox().delivery = Some(delivery);
        self.mail_arrived.notify_all();
    }

    /// Waits to be told how the session gets its messages; `None`: the session is over.
    pub fn await_delivery(&self) -> Option<Delivery> {
        self.await_mail(|mailbox| {
            if mailbox.finished {
                Some(None)
            } else {
                mailbox.delivery.take().map(Some)
            }
        })
        .flatten()
    }

    /// Waits until its session was ended, at most this long.
    pub fn await_end(&self, timeout: Duration) {
        let open = |mailbox: &mut Mailbox| !mailbox.finished && !mailbox.closed;
        drop(
            self.mail_arrived
                .wait_timeout_while(self.mailbox(), timeout, open),
        );
    }

    /// Its session is over, or its connection closed.
    pub fn is_finished(&self) -> bool {
        let mailbox = self.mailbox();
        mailbox.finished || mailbox.closed
    }

    /// Takes credit for bytes that go to the state thread, and waits until there is some; false:
    /// the session is over.
    pub fn take_credit(&self, bytes: usize) -> bool {
        let credit_used = self.credit_used.lock().unwrap_or_else(PoisonError::into_inner);
        let mut credit_used = self
            .credit_returned
            .wait_while(credit_used, |credit_used| *credit_used > CREDIT_BYTES)
            .unwrap_or_else(PoisonError::into_inner);
        *credit_used += bytes;
        drop(credit_used);
        !self.is_finished()
    }

    /// Returns credit: the state thread has processed this many bytes.
    pub fn return_credit(&self, bytes: usize) {
        let mut credit_used = self.credit_used.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *credit_used;
        *credit_used = credit_used.saturating_sub(bytes);
        if before > CREDIT_BYTES && *credit_used <= CREDIT_BYTES {
            self.credit_returned.notify_all();
        }
    }

    /// Ends the wait for its hello; a hello that has come already still counts.
    pub fn evict(&self, reason: DeclineReason) {
        let index = DeclineReason::ALL.iter().position(|known| *known == reason);
        let number = index.and_then(|index| u8::try_from(index + 1).ok()).unwrap_or(1);
        self.evicted.store(number, Ordering::Release);
        self.shutdown(Shutdown::Read);
    }

    /// Ends the connection at once; queued bytes are dropped.
    pub fn close(&self, budget: &Budget) {
        self.outbox.end(budget);
        self.mailbox().closed = true;
        self.mail_arrived.notify_all();
        *self.credit_used.lock().unwrap_or_else(PoisonError::into_inner) = 0;
        self.credit_returned.notify_all();
        self.shutdown(Shutdown::Both);
    }

    /// Why it was evicted, if it was.
    pub fn evict_reason(&self) -> Option<DeclineReason> {
        let number = usize::from(self.evicted.load(Ordering::Acquire));
        DeclineReason::ALL.get(number.checked_sub(1)?).copied()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.remove(1);
    }
}

/// A count of open connections or threads that can be waited for.
#[derive(Debug, Default)]
pub struct OpenCount {
    count: Mutex<usize>,
    changed: Condvar,
}

impl OpenCount {
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

    /// Waits until fewer than `limit` are open; false if it took longer than `timeout`.
    pub fn wait_below(&self, limit: usize, timeout: Duration) -> bool {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, _) = self
            .changed
            .wait_timeout_while(count, timeout, |count| *count >= limit)
            .unwrap_or_else(PoisonError::into_inner);
        *count < limit
    }
}
