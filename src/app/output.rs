//! stdout: the result, and nothing else.
//!
//! Here: the only writer to stdout. It escapes paths, names and guests' words, so that a terminal obeys none
//! of them. When the reader has closed the pipe it writes nothing more, and the operation goes on to its end:
//! `castra up | head -1` leaves no half-started VM. Not here: the conversation on stderr (`screen`).

use std::io::{self, IsTerminal, Write};

use castra::core::escape::{escape_json, escape_text};
use castra::core::failure::{Exit, Failure, Result};
use castra::core::host;
use serde::Serialize;

/// Buffered text is written in pieces of about this size.
const PIECE: usize = 64 * 1024;

/// stdout, buffered.
#[derive(Debug, Default)]
pub struct Output {
    buffer: Vec<u8>,
    state: State,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Open,
    /// The reader has closed the pipe.
    Closed,
    /// A failed write, usually because the disk is full.
    Failed(io::Error),
}

impl Output {
    /// One line of text for people.
    pub fn line(&mut self, text: impl AsRef<str>) {
        self.text(text);
        self.verbatim("\n");
    }

    /// Text for people: castra's own colours and line ends are kept, everything else is escaped.
    pub fn text(&mut self, text: impl AsRef<str>) {
        self.verbatim(escape_text(text.as_ref()));
    }

    /// Text for other programs, such as a path or an ssh_config: escaped only if stdout is a terminal.
    pub fn data(&mut self, text: impl AsRef<str>) {
        match io::stdout().is_terminal() {
            true => self.text(text),
            false => self.verbatim(text),
        }
    }

    /// Text that comes from castra alone: a man page, completions, cursor movements.
    pub fn verbatim(&mut self, text: impl AsRef<str>) {
        if !self.is_open() {
            return;
        }
        self.buffer.extend_from_slice(text.as_ref().as_bytes());
        if self.buffer.len() >= PIECE {
            self.flush();
        }
    }

    /// One JSON object on one line, written at once for readers that follow.
    pub fn json<T: Serialize + ?Sized>(&mut self, value: &T) {
        match serde_json::to_string(value) {
            Ok(line) => self.json_line(line),
            // A path that is no UTF-8: nothing else in an answer can't be written.
            Err(error) => self.state = State::Failed(io::Error::other(error)),
        }
        self.flush();
    }

    /// The same for JSON that is text already.
    pub fn json_line(&mut self, line: impl AsRef<str>) {
        self.verbatim(escape_json(line.as_ref()));
        self.verbatim("\n");
    }

    /// Whether the reader is still there. Commands that go on printing end when this is false.
    pub fn is_open(&self) -> bool {
        matches!(self.state, State::Open)
    }

    /// Checks whether the reader is gone, for commands that may print nothing for a long time: `castra events
    /// -f | head -1` ends with `head`, not with the next event.
    pub fn look_for_reader(&mut self) {
        if self.is_open() && host::reader_has_gone(io::stdout().lock()) {
            self.state = State::Closed;
        }
    }

    /// Writes what is buffered.
    pub fn flush(&mut self) {
        if self.is_open() && !self.buffer.is_empty() {
            let mut stdout = io::stdout().lock();
            if let Err(error) = stdout.write_all(&self.buffer).and_then(|()| stdout.flush()) {
                self.state = match error.kind() {
                    io::ErrorKind::BrokenPipe => State::Closed,
                    _ => State::Failed(error),
                };
            }
        }
        self.buffer.clear();
    }

    /// The end: a failed write is a failure, a reader that is gone isn't.
    pub fn finish(&mut self) -> Result<()> {
        self.flush();
        match &self.state {
            State::Open | State::Closed => Ok(()),
            State::Failed(error) => Err(Failure::new(Exit::Io, "can't write to stdout").because(error)),
        }
    }
}
