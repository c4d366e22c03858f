//! The default guest's SSH server: what `exec` relies on, and that nobody can shut others out of it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::guest_project::{Project, text};
use crate::{PATIENCE, eventually};

/// Starts castra, reads one line of its stdout and closes that.
fn first_line_of(project: &Project, args: &[&str]) -> String {
    let mut child = project
        .command(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = Vec::new();
    let mut out = child.stdout.take().unwrap();
    let mut byte = [0];
    while out.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    drop(out);
    eventually("a command whose reader is gone to end", || {
        child.try_wait().unwrap().is_some()
    });
    text(&line)
}

#[test]
fn the_guests_ssh_server_serves_everybody() {
    let project = Project::with("server", "[[vms]]\nname = \"web\"\n");
    project.expect(0, &["up"]);

    // A reader that is gone ends the command, however little that says.
    assert_eq!(first_line_of(&project, &["exec", "web", "--", "yes"]), "y");
    let slow = "while :; do echo ready; sleep 1; done";
    assert_eq!(
        first_line_of(&project, &["exec", "web", "--", "sh", "-c", slow]),
        "ready"
    );
    eventually("both commands to be gone in the guest", || {
        let left = project.expect(0, &["exec", "web", "--", "ps", "-o", "args"]);
        !left
            .lines()
            .any(|line| line == "yes" || line.contains("echo ready"))
    });

    // Eight at once, three times.
    let failures: Vec<String> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| -> Vec<String> {
                    (0..3)
                        .map(|_| project.run(&["exec", "web", "--", "true"]))
                        .filter(|ran| ran.status.code() != Some(0))
                        .map(|ran| text(&ran.stderr))
                        .collect()
                })
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap())
            .collect()
    });
    assert_eq!(failures, [""; 0]);

    // A command line of the length that Linux allows for one argument, nearly.
    for length in [8_000, 9_000, 20_000, 120_000] {
        let long = "a".repeat(length);
        let told = project.expect(0, &["exec", "web", "--", "sh", "-c", "echo ${#1}", "x", &long]);
        assert_eq!(told, format!("{length}\n"));
    }

    // Commands have the priority that commands have.
    let nice = ["exec", "web", "--", "cut", "-d ", "-f19", "/proc/self/stat"];
    assert_eq!(project.expect(0, &nice), "0\n");

    others_that_say_nothing(&project);
    one_that_starts_anew(&project);
    project.expect(0, &["down"]);
    let console = project.expect(0, &["logs", "web", "--source", "serial"]);
    assert!(console.contains("castra-test: TERM was heard"), "{console}");
}

/// Starts a program that treats signals as sshd does: it ends at TERM, starts itself anew at HUP, and what comes while
/// it does so is lost. A power-off that sends HUP first waits five seconds for the one that never heard of TERM.
fn one_that_starts_anew(project: &Project) {
    let script = "trap 'term=1' TERM; trap 'hup=1' HUP\n\
                  [ \"${1-}\" = anew ] || : >/run/anew.ready\n\
                  while :; do\n\
                  [ -z \"${term-}\" ] || { echo castra-test: TERM was heard >/dev/console; exit; }\n\
                  [ -z \"${hup-}\" ] || { sleep 0.5; exec sh /run/anew anew; }\n\
                  sleep 1000 & wait\n\
                  done\n";
    project.file("anew", script);
    project.expect(0, &["cp", "anew", "web:/run/anew"]);
    // Before all others, so that it hears the first signal before the second is sent.
    let start = "sh -c 'renice -n -40 -p $$; exec setsid sh /run/anew' </dev/null >/dev/null 2>&1 &
                 until [ -e /run/anew.ready ]; do [ -d /proc/$! ] || exit 9; usleep 10000; done";
    project.expect(0, &["exec", "web", "--", "sh", "-c", start]);
}

/// All that comes through the forward has one address: neither silence nor rubbish of some is held against others.
fn others_that_say_nothing(project: &Project) {
    let port = u16::try_from(project.vm("web")["ssh"]["port"].as_u64().unwrap()).unwrap();
    let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    let idle: Vec<TcpStream> = (0..60).map(|_| connect()).collect();
    for _ in 0..30 {
        let _ = connect().write_all(b"GET / HTTP/1.0\r\n\r\n");
    }
    // All of them have been answered, so the server knows of them.
    let until = Instant::now() + PATIENCE;
    for mut stream in &idle {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut banner = [0; 4];
        stream.read_exact(&mut banner).unwrap();
        assert_eq!(&banner, b"SSH-");
        assert!(Instant::now() < until);
    }
    project.expect(0, &["exec", "web", "--", "true"]);
}
