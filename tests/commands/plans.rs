//! `up --plan` finds what `up` and `restart` find, before anything is made.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::project::{ONE, Project};

fn make_image(project: &Project, args: &[&str]) {
    let made = Command::new("qemu-img")
        .arg("create")
        .arg("-q")
        .args(args)
        .current_dir(project.castra().project())
        .status();
    assert!(made.unwrap().success(), "qemu-img {args:?}");
}

/// What a plan says is wrong.
fn errors(plan: &[Value]) -> Vec<String> {
    plan.iter()
        .filter(|event| event["severity"] == "error")
        .map(|event| event["text"].as_str().unwrap().to_owned())
        .collect()
}

/// Projects that `up` can't bring up, and words of the reason. `FROM` stands for what the VM boots.
fn unfit() -> Vec<(&'static str, &'static [&'static str])> {
    vec![
        (
            "base_image = \"nosuch.qcow2\"",
            &["castra.toml:17:14: ", "nosuch.qcow2", "no such file"],
        ),
        (
            "base_image = \"b.qcow2\"\nuser_data = \"users: [a]\"",
            &["castra.toml:18:13: ", "user_data", "first line"],
        ),
        (
            "base_image = \"b.qcow2\"\ndisk_size = \"1 MiB\"",
            &["castra.toml:18:13: ", "can't be shrunk"],
        ),
        (
            "base_image = \"enc.qcow2\"",
            &["castra.toml:17:14: ", "enc.qcow2", "encrypted"],
        ),
        ("base_image = \"luks.img\"", &["castra.toml:17:14: ", "luks.img"]),
        (
            "base_image = \"b.qcow2\"\nbase_image_sha256 = \"0000000000000000000000000000000000000000000000000000000000000000\"",
            &["b.qcow2", "castra.toml pins 0000"],
        ),
        (
            "kernel = \"nosuch\"",
            &["castra.toml:17:10: ", "nosuch", "no such file"],
        ),
        (
            "kernel = \"vmlinuz\"\ninitrd = \"nosuch\"",
            &["castra.toml:18:10: ", "nosuch", "no such file"],
        ),
        ("kernel = \".\"", &["it is a directory"]),
        ("kernel = \"empty\"", &["it is empty"]),
        (
            "kernel = \"vmlinuz\"\nmounts = [{ host = \".\", guest = \"/b\" }, { host = \"nosuch\", guest = \"/a\" }]",
            &["castra.toml:18:41: ", "nosuch", "no such file or folder"],
        ),
        (
            "kernel = \"vmlinuz\"\nmounts = [{ host = \"run.sh\", guest = \"/a\" }]",
            &["run.sh", "isn't a folder"],
        ),
        (
            "kernel = \"vmlinuz\"\nmounts = [{ host = \"site\", guest = \"/a/b\" }, { host = \".\", guest = \"/a\" }]",
            &[
                "castra.toml:18:11: ",
                "/a is read-only in the guest",
                "/b doesn't exist",
            ],
        ),
        (
            "memory = \"40 MiB\"",
            &["castra.toml:17:10: ", "too little memory", "40 MiB"],
        ),
        (
            "kernel = \"vmlinuz\"\nbootstrap.script = \"nosuch.sh\"\nbootstrap.mode = \"auto\"",
            &["nosuch.sh"],
        ),
        (
            "kernel = \"vmlinuz\"\nbootstrap.script = \"run.sh\"\nbootstrap.mode = \"auto\"\nbootstrap.payload = \"nosuch\"",
            &["nosuch", "payload"],
        ),
    ]
}

#[test]
fn what_up_refuses_a_plan_finds_and_nothing_is_made() {
    let project = Project::new("unfit", ONE);
    project.castra().write("empty", "");
    project.castra().write("site/index.html", "hello");
    make_image(&project, &["-f", "qcow2", "b.qcow2", "2M"]);
    // Real ones take seconds each to derive their keys: 2 is qcow2's number for LUKS.
    let mut image = fs::read(project.castra().project().join("b.qcow2")).unwrap();
    image[35] = 2;
    fs::write(project.castra().project().join("enc.qcow2"), image).unwrap();
    let mut luks = b"LUKS\xba\xbe\0\x01".to_vec();
    luks.resize(1 << 20, 0);
    fs::write(project.castra().project().join("luks.img"), luks).unwrap();
    for (keys, words) in unfit() {
        project.config(&format!("[[vms]]\nname = \"web\"\n{keys}\n"));
        let plan = project.run(&["up", "--plan", "--json"]).exits(1).objects();
        let errors = errors(&plan);
        assert_eq!(errors.len(), 1, "{keys}: {errors:?}");
        let shown = project.run(&["up", "--plan"]).exits(1);
        for word in words {
            assert!(errors[0].contains(word), "{keys}: no {word:?} in {errors:?}");
            assert!(shown.stderr.contains(word), "{keys}: {shown:?}");
        }
        for command in ["up", "restart"] {
            project.refused(65, &[command]).alone().tells(words);
        }
        assert!(!project.state("").exists(), "something was made for {keys}");
        assert!(!project.castra().home().exists(), "something was made for {keys}");
    }
}

#[test]
fn a_restart_that_would_fail_leaves_its_vm_running() {
    let project = Project::new("unfit-restart", ONE);
    project.run(&["up"]).exits(0);
    let pid = project.pid("web");
    project.config(&format!(
        "{ONE}mounts = [{{ host = \"nosuch\", guest = \"/a\" }}]\n"
    ));
    project.refused(65, &["restart"]).alone().tells(&["nosuch"]);
    assert_eq!(project.pid("web"), pid);
    project.down();
}

#[test]
fn an_option_that_qemu_refuses_is_named_with_its_place() {
    let project = Project::new("qemu-args", ONE);
    project.config(&format!("{ONE}qemu_args = [\"-snapshot\", \"-nonsense\"]\n"));
    let ran = project
        .run_faking("refuse=-nonsense: invalid option", &["up"])
        .exits(1);
    for word in [
        "-nonsense: invalid option",
        "castra.toml:18:27: correct `-nonsense` under `qemu_args`",
    ] {
        assert!(ran.stderr.contains(word), "no {word:?} in {}", ran.stderr);
    }
    // A user's own kernel reports itself that it has too little memory.
    let panic = "console=Kernel panic - not syncing: System is deadlocked on memory";
    project.config(&format!(
        "{ONE}memory = \"40 MiB\"\nbootstrap = {{ mode = \"auto\", script = \"run.sh\" }}\n"
    ));
    let ran = project
        .run_faking(&format!("{panic},off-after=0.3"), &["up"])
        .exits(1);
    ran.tells("40 MiB of memory are too little for it, write more under castra.toml:18:10: `memory`");
    project.down();
}

#[test]
fn several_reasons_are_told_at_once_and_replicas_once() {
    let project = Project::new("unfit-many", "");
    project.config(
        "[[vms]]\nname = \"web\"\ncount = 3\nkernel = \"vmlinuz\"\nbase_image = \"nosuch.qcow2\"\n\
         [[vms]]\nname = \"db\"\nkernel = \"nosuch\"\n",
    );
    let refusal = project
        .refused(65, &["up"])
        .alone()
        .tells(&["2 reasons", "nosuch.qcow2", "`db`"]);
    assert_eq!(refusal.detail.matches("nosuch.qcow2").count(), 1, "{refusal:#?}");
    // VMs that weren't named don't count.
    let plan = project.run(&["up", "--plan", "--json", "db"]).exits(1).objects();
    assert_eq!(errors(&plan).len(), 1);
}

#[test]
fn a_plan_shows_each_machine_and_all_warnings() {
    let project = Project::new("plan-shows", "");
    project.castra().write("site/index.html", "hello");
    project.castra().write("bootstrap.toml", "flavour = 1\n");
    project.config(
        "[[vms]]\nname = \"web\"\nkernel = \"vmlinuz\"\ncpus = 2\nmemory = \"300 MiB\"\nnetwork = \"isolated\"\nuser_data = \"#!/bin/sh\"\n\
         colour = 1\nmounts = [{ host = \"site\", guest = \"/srv\" }]\n\
         port_forwards = [{ host = 18099, guest = 80 }]\n\
         bootstrap = { script = \"run.sh\", mode = \"auto\" }\n[[vms]]\nname = \"db\"\n",
    );
    let shown = project.run(&["up", "--plan"]).exits(0);
    for word in [
        "image        none, an empty disk",
        "machine      2 CPUs, 300 MiB of memory, disk of 4 GiB",
        "network      isolated",
        "127.0.0.1:18099 → guest port 80, a free port → guest port 22",
        "/srv (read-only)",
        "image        default guest, built first",
        "machine      1 CPU, 256 MiB of memory",
    ] {
        assert!(shown.stdout.contains(word), "no {word:?} in {}", shown.stdout);
    }
    for word in [
        "unknown key `colour`",
        "bootstrap.toml:1:1: unknown key `flavour`",
        "nothing reads its `user_data`",
    ] {
        assert!(shown.stderr.contains(word), "no {word:?} in {}", shown.stderr);
    }
    let plan = project.run(&["up", "--plan", "--json"]).exits(0).objects();
    let planned = plan
        .iter()
        .find(|event| event["type"] == "bootstrap.planned")
        .unwrap();
    let machine = &planned["machine"];
    assert_eq!(
        (&planned["vm"], &machine["memory_bytes"]),
        (&json!("web"), &json!(300 << 20))
    );
    assert_eq!(
        machine["forwards"][1],
        json!({ "host": null, "guest": 22, "protocol": "tcp" })
    );
    assert_eq!(machine["mounts"][0]["guest"], "/srv");
    let warned = |word: &str| {
        plan.iter()
            .any(|event| event["severity"] == "warn" && event["text"].as_str().unwrap().contains(word))
    };
    assert!(warned("`colour`") && warned("`flavour`"), "{plan:?}");
    // The same warnings where ports are looked at.
    let ports = project.run(&["ports"]).exits(0);
    ports.tells("`colour`").tells("`flavour`");
    assert!(!project.state("").exists() && fs::metadata(project.castra().home()).is_err());
}
