//! How a command in a guest ends: its exit code, its client's end, and words too long for a command line.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Guest;
use crate::support::{eventually, is_alive, until};

/// Ends neither by SIGTERM nor by a closed stdin, and has a child in a process group of its own.
const STUBBORN: &str = "trap '' TERM; set -m; sleep 1000 & echo $! $$; set +m; while :; do sleep 1000; done";

#[test]
fn a_signal_is_told_from_a_lost_connection() {
    let guest = Guest::up("exec-signal", "true\n", "");
    for (command, script, code) in [
        ("exec", "kill -9 $$", 137),
        ("exec", "kill -TERM $$", 143),
        ("exec", "exit 255", 255),
        ("exec", "exit 3", 3),
    ] {
        let ran = guest
            .project
            .run(&[command, "web", "--", "sh", "-c", script])
            .exits(code);
        assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("", ""), "{script}");
    }
    guest
        .project
        .run(&["ssh", "web", "--", "kill -KILL", "$$"])
        .exits(137);
    guest
        .project
        .run(&["ssh", "web", "--", "exec", "sh -c 'kill -KILL $$'"])
        .exits(137);
    guest.project.run(&["down"]).exits(0);
    for command in ["exec", "ssh"] {
        let ran = guest.project.run(&[command, "web", "--", "true"]).exits(255);
        ran.tells("`web` is not running").tells("castra up web");
    }
}

#[test]
fn a_command_ends_with_its_client() {
    let guest = Guest::up("exec-client", "true\n", "");
    for (args, signal) in [
        (
            &["exec", "web", "--", "bash", "-c", STUBBORN][..],
            Signal::SIGKILL,
        ),
        (&["exec", "web", "--", "bash", "-c", STUBBORN], Signal::SIGTERM),
        (&["ssh", "web", "--", STUBBORN], Signal::SIGINT),
    ] {
        let mut client = guest
            .project
            .castra()
            .command(args)
            // Held open, so that no end of stdin tells anybody anything.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut pids = String::new();
        BufReader::new(client.stdout.take().unwrap())
            .read_line(&mut pids)
            .unwrap();
        assert!(
            pids.split_whitespace().count() == 2 && pids.split_whitespace().all(is_alive),
            "{pids}"
        );
        kill(Pid::from_raw(i32::try_from(client.id()).unwrap()), signal).unwrap();
        client.wait().unwrap();
        until("command and child to end with their client", || {
            !pids.split_whitespace().any(is_alive)
        });
    }
}

#[test]
fn a_closed_stdin_ends_no_command_and_a_background_process_stays() {
    let guest = Guest::up("exec-stays", "true\n", "");
    // Longer than the watch needs to look twice.
    let script = "cat; sleep 4; sleep 1000 >/dev/null 2>&1 & echo $!; sleep 4; echo done";
    let ran = guest
        .project
        .run(&["exec", "web", "--", "sh", "-c", script])
        .exits(0);
    let mut lines = ran.stdout.lines();
    let pid = lines.next().unwrap();
    assert_eq!(lines.next(), Some("done"));
    let ended = Instant::now();
    until("the watch to have been able to look again", || {
        ended.elapsed() > Duration::from_secs(6)
    });
    assert!(is_alive(pid), "a process that the command left was ended");
    kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
}

#[test]
fn a_gone_reader_ends_the_command() {
    let guest = Guest::up("exec-reader", "true\n", "");
    let script = "echo $$; while :; do echo ready; done";
    let mut client = guest
        .project
        .castra()
        .command(&["exec", "web", "--", "sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pid = String::new();
    BufReader::new(client.stdout.take().unwrap())
        .read_line(&mut pid)
        .unwrap();
    eventually("castra to end with its reader", || client.try_wait().unwrap());
    until("the command to end with its reader", || !is_alive(pid.trim()));
}

#[test]
fn a_command_may_be_of_any_length() {
    let guest = Guest::up("exec-long", "true\n", "");
    let castra = guest.project.castra();
    let stdin: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    for length in [1, 7_000, 9_000, 20_000, 100_000] {
        let word = format!("it's\n{}", "a".repeat(length));
        let script = "printf '%s %s\\n' ${#1} ${#2}; exec cat";
        let ran = castra.run_with_stdin(
            &["exec", "web", "--", "sh", "-c", script, "x", &word, &word],
            &stdin,
        );
        let ran = ran.exits(0);
        let (head, rest) = ran.stdout.split_once('\n').unwrap();
        assert_eq!(head, format!("{0} {0}", word.len()));
        assert_eq!(rest, String::from_utf8_lossy(&stdin));
        let line = format!("echo \"{word}\" | wc -c; cat; exit 4; #");
        let ran = castra
            .run_with_stdin(&["ssh", "web", "--", &line, "more"], b"end")
            .exits(4);
        assert_eq!(ran.stdout, format!("{}\nend", word.len() + 1), "{}", ran.stderr);
    }
    // More than a shell takes as one argument can't be its line; apart, as `exec` sends them, the words are no trouble.
    let word = "a".repeat(100_000);
    let ran = castra.run(&["ssh", "web", "--", "echo", &word, &word]).exits(64);
    ran.tells("128 KiB").tells("castra exec web -- ");
    castra.run(&["exec", "web", "--", "true", &word, &word]).exits(0);
}

#[test]
fn what_feeds_a_long_command_ends_with_its_client() {
    let guest = Guest::up("exec-feeder", "true\n", "");
    let word = format!("{}-{}", "a".repeat(20_000), std::process::id());
    let mut client = guest
        .project
        .castra()
        .command(&[
            "exec",
            "web",
            "--",
            "sh",
            "-c",
            "echo ready; sleep 1000",
            "sh",
            &word,
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(client.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "ready\n");
    client.kill().unwrap();
    client.wait().unwrap();
    until("nothing to be left here or in the guest", || {
        let holds = |entry: &fs::DirEntry| {
            fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| line.windows(word.len()).any(|part| part == word.as_bytes()))
        };
        !fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .any(|entry| holds(&entry))
    });
}

/// A server that has a banner and nothing else.
#[test]
fn a_login_that_makes_no_end_is_given_up() {
    let guest = Guest::up("exec-mute", "true\n", "");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(b"SSH-2.0-mute\r\n");
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    let run = guest.project.state("vms/web/run.json");
    let text = fs::read_to_string(&run).unwrap();
    let port_of = format!("\"port\": {}", guest.sshd.port());
    let other = text
        .replace(&port_of, &format!("\"port\": {port}"))
        .replace(&port_of.replace(' ', ""), &format!("\"port\":{port}"));
    assert_ne!(text, other, "{text}");
    // A minute is castra's own limit; a test need not wait so long.
    let other = other.replacen(
        "\"options\":",
        "\"options\":[\"ServerAliveInterval=1\",\"ServerAliveCountMax=2\"],\"was\":",
        1,
    );
    fs::write(&run, other).unwrap();
    for command in ["exec", "ssh"] {
        let ran = guest.project.run(&[command, "web", "--", "true"]).exits(255);
        ran.tells("timed out");
    }
    server.join().unwrap();
    fs::write(&run, text).unwrap();
}
