//! Guests that begin anew under the same QEMU: a reboot is told and counted, a panic and a boot loop end.

use std::fs;

use serde_json::Value;

use crate::support::eventually;
use crate::support::project::{Project, SCRIPT, faking};

/// The guest resets; the file appears with all that it holds.
fn reset(project: &Project, how: &str) {
    project.write_state("vms/web/reset.new", how);
    fs::rename(project.state("vms/web/reset.new"), project.state("vms/web/reset")).unwrap();
}

#[test]
fn a_reboot_is_told_and_a_panic_of_which_qemu_is_not_told_ends_the_guest() {
    let project = Project::new("reboots", &faking("resets", ""));
    project.run(&["up"]).exits(0);
    let vm = project.vm("web");
    assert_eq!((&vm["boots"], &vm["last_reset"]), (&1.into(), &Value::Null));
    let pid = vm["pid"].clone();

    // Linux resets in several ways at once: that is one reboot.
    reset(&project, "");
    let vm = eventually("the reboot", || {
        Some(project.vm("web")).filter(|vm| vm["boots"] == 2)
    });
    assert_eq!((&vm["state"], &vm["pid"]), (&"running".into(), &pid));
    assert!(vm["last_reset"].is_string(), "{vm}");
    let event = eventually("its event", || project.broker_told("rebooted").pop());
    assert_eq!((&event["vm"], &event["boots"]), (&"web".into(), &2.into()));
    // It runs: `up` has nothing to do, and its disk stays.
    project.run(&["up"]).exits(0);
    assert_eq!(project.vm("web")["pid"], pid);

    reset(&project, "panic");
    let vm = eventually("the panic", || {
        Some(project.vm("web")).filter(|vm| vm["state"] == "crashed")
    });
    assert_eq!(vm["ended"]["reason"], "guest-panic");
    let words = vm["ended"]["last_words"].as_str().unwrap();
    assert!(words.contains("Kernel panic"), "{words}");
    let remedy = vm["ended"]["remediation"].as_str().unwrap();
    assert!(remedy.contains("castra restart web"), "{remedy}");
    assert_eq!(vm["boots"], Value::Null);
    let event = eventually("its event", || project.broker_told("exited").pop());
    assert_eq!(event["reason"], "guest-panic");
    project.down();
}

#[test]
fn a_guest_that_only_begins_is_ended_and_up_says_so() {
    let project = Project::new("boot-loop", &faking("reset-every=0.4", SCRIPT));
    let ran = project.run(&["up", "--json"]).exits(1);
    ran.prints("boot-loop");
    let vm = project.vm("web");
    assert_eq!(
        (&vm["state"], &vm["ended"]["reason"]),
        (&"crashed".into(), &"boot-loop".into())
    );
    let remedy = vm["ended"]["remediation"].as_str().unwrap();
    assert!(
        remedy.contains("again and again") && remedy.contains("castra restart web"),
        "{remedy}"
    );
    project.down();
}
