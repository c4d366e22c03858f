//! Sockets and their threads: accepting, greeting, reading one hello under one deadline.
//!
//! Here: the accept threads and the small pool of connection threads. Not here: the socket itself
//! (`broker::connection`), any decision about admission (`broker::state`).
//!
//! An accept thread only accepts. Each connection has a thread that greets, reads and then waits
//! for the client to close, so a silent, slow or flooding client takes one thread and delays
//! nobody.

use std::collections::VecDeque;
use std::io;
use std::net::TcpListener;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::core::escape::escape_line;

use super::connection::{Connection, OpenCount, Stream};
use super::protocol::{
    DeclineReason, HELLO_BYTES, HelloRefusal, Progress, declined_reply, parse_hello, progress,
};
use super::session_loop::{Sessions, run_session};
use super::state::{ConnId, Input, Peer};

/// Stack of a connection thread. Only touched pages count as memory; a debug build touches most.
const STACK_BYTES: usize = 128 * 1024;

/// Finished connection threads kept for the next connection: starting one costs 50 µs and, on
/// a busy host, a scheduling delay.
const IDLE_THREADS: usize = 16;

/// How long a client may take to close after its answer. To close with unread bytes makes the
/// kernel reset the connection, and the client would lose the answer that tells it what was wrong;
/// so this many bytes are read and dropped. A client that sends more has a full socket until the
/// time is up: a flood stalls and costs no processor time.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: usize = 16 * 1024;

/// How many connections beyond the limit may exist while evicted ones are still closing.
pub const SLACK: usize = 32;

/// What wakes the state thread.
pub enum Wake {
    /// A listener has as many connections as it may: one must be evicted.
    ConnectionsFull,
    /// An input from a connection thread.
    Input(Input),
    /// An error for the log.
    Error(String),
    /// Somebody asked the broker to stop.
    Stop,
}

/// A new connection, with the handle to answer it.
pub struct NewConnection {
    /// The handle.
    pub connection: Arc<Connection>,
    /// Who is at its other end.
    pub peer: Peer,
    /// Where it comes from.
    pub remote: String,
}

/// The threads that serve connections, shared by both listeners.
pub struct ConnectionThreads {
    to_state: Sender<Wake>,
    /// Connections that the state thread doesn't know yet. They don't wake it: it takes them before
    /// the inputs of their threads, and until then there is nothing to decide about them.
    new_connections: Mutex<Vec<NewConnection>>,
    hello_timeout: Duration,
    next_id: AtomicU64,
    sessions: Arc<Sessions>,
    threads: Arc<OpenCount>,
    jobs: Mutex<Jobs>,
    job_arrived: Condvar,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<(Arc<Connection>, Instant)>,
    idle: usize,
    closed: bool,
}

impl ConnectionThreads {
    /// No thread yet; inputs go to the state thread.
    pub fn new(
        to_state: Sender<Wake>,
        hello_timeout: Duration,
        sessions: Arc<Sessions>,
    ) -> Arc<ConnectionThreads> {
        Arc::new(ConnectionThreads {
            to_state,
            new_connections: Mutex::default(),
            hello_timeout,
            sessions,
            next_id: AtomicU64::new(1),
            threads: Arc::default(),
            jobs: Mutex::default(),
            job_arrived: Condvar::new(),
        })
    }

    /// Connections that came since the last call. Call it after the inputs of the threads were
    /// received.
    pub fn take_new(&self) -> Vec<NewConnection> {
        std::mem::take(
            &mut *self
                .new_connections
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// Ends the idle threads and waits for the busy ones; true if all ended in time.
    pub fn close(&self, timeout: Duration) -> bool {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.job_arrived.notify_all();
        self.threads.wait_below(1, timeout)
    }

    fn serve_new(self: &Arc<Self>, connections: &Arc<OpenCount>, stream: Stream, peer: Peer, remote: String) {
        let accepted_at = Instant::now();
        let id = ConnId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let connection = Arc::new(Connection::new(id, stream, Arc::clone(connections)));
        self.new_connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(NewConnection {
                connection: Arc::clone(&connection),
                peer,
                remote,
            });
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.idle > jobs.waiting.len() {
            jobs.waiting.push_back((connection, accepted_at));
            // Unlocked first: the woken thread would only wait for the lock.
            drop(jobs);
            self.job_arrived.notify_one();
            return;
        }
        drop(jobs);
        self.threads.add(1);
        let connection_threads = Arc::clone(self);
        let job = Arc::clone(&connection);
        let spawned = thread::Builder::new()
            .name("broker-conn".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _leaving = ThreadCounted(Arc::clone(&connection_threads));
                connection_threads.run_thread(job, accepted_at);
            });
        if let Err(error) = spawned {
            self.threads.remove(1);
            connection.reply_and_close(&declined_reply(DeclineReason::SessionLimit, &[]));
            let _ = self
                .to_state
                .send(Wake::Error(format!("no thread for a connection: {error}")));
            let _ = self.to_state.send(Wake::Input(Input::Closed { conn: id }));
        }
    }

    /// A connection thread's life: one connection after another.
    fn run_thread(&self, connection: Arc<Connection>, accepted_at: Instant) {
        let mut job = Some((connection, accepted_at));
        while let Some((connection, accepted_at)) = job.take() {
            {
                let _closing = ClosedOnDrop {
                    conn: connection.id,
                    to_state: &self.to_state,
                };
                let mut bytes = [0; HELLO_BYTES + 2];
                let input = read_hello(&connection, accepted_at + self.hello_timeout, &mut bytes);
                if let Some((input, behind)) = input {
                    let wants_bus = offers_bus(&input);
                    let _ = self.to_state.send(Wake::Input(input));
                    if wants_bus && connection.await_grant() {
                        run_session(&connection, &bytes[behind], &self.sessions, &self.to_state);
                    } else {
                        linger(&connection);
                    }
                }
            }
            drop(connection);
            job = self.next_job();
        }
    }

    fn next_job(&self) -> Option<(Arc<Connection>, Instant)> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.idle >= IDLE_THREADS {
            return None;
        }
        jobs.idle += 1;
        let mut jobs = self
            .job_arrived
            .wait_while(jobs, |jobs| jobs.waiting.is_empty() && !jobs.closed)
            .unwrap_or_else(PoisonError::into_inner);
        jobs.idle -= 1;
        jobs.waiting.pop_front()
    }
}

/// Counts a connection thread until it ends, however it ends.
struct ThreadCounted(Arc<ConnectionThreads>);

impl Drop for ThreadCounted {
    fn drop(&mut self) {
        self.0.threads.remove(1);
    }
}

/// Reports that a connection is closed, however its thread ends.
struct ClosedOnDrop<'a> {
    conn: ConnId,
    to_state: &'a Sender<Wake>,
}

impl Drop for ClosedOnDrop<'_> {
    fn drop(&mut self) {
        let _ = self.to_state.send(Wake::Input(Input::Closed { conn: self.conn }));
    }
}

/// Whether a hello offers any version of the bus: then its thread waits for the answer.
fn offers_bus(input: &Input) -> bool {
    match input {
        Input::Hello { hello, .. } => hello.capabilities.iter().any(|word| word.starts_with("bus-")),
        _ => false,
    }
}

/// Greets and reads until there is a hello, something else, or no time left; also returns the range
/// of `bytes` that came after the hello. `None`: the client left without a byte, which is no
/// attempt.
fn read_hello(
    connection: &Connection,
    deadline: Instant,
    bytes: &mut [u8; HELLO_BYTES + 2],
) -> Option<(Input, Range<usize>)> {
    let conn = connection.id;
    connection.greet_if_silent();
    // A hello and its CR LF; more isn't read before the hello is answered.
    let mut length = 0;
    let refused = |length: usize, refusal: HelloRefusal| Input::HelloRefused {
        conn,
        refusal,
        attempted: length > 0,
    };
    let over = |length: usize, refusal: HelloRefusal| Some((refused(length, refusal), 0..0));
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return over(length, HelloRefusal::unnamed(DeclineReason::Timeout));
        }
        match connection.read(&mut bytes[length..], left) {
            Ok(0) => {
                return match (connection.evict_reason(), length) {
                    (Some(reason), _) => over(length, HelloRefusal::unnamed(reason)),
                    (None, 0) => None,
                    (None, _) => over(length, HelloRefusal::unnamed(DeclineReason::ProtocolError)),
                };
            }
            Ok(more) => length += more,
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => continue,
                _ if length == 0 => return None,
                _ => return over(length, HelloRefusal::unnamed(DeclineReason::ProtocolError)),
            },
        }
        let mut behind = 0..0;
        let parsed = match progress(&bytes[..length]) {
            Progress::Partial => match connection.evict_reason() {
                Some(reason) => Err(HelloRefusal::unnamed(reason)),
                None => {
                    connection.greet();
                    continue;
                }
            },
            Progress::Hopeless => Err(HelloRefusal::unnamed(DeclineReason::ProtocolError)),
            Progress::Line { line, used } => {
                behind = used..length;
                parse_hello(&bytes[..line])
            }
        };
        let input = match parsed {
            Ok(hello) => Input::Hello { conn, hello },
            Err(refusal) => {
                let input = escape_line(&String::from_utf8_lossy(&bytes[..length]), 80);
                log::debug!("connection {}: refused {input}", conn.0);
                refused(length, refusal)
            }
        };
        return Some((input, behind));
    }
}

/// Reads and drops what the client still sends, until it closes or the time is up.
fn linger(connection: &Connection) {
    let until = Instant::now() + LINGER;
    let mut taken = 0;
    let mut bytes = [0; 2048];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        if taken >= LINGER_BYTES {
            // With no events asked for, poll still reports the end of both directions.
            let mut asked = [PollFd::new(connection.as_fd(), PollFlags::empty())];
            let _ = poll(
                &mut asked,
                PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO),
            );
            return;
        }
        match connection.read(&mut bytes, left) {
            Ok(0) => return,
            Ok(more) => taken += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// The thread that accepts a listener's connections, and how to end it.
pub struct AcceptThread {
    thread: Option<JoinHandle<()>>,
    quit: Option<io::PipeWriter>,
}

/// A listening socket.
pub enum Listener {
    /// Guests.
    Tcp(TcpListener),
    /// The host.
    Unix(UnixListener),
}

impl Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Tcp(tcp) => tcp.as_fd(),
            Listener::Unix(unix) => unix.as_fd(),
        }
    }

    fn accept(&self) -> io::Result<(Stream, Peer, String)> {
        match self {
            Listener::Tcp(tcp) => {
                let (stream, remote) = tcp.accept()?;
                Ok((Stream::Tcp(stream), Peer::Guest, remote.to_string()))
            }
            Listener::Unix(unix) => {
                let (stream, _) = unix.accept()?;
                Ok((Stream::Unix(stream), Peer::Host, "unix".to_owned()))
            }
        }
    }
}

impl AcceptThread {
    /// Starts to accept: at most `places` connections, and those that are just closing.
    pub fn start(
        listener: Listener,
        connection_threads: Arc<ConnectionThreads>,
        places: usize,
    ) -> io::Result<AcceptThread> {
        match &listener {
            Listener::Tcp(tcp) => tcp.set_nonblocking(true)?,
            Listener::Unix(unix) => unix.set_nonblocking(true)?,
        }
        let (quit_seen, quit) = io::pipe()?;
        let name = match listener {
            Listener::Tcp(_) => "broker-accept",
            Listener::Unix(_) => "broker-host",
        };
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || accept_all(&listener, &quit_seen, &connection_threads, places))?;
        Ok(AcceptThread {
            thread: Some(thread),
            quit: Some(quit),
        })
    }
}

impl Drop for AcceptThread {
    fn drop(&mut self) {
        // The thread sees the end of the pipe.
        self.quit.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept_all(
    listener: &Listener,
    quit: &io::PipeReader,
    connection_threads: &Arc<ConnectionThreads>,
    places: usize,
) {
    // Closed for a moment when descriptors run out, so that the client can be told.
    let mut spare = std::fs::File::open("/dev/null").ok();
    // Each listener counts its own connections, so that guests can't use up the host's.
    let connections: Arc<OpenCount> = Arc::default();
    loop {
        let mut asked = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(quit.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut asked, PollTimeout::NONE);
        if asked[1].any() == Some(true) {
            return;
        }
        // Evicted connections are closing; the kernel's backlog holds new ones.
        if !connections.wait_below(places + SLACK, Duration::from_millis(20)) {
            continue;
        }
        match listener.accept() {
            Ok((stream, peer, remote)) => {
                connection_threads.serve_new(&connections, stream, peer, remote);
                if connections.count() > places {
                    let _ = connection_threads.to_state.send(Wake::ConnectionsFull);
                }
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {
                }
                _ => {
                    let _ = connection_threads
                        .to_state
                        .send(Wake::Error(format!("can't accept: {error}")));
                    spare.take();
                    if let Ok((stream, _, _)) = listener.accept() {
                        let connection = Connection::new(ConnId(0), stream, Arc::clone(&connections));
                        connection.reply_and_close(&declined_reply(DeclineReason::SessionLimit, &[]));
                    }
                    spare = std::fs::File::open("/dev/null").ok();
                    if spare.is_none() {
                        // Nothing to give back next time: don't spin on a poll that stays ready.
                        thread::sleep(Duration::from_millis(20));
                    }
                }
            },
        }
    }
}
