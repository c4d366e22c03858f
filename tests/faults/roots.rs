//! State roots that are changed, removed or moved while VMs run: what runs is found, shown, and ended
//! when somebody asks.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::project::{ONE, Project, TWO, is_phase};
use crate::support::{CASTRA, is_alive, until};

fn doctor(project: &Project) -> Vec<Value> {
    let ran = project.run(&["doctor", "--json"]);
    let outcome: Value = serde_json::from_str(&ran.stdout).unwrap();
    outcome["findings"].as_array().unwrap().clone()
}

fn finding(findings: &[Value], id: &str, vm: &str) -> Option<Value> {
    let found = findings
        .iter()
        .find(|finding| finding["id"] == id && finding["data"]["vm"] == vm);
    found.cloned()
}

/// The project in its new place sees the VM, and its `down` ends it.
fn the_moved_one_has_it_and_ends_it(project: &Project, there: &Path, pid: u32) {
    let run = |args: &[&str]| {
        let mut command = project.castra().command(args);
        command.current_dir(there);
        crate::support::project::finish(command, args)
    };
    let status: Value = serde_json::from_str(&run(&["status", "--json"]).exits(0).stdout).unwrap();
    assert_eq!(status["vms"][0]["pid"], pid);
    run(&["down"]).exits(0);
    assert!(!is_alive(pid));
    project.assert_no_process();
}

fn change_state_dir(project: &Project, from: &str, to: &str) {
    let text = fs::read_to_string(project.castra().project().join("castra.toml")).unwrap();
    let changed = text.replace(from, to);
    assert_ne!(text, changed);
    project.castra().write("castra.toml", &changed);
}

#[test]
fn a_state_dir_that_is_changed_while_vms_run_loses_none() {
    let project = Project::new("state-dir", ONE);
    // From the default place to one of its own, and from there to another.
    change_state_dir(&project, "state_dir = \"state\"\n", "");
    project.run(&["up"]).exits(0);
    let pid = project.pid("web");
    change_state_dir(
        &project,
        "name = \"faults\"\n",
        "name = \"faults\"\nstate_dir = \"one\"\n",
    );
    let busy = project.refused(75, &["up"]);
    let pid_text = format!("pid {pid}");
    busy.tells(&["web", pid_text.as_str()]).advises("castra down");
    assert!(
        !project.castra().project().join("one").exists(),
        "nothing is made"
    );
    for args in [&["restart"][..], &["bootstrap"]] {
        project.refused(75, args).tells(&[pid_text.as_str()]);
    }
    // Whatever looks at the project sees what runs.
    assert_eq!(project.pid("web"), pid);
    let ran = project.run(&["status"]).exits(0);
    ran.tells("castra down").tells("/one");
    let workspaces = project.run(&["workspaces"]).exits(0);
    workspaces.prints("1 VM");
    project.run(&["ssh-config", "web"]).exits(0);
    let down = project.run(&["down", "--json"]).exits(0).objects();
    assert!(
        down.iter().any(|event| is_phase(event, "shutdown-complete")),
        "{down:#?}"
    );
    project.assert_no_process();
    project.run(&["up"]).exits(0);
    assert!(project.castra().project().join("one/vms/web/run.json").exists());
    let second = project.pid("web");
    change_state_dir(&project, "state_dir = \"one\"", "state_dir = \"two\"");
    project
        .refused(75, &["up"])
        .tells(&[format!("pid {second}").as_str()]);
    assert_eq!(project.pid("web"), second);
    project.run(&["down"]).exits(0);
    project.assert_no_process();
    assert_ne!(project.vm("web")["state"], "running");
    // A disk that stays behind is told of when it does, and not ever after.
    project.castra().write("one/overlays/kept.qcow2", "");
    let ran = project.run(&["up"]).exits(0);
    ran.tells("1 disk");
    let ran = project.run(&["up"]).exits(0);
    assert!(!ran.stderr.contains("1 disk"), "{ran:?}");
    project.run(&["down"]).exits(0);
    project.assert_no_process();
}

#[test]
fn a_state_root_that_is_removed_while_vms_run_is_said_and_down_ends_them() {
    let project = Project::new("root-removed", TWO);
    project.run(&["up"]).exits(0);
    let (web, db) = (project.pid("web"), project.pid("db"));
    let broker = u32::try_from(project.status()["broker"]["pid"].as_u64().unwrap()).unwrap();
    fs::remove_dir_all(project.state("")).unwrap();
    until("the end of the broker", || !is_alive(broker));
    assert!(!project.state("").exists(), "the broker made it anew");
    // They are told of, with their pids.
    assert_eq!((project.pid("web"), project.pid("db")), (web, db));
    assert_eq!(project.vm("web")["reachable"], false);
    let ran = project.run(&["status"]).exits(0);
    ran.prints(&web.to_string()).prints("castra down");
    assert!(
        !ran.stdout.contains("castra up"),
        "nothing starts beside them: {ran:?}"
    );
    assert!(project.vm("web")["lost"].as_str().unwrap().contains("removed"));
    for command in [
        &["exec", "web", "--", "true"][..],
        &["ssh", "web"],
        &["cp", "web:a", "."],
    ] {
        let ran = project.run(command).exits(255);
        for said in ["without its state", "removed", "castra down"] {
            ran.tells(said);
        }
    }
    let findings = doctor(&project);
    for (vm, pid) in [("web", web), ("db", db)] {
        let lost = finding(&findings, "state.lost", vm).unwrap_or_else(|| panic!("{findings:#?}"));
        assert_eq!(lost["data"]["pid"], pid);
        assert!(lost["remediation"].as_str().unwrap().contains("down"), "{lost}");
    }
    assert!(
        findings
            .iter()
            .all(|finding| finding["id"] != "state.broker-offline"),
        "{findings:#?}"
    );
    let workspaces = project.run(&["workspaces"]).exits(0);
    workspaces.prints("2 VMs run");
    // No second one beside it.
    project
        .refused(75, &["up", "web"])
        .tells(&["pid", "removed"])
        .advises("castra down");
    assert!(!project.state("").exists());
    // Only the named VM is ended.
    let down = project.run(&["down", "web", "--json"]).exits(0).objects();
    let ended = down
        .iter()
        .find(|event| is_phase(event, "shutdown-complete"))
        .unwrap();
    assert_eq!(
        (&ended["vm"], &ended["outcome"]),
        (&"web".into(), &"terminated".into())
    );
    assert!(!is_alive(web) && is_alive(db));
    let ran = project.run(&["down"]).exits(0);
    ran.tells(&format!("pid {db}"));
    assert!(!project.state("").exists());
    project.assert_no_process();
    let ran = project.run(&["down"]).exits(0);
    assert!(!ran.stderr.contains("has never been up"), "{ran:?}");
    assert_eq!(finding(&doctor(&project), "state.lost", "web"), None);
    project.run(&["up"]).exits(0);
    project.down();
}

#[test]
fn a_state_root_that_is_moved_or_replaced_while_vms_run_is_said_and_down_ends_them() {
    for replaced in [false, true] {
        let project = Project::new("root-moved", ONE);
        project.run(&["up"]).exits(0);
        let pid = project.pid("web");
        let moved = project.castra().project().join("elsewhere");
        fs::rename(project.state(""), &moved).unwrap();
        if replaced {
            copy_all(&moved, &project.state(""));
        }
        assert_eq!(project.pid("web"), pid);
        let lost = finding(&doctor(&project), "state.lost", "web").unwrap();
        assert_eq!(lost["data"]["moved_to"], moved.to_str().unwrap());
        project
            .refused(75, &["up"])
            .tells(&[format!("pid {pid}").as_str()]);
        let clean = project.run(&["clean"]);
        assert!(matches!(clean.code, Some(0 | 75)) && is_alive(pid), "{clean:?}");
        project.run(&["down"]).exits(0);
        assert!(!is_alive(pid));
        project.assert_no_process();
    }
    // Its folder goes with its state: found by the lock, as ever.
    let project = Project::new("project-moved", ONE);
    project.run(&["up"]).exits(0);
    let pid = project.pid("web");
    let there = project.castra().dir().join("there");
    fs::rename(project.castra().project(), &there).unwrap();
    the_moved_one_has_it_and_ends_it(&project, &there, pid);
    fs::rename(&there, project.castra().project()).unwrap();
}

#[test]
fn a_new_project_in_the_place_of_one_that_moved_has_no_say_over_its_vms() {
    let project = Project::new("moved-and-cloned", ONE);
    project.run(&["up"]).exits(0);
    let pid = project.pid("web");
    let there = project.castra().dir().join("there");
    fs::rename(project.castra().project(), &there).unwrap();
    fs::create_dir(project.castra().project()).unwrap();
    for name in ["castra.toml", "vmlinuz"] {
        fs::copy(there.join(name), project.castra().project().join(name)).unwrap();
    }
    assert_ne!(project.vm("web")["state"], "running");
    assert_eq!(finding(&doctor(&project), "state.lost", "web"), None);
    let down = project.run(&["down"]).exits(0);
    assert!(
        is_alive(pid) && !down.stderr.contains(&pid.to_string()),
        "{down:?}"
    );
    project.run(&["up"]).exits(0);
    let own = project.pid("web");
    assert!(own != pid && is_alive(pid));
    project.run(&["down"]).exits(0);
    assert!(is_alive(pid) && !is_alive(own));
    // It belongs to the moved project, as before.
    the_moved_one_has_it_and_ends_it(&project, &there, pid);
}

#[test]
fn a_process_that_only_looks_like_a_lost_vm_is_left_alone() {
    let project = Project::new("look-alike", ONE);
    project.run(&["up"]).exits(0);
    project.down();
    let pid_file = project.state("vms/web/qemu.pid");
    // The right command line, but no lock on any pid file.
    let mut innocent = std::process::Command::new("sleep");
    std::os::unix::process::CommandExt::arg0(&mut innocent, "qemu");
    let script = "exec 3>qemu.pid; rm qemu.pid; while :; do sleep 1; done";
    let mut innocent = std::process::Command::new("sh");
    innocent
        .args(["-c", script, "-name", "web", "-pidfile"])
        .arg(&pid_file);
    let mut innocent = innocent.current_dir(project.castra().project()).spawn().unwrap();
    fs::remove_dir_all(project.state("")).unwrap();
    assert_ne!(project.vm("web")["state"], "running");
    assert_eq!(finding(&doctor(&project), "state.lost", "web"), None);
    project.run(&["down"]).exits(0);
    assert!(innocent.try_wait().unwrap().is_none(), "it was signalled");
    innocent.kill().unwrap();
    innocent.wait().unwrap();
}

/// Regular files alone: a socket can't be copied.
fn copy_all(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        let target = to.join(entry.file_name());
        if kind.is_dir() {
            copy_all(&entry.path(), &target);
        } else if kind.is_file() {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// In a container the same path is another project's.
#[test]
fn a_vm_of_another_mount_namespace_is_nobodys_here() {
    let project = Project::new("mount-namespace", ONE);
    let dir = project.castra().project();
    let kept = project.castra().dir().join("kept");
    copy_all(&dir, &kept);
    let script =
        "mount -t tmpfs castra \"$1\" && cp \"$2\"/* \"$1\" && cd \"$1\" && shift 2 && \"$@\" && rm -r state";
    let mut command = project.castra().command_of("unshare");
    command
        .args(["-r", "-m", "sh", "-c", script, "sh"])
        .args([&dir, &kept])
        .args([CASTRA, "up"]);
    let ran = crate::support::project::finish(command, &["up"]);
    if ran.stderr.starts_with("unshare: ") || ran.stderr.starts_with("mount: ") {
        eprintln!("no mount namespace is to be had here: {}", ran.stderr);
        return;
    }
    ran.exits(0);
    let pid_file = project.state("vms/web/qemu.pid");
    let all = castra::core::host::command_lines();
    let named = |words: &[std::ffi::OsString]| words.iter().any(|word| word == pid_file.as_os_str());
    let pid = all.iter().find(|(_, words)| named(words)).unwrap().0;
    assert_ne!(project.vm("web")["state"], "running");
    project.run(&["down"]).exits(0);
    assert!(is_alive(pid), "it was ended");
    project.run(&["up"]).exits(0);
    project.run(&["down"]).exits(0);
    assert!(is_alive(pid));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}
