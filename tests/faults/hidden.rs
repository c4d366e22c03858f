//! State that may not be looked at, or that is no regular file: neither is "nothing there", and nobody
//! waits for it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::input::Nobody;
use crate::support::project::{ONE, Project, Refusal, finish};
use crate::support::{CASTRA, Ran, files_below};

#[test]
fn what_may_not_be_looked_at_is_not_absent() {
    let project = Project::new("hidden", ONE);
    let nobody = Nobody::of(&project);
    project.run(&["up"]).exits(0);
    let set = |mode: u32| {
        // Root may look everywhere, and nobody into nothing of root's.
        if nobody.is_none() {
            for dir in [project.state(""), project.castra().home().join("projects")] {
                fs::set_permissions(dir, fs::Permissions::from_mode(mode)).unwrap();
            }
        }
    };
    set(0o000);
    let run = |args: &[&str]| match &nobody {
        Some(nobody) => nobody.run(args),
        None => project.run(args),
    };
    let words = ["ermission denied", "state/vms"];
    Refusal::of(run(&["down", "--json"]).exits(74))
        .tells(&words)
        .alone();
    for args in [
        &["status"][..],
        &["exec", "web", "--", "true"],
        &["cp", "x", "web:"],
        &["ports"],
        &["logs"],
        &["ssh-config"],
    ] {
        let ran = run(args);
        assert_eq!(ran.code, Some(74), "{ran:?}");
        for word in words {
            assert!(ran.stderr.contains(word), "no {word:?}: {ran:?}");
        }
    }
    // Whoever may not see the lock can't know that somebody holds it.
    for args in [&["up"][..], &["restart"], &["bootstrap"], &["clean"], &["down"]] {
        let ran = run(args);
        assert_eq!(ran.code, Some(74), "{ran:?}");
        ran.tells("ermission denied").tells("run castra as the owner");
    }
    for args in [&["workspaces"][..], &["status", "--all"], &["ports", "--all"]] {
        let ran = run(args);
        assert_eq!(ran.code, Some(74), "{ran:?}");
        ran.tells("ermission denied").tells("projects");
    }
    set(0o700);
    // One VM's folder is enough.
    let dir = project.state("vms/web");
    if nobody.is_some() {
        for open in ["", "vms"] {
            fs::set_permissions(project.state(open), fs::Permissions::from_mode(0o755)).unwrap();
        }
    } else {
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o000)).unwrap();
    }
    for args in [&["down"][..], &["status"], &["exec", "web", "--", "true"]] {
        let ran = run(args);
        assert_eq!(ran.code, Some(74), "{ran:?}");
        ran.tells("vms/web/qemu.pid");
    }
    if nobody.is_some() {
        for open in ["", "vms"] {
            fs::set_permissions(project.state(open), fs::Permissions::from_mode(0o700)).unwrap();
        }
    }
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    project.pid("web");
    project.down();
}

/// Ends what hangs; nothing here takes long.
fn run_bounded(project: &Project, args: &[&str]) -> Ran {
    let mut command = project.castra().command_of("timeout");
    command.args(["60", CASTRA]).args(args);
    finish(command, args)
}

#[test]
fn a_named_pipe_in_the_place_of_a_state_file_stops_nobody() {
    const FILES: [&str; 9] = [
        "guests.json",
        "broker.json",
        "workspace.json",
        "vms/web/run.json",
        "vms/web/stop.json",
        "handshakes/web.json",
        "logs/events.jsonl",
        "logs/events-broker.jsonl",
        "vms/web/qmp.log",
    ];
    let project = Project::new("fifo", ONE);
    for file in FILES {
        project.run(&["up"]).exits(0);
        let path = project.state(file);
        let aside = path.with_extension("aside");
        let was_there = path.exists();
        if was_there {
            fs::rename(&path, &aside).unwrap();
        }
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let ran = run_bounded(&project, &["status", "--json"]);
        assert_eq!(ran.code, Some(0), "{file}: {ran:?}");
        for args in [&["doctor"][..], &["events"], &["logs"], &["ports"]] {
            let ran = run_bounded(&project, args);
            assert_ne!(ran.code, Some(124), "{file}: {ran:?}");
        }
        // The broker's state thread answers.
        let ran = run_bounded(&project, &["bus", "publish", "--topic", "x", "--payload", "1"]);
        assert_eq!(ran.code, Some(0), "{file}: {ran:?}");
        remove(&path);
        if was_there {
            fs::rename(&aside, &path).unwrap();
        }
        project.run(&["down"]).exits(0);
        project.assert_no_process();
    }
    for file in ["vms/web/qemu.pid", "broker.pid", "lock", "vms/web/lock"] {
        let path = project.state(file);
        remove(&path);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        for args in [&["status"][..], &["doctor"], &["up"], &["down"]] {
            let ran = run_bounded(&project, args);
            assert_ne!(ran.code, Some(124), "{file}: {ran:?}");
        }
        remove(&path);
        project.run(&["down"]).exits(0);
        project.assert_no_process();
    }
}

#[test]
fn modes_are_the_same_under_every_umask() {
    for umask in ["000", "022", "077"] {
        let project = Project::new("umask", ONE);
        let umask = format!("umask {umask}");
        let command = project.castra().command_under(&umask, &["up", "--quiet"]);
        finish(command, &["up"]).exits(0);
        for dir in [project.state(""), project.castra().home()] {
            for path in files_below(&dir) {
                let meta = fs::symlink_metadata(&path).unwrap();
                // QEMU makes its sockets itself, in a folder that is private.
                let wanted = match meta.is_file() && !path.ends_with("qemu.pid") {
                    true => 0o600,
                    false => continue,
                };
                let mode = meta.permissions().mode() & 0o777;
                assert_eq!(mode, wanted, "{} under umask {umask}", path.display());
                let mode = fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777;
                assert_eq!(
                    mode,
                    0o700,
                    "the folder of {} under umask {umask}",
                    path.display()
                );
            }
        }
        project.down();
    }
}

fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}
