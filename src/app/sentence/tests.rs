//! Facts and the words for them, side by side.

use castra::core::events::endings::{LaunchEnding, ShutdownEnding};
use castra::core::events::{
    Accel, BootstrapStepKind, BootstrapStepStatus, Event, HandshakeOutcome, Severity,
};
use castra::core::name::VmName;

use super::sentence;
use crate::app::progress::render;
use crate::app::style::Style;

fn check(event: Event, expected: &str) {
    assert_eq!(render(&sentence(&event), Style::PLAIN, 8), expected, "{event:?}");
}

fn vm() -> VmName {
    "web-0".parse().unwrap()
}

#[test]
fn from_launch_to_the_end() {
    check(
        Event::VmLaunched {
            vm: vm(),
            pid: 4711,
            accel: Accel::Tcg,
            accel_reason: "no /dev/kvm".into(),
            elapsed_ms: 212,
        },
        "web-0     launched in 0.2 s, pid 4711, tcg (no /dev/kvm)",
    );
    check(
        Event::BootstrapStep {
            vm: vm(),
            step: BootstrapStepKind::WaitHandshake,
            status: BootstrapStepStatus::Success,
            duration_ms: 3_100,
            detail: Some("SSH banner".into()),
        },
        "web-0     wait-handshake in 3.1 s: SSH banner",
    );
    check(
        Event::BootstrapStep {
            vm: vm(),
            step: BootstrapStepKind::Apply,
            status: BootstrapStepStatus::Failed,
            duration_ms: 12_000,
            detail: Some("exit status 3".into()),
        },
        "web-0     error: apply failed after 12 s: exit status 3",
    );
    check(
        Event::BootstrapCompleted {
            vm: vm(),
            noop: true,
            duration_ms: 61_000,
            stamp: None,
        },
        "web-0     bootstrapped in 1 min 1 s, nothing to change",
    );
    check(
        Event::VmExited {
            vm: vm(),
            pid: Some(4711),
            reason: "guest-panic".into(),
            outcome: LaunchEnding::Crashed.into(),
            last_words: Some("Kernel panic\x1b[2J".into()),
            qemu_words: Some("qemu: gone\x07".into()),
            remediation: Some("castra restart web-0".into()),
        },
        "web-0     error: crashed (guest-panic); console: Kernel panic\\x1b[2J; QEMU: qemu: gone\\x07\n  try: \
         castra restart web-0",
    );
    check(
        Event::Escalated {
            vm: vm(),
            pid: 4711,
            signal: "SIGTERM".into(),
            timeout_ms: 10_000,
        },
        "web-0     warning: SIGTERM sent to pid 4711; castra waits up to 10 s",
    );
    for (outcome, changed, expected) in [
        (ShutdownEnding::Graceful, true, "web-0     powered off in 70 ms"),
        (
            ShutdownEnding::Terminated,
            true,
            "web-0     stopped by SIGTERM after 70 ms",
        ),
        (
            ShutdownEnding::Killed,
            true,
            "web-0     stopped by SIGKILL after 70 ms",
        ),
        (ShutdownEnding::AlreadyStopped, false, "web-0     was not running"),
        (
            ShutdownEnding::Failed,
            false,
            "web-0     error: still runs after 70 ms",
        ),
    ] {
        check(
            Event::ShutdownComplete {
                vm: vm(),
                outcome: outcome.into(),
                elapsed_ms: 70,
                changed,
            },
            expected,
        );
    }
}

#[test]
fn what_guests_say_stays_text() {
    check(
        Event::BrokerHandshake {
            vm: None,
            capabilities: Vec::new(),
            outcome: HandshakeOutcome::Declined,
            reason: Some("protocol-error".into()),
            session: None,
            remote: "127.0.0.1:41000".into(),
            repeated: Some(7),
        },
        "warning: hello from 127.0.0.1:41000 declined: protocol-error (7 times)",
    );
    check(
        Event::message(Severity::Progress, Some(&vm()), "\x1b]0;owned\x07\r\nline"),
        "web-0     \\x1b]0;owned\\x07\\r\\nline",
    );
}

#[test]
fn advice_stands_below() {
    check(
        Event::advice(Severity::Blocker, Some(&vm()), "no ssh", "install openssh-client"),
        "web-0     error: no ssh\n  try: install openssh-client",
    );
}
