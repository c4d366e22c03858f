//! What the guest has written and the terminal hasn't taken yet, bounded.
//!
//! A terminal that takes nothing (it scrolls back, it is at the other end of a slow line) must not
//! stall the guest, whose console waits for whoever is attached. So what comes is always taken; when
//! too much is waiting, the oldest goes, up to the end of a line, and how much that was is said.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes between two threads: one puts, one takes.
#[derive(Debug)]
pub struct Backlog {
    inner: Mutex<Inner>,
    changed: Condvar,
    limit: usize,
}

#[derive(Debug)]
struct Inner {
    waiting: VecDeque<u8>,
    /// Left out since the last take.
    dropped: u64,
    /// Nothing more will be put.
    ended: bool,
    /// Nobody will take any more.
    abandoned: bool,
    /// All that was put has been written out.
    written: bool,
    last_put: Instant,
}

impl Backlog {
    /// Holds at most `limit` bytes.
    pub fn new(limit: usize) -> Backlog {
        Backlog {
            inner: Mutex::new(Inner {
                waiting: VecDeque::new(),
                dropped: 0,
                ended: false,
                abandoned: false,
                written: false,
                last_put: Instant::now(),
            }),
            changed: Condvar::new(),
            limit,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts some more; never waits.
    pub fn put(&self, bytes: &[u8]) {
        let mut inner = self.inner();
        inner.last_put = Instant::now();
        inner.waiting.extend(bytes);
        let over = inner.waiting.len().saturating_sub(self.limit);
        if over > 0 {
            // To the end of a line, so that what is shown next begins with one.
            let line = inner
                .waiting
                .iter()
                .skip(over - 1)
                .position(|byte| *byte == b'\n');
            let cut = line.map_or(over, |line| over + line);
            inner.waiting.drain(..cut);
            inner.dropped += cut as u64;
        }
        self.changed.notify_all();
    }

    /// Nothing more will be put.
    pub fn end(&self) {
        self.inner().ended = true;
        self.changed.notify_all();
    }

    /// Nobody will take any more.
    pub fn abandon(&self) {
        self.inner().abandoned = true;
        self.changed.notify_all();
    }

    /// Waits for something to take: how much was left out before it, and at most `most` bytes. `None`:
    /// there is nothing and never will be.
    pub fn take(&self, most: usize) -> Option<(u64, Vec<u8>)> {
        let mut inner = self.inner();
        loop {
            if !inner.waiting.is_empty() || inner.dropped > 0 {
                let count = inner.waiting.len().min(most);
                let bytes = inner.waiting.drain(..count).collect();
                return Some((std::mem::take(&mut inner.dropped), bytes));
            }
            if inner.ended || inner.abandoned {
                inner.written = true;
                self.changed.notify_all();
                return None;
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until all of an ended backlog is written, but no longer than `limit`.
    pub fn wait_written(&self, limit: Duration) -> bool {
        let inner = self.inner();
        let (inner, _) = self
            .changed
            .wait_timeout_while(inner, limit, |inner| !inner.written && !inner.abandoned)
            .unwrap_or_else(PoisonError::into_inner);
        inner.written
    }

    /// Whether nothing more will be put.
    pub fn has_ended(&self) -> bool {
        self.inner().ended
    }

    /// Whether nobody takes any more.
    pub fn is_abandoned(&self) -> bool {
        self.inner().abandoned
    }

    /// How long nothing has come.
    pub fn quiet_for(&self) -> Duration {
        self.inner().last_put.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_lines_go_and_are_counted() {
        let backlog = Backlog::new(10);
        backlog.put(b"one\ntwo\n");
        backlog.put(b"three\n");
        assert_eq!(backlog.take(100), Some((4, b"two\nthree\n".to_vec())));
        backlog.put(&[b'x'; 25]);
        assert_eq!(backlog.take(4), Some((15, b"xxxx".to_vec())));
        assert_eq!(backlog.take(100), Some((0, b"xxxxxx".to_vec())));
        backlog.put(b"a line that is far too long\n");
        assert_eq!(backlog.take(100), Some((28, Vec::new())));
    }

    #[test]
    fn its_end_comes_after_all_that_was_put() {
        let backlog = Backlog::new(10);
        backlog.put(b"last");
        backlog.end();
        assert!(backlog.has_ended() && !backlog.wait_written(Duration::ZERO));
        assert_eq!(backlog.take(2), Some((0, b"la".to_vec())));
        assert_eq!(backlog.take(2), Some((0, b"st".to_vec())));
        assert_eq!(backlog.take(2), None);
        assert!(backlog.wait_written(Duration::ZERO));
    }
}
