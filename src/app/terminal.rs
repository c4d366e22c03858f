//! The terminal behind stderr: its size, what happens to it, whether it is ours.
//!
//! Here: asking. Not here: what is drawn on it (`screen`).

use std::io;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{getpgrp, tcgetpgrp};

/// Columns of a terminal that doesn't tell.
const DEFAULT_COLUMNS: usize = 80;
/// Its lines.
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
    // stty asks about its stdin; ours may be a pipe.
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

/// Whether castra may draw: a job in the background leaves the terminal to whoever has it.
pub fn is_foreground() -> bool {
    // A terminal that doesn't control us has no background.
    tcgetpgrp(io::stderr()).map_or(true, |group| group == getpgrp())
}

/// What has happened to the terminal since somebody last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TerminalChanges {
    /// It has another size.
    pub resized: bool,
    /// castra was stopped and goes on: a shell has written meanwhile.
    pub resumed: bool,
}

/// Hears of new sizes and of being continued, which come as signals; no signal handler is involved,
/// for that takes unsafe code.
#[derive(Debug)]
pub struct Watch(Option<SignalFd>);

impl Watch {
    /// Begins to listen. [`hold_signals`] has to come before any thread starts.
    pub fn start() -> Watch {
        Watch(SignalFd::with_flags(&signals(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).ok())
    }

    /// What has happened since the last time.
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

/// Keeps the signals that [`Watch`] reads from being lost in a thread that doesn't hold them. A
/// stopped castra goes on all the same, and children that inherit this aren't the worse for it.
pub fn hold_signals() {
    if let Err(error) = signals().thread_block() {
        log::warn!("changes of the terminal's size can't be noticed: {error}");
    }
}
