//! castra-hello, the guest's boot agent, under every shell and transport it claims to work with.
//!
//! Here: the script itself against a stand-in for the broker that speaks the handshake on an ephemeral port.
//! Not here: the real broker, and the agent inside a booted guest.
//!
//! Needs dash, bash, busybox, python3, socat, ncat and both netcats. A missing one fails the test with the name of
//! its package: a transport nobody tried is a transport that doesn't work.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use support::guest_scripts::{self, Running, SHELLS, TRANSPORTS, require};
use support::{AMPLE, Scratch, commands_with, free_port};

const TOKEN: &str = "5f1d2c3b4a5968778695a4b3c2d1e0f0";

// --- the stand-in for the broker ----------------------------------------------------------------

#[derive(Clone, Copy)]
enum Manner {
    /// Greets, reads the hello, sends this and closes.
    Answers(&'static str),
    /// Greets, reads the hello, and keeps the connection open without a word.
    FallsSilent,
    /// Accepts and says nothing at all, not even the greeting.
    SaysNothing,
    /// Sends this instead of a greeting, and closes.
    IsNoBroker(&'static str),
}

struct Broker {
    port: u16,
    hellos: Receiver<String>,
}

impl Broker {
    fn start(manner: Manner) -> Broker {
        Broker::serve(TcpListener::bind("127.0.0.1:0").unwrap(), manner)
    }

    fn serve(listener: TcpListener, manner: Manner) -> Broker {
        let port = listener.local_addr().unwrap().port();
        let (said, hellos) = mpsc::channel();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, said) = (stream.unwrap(), said.clone());
                thread::spawn(move || {
                    // A client that leaves early is the client's business.
                    let _ = talk(&mut stream, manner, |line| {
                        let _ = said.send(line);
                    });
                });
            }
        });
        Broker { port, hellos }
    }

    fn next_hello(&self) -> String {
        self.hellos.recv_timeout(AMPLE).expect("the agent says hello")
    }
}

fn talk(stream: &mut TcpStream, manner: Manner, said: impl Fn(String)) -> std::io::Result<()> {
    match manner {
        Manner::IsNoBroker(text) => return stream.write_all(text.as_bytes()),
        Manner::SaysNothing => {}
        Manner::Answers(_) | Manner::FallsSilent => {
            stream.write_all(b"castra-broker 1 ready\n")?;
        }
    }
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    said(line);
    if let Manner::Answers(answer) = manner {
        return stream.write_all(answer.as_bytes());
    }
    // The client half-closes, so reading would end at once; only its death makes a write fail.
    thread::park_timeout(AMPLE);
    Ok(())
}

// --- running the agent --------------------------------------------------------------------------

/// The agent under `shell`, sealed off from this machine's own castra files.
fn agent(shell: &[&str], args: &[&str]) -> Command {
    let script = guest_scripts::scripts().join("castra-hello");
    guest_scripts::command(shell, &script, &std::env::temp_dir(), args)
}

fn once(shell: &[&str], via: &str, port: u16, timeout: &str) -> Output {
    let address = format!("127.0.0.1:{port}");
    let args = ["--vm", "web-0", "--broker", &address];
    let more = ["--via", via, "--timeout", timeout];
    agent(shell, &[&args[..], &more[..]].concat())
        .env("CASTRA_TOKEN", TOKEN)
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Exit code and what was said, checked together; `told` must be the only line.
fn check(output: &Output, code: i32, told: &str, context: &str) {
    assert_eq!(
        (output.status.code(), stderr(output).as_str()),
        (Some(code), format!("castra-hello: {told}\n").as_str()),
        "{context}"
    );
    assert!(output.stdout.is_empty(), "{context}: stdout stays empty");
}

/// Every shell with every transport.
fn everywhere(run: impl Fn(&'static [&'static str], &'static str)) {
    for (via, program, package) in TRANSPORTS {
        require(program, package);
        for shell in SHELLS {
            run(shell, via);
        }
    }
}

// --- one attempt --------------------------------------------------------------------------------

#[test]
fn is_accepted_with_every_shell_and_transport() {
    let broker = Broker::start(Manner::Answers("ok\n"));
    everywhere(|shell, via| {
        let context = format!("{shell:?} via {via}");
        let output = once(shell, via, broker.port, "20");
        let told = format!("web-0 accepted by 127.0.0.1:{}", broker.port);
        check(&output, 0, &told, &context);
        assert_eq!(
            broker.next_hello(),
            format!("hello vm:web-0 token={TOKEN}\n"),
            "{context}"
        );
    });
}

#[test]
fn names_the_reason_when_declined() {
    let broker = Broker::start(Manner::Answers("declined reason=bad-token\r\n"));
    everywhere(|shell, via| {
        let output = once(shell, via, broker.port, "20");
        let told = format!("web-0 declined by 127.0.0.1:{}: bad-token", broker.port);
        check(&output, 1, &told, &format!("{shell:?} via {via}"));
    });
}

#[test]
fn says_when_nobody_listens() {
    let port = free_port();
    everywhere(|shell, via| {
        let output = once(shell, via, port, "20");
        let told = format!("nothing answers at 127.0.0.1:{port}");
        check(&output, 2, &told, &format!("{shell:?} via {via}"));
    });
}

#[test]
fn gives_up_on_a_silent_broker_at_the_deadline() {
    let (mute, sleepy) = (
        Broker::start(Manner::SaysNothing),
        Broker::start(Manner::FallsSilent),
    );
    let (mute_port, sleepy_port) = (mute.port, sleepy.port);
    // A second each, so all at once.
    thread::scope(|scope| {
        for (via, program, package) in TRANSPORTS {
            require(program, package);
            for shell in SHELLS {
                scope.spawn(move || {
                    let started = Instant::now();
                    let output = once(shell, via, mute_port, "1");
                    let told = format!("nothing answers at 127.0.0.1:{mute_port}");
                    check(&output, 2, &told, &format!("{shell:?} via {via}"));
                    // Time enough for the greeting to come through thirty of them at once.
                    let output = once(shell, via, sleepy_port, "5");
                    let told =
                        format!("the broker at 127.0.0.1:{sleepy_port} greeted and then gave no answer");
                    check(&output, 2, &told, &format!("{shell:?} via {via}"));
                    assert!(
                        started.elapsed() < Duration::from_secs(30),
                        "{shell:?} via {via} waits for ever"
                    );
                });
            }
        }
    });
}

#[test]
fn keeps_the_deadline_without_the_timeout_program() {
    // A PATH with what a bare system has, and no `timeout`.
    let tools = Scratch::new("hello-tools");
    for tool in [
        "busybox",
        "dash",
        "bash",
        "nc.openbsd",
        "printf",
        "tr",
        "sleep",
        "true",
    ] {
        let from = std::env::split_paths(&std::env::var_os("PATH").unwrap())
            .map(|dir| dir.join(tool))
            .find(|path| path.exists())
            .unwrap_or_else(|| panic!("`{tool}` is missing"));
        std::os::unix::fs::symlink(from, tools.path(tool)).unwrap();
    }
    let broker = Broker::start(Manner::SaysNothing);
    let good = Broker::start(Manner::Answers("ok\n"));
    for shell in [&["dash"][..], &["bash"]] {
        for via in ["openbsd", "bash"] {
            for (port, code) in [(broker.port, 2), (good.port, 0)] {
                let started = Instant::now();
                let output = agent(
                    shell,
                    &["--vm", "web-0", "--broker", &format!("127.0.0.1:{port}")],
                )
                .args(["--via", via, "--timeout", if code == 2 { "1" } else { "20" }])
                .env("PATH", tools.dir())
                .output()
                .unwrap();
                assert_eq!(
                    output.status.code(),
                    Some(code),
                    "{shell:?} via {via}: {}",
                    stderr(&output)
                );
                assert!(started.elapsed() < Duration::from_secs(15));
            }
        }
    }
}

#[test]
fn takes_nobody_else_for_a_broker() {
    for text in [
        "HTTP/1.1 400 Bad Request\r\n\r\n",
        "SSH-2.0-OpenSSH_9.2\n",
        "ok\n",
    ] {
        let broker = Broker::start(Manner::IsNoBroker(text));
        let output = once(&["dash"], "python3", broker.port, "20");
        let told = format!("what listens at 127.0.0.1:{} is no castra broker", broker.port);
        check(&output, 2, &told, text);
    }
}

#[test]
fn repeats_no_escape_sequences_from_the_network() {
    let broker = Broker::start(Manner::Answers("declined reason=\u{1b}[2Jgone\n"));
    let output = once(&["dash"], "busybox", broker.port, "20");
    let told = format!("web-0 declined by 127.0.0.1:{}: unknown", broker.port);
    check(&output, 1, &told, "escape");
}

#[test]
fn puts_the_token_into_no_argument_list() {
    let secret = "0f1e2d3c4b5a69788796a5b4c3d2e1f0";
    for (via, program, package) in TRANSPORTS {
        require(program, package);
        let broker = Broker::start(Manner::FallsSilent);
        let address = format!("127.0.0.1:{}", broker.port);
        let mut child = agent(&["dash"], &["--vm", "web-0", "--broker", &address, "--via", via])
            .env("CASTRA_TOKEN", secret)
            .spawn()
            .unwrap();
        // From here on the transport runs and waits for an answer.
        assert!(broker.next_hello().contains(secret));
        assert!(commands_with(secret).is_empty(), "via {via}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

// --- where the values come from -----------------------------------------------------------------

#[test]
fn finds_its_values_in_order() {
    let broker = Broker::start(Manner::Answers("ok\n"));
    let address = format!("127.0.0.1:{}", broker.port);
    let dir = Scratch::new("hello-values");
    let (fw_cfg, etc) = (dir.path("fw_cfg"), dir.path("etc"));
    fs::create_dir_all(&etc).unwrap();
    for (key, value) in [
        ("broker", address.as_str()),
        ("vm", "from-etc"),
        ("token", "t-etc"),
    ] {
        fs::write(etc.join(key), format!("{value}\n")).unwrap();
    }
    let run = |args: &[&str], vars: &[(&str, &str)]| {
        let output = agent(&["dash"], &[&["--timeout", "20"], args].concat())
            .env("CASTRA_FW_CFG_DIR", &fw_cfg)
            .env("CASTRA_ETC_DIR", &etc)
            .envs(vars.iter().copied())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        broker.next_hello()
    };
    assert_eq!(run(&[], &[]), "hello vm:from-etc token=t-etc\n");
    // fw_cfg gives bare values without a newline, and only some of them.
    for (key, value) in [("vm", "from-fw"), ("token", "t-fw")] {
        fs::create_dir_all(fw_cfg.join(key)).unwrap();
        fs::write(fw_cfg.join(key).join("raw"), value).unwrap();
    }
    assert_eq!(run(&[], &[]), "hello vm:from-fw token=t-fw\n");
    assert_eq!(
        run(&[], &[("CASTRA_VM", "from-env"), ("CASTRA_TOKEN", "t-env")]),
        "hello vm:from-env token=t-env\n"
    );
    let file = dir.path("token");
    fs::write(&file, "t-file\n").unwrap();
    assert_eq!(
        run(
            &[
                "--vm",
                "from-arg",
                "--token-file",
                file.to_str().unwrap(),
                "--broker",
                &address
            ],
            &[("CASTRA_VM", "from-env"), ("CASTRA_TOKEN", "t-env")]
        ),
        "hello vm:from-arg token=t-file\n"
    );
    // Without a token the hello goes without one.
    fs::remove_dir_all(&fw_cfg).unwrap();
    fs::remove_file(etc.join("token")).unwrap();
    assert_eq!(run(&[], &[]), "hello vm:from-etc\n");
}

#[test]
fn refuses_what_it_cannot_use() {
    let good = ["--vm", "web-0", "--broker", "127.0.0.1:7070"];
    let cases: &[(&[&str], &str)] = &[
        (&["--frobnicate"], "unknown argument: --frobnicate"),
        (&["--vm"], "--vm needs a value"),
        (&["--vm", "web-0"], "no broker address"),
        (
            &["--vm", "two words", "--broker", "h:1"],
            "not a VM name: 'two words'",
        ),
        (&["--vm", "a\nhello vm:b", "--broker", "h:1"], "not a VM name: "),
        (
            &["--vm", "$(reboot)", "--broker", "h:1"],
            "not a VM name: '$(reboot)'",
        ),
        (
            &["--vm", "a", "--broker", "h"],
            "not a broker address: h (write HOST:PORT)",
        ),
        (&["--vm", "a", "--broker", "-e:1"], "not a broker address: -e:1"),
        (&["--vm", "a", "--broker", "h:1;x"], "not a broker address: h:1;x"),
        (
            &["--heartbeat", "soon"],
            "not a number of seconds: --heartbeat soon",
        ),
        (&["--timeout", "0"], "not a number of seconds: --timeout 0"),
        (&["--via", "pigeon"], "unknown transport: --via pigeon"),
        (
            &["--token-file", "/nonexistent/token"],
            "the token file /nonexistent/token can't be read",
        ),
    ];
    for shell in SHELLS {
        for (args, told) in cases {
            let args = if args[0] == "--vm" || args[0] == "--frobnicate" {
                args.to_vec()
            } else {
                [&good, *args].concat()
            };
            let output = agent(shell, &args).output().unwrap();
            assert_eq!(output.status.code(), Some(64), "{shell:?} {args:?}");
            assert!(
                stderr(&output).starts_with(&format!("castra-hello: {told}")),
                "{shell:?} {args:?}: {}",
                stderr(&output)
            );
        }
        let help = agent(shell, &["--help"]).output().unwrap();
        assert_eq!(help.status.code(), Some(0));
        assert!(String::from_utf8_lossy(&help.stdout).starts_with("usage: castra-hello"));
    }
}

// --- the loop -----------------------------------------------------------------------------------

fn start_loop(shell: &[&str], port: u16, vizier_active: &Path) -> Running {
    let address = format!("127.0.0.1:{port}");
    let mut command = agent(shell, &["--loop", "--vm", "web-0", "--broker", &address]);
    command
        .args(["--heartbeat", "1", "--timeout", "20", "--via", "busybox"])
        .env("CASTRA_VIZIER_ACTIVE", vizier_active);
    Running::start(command)
}

#[test]
fn the_loop_finds_a_broker_that_comes_later_and_tells_only_what_changed() {
    let nowhere = Path::new("/nonexistent");
    for shell in SHELLS {
        let port = free_port();
        let agent = start_loop(shell, port, nowhere);
        assert_eq!(
            agent.next_said(),
            format!("castra-hello: nothing answers at 127.0.0.1:{port}")
        );
        let broker = Broker::serve(
            TcpListener::bind(("127.0.0.1", port)).unwrap(),
            Manner::Answers("ok\n"),
        );
        assert_eq!(
            agent.next_said(),
            format!("castra-hello: web-0 accepted by 127.0.0.1:{port}")
        );
        for _ in 0..3 {
            broker.next_hello();
        }
        assert!(
            agent.said.try_recv().is_err(),
            "{shell:?}: three hellos, one line"
        );
    }
}

#[test]
fn the_loop_rests_while_vizier_lives() {
    let broker = Broker::start(Manner::Answers("ok\n"));
    let dir = Scratch::new("hello-vizier");
    let active = dir.path("vizier.active");
    // A process whose arguments name Vizier, as those of `sh …/castra-vizier` do.
    let mut vizier = Command::new("sh")
        .args(["-c", "read _", "castra-vizier"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    fs::write(&active, format!("{}\n", vizier.id())).unwrap();
    let agent = start_loop(&["dash"], broker.port, &active);
    assert_eq!(
        agent.next_said(),
        format!(
            "castra-hello: resting while Vizier (process {}) keeps in touch",
            vizier.id()
        )
    );
    assert!(broker.hellos.try_recv().is_err(), "no hello while resting");
    // It dies and leaves its file behind, which then counts for nothing, even with a number that lives again.
    vizier.kill().unwrap();
    vizier.wait().unwrap();
    fs::write(&active, format!("{}\n", std::process::id())).unwrap();
    broker.next_hello();
    assert_eq!(
        agent.next_said(),
        format!("castra-hello: web-0 accepted by 127.0.0.1:{}", broker.port)
    );
}
