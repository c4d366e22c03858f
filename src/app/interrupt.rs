//! Signals: Ctrl-C, SIGTERM and SIGHUP while an operation runs, and the one of a full file.
//!
//! Here: turning signals into requests to stop. Not here: what stops, and how (`core`).

use std::io;
use std::thread;

use castra::core::cancel::Cancel;
use castra::core::host;
use nix::sys::signal::{SigSet, Signal};

use super::screen::Screen;
use super::style::is_capable;
use super::terminal;

/// From now on the first signal asks to stop in order, the second to stop at once. Without
/// handlers (the system refused) signals end castra as they end any program.
pub fn cancel_on_signals(screen: Screen) -> Cancel {
    if is_capable(&io::stderr()) {
        terminal::hold_signals();
    }
    on_signals(move |requests| match requests {
        1 => screen.say("stopping; a second Ctrl-C stops at once"),
        2 => screen.say("stopping at once"),
        _ => {}
    })
}

/// The same for what only looks on: there is nothing to stop, and nothing is said.
pub fn end_on_signals() -> Cancel {
    on_signals(|_| {})
}

fn on_signals(then: impl Fn(u32) + Send + 'static) -> Cancel {
    keep_ignoring();
    let cancel = Cancel::new();
    let raised = cancel.clone();
    // ctrlc takes the signals first and then counts on a thread to hear of them: without one castra
    // would be deaf to them. Left alone they end it as they end any program.
    let spare = thread::Builder::new().spawn(|| {}).map(thread::JoinHandle::join);
    if let Err(error) = spare {
        log::warn!("no thread for signals: {error}");
        return cancel;
    }
    let installed = ctrlc::set_handler(move || {
        raised.request();
        then(raised.requests());
    });
    if let Err(error) = installed {
        log::warn!("no signal handlers: {error}");
    }
    cancel
}

/// A file that may not grow any more (`ulimit -f`, a quota) is an error of that write, which is told;
/// the signal that comes with it would end castra in the middle of its work.
pub fn outlive_file_limits() {
    let mut masked = SigSet::empty();
    masked.add(Signal::SIGXFSZ);
    if let Err(error) = masked.thread_block() {
        log::warn!("SIGXFSZ can't be blocked: {error}");
    }
}

/// What whoever started castra told it to ignore stays ignored: `nohup castra up` outlives its
/// terminal. The handlers to be installed would change that, so these signals are blocked, in this
/// thread and in all that it starts.
fn keep_ignoring() {
    let mut ignored = SigSet::empty();
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        if host::ignores_signal(signal as i32) {
            ignored.add(signal);
        }
    }
    if let Err(error) = ignored.thread_block() {
        log::warn!("signals can't be blocked: {error}");
    }
}
