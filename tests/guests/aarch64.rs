//! The default guest of another architecture than that of the hosts tests run on, under emulation: one boot.

use std::fs;

use crate::of_type;
use crate::support::guest_project::{Project, text};

const HEAD: &str = "[qemu]\narch = \"aarch64\"\n";

#[test]
fn an_aarch64_guest_comes_up_and_powers_off_over_ssh() {
    let project = Project::new("aarch64", HEAD);
    project.config("[[vms]]\nname = \"web\"\nbootstrap.script = \"web.sh\"\n");
    project.file("web.sh", "#!/bin/sh\nuname -m >/root/machine\n");

    let up = project.events(0, &["up"]);
    let launched = up.iter().find(|event| event["phase"] == "launched").unwrap();
    if std::env::consts::ARCH != "aarch64" {
        assert_eq!(launched["accel"], "tcg");
        let reason = launched["accel_reason"].as_str().unwrap();
        assert!(reason.contains("always emulated"), "{reason}");
    }
    assert_eq!(of_type(&up, "bootstrap.completed").len(), 1);
    assert_eq!(project.vm("web")["reachable"], true);
    assert_eq!(
        project.expect(0, &["exec", "web", "--", "cat", "/root/machine"]),
        "aarch64\n"
    );

    let down = project.events(0, &["down"]);
    let phase = |name: &str| down.iter().find(|event| event["phase"] == name).unwrap();
    assert_eq!(phase("cooperative-succeeded")["method"], "ssh-poweroff");
    assert_eq!(phase("shutdown-complete")["outcome"], "graceful");
    let console = fs::read(project.state("vms/web/serial.log")).unwrap();
    assert!(
        text(&console).contains("castra: poweroff"),
        "it had time to end its programs"
    );
}

#[test]
fn its_guest_mounts_nothing_and_that_is_said_before_anything_is_made() {
    let project = Project::new("aarch64-mounts", HEAD);
    project.config("[[vms]]\nname = \"web\"\nmounts = [{ host = \".\", guest = \"/work\" }]\n");
    let refused = project.run(&["up"]);
    assert_eq!(refused.status.code(), Some(65));
    let said = text(&refused.stderr);
    assert!(said.contains("the default guest for aarch64 has no 9p"), "{said}");
    assert!(!project.state("vms").exists());
}
