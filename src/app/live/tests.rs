//! What the block shows, without a terminal.

use castra::core::events::endings::ShutdownEnding;
use castra::core::events::{Accel, BootstrapMode, BootstrapTrigger};
use castra::core::name::VmName;
use castra::core::reporter::COMMAND_LINE;
use serde_json::json;

use super::*;

/// An [`Activity`] and a clock that moves only when told.
struct Script {
    doing: Activity,
    began: Instant,
}

fn vm(name: &str) -> VmName {
    name.parse().unwrap()
}

impl Script {
    fn new(vms: &[&str]) -> Script {
        Script {
            doing: Activity::expecting(vms.iter().map(|vm| (*vm).to_owned())),
            began: Instant::now(),
        }
    }

    fn at(&self, secs: u64) -> Instant {
        self.began + Duration::from_secs(secs)
    }

    fn note(&mut self, secs: u64, event: Event) {
        let now = self.at(secs);
        self.doing.note(&event, now);
    }

    fn shows(&mut self, secs: u64, rows: usize, columns: usize, expected: &[&str]) {
        let size = Size { rows, columns };
        let now = self.at(secs);
        let lines = self.doing.lines(now, size, Style::PLAIN);
        for line in &lines {
            assert_eq!(line.width, width::of(&line.text), "{line:?}");
            assert!(line.width < columns, "{line:?}");
        }
        assert!(lines.len() < rows.max(2));
        let texts: Vec<&str> = lines.iter().map(|line| line.text.as_str()).collect();
        assert_eq!(texts, expected);
    }

    fn launch(&mut self, secs: u64, name: &str) {
        self.note(secs, prepared(name));
        self.note(secs, launched(name));
        self.note(secs + 1, planned(name, BootstrapPlanAction::Run));
    }

    fn step(&mut self, secs: u64, name: &str, step: BootstrapStepKind, detail: &str) {
        self.note(
            secs,
            Event::BootstrapStep {
                vm: vm(name),
                step,
                status: BootstrapStepStatus::Success,
                duration_ms: 1,
                detail: Some(detail.to_owned()),
            },
        );
    }

    fn script_says(&mut self, secs: u64, name: &str, text: &str, data: Option<Value>) {
        let mut event = Event::message(Severity::Progress, Some(&vm(name)), text);
        if let Event::Message {
            source, data: slot, ..
        } = &mut event
        {
            *source = Some("bootstrap".to_owned());
            *slot = data;
        }
        self.note(secs, event);
    }
}

/// The text for a VM that waits for its turn.
fn waiting() -> String {
    match host::cores() {
        1 => "waiting: 1 VM boots at a time here".to_owned(),
        cores => format!("waiting: {cores} VMs boot at a time here"),
    }
}

fn prepared(name: &str) -> Event {
    Event::OverlayPrepared {
        vm: vm(name),
        path: "disk.qcow2".into(),
        base: None,
        reused: false,
        elapsed_ms: 3,
    }
}

fn launched(name: &str) -> Event {
    Event::VmLaunched {
        vm: vm(name),
        pid: 7,
        accel: Accel::Tcg,
        accel_reason: "no /dev/kvm".into(),
        elapsed_ms: 60,
    }
}

fn planned(name: &str, action: BootstrapPlanAction) -> Event {
    Event::BootstrapPlanned(Box::new(BootstrapPlan {
        vm: vm(name),
        mode: BootstrapMode::Auto,
        action,
        reason: String::new(),
        trigger: Some(BootstrapTrigger::Auto),
        script_path: None,
        payload_path: None,
        payload_bytes: None,
        handshake_timeout_secs: Some(60),
        step_timeout_secs: Some(30),
        apply_timeout_secs: Some(600),
        remote_dir: None,
        ssh: None,
        env_keys: Vec::new(),
        verify: None,
        artifact_hash: None,
        metadata_path: None,
        warnings: Vec::new(),
        vizier_status: None,
        vizier_log_path: None,
        vizier_remediation: None,
        machine: None,
    }))
}

#[test]
fn a_line_for_each_vm_through_all_of_up() {
    let mut script = Script::new(&["web-0", "database"]);
    script.shows(0, 24, 80, &[]);
    script.note(0, Event::message(Severity::Progress, None, "trying KVM"));
    script.shows(2, 24, 80, &["trying KVM  2 s"]);
    script.note(2, prepared("web-0"));
    script.shows(
        3,
        24,
        80,
        &[
            "web-0     starting QEMU, 1 s (gives up after 1 min)",
            &format!("database  {}", waiting()),
        ],
    );
    script.note(3, launched("web-0"));
    script.note(4, planned("web-0", BootstrapPlanAction::Run));
    let later = script.at(4);
    script
        .doing
        .note_console("web-0", "Run /init as init process", later);
    assert_eq!(script.doing.booting(), ["web-0"]);
    script.launch(5, "database");
    script.shows(
        8,
        24,
        80,
        &[
            // The limit counts from the launch.
            "web-0     booting, 5 s       (gives up after 1 min)  Run /init as init process",
            "database  booting, 3 s       (gives up after 1 min)",
        ],
    );
    script.step(9, "web-0", BootstrapStepKind::WaitHandshake, "handshake");
    for step in &BootstrapStepKind::ALL[1..6] {
        script.step(10, "web-0", *step, "done");
    }
    script.shows(
        12,
        24,
        80,
        &[
            "web-0     running its script, 2 s (gives up after 10 min)",
            "database  booting, 7 s            (gives up after 1 min)",
        ],
    );
    script.script_says(12, "web-0", "Get:3\thttp://deb.example/日本", None);
    script.note(13, planned("database", BootstrapPlanAction::Skip));
    script.shows(
        13,
        24,
        60,
        &["web-0     running its script, 3 s (gives up after 10 min)"],
    );
    let completed = Event::BootstrapCompleted {
        vm: vm("web-0"),
        noop: false,
        duration_ms: 9,
        stamp: None,
    };
    script.note(14, completed);
    script.shows(14, 24, 80, &["trying KVM  14 s"]);
    script.note(
        14,
        Event::CommandCompleted {
            command: "up".into(),
            detail: None,
            duration_ms: None,
            exit_status: Some(0),
            source: COMMAND_LINE.into(),
            thread: None,
            turn: None,
        },
    );
    script.shows(14, 24, 80, &[]);
}

#[test]
fn the_way_down() {
    let mut script = Script::new(&[]);
    let web = || vm("web");
    script.note(0, Event::ShutdownRequested { vm: web(), pid: 7 });
    script.shows(0, 24, 80, &["web       shutting down, 0 s"]);
    let method = || "qmp-system-powerdown".to_owned();
    script.note(
        0,
        Event::CooperativeAttempted {
            vm: web(),
            method: method(),
            timeout_ms: 20_000,
        },
    );
    script.shows(15, 24, 80, &["web       powering off, 15 s (gives up in 5 s)"]);
    script.note(
        20,
        Event::CooperativeTimedOut {
            vm: web(),
            method: method(),
            elapsed_ms: 20_000,
            detail: None,
        },
    );
    script.note(
        20,
        Event::Escalated {
            vm: web(),
            pid: 7,
            signal: "SIGTERM".into(),
            timeout_ms: 5_000,
        },
    );
    script.shows(
        21,
        24,
        100,
        &["web       SIGTERM sent, 1 s  (gives up after 5 s)  didn't power off in 20 s"],
    );
    script.note(
        22,
        Event::ShutdownComplete {
            vm: web(),
            outcome: ShutdownEnding::Terminated.into(),
            elapsed_ms: 22_000,
            changed: true,
        },
    );
    script.shows(22, 24, 80, &[]);
}

#[test]
fn a_fleet_taller_than_the_terminal() {
    let names: Vec<String> = (0..40).map(|number| format!("web-{number}")).collect();
    let borrowed: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut script = Script::new(&borrowed);
    for name in &borrowed[..3] {
        script.launch(0, name);
    }
    script.note(1, prepared("web-3"));
    script.shows(
        2,
        8,
        60,
        &[
            "web-0     booting, 2 s       (gives up after 1 min)",
            "web-1     booting, 2 s       (gives up after 1 min)",
            "web-2     booting, 2 s       (gives up after 1 min)",
            "web-3     starting QEMU, 1 s (gives up after 1 min)",
            "and 36 more: 36 waiting",
        ],
    );
    script.shows(
        2,
        3,
        60,
        &[
            "web-0     booting, 2 s (gives up after 1 min)",
            "and 39 more: 2 booting, 1 starting QEMU, 36 waiting",
        ],
    );
    // A terminal of one line or two has no room for more than this.
    script.shows(2, 2, 60, &["and 40 more: 3 booting, 1 starting QEMU, 36 waiting"]);
    script.shows(2, 1, 60, &["and 40 more: 3 booting, 1 starting QEMU, 36 waiting"]);
    // Failed VMs leave room for others.
    script.note(
        3,
        Event::message(Severity::Error, Some(&vm("web-1")), "no memory"),
    );
    let size = Size { rows: 5, columns: 60 };
    let now = script.at(3);
    let lines = script.doing.lines(now, size, Style::PLAIN);
    assert!(lines[1].text.starts_with("web-2 "), "{lines:?}");
}

#[test]
fn vms_that_nobody_announced_are_in_order() {
    let mut script = Script::new(&[]);
    for name in ["web-10", "db", "web-2", "web-1", "web"] {
        script.note(0, Event::ShutdownRequested { vm: vm(name), pid: 7 });
    }
    let names: Vec<&str> = script.doing.vms.iter().map(|vm| vm.vm.as_str()).collect();
    assert_eq!(names, ["db", "web", "web-1", "web-2", "web-10"]);
}

#[test]
fn narrow_terminals() {
    let mut script = Script::new(&["a-very-long-name-of-a-vm", "b"]);
    script.launch(0, "a-very-long-name-of-a-vm");
    let b = |gap: usize, room: usize| format!("b{}{}", " ".repeat(gap), width::cut(&waiting(), room));
    for (columns, first, second) in [
        (40, "a-very-long-…  booting, 2 s", b(14, 24)),
        (20, "a-ver…  booting, 2…", b(7, 11)),
        (10, "a-v…  bo…", b(5, 3)),
        (2, "…", "b".to_owned()),
    ] {
        script.shows(2, 24, columns, &[first, &second]);
    }
}

#[test]
fn bytes_have_a_bar() {
    const MIB: u64 = 1 << 20;
    let mut script = Script::new(&["web"]);
    let fetching = |bytes: u64| {
        let mut event = Event::message(Severity::Progress, None, format!("fetching it: {bytes}"));
        if let Event::Message { data, .. } = &mut event {
            *data = Some(json!({"bytes": bytes, "total_bytes": 100 * MIB, "label": "fetching debian.qcow2"}));
        }
        event
    };
    script.note(1, fetching(10 * MIB));
    script.note(3, fetching(50 * MIB));
    script.shows(
        3,
        24,
        80,
        &["fetching debian.qcow2  █████████░░░░░░░░░ 50 MiB of 100 MiB, 20 MiB/s, 2 s left"],
    );
    script.launch(4, "web");
    for step in &BootstrapStepKind::ALL[..5] {
        script.step(6, "web", *step, "done");
    }
    let sent = |mib: u64| Some(json!({"sent_bytes": mib * MIB, "total_bytes": 40 * MIB}));
    script.script_says(8, "web", "5 of 40", sent(5));
    script.script_says(9, "web", "10 of 40", sent(10));
    script.shows(
        9,
        24,
        80,
        &["web       copying files, 3 s  ███░░░░░░░░░░ 10 MiB of 40 MiB, 5 MiB/s, 6 s left"],
    );
    // A stalled transfer has a deadline: 30 s from the last byte.
    script.script_says(14, "web", "10 of 40", sent(10));
    script.shows(
        15,
        24,
        80,
        &["web       copying files, 9 s (gives up in 24 s)  10 MiB of 40 MiB, nothing mor…"],
    );
}
