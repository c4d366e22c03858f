//! A pseudo-terminal with castra in it.
//!
//! Here: the window, what is typed into it, what it shows. Not here: how bytes become a picture
//! (`emulator`).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::{Winsize, openpty};

use super::emulator::Terminal;
use crate::support::{Castra, eventually, eventually_in};

/// What stands behind the end of the program: where a shell would ask for the next command.
const PROMPT: &str = "$ ";

/// A window in which a castra runs.
pub struct Window {
    terminal: Arc<Mutex<Terminal>>,
    keyboard: File,
    screen: OwnedFd,
    child: Child,
}

impl Window {
    /// A window of this size, in which a shell runs castra and then says how it ended.
    pub fn run(castra: &Castra, rows: u16, columns: u16, env: &[(&str, &str)], args: &[&str]) -> Window {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(&size, None).unwrap();
        keep(&pty.master);
        keep(&pty.slave);
        let own = castra.command(args);
        let mut command = Command::new("setsid");
        // The shell itself must outlive Ctrl-C.
        command
            .args(["--ctty", "--wait", "sh", "-c"])
            .arg(format!(
                "trap : INT; \"$@\"; echo \"exit $?\"; printf '{PROMPT}'; read -r _"
            ))
            .args([own.get_program(), own.get_program()])
            .args(args)
            .current_dir(castra.project())
            .env_clear()
            .envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .env("TERM", "xterm-256color")
            .envs(env.iter().copied())
            .stdin(Stdio::from(pty.slave.try_clone().unwrap()))
            .stdout(Stdio::from(pty.slave.try_clone().unwrap()))
            .stderr(Stdio::from(pty.slave.try_clone().unwrap()));
        let child = command.spawn().unwrap();
        let terminal = Arc::new(Mutex::new(Terminal::new(rows.into(), columns.into())));
        let mut output = File::from(pty.master.try_clone().unwrap());
        let picture = Arc::clone(&terminal);
        // It ends with the window: nobody has the other side open any more.
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count) = output.read(&mut bytes) {
                picture.lock().unwrap().feed(&bytes[..count]);
            }
        });
        Window {
            terminal,
            keyboard: File::from(pty.master),
            screen: pty.slave,
            child,
        }
    }

    /// Looks at it.
    pub fn see<T>(&self, look: impl FnOnce(&Terminal) -> T) -> T {
        look(&self.terminal.lock().unwrap())
    }

    /// Waits until it shows this.
    #[track_caller]
    pub fn shows(&self, what: &str, look: impl Fn(&Terminal) -> bool) {
        eventually_in(what, || self.picture(), || self.see(&look).then_some(()));
    }

    /// All of it, for messages.
    pub fn picture(&self) -> String {
        self.see(|terminal| terminal.text().join("\n"))
    }

    /// Ctrl-C.
    pub fn interrupt(&mut self) {
        self.keyboard.write_all(b"\x03").unwrap();
    }

    /// Makes it this large, as if it was dragged.
    pub fn resize(&self, rows: u16, columns: u16) {
        let mut terminal = self.terminal.lock().unwrap();
        terminal.resize(rows.into(), columns.into());
        let slave = self.screen.try_clone().unwrap();
        let status = Command::new("stty")
            .args(["rows", &rows.to_string(), "cols", &columns.to_string()])
            .stdin(Stdio::from(slave))
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// Waits for castra's end; what it leaves on the screen above the prompt, which must stand at the
    /// beginning of a line.
    #[track_caller]
    pub fn ends(&self, code: i32) -> Vec<String> {
        let exit = format!("exit {code}");
        self.shows(&format!("`{exit}` and the prompt"), |terminal| {
            let text = terminal.text();
            let last: Vec<&String> = text.iter().filter(|line| !line.is_empty()).collect();
            matches!(last[..], [.., before, prompt] if *before == exit && prompt == PROMPT.trim_end())
        });
        let mut text = self.see(Terminal::text);
        text.truncate(text.iter().position(|line| *line == exit).unwrap());
        text
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // Whatever still runs there is asked to stop, twice where once isn't enough; then the shell
        // gets its line.
        let child = &mut self.child;
        let keyboard = &mut self.keyboard;
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually("the shell's end", || {
                let _ = keyboard.write_all(b"\x03\n");
                child.try_wait().unwrap()
            })
        }));
    }
}

/// Later children must not inherit this descriptor.
fn keep(descriptor: &OwnedFd) {
    fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
}
