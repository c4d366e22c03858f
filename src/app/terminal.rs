//! The terminal behind stderr: its size, its changes, and whether castra is in its foreground.
//!
//! Here: queries. Not here: what is drawn (`screen`).

use std::io;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{getpgrp, tcgetpgrp};

/// Width if the terminal doesn't tell.
const DEFAULT_COLUMNS: usize = 80;
/// Height if the terminal doesn't tell.
const DEFAULT_ROWS: usize = 24;

/// A terminal's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: usize,
    /// Characters in a line.
    pub columns: usize,
}

/// The terminal's size. Asking the kernel takes unsafe code, so `stty` asks.
pub fn size() -> Size {
    // stty asks about its stdin, and castra's may be a pipe.
    let terminal = io::stderr()
        .as_fd()
        .try_clone_to_owned()
        .map_or_else(|_| Stdio::null(), Stdio::from);
    let asked = Command::new("stty")
        .arg("size")
        .stdin(terminal)
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .unwrap_or_default();
    let mut asked = asked.split_whitespace().map(|number| number.parse().ok());
    let from_environment = |name: &str| std::env::var(name).ok()?.trim().parse().ok();
    let mut side = |name: &str, usual: usize| {
        asked
            .next()
            .flatten()
            .filter(|count| *count > 0)
            .or_else(|| from_environment(name))
            .filter(|count| *count > 0)
            .unwrap_or(usual)
    };
    Size {
        rows: side("LINES", DEFAULT_ROWS),
        columns: side("COLUMNS", DEFAULT_COLUMNS),
    }
}

/// Whether castra may draw: a background job leaves the terminal to the foreground.
pub fn is_foreground() -> bool {
    // A terminal that isn't castra's controlling terminal has no foreground group for it.
    tcgetpgrp(io::stderr()).map_or(true, |group| group == getpgrp())
}

/// What has happened to the terminal since the last query.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TerminalChanges {
    /// It has another size.
    pub resized: bool,
    /// castra was stopped and continued: a shell has written meanwhile.
    pub resumed: bool,
}

/// Listens for SIGWINCH and SIGCONT without a signal handler, which would take unsafe code.
#[derive(Debug)]
pub struct Watch(Option<SignalFd>);

impl Watch {
    /// Begins to listen. Call [`hold_signals`] before any thread starts.
    pub fn start() -> Watch {
        Watch(SignalFd::with_flags(&signals(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).ok())
    }

    /// What has happened since the last call.
    pub fn take_changes(&self) -> TerminalChanges {
        let mut news = TerminalChanges::default();
        while let Some(info) = self
            .0
            .as_ref()
            .and_then(|signals| signals.read_signal().ok().flatten())
        {
            news.resized |= info.ssi_signo == Signal::SIGWINCH as u32;
            news.resumed |= info.ssi_signo == Signal::SIGCONT as u32;
        }
        news
    }
}

fn signals() -> SigSet {
    [Signal::SIGWINCH, Signal::SIGCONT].into_iter().collect()
}

/// Blocks the signals that [`Watch`] reads in all threads, so that none takes them away. A stopped castra is
/// continued all the same, and blocking does no harm to children that inherit it.
pub fn hold_signals() {
    if let Err(error) = signals().thread_block() {
        log::warn!("changes of the terminal's size can't be noticed: {error}");
    }
}
