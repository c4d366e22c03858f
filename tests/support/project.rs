//! A project whose VMs run on the stand-in for QEMU, and what tests ask of it.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Castra, Ran, eventually, files_below, objects, objects_in, processes_of, until};

/// The stand-in for QEMU.
pub const FAKE_QEMU: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/fake-qemu.py");

/// Two VMs that need no image.
pub const TWO: &str =
    "[[vms]]\nname = \"web\"\nkernel = \"vmlinuz\"\n[[vms]]\nname = \"db\"\nkernel = \"vmlinuz\"\n";
/// One VM that needs no image.
pub const ONE: &str = "[[vms]]\nname = \"web\"\nkernel = \"vmlinuz\"\n";
/// To be put behind [`ONE`]: a bootstrap, which no guest will ever answer.
pub const SCRIPT: &str =
    "[vms.bootstrap]\nmode = \"auto\"\nscript = \"run.sh\"\nhandshake_timeout_secs = 600\n";

/// To be the VMs of a project: one whose stand-in is told to do `word`; `rest` is put behind it.
pub fn faking(word: &str, rest: &str) -> String {
    format!("{ONE}qemu_args = [\"-fake\", \"{word}\"]\n{rest}")
}

/// A castra with a project. At its end nothing of it may be left running.
pub struct Project {
    castra: Castra,
}

impl Project {
    /// A project with these VMs; its QEMU is the stand-in.
    pub fn new(name: &str, vms: &str) -> Project {
        let project = Project {
            castra: Castra::new(name),
        };
        project.castra.write("vmlinuz", "not really a kernel");
        project.castra.write("run.sh", "#!/bin/sh\n");
        project.config(vms);
        project
    }

    /// Replaces the VMs of the config.
    pub fn config(&self, vms: &str) {
        self.config_with("[broker]\nport = 0\n", vms);
    }

    /// Replaces the VMs of the config, and what stands before them.
    pub fn config_with(&self, head: &str, vms: &str) {
        let text = format!(
            "version = \"0.2.0\"\n[project]\nname = \"faults\"\nstate_dir = \"state\"\n\
             [qemu]\nbinary = \"{FAKE_QEMU}\"\naccel = \"tcg\"\n\
             [bootstrap]\nmode = \"skip\"\n[lifecycle]\ngraceful_shutdown_wait_secs = 60\nsigterm_wait_secs = 60\n{head}{vms}"
        );
        self.castra.write("castra.toml", &text);
    }

    pub fn castra(&self) -> &Castra {
        &self.castra
    }

    /// A file of the state root.
    pub fn state(&self, name: &str) -> PathBuf {
        self.castra.state(name)
    }

    /// Writes a file of the state root.
    pub fn write_state(&self, name: &str, text: &str) {
        self.castra.write(&format!("state/{name}"), text);
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        self.castra.run(args)
    }

    /// Runs it with the stand-in told to do `fake`.
    pub fn run_faking(&self, fake: &str, args: &[&str]) -> Ran {
        self.run_with(&[("CASTRA_FAKE_QEMU", fake)], args)
    }

    /// Runs it with these variables in its environment.
    pub fn run_with<V: AsRef<OsStr>>(&self, env: &[(&str, V)], args: &[&str]) -> Ran {
        let mut command = self.castra.command(args);
        for (name, value) in env {
            command.env(name, value);
        }
        finish(command, args)
    }

    /// The one line with which `--json` tells of a refusal.
    #[track_caller]
    pub fn refused(&self, code: i32, args: &[&str]) -> Refusal {
        Refusal::of(self.run(&[&["--json"], args].concat()).exits(code))
    }

    /// Begins a run; its events are read as they come.
    pub fn begin(&self, fake: &str, args: &[&str]) -> Running {
        let mut child = self
            .castra
            .command(&[args, &["--json"]].concat())
            .env("CASTRA_FAKE_QEMU", fake)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Running {
            child,
            lines,
            seen: Vec::new(),
        }
    }

    pub fn status(&self) -> Value {
        self.castra.status()
    }

    /// What `status` says of one VM.
    pub fn vm(&self, name: &str) -> Value {
        self.castra.vm(name)
    }

    /// What the broker has told of one step of its VMs' lives.
    pub fn broker_told(&self, phase: &str) -> Vec<Value> {
        let mut events = objects_in(&self.state("logs/events-broker.jsonl"));
        events.retain(|event| is_phase(event, phase));
        events
    }

    /// The pid of a VM that runs.
    #[track_caller]
    pub fn pid(&self, vm: &str) -> u32 {
        let vm = self.vm(vm);
        assert_eq!(vm["state"], "running", "{vm}");
        vm["pid"].as_u64().unwrap().try_into().unwrap()
    }

    /// Takes down at once what ignores its power button.
    #[track_caller]
    pub fn down_at_once(&self) {
        self.run(&["down", "--graceful-wait-secs", "0"]).exits(0);
        self.assert_nothing_left();
    }

    /// Takes all down and asserts that nothing which only a living project may have is left.
    #[track_caller]
    pub fn down(&self) -> Ran {
        let ran = self.run(&["down", "--json"]).exits(0);
        self.assert_nothing_left();
        ran
    }

    /// No process, socket, pid file or overlay; and a journal of whole lines.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        self.assert_no_process();
        let left: Vec<PathBuf> = files_below(&self.state(""))
            .into_iter()
            .filter(|path| {
                let name = path.file_name().unwrap().to_string_lossy();
                name.ends_with(".sock") || name.ends_with(".qcow2") || name == "qemu.pid" || name == "ssh.ctl"
            })
            .collect();
        assert_eq!(left, Vec::<PathBuf>::new());
        self.assert_journal_whole();
    }

    /// A broker gives up its lock, which is what `down` waits for, a moment before it is gone.
    #[track_caller]
    pub fn assert_no_process(&self) {
        let what = format!("the end of {:?}", self.processes());
        until(&what, || self.processes().is_empty());
    }

    #[track_caller]
    pub fn assert_journal_whole(&self) {
        let kept = fs::read_to_string(self.state("logs/events.jsonl")).unwrap_or_default();
        assert!(kept.is_empty() || kept.ends_with('\n'), "a torn line at the end");
        objects(&kept);
    }

    /// Command lines of what this project has running: stand-ins, brokers, masters.
    pub fn processes(&self) -> Vec<String> {
        processes_of(self.castra.dir())
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        let _ = self.run(&["--quiet", "down"]);
        if std::thread::panicking() {
            let kept = fs::read_to_string(self.state("logs/events.jsonl")).unwrap_or_default();
            eprintln!("--- the journal\n{kept}");
        }
    }
}

/// Runs a command that isn't plainly [`Castra::run`].
pub fn finish(mut command: Command, args: &[&str]) -> Ran {
    Ran::of(args, command.output().unwrap())
}

/// A refusal in JSON and as text.
#[derive(Debug)]
pub struct Refusal {
    pub detail: String,
    pub remediation: String,
    /// What people see.
    pub stderr: String,
    /// The lines before it.
    pub before: Vec<Value>,
}

impl Refusal {
    /// The refusal that a run with `--json` ended with: the only line, or before the end of what
    /// was accepted.
    #[track_caller]
    pub fn of(ran: Ran) -> Refusal {
        let mut before = ran.objects();
        let rejected = |line: &Value| line["type"] == "command.rejected";
        let at = before.iter().position(rejected);
        let rest = before.split_off(at.unwrap_or_else(|| panic!("no refusal: {ran:?}")));
        let last = &rest[0];
        let end: Vec<&str> = rest[1..]
            .iter()
            .filter_map(|line| line["type"].as_str())
            .collect();
        match before.is_empty() {
            true => assert_eq!(end, [""; 0], "{ran:?}"),
            false => assert_eq!(end, ["command.failed", "summary"], "{ran:?}"),
        }
        assert_eq!(last["exit_status"].as_i64(), ran.code.map(i64::from), "{ran:?}");
        let text = |key: &str| {
            last[key]
                .as_str()
                .unwrap_or_else(|| panic!("no {key}: {last}"))
                .to_owned()
        };
        Refusal {
            detail: text("detail"),
            remediation: text("remediation"),
            stderr: ran.stderr.clone(),
            before,
        }
    }

    /// Its detail holds all of these.
    #[track_caller]
    pub fn tells(self, words: &[&str]) -> Refusal {
        for word in words {
            assert!(self.detail.contains(word), "no {word:?} in {self:#?}");
        }
        self
    }

    /// Its remediation holds this.
    #[track_caller]
    pub fn advises(self, word: &str) -> Refusal {
        assert!(self.remediation.contains(word), "no {word:?} in {self:#?}");
        self
    }

    /// Nothing ran before it.
    #[track_caller]
    pub fn alone(self) -> Refusal {
        assert!(self.before.is_empty(), "{self:#?}");
        self
    }
}

/// A running castra.
pub struct Running {
    pub child: Child,
    lines: BufReader<ChildStdout>,
    pub seen: Vec<Value>,
}

impl Running {
    /// Reads on to the first event like this.
    #[track_caller]
    pub fn until(&mut self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        self.until_line(what, |event, _| is(event))
    }

    /// Reads on to the first event like this, which may look at its line too.
    #[track_caller]
    pub fn until_line(&mut self, what: &str, is: impl Fn(&Value, &str) -> bool) -> Value {
        let mut line = String::new();
        loop {
            line.clear();
            if self.lines.read_line(&mut line).unwrap() == 0 {
                panic!("it ended before {what}: {:#?}", self.seen);
            }
            let event: Value = serde_json::from_str(&line).unwrap();
            self.seen.push(event.clone());
            if is(&event, line.trim_end_matches('\n')) {
                return event;
            }
        }
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(pid, signal).unwrap();
    }

    /// Waits for its end; its code (none after a signal) and all its events.
    pub fn end(mut self) -> (Option<i32>, Vec<Value>) {
        let mut line = String::new();
        while self.lines.read_line(&mut line).unwrap() > 0 {
            self.seen.push(serde_json::from_str(&line).unwrap());
            line.clear();
        }
        let status = eventually("its end", || self.child.try_wait().unwrap());
        (status.code(), std::mem::take(&mut self.seen))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether an event is this step of one VM's life.
pub fn is_phase(event: &Value, phase: &str) -> bool {
    event["type"] == "vm.lifecycle" && event["phase"] == phase
}

/// Whether an event says that a bootstrap has begun; its first step waits for a guest that never speaks.
pub fn is_waiting(event: &Value) -> bool {
    event["type"] == "bootstrap.started"
}
