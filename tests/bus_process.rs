//! The bus of a broker that is a process of its own: killed in the middle, short of room and of
//! descriptors, flooded, in a crowd, and what status tells of its sessions.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use castra::core::host;
use castra::core::root::alive::find_broker;
use castra::core::root::paths::StateRoot;
use support::session::{Session, framed, seq_of};
use support::{Castra, eventually, objects, until};

/// A project and its broker, a plain child so that a test can kill and limit it.
struct Process {
    castra: Castra,
    child: Option<Child>,
    port: u16,
}

impl Process {
    fn new(label: &str, bus: &str) -> Process {
        let castra = Castra::new(label);
        castra.write(
            "castra.toml",
            &format!(
                "[project]\nname = \"demo\"\nstate_dir = \"state\"\n[broker]\nport = 0\n[bus]\n{bus}\n[[vms]]\nname = \"web\"\n"
            ),
        );
        Process {
            castra,
            child: None,
            port: 0,
        }
    }

    fn state(&self) -> StateRoot {
        StateRoot::new(self.dir())
    }

    fn dir(&self) -> PathBuf {
        self.castra.project().join("state")
    }

    /// Starts it under a limit of the shell's, `true` for none.
    fn start(&mut self, limit: &str) {
        let began = host::boottime_ms();
        let child = self
            .castra
            .command_under(limit, &["broker", "--quiet", "--config", "castra.toml"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = child.id();
        self.child = Some(child);
        self.port = eventually("the broker to listen", || {
            // The record of the one before stays until this one is ready.
            let (_, record) = find_broker(&self.state()).filter(|(found, _)| *found == pid)?;
            record
                .filter(|record| record.started_boottime_ms >= began)
                .map(|record| record.port)
        });
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// kill -9.
    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn guest(&self, vm: &str) -> Session {
        Session::guest(self.port, vm)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.state().broker_log()).unwrap_or_default()
    }

    /// A log and the rotated files before it.
    fn texts(&self, path: &Path) -> String {
        let rotated = (1..100)
            .rev()
            .map(|number| format!("{}.{number}", path.display()));
        let files = rotated.map(PathBuf::from).chain([path.to_path_buf()]);
        files.filter_map(|file| fs::read_to_string(file).ok()).collect()
    }

    /// Lines of a log of the bus.
    fn lines(&self, name: &str) -> Vec<Value> {
        let path = self.state().bus_log().with_file_name(name);
        let text = self.texts(&path);
        objects(&text)
    }

    /// What it keeps in memory, KiB.
    fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    fn status(&self) -> Value {
        self.castra.vm("web")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn numbers(lines: &[Value]) -> Vec<u64> {
    lines.iter().map(|line| line["seq"].as_u64().unwrap()).collect()
}

#[test]
fn five_hundred_sessions_and_eight_publishers() {
    let mut broker = Process::new("crowd", "sessions_per_vm = 600");
    broker.start("true");
    let each = 40_u64;
    let mut readers: Vec<Session> = (0..500)
        .map(|n| {
            let mut session = broker.guest("web");
            session.subscribe(["all/*", "*"][n % 2], None);
            session
        })
        .collect();
    let port = broker.port;
    thread::scope(|scope| {
        for publisher in 0..8 {
            scope.spawn(move || {
                let mut session = Session::guest(port, "web");
                let mut said = Vec::new();
                for n in 0..each {
                    let payload = json!({ "p": publisher, "n": n });
                    let frame = json!({ "type": "publish", "topic": format!("all/{publisher}"), "payload": payload, "id": n });
                    said.extend_from_slice(&framed(frame.to_string().as_bytes()));
                }
                session.write(&said).unwrap();
                let mut before = 0;
                for n in 0..each {
                    let ack = session.ack();
                    assert_eq!((&ack["id"], &ack["status"]), (&json!(n), &json!("ok")));
                    let seq = ack["seq"].as_u64().unwrap();
                    assert!(seq > before, "in the order in which they were sent");
                    before = seq;
                }
            });
        }
    });
    let total = 8 * each;
    let lines = broker.lines("bus.log");
    assert_eq!(numbers(&lines), (1..=total).collect::<Vec<_>>());
    for publisher in 0..8 {
        let sent = lines.iter().filter(|line| line["payload"]["p"] == publisher);
        let order: Vec<u64> = sent.map(|line| line["payload"]["n"].as_u64().unwrap()).collect();
        assert_eq!(order, (0..each).collect::<Vec<_>>());
    }
    for reader in &mut readers {
        for seq in 1..=total {
            assert_eq!(seq_of(&reader.body().unwrap()), seq);
        }
    }
    assert!(!broker.log().contains("backpressure"), "{}", broker.log());
}

#[test]
fn killed_in_the_middle_nothing_acked_is_lost() {
    let mut broker = Process::new("killed", "log_max_bytes = 65536\nlog_keep = 90\nsync = \"none\"");
    let mut acked: BTreeSet<u64> = BTreeSet::new();
    for round in 0..4_u64 {
        broker.start("true");
        let port = broker.port;
        let count = AtomicU64::new(0);
        let told = thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|worker| {
                    let count = &count;
                    scope.spawn(move || {
                        let mut acked = Vec::new();
                        // The others may have been so fast that it is killed already.
                        let Ok(mut session) = Session::try_guest(port, ["web", "db"][worker % 2]) else {
                            return acked;
                        };
                        let mut sent = 0_u64;
                        loop {
                            let frame = json!({ "type": "publish", "topic": "a", "payload": { "r": round, "w": worker, "n": sent } });
                            sent += 1;
                            if session.write(&framed(frame.to_string().as_bytes())).is_err() {
                                return acked;
                            }
                            // A few in flight.
                            if sent.is_multiple_of(4) {
                                for _ in 0..4 {
                                    match session.frame() {
                                        Some(ack) => acked.push(ack["seq"].as_u64().unwrap()),
                                        None => return acked,
                                    }
                                    count.fetch_add(1, Ordering::Relaxed);
                                }
                            }
                        }
                    })
                })
                .collect();
            until("publishes to be under way", || {
                count.load(Ordering::Relaxed) > 300
            });
            broker.kill();
            let workers = workers.into_iter();
            workers
                .flat_map(|worker| worker.join().unwrap())
                .collect::<Vec<_>>()
        });
        for seq in told {
            assert!(acked.insert(seq), "number {seq} was given twice");
        }
        // As a loss of power within a write leaves it; and a sender's own log that lacks its end.
        let mut log = OpenOptions::new()
            .append(true)
            .open(broker.state().bus_log())
            .unwrap();
        log.write_all(b"{\"seq\":999999,\"ts\":17").unwrap();
        drop(log);
        // What is in the newest file of the log is looked for in the senders' own.
        let newest = fs::read_to_string(broker.state().bus_log()).unwrap();
        let own = broker.state().bus_log_of("web");
        let text = fs::read_to_string(&own).unwrap_or_default();
        if let Some(last) = text.lines().last()
            && newest.contains(last)
        {
            let file = OpenOptions::new().write(true).open(&own).unwrap();
            file.set_len((text.len() - last.len() + 5) as u64).unwrap();
        }
    }
    broker.start("true");
    let told = broker.texts(&broker.state().broker_log());
    assert_eq!(
        told.matches("bytes of an incomplete last message").count(),
        4,
        "{told}"
    );
    let lines = broker.lines("bus.log");
    let found = numbers(&lines);
    assert_eq!(
        found,
        (1..=found.len() as u64).collect::<Vec<_>>(),
        "without holes"
    );
    assert!(
        acked.iter().all(|seq| *seq <= found.len() as u64),
        "what was acked is there"
    );
    let unique: BTreeSet<String> = lines.iter().map(|line| line["payload"].to_string()).collect();
    assert_eq!(unique.len(), lines.len(), "each once");
    for vm in ["web", "db"] {
        let own = numbers(&broker.lines(&format!("{vm}.log")));
        let all: Vec<u64> = lines
            .iter()
            .filter(|line| line["vm"] == vm)
            .map(|line| line["seq"].as_u64().unwrap())
            .collect();
        assert_eq!(own, all, "{vm}.log has what {vm} said");
    }
    let next = broker.guest("web").publish("a", &json!("next"));
    assert_eq!(next, found.len() as u64 + 1);
    let mut reader = broker.guest("web");
    reader.subscribe("a", Some(1));
    for seq in 1..=next {
        assert_eq!(seq_of(&reader.body().unwrap()), seq);
    }
}

/// Both kinds of a full disk: publishes are refused, everything else goes on, then all is as before.
fn without_room(broker: &mut Process, room_again: impl FnOnce(&Process)) {
    let mut client = broker.guest("web");
    let mut reader = broker.guest("web");
    reader.subscribe("a", None);
    let pad = "x".repeat(3000);
    let (mut kept, mut refused) = (0_u64, 0_u64);
    while refused < 20 {
        client.send(&json!({ "type": "publish", "topic": "a", "payload": pad }));
        let ack = client.ack();
        if ack["status"] == "ok" {
            kept += 1;
            assert_eq!(ack["seq"], kept, "a number that was refused is given again");
            assert_eq!(reader.frame().unwrap()["seq"], kept);
        } else {
            assert_eq!(ack["reason"], "storage-error", "{ack}");
            refused += 1;
        }
        assert!(kept < 1000, "there is too much room");
    }
    assert!(kept > 0);
    // Known guests and sessions don't need any room.
    for _ in 0..5 {
        drop(broker.guest("web"));
    }
    client.lives();
    let mut past = broker.guest("web");
    past.subscribe("a", Some(1));
    for seq in 1..=kept {
        assert_eq!(seq_of(&past.body().unwrap()), seq, "what is there can be read");
    }
    room_again(broker);
    // The log itself needs no more than the room.
    let next = eventually("publishes to be taken again", || {
        client.send(&json!({ "type": "publish", "topic": "a", "payload": "again" }));
        client.ack()["seq"].as_u64()
    });
    assert_eq!(next, kept + 1);
    assert_eq!(reader.frame().unwrap()["payload"], "again");
    assert_eq!(past.frame().unwrap()["payload"], "again");
    let lines = broker.lines("bus.log");
    assert_eq!(numbers(&lines), (1..=next).collect::<Vec<_>>());
}

#[test]
fn at_the_limit_of_file_size_publishes_are_refused() {
    let mut broker = Process::new("file-size", "sync = \"none\"");
    // In blocks of 512 bytes.
    broker.start("ulimit -S -f 64");
    without_room(&mut broker, |broker| {
        let raised = Command::new("prlimit")
            .args(["--fsize=unlimited:", "--pid"])
            .arg(broker.pid().to_string())
            .status();
        assert!(raised.unwrap().success(), "prlimit of util-linux");
    });
}

/// Room for a file system of our own needs root; the limit of file size shows the same without.
#[test]
fn on_a_full_disk_publishes_are_refused() {
    let mut broker = Process::new("full", "sync = \"batch\"");
    let dir = broker.dir();
    fs::create_dir_all(&dir).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=512k,mode=0700", "tmpfs"])
        .arg(&dir)
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !mounted {
        return;
    }
    let mounted = Mounted(dir.clone());
    broker.start("true");
    // The records and logs of a session that was there before have their room.
    broker.guest("web").lives();
    let filler = dir.join("filler");
    let mut file = File::create(&filler).unwrap();
    file.write_all(&[0; 256 * 1024]).unwrap();
    drop(file);
    without_room(&mut broker, |_| fs::remove_file(&filler).unwrap());
    let log = broker.log();
    broker.kill();
    drop(mounted);
    assert!(
        log.contains("No space left on device") || log.contains("no storage space"),
        "{log}"
    );
}

/// A test's file system, unmounted at the end even if it is still in use.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn at_the_limit_of_descriptors_sessions_go_on() {
    let mut broker = Process::new("descriptors", "sessions_per_vm = 1000\nlog_max_bytes = 65536");
    broker.start("ulimit -n 260");
    let mut open: Vec<Session> = Vec::new();
    let refused = loop {
        match Session::try_guest(broker.port, "web") {
            Ok(session) => open.push(session),
            Err(said) => break said,
        }
        assert!(open.len() < 260);
    };
    assert!(
        refused.ends_with("declined reason=session-limit\n"),
        "{refused:?} after {}",
        open.len()
    );
    assert!(open.len() > 20, "{}", open.len());
    // Also across rotations, which need descriptors of their own.
    let (first, others) = open.split_at_mut(1);
    for session in others.iter_mut() {
        session.subscribe("a", None);
    }
    for n in 1..=100_u64 {
        assert_eq!(
            first[0].publish("a", &json!({ "n": n, "pad": "x".repeat(900) })),
            n
        );
    }
    for session in others.iter_mut() {
        for n in 1..=100_u64 {
            assert_eq!(seq_of(&session.body().unwrap()), n);
        }
    }
    open.truncate(10);
    let mut late = eventually("places to be free", || {
        Session::try_guest(broker.port, "web").ok()
    });
    late.subscribe("a", Some(90));
    for n in 90..=100 {
        assert_eq!(seq_of(&late.body().unwrap()), n);
    }
    assert!(broker.log().contains("WARN max_connections="));
}

#[test]
fn who_sends_without_end_costs_little_and_delays_nobody() {
    let mut broker = Process::new("flood", "log_max_bytes = 4000000\nlog_keep = 1\nsync = \"none\"");
    broker.start("true");
    let mut other = broker.guest("other");
    other.lives();
    let before = broker.resident();
    let large = framed(
        format!(
            "{{\"type\":\"publish\",\"topic\":\"a\",\"payload\":\"{}\"}}",
            "x".repeat(60_000)
        )
        .as_bytes(),
    );
    let small = framed(b"{}");
    let none = framed(b"");
    let beats = framed(b"{\"type\":\"heartbeat\"}");
    let stop = AtomicBool::new(false);
    let sent = AtomicU64::new(0);
    let mut most = 0;
    thread::scope(|scope| {
        // None of them ever reads.
        for (vm, frame) in [
            ("large", &large),
            ("small", &small),
            ("none", &none),
            ("beats", &beats),
        ] {
            let (stop, sent, port) = (&stop, &sent, broker.port);
            scope.spawn(move || {
                let piece = frame.repeat(1.max(256 * 1024 / frame.len()));
                while !stop.load(Ordering::Relaxed) {
                    // Cut off as a slow consumer it comes back at once.
                    let Ok(mut session) = Session::try_guest(port, vm) else {
                        continue;
                    };
                    session.write_timeout(Duration::from_millis(100));
                    while session.write(&piece).is_ok() && !stop.load(Ordering::Relaxed) {
                        sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
                    }
                }
            });
        }
        let began = Instant::now();
        until("a lot to be sent", || {
            let seq = other.publish("b", &json!("between"));
            assert!(seq > 0);
            most = most.max(broker.resident());
            let sent = sent.load(Ordering::Relaxed);
            sent > 64 << 20 || began.elapsed() > Duration::from_secs(6)
        });
        stop.store(true, Ordering::Relaxed);
    });
    println!(
        "{before} KiB before, {most} KiB at most, {} MiB sent",
        sent.load(Ordering::Relaxed) >> 20
    );
    // Four queues of 4 MiB, what was read and is being answered, and what a debug build adds.
    assert!(
        most < before + 100 * 1024,
        "{before} KiB before, {most} KiB at most"
    );
    other.lives();
}

#[test]
fn status_tells_of_sessions_while_they_are_there() {
    let mut broker = Process::new("status", "");
    broker.start("true");
    let seen = |what: &str, look: &dyn Fn(&Value) -> bool| {
        eventually(what, || {
            let vm = broker.status();
            look(&vm).then_some(vm)
        })
    };
    let vm = broker.status();
    assert_eq!(
        (&vm["bus_session"], &vm["bus_subscribed"]),
        (&json!(false), &json!(false))
    );
    let mut first = broker.guest("web");
    let vm = seen("a session", &|vm| vm["bus_session"] == true);
    assert_eq!(vm["bus_subscribed"], false);
    assert!(vm["last_publish_age_ms"].is_null() && vm["last_heartbeat_age_ms"].is_null());
    first.subscribe("a", None);
    seen("a subscription", &|vm| vm["bus_subscribed"] == true);
    first.publish("b", &json!(1));
    seen("a publish", &|vm| vm["last_publish_age_ms"].is_u64());
    first.send(&json!({ "type": "heartbeat", "payload": { "load": 0.5 } }));
    first.ack();
    let vm = seen("metrics", &|vm| vm["guest_metrics"] == json!({ "load": 0.5 }));
    assert!(vm["last_heartbeat_age_ms"].is_u64());
    // One too long to keep proves life and changes nothing else.
    first.send(&json!({ "type": "heartbeat", "payload": "m".repeat(600) }));
    first.ack();
    let mut second = broker.guest("web");
    second.lives();
    drop(first);
    let vm = seen("the subscription to go", &|vm| vm["bus_subscribed"] == false);
    assert_eq!(vm["bus_session"], true, "the other one is there");
    assert_eq!(vm["guest_metrics"], json!({ "load": 0.5 }));
    drop(second);
    seen("the sessions to go", &|vm| vm["bus_session"] == false);
    // A broker that is killed leaves no session behind.
    let mut last = broker.guest("web");
    last.subscribe("a", None);
    seen("a subscription again", &|vm| vm["bus_subscribed"] == true);
    broker.kill();
    broker.start("true");
    let vm = broker.status();
    assert_eq!(
        (&vm["bus_session"], &vm["bus_subscribed"]),
        (&json!(false), &json!(false))
    );
}
