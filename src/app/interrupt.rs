//! Signals: Ctrl-C, SIGTERM and SIGHUP during an operation, and SIGXFSZ.
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

/// From now on the first signal asks the operation to stop cleanly, the second to stop at once. If the system
/// refuses handlers, a signal ends castra as it ends any program.
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

/// The same for commands that only watch: they have nothing to stop, and print nothing.
pub fn end_on_signals() -> Cancel {
    on_signals(|_| {})
}

fn on_signals(then: impl Fn(u32) + Send + 'static) -> Cancel {
    keep_ignoring();
    let cancel = Cancel::new();
    let raised = cancel.clone();
    // ctrlc installs its handlers and then starts a thread that waits for signals. Without that thread castra
    // would ignore signals, so castra checks first that a thread can be started.
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

/// SIGXFSZ comes with a write beyond a file size limit (`ulimit -f`) and would end castra in the middle of
/// its work. While it is blocked, the write fails with an error, which castra reports.
pub fn outlive_file_limits() {
    let mut masked = SigSet::empty();
    masked.add(Signal::SIGXFSZ);
    if let Err(error) = masked.thread_block() {
        log::warn!("SIGXFSZ can't be blocked: {error}");
    }
}

/// Signals that castra's parent made it ignore stay ignored: `nohup castra up` outlives its terminal. The
/// handlers would change that, so these signals are blocked in this thread and in all threads that it starts.
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
