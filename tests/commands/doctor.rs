//! `castra doctor`: what it sees, what it advises, its exit code, and that it writes nothing.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::project::{FAKE_QEMU, ONE, Project, TWO, finish};
use crate::support::{Ran, program, until};

/// Where every id is explained.
const DOC: &str = include_str!("../../docs/DOCTOR.md");

/// A PATH of stand-ins, so that what this machine has or lacks decides nothing. Those named in
/// `without` are left out.
fn path(project: &Project, without: &[&str]) -> PathBuf {
    let dir = project.castra().dir().join("tools");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    let program = |name: &str, says: &str| {
        if !without.contains(&name) {
            program(&dir.join(name), format!("#!/bin/sh\necho '{says}'\n"));
        }
    };
    program("qemu-img", "qemu-img version 7.2.0 (fake)");
    program("ssh", "OpenSSH_9.9p1 Fake-1");
    program("ssh-keygen", "");
    program("curl", "curl 8.1.2 (fake)");
    program("tar", "tar (GNU tar) 1.99");
    // What is called python3 may be a script that needs more than this PATH.
    let asked = Command::new("python3")
        .args(["-c", "import sys; print(sys.executable)"])
        .output()
        .unwrap();
    let python = String::from_utf8(asked.stdout).unwrap();
    symlink(python.trim(), dir.join("python3")).unwrap();
    if !without.contains(&"qemu") {
        symlink(
            FAKE_QEMU,
            dir.join(format!("qemu-system-{}", std::env::consts::ARCH)),
        )
        .unwrap();
    }
    dir
}

fn doctor_in(project: &Project, dir: &Path, path: &Path, args: &[&str]) -> Ran {
    let args = [&["doctor"], args].concat();
    let mut command = project.castra().command(&args);
    command.current_dir(dir).env("PATH", path);
    finish(command, &args)
}

fn doctor(project: &Project, args: &[&str]) -> Ran {
    doctor_in(project, &project.castra().project(), &path(project, &[]), args)
}

fn findings(ran: &Ran) -> Vec<Value> {
    let outcome: Value = serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {ran:?}"));
    assert_eq!(outcome["schema"], "castra.doctor.v1");
    let findings = outcome["findings"].as_array().unwrap().clone();
    let worst = ["error", "warn", "ok"]
        .into_iter()
        .find(|level| findings.iter().any(|finding| finding["level"] == *level));
    assert_eq!(outcome["verdict"].as_str(), worst, "{outcome}");
    for finding in &findings {
        let remedy = finding["remediation"].as_str().unwrap_or_default();
        assert!(
            finding["level"] == "ok" || !remedy.is_empty(),
            "no remedy: {finding}"
        );
        let id = finding["id"].as_str().unwrap();
        assert!(
            DOC.contains(&format!("| `{id}` |")),
            "docs/DOCTOR.md doesn't know {id}"
        );
        assert!(finding["data"].is_object() && !finding["text"].as_str().unwrap().contains('\n'));
    }
    findings
}

/// The finding of this id with this level.
#[track_caller]
fn one<'f>(findings: &'f [Value], id: &str, level: &str) -> &'f Value {
    let found = findings
        .iter()
        .find(|finding| finding["id"] == id && finding["level"] == level);
    found.unwrap_or_else(|| panic!("no {level} of {id} in {findings:#?}"))
}

/// Ids of what isn't ok.
fn wrong(findings: &[Value]) -> Vec<&str> {
    let bad = findings.iter().filter(|finding| finding["level"] != "ok");
    bad.map(|finding| finding["id"].as_str().unwrap()).collect()
}

/// Every path below a directory with what changes when somebody writes.
fn tree(dir: &Path) -> Vec<(PathBuf, u64, SystemTime)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let meta = entry.path().symlink_metadata().unwrap();
        found.push((entry.path(), meta.len(), meta.modified().unwrap()));
        if meta.is_dir() {
            found.extend(tree(&entry.path()));
        }
    }
    found.sort();
    found
}

#[test]
fn without_a_config_the_host_is_looked_at() {
    let project = Project::new("doctor-host", ONE);
    let elsewhere = project.castra().dir().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let ran = doctor_in(&project, &elsewhere, &path(&project, &[]), &["--json"]).exits(0);
    let seen = findings(&ran);
    let qemu = one(&seen, "qemu.binary", "ok");
    assert_eq!(qemu["data"]["version"], "7.2.0");
    one(&seen, "qemu.features", "ok");
    assert_eq!(one(&seen, "tool.ssh", "ok")["data"]["version"], "9.9p1");
    assert_eq!(one(&seen, "tool.tar", "ok")["data"]["version"], "1.99");
    for id in ["memory.available", "state.projects", "image.default-guest"] {
        one(&seen, id, "ok");
    }
    assert!(!seen.iter().any(|finding| finding["id"] == "config.valid"));
    assert!(!project.castra().home().exists(), "something was made");

    let text = doctor_in(&project, &elsewhere, &path(&project, &[]), &[]).exits(0);
    text.prints("QEMU 7.2.0, ");
    let quiet = doctor_in(&project, &elsewhere, &path(&project, &[]), &["--quiet"]).exits(0);
    assert!(!quiet.stdout.contains("QEMU 7.2.0, "), "{quiet:?}");
}

#[test]
fn missing_tools_are_errors_where_something_needs_them() {
    let project = Project::new("doctor-tools", ONE);
    let dir = project.castra().project();
    let none = path(&project, &["qemu-img", "ssh", "curl", "tar", "qemu"]);
    let ran = doctor_in(&project, &dir, &none, &["--json"]).exits(1);
    let seen = findings(&ran);
    let image = one(&seen, "tool.qemu-img", "error");
    assert!(
        image["remediation"]
            .as_str()
            .unwrap()
            .contains("apt install qemu-utils")
    );
    // No VM here is bootstrapped or comes from a URL.
    one(&seen, "tool.ssh", "warn");
    one(&seen, "tool.curl", "warn");
    // Its config names a QEMU; without one there is none.
    one(&seen, "qemu.binary", "ok");
    let elsewhere = project.castra().dir().to_owned();
    let ran = doctor_in(&project, &elsewhere, &none, &["--json"]).exits(1);
    let seen = findings(&ran);
    if !Path::new("/usr/libexec/qemu-kvm").exists() {
        assert!(
            one(&seen, "qemu.binary", "error")["remediation"]
                .as_str()
                .unwrap()
                .contains("install QEMU")
        );
    }
    one(&seen, "tool.ssh", "error");
}

#[test]
fn a_config_that_cannot_be_used_is_a_finding() {
    let project = Project::new("doctor-config", ONE);
    project.castra().write("castra.toml", "[[vms]]\nname = 7\n");
    let seen = findings(&doctor(&project, &["--json"]).exits(1));
    let invalid = one(&seen, "config.invalid", "error");
    assert!(
        invalid["text"].as_str().unwrap().contains("castra.toml:2:8"),
        "{invalid}"
    );
    one(&seen, "qemu.binary", "ok");
    // A missing file that was named on the command line is a failure, not a finding.
    doctor(&project, &["--config", "none.toml"]).exits(66);
    doctor(&project, &["--workspace", "none"]).exits(66);
}

#[test]
fn a_fleet_in_order_has_nothing_wrong_and_nothing_is_written() {
    let project = Project::new("doctor-fine", TWO);
    project.run(&["up"]).exits(0);
    until("both to run", || {
        let status = project.status();
        let vms = status["vms"].as_array().unwrap();
        vms.iter().all(|vm| vm["state"] == "running")
    });
    let before = tree(project.castra().dir());
    let tools = path(&project, &[]);
    let dir = project.castra().project();
    let without_tools = |all: Vec<(PathBuf, u64, SystemTime)>| -> Vec<_> {
        let mut all = all;
        let changes = |path: &Path| {
            // The broker changes files, and so do the stand-ins in this folder; doctor must not.
            path.starts_with(&tools) || path == project.castra().dir().join("tools")
        };
        all.retain(|(path, ..)| !changes(path));
        all
    };
    for args in [&["--json"] as &[&str], &["--all", "--json"], &[]] {
        let ran = doctor_in(&project, &dir, &tools, args).exits(0);
        if args.contains(&"--json") {
            let seen = findings(&ran);
            assert_eq!(wrong(&seen), [""; 0], "{seen:#?}");
            let clean = one(&seen, "state.clean", "ok");
            assert_eq!(clean["data"]["vms_running"], 2);
            one(&seen, "ports.free", "ok");
            one(&seen, "security.auth", "ok");
            one(&seen, "security.network", "ok");
        }
    }
    assert_eq!(without_tools(before), without_tools(tree(project.castra().dir())));
    project.down();
}

#[test]
fn what_earlier_runs_left_is_named_with_its_remedy() {
    let project = Project::new("doctor-stale", TWO);
    project.run(&["up"]).exits(0);
    let pid = |value: &Value| Pid::from_raw(i32::try_from(value.as_i64().unwrap()).unwrap());
    let status = project.status();

    // No broker, but VMs.
    kill(pid(&status["broker"]["pid"]), Signal::SIGKILL).unwrap();
    until("the broker's end", || {
        project.status()["broker"]["state"] == "offline"
    });
    let seen = findings(&doctor(&project, &["--json"]).exits(0));
    assert_eq!(wrong(&seen), ["state.broker-offline"], "{seen:#?}");

    // One VM crashes, the other is of an earlier boot of the host.
    for vm in ["web", "db"] {
        kill(pid(&project.vm(vm)["pid"]), Signal::SIGKILL).unwrap();
        until("its end", || project.vm(vm)["pid"].is_null());
    }
    let run = project.state("vms/db/run.json");
    let text = fs::read_to_string(&run).unwrap();
    let mut record: Value = serde_json::from_str(&text).unwrap();
    record["boot_id"] = "00000000-0000-0000-0000-000000000000".into();
    fs::write(&run, record.to_string()).unwrap();
    let log = fs::File::options()
        .write(true)
        .open(project.state("vms/web/serial.log"))
        .unwrap();
    log.set_len(3 << 30).unwrap();
    let seen = findings(&doctor(&project, &["--json"]).exits(0));
    assert_eq!(
        wrong(&seen),
        ["state.crashed", "state.large-log", "state.earlier-boot"],
        "{seen:#?}"
    );
    let crashed = one(&seen, "state.crashed", "warn");
    assert_eq!(crashed["data"]["vm"], "web");
    let remedy = crashed["remediation"].as_str().unwrap();
    assert!(
        remedy.contains("castra --workspace faults-") && remedy.contains("down web`"),
        "{remedy}"
    );

    // `down` was right.
    project.run(&["down"]).exits(0);
    let seen = findings(&doctor(&project, &["--json"]).exits(0));
    assert!(!wrong(&seen).contains(&"state.crashed"), "{seen:#?}");

    // A start that was interrupted; a disk that nobody uses.
    record["boot_id"] = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap()
        .trim()
        .into();
    record["phase"] = "starting".into();
    fs::create_dir_all(project.state("vms/db")).unwrap();
    fs::write(&run, record.to_string()).unwrap();
    fs::write(project.state("vms/db/qemu.pid"), "1\n").unwrap();
    let _ = fs::remove_file(project.state("vms/db/qmp.log"));
    let _ = fs::remove_file(project.state("vms/db/stop.json"));
    fs::create_dir_all(project.state("overlays")).unwrap();
    fs::write(project.state("overlays/lost.qcow2"), "disk").unwrap();
    let seen = findings(&doctor(&project, &["--json"]).exits(0));
    one(&seen, "state.half-started", "warn");
    let disk = one(&seen, "state.disk", "warn");
    assert_eq!(disk["data"]["vm"], "lost");
    project.run(&["clean", "--force"]).exits(0);
}

#[test]
fn ports_and_open_doors_are_found() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let project = Project::new("doctor-doors", ONE);
    let forward = format!("{ONE}[[vms.port_forwards]]\nhost = {port}\nguest = 80\n");
    project.config_with("[broker]\nport = 0\nauth = \"open\"\n", &forward);
    fs::create_dir_all(project.state("")).unwrap();
    fs::set_permissions(project.state(""), fs::Permissions::from_mode(0o755)).unwrap();
    let seen = findings(&doctor(&project, &["--json"]).exits(1));
    assert_eq!(
        wrong(&seen),
        ["ports.conflict", "security.auth", "security.modes"],
        "{seen:#?}"
    );
    let conflict = one(&seen, "ports.conflict", "error");
    assert_eq!(
        (&conflict["data"]["port"], &conflict["data"]["vm"]),
        (&port.into(), &"web".into())
    );
    assert_eq!(conflict["data"]["owner"]["kind"], "process");
    let modes = one(&seen, "security.modes", "warn");
    assert!(
        modes["remediation"].as_str().unwrap().starts_with("`chmod 700 "),
        "{modes}"
    );
    drop(listener);
    let seen = findings(&doctor(&project, &["--json"]).exits(0));
    one(&seen, "ports.free", "ok");
}

#[test]
fn a_fleet_too_large_for_the_host_is_found_before_it_starts() {
    let project = Project::new("doctor-room", ONE);
    project.config(&format!("{ONE}memory = \"60 TiB\"\ncpus = 250\n"));
    let seen = findings(&doctor(&project, &["--json"]).exits(1));
    let memory = one(&seen, "memory.fleet", "error");
    assert!(memory["text"].as_str().unwrap().contains("vm `web`"), "{memory}");
    let cores = one(&seen, "limits.cores", "warn");
    assert_eq!(cores["data"]["vm"], "web");
}

#[test]
fn projects_that_lost_their_config_or_state_are_named() {
    let project = Project::new("doctor-lost", ONE);
    project.run(&["up"]).exits(0);
    let elsewhere = project.castra().dir().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let config = project.castra().project().join("castra.toml");
    fs::rename(&config, elsewhere.join("moved.toml")).unwrap();
    let tools = path(&project, &[]);
    let seen = findings(&doctor_in(&project, &elsewhere, &tools, &["--json"]).exits(0));
    let gone = one(&seen, "state.config-gone", "warn");
    let workspace = gone["data"]["workspace"].as_str().unwrap().to_owned();
    assert!(gone["remediation"].as_str().unwrap().contains(&workspace));
    // What runs of it is still told.
    let seen = findings(
        &doctor_in(
            &project,
            &elsewhere,
            &tools,
            &["--json", "--workspace", &workspace],
        )
        .exits(0),
    );
    assert_eq!(one(&seen, "state.clean", "ok")["data"]["vms_running"], 1);
    let all = findings(&doctor_in(&project, &elsewhere, &tools, &["--json", "--all"]).exits(0));
    assert_eq!(one(&all, "state.clean", "ok")["data"]["vms_running"], 1);
    fs::rename(elsewhere.join("moved.toml"), &config).unwrap();
    project.down();
    fs::remove_dir_all(project.state("")).unwrap();
    let seen = findings(&doctor_in(&project, &elsewhere, &tools, &["--json"]).exits(0));
    assert_eq!(
        one(&seen, "state.root-gone", "warn")["data"]["workspaces"][0],
        workspace.as_str()
    );
}

/// Both hold their lock, so by that alone they run.
#[test]
fn a_broker_that_is_stopped_or_stuck_is_found() {
    let project = Project::new("doctor-silent", ONE);
    project.run(&["up"]).exits(0);
    let broker = i32::try_from(project.status()["broker"]["pid"].as_i64().unwrap()).unwrap();
    let seen = findings(&doctor(&project, &["--json"]));
    assert!(!wrong(&seen).contains(&"state.broker-silent"), "{seen:#?}");
    kill(Pid::from_raw(broker), Signal::SIGSTOP).unwrap();
    let seen = findings(&doctor(&project, &["--json"]).exits(1));
    let silent = one(&seen, "state.broker-silent", "error");
    assert_eq!(silent["data"]["pid"], broker);
    assert!(
        silent["remediation"].as_str().unwrap().contains("-CONT"),
        "{silent}"
    );
    kill(Pid::from_raw(broker), Signal::SIGCONT).unwrap();
    let seen = findings(&doctor(&project, &["--json"]));
    assert!(!wrong(&seen).contains(&"state.broker-silent"), "{seen:#?}");
    project.down();

    // A broker that holds the lock and waits for something that never comes.
    let state = project.state("");
    let script = "import fcntl, os, struct, time\n\
                  file = open('broker.pid', 'r+')\n\
                  lock = struct.pack('hhqqi', fcntl.F_WRLCK, 0, 0, 0, 0)\n\
                  fcntl.fcntl(file, 37, lock)\n\
                  file.write(f'{os.getpid()} castra broker stuck\\n')\n\
                  file.flush()\n\
                  print('held', flush=True)\n\
                  time.sleep(600)\n";
    let mut stuck = Command::new("python3")
        .args(["-c", script])
        .current_dir(&state)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut said = std::io::BufReader::new(stuck.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut said, &mut line).unwrap();
    assert_eq!(line, "held\n");
    let seen = findings(&doctor(&project, &["--json"]).exits(1));
    let silent = one(&seen, "state.broker-silent", "error");
    assert_eq!(silent["data"]["pid"], stuck.id());
    assert!(
        silent["remediation"].as_str().unwrap().contains("-KILL"),
        "{silent}"
    );
    stuck.kill().unwrap();
    stuck.wait().unwrap();
}
