//! `castra bus publish`, `request`, `subscribe` and `tail` as people type them: words instead of
//! flags, last values, groups, questions and answers, and what a mistake is told.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use support::session::Session;
use support::{Castra, eventually, spawn_piped, until};

fn project(name: &str, bus: &str) -> Castra {
    let castra = Castra::new(name);
    castra.write(
        "castra.toml",
        &format!(
            "[project]\nname = \"demo\"\nstate_dir = \"state\"\n[broker]\nport = 0\n[bus]\n{bus}\n[[vms]]\nname = \"web\"\n"
        ),
    );
    castra.run(&["up", "--broker-only"]).exits(0);
    castra
}

fn kept(castra: &Castra) -> Vec<(String, Value)> {
    let tail = castra
        .run(&["bus", "tail", "--no-follow", "--tail", "1000", "--json"])
        .exits(0);
    let own = tail
        .objects()
        .into_iter()
        .filter(|message| message["vm"] != "broker");
    own.map(|mut message| {
        (
            message["topic"].as_str().unwrap().to_owned(),
            message["payload"].take(),
        )
    })
    .collect()
}

/// A castra whose stderr is told line by line; killed at the end.
struct Running(Child);

impl Running {
    /// Waits until it is subscribed.
    fn subscribed(mut command: Command) -> Running {
        let mut child = spawn_piped(command.stdin(Stdio::null()));
        let mut told = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("subscribed to") {
            line.clear();
            assert!(
                told.read_line(&mut line).unwrap() > 0,
                "it ended before it was subscribed"
            );
        }
        child.stderr = Some(told.into_inner());
        Running(child)
    }

    fn ends(mut self) -> (Option<i32>, String, String) {
        let read = |stream: Option<Box<dyn std::io::Read>>| {
            let mut text = String::new();
            let _ = stream.map(|mut stream| stream.read_to_string(&mut text));
            text
        };
        let stdout = read(self.0.stdout.take().map(|stream| Box::new(stream) as _));
        let stderr = read(self.0.stderr.take().map(|stream| Box::new(stream) as _));
        (self.0.wait().unwrap().code(), stdout, stderr)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn messages_as_people_type_them() {
    let castra = project("bus-words", "");
    for args in [
        &["ci/build", "{\"state\": \"ok\"}"][..],
        &["ci/build", "null"],
        &["vm:WEB", "\"reload\""],
        &["--topic", "ci/build", "--payload", "1"],
        &["--topic", "ci/build"],
        &["ci/build", "--payload", "2"],
        &["--payload", "3"],
    ] {
        castra.run(&[&["bus", "publish"], args].concat()).exits(0);
    }
    castra
        .run_with_stdin(&["bus", "publish", "ci/jobs", "-"], b"4\n5\n")
        .exits(0);
    castra.run_with_stdin(&["bus", "publish", "-"], b"6\n").exits(0);
    castra
        .run_with_stdin(&["bus", "publish", "--topic", "ci/jobs", "-"], b"7\n")
        .exits(0);
    let expected = [
        ("ci/build", json!({"state": "ok"})),
        ("ci/build", Value::Null),
        ("vm:web", json!("reload")),
        ("ci/build", json!(1)),
        ("ci/build", Value::Null),
        ("ci/build", json!(2)),
        ("broadcast", json!(3)),
        ("ci/jobs", json!(4)),
        ("ci/jobs", json!(5)),
        ("broadcast", json!(6)),
        ("ci/jobs", json!(7)),
    ]
    .map(|(topic, payload)| (topic.to_owned(), payload));
    assert_eq!(kept(&castra), expected);

    for (args, said) in [
        (
            &["a", "1", "--topic", "b"][..],
            "both a topic, \"a\", and --topic are given",
        ),
        (&["a", "1", "--payload", "2"], "both `1` and --payload are given"),
        (
            &["a", "{\"x\": 1,}"],
            "invalid JSON: key must be a string, column 9",
        ),
        (&["a", "hello"], "invalid JSON: expected value, column 1"),
        (
            &["a", "[1,\n2,\nx]"],
            "invalid JSON: expected value, line 3 column 1",
        ),
        (&["no topic", "1"], "isn't a topic you can publish on"),
        (
            &["vm:wbe", "1"],
            "try: did you mean vm:web? --force publishes the message anyway",
        ),
        (
            &["vm:nobody", "1"],
            "error: the project has no vm `nobody` to publish to",
        ),
    ] {
        let ran = castra.run(&[&["bus", "publish"], args].concat()).exits(64);
        assert!(ran.stderr.contains(said), "{args:?}: {}", ran.stderr);
    }
    castra
        .run(&["bus", "publish", "vm:nobody", "8", "--force"])
        .exits(0);
    assert_eq!(kept(&castra).last().unwrap(), &("vm:nobody".to_owned(), json!(8)));
    castra.run(&["bus", "request", "vm:nobody"]).exits(64);
    castra.run(&["down"]).exits(0);
}

#[test]
fn last_values_and_groups() {
    let castra = project("bus-last", "");
    for (topic, payload) in [
        ("s/a/state", "1"),
        ("s/b/state", "2"),
        ("s/a/state", "3"),
        ("s/x", "4"),
    ] {
        castra.run(&["bus", "publish", topic, payload]).exits(0);
    }
    let ran = castra
        .run(&[
            "bus",
            "subscribe",
            "s/*/state",
            "--last",
            "--count",
            "2",
            "--json",
        ])
        .exits(0);
    let told: Vec<Value> = ran
        .objects()
        .into_iter()
        .map(|mut message| message["payload"].take())
        .collect();
    assert_eq!(told, [json!(2), json!(3)]);
    // The client in Python hears the same.
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/examples/bus_client.py");
    let python = Command::new("python3")
        .arg(example)
        .arg("--unix")
        .arg(castra.state("broker.sock"))
        .args(["subscribe", "s/*/state", "--last", "--count", "2"])
        .output()
        .unwrap();
    let heard = String::from_utf8_lossy(&python.stdout).into_owned();
    assert_eq!(heard, ran.stdout, "{}", String::from_utf8_lossy(&python.stderr));
    for args in [["--from", "1"].as_slice(), &["--last"]] {
        let ran = castra
            .run(&[&["bus", "subscribe", "x", "--group", "w"], args].concat())
            .exits(64);
        ran.tells("a group takes neither --from nor --last");
    }
    castra
        .run(&["bus", "subscribe", "x", "--group", "no name"])
        .exits(64);
    let worker = || {
        Running::subscribed(castra.command(&[
            "bus",
            "subscribe",
            "jobs",
            "--group",
            "w",
            "--count",
            "5",
            "--json",
        ]))
    };
    let workers = [worker(), worker()];
    let jobs: String = (1..=10).map(|job| format!("{job}\n")).collect();
    castra
        .run_with_stdin(&["bus", "publish", "jobs", "-"], jobs.as_bytes())
        .exits(0);
    let mut done: Vec<u64> = workers
        .into_iter()
        .flat_map(|worker| {
            let (code, stdout, stderr) = worker.ends();
            assert_eq!(code, Some(0), "{stderr}");
            let payload = |line: &str| {
                serde_json::from_str::<Value>(line).unwrap()["payload"]
                    .as_u64()
                    .unwrap()
            };
            stdout.lines().map(payload).collect::<Vec<u64>>()
        })
        .collect();
    done.sort_unstable();
    assert_eq!(done, (1..=10).collect::<Vec<u64>>());
    castra.run(&["down"]).exits(0);
}

#[test]
fn a_question_is_answered_or_not() {
    let castra = project("bus-request", "");
    let mut web = Session::guest(castra.broker_port(), "web");
    web.subscribe("vm:web", None);
    let answer = std::thread::spawn(move || {
        for _ in 0..2 {
            let question = web.frame().unwrap();
            let reply = question["reply"].as_str().unwrap().to_owned();
            assert!(reply.starts_with("vm:host/reply/"), "{reply}");
            web.publish(&reply, &json!({"you": question["payload"]}));
        }
        web
    });
    let ran = castra.run(&["bus", "request", "vm:web", "\"how\""]).exits(0);
    assert_eq!(ran.stdout, "{\"you\":\"how\"}\n");
    let ran = castra.run(&["bus", "request", "vm:web", "--json"]).exits(0);
    let message = ran.objects().remove(0);
    assert_eq!(
        (&message["vm"], &message["payload"]),
        (&json!("web"), &json!({"you": null}))
    );
    drop(answer.join().unwrap());
    let ran = castra
        .run(&["bus", "request", "vm:web", "--timeout", "200ms"])
        .exits(1);
    ran.tells("error: no answer came within 0.2 s");
    ran.tells("try: check in `castra bus tail`");
    castra.run(&["bus", "request", "x", "{"]).exits(64);
    castra.run(&["down"]).exits(0);
}

#[test]
fn who_reads_too_slowly_is_told_so() {
    let castra = project("bus-slow", "outbound_queue_bytes = 65536");
    let mut subscriber = Running::subscribed(castra.command(&["bus", "subscribe", "t", "--json"]));
    kill(
        Pid::from_raw(subscriber.0.id().try_into().unwrap()),
        Signal::SIGSTOP,
    )
    .unwrap();
    let long = format!("\"{}\"\n", "x".repeat(8000)).repeat(200);
    castra
        .run_with_stdin(&["bus", "publish", "t", "-"], long.as_bytes())
        .exits(0);
    let log = castra.state("logs/broker.log");
    until("the end of the session", || {
        let text = fs::read_to_string(&log).unwrap();
        text.contains("phase=closed reason=slow-consumer")
    });
    kill(
        Pid::from_raw(subscriber.0.id().try_into().unwrap()),
        Signal::SIGCONT,
    )
    .unwrap();
    let mut stdout = subscriber.0.stdout.take().unwrap();
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    let (code, _, stderr) = subscriber.ends();
    assert_eq!(code, Some(1));
    assert!(
        stderr.contains("cut this session off as a slow consumer"),
        "{stderr}"
    );
    assert!(stderr.contains("--from "), "{stderr}");
    castra.run(&["down"]).exits(0);
}

#[test]
fn a_line_of_gigabytes_ends_with_ctrl_c() {
    let castra = project("bus-endless", "");
    castra.run(&["bus", "publish", "t", "1"]).exits(0);
    castra.run(&["down"]).exits(0);
    for path in ["logs/bus/bus.log", "logs/events.jsonl"] {
        let mut file = File::options().append(true).open(castra.state(path)).unwrap();
        file.write_all(b"\n").unwrap();
        let file = File::options().write(true).open(castra.state(path)).unwrap();
        // A hole: nothing on the disk, and no line end for longer than anybody waits.
        file.write_all_at(b"x\n", 300 << 30).unwrap();
    }
    for args in [
        &["bus", "tail"][..],
        &["bus", "tail", "--tail", "9"],
        &["logs", "--source", "bus", "-f"],
        &["events", "-f", "--tail", "99"],
        &["events", "-f"],
    ] {
        let child = spawn_piped(castra.command(args).stdin(Stdio::null()));
        let mut running = Running(child);
        let pid = running.0.id();
        eventually("it to read", || {
            let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
            let read = io.lines().find_map(|line| line.strip_prefix("rchar: "))?;
            (read.parse::<u64>().unwrap() > 32 << 20).then_some(())
        });
        kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGINT).unwrap();
        let status = eventually("its end", || running.0.try_wait().unwrap());
        assert!(status.code().is_some(), "{args:?}: {status}");
    }
    for path in ["logs/bus/bus.log", "logs/events.jsonl"] {
        fs::remove_file(castra.state(path)).unwrap();
    }
}

#[test]
fn tail_follows_unless_told_otherwise() {
    let castra = project("bus-follow", "");
    castra.run(&["bus", "publish", "t", "1"]).exits(0);
    let mut child = castra
        .command(&["bus", "tail", "--json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let running = Running(child);
    assert!(lines.next().unwrap().unwrap().contains("\"payload\":1}"));
    castra.run(&["bus", "publish", "t", "2"]).exits(0);
    assert!(lines.next().unwrap().unwrap().contains("\"payload\":2}"));
    drop(running);
    assert_eq!(kept(&castra).len(), 2);
    castra.run(&["bus", "tail", "-f", "--no-follow"]).exits(64);
    castra.run(&["down"]).exits(0);
}
