//! castra-bus, the guest's side of the bus, under every shell and transport it claims to work with.
//!
//! Here: the script against the real broker, and against a stand-in where the broker must misbehave. Not here: the
//! script inside a booted guest (`guests.rs`), the protocol itself (`broker*.rs`).
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::guest_scripts::{self, Running, SHELLS, TRANSPORTS, require, scripts};
use support::{
    AMPLE, Castra, commands_with, eventually, free_port, objects, objects_in, processes_of, until,
};

/// A broker without VMs, and a place for the scripts' temporary files.
struct Bus {
    castra: Castra,
    tmp: PathBuf,
    address: String,
}

impl Bus {
    fn new(name: &str) -> Bus {
        let castra = Castra::new(name);
        let tmp = castra.dir().join("tmp");
        fs::create_dir_all(&tmp).unwrap();
        let port = free_port();
        castra.write(
            "castra.toml",
            &format!(
                "[project]\nname = \"demo\"\n[broker]\nport = {port}\nfreshness_secs = 3\n\
                 [bus]\nsessions_per_vm = 64\n[[vms]]\nname = \"web-0\"\n[[vms]]\nname = \"web-1\"\n"
            ),
        );
        let address = format!("127.0.0.1:{port}");
        let bus = Bus { castra, tmp, address };
        bus.start();
        bus
    }

    /// A broker, always on the same port.
    fn start(&self) {
        let ran = self.castra.run(&["up", "--broker-only"]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
    }

    fn command(&self, shell: &[&str], args: &[&str]) -> Command {
        let mut command = guest_scripts::command(shell, &scripts().join("castra-bus"), &self.tmp, args);
        command.args(["--vm", "web-0", "--broker", &self.address, "--timeout", "30"]);
        command
    }

    fn run(&self, shell: &[&str], args: &[&str]) -> Output {
        self.command(shell, args).output().unwrap()
    }

    /// A file of the state root.
    fn state(&self, name: &str) -> PathBuf {
        let projects = self.castra.home().join("projects");
        let project = fs::read_dir(projects).unwrap().next().unwrap().unwrap();
        project.path().join(name)
    }

    /// What the broker has written down of the guest.
    fn handshake(&self) -> Value {
        serde_json::from_slice(&fs::read(self.state("handshakes/web-0.json")).unwrap()).unwrap_or_default()
    }

    /// The messages of a topic, as the log has them.
    fn messages(&self, topic: &str) -> Vec<Value> {
        let mut all = objects_in(&self.state("logs/bus/bus.log"));
        all.retain(|message| message["topic"] == topic);
        all
    }

    /// Nothing of a session is left: neither directories nor processes.
    fn is_clean(&self) -> bool {
        fs::read_dir(&self.tmp).unwrap().next().is_none() && processes_of(&self.tmp).is_empty()
    }

    /// Every shell with every transport.
    fn everywhere(&self, run: impl Fn(&'static [&'static str], &'static str)) {
        for (via, program, package) in TRANSPORTS {
            require(program, package);
            for shell in SHELLS {
                run(shell, via);
            }
        }
    }
}

fn check(output: &Output, code: i32, told: &str, context: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        (output.status.code(), said.as_ref()),
        (Some(code), told),
        "{context}"
    );
}

#[test]
fn publishes_and_subscribes_with_every_shell_and_transport() {
    let bus = Bus::new("guest-bus-all");
    let payload = r#"{"text":"Grüße \"100%\" \\n \u0000","list":[1,null,-2.5e3]}"#;
    bus.everywhere(|shell, via| {
        let context = format!("{shell:?} via {via}");
        let published = bus.run(shell, &["publish", "ci/x", payload, "--via", via]);
        check(&published, 0, "", &context);
        assert!(published.stdout.is_empty(), "{context}");
        let heard = bus.run(
            shell,
            &["subscribe", "ci/*", "--from", "1", "--count", "1", "--via", via],
        );
        let told = format!("castra-bus: web-0 has a session with {}\n", bus.address);
        check(&heard, 0, &told, &context);
        let line: Value = serde_json::from_slice(&heard.stdout).unwrap();
        assert_eq!(line, bus.messages("ci/x")[0], "{context}");
    });
    let all = bus.messages("ci/x");
    assert_eq!(all.len(), TRANSPORTS.len() * SHELLS.len());
    let expected: Value = serde_json::from_str(payload).unwrap();
    assert!(
        all.iter()
            .all(|line| line["payload"] == expected && line["vm"] == "web-0")
    );
    until("nothing is left over", || bus.is_clean());
}

#[test]
fn asks_and_answers_with_every_shell() {
    let bus = Bus::new("guest-bus-ask");
    for shell in SHELLS {
        let context = format!("{shell:?}");
        let answer = |topic: &str, command: &str| {
            let running = Running::start(bus.command(shell, &["reply", topic, command]));
            running.wait_said("has a session");
            running
        };
        let mut workers = [
            answer("q/echo", "read -r x; printf '{\"got\":%s}' \"$x\""),
            answer("q/fails", "exit 3"),
            answer("q/silent", "cat >/dev/null"),
        ];
        for topic in ["q/echo", "q/fails", "q/silent"] {
            until("the worker to be subscribed", || {
                let ran = bus.castra.run(&["bus", "request", topic, "1", "--timeout", "1s"]);
                ran.code == Some(0)
            });
        }
        let asked = r#"{"text":"100% \\n \"ö\"","list":[1,null]}"#;
        for (topic, expected) in [
            ("q/echo", format!("{{\"got\":{asked}}}\n")),
            ("q/fails", "{\"error\":\"exit 3\"}\n".to_owned()),
            ("q/silent", "null\n".to_owned()),
        ] {
            let ran = bus.run(shell, &["request", topic, asked]);
            check(&ran, 0, "", &context);
            assert_eq!(String::from_utf8_lossy(&ran.stdout), expected, "{context}");
            let ran = bus.castra.run(&["bus", "request", topic, asked]);
            assert_eq!((ran.code, ran.stdout), (Some(0), expected), "{context}");
        }
        for worker in &mut workers {
            worker.signal(Signal::SIGTERM);
            worker.wait();
        }
    }
    let mut command = bus.command(SHELLS[0], &["request", "q/nobody", "1"]);
    command.args(["--timeout", "1"]);
    check(
        &command.output().unwrap(),
        1,
        "castra-bus: no answer came within 1 s\n",
        "nobody answers",
    );
    let lost = bus.run(SHELLS[0], &["publish", "vm:nobody", "1"]);
    let warned = "castra-bus: warning: the project has no VM for vm:nobody\n";
    check(&lost, 0, warned, "kept all the same");
    until("nothing is left over", || bus.is_clean());
}

#[test]
fn last_values_and_groups_from_a_guest() {
    let bus = Bus::new("guest-bus-last");
    for (topic, payload) in [("s/a/x", "1"), ("s/b/x", "2"), ("s/a/x", "3"), ("s/a/y", "4")] {
        check(&bus.run(SHELLS[0], &["publish", topic, payload]), 0, "", topic);
    }
    for shell in SHELLS {
        let ran = bus.run(shell, &["subscribe", "s/*/x", "--last", "--count", "2"]);
        let payloads: Vec<Value> = objects(&String::from_utf8_lossy(&ran.stdout))
            .into_iter()
            .map(|mut message| message["payload"].take())
            .collect();
        assert_eq!(payloads, [json!(2), json!(3)], "{shell:?}");
        for args in [&["--last", "--group", "w"][..], &["--group", "no name"]] {
            let ran = bus.run(shell, &[&["subscribe", "x"], args].concat());
            assert_eq!(ran.status.code(), Some(64), "{shell:?} {args:?}");
        }
        let worker = || {
            let running =
                Running::start(bus.command(shell, &["subscribe", "jobs", "--group", "w", "--count", "3"]));
            running.wait_said("has a session");
            running
        };
        let mut workers = [worker(), worker()];
        let mut counts = [0, 0];
        // The first ones may come before both are subscribed.
        until("three jobs for each of both", || {
            check(&bus.run(shell, &["publish", "jobs", "0"]), 0, "", "a job");
            for (count, worker) in counts.iter_mut().zip(&workers) {
                *count += worker.out.try_iter().count();
            }
            counts == [3, 3]
        });
        let done: Vec<_> = workers.iter_mut().map(Running::wait).collect();
        assert_eq!(done, [Some(0), Some(0)], "{shell:?}");
    }
    until("nothing is left over", || bus.is_clean());
}

#[test]
fn frames_of_every_size_go_both_ways() {
    let bus = Bus::new("guest-bus-sizes");
    // Lengths whose bytes are line feeds, NULs, braces, backslashes; and one that takes many reads.
    let sizes = [0, 1, 10, 92, 123, 138, 200, 256, 2570, 4090, 4096, 5000, 60_000];
    for shell in SHELLS {
        for size in sizes {
            let payload = format!("\"{}\"", "ö".repeat(size / 2) + &"x".repeat(size % 2));
            let ran = bus
                .command(shell, &["publish", "size", "-"])
                .stdin(file_with(&bus, &payload))
                .output()
                .unwrap();
            check(&ran, 0, "", &format!("{shell:?} {size}"));
        }
    }
    let written = bus.messages("size");
    assert_eq!(written.len(), SHELLS.len() * sizes.len());
    for shell in SHELLS {
        let count = written.len().to_string();
        let ran = bus.run(shell, &["subscribe", "size", "--from", "1", "--count", &count]);
        let heard = objects(&String::from_utf8(ran.stdout).unwrap());
        assert_eq!(heard, written, "{shell:?}");
    }
}

fn file_with(bus: &Bus, text: &str) -> fs::File {
    let path = bus.castra.dir().join("payload");
    fs::write(&path, text).unwrap();
    fs::File::open(path).unwrap()
}

#[test]
fn says_why_a_message_was_not_taken() {
    let bus = Bus::new("guest-bus-refused");
    let at = &bus.address;
    let spaces = format!("{}1", " ".repeat(70_000));
    for shell in SHELLS {
        for (args, told) in [
            (
                ["publish", "ci/x", "{bad"],
                format!("refused by {at}: malformed (key must be a string, column 2)"),
            ),
            (
                ["publish", "castra/x", "1"],
                format!("refused by {at}: forbidden"),
            ),
        ] {
            let told = format!("castra-bus: {told}\n");
            check(&bus.run(shell, &args), 1, &told, &format!("{shell:?}"));
        }
        // The broker reads no further than the length: whether its last words outrun the reset is the network's business.
        let long = bus.run(shell, &["publish", "ci/x", &spaces]);
        let said = String::from_utf8_lossy(&long.stderr).into_owned();
        assert_eq!(long.status.code(), Some(1), "{shell:?}: {said}");
        assert!(
            said.contains("closed the session: protocol-error") || said.contains("broke before the message"),
            "{shell:?}: {said}"
        );
        let forbidden = bus.run(shell, &["subscribe", "vm:web-1"]);
        let told = format!(
            "castra-bus: web-0 has a session with {at}\ncastra-bus: refused by {at}: vm:web-1 forbidden\n"
        );
        check(&forbidden, 1, &told, "another VM's topic");
        let unknown = bus
            .command(shell, &["publish", "ci/x", "1"])
            .args(["--vm", "nobody"])
            .output()
            .unwrap();
        let told = format!("castra-bus: nobody declined by {at}: unknown-vm\n");
        check(&unknown, 1, &told, "a name nobody has");
    }
    until("nothing is left over", || bus.is_clean());
}

#[test]
fn wrong_usage_is_told_before_anything_is_sent() {
    let bus = Bus::new("guest-bus-usage");
    for shell in SHELLS {
        for (args, told) in [
            (
                &[][..],
                "say what to do: publish, request, reply, subscribe or session",
            ),
            (&["listen"], "unknown command: listen"),
            (&["publish", "ci/x"], "publish needs a topic and a JSON text"),
            (&["publish", "ci x", "1"], "not a topic: 'ci x'"),
            (&["publish", "ci/*", "1"], "publish takes one topic, and no *"),
            (&["publish", "ci/x", ""], "the JSON text is empty"),
            (&["subscribe"], "subscribe needs a topic"),
            (&["subscribe", "a\",\"x\":\"b"], "not a topic: 'a\",\"x\":\"b'"),
            (&["subscribe", "a", "--from", "-1"], "not a number: --from -1"),
            (
                &["subscribe", "a", "--frobnicate"],
                "unknown argument: --frobnicate",
            ),
            (&["session", "a"], "session takes no topic"),
        ] {
            let told = format!("castra-bus: {told}\ncastra-bus: try: castra-bus --help\n");
            check(&bus.run(shell, args), 64, &told, &format!("{shell:?} {args:?}"));
        }
        let help = bus.run(shell, &["--help"]);
        assert_eq!(help.status.code(), Some(0));
        assert!(String::from_utf8_lossy(&help.stdout).starts_with("usage: castra-bus"));
    }
}

#[test]
fn a_subscription_outlives_its_broker_without_a_loss() {
    let bus = Bus::new("guest-bus-restart");
    for shell in SHELLS {
        let mut listener = Running::start(bus.command(shell, &["subscribe", "n", "vm:web-0"]));
        listener.wait_said("has a session");
        let mut number = 0;
        let mut publish = |bus: &Bus, many: usize| {
            for _ in 0..many {
                number += 1;
                let ran = bus.run(&["dash"], &["publish", "n", &number.to_string()]);
                check(&ran, 0, "", "publish");
            }
        };
        until("the subscription is there", || {
            bus.castra.vm("web-0")["bus_subscribed"] == true
        });
        publish(&bus, 3);
        bus.castra.kill_broker();
        listener.wait_said("nothing answers");
        bus.start();
        // Some of these come before it is back.
        publish(&bus, 3);
        let heard: Vec<Value> = (0..6)
            .map(|_| serde_json::from_str::<Value>(&listener.next_out()).unwrap()["payload"].clone())
            .collect();
        assert_eq!(json!(heard), json!([1, 2, 3, 4, 5, 6]), "{shell:?}");
        listener.signal(Signal::SIGTERM);
        assert_eq!(listener.wait(), Some(143), "{shell:?}");
        until("nothing is left over", || bus.is_clean());
    }
}

#[test]
fn a_session_lives_by_its_heartbeats() {
    let bus = Bus::new("guest-bus-session");
    for shell in SHELLS {
        let mut session = Running::start(bus.command(shell, &["session"]));
        session.wait_said("has a session");
        let heard = || bus.handshake()["last_heartbeat_boottime_ms"].as_u64();
        let first = eventually("a heartbeat", heard);
        until("another one", || heard() > Some(first));
        assert_eq!(bus.castra.vm("web-0")["bus_session"], true);
        // Killed by SIGKILL, so that it can't clean up: the heart notices.
        session.signal(Signal::SIGKILL);
        session.wait();
        until("nothing is left over", || bus.is_clean());
        until("the broker knows", || {
            bus.castra.vm("web-0")["bus_session"] == false
        });
    }
}

#[test]
fn a_reader_that_leaves_ends_the_subscription() {
    let bus = Bus::new("guest-bus-pipe");
    check(&bus.run(&["dash"], &["publish", "n", "1"]), 0, "", "publish");
    for shell in SHELLS {
        let mut child = bus
            .command(shell, &["subscribe", "n", "--from", "1"])
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        drop(out);
        check(&bus.run(&["dash"], &["publish", "n", "2"]), 0, "", "publish");
        assert_eq!(child.wait().unwrap().code(), Some(0), "{shell:?}");
    }
    until("nothing is left over", || bus.is_clean());
}

// --- a broker that isn't ours -------------------------------------------------------------------

/// A stand-in: sends each hello on, and answers with what `answer` says of it; a session then gets these frames.
fn stand_in(answer: fn(&str) -> &'static str, frames: Vec<u8>) -> (String, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (tell, hellos) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, tell, frames) = (stream.unwrap(), tell.clone(), frames.clone());
            thread::spawn(move || {
                // A client that leaves early is the client's business.
                let _ = converse(&mut stream, answer, &frames, |line| {
                    let _ = tell.send(line);
                });
            });
        }
    });
    (address, hellos)
}

fn converse(
    stream: &mut TcpStream,
    answer: fn(&str) -> &'static str,
    frames: &[u8],
    said: impl Fn(String),
) -> std::io::Result<()> {
    stream.write_all(b"castra-broker 1 ready\n")?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut hello = String::new();
    reader.read_line(&mut hello)?;
    let line = answer(&hello);
    said(hello);
    stream.write_all(line.as_bytes())?;
    if line.starts_with("ok session=") {
        // A byte at a time: how the stream is cut must not matter.
        stream.set_nodelay(true)?;
        for byte in frames {
            stream.write_all(&[*byte])?;
        }
        reader.read_to_end(&mut Vec::new())?;
    }
    Ok(())
}

fn frame(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn against(address: &str, shell: &[&str], args: &[&str]) -> Command {
    let mut command = guest_scripts::command(
        shell,
        &scripts().join("castra-bus"),
        &PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
        args,
    );
    command.args(["--vm", "web-0", "--broker", address]);
    command
}

#[test]
fn frames_that_come_in_single_bytes_are_put_together() {
    let texts = [
        r#"{"type":"ack","ack":"subscribe","status":"ok","topic":"n","seq":9}"#,
        r#"{"type":"publish","seq":10,"ts":1,"vm":"web-1","topic":"n","payload":"%s\\ ü"}"#,
        r#"{"type":"later","what":"nobody knows"}"#,
        r#"{"type":"gap","from":11,"to":12}"#,
        r#"{"type":"publish","seq":13,"ts":2,"vm":"web-1","topic":"n","payload":{"a":[]}}"#,
    ];
    let frames = texts.iter().flat_map(|text| frame(text)).collect();
    let (address, _hellos) = stand_in(|_| "ok session=s-1 heartbeat_secs=5\r\n", frames);
    for shell in SHELLS {
        let ran = against(&address, shell, &["subscribe", "n", "--count", "2"])
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&ran.stdout),
            "{\"seq\":10,\"ts\":1,\"vm\":\"web-1\",\"topic\":\"n\",\"payload\":\"%s\\\\ ü\"}\n\
             {\"seq\":13,\"ts\":2,\"vm\":\"web-1\",\"topic\":\"n\",\"payload\":{\"a\":[]}}\n",
            "{shell:?}"
        );
        let told = format!(
            "castra-bus: web-0 has a session with {address}\n\
             castra-bus: messages 11 to 12 are no longer in the broker's log\n"
        );
        check(&ran, 0, &told, &format!("{shell:?}"));
    }
}

#[test]
fn a_broker_without_the_bus_is_told_of_our_life_at_least() {
    let (address, hellos) = stand_in(
        |hello| {
            if hello.contains("bus-v1") {
                "declined reason=unsupported-capability supported=bus-v2\n"
            } else {
                "ok\n"
            }
        },
        Vec::new(),
    );
    for shell in SHELLS {
        let ran = against(&address, shell, &["publish", "n", "1", "--timeout", "30"])
            .env("CASTRA_TOKEN", "secret")
            .output()
            .unwrap();
        let told = format!(
            "castra-bus: web-0 declined by {address}: unsupported-capability\n\
             castra-bus: web-0 accepted by {address}, without the bus\n"
        );
        check(&ran, 1, &told, &format!("{shell:?}"));
        let both: Vec<String> = hellos.try_iter().collect();
        assert_eq!(
            both,
            [
                "hello vm:web-0 token=secret capabilities=bus-v1\n",
                "hello vm:web-0 token=secret\n"
            ]
        );
        let session = Running::start(against(&address, shell, &["session", "--timeout", "30"]));
        session.wait_said("shaking hands instead");
        let next = || hellos.recv_timeout(AMPLE).unwrap();
        assert_eq!(
            (next(), next()),
            (
                "hello vm:web-0 capabilities=bus-v1\n".into(),
                "hello vm:web-0\n".into()
            )
        );
        drop(session);
        hellos.try_iter().count();
    }
}

#[test]
fn gives_up_where_no_acknowledgement_comes() {
    let (address, _hellos) = stand_in(|_| "ok session=s-1 heartbeat_secs=5\n", Vec::new());
    let (mute, _hellos) = stand_in(|_| "", Vec::new());
    for shell in SHELLS {
        let ran = against(&address, shell, &["publish", "n", "1", "--timeout", "2"])
            .output()
            .unwrap();
        let told = format!("castra-bus: no acknowledgement came from {address} within 2 s\n");
        check(&ran, 1, &told, &format!("{shell:?}"));
        let ran = against(&mute, shell, &["publish", "n", "1", "--timeout", "2"])
            .output()
            .unwrap();
        let told = format!("castra-bus: the broker at {mute} gave no answer\n");
        check(&ran, 1, &told, &format!("{shell:?}"));
    }
}

#[test]
fn the_token_is_in_no_argument_list() {
    let secret = "0f1e2d3c4b5a69788796a5b4c3d2e1f0";
    let (address, hellos) = stand_in(|_| "ok session=s-1 heartbeat_secs=5\n", Vec::new());
    for (via, program, package) in TRANSPORTS {
        require(program, package);
        let mut command = against(&address, &["dash"], &["session", "--via", via]);
        let session = Running::start({
            command.env("CASTRA_TOKEN", secret);
            command
        });
        assert!(hellos.recv_timeout(AMPLE).unwrap().contains(secret));
        session.wait_said("has a session");
        assert!(commands_with(secret).is_empty(), "via {via}");
    }
}

#[test]
fn lines_are_whole_where_many_publish_at_once() {
    let bus = Bus::new("guest-bus-many");
    thread::scope(|scope| {
        for (index, shell) in SHELLS.iter().cycle().take(9).enumerate() {
            let bus = &bus;
            scope.spawn(move || {
                for round in 0..3 {
                    let payload = format!("\"{index}-{round}\"");
                    let ran = bus.run(shell, &["publish", "many", &payload]);
                    check(&ran, 0, "", &format!("{shell:?}"));
                }
            });
        }
    });
    let payloads: BTreeSet<String> = bus
        .messages("many")
        .iter()
        .map(|line| line["payload"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(payloads.len(), 27);
}
