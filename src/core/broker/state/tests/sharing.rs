//! What subscriptions can ask for beside a topic, what publishes can, and who makes room for whom,
//! one by one; whatever they do together is the simulator's.

use super::super::*;
use super::*;

fn with_terms(topic: &str, terms: &str) -> String {
    format!("{{\"type\":\"subscribe\",\"topic\":\"{topic}\",{terms}}}")
}

/// A script with room for many.
fn crowd() -> Script {
    Script::on_bus(Rules {
        max_connections: 50,
        max_host_connections: 50,
        ..rules()
    })
}

#[test]
fn each_message_goes_to_one_of_a_group() {
    let mut script = crowd();
    script.run(0, table(&["a", "b"], None));
    for (conn, vm) in [(1, "a"), (2, "b"), (3, "host"), (4, "host"), (5, "a")] {
        script.session(0, conn, vm);
    }
    let join = with_terms("jobs/*", "\"group\":\"w\"");
    for conn in 1..=4 {
        let told = script.say(1, conn, &[&join]);
        assert!(told[0].contains("<subscribe ok"), "{told:?}");
    }
    script.say(1, 5, &[&subscribe("jobs/*")]);
    let job = publish("jobs/1");
    let told = |script: &mut Script| -> Vec<String> {
        let all = script.say(2, 5, &[&job]);
        let to = |word: String| word.split_once("<jobs/1").map(|(conn, _)| conn.to_owned());
        all.into_iter().filter_map(to).collect()
    };
    // One of the guests' group, one of the host's, and who is subscribed for himself.
    assert_eq!(told(&mut script), ["1", "3", "5"]);
    assert_eq!(told(&mut script), ["2", "4", "5"]);
    // Several in one run are shared out one by one.
    let told_both = script.say(2, 5, &[&job, &job]);
    let to = |conn: &str| told_both.iter().filter(|word| word.starts_with(conn)).count();
    assert_eq!(
        (to("1<"), to("2<"), to("3<"), to("4<")),
        (1, 1, 1, 1),
        "{told_both:?}"
    );
    script.run(3, closed(1));
    assert_eq!(told(&mut script), ["2", "3", "5"]);
    script.run(3, closed(2));
    assert_eq!(told(&mut script), ["4", "5"], "a group without members is none");
}

#[test]
fn a_group_gets_what_comes_and_nothing_that_is_not_its_members() {
    let mut script = crowd();
    script.run(0, table(&["a", "b"], None));
    script.session(0, 1, "a");
    script.session(0, 2, "b");
    let join = with_terms("vm:*", "\"group\":\"w\"");
    script.say(1, 1, &[&join]);
    script.say(1, 2, &[&join]);
    for _ in 0..3 {
        let told = script.say(2, 1, &[&publish("vm:b")]);
        assert!(told[1].starts_with("2<vm:b "), "{told:?}");
    }
    for (terms, expected) in [
        ("\"group\":\"w\",\"from\":1", "1<subscribe malformed"),
        ("\"group\":\"w\",\"last\":true", "1<subscribe malformed"),
        ("\"group\":\"no name\"", "1<subscribe malformed"),
        ("\"group\":7", "1<subscribe malformed"),
        ("\"last\":1", "1<subscribe malformed"),
        // Its thread would have to send, while it takes part in the group.
        ("\"from\":1", "1<subscribe forbidden"),
    ] {
        let told = script.say(3, 1, &[&with_terms("x", terms)]);
        assert_eq!(told[0], expected, "{terms}");
    }
    // The same pattern again, for itself: it has left the group.
    script.say(4, 2, &[&subscribe("vm:*")]);
    assert!(script.state.index.groups.mentions(ConnId(1)));
    assert!(!script.state.index.groups.mentions(ConnId(2)));
}

#[test]
fn patterns_that_cost_every_message_a_look_are_few() {
    let mut script = Script::on_bus(Rules {
        bus: BusRules {
            subscriptions_per_session: 64,
            ..rules().bus
        },
        ..rules()
    });
    script.session(0, 1, "a");
    for number in 0..16 {
        let told = script.say(1, 1, &[&subscribe(&format!("s/*/{number}"))]);
        assert_eq!(told, ["1<subscribe ok 0"]);
    }
    assert_eq!(
        script.say(1, 1, &[&subscribe("s/*/16")]),
        ["1<subscribe subscription-limit"]
    );
    assert_eq!(script.say(1, 1, &[&subscribe("s/16")]), ["1<subscribe ok 0"]);
    let told = script.say(2, 1, &[&publish("s/x/3"), &publish("s/x/y/3"), &publish("s//3")]);
    assert_eq!(
        told,
        ["1<s/x/3 1", "1<publish ok 1", "1<publish ok 2", "1<publish ok 3"]
    );
}

#[test]
fn a_star_in_the_middle_shows_nothing_of_another_vm() {
    let mut script = crowd();
    script.run(0, table(&["a", "b"], None));
    script.session(0, 1, "a");
    script.session(0, 2, "b");
    let all = ["castra/*/b", "*/session/b", "vm:b/*/x"].map(subscribe);
    let bodies: Vec<&str> = all.iter().map(String::as_str).collect();
    assert_eq!(script.say(1, 1, &bodies).len(), 3);
    script.say(1, 2, &[&subscribe("castra/*/b")]);
    script.run(2, closed(2));
    let told = script.commit(2);
    assert!(told.iter().all(|word| !word.starts_with("1<")), "{told:?}");
    script.session(3, 3, "b");
    let told = script.say(3, 3, &[&publish("vm:b/y/x"), &subscribe("vm:a/reply/1")]);
    let told: Vec<&str> = told
        .iter()
        .map(String::as_str)
        .filter(|word| word.contains("<subscribe") || word.starts_with("1<"))
        .collect();
    assert_eq!(told, ["3<subscribe forbidden"]);
}

#[test]
fn the_last_message_is_asked_of_the_sessions_own_thread() {
    let mut script = crowd();
    script.session(0, 1, "a");
    script.say(1, 1, &[&publish("t")]);
    let ask = with_terms("t", "\"last\":true");
    assert_eq!(script.say(2, 1, &[&ask]), ["1<subscribe ok 1", "1 replay upto 1"]);
    let plan = |script: &Script| script.state.session(ConnId(1)).unwrap().plan(9).subscriptions;
    let wanted = plan(&script);
    assert_eq!((wanted[0].last, wanted[0].first), (Some(1), 2));
    let effects = script.run(
        3,
        Input::ReplayDone {
            conn: ConnId(1),
            next: 2,
        },
    );
    assert_eq!(effects.iter().flat_map(brief).collect::<Vec<_>>(), ["1 attached"]);
    assert_eq!(plan(&script)[0].last, None, "it is told once");
}

#[test]
fn where_answers_go_is_the_askers_own() {
    let mut script = crowd();
    script.run(0, table(&["web", "db"], None));
    script.session(0, 1, "web");
    script.session(0, 2, "host");
    script.say(0, 2, &[&subscribe("q")]);
    let ask =
        |reply: &str| format!("{{\"type\":\"publish\",\"topic\":\"q\",\"payload\":1,\"reply\":\"{reply}\"}}");
    for (conn, reply, expected) in [
        (1, "vm:web/reply/1", "ok"),
        (1, "vm:WEB", "ok"),
        (1, "vm:db", "forbidden"),
        (1, "vm:host/x", "forbidden"),
        (1, "ci/deploy", "forbidden"),
        (1, "castra/session/web", "forbidden"),
        (1, "vm:-", "bad-topic"),
        (1, "no topic", "malformed"),
        (1, "", "malformed"),
        (2, "vm:host/reply/1", "ok"),
        (2, "ci/answers", "ok"),
        (2, "castra/x", "forbidden"),
    ] {
        let told = script.say(1, conn, &[&ask(reply)]);
        let answer = told.iter().find(|word| word.contains("<publish")).unwrap();
        assert!(
            answer.starts_with(&format!("{conn}<publish {expected}")),
            "{reply}: {told:?}"
        );
    }
    let effects = script.run(2, frames(1, &[&ask("vm:web/reply/2")]));
    assert!(effects.is_empty());
    let effects = script.run(2, Input::Commit);
    let line = effects.iter().find_map(|effect| match effect {
        Effect::Append(lines) => Some(String::from_utf8(lines.to_vec()).unwrap()),
        _ => None,
    });
    assert!(
        line.unwrap()
            .ends_with(",\"vm\":\"web\",\"topic\":\"q\",\"reply\":\"vm:web/reply/2\",\"payload\":1}\n")
    );
}

/// The frames that one session is sent for this, as JSON.
fn answers(script: &mut Script, ms: u64, conn: u64, bodies: &[&str]) -> Vec<serde_json::Value> {
    script.run(ms, frames(conn, bodies));
    let mut bytes = Vec::new();
    while script.state.uncommitted() {
        for effect in script.run(ms, Input::Commit) {
            if let Effect::Send { parts, .. } = effect {
                bytes.extend(parts.iter().flat_map(|part| part.bytes().to_vec()));
            }
        }
    }
    frames_in(&bytes)
        .iter()
        .map(|frame| serde_json::from_str(frame).unwrap())
        .collect()
}

#[test]
fn a_message_to_a_vm_that_is_none_is_kept_with_a_warning() {
    let mut script = crowd();
    script.session(0, 1, "web");
    let warned = |script: &mut Script, topic: &str| {
        let told = answers(script, 1, 1, &[&publish(topic)]);
        assert_eq!(told[0]["status"], "ok");
        told[0]["warning"].as_str().map(str::to_owned)
    };
    assert_eq!(
        warned(&mut script, "vm:nobody"),
        None,
        "without a project nobody knows"
    );
    script.run(0, table(&["web"], None));
    assert_eq!(warned(&mut script, "vm:nobody").as_deref(), Some("unknown-vm"));
    assert_eq!(warned(&mut script, "vm:nobody/x").as_deref(), Some("unknown-vm"));
    for topic in ["vm:Web", "vm:web/x", "vm:host/reply/1", "nobody"] {
        assert_eq!(warned(&mut script, topic), None, "{topic}");
    }
}

#[test]
fn what_is_malformed_is_told_where() {
    let mut script = crowd();
    script.session(0, 1, "web");
    let nested = |kind: &str, levels: usize| {
        let body = format!("{}1{}", "[".repeat(levels), "]".repeat(levels));
        format!("{{\"type\":\"{kind}\",\"payload\":{body}}}")
    };
    for (body, expected) in [
        (
            "{\"type\":\"publish\",\"payload\":{a:1}}".to_owned(),
            "key must be a string at line 1 column 30",
        ),
        ("[1]".into(), "it isn't a JSON object"),
        ("{\"type\":\"publish\"}".into(), "it has no `payload`"),
        (nested("publish", 121), "`payload` is nested more than 120 deep"),
        (nested("heartbeat", 65), "`payload` is nested more than 64 deep"),
        (
            "{\"type\":\"subscribe\",\"topic\":\"a\",\"from\":-1}".into(),
            "`from` isn't a number",
        ),
    ] {
        let told = answers(&mut script, 1, 1, &[&body]);
        assert_eq!(told[0]["reason"], "malformed", "{told:?}");
        assert_eq!(told[0]["detail"], expected, "{body}");
    }
    let told = answers(
        &mut script,
        1,
        1,
        &[&nested("publish", 120), &nested("heartbeat", 64)],
    );
    assert!(told.iter().all(|ack| ack["status"] == "ok"), "{told:?}");
    script.run(2000, Input::Tick);
    let record = serde_json::to_string(&script.on_disk["web"]).unwrap();
    assert!(
        serde_json::from_str::<HandshakeRecord>(&record).is_ok(),
        "{record}"
    );
}

#[test]
fn squatted_sessions_make_room() {
    let mut script = crowd();
    let come = |script: &mut Script, ms: u64, conn: u64| -> (String, Vec<u64>) {
        script.run(ms, opened(conn));
        let effects = script.run(ms, hello(conn, "web capabilities=bus-v1"));
        let line = effects.iter().find_map(|effect| match effect {
            Effect::Reply { line, .. } | Effect::Grant { line, .. } => Some(line.trim_end().to_owned()),
            _ => None,
        });
        let dropped = effects.iter().filter_map(|effect| match effect {
            Effect::Drop { conn } => Some(conn.0),
            _ => None,
        });
        (line.unwrap(), dropped.collect())
    };
    let beat = "{\"type\":\"heartbeat\"}";
    script.session(0, 1, "web");
    script.session(0, 2, "web");
    assert_eq!(come(&mut script, 999, 3).0, "declined reason=session-limit");
    // Both have said nothing for a second: the older one goes.
    let (line, dropped) = come(&mut script, 1000, 4);
    assert!(line.starts_with("ok session="), "{line}");
    assert_eq!(dropped, [1]);
    script.say(1000, 4, &[beat]);
    script.say(1000, 2, &[beat]);
    assert_eq!(
        come(&mut script, 5000, 5).0,
        "declined reason=session-limit",
        "both speak"
    );
    script.say(20_000, 4, &[beat]);
    let (line, dropped) = come(&mut script, 31_000, 6);
    assert!(line.starts_with("ok session="), "{line}");
    assert_eq!(dropped, [2], "it has left out two heartbeats");
}

#[test]
fn who_shows_the_token_takes_the_place_of_who_does_not() {
    let mut script = Script::on_bus(Rules {
        auth: AuthMode::Open,
        max_connections: 50,
        ..rules()
    });
    let hash = |token: &str| {
        use sha2::{Digest, Sha256};
        crate::core::host::hex(&Sha256::digest(token))
    };
    let guest = GuestRecord {
        closed: false,
        name: name("web"),
        second_name: None,
        launch_id: None,
        launched_boottime_ms: None,
        boot_id: None,
        token_sha256: Some(hash("secret")),
    };
    let record = GuestsRecord { guests: vec![guest] };
    let listed = GuestTable::from_record(&record, &"boot".into()).unwrap();
    script.run(0, Input::Guests(Some(listed)));
    let beat = "{\"type\":\"heartbeat\"}";
    for conn in [1, 2] {
        script.session(0, conn, "web");
        script.say(0, conn, &[beat]);
    }
    script.session(1, 3, "web token=secret");
    script.session(1, 4, "web token=secret");
    assert_eq!(script.state.sessions_of("web"), 2);
    let told = script.hears(50_000, 5, "web capabilities=bus-v1");
    assert_eq!(told, ["declined reason=session-limit"], "nor back");
}

#[test]
fn a_launch_that_is_over_proves_nothing() {
    let mut script = crowd();
    script.run(0, table(&["web"], Some(0)));
    script.check(1, opened(1), "");
    script.run(1, hello(1, "web"));
    script.check(10, Input::VmGone { vm: name("web") }, "fresh web false 9");
    script.run(20, opened(2));
    let effects = script.run(20, hello(2, "web"));
    assert!(
        !effects
            .iter()
            .any(|effect| matches!(effect, Effect::Emit(Event::BrokerFreshness { .. })))
    );
    // `up --broker-only` forgets it: from then on it is whoever says so.
    script.run(30, table(&["web"], Some(30)));
    script.run(31, opened(3));
    let effects = script.run(31, hello(3, "web"));
    assert!(effects.iter().any(|effect| matches!(
        effect,
        Effect::Emit(Event::BrokerFreshness { reachable: true, .. })
    )));
    script.check(40, Input::Finish, "record web 31; fresh web false 9");
}

#[test]
fn a_vm_that_castra_has_not_launched_beside_its_own_is_nobody() {
    let mut script = crowd();
    let listed = |closed: bool| {
        let guest = GuestRecord {
            name: name("db"),
            second_name: None,
            launch_id: None,
            launched_boottime_ms: None,
            boot_id: None,
            token_sha256: None,
            closed,
        };
        let record = GuestsRecord { guests: vec![guest] };
        Input::Guests(Some(GuestTable::from_record(&record, &"boot".into()).unwrap()))
    };
    let freshness = |effects: &[Effect]| -> Vec<bool> {
        let told = effects.iter().filter_map(|effect| match effect {
            Effect::Emit(Event::BrokerFreshness { reachable, .. }) => Some(*reachable),
            _ => None,
        });
        told.collect()
    };
    script.run(0, listed(true));
    script.run(1, opened(1));
    assert!(freshness(&script.run(1, hello(1, "db"))).is_empty());
    // `up --broker-only`.
    script.run(10, listed(false));
    script.run(11, opened(2));
    assert_eq!(freshness(&script.run(11, hello(2, "db"))), [true]);
    assert_eq!(freshness(&script.run(20, listed(true))), [false]);
}
