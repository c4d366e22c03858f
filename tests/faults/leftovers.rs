//! State that is damaged, stale, or of somebody else.

use std::fs;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::project::{ONE, Project, is_phase};
use crate::support::until;

#[test]
fn a_number_in_a_pid_file_is_never_signalled() {
    let project = Project::new("innocent", ONE);
    project.run(&["up"]).exits(0);
    project.down();
    let mut innocent = Command::new("sleep")
        .arg("600")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let live = innocent.id().to_string();
    for number in [
        live.as_str(),
        "1",
        "0",
        "-1",
        "",
        "nonsense",
        "99999999999999999999",
    ] {
        for file in ["vms/web/qemu.pid", "broker.pid"] {
            project.write_state(file, &format!("{number}\n"));
        }
        for file in [
            "vms/web/qmp.sock",
            "vms/web/serial.sock",
            "broker.sock",
            "vms/web/ssh.ctl",
        ] {
            project.write_state(file, "");
        }
        assert_eq!(project.vm("web")["state"], "stopped", "{number}");
        assert_eq!(project.status()["broker"]["state"], "offline", "{number}");
        project.down();
        project.write_state("vms/web/qemu.pid", &format!("{number}\n"));
        project.write_state("vms/web/qmp.sock", "");
        project.run(&["up"]).exits(0);
        project.pid("web");
        project.down();
        assert!(
            innocent.try_wait().unwrap().is_none(),
            "{number}: it was signalled"
        );
    }
    innocent.kill().unwrap();
    innocent.wait().unwrap();
}

#[test]
fn a_damaged_run_record_keeps_nobody_alive() {
    for damage in ["", "{", "null", "{\"vm\":\"web\"}", "\u{0}\u{0}\u{0}"] {
        let project = Project::new("run-json", ONE);
        project.run(&["up"]).exits(0);
        project.write_state("vms/web/run.json", damage);
        project.run(&["status"]).exits(0);
        let up = project.run(&["up", "--json"]).exits(1);
        up.prints("run.json").prints("castra down web");
        let down = project.run(&["down", "--json"]).exits(0);
        down.prints("run.json");
        // Whether its disk was to be kept nobody knows any more, so it is kept, and named.
        down.prints("web.qcow2");
        assert!(project.state("overlays/web.qcow2").exists());
        project.assert_no_process();
        assert_ne!(project.vm("web")["state"], "running");
        project.run(&["up"]).exits(0);
        project.down();
    }
}

#[test]
fn a_run_record_that_is_gone_hides_no_vm_from_down() {
    let project = Project::new("run-gone", ONE);
    project.run(&["up"]).exits(0);
    fs::remove_file(project.state("vms/web/run.json")).unwrap();
    let up = project.run(&["up", "--json"]).exits(1);
    up.prints("castra down web");
    project.run(&["down"]).exits(0);
    project.assert_no_process();
    project.run(&["up"]).exits(0);
    project.down();
}

#[test]
fn other_damaged_files_are_no_obstacle() {
    let project = Project::new("damaged", ONE);
    const FILES: [&str; 5] = [
        "guests.json",
        "broker.json",
        "handshakes/web.json",
        "vms/web/stop.json",
        "workspace.json",
    ];
    project.run(&["up"]).exits(0);
    let id = fs::read_to_string(project.state("vms/web/run.json")).unwrap();
    assert!(id.contains("launch_id"));
    for file in FILES {
        project.write_state(file, "{\"torn");
        project.run(&["status"]).exits(0);
        project.pid("web");
    }
    project.down();
    for file in FILES {
        project.write_state(file, "{\"torn");
    }
    project.run(&["up"]).exits(0);
    project.pid("web");
    project.down();
}

#[test]
fn a_stop_mark_of_an_earlier_launch_means_nothing() {
    let project = Project::new("stop-json", ONE);
    project.run(&["up"]).exits(0);
    project.down();
    assert!(project.state("vms/web/stop.json").exists());
    let mark = fs::read_to_string(project.state("vms/web/stop.json")).unwrap();
    project.run(&["up"]).exits(0);
    project.write_state("vms/web/stop.json", &mark);
    project.pid("web");
    project.down();
}

#[test]
fn an_overlay_removed_underneath_is_no_obstacle() {
    let project = Project::new("overlay-gone", ONE);
    project.run(&["up"]).exits(0);
    fs::remove_file(project.state("overlays/web.qcow2")).unwrap();
    let down = project.down().objects();
    assert!(
        !down.iter().any(|event| is_phase(event, "overlay-discarded")),
        "{down:#?}"
    );
    project.run(&["up"]).exits(0);
    project.down();
}

#[test]
fn a_torn_journal_is_made_whole() {
    let project = Project::new("journal", ONE);
    project.run(&["up"]).exits(0);
    let path = project.state("logs/events.jsonl");
    let mut kept = fs::read_to_string(&path).unwrap();
    kept.push_str("{\"type\":\"message\",\"v\":1,\"te");
    fs::write(&path, kept).unwrap();
    project.down();
}

#[test]
fn a_broker_that_was_killed_comes_back_on_its_port() {
    let project = Project::new("broker", ONE);
    project.run(&["up"]).exits(0);
    let before = project.status()["broker"].clone();
    let pid = i32::try_from(before["pid"].as_i64().unwrap()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    until("its end", || project.status()["broker"]["state"] == "offline");
    project.run(&["up"]).exits(0);
    let after = project.status()["broker"].clone();
    assert_eq!(before["port"], after["port"]);
    assert_ne!(before["pid"], after["pid"]);

    // Another process has the port meanwhile: it is named, and the VM goes on.
    let pid = i32::try_from(after["pid"].as_i64().unwrap()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    until("its end", || project.status()["broker"]["state"] == "offline");
    let port = u16::try_from(after["port"].as_u64().unwrap()).unwrap();
    let thief = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let ran = project.run(&["up"]);
    assert!(
        ran.code != Some(0) && ran.stderr.contains(&format!("pid {}", std::process::id())),
        "{ran:?}"
    );
    project.pid("web");
    drop(thief);
    project.down();
}

#[test]
fn a_broker_alone_is_stopped_by_down() {
    let project = Project::new("broker-only", ONE);
    project.run(&["up", "--broker-only"]).exits(0);
    assert_eq!(project.status()["broker"]["state"], "running");
    project.down();
    assert_eq!(project.status()["broker"]["state"], "offline");
}
