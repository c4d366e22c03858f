//! SIGTERM, SIGINT and SIGHUP as a request to stop in order.
//!
//! Here: the broker process's own signals. Not here: a broker in a thread of an embedding
//! process, whose signals are the embedder's.

use std::io;
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::core::cancel::Cancel;

/// A thread that waits for signals; ends when dropped.
pub struct Signals {
    thread: Option<JoinHandle<()>>,
    quit: Option<io::PipeWriter>,
}

impl Signals {
    /// From now on a signal to stop raises `stop`. Call it before any other thread is started:
    /// threads inherit the mask, and one without it would take the signal and end the process.
    /// SIGXFSZ (a file size limit reached) is masked too: the write's error says it better.
    pub fn watch(stop: Cancel) -> io::Result<Signals> {
        let mut masked = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            masked.add(signal);
        }
        let signals = SignalFd::with_flags(&masked, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        masked.add(Signal::SIGXFSZ);
        masked.thread_block()?;
        let (quit_seen, quit) = io::pipe()?;
        let thread = thread::Builder::new()
            .name("broker-signals".to_owned())
            .spawn(move || {
                loop {
                    let mut asked = [
                        PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                        PollFd::new(quit_seen.as_fd(), PollFlags::POLLIN),
                    ];
                    let _ = poll(&mut asked, PollTimeout::NONE);
                    if asked[1].any() == Some(true) {
                        return;
                    }
                    while let Ok(Some(_)) = signals.read_signal() {
                        stop.request();
                    }
                }
            })?;
        Ok(Signals {
            thread: Some(thread),
            quit: Some(quit),
        })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.quit.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
