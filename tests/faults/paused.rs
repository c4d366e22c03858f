//! Guests that QEMU has paused: castra reports the reason, resumes them if it may, and they block nothing
//! else.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use serde_json::Value;

use crate::support::project::{ONE, Project, SCRIPT, faking, is_phase};
use crate::support::{AMPLE, eventually, until};

fn is_in_state(project: &Project, state: &str) -> Option<Value> {
    Some(project.vm("web")).filter(|vm| vm["state"] == state)
}

/// Says one thing to QEMU over QMP.
fn qmp(project: &Project, command: &str) {
    let directory = fs::File::open(project.state("vms/web")).unwrap();
    let path = castra::core::host::short_path(&directory, "qmp.sock");
    let mut stream = UnixStream::connect(path).unwrap();
    let mut answers = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    answers.read_line(&mut line).unwrap();
    for command in ["qmp_capabilities", command] {
        writeln!(stream, "{{\"execute\": \"{command}\"}}").unwrap();
        line.clear();
        while !line.contains("\"return\"") {
            line.clear();
            answers.read_line(&mut line).unwrap();
        }
    }
}

#[test]
fn a_full_disk_is_told_and_the_guest_runs_on_once_there_is_room() {
    let project = Project::new("disk-full", &faking("disk-full", ""));
    project.run(&["up"]).exits(0);
    project.write_state("vms/web/disk-full", "");
    let vm = eventually("the pause", || is_in_state(&project, "paused"));
    assert_eq!(vm["paused"]["reason"], "io-error");
    let detail = vm["paused"]["detail"].as_str().unwrap();
    assert!(
        detail.contains("no space") && detail.contains("web.qcow2"),
        "{detail}"
    );
    assert_eq!(vm["reachable"], false);
    let ran = project.run(&["exec", "web", "--", "true"]).exits(255);
    for said in ["paused (io-error)", "no space", "make room"] {
        ran.tells(said);
    }
    let table = project.run(&["status"]).exits(0).stdout;
    assert!(
        table.contains("paused (io-error)") && table.contains("make room"),
        "{table}"
    );
    let event = eventually("its event", || project.broker_told("paused").pop());
    assert_eq!(
        (&event["vm"], &event["reason"]),
        (&"web".into(), &"io-error".into())
    );
    // The stand-in's disk is full while the file is there; the host's never was, so castra tries, in vain
    // and seldomer each time, and tells of it no more.
    fs::remove_file(project.state("vms/web/disk-full")).unwrap();
    eventually("it to run on", || is_in_state(&project, "running"));
    let event = eventually("its event", || project.broker_told("resumed").pop());
    assert_eq!(event["reason"], "io-error");
    assert_eq!(project.broker_told("paused").len(), 1);
    project.down();
}

#[test]
fn up_lets_it_run_on_or_says_why_it_cannot_and_waits_for_nothing() {
    let project = Project::new("disk-full-up", &faking("disk-full", SCRIPT));
    project.run(&["up", "--bootstrap", "skip"]).exits(0);
    project.write_state("vms/web/disk-full", "");
    eventually("the pause", || is_in_state(&project, "paused"));
    // Its handshake deadline is ten minutes.
    let began = Instant::now();
    let ran = project.run(&["up"]).exits(1);
    assert!(began.elapsed() < AMPLE, "it has waited");
    ran.tells("paused (io-error)").tells("no space is left");
    fs::remove_file(project.state("vms/web/disk-full")).unwrap();
    project.run(&["up", "--bootstrap", "skip"]).exits(0);
    assert_eq!(project.vm("web")["state"], "running");
    project.down();
}

#[test]
fn one_that_pauses_while_it_is_waited_for_is_not_waited_for() {
    let project = Project::new("disk-full-boot", &faking("disk-full", SCRIPT));
    let mut up = project.begin("", &["up"]);
    up.until("the bootstrap", |event| event["type"] == "bootstrap.started");
    project.write_state("vms/web/disk-full", "");
    let step = up.until("the step's end", |event| event["type"] == "bootstrap.step");
    assert_eq!(step["status"], "failed");
    let detail = step["detail"].as_str().unwrap();
    assert!(detail.contains("no space is left"), "{detail}");
    assert_eq!(up.end().0, Some(1));
    project.down();
}

#[test]
fn whom_somebody_paused_only_up_lets_run_on() {
    let project = Project::new("paused-by-hand", ONE);
    project.run(&["up"]).exits(0);
    qmp(&project, "stop");
    let vm = project.vm("web");
    assert_eq!(
        (&vm["state"], &vm["paused"]["reason"]),
        (&"paused".into(), &"paused".into())
    );
    eventually("its event", || project.broker_told("paused").pop());
    // Waits for a few more checks of the broker, which must not resume it.
    let looks = Instant::now();
    until("a few looks", || looks.elapsed().as_secs() >= 3);
    assert_eq!(project.vm("web")["state"], "paused", "nobody asked for that");
    let ran = project.run(&["up", "--verbose"]).exits(0);
    ran.tells("was paused (paused) and runs again");
    assert_eq!(project.vm("web")["state"], "running");
    project.down();
}

#[test]
fn a_qemu_that_has_not_begun_says_so() {
    let project = Project::new("prelaunch", &faking("prelaunch", SCRIPT));
    let began = Instant::now();
    let ran = project.run(&["up"]).exits(1);
    assert!(began.elapsed() < AMPLE, "it has waited");
    ran.tells("-S");
    let vm = project.vm("web");
    assert_eq!(vm["paused"]["reason"], "prelaunch");
    let ran = project.run(&["up"]).exits(1);
    ran.tells("`cont` over QMP");
    qmp(&project, "cont");
    assert_eq!(project.vm("web")["state"], "running");
    project.down();
}

#[test]
fn a_paused_guest_is_not_asked_to_power_off() {
    let project = Project::new("paused-down", &faking("disk-full", ""));
    project.run(&["up"]).exits(0);
    project.write_state("vms/web/disk-full", "");
    eventually("the pause", || is_in_state(&project, "paused"));
    let ran = project
        .run(&["down", "--graceful-wait-secs", "600", "--json"])
        .exits(0);
    let events = ran.objects();
    let asked = events
        .iter()
        .find(|event| is_phase(event, "cooperative-timed-out"));
    let detail = asked.unwrap()["detail"].as_str().unwrap();
    assert!(detail.contains("io-error"), "{detail}");
    let done = events.iter().find(|event| is_phase(event, "shutdown-complete"));
    assert_eq!(done.unwrap()["outcome"], "terminated");
    project.assert_nothing_left();
}
