//! The real binary in a fresh directory.
//!
//! A [`Castra`] has a home (CASTRA_HOME) and a project directory of its own, knows nothing of the
//! environment of whoever runs the tests, and leaves nothing behind: at its end it takes down what
//! still runs and removes its directory.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::scratch::Scratch;
use super::{journals, objects, spawn_piped, until};

/// The binary under test.
pub const CASTRA: &str = env!("CARGO_BIN_EXE_castra");

/// A castra with nothing around it.
pub struct Castra {
    dir: Scratch,
    /// A test has put lines of its own into a journal.
    made_up: AtomicBool,
}

/// What one run left.
#[derive(Debug)]
pub struct Ran {
    /// Arguments, for messages.
    pub args: String,
    /// Exit code; `None`: ended by a signal.
    pub code: Option<i32>,
    /// Its stdout.
    pub stdout: String,
    /// Its stderr.
    pub stderr: String,
}

impl Castra {
    /// A fresh one; `name` goes into the directory's name.
    pub fn new(name: &str) -> Castra {
        let dir = Scratch::new(name);
        fs::create_dir(dir.path("project")).unwrap();
        Castra {
            dir,
            made_up: AtomicBool::new(false),
        }
    }

    /// The directory that everything lies in.
    pub fn dir(&self) -> &Path {
        self.dir.dir()
    }

    /// CASTRA_HOME.
    pub fn home(&self) -> PathBuf {
        self.dir.path("home")
    }

    /// The working directory.
    pub fn project(&self) -> PathBuf {
        self.dir.path("project")
    }

    /// A file of a state root that is the project's `state`.
    pub fn state(&self, name: &str) -> PathBuf {
        self.project().join("state").join(name)
    }

    /// Writes a file of the project, with the directories above it.
    pub fn write(&self, path: &str, text: &str) -> PathBuf {
        if path.contains("logs/events") {
            self.made_up.store(true, Ordering::Relaxed);
        }
        let path = self.project().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    /// From now on a journal holds lines that no castra has written: they aren't checked.
    pub fn makes_up_events(&self) {
        self.made_up.store(true, Ordering::Relaxed);
    }

    /// The binary with these arguments, in the project directory, stdin empty.
    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(CASTRA);
        command.args(args);
        self.surround(command)
    }

    /// Another program that runs the binary, in the same surroundings.
    pub fn command_of(&self, program: &str) -> Command {
        self.surround(Command::new(program))
    }

    fn surround(&self, mut command: Command) -> Command {
        command
            .current_dir(self.project())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.dir())
            .env("CASTRA_HOME", self.home())
            .stdin(Stdio::null());
        command
    }

    /// Runs it to its end.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Ran {
        let ran = Ran::of(args, self.command(args).output().unwrap());
        if !self.made_up.load(Ordering::Relaxed) {
            journals::check_printed(&ran.stdout, &ran.args);
        }
        ran
    }

    /// The binary under a limit of the shell's (`ulimit -n 100`), in the same surroundings.
    pub fn command_under(&self, limit: &str, args: &[&str]) -> Command {
        let mut shell = self.command_of("sh");
        shell.args(["-c", &format!("{limit} && exec \"$0\" \"$@\""), CASTRA]);
        shell.args(args);
        shell
    }

    /// What `status --json` says.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.run(&["status", "--json"]).exits(0).objects().remove(0)
    }

    /// What it says of one VM.
    #[track_caller]
    pub fn vm(&self, name: &str) -> Value {
        vm_of(&self.status(), name)
    }

    /// Where its broker listens.
    #[track_caller]
    pub fn broker_port(&self) -> u16 {
        let port = self.status()["broker"]["port"].as_u64().unwrap();
        u16::try_from(port).unwrap()
    }

    /// Ends the broker as a crash does, and waits until that is seen.
    #[track_caller]
    pub fn kill_broker(&self) {
        let pid = self.status()["broker"]["pid"].as_i64().unwrap();
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
        until("the broker's end", || {
            self.status()["broker"]["state"] == "offline"
        });
    }

    /// Runs it with this on its stdin.
    pub fn run_with_stdin<S: AsRef<OsStr>>(&self, args: &[S], stdin: &[u8]) -> Ran {
        let mut child = spawn_piped(self.command(args).stdin(Stdio::piped()));
        let mut pipe = child.stdin.take().unwrap();
        let bytes = stdin.to_vec();
        let writer = thread::spawn(move || {
            // A child that ends early reads no more.
            let _ = pipe.write_all(&bytes);
        });
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        Ran::of(args, output)
    }
}

/// One VM of a status.
#[track_caller]
pub fn vm_of(status: &Value, name: &str) -> Value {
    let vms = status["vms"].as_array().unwrap();
    let vm = vms.iter().find(|vm| vm["name"] == name);
    vm.unwrap_or_else(|| panic!("no {name} in {status}")).clone()
}

impl Drop for Castra {
    fn drop(&mut self) {
        let projects = fs::read_dir(self.home().join("projects"))
            .into_iter()
            .flatten()
            .flatten();
        for project in projects {
            let id = project.file_name();
            let args: [&OsStr; 4] = [
                OsStr::new("--quiet"),
                OsStr::new("--workspace"),
                &id,
                OsStr::new("down"),
            ];
            let _ = self.command(&args).output();
        }
        if !self.made_up.load(Ordering::Relaxed) {
            journals::check_below(self.dir());
        }
    }
}

impl Ran {
    /// What a command with these arguments left.
    pub fn of<S: AsRef<OsStr>>(args: &[S], output: Output) -> Ran {
        let args: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
        Ran {
            args: args.join(" "),
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Fails unless it ended with this code.
    #[track_caller]
    pub fn exits(self, code: i32) -> Ran {
        assert_eq!(
            self.code,
            Some(code),
            "castra {}\n--- stdout\n{}\n--- stderr\n{}",
            self.args,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Fails unless its stderr has these words.
    #[track_caller]
    pub fn tells(&self, words: &str) -> &Ran {
        assert!(self.stderr.contains(words), "no {words:?}: {self:?}");
        self
    }

    /// Fails unless its stdout has these words.
    #[track_caller]
    pub fn prints(&self, words: &str) -> &Ran {
        assert!(self.stdout.contains(words), "no {words:?}: {self:?}");
        self
    }

    /// stdout as JSON objects, one a line.
    #[track_caller]
    pub fn objects(&self) -> Vec<Value> {
        objects(&self.stdout)
    }
}
