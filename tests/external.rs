//! VMs that somebody starts himself, beside `castra up --broker-only`: let in without the token of a
//! launch that has ended, reachable by their handshake, told of alike by status and events.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use support::{Castra, eventually};

const SOON: Duration = Duration::from_secs(30);

fn state(castra: &Castra) -> PathBuf {
    castra.project().join("state")
}

fn hello(castra: &Castra, words: &str) -> String {
    let record: Value =
        serde_json::from_slice(&fs::read(state(castra).join("broker.json")).unwrap()).unwrap();
    let port = u16::try_from(record["port"].as_u64().unwrap()).unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
        .write_all(format!("hello vm:{words}\n").as_bytes())
        .unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    said.lines().nth(1).unwrap_or_default().to_owned()
}

/// What `broker.freshness` has told of a VM, in order.
fn freshness(castra: &Castra, vm: &str) -> Vec<bool> {
    let text = fs::read_to_string(state(castra).join("logs/events-broker.jsonl")).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
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
    fs::write(state(&castra).join("guests.json"), launched.to_string()).unwrap();

    castra.run(&["up", "--broker-only"]).exits(0);
    let status = |castra: &Castra| castra.run(&["status", "--json"]).exits(0).objects().remove(0);
    let vm = |status: &Value, name: &str| {
        let vms = status["vms"].as_array().unwrap();
        vms.iter().find(|vm| vm["name"] == name).unwrap().clone()
    };
    assert_eq!(vm(&status(&castra), "web")["state"], "stopped");
    assert_eq!(hello(&castra, "web"), "ok", "the old token declines nobody");
    let seen = status(&castra);
    let web = vm(&seen, "web");
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
    assert_eq!(vm(&seen, "db")["state"], "stopped");
    assert_eq!(freshness(&castra, "web"), [true]);
    // Asked again, nobody who is there loses his session or his place.
    castra.run(&["up", "--broker-only"]).exits(0);
    assert_eq!(vm(&status(&castra), "web")["state"], "external");

    castra.run(&["down"]).exits(0);
    assert_eq!(freshness(&castra, "web"), [true, false], "the last down tells it");
    let seen = status(&castra);
    assert_eq!(
        (&vm(&seen, "web")["state"], &seen["reachable"]),
        (&json!("stopped"), &json!(false))
    );
    // The next broker believes what the last one heard, and says so.
    castra.run(&["up", "--broker-only"]).exits(0);
    let told = eventually(SOON, "the VM in the window again", || {
        let told = freshness(&castra, "web");
        (told.len() > 2).then_some(told)
    });
    assert_eq!(told, [true, false, true]);
    assert_eq!(vm(&status(&castra), "web")["reachable"], true);
    castra.run(&["down"]).exits(0);
}

#[test]
fn beside_vms_of_castras_nobody_is_another_by_saying_its_name() {
    let castra = Castra::new("external-beside");
    let qemu = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/fake-qemu.py");
    castra.write("vmlinuz", "not really a kernel");
    let vm = |name: &str| format!("[[vms]]\nname = \"{name}\"\nkernel = \"vmlinuz\"\n");
    let text = format!(
        "[project]\nname = \"demo\"\nstate_dir = \"state\"\n[qemu]\nbinary = \"{}\"\naccel = \"tcg\"\n\
         [bootstrap]\nmode = \"skip\"\n[lifecycle]\ngraceful_shutdown_wait_secs = 1\n[broker]\nport = 0\n{}{}",
        qemu.display(),
        vm("web"),
        vm("db")
    );
    castra.write("castra.toml", &text);
    castra.run(&["up", "web"]).exits(0);
    let db = |castra: &Castra| {
        let seen = castra.run(&["status", "--json"]).exits(0).objects().remove(0);
        let vms = seen["vms"].as_array().unwrap().clone();
        let db = vms.into_iter().find(|vm| vm["name"] == "db").unwrap();
        (db["state"].clone(), db["reachable"].clone())
    };
    hello(&castra, "db");
    assert_eq!(db(&castra), (json!("stopped"), json!(false)));
    assert!(freshness(&castra, "db").is_empty());
    // Whoever starts it himself says so.
    castra.run(&["up", "--broker-only"]).exits(0);
    hello(&castra, "db");
    assert_eq!(db(&castra), (json!("external"), json!(true)));
    castra.run(&["up", "web"]).exits(0);
    assert_eq!(db(&castra), (json!("external"), json!(true)), "that stays");
    castra.run(&["down"]).exits(0);
}
