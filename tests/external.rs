//! VMs that a user starts without castra, beside `castra up --broker-only`: accepted without the token of a
//! launch that has ended, reachable by their handshake, and the same in status and events.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use support::project::FAKE_QEMU;
use support::{AMPLE, Castra, eventually, objects_in, vm_of};

fn hello(castra: &Castra, words: &str) -> String {
    let port = castra.broker_port();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(AMPLE)).unwrap();
    stream
        .write_all(format!("hello vm:{words}\n").as_bytes())
        .unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    said.lines().nth(1).unwrap_or_default().to_owned()
}

/// What `broker.freshness` has told of a VM, in order.
fn freshness(castra: &Castra, vm: &str) -> Vec<bool> {
    objects_in(&castra.state("logs/events-broker.jsonl"))
        .into_iter()
        .filter(|event| event["type"] == "broker.freshness" && event["vm"] == vm)
        .map(|event| event["reachable"].as_bool().unwrap())
        .collect()
}

#[test]
fn after_up_and_down_a_broker_alone_lets_them_in() {
    let castra = Castra::new("external");
    castra.write(
        "castra.toml",
        "[project]\nname = \"demo\"\nstate_dir = \"state\"\n[broker]\nport = 0\n[[vms]]\nname = \"web\"\n[[vms]]\nname = \"db\"\n",
    );
    castra.run(&["up", "--broker-only"]).exits(0);
    castra.run(&["down"]).exits(0);
    // As a launch of castra's leaves it, which has ended since.
    let launched = json!({"guests": [
        {"name": "web", "launch_id": "l-1", "launched_boottime_ms": 1, "boot_id": castra::core::host::boot_id(),
         "token_sha256": "ab".repeat(32)},
        {"name": "db", "launch_id": null, "launched_boottime_ms": null, "boot_id": null, "token_sha256": null}]});
    fs::write(castra.state("guests.json"), launched.to_string()).unwrap();

    castra.run(&["up", "--broker-only"]).exits(0);
    assert_eq!(castra.vm("web")["state"], "stopped");
    assert_eq!(hello(&castra, "web"), "ok", "the old token declines nobody");
    let seen = castra.status();
    let web = vm_of(&seen, "web");
    assert_eq!(
        (
            &web["state"],
            &web["reachable"],
            &web["broker"],
            &web["pid"],
            &web["ended"]
        ),
        (
            &json!("external"),
            &json!(true),
            &json!("reachable"),
            &Value::Null,
            &Value::Null
        )
    );
    assert_eq!(web["last_acked_seq"], Value::Null);
    assert_eq!(seen["reachable"], true);
    assert_eq!(vm_of(&seen, "db")["state"], "stopped");
    assert_eq!(freshness(&castra, "web"), [true]);
    // A second `up --broker-only` costs no connected guest its session.
    castra.run(&["up", "--broker-only"]).exits(0);
    assert_eq!(castra.vm("web")["state"], "external");

    castra.run(&["down"]).exits(0);
    assert_eq!(freshness(&castra, "web"), [true, false], "the last down tells it");
    let seen = castra.status();
    assert_eq!(
        (&vm_of(&seen, "web")["state"], &seen["reachable"]),
        (&json!("stopped"), &json!(false))
    );
    // The next broker believes what the last one heard, and says so.
    castra.run(&["up", "--broker-only"]).exits(0);
    let told = eventually("the VM in the window again", || {
        let told = freshness(&castra, "web");
        (told.len() > 2).then_some(told)
    });
    assert_eq!(told, [true, false, true]);
    assert_eq!(castra.vm("web")["reachable"], true);
    castra.run(&["down"]).exits(0);
}

#[test]
fn beside_vms_of_castras_nobody_is_another_by_saying_its_name() {
    let castra = Castra::new("external-beside");
    castra.write("vmlinuz", "not really a kernel");
    let vm = |name: &str| format!("[[vms]]\nname = \"{name}\"\nkernel = \"vmlinuz\"\n");
    let text = format!(
        "[project]\nname = \"demo\"\nstate_dir = \"state\"\n[qemu]\nbinary = \"{FAKE_QEMU}\"\naccel = \"tcg\"\n\
         [bootstrap]\nmode = \"skip\"\n[lifecycle]\ngraceful_shutdown_wait_secs = 1\n[broker]\nport = 0\n{}{}",
        vm("web"),
        vm("db")
    );
    castra.write("castra.toml", &text);
    castra.run(&["up", "web"]).exits(0);
    let db = |castra: &Castra| {
        let db = castra.vm("db");
        (db["state"].clone(), db["reachable"].clone())
    };
    hello(&castra, "db");
    assert_eq!(db(&castra), (json!("stopped"), json!(false)));
    assert!(freshness(&castra, "db").is_empty());
    // With --broker-only the user says that he starts VMs without castra.
    castra.run(&["up", "--broker-only"]).exits(0);
    hello(&castra, "db");
    assert_eq!(db(&castra), (json!("external"), json!(true)));
    castra.run(&["up", "web"]).exits(0);
    assert_eq!(db(&castra), (json!("external"), json!(true)), "that stays");
    castra.run(&["down"]).exits(0);
}
