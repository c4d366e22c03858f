//! stderr: the conversation, and on a terminal the block of lines below it that changes.
//!
//! Here: the one writer to stderr, and the live block. Everything that castra says to people goes through
//! [`Screen`], so that the block, the operation's threads, Ctrl-C, log lines and a panic don't write into
//! each other. Not here: what is said (`progress`, `failure`), what the block shows (`live`).
//!
//! The cursor rests at the beginning of the line below the block: if castra ends, by SIGKILL too, the shell's
//! prompt gets a line of its own and nothing has to be restored.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use castra::core::escape::escape_text;

use super::style::is_capable;
use super::terminal::{self, Size, Watch};

/// How often the block is updated; it is drawn only if it has changed.
const REDRAW_INTERVAL: Duration = Duration::from_millis(125);

/// A process has one stderr.
static STATE: Mutex<State> = Mutex::new(State {
    drawn: Vec::new(),
    terminal: None,
});

/// stderr, shared by all threads.
#[derive(Clone, Copy, Debug, Default)]
pub struct Screen;

#[derive(Debug)]
struct State {
    /// The block as it is on the terminal.
    drawn: Vec<Line>,
    /// While there may be a block.
    terminal: Option<Terminal>,
}

#[derive(Debug)]
struct Terminal {
    size: Size,
    watch: Watch,
}

/// One line of the block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// With its colours.
    pub text: String,
    /// Its width in columns.
    pub width: usize,
}

impl Screen {
    /// Prints one or more lines with castra's own colours; everything else is escaped. Errors are ignored: if
    /// nobody reads stderr, the operation still goes on.
    pub fn say(self, text: &str) {
        lock().say(&escape_text(text));
    }

    /// The same for a caller that may hold the lock itself, such as a panic hook.
    pub fn say_if_free(self, text: &str) {
        let text = &*escape_text(text);
        match STATE.try_lock() {
            Ok(mut state) => state.say(text),
            Err(TryLockError::Poisoned(state)) => state.into_inner().say(text),
            Err(TryLockError::WouldBlock) => write(&format!("{text}\n")),
        }
    }
}

fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

impl State {
    fn say(&mut self, text: &str) {
        self.catch_up();
        let block = self.drawn.clone();
        self.put(Some(text), block);
    }

    /// Shows `block` in place of what is there.
    fn draw(&mut self, block: Vec<Line>) {
        if self.terminal.is_none() || (block.is_empty() && self.drawn.is_empty()) {
            return;
        }
        self.catch_up();
        let block = if terminal::is_foreground() {
            block
        } else {
            Vec::new()
        };
        if block != self.drawn {
            self.put(None, block);
        }
    }

    /// Takes note of a new size, or of a stop and continuation.
    fn catch_up(&mut self) {
        let Some(terminal) = &mut self.terminal else {
            return;
        };
        let news = terminal.watch.take_changes();
        if news.resized {
            terminal.size = terminal::size();
        }
        if news.resumed {
            // The shell has written below the block, so the block there is left as it is.
            self.drawn.clear();
        }
    }

    /// The terminal's size; read once, and again when it changes.
    fn size(&mut self) -> Size {
        self.catch_up();
        let terminal = self.terminal.get_or_insert_with(|| Terminal {
            // Before the size is read, so that no change is missed.
            watch: Watch::start(),
            size: terminal::size(),
        });
        terminal.size
    }

    /// One write: moves to the block's first line, writes the text above, then the block.
    fn put(&mut self, above: Option<&str>, block: Vec<Line>) {
        let columns = self
            .terminal
            .as_ref()
            .map_or(usize::MAX, |terminal| terminal.size.columns);
        let bytes = repaint(&self.drawn, above, &block, columns);
        self.drawn = block;
        write(&bytes);
    }
}

/// The bytes that turn one block into the next, with text above it.
fn repaint(drawn: &[Line], above: Option<&str>, block: &[Line], columns: usize) -> String {
    let mut bytes = String::new();
    // A terminal that has become narrower shows a line in several rows.
    let rows: usize = drawn
        .iter()
        .map(|line| line.width.div_ceil(columns.max(1)).max(1))
        .sum();
    let wrapped = rows > drawn.len();
    if rows > 0 {
        let _ = write!(bytes, "\r\x1b[{rows}A");
    }
    // Text of unknown length replaces these lines, so they are erased first.
    let afresh = above.is_some() || wrapped;
    if afresh && rows > 0 {
        bytes.push_str("\x1b[J");
    }
    if let Some(text) = above {
        bytes.push_str(text);
        bytes.push('\n');
    }
    for (index, line) in block.iter().enumerate() {
        // Unchanged lines aren't written again, so nothing flickers.
        if afresh || drawn.get(index) != Some(line) {
            bytes.push_str(&line.text);
            bytes.push_str("\x1b[K");
        }
        bytes.push_str("\r\n");
    }
    if !afresh && block.len() < drawn.len() {
        bytes.push_str("\x1b[J");
    }
    bytes
}

/// The live block, updated by a thread until it is dropped.
#[derive(Debug)]
pub struct LiveBlock {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl LiveBlock {
    /// Shows the lines that `lines` returns, if stderr is a terminal that can erase lines. The size is read
    /// once there is something to show.
    pub fn start(
        mut lines: impl FnMut(&dyn Fn() -> Size) -> Vec<Line> + Send + 'static,
    ) -> Option<LiveBlock> {
        if !is_capable(&io::stderr()) {
            return None;
        }
        let (stop, stopped) = mpsc::channel::<()>();
        let thread = thread::Builder::new()
            .name("live block".to_owned())
            .spawn(move || {
                while stopped.recv_timeout(REDRAW_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    let block = lines(&|| lock().size());
                    lock().draw(block);
                }
            })
            .ok()?;
        Some(LiveBlock {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for LiveBlock {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let mut state = lock();
        state.draw(Vec::new());
        state.terminal = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(texts: &[&str]) -> Vec<Line> {
        let line = |text: &&str| Line {
            text: (*text).to_owned(),
            width: text.len(),
        };
        texts.iter().map(line).collect()
    }

    #[test]
    fn only_what_has_changed_is_written() {
        for (drawn, above, block, bytes) in [
            (&[][..], None, &["a", "b"][..], "a\x1b[K\r\nb\x1b[K\r\n"),
            (&["a", "b"], None, &["a", "c"], "\r\x1b[2A\r\nc\x1b[K\r\n"),
            (&["a", "b"], None, &["b"], "\r\x1b[2Ab\x1b[K\r\n\x1b[J"),
            (&["a"], None, &[], "\r\x1b[1A\x1b[J"),
            (&["a"], None, &["a", "b"], "\r\x1b[1A\r\nb\x1b[K\r\n"),
            (&["a"], Some("told"), &["a"], "\r\x1b[1A\x1b[Jtold\na\x1b[K\r\n"),
            (&[], Some("told"), &[], "told\n"),
            // Ten columns were taken by a terminal that has four now.
            (&["0123456789"], None, &["012"], "\r\x1b[3A\x1b[J012\x1b[K\r\n"),
        ] {
            let (old, new) = (lines(drawn), lines(block));
            assert_eq!(
                repaint(&old, above, &new, 4),
                bytes,
                "{drawn:?} {above:?} {block:?}"
            );
        }
    }
}
