//! Reading a log of the bus while the broker goes on writing it (docs/PROTOCOL.md).
//!
//! Here: messages of some topics, the last ones, those that follow, lines that are none. Not here: the
//! files and their rotation (`core::lines::rotated_log`), writing (`core::broker`), or which log somebody
//! wants (`core::operations::bus`).
//!
//! Only whole lines count: what stands behind the last line end is being written, or will be cut off.

use std::io;
use std::path::Path;

use crate::core::cancel::Cancel;
use crate::core::lines::rotated_log::{LogStep, RotatedLog};

use super::client_frame::MAX_FRAME_BYTES;
use super::line::BusLine;
use super::message::Message;
use super::topic::Pattern;

/// A longer line is no message: no frame could have brought it.
pub(crate) const MAX_LINE_BYTES: usize = MAX_FRAME_BYTES;

/// One log, read from old to young.
#[derive(Debug)]
pub struct LogReader {
    log: RotatedLog,
    topics: Vec<Pattern>,
    /// Of the last message read, of any topic.
    last_seq: Option<u64>,
    /// Files in between may have been removed before they were read.
    may_have_lost: bool,
    skipped: u64,
    lost: u64,
}

impl LogReader {
    /// Before the oldest message that is kept. No file is an empty log. Of topics, those that any
    /// pattern means; no pattern: all.
    pub fn open(path: impl AsRef<Path>, topics: Vec<Pattern>) -> io::Result<LogReader> {
        Ok(LogReader {
            log: RotatedLog::open(path.as_ref(), MAX_LINE_BYTES)?,
            topics,
            last_seq: None,
            may_have_lost: false,
            skipped: 0,
            lost: 0,
        })
    }

    /// Reading ends with an error of the kind `Interrupted` soon after this flag is raised.
    pub fn until(mut self, stop: &Cancel) -> LogReader {
        self.log = self.log.until(stop);
        self
    }

    /// Goes to before the last `count` messages wanted, reading from the end: what a log of many
    /// files costs is what those messages take. For a reader that has read nothing yet.
    pub fn seek_last(&mut self, count: u64) -> io::Result<()> {
        match self.seek(count) {
            // The broker cut back a write that failed: its lines now end elsewhere.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => self.seek(count),
            other => other,
        }
    }

    fn seek(&mut self, count: u64) -> io::Result<()> {
        let mut lines = self.log.backward(true)?;
        let mut begin = lines.end()?;
        let mut left = count;
        while left > 0
            && let Some((place, line)) = lines.next_line()?
        {
            if let LineKind::Wanted(_) = kind_of(line, &self.topics) {
                left -= 1;
                begin = place;
            }
        }
        // Where there are fewer, what is no message before them counts as well.
        if left == 0 {
            self.log.go_to(begin);
        }
        Ok(())
    }

    /// The next message wanted, `None` where the log ends for now; ask again to follow it.
    pub fn next_message(&mut self) -> io::Result<Option<Message>> {
        loop {
            let step = self.log.next_line(true)?;
            self.may_have_lost |= self.log.take_missed();
            let kind = match step {
                LogStep::End => return Ok(None),
                LogStep::Waste => LineKind::NoMessage,
                LogStep::Line(line) => kind_of(self.log.bytes(line), &self.topics),
            };
            let (seq, wanted) = match kind {
                LineKind::NoMessage => {
                    self.skipped += 1;
                    continue;
                }
                LineKind::Other(seq) => (seq, None),
                LineKind::Wanted(message) => (message.seq, Some(message)),
            };
            if std::mem::take(&mut self.may_have_lost) {
                let follows = self.last_seq.is_none_or(|last| last.checked_add(1) == Some(seq));
                self.lost += u64::from(!follows);
            }
            self.last_seq = Some(seq);
            if wanted.is_some() {
                return Ok(wanted);
            }
        }
    }

    /// Lines that were no messages and were passed over. Where only some topics are wanted, lines
    /// that name another one are not looked at any closer.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// How often files may have been rotated away before they were read.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

/// What a line is.
enum LineKind {
    NoMessage,
    /// A message of another topic, of which the number is all that counts.
    Other(u64),
    Wanted(Message),
}

fn kind_of(line: &[u8], topics: &[Pattern]) -> LineKind {
    let is_wanted = |topic: &str| topics.is_empty() || topics.iter().any(|pattern| pattern.matches(topic));
    // One topic among millions of messages: what is plainly of another one isn't parsed.
    if !topics.is_empty()
        && let Some(plain) = BusLine::parse(line)
        && !is_wanted(plain.topic)
    {
        return LineKind::Other(plain.seq);
    }
    match Message::parse(line) {
        Ok(message) if is_wanted(&message.topic) => LineKind::Wanted(message),
        Ok(message) => LineKind::Other(message.seq),
        Err(_) => LineKind::NoMessage,
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
