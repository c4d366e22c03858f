//! Several castras at once, and signals in the middle.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::project::{ONE, Project, SCRIPT, TWO, is_phase, is_waiting};
use crate::support::{eventually, of_type, program, until};

#[test]
fn a_second_up_is_told_who_is_at_work() {
    let project = Project::new("second", ONE);
    let mut first = project.begin("hang", &["up"]);
    first.until("an overlay", |event| is_phase(event, "overlay-prepared"));
    for command in ["up", "down"] {
        let refusal = project.refused(75, &[command]);
        refusal
            .tells(&[&format!("pid {}", first.child.id()), "castra up"])
            .advises("again");
    }
    first.signal(Signal::SIGTERM);
    assert_eq!(first.end().0, Some(130));
    project.down();
}

#[test]
fn of_racing_ups_each_vm_is_started_once() {
    let project = Project::new("racing", TWO);
    let runs: Vec<_> = (0..4).map(|_| project.begin("", &["up"])).collect();
    let ends: Vec<_> = runs.into_iter().map(|run| run.end()).collect();
    let mut launched = 0;
    for (code, events) in &ends {
        assert!(matches!(code, Some(0 | 75)), "{events:#?}");
        launched += events.iter().filter(|event| is_phase(event, "launched")).count();
    }
    assert!(ends.iter().any(|(code, _)| *code == Some(0)));
    assert_eq!(launched, 2, "{ends:#?}");
    project.pid("web");
    project.pid("db");
    project.down();
}

#[test]
fn up_when_all_is_up_says_so() {
    let project = Project::new("again", TWO);
    project.run(&["up", "web"]).exits(0);
    let web = project.pid("web");
    assert_ne!(project.vm("db")["state"], "running");
    let again = project.run(&["up", "web"]).exits(0);
    again.tells("is running already").prints("was running already");
    project.run(&["up"]).exits(0);
    assert_eq!(project.pid("web"), web);
    project.pid("db");
    let last = project.run(&["up", "--json"]).exits(0).objects().pop().unwrap();
    assert_eq!(
        (&last["vms"]["unchanged"], &last["vms"]["changed"]),
        (&2.into(), &0.into())
    );

    project.run(&["down", "web"]).exits(0);
    assert_eq!(project.vm("web")["state"], "stopped");
    project.pid("db");
    assert_eq!(project.status()["broker"]["state"], "running");
    project.run(&["down", "web"]).exits(0);
    project.down();
    project.down();
}

#[test]
fn up_when_all_is_up_bootstraps_by_the_modes() {
    let project = Project::new("modes", &format!("{ONE}{SCRIPT}"));
    project.run(&["up", "--bootstrap", "skip"]).exits(0);
    let pid = project.pid("web");
    let mut up = project.begin("", &["up"]);
    up.until("a bootstrap", is_waiting);
    up.signal(Signal::SIGINT);
    assert_eq!(up.end().0, Some(130));
    assert_eq!(project.pid("web"), pid);
    project.down();
}

#[test]
fn down_with_nothing_ever_up_makes_nothing() {
    let project = Project::new("never", TWO);
    let down = project.run(&["down"]).exits(0);
    assert!(
        format!("{}{}", down.stdout, down.stderr).contains("never been up"),
        "{down:?}"
    );
    project.run(&["down", "web"]).exits(0);
    assert!(!project.state("").exists());
}

#[test]
fn down_ends_the_bootstrap_of_another_castra() {
    let project = Project::new("stopped", &format!("{ONE}{SCRIPT}"));
    let mut up = project.begin("", &["up"]);
    up.until("a bootstrap", is_waiting);
    // The project is free, the VM isn't: a second `up` says so, `down` goes through.
    project
        .refused(75, &["up"])
        .tells(&["web", &format!("pid {}", up.child.id())]);
    project.down();
    let (code, events) = up.end();
    assert_eq!(code, Some(1));
    let failed = of_type(&events, "bootstrap.failed");
    assert_eq!(failed.len(), 1, "{events:#?}");
    assert!(
        failed[0].to_string().contains("stopped by castra down"),
        "{}",
        failed[0]
    );
    assert_eq!(project.vm("web")["state"], "stopped");
    project.assert_nothing_left();
}

#[test]
fn signals_during_the_wait_for_a_guest() {
    for signals in [
        &[Signal::SIGINT][..],
        &[Signal::SIGTERM],
        &[Signal::SIGINT, Signal::SIGINT],
    ] {
        let project = Project::new("wait", &format!("{ONE}{SCRIPT}"));
        let mut up = project.begin("", &["up"]);
        up.until("a bootstrap", is_waiting);
        for signal in signals {
            up.signal(*signal);
        }
        let (code, events) = up.end();
        assert_eq!(code, Some(130), "{events:#?}");
        assert_eq!(of_type(&events, "bootstrap.failed").len(), 1, "{events:#?}");
        assert_eq!(events.last().unwrap()["type"], "summary");
        // The running command goes on, and the message names it.
        project.pid("web");
        project.down();
    }
}

#[test]
fn a_castra_killed_in_mid_launch_leaves_nothing_that_down_does_not_find() {
    for next in ["down", "up"] {
        let project = Project::new("killed", ONE);
        let mut up = project.begin("hang", &["up"]);
        up.until("an overlay", |event| is_phase(event, "overlay-prepared"));
        let pid_file = project.state("vms/web/qemu.pid");
        let qemu: i32 = eventually("a QEMU that hangs", || {
            fs::read_to_string(&pid_file).ok()?.trim().parse().ok()
        });
        up.signal(Signal::SIGKILL);
        drop(up);
        // A QEMU that never gets ready lives on, and has the VM's lock as its castra had.
        assert_eq!(project.vm("web")["state"], "starting");
        kill(Pid::from_raw(qemu), Signal::SIGKILL).unwrap();
        until("a status without it", || project.vm("web")["state"] == "stopped");
        project.run(&[next]).exits(0);
        project.down();
    }
}

#[test]
fn a_castra_killed_before_qemu_started_leaves_an_overlay_that_down_removes() {
    let project = Project::new("killed-early", ONE);
    // The stand-in for qemu-img waits for ever once the overlay is there.
    let bin = project.castra().dir().join("bin");
    let script = "#!/bin/sh\nPATH=${PATH#*:}\nqemu-img \"$@\" || exit\n\
                  case $1 in create) exec sleep 600;; esac\n";
    program(&bin.join("qemu-img"), script);
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut up = project
        .castra()
        .command(&["up"])
        .env("PATH", path)
        .spawn()
        .unwrap();
    let overlays = project.state("overlays");
    let _ = eventually("an overlay", || fs::read_dir(&overlays).ok()?.next());
    up.kill().unwrap();
    up.wait().unwrap();
    assert_ne!(project.vm("web")["state"], "running");
    // Its child outlives it, as a qemu-img would for a moment.
    until("the end of its child", || {
        end_sleepers(&project);
        project.processes().len() <= 1
    });
    project.down();
    assert_eq!(fs::read_dir(&overlays).unwrap().count(), 0, "an overlay is left");
}

/// Ends the `sleep`s that a stand-in of this project became.
fn end_sleepers(project: &Project) {
    let mark = format!("CASTRA_HOME={}", project.castra().home().display());
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
        let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if cmdline.starts_with(b"sleep\0") && String::from_utf8_lossy(&environ).contains(&mark) {
            let pid: i32 = entry.file_name().to_str().unwrap().parse().unwrap();
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}
