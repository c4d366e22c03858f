//! Threads: started by name, so that a panic is attributed, and without any when there is none to be
//! had.
//!
//! Here: starting them, what is said when the system has no room for one more, and the work that
//! then goes on one thing after the other. Not here: children (`core::process`), or what any thread
//! does.

use std::io;
use std::panic;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope, ScopedJoinHandle};

use crate::core::cancel::Cancel;
use crate::core::failure::{Exit, Failure, Result};

/// What to do where the system starts no further thread or process.
pub const FREE_RESOURCES: &str =
    "end some processes, or raise the limit of this user (`ulimit -u`) or of its control group";

/// Starts a thread of this scope.
pub fn spawn_scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    let started = thread::Builder::new()
        .name(name.to_owned())
        .spawn_scoped(scope, work);
    started.map_err(|error| no_thread_failure(name, &error))
}

/// The failure of starting a thread or a process for `what`.
pub fn no_thread_failure(what: &str, error: &io::Error) -> Failure {
    Failure::new(Exit::Busy, format!("no thread can be started for `{what}`"))
        .because(error)
        .advice(FREE_RESOURCES)
}

/// Whether this error of a start means that the system has no room for it now; any other one means
/// that what was to be started can't run at all.
pub fn is_out_of_resources(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory
    )
}

/// Does `work` on each of these, each in a thread of its own; on those for which no thread is to be
/// had one after the other, here. The outcomes stand in the order of the items; `Err`: it panicked.
pub fn map_parallel<'i, I: Sync, T: Send>(
    items: &'i [I],
    name: impl Fn(&I) -> String,
    work: impl Fn(&'i I) -> T + Sync,
) -> Vec<thread::Result<T>> {
    let work = &work;
    thread::scope(|scope| {
        let started: Vec<_> = items
            .iter()
            .map(|item| (item, spawn_scoped(scope, &name(item), move || work(item))))
            .collect();
        let done = started.into_iter().map(|(item, thread)| match thread {
            Ok(thread) => thread.join(),
            Err(_) => panic::catch_unwind(panic::AssertUnwindSafe(|| work(item))),
        });
        done.collect()
    })
}

/// Does both, `aside` in a thread beside this one; without a thread one after the other.
pub fn run_both<A: Send, B>(
    name: &str,
    aside: impl FnOnce() -> A + Send,
    here: impl FnOnce() -> B,
) -> (A, B) {
    let aside = Mutex::new(Some(aside));
    let take = || aside.lock().unwrap_or_else(PoisonError::into_inner).take();
    thread::scope(|scope| {
        let started = spawn_scoped(scope, name, || take().map(|work| work()));
        let here = here();
        let aside = match started.map(ScopedJoinHandle::join) {
            Ok(Ok(done)) => done,
            Ok(Err(panicked)) => panic::resume_unwind(panicked),
            Err(_) => take().map(|work| work()),
        };
        (aside.expect("one of the two has taken the work"), here)
    })
}

/// Raises a request when it is dropped: a thread that waits for it ends however its scope is left.
#[derive(Debug)]
pub struct CancelOnDrop<'c>(pub &'c Cancel);

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        self.0.request();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_stand_in_order_and_a_panic_is_one_items_own() {
        let outcomes = map_parallel(
            &[1, 2, 3],
            |number| format!("t{number}"),
            |number| match number {
                2 => panic!("as asked"),
                number => number * 10,
            },
        );
        let outcomes: Vec<Option<i32>> = outcomes.into_iter().map(Result::ok).collect();
        assert_eq!(outcomes, [Some(10), None, Some(30)]);
        assert_eq!(run_both("aside", || 1, || 2), (1, 2));
    }

    #[test]
    fn a_waiting_thread_is_asked_to_end_however_its_scope_is_left() {
        let asked = Cancel::new();
        let left = panic::catch_unwind(panic::AssertUnwindSafe(|| {
            thread::scope(|scope| {
                let _end = CancelOnDrop(&asked);
                let _thread = spawn_scoped(scope, "waits", || {
                    while !asked.pause(std::time::Duration::from_secs(1)) {}
                });
                panic!("as asked");
            })
        }));
        assert!(left.is_err());
    }
}
