//! A QEMU that doesn't start, dies, hangs or won't stop.

use std::fs::{self, OpenOptions};
use std::io::Write;

use nix::sys::signal::Signal;

use crate::support::project::{ONE, Project, SCRIPT, TWO, is_phase};
use crate::support::{eventually, of_type, until};

#[test]
fn a_qemu_that_fails_is_told_with_its_own_words() {
    let project = Project::new("fails", ONE);
    for (fake, words) in [
        (
            "refuse=-m 1: cannot set up guest memory 'pc.ram': Cannot allocate memory",
            "Cannot allocate memory",
        ),
        ("refuse=no such thing as a q35", "no such thing as a q35"),
        ("die", "QEMU"),
        ("die-greeted", "QEMU"),
        ("internal-error", "KVM internal error"),
    ] {
        let ran = project.run_faking(fake, &["up", "--json"]).exits(1);
        let events = ran.objects();
        let errors: Vec<String> = events
            .iter()
            .filter(|event| event["severity"] == "error" && event["vm"] == "web")
            .map(|event| format!("{} {}", event["text"], event["remediation"]))
            .collect();
        assert_eq!(errors.len(), 1, "{fake}: {events:#?}");
        assert!(
            errors[0].contains(words) && !errors[0].contains("null"),
            "{fake}: {errors:?}"
        );
        assert_eq!(of_type(&events, "command.failed")[0]["detail"], "failed: web");
        assert_eq!(events.last().unwrap()["vms"]["failed"], 1);
        // What was made for it is gone at once, and that is told.
        assert!(!project.state("overlays/web.qcow2").exists(), "{fake}");
        let made = events
            .iter()
            .filter(|event| is_phase(event, "overlay-prepared"))
            .count();
        let gone = events
            .iter()
            .filter(|event| is_phase(event, "overlay-discarded"))
            .count();
        assert_eq!((made, gone), (1, 1), "{fake}: {events:#?}");
        let vm = project.vm("web");
        assert!(
            vm["state"] == "stopped" || vm["state"] == "crashed",
            "{fake}: {vm}"
        );
        let human = project.run_faking(fake, &["up"]).exits(1);
        assert!(human.stderr.contains(words), "{fake}: {human:?}");
    }
    project.down();
    project.run(&["up"]).exits(0);
    project.down();
}

#[test]
fn one_that_fails_keeps_no_other_from_starting() {
    let vms = TWO.replacen(
        "kernel",
        "qemu_args = [\"-fake\", \"refuse=not today\"]\nkernel",
        1,
    );
    let project = Project::new("one-of-two", &vms);
    let ran = project.run(&["up"]).exits(1);
    ran.prints("1 of 2");
    ran.tells("not today");
    project.pid("db");
    assert_ne!(project.vm("web")["state"], "running");
    project.down();
}

#[test]
fn a_qemu_that_never_gets_ready_is_ended_by_ctrl_c() {
    for fake in ["hang", "mute"] {
        let project = Project::new("hang", ONE);
        let mut up = project.begin(fake, &["up"]);
        up.until("an overlay", |event| is_phase(event, "overlay-prepared"));
        let status = project.vm("web");
        assert!(status["state"] != "running" || fake == "mute", "{status}");
        up.signal(Signal::SIGINT);
        let (code, events) = up.end();
        assert_eq!(code, Some(130), "{events:#?}");
        assert_eq!(events.last().unwrap()["type"], "summary");
        assert!(!project.state("overlays/web.qcow2").exists());
        assert_ne!(project.vm("web")["state"], "running");
        project.down();
    }
}

#[test]
fn a_qemu_that_dies_later_is_seen_and_started_anew() {
    let project = Project::new("dies", ONE);
    project.run_faking("die-after=0.1", &["up"]).exits(0);
    until("its death", || project.vm("web")["state"] == "crashed");
    let up = project.run(&["up", "--json"]).exits(0).objects();
    assert!(up.iter().any(|event| is_phase(event, "exited")), "{up:#?}");
    project.pid("web");
    project.down();
}

#[test]
fn a_qemu_that_ends_while_its_guest_boots_ends_the_wait_and_is_explained() {
    for (fake, state, reason, why) in [
        ("die-after=0.3", "crashed", "unknown", "fake guest boots"),
        ("off-after=0.3", "stopped", "guest-shutdown", "guest-shutdown"),
        (
            "panic-after=0.3",
            "crashed",
            "guest-panic",
            "Kernel panic - not syncing: fake",
        ),
    ] {
        let project = Project::new("mid-boot", &format!("{ONE}{SCRIPT}"));
        let ran = project.run_faking(fake, &["up", "--json"]).exits(1);
        let events = ran.objects();
        let failed = of_type(&events, "bootstrap.failed");
        assert_eq!(failed.len(), 1, "{fake}: {events:#?}");
        let error = failed[0]["error"].as_str().unwrap();
        assert!(
            error.contains("the VM ended") && error.contains(why),
            "{fake}: {error}"
        );
        assert_eq!(events.last().unwrap()["verdict"], "none");
        let vm = project.vm("web");
        assert_eq!(
            (&vm["state"], &vm["ended"]["reason"]),
            (&state.into(), &reason.into())
        );
        // The broker, which looks once a second, tells of it with words and a remedy.
        let kept = project.state("logs/events-broker.jsonl");
        let exited = eventually("the broker's event", || {
            let text = std::fs::read_to_string(&kept).ok()?;
            let mut events = text.lines().filter_map(|line| serde_json::from_str(line).ok());
            events.find(|event| is_phase(event, "exited"))
        });
        assert_eq!(exited["outcome"], state);
        let human = project.run(&["status"]).exits(0).stdout;
        for remediation in [&exited["remediation"], &vm["ended"]["remediation"]] {
            match state {
                "crashed" => assert!(remediation.as_str().unwrap().contains("castra restart web")),
                _ => assert!(remediation.is_null()),
            }
        }
        assert_eq!(
            human.contains("castra restart web"),
            state == "crashed",
            "{human}"
        );
        project.down();
    }
}

#[test]
fn who_ended_a_qemu_is_told_in_its_own_words() {
    let project = Project::new("signalled", ONE);
    project.run(&["up"]).exits(0);
    let pid = i32::try_from(project.pid("web")).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    until("its end", || project.vm("web")["state"] == "crashed");
    let ended = &project.vm("web")["ended"];
    assert_eq!(ended["reason"], "host-signal");
    let said = ended["qemu_words"].as_str().unwrap();
    assert!(said.contains("terminating on signal 15"), "{ended}");
    assert!(
        project
            .run(&["status"])
            .exits(0)
            .stdout
            .contains("terminating on signal 15")
    );
    // `down` takes note of it: it reads as stopped, and why it ended is still there.
    project.down();
    let web = project.vm("web");
    assert_eq!(
        (&web["state"], &web["ended"]["reason"]),
        (&"stopped".into(), &"host-signal".into())
    );
    project.down();
}

#[test]
fn all_some_and_none_are_told_apart() {
    let refusing = |count: usize| {
        TWO.replacen(
            "kernel",
            "qemu_args = [\"-fake\", \"refuse=not today\"]\nkernel",
            count,
        )
    };
    for (failing, code, verdict, text) in [
        (0, 0, "all", "2 VMs up"),
        (1, 1, "some", "1 of 2 VMs up, 1 failed, after "),
        (2, 1, "none", "2 of 2 VMs failed, after "),
    ] {
        let project = Project::new("verdicts", &refusing(failing));
        let events = project.run(&["up", "--json"]).exits(code).objects();
        let summary = events.last().unwrap();
        assert_eq!(summary["verdict"], verdict);
        assert_eq!(summary["vms"]["failed"], failing);
        let again = project.run(&["up"]).exits(code);
        again.prints(text);
        let down = project.run(&["down", "--json"]).exits(0).objects();
        assert_eq!(down.last().unwrap()["verdict"], "all");
        project.assert_nothing_left();
    }
}

#[test]
fn the_ladder_is_climbed_for_those_who_will_not_go() {
    let project = Project::new("ladder", ONE);
    let waits = ["--graceful-wait-secs", "1", "--sigterm-wait-secs", "1"];
    for (fake, waits, outcome) in [
        ("", &waits[..0], "graceful"),
        ("ignore-powerdown", &waits[..2], "terminated"),
        ("ignore-powerdown,ignore-term", &waits[..], "killed"),
    ] {
        project.run_faking(fake, &["up"]).exits(0);
        let events = project
            .run(&[&["down", "--json"], waits].concat())
            .exits(0)
            .objects();
        project.assert_nothing_left();
        let done = events
            .iter()
            .find(|event| is_phase(event, "shutdown-complete"))
            .unwrap();
        assert_eq!(done["outcome"], outcome);
        let gone = events
            .iter()
            .find(|event| is_phase(event, "overlay-discarded"))
            .unwrap();
        assert!(gone["reclaimed_bytes"].as_u64().unwrap() > 0);
        assert_eq!(of_type(&events, "cleanup").len(), 1);
        assert_eq!(project.vm("web")["state"], "stopped");
    }
}

#[test]
fn a_second_ctrl_c_skips_the_patience_of_down() {
    let project = Project::new("impatient", ONE);
    project
        .run_faking("ignore-powerdown,ignore-term", &["up"])
        .exits(0);
    let mut down = project.begin("", &["down", "--graceful-wait-secs", "600"]);
    down.until("the power button", |event| {
        is_phase(event, "cooperative-attempted")
    });
    down.signal(Signal::SIGINT);
    down.signal(Signal::SIGTERM);
    let (_, events) = down.end();
    let done = events
        .iter()
        .find(|event| is_phase(event, "shutdown-complete"))
        .unwrap();
    assert_eq!(done["changed"], true, "{events:#?}");
    project.down();
}

#[test]
fn a_snatched_port_is_replaced() {
    let project = Project::new("snatched", ONE);
    project.run_faking("snatch=2", &["up"]).exits(0);
    project.pid("web");
    project.down();
}

#[test]
fn a_broker_that_was_started_for_nothing_goes_again() {
    let project = Project::new("broker-goes", TWO);
    for args in [&["up", "--json"][..], &["restart", "--json"]] {
        let events = project.run_faking("refuse=no", args).exits(1).objects();
        let broker: Vec<&str> = events
            .iter()
            .filter_map(|event| event["type"].as_str())
            .filter(|kind| kind.starts_with("broker."))
            .collect();
        assert_eq!(broker, ["broker.started", "broker.stopped"], "{events:#?}");
        project.assert_no_process();
        assert_eq!(project.status()["broker"]["state"], "offline");
    }
    let ran = project.run_faking("refuse=no", &["up"]).exits(1);
    assert!(!ran.stdout.contains("broker on"), "{ran:?}");

    // One that was there before stays, and so does one that a VM needs.
    project.run(&["up", "--broker-only"]).exits(0);
    project.run_faking("refuse=no", &["up"]).exits(1);
    assert_eq!(project.status()["broker"]["state"], "running");
    project.down();
    project.config(&TWO.replacen(
        "kernel = ",
        "qemu_args = [\"-fake\", \"refuse=no\"]\nkernel = ",
        1,
    ));
    project.run(&["up"]).exits(1);
    project.pid("db");
    assert_eq!(project.status()["broker"]["state"], "running");
    project.down();
}

#[test]
fn brokers_starts_and_stops_are_told_by_whose_operation_they_are() {
    let project = Project::new("broker-told", ONE);
    let kinds = |args: &[&str]| -> Vec<String> {
        let events = project.run(args).exits(0).objects();
        let kinds = events
            .iter()
            .filter_map(|event| event["type"].as_str().map(str::to_owned));
        kinds.filter(|kind| kind.starts_with("broker.s")).collect()
    };
    for args in [&["up", "--json"][..], &["up", "--broker-only", "--json"]] {
        assert_eq!(kinds(args), ["broker.started"], "{args:?}");
        assert_eq!(kinds(args), [""; 0], "it runs already");
        assert_eq!(kinds(&["down", "--json"]), ["broker.stopped"]);
    }
    project.assert_nothing_left();
}

#[test]
fn a_line_of_the_brokers_journal_is_printed_as_the_broker_kept_it() {
    let project = Project::new("broker-line", ONE);
    let mut up = project.begin("hang", &["up"]);
    up.until("the broker", |event| event["type"] == "broker.started");
    // As a broker of another version may write it.
    let line = concat!(
        r#"{"type":"broker.freshness", "v":1,"ts":"2026-11-21T10:00:00.000Z","offset_ms":0,"seq":900,"run":"r-1","#,
        r#""vm":"web","later":{"b": 1,"a":2},"reachable":true,"last_handshake_age_ms":0}"#
    );
    let path = project.state("logs/events-broker.jsonl");
    let mut journal = OpenOptions::new().append(true).open(&path).unwrap();
    journal.write_all(format!("{line}\n").as_bytes()).unwrap();
    up.until_line("the line", |_, printed| printed == line);
    up.signal(Signal::SIGINT);
    assert_eq!(up.end().0, Some(130));
    project.down();
    // This version of castra would not have written that line.
    fs::remove_file(path).unwrap();
}

/// A launch that fails before QEMU is started, after one that `down` had to end by a signal.
#[test]
fn a_launch_that_fails_early_does_not_make_the_last_end_a_crash() {
    let project = Project::new(
        "own-down",
        &format!("{ONE}qemu_args = [\"-fake\", \"ignore-powerdown\"]\n"),
    );
    for overlay in ["", "overlay = \"own.qcow2\"\n"] {
        project.config(&format!(
            "{ONE}{overlay}qemu_args = [\"-fake\", \"ignore-powerdown\"]\n"
        ));
        project.run(&["up"]).exits(0);
        project.down_at_once();
        assert_eq!(project.vm("web")["state"], "stopped");
        // Where its seed is to be written lies something else.
        let seed = project.state("vms/web/seed");
        let _ = fs::remove_dir_all(&seed);
        fs::write(&seed, "in the way").unwrap();
        let ran = project.run(&["up", "--json"]).exits(1);
        assert!(!ran.stdout.contains("\"exited\""), "{ran:?}");
        let vm = project.vm("web");
        assert_eq!(vm["state"], "stopped", "{overlay:?}: {vm}");
        fs::remove_file(&seed).unwrap();
    }
    let ran = project.run(&["up", "--json"]).exits(0);
    assert!(!ran.stdout.contains("\"exited\""), "{ran:?}");
    project.down_at_once();
}
