//! Sessions of the bus over real sockets: every bad input, clients that stall, never read or never
//! stop, replay across rotations.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use castra::core::lines::journal::Rotation;
use castra::core::root::handshake_record::RecordRead;
use support::broker::Fixture;
use support::session::{Session, framed, seq_of};
use support::{eventually, objects_in, until};

fn error(kind: Value, reason: &str) -> Value {
    json!({ "type": "ack", "ack": kind, "status": "error", "reason": reason })
}

/// The events of the broker of this type.
fn events(broker: &Fixture, kind: &str) -> Vec<Value> {
    let mut events = objects_in(&broker.state.broker_events());
    events.retain(|event| event["type"] == kind);
    events
}

/// What the log of the bus holds, by number.
fn kept(broker: &Fixture) -> Vec<Value> {
    objects_in(&broker.state.bus_log())
}

/// How often a frame was refused for this reason, told one by one or merged.
fn refusals(broker: &Fixture, reason: &str) -> u64 {
    let wanted = format!(" reason={reason}");
    let log = broker.log();
    let lines = log
        .lines()
        .filter(|line| line.contains(" refused vm:") && line.contains(&wanted));
    lines
        .map(|line| match line.split_once(" repeated=") {
            Some((_, count)) => count.parse().unwrap(),
            None => 1,
        })
        .sum()
}

#[test]
fn bad_frames_are_answered_and_logged_once_each() {
    let mut broker = Fixture::new("bad-frames");
    let port = broker.start();
    let mut watcher = Session::host(&broker.state.broker_sock());
    watcher.subscribe("*", None);
    let deep = |opened: &str, closed: &str| -> String {
        format!(
            "{{\"type\":\"publish\",\"payload\":{}0{}}}",
            opened.repeat(10_000),
            closed.repeat(10_000)
        )
    };
    let long = format!(
        "{{\"type\":\"publish\",\"topic\":\"{}\",\"payload\":1}}",
        "t".repeat(300)
    );
    let cases: [(&[u8], Value, &str); 23] = [
        (b"", Value::Null, "malformed"),
        (b"no json", Value::Null, "malformed"),
        (b"{\"type\":\"publish\"", Value::Null, "malformed"),
        (
            b"{\"type\":\"publish\",\"payload\":\"\xff\"}",
            Value::Null,
            "malformed",
        ),
        (b"17", Value::Null, "malformed"),
        (b"[\"publish\",\"a\",1]", Value::Null, "malformed"),
        (b"null", Value::Null, "malformed"),
        (b"{}", Value::Null, "malformed"),
        (b"{\"topic\":\"a\",\"payload\":1}", Value::Null, "malformed"),
        (b"{\"type\":1}", Value::Null, "malformed"),
        (
            b"{\"type\":\"heartbeat\",\"type\":\"publish\",\"payload\":1}",
            Value::Null,
            "malformed",
        ),
        (
            b"{\"type\":\"publish\",\"payload\":1,\"payload\":2}",
            Value::Null,
            "malformed",
        ),
        (b"{\"type\":\"dance\"}", json!("dance"), "unknown-type"),
        (b"{\"type\":\"publish\"}", json!("publish"), "malformed"),
        (
            b"{\"type\":\"publish\",\"topic\":\"a\\nb\",\"payload\":1}",
            json!("publish"),
            "bad-topic",
        ),
        (
            b"{\"type\":\"publish\",\"topic\":\"a\\u001b[2J\",\"payload\":1}",
            json!("publish"),
            "bad-topic",
        ),
        (
            b"{\"type\":\"publish\",\"topic\":\"\",\"payload\":1}",
            json!("publish"),
            "bad-topic",
        ),
        (
            b"{\"type\":\"publish\",\"topic\":\"a*\",\"payload\":1}",
            json!("publish"),
            "bad-topic",
        ),
        (
            b"{\"type\":\"subscribe\",\"topic\":\"a*b\"}",
            json!("subscribe"),
            "bad-topic",
        ),
        (
            b"{\"type\":\"subscribe\",\"topic\":\"a\",\"from\":-1}",
            json!("subscribe"),
            "malformed",
        ),
        (
            b"{\"type\":\"publish\",\"topic\":\"castra/session/web\",\"payload\":1}",
            json!("publish"),
            "forbidden",
        ),
        (b"{\"type\":\"subscribe\"}", json!("subscribe"), "bad-topic"),
        (long.as_bytes(), json!("publish"), "bad-topic"),
    ];
    let mut client = Session::guest(port, "web");
    let mut told = std::collections::BTreeMap::new();
    let mut expect = |reason: &str| *told.entry(reason.to_owned()).or_insert(0) += 1;
    for (body, kind, reason) in &cases {
        client.send_raw(body);
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        let mut ack = client.ack();
        let detail = ack.as_object_mut().unwrap().remove("detail");
        assert_eq!(ack, error(kind.clone(), reason), "{shown}");
        assert_eq!(detail.is_some(), *reason == "malformed", "{shown}: {detail:?}");
        expect(reason);
        client.lives();
    }
    for (opened, closed) in [("[", "]"), ("{\"a\":", "}")] {
        client.send_raw(deep(opened, closed).as_bytes());
        let ack = client.ack();
        assert_eq!(ack["reason"], "malformed", "{ack}");
        expect("malformed");
    }
    // One that forges a line of the log is told as text.
    client.send_raw(b"{\"type\":\"a\\n[host-broker] forged\"}");
    assert_eq!(client.ack()["reason"], "unknown-type");
    expect("unknown-type");
    client.lives();
    assert_eq!(
        client.publish("ci", &json!("good")),
        1,
        "nothing else got a number"
    );
    let delivered = watcher.frame().unwrap();
    assert_eq!(
        (&delivered["payload"], &delivered["seq"]),
        (&json!("good"), &json!(1))
    );
    broker.stop();
    for (reason, count) in told {
        assert_eq!(refusals(&broker, &reason), count, "{reason}");
    }
    let log = broker.log();
    assert!(log.lines().all(|line| line.starts_with("[host-broker] 2")));
    assert!(
        log.bytes()
            .all(|byte| byte == b'\n' || (b' '..=b'~').contains(&byte))
    );
}

#[test]
fn a_length_that_is_none_closes_that_session_alone() {
    let mut broker = Fixture::new("lengths");
    let port = broker.start();
    let mut other = Session::guest(port, "other");
    for (index, length) in [65_537_u32, u32::MAX].into_iter().enumerate() {
        let mut client = Session::guest(port, "web");
        let mut bytes = framed(br#"{"type":"publish","topic":"a","payload":1,"id":"before"}"#);
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&framed(br#"{"type":"publish","payload":"behind"}"#));
        client.write(&bytes).unwrap();
        assert_eq!(client.ack()["id"], "before");
        assert_eq!(
            client.frame().unwrap(),
            json!({ "type": "close", "reason": "protocol-error" })
        );
        assert_eq!(client.frame(), None, "nothing follows a close");
        let wanted = format!("length={length} is beyond max_frame_bytes");
        until("the close to be told", || {
            let closed = events(&broker, "broker.session")
                .into_iter()
                .filter(|event| event["reason"] == "protocol-error");
            closed.count() == index + 1
        });
        assert_eq!(broker.lines(&wanted), 1);
    }
    // The largest frame there may be.
    let head = br#"{"type":"publish","topic":"a","payload":""#;
    let body = [head.as_slice(), &vec![b'x'; 65_536 - head.len() - 2], b"\"}"].concat();
    assert_eq!(body.len(), 65_536);
    other.send_raw(&body);
    assert_eq!(other.ack()["seq"], 3);
    assert!(kept(&broker).iter().all(|line| line["payload"] != "behind"));
}

#[test]
fn a_frame_that_stalls_is_taken_when_it_is_whole() {
    let mut broker = Fixture::new("stall");
    broker.config.hello_timeout = Duration::from_millis(300);
    let port = broker.start();
    let frame = framed(br#"{"type":"publish","topic":"a","payload":"whole"}"#);
    for cut in [1, 3, 4, 5, frame.len() - 1] {
        let mut client = eventually("a session in so short a time", || {
            Session::try_guest(port, "web").ok()
        });
        client.write(&frame[..cut]).unwrap();
        // Waits as long as the broker waits for a silent client's hello.
        assert_eq!(broker.say(b""), "declined reason=timeout\n");
        client.write(&frame[cut..]).unwrap();
        assert_eq!(client.ack()["status"], "ok", "cut at {cut}");
    }
    assert_eq!(kept(&broker).len(), 5);
}

#[test]
fn who_is_silent_for_too_long_is_told_and_closed() {
    let mut broker = Fixture::new("idle");
    broker.bus.session_idle = Duration::from_secs(3);
    let port = broker.start();
    let mut silent = Session::guest(port, "silent");
    // Bytes that don't complete a frame are no proof of life.
    let frame = framed(br#"{"type":"publish","payload":"late"}"#);
    silent.write(&frame[..7]).unwrap();
    let mut busy = Session::guest(port, "busy");
    let closed = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            until("the silent one to be closed", || {
                busy.lives();
                closed.load(Ordering::Relaxed)
            });
        });
        assert_eq!(
            silent.frame().unwrap(),
            json!({ "type": "close", "reason": "idle" })
        );
        assert_eq!(silent.frame(), None);
        closed.store(true, Ordering::Relaxed);
    });
    busy.lives();
    assert_eq!(broker.lines("session of vm:silent"), 2);
    assert_eq!(broker.lines("phase=closed reason=idle"), 1);
    eventually("the record to say so", || match broker.record("silent") {
        RecordRead::Record(record) => (!record.bus_session).then_some(()),
        _ => None,
    });
    assert_eq!(kept(&broker).len(), 0, "half a frame is no message");
}

#[test]
fn there_are_only_so_many_subscriptions_and_sessions() {
    let mut broker = Fixture::new("limits");
    broker.bus.sessions_per_vm = 3;
    broker.bus.publishes_per_sec_per_vm = 5;
    let port = broker.start();
    let mut client = Session::guest(port, "web");
    let asked: Vec<u8> = (0..10_000)
        .flat_map(|n| framed(format!("{{\"type\":\"subscribe\",\"topic\":\"t/{n}\",\"id\":{n}}}").as_bytes()))
        .collect();
    client.write(&asked).unwrap();
    for n in 0..10_000 {
        let ack = client.ack();
        assert_eq!((&ack["id"], &ack["topic"]), (&json!(n), &json!(format!("t/{n}"))));
        if n < 64 {
            assert_eq!(ack["status"], "ok");
        } else {
            assert_eq!(ack["reason"], "subscription-limit");
        }
    }
    let mut more: Vec<Session> = (0..2).map(|_| Session::guest(port, "WEB")).collect();
    assert_eq!(
        Session::try_guest(port, "web").err().unwrap(),
        "declined reason=session-limit\n"
    );
    assert_eq!(broker.hello("web"), "ok\n", "who wants no session needs no place");
    drop(client);
    more.push(eventually("a place to be free", || {
        Session::try_guest(port, "web").ok()
    }));
    let mut publisher = more.pop().unwrap();
    for n in 0..200 {
        publisher.send(&json!({ "type": "publish", "topic": "a", "payload": n, "id": n }));
    }
    let acks: Vec<Value> = (0..200).map(|_| publisher.ack()).collect();
    let taken = acks.iter().filter(|ack| ack["status"] == "ok").count();
    assert!(
        (5..200).contains(&taken),
        "{taken} of 200 publishes at 5 a second"
    );
    assert!(acks.iter().enumerate().all(|(n, ack)| ack["id"] == n));
    let refused = acks.iter().filter(|ack| ack["reason"] == "rate-limit").count();
    assert_eq!(taken + refused, 200);
    let reasons: std::collections::BTreeSet<String> = events(&broker, "broker.backpressure")
        .iter()
        .map(|event| event["reason"].as_str().unwrap().to_owned())
        .collect();
    assert!(reasons.contains("subscription-limit"), "{reasons:?}");
    until("the refusals to be told", || {
        refusals(&broker, "rate-limit") == refused as u64
    });
}

#[test]
fn who_never_reads_is_cut_off_and_delays_nobody() {
    let mut broker = Fixture::new("slow");
    broker.bus.outbound_queue_bytes = 200_000;
    broker.guests(&[("slow", None), ("fast", None), ("web", None)]);
    let port = broker.start();
    let mut host = Session::host(&broker.state.broker_sock());
    host.subscribe("castra/session/*", None);
    let mut slow = Session::guest(port, "slow");
    slow.subscribe("a", None);
    let mut fast = Session::guest(port, "fast");
    fast.subscribe("a", None);
    let done = AtomicBool::new(false);
    let published = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            // Three may be closed or opened meanwhile; only these are numbered without holes among
            // themselves.
            let mut count = 0_u64;
            while let Some(frame) = fast.frame() {
                if frame["payload"]["n"] == "last" {
                    return count;
                }
                assert_eq!(frame["payload"]["n"], count, "every message, in order");
                count += 1;
            }
            panic!("the fast one was cut off after {count}");
        });
        let mut publisher = Session::guest(port, "web");
        let pad = "x".repeat(20_000);
        let mut count = 0_u64;
        until("the slow one to be cut off", || {
            publisher.publish("a", &json!({ "n": count, "pad": pad }));
            count += 1;
            broker.lines("backpressure of vm:slow") > 0
        });
        publisher.publish("a", &json!({ "n": "last" }));
        assert_eq!(reader.join().unwrap(), count);
        done.store(true, Ordering::Relaxed);
        count
    });
    assert!(published > 0 && done.load(Ordering::Relaxed));
    assert_eq!(broker.lines("reason=slow-consumer queued_bytes="), 1);
    assert_eq!(broker.lines("session of vm:slow session=s-"), 2);
    let told = events(&broker, "broker.backpressure");
    assert_eq!(told.len(), 1);
    assert_eq!(
        (&told[0]["vm"], &told[0]["reason"]),
        (&json!("slow"), &json!("slow-consumer"))
    );
    assert!(told[0]["queued_bytes"].as_u64().unwrap() > 200_000);
    let closed = eventually("the session's topic to tell it", || {
        let frame = host.frame().unwrap();
        (frame["payload"]["phase"] == "closed").then_some(frame)
    });
    assert_eq!(closed["topic"], "castra/session/slow");
    assert_eq!(closed["payload"]["reason"], "slow-consumer");
    assert_eq!(closed["vm"], "broker");
    // The frames so far are whole, and the stream ends without a close.
    let mut had = 0;
    while let Some(body) = slow.body() {
        assert!(seq_of(&body) > had);
        had = seq_of(&body);
    }
    // It continues where it was.
    let mut slow = Session::guest(port, "slow");
    slow.subscribe("a", Some(had + 1));
    let mut n = eventually("the first message that it missed", || {
        let frame = slow.frame().unwrap();
        frame["payload"]["n"].as_u64()
    });
    while let Some(next) = slow.frame().unwrap()["payload"]["n"].as_u64() {
        assert_eq!(next, n + 1);
        n = next;
    }
    assert_eq!(n, published - 1);
}

#[test]
fn who_closes_its_side_gets_its_answers() {
    let mut broker = Fixture::new("half");
    let port = broker.start();
    for round in 0..10_u64 {
        let mut client = Session::guest(port, "web");
        let said: Vec<u8> = (0..200)
            .flat_map(|n| framed(format!("{{\"type\":\"publish\",\"payload\":{n},\"id\":{n}}}").as_bytes()))
            .collect();
        client.write(&said).unwrap();
        client.half_close();
        for n in 0..200 {
            let ack = client.ack();
            assert_eq!(
                (&ack["id"], &ack["seq"]),
                (&json!(n), &json!(round * 200 + n + 1))
            );
        }
        assert_eq!(client.frame(), None);
    }
    until("the sessions to be gone", || {
        broker.lines("phase=closed reason=disconnected") == 10
    });
}

#[test]
fn guests_that_only_say_hello_are_as_before_beside_sessions() {
    let mut broker = Fixture::new("beside");
    let port = broker.start();
    let until = AtomicBool::new(false);
    thread::scope(|scope| {
        for vm in ["a", "b"] {
            let until = &until;
            scope.spawn(move || {
                let mut client = Session::guest(port, vm);
                client.subscribe("*", None);
                let mut acked = 0_u64;
                while !until.load(Ordering::Relaxed) {
                    client.send(&json!({ "type": "publish", "topic": "x", "payload": vm }));
                    loop {
                        let frame = client.frame().unwrap();
                        if frame["type"] == "ack" {
                            break;
                        }
                    }
                    acked += 1;
                }
                assert!(acked > 0);
            });
        }
        for _ in 0..100 {
            assert_eq!(broker.hello("plain"), "ok\n");
            assert_eq!(broker.hello("a"), "ok\n", "the same VM may do both");
            assert_eq!(
                broker.say(b"hello vm:plain capabilities=bus-v7,x-y\n"),
                "declined reason=unsupported-capability supported=bus-v1\n"
            );
        }
        until.store(true, Ordering::Relaxed);
    });
    let RecordRead::Record(record) = broker.record("plain") else {
        panic!("no record");
    };
    assert!(!record.bus_session && record.last_publish_boottime_ms.is_none());
}

#[test]
fn replay_across_rotations_while_others_publish() {
    let mut broker = Fixture::new("replay");
    broker.bus.rotation = Rotation {
        max_bytes: 20_000,
        keep: 200,
    };
    let port = broker.start();
    let total = 4000_u64;
    thread::scope(|scope| {
        let publisher = scope.spawn(move || {
            let mut client = Session::guest(port, "web");
            for n in 1..=total {
                assert_eq!(client.publish(["a", "b"][(n % 2) as usize], &json!(n)), n);
            }
        });
        for reader in 0..6_u64 {
            let broker = &broker;
            scope.spawn(move || {
                let from = 1 + reader * 300;
                let mut client = Session::guest(port, "reader");
                eventually("messages to be replayed", || {
                    client.send(&json!({ "type": "publish", "topic": "", "payload": 0 }));
                    client.ack();
                    let text = fs::read_to_string(broker.state.bus_log()).unwrap_or_default();
                    let last = text
                        .lines()
                        .last()
                        .and_then(|line| serde_json::from_str::<Value>(line).ok());
                    (last?["seq"].as_u64()? >= from + 100).then_some(())
                });
                // Two subscriptions that share messages: each comes once.
                client.send(&json!({ "type": "subscribe", "topic": "*", "from": from }));
                client.send(&json!({ "type": "subscribe", "topic": "a", "from": from }));
                let mut next = from;
                while next <= total {
                    let frame = client.frame().unwrap();
                    if frame["type"] == "ack" {
                        assert_eq!(frame["status"], "ok");
                        continue;
                    }
                    assert_eq!(frame["seq"], next, "{frame}");
                    assert_eq!(frame["payload"], next);
                    next += 1;
                }
            });
        }
        publisher.join().unwrap();
    });
    assert!(
        fs::read_dir(broker.state.bus_log().parent().unwrap())
            .unwrap()
            .count()
            > 10
    );
}

#[test]
fn what_rotation_has_taken_is_a_gap() {
    let mut broker = Fixture::new("gap");
    broker.bus.rotation = Rotation {
        max_bytes: 5000,
        keep: 1,
    };
    let port = broker.start();
    let mut publisher = Session::guest(port, "web");
    for n in 1..=500_u64 {
        assert_eq!(publisher.publish("a", &json!(n)), n);
    }
    let mut client = Session::host(&broker.state.broker_sock());
    client.subscribe("a", Some(0));
    let gap = client.frame().unwrap();
    assert_eq!((&gap["type"], &gap["from"]), (&json!("gap"), &json!(1)));
    let first = gap["to"].as_u64().unwrap() + 1;
    assert!((100..=500).contains(&first), "{gap}");
    for n in first..=500 {
        assert_eq!(client.frame().unwrap()["seq"], n);
    }
    publisher.publish("a", &json!("live"));
    assert_eq!(client.frame().unwrap()["payload"], "live", "it has caught up");
}

#[test]
fn a_log_that_is_taken_away_is_begun_anew_with_the_next_number() {
    let mut broker = Fixture::new("taken-log");
    let port = broker.start();
    let mut client = Session::guest(port, "web");
    for n in 1..=10_u64 {
        assert_eq!(client.publish("a", &json!(n)), n);
    }
    fs::remove_file(broker.state.bus_log()).unwrap();
    // Published all the time, also in the moment in which it is opened anew.
    let mut n = 10;
    until("the log to be back", || {
        for _ in 0..10 {
            n += 1;
            assert_eq!(client.publish("a", &json!(n)), n);
        }
        broker.state.bus_log().exists()
    });
    assert_eq!(client.publish("a", &json!("after")), n + 1);
    let lines = kept(&broker);
    let mut before = lines[0]["seq"].as_u64().unwrap() - 1;
    for line in &lines {
        assert_eq!(line["seq"], before + 1);
        before += 1;
    }
    assert_eq!(before, n + 1);
    let mut reader = Session::guest(port, "reader");
    reader.subscribe("a", Some(1));
    let gap = reader.frame().unwrap();
    let first = lines[0]["seq"].as_u64().unwrap();
    assert_eq!(gap, json!({ "type": "gap", "from": 1, "to": first - 1 }));
    for seq in first..=n + 1 {
        assert_eq!(reader.frame().unwrap()["seq"], seq);
    }
    broker.stop();
    // Also if the client leaves before the next check.
    fs::remove_file(broker.state.bus_log()).unwrap();
    let port = broker.start();
    assert!(Session::guest(port, "web").publish("a", &json!("again")) > n + 1);
}

#[test]
fn a_log_that_can_not_be_written_is_told_and_comes_back() {
    let mut broker = Fixture::new("no-log");
    let dir = broker.state.bus_log().parent().unwrap().to_path_buf();
    castra::core::host::ensure_private_dir(dir.parent().unwrap()).unwrap();
    fs::write(&dir, "a file where the directory should be").unwrap();
    let port = broker.start();
    let mut client = Session::guest(port, "web");
    client.subscribe("*", Some(1));
    client.send(&json!({ "type": "publish", "payload": 1, "id": "x" }));
    assert_eq!(
        client.ack(),
        json!({ "type": "ack", "ack": "publish", "status": "error", "id": "x", "reason": "storage-error" })
    );
    assert_eq!(broker.hello("other"), "ok\n", "handshakes go on");
    client.lives();
    fs::remove_file(&dir).unwrap();
    until("publishes to be taken", || {
        client.send(&json!({ "type": "publish", "payload": 2 }));
        // Its own message comes to it as well, before the ack.
        let frame = client.frame().unwrap();
        frame["payload"] == 2
    });
    assert_eq!(client.ack()["seq"], 1);
    assert!(broker.lines("publishes are refused") >= 1);
    assert!(
        events(&broker, "broker.backpressure")
            .iter()
            .any(|event| event["reason"] == "storage-error")
    );
}

#[test]
fn who_talks_while_the_broker_stops_is_told() {
    let mut broker = Fixture::new("stop");
    let port = broker.start();
    let mut sessions: Vec<Session> = (0..20)
        .map(|n| Session::guest(port, &format!("vm-{n}")))
        .collect();
    for session in &mut sessions {
        session.subscribe("*", None);
        session.send(&json!({ "type": "publish", "payload": 1 }));
    }
    // Each is answered before it is told to go, or the broker never read it.
    let stopper = thread::spawn(move || {
        broker.stop();
        broker
    });
    for session in &mut sessions {
        let mut last = Value::Null;
        while let Some(frame) = session.frame() {
            assert_ne!(last["type"], "close", "nothing follows a close: {frame}");
            last = frame;
        }
        assert_eq!(last, json!({ "type": "close", "reason": "shutting-down" }));
    }
    let broker = stopper.join().unwrap();
    assert_eq!(broker.lines("phase=closed reason=shutting-down"), 20);
}
