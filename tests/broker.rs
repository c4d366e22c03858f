//! The broker over real sockets: every bad input, crowds of bad clients, removed files.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs;
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use castra::core::cancel::Cancel;
use castra::core::config::{AuthMode, PortChoice};
use castra::core::failure::Exit;
use castra::core::host;
use castra::core::root::handshake_record::RecordRead;
use castra::core::root::paths::StateRoot;
use castra::core::root::records::{self, BrokerRecord, GuestRecord, GuestsRecord};

use support::broker::{Fixture, answer};
use support::scratch::RecordLock;
use support::{AMPLE, eventually, objects_in, of_type, until};

#[test]
fn a_hello_is_answered_logged_and_recorded() {
    let mut broker = Fixture::new("hello");
    broker.start();
    assert_eq!(broker.say(b"hello vm:web-0 capabilities=x-b,x-a,x-b\r\n"), "ok\n");
    let RecordRead::Record(record) = broker.record("web-0") else {
        panic!("no record");
    };
    assert_eq!(record.capabilities, ["x-a", "x-b"]);
    assert!(host::boottime_ms() - record.heard_boottime_ms < 5000);
    let log = broker.log();
    let line = log.lines().find(|line| line.contains("hello from")).unwrap();
    assert!(
        line.starts_with("[host-broker] 2")
            && line.contains(
                "Z INFO hello from vm:web-0 outcome=ok session=none capabilities=x-a,x-b remote=127.0.0.1:"
            ),
        "{line}"
    );
    let events = objects_in(&broker.state.broker_events());
    let handshakes = of_type(&events, "broker.handshake");
    assert_eq!(handshakes.len(), 1);
    assert_eq!(handshakes[0]["vm"], "web-0");
    assert_eq!(handshakes[0]["capabilities"], serde_json::json!(["x-a", "x-b"]));
    broker.stop();
    let record: BrokerRecord = records::load(&broker.state.broker_json()).unwrap().unwrap();
    assert!(record.clean_stop && record.embedded);
    assert!(!broker.state.broker_sock().exists());
}

#[test]
fn bad_hellos_are_declined_told_and_logged_once() {
    let mut broker = Fixture::new("bad");
    broker.config.hello_timeout = Duration::from_secs(2);
    broker.guests(&[("web-0", None), ("db", Some("secret"))]);
    broker.start();
    let long = [b"hello vm:web-0 x=".as_slice(), &[b'y'; 10_000], b"\n"].concat();
    let longest_name = format!("hello vm:{}\n", "a".repeat(65));
    let cases: [(&[u8], &str, &str); 24] = [
        (&long, "protocol-error", "-"),
        (&long[..10_000], "protocol-error", "-"),
        (b"hello vm:web-0", "timeout", "-"),
        (b"hello vm:web-0\0\n", "protocol-error", "-"),
        (b"hello vm:web-0\x1b[2J\n", "protocol-error", "-"),
        (b"hello vm:web-0\xe2\x80\xae\n", "protocol-error", "-"),
        (b"hello vm:web-0 x=\xff\xfe\n", "protocol-error", "-"),
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "protocol-error",
            "-",
        ),
        (
            b"POST / HTTP/1.1\r\nContent-Length: 15\r\n\r\nhello vm:web-0\n",
            "protocol-error",
            "-",
        ),
        (b"\n", "protocol-error", "-"),
        (b"hello\n", "protocol-error", "-"),
        (b"hello vm:\n", "protocol-error", "-"),
        (b"hello vm:..\n", "protocol-error", "-"),
        (b"hello vm:/\n", "protocol-error", "-"),
        (b"hello vm:../../etc/passwd\n", "protocol-error", "-"),
        (longest_name.as_bytes(), "protocol-error", "-"),
        (b"hello vm:web-0 [host-broker]\n", "protocol-error", "web-0"),
        (b"hello vm:host\n", "reserved-identity", "host"),
        (b"hello vm:HOST\n", "reserved-identity", "HOST"),
        (b"hello vm:broadcast\n", "reserved-identity", "broadcast"),
        (b"hello vm:evil\n", "unknown-vm", "evil"),
        (b"hello vm:db\n", "bad-token", "db"),
        (b"hello vm:db token=guess\n", "bad-token", "db"),
        (b"hello vm:DB token=\n", "bad-token", "db"),
    ];
    for (index, (bytes, reason, vm)) in cases.iter().enumerate() {
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).into_owned();
        // Beyond twenty a second lines are merged, and these are to be told apart.
        until("a new second", || {
            index == 0 || index % 15 != 0 || broker.lines("hello from") < 15 || second_is_new(&broker)
        });
        let before = broker.lines("hello from");
        assert_eq!(
            broker.say(bytes),
            format!("declined reason={reason}\n"),
            "{shown:?}"
        );
        let log = broker.log();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains("hello from")).collect();
        assert_eq!(lines.len(), before + 1, "{shown:?} gives one line");
        let wanted = format!(
            " WARN hello from vm:{vm} outcome=declined reason={reason} capabilities=- remote=127.0.0.1:"
        );
        assert!(lines[before].contains(&wanted), "{shown:?}: {}", lines[before]);
    }
    let log = broker.log();
    assert!(
        log.lines().all(|line| line.starts_with("[host-broker] 2")),
        "nobody can forge a line"
    );
    assert!(
        log.bytes()
            .all(|byte| byte == b'\n' || (b' '..=b'~').contains(&byte))
    );
    assert!(
        !log.contains("secret") && !log.contains("guess"),
        "no token in a log"
    );
    assert_eq!(broker.say(b"hello vm:db token=secret\n"), "ok\n");
    assert_eq!(fs::read_dir(broker.state.handshakes()).unwrap().count(), 1);
}

/// Waits until the last line is a second old.
fn second_is_new(broker: &Fixture) -> bool {
    let log = broker.log();
    let stamp = log
        .lines()
        .last()
        .and_then(|line| line.split(' ').nth(1))
        .unwrap_or_default();
    let then = humantime::parse_rfc3339(stamp).unwrap();
    then.elapsed().is_ok_and(|age| age > Duration::from_millis(1100))
}

#[test]
fn odd_but_right_hellos_are_accepted() {
    let mut broker = Fixture::new("odd");
    broker.start();
    assert_eq!(broker.say(b"hello vm:crlf\r\n"), "ok\n");
    assert_eq!(broker.say(b"hello vm:one\nhello vm:two\n"), "ok\n");
    assert!(
        matches!(broker.record("two"), RecordRead::Absent),
        "the second hello is dropped"
    );
    let mut pieces = broker.connect();
    pieces.set_nodelay(true).unwrap();
    for byte in b"hello vm:pieces\n" {
        pieces.write_all(&[*byte]).unwrap();
    }
    assert_eq!(answer(pieces), "ok\n");
    // nc -N: the sending side is closed behind the hello.
    let mut half_closed = broker.connect();
    half_closed.write_all(b"hello vm:half\n").unwrap();
    half_closed.shutdown(Shutdown::Write).unwrap();
    assert_eq!(answer(half_closed), "ok\n");
    // A bus this broker doesn't speak: the guest is told which one it may ask for.
    assert_eq!(
        broker.say(b"hello vm:rider capabilities=bus-v9\n"),
        "declined reason=unsupported-capability supported=bus-v1\n"
    );
    let mut cut = broker.connect();
    cut.write_all(b"hello vm:cut").unwrap();
    cut.shutdown(Shutdown::Write).unwrap();
    assert_eq!(answer(cut), "declined reason=protocol-error\n");
    drop(broker.connect());
    broker.stop();
    assert_eq!(
        broker.lines("hello from"),
        6,
        "closed before its first byte: no attempt"
    );
}

#[test]
fn the_same_name_from_two_connections_is_one_guest() {
    let mut broker = Fixture::new("same");
    broker.start();
    let mut first = broker.connect();
    let mut second = broker.connect();
    first.write_all(b"hello vm:web").unwrap();
    second.write_all(b"hello vm:WEB capabilities=x\n").unwrap();
    assert_eq!(answer(second), "ok\n");
    first.write_all(b" capabilities=y\n").unwrap();
    assert_eq!(answer(first), "ok\n");
    broker.stop();
    assert_eq!(fs::read_dir(broker.state.handshakes()).unwrap().count(), 1);
    assert_eq!(broker.lines("reachable=true last_handshake"), 1);
    assert_eq!(broker.lines("reachable=false last_handshake"), 1, "at the stop");
}

#[test]
fn the_host_has_a_door_of_its_own() {
    let mut broker = Fixture::new("host");
    broker.start();
    let mode = fs::metadata(broker.state.broker_sock())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let say = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(broker.state.broker_sock()).unwrap();
        stream.write_all(bytes).unwrap();
        answer(stream)
    };
    assert_eq!(say(b"hello vm:host\n"), "ok\n");
    assert_eq!(say(b"hello vm:web-0\n"), "declined reason=unknown-vm\n");
    assert_eq!(broker.hello("host"), "declined reason=reserved-identity\n");
    assert_eq!(
        broker.lines("hello from vm:host outcome=ok session=none capabilities=- remote=unix"),
        1
    );
    assert!(!broker.state.handshakes().exists(), "the host has no record");
}

/// Silent, dripping and flooding clients, until told to stop.
fn crowd(port: u16, silent: usize, dripping: usize, stop: &Cancel) {
    thread::scope(|scope| {
        scope.spawn(|| {
            let held: Vec<TcpStream> = (0..silent)
                .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
                .collect();
            let mut drips: Vec<TcpStream> = (0..dripping)
                .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
                .collect();
            while !stop.pause(Duration::from_millis(200)) {
                for drip in &mut drips {
                    let _ = drip.write_all(b"h");
                }
            }
            drop(held);
        });
        scope.spawn(|| {
            let garbage = [b'x'; 65_536];
            while !stop.is_requested() {
                let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
                while stream.write_all(&garbage).is_ok() {}
            }
        });
    });
}

fn median_of_hellos(broker: &Fixture, count: usize) -> Duration {
    let mut took: Vec<Duration> = (0..count)
        .map(|_| {
            let began = Instant::now();
            assert_eq!(broker.hello("web"), "ok\n");
            began.elapsed()
        })
        .collect();
    took.sort_unstable();
    took[count / 2]
}

#[test]
fn a_crowd_of_bad_clients_delays_nobody() {
    let mut broker = Fixture::new("crowd");
    broker.config.hello_timeout = AMPLE;
    broker.start();
    let alone = median_of_hellos(&broker, 200);
    let stop = Cancel::new();
    let port = broker.port();
    let beside = thread::scope(|scope| {
        scope.spawn(|| crowd(port, 500, 20, &stop));
        until("the flood to be refused", || broker.lines("protocol-error") > 0);
        let beside = median_of_hellos(&broker, 200);
        stop.request();
        beside
    });
    println!("hello alone {alone:?}, beside the crowd {beside:?}");
    // The flood uses CPU time; what must not happen is that others wait for it.
    assert!(
        beside < Duration::from_millis(100),
        "{beside:?} beside the crowd, {alone:?} alone"
    );
}

#[test]
fn at_the_cap_the_oldest_makes_room() {
    let mut broker = Fixture::new("cap");
    broker.config.max_connections = 20;
    broker.start();
    let held: Vec<TcpStream> = (0..100).map(|_| broker.connect()).collect();
    for _ in 0..50 {
        assert_eq!(broker.hello("web"), "ok\n");
    }
    let mut told = held.into_iter().take(50).map(answer);
    assert!(told.all(|said| said == "declined reason=session-limit\n"));
}

#[test]
fn files_taken_away_are_made_anew() {
    let mut broker = Fixture::new("taken");
    broker.start();
    assert_eq!(broker.hello("web"), "ok\n");
    let RecordRead::Record(before) = broker.record("web") else {
        panic!("no record");
    };
    fs::remove_dir_all(broker.state.handshakes()).unwrap();
    fs::remove_file(broker.state.broker_pid()).unwrap();
    fs::remove_file(broker.state.broker_sock()).unwrap();
    fs::remove_file(broker.state.broker_json()).unwrap();
    fs::remove_dir_all(broker.state.logs()).unwrap();
    let after = eventually("the record to be back", || match broker.record("web") {
        RecordRead::Record(record) => Some(record),
        _ => None,
    });
    assert_eq!(after, before, "with the time at which the guest was heard");
    until("the pid file to be back", || {
        host::locked_pid(&broker.state.broker_pid()) == Some(std::process::id())
    });
    eventually("the host's door to be back", || {
        UnixStream::connect(broker.state.broker_sock()).ok()
    });
    until("broker.json to be back", || broker.state.broker_json().exists());
    until("the log to be back", || broker.state.broker_log().exists());
}

/// Guests keep sending, so that the broker writes at every moment.
#[test]
fn a_broker_stops_with_its_state_root_and_makes_nothing_anew() {
    for (label, replaced) in [("root-gone", false), ("root-replaced", true)] {
        let mut broker = Fixture::new(label);
        let port = broker.start();
        assert_eq!(broker.hello("web"), "ok\n");
        let root = broker.state.dir().to_owned();
        fs::remove_dir_all(&root).unwrap();
        if replaced {
            fs::create_dir(&root).unwrap();
        }
        eventually("the broker's end", || {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(mut stream) => {
                    // The broker may end before it sends its greeting.
                    let _ = stream.write_all(b"hello vm:db\n");
                    let _ = std::io::copy(&mut stream, &mut std::io::sink());
                    None
                }
                Err(_) => Some(()),
            }
        });
        broker.stop();
        match replaced {
            true => assert_eq!(fs::read_dir(&root).unwrap().count(), 0),
            false => assert!(!root.exists()),
        }
    }
}

#[test]
fn a_broker_whose_state_root_was_moved_stops_in_order() {
    let mut broker = Fixture::new("root-moved");
    broker.start();
    assert_eq!(broker.hello("web"), "ok\n");
    let moved = broker.state.dir().with_file_name("moved");
    fs::rename(broker.state.dir(), &moved).unwrap();
    let moved = StateRoot::new(moved);
    eventually("its last word", || {
        let log = fs::read_to_string(moved.broker_log()).ok()?;
        log.contains("broker stopped").then_some(())
    });
    broker.stop();
    assert!(!broker.state.dir().exists() && !moved.broker_sock().exists());
    let record: BrokerRecord = records::load(&moved.broker_json()).unwrap().unwrap();
    assert!(record.clean_stop);
    let log = fs::read_to_string(moved.broker_log()).unwrap();
    assert!(
        log.contains(&broker.state.dir().display().to_string()) && !log.contains("/proc/"),
        "{log}"
    );
}

#[test]
fn a_disk_without_room_stops_records_not_the_broker() {
    let mut broker = Fixture::new("disk");
    host::ensure_private_dir(&broker.state.logs()).unwrap();
    for log in [broker.state.broker_log(), broker.state.broker_events()] {
        std::os::unix::fs::symlink("/dev/full", log).unwrap();
    }
    fs::write(broker.state.handshakes(), "a file where the directory should be").unwrap();
    broker.start();
    assert_eq!(broker.hello("web"), "declined reason=storage-error\n");
    fs::remove_file(broker.state.handshakes()).unwrap();
    assert_eq!(broker.hello("web"), "ok\n");
    // An existing record needs no room.
    for log in [broker.state.broker_log(), broker.state.broker_events()] {
        fs::remove_file(log).unwrap();
    }
    assert_eq!(broker.hello("web"), "ok\n");
    broker.stop();
    assert_eq!(
        broker.lines("lines before this one were lost"),
        1,
        "{}",
        broker.log()
    );
    assert!(
        fs::read_to_string(broker.state.broker_events())
            .unwrap()
            .contains("broker.stopped")
    );
}

#[test]
fn guests_are_those_of_the_last_launch() {
    let mut broker = Fixture::new("launch");
    broker.guests(&[("web", Some("first"))]);
    broker.start();
    assert_eq!(broker.say(b"hello vm:web token=first\n"), "ok\n");
    broker.guests(&[("web", Some("second"))]);
    assert_eq!(
        broker.say(b"hello vm:web token=first\n"),
        "declined reason=bad-token\n",
        "a hello of an earlier boot"
    );
    assert_eq!(broker.say(b"hello vm:web token=second\n"), "ok\n");
    fs::write(broker.state.guests(), "{ half").unwrap();
    assert_eq!(
        broker.say(b"hello vm:web token=second\n"),
        "ok\n",
        "a broken file changes nothing"
    );
    broker.config.auth = AuthMode::Token;
    broker.stop();
    broker.guests(&[("web", None)]);
    broker.start();
    assert_eq!(broker.hello("web"), "declined reason=bad-token\n");
}

#[test]
fn two_brokers_of_one_project_are_one_too_many() {
    let mut broker = Fixture::new("two");
    broker.start();
    let mut other = Fixture::new("two");
    other.state = broker.state.clone();
    let failure = other.try_start().unwrap_err();
    assert_eq!(failure.exit, Exit::Busy);
    assert!(
        failure.what.contains(&format!("pid {}", std::process::id())),
        "{failure}"
    );
    assert_eq!(broker.hello("web"), "ok\n");
}

#[test]
fn a_port_in_use_is_refused_with_its_owner() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut broker = Fixture::new("port");
    broker.config.port = PortChoice::Exactly(port);
    let failure = broker.try_start().unwrap_err();
    assert!(failure.what.contains(&port.to_string()), "{failure}");
    assert!(
        failure
            .why
            .unwrap()
            .contains(&format!("(pid {})", std::process::id()))
    );
    drop(taken);
    assert_eq!(broker.start(), port);
    // A running VM knows the port, so the port stays, whatever the config says now.
    broker.stop();
    let vm = broker.state.vm(&"web".parse().unwrap());
    host::ensure_private_dir(vm.dir()).unwrap();
    let qemu = RecordLock::hold(&vm.qemu_pid());
    broker.config.port = PortChoice::Free;
    assert_eq!(broker.start(), port);
    broker.stop();
    let taken = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let failure = broker.try_start().unwrap_err();
    assert!(failure.next.unwrap().contains("castra down"));
    drop((qemu, taken));
    assert_ne!(broker.start(), 0);
}

#[test]
fn a_vm_that_ends_is_told_once_and_leaves_the_window() {
    let mut broker = Fixture::new("exit");
    let vm: castra::core::name::VmName = "web".parse().unwrap();
    let paths = broker.state.vm(&vm);
    host::ensure_private_dir(paths.dir()).unwrap();
    let state = broker.state.clone();
    let launch = |id: &str| {
        let launched = Some(host::boottime_ms());
        let guest = GuestRecord {
            closed: false,
            name: vm.clone(),
            second_name: None,
            launch_id: Some(id.into()),
            launched_boottime_ms: launched,
            boot_id: Some(host::boot_id().clone()),
            token_sha256: None,
        };
        records::save(&state.guests(), &GuestsRecord { guests: vec![guest] }).unwrap();
    };
    launch("one");
    let qemu = RecordLock::hold(&paths.qemu_pid());
    broker.start();
    assert_eq!(broker.hello("web"), "ok\n");
    fs::write(
        paths.file("qmp.log"),
        "{\"return\": {}}\n{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-panic\"}}\n",
    )
    .unwrap();
    drop(qemu);
    until("the exit in the log", || broker.lines("exit of vm:web") == 1);
    assert_eq!(
        broker.lines("exit of vm:web outcome=crashed reason=guest-panic"),
        1
    );
    assert_eq!(broker.lines("freshness of vm:web reachable=false"), 1);

    launch("two");
    let qemu = RecordLock::hold(&paths.qemu_pid());
    assert_eq!(broker.hello("web"), "ok\n");
    until("a look at the new launch", || second_is_new(&broker));
    let stop = castra::core::root::records::StopRecord {
        launch_id: "two".into(),
        by: "castra down".into(),
        at: "2026-11-21T10:00:00.000Z".into(),
    };
    records::save(&paths.stop(), &stop).unwrap();
    drop(qemu);
    until("the guest to leave the window", || {
        broker.lines("freshness of vm:web reachable=false") == 2
    });
    broker.stop();
    broker.start();
    broker.stop();
    assert_eq!(
        broker.lines("exit of vm:web"),
        1,
        "what `down` asked for is its own to tell"
    );
    let events = fs::read_to_string(broker.state.broker_events()).unwrap();
    assert_eq!(events.matches("\"phase\":\"exited\"").count(), 1);
}

/// Hellos with bytes changed, cut, doubled and moved: each is answered, none does harm.
#[test]
fn whatever_comes_is_answered() {
    let mut broker = Fixture::new("fuzz");
    broker.config.hello_timeout = Duration::from_millis(100);
    broker.guests(&[("web-0", None)]);
    let port = broker.start();
    let whole = b"hello vm:web-0 token=abc capabilities=vizier-v1,x-demo later=1\r\n";
    let mangle = |seed: u64| {
        let mut dice = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut roll = |sides: usize| {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            (dice % sides as u64) as usize
        };
        let mut bytes = whole.to_vec();
        for _ in 0..=roll(4) {
            let at = roll(bytes.len());
            match roll(5) {
                0 => bytes[at] = roll(256) as u8,
                1 => bytes.insert(at, [b'\n', b'\r', 0, 0x1b, b' ', b'=', b',', 0xff][roll(8)]),
                2 => bytes.truncate(at.max(1)),
                3 => bytes.extend_from_within(at..),
                _ => {
                    let by = roll(3).min(bytes.len());
                    bytes.rotate_left(by);
                }
            }
        }
        let mut stream = broker.connect();
        stream.write_all(&bytes).unwrap();
        // Half of them close their side, half wait to be answered.
        if roll(2) == 0 {
            stream.shutdown(Shutdown::Write).unwrap();
        }
        let said = answer(stream);
        assert!(
            said == "ok\n" || (said.starts_with("declined reason=") && said.ends_with('\n')),
            "seed {seed}: {said:?} to {:?}",
            String::from_utf8_lossy(&bytes)
        );
    };
    thread::scope(|scope| {
        for first in 1..=12 {
            let mangle = &mangle;
            scope.spawn(move || (0..50).for_each(|more| mangle(first + 12 * more)));
        }
    });
    assert_eq!(broker.port(), port);
    assert_eq!(broker.hello("web-0"), "ok\n");
    assert_eq!(fs::read_dir(broker.state.handshakes()).unwrap().count(), 1);
    assert!(
        broker
            .log()
            .bytes()
            .all(|byte| byte == b'\n' || (b' '..=b'~').contains(&byte))
    );
}
