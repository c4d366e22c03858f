//! `castra harness run --in VM`: an agent inside a guest. The guest is a real sshd on the loopback,
//! the agent a script; how it works there, and how it ends when the clock, the host or the
//! connection wants it to.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use castra::core::root::records::RunRecord;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::fleet::Fleet;
use support::sshd::{self, Sshd, keygen};
use support::{Castra, eventually, is_alive, objects, program, until};

const SAYS: &str = r#"printf '%s\n' '{"type":"thread.started","thread_id":"t-1"}' '{"type":"turn.started"}'"#;
const DONE: &str = r#"printf '%s\n' '{"type":"item.completed","item":{"id":"i","type":"agent_message","text":"done"}}' '{"type":"turn.completed","usage":{"input_tokens":9,"output_tokens":1}}'"#;
/// Starts something of its own and waits; whoever ends it has to end both.
const HANGS: &str = "sleep 1000 & echo $! >child; echo $$ >self; wait";

/// A project with one VM that runs and has an sshd.
struct Guest {
    castra: Castra,
    fleet: Fleet,
    sshd: Sshd,
}

impl Guest {
    /// `script` is the guest's `codex`.
    fn new(name: &str, script: &str) -> Guest {
        let castra = Castra::new(name);
        let mut fleet = Fleet::new();
        let config = "version = \"0.2.0\"\n[project]\nname = \"demo\"\nstate_dir = \"state\"\n[[vms]]\nname = \"web\"\n";
        fs::write(fleet.dir().join("castra.toml"), config).unwrap();
        let bin = fleet.dir().join("bin");
        program(&bin.join("codex"), format!("#!/bin/sh\n{script}\n"));
        let key = fleet.state.ssh_key();
        keygen(&key);
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        let sshd = Sshd::start_with(&fleet.dir().join("sshd"), &key.with_extension("pub"), &path, "");
        let user = sshd::login();
        fleet.run("web", 1000, |run: &mut RunRecord| {
            run.ssh.port = Some(sshd.port());
            run.ssh.user = user;
        });
        fleet.hold("web");
        Guest { castra, fleet, sshd }
    }

    /// Where the agent works.
    fn work(&self) -> PathBuf {
        let work = self.fleet.dir().join("work");
        fs::create_dir_all(&work).unwrap();
        work
    }

    fn command(&self, flags: &[&str]) -> Command {
        let config = self.fleet.dir().join("castra.toml");
        let work = self.work();
        let fixed = [
            "--config",
            config.to_str().unwrap(),
            "harness",
            "run",
            "--json",
            "--in",
            "WEB",
        ];
        let place = ["--cwd", work.to_str().unwrap()];
        let prompt = ["--", "it's `$HOME`\nand more"];
        let args = [&fixed[..], &place, flags, &prompt].concat();
        let mut command = self.castra.command(&args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, flags: &[&str]) -> (Option<i32>, Vec<Value>) {
        told(self.command(flags).output().unwrap())
    }

    /// The pids that [`HANGS`] wrote down.
    fn pids(&self) -> [String; 2] {
        let read = |name: &str| {
            let text = fs::read_to_string(self.work().join(name)).ok()?;
            text.ends_with('\n').then(|| text.trim().to_owned())
        };
        eventually("the agent to run", || Some([read("child")?, read("self")?]))
    }

    /// The agent runs, and what it said has come through.
    fn is_at_work(&self) {
        self.pids();
        let transcript = self.fleet.state.harness_logs().join("t-1.jsonl");
        eventually("the transcript to hold what was said", || {
            fs::read_to_string(&transcript)
                .ok()?
                .contains("turn.started")
                .then_some(())
        });
    }

    /// Nothing of the agent is left in the guest.
    fn is_quiet(&self) {
        for pid in self.pids() {
            until("the agent to be gone from the guest", || !is_alive(&pid));
        }
    }
}

fn told(output: Output) -> (Option<i32>, Vec<Value>) {
    let events = objects(&String::from_utf8(output.stdout).unwrap());
    assert!(!events.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code(), events)
}

fn verdict(events: &[Value]) -> &str {
    let last = events.last().unwrap();
    assert_eq!(last["type"], "summary");
    last["verdict"].as_str().unwrap()
}

#[test]
fn the_agent_works_in_the_guest() {
    let guest = Guest::new(
        "inside",
        &format!("cat >stdin; for word in \"$@\"; do printf '%s\\0' \"$word\"; done >argv\n{SAYS}\n{DONE}"),
    );
    let (code, events) = guest.run(&[]);
    assert_eq!((code, verdict(&events)), (Some(0), "complete"), "{events:?}");
    assert_eq!(fs::read(guest.work().join("stdin")).unwrap(), b"");
    let argv = fs::read_to_string(guest.work().join("argv")).unwrap();
    assert!(argv.starts_with("exec\0--json\0--\0"), "{argv}");
    assert!(argv.ends_with("Your task:\nit's `$HOME`\nand more\0"), "{argv}");
    assert!(
        argv.contains("inside its throw-away virtual machine `web`"),
        "{argv}"
    );
    assert!(
        !argv.contains("--workspace"),
        "castra is out of its reach: {argv}"
    );
    let kept = guest.fleet.state.harness_logs().join("t-1.json");
    let record: Value = serde_json::from_slice(&fs::read(kept).unwrap()).unwrap();
    assert_eq!(record["sessions"][0]["vm"], "web");
}

#[test]
fn a_long_prompt_reaches_it_past_start_up_files_that_print() {
    let guest = Guest::new(
        "inside-long",
        &format!("for word in \"$@\"; do printf '%s\\0' \"$word\"; done >argv\n{SAYS}\n{DONE}"),
    );
    for name in [".bashrc", ".profile", ".zshenv"] {
        fs::write(
            guest.fleet.dir().join("sshd").join(name),
            "printf '\\033]0;title\\007'\n",
        )
        .unwrap();
    }
    let long = format!("begin{}end", "x".repeat(100_000));
    let mut command = guest.command(&[]);
    command.arg(&long);
    let (code, events) = told(command.output().unwrap());
    assert_eq!((code, verdict(&events)), (Some(0), "complete"), "{events:?}");
    assert!(
        fs::read_to_string(guest.work().join("argv"))
            .unwrap()
            .contains(&long)
    );
    let mut command = guest.command(&[]);
    command.args([&long, &long]);
    assert_eq!(told(command.output().unwrap()).0, Some(64));
}

#[test]
fn its_exit_and_its_absence_are_told() {
    let guest = Guest::new("inside-exit", "echo 'no login' >&2; exit 9");
    let (code, events) = guest.run(&[]);
    assert_eq!((code, verdict(&events)), (Some(1), "failed"));
    let stderr = events
        .iter()
        .find(|event| event["data"]["kind"] == "stderr")
        .unwrap();
    assert!(stderr["text"].as_str().unwrap().contains("no login"), "{stderr}");
    let (code, events) = guest.run(&["--codex", "no-such-codex"]);
    assert_eq!(code, Some(69));
    let rejected = events
        .iter()
        .find(|event| event["type"] == "command.rejected")
        .unwrap();
    assert!(
        rejected["detail"]
            .as_str()
            .unwrap()
            .contains("no `no-such-codex` in vm `web`"),
        "{rejected}"
    );
    assert_eq!(
        events.iter().filter(|event| event["type"] == "summary").count(),
        1
    );
    assert_eq!(verdict(&events), "failed");
}

#[test]
fn a_time_out_ends_it_there() {
    let guest = Guest::new("inside-time-out", &format!("{SAYS}\ntrap '' TERM\n{HANGS}"));
    let (code, events) = guest.run(&["--idle-timeout", "2s"]);
    assert_eq!((code, verdict(&events)), (Some(1), "timed out"));
    guest.is_quiet();
}

#[test]
fn ctrl_c_ends_it_there() {
    let guest = Guest::new("inside-ctrl-c", &format!("{SAYS}\n{HANGS}"));
    let child = guest.command(&[]).spawn().unwrap();
    guest.is_at_work();
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    let (code, events) = told(child.wait_with_output().unwrap());
    assert_eq!((code, verdict(&events)), (Some(130), "incomplete"));
    guest.is_quiet();
}

#[test]
fn a_broken_connection_ends_it_there() {
    let guest = Guest::new("inside-cut", &format!("{SAYS}\n{HANGS}"));
    let child = guest.command(&[]).spawn().unwrap();
    guest.is_at_work();
    guest.sshd.cut();
    let (code, events) = told(child.wait_with_output().unwrap());
    assert_eq!((code, verdict(&events)), (Some(1), "incomplete"));
    guest.is_quiet();
}

#[test]
fn a_killed_castra_leaves_nothing_there() {
    let guest = Guest::new("inside-killed", &format!("{SAYS}\n{HANGS}"));
    let mut child = guest.command(&[]).spawn().unwrap();
    guest.is_at_work();
    child.kill().unwrap();
    child.wait().unwrap();
    guest.is_quiet();
}
