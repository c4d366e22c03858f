//! `castra harness` on recorded streams and on stand-ins for Codex: what becomes of every recorded
//! stream, of streams no Codex would say, what is kept, and how a process is ended. The real Codex
//! is in tests/harness_codex.rs.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use castra::core::events::contract::Stamped;
use serde_json::{Value, json};
use support::{Castra, eventually, golden, is_alive, objects, of_type, program};

const CONFIG: &str =
    "version = \"0.2.0\"\n[project]\nname = \"demo\"\nstate_dir = \"state\"\n[[vms]]\nname = \"web\"\n";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/codex")
}

fn fixture(name: &str) -> String {
    fixtures().join(format!("{name}.jsonl")).display().to_string()
}

/// An event without what differs from run to run.
fn normal(event: &Value) -> String {
    let mut event = event.clone();
    let fields = event.as_object_mut().unwrap();
    fields.insert("ts".into(), "TS".into());
    fields.insert("run".into(), "RUN".into());
    fields.insert("offset_ms".into(), 0.into());
    if fields.get("duration_ms").is_some_and(Value::is_number) {
        fields.insert("duration_ms".into(), 0.into());
    }
    if fields
        .get("command")
        .is_some_and(|command| command == "harness relay")
        && fields["type"] == "command.accepted"
    {
        fields.insert("detail".into(), "FILE".into());
    }
    event.to_string()
}

fn message_of<'e>(events: &'e [Value], kind: &str) -> &'e Value {
    events
        .iter()
        .find(|event| event["data"]["kind"] == kind)
        .unwrap_or_else(|| panic!("no message of kind {kind}: {events:?}"))
}

/// The verdict, and that the stream has the form every one has.
#[track_caller]
fn verdict(events: &[Value]) -> String {
    for event in events {
        assert!(
            Stamped::from_contract_line(&event.to_string()).is_some(),
            "{event}"
        );
    }
    let ours = |event: &&&Value| event["source"] == "cli";
    assert_eq!(events[0]["type"], "command.accepted");
    assert_eq!(of_type(events, "command.accepted").iter().filter(ours).count(), 1);
    assert_eq!(of_type(events, "summary").len(), 1);
    let begun = of_type(events, "command.accepted").len();
    let ended = of_type(events, "command.completed").len() + of_type(events, "command.failed").len();
    assert_eq!(begun, ended, "every command that began has ended");
    let summary = events.last().unwrap();
    assert_eq!(summary["type"], "summary");
    let verdict = summary["verdict"].as_str().unwrap().to_owned();
    assert_eq!(verdict == "complete", summary["exit_status"] == 0);
    verdict
}

#[test]
fn every_recorded_stream_becomes_the_events_it_should() {
    let castra = Castra::new("harness-golden");
    let mut seen = 0;
    for entry in fs::read_dir(fixtures()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "jsonl") {
            continue;
        }
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let code = if name.contains("turn_failed") || name.contains("interrupted") {
            1
        } else {
            0
        };
        let ran = castra
            .run(&["harness", "relay", &path.display().to_string(), "--json"])
            .exits(code);
        let events = ran.objects();
        let expected = match name.as_str() {
            "interrupted_sigterm" => "incomplete",
            _ if code == 1 => "failed",
            _ => "complete",
        };
        assert_eq!(verdict(&events), expected, "{name}");
        let lines: Vec<String> = events.iter().map(normal).collect();
        golden(&format!("harness/{name}.jsonl"), &(lines.join("\n") + "\n"));
        // Streams come in pieces of any size.
        let piped = castra
            .run_with_stdin(&["harness", "relay", "--json"], &fs::read(&path).unwrap())
            .exits(code);
        assert_eq!(piped.objects().len(), events.len(), "{name}");
        seen += 1;
    }
    assert_eq!(seen, 30, "all fixtures are here");
}

#[test]
fn a_resume_is_counted_right_in_both_generations() {
    for (first, second, expected) in [
        ("resume_1_first", "resume_2_second", [2500, 4500]),
        ("v055_resume_1_first", "v055_resume_2_second", [2500, 4500]),
    ] {
        let castra = Castra::new("harness-resume");
        castra.write("castra.toml", CONFIG);
        let prompts = |name: &str| {
            let events = castra
                .run(&["harness", "relay", &fixture(name), "--json"])
                .exits(0)
                .objects();
            let usage = of_type(&events, "usage");
            assert_eq!(usage.len(), 2);
            assert_eq!(
                (&usage[0]["scope"], &usage[1]["scope"]),
                (&json!("turn"), &json!("thread"))
            );
            [&usage[0], &usage[1]].map(|usage| usage["prompt_tokens"].as_u64().unwrap())
        };
        assert_eq!(prompts(first), [expected[0], expected[0]], "{first}");
        assert_eq!(
            prompts(second),
            [expected[1], expected[0] + expected[1]],
            "{second}"
        );
        // Both in one stream give the same sums.
        let both = [first, second]
            .map(|name| fs::read(fixture(name)).unwrap())
            .concat();
        let events = castra
            .run_with_stdin(&["harness", "relay", "--json", "--no-record"], &both)
            .exits(0)
            .objects();
        let of_turns: u64 = of_type(&events, "usage")
            .iter()
            .filter(|usage| usage["scope"] == "turn")
            .map(|usage| usage["prompt_tokens"].as_u64().unwrap())
            .sum();
        assert_eq!(of_turns, expected[0] + expected[1]);
        let turns: Vec<_> = of_type(&events, "usage")
            .iter()
            .map(|usage| usage["turn"].clone())
            .collect();
        assert_eq!(turns, [json!(1), json!(null), json!(2), json!(null)]);
    }
}

#[test]
fn what_was_said_is_kept_and_summed_up() {
    let castra = Castra::new("harness-kept");
    castra.write("castra.toml", CONFIG);
    for name in ["resume_1_first", "resume_2_second", "command_exit3"] {
        castra.run(&["harness", "relay", &fixture(name)]).exits(0);
    }
    let thread = "01a1fc64-62e2-74c2-8c4a-903e855a2f3b";
    let kept = castra
        .project()
        .join(format!("state/logs/harness/{thread}.jsonl"));
    let said = ["resume_1_first", "resume_2_second"].map(|name| fs::read(fixture(name)).unwrap());
    assert_eq!(fs::read(&kept).unwrap(), said.concat());
    assert_eq!(fs::metadata(&kept).unwrap().permissions().mode() & 0o777, 0o600);

    let listed = castra.run(&["harness", "list", "--json"]).exits(0).objects();
    let threads = listed[0]["threads"].as_array().unwrap();
    assert_eq!(threads.len(), 2);
    assert_eq!(
        (&threads[0]["thread"], &threads[0]["turns"]),
        (&json!(thread), &json!(2))
    );
    assert_eq!(
        (&threads[0]["prompt_tokens"], &threads[0]["sessions"]),
        (&json!(7000), &json!(2))
    );
    assert_eq!(
        (&threads[1]["commands"], &threads[1]["commands_failed"]),
        (&json!(1), &json!(1))
    );
    let told = castra.run(&["harness", "list"]).exits(0).stdout;
    assert!(
        told.contains(thread) && told.contains("2 turns, 7000 tokens in"),
        "{told}"
    );

    let lines: String = castra
        .run(&["harness", "show", "01a1fc64", "--json"])
        .exits(0)
        .stdout
        .lines()
        .map(|line| {
            line.strip_prefix("{\"line\":")
                .unwrap()
                .strip_suffix('}')
                .unwrap()
                .to_owned()
                + "\n"
        })
        .collect();
    assert_eq!(lines.as_bytes(), said.concat());
    let told = castra.run(&["harness", "show", thread]).exits(0).stdout;
    assert!(
        told.contains("codex: Second turn answer, after resume."),
        "{told}"
    );
    assert!(told.contains("codex ran `/bin/bash -lc 'echo again'`"), "{told}");
    castra.run(&["harness", "show", "01a1fc"]).exits(64);
    castra.run(&["harness", "show", "none"]).exits(64);

    let usage = castra.run(&["harness", "usage", "--json"]).exits(0).objects();
    assert_eq!(usage[0]["total"]["prompt_tokens"], 9500);
    assert_eq!(usage[0]["days"].as_array().unwrap().len(), 1);
    let of_turns: u64 = castra
        .run(&["events", "--type", "usage", "--json"])
        .exits(0)
        .objects()
        .iter()
        .filter(|usage| usage["scope"] == "turn")
        .map(|usage| usage["prompt_tokens"].as_u64().unwrap())
        .sum();
    assert_eq!(of_turns, 9500, "the journal holds the same");

    // What the records say can be made again from the transcripts.
    fs::remove_file(kept.with_extension("json")).unwrap();
    let again = castra.run(&["harness", "list", "--json"]).exits(0).objects();
    let of_thread = again[0]["threads"]
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["thread"] == thread)
        .unwrap();
    assert_eq!(
        (&of_thread["prompt_tokens"], &of_thread["turns"]),
        (&json!(7000), &json!(2))
    );
}

#[test]
fn tokens_are_joined_with_the_time_vms_ran() {
    let castra = Castra::new("harness-vm-time");
    castra.write("castra.toml", CONFIG);
    let line = |ts: &str, phase: &str, more: Value| {
        let mut event = json!({"type": "vm.lifecycle", "v": 1, "ts": ts, "offset_ms": 0, "seq": 0, "run": "r",
                               "phase": phase, "vm": "web"});
        event
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        event.to_string() + "\n"
    };
    let launched = json!({"pid": 1, "accel": "tcg", "accel_reason": "", "elapsed_ms": 1});
    let down = json!({"outcome": "graceful", "elapsed_ms": 1, "changed": true});
    let journal = line("2026-11-19T23:00:00.000Z", "launched", launched)
        + &line("2026-11-20T02:00:00.000Z", "shutdown-complete", down);
    castra.write("state/logs/events.jsonl", &journal);
    castra
        .run(&["harness", "relay", &fixture("plain_message")])
        .exits(0);
    let usage = castra
        .run(&["harness", "usage", "--json"])
        .exits(0)
        .objects()
        .remove(0);
    assert_eq!(
        usage["days"][0],
        json!({"day": "2026-11-19", "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0,
               "agent_ms": 0, "vm_ms": 3_600_000})
    );
    assert_eq!(usage["days"][1]["vm_ms"], 7_200_000);
    assert_eq!(usage["total"]["vm_ms"], 10_800_000);
    assert_eq!(
        (
            &usage["total"]["prompt_tokens"],
            &usage["total"]["cached_tokens"],
            &usage["total"]["completion_tokens"]
        ),
        (&json!(1200), &json!(1024), &json!(42))
    );
    let table = castra.run(&["harness", "usage"]).exits(0).stdout;
    assert!(table.contains("2026-11-20") && table.contains("1200"), "{table}");
}

#[test]
fn streams_no_codex_would_say_are_told_as_they_are() {
    let castra = Castra::new("harness-odd");
    let begin = b"{\"type\":\"thread.started\",\"thread_id\":\"../../etc/x\"}\n{\"type\":\"turn.started\"}\n"
        .to_vec();
    let end = b"{\"type\":\"turn.completed\",\"usage\":{\"input_tokens\":1,\"input_tokens\":2,\"output_tokens\":1}}\n";
    let deep = format!(
        "{{\"type\":\"new\",\"x\":{}{}}}\n",
        "[".repeat(50_000),
        "]".repeat(50_000)
    );
    let long = format!(
        "{{\"type\":\"item.completed\",\"item\":{{\"id\":\"i\",\"type\":\"agent_message\",\"text\":\"{}\"}}}}\n",
        "y".repeat(17 << 20)
    );
    let length = long.len() - 1;
    let middle: Vec<u8> = [
        b"\r\n\n{\"type\":\"turn.started\"} trailing\n\xff\xfe\n".to_vec(),
        b"{\"type\":\"item.completed\",\"item\":{\"id\":\"i\",\"type\":\"agent_message\",\"text\":\"a\xe2\x80\xa8b\\u001b[31m\\ud800\xff\"}}\n".to_vec(),
        deep.into_bytes(),
        long.into_bytes(),
        b"{\"type\":\"item.started\",\"item\":{\"id\":\"c\",\"type\":\"command_execution\",\"command\":\"one\"}}\n".to_vec(),
        b"{\"type\":\"item.started\",\"item\":{\"id\":\"c\",\"type\":\"command_execution\",\"command\":\"two\"}}\n".to_vec(),
    ]
    .concat();
    let stream = [
        begin.clone(),
        middle,
        end.to_vec(),
        b"{\"type\":\"turn.sta".to_vec(),
    ]
    .concat();
    castra.write("castra.toml", CONFIG);
    let ran = castra
        .run_with_stdin(&["harness", "relay", "-", "--json"], &stream)
        .exits(0);
    let events = ran.objects();
    assert_eq!(verdict(&events), "complete");
    let texts: Vec<&str> = of_type(&events, "message")
        .iter()
        .map(|event| event["text"].as_str().unwrap())
        .collect();
    assert!(
        texts.contains(&"a\u{2028}b\u{1b}[31m\u{fffd}\u{fffd}"),
        "{texts:?}"
    );
    assert!(
        message_of(&events, "unknown")["data"]["raw"].is_string(),
        "too deep to be a tree"
    );
    assert_eq!(message_of(&events, "too-long")["data"]["bytes"], length);
    let garbage = events
        .iter()
        .filter(|event| event["data"]["kind"] == "garbage")
        .count();
    assert_eq!(garbage, 3, "{texts:?}");
    let failed: Vec<_> = of_type(&events, "command.failed")
        .iter()
        .map(|event| event["command"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(failed, ["one", "two"], "both are abandoned");
    assert_eq!(of_type(&events, "usage")[0]["prompt_tokens"], 2);
    // The thread's name is no path.
    let kept: Vec<String> = fs::read_dir(castra.project().join("state/logs/harness"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(
        kept.iter()
            .all(|name| name.len() == 64 + ".jsonl".len() || name.len() == 64 + ".json".len()),
        "{kept:?}"
    );
    // Text for people has no control characters.
    let shown = castra.run(&["harness", "show", "../../etc/x"]).exits(0).stdout;
    assert!(
        !shown.contains('\u{1b}') && shown.contains("\\x1b[31m"),
        "{shown}"
    );

    for (stream, code) in [(&b""[..], 1), (b"\n\n", 1), (b"{}", 1), (&begin, 1)] {
        let ran = castra
            .run_with_stdin(&["harness", "relay", "--json"], stream)
            .exits(code);
        assert_eq!(verdict(&ran.objects()), "incomplete");
    }
    castra.run(&["harness", "relay", "no-such-file"]).exits(66);
    castra.run(&["harness", "relay", "a", "b"]).exits(64);
    castra.run(&["--config", "nowhere", "harness", "relay"]).exits(66);
}

/// A stand-in for Codex: a shell script that says what it likes.
fn agent(castra: &Castra, script: &str) -> String {
    let path = program(
        &castra.project().join("bin/codex"),
        format!("#!/bin/sh\n{script}\n"),
    );
    path.display().to_string()
}

const SAYS: &str = r#"printf '%s\n' '{"type":"thread.started","thread_id":"t-1"}' '{"type":"turn.started"}'"#;
const DONE: &str = r#"printf '%s\n' '{"type":"item.completed","item":{"id":"item_0","type":"agent_message","text":"done\nhere"}}' '{"type":"turn.completed","usage":{"input_tokens":9,"output_tokens":1}}'"#;

#[test]
fn an_agent_is_run_with_a_preamble_and_an_empty_stdin() {
    let castra = Castra::new("harness-run");
    castra.write("castra.toml", CONFIG);
    let codex = agent(
        &castra,
        &format!(
            "for word in \"$@\"; do printf '%s\\0' \"$word\"; done >argv; cat >stdin; pwd >pwd\n{SAYS}\n{DONE}"
        ),
    );
    fs::create_dir(castra.project().join("work")).unwrap();
    let ran = castra
        .run(&[
            "harness",
            "run",
            "--codex",
            &codex,
            "--model",
            "m",
            "--cwd",
            "work",
            "--resume",
            "t-1",
            "--codex-arg=--skip-git-repo-check",
            "--",
            "do",
            "it --now",
        ])
        .exits(0);
    assert_eq!(ran.stdout, "done\nhere\n");
    ran.tells("complete, 9 tokens in, 1 out");
    let work = castra.project().join("work");
    let argv = fs::read_to_string(work.join("argv")).unwrap();
    let argv: Vec<&str> = argv.split_terminator('\0').collect();
    assert_eq!(
        argv[..argv.len() - 1],
        [
            "exec",
            "--json",
            "--model=m",
            "--skip-git-repo-check",
            "resume",
            "--",
            "t-1"
        ]
    );
    let prompt = argv[argv.len() - 1];
    assert!(prompt.ends_with("\nYour task:\ndo it --now"), "{prompt}");
    assert!(prompt.contains("No VM runs."), "{prompt}");
    assert_eq!(fs::read(work.join("stdin")).unwrap(), b"");
    assert_eq!(
        fs::read_to_string(work.join("pwd")).unwrap().trim(),
        work.display().to_string()
    );

    let events = castra
        .run(&[
            "harness",
            "run",
            "--codex",
            &codex,
            "--no-preamble",
            "--json",
            "hello",
        ])
        .exits(0)
        .objects();
    assert_eq!(verdict(&events), "complete");
    let argv = fs::read_to_string(castra.project().join("argv")).unwrap();
    assert!(argv.ends_with("\0--\0hello\0"), "{argv}");
}

#[test]
fn every_end_has_its_verdict_and_leaves_nothing_behind() {
    let castra = Castra::new("harness-ends");
    castra.write("castra.toml", CONFIG);
    let run = |script: &str, flags: &[&str], code: i32| {
        let codex = agent(&castra, script);
        let args = [
            &["harness", "run", "--json", "--codex", &codex],
            flags,
            &["--", "x"],
        ]
        .concat();
        castra.run(&args).exits(code).objects()
    };
    let says_no = run("echo 'Not inside a trusted directory' >&2; exit 1", &[], 1);
    assert_eq!(verdict(&says_no), "failed");
    assert!(
        message_of(&says_no, "stderr")["text"]
            .as_str()
            .unwrap()
            .contains("Not inside a trusted")
    );

    let hangs = run(
        &format!("{SAYS}; echo $$ >pid; sleep 1000"),
        &["--timeout", "1"],
        1,
    );
    assert_eq!(verdict(&hangs), "timed out");
    let pid = fs::read_to_string(castra.project().join("pid")).unwrap();
    assert!(!is_alive(pid.trim()));

    let silent = run(
        &format!("{SAYS}; trap '' TERM; sleep 0.1"),
        &["--idle-timeout=60"],
        1,
    );
    assert_eq!(verdict(&silent), "incomplete");
    let silent = run(
        &format!("{SAYS}; exec sleep 1000"),
        &["--idle-timeout", "300ms"],
        1,
    );
    assert_eq!(verdict(&silent), "timed out");

    let crashed = run(&format!("{SAYS}; kill -9 $$"), &[], 1);
    assert_eq!(verdict(&crashed), "incomplete");
    let odd = run(&format!("{SAYS}; {DONE}; exit 7"), &[], 1);
    assert_eq!(verdict(&odd), "failed");
    let left = run(&format!("{SAYS}; setsid sleep 1000 & {DONE}"), &[], 0);
    assert_eq!(verdict(&left), "complete");

    let renamed = run(&format!("{SAYS}; {DONE}"), &["--resume", "no-such-name"], 0);
    assert_eq!(verdict(&renamed), "complete");
    // `t-1` is known by now: the name may well be its.
    assert!(
        !renamed
            .iter()
            .any(|event| event["data"]["asked"] == "no-such-name")
    );
    let new = SAYS.replace("t-1", "t-2");
    let renamed = run(&format!("{new}; {DONE}"), &["--resume", "no-such-name"], 0);
    let warning = renamed
        .iter()
        .find(|event| event["data"]["asked"] == "no-such-name")
        .unwrap();
    assert_eq!(warning["severity"], "warn");
}

#[test]
fn what_cannot_run_is_refused_before_anything_runs() {
    let castra = Castra::new("harness-refused");
    castra.write("castra.toml", CONFIG);
    let refused = |args: &[&str], code: i32| {
        let ran = castra
            .run(&[&["harness", "run", "--json"], args].concat())
            .exits(code);
        let events = ran.objects();
        assert_eq!(events.len(), 1, "{events:?}");
        assert_eq!(events[0]["type"], "command.rejected");
        assert!(events[0]["remediation"].is_string(), "{events:?}");
    };
    refused(&["--codex", "no-such-codex", "--", "x"], 69);
    refused(&["--codex", "/etc/passwd", "--", "x"], 69);
    refused(&["--codex", "true", "--cwd", "nowhere", "--", "x"], 66);
    refused(&["--codex", "true", "--", " "], 64);
    refused(&["--codex", "true", "--", &"x".repeat(125_000)], 64);
    refused(&["--codex", "true", "--in", "nobody", "--", "x"], 64);
    refused(&["--codex", "true", "--timeout", "soon", "--", "x"], 64);
    refused(&[], 64);
    castra.run(&["harness", "run", "--in", "web", "--", "x"]).exits(1);
    assert!(!castra.project().join("state/logs").exists());
}

#[test]
fn ctrl_c_ends_the_agent_with_all_it_started() {
    let castra = Castra::new("harness-ctrl-c");
    castra.write("castra.toml", CONFIG);
    let codex = agent(
        &castra,
        &format!("{SAYS}; setsid sleep 1000 & echo $! >child; echo $$ >self; wait"),
    );
    let child = castra
        .command(&["harness", "run", "--json", "--codex", &codex, "--", "x"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pids = eventually("the agent to run", || {
        let read = |name: &str| {
            let text = fs::read_to_string(castra.project().join(name)).ok()?;
            text.ends_with('\n').then(|| text.trim().to_owned())
        };
        Some([read("child")?, read("self")?])
    });
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let events = objects(&String::from_utf8(output.stdout).unwrap());
    assert_eq!(verdict(&events), "incomplete");
    for pid in pids {
        assert!(!is_alive(&pid), "{pid} is left");
    }
}
