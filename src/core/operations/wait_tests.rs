//! What one look means for whoever waits.

use serde_json::{Value, json};

use super::*;

/// A VM that runs, was heard and is bootstrapped, with these fields otherwise.
fn vm(change: Value) -> VmStatus {
    let mut vm = json!({
        "name": "web-0", "role": "web", "state": "running", "pid": 7, "cpus": 1, "memory_bytes": 1, "uptime_ms": 1,
        "broker": "reachable", "reachable": true, "last_handshake_age_ms": 5, "capabilities": [],
        "bus_session": false, "bus_subscribed": false, "last_publish_age_ms": null, "last_heartbeat_age_ms": null,
        "guest_metrics": null, "forwards": [], "ssh": null,
        "bootstrap": {"status": "success", "noop": false, "duration_ms": 1}, "ended": null
    });
    for (key, value) in change.as_object().unwrap() {
        vm[key] = value.clone();
    }
    serde_json::from_value(vm).unwrap()
}

fn paused(reason: &str) -> Value {
    json!({
        "state": "paused", "reachable": false,
        "paused": {"reason": reason, "at": null, "detail": null, "remediation": ""}
    })
}

#[test]
fn each_state_means_met_not_yet_or_never() {
    let bootstrap = |status: &str| json!({"bootstrap": {"status": status, "noop": false, "duration_ms": 1}});
    let unheard = json!({"reachable": false, "broker": "waiting", "last_handshake_age_ms": null});
    let offline = json!({"reachable": false, "broker": "offline"});
    let stopped = json!({"state": "stopped", "pid": null, "reachable": false});
    let crashed = json!({
        "state": "crashed", "pid": null, "reachable": false,
        "ended": {"reason": "host-signal", "at": null, "last_words": null}
    });
    let starting = json!({"state": "starting", "reachable": false, "bootstrap": null});
    // Reachable, bootstrapped, stopped; each: + met, . not yet, ! never.
    for (change, ran, expected) in [
        (json!({}), true, "+ + ."),
        (unheard, true, ". + ."),
        (offline, true, ". + ."),
        (bootstrap("running"), true, "+ . ."),
        (bootstrap("failed"), true, "+ ! ."),
        (bootstrap("skipped"), true, "+ + ."),
        (json!({"bootstrap": null}), true, "+ . ."),
        (stopped.clone(), false, ". . +"),
        (stopped, true, "! ! +"),
        (crashed.clone(), false, "! ! +"),
        (crashed, true, "! ! +"),
        (starting, false, ". . ."),
        (json!({"state": "stopping", "reachable": false}), true, ". . ."),
        (paused("io-error"), true, ". . ."),
        (paused("internal-error"), true, "! ! ."),
        (paused("guest-panicked"), true, "! ! ."),
    ] {
        let found = WaitFor::ALL.map(|wait_for| match judge(&vm(change.clone()), wait_for, ran) {
            VmProgress::Met => "+",
            VmProgress::NotYet(_) => ".",
            VmProgress::Never(_) => "!",
        });
        assert_eq!(found.join(" "), expected, "{change} {ran}");
    }
    let VmProgress::Never(why) = judge(
        &vm(json!({"state": "crashed", "ended": {"reason": "host-signal", "at": null, "last_words": null}})),
        WaitFor::Reachable,
        true,
    ) else {
        panic!()
    };
    assert!(why.contains("host-signal"), "{why}");
}

#[test]
fn every_word_is_its_own() {
    for wait_for in WaitFor::ALL {
        let json = serde_json::to_value(wait_for).unwrap();
        assert_eq!(json, wait_for.as_str());
    }
}
