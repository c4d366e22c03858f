//! A client of the broker's host socket: whoever may open it is the host (DESIGN §6).
//!
//! Here: connecting, the hello, sending and receiving without ever waiting beyond what the caller
//! allows, heartbeats while nothing else is said, and why a session ended. Not here: frames
//! (`bus::frame`), starting a broker (`core::broker::launcher`), or what to do with messages
//! (`core::operations::bus`).
//!
//! The socket never blocks: what can't be sent yet waits in a buffer, and every wait is one
//! `poll` on both directions, so that neither side can stop the other by not reading.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::core::host;

use super::frame::{Ack, Decoder, Frame, Request};
use super::message::one_line;
use super::topic::{Pattern, Topic};

/// What a client of this version says first.
const HELLO: &str = "hello vm:host capabilities=bus-v1\n";

/// Longest line before the frames, bytes (DESIGN §6).
const LINE_BYTES: usize = 512;

/// A session with the broker.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    decoder: Decoder,
    /// What has yet to be sent, from `sent` on.
    out: Vec<u8>,
    sent: usize,
    /// Frames that came while an ack was waited for.
    early: VecDeque<Frame>,
    session: String,
    heartbeat: Duration,
    /// When the connection was asked for.
    began: Instant,
    /// When we last said something.
    spoke: Instant,
    last_id: u64,
    /// Nothing can be sent any more; why is still to be read.
    deaf: Option<io::ErrorKind>,
    ended: Option<BusError>,
}

/// Why there is no session, or none any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BusError {
    /// Nobody listens at the socket.
    NoBroker(PathBuf),
    /// The socket can't be used.
    Socket(PathBuf, String),
    /// Who listens there is no broker, or one that we don't understand.
    Stranger(String),
    /// The broker took the hello and has no bus to offer.
    NoBus,
    /// The broker declined the hello, for this reason.
    Declined(String),
    /// It didn't come in time; the text says what.
    TimedOut(&'static str),
    /// The broker closed the session in order, for this reason.
    Closed(String),
    /// The session ended without a word.
    Ended,
    /// The broker said what can't be understood.
    Garbled(String),
    /// The broker refused a request, for this reason.
    Refused(String),
    /// The connection failed.
    Broken(String),
    /// No topic: see [`Topic`].
    BadTopic(String),
    /// The payload is no JSON; the text says what is wrong.
    BadPayload(String),
}

/// What ended a wait.
#[derive(Clone, Debug, PartialEq)]
pub enum Woken {
    /// The broker said this.
    Frame(Frame),
    /// The other descriptor can be read.
    Other,
    /// Time is up.
    Time,
}

impl Client {
    /// Opens a session at this socket, a project's `broker.sock`.
    pub fn connect(socket: &Path, within: Duration) -> Result<Client, BusError> {
        let began = Instant::now();
        let stream = open(socket, within)?;
        Client::greet(stream, began, within)
    }

    /// Opens a session on a connection that somebody else has made.
    pub fn over(stream: UnixStream, within: Duration) -> Result<Client, BusError> {
        Client::greet(stream, Instant::now(), within)
    }

    fn greet(mut stream: UnixStream, began: Instant, within: Duration) -> Result<Client, BusError> {
        let until = began + within;
        stream.set_nonblocking(true).map_err(broken)?;
        // The hello may come before the greeting was read, and then costs no round trip.
        match stream.write_all(HELLO.as_bytes()) {
            Ok(()) => {}
            // Closed already: what it said first tells why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => return Err(broken(error)),
        }
        let mut heard = Vec::new();
        let greeting = line(&mut stream, &mut heard, until, "greeting")?;
        match greeting.split_whitespace().collect::<Vec<_>>()[..] {
            ["castra-broker", "1", ..] => {}
            ["castra-broker", version, ..] => {
                return Err(BusError::Stranger(format!(
                    "it speaks version {version:?} of the protocol, this castra version 1"
                )));
            }
            _ => return Err(BusError::Stranger(format!("it greets with {greeting:?}"))),
        }
        let reply = line(&mut stream, &mut heard, until, "answer to the hello")?;
        let (session, heartbeat) = understand(&reply)?;
        Ok(Client {
            stream,
            decoder: Decoder::new(&heard),
            out: Vec::new(),
            sent: 0,
            early: VecDeque::new(),
            session,
            heartbeat,
            began,
            spoke: Instant::now(),
            last_id: 0,
            deaf: None,
            ended: None,
        })
    }

    /// The session's public id, as log lines and events name it.
    pub fn session(&self) -> &str {
        &self.session
    }

    /// How often the broker wants to hear from us; [`Client::next_frame`] sees to it.
    pub fn heartbeat(&self) -> Duration {
        self.heartbeat
    }

    /// When the connection was asked for.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// A number that no request of this session had.
    pub fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// Puts a request where [`Client::next_frame`] and [`Client::wait`] send it from. Doesn't
    /// look at it: topic and payload have to be valid.
    pub fn queue(&mut self, request: Request<'_>) {
        request.render(&mut self.out);
    }

    /// Bytes that wait to be sent.
    pub fn unsent(&self) -> usize {
        self.out.len() - self.sent
    }

    /// Publishes one message and waits for its ack: its number. Other frames that come meanwhile
    /// are kept in memory for [`Client::next_frame`].
    pub fn publish(&mut self, topic: &str, payload: &str, within: Duration) -> Result<u64, BusError> {
        if !Topic::is_valid(topic) {
            return Err(BusError::BadTopic(topic.to_owned()));
        }
        if let Err(error) = serde_json::from_str::<&serde_json::value::RawValue>(payload) {
            return Err(BusError::BadPayload(error.to_string()));
        }
        let id = self.new_id();
        self.queue(Request::Publish {
            topic,
            payload: &one_line(payload),
            id,
        });
        let ack = self.acked(id, within)?;
        ack.seq
            .ok_or_else(|| BusError::Garbled("the ack of a publish has no number".to_owned()))
    }

    /// Subscribes, from now on or from a number on, and waits for the ack: the last number given
    /// so far, if any was.
    pub fn subscribe(
        &mut self,
        topic: &Pattern,
        from: Option<u64>,
        within: Duration,
    ) -> Result<Option<u64>, BusError> {
        let id = self.new_id();
        self.queue(Request::Subscribe { topic, from, id });
        Ok(self.acked(id, within)?.seq)
    }

    /// Ends a subscription and waits for the ack.
    pub fn unsubscribe(&mut self, topic: &Pattern, within: Duration) -> Result<(), BusError> {
        let id = self.new_id();
        self.queue(Request::Unsubscribe { topic, id });
        self.acked(id, within).map(|_| ())
    }

    fn acked(&mut self, id: u64, within: Duration) -> Result<Ack, BusError> {
        let until = Instant::now() + within;
        loop {
            match self.receive(until, None)? {
                Woken::Frame(Frame::Ack(ack)) if ack.id == Some(id) => {
                    return match ack.refused {
                        None => Ok(ack),
                        Some(reason) => Err(BusError::Refused(reason)),
                    };
                }
                Woken::Frame(frame) => self.early.push_back(frame),
                Woken::Other => {}
                Woken::Time => return Err(BusError::TimedOut("ack")),
            }
        }
    }

    /// The next frame that has been read already, without a look at the socket: who sends in
    /// answer to frames deals with all of these first, and then sends once.
    pub fn at_hand(&mut self) -> Result<Option<Frame>, BusError> {
        if let Some(frame) = self.early.pop_front() {
            return Ok(Some(frame));
        }
        if let Some(error) = &self.ended {
            return Err(error.clone());
        }
        self.decoded().inspect_err(|error| {
            self.ended = Some(error.clone());
        })
    }

    /// The next frame, if one comes until then. Sends what is queued, and heartbeats.
    pub fn next_frame(&mut self, until: Instant) -> Result<Option<Frame>, BusError> {
        match self.wait(until, None)? {
            Woken::Frame(frame) => Ok(Some(frame)),
            Woken::Other | Woken::Time => Ok(None),
        }
    }

    /// As [`Client::next_frame`], but also ends when `other` can be read. Frames that are there
    /// already come first.
    pub fn wait(&mut self, until: Instant, other: Option<BorrowedFd<'_>>) -> Result<Woken, BusError> {
        match self.early.pop_front() {
            Some(frame) => Ok(Woken::Frame(frame)),
            None => self.receive(until, other),
        }
    }

    fn receive(&mut self, until: Instant, other: Option<BorrowedFd<'_>>) -> Result<Woken, BusError> {
        if let Some(error) = &self.ended {
            return Err(error.clone());
        }
        self.turns(until, other).inspect_err(|error| {
            self.ended = Some(error.clone());
        })
    }

    fn turns(&mut self, until: Instant, other: Option<BorrowedFd<'_>>) -> Result<Woken, BusError> {
        loop {
            self.send()?;
            if let Some(frame) = self.decoded()? {
                return Ok(Woken::Frame(frame));
            }
            let now = Instant::now();
            let beat_at = self.spoke + self.heartbeat;
            if now >= beat_at && self.unsent() == 0 {
                let id = self.new_id();
                self.queue(Request::Heartbeat { payload: None, id });
                continue;
            }
            // Looked at even when time is up, so that a caller who polls gets what is there.
            let wake = if self.unsent() == 0 {
                until.min(beat_at)
            } else {
                until
            };
            let ready = self.poll(wake.saturating_duration_since(now), other)?;
            if ready.broker {
                match self.decoder.read_from(&mut self.stream) {
                    Ok(0) => return Err(self.end_of_stream()),
                    Ok(_) => continue,
                    Err(error) if is_nothing(&error) => {}
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                        return Err(self.end_of_stream());
                    }
                    Err(error) => return Err(broken(error)),
                }
            }
            if ready.other {
                return Ok(Woken::Other);
            }
            if Instant::now() >= until {
                return Ok(Woken::Time);
            }
        }
    }

    fn decoded(&mut self) -> Result<Option<Frame>, BusError> {
        loop {
            let frame = self.decoder.next_frame();
            match frame.map_err(|bad| BusError::Garbled(bad.to_string()))? {
                Some(Frame::Close { reason }) => return Err(BusError::Closed(reason)),
                // Of our own heartbeats, and all they say is that we are heard.
                Some(Frame::Ack(ack)) if ack.of.as_deref() == Some("heartbeat") => {}
                frame => return Ok(frame),
            }
        }
    }

    fn end_of_stream(&self) -> BusError {
        if self.decoder.is_torn() {
            // Half a frame stands before the end: nobody stops like that in order.
            return BusError::Broken("the connection ended within a frame".to_owned());
        }
        BusError::Ended
    }

    /// Sends what can be sent now.
    fn send(&mut self) -> Result<(), BusError> {
        while self.unsent() > 0 && self.deaf.is_none() {
            match self.stream.write(&self.out[self.sent..]) {
                Ok(count) => {
                    self.sent += count;
                    self.spoke = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // The broker has hung up. What it said before, such as why, is still to be read.
                Err(error) => self.deaf = Some(error.kind()),
            }
        }
        self.out.clear();
        self.sent = 0;
        Ok(())
    }

    fn poll(&self, limit: Duration, other: Option<BorrowedFd<'_>>) -> Result<Ready, BusError> {
        let mut interest = PollFlags::POLLIN;
        if self.unsent() > 0 {
            interest |= PollFlags::POLLOUT;
        }
        let mut watched = vec![PollFd::new(self.stream.as_fd(), interest)];
        watched.extend(other.map(|other| PollFd::new(other, PollFlags::POLLIN)));
        match poll(&mut watched, timeout(limit)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(BusError::Broken(errno.desc().to_owned())),
        }
        let readable = |slot: &PollFd<'_>| {
            slot.revents()
                .is_some_and(|events| !(events & !PollFlags::POLLOUT).is_empty())
        };
        Ok(Ready {
            broker: readable(&watched[0]),
            other: watched.get(1).is_some_and(readable),
        })
    }
}

struct Ready {
    broker: bool,
    other: bool,
}

/// Rounded up: a wait that ends a little early would turn in circles until it is time.
fn timeout(limit: Duration) -> PollTimeout {
    let millis = limit.as_nanos().div_ceil(1_000_000);
    i32::try_from(millis)
        .ok()
        .and_then(|millis| PollTimeout::try_from(millis).ok())
        .unwrap_or(PollTimeout::MAX)
}

/// Connects, in a thread of its own: a broker that has stopped accepting would keep us for ever,
/// and std knows no limit for it. Named relative to its directory, no path is too long.
fn open(socket: &Path, within: Duration) -> Result<UnixStream, BusError> {
    let unusable = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => BusError::NoBroker(socket.to_owned()),
        _ => BusError::Socket(socket.to_owned(), error.to_string()),
    };
    let (Some(directory), Some(name)) = (socket.parent(), socket.file_name().and_then(|name| name.to_str()))
    else {
        return Err(BusError::Socket(socket.to_owned(), "it names no file".to_owned()));
    };
    let directory = File::open(directory).map_err(unusable)?;
    let name = name.to_owned();
    let (tell, told) = crossbeam_channel::bounded(1);
    thread::Builder::new()
        .name("bus-connect".to_owned())
        .spawn(move || {
            let connected = UnixStream::connect(host::short_path(&directory, &name));
            // Nobody may be waiting any more.
            let _ = tell.send(connected);
        })
        .map_err(broken)?;
    match told.recv_timeout(within) {
        Ok(connected) => connected.map_err(unusable),
        Err(_) => Err(BusError::TimedOut("connection")),
    }
}

/// One line; what came behind it stays in `heard`.
fn line(
    stream: &mut UnixStream,
    heard: &mut Vec<u8>,
    until: Instant,
    what: &'static str,
) -> Result<String, BusError> {
    loop {
        if let Some(end) = heard.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = heard.drain(..=end).collect();
            return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
        if heard.len() > LINE_BYTES {
            return Err(BusError::Stranger(format!(
                "it says more than {LINE_BYTES} bytes without a line end"
            )));
        }
        let mut piece = [0; LINE_BYTES];
        match stream.read(&mut piece) {
            Ok(0) => return Err(BusError::Ended),
            Ok(count) => heard.extend_from_slice(&piece[..count]),
            Err(error) if is_nothing(&error) => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(BusError::TimedOut(what));
                }
                let mut watched = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut watched, timeout(left));
            }
            Err(error) => return Err(broken(error)),
        }
    }
}

/// The answer to a hello: the session's id and its heartbeat.
fn understand(reply: &str) -> Result<(String, Duration), BusError> {
    let mut words = reply.split_whitespace();
    let verdict = words.next();
    let value = |key: &str| {
        reply
            .split_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    };
    match verdict {
        Some("declined") => Err(BusError::Declined(
            value("reason").unwrap_or("no reason given").to_owned(),
        )),
        Some("ok") => match value("session") {
            Some(session) => {
                let secs = value("heartbeat_secs").and_then(|secs| secs.parse::<u64>().ok());
                // A day is beyond every sensible window; no number at all is the usual one.
                let secs = secs.unwrap_or(15).clamp(1, 86_400);
                Ok((session.to_owned(), Duration::from_secs(secs)))
            }
            None => Err(BusError::NoBus),
        },
        _ => Err(BusError::Stranger(format!("it answers {reply:?}"))),
    }
}

fn is_nothing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::TimedOut
    )
}

fn broken(error: io::Error) -> BusError {
    BusError::Broken(error.to_string())
}

impl fmt::Display for BusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BusError::NoBroker(path) => write!(f, "no broker listens at {}", path.display()),
            BusError::Socket(path, why) => write!(f, "{} can't be used: {why}", path.display()),
            BusError::Stranger(why) => write!(f, "who listens there is no broker of this castra: {why}"),
            BusError::NoBus => write!(f, "the broker has no bus: it is of an earlier castra"),
            BusError::Declined(reason) => write!(f, "the broker declined the hello: {reason}"),
            BusError::TimedOut(what) => write!(f, "the broker gave no {what} in time"),
            BusError::Closed(reason) => write!(f, "the broker closed the session: {reason}"),
            BusError::Ended => write!(f, "the broker ended the session without a word"),
            BusError::Garbled(why) => write!(f, "the broker can't be understood: {why}"),
            BusError::Refused(reason) => write!(f, "the broker refused: {reason}"),
            BusError::Broken(why) => write!(f, "the connection to the broker failed: {why}"),
            BusError::BadTopic(topic) => write!(f, "{topic:?} is no topic"),
            BusError::BadPayload(why) => write!(f, "the payload is no JSON: {why}"),
        }
    }
}

impl std::error::Error for BusError {}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
