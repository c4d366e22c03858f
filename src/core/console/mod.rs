//! A guest's serial console: attaching a terminal to it.
//!
//! Here: who may attach, the connection, the last lines before it. In the submodules: which of the
//! guest's bytes a terminal gets ([`filter`]), and copying in both directions without either side
//! waiting for the other ([`bridge`]). Not here: the terminal's modes, and messages for people
//! (`app::console`).
//!
//! QEMU serves one client at a time: the kernel accepts a second one, which gets nothing until the
//! first leaves. So a client holds `vms/<vm>/console.lock`, and checks whether QEMU already has a
//! client without the lock.

pub mod backlog;
pub mod bridge;
pub mod filter;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::core::cancel::{Cancel, POLL_INTERVAL};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, FileLock, LockError};
use crate::core::name::VmName;
use crate::core::root::alive::qemu_pid;
use crate::core::root::paths::{StateRoot, VmPaths, vm_file};
use crate::core::runtime::launch::gone_within;
use crate::core::runtime::restart_advice;

use filter::TerminalFilter;

/// Who holds the lock, as whoever finds it held is told.
const NOTE: &str = "castra console";

/// How long QEMU may take to notice that its client has left: an idle one takes 1 ms.
const LEAVES_WITHIN: Duration = Duration::from_secs(2);

/// As much of the end of `serial.log` as is looked at for the last lines.
const TAIL: u64 = 64 * 1024;

/// An attached console: nobody else is attached while it lives.
#[derive(Debug)]
pub struct Console {
    paths: VmPaths,
    stream: UnixStream,
    _lock: FileLock,
}

impl Console {
    /// Attaches to the console of a VM that runs and whose console nobody else has.
    pub fn attach(state: &StateRoot, vm: &VmName) -> Result<Console> {
        let paths = state.vm(vm);
        let cant = || format!("can't attach to the console of vm `{vm}`");
        let Some(qemu) = qemu_pid(&paths) else {
            return Err(
                Failure::new(Exit::Failed, format!("vm `{vm}` is not running")).advice(format!(
                    "{}; `castra logs --source serial {vm}` shows what it wrote last",
                    restart_advice::advice(&paths, vm)
                )),
            );
        };
        let busy = |why: String| {
            Failure::new(Exit::Busy, format!("the console of vm `{vm}` is in use"))
                .because(why)
                .advice(format!(
                    "QEMU takes one client at a time: end that client, or follow the output with `castra logs -f --source serial {vm}`"
                ))
        };
        let lock_path = paths.console_lock();
        let lock = FileLock::try_take(&lock_path, NOTE).map_err(|error| match error {
            LockError::Held(holder) => busy(held_by(&holder)),
            LockError::Io(error) => Failure::io("create", &lock_path, &error),
        })?;
        if is_taken(qemu) {
            let who = "a program that isn't castra is attached to";
            return Err(busy(format!(
                "{who} {}",
                paths.file(vm_file::SERIAL_SOCK).display()
            )));
        }
        let directory = File::open(paths.dir()).map_err(|error| Failure::io("read", paths.dir(), &error))?;
        let stream =
            UnixStream::connect(host::short_path(&directory, vm_file::SERIAL_SOCK)).map_err(|error| {
                Failure::new(Exit::Io, cant())
                    .because(format!("{}: {error}", paths.file(vm_file::SERIAL_SOCK).display()))
                    .advice(format!(
                        "castra status; `castra logs --source serial {vm}` shows what it writes"
                    ))
            })?;
        Ok(Console {
            paths,
            stream,
            _lock: lock,
        })
    }

    /// The connection to QEMU.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether the VM's QEMU ends within this time.
    pub fn vm_ends_within(&self, limit: Duration) -> bool {
        gone_within(&self.paths, limit)
    }

    /// The last lines that the guest wrote before, fit for a terminal: without colours and cursor
    /// movements, which belong to a picture that isn't there any more. The last one has no end if
    /// the guest is in the middle of it, as after a prompt.
    pub fn last_lines(&self, count: usize) -> String {
        last_lines(&host::tail_of(&self.paths.file(vm_file::SERIAL_LOG), TAIL), count)
    }
}

/// Whether QEMU has a client. It takes a moment to notice that one has left.
fn is_taken(qemu: u32) -> bool {
    !Cancel::new().wait_until(LEAVES_WITHIN, POLL_INTERVAL, || {
        !host::has_client(qemu, vm_file::SERIAL_SOCK)
    })
}

/// What a lock's note says of its holder.
fn held_by(note: &str) -> String {
    match note.split_once(' ') {
        Some((pid, what)) if pid.bytes().all(|byte| byte.is_ascii_digit()) => {
            format!("{what} (pid {pid}) has it")
        }
        _ => "another castra console has it".to_owned(),
    }
}

fn last_lines(log: &str, count: usize) -> String {
    let mut filtered = Vec::new();
    TerminalFilter::new().feed(log.as_bytes(), &mut filtered);
    let text = plain(&String::from_utf8_lossy(&filtered));
    let ended = text.ends_with('\n');
    let lines: Vec<&str> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(count)..];
    let mut tail = shown.join("\r\n");
    if ended && !shown.is_empty() {
        tail.push_str("\r\n");
    }
    tail
}

/// Filtered text without what is left of control sequences and characters.
fn plain(filtered: &str) -> String {
    let mut text = String::with_capacity(filtered.len());
    let mut rest = filtered.chars();
    while let Some(c) = rest.next() {
        match c {
            '\x1b' => match rest.next() {
                Some('[') => drop(rest.by_ref().find(|c| ('@'..='~').contains(c))),
                Some('(' | ')') => drop(rest.next()),
                _ => {}
            },
            '\n' | '\t' => text.push(c),
            c if c.is_control() => {}
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_text_alone() {
        let log = "one\r\ntwo \x1b[31mred\x1b[0m\r\n\x1b]0;title\x07three\r\n\x1b[2J\x1b[H/ # ";
        assert_eq!(last_lines(log, 2), "three\r\n/ # ");
        assert_eq!(last_lines(log, 100), "one\r\ntwo red\r\nthree\r\n/ # ");
        assert_eq!(last_lines("a\r\nb\r\n", 1), "b\r\n");
        assert_eq!(
            (last_lines("", 5), last_lines("a", 0)),
            (String::new(), String::new())
        );
        assert_eq!(last_lines("\x1b(0lqk\x1b(B\x08x", 1), "lqkx");
    }

    #[test]
    fn holders_are_named() {
        assert_eq!(held_by("4711 castra console"), "castra console (pid 4711) has it");
        assert_eq!(held_by(""), "another castra console has it");
    }
}
