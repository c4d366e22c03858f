//! Lines to be published, from a descriptor that `poll` can wait for beside the broker's socket.
//!
//! Here: whole lines from any stream, with bounded memory. Not here: valid payloads (`payload`).

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

/// Read in pieces of this size.
const READ_BYTES: usize = 64 * 1024;

/// A stream of lines: a descriptor, or any reader.
pub struct Input(File);

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Input")
    }
}

impl From<OwnedFd> for Input {
    fn from(descriptor: OwnedFd) -> Input {
        Input(File::from(descriptor))
    }
}

impl Input {
    /// Lines of anything that can be read. A thread reads it, until its end or until nobody wants
    /// more; no further ahead than a socket's buffer.
    pub fn of(mut reader: impl Read + Send + 'static) -> io::Result<Input> {
        let (ours, mut theirs) = UnixStream::pair()?;
        thread::Builder::new()
            .name("bus-input".to_owned())
            .spawn(move || {
                // An error ends the lines as the end does; whoever owns the reader knows of it.
                let _ = io::copy(&mut reader, &mut theirs);
            })?;
        Ok(Input(File::from(OwnedFd::from(ours))))
    }
}

/// What the lines hold next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A line, without its end.
    Whole(Vec<u8>),
    /// A line longer than any message, not kept.
    TooLong,
}

/// Lines with their numbers.
#[derive(Debug)]
pub(super) struct StdinLines {
    input: File,
    longest: usize,
    buffer: Vec<u8>,
    taken: usize,
    searched: usize,
    in_overlong_line: bool,
    ended: bool,
    number: u64,
}

impl StdinLines {
    pub(super) fn new(input: Input, longest: usize) -> StdinLines {
        StdinLines {
            input: input.0,
            longest,
            buffer: Vec::new(),
            taken: 0,
            searched: 0,
            in_overlong_line: false,
            ended: false,
            number: 0,
        }
    }

    /// Number of the line last given, counted from 1.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// What to wait for; `None` after the end.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        (!self.ended).then(|| self.input.as_fd())
    }

    /// Whether everything has been given.
    pub(super) fn is_over(&self) -> bool {
        self.ended && self.taken == self.buffer.len() && !self.in_overlong_line
    }

    /// One read; waits if nothing is there.
    pub(super) fn read(&mut self) -> io::Result<()> {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let have = self.buffer.len();
        self.buffer.resize(have + READ_BYTES, 0);
        let read = self.input.read(&mut self.buffer[have..]);
        self.buffer.truncate(have + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => self.ended = true,
            Ok(_) => {}
            // Another process shares the descriptor and made it non-blocking; there will be more.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            Err(error) => {
                self.ended = true;
                return Err(error);
            }
        }
        Ok(())
    }

    /// The next line of what was read. The last one counts without a line end too.
    pub(super) fn next_line(&mut self) -> Option<Line> {
        let rest = &self.buffer[self.taken..];
        let found = rest[self.searched..].iter().position(|byte| *byte == b'\n');
        let (length, used) = match found {
            Some(at) => (self.searched + at, self.searched + at + 1),
            None if self.ended && (!rest.is_empty() || self.in_overlong_line) => (rest.len(), rest.len()),
            None => {
                self.searched = rest.len();
                if rest.len() > self.longest {
                    self.in_overlong_line = true;
                    self.taken = self.buffer.len();
                    self.searched = 0;
                }
                return None;
            }
        };
        let line = match std::mem::take(&mut self.in_overlong_line) || length > self.longest {
            true => Line::TooLong,
            false => Line::Whole(rest[..length].to_vec()),
        };
        self.taken += used;
        self.searched = 0;
        self.number += 1;
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_of(text: &'static [u8], longest: usize) -> Vec<(u64, String)> {
        let mut lines = StdinLines::new(Input::of(text).unwrap(), longest);
        let mut seen = Vec::new();
        while !lines.is_over() {
            match lines.next_line() {
                Some(Line::Whole(line)) => {
                    seen.push((lines.number(), String::from_utf8_lossy(&line).into_owned()));
                }
                Some(Line::TooLong) => seen.push((lines.number(), "too long".to_owned())),
                None => lines.read().unwrap(),
            }
        }
        seen
    }

    #[test]
    fn lines_have_numbers_and_limits() {
        let long: &'static [u8] = Box::leak(
            [
                b"a\n".as_slice(),
                &vec![b'x'; 3 * READ_BYTES],
                b"\nb\n",
                &vec![b'y'; 3 * READ_BYTES],
            ]
            .concat()
            .into_boxed_slice(),
        );
        for (text, longest, expected) in [
            (&b""[..], 9, vec![]),
            (b"one\ntwo\n", 9, vec![(1, "one"), (2, "two")]),
            (b"one\n\ntwo", 9, vec![(1, "one"), (2, ""), (3, "two")]),
            (
                b"1234\n12345\n1\n",
                4,
                vec![(1, "1234"), (2, "too long"), (3, "1")],
            ),
            (
                long,
                READ_BYTES,
                vec![(1, "a"), (2, "too long"), (3, "b"), (4, "too long")],
            ),
        ] {
            let expected: Vec<_> = expected
                .into_iter()
                .map(|(number, line)| (number, line.to_owned()))
                .collect();
            assert_eq!(lines_of(text, longest), expected);
        }
    }

    #[test]
    fn what_is_too_long_is_not_kept() {
        let mut lines = StdinLines::new(Input::of(io::repeat(b'x').take(50_000_000)).unwrap(), 1000);
        while !lines.is_over() {
            if lines.next_line().is_none() {
                lines.read().unwrap();
            }
            assert!(lines.buffer.capacity() <= 4 * READ_BYTES);
        }
        assert_eq!(lines.number(), 1);
    }
}
