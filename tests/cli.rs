//! The command line as its users meet it: the real binary, its streams and exit codes.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::thread;

use support::fleet::Fleet;
use support::{CASTRA, Castra, eventually, golden, program, spawn_piped};

/// What `castra --help` lists.
const COMMANDS: &[&[&str]] = &[
    &["init"],
    &["up"],
    &["down"],
    &["restart"],
    &["bootstrap"],
    &["ssh"],
    &["exec"],
    &["status"],
    &["wait"],
    &["logs"],
    &["events"],
    &["report"],
    &["clean"],
    &["ports"],
    &["workspaces"],
    &["bus", "publish"],
    &["bus", "request"],
    &["bus", "subscribe"],
    &["bus", "tail"],
    &["bus", "bench"],
    &["image", "build"],
    &["image", "list"],
    &["image", "path"],
    &["broker"],
    &["completions"],
    &["man"],
];

#[test]
fn help_of_every_command() {
    let castra = Castra::new("help");
    golden("cli/help.txt", &castra.run(&["--help"]).exits(0).stdout);
    golden("cli/help-short.txt", &castra.run(&["-h"]).exits(0).stdout);
    golden("cli/image.txt", &castra.run(&["image", "--help"]).exits(0).stdout);
    golden("cli/bus.txt", &castra.run(&["bus", "--help"]).exits(0).stdout);
    for words in COMMANDS {
        let name = words.join("-");
        for (flag, suffix) in [("--help", ""), ("-h", "-short")] {
            let ran = castra.run(&[words, &[flag][..]].concat()).exits(0);
            assert_eq!(ran.stderr, "");
            golden(&format!("cli/{name}{suffix}.txt"), &ran.stdout);
        }
    }
    assert!(!castra.home().exists(), "help makes nothing");
}

#[test]
fn version() {
    let castra = Castra::new("version");
    let expected = format!("castra {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(castra.run(&["--version"]).exits(0).stdout, expected);
    assert_eq!(castra.run(&["-V"]).exits(0).stdout, expected);
}

#[test]
fn wrong_usage_is_64_and_names_the_nearest() {
    let castra = Castra::new("usage");
    for (args, expected) in [
        (&["stauts"][..], "try: castra status, the nearest known word"),
        (
            &["up", "--borker-only"],
            "try: --broker-only, the nearest known word",
        ),
        (
            &["man", "castra.tml"],
            "try: castra man castra.toml, the nearest known word",
        ),
        (
            &["bus", "publish", "ci/x", "hello", "world"],
            "try: put the payload in single quotes, such as '{\"ok\": true}' or '\"some text\"'",
        ),
        (
            &["down", "--plan"],
            "because: it belongs to `castra up` and `castra bootstrap`",
        ),
        (&["--quiet"], "error: no command given"),
    ] {
        let ran = castra.run(args).exits(64);
        assert_eq!(ran.stdout, "");
        ran.tells(expected);
    }
    let first = castra.run::<&str>(&[]).exits(0).stdout;
    for step in [
        "castra init",
        "castra up",
        "castra ssh ",
        "castra down",
        "castra --help",
    ] {
        assert!(first.contains(step), "{first}");
    }
    golden("cli/unknown-command.txt", &castra.run(&["stauts"]).stderr);
}

#[test]
fn a_refusal_with_json_is_one_contract_line() {
    let castra = Castra::new("refusal");
    castra.write("bad/castra.toml", "[[vms]]\nname = \"web\"\nmemory = \"lots\"\n");
    for (args, command, exit) in [
        (&["--json", "stauts"][..], "castra", 64),
        (&["up", "--json", "--nonsense"], "up", 64),
        (&["status", "--json"], "status", 66),
        (&["--json", "--workspace", "nowhere", "status"], "status", 66),
        (&["--json", "--config", "bad", "status"], "status", 65),
        (&["--json", "--config", "missing.toml", "broker"], "broker", 66),
    ] {
        let ran = castra.run(args).exits(exit);
        let objects = ran.objects();
        assert_eq!(objects.len(), 1, "{}", ran.stdout);
        let object = &objects[0];
        assert_eq!(object["type"], "command.rejected");
        assert_eq!(object["v"], 1);
        assert_eq!(object["command"], command, "{args:?}");
        assert_eq!(object["exit_status"], exit);
        assert_eq!(object["source"], "cli");
        assert!(object["detail"].as_str().is_some_and(|text| !text.is_empty()));
        for key in ["ts", "offset_ms", "seq", "run", "remediation", "thread", "turn"] {
            assert!(object.get(key).is_some(), "{key} is missing");
        }
        assert!(ran.stderr.starts_with("error: "), "{}", ran.stderr);
    }
}

#[test]
fn without_a_project_castra_says_what_there_is() {
    let castra = Castra::new("nothing");
    let ran = castra.run(&["status"]).exits(66);
    ran.tells("there is no castra.toml in");
    ran.tells("no castra project runs");
    ran.tells("`castra init` writes one");
    let ran = castra
        .run(&["--config", "a", "--workspace", "b", "status"])
        .exits(64);
    ran.tells("leave one out");
    let listed = castra.run(&["workspaces", "--json"]).exits(0).objects();
    assert_eq!(listed, [serde_json::json!({"workspaces": []})]);
    assert!(!castra.home().exists(), "looking makes nothing");
}

#[test]
fn init_then_a_config_that_loads() {
    let castra = Castra::new("init");
    let ran = castra.run(&["init"]).exits(0);
    assert!(
        ran.stdout.starts_with("Created castra.toml (project "),
        "{}",
        ran.stdout
    );
    ran.tells("next: `castra up`");
    assert_eq!(castra.run(&["vm-names"]).exits(0).stdout, "web\n");
    let status = castra.status();
    assert_eq!(status["schema"], "castra.status.v1");
    assert_eq!(status["vms"][0]["state"], "stopped");
    let again = castra.run(&["init"]);
    assert!(again.code.is_some_and(|code| code >= 64), "{again:?}");
    again.tells("--force");
    castra
        .run(&["init", "--force", "--project-name", "other"])
        .exits(0);
    let status = castra.status();
    assert_eq!(status["project"], "other");
    let events = castra
        .run(&["--json", "init", "--output", "sub.toml"])
        .exits(0)
        .objects();
    assert_eq!(events[0]["type"], "command.accepted");
    assert_eq!(events.last().unwrap()["type"], "summary");
}

#[test]
fn logs_and_events_read_what_is_there() {
    let castra = Castra::new("logs");
    castra.write(
        "castra.toml",
        "[project]\nname = \"demo\"\nstate_dir = \"state\"\n[[vms]]\nname = \"web\"\n",
    );
    let ran = castra.run(&["logs"]).exits(0);
    assert!(ran.stdout.is_empty() && ran.stderr.contains("empty"), "{ran:?}");
    castra.write("state/vms/web/serial.log", "booting\r\n\x1b[2Jclear\nlast\n");
    castra.write("state/logs/broker.log", "[host-broker] one\n");
    assert_eq!(
        castra.run(&["logs"]).exits(0).stdout,
        "web serial    | booting\nweb serial    | \\x1b[2Jclear\nweb serial    | last\n    broker    | [host-broker] one\n"
    );
    assert_eq!(
        castra.run(&["logs", "WEB", "--tail", "1"]).exits(0).stdout,
        "web serial    | last\n"
    );
    let objects = castra
        .run(&["logs", "--source", "serial", "--tail=1", "--json"])
        .exits(0)
        .objects();
    assert_eq!(
        objects,
        [serde_json::json!({"ts": null, "source": "serial", "vm": "web", "line": "last"})]
    );
    castra.run(&["logs", "wbe"]).exits(64);

    let line = "{\"type\":\"message\",\"v\":1,\"ts\":\"2026-11-21T10:00:00.000Z\",\"offset_ms\":0,\"seq\":0,\
                \"run\":\"r\",\"severity\":\"warn\",\"text\":\"odd \\u001b[2J\",\"vm\":\"web\",\"remediation\":null,\
                \"source\":null,\"thread\":null,\"turn\":null,\"data\":null}";
    castra.write("state/logs/events.jsonl", &format!("{line}\n"));
    assert_eq!(
        castra.run(&["events", "--json"]).exits(0).stdout,
        format!("{line}\n")
    );
    assert_eq!(
        castra
            .run(&["events", "--type", "mess*", "--vm", "web"])
            .exits(0)
            .stdout,
        "2026-11-21T10:00:00.000Z  web       warning: odd \\x1b[2J\n"
    );
    assert_eq!(castra.run(&["events", "--type", "summary"]).exits(0).stdout, "");
    let none = castra.run(&["events", "--type", "bootstrap"]).exits(0);
    none.tells("try: --type 'bootstrap.*'");
}

#[test]
fn colour_is_for_terminals_unless_asked_for() {
    let castra = Castra::new("colour");
    let escapes = |args: &[&str], env: &[(&str, &str)]| {
        let output = castra.command(args).envs(env.iter().copied()).output().unwrap();
        output.stderr.contains(&0x1b)
    };
    assert!(!escapes(&["stauts"], &[("TERM", "xterm")]), "stderr is a pipe");
    assert!(escapes(&["--color", "always", "stauts"], &[]));
    assert!(
        escapes(&["--color", "always", "stauts"], &[("NO_COLOR", "1")]),
        "the flag was typed"
    );
    assert!(!escapes(&["--color", "never", "stauts"], &[("TERM", "xterm")]));
}

/// `script` gives a command a terminal of its own; it is part of util-linux or bsdutils.
#[test]
fn on_a_terminal_no_color_and_dumb_are_obeyed() {
    let castra = Castra::new("terminal");
    let escapes = |env: &[(&str, &str)]| {
        let binary = CASTRA;
        let output = Command::new("script")
            .args(["-qec", &format!("{binary} stauts"), "/dev/null"])
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("SHELL", "/bin/sh")
            .envs(env.iter().copied())
            .current_dir(castra.project())
            .stdin(Stdio::null())
            .output()
            .expect("script is there: it is essential on Debian");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("there is no command"), "{text}");
        text.contains('\x1b')
    };
    assert!(escapes(&[("TERM", "xterm")]));
    assert!(!escapes(&[("TERM", "xterm"), ("NO_COLOR", "1")]));
    assert!(
        escapes(&[("TERM", "xterm"), ("NO_COLOR", "")]),
        "an empty NO_COLOR is none"
    );
    assert!(!escapes(&[("TERM", "dumb")]));
    assert!(!escapes(&[]));
}

#[test]
fn a_reader_who_leaves_is_no_error() {
    let castra = Castra::new("pipe");
    for args in [&["man"][..], &["--help"], &["completions", "bash"]] {
        let mut child = spawn_piped(castra.command(args));
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    }
}

#[test]
fn a_full_disk_is_an_error() {
    let castra = Castra::new("full");
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = castra.command(&["man"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(74));
    assert!(String::from_utf8_lossy(&output.stderr).contains("can't write to stdout"));
}

#[test]
fn the_broker_pipe_joins_both_ends() {
    let castra = Castra::new("broker-pipe");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let broker = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"greeting\n").unwrap();
        let mut hello = String::new();
        stream.read_to_string(&mut hello).unwrap();
        stream.write_all(b"ok\n").unwrap();
        hello
    });
    let ran = castra
        .run_with_stdin(&["broker-pipe", &port], b"hello vm:web\n")
        .exits(0);
    assert_eq!(ran.stdout, "greeting\nok\n");
    assert_eq!(broker.join().unwrap(), "hello vm:web\n");
    let ran = castra.run(&["broker-pipe", &port]).exits(74);
    assert_eq!(
        (ran.stdout, ran.stderr),
        (String::new(), String::new()),
        "both are the guest's connection"
    );
    castra.run(&["broker-pipe", "0"]).exits(64);
}

#[test]
fn a_broker_in_the_foreground_is_seen_and_stops_in_order() {
    let castra = Castra::new("foreground");
    castra.write(
        "castra.toml",
        "[project]\nname = \"demo\"\n[broker]\nport = 0\n[[vms]]\nname = \"web\"\n",
    );
    let mut child = castra
        .command(&["broker"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(child.stderr.take().unwrap())
        .read_line(&mut said)
        .unwrap();
    assert!(said.contains("broker of demo"), "{said}");
    let port = eventually("the broker to listen", || {
        castra.status()["broker"]["port"].as_u64()
    });
    assert!(std::net::TcpStream::connect(("127.0.0.1", u16::try_from(port).unwrap())).is_ok());
    let killed = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(killed.success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let status = castra.status();
    assert_eq!(status["broker"]["state"], "offline");
}

#[test]
fn completions_are_scripts_their_shells_accept() {
    let castra = Castra::new("completions");
    for shell in ["bash", "zsh", "fish"] {
        let script = castra.run(&["completions", shell]).exits(0).stdout;
        golden(&format!("cli/completions.{shell}"), &script);
        let path = castra.write(shell, &script);
        // bash is essential on Debian; the other two are tried where they are installed.
        match Command::new(shell).arg("-n").arg(&path).output() {
            Ok(output) => assert!(
                output.status.success(),
                "{shell}: {}",
                String::from_utf8_lossy(&output.stderr)
            ),
            Err(error) => assert!(shell != "bash", "{error}"),
        }
    }
}

#[test]
fn man_pages_are_roff_that_groff_renders() {
    let castra = Castra::new("man");
    let page = castra.run(&["man"]).exits(0).stdout;
    golden("cli/castra.1", &page);
    let tail = castra.run(&["man", "bus", "tail"]).exits(0).stdout;
    golden("cli/castra-bus-tail.1", &tail);
    let dir = castra.project().join("pages");
    fs::create_dir(&dir).unwrap();
    castra.run(&["man", "--dir", "pages"]).exits(0);
    assert_eq!(fs::read_to_string(dir.join("castra.1")).unwrap(), page);
    assert_eq!(fs::read_to_string(dir.join("castra-bus-tail.1")).unwrap(), tail);
    let config = castra.run(&["man", "castra.toml"]).exits(0).stdout;
    assert_eq!(fs::read_to_string(dir.join("castra.toml.5")).unwrap(), config);
    assert!(config.starts_with(".TH CASTRA.TOML 5 "), "{config}");
    for entry in fs::read_dir(&dir).unwrap().flatten() {
        let output = Command::new("groff")
            .args(["-man", "-Tutf8", "-ww"])
            .arg(entry.path())
            .output()
            .expect("groff is there: scripts/install-deps.sh test");
        assert!(output.status.success());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said, "", "{}", entry.path().display());
        assert!(output.stdout.len() > 500, "{}", entry.path().display());
    }
    for (args, said) in [
        (
            &["man", "stauts"][..],
            "try: castra man status, the nearest known word",
        ),
        (&["man", "up", "--dir", "pages"], "error: --dir writes all pages"),
    ] {
        let ran = castra.run(args).exits(64);
        ran.tells(said);
    }
    castra.run(&["man", "--dir", "nowhere"]).exits(74);
}

/// A project whose state is a fleet's, and an `ssh` that shows what it was given.
fn with_stand_in_ssh(castra: &Castra, fleet: &Fleet, args: &[&str], stdin: &[u8]) -> (i32, String, String) {
    castra.write(
        "castra.toml",
        &format!(
            "[project]\nname = \"demo\"\nstate_dir = {:?}\n[[vms]]\nname = \"web\"\ncount = 1\n[[vms]]\nname = \"db\"\n",
            fleet.state.dir()
        ),
    );
    let ssh = program(
        &castra.project().join("bin/ssh"),
        "#!/bin/sh\nfor word; do echo \"<$word>\"; done\ncat\nexit 7\n",
    );
    let path = format!(
        "{}:{}",
        ssh.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let mut child = spawn_piped(castra.command(args).env("PATH", path).stdin(Stdio::piped()));
    // The command may be refused before it reads its stdin.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    let output = child.wait_with_output().unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn ssh_and_exec_become_ssh() {
    let castra = Castra::new("ssh");
    let mut fleet = Fleet::new();
    fleet.launch("web-0", 1000);
    let (code, stdout, stderr) = with_stand_in_ssh(
        &castra,
        &fleet,
        &["exec", "WEB-0", "--", "cat", "a b"],
        b"raw\0bytes",
    );
    assert_eq!((code, stderr.as_str()), (7, ""), "the exit code is ssh's");
    assert!(
        stdout.contains("<-l>\n<root>\n<-p>\n<2222>\n<-->\n<127.0.0.1>\n<exec env castra_exec='")
            && stdout
                .ends_with(" castra_1='cat' castra_2='a b' sh -c 'eval \"$castra_exec\"' sh>\nraw\0bytes"),
        "{stdout}"
    );
    assert!(stdout.starts_with("<-F>\n</dev/null>\n<-T>\n"), "{stdout}");
    assert!(
        stdout.contains("<HostKeyAlias=castra-web-0>") && stdout.contains("<BatchMode=yes>"),
        "{stdout}"
    );
    let (code, stdout, _) = with_stand_in_ssh(&castra, &fleet, &["ssh", "web-0"], b"");
    assert_eq!(code, 7);
    assert!(
        stdout.ends_with("<-->\n<127.0.0.1>\n") && !stdout.contains("<-T>"),
        "{stdout}"
    );
    let (code, stdout, _) = with_stand_in_ssh(&castra, &fleet, &["ssh", "web-0", "--", "ls", "|", "wc"], b"");
    assert_eq!(code, 7);
    assert!(stdout.contains(" castra_1='ls | wc' sh -c "), "{stdout}");

    let (code, _, stderr) = with_stand_in_ssh(&castra, &fleet, &["ssh", "db"], b"");
    assert_eq!(code, 255);
    assert_eq!(stderr, "error: vm `db` is not running\n  try: castra up db\n");
    // A role with one VM is that VM; where there are two VMs one has to be named.
    let (code, stdout, _) = with_stand_in_ssh(&castra, &fleet, &["exec", "Web", "--", "true"], b"");
    assert_eq!(code, 7);
    assert!(stdout.contains("<HostKeyAlias=castra-web-0>"), "{stdout}");
    for command in ["ssh", "console"] {
        let (code, _, stderr) = with_stand_in_ssh(&castra, &fleet, &[command], b"");
        assert_eq!(code, 64);
        assert!(stderr.contains("they are web-0, db"), "{stderr}");
    }
    let (code, _, stderr) = with_stand_in_ssh(&castra, &fleet, &["exec", "wbe-0", "--", "true"], b"");
    assert_eq!(code, 64);
    assert!(stderr.contains("did you mean `web-0`?"), "{stderr}");
    // Without a VM the message tells where the name belongs; with an unknown name, which VMs there are.
    let (code, _, stderr) = with_stand_in_ssh(&castra, &fleet, &["exec", "--", "uname", "-a"], b"");
    assert_eq!(code, 64);
    assert!(
        stderr.contains("there is no VM \"uname\" in this project"),
        "{stderr}"
    );
    assert!(stderr.contains("because: its VMs are web-0, db"), "{stderr}");
    assert!(
        stderr.contains("castra exec VM -- COMMAND: the VM stands before `--`"),
        "{stderr}"
    );
    let output = castra
        .command(&["ssh", "web-0"])
        .env("PATH", castra.project())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(69));
    assert!(String::from_utf8_lossy(&output.stderr).contains("openssh-client"));
}

const BROKER_ONLY: &str = "[project]\nname = \"demo\"\n[broker]\nport = 0\n[[vms]]\nname = \"web\"\n";

#[test]
fn a_broker_is_started_found_from_anywhere_and_stopped() {
    let castra = Castra::new("anywhere");
    castra.write("demo/castra.toml", BROKER_ONLY);
    let up = castra.run(&["--config", "demo", "up", "--broker-only"]).exits(0);
    assert!(up.stdout.starts_with("broker on 127.0.0.1:"), "{up:?}");
    up.tells("`castra down` stops it");

    for command in ["status", "down", "logs"] {
        let ran = castra.run(&[command]).exits(66);
        ran.tells("these projects run");
        ran.tells(&format!(" {command}\n"));
        ran.tells("try: castra --workspace demo-");
    }
    let listed = &castra.run(&["workspaces", "--json"]).exits(0).objects()[0]["workspaces"][0];
    assert_eq!(
        (&listed["project"], &listed["broker_running"]),
        (&"demo".into(), &true.into())
    );
    let id = listed["workspace"].as_str().unwrap().to_owned();
    assert!(castra.run(&["workspaces"]).stdout.contains("a broker runs"));

    // The project's folder is gone; what runs can still be seen and stopped.
    fs::remove_dir_all(castra.project().join("demo")).unwrap();
    let status = &castra
        .run(&["--workspace", &id, "status", "--json"])
        .exits(0)
        .objects()[0];
    assert_eq!(status["broker"]["state"], "running");
    let refused = castra.run(&["--workspace", &id, "up"]).exits(66);
    refused.tells(&format!("castra --workspace {id} down"));
    let down = castra.run(&["--workspace", &id, "down"]).exits(0);
    down.prints("broker stopped");
    let status = &castra
        .run(&["--workspace", &id, "status", "--json"])
        .exits(0)
        .objects()[0];
    assert_eq!(status["broker"]["state"], "offline");
}

#[test]
fn a_reader_of_events_who_leaves_stops_nothing() {
    let castra = Castra::new("events-pipe");
    castra.write("castra.toml", BROKER_ONLY);
    let mut child = spawn_piped(castra.command(&["--json", "up", "--broker-only"]));
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    let status = castra.status();
    assert_eq!(status["broker"]["state"], "running");
}

#[test]
fn events_of_a_command_frame_it_and_are_kept() {
    let castra = Castra::new("frame");
    castra.write("castra.toml", BROKER_ONLY);
    let up = castra.run(&["up", "--broker-only", "--json"]).exits(0);
    let types: Vec<String> = up
        .objects()
        .iter()
        .map(|object| object["type"].to_string())
        .collect();
    assert_eq!(types.first().unwrap(), "\"command.accepted\"");
    assert_eq!(types.last().unwrap(), "\"summary\"");
    let kept = castra.run(&["events", "--json"]).exits(0).stdout;
    for line in up.stdout.lines() {
        assert!(kept.contains(line), "{line} wasn't kept");
    }
    let unknown = castra.run(&["--json", "up", "nobody"]).exits(64);
    assert_eq!(unknown.objects()[0]["type"], "command.rejected");
    let quiet = castra.run(&["--quiet", "down"]).exits(0);
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("", ""));
}

#[test]
fn a_plan_changes_nothing() {
    let castra = Castra::new("plan");
    castra.write("castra.toml", BROKER_ONLY);
    let plan = castra.run(&["up", "--plan", "--bootstrap", "skip"]).exits(0);
    assert!(plan.stdout.starts_with("web: skip, "), "{plan:?}");
    plan.tells("nothing was changed");
    let plan = castra.run(&["up", "--plan", "--json"]).exits(0).objects();
    assert_eq!((plan.len(), &plan[0]["type"]), (1, &"bootstrap.planned".into()));
    castra
        .run(&["up", "--plan", "--bootstrap", "nobody=skip"])
        .exits(64);
    assert!(!castra.home().exists(), "a plan makes nothing");
}

#[test]
fn a_project_somebody_works_on_is_busy() {
    let castra = Castra::new("busy");
    castra.write(
        "castra.toml",
        &BROKER_ONLY.replace("[broker]", "state_dir = \"state\"\n[broker]"),
    );
    let state = castra.project().join("state");
    fs::create_dir(&state).unwrap();
    let lock = castra::core::host::FileLock::try_take(&state.join("lock"), "castra up").unwrap();
    for command in [&["--json", "up", "--broker-only"][..], &["--json", "down"]] {
        let ran = castra.run(command).exits(75);
        let last = ran.objects().pop().unwrap();
        assert_eq!(last["type"], "command.rejected");
        assert_eq!(last["exit_status"], 75);
        let me = format!("castra up (pid {})", std::process::id());
        ran.tells(&me);
    }
    drop(lock);
    castra.run(&["up", "--broker-only"]).exits(0);
    castra.run(&["down"]).exits(0);
}
