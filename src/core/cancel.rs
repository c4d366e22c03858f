//! How an operation is told to stop early: Ctrl-C, SIGTERM, or an embedder's wish.
//!
//! Here: the flag that its threads share and can wait on, and waiting for anything that has to be looked at again and
//! again. Not here: signal handlers (`main`).

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a wait looks, unless it has reasons of its own.
pub const POLL_INTERVAL: Duration = Duration::from_millis(10);

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

    /// Looks every so often until there is something; `None` if there is nothing within the limit. A request to stop
    /// ends the wait after one more look. A wait that no request may end has a flag of its own.
    pub fn wait_for<T>(
        &self,
        limit: Duration,
        every: Duration,
        mut look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let until = Instant::now().checked_add(limit);
        let mut last = false;
        loop {
            let found = look();
            if found.is_some() || last {
                return found;
            }
            let left = until.map_or(every, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return None;
            }
            last = self.pause(every.min(left));
        }
    }

    /// As [`Cancel::wait_for`], for what is only true or not.
    pub fn wait_until(&self, limit: Duration, every: Duration, mut is_so: impl FnMut() -> bool) -> bool {
        self.wait_for(limit, every, || is_so().then_some(())).is_some()
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

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_millis(1);

    /// What a wait found, and how often it looked.
    fn waited(
        cancel: &Cancel,
        limit: Duration,
        mut look: impl FnMut(u32) -> Option<u32>,
    ) -> (Option<u32>, u32) {
        let mut looks = 0;
        let found = cancel.wait_for(limit, EVERY, || {
            looks += 1;
            look(looks)
        });
        (found, looks)
    }

    #[test]
    fn a_wait_ends_with_what_it_waits_for_its_limit_or_a_request() {
        let cancel = Cancel::new();
        assert_eq!(waited(&cancel, Duration::ZERO, Some), (Some(1), 1));
        assert_eq!(waited(&cancel, Duration::ZERO, |_| None), (None, 1));
        assert_eq!(
            waited(&cancel, Duration::MAX, |looks| (looks == 3).then_some(7)),
            (Some(7), 3)
        );
        let began = Instant::now();
        let (found, looks) = waited(&cancel, Duration::from_millis(20), |_| None);
        assert!(found.is_none() && looks > 1 && began.elapsed() >= Duration::from_millis(20));

        // Whoever asks is heard at once, however rarely the wait looks.
        let asking = cancel.clone();
        let asked = cancel.wait_until(Duration::MAX, Duration::from_secs(3600), || {
            let was = asking.is_requested();
            asking.request();
            was
        });
        assert!(asked, "a last look after the request");
        assert_eq!(waited(&cancel, Duration::MAX, |_| None), (None, 2));
    }
}
