//! `castra harness run` with the real Codex CLI, which `scripts/install-deps.sh test` puts under
//! target/, against a stand-in of its server on the loopback (tests/support/responses.py). Run by
//! `make test`.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use serde_json::{Value, json};
use support::{Castra, eventually, objects};

const CONFIG: &str =
    "version = \"0.2.0\"\n[project]\nname = \"demo\"\nstate_dir = \"state\"\n[[vms]]\nname = \"web\"\n";
const TRUST: &str = "--codex-arg=--skip-git-repo-check";

/// A project with Codex set up for a stand-in of its server.
struct Stage {
    castra: Castra,
    server: Child,
    /// The server ends when this does.
    _held: ChildStdin,
}

impl Stage {
    fn new(name: &str) -> Stage {
        let castra = Castra::new(name);
        castra.write("castra.toml", CONFIG);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/responses.py");
        let mut server = Command::new("python3")
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let held = server.stdin.take().unwrap();
        let mut port = String::new();
        BufReader::new(server.stdout.as_mut().unwrap())
            .read_line(&mut port)
            .unwrap();
        let config = format!(
            "model = \"stand-in\"\nmodel_provider = \"stand-in\"\napproval_policy = \"never\"\n\
             sandbox_mode = \"danger-full-access\"\n\
             [model_providers.stand-in]\nname = \"stand-in\"\nbase_url = \"http://127.0.0.1:{}/v1\"\n\
             wire_api = \"responses\"\nenv_key = \"STAND_IN_KEY\"\nrequest_max_retries = 0\nstream_max_retries = 0\n",
            port.trim()
        );
        fs::create_dir_all(castra.dir().join("codex")).unwrap();
        fs::write(castra.dir().join("codex/config.toml"), config).unwrap();
        Stage {
            castra,
            server,
            _held: held,
        }
    }

    fn command(&self, flags: &[&str], prompt: &str) -> Command {
        let codex = codex();
        let args = [
            &["harness", "run", "--json", "--codex", codex.to_str().unwrap()],
            flags,
            &["--", prompt],
        ]
        .concat();
        let mut command = self.castra.command(&args);
        command
            .env("CODEX_HOME", self.castra.dir().join("codex"))
            .env("STAND_IN_KEY", "none")
            // All other connections of Codex are refused.
            .env("HTTP_PROXY", "http://127.0.0.1:9")
            .env("HTTPS_PROXY", "http://127.0.0.1:9")
            .env("NO_PROXY", "127.0.0.1")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// In a folder that Codex is told to trust.
    fn run(&self, flags: &[&str], prompt: &str) -> Told {
        Told::of(
            self.command(&[&[TRUST], flags].concat(), prompt)
                .output()
                .unwrap(),
        )
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn codex() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/codex/node_modules/.bin/codex");
    assert!(
        path.exists(),
        "{} is missing: scripts/install-deps.sh test",
        path.display()
    );
    path
}

/// What castra told of one run.
struct Told {
    code: Option<i32>,
    events: Vec<Value>,
}

impl Told {
    fn of(output: Output) -> Told {
        let events = objects(&String::from_utf8(output.stdout).unwrap());
        assert!(!events.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        let told = Told {
            code: output.status.code(),
            events,
        };
        told.is_in_order();
        told
    }

    /// What holds of every stream: one summary at the end, and every command that began has ended.
    fn is_in_order(&self) {
        let count = |kind: &str| self.events.iter().filter(|event| event["type"] == kind).count();
        assert_eq!(count("summary"), 1);
        assert_eq!(self.events.last().unwrap()["type"], "summary");
        assert_eq!(
            count("command.accepted"),
            count("command.completed") + count("command.failed")
        );
        let run = self.events[0]["run"].as_str().unwrap();
        assert!(
            castra::core::host::processes_with("CASTRA_HARNESS_RUN", run).is_empty(),
            "processes are left behind"
        );
    }

    #[track_caller]
    fn ended(self, code: i32, verdict: &str) -> Told {
        let last = self.events.last().unwrap();
        assert_eq!(
            (self.code, &last["verdict"]),
            (Some(code), &json!(verdict)),
            "{:#?}",
            self.events
        );
        self
    }

    fn says(&self, text: &str) -> bool {
        self.events
            .iter()
            .any(|event| event["data"]["kind"] == "agent_message" && event["text"] == text)
    }

    fn of_codex(&self, kind: &str) -> Vec<&Value> {
        self.events
            .iter()
            .filter(|event| event["type"] == kind && event["source"] == "codex")
            .collect()
    }

    fn thread(&self) -> String {
        let begun = self
            .events
            .iter()
            .find(|event| event["data"]["kind"] == "thread")
            .unwrap();
        begun["thread"].as_str().unwrap().to_owned()
    }

    fn prompt_tokens(&self, scope: &str) -> u64 {
        let usage = self
            .of_codex("usage")
            .into_iter()
            .find(|usage| usage["scope"] == scope);
        usage.unwrap()["prompt_tokens"].as_u64().unwrap()
    }
}

#[test]
fn messages_and_commands_of_the_real_codex() {
    let stage = Stage::new("codex-commands");
    let told = stage.run(&[], "play message").ended(0, "complete");
    assert!(told.says("Hello from the stand-in."));
    assert_eq!(
        (told.prompt_tokens("turn"), told.prompt_tokens("thread")),
        (100, 100)
    );

    let told = stage.run(&[], "play command").ended(0, "complete");
    let completed = told.of_codex("command.completed");
    assert_eq!(
        (&completed[0]["exit_status"], &completed[0]["detail"]),
        (&json!(0), &json!("it-works"))
    );
    assert!(
        completed[0]["command"]
            .as_str()
            .unwrap()
            .contains("echo it-works")
    );
    assert!(completed[0]["duration_ms"].is_number());
    assert_eq!(told.prompt_tokens("turn"), 200);

    let told = stage.run(&[], "play exit3").ended(0, "complete");
    let failed = told.of_codex("command.failed");
    assert_eq!(failed[0]["exit_status"], 3);
    // Codex reads stdout and stderr by two pipes, so their order is its own.
    let detail = failed[0]["detail"].as_str().unwrap();
    assert!(
        detail.starts_with("exit status 3: ") && detail.contains("out") && detail.contains("oops"),
        "{detail}"
    );
    assert!(told.says("It failed with 3."));
}

#[test]
fn a_file_change_is_told_and_made() {
    let stage = Stage::new("codex-file");
    let told = stage.run(&[], "play file").ended(0, "complete");
    let change = told
        .events
        .iter()
        .find(|event| event["data"]["kind"] == "file_change" && event["data"]["status"] == "completed")
        .unwrap();
    assert_eq!(change["data"]["changes"][0]["kind"], "add");
    let made = fs::read_to_string(stage.castra.project().join("made.txt")).unwrap();
    assert_eq!(made, "made by a test\n");
}

#[test]
fn a_failed_turn_is_told_once() {
    let stage = Stage::new("codex-fail");
    let told = stage.run(&[], "play fail").ended(1, "failed");
    let failures = told
        .events
        .iter()
        .filter(|event| event["data"]["kind"] == "turn_failed");
    assert_eq!(failures.count(), 1);
    assert!(told.of_codex("usage").is_empty());
}

#[test]
fn a_resume_goes_on_with_thread_and_tokens() {
    let stage = Stage::new("codex-resume");
    let first = stage.run(&[], "play command").ended(0, "complete");
    let thread = first.thread();
    let second = stage
        .run(&["--resume", &thread], "play message")
        .ended(0, "complete");
    assert_eq!(second.thread(), thread);
    assert_eq!(
        (second.prompt_tokens("turn"), second.prompt_tokens("thread")),
        (100, 300)
    );
    let transcript = stage
        .castra
        .project()
        .join(format!("state/logs/harness/{thread}.jsonl"));
    let lines = fs::read_to_string(transcript).unwrap();
    assert_eq!(lines.matches("thread.started").count(), 2);

    // A name that Codex doesn't know begins a new thread without a word of its own.
    let third = stage
        .run(&["--resume", "no-such-thread"], "play message")
        .ended(0, "complete");
    assert_ne!(third.thread(), thread);
    let asked = third
        .events
        .iter()
        .find(|event| event["data"]["asked"] == "no-such-thread")
        .unwrap();
    assert_eq!(asked["severity"], "warn");
}

#[test]
fn an_untrusted_folder_is_told_in_codex_words() {
    let stage = Stage::new("codex-untrusted");
    let elsewhere = stage.castra.dir().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let flags = ["--cwd", elsewhere.to_str().unwrap()];
    let told = Told::of(stage.command(&flags, "play message").output().unwrap()).ended(1, "failed");
    let stderr = told
        .events
        .iter()
        .find(|event| event["data"]["kind"] == "stderr")
        .unwrap();
    assert!(
        stderr["text"].as_str().unwrap().contains("trusted directory"),
        "{stderr}"
    );
}

#[test]
fn a_server_that_never_answers_ends_by_the_time_out() {
    let stage = Stage::new("codex-silence");
    stage
        .run(&["--idle-timeout", "3s"], "play silence")
        .ended(1, "timed out");
}

#[test]
fn a_command_that_never_ends_is_ended_by_the_time_out() {
    let stage = Stage::new("codex-sleep");
    let told = stage
        .run(&["--timeout", "10s"], "play sleep")
        .ended(1, "timed out");
    let failed = told.of_codex("command.failed");
    assert!(
        failed[0]["detail"].as_str().unwrap().starts_with("abandoned"),
        "{failed:?}"
    );
}

#[test]
fn ctrl_c_ends_codex_and_its_command() {
    let stage = Stage::new("codex-ctrl-c");
    let child = stage.command(&[TRUST], "play sleep").spawn().unwrap();
    let journal = stage.castra.project().join("state/logs/events.jsonl");
    eventually("Codex to run its command", || {
        fs::read_to_string(&journal)
            .ok()?
            .contains("sleep 1000")
            .then_some(())
    });
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    Told::of(child.wait_with_output().unwrap()).ended(130, "incomplete");
}
