//! `restart`: what it keeps, what it leaves alone, and what becomes of VMs that fail on the way.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::project::{ONE, Project, SCRIPT, TWO, is_phase, is_waiting};
use crate::support::{CASTRA, eventually, free_port, of_type, until};

/// What a disk is known by: a fresh one is another file. It may get the inode of the one that was removed, so its
/// birth counts, too.
fn disk(project: &Project, vm: &str) -> (u64, Option<SystemTime>) {
    let path = project.state(&format!("overlays/{vm}.qcow2"));
    let meta = fs::metadata(&path).unwrap();
    (meta.ino(), meta.created().ok())
}

fn phases<'e>(events: &'e [Value], vm: &str) -> Vec<&'e str> {
    events
        .iter()
        .filter(|event| event["type"] == "vm.lifecycle" && event["vm"] == vm)
        .filter_map(|event| event["phase"].as_str())
        .collect()
}

fn launch_id(project: &Project, vm: &str) -> String {
    let text = fs::read_to_string(project.state(&format!("vms/{vm}/run.json"))).unwrap();
    let record: Value = serde_json::from_str(&text).unwrap();
    record["launch_id"].as_str().unwrap().to_owned()
}

#[test]
fn a_vm_comes_back_with_its_disk_and_a_new_identity() {
    let project = Project::new("restart", TWO);
    project.run(&["up"]).exits(0);
    let before = (
        project.vm("web"),
        disk(&project, "web"),
        launch_id(&project, "web"),
    );
    let (db, broker) = (project.pid("db"), project.status()["broker"].clone());
    assert_eq!(broker["state"], "running");

    let ran = project.run(&["restart", "web", "--json"]).exits(0);
    let events = ran.objects();
    assert_eq!(
        phases(&events, "web"),
        [
            "shutdown-requested",
            "cooperative-attempted",
            "cooperative-succeeded",
            "shutdown-complete",
            "overlay-prepared",
            "launched"
        ]
    );
    assert_eq!(events[0]["type"], "command.accepted");
    assert_eq!(events[0]["command"], "restart");
    let kept = events.iter().find(|event| is_phase(event, "overlay-prepared"));
    assert_eq!(kept.unwrap()["reused"], true);
    let summary = events.last().unwrap();
    assert_eq!(
        (&summary["operation"], &summary["verdict"]),
        (&"restart".into(), &"all".into())
    );
    assert_eq!(summary["vms"]["total"], 1);

    let after = project.vm("web");
    assert_ne!(after["pid"], before.0["pid"]);
    // The same if nobody took it meanwhile, which the kernel alone decides.
    assert_eq!(after["forwards"][0]["guest"], 22);
    assert_eq!(disk(&project, "web"), before.1);
    assert_ne!(launch_id(&project, "web"), before.2);
    // VMs that weren't named are left alone, and the broker notices nothing.
    assert_eq!(project.pid("db"), db);
    assert_eq!(project.status()["broker"], broker);

    let fresh = project
        .run(&["restart", "web", "--discard", "--json"])
        .exits(0)
        .objects();
    assert!(
        fresh.iter().any(|event| is_phase(event, "overlay-discarded")),
        "{fresh:#?}"
    );
    assert_ne!(disk(&project, "web"), before.1);
    let human = project.run(&["restart"]).exits(0);
    human.prints("2 VMs restarted").prints("restarted (graceful)");
    project.down();
}

#[test]
fn those_that_do_not_run_are_just_started() {
    let project = Project::new("restart-cold", TWO);
    // Nothing was ever up.
    let events = project.run(&["restart", "--json"]).exits(0).objects();
    for vm in ["web", "db"] {
        assert_eq!(phases(&events, vm), ["overlay-prepared", "launched"]);
        project.pid(vm);
    }
    // One has crashed: its disk is still there, and kept.
    let before = disk(&project, "web");
    let pid = i32::try_from(project.pid("web")).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    until("the crash", || project.vm("web")["state"] == "crashed");
    let events = project.run(&["restart", "web", "--json"]).exits(0).objects();
    assert_eq!(
        phases(&events, "web")
            .iter()
            .filter(|phase| **phase != "exited")
            .collect::<Vec<_>>(),
        [&"overlay-prepared", &"launched"]
    );
    assert_eq!(disk(&project, "web"), before);
    project.down();
    // After `down` there is none to keep.
    let events = project.run(&["restart", "web", "--json"]).exits(0).objects();
    let made = events.iter().find(|event| is_phase(event, "overlay-prepared"));
    assert_eq!(made.unwrap()["reused"], false);
    project.down();
}

#[test]
fn one_that_will_not_go_is_made_to_and_delays_no_other() {
    let vms = TWO.replacen(
        "kernel",
        "qemu_args = [\"-fake\", \"ignore-powerdown\"]\nkernel",
        1,
    );
    let project = Project::new("restart-slow", &vms);
    project.run(&["up"]).exits(0);
    let ran = project.run(&["restart", "web", "--json", "--graceful-wait-secs", "0"]);
    assert_eq!(
        phases(&ran.exits(0).objects(), "web"),
        [
            "shutdown-requested",
            "cooperative-attempted",
            "cooperative-timed-out",
            "escalated",
            "shutdown-complete",
            "overlay-prepared",
            "launched"
        ]
    );
    let web = i32::try_from(project.pid("web")).unwrap();
    let mut restart = project.begin("", &["restart", "--graceful-wait-secs", "600"]);
    restart.until("the other one's launch", |event| {
        event["vm"] == "db" && is_phase(event, "launched")
    });
    project.pid("db");
    kill(Pid::from_raw(web), Signal::SIGKILL).unwrap();
    assert_eq!(restart.end().0, Some(0));
    project.pid("web");
    project.down_at_once();
}

#[test]
fn one_that_fails_keeps_no_other_from_restarting_and_its_disk_stays() {
    let project = Project::new("restart-fails", TWO);
    project.run(&["up"]).exits(0);
    let before = disk(&project, "web");
    let failing = TWO.replacen(
        "kernel",
        "qemu_args = [\"-fake\", \"refuse=not today\"]\nkernel",
        1,
    );
    project.config(&failing);
    let ran = project.run(&["restart", "--json"]).exits(1);
    let events = ran.objects();
    assert_eq!(events.last().unwrap()["verdict"], "some");
    ran.prints("not today").prints("castra restart web");
    project.pid("db");
    assert_ne!(project.vm("web")["state"], "running");
    assert_eq!(disk(&project, "web"), before);
    assert_eq!(project.status()["broker"]["state"], "running");
    project.config(TWO);
    project.run(&["restart", "web"]).exits(0);
    assert_eq!(disk(&project, "web"), before);
    project.down();
}

#[test]
fn what_can_be_found_wrong_before_leaves_all_as_they_are() {
    let project = Project::new("restart-refused", ONE);
    project.run(&["up"]).exits(0);
    let pid = project.pid("web");
    project
        .refused(64, &["restart", "wbe"])
        .alone()
        .advises("did you mean `web`?");
    project.refused(64, &["restart", "--plan"]).alone();
    project.config(&format!("{ONE}[vms.bootstrap]\nmode = \"always\"\n"));
    project.refused(65, &["restart"]).alone();
    // A disk that the config no longer describes is no disk to go on with.
    project.config(&format!("{ONE}disk_size = \"1 MiB\"\n"));
    project
        .refused(65, &["restart"])
        .alone()
        .tells(&["castra.toml:18:13: ", "can't be shrunk"])
        .advises("--discard");
    project.config(&format!("{ONE}overlay = \"other.qcow2\"\n"));
    let ran = project.run(&["restart"]).exits(1);
    ran.tells("other.qcow2").tells("web.qcow2");
    // A port that somebody else has, and one that it has itself.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let wants = |port: u64| format!("{ONE}[[vms.port_forwards]]\nhost = {port}\nguest = 22\n");
    let port = taken.local_addr().unwrap().port();
    project.config(&wants(port.into()));
    project
        .refused(75, &["restart"])
        .alone()
        .tells(&[&port.to_string()]);
    assert_eq!(project.pid("web"), pid);
    let own = free_port();
    drop(taken);
    for _ in 0..2 {
        project.config(&wants(own.into()));
        project.run(&["restart"]).exits(0);
        assert_eq!(project.vm("web")["forwards"][0]["host"], own);
    }
    assert_ne!(project.pid("web"), pid);
    project.down();
}

#[test]
fn a_bootstrap_under_way_ends_as_stopped_by_restart() {
    let project = Project::new("restart-bootstrap", &format!("{ONE}{SCRIPT}"));
    let mut up = project.begin("", &["up"]);
    up.until("a bootstrap", is_waiting);
    project.run(&["restart", "--bootstrap", "skip"]).exits(0);
    let (code, events) = up.end();
    assert_eq!(code, Some(1));
    let failed = of_type(&events, "bootstrap.failed");
    assert!(
        failed[0].to_string().contains("stopped by castra restart"),
        "{failed:#?}"
    );
    project.pid("web");

    // One that was killed has no end: that is made up for.
    let mut up = project.begin("", &["up"]);
    up.until("a bootstrap", is_waiting);
    up.signal(Signal::SIGKILL);
    drop(up);
    let ran = project.run(&["restart", "--bootstrap", "skip"]).exits(0);
    ran.tells("counts as failed");
    project.down();
}

#[test]
fn ctrl_c_while_one_stops_starts_nothing_and_keeps_its_disk() {
    let vms = ONE.replacen(
        "kernel",
        "qemu_args = [\"-fake\", \"ignore-powerdown\"]\nkernel",
        1,
    );
    let project = Project::new("restart-interrupted", &vms);
    project.run(&["up"]).exits(0);
    let before = disk(&project, "web");
    let mut restart = project.begin("", &["restart", "--graceful-wait-secs", "6"]);
    restart.until("the power button", |event| {
        is_phase(event, "cooperative-attempted")
    });
    restart.signal(Signal::SIGINT);
    let (code, events) = restart.end();
    assert_eq!(code, Some(130), "{events:#?}");
    assert!(
        !events.iter().any(|event| is_phase(event, "launched")),
        "{events:#?}"
    );
    assert_eq!(project.vm("web")["state"], "stopped");
    assert_eq!(disk(&project, "web"), before);
    project.run(&["restart"]).exits(0);
    assert_eq!(disk(&project, "web"), before);
    project.down_at_once();
}

/// What the guest wrote belongs to the blocks of another image: kept over the new one it is garbage.
#[test]
fn a_base_rewritten_under_a_kept_disk_is_refused() {
    let vm = "[[vms]]\nname = \"web\"\nbase_image = \"base.raw\"\n";
    for persist in [true, false] {
        let project = Project::new("base-changed", &format!("{vm}persist = {persist}\n"));
        project.castra().write("base.raw", &"\0".repeat(1 << 20));
        project.run(&["up"]).exits(0);
        let command: &[&str] = match persist {
            true => {
                project.run(&["down"]).exits(0);
                project.run(&["up"]).exits(0);
                project.run(&["down"]).exits(0);
                &["up"]
            }
            false => &["restart"],
        };
        project.castra().write("base.raw", &"\0".repeat(1 << 21));
        if !persist {
            let ran = project.run(&["doctor"]);
            ran.prints("was rewritten while the VM runs");
        }
        let ran = project.run(command);
        assert!(
            ran.code != Some(0) && ran.stderr.contains("base.raw was rewritten"),
            "{ran:?}"
        );
        // This holds as long as the disk exists.
        let ran = project.run(command);
        assert!(
            ran.code != Some(0) && ran.stderr.contains("base.raw was rewritten"),
            "{ran:?}"
        );
        match persist {
            true => project.run(&["down", "--discard"]).exits(0),
            false => project.run(&["restart", "--discard"]).exits(0),
        };
        project.run(&["up"]).exits(0);
        project.run(&["down", "--discard"]).exits(0);
        project.assert_no_process();
    }
}

/// A launch in a time namespace and hellos outside of it are told by one clock.
#[test]
fn a_restart_in_a_time_namespace_makes_no_guest_unheard() {
    let project = Project::new("time-namespace", ONE);
    project.config_with("[broker]\nport = 0\nauth = \"open\"\n", ONE);
    project.run(&["up"]).exits(0);
    for shift in ["100000", "-60"] {
        let mut command = project.castra().command_of("unshare");
        command.args(["--time", "--boottime", shift, "--fork", CASTRA, "restart"]);
        let ran = crate::support::project::finish(command, &["restart"]);
        if ran.stderr.starts_with("unshare: ") {
            eprintln!(
                "no time namespace is to be had here, so nothing was tried: {}",
                ran.stderr
            );
            break;
        }
        ran.exits(0);
        let port = u16::try_from(project.status()["broker"]["port"].as_u64().unwrap()).unwrap();
        let mut guest = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        std::io::Write::write_all(&mut guest, b"hello vm:web\n").unwrap();
        let mut said = String::new();
        std::io::Read::read_to_string(&mut guest, &mut said).unwrap();
        assert!(said.ends_with("ok\n"), "{said}");
        // A second handshake within 250 ms reaches the record with the next write.
        let vm = eventually("a handshake that counts", || {
            Some(project.vm("web")).filter(|vm| vm["reachable"] == true)
        });
        assert!(vm["uptime_ms"].as_u64().unwrap() < 60_000, "{vm}");
    }
    project.down();
}
