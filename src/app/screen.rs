//! stderr: the conversation, and on a terminal the one line below it that changes.
//!
//! Here: who may write when, and the live line. All that castra says to people goes through one
//! [`Screen`], so that the live line, the operation's threads and Ctrl-C don't write into each
//! other. Not here: what is said (`progress`, `failure`).

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::style::is_capable;

/// How often the live line is drawn again.
const REDRAW_EVERY: Duration = Duration::from_millis(200);
/// Columns of a terminal that doesn't tell.
const USUAL_COLUMNS: usize = 80;
/// Its lines.
const USUAL_ROWS: usize = 24;

/// stderr, shared by all who speak. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Screen(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The live line as it stands on the terminal; empty: none.
    drawn: String,
}

impl Screen {
    /// One line, or several. A stderr that nobody reads is no reason to stop.
    pub fn say(&self, text: &str) {
        let mut state = self.lock();
        let mut bytes = String::new();
        if !state.drawn.is_empty() {
            bytes.push_str("\r\x1b[K");
        }
        bytes.push_str(text);
        bytes.push('\n');
        bytes.push_str(&state.drawn);
        write(&mut state, &bytes);
    }

    fn draw(&self, line: String) {
        let mut state = self.lock();
        if state.drawn == line {
            return;
        }
        let bytes = format!("\r{line}\x1b[K");
        write(&mut state, &bytes);
        state.drawn = line;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write(_lock: &mut State, text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// The live line, drawn again and again by a thread until it is dropped.
#[derive(Debug)]
pub struct LiveLine {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl LiveLine {
    /// Shows what `text` says, if stderr is a terminal that can take a line back.
    pub fn start(screen: &Screen, text: impl Fn() -> String + Send + 'static) -> Option<LiveLine> {
        if !is_capable(&io::stderr()) {
            return None;
        }
        let screen = screen.clone();
        let (stop, stopped) = mpsc::channel::<()>();
        let thread = thread::Builder::new()
            .name("live line".to_owned())
            .spawn(move || {
                let columns = columns();
                while stopped.recv_timeout(REDRAW_EVERY) == Err(RecvTimeoutError::Timeout) {
                    // One column stays free: some terminals wrap when the last one is written.
                    screen.draw(text().chars().take(columns.saturating_sub(1)).collect());
                }
                screen.draw(String::new());
            })
            .ok()?;
        Some(LiveLine {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for LiveLine {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A terminal's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: usize,
    /// Characters in a line.
    pub columns: usize,
}

/// The terminal's width.
pub fn columns() -> usize {
    size().columns
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
            .or_else(|| from_environment(name))
            .filter(|count| *count > 0)
            .unwrap_or(usual)
    };
    Size {
        rows: side("LINES", USUAL_ROWS),
        columns: side("COLUMNS", USUAL_COLUMNS),
    }
}
