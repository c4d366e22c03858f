//! The rules of the bus one by one (docs/PROTOCOL.md), each by its name; whatever they do together is
//! the simulator's.

#[path = "sharing.rs"]
mod sharing;

use crate::core::broker::frame::Decoder;

use super::*;

/// Frames as one read brings them.
fn frames(conn: u64, bodies: &[&str]) -> Input {
    let mut bytes = Vec::new();
    for body in bodies {
        bytes.extend_from_slice(&u32::try_from(body.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(body.as_bytes());
    }
    Input::Frames {
        conn: ConnId(conn),
        burst: Decoder::new(65_536, &bytes).take_burst().unwrap(),
    }
}

fn publish(topic: &str) -> String {
    format!("{{\"type\":\"publish\",\"topic\":\"{topic}\",\"payload\":1}}")
}

fn subscribe(topic: &str) -> String {
    format!("{{\"type\":\"subscribe\",\"topic\":\"{topic}\"}}")
}

fn log_opened(last: u64) -> Input {
    Input::LogOpened { last }
}

impl Script {
    /// A script whose log is open.
    fn on_bus(rules: Rules) -> Script {
        let mut script = Script::with(rules);
        script.run(0, log_opened(0));
        script
    }

    fn hears(&mut self, ms: u64, conn: u64, words: &str) -> Vec<String> {
        let host = words.starts_with("host");
        self.run(ms, if host { opened_by_host(conn) } else { opened(conn) });
        let effects = self.run(ms, hello(conn, words));
        let line = |effect: &Effect| match effect {
            Effect::Reply { line, .. } | Effect::Grant { line, .. } => Some(line.trim_end().to_owned()),
            _ => None,
        };
        effects.iter().filter_map(line).collect()
    }

    /// A session, and everything that came before it kept.
    fn session(&mut self, ms: u64, conn: u64, vm: &str) {
        let told = self.hears(ms, conn, &format!("{vm} capabilities=bus-v1"));
        assert!(told[0].starts_with("ok session="), "{told:?}");
        self.commit(ms);
    }

    /// Frames and their commit: what each session is sent, without what is always the same.
    fn say(&mut self, ms: u64, conn: u64, bodies: &[&str]) -> Vec<String> {
        self.run(ms, frames(conn, bodies));
        self.commit(ms)
    }

    fn commit(&mut self, ms: u64) -> Vec<String> {
        let mut all = Vec::new();
        while self.state.uncommitted() {
            all.extend(self.run(ms, Input::Commit));
        }
        all.iter().flat_map(brief).collect()
    }
}

/// `1<publish ok 7`, `2<a 7`, `1<subscribe forbidden`: whom, and the word of each frame.
fn brief(effect: &Effect) -> Vec<String> {
    let (conn, bytes) = match effect {
        Effect::Send { conn, parts } => (
            conn.0,
            parts
                .iter()
                .flat_map(|part| part.bytes().to_vec())
                .collect::<Vec<u8>>(),
        ),
        Effect::End { conn, last } => (conn.0, last.clone()),
        Effect::SetDelivery {
            conn,
            delivery: order,
        } => {
            return vec![match order {
                Delivery::Live => format!("{} attached", conn.0),
                Delivery::Replay(plan) => format!("{} replay upto {}", conn.0, plan.upto),
            }];
        }
        Effect::Drop { conn } => return vec![format!("{} dropped", conn.0)],
        _ => return Vec::new(),
    };
    let word = |frame: &String| -> String {
        let value: serde_json::Value = serde_json::from_str(frame).unwrap();
        let text = |key: &str| value[key].as_str().unwrap_or("null").to_owned();
        let seq = value["seq"]
            .as_u64()
            .map(|seq| format!(" {seq}"))
            .unwrap_or_default();
        match text("type").as_str() {
            "publish" => format!("{conn}<{}{seq}", text("topic")),
            "close" => format!("{conn}<close {}", text("reason")),
            _ if text("status") == "ok" => format!("{conn}<{} ok{seq}", text("ack")),
            _ => format!("{conn}<{} {}", text("ack"), text("reason")),
        }
    };
    frames_in(&bytes).iter().map(word).collect()
}

fn logged(effects: &[Effect], needle: &str) -> Vec<String> {
    let lines = effects.iter().filter_map(|effect| match effect {
        Effect::Log(line) if line.contains(needle) => Some(line.split_once("Z ").unwrap().1.to_owned()),
        _ => None,
    });
    lines.collect()
}

#[test]
fn the_highest_version_that_both_speak_is_taken() {
    let mut script = Script::on_bus(Rules {
        bus_versions: &[1, 2],
        max_connections: 50,
        ..rules()
    });
    let cases = [
        ("bus-v1", "ok session=s-1.run heartbeat_secs=15"),
        ("bus-v2", "ok session=s-2.run heartbeat_secs=15"),
        ("bus-v3,bus-v2,bus-v1", "ok session=s-3.run heartbeat_secs=15"),
        ("x-a,bus-v9,bus-v2", "ok session=s-4.run heartbeat_secs=15"),
        (
            "bus-v3",
            "declined reason=unsupported-capability supported=bus-v1,bus-v2",
        ),
        (
            "bus-,bus-v,bus-vx,bus-v01x",
            "declined reason=unsupported-capability supported=bus-v1,bus-v2",
        ),
        ("x-bus-v1,vizier-v1", "ok"),
        ("", "ok"),
    ];
    for (conn, (offered, answer)) in (1..).zip(cases) {
        let words = format!("vm-{conn} capabilities={offered}");
        assert_eq!(script.hears(0, conn, &words), [answer], "{offered}");
    }
    // The same offers to a broker of today.
    let mut script = Script::on_bus(rules());
    assert_eq!(
        script.hears(0, 1, "a capabilities=bus-v2"),
        ["declined reason=unsupported-capability supported=bus-v1"]
    );
    assert_eq!(
        script.hears(0, 2, "a capabilities=bus-v2,bus-v1"),
        ["ok session=s-2.run heartbeat_secs=15"]
    );
}

#[test]
fn a_vm_has_only_so_many_sessions() {
    let mut script = Script::on_bus(Rules {
        max_connections: 50,
        max_host_connections: 50,
        ..rules()
    });
    script.session(0, 1, "web");
    script.session(0, 2, "WEB");
    assert_eq!(
        script.hears(0, 3, "Web capabilities=bus-v1"),
        ["declined reason=session-limit"]
    );
    assert_eq!(
        script.hears(0, 4, "web"),
        ["ok"],
        "who wants no session needs no place"
    );
    script.session(0, 5, "db");
    script.run(1, closed(1));
    script.session(1, 6, "web");
    for conn in 10..20 {
        script.session(1, conn, "host");
    }
}

#[test]
fn a_session_has_only_so_many_subscriptions() {
    let mut script = Script::on_bus(rules());
    script.session(0, 1, "web");
    let all: Vec<String> = ["a", "b*", "c", "a", "d"].map(subscribe).to_vec();
    let bodies: Vec<&str> = all.iter().map(String::as_str).collect();
    let told = script.say(1, 1, &bodies);
    assert_eq!(
        told,
        [
            "1<subscribe ok 0",
            "1<subscribe ok 0",
            "1<subscribe ok 0",
            "1<subscribe ok 0",
            "1<subscribe subscription-limit",
        ]
    );
    let told = script.say(
        2,
        1,
        &[
            "{\"type\":\"unsubscribe\",\"topic\":\"c\"}",
            &subscribe("d"),
            &subscribe("c"),
        ],
    );
    assert_eq!(
        told,
        [
            "1<unsubscribe ok",
            "1<subscribe ok 0",
            "1<subscribe subscription-limit"
        ],
        "a place is free as soon as it is"
    );
}

#[test]
fn a_vm_publishes_only_so_much_a_second() {
    let mut script = Script::on_bus(Rules {
        bus: BusRules {
            publishes_per_sec_per_vm: 2,
            ..rules().bus
        },
        ..rules()
    });
    script.session(0, 1, "web");
    script.session(0, 2, "web");
    script.session(0, 3, "db");
    script.session(0, 4, "host");
    let one = publish("a");
    let three = [one.as_str(); 3];
    assert_eq!(
        script.say(0, 1, &three),
        ["1<publish ok 1", "1<publish ok 2", "1<publish rate-limit"]
    );
    assert_eq!(
        script.say(499, 2, &[&one]),
        ["2<publish rate-limit"],
        "all its sessions share it"
    );
    assert_eq!(script.say(500, 2, &[&one]), ["2<publish ok 3"]);
    assert_eq!(script.say(500, 1, &[&one]), ["1<publish rate-limit"]);
    assert_eq!(
        script.say(500, 3, &three[..2]),
        ["3<publish ok 4", "3<publish ok 5"]
    );
    assert_eq!(script.say(500, 4, &three).len(), 3);
    let told = script.say(90_000, 1, &three);
    assert_eq!(told[2], "1<publish rate-limit", "what isn't used is not saved up");
    // Nobody is kept in mind for ever.
    script.run(30_000, frames(3, &[&one]));
    script.run(170_000, Input::Tick);
    assert!(script.state.allowances.is_empty());
}

#[test]
fn only_frames_prove_life_but_every_one_does() {
    let mut script = Script::on_bus(rules());
    script.session(0, 1, "web");
    script.session(0, 2, "host");
    assert_eq!(
        script.say(30_000, 1, &["{\"type\":\"dance\"}"]),
        ["1<dance unknown-type"]
    );
    let ended = |script: &mut Script, ms: u64| -> Vec<String> {
        let effects = script.run(ms, Input::Tick);
        effects.iter().flat_map(brief).collect()
    };
    assert!(ended(&mut script, 59_999).is_empty());
    assert_eq!(ended(&mut script, 60_000), ["2<close idle"], "the host too");
    assert!(script.state.due().unwrap() <= 90_000);
    assert!(ended(&mut script, 89_999).is_empty());
    assert_eq!(ended(&mut script, 90_000), ["1<close idle"]);
    assert!(script.state.vm_sessions.is_empty());
    assert!(ended(&mut script, 200_000).is_empty());
}

#[test]
fn a_session_belongs_to_one_launch_and_one_project() {
    let mut script = Script::on_bus(rules());
    script.run(0, table(&["web", "db"], Some(0)));
    script.session(10, 1, "web");
    script.session(50, 2, "db");
    script.session(50, 3, "host");
    script.say(60, 1, &[&subscribe("*")]);
    let effects = script.run(70, table(&["web", "db"], Some(40)));
    assert_eq!(effects.iter().flat_map(brief).collect::<Vec<_>>(), ["1 dropped"]);
    assert_eq!(
        logged(&effects, "phase=closed"),
        ["INFO session of vm:web session=s-1.run phase=closed reason=superseded remote=127.0.0.1:40001"]
    );
    assert!(!script.state.index.mentions(ConnId(1)));
    // A VM that leaves the project: its record, too, tells of no session any more.
    assert!(script.on_disk["db"].bus_session);
    let effects = script.run(5000, table(&["web"], Some(40)));
    assert_eq!(effects.iter().flat_map(brief).collect::<Vec<_>>(), ["2 dropped"]);
    assert!(!script.on_disk["db"].bus_session);
    assert!(script.state.session(ConnId(3)).is_some(), "the host stays");
    let effects = script.run(5001, Input::Guests(None));
    assert!(effects.is_empty());
}

#[test]
fn a_stop_tells_every_session() {
    let mut script = Script::on_bus(rules());
    script.session(0, 1, "web");
    script.session(0, 2, "host");
    let effects = script.run(1, Input::Stop);
    let told: BTreeSet<String> = effects.iter().flat_map(brief).collect();
    assert_eq!(
        told.into_iter().collect::<Vec<_>>(),
        ["1<close shutting-down", "2<close shutting-down"]
    );
    assert!(script.state.all_answered());
    assert!(
        script.say(2, 1, &[&publish("a")]).is_empty(),
        "what comes later is nobody's"
    );
}

#[test]
fn the_broker_tells_of_listed_vms_on_the_bus() {
    let mut script = Script::on_bus(Rules {
        max_connections: 50,
        ..rules()
    });
    script.run(0, table(&["Web", "db"], None));
    script.session(0, 1, "host");
    script.session(0, 2, "db");
    script.say(0, 1, &[&subscribe("castra/*")]);
    script.say(0, 2, &[&subscribe("castra/*")]);
    assert!(
        script
            .say(0, 2, &[&subscribe("castra/session/web")])
            .contains(&"2<subscribe forbidden".to_owned())
    );
    script.run(1, opened(3));
    let mut effects = script.run(1, hello(3, "web capabilities=bus-v1,x-a"));
    while script.state.uncommitted() {
        effects.extend(script.run(1, Input::Commit));
    }
    let told: Vec<String> = effects.iter().flat_map(brief).collect();
    assert_eq!(told, ["1<castra/handshake/Web 3", "1<castra/session/Web 4"]);
    let bytes: Vec<u8> = effects
        .iter()
        .find_map(|effect| match effect {
            Effect::Send { parts, .. } => Some(parts.iter().flat_map(|part| part.bytes().to_vec()).collect()),
            _ => None,
        })
        .unwrap();
    let frames: Vec<serde_json::Value> = frames_in(&bytes)
        .iter()
        .map(|frame| serde_json::from_str(frame).unwrap())
        .collect();
    assert_eq!(frames[0]["vm"], "broker");
    assert_eq!(frames[0]["payload"]["vm"], "Web");
    assert_eq!(frames[0]["payload"]["outcome"], "ok");
    assert_eq!(
        frames[0]["payload"]["capabilities"],
        serde_json::json!(["bus-v1", "x-a"])
    );
    assert_eq!(frames[1]["payload"]["phase"], "opened");
    assert_eq!(frames[1]["payload"]["session"], "s-3.run");
    // What isn't in the project is not told to anybody: names could be made up without end.
    script.run(2, opened(4));
    script.run(2, hello(4, "evil"));
    assert!(script.commit(2).is_empty());
    // Its own news reach a VM.
    script.run(3, closed(3));
    assert_eq!(script.commit(3), ["1<castra/session/Web 5"]);
    script.session(4, 5, "db");
    script.run(5, closed(5));
    let told = script.commit(5);
    assert!(told.contains(&"2<castra/session/db 8".to_owned()), "{told:?}");
    let told = script.say(6, 2, &[&publish("castra/session/db")]);
    assert_eq!(told, ["2<publish forbidden"]);
}

#[test]
fn names_in_topics_are_spelled_as_the_project_does() {
    let mut script = Script::on_bus(rules());
    script.run(0, table(&["Web-0", "db"], None));
    script.session(0, 1, "web-0");
    script.session(0, 2, "db");
    let effects = {
        script.run(1, frames(1, &[&subscribe("vm:WEB-0")]));
        script.run(1, Input::Commit)
    };
    let acks: Vec<String> = effects.iter().filter_map(show).collect();
    assert!(
        acks.iter().any(|ack| ack.contains("\"topic\":\"vm:Web-0\"")),
        "{acks:?}"
    );
    let told = script.say(
        2,
        2,
        &[&publish("vm:web-0"), &publish("vm:nobody"), &publish("vm:-")],
    );
    assert_eq!(
        told,
        [
            "1<vm:Web-0 5",
            "2<publish ok 5",
            "2<publish ok 6",
            "2<publish bad-topic"
        ]
    );
    assert_eq!(
        script.say(3, 2, &[&subscribe("vm:web-0")]),
        ["2<subscribe forbidden"]
    );
    let told = script.say(
        4,
        1,
        &[
            "{\"type\":\"unsubscribe\",\"topic\":\"vm:web-0\"}",
            &publish("vm:Web-0"),
        ],
    );
    assert_eq!(told, ["1<unsubscribe ok", "1<publish ok 7"]);
}

#[test]
fn a_message_comes_once_and_answers_come_in_order() {
    let mut script = Script::on_bus(rules());
    script.session(0, 1, "web");
    let told = script.say(
        1,
        1,
        &[
            &publish("a"),
            &subscribe("*"),
            &publish("a"),
            "{\"type\":\"heartbeat\"}",
            &subscribe("a"),
            &publish("a"),
            "{\"type\":\"ack\",\"seq\":1}",
            "{\"type\":\"unsubscribe\",\"topic\":\"*\"}",
            &publish("b"),
        ],
    );
    assert_eq!(
        told,
        [
            "1<publish ok 1",
            "1<subscribe ok 1",
            "1<a 2",
            "1<publish ok 2",
            "1<heartbeat ok",
            "1<subscribe ok 2",
            "1<a 3",
            "1<publish ok 3",
            "1<unsubscribe ok",
            "1<publish ok 4",
        ]
    );
    // From a number that is still to come: attached, and nothing before it.
    let told = script.say(2, 1, &["{\"type\":\"subscribe\",\"topic\":\"b\",\"from\":7}"]);
    assert_eq!(told, ["1<subscribe ok 4", "1 attached"]);
    let told = script.say(3, 1, &[&publish("b"), &publish("b"), &publish("b")]);
    assert_eq!(
        told,
        ["1<b 7", "1<publish ok 5", "1<publish ok 6", "1<publish ok 7"]
    );
    // From nothing at all: everything.
    let told = script.say(
        4,
        1,
        &[
            "{\"type\":\"subscribe\",\"topic\":\"b\",\"from\":0}",
            &publish("b"),
        ],
    );
    assert_eq!(told, ["1<subscribe ok 7", "1<publish ok 8", "1 replay upto 8"]);
    let told: Vec<String> = script
        .run(
            5,
            Input::ReplayDone {
                conn: ConnId(1),
                next: 8,
            },
        )
        .iter()
        .flat_map(brief)
        .collect();
    assert_eq!(told, ["1 replay upto 8"]);
    let told = script.run(
        5,
        Input::ReplayDone {
            conn: ConnId(1),
            next: 9,
        },
    );
    assert_eq!(told.iter().flat_map(brief).collect::<Vec<_>>(), ["1 attached"]);
    let mut empty = Script::on_bus(rules());
    empty.session(0, 1, "web");
    let told = empty.say(1, 1, &["{\"type\":\"subscribe\",\"topic\":\"b\",\"from\":0}"]);
    assert_eq!(
        told,
        ["1<subscribe ok 0", "1 attached"],
        "there is nothing to replay"
    );
}

#[test]
fn a_log_that_fails_takes_no_number_with_it() {
    let mut script = Script::on_bus(rules());
    script.session(0, 1, "web");
    script.say(1, 1, &[&subscribe("*")]);
    assert_eq!(script.say(2, 1, &[&publish("a")]), ["1<a 1", "1<publish ok 1"]);
    script.disk_full = true;
    assert_eq!(
        script.say(3, 1, &[&publish("a"), "{\"type\":\"heartbeat\"}", &publish("b")]),
        [
            "1<publish storage-error",
            "1<heartbeat ok",
            "1<publish storage-error"
        ]
    );
    script.disk_full = false;
    assert_eq!(script.say(4, 1, &[&publish("a")]), ["1<a 2", "1<publish ok 2"]);
    // One that is opened anew while messages wait for their commit gives no number twice.
    script.run(5, frames(1, &[&publish("a")]));
    script.run(5, log_opened(2));
    assert_eq!(
        script.say(5, 1, &[&publish("b")]),
        ["1<a 3", "1<b 4", "1<publish ok 3", "1<publish ok 4"]
    );
    script.run(6, log_opened(1 << 32));
    assert_eq!(
        script.say(7, 1, &[&publish("a")]),
        ["1<a 4294967297", "1<publish ok 4294967297"]
    );
}

#[test]
fn a_closed_log_refuses_at_once() {
    let mut script = Script::new();
    script.session(0, 1, "web");
    assert_eq!(script.say(1, 1, &[&publish("a")]), ["1<publish storage-error"]);
    assert_eq!(script.say(1, 1, &[&subscribe("a")]), ["1<subscribe ok 0"]);
    script.run(2, log_opened(7));
    assert_eq!(script.say(3, 1, &[&publish("a")]), ["1<a 8", "1<publish ok 8"]);
}

#[test]
fn beyond_twenty_a_second_lines_are_merged() {
    let mut script = Script::on_bus(Rules {
        max_connections: 100,
        bus: BusRules {
            sessions_per_vm: 100,
            ..rules().bus
        },
        ..rules()
    });
    script.session(0, 1, "web");
    let bad = ["{}"; 27];
    let effects = script.run(1, frames(1, &bad));
    assert_eq!(logged(&effects, "refused vm:web").len(), 20);
    script.run(1, Input::Commit);
    let effects = script.run(1001, Input::Tick);
    assert_eq!(
        logged(&effects, "refused vm:web"),
        ["WARN refused vm:web session=s-1.run ack=null reason=malformed repeated=7"]
    );
    let mut lines = Vec::new();
    for conn in 2..=40 {
        script.run(3000, opened(conn));
        let effects = script.run(3000, hello(conn, "web capabilities=bus-v1"));
        lines.extend(logged(&effects, "phase=opened"));
    }
    assert_eq!(lines.len(), 20);
    let effects = script.run(4000, Input::Tick);
    assert_eq!(
        logged(&effects, "phase=opened"),
        ["INFO session of vm:web session=s-40.run phase=opened remote=127.0.0.1:40040 repeated=19"]
    );
}

#[test]
fn what_is_too_slow_is_cut_off_and_told() {
    let mut script = Script::on_bus(rules());
    script.session(0, 1, "web");
    script.say(0, 1, &[&subscribe("*")]);
    let full = Input::QueueFull {
        conn: ConnId(1),
        queued_bytes: 5_000_000,
    };
    script.check(
        1,
        full.clone(),
        "log WARN backpressure of vm:web session=s-1.run reason=slow-consumer queued_bytes=5000000; \
         BrokerBackpressure { vm: Some(VmName(\"web\")), session: Some(\"s-1.run\"), reason: \"slow-consumer\", \
         queued_bytes: Some(5000000), repeated: None }; \
         log INFO session of vm:web session=s-1.run phase=closed reason=slow-consumer remote=127.0.0.1:40001; \
         BrokerSession { vm: VmName(\"web\"), session: \"s-1.run\", phase: Closed, reason: Some(\"slow-consumer\"), repeated: None }; \
         drop 1",
    );
    script.check(1, full, "");
    assert!(script.state.index.is_empty());
    script.run(1000, Input::Tick);
    assert!(!script.on_disk["web"].bus_session && !script.on_disk["web"].bus_subscribed);
}

#[test]
fn a_short_visit_takes_no_capability_away() {
    let mut script = Script::new();
    script.run(0, opened(1));
    script.run(1, hello(1, "web capabilities=bus-v1,vizier-v1"));
    script.run(1000, opened(2));
    script.run(1001, hello(2, "web capabilities=bus-v1"));
    assert_eq!(script.on_disk["web"].capabilities, ["bus-v1", "vizier-v1"]);
    script.run(1002, closed(1));
    script.run(1003, closed(2));
    script.run(2000, opened(3));
    script.run(2001, hello(3, "web capabilities=x"));
    assert_eq!(script.on_disk["web"].capabilities, ["x"]);
}
