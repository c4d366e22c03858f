//! Whose word an end is while VMs are launched again, and when a guest is let run on.

use std::fs;

use super::*;
use crate::core::events::{Accel, BootstrapPlanSsh};
use crate::core::host::FileLock;
use crate::core::root::records::GuestRecord;
use crate::core::scratch::Scratch;

/// A VM whose QEMU is gone, and what a broker's looks have told of it.
struct Story {
    scratch: Scratch,
    vms: VmWatch,
}

impl Story {
    fn new(name: &str) -> Story {
        let story = Story {
            scratch: Scratch::new(name),
            vms: VmWatch::default(),
        };
        fs::create_dir_all(story.paths().dir()).unwrap();
        story
    }

    fn state(&self) -> StateRoot {
        StateRoot::new(self.scratch.dir())
    }

    fn paths(&self) -> VmPaths {
        self.state().vm(&"web".parse().unwrap())
    }

    fn record(&self, launch: &str) {
        let record = RunRecord {
            vm: "web".parse().unwrap(),
            role: "web".into(),
            launch_id: launch.into(),
            phase: RunPhase::Running,
            launched_boottime_ms: 1,
            launched_at: "2026-11-21T10:00:00.000Z".into(),
            boot_id: host::boot_id().clone(),
            accel: Accel::Tcg,
            accel_reason: String::new(),
            cpus: 1,
            memory_bytes: 1,
            forwards: Vec::new(),
            ssh: BootstrapPlanSsh {
                user: "root".into(),
                host: "127.0.0.1".into(),
                port: None,
                identity: None,
                options: Vec::new(),
            },
            overlay: None,
            persist: false,
            bootstrap: None,
            settings: Default::default(),
            base: None,
        };
        records::save(&self.paths().run(), &record).unwrap();
    }

    fn stop(&self, launch: &str) {
        let stop = StopRecord {
            launch_id: launch.into(),
            by: "castra restart (pid 9)".into(),
            at: "2026-11-21T10:00:00.000Z".into(),
        };
        records::save(&self.paths().stop(), &stop).unwrap();
    }

    fn qmp(&self, text: &str) {
        fs::write(self.paths().file(vm_file::QMP_LOG), text).unwrap();
    }

    /// What one look tells, where `guests.json` names this launch.
    fn look(&mut self, launch: &str) -> Vec<String> {
        let guests = GuestsRecord {
            guests: vec![GuestRecord {
                closed: false,
                name: "web".parse().unwrap(),
                launch_id: Some(launch.into()),
                launched_boottime_ms: Some(1),
                boot_id: Some(host::boot_id().clone()),
                token_sha256: None,
                second_name: None,
            }],
        };
        let state = self.state();
        let changes = self.vms.look(&state, &guests, 0, Rotation::default(), false);
        let told = changes.events.iter().map(|event| match event {
            Event::VmExited { reason, outcome, .. } => format!("{outcome} {reason}"),
            other => format!("{other:?}"),
        });
        told.collect()
    }
}

const ANSWER: &str = "{\"return\": {}}\n";

fn ended(reason: &str) -> String {
    format!("{ANSWER}{{\"event\": \"SHUTDOWN\", \"data\": {{\"guest\": true, \"reason\": \"{reason}\"}}}}\n")
}

#[test]
fn an_end_that_nobody_asked_for_is_told_once() {
    let mut story = Story::new("vms-end");
    story.record("one");
    story.qmp(&ended("guest-panic"));
    assert_eq!(story.look("one"), ["crashed guest-panic"]);
    assert_eq!(story.look("one"), [""; 0]);
}

#[test]
fn one_that_was_asked_for_is_whose_command_asked() {
    let mut story = Story::new("vms-asked");
    story.record("one");
    story.qmp(&ended("host-signal"));
    story.stop("one");
    assert_eq!(story.look("one"), [""; 0]);
}

/// A restart between two of its steps, as a look at any moment may find it: its lock is held, QEMU's log
/// is emptied first, then the record is that of the new launch, and only then the old `stop.json` goes.
#[test]
fn a_vm_that_is_launched_again_has_no_unknown_end() {
    let mut story = Story::new("vms-again");
    story.record("one");
    story.qmp("");
    let lock = FileLock::try_take(&story.paths().lock(), "castra up").unwrap();
    assert_eq!(story.look("one"), [""; 0], "whoever launches it tells of its end");
    story.record("two");
    story.qmp(ANSWER);
    // `guests.json` was read a moment before.
    assert_eq!(story.look("one"), [""; 0], "nothing says how that launch ended");
    drop(lock);
    assert_eq!(story.look("one"), [""; 0]);

    // A launcher that was killed before its record: nobody else tells.
    let mut story = Story::new("vms-killed");
    story.record("one");
    story.qmp("");
    let lock = FileLock::try_take(&story.paths().lock(), "castra up").unwrap();
    assert_eq!(story.look("one"), [""; 0]);
    drop(lock);
    assert_eq!(story.look("one"), ["stopped unknown"]);
}

#[test]
fn a_full_disk_is_tried_seldomer_each_time() {
    let pause = |reason: &str, no_space: bool| Pause {
        reason: reason.into(),
        no_space,
        at: None,
    };
    let full = pause("io-error", true);
    let mut tries = ResumeTries::default();
    let mut at = 0;
    let mut waits = Vec::new();
    while waits.len() < 8 {
        assert_eq!(
            tries.due(&full, at, || Some(pause::MIN_FREE_BYTES - 1)),
            None,
            "no room"
        );
        assert_eq!(tries.due(&full, at, || None), None, "nobody knows");
        let next = tries.due(&full, at, || Some(pause::MIN_FREE_BYTES)).unwrap();
        assert_eq!(next.due(&full, next.next_ms - 1, || Some(u64::MAX)), None);
        waits.push((next.next_ms - at) / 1000);
        (tries, at) = (next, next.next_ms);
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
    for other in [
        pause("io-error", false),
        pause("paused", false),
        pause("internal-error", false),
    ] {
        assert_eq!(
            ResumeTries::default().due(&other, 0, || Some(u64::MAX)),
            None,
            "{other:?}"
        );
    }
}
