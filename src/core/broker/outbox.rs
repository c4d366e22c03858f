//! The queue of bytes for a session, and the thread that sends them when the client reads.
//!
//! Here: sending without waiting, bounded queues, the one thread that empties them. Not here: what
//! happens to a client that is too slow (`broker::state`).
//!
//! Sockets of sessions don't block. What a socket doesn't take at once goes to its session's queue,
//! which is bounded in bytes, and one thread sends all queues as clients read. So a slow client
//! costs memory within its bound, and delays neither the state thread nor another client.

use std::io::{self, IoSlice, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::connection::Connection;
use super::state::Chunk;

/// Bytes sent to one client before the next one has its turn.
const TURN_BYTES: usize = 256 * 1024;

/// Slices of one write; the kernel takes 1024.
const SLICES: usize = 256;

/// How many bytes may wait, for one session and for all.
#[derive(Debug)]
pub struct Budget {
    /// Bytes for one session.
    pub per_session: usize,
    /// Bytes for all.
    pub all: usize,
    waiting: AtomicUsize,
}

impl Budget {
    /// Nothing waits.
    pub fn new(per_session: usize, all: usize) -> Arc<Budget> {
        Arc::new(Budget {
            per_session,
            all,
            waiting: AtomicUsize::new(0),
        })
    }

    /// Whether more bytes wait than may.
    pub fn is_exceeded(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > self.all
    }
}

/// The result of a send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The kernel has it all, or the queue has it and is being emptied.
    Done,
    /// The queue has it, and the drainer must be told.
    NeedsDrain,
    /// It is too much, so the stream was cut off; this many bytes would have waited.
    Full(usize),
}

/// The queue of one session.
#[derive(Debug, Default)]
pub struct Outbox {
    waiting: Mutex<Queue>,
    emptied: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    /// How many of them are sent.
    sent: usize,
    /// The drainer empties it.
    draining: bool,
    /// Nothing more is sent.
    closed: bool,
    /// The sending side is closed when it is empty.
    last: bool,
}

impl Queue {
    fn length(&self) -> usize {
        self.bytes.len() - self.sent
    }

    fn forget(&mut self, budget: &Budget) {
        budget.waiting.fetch_sub(self.length(), Ordering::Relaxed);
        self.bytes = Vec::new();
        self.sent = 0;
    }
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that wait.
    pub fn length(&self) -> usize {
        self.lock().length()
    }

    /// Sends these in order, after the bytes that wait.
    pub fn send(&self, mut socket: impl Write, parts: &[Chunk], budget: &Budget) -> Sent {
        let mut waiting = self.lock();
        if waiting.closed || waiting.last {
            return Sent::Done;
        }
        let (mut part, mut offset) = (0, 0);
        if waiting.length() == 0 {
            (part, offset) = match send_now(&mut socket, parts) {
                Ok(position) => position,
                Err(_) => {
                    // Its thread sees the end and reports it.
                    waiting.closed = true;
                    return Sent::Done;
                }
            };
        }
        let rest = parts.get(part..).unwrap_or_default();
        let more: usize = rest.iter().map(|part| part.bytes().len()).sum::<usize>() - offset;
        if more == 0 {
            return Sent::Done;
        }
        if waiting.length() + more > budget.per_session {
            let length = waiting.length() + more;
            waiting.closed = true;
            waiting.forget(budget);
            self.emptied.notify_all();
            return Sent::Full(length);
        }
        for part in rest {
            waiting.bytes.extend_from_slice(&part.bytes()[offset..]);
            offset = 0;
        }
        budget.waiting.fetch_add(more, Ordering::Relaxed);
        if std::mem::replace(&mut waiting.draining, true) {
            Sent::Done
        } else {
            Sent::NeedsDrain
        }
    }

    /// Sends waiting bytes, as far as the client takes them. False: nothing is left to send.
    pub fn drain(&self, mut socket: impl Write, budget: &Budget) -> bool {
        let mut waiting = self.lock();
        let mut turn = TURN_BYTES;
        while waiting.length() > 0 && turn > 0 {
            let end = waiting.bytes.len().min(waiting.sent + turn);
            match socket.write(&waiting.bytes[waiting.sent..end]) {
                Ok(written) if written > 0 => {
                    waiting.sent += written;
                    turn -= written;
                    budget.waiting.fetch_sub(written, Ordering::Relaxed);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => {
                    waiting.closed = true;
                    waiting.forget(budget);
                }
            }
        }
        if waiting.length() > 0 && !waiting.closed {
            // Bytes that are sent needn't be kept.
            if waiting.sent > TURN_BYTES {
                let sent = std::mem::take(&mut waiting.sent);
                waiting.bytes.drain(..sent);
            }
            return true;
        }
        waiting.bytes = Vec::new();
        waiting.sent = 0;
        waiting.draining = false;
        self.emptied.notify_all();
        false
    }

    /// Closes the queue after the bytes that wait. True: there are none.
    pub fn finish(&self) -> bool {
        let mut waiting = self.lock();
        waiting.last = true;
        waiting.length() == 0
    }

    /// Whether [`Outbox::finish`] was called.
    pub fn is_finished(&self) -> bool {
        self.lock().last
    }

    /// Drops the bytes that wait and sends nothing more.
    pub fn end(&self, budget: &Budget) {
        let mut waiting = self.lock();
        waiting.closed = true;
        waiting.forget(budget);
        self.emptied.notify_all();
    }

    /// Waits until everything is sent; false if that takes too long or won't happen.
    pub fn wait_until_sent(&self, timeout: Duration) -> bool {
        let waits = |waiting: &mut Queue| waiting.length() > 0 && !waiting.closed;
        let (waiting, _) = self
            .emptied
            .wait_timeout_while(self.lock(), timeout, waits)
            .unwrap_or_else(PoisonError::into_inner);
        waiting.length() == 0 && !waiting.closed
    }
}

/// Writes as much as the kernel takes now: the part and the offset in it where it stopped.
fn send_now(socket: &mut impl Write, parts: &[Chunk]) -> io::Result<(usize, usize)> {
    let (mut part, mut offset) = (0, 0);
    while part < parts.len() {
        let mut slices = Vec::with_capacity((parts.len() - part).min(SLICES));
        for (index, part) in parts[part..].iter().take(SLICES).enumerate() {
            slices.push(IoSlice::new(&part.bytes()[if index == 0 { offset } else { 0 }..]));
        }
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        let mut written = match socket.write_vectored(&slices) {
            Ok(0) if wanted > 0 => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        while part < parts.len() {
            let left = parts[part].bytes().len() - offset;
            if written < left {
                offset += written;
                break;
            }
            written -= left;
            offset = 0;
            part += 1;
            if written == 0 {
                break;
            }
        }
    }
    Ok((part, offset))
}

/// The thread that empties queues.
#[derive(Debug)]
pub struct Drainer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    added: Mutex<Vec<Arc<Connection>>>,
    woken: AtomicBool,
    wake_writer: Mutex<Option<io::PipeWriter>>,
}

impl Drainer {
    /// Starts the thread.
    pub fn start(budget: Arc<Budget>) -> io::Result<Drainer> {
        let (wake_reader, wake_writer) = io::pipe()?;
        let shared = Arc::new(Shared {
            added: Mutex::default(),
            woken: AtomicBool::new(false),
            wake_writer: Mutex::new(Some(wake_writer)),
        });
        let its = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("broker-drain".to_owned())
            .stack_size(64 * 1024)
            .spawn(move || drain_all(&its, wake_reader, &budget))?;
        Ok(Drainer {
            shared,
            thread: Some(thread),
        })
    }

    /// Empties the queue of this connection from now on.
    pub fn drain(&self, connection: Arc<Connection>) {
        self.shared
            .added
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(connection);
        if !self.shared.woken.swap(true, Ordering::AcqRel)
            && let Some(wake_writer) = &mut *self
                .shared
                .wake_writer
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        {
            let _ = wake_writer.write(&[0]);
        }
    }
}

impl Drop for Drainer {
    fn drop(&mut self) {
        // The thread sees the end of the pipe.
        self.shared
            .wake_writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn drain_all(shared: &Shared, mut wake_reader: io::PipeReader, budget: &Budget) {
    let mut connections: Vec<Arc<Connection>> = Vec::new();
    loop {
        let ready: Vec<bool> = {
            let mut asked = vec![PollFd::new(wake_reader.as_fd(), PollFlags::POLLIN)];
            asked.extend(
                connections
                    .iter()
                    .map(|connection| PollFd::new(connection.as_fd(), PollFlags::POLLOUT)),
            );
            if poll(&mut asked, PollTimeout::NONE).is_err() {
                continue;
            }
            asked.iter().map(|fd| fd.any().unwrap_or(true)).collect()
        };
        let mut at = 0;
        connections.retain(|connection| {
            at += 1;
            !ready[at] || connection.drain(budget)
        });
        if ready[0] {
            let mut wakeups = [0; 16];
            match io::Read::read(&mut wake_reader, &mut wakeups) {
                Ok(0) => return,
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return,
                _ => {}
            }
            shared.woken.store(false, Ordering::Release);
            connections.append(&mut shared.added.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A socket with so much room.
    struct Socket {
        room: usize,
        got: Vec<u8>,
    }

    impl Write for Socket {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let taken = bytes.len().min(self.room);
            self.room -= taken;
            self.got.extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn parts() -> Vec<Chunk> {
        vec![
            Chunk::Own(vec![1; 10]),
            Chunk::Own(Vec::new()),
            Chunk::Shared(Arc::new((0..100).collect()), 20..40),
        ]
    }

    #[test]
    fn nothing_is_lost_or_swapped_however_little_the_client_takes() {
        let whole: Vec<u8> = parts().iter().flat_map(|part| part.bytes().to_vec()).collect();
        let twice = [whole.clone(), whole.clone()].concat();
        for room in 0..=60 {
            let budget = Budget::new(1000, 1000);
            let outbox = Outbox::default();
            let mut socket = Socket {
                room,
                got: Vec::new(),
            };
            let first = outbox.send(&mut socket, &parts(), &budget);
            assert_eq!(
                first,
                if room < 30 { Sent::NeedsDrain } else { Sent::Done },
                "{room}"
            );
            let _ = outbox.send(&mut socket, &parts(), &budget);
            assert_eq!(outbox.length(), 60 - room);
            while outbox.length() > 0 {
                socket.room = 7;
                outbox.drain(&mut socket, &budget);
            }
            assert_eq!(socket.got, twice);
            assert_eq!(budget.waiting.load(Ordering::Relaxed), 0);
            assert!(outbox.wait_until_sent(Duration::ZERO));
        }
    }

    #[test]
    fn too_much_breaks_the_stream_off() {
        let budget = Budget::new(50, 40);
        let outbox = Outbox::default();
        let mut socket = Socket {
            room: 0,
            got: Vec::new(),
        };
        assert_eq!(outbox.send(&mut socket, &parts(), &budget), Sent::NeedsDrain);
        assert!(!budget.is_exceeded());
        assert_eq!(outbox.send(&mut socket, &parts(), &budget), Sent::Full(60));
        assert_eq!((outbox.length(), budget.waiting.load(Ordering::Relaxed)), (0, 0));
        socket.room = 1000;
        assert_eq!(outbox.send(&mut socket, &parts(), &budget), Sent::Done);
        assert!(socket.got.is_empty(), "nothing follows a broken stream");
        assert!(!outbox.wait_until_sent(Duration::ZERO));
    }

    #[test]
    fn nothing_follows_the_last() {
        let budget = Budget::new(1000, 1000);
        let outbox = Outbox::default();
        let mut socket = Socket {
            room: 5,
            got: Vec::new(),
        };
        assert_eq!(outbox.send(&mut socket, &parts(), &budget), Sent::NeedsDrain);
        assert!(!outbox.finish());
        assert_eq!(outbox.send(&mut socket, &parts(), &budget), Sent::Done);
        socket.room = 1000;
        assert!(!outbox.drain(&mut socket, &budget));
        assert_eq!(socket.got.len(), 30);
    }
}
