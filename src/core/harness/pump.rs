//! From an agent's bytes to events and transcript.
//!
//! Here: reading a stream in a thread of its own, so that the caller can also watch a clock, a child and
//! requests to stop; and passing each line to relay and transcript. Not here: lines (`line_splitter`), their
//! meaning (`relay`), processes (`agent_process`).

use std::io::{self, Read};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};

use super::line_splitter::{Line, LineSplitter};
use super::relay::Relay;
use super::transcript::Transcript;
use crate::core::events::{Event, Severity};

/// The size of a pipe's buffer.
const READ_BYTES: usize = 64 * 1024;
/// How many pieces are read ahead: one is read while another is worked on.
const AHEAD: usize = 2;

/// A stream that is read by a thread of its own.
#[derive(Debug)]
pub struct StreamReader {
    pieces: Receiver<io::Result<Vec<u8>>>,
    used: Sender<Vec<u8>>,
}

/// What a source has.
#[derive(Debug)]
pub enum Received {
    /// These bytes.
    Bytes(Vec<u8>),
    /// Nothing yet.
    Nothing,
    /// The end, or a failed read.
    End(Option<io::Error>),
}

impl StreamReader {
    /// Begins to read. The thread ends with the stream, or at the first read after the source was
    /// dropped; nobody waits for it, because a read can't be interrupted.
    pub fn start(mut reader: impl Read + Send + 'static) -> io::Result<StreamReader> {
        let (full, pieces) = bounded(AHEAD);
        let (used, empty) = bounded::<Vec<u8>>(AHEAD + 1);
        let read = move || {
            loop {
                let mut piece = empty.try_recv().unwrap_or_default();
                piece.resize(READ_BYTES, 0);
                let outcome = match reader.read(&mut piece) {
                    Ok(0) => return,
                    Ok(length) => {
                        piece.truncate(length);
                        Ok(piece)
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => Err(error),
                };
                let failed = outcome.is_err();
                if full.send(outcome).is_err() || failed {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("harness-read".to_owned())
            .spawn(read)?;
        Ok(StreamReader { pieces, used })
    }

    /// What is available already.
    pub fn look(&self) -> Received {
        match self.pieces.try_recv() {
            Ok(piece) => heard(piece),
            Err(TryRecvError::Empty) => Received::Nothing,
            Err(TryRecvError::Disconnected) => Received::End(None),
        }
    }

    /// Waits for output, at most this long.
    pub fn wait(&self, limit: Duration) -> Received {
        match self.pieces.recv_timeout(limit) {
            Ok(piece) => heard(piece),
            Err(RecvTimeoutError::Timeout) => Received::Nothing,
            Err(RecvTimeoutError::Disconnected) => Received::End(None),
        }
    }

    /// Returns a piece, so that its buffer can be used again.
    pub fn give_back(&self, piece: Vec<u8>) {
        let _ = self.used.try_send(piece);
    }
}

fn heard(piece: io::Result<Vec<u8>>) -> Received {
    match piece {
        Ok(bytes) => Received::Bytes(bytes),
        Err(error) => Received::End(Some(error)),
    }
}

/// Passes each line of a stream to the relay and the transcript.
pub struct Pump<'a> {
    /// Makes events of the lines.
    pub relay: Relay<'a>,
    transcript: Option<Transcript>,
    lines: LineSplitter,
    bytes: u64,
}

impl<'a> Pump<'a> {
    /// A pump at the beginning of a stream.
    pub fn new(relay: Relay<'a>, transcript: Option<Transcript>) -> Pump<'a> {
        Pump {
            relay,
            transcript,
            lines: LineSplitter::default(),
            bytes: 0,
        }
    }

    /// Takes the next bytes.
    pub fn feed(&mut self, bytes: &[u8], emit: &mut dyn FnMut(Event)) {
        self.bytes += bytes.len() as u64;
        let Pump {
            relay,
            transcript,
            lines,
            ..
        } = self;
        lines.feed(bytes, |line| take(relay, transcript.as_mut(), line, emit));
    }

    /// No output comes now: lines so far are written out.
    pub fn idle(&mut self, emit: &mut dyn FnMut(Event)) {
        let Some(transcript) = &mut self.transcript else {
            return;
        };
        transcript.flush();
        if let Some((path, error)) = transcript.take_error() {
            emit(Event::advice(
                Severity::Warn,
                None,
                format!("the transcript can't be kept in {}: {error}", path.display()),
                "the agent goes on; make that folder writable to keep what it says",
            ));
        }
    }

    /// The stream has ended: takes an unfinished line.
    pub fn end(&mut self, emit: &mut dyn FnMut(Event)) {
        let lines = std::mem::take(&mut self.lines);
        let Pump {
            relay, transcript, ..
        } = self;
        lines.end(|line| take(relay, transcript.as_mut(), line, emit));
        self.idle(emit);
    }

    /// Bytes taken so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

fn take(
    relay: &mut Relay<'_>,
    transcript: Option<&mut Transcript>,
    line: Line<'_>,
    emit: &mut dyn FnMut(Event),
) {
    relay.line(line, emit);
    if let Some(transcript) = transcript {
        transcript.line(relay.thread(), line);
    }
}
