//! `castra bus …` as its users meet it: the real binary against a real broker, which
//! `castra up --broker-only` starts. And the client in Python of docs/examples.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use castra::core::bus::{Client, Message};
use castra::core::events::contract::Stamped;
use castra::core::failure::Exit;
use castra::core::operations::bus::{
    BusProject, BusPublishOptions, BusSubscribeOptions, BusTailOptions, Input, Payload, SubscriptionEnd,
};
use castra::core::operations::{self, BrokerLauncher, ThreadBrokerLauncher};
use castra::core::reporter::Silent;
use support::fleet::Fleet;
use support::{AMPLE, Castra, Ran, eventually, objects, spawn_piped, until};

/// A project with this under [bus], its broker running.
fn project(name: &str, bus: &str) -> Castra {
    let castra = without_broker(name, bus);
    castra.run(&["up", "--broker-only"]).exits(0);
    castra
}

fn without_broker(name: &str, bus: &str) -> Castra {
    let castra = Castra::new(name);
    write_config(&castra, bus);
    castra
}

fn write_config(castra: &Castra, bus: &str) {
    castra.write(
        "castra.toml",
        &format!(
            "[project]\nname = \"demo\"\nstate_dir = \"state\"\n[broker]\nport = 0\n[bus]\n{bus}\n[[vms]]\nname = \"web\"\n"
        ),
    );
}

fn broker_pid(castra: &Castra) -> Pid {
    let note = fs::read_to_string(castra.state("broker.pid")).unwrap();
    Pid::from_raw(note.split_whitespace().next().unwrap().parse().unwrap())
}

fn publish(castra: &Castra, payload: &str) {
    castra.run(&["bus", "publish", "--payload", payload]).exits(0);
}

/// NDJSON of these numbers.
fn numbers(range: std::ops::RangeInclusive<u64>) -> String {
    range.map(|number| format!("{number}\n")).collect()
}

fn payloads(ran: &Ran) -> Vec<Value> {
    ran.objects()
        .into_iter()
        .map(|mut message| message["payload"].take())
        .collect()
}

/// A castra that runs beside the test; killed at its end.
struct Running {
    child: Child,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

impl Running {
    fn start(castra: &Castra, args: &[&str]) -> (Running, ChildStdin) {
        Running::spawn(castra.command(args))
    }

    fn spawn(mut command: Command) -> (Running, ChildStdin) {
        let mut child = spawn_piped(command.stdin(Stdio::piped()));
        let (stdout, out_reader) = gather(child.stdout.take().unwrap());
        let (stderr, err_reader) = gather(child.stderr.take().unwrap());
        let stdin = child.stdin.take().unwrap();
        let running = Running {
            child,
            stdout,
            stderr,
            readers: vec![out_reader, err_reader],
        };
        (running, stdin)
    }

    fn lines(&self) -> Vec<String> {
        self.stdout.lock().unwrap().lines().map(str::to_owned).collect()
    }

    #[track_caller]
    fn says(&self, text: &str) {
        until(text, || self.stderr.lock().unwrap().contains(text));
    }

    #[track_caller]
    fn has_lines(&self, count: usize) {
        until(&format!("{count} lines"), || self.lines().len() >= count);
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Its exit code and its output.
    #[track_caller]
    fn ends(mut self) -> (Option<i32>, String, String) {
        let status = eventually("the end of castra", || self.child.try_wait().unwrap());
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        let text = |shared: &Mutex<String>| shared.lock().unwrap().clone();
        (status.code(), text(&self.stdout), text(&self.stderr))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn gather(stream: impl Read + Send + 'static) -> (Arc<Mutex<String>>, JoinHandle<()>) {
    let text = Arc::new(Mutex::new(String::new()));
    let shared = Arc::clone(&text);
    let reader = thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.read_until(b'\n', &mut line).unwrap_or(0) > 0 {
            shared.lock().unwrap().push_str(&String::from_utf8_lossy(&line));
            line.clear();
        }
    });
    (text, reader)
}

#[test]
fn a_message_is_acked_kept_and_shown() {
    let castra = project("bus-one", "");
    let ran = castra
        .run(&[
            "bus",
            "publish",
            "--topic",
            "ci/build",
            "--payload",
            "{\"a\":\n [1.50, \"\u{202e}é\"]}",
        ])
        .exits(0);
    assert_eq!(
        (ran.stdout.as_str(), ran.stderr.as_str()),
        ("", "published on ci/build as number 1\n")
    );
    let ran = castra.run(&["bus", "publish", "--json"]).exits(0);
    let events = ran.objects();
    let types: Vec<_> = events
        .iter()
        .map(|event| event["type"].as_str().unwrap())
        .collect();
    assert_eq!(
        types,
        ["command.accepted", "message", "command.completed", "summary"]
    );
    let data = json!({"topic": "broadcast", "acked": 1, "first_seq": 2, "last_seq": 2});
    assert_eq!(events[1]["data"], data);
    let bytes = fs::read_to_string(castra.state("logs/bus/bus.log")).unwrap();
    let payload = bytes
        .lines()
        .last()
        .unwrap()
        .split_once("\"payload\":")
        .unwrap()
        .1;
    assert_eq!(events[3]["bytes"], payload.len() - "}".len());
    let journal = castra
        .run(&["events", "--json", "--type", "command.completed"])
        .exits(0);
    assert_eq!(journal.objects().len(), 3, "up and two publishes");

    // JSON has the kept payload, with escapes for what a terminal would obey; people see only text.
    let log = fs::read_to_string(castra.state("logs/bus/bus.log")).unwrap();
    let tail = castra.run(&["bus", "tail", "--no-follow", "--json"]).exits(0);
    let told = log.replace('\u{202e}', "\\u202e");
    assert_eq!(tail.stdout, told);
    assert!(
        log.contains("\"topic\":\"ci/build\",\"payload\":{\"a\":  [1.50, \"\u{202e}é\"]}}\n"),
        "{log}"
    );
    for args in [
        &["bus", "tail", "--no-follow", "--shared", "--json"][..],
        &["bus", "subscribe", "*", "--from", "1", "--count", "2", "--json"],
    ] {
        assert_eq!(castra.run(args).exits(0).stdout, told, "{args:?}");
    }
    // A sender's own log follows that of the bus.
    until("the host's own log", || {
        let own = castra
            .run(&["bus", "tail", "--no-follow", "--vm", "HOST", "--json"])
            .exits(0)
            .stdout;
        own == told
    });
    let shown = castra
        .run(&["bus", "tail", "--no-follow", "--topic", "ci/*"])
        .exits(0)
        .stdout;
    assert!(
        shown.ends_with("  host    ci/build   {\"a\":  [1.50, \"\\u{202e}é\"]}\n"),
        "{shown}"
    );
    assert_eq!(shown.find("  "), Some("10:00:00.000".len()), "{shown}");
    let none = castra
        .run(&["bus", "tail", "--no-follow", "--vm", "web"])
        .exits(0);
    assert_eq!(
        (none.stdout.as_str(), none.stderr.as_str()),
        ("", "no message matches\n")
    );
    let unknown = castra
        .run(&["bus", "tail", "--no-follow", "--vm", "wbe"])
        .exits(64);
    unknown.tells("web");
}

#[test]
fn fifty_thousand_lines_go_through_in_order() {
    let castra = project("bus-many", "");
    let ran = castra.run_with_stdin(
        &["bus", "publish", "--topic", "bulk", "-"],
        numbers(1..=50_000).as_bytes(),
    );
    assert_eq!(
        ran.stderr,
        "published 50000 messages on bulk, numbers 1 to 50000\n"
    );
    let tail = castra
        .run(&["bus", "tail", "--no-follow", "--tail", "50000", "--json"])
        .exits(0);
    let expected: Vec<Value> = (1..=50_000).map(Value::from).collect();
    assert_eq!(payloads(&tail), expected);
    let replay = castra
        .run(&[
            "bus",
            "subscribe",
            "bulk",
            "--from",
            "1",
            "--count",
            "50000",
            "--json",
        ])
        .exits(0);
    assert_eq!(replay.stdout, tail.stdout);
    let last = castra
        .run(&["bus", "tail", "--no-follow", "--tail", "1", "--json"])
        .exits(0);
    assert_eq!(payloads(&last), [json!(50_000)]);
}

#[test]
fn lines_that_are_no_messages_are_named() {
    let castra = project("bus-bad-lines", "max_frame_bytes = 2048");
    let long = format!("\"{}\"", "x".repeat(3000));
    let longer = "y".repeat(100_000);
    let nested = format!("{}1{}", "[".repeat(200), "]".repeat(200));
    let lines: [&[u8]; 11] = [
        b"1",
        b"{\"broken\":",
        b"",
        b"  2  ",
        b"\"\xff\xfe\"",
        long.as_bytes(),
        longer.as_bytes(),
        nested.as_bytes(),
        b"\"\\ud800\"",
        b"3\r",
        b"4",
    ];
    let ran = castra
        .run_with_stdin(&["bus", "publish", "--payload", "-"], &lines.join(&b'\n'))
        .exits(1);
    for line in [
        "line 2 was not published: invalid JSON: EOF while parsing a value, column 10",
        "line 5 was not published: it isn't UTF-8 from byte 2 on",
        "line 6 was not published: it is longer than the 2048 bytes",
        "line 7 was not published: it is longer than the 2048 bytes",
        "line 8 was not published: it is nested ",
        "line 9 was not published: the broker refused it: malformed",
        "error: 6 lines not published, 4 messages acked",
    ] {
        assert!(ran.stderr.contains(line), "{line}\n{}", ran.stderr);
    }
    assert!(
        !ran.stderr.contains("line 3") && !ran.stderr.contains("line 10"),
        "{}",
        ran.stderr
    );
    let tail = castra.run(&["bus", "tail", "--no-follow", "--json"]).exits(0);
    assert_eq!(payloads(&tail), [json!(1), json!(2), json!(3), json!(4)]);

    // Many bad lines: some are named, all are counted; as JSON too.
    let ran = castra
        .run_with_stdin(&["bus", "publish", "--json", "-"], "x\n".repeat(500).as_bytes())
        .exits(1);
    let events = ran.objects();
    let named: Vec<_> = events
        .iter()
        .filter(|event| event["severity"] == "error")
        .collect();
    assert_eq!(named.len(), 20);
    assert_eq!(named[19]["data"]["line"], 20);
    let failed = events
        .iter()
        .find(|event| event["type"] == "command.failed")
        .unwrap();
    assert!(
        failed["detail"]
            .as_str()
            .unwrap()
            .contains("500 lines not published"),
        "{failed}"
    );
    // Nothing to publish is no failure.
    castra.run(&["bus", "publish", "-"]).exits(0);
}

#[test]
fn what_can_not_be_published_is_refused_before_anything_happens() {
    let castra = project("bus-usage", "");
    let huge = format!("\"{}\"", "x".repeat(70_000));
    for (args, expected) in [
        (&["publish", "--payload", "hello"][..], "--payload '\"hello\"'"),
        (&["publish", "--payload", "{state: 1}"], "single quotes"),
        (&["publish", "--payload", ""], "invalid JSON"),
        (
            &["publish", "--payload", &huge],
            "more than the 65536 of `max_frame_bytes`",
        ),
        (&["publish", "--topic", "a b"], "it holds ' '"),
        (&["publish", "--topic", "a\u{1b}[2J"], "\\u{1b}"),
        (&["publish", "--topic", "ci/*"], "only subscriptions"),
        (&["publish", "--topic", "castra/x"], "the broker's own"),
        (&["publish", "--topic", "a", "--topic", "b"], "one topic"),
        (&["publish", "reload"], "alone could be a topic or a payload"),
        (&["publish", "-", "--payload", "1"], "both `-` and --payload"),
        (&["publish", "--wait", "soon"], "such as 90s"),
        (&["subscribe"], "needs TOPIC"),
        (&["subscribe", "a*b"], "valid topic"),
        (&["subscribe", "a", "--from", "-1"], "number of a message"),
        (&["tail", "--topic", "é"], "valid topic"),
        (&["tail", "--vm", "web", "--shared"], "both --vm and --shared"),
        (&["bench", "--size", "3"], "it may be 12 to"),
        (&["bench", "--messages", "0"], "it may be 1 to"),
        (&["bench", "--publishers", "1000"], "it may be 1 to 64"),
    ] {
        let ran = castra.run(&[&["bus"], args].concat()).exits(64);
        assert!(ran.stderr.contains(expected), "{args:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains('\u{1b}'));
    }
    let ran = castra
        .run(&["bus", "publish", "--payload", "hello", "--json"])
        .exits(64);
    assert_eq!(ran.objects()[0]["type"], "command.rejected");
    assert_eq!(ran.objects().len(), 1);
    assert!(
        castra
            .run(&["bus", "tail", "--no-follow"])
            .exits(0)
            .stdout
            .is_empty()
    );
}

#[test]
fn followed_across_rotation_nothing_is_missing_or_repeated() {
    let castra = project("bus-rotate", "log_max_bytes = 65536\nlog_keep = 100");
    publish(&castra, "0");
    let (all, _in1) = Running::start(&castra, &["bus", "tail", "-f", "--json"]);
    let (new, _in2) = Running::start(
        &castra,
        &["bus", "tail", "--vm", "host", "-f", "--tail", "0", "--json"],
    );
    all.has_lines(1);
    let mut next = 1;
    for _ in 0..5 {
        let batch = numbers(next..=next + 999);
        castra
            .run_with_stdin(&["bus", "publish", "-"], batch.as_bytes())
            .exits(0);
        next += 1000;
        // A follower that keeps up, and one that has all of it at once.
        all.has_lines(usize::try_from(next).unwrap());
    }
    assert!(castra.state("logs/bus/bus.log.4").exists(), "it was rotated");
    new.signal(Signal::SIGINT);
    all.signal(Signal::SIGINT);
    let (code, stdout, stderr) = all.ends();
    assert_eq!((code, stderr.as_str()), (Some(130), ""));
    let seen: Vec<Value> = objects(&stdout)
        .into_iter()
        .map(|mut message| message["payload"].take())
        .collect();
    assert_eq!(seen, (0..next).map(Value::from).collect::<Vec<_>>());
    assert_eq!(new.ends().0, Some(130));
    // The rotated files are read as one log.
    let tail = castra
        .run(&["bus", "tail", "--no-follow", "--tail", "5001", "--json"])
        .exits(0);
    assert_eq!(tail.stdout, stdout);
}

#[test]
fn what_rotation_has_taken_is_told() {
    let castra = project("bus-gap", "log_max_bytes = 65536\nlog_keep = 1");
    // A file is rotated between two writes, and on a busy host one write may hold all that one command sends:
    // three of them fill more files than are kept.
    for _ in 0..3 {
        castra
            .run_with_stdin(&["bus", "publish", "-"], numbers(1..=4000).as_bytes())
            .exits(0);
    }
    let first = castra
        .run(&["bus", "tail", "--no-follow", "--tail", "12000", "--json"])
        .exits(0)
        .objects()[0]["seq"]
        .as_u64()
        .unwrap();
    assert!(first > 1, "something was rotated away");
    let ran = castra
        .run(&["bus", "subscribe", "*", "--from", "1", "--count", "1", "--json"])
        .exits(0);
    let lines = ran.objects();
    assert_eq!(lines[0], json!({"gap": {"from": 1, "to": first - 1}}));
    assert_eq!(lines[1]["seq"], first);
    let warning = format!("rotation has removed messages 1 to {} from the log", first - 1);
    ran.tells(&warning);
}

#[test]
fn live_messages_come_at_once_and_only_those_asked_for() {
    let castra = project("bus-live", "");
    publish(&castra, "\"before\"");
    let (live, _stdin) = Running::start(
        &castra,
        &["bus", "subscribe", "ci/*", "broadcast", "--count", "3"],
    );
    live.says("subscribed to ci/* broadcast; the last number so far is 1");
    for topic in ["ci/a", "other", "broadcast", "vm:web", "ci/b"] {
        castra
            .run(&["bus", "publish", "--topic", topic, "--payload", "[]"])
            .exits(0);
    }
    let (code, stdout, _) = live.ends();
    assert_eq!(code, Some(0));
    let topics: Vec<_> = stdout
        .lines()
        .map(|line| line.split_whitespace().nth(2).unwrap())
        .collect();
    assert_eq!(topics, ["ci/a", "broadcast", "ci/b"]);
}

#[test]
fn a_reader_that_goes_ends_it_quietly_even_when_nothing_more_comes() {
    let castra = project("bus-pipe", "");
    castra
        .run_with_stdin(&["bus", "publish", "-"], numbers(1..=3).as_bytes())
        .exits(0);
    for args in [
        &["bus", "subscribe", "*", "--from", "1", "--json"][..],
        &["bus", "tail", "-f", "--json"],
    ] {
        let mut child = spawn_piped(castra.command(args));
        let mut reader = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert!(line.starts_with("{\"seq\":1,"), "{line}");
        drop(reader);
        let status = eventually("castra to see its reader go", || child.try_wait().unwrap());
        assert_eq!(status.code(), Some(0), "{args:?}");
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert!(!stderr.contains("error"), "{stderr}");
    }
}

#[test]
fn a_broker_killed_in_the_middle() {
    let castra = project("bus-killed", "");
    let (publisher, mut lines) = Running::start(&castra, &["bus", "publish", "--topic", "t", "-"]);
    let (subscriber, _stdin) = Running::start(&castra, &["bus", "subscribe", "t", "--from", "1", "--json"]);
    lines.write_all(b"1\n2\n3\n").unwrap();
    subscriber.has_lines(3);
    castra.kill_broker();
    let (code, stdout, stderr) = subscriber.ends();
    assert_eq!((code, stdout.lines().count()), (Some(1), 3));
    for text in [
        "error: the subscription ended after 3 messages",
        "because: the broker ended the session and gave no reason",
        "--from 4 goes on where this ended",
    ] {
        assert!(stderr.contains(text), "{text}\n{stderr}");
    }
    let (code, _, stderr) = publisher.ends();
    assert_eq!(code, Some(1));
    for text in [
        "error: only 3 messages acked",
        "no line after 3 was sent",
        "tail -n +4 FILE | castra bus publish --topic t -",
        "published 3 messages on t, numbers 1 to 3",
    ] {
        assert!(stderr.contains(text), "{text}\n{stderr}");
    }
    // Acked messages are kept, by the next broker too.
    castra.run(&["up", "--broker-only"]).exits(0);
    let replay = castra
        .run(&["bus", "subscribe", "t", "--from", "1", "--count", "3", "--json"])
        .exits(0);
    assert_eq!(payloads(&replay), [json!(1), json!(2), json!(3)]);
}

#[test]
fn a_broker_that_says_nothing_any_more() {
    let castra = project("bus-stopped", "");
    let (publisher, mut lines) = Running::start(&castra, &["bus", "publish", "-"]);
    lines.write_all(b"1\n").unwrap();
    until("the first message", || {
        let tail = castra.run(&["bus", "tail", "--no-follow", "--json"]);
        tail.stdout.lines().count() == 1
    });
    let pid = broker_pid(&castra);
    kill(pid, Signal::SIGSTOP).unwrap();
    lines.write_all(b"2\n3\n").unwrap();
    let (code, _, stderr) = publisher.ends();
    // A command that isn't connected yet doesn't wait for ever either.
    let late = castra.run(&["bus", "publish", "--payload", "4"]);
    kill(pid, Signal::SIGCONT).unwrap();
    assert_eq!(code, Some(1), "{stderr}");
    for text in [
        "because: the broker gave no ack in time",
        "of lines 2 to 3, 2 messages sent and not acked: they may or may not be in the log",
        "tail -n +2 FILE",
    ] {
        assert!(stderr.contains(text), "{text}\n{stderr}");
    }
    let late = late.exits(1);
    late.tells("in time");
}

#[test]
fn a_broker_that_stops_in_order_says_so() {
    let castra = project("bus-down", "");
    let (subscriber, _stdin) = Running::start(&castra, &["bus", "subscribe", "*"]);
    subscriber.says("subscribed to *; no message so far");
    castra.run(&["down"]).exits(0);
    let (code, _, stderr) = subscriber.ends();
    assert_eq!(code, Some(1));
    assert!(
        stderr.contains("because: the broker closed the session: shutting-down"),
        "{stderr}"
    );
}

#[test]
fn without_a_broker() {
    let castra = without_broker("bus-none", "");
    for args in [
        &["bus", "publish"][..],
        &["bus", "request", "x"],
        &["bus", "subscribe", "*"],
        &["bus", "bench"],
    ] {
        let ran = castra.run(args).exits(1);
        ran.tells("error: no broker runs in this project");
        ran.tells("castra up --broker-only");
    }
    assert!(
        !castra.state("").exists(),
        "nothing is made for what can't be done"
    );
    let tail = castra.run(&["bus", "tail", "--no-follow"]).exits(0);
    assert_eq!(tail.stderr, "no message matches\n");
    let ran = castra.run(&["bus", "publish", "--wait", "200ms"]).exits(1);
    ran.tells("no broker runs");

    let (waiting, _stdin) = Running::start(&castra, &["bus", "publish", "--payload", "7", "--wait", "30s"]);
    let (live, _stdin) = Running::start(
        &castra,
        &[
            "bus",
            "subscribe",
            "*",
            "--from",
            "1",
            "--count",
            "1",
            "--wait",
            "30",
        ],
    );
    castra.run(&["up", "--broker-only"]).exits(0);
    assert_eq!(waiting.ends().0, Some(0));
    let (code, stdout, _) = live.ends();
    assert_eq!(
        (code, stdout.trim_end().ends_with(" 7")),
        (Some(0), true),
        "{stdout}"
    );
}

#[test]
fn a_missing_broker_is_started_when_a_vm_runs() {
    let castra = Castra::new("bus-start");
    let mut fleet = Fleet::new();
    fleet.launch("web", 1000);
    let state_dir = fleet.state.dir().display();
    castra.write(
        "castra.toml",
        &format!("[project]\nname = \"demo\"\nstate_dir = \"{state_dir}\"\n[broker]\nport = 0\n[[vms]]\nname = \"web\"\n"),
    );
    let ran = castra.run(&["bus", "publish"]).exits(0);
    ran.tells("started the broker on");
    ran.tells("published on broadcast as number 1");
    castra::core::broker::stop_broker(&fleet.state, AMPLE).unwrap();
    let ran = castra
        .run(&["bus", "subscribe", "*", "--from", "1", "--count", "1"])
        .exits(0);
    ran.tells("started the broker on");
    castra::core::broker::stop_broker(&fleet.state, AMPLE).unwrap();
}

#[test]
fn a_subscriber_that_hears_nothing_for_long_stays() {
    let castra = project("bus-idle", "session_idle_secs = 3");
    let (subscriber, _stdin) = Running::start(&castra, &["bus", "subscribe", "broadcast", "--count", "1"]);
    subscriber.says("subscribed to");
    // A second session that sends no heartbeats shows when the end would have come.
    let port = castra.broker_port();
    let mut silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
    silent.set_read_timeout(Some(AMPLE)).unwrap();
    silent.write_all(b"hello vm:web capabilities=bus-v1\n").unwrap();
    let mut heard = Vec::new();
    silent.read_to_end(&mut heard).unwrap();
    let heard = String::from_utf8_lossy(&heard);
    assert!(
        heard.ends_with("{\"type\":\"close\",\"reason\":\"idle\"}"),
        "{heard}"
    );
    publish(&castra, "1");
    let (code, stdout, _) = subscriber.ends();
    assert_eq!((code, stdout.lines().count()), (Some(0), 1));
}

#[test]
fn a_config_that_the_broker_does_not_know_yet() {
    let castra = project("bus-config", "max_frame_bytes = 1024");
    write_config(&castra, "max_frame_bytes = 4096");
    let long = format!("\"{}\"", "x".repeat(2000));
    let ran = castra.run(&["bus", "publish", "--payload", &long]).exits(1);
    for text in [
        "the broker closed the session: protocol-error",
        "`max_frame_bytes`",
    ] {
        assert!(ran.stderr.contains(text), "{text}\n{}", ran.stderr);
    }
}

#[test]
fn ctrl_c_ends_it_at_once() {
    let castra = project("bus-ctrl-c", "");
    let (subscriber, _in1) = Running::start(&castra, &["bus", "subscribe", "*"]);
    subscriber.says("subscribed to *");
    let (publisher, mut lines) = Running::start(&castra, &["bus", "publish", "-"]);
    lines.write_all(b"1\n").unwrap();
    subscriber.has_lines(1);
    for running in [subscriber, publisher] {
        running.signal(Signal::SIGINT);
        let (code, _, stderr) = running.ends();
        assert_eq!(code, Some(130), "{stderr}");
    }
}

#[test]
fn what_a_guest_says_reaches_the_host() {
    let castra = project("bus-guest", "");
    let (subscriber, _stdin) = Running::start(
        &castra,
        &["bus", "subscribe", "castra/session/web", "greeting", "--json"],
    );
    subscriber.says("subscribed to");
    let guest = python(
        &castra,
        &Side::Guest,
        &["publish", "greeting", "{\"from\": \"web\"}"],
    );
    assert_eq!(guest.code, Some(0), "{}", guest.stderr);
    subscriber.has_lines(2);
    let messages: Vec<Value> = subscriber
        .lines()
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let greeting = messages
        .iter()
        .find(|message| message["topic"] == "greeting")
        .unwrap();
    assert_eq!(
        (&greeting["vm"], &greeting["payload"]),
        (&json!("web"), &json!({"from": "web"}))
    );
    let session = messages
        .iter()
        .find(|message| message["topic"] != "greeting")
        .unwrap();
    assert_eq!(
        (&session["vm"], &session["payload"]["phase"]),
        (&json!("broker"), &json!("opened"))
    );
    until("the guest's own log", || {
        let tail = castra
            .run(&["bus", "tail", "--no-follow", "--vm", "web", "--json"])
            .exits(0);
        payloads(&tail) == [json!({"from": "web"})]
    });
}

#[test]
fn a_program_that_embeds_castra_publishes_and_listens() {
    let castra = without_broker("bus-embedded", "");
    let config = castra::core::config::load(&castra.project().join("castra.toml")).unwrap();
    let broker = ThreadBrokerLauncher::new();
    broker.launch(&config).unwrap();
    let project = BusProject::from(config.clone());
    let options = BusPublishOptions {
        payload: Payload::Lines(Input::of(&b"1\n2\nx\n3\n"[..]).unwrap()),
        ..BusPublishOptions::new(project.clone())
    };
    let mut events: Vec<Stamped> = Vec::new();
    let outcome = operations::bus_publish(options, &mut events).unwrap();
    assert_eq!(
        (outcome.acked, outcome.last_seq, outcome.exit),
        (3, Some(3), Exit::Failed)
    );
    assert_eq!(
        (outcome.not_published[0].line, outcome.not_published_count),
        (3, 1)
    );
    assert!(
        events
            .iter()
            .any(|event| event.event.contract_type() == "command.failed")
    );

    let mut seen = Vec::new();
    let mut sink = |message: &Message| seen.push(message.payload.get().to_owned());
    let options = BusSubscribeOptions {
        from: Some(1),
        count: Some(3),
        ..BusSubscribeOptions::new(project, vec!["*".parse().unwrap()])
    };
    let heard = operations::bus_subscribe(options, &mut sink, &mut Silent).unwrap();
    assert_eq!((heard.messages, heard.end), (3, SubscriptionEnd::Count));
    let kept = operations::bus_tail(&BusTailOptions::new(config.state.clone()), &mut sink).unwrap();
    assert_eq!(kept.messages, 3);
    assert_eq!(seen, ["1", "2", "3", "1", "2", "3"]);

    // The client alone, for who wants the session in their own hands.
    let mut client = Client::connect(&config.state.broker_sock(), AMPLE).unwrap();
    assert_eq!(client.publish("a", "{\n}", AMPLE), Ok(4));
    drop(client);
    broker.stop();
}

#[test]
fn the_bench_measures_and_leaves_no_other_trace() {
    let castra = project("bus-bench", "");
    let args = [
        "bus",
        "bench",
        "--messages",
        "600",
        "--size",
        "64",
        "--in-flight",
        "16",
        "--publishers",
        "3",
    ];
    let ran = castra.run(&[&args[..], &["--json"]].concat()).exits(0);
    let measured = &ran.objects()[0];
    assert_eq!(
        measured["throughput"]["load"],
        json!({"messages": 600, "size": 64, "in_flight": 16, "publishers": 3})
    );
    assert_eq!(measured["replay"]["load"]["messages"], 600);
    for phase in ["one_by_one", "to_subscriber", "throughput"] {
        let latency = &measured[phase]["latency_us"];
        assert!(
            latency["p50"].as_f64().unwrap() <= latency["p99_9"].as_f64().unwrap(),
            "{latency}"
        );
        assert!(measured[phase]["messages_per_sec"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(measured["sync"], "interval");
    let topic = measured["topic"].as_str().unwrap();
    let kept = castra
        .run(&[
            "bus",
            "tail",
            "--no-follow",
            "--tail",
            "5000",
            "--topic",
            topic,
            "--json",
        ])
        .exits(0);
    assert_eq!(kept.stdout.lines().count(), 1200);
    let table = castra.run(&args).exits(0).stdout;
    assert!(table.contains("3 x 16 in flight, to the ack"), "{table}");
    assert_eq!(table.lines().count(), 6, "{table}");
}

/// The name that the Python client uses.
enum Side {
    Guest,
    Host,
}

fn python_command(castra: &Castra, side: &Side, args: &[&str]) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/examples/bus_client.py");
    let mut command = Command::new("python3");
    command.arg(script);
    match side {
        Side::Guest => {
            let port = castra.broker_port();
            command.args(["--tcp", &format!("127.0.0.1:{port}"), "--vm", "web"]);
        }
        Side::Host => {
            command.arg("--unix").arg(castra.state("broker.sock"));
        }
    }
    command.args(args);
    command
}

fn python(castra: &Castra, side: &Side, args: &[&str]) -> Ran {
    let (running, stdin) = Running::spawn(python_command(castra, side, args));
    drop(stdin);
    let (code, stdout, stderr) = running.ends();
    Ran {
        args: args.join(" "),
        code,
        stdout,
        stderr,
    }
}

#[test]
fn the_client_in_python_publishes_replays_and_comes_back() {
    // A heartbeat each second, so that the session lives by them for a while.
    let castra = project("bus-python", "session_idle_secs = 3");
    for side in [Side::Guest, Side::Host] {
        let ran = python(&castra, &side, &["publish", "ci/a", "[1, {\"b\": null}]"]).exits(0);
        assert!(ran.stdout.trim().parse::<u64>().unwrap() > 0);
    }
    let (code, refused) = {
        let ran = python(&castra, &Side::Guest, &["subscribe", "vm:db"]);
        (ran.code, ran.stderr)
    };
    assert_eq!(
        (code, refused.as_str()),
        (Some(1), "bus_client: the broker refused vm:db: forbidden\n")
    );

    let subscribe = ["subscribe", "ci/*", "broadcast", "--from", "1", "--count"];
    let start = |side, count| {
        Running::spawn(python_command(
            &castra,
            side,
            &[&subscribe[..], &[count]].concat(),
        ))
    };
    let (guest, _in1) = start(&Side::Guest, "3");
    let (host, _in2) = start(&Side::Host, "5");
    guest.has_lines(2);
    // Only heartbeats keep its session alive.
    until("a heartbeat to be recorded", || {
        let status = castra.status();
        let web = &status["vms"][0];
        web["last_heartbeat_age_ms"].as_u64().is_some() && web["bus_subscribed"] == true
    });
    publish(&castra, "3");
    let (code, stdout, stderr) = guest.ends();
    assert_eq!((code, stdout.lines().count(), stderr.as_str()), (Some(0), 3, ""));

    host.has_lines(3);
    castra.kill_broker();
    host.says("going on from");
    castra.run(&["up", "--broker-only"]).exits(0);
    publish(&castra, "4");
    castra
        .run(&["bus", "publish", "--topic", "ci/z", "--payload", "5"])
        .exits(0);
    let (code, stdout, stderr) = host.ends();
    assert_eq!(code, Some(0), "{stderr}");
    let seen: Vec<Value> = objects(&stdout)
        .into_iter()
        .map(|mut message| message["payload"].take())
        .collect();
    let list = json!([1, {"b": null}]);
    assert_eq!(seen, [list.clone(), list, json!(3), json!(4), json!(5)]);
}
