//! A client of the broker's host socket: every process that may open the socket counts as the host
//! (docs/PROTOCOL.md).
//!
//! Here: sending and receiving with the caller's deadline, and heartbeats while nothing else is
//! sent. Not here: opening the session (`bus::greeting`), frames (`bus::client_frame`), starting a
//! broker (`core::broker::launcher`), or what to do with messages (`core::operations::bus`).
//!
//! The socket never blocks: unsent bytes wait in a buffer, and every wait is one `poll` for both
//! directions, so that neither side can stop the other by not reading.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use super::client_frame::{Ack, Decoder, Frame, Request};
use super::error::BusError;
use super::greeting::{broken, greet, is_nothing, open, timeout};
use super::message::one_line;
use super::topic::{Pattern, Topic};

/// A session with the broker.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    decoder: Decoder,
    /// Bytes to send, from `sent` on.
    out: Vec<u8>,
    sent: usize,
    /// Frames that came while an ack was waited for.
    early: VecDeque<Frame>,
    session: String,
    heartbeat: Duration,
    /// When the connection was asked for.
    began: Instant,
    /// When this client last sent something.
    spoke: Instant,
    last_id: u64,
    /// Nothing can be sent any more; the broker's reason has yet to be read.
    deaf: Option<io::ErrorKind>,
    ended: Option<BusError>,
}

/// What ended a wait.
#[derive(Clone, Debug, PartialEq)]
pub enum WaitEnd {
    /// The broker sent this frame.
    Frame(Frame),
    /// The other descriptor can be read.
    Other,
    /// Time is up.
    Timeout,
}

impl Client {
    /// Opens a session at this socket, a project's `broker.sock`.
    pub fn connect(socket: &Path, within: Duration) -> Result<Client, BusError> {
        let began = Instant::now();
        let stream = open(socket, within)?;
        Client::enter(stream, began, within)
    }

    /// Opens a session on an existing connection.
    pub fn over(stream: UnixStream, within: Duration) -> Result<Client, BusError> {
        Client::enter(stream, Instant::now(), within)
    }

    fn enter(mut stream: UnixStream, began: Instant, within: Duration) -> Result<Client, BusError> {
        let granted = greet(&mut stream, began + within)?;
        Ok(Client {
            stream,
            decoder: Decoder::new(&granted.heard),
            out: Vec::new(),
            sent: 0,
            early: VecDeque::new(),
            session: granted.session,
            heartbeat: granted.heartbeat,
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

    /// The heartbeat interval that the broker expects; [`Client::next_frame`] sends heartbeats.
    pub fn heartbeat(&self) -> Duration {
        self.heartbeat
    }

    /// When the connection was asked for.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// A new request number of this session.
    pub fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// Queues a request, which [`Client::next_frame`] and [`Client::wait`] send. Topic and payload
    /// aren't checked: they have to be valid.
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
        self.publish_to(topic, payload, None, within)
    }

    /// Publishes one message whose answers are awaited on `reply`, a topic that we are subscribed to,
    /// and waits for its ack: its number.
    pub fn publish_with_reply(
        &mut self,
        topic: &str,
        payload: &str,
        reply: &str,
        within: Duration,
    ) -> Result<u64, BusError> {
        self.publish_to(topic, payload, Some(reply), within)
    }

    fn publish_to(
        &mut self,
        topic: &str,
        payload: &str,
        reply: Option<&str>,
        within: Duration,
    ) -> Result<u64, BusError> {
        for topic in [Some(topic), reply].into_iter().flatten() {
            if !Topic::is_valid(topic) {
                return Err(BusError::BadTopic(topic.to_owned()));
            }
        }
        if let Err(error) = serde_json::from_str::<&serde_json::value::RawValue>(payload) {
            return Err(BusError::BadPayload(error.to_string()));
        }
        let id = self.new_id();
        self.queue(Request::Publish {
            topic,
            payload: &one_line(payload),
            reply,
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
        self.queue(Request::Subscribe {
            topic,
            from,
            last: false,
            group: None,
            id,
        });
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
                WaitEnd::Frame(Frame::Ack(ack)) if ack.id == Some(id) => {
                    return match ack.refused {
                        None => Ok(ack),
                        Some(reason) => Err(BusError::Refused(reason)),
                    };
                }
                WaitEnd::Frame(frame) => self.early.push_back(frame),
                WaitEnd::Other => {}
                WaitEnd::Timeout => return Err(BusError::TimedOut("ack")),
            }
        }
    }

    /// The next frame that has been read already, without reading the socket: a caller who answers
    /// frames handles all of these first, and then sends once.
    pub fn buffered_frame(&mut self) -> Result<Option<Frame>, BusError> {
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

    /// The next frame, if one comes before the deadline. Sends queued requests and heartbeats.
    pub fn next_frame(&mut self, until: Instant) -> Result<Option<Frame>, BusError> {
        match self.wait(until, None)? {
            WaitEnd::Frame(frame) => Ok(Some(frame)),
            WaitEnd::Other | WaitEnd::Timeout => Ok(None),
        }
    }

    /// As [`Client::next_frame`], but also ends when `other` can be read. Frames that are there
    /// already come first.
    pub fn wait(&mut self, until: Instant, other: Option<BorrowedFd<'_>>) -> Result<WaitEnd, BusError> {
        match self.early.pop_front() {
            Some(frame) => Ok(WaitEnd::Frame(frame)),
            None => self.receive(until, other),
        }
    }

    fn receive(&mut self, until: Instant, other: Option<BorrowedFd<'_>>) -> Result<WaitEnd, BusError> {
        if let Some(error) = &self.ended {
            return Err(error.clone());
        }
        self.turns(until, other).inspect_err(|error| {
            self.ended = Some(error.clone());
        })
    }

    fn turns(&mut self, until: Instant, other: Option<BorrowedFd<'_>>) -> Result<WaitEnd, BusError> {
        loop {
            self.send()?;
            if let Some(frame) = self.decoded()? {
                return Ok(WaitEnd::Frame(frame));
            }
            let now = Instant::now();
            let beat_at = self.spoke + self.heartbeat;
            if now >= beat_at && self.unsent() == 0 {
                let id = self.new_id();
                self.queue(Request::Heartbeat { payload: None, id });
                continue;
            }
            // Polled even when time is up, so that a caller who polls gets available frames.
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
                return Ok(WaitEnd::Other);
            }
            if Instant::now() >= until {
                return Ok(WaitEnd::Timeout);
            }
        }
    }

    fn decoded(&mut self) -> Result<Option<Frame>, BusError> {
        loop {
            let frame = self.decoder.next_frame();
            match frame.map_err(|bad| BusError::Garbled(bad.to_string()))? {
                Some(Frame::Close { reason }) => return Err(BusError::Closed(reason)),
                // Acks of this client's own heartbeats, which nobody awaits.
                Some(Frame::Ack(ack)) if ack.of.as_deref() == Some("heartbeat") => {}
                frame => return Ok(frame),
            }
        }
    }

    fn end_of_stream(&self) -> BusError {
        if self.decoder.is_torn() {
            // The stream ends within a frame, so this isn't an orderly end.
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
                // The broker has closed the connection. What it sent before, such as the reason,
                // has yet to be read.
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

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
