//! A simulated connection: its two streams, and its thread as `broker::listen` and
//! `broker::session_loop` run it, one step at a time.
//!
//! Here: what that thread does when it is woken. Not here: what the client says and must hear
//! (`super::model_client`), the state thread and the disk (`super::world`).

use std::collections::VecDeque;
use std::io::{self, Write};

use crate::core::broker::frame::{Decoder, Frame};
use crate::core::broker::outbox::{Budget, Outbox, Sent};
use crate::core::broker::protocol::{DeclineReason, HelloRefusal, parse_hello};
use crate::core::broker::replay::{Piece, Replay, ReplayLog};
use crate::core::broker::state::{Chunk, ConnId, Delivery, Input, Peer};

use super::Dice;
use super::model_client::{Client, Mood};

const PIECE_TIMEOUT: u64 = 10_000;
const LINGER: u64 = 500;

/// What the kernel holds for a client.
#[derive(Debug, Default)]
pub struct Pipe {
    /// Bytes it still takes.
    pub room: usize,
    /// Bytes the client hasn't read.
    pub unread: Vec<u8>,
    /// The client is gone.
    pub broken: bool,
}

impl Write for &mut Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if self.room == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = bytes.len().min(self.room);
        self.room -= taken;
        self.unread.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a thread stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Place {
    /// It reads the hello.
    Hello,
    /// It waits for the verdict.
    Verdict,
    /// It reads frames, or delivers from the log.
    Turn,
    /// It waits until a piece is taken; then it says how far it is.
    Piece(u64, Option<u64>),
    /// It waits for an order.
    Order,
    /// It has read the end of its client's side.
    Ended(u64),
    /// The client has a moment to close.
    Linger(u64),
    /// It is gone.
    Gone,
}

/// One connection.
pub struct Conn {
    /// Its number.
    pub id: ConnId,
    /// Who uses it.
    pub client: Client,
    /// Its hello.
    hello: String,
    /// To the client.
    pub pipe: Pipe,
    /// Its queue.
    pub outbox: Outbox,
    /// From the client.
    pub sent: VecDeque<u8>,
    /// The client sends no more.
    pub half_closed: bool,
    /// The client reads.
    pub reads: bool,
    /// Where its thread stands.
    pub place: Place,
    decoder: Decoder,
    replay: Option<Box<Replay>>,
    /// What the state thread told it.
    pub order: Option<Delivery>,
    /// The verdict on its hello.
    pub granted: Option<bool>,
    /// Its session was ended.
    pub finished: bool,
    /// It was closed.
    pub over: bool,
    /// It was cut off: what was on its way to the client may be lost.
    pub cut: bool,
    /// It was told to go.
    pub evicted: Option<DeclineReason>,
}

impl Conn {
    /// A connection whose client has said this hello.
    pub fn new(id: u64, peer: Peer, vm: &str, capabilities: &str, room: usize) -> Conn {
        Conn {
            id: ConnId(id),
            client: Client::new(vm, peer),
            hello: format!("hello vm:{vm} capabilities={capabilities}"),
            pipe: Pipe {
                room,
                ..Pipe::default()
            },
            outbox: Outbox::default(),
            sent: VecDeque::new(),
            half_closed: false,
            reads: true,
            place: Place::Hello,
            decoder: Decoder::new(65_536, b""),
            replay: None,
            order: None,
            granted: None,
            finished: false,
            over: false,
            cut: false,
            evicted: None,
        }
    }

    fn is_over(&self) -> bool {
        self.finished || self.over
    }

    /// Ends it at once.
    pub fn close(&mut self, budget: &Budget) {
        self.cut |= self.outbox.length() > 0 || !self.finished;
        self.outbox.end(budget);
        self.over = true;
    }

    /// One step of its thread.
    pub fn step(&mut self, past: &ReplayLog, budget: &Budget, now: u64, dice: &mut Dice) -> Vec<Input> {
        let conn = self.id;
        match self.place {
            Place::Hello if self.evicted.is_some() && dice.one_in(2) => {
                self.place = Place::Linger(now);
                let refusal = HelloRefusal::unnamed(self.evicted.unwrap());
                vec![Input::HelloRefused {
                    conn,
                    refusal,
                    attempted: true,
                }]
            }
            Place::Hello => {
                self.place = Place::Verdict;
                let hello = parse_hello(self.hello.as_bytes()).unwrap();
                vec![Input::Hello { conn, hello }]
            }
            Place::Verdict => {
                match self.granted {
                    Some(true) => self.place = Place::Turn,
                    Some(false) => self.place = Place::Linger(now),
                    None if self.over => self.place = Place::Linger(now),
                    None => {}
                }
                Vec::new()
            }
            Place::Turn => self.turn(budget, now, dice),
            Place::Piece(since, end) => {
                let patient = now < since + PIECE_TIMEOUT;
                let waiting = self.outbox.length();
                if self.over || (self.finished && !patient) {
                    self.place = Place::Linger(now);
                } else if waiting == 0 {
                    let (place, said) = match end {
                        Some(next) => (Place::Order, vec![Input::ReplayDone { conn, next }]),
                        None => (Place::Turn, Vec::new()),
                    };
                    self.place = place;
                    return said;
                } else if !patient {
                    self.place = Place::Linger(now);
                    return vec![Input::QueueFull {
                        conn,
                        queued_bytes: waiting as u64,
                    }];
                }
                Vec::new()
            }
            Place::Order => {
                if self.is_over() {
                    self.place = Place::Linger(now);
                } else if let Some(order) = self.order.take() {
                    self.follow(order, past);
                    self.place = Place::Turn;
                }
                Vec::new()
            }
            Place::Ended(since) => {
                if self.is_over() || now >= since + PIECE_TIMEOUT {
                    self.place = Place::Linger(now);
                }
                Vec::new()
            }
            Place::Linger(since) => {
                let waits = self.outbox.length() > 0 && now < since + PIECE_TIMEOUT;
                let left = self.pipe.broken || now >= since + LINGER;
                if self.over || (left && !waits) {
                    self.close(budget);
                    self.place = Place::Gone;
                    return vec![Input::Closed { conn }];
                }
                Vec::new()
            }
            Place::Gone => Vec::new(),
        }
    }

    fn turn(&mut self, budget: &Budget, now: u64, dice: &mut Dice) -> Vec<Input> {
        let conn = self.id;
        if self.is_over() {
            self.place = Place::Linger(now);
            return Vec::new();
        }
        if let Some(burst) = self.decoder.take_burst() {
            let asks = burst.replays() || (self.replay.is_some() && burst.subscribes());
            if matches!(burst.frames.last(), Some(Frame::Broken { .. })) {
                self.place = Place::Ended(now);
            } else if asks {
                self.place = Place::Order;
            }
            return vec![Input::Frames { conn, burst }];
        }
        let readable = !self.sent.is_empty() || self.half_closed || self.pipe.broken;
        if let Some(replay) = &mut self.replay
            && (!readable || dice.one_in(2))
        {
            let (frames, end) = match replay.next_piece().unwrap() {
                Piece::Frames(frames) => (frames, None),
                Piece::End(frames, next) => (frames, Some(next)),
            };
            if let Sent::Full(queued) = self.outbox.send(&mut self.pipe, &[Chunk::Own(frames)], budget) {
                self.place = Place::Linger(now);
                self.cut = true;
                let queued_bytes = queued as u64;
                return vec![Input::QueueFull { conn, queued_bytes }];
            }
            self.place = Place::Piece(now, end);
            return Vec::new();
        }
        if self.sent.is_empty() {
            if self.half_closed || self.pipe.broken {
                self.place = Place::Ended(now);
                return vec![Input::HalfClosed { conn }];
            }
            return Vec::new();
        }
        let space = self.decoder.read_buffer();
        // A read brings what has come so far, which may be any part of a frame.
        let most = if dice.one_in(3) {
            dice.roll(60) as usize + 1
        } else {
            self.sent.len()
        };
        let taken = most.min(self.sent.len()).min(space.len());
        for (to, byte) in space.iter_mut().zip(self.sent.drain(..taken)) {
            *to = byte;
        }
        self.decoder.advance(taken);
        Vec::new()
    }

    fn follow(&mut self, order: Delivery, past: &ReplayLog) {
        match (order, &mut self.replay) {
            (Delivery::Live, _) => self.replay = None,
            (Delivery::Replay(plan), Some(replay)) => replay.update(plan),
            (Delivery::Replay(plan), None) => {
                self.replay = Some(Box::new(Replay::new(past.clone(), plan)));
            }
        }
    }

    /// Whether its thread has anything to do without being woken.
    pub fn is_quiet(&self) -> bool {
        let delivered = self.outbox.length() == 0 && self.pipe.unread.is_empty();
        match self.place {
            Place::Gone => true,
            Place::Turn => {
                delivered
                    && self.replay.is_none()
                    && self.sent.is_empty()
                    && !self.half_closed
                    && !self.pipe.broken
                    && !self.is_over()
            }
            _ => false,
        }
    }

    /// It has a session, as far as its client knows.
    pub fn converses(&self) -> bool {
        self.client.mood == Mood::Frames && self.client.closed.is_none() && !self.pipe.broken
    }
}
