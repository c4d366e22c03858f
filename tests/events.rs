//! `castra events` and the journals behind it, by the real binary: picking, following, many
//! writers at once, journals that can't be written or read, and what `--json` prints.
#![allow(clippy::unwrap_used, dead_code, missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command};
use std::sync::Mutex;

use serde_json::Value;
use support::project::{Project, TWO, finish};
use support::{Castra, Ran, eventually, spawn_piped, until};

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
        let mut child = spawn_piped(castra.command(&[&["events", "--json", "--follow"], args].concat()));
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
        assert_eq!(ran.stderr, "warning: 7 invalid lines skipped\n");
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
    assert_eq!(stderr, "warning: 1 invalid line skipped\n");
    castra.run(&["down"]).exits(0);
}

#[test]
fn a_reader_that_goes_ends_the_following() {
    let castra = project("events-reader", "");
    castra.write("state/logs/events.jsonl", &line(0, "message"));
    let mut following = Following::start(&castra, &[]);
    assert_eq!(following.next()["seq"], 0);
    // No more events come, and the reader is gone.
    let Following { mut child, lines } = following;
    drop(lines);
    let status = eventually("castra to notice", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    let stderr = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert_eq!(stderr, "");
}

/// Two commands in loops, a broker with clients, small journals, and a reader that follows.
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
        let port = castra.broker_port();
        let writer = || {
            let mut printed = Vec::new();
            for _ in 0..ROUNDS {
                // Busy, if both work at the same time.
                let ran = castra.run(&["--json", "up", "--broker-only"]);
                assert!(matches!(ran.code, Some(0 | 75)), "{ran:?}");
                printed.extend(ran.objects());
            }
            printed
        };
        let writers = [scope.spawn(writer), scope.spawn(writer)];
        for _ in 0..200 {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let _ = stream.write_all(b"hello vm:nobody\n");
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
        let printed = writers.map(|writer| writer.join().unwrap()).concat();
        castra.run(&["down"]).exits(0);
        let all = kept(&castra).len();
        until("everything to be followed", || {
            followed.lock().unwrap().len() >= all
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
    let told = castra.run(&["events", "--json"]).exits(0).objects();
    let times: Vec<&str> = told.iter().map(|line| line["ts"].as_str().unwrap()).collect();
    assert!(times.is_sorted(), "merged by time");
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

/// Starts and stops a project whose journal can't be written: it is said once in each run, and
/// changes nothing else.
fn goes_on_without(castra: &Castra, run: impl Fn(&[&str]) -> Ran) {
    for command in [&["up", "--broker-only"][..], &["down"]] {
        let ran = run(&[&["--json"], command].concat()).exits(0);
        let events = ran.objects();
        let said: Vec<&Value> = events
            .iter()
            .filter(|event| event["severity"] == "warn")
            .collect();
        assert_eq!(said.len(), 1, "{ran:?}");
        let text = said[0]["text"].as_str().unwrap();
        let place = journal(castra);
        assert!(
            text.starts_with(&format!("events can't be kept in {}: ", place.display())),
            "{text}"
        );
        assert!(said[0]["remediation"].is_string());
        let last = events.last().unwrap();
        assert_eq!(
            (&last["type"], &last["exit_status"]),
            (&"summary".into(), &0.into())
        );
        // The broker's start or stop passes through: it is of another run.
        let own = events.iter().filter(|event| event["run"] == events[0]["run"]);
        let own: Vec<u64> = own.map(|event| event["seq"].as_u64().unwrap()).collect();
        assert!(own.iter().copied().eq(0..own.len() as u64), "{ran:?}");
    }
    let people = run(&["up", "--broker-only"]).exits(0);
    assert_eq!(
        people.stderr.matches("events can't be kept").count(),
        1,
        "{people:?}"
    );
    run(&["down"]).exits(0);
}

#[test]
fn operations_go_on_where_something_lies_in_the_journals_place() {
    let castra = project("events-directory", "");
    fs::create_dir_all(journal(&castra)).unwrap();
    goes_on_without(&castra, |args| castra.run(args));
    // The broker's own journal is there to be read.
    let kinds = castra
        .run(&["events", "--json", "--type", "broker.st*"])
        .exits(0)
        .objects();
    assert_eq!(kinds.len(), 4, "{kinds:?}");
}

#[test]
fn operations_go_on_when_the_disk_is_full() {
    let castra = project("events-full", "");
    fs::create_dir_all(journal(&castra).parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", journal(&castra)).unwrap();
    goes_on_without(&castra, |args| castra.run(args));
}

/// A limit on the size of files comes with a signal that ends whoever doesn't expect it.
#[test]
fn operations_go_on_when_the_journal_may_not_grow() {
    let castra = project("events-limit", "");
    // More than the limit, in lines of which the last is whole.
    let text: String = (0..400).map(|seq| line(seq, "message")).collect();
    castra.write("state/logs/events.jsonl", &text);
    goes_on_without(&castra, |args| {
        finish(castra.command_under("ulimit -f 32", args), args)
    });
    let kept = fs::read_to_string(journal(&castra)).unwrap();
    assert_eq!(kept, text, "nothing torn is left");
}

#[test]
fn a_reader_that_goes_leaves_the_vms_alone() {
    let project = Project::new("events-gone", TWO);
    let mut child = spawn_piped(project.castra().command(&["--json", "up"]));
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    lines.read_line(&mut String::new()).unwrap();
    drop(lines);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    for vm in ["web", "db"] {
        assert_eq!(project.vm(vm)["state"], "running");
    }
    // Events are kept even if nobody reads the stream.
    let kept = project
        .run(&["events", "--json", "--type", "vm.lifecycle"])
        .exits(0);
    let launched = |line: &&Value| line["phase"] == "launched";
    assert_eq!(kept.objects().iter().filter(launched).count(), 2);
    project.run(&["down"]).exits(0);
}

/// Whatever is asked for, whether it works or not: one object a line, and nothing else.
#[test]
fn with_json_stdout_is_json_alone() {
    let castra = project("events-json", "");
    let check = |args: &[&str]| {
        let ran = castra.run(&[&["--json"], args].concat());
        for object in ran.objects() {
            assert!(object.is_object(), "{ran:?}");
        }
        if ran.code.is_some_and(|code| code >= 64) {
            let rejected = |line: &&Value| line["type"] == "command.rejected";
            assert_eq!(ran.objects().iter().filter(rejected).count(), 1, "{ran:?}");
        }
        ran
    };
    for args in [
        &["init", "--output", "new.toml"][..],
        &["up", "--broker-only"],
        &["up", "--plan"],
    ] {
        assert!(!check(args).exits(0).stdout.is_empty(), "{args:?}");
    }
    for args in [
        &["status"][..],
        &["status", "--all"],
        &["ports"],
        &["logs"],
        &["events"],
        &["workspaces"],
        &["image", "list"],
    ] {
        assert!(!check(args).exits(0).stdout.is_empty(), "{args:?}");
    }
    check(&["image", "path"]);
    for args in [
        &["init"][..],
        &["up", "nobody"],
        &["up", "--bootstrap", "sometimes"],
        &["bootstrap"],
        &["down", "nobody"],
        &["status", "--watch=3"],
        &["logs", "nobody"],
        &["events", "--since", "x"],
        &["image", "burn"],
        &["fly"],
        &[],
        &["--workspace", "nobody-00000000", "status"],
    ] {
        let ran = check(args);
        assert_ne!(ran.code, Some(0), "{ran:?}");
        assert!(!ran.stdout.is_empty(), "{ran:?}");
    }
    let down = check(&["down"]).exits(0).objects();
    assert_eq!(down.last().unwrap()["type"], "summary");
}

#[test]
fn init_is_kept_where_its_project_has_a_journal() {
    let castra = Castra::new("events-init");
    castra.run(&["init"]).exits(0);
    assert!(!castra.home().exists(), "it leaves one file");
    castra.run(&["up", "--broker-only"]).exits(0);
    castra.run(&["down"]).exits(0);
    let printed = castra.run(&["--json", "init", "--force"]).exits(0).stdout;
    let run = castra.run(&["events", "--json", "--type", "command.accepted", "--tail", "1"]);
    let run = run.objects()[0].clone();
    assert_eq!(run["command"], "init");
    let kept = castra.run(&["events", "--json", "--run", run["run"].as_str().unwrap()]);
    assert_eq!(kept.stdout, printed);
    // A refusal, where nothing ran, isn't kept.
    castra.run(&["init"]).exits(73);
    let last = castra.run(&["events", "--json", "--tail", "1"]).objects();
    assert_eq!(
        (&last[0]["type"], &last[0]["run"]),
        (&"summary".into(), &run["run"])
    );
}

/// A refusal under way stands before the end, and the journal has it all.
#[test]
fn a_refusal_under_way_is_told_once_and_then_the_end() {
    let castra = Castra::new("events-refusal");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    castra.write(
        "castra.toml",
        &PROJECT.replace("port = 0", &format!("port = {port}")),
    );
    let ran = castra.run(&["--json", "up", "--broker-only"]).exits(75);
    let kinds: Vec<String> = ran
        .objects()
        .iter()
        .map(|line| line["type"].as_str().unwrap().to_owned())
        .collect();
    let end = ["command.rejected", "command.failed", "summary"];
    assert_eq!(kinds.first().unwrap(), "command.accepted");
    assert_eq!(kinds[kinds.len() - 3..], end, "{ran:?}");
    assert_eq!(castra.run(&["events", "--json"]).exits(0).stdout, ran.stdout);
    let people = castra.run(&["up", "--broker-only"]).exits(75);
    assert_eq!(people.stderr.matches("can't listen").count(), 1, "{people:?}");

    // A failure of the whole operation is a blocker.
    castra.write("castra.toml", PROJECT);
    fs::remove_file(castra.project().join("state/guests.json")).unwrap();
    fs::create_dir_all(castra.project().join("state/guests.json/in-the-way")).unwrap();
    let ran = castra.run(&["--json", "up", "--broker-only"]);
    let events = ran.objects();
    let at = events.iter().position(|line| line["severity"] == "blocker");
    let blocker = &events[at.unwrap_or_else(|| panic!("no blocker: {ran:?}"))];
    assert!(blocker["remediation"].is_string(), "{blocker}");
    assert_eq!(events[at.unwrap() + 1]["type"], "command.rejected");
    let people = castra.run(&["up", "--broker-only"]);
    assert_eq!(people.code, ran.code);
    assert_eq!(people.stderr.matches("error:").count(), 1, "{people:?}");
}
