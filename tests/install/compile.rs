//! `scripts/compile.sh`, with a shell in cargo's place.

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use crate::support::Castra;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/compile.sh");

fn said(binary: &str, cargo: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(SCRIPT)
        .arg(binary)
        .args(cargo)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn how_long_it_takes_is_said_before_it_begins() {
    let castra = Castra::new("compile");
    let binary = castra.project().join("castra");
    let binary = binary.to_str().unwrap();
    let ahead = "compiling castra takes about two minutes on two cores\n";
    let cargo = ["sh", "-c", "echo cargo begins >&2; exit 101"];
    assert_eq!(
        said(binary, &cargo),
        (Some(101), format!("{ahead}cargo begins\n"))
    );

    // Of what is built already, only what changed is compiled.
    fs::write(binary, "").unwrap();
    assert_eq!(said(binary, &cargo), (Some(101), "cargo begins\n".to_owned()));
}

#[test]
fn a_terminal_sees_it_go_on() {
    // Cargo ends when its stdin does: after the counter was seen.
    let line = format!("{SCRIPT} /nowhere sh -c 'read line; echo \"quiet: $CARGO_TERM_QUIET\"'");
    let mut child = Command::new("/usr/bin/script")
        .args(["-qec", &line, "/dev/null"])
        .env("SHELL", "/bin/sh")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut seen = Vec::new();
    let mut byte = [0];
    let mut stdout = child.stdout.take().unwrap();
    while !String::from_utf8_lossy(&seen).contains(" s so far\u{1b}[K\r") {
        assert_eq!(
            stdout.read(&mut byte).unwrap(),
            1,
            "{}",
            String::from_utf8_lossy(&seen)
        );
        seen.push(byte[0]);
    }
    writeln!(child.stdin.take().unwrap(), "done").unwrap();
    stdout.read_to_end(&mut seen).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(String::from_utf8_lossy(&seen).contains("quiet: true"));
}
