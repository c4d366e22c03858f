//! `castra clean`: what goes, what stays, and what it refuses.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::project::{ONE, Project, TWO};

/// Everything below a directory, as paths relative to it.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            found.push(entry.path().strip_prefix(dir).unwrap().to_owned());
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

/// A project that was up and down again, with a persistent disk at `db`.
fn used(name: &str) -> Project {
    let project = Project::new(name, &format!("{ONE}{}", persistent("db")));
    project.run(&["up"]).exits(0);
    project.run(&["down"]).exits(0);
    project.assert_no_process();
    assert!(project.state("overlays/db.qcow2").exists());
    project
}

fn persistent(vm: &str) -> String {
    format!("[[vms]]\nname = \"{vm}\"\nkernel = \"vmlinuz\"\npersist = true\n")
}

fn cleanups(events: &[Value]) -> Vec<(String, u64, bool)> {
    events
        .iter()
        .filter(|event| event["type"] == "cleanup")
        .map(|event| {
            (
                event["category"].as_str().unwrap().to_owned(),
                event["bytes"].as_u64().unwrap(),
                event["dry_run"].as_bool().unwrap(),
            )
        })
        .collect()
}

#[test]
fn what_runs_is_refused_by_its_locks() {
    let project = Project::new("clean-running", TWO);
    project.run(&["up"]).exits(0);
    for args in [&["clean"][..], &["clean", "--dry-run"], &["clean", "--force"]] {
        let pid = project.pid("web").to_string();
        project
            .refused(75, args)
            .alone()
            .tells(&["while it runs", "vm `web`", "vm `db`", &pid, "its broker"])
            .advises("down");
    }
    let all = project.run(&["clean", "--global", "--json"]).exits(1);
    let passed_over =
        |event: &Value| event["severity"] == "error" && event["text"].to_string().contains("while it runs");
    assert!(all.objects().iter().any(passed_over), "{all:?}");
    assert_eq!(project.vm("web")["state"], "running");
    // VMs alone, the broker alone: each of them keeps the project.
    project.run(&["down", "web", "db"]).exits(0);
    project.run(&["up", "--broker-only"]).exits(0);
    project.refused(75, &["clean"]).tells(&["its broker"]);
    project.down();
    project.run(&["clean"]).exits(0);
    assert!(!project.state("").exists());
}

#[test]
fn a_dry_run_tells_exactly_what_a_clean_does() {
    let project = used("clean-dry");
    let before = tree(&project.castra().project());
    let dry = project.run(&["clean", "--dry-run", "--json"]).exits(0).objects();
    assert_eq!(
        tree(&project.castra().project()),
        before,
        "a dry run touched something"
    );
    let real = project.run(&["clean", "--json"]).exits(0).objects();
    let (told, done) = (cleanups(&dry), cleanups(&real));
    assert!(told.iter().all(|(.., dry)| *dry) && done.iter().all(|(.., dry)| !*dry));
    let plain = |list: &[(String, u64, bool)]| {
        list.iter()
            .map(|(kind, bytes, _)| (kind.clone(), *bytes))
            .collect::<Vec<_>>()
    };
    assert_eq!(plain(&told), plain(&done));
    let bytes: u64 = done.iter().map(|(_, bytes, _)| bytes).sum();
    let summary = real.last().unwrap();
    assert_eq!(
        (&summary["type"], summary["bytes"].as_u64()),
        (&"summary".into(), Some(bytes))
    );
    assert_eq!(summary["vms"]["total"], 2);
    assert_eq!(real[0]["type"], "command.accepted");
}

#[test]
fn a_persistent_disk_stays_with_what_it_needs_unless_forced() {
    let project = used("clean-persist");
    fs::write(project.state("overlays/db.qcow2"), [b'd'; 9000]).unwrap();
    let said = project.run(&["clean"]).exits(0);
    said.tells("db.qcow2 stays").tells("--force");
    let left = tree(&project.state(""));
    let left: Vec<&str> = left.iter().map(|path| path.to_str().unwrap()).collect();
    for stays in ["overlays/db.qcow2", "vms/db/run.json", "workspace.json"] {
        assert!(left.contains(&stays), "{stays} is gone: {left:?}");
    }
    for gone in ["vms/web", "logs", "guests.json", "broker.json", "vms/db/qemu.log"] {
        assert!(!left.contains(&gone), "{gone} is left: {left:?}");
    }
    // The next start finds its disk as it was.
    let workspaces = project.run(&["workspaces", "--json"]).exits(0).objects();
    assert_eq!(workspaces[0]["workspaces"].as_array().unwrap().len(), 1);
    let again = project.run(&["clean", "--json"]).exits(0).objects();
    assert_eq!(cleanups(&again), [], "there was nothing more to remove");

    let forced = project.run(&["clean", "--force"]).exits(0);
    forced.prints("db.qcow2");
    assert!(!project.state("").exists(), "{:?}", tree(&project.state("")));
    let workspaces = project.run(&["workspaces", "--json"]).exits(0).objects();
    assert_eq!(
        workspaces[0]["workspaces"].as_array().unwrap().len(),
        0,
        "it is still on record"
    );
    assert_eq!(
        tree(&project.castra().home().join("projects")),
        Vec::<PathBuf>::new()
    );
    let nothing = project.run(&["clean"]).exits(0);
    nothing.prints("nothing to clean");
}

#[test]
fn logs_and_handshakes_stay_where_asked() {
    let project = used("clean-logs");
    fs::create_dir_all(project.state("handshakes")).unwrap();
    fs::write(project.state("handshakes/web.json"), "{}").unwrap();
    let kept = project
        .run(&["clean", "--no-logs", "--no-handshakes", "--force", "--json"])
        .exits(0)
        .objects();
    for stays in [
        "logs/broker.log",
        "vms/web/serial.log",
        "handshakes/web.json",
        "workspace.json",
    ] {
        assert!(project.state(stays).exists(), "{stays} is gone");
    }
    assert!(!project.state("vms/web/run.json").exists() && !project.state("overlays").exists());
    let logs = project.run(&["logs", "web", "--source", "serial"]).exits(0);
    logs.prints("fake guest boots");
    // The journal stays, so it tells of this clean too.
    let journal = fs::read_to_string(project.state("logs/events.jsonl")).unwrap();
    let told = |line: &str| serde_json::from_str::<Value>(line).unwrap();
    let journal: Vec<Value> = journal.lines().map(told).collect();
    assert_eq!(journal[journal.len() - kept.len()..], kept);
    project.run(&["clean", "--no-logs"]).exits(0);
    assert!(!project.state("handshakes").exists() && project.state("logs/broker.log").exists());
    project.run(&["clean"]).exits(0);
    assert!(!project.state("").exists(), "{:?}", tree(&project.state("")));
}

#[test]
fn nothing_that_is_not_castras_is_touched() {
    let project = used("clean-foreign");
    let outside = project.castra().dir().join("outside");
    fs::create_dir_all(&outside).unwrap();
    for file in ["broker.log", "web.qcow2", "run.json", "digest-00.json"] {
        fs::write(outside.join(file), "precious").unwrap();
    }
    // A `state_dir` that the user keeps things of his own in, and links that lead out of it.
    fs::write(project.state("notes.txt"), "mine").unwrap();
    fs::write(project.state("logs/nginx.log"), "mine").unwrap();
    fs::create_dir_all(project.state("images")).unwrap();
    fs::write(project.state("images/debian.qcow2"), "mine").unwrap();
    symlink(outside.join("broker.log"), project.state("logs/broker.log.9")).unwrap();
    symlink(&outside, project.state("logs/harness")).unwrap();
    symlink(&outside, project.state("vms/linked")).unwrap();
    fs::remove_dir_all(project.state("overlays")).unwrap();
    symlink(&outside, project.state("overlays")).unwrap();
    let said = project.run(&["clean", "--force", "--json"]).exits(0);
    let precious = tree(&outside);
    assert_eq!(precious.len(), 4, "{precious:?}\n{}", said.stdout);
    let left: Vec<String> = tree(&project.state(""))
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    assert_eq!(
        left,
        [
            "images",
            "images/debian.qcow2",
            "logs",
            "logs/broker.log.9",
            "logs/harness",
            "logs/nginx.log",
            "notes.txt",
            "overlays",
            "vms",
            "vms/linked"
        ]
    );
    let named = |name: &str| {
        said.stdout
            .contains(&format!("{name} stays: castra didn't make it"))
    };
    assert!(
        named("logs/nginx.log") && named("logs/broker.log.9") && named("images/debian.qcow2"),
        "{}",
        said.stdout
    );
}

#[test]
fn a_state_root_is_cleaned_by_its_path_alone() {
    let project = used("clean-root");
    let root = project.state("").to_str().unwrap().to_owned();
    let other = project.castra().dir().to_str().unwrap().to_owned();
    project
        .refused(66, &["clean", "--state-root", &other])
        .tells(&["isn't a state root of castra"]);
    project
        .refused(64, &["clean", "--state-root", &root, "--global"])
        .tells(&["--state-root and --global"]);
    // Moved with its project: the record in it still says whose it is.
    let moved = project.castra().dir().join("moved");
    fs::rename(&root, &moved).unwrap();
    fs::remove_file(project.castra().project().join("castra.toml")).unwrap();
    project
        .run(&["clean", "--force", "--state-root", moved.to_str().unwrap()])
        .exits(0);
    assert!(!moved.exists(), "{:?}", tree(&moved));
    // Its entry still names the old place: that is lost, and `--global` forgets it.
    let all = project.run(&["clean", "--global", "--json"]).exits(0).objects();
    assert_eq!(
        cleanups(&all)
            .iter()
            .map(|(kind, ..)| kind.as_str())
            .collect::<Vec<_>>(),
        ["workspace"]
    );
    assert_eq!(
        tree(&project.castra().home().join("projects")),
        Vec::<PathBuf>::new()
    );
}

#[test]
fn the_image_cache_goes_when_nobody_needs_it() {
    let project = used("clean-global");
    let images = project.castra().home().join("images");
    fs::create_dir_all(images.join("guest-x86_64-0123456789ab")).unwrap();
    fs::write(images.join("guest-x86_64-0123456789ab/vmlinux"), [0; 9000]).unwrap();
    fs::write(images.join("mine.qcow2"), "mine").unwrap();
    let kept = project.run(&["clean", "--global"]).exits(0);
    kept.tells("a remaining project may need its images");
    assert!(images.join("guest-x86_64-0123456789ab/vmlinux").exists());
    project.run(&["clean", "--global", "--force"]).exits(0);
    assert_eq!(tree(&images), [PathBuf::from("mine.qcow2")]);
}

#[test]
fn an_abandoned_bootstrap_is_closed_before_its_log_is_all_that_is_left() {
    let project = used("clean-abandoned");
    let log = "{\"vm\":\"web\",\"artifact_hash\":null,\"base_hash\":null,\"status\":\"running\",\"noop\":false,\
               \"duration_ms\":0,\"steps\":[],\"error\":null,\"trigger\":\"auto\",\"run_id\":\"r\",\"launch_id\":\"l\",\
               \"started_at\":\"2026-11-21T10:00:00.000Z\",\"version\":\"0.2.0\",\"output\":null}";
    project.write_state("logs/bootstrap/web-20261121T100000.000Z.open", log);
    let said = project.run(&["clean", "--no-logs"]).exits(0);
    said.tells("never ended and counts as failed");
    assert!(
        project
            .state("logs/bootstrap/web-20261121T100000.000Z.json")
            .exists()
    );
}

#[test]
fn what_cannot_be_removed_is_told_and_the_rest_goes() {
    let project = used("clean-readonly");
    // A folder in the place of a file: it can't be unlinked, and isn't castra's.
    fs::remove_file(project.state("guests.json")).unwrap();
    fs::create_dir(project.state("guests.json")).unwrap();
    let said = project.run(&["clean", "--force"]).exits(0);
    said.tells("guests.json stays");
    assert_eq!(tree(&project.state("")), [PathBuf::from("guests.json")]);
    // Somebody is at work on it.
    let project = used("clean-busy");
    let lock = castra::core::host::FileLock::try_take(&project.state("vms/web/lock"), "castra up").unwrap();
    for args in [&["clean"][..], &["clean", "--dry-run"]] {
        let refusal = project.run(args).exits(1);
        refusal.tells("is busy").tells("castra up");
    }
    drop(lock);
    project.run(&["clean"]).exits(0);
}
