//! How an operation is told to stop early: Ctrl-C, SIGTERM, or an embedder's wish.
//!
//! Here: the flag that its threads share and can wait on. Not here: signal handlers (`main`).

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Shared by everybody who takes part in one operation. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    requests: Mutex<u32>,
    changed: Condvar,
}

impl Cancel {
    /// A flag nobody has raised.
    pub fn new() -> Cancel {
        Cancel::default()
    }

    /// Asks to stop; asking twice means: at once.
    pub fn request(&self) {
        let mut requests = self.0.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests = requests.saturating_add(1);
        self.0.changed.notify_all();
    }

    /// How often it was asked: 0 go on, 1 stop in order, 2 and more stop at once.
    pub fn requests(&self) -> u32 {
        *self.0.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was asked at all.
    pub fn is_requested(&self) -> bool {
        self.requests() > 0
    }

    /// Waits, but not beyond a request to stop; true if there is one. This is how the waits of
    /// an operation pause between two looks.
    pub fn pause(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut requests = self.0.requests.lock().unwrap_or_else(PoisonError::into_inner);
        while *requests == 0 {
            let Some(left) = until
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero())
            else {
                return false;
            };
            requests = self
                .0
                .changed
                .wait_timeout(requests, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}
