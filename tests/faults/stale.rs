//! VMs that run with other settings than the config has now.

use crate::support::of_type;
use crate::support::project::{ONE, Project, TWO, is_phase};

const DB: &str = "[[vms]]\nname = \"db\"\nkernel = \"vmlinuz\"\n";

#[test]
fn up_names_what_differs_and_restart_applies_it() {
    let project = Project::new("stale", ONE);
    project.run(&["up"]).exits(0);
    let pid = project.pid("web");
    assert_eq!(project.vm("web")["stale_config"], serde_json::json!([]));
    project.config(&format!("{ONE}memory = \"512 MiB\"\nnetwork = \"isolated\"\n"));
    assert_eq!(
        project.vm("web")["stale_config"],
        serde_json::json!(["memory", "network"])
    );
    let table = project.run(&["status"]).exits(0).stdout;
    assert!(
        table.contains("memory, network") && table.contains("castra restart web"),
        "{table}"
    );
    // A network or mount that the config closes and the VM still has open is reported even with --quiet.
    for args in [&["up"][..], &["up", "-q"]] {
        let ran = project.run(args).exits(0);
        ran.tells("NOT AS CONFIGURED: it is not isolated")
            .tells("memory, network")
            .tells("castra restart web");
    }
    let ran = project.run(&["up"]).exits(0);
    ran.prints("differs from castra.toml");
    assert_eq!(project.pid("web"), pid, "it runs on");

    project.run(&["restart", "web"]).exits(0);
    let vm = project.vm("web");
    assert_eq!(vm["stale_config"], serde_json::json!([]));
    assert_eq!(vm["memory_bytes"], 512 << 20);
    let ran = project.run(&["up", "--json"]).exits(0);
    assert!(!ran.stdout.contains("stale_config"), "{ran:?}");
    project.down();
}

#[test]
fn recreate_restarts_those_that_differ_with_their_disks() {
    let project = Project::new("recreate", TWO);
    project.run(&["up"]).exits(0);
    let (web, db) = (project.pid("web"), project.pid("db"));
    project.config(&format!("{ONE}cpus = 2\n{DB}"));
    let events = project.run(&["up", "--recreate", "--json"]).exits(0).objects();
    assert_ne!(project.pid("web"), web);
    assert_eq!(project.pid("db"), db, "it differs in nothing");
    let made = events.iter().find(|event| is_phase(event, "overlay-prepared"));
    assert_eq!(made.unwrap()["reused"], true, "its disk stays");
    assert_eq!(project.vm("web")["stale_config"], serde_json::json!([]));
    assert_eq!(project.vm("web")["cpus"], 2);
    // Nothing to do is nothing done.
    let events = project.run(&["up", "--recreate", "--json"]).exits(0).objects();
    assert!(of_type(&events, "vm.lifecycle").is_empty(), "{events:#?}");
    project.down();
}

#[test]
fn a_change_that_a_kept_disk_cannot_follow_says_so() {
    let project = Project::new("stale-disk", ONE);
    project.run(&["up"]).exits(0);
    project.config(&format!("{ONE}overlay = \"elsewhere.qcow2\"\n"));
    let ran = project.run(&["up"]).exits(0);
    ran.tells("castra restart --discard web");
    let pid = project.pid("web");
    let ran = project.run(&["up", "--recreate"]).exits(1);
    ran.tells("--discard");
    assert_eq!(project.pid("web"), pid, "it runs on as it was");
    project.down();
}
