//! `castra logs`: every source, since when, and following over restarts and rotation.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use castra::core::lines::journal::{Journal, Rotation};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::project::{ONE, Project, TWO};
use crate::support::{AMPLE, eventually, spawn_piped};

const BROKER: &str = "[host-broker] 2026-11-21T10:00:00.123Z INFO hello from vm:web outcome=ok";

/// A project with a log of every kind, of nothing that runs.
fn written(name: &str) -> Project {
    let project = Project::new(name, TWO);
    project.write_state("vms/web/serial.log", "web boots\r\nlogin: \x1b[2J\u{202e}");
    project.write_state("vms/web/qemu.log", "qemu-system-x86_64: warning: odd\n");
    project.write_state("vms/db/serial.log", "db boots\n");
    project.write_state("logs/broker.log", &format!("{BROKER}\n"));
    let message = |seq: u64, vm: &str, payload: &str| {
        format!(
            "{{\"seq\":{seq},\"ts\":{},\"vm\":\"{vm}\",\"topic\":\"news\",\"payload\":{payload}}}\n",
            1_763_719_200_000 + seq
        )
    };
    let web = message(1, "web", "{\"x\":\"\\u001b\"}");
    project.write_state("logs/bus/bus.log", &format!("{web}{}", message(2, "host", "7")));
    project.write_state("logs/bus/web.log", &web);
    let log = |status: &str| {
        json!({
            "vm": "web", "artifact_hash": null, "base_hash": null, "status": status, "noop": false, "duration_ms": 12,
            "steps": [
                {"step": "connect", "status": "success", "duration_ms": 3},
                {"step": "apply", "status": "failed", "duration_ms": 9, "detail": "exit status 1"},
            ],
            "error": "exit status 1", "trigger": "auto", "run_id": "r1", "launch_id": "l1",
            "started_at": "2026-11-21T10:00:00.000Z", "version": "0.2.0", "output": null,
        })
        .to_string()
    };
    project.write_state("logs/bootstrap/web-20261121T100000.000Z.json", &log("failed"));
    project.write_state(
        "logs/bootstrap/web-20261121T100000.000Z.out",
        "what the script said\n",
    );
    project
}

#[test]
fn every_source_has_its_prefix_and_guests_are_not_obeyed() {
    let project = written("logs-all");
    let all = project.run(&["logs"]).exits(0);
    assert_eq!(
        all.stdout,
        format!(
            "db  serial    | db boots\n\
             web qemu      | qemu-system-x86_64: warning: odd\n\
             web serial    | web boots\n\
             web serial    | login: \\x1b[2J\\u{{202e}}\n\
             web bootstrap | bootstrap r1 began\n\
             web bootstrap | step connect success, 3 ms\n\
             web bootstrap | what the script said\n\
             web bootstrap | step apply failed, 9 ms: exit status 1\n\
             web bootstrap | bootstrap failed, 12 ms\n    \
             broker    | {BROKER}\n\
             web bus       | to news: {{\"x\":\"\\u001b\"}}\n    \
             bus       | host to news: 7\n"
        )
    );
    let web = project
        .run(&[
            "logs", "WEB", "--source", "bus", "--source", "serial", "--tail", "1",
        ])
        .exits(0);
    assert_eq!(
        web.stdout,
        "web serial    | login: \\x1b[2J\\u{202e}\nweb bus       | to news: {\"x\":\"\\u001b\"}\n"
    );
    let colours = project.run(&["logs", "--color", "always"]).exits(0).stdout;
    for code in ["32", "33", "34", "35", "36"] {
        assert!(
            colours.contains(&format!("\x1b[{code}m")),
            "no source has colour {code}"
        );
    }
    assert!(!colours.contains("\x1b[2J"), "a guest was obeyed");
    let unknown = project.refused(64, &["logs", "wbe"]);
    unknown.tells(&["wbe"]).advises("web");
    let empty = Project::new("logs-none", ONE).run(&["logs"]).exits(0);
    assert!(
        empty.stdout.is_empty() && empty.stderr.contains("these logs are empty"),
        "{empty:?}"
    );
}

#[test]
fn json_has_one_object_a_line() {
    let project = written("logs-json");
    let ran = project.run(&["logs", "--json"]).exits(0);
    assert!(
        ran.stdout
            .bytes()
            .all(|byte| byte == b'\n' || (b' '..=b'~').contains(&byte)),
        "{}",
        ran.stdout
    );
    let lines = ran.objects();
    assert_eq!(lines.len(), 12);
    assert_eq!(
        lines[3],
        json!({"ts": null, "source": "serial", "vm": "web", "line": "login: \u{1b}[2J\u{202e}"})
    );
    assert_eq!(
        lines[9],
        json!({"ts": "2026-11-21T10:00:00.123Z", "source": "broker", "vm": null, "line": BROKER})
    );
    assert_eq!(
        (&lines[10]["vm"], &lines[11]["vm"]),
        (&json!("web"), &Value::Null)
    );
    assert_eq!(lines[10]["ts"], "2025-11-21T10:00:00.001Z");
    let message: Value = serde_json::from_str(lines[10]["line"].as_str().unwrap()).unwrap();
    assert_eq!(message["payload"]["x"], "\u{1b}");
}

#[test]
fn since_goes_by_the_line_or_else_by_the_file() {
    let project = written("logs-since");
    let sources = |since: &str| -> Vec<String> {
        let lines = project
            .run(&["logs", "--json", "--since", since])
            .exits(0)
            .objects();
        let mut sources: Vec<String> = lines
            .iter()
            .map(|line| line["source"].as_str().unwrap().to_owned())
            .collect();
        sources.dedup();
        sources
    };
    // The broker's line and the bus's messages say that they are older than the files.
    assert_eq!(
        sources("2026-11-21T10:00:00.124Z"),
        ["serial", "qemu", "serial", "bootstrap"]
    );
    assert_eq!(
        sources("2026-11-21T10:00:00.123Z"),
        ["serial", "qemu", "serial", "bootstrap", "broker"]
    );
    assert_eq!(sources("2025-11-21T10:00:00.002Z").last().unwrap(), "bus");
    let old = std::time::SystemTime::UNIX_EPOCH;
    OpenOptions::new()
        .append(true)
        .open(project.state("vms/db/serial.log"))
        .unwrap()
        .set_modified(old)
        .unwrap();
    let db = project.run(&["logs", "db", "--since", "1h"]).exits(0);
    assert_eq!(db.stdout, "", "it was not written for an hour");
}

/// A `logs -f` at work.
struct Following {
    child: Child,
    lines: Receiver<String>,
}

impl Following {
    fn start(project: &Project, args: &[&str]) -> Following {
        let mut child = project
            .castra()
            .command(&[&["logs", "-f"], args].concat())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (tell, lines) = channel();
        thread::spawn(move || {
            stdout
                .lines()
                .map_while(Result::ok)
                .all(|line| tell.send(line).is_ok())
        });
        Following { child, lines }
    }

    fn next(&self) -> String {
        self.lines.recv_timeout(AMPLE).expect("another line")
    }

    /// The line of which this is a part, and none before it.
    #[track_caller]
    fn is_next(&self, part: &str) {
        let line = self.next();
        assert!(line.contains(part), "{line} instead of {part}");
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn following_goes_on_over_rotation_and_restarts() {
    let project = written("logs-follow");
    let log = project.state("logs/broker.log");
    let mut broker = Journal::open(
        &log,
        Rotation {
            max_bytes: 200,
            keep: 9,
        },
    )
    .unwrap();
    let following = Following::start(&project, &["--source", "broker"]);
    following.is_next("outcome=ok");
    for number in 0..40 {
        broker
            .append(&format!(
                "[host-broker] line {number} of some length, so that files are rotated"
            ))
            .unwrap();
        following.is_next(&format!("line {number} of"));
    }
    assert!(project.state("logs/broker.log.5").exists(), "nothing was rotated");
    drop(following);

    // A console is begun anew by each launch, in the same file.
    let console = project.state("vms/db/serial.log");
    let following = Following::start(&project, &["db", "--source", "serial"]);
    following.is_next("db boots");
    OpenOptions::new()
        .append(true)
        .open(&console)
        .unwrap()
        .write_all(b"more of it\nlogin: ")
        .unwrap();
    following.is_next("more of it");
    following.is_next("login: ");
    fs::write(&console, "again\n").unwrap();
    following.is_next("again");

    // Ctrl-C ends it.
    let mut following = following;
    kill(
        Pid::from_raw(i32::try_from(following.child.id()).unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    let status = eventually("its end", || following.child.try_wait().unwrap());
    assert_eq!(status.code(), Some(130));
}

#[test]
fn vms_launched_meanwhile_and_their_bootstraps_are_followed() {
    let script = "[vms.bootstrap]\nmode = \"auto\"\nscript = \"run.sh\"\nhandshake_timeout_secs = 1\n";
    let project = Project::new("logs-launch", &format!("{ONE}{script}"));
    let following = Following::start(&project, &["--json"]);
    project.run(&["up"]).exits(1);
    let mut seen: Vec<(String, String)> = Vec::new();
    let wanted = [
        ("serial", "fake guest boots"),
        ("broker", "broker started"),
        ("bootstrap", "began"),
        ("bootstrap", "step wait-handshake failed"),
        ("bootstrap", "bootstrap failed"),
    ];
    let found = |seen: &[(String, String)], source: &str, part: &str| {
        seen.iter()
            .any(|(from, line)| from == source && line.contains(part))
    };
    while !wanted.iter().all(|(source, part)| found(&seen, source, part)) {
        let line = following
            .lines
            .recv_timeout(AMPLE)
            .unwrap_or_else(|_| panic!("no more than {seen:#?}"));
        let line: Value = serde_json::from_str(&line).unwrap();
        let text = |key: &str| line[key].as_str().unwrap().to_owned();
        seen.push((text("source"), text("line")));
    }
    drop(following);
    project.down();
}

#[test]
fn a_reader_that_goes_ends_it_quietly() {
    let project = written("logs-pipe");
    let command = project.castra().command(&["logs", "-f", "--source", "serial"]);
    let mut child = spawn_piped(command);
    let mut first = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut first).unwrap();
    drop(stdout);
    let status = eventually("its end", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    let stderr = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert_eq!(stderr, "");
}
