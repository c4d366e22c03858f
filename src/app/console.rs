//! `castra console`.
//!
//! Here: the terminal's raw mode, which every way out undoes, and the messages at begin and end. Not here:
//! attaching and relaying (`core::console`).

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use castra::core::cancel::Cancel;
use castra::core::console::Console;
use castra::core::console::bridge::{Bridge, BridgeEnd};
use castra::core::failure::{Exit, Failure, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::context::Context;
use super::{find_project, operands, terminal};
use crate::cli::{Command, Raw};

/// Ctrl-], as with `virsh console` and telnet.
const ESCAPE: u8 = 0x1d;

/// How long castra prints the guest's output after a piped input has ended.
const QUIET: Duration = Duration::from_secs(2);

/// How much earlier output is shown; `castra logs` has all of it.
const MAX_LINES: usize = 100;

/// QEMU closes its sockets before it is gone.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Attaches the terminal, or a pipe, to the console of a VM.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let name = raw.operands.first().map(operands::name).transpose()?;
    let selected = find_project::project(raw)?;
    let vm = match &name {
        Some(name) => find_project::vm(&selected, name)?,
        None => find_project::only_vm(&selected, Command::Console)?,
    };
    // Before raw mode, so that an interrupted castra restores the terminal.
    let cancel = context.end_on_signals();
    let console = Console::attach(&selected.state(), &vm)?;
    context.out.finish()?;
    let interactive = io::stdin().is_terminal();
    if interactive {
        context.say(&format!(
            "attached to the console of vm `{vm}`: Ctrl-] leaves it; if nothing shows, press Enter"
        ));
    }
    let end = {
        let _raw = if interactive { Terminal::raw()? } else { None };
        if io::stdout().is_terminal() {
            let lines = terminal::size().rows.saturating_sub(2).min(MAX_LINES);
            write_all(console.last_lines(lines).as_bytes())?;
        }
        relay(&console, raw, interactive, cancel)?
    };
    if interactive {
        // The guest's last line, often a prompt, usually has no line end.
        context.say("");
    }
    let words = match end {
        BridgeEnd::Closed if console.vm_ends_within(GONE_WITHIN) => format!("vm `{vm}` has ended"),
        BridgeEnd::Closed => {
            return Err(
                Failure::new(Exit::Io, format!("the console of vm `{vm}` was closed"))
                    .because("QEMU closed it and still runs")
                    .advice("castra status"),
            );
        }
        BridgeEnd::Left => format!("left the console of vm `{vm}`, which keeps running"),
        BridgeEnd::InputEnded | BridgeEnd::ReaderGone => String::new(),
        BridgeEnd::Cancelled => return Ok(Exit::Interrupted),
    };
    if !words.is_empty() {
        context.say(&words);
    }
    Ok(Exit::Done)
}

fn relay(console: &Console, raw: &Raw, interactive: bool, cancel: Cancel) -> Result<BridgeEnd> {
    let output = duplicate(io::stdout())?;
    Bridge {
        input: duplicate(io::stdin())?,
        output: Box::new(std::fs::File::from(output)),
        escape: interactive.then_some(ESCAPE),
        quiet: QUIET,
        raw: raw.raw,
        cancel,
    }
    .run(console.stream())
}

fn duplicate(stream: impl AsFd) -> Result<OwnedFd> {
    stream
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| Failure::new(Exit::Internal, "can't duplicate a descriptor").because(error))
}

/// Writes to stdout without buffering.
fn write_all(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::fs::File::from(duplicate(io::stdout())?);
    match io::Write::write_all(&mut stdout, bytes) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Io, "can't write to stdout").because(error))
        }
        _ => Ok(()),
    }
}

/// The terminal in raw mode; as it was before when this is dropped, at a panic too.
struct Terminal {
    before: Termios,
}

impl Terminal {
    /// Every key goes to the guest, Ctrl-C and Ctrl-Z included. `None`: there is no such terminal.
    fn raw() -> Result<Option<Terminal>> {
        // castra must not be suspended by a signal from outside either: it would read nothing, and the guest
        // would wait.
        let mut masked = SigSet::empty();
        masked.add(Signal::SIGTSTP);
        let _ = masked.thread_block();
        let Ok(before) = tcgetattr(io::stdin()) else {
            return Ok(None);
        };
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)
            .map_err(|errno| Failure::new(Exit::Io, "can't put the terminal into raw mode").because(errno))?;
        Ok(Some(Terminal { before }))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Input typed after the escape key must not reach the shell.
        let _ = tcsetattr(io::stdin(), SetArg::TCSAFLUSH, &self.before);
    }
}
