//! `castra events` and the journals behind it, by the real binary: picking, following, many
//! writers at once, and journals that can't be written or read.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;
use support::{Castra, eventually};

/// More than a busy machine needs, less than anybody would wait.
const LONG: Duration = Duration::from_secs(60);

/// A project whose broker can be started without QEMU, with its state beside it.
const PROJECT: &str = "[project]\nstate_dir = \"state\"\n[broker]\nport = 0\n[[vms]]\nname = \"web\"\n";

fn project(name: &str, rest: &str) -> Castra {
    let castra = Castra::new(name);
    castra.write("castra.toml", &format!("{PROJECT}{rest}"));
    castra
}

fn journal(castra: &Castra) -> PathBuf {
    castra.project().join("state/logs/events.jsonl")
}

fn line(seq: u32, kind: &str) -> String {
    let (minutes, seconds) = (seq / 60, seq % 60);
    format!(
        "{{\"type\":\"{kind}\",\"v\":1,\"ts\":\"2026-11-21T10:{minutes:02}:{seconds:02}.000Z\",\"offset_ms\":0,\
         \"seq\":{seq},\"run\":\"r{}\",\"text\":\"…\"}}\n",
        seq % 2
    )
}

/// `castra events -f`, read line by line.
struct Following {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Following {
    fn start(castra: &Castra, args: &[&str]) -> Following {
        let mut child = castra
            .command(&[&["events", "--json", "--follow"], args].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Following { child, lines }
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// Asks it to end, and hands back its exit code and stderr.
    fn end(self, signal: &str) -> (Option<i32>, String) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args([signal, &pid]).status();
        assert!(sent.unwrap().success());
        let output = self.child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }
}

#[test]
fn events_are_picked_by_time_run_number_and_count() {
    let castra = project("events-pick", "");
    let text: String = (0..20).map(|seq| line(seq, "message")).collect();
    castra.write("state/logs/events.jsonl", &text);
    let seqs = |args: &[&str]| -> Vec<u64> {
        let ran = castra.run(&[&["events", "--json"], args].concat()).exits(0);
        assert_eq!(ran.stderr, "");
        ran.objects()
            .iter()
            .map(|line| line["seq"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(seqs(&[]), (0..20).collect::<Vec<_>>());
    assert_eq!(seqs(&["--tail", "2"]), [18, 19]);
    assert_eq!(seqs(&["--since", "2026-11-21T10:00:17Z"]), [17, 18, 19]);
    assert_eq!(seqs(&["--since", "2026-11-21T12:00:18+02:00"]), [18, 19]);
    assert_eq!(seqs(&["--since", "2026-11-21T10:00:10Z", "--tail", "1"]), [19]);
    assert_eq!(seqs(&["--run", "r1", "--after", "14"]), [15, 17, 19]);
    assert_eq!(seqs(&["--run", "r0", "--tail", "1"]), [18]);
    assert_eq!(seqs(&["--type", "mes*ge", "--tail", "1"]), [19]);
    assert_eq!(seqs(&["--since", "1s"]), [0; 0]);

    for wrong in [
        &["--after", "3"][..],
        &["--since", "tomorrow"],
        &["--since", ""],
        &["--tail", "-1"],
        &["--run", ""],
    ] {
        let ran = castra.run(&[&["--json", "events"], wrong].concat()).exits(64);
        assert_eq!(ran.objects()[0]["type"], "command.rejected", "{ran:?}");
        assert_eq!(ran.objects().len(), 1, "{ran:?}");
    }
}

#[test]
fn corrupt_lines_are_skipped_and_counted() {
    let castra = project("events-corrupt", "");
    let text = format!(
        "{}not json\n{}\u{0}\u{0}\u{0}\n{{\"type\":\"message\",\"te{}{{\"torn",
        line(0, "message"),
        line(1, "a.type.of.2031"),
        line(2, "message"),
    );
    castra.write("state/logs/events.jsonl", &text);
    fs::write(
        journal(&castra).with_file_name("events-broker.jsonl"),
        b"\xff\xfe\n\n[]\n",
    )
    .unwrap();
    for args in [&["events", "--json"][..], &["events"]] {
        let ran = castra.run(args).exits(0);
        assert_eq!(ran.stdout.lines().count(), 3, "{ran:?}");
        assert_eq!(ran.stderr, "warning: 7 corrupt lines skipped: no events\n");
    }
    let kinds: Vec<Value> = castra.run(&["events", "--json"]).objects();
    let kinds: Vec<&str> = kinds.iter().map(|line| line["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["message", "a.type.of.2031", "message"]);
}

#[test]
fn what_happens_is_followed_as_it_happens() {
    let castra = project("events-follow", "");
    // Nothing is there yet, not even the directory.
    let mut following = Following::start(&castra, &["--type", "command.*"]);
    let up = castra.run(&["up", "--broker-only", "--json"]).exits(0).objects();
    for kind in ["command.accepted", "command.completed"] {
        let next = following.next();
        assert_eq!((&next["type"], &next["run"]), (&kind.into(), &up[0]["run"]));
    }
    // A torn piece that another writer ends, and a file rotated away.
    castra.makes_up_events();
    let mut file = fs::File::options().append(true).open(journal(&castra)).unwrap();
    file.write_all(b"{\"type\":\"command.acc").unwrap();
    file.write_all(line(7, "command.of.2031").as_bytes()).unwrap();
    assert_eq!(following.next()["seq"], 7);
    fs::rename(journal(&castra), journal(&castra).with_extension("jsonl.1")).unwrap();
    fs::write(journal(&castra), line(8, "command.of.2031")).unwrap();
    assert_eq!(following.next()["seq"], 8);
    let (code, stderr) = following.end("-INT");
    assert_eq!(code, Some(130));
    assert_eq!(stderr, "warning: 1 corrupt line skipped: no events\n");
    castra.run(&["down"]).exits(0);
}

#[test]
fn a_reader_that_goes_ends_the_following() {
    let castra = project("events-reader", "");
    castra.write("state/logs/events.jsonl", &line(0, "message"));
    let mut following = Following::start(&castra, &[]);
    assert_eq!(following.next()["seq"], 0);
    // Nothing more ever happens, and nobody reads.
    let Following { mut child, lines } = following;
    drop(lines);
    let status = eventually(LONG, "castra to notice", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    let stderr = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert_eq!(stderr, "");
}

/// Two commands that loop, a broker that is spoken to, small journals, and a reader that follows.
#[test]
fn several_castras_and_a_broker_write_at_once() {
    const ROUNDS: usize = 40;
    // Every key that castra doesn't know is a warning, and so an event, of each run.
    let unknown: String = (0..60).map(|number| format!("odd_{number} = 1\n")).collect();
    let castra = Castra::new("events-writers");
    let bus = format!("[bus]\nlog_max_bytes = 65536\nlog_keep = 50\n{unknown}");
    castra.write("castra.toml", &format!("{PROJECT}{bus}"));
    let following = Following::start(&castra, &[]);
    let pid = following.child.id().to_string();
    let followed = Mutex::new(Vec::new());
    let printed: Vec<Value> = std::thread::scope(|scope| {
        scope.spawn(|| {
            for line in following.lines.lines() {
                followed.lock().unwrap().push(line.unwrap());
            }
        });
        castra.run(&["up", "--broker-only"]).exits(0);
        let port = castra.run(&["status", "--json"]).exits(0).objects()[0]["broker"]["port"].as_u64();
        let writer = || {
            let mut printed = Vec::new();
            for _ in 0..ROUNDS {
                // Busy where both are at it at once.
                let ran = castra.run(&["--json", "up", "--broker-only"]);
                assert!(matches!(ran.code, Some(0 | 75)), "{ran:?}");
                printed.extend(ran.objects());
            }
            printed
        };
        let writers = [scope.spawn(writer), scope.spawn(writer)];
        for _ in 0..200 {
            let mut stream = TcpStream::connect(("127.0.0.1", port.unwrap() as u16)).unwrap();
            let _ = stream.write_all(b"hello vm:nobody\n");
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
        let printed = writers.map(|writer| writer.join().unwrap()).concat();
        castra.run(&["down"]).exits(0);
        let all = kept(&castra).len();
        eventually(LONG, "everything to be followed", || {
            (followed.lock().unwrap().len() >= all).then_some(())
        });
        assert!(
            Command::new("kill")
                .args(["-INT", &pid])
                .status()
                .unwrap()
                .success()
        );
        printed
    });
    following_ended(following.child);

    let kept = kept(&castra);
    assert!(
        journal(&castra).with_extension("jsonl.2").exists(),
        "it was rotated"
    );
    let mut numbers: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for line in &kept {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let run = numbers
            .entry(event["run"].as_str().unwrap().to_owned())
            .or_default();
        run.push(event["seq"].as_u64().unwrap());
    }
    for (run, seqs) in &numbers {
        assert!(seqs.iter().copied().eq(0..seqs.len() as u64), "{run}: {seqs:?}");
    }
    // A refusal where nothing ran has no run that would be kept.
    for line in printed
        .iter()
        .filter(|line| line["type"] != "command.rejected" || line["seq"] != 0)
    {
        let seqs = &numbers[line["run"].as_str().unwrap()];
        assert!(seqs.contains(&line["seq"].as_u64().unwrap()), "{line}");
    }
    let (mut kept, mut followed) = (kept, followed.into_inner().unwrap());
    kept.sort();
    followed.sort();
    assert_eq!(followed, kept, "each line once");
}

/// Every line of both journals, their oldest files first.
fn kept(castra: &Castra) -> Vec<String> {
    let mut lines = Vec::new();
    for name in ["events.jsonl", "events-broker.jsonl"] {
        let path = journal(castra).with_file_name(name);
        let rotated = |number: u32| path.with_file_name(format!("{name}.{number}"));
        let there = (1..).take_while(|number| rotated(*number).exists()).count() as u32;
        for path in (1..=there).rev().map(rotated).chain([path.clone()]) {
            let text = fs::read_to_string(path).unwrap();
            assert!(text.ends_with('\n'), "a torn line");
            lines.extend(text.lines().map(str::to_owned));
        }
    }
    lines
}

fn following_ended(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
