//! A session's thread: reads frames, and while its session is behind, delivers from the log.
//!
//! Here: that thread's loop. Not here: hellos (`broker::listen`), what frames do (`broker::state`),
//! queues (`broker::outbox`).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::connection::Link;
use super::frame::{Decoder, Frame};
use super::listen::Wake;
use super::outbox::{Budget, Drainer, Sent};
use super::replay::{Past, Piece, Replay};
use super::state::{Input, Order, Part};

/// A replayed piece that the client doesn't read within this time ends the session
/// (docs/PROTOCOL.md).
const PIECE_PATIENCE: Duration = Duration::from_secs(10);

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
    pub past: Past,
    /// How many bytes may wait to be sent.
    pub budget: Arc<Budget>,
    /// The thread that empties queues.
    pub drainer: Drainer,
}

impl Sessions {
    /// Sends frames to a session, or hands them to its queue.
    pub fn send(&self, link: &Arc<Link>, parts: &[Part]) -> Sent {
        let sent = link.send_frames(parts, &self.budget);
        if sent == Sent::Waits {
            self.drainer.watch(Arc::clone(link));
        }
        sent
    }
}

/// Why the loop ended.
enum Over {
    /// The client ended its side.
    Ended,
    /// The broker has ended the session, or is about to.
    Told,
}

/// Serves a granted session until it is over. `already`: bytes that came after the hello.
pub fn converse(link: &Arc<Link>, already: &[u8], sessions: &Sessions, to_state: &Sender<Wake>) {
    let mut session = Conversation {
        link,
        sessions,
        to_state,
        decoder: Decoder::new(sessions.max_frame, already),
        replay: None,
    };
    if let Over::Ended = session.turn() {
        // Its earlier frames are still answered; then the state ends the session.
        session.tell(Input::Ended { conn: link.id });
    }
    linger(link);
    link.close(&sessions.budget);
}

struct Conversation<'a> {
    link: &'a Arc<Link>,
    sessions: &'a Sessions,
    to_state: &'a Sender<Wake>,
    decoder: Decoder,
    replay: Option<Box<Replay>>,
}

impl Conversation<'_> {
    fn tell(&self, input: Input) {
        let _ = self.to_state.send(Wake::Input(input));
    }

    fn turn(&mut self) -> Over {
        loop {
            if let Some(over) = self.hand_over() {
                return over;
            }
            if self.replay.is_some() {
                if !self.deliver_piece() {
                    return Over::Told;
                }
                // Between pieces: what the client has sent, without waiting for it.
                if self.replay.is_some() && !self.is_readable(Duration::ZERO) {
                    continue;
                }
            } else if !self.is_readable(QUIET) {
                self.decoder.rest();
                self.wait_until_readable();
            }
            if self.link.is_over() {
                return Over::Told;
            }
            match self.link.read_now(self.decoder.space()) {
                Ok(0) => {
                    return if self.link.is_over() {
                        Over::Told
                    } else {
                        Over::Ended
                    };
                }
                Ok(more) => self.decoder.filled(more),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                // A broken connection is an end as well; the state learns of it at once.
                Err(_) => return Over::Ended,
            }
        }
    }

    /// Hands complete frames to the state thread. `Some`: read no more.
    fn hand_over(&mut self) -> Option<Over> {
        let burst = self.decoder.burst()?;
        let asks = burst.replays() || (self.replay.is_some() && burst.subscribes());
        let broken = matches!(burst.frames.last(), Some(Frame::Broken { .. }));
        let conn = self.link.id;
        if !self.link.spend(burst.wire_bytes) {
            return Some(Over::Told);
        }
        self.tell(Input::Frames { conn, burst });
        if asks {
            match self.link.await_order() {
                Some(order) => self.follow(order),
                None => return Some(Over::Told),
            }
        }
        broken.then_some(Over::Told)
    }

    fn follow(&mut self, order: Order) {
        match (order, &mut self.replay) {
            (Order::Attached, _) => self.replay = None,
            (Order::Replay(plan), Some(replay)) => replay.update(plan),
            (Order::Replay(plan), None) => {
                let replay = Replay::new(self.sessions.past.clone(), plan);
                self.replay = Some(Box::new(replay));
            }
        }
    }

    /// Sends the next piece and waits until the client has read it. False: the session is over.
    fn deliver_piece(&mut self) -> bool {
        let conn = self.link.id;
        let Some(replay) = self.replay.as_mut() else {
            return true;
        };
        let (frames, end) = match replay.piece() {
            Ok(Piece::Frames(frames)) => (frames, None),
            Ok(Piece::End(frames, next)) => (frames, Some(next)),
            Err(error) => {
                let text = format!("can't read {}: {error}", self.sessions.past.path().display());
                let _ = self.to_state.send(Wake::Trouble(text));
                self.tell(Input::Ended { conn });
                return false;
            }
        };
        if !frames.is_empty() {
            let queued_bytes = match self.sessions.send(self.link, &[Part::Own(frames)]) {
                Sent::Full(queued) => Some(queued),
                _ if self.link.wait_until_sent(PIECE_PATIENCE) => None,
                _ if self.link.is_over() => return false,
                _ => Some(self.link.waiting()),
            };
            if let Some(queued) = queued_bytes {
                let queued_bytes = queued as u64;
                self.tell(Input::Full { conn, queued_bytes });
                return false;
            }
        }
        let Some(next) = end else {
            return true;
        };
        self.tell(Input::AtEnd { conn, next });
        match self.link.await_order() {
            Some(order) => {
                self.follow(order);
                true
            }
            None => false,
        }
    }

    fn is_readable(&self, patience: Duration) -> bool {
        let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
        let mut asked = [PollFd::new(self.link.as_fd(), PollFlags::POLLIN)];
        poll(&mut asked, patience).is_ok_and(|ready| ready > 0)
    }

    fn wait_until_readable(&self) {
        let mut asked = [PollFd::new(self.link.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut asked, PollTimeout::NONE);
    }
}

/// Gives the client a moment to close: to close at once would discard the last frame if the client
/// hasn't read it. Nothing more is read.
fn linger(link: &Link) {
    // The state may still have to answer earlier frames, on a busy disk, and a slow client may
    // still have to read the answers.
    link.await_end(PIECE_PATIENCE);
    link.wait_until_sent(PIECE_PATIENCE);
    let mut asked = [PollFd::new(link.as_fd(), PollFlags::empty())];
    let _ = poll(
        &mut asked,
        PollTimeout::try_from(LINGER).unwrap_or(PollTimeout::ZERO),
    );
}
