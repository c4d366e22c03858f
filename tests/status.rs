//! `status` on a state root as a running fleet leaves it: real files, real locks, no QEMU.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use castra::core::cancel::Cancel;
use castra::core::failure::{Exit, Failure};
use castra::core::host::FileLock;
use castra::core::operations::status::{StatusAllOutcome, StatusOptions, status, status_all};
use castra::core::reporter::Silent;
use castra::core::root::handshake_record::RecordWriter;
use castra::core::root::project::{Declared, Project};
use castra::core::root::records::{RunPhase, StopRecord, WorkspaceRecord, save};
use castra::core::status::{BrokerState, StatusOutcome, VmState};

use support::CASTRA;
use support::fleet::Fleet;

/// The project whose config names these VMs; none: it has no config.
fn project(fleet: &Fleet, vms: &[&str]) -> Project {
    let declared = vms.iter().map(|name| Declared {
        name: name.parse().unwrap(),
        role: "declared".into(),
        cpus: 1,
        memory_bytes: 1 << 30,
        forwards: Vec::new(),
        settings: Default::default(),
    });
    Project {
        project: "demo".into(),
        workspace: "demo-1a2b3c4d".into(),
        config_path: fleet.dir().join("castra.toml"),
        state: fleet.state.clone(),
        freshness: Duration::from_secs(30),
        broker_port: None,
        vms: (!vms.is_empty()).then(|| declared.collect()),
    }
}

fn ask(project: Project) -> Result<StatusOutcome, Failure> {
    let cancel = Cancel::new();
    status(StatusOptions { project, cancel }, &mut Silent)
}

/// `name state broker` of each VM.
fn told(status: &StatusOutcome) -> Vec<String> {
    let vms = status.vms.iter();
    vms.map(|vm| format!("{} {} {}", vm.name, vm.state.as_str(), vm.broker.as_str()))
        .collect()
}

#[test]
fn a_fleet_is_told_from_its_locks_and_records() {
    let mut fleet = Fleet::new();
    let vms = ["web-0", "web-1", "db", "idle", "new", "old"];
    assert_eq!(
        told(&ask(project(&fleet, &vms)).unwrap()).len(),
        6,
        "without a state of its own"
    );
    fleet.launch("web-0", 60_000);
    fleet.launch("web-1", 60_000);
    fleet.launch("db", 60_000);
    fleet.launch("old", 60_000);
    fleet.launch("leftover-10", 60_000);
    fleet.launch("leftover-9", 60_000);
    fleet.run("gone", 60_000, |_| {});
    fleet.run("new", 10, |run| run.phase = RunPhase::Starting);
    let new = fleet.state.vm(&"new".parse().unwrap());
    let _launching = FileLock::try_take(&new.lock(), "castra up").unwrap();
    fleet.heard("web-0", 400);
    fleet.heard("web-1", 46_000);
    fleet.heard("db", 61_000);
    fleet.heard("old", 500);
    fleet.kill("old");
    fleet.start_broker(59_000);

    let status = ask(project(&fleet, &vms)).unwrap();
    let expected = [
        "web-0 running reachable",
        "web-1 running waiting",
        "db running waiting",
        "idle stopped waiting",
        "new starting waiting",
        "old stopped waiting",
        "leftover-9 running waiting",
        "leftover-10 running waiting",
    ];
    assert_eq!(told(&status), expected);
    assert_eq!(status.broker.pid, Some(std::process::id()));
    assert_eq!(status.vms[0].pid, Some(fleet.qemu_pid()));
    assert_eq!((status.vms[0].cpus, status.vms[3].cpus), (Some(2), Some(1)));
    let age = status.vms[0].last_handshake_age_ms.unwrap();
    assert!((400..10_000).contains(&age), "{age}");
    assert_eq!(status.vms[2].last_handshake_age_ms, None, "it was launched since");
    assert!(status.vms[0].bus_session && !status.vms[0].bus_subscribed);

    let without_config = ask(project(&fleet, &[])).unwrap();
    let names: Vec<&str> = without_config.vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "db",
            "gone",
            "leftover-9",
            "leftover-10",
            "new",
            "old",
            "web-0",
            "web-1"
        ]
    );

    fleet.kill_broker();
    let status = ask(project(&fleet, &vms)).unwrap();
    assert_eq!(status.broker.state, BrokerState::Offline);
    assert!(!status.reachable && status.vms.iter().all(|vm| !vm.bus_session));
    assert!(
        status.vms[0].last_handshake_age_ms.unwrap() >= age,
        "ages grow on"
    );
}

#[test]
fn a_stop_is_told_step_by_step() {
    let mut fleet = Fleet::new();
    fleet.launch("web-0", 60_000);
    let paths = fleet.state.vm(&"web-0".parse().unwrap());
    let state = |fleet: &Fleet| ask(project(fleet, &["web-0"])).unwrap().vms.remove(0);
    let stop = |launch_id: &str| StopRecord {
        launch_id: launch_id.into(),
        by: "castra down".into(),
        at: "2026-11-21T10:00:00.000Z".into(),
    };
    save(&paths.stop(), &stop("an-earlier-one")).unwrap();
    assert_eq!(state(&fleet).state, VmState::Running);
    save(&paths.stop(), &stop("launch-of-web-0")).unwrap();
    assert_eq!(state(&fleet).state, VmState::Stopping);
    fleet.kill("web-0");
    let tidying = FileLock::try_take(&paths.lock(), "castra down").unwrap();
    assert_eq!(state(&fleet).state, VmState::Stopping);
    drop(tidying);
    let vm = state(&fleet);
    assert_eq!((vm.state, vm.pid), (VmState::Stopped, None));
    assert!(vm.ended.is_some());
}

#[test]
fn an_end_is_told_from_the_logs() {
    let mut fleet = Fleet::new();
    fleet.launch("web-0", 60_000);
    fleet.kill("web-0");
    let paths = fleet.state.vm(&"web-0".parse().unwrap());
    fs::write(
        paths.file("qmp.log"),
        "{\"return\": {}}\r\n{\"timestamp\": {\"seconds\": 1795255200, \"microseconds\": 0}, \
         \"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-reset\"}}\r\n",
    )
    .unwrap();
    fs::write(
        paths.file("serial.log"),
        "Kernel panic - not syncing: \u{1b}[31mVFS\r\n",
    )
    .unwrap();
    let vm = ask(project(&fleet, &["web-0"])).unwrap().vms.remove(0);
    assert_eq!(vm.state, VmState::Crashed);
    let ended = vm.ended.unwrap();
    assert_eq!(ended.reason, "guest-reset");
    assert_eq!(ended.at.as_deref(), Some("2026-11-21T10:00:00.000Z"));
    assert_eq!(
        ended.last_words.as_deref(),
        Some("Kernel panic - not syncing: \\x1b[31mVFS")
    );
}

#[test]
fn pid_files_prove_nothing_by_their_content() {
    let fleet = Fleet::new();
    for (index, pid) in [
        std::process::id().to_string(),
        "1".into(),
        "0".into(),
        "-1".into(),
    ]
    .iter()
    .enumerate()
    {
        let name = format!("web-{index}");
        fleet.run(&name, 1_000, |_| {});
        fs::write(fleet.state.vm(&name.parse().unwrap()).qemu_pid(), pid).unwrap();
    }
    fs::write(fleet.state.broker_pid(), std::process::id().to_string()).unwrap();
    let status = ask(project(&fleet, &[])).unwrap();
    assert_eq!(status.broker.state, BrokerState::Offline);
    assert_eq!(status.vms.len(), 4);
    assert!(
        status
            .vms
            .iter()
            .all(|vm| vm.pid.is_none() && vm.state == VmState::Stopped)
    );
}

#[test]
fn a_young_broker_is_given_half_a_second() {
    let mut fleet = Fleet::new();
    fleet.launch("web-0", 60_000);
    let waited = |fleet: &Fleet| {
        let began = Instant::now();
        let status = ask(project(fleet, &["web-0"])).unwrap();
        (status.reachable, began.elapsed())
    };
    fleet.start_broker(0);
    let (reachable, took) = waited(&fleet);
    assert!(!reachable && took < Duration::from_secs(5), "{took:?}");
    let old_enough = ask(project(&fleet, &["web-0"])).unwrap();
    assert!(!old_enough.reachable);

    // A guest whose handshake comes meanwhile ends the wait.
    fleet.kill_broker();
    fleet.start_broker(0);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| ask(project(&fleet, &["web-0"])).unwrap());
        fleet.heard("web-0", 0);
        assert!(asked.join().unwrap().reachable);
    });

    // Who asks to stop isn't kept waiting, and a broker without VMs is no reason to wait.
    let cancel = Cancel::new();
    cancel.request();
    let options = StatusOptions {
        project: project(&fleet, &["web-0"]),
        cancel,
    };
    status(options, &mut Silent).unwrap();
}

#[test]
fn damaged_files_are_reported_not_fatal() {
    let mut fleet = Fleet::new();
    fleet.launch("web-0", 60_000);
    fleet.heard("web-0", 100);
    fleet.start_broker(60_000);
    let paths = fleet.state.vm(&"web-0".parse().unwrap());
    fs::write(paths.run(), "{").unwrap();
    fs::write(paths.stop(), "[]").unwrap();
    fs::write(fleet.state.broker_json(), "\0").unwrap();
    fs::write(fleet.state.handshake(&"web-0".parse().unwrap()), "x").unwrap();
    let mut events = Vec::new();
    let options = StatusOptions {
        project: project(&fleet, &["web-0"]),
        cancel: Cancel::new(),
    };
    let status = status(options, &mut events).unwrap();
    assert_eq!(told(&status), ["web-0 running waiting"]);
    assert_eq!(events.len(), 4, "{events:?}");
    assert_eq!(status.broker.state, BrokerState::Running);
}

#[test]
fn a_state_root_that_cannot_be_read_is_a_failure() {
    let fleet = Fleet::new();
    fs::write(fleet.state.vms(), "a file").unwrap();
    let failure = ask(project(&fleet, &["web-0"])).unwrap_err();
    assert_eq!(failure.exit, Exit::Io);
    let all = status_all(vec![project(&fleet, &[])], &mut Silent);
    assert!(all.projects.is_empty());
}

#[test]
fn nothing_is_changed() {
    let mut fleet = Fleet::new();
    fleet.launch("web-0", 60_000);
    fleet.launch("web-1", 60_000);
    fleet.kill("web-1");
    fleet.heard("web-0", 100);
    fleet.start_broker(60_000);
    let before = listing(fleet.dir());
    // In a read-only directory status answers all the same.
    let dirs = [
        fleet.state.dir().to_owned(),
        fleet.state.vms(),
        fleet.state.handshakes(),
    ];
    for dir in &dirs {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o500)).unwrap();
    }
    for _ in 0..20 {
        ask(project(&fleet, &["web-0", "web-1", "web-2"])).unwrap();
        ask(project(&fleet, &[])).unwrap();
    }
    for dir in &dirs {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    assert_eq!(listing(fleet.dir()), before);
}

/// Every file with length, inode and time of last change of its content.
fn listing(dir: &Path) -> BTreeMap<String, (u64, u64, i64, i64)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let meta = entry.metadata().unwrap();
        let times = (meta.len(), meta.ino(), meta.mtime(), meta.mtime_nsec());
        found.insert(entry.path().display().to_string(), times);
        if meta.is_dir() {
            found.extend(listing(&entry.path()));
        }
    }
    found
}

/// The real command, in this directory, with the fleet's directory as its home.
fn castra(fleet: &Fleet, args: &[&str]) -> Command {
    let mut command = Command::new(CASTRA);
    command
        .args(args)
        .current_dir(fleet.dir())
        .env("CASTRA_HOME", fleet.dir().join("home"))
        .env_remove("CASTRA_LOG")
        .stdin(Stdio::null());
    command
}

fn write_config(fleet: &Fleet, vms: &str) {
    let config = format!(
        "[project]\nname = \"demo\"\nstate_dir = \"{}\"\n{vms}",
        fleet.state.dir().display()
    );
    fs::write(fleet.dir().join("castra.toml"), config).unwrap();
}

#[test]
fn the_command_prints_object_table_and_all_projects() {
    let mut fleet = Fleet::new();
    write_config(&fleet, "[[vms]]\nname = \"web\"\ncount = 2\n");
    fleet.launch("web-0", 60_000);
    fleet.heard("web-0", 100);
    fleet.start_broker(60_000);

    let output = castra(&fleet, &["status", "--json"]).output().unwrap();
    assert_eq!(
        (output.status.code(), output.stderr.as_slice()),
        (Some(0), &b""[..])
    );
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "one object on one line");
    let status: StatusOutcome = serde_json::from_str(&text).unwrap();
    assert_eq!(
        told(&status),
        ["web-0 running reachable", "web-1 stopped waiting"]
    );

    let output = castra(&fleet, &["status"]).output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    let row = table.lines().find(|line| line.starts_with("web-0 ")).unwrap();
    let cells: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(cells[..4], ["web-0", "-", "running", "reachable"], "{table}");
    // A pipe has the table alone; what it means, whoever asks is told.
    assert!(
        !table.contains("--legend") && !table.contains('\u{1b}'),
        "{table}"
    );
    let explained = castra(&fleet, &["status", "--legend"]).output().unwrap();
    let explained = String::from_utf8(explained.stdout).unwrap();
    assert!(explained.contains("\nBROKER     reachable: "), "{explained}");

    // By its id, after the config has gone.
    let entry = fleet.dir().join("home/projects").join(&status.workspace);
    fs::create_dir_all(&entry).unwrap();
    let record = WorkspaceRecord {
        former_roots: Vec::new(),
        id: status.workspace.clone(),
        project: status.project,
        config_path: status.config_path.clone(),
        state_root: status.state_root,
        version: "0.2.0".into(),
    };
    save(&entry.join("workspace.json"), &record).unwrap();
    fs::remove_file(&status.config_path).unwrap();
    let output = castra(&fleet, &["--workspace", &record.id, "status", "--json"])
        .output()
        .unwrap();
    let by_id: StatusOutcome = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told(&by_id), ["web-0 running reachable"]);
    let output = castra(&fleet, &["status", "--all", "--json"]).output().unwrap();
    let all: StatusAllOutcome = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(all.projects.len(), 1);
    assert_eq!(told(&all.projects[0]), ["web-0 running reachable"]);

    // No project here: what runs elsewhere is named.
    let output = castra(&fleet, &["status"]).output().unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(66), &b""[..])
    );
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains(&format!("--workspace {}", record.id)), "{said}");
}

#[test]
fn json_of_a_guest_cannot_fool_a_terminal_and_damage_is_told_on_stderr() {
    let mut fleet = Fleet::new();
    write_config(&fleet, "[[vms]]\nname = \"web\"\n[[vms]]\nname = \"db\"\n");
    fleet.launch("web", 60_000);
    fleet.launch("db", 60_000);
    let mut record = fleet.heard("web", 100);
    record.guest_metrics = Some(serde_json::json!("\u{202e}\u{1b}[2J"));
    RecordWriter::new(fleet.state.handshake(&record.vm))
        .write(&record)
        .unwrap();
    fs::write(fleet.state.handshake(&"db".parse().unwrap()), "torn").unwrap();
    let output = castra(&fleet, &["status", "--json"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.trim_end().bytes().all(|byte| (b' '..=b'~').contains(&byte)),
        "{text}"
    );
    let status: StatusOutcome = serde_json::from_str(&text).unwrap();
    assert_eq!(status.vms[0].guest_metrics, record.guest_metrics);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("db: can't read the handshake record"), "{said}");
}

#[test]
fn watch_goes_on_until_nobody_reads() {
    let fleet = Fleet::new();
    write_config(&fleet, "[[vms]]\nname = \"web\"\n");
    let mut watch = castra(&fleet, &["status", "--watch", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    serde_json::from_str::<StatusOutcome>(&line).unwrap();
    drop(lines);
    assert!(watch.wait().unwrap().success(), "a closed pipe is no failure");
}

/// Forty guests shake hands as fast as they can while status is asked: every answer is whole,
/// and no VM that was heard is ever shown as never heard.
#[test]
fn no_answer_is_torn_while_records_are_written() {
    let mut fleet = Fleet::new();
    let names: Vec<String> = (0..40).map(|index| format!("web-{index}")).collect();
    for name in &names {
        fleet.launch(name, 60_000);
        fleet.heard(name, 0);
    }
    fleet.start_broker(60_000);
    let declared: Vec<&str> = names.iter().map(String::as_str).collect();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                for name in &names {
                    fleet.heard(name, 0);
                }
            }
        });
        for _ in 0..100 {
            let status = ask(project(&fleet, &declared)).unwrap();
            assert_eq!(status.notes, [], "an unreadable record");
            assert_eq!(status.vms.len(), names.len());
            for vm in &status.vms {
                assert!(vm.reachable && vm.last_handshake_age_ms.is_some(), "{vm:?}");
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
