//! What subscriptions can ask for beside a topic, over real sockets: last values, groups, answers,
//! `*` in the middle; whom a VM's sessions make room for; and logs that somebody has spoilt.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::fs;

use serde_json::{Value, json};

use castra::core::lines::journal::Rotation;
use castra::core::root::handshake_record::RecordRead;
use support::broker::Fixture;
use support::session::Session;
use support::{eventually, until};

fn ask(session: &mut Session, topic: &str, terms: &Value) -> Value {
    let mut frame = json!({ "type": "subscribe", "topic": topic });
    for (key, value) in terms.as_object().unwrap() {
        frame[key] = value.clone();
    }
    session.send(&frame);
    session.ack()
}

/// The next so many deliveries: topic and payload.
fn deliveries(session: &mut Session, count: usize) -> Vec<(String, Value)> {
    let mut told = Vec::new();
    while told.len() < count {
        let frame = session.frame().unwrap();
        if frame["type"] == "publish" {
            told.push((
                frame["topic"].as_str().unwrap().to_owned(),
                frame["payload"].clone(),
            ));
        }
    }
    told
}

#[test]
fn last_values_outlive_the_broker_and_rotation_of_others_files() {
    let mut broker = Fixture::new("last");
    broker.bus.rotation = Rotation {
        max_bytes: 2000,
        keep: 50,
    };
    broker.guests(&[("web", None), ("db", None)]);
    let port = broker.start();
    let mut web = Session::guest(port, "web");
    for (topic, payload) in [("s/a/state", 1), ("s/b/state", 2), ("s/a/state", 3), ("vm:db", 4)] {
        web.publish(topic, &json!(payload));
    }
    for number in 0..100 {
        web.publish("noise", &json!({ "n": number, "x": "y".repeat(50) }));
    }
    broker.stop();
    let port = broker.start();
    let mut reader = Session::guest(port, "web");
    let ack = ask(&mut reader, "s/*/state", &json!({"last": true}));
    assert_eq!(ack["status"], "ok");
    assert!(ack["seq"].as_u64() >= Some(104), "{ack}");
    assert_eq!(
        deliveries(&mut reader, 2),
        [
            ("s/b/state".to_owned(), json!(2)),
            ("s/a/state".to_owned(), json!(3))
        ]
    );
    // What comes now follows, once.
    Session::guest(port, "db").publish("s/a/state", &json!(5));
    assert_eq!(deliveries(&mut reader, 1), [("s/a/state".to_owned(), json!(5))]);
    // There is no last value either of topics that only another VM may read.
    ask(&mut reader, "vm:*", &json!({"last": true}));
    reader.lives();
    let mut db = Session::guest(port, "db");
    ask(&mut db, "vm:db", &json!({"last": true}));
    assert_eq!(deliveries(&mut db, 1), [("vm:db".to_owned(), json!(4))]);
}

#[test]
fn workers_share_what_comes_and_the_hosts_are_apart() {
    let mut broker = Fixture::new("group");
    let port = broker.start();
    let mut workers: Vec<Session> = ["a", "b", "c"].map(|vm| Session::guest(port, vm)).into();
    let mut host = Session::host(&broker.state.broker_sock());
    for worker in workers.iter_mut().chain([&mut host]) {
        let ack = ask(worker, "jobs/*", &json!({"group": "w"}));
        assert_eq!(ack["status"], "ok");
    }
    let mut boss = Session::guest(port, "boss");
    for number in 0..30 {
        boss.publish("jobs/x", &json!(number));
    }
    let all: Vec<Vec<(String, Value)>> = workers.iter_mut().map(|worker| deliveries(worker, 10)).collect();
    let seen: BTreeSet<u64> = all
        .iter()
        .flatten()
        .map(|(_, payload)| payload.as_u64().unwrap())
        .collect();
    assert_eq!(seen, (0..30).collect(), "each to one of them");
    assert_eq!(
        deliveries(&mut host, 30).len(),
        30,
        "alone in the host's group, it gets all"
    );
    // A member that left gets nothing, and the others continue.
    drop(workers.remove(0));
    until("the end of a's session", || {
        broker.lines("session of vm:a session=s-1") >= 1 && broker.lines("phase=closed") >= 1
    });
    for number in 30..40 {
        boss.publish("jobs/x", &json!(number));
    }
    for worker in &mut workers {
        assert_eq!(deliveries(worker, 5).len(), 5);
    }
}

#[test]
fn who_is_asked_answers_the_asker_alone() {
    let mut broker = Fixture::new("request");
    broker.guests(&[("web", None), ("db", None)]);
    let port = broker.start();
    let mut asker = Session::guest(port, "web");
    let mut spy = Session::guest(port, "db");
    spy.subscribe("*", None);
    let mut server = Session::host(&broker.state.broker_sock());
    server.subscribe("time/now", None);
    asker.subscribe("vm:web/reply/17", None);
    asker.send(&json!({"type": "publish", "topic": "time/now", "payload": null, "reply": "vm:web/reply/17"}));
    let request = server.frame().unwrap();
    assert_eq!(request["reply"], "vm:web/reply/17");
    assert_eq!(request["vm"], "web");
    server.publish(request["reply"].as_str().unwrap(), &json!("12:00"));
    assert_eq!(
        deliveries(&mut asker, 1),
        [("vm:web/reply/17".to_owned(), json!("12:00"))]
    );
    // A subscriber to everything saw the question, and nothing of the answer.
    server.publish("time/end", &json!(0));
    let seen: Vec<String> = deliveries(&mut spy, 2)
        .into_iter()
        .map(|(topic, _)| topic)
        .collect();
    assert_eq!(seen, ["time/now", "time/end"]);
    let text = fs::read_to_string(broker.state.bus_log()).unwrap();
    assert!(text.contains("\"topic\":\"time/now\",\"reply\":\"vm:web/reply/17\",\"payload\":null}"));
}

#[test]
fn eight_squatters_keep_nobody_out() {
    let mut broker = Fixture::new("squat");
    let port = broker.start();
    let squatters: Vec<Session> = (0..8).map(|_| Session::guest(port, "web")).collect();
    // As the guest's own scripts do it: again after a short while.
    let mut web = eventually("a session of the VM itself", || {
        Session::try_guest(port, "web").ok()
    });
    assert!(web.publish("x", &json!(1)) > 0);
    drop(squatters);
    assert!(broker.log().contains("reason=superseded"));
}

#[test]
fn what_is_nested_too_deep_spoils_no_record() {
    let mut broker = Fixture::new("deep");
    let port = broker.start();
    let mut web = Session::guest(port, "web");
    for (kind, levels, expected) in [
        ("heartbeat", 64, "ok"),
        ("heartbeat", 65, "error"),
        ("heartbeat", 127, "error"),
        ("publish", 120, "ok"),
        ("publish", 121, "error"),
    ] {
        let nested = format!("{}1{}", "[".repeat(levels), "]".repeat(levels));
        web.send_raw(format!("{{\"type\":\"{kind}\",\"payload\":{nested}}}").as_bytes());
        let ack = web.ack();
        assert_eq!(ack["status"], expected, "{kind} {levels}: {ack}");
        if expected == "error" {
            assert_eq!(ack["reason"], "malformed");
            assert!(ack["detail"].as_str().unwrap().contains("nested"), "{ack}");
        }
    }
    eventually("the metrics in the record", || match broker.record("web") {
        RecordRead::Record(record) => record.guest_metrics,
        other => panic!("{other:?}"),
    });
    // Kept messages can be read by any JSON parser.
    let text = fs::read_to_string(broker.state.bus_log()).unwrap();
    assert_eq!(
        text.lines()
            .filter(|line| serde_json::from_str::<Value>(line).is_ok())
            .count(),
        text.lines().count()
    );
}

#[test]
fn spoilt_numbers_lose_no_message_and_give_none_twice() {
    let mut broker = Fixture::new("spoilt");
    let port = broker.start();
    let mut web = Session::guest(port, "web");
    for number in 1..=4 {
        assert_eq!(web.publish("t", &json!(number)), number);
    }
    drop(web);
    broker.stop();
    let path = broker.state.bus_log();
    let line = |seq: u64, payload: u64| {
        format!("{{\"seq\":{seq},\"ts\":1,\"vm\":\"web\",\"topic\":\"t\",\"payload\":{payload}}}\n")
    };
    let text = fs::read_to_string(&path).unwrap();
    fs::write(
        &path,
        line(900, 100) + &text + &line(7, 101) + &line(u64::MAX, 102),
    )
    .unwrap();
    let port = broker.start();
    let mut web = Session::guest(port, "web");
    let next = web.publish("t", &json!(5));
    assert_eq!(next, 901, "behind the highest number there is");
    web.subscribe("t", Some(1));
    let told: Vec<u64> = deliveries(&mut web, 7)
        .into_iter()
        .map(|(_, payload)| payload.as_u64().unwrap())
        .collect();
    assert_eq!(told, [100, 1, 2, 3, 4, 101, 5]);
    assert_eq!(broker.lines("the numbers of its messages don't rise"), 1);
    assert_eq!(Session::guest(port, "web").publish("t", &json!(6)), 902);
}
