//! What is castra's, and what happens to everything else.

use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::core::scratch::Scratch;

#[test]
fn names_have_their_meaning_by_place() {
    let vm = |disk_stays, logs_stay| Folder::Vm {
        disk_stays,
        logs_stay,
    };
    for (place, name, meaning) in [
        (vm(false, false), "run.json", Meaning::File),
        (vm(false, false), "run.json.tmp-12-0a1b2c3d", Meaning::File),
        (vm(false, false), "run.json.tmp-x-0a1b", Meaning::Foreign),
        (vm(false, false), "serial.log", Meaning::File),
        (vm(false, false), "vizier.json", Meaning::File),
        (vm(false, false), "ssh.ctl.Ab3", Meaning::File),
        (vm(false, false), "lock", Meaning::Lock),
        (vm(false, false), "notes.txt", Meaning::Foreign),
        (vm(true, false), "run.json", Meaning::Stays),
        (vm(true, false), "known_hosts", Meaning::Stays),
        (vm(true, false), "qmp.log", Meaning::File),
        (vm(false, true), "qmp.log", Meaning::Stays),
        (Folder::Digests, "digest-00ff.json", Meaning::File),
        (Folder::Digests, "debian.qcow2", Meaning::Foreign),
        (Folder::Handshakes, "web-0.json", Meaning::File),
        (Folder::Handshakes, "web 0.json", Meaning::Foreign),
        (Folder::Logs, "broker.log.12", Meaning::File),
        (Folder::Logs, "events.jsonl", Meaning::File),
        (Folder::Logs, "nginx.log", Meaning::Foreign),
        (Folder::Logs, "bus", Meaning::Folder(Folder::BusLogs)),
        (Folder::BusLogs, "web.v2.log.3", Meaning::File),
        (Folder::BusLogs, "web.txt", Meaning::Foreign),
        (
            Folder::BootstrapLogs,
            "web-20261121T130720.701Z.out",
            Meaning::File,
        ),
        (
            Folder::BootstrapLogs,
            "web-20261121T130720.701Z.sh",
            Meaning::Foreign,
        ),
        (Folder::HarnessLogs, "0199-ab.jsonl.1", Meaning::File),
        (Folder::HarnessLogs, "a b.jsonl", Meaning::Foreign),
        (Folder::GuestState, "ready", Meaning::Foreign),
        (Folder::VizierOf, "service.log.2", Meaning::File),
        (
            Folder::ImageCache,
            "guest-x86_64-0e18529ad9a0.lock",
            Meaning::File,
        ),
        (
            Folder::ImageCache,
            "guest-x86_64-0e18529ad9a0",
            Meaning::Folder(Folder::Whole),
        ),
        (Folder::ImageCache, "mine.qcow2", Meaning::Foreign),
        (
            Folder::Downloads,
            "0123456789abcdef-debian.qcow2.part",
            Meaning::File,
        ),
        (Folder::Downloads, "debian.qcow2", Meaning::Foreign),
    ] {
        assert_eq!(place.meaning(name), meaning, "{place:?} {name}");
    }
    let longest = format!("{}-20261121T130720.701Z.json", "a".repeat(64));
    assert_eq!(Folder::BootstrapLogs.meaning(&longest), Meaning::File);
}

/// A `logs` folder with castra's files and others.
fn filled() -> Scratch {
    let scratch = Scratch::new("clean-sweep");
    for file in [
        "logs/broker.log",
        "logs/bus/bus.log",
        "logs/bus/bus.log.1",
        "outside/broker.log",
    ] {
        let path = scratch.path(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, [b'x'; 5000]).unwrap();
    }
    scratch
}

#[test]
fn castras_own_goes_with_the_folders_it_leaves_empty() {
    let scratch = filled();
    let root = Dir::open(scratch.dir()).unwrap();
    let looked = sweep_folder(&root, "logs", Folder::Logs, true);
    assert!(scratch.path("logs/bus/bus.log").exists(), "a look removed it");
    let swept = sweep_folder(&root, "logs", Folder::Logs, false);
    assert_eq!(looked, swept, "a look tells what a sweep does");
    assert_eq!((swept.files, swept.is_all()), (3, true));
    assert!(swept.bytes >= 15_000, "{}", swept.bytes);
    assert!(!scratch.path("logs").exists());
    assert_eq!(
        sweep_folder(&root, "logs", Folder::Logs, false),
        Swept::default(),
        "nothing there"
    );
}

#[test]
fn what_is_not_castras_stays_and_is_named() {
    let scratch = filled();
    fs::write(scratch.path("logs/bus/notes"), "mine").unwrap();
    symlink("../outside/broker.log", scratch.path("logs/broker.log.1")).unwrap();
    symlink("../outside", scratch.path("logs/bootstrap")).unwrap();
    fs::create_dir(scratch.path("logs/events.jsonl")).unwrap();
    nix::unistd::mkfifo(
        &scratch.path("logs/events-broker.jsonl"),
        nix::sys::stat::Mode::S_IRWXU,
    )
    .unwrap();
    let root = Dir::open(scratch.dir()).unwrap();
    let swept = sweep_folder(&root, "logs", Folder::Logs, false);
    let mut foreign: Vec<_> = swept
        .foreign
        .iter()
        .map(|path| path.strip_prefix(scratch.dir()).unwrap())
        .collect();
    foreign.sort_unstable();
    let names = [
        "bootstrap",
        "broker.log.1",
        "bus/notes",
        "events-broker.jsonl",
        "events.jsonl",
    ];
    assert_eq!(foreign, names.map(|name| Path::new("logs").join(name)));
    assert_eq!(swept.files, 3);
    assert!(scratch.path("outside/broker.log").exists(), "a link was followed");
    assert!(scratch.path("logs/bus/notes").exists() && !scratch.path("logs/broker.log").exists());
}

#[test]
fn a_link_in_a_folders_place_is_not_entered() {
    let scratch = filled();
    symlink("outside", scratch.path("linked")).unwrap();
    let root = Dir::open(scratch.dir()).unwrap();
    let swept = sweep_folder(&root, "linked", Folder::Logs, false);
    assert_eq!(swept.foreign, [scratch.path("linked")]);
    assert!(scratch.path("outside/broker.log").exists());
    assert!(Dir::open(&scratch.path("linked")).is_err());
    assert!(root.folder("../elsewhere").is_err() && root.remove_file("logs/broker.log").is_err());
}
