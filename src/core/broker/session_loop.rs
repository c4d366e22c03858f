//! A session's thread: reads frames, and while its session is behind, delivers from the log.
//!
//! Here: that thread's loop. Not here: hellos (`broker::listen`), what frames do (`broker::state`),
//! queues (`broker::outbox`).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::connection::Connection;
use super::frame::{Decoder, Frame};
use super::listen::Wake;
use super::outbox::{Budget, Drainer, Sent};
use super::replay::{Piece, Replay, ReplayLog};
use super::state::{Chunk, Delivery, Input};

/// A replayed piece that the client doesn't read within this time ends the session
/// (docs/PROTOCOL.md).
const PIECE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a client has to close after its session is over.
const LINGER: Duration = Duration::from_millis(500);

/// After this long without a frame a session's buffer becomes small again.
const QUIET: Duration = Duration::from_secs(1);

/// What all sessions share.
#[derive(Debug)]
pub struct Sessions {
    /// Largest frame, bytes.
    pub max_frame: usize,
    /// The log of the bus.
    pub replay_log: ReplayLog,
    /// How many bytes may wait to be sent.
    pub budget: Arc<Budget>,
    /// The thread that empties queues.
    pub drainer: Drainer,
}

impl Sessions {
    /// Sends frames to a session, or hands them to its queue.
    pub fn send(&self, connection: &Arc<Connection>, parts: &[Chunk]) -> Sent {
        let sent = connection.send_frames(parts, &self.budget);
        if sent == Sent::NeedsDrain {
            self.drainer.drain(Arc::clone(connection));
        }
        sent
    }
}

/// Why the loop ended.
enum LoopEnd {
    /// The client ended its side.
    HalfClosed,
    /// The broker has ended the session, or is about to.
    Finished,
}

/// Serves a granted session until it is over. `already`: bytes that came after the hello.
pub fn run_session(
    connection: &Arc<Connection>,
    already: &[u8],
    sessions: &Sessions,
    to_state: &Sender<Wake>,
) {
    let mut session = SessionLoop {
        connection,
        sessions,
        to_state,
        decoder: Decoder::new(sessions.max_frame, already),
        replay: None,
    };
    if let LoopEnd::HalfClosed = session.run() {
        // Its earlier frames are still answered; then the state ends the session.
        session.send_input(Input::HalfClosed { conn: connection.id });
    }
    linger(connection);
    connection.close(&sessions.budget);
}

struct SessionLoop<'a> {
    connection: &'a Arc<Connection>,
    sessions: &'a Sessions,
    to_state: &'a Sender<Wake>,
    decoder: Decoder,
    replay: Option<Box<Replay>>,
}

impl SessionLoop<'_> {
    fn send_input(&self, input: Input) {
        let _ = self.to_state.send(Wake::Input(input));
    }

    fn run(&mut self) -> LoopEnd {
        loop {
            if let Some(over) = self.submit_frames() {
                return over;
            }
            if self.replay.is_some() {
                if !self.deliver_piece() {
                    return LoopEnd::Finished;
                }
                // Between pieces: what the client has sent, without waiting for it.
                if self.replay.is_some() && !self.is_readable(Duration::ZERO) {
                    continue;
                }
            } else if !self.is_readable(QUIET) {
                self.decoder.shrink();
                self.wait_until_readable();
            }
            if self.connection.is_finished() {
                return LoopEnd::Finished;
            }
            match self.connection.read_now(self.decoder.read_buffer()) {
                Ok(0) => {
                    return if self.connection.is_finished() {
                        LoopEnd::Finished
                    } else {
                        LoopEnd::HalfClosed
                    };
                }
                Ok(more) => self.decoder.advance(more),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                // A broken connection is an end as well; the state learns of it at once.
                Err(_) => return LoopEnd::HalfClosed,
            }
        }
    }

    /// Hands complete frames to the state thread. `Some`: read no more.
    fn submit_frames(&mut self) -> Option<LoopEnd> {
        let burst = self.decoder.take_burst()?;
        let asks = burst.replays() || (self.replay.is_some() && burst.subscribes());
        let broken = matches!(burst.frames.last(), Some(Frame::Broken { .. }));
        let conn = self.connection.id;
        if !self.connection.take_credit(burst.wire_bytes) {
            return Some(LoopEnd::Finished);
        }
        self.send_input(Input::Frames { conn, burst });
        if asks {
            match self.connection.await_delivery() {
                Some(delivery) => self.set_delivery(delivery),
                None => return Some(LoopEnd::Finished),
            }
        }
        broken.then_some(LoopEnd::Finished)
    }

    fn set_delivery(&mut self, delivery: Delivery) {
        match (delivery, &mut self.replay) {
            (Delivery::Live, _) => self.replay = None,
            (Delivery::Replay(plan), Some(replay)) => replay.update(plan),
            (Delivery::Replay(plan), None) => {
                let replay = Replay::new(self.sessions.replay_log.clone(), plan);
                self.replay = Some(Box::new(replay));
            }
        }
    }

    /// Sends the next piece and waits until the client has read it. False: the session is over.
    fn deliver_piece(&mut self) -> bool {
        let conn = self.connection.id;
        let Some(replay) = self.replay.as_mut() else {
            return true;
        };
        let (frames, end) = match replay.next_piece() {
            Ok(Piece::Frames(frames)) => (frames, None),
            Ok(Piece::End(frames, next)) => (frames, Some(next)),
            Err(error) => {
                let text = format!(
                    "can't read {}: {error}",
                    self.sessions.replay_log.path().display()
                );
                let _ = self.to_state.send(Wake::Error(text));
                self.send_input(Input::HalfClosed { conn });
                return false;
            }
        };
        if !frames.is_empty() {
            let queued_bytes = match self.sessions.send(self.connection, &[Chunk::Own(frames)]) {
                Sent::Full(queued) => Some(queued),
                _ if self.connection.wait_until_sent(PIECE_TIMEOUT) => None,
                _ if self.connection.is_finished() => return false,
                _ => Some(self.connection.queued_bytes()),
            };
            if let Some(queued) = queued_bytes {
                let queued_bytes = queued as u64;
                self.send_input(Input::QueueFull { conn, queued_bytes });
                return false;
            }
        }
        let Some(next) = end else {
            return true;
        };
        self.send_input(Input::ReplayDone { conn, next });
        match self.connection.await_delivery() {
            Some(delivery) => {
                self.set_delivery(delivery);
                true
            }
            None => false,
        }
    }

    fn is_readable(&self, timeout: Duration) -> bool {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::ZERO);
        let mut asked = [PollFd::new(self.connection.as_fd(), PollFlags::POLLIN)];
        poll(&mut asked, timeout).is_ok_and(|ready| ready > 0)
    }

    fn wait_until_readable(&self) {
        let mut asked = [PollFd::new(self.connection.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut asked, PollTimeout::NONE);
    }
}

/// Gives the client a moment to close: to close at once would discard the last frame if the client
/// hasn't read it. Nothing more is read.
fn linger(connection: &Connection) {
    // The state may still have to answer earlier frames, on a busy disk, and a slow client may
    // still have to read the answers.
    connection.await_end(PIECE_TIMEOUT);
    connection.wait_until_sent(PIECE_TIMEOUT);
    let mut asked = [PollFd::new(connection.as_fd(), PollFlags::empty())];
    let _ = poll(
        &mut asked,
        PollTimeout::try_from(LINGER).unwrap_or(PollTimeout::ZERO),
    );
}
