//! Tests of what a run's events become: events in, one line a VM out.

use super::*;
use crate::core::events::endings::LaunchEnding;
use crate::core::events::{Accel, BootstrapStepKind, BootstrapStepStatus, HandshakeOutcome, VmCounts};
use crate::core::report::model::MarkKind;

struct Script {
    fold: RunBuilder,
    seq: u64,
}

fn web() -> VmName {
    "web".parse().unwrap()
}

impl Script {
    fn new() -> Script {
        Script {
            fold: RunBuilder::new(
                "r".into(),
                "up".into(),
                None,
                "2026-11-21T10:00:00.000Z",
                1_000_000,
            ),
            seq: 0,
        }
    }

    fn at(mut self, offset_ms: u64, event: Event) -> Script {
        self.seq += 1;
        self.fold.add_event(&Stamped {
            ts: String::new(),
            offset_ms,
            seq: self.seq,
            run: "r".into(),
            event,
        });
        self
    }

    fn launched(self, at: u64) -> Script {
        let event = Event::VmLaunched {
            vm: web(),
            pid: 7,
            accel: Accel::Tcg,
            accel_reason: String::new(),
            elapsed_ms: 100,
        };
        self.at(at, event)
    }

    fn overlay(self, at: u64) -> Script {
        let event = Event::OverlayPrepared {
            vm: web(),
            path: "o".into(),
            base: None,
            reused: false,
            elapsed_ms: 10,
        };
        self.at(at, event)
    }

    fn step(self, at: u64, step: BootstrapStepKind, status: BootstrapStepStatus, detail: &str) -> Script {
        let event = Event::BootstrapStep {
            vm: web(),
            step,
            status,
            duration_ms: 50,
            detail: Some(detail.into()),
        };
        self.at(at, event)
    }

    fn broker(mut self, at: u64, event: Event) -> Script {
        self.fold.add_broker_event("web", at, &event);
        self
    }

    fn exited(self, at: u64) -> Script {
        self.broker(at, gone())
    }

    fn end(self, at: u64, exit_status: i32) -> Script {
        let event = Event::Summary {
            operation: "up".into(),
            duration_ms: at,
            exit_status,
            vms: VmCounts::default(),
            bytes: 0,
            verdict: None,
        };
        self.at(at, event)
    }

    /// `web ok: launch 100+50; launched@150`, and the error.
    fn check(self, wanted: &str) {
        let run = self.fold.finish(&[]);
        let mut lines = vec![run.outcome.as_str().to_owned()];
        for vm in &run.vms {
            let phases = vm.phases.iter().map(|phase| {
                let state = match phase.state {
                    State::Ok => "",
                    state => state.as_str(),
                };
                format!(
                    "{} {}+{}{}",
                    phase.phase, phase.start_ms, phase.duration_ms, state
                )
            });
            let marks = vm.marks.iter().map(|mark| match mark.mark {
                MarkKind::Handshake => format!("@{} handshake", mark.at_ms),
                MarkKind::Service => format!("@{} service", mark.at_ms),
                kind => format!("@{} {}", mark.at_ms, kind.words()),
            });
            let told: Vec<String> = phases.chain(marks).collect();
            let error = vm
                .error
                .as_ref()
                .map(|error| format!(" ({error})"))
                .unwrap_or_default();
            lines.push(format!(
                "{} {}: {}{error}",
                vm.vm,
                vm.state.as_str(),
                told.join(", ")
            ));
        }
        assert_eq!(lines.join("; "), wanted);
    }
}

fn gone() -> Event {
    Event::VmExited {
        vm: web(),
        pid: None,
        reason: "sigkill".into(),
        outcome: LaunchEnding::Crashed.into(),
        last_words: None,
        qemu_words: Some("killed".into()),
        remediation: Some("castra up".into()),
    }
}

fn hello(capability: &str) -> Event {
    Event::BrokerHandshake {
        vm: Some(web()),
        capabilities: vec![capability.into()],
        outcome: HandshakeOutcome::Ok,
        reason: None,
        session: None,
        remote: String::new(),
        repeated: None,
    }
}

fn silent() -> Event {
    Event::BrokerFreshness {
        vm: web(),
        reachable: false,
        last_handshake_age_ms: None,
    }
}

fn down(method: &str) -> Event {
    match method {
        "timed-out" => Event::CooperativeTimedOut {
            vm: web(),
            method: String::new(),
            elapsed_ms: 90,
            detail: None,
        },
        "ok" => Event::CooperativeSucceeded {
            vm: web(),
            method: String::new(),
            elapsed_ms: 90,
        },
        "SIGTERM" | "SIGKILL" => Event::Escalated {
            vm: web(),
            pid: 7,
            signal: method.into(),
            timeout_ms: 100,
        },
        outcome => Event::ShutdownComplete {
            vm: web(),
            outcome: serde_json::from_value(outcome.into()).unwrap(),
            elapsed_ms: 0,
            changed: true,
        },
    }
}

#[test]
fn a_bootstrap_that_works() {
    use BootstrapStepKind::{Apply, Verify, WaitHandshake};
    use BootstrapStepStatus::{Skipped, Success};
    Script::new()
        .overlay(80)
        .launched(200)
        .step(260, WaitHandshake, Success, "SSH banner SSH-2.0")
        .step(320, Apply, Success, "")
        .step(320, Verify, Skipped, "")
        .at(
            330,
            Event::BootstrapCompleted {
                vm: web(),
                noop: false,
                duration_ms: 130,
                stamp: None,
            },
        )
        .end(340, 0)
        .broker(150, silent())
        .broker(250, hello("x"))
        .broker(255, hello("vizier-v1"))
        .broker(300, hello("vizier-v1"))
        .broker(900, silent())
        .exited(1_000)
        .check(
            "ok; web ok: queued 0+70waiting, overlay 70+10, launch 100+100, wait-handshake 210+50, apply 270+50, \
             verify 270+50skipped, @200 launched, @250 handshake, @255 service, @260 SSH banner, @900 unreachable, \
             @1000 QEMU gone",
        );
}

#[test]
fn vms_that_fail() {
    // No event tells of a launch that didn't work but the error.
    Script::new()
        .overlay(20)
        .at(
            60,
            Event::message(Severity::Error, Some(&web()), "QEMU would not start"),
        )
        .end(70, 1)
        .check("failed; web failed: overlay 10+10, launch 20+40failed (QEMU would not start)");
    // It dies while the run goes on, though nobody waits for it; and one that died of an earlier launch.
    Script::new()
        .launched(200)
        .end(900, 0)
        .exited(150)
        .exited(500)
        .check("ok; web failed: queued 0+100waiting, launch 100+100, @200 launched, @500 QEMU gone (crashed (sigkill): QEMU: killed; → castra up)");
    Script::new()
        .at(5, gone())
        .launched(200)
        .end(300, 0)
        .check("ok; web ok: queued 0+100waiting, launch 100+100, @5 QEMU gone, @200 launched");
}

#[test]
fn runs_without_end() {
    Script::new()
        .launched(100)
        .at(700, Event::message(Severity::Info, None, "x"))
        .check("unfinished; web waiting: launch 0+100, unfinished 100+600waiting, @100 launched");
    Script::new()
        .at(90, down("timed-out"))
        .at(90, down("SIGTERM"))
        .end(120, 130)
        .check("interrupted; web waiting: power-button 0+90failed, SIGTERM 90+30waiting");
    Script::new().check("unfinished");
}

#[test]
fn ladders_of_shutdown() {
    Script::new()
        .at(100, down("ok"))
        .at(100, down("graceful"))
        .end(110, 0)
        .broker(105, silent())
        .exited(105)
        .check("ok; web ok: power-button 10+90");
    Script::new()
        .at(90, down("timed-out"))
        .at(90, down("SIGTERM"))
        .at(190, down("SIGKILL"))
        .at(200, down("killed"))
        .end(210, 0)
        .check("ok; web ok: power-button 0+90failed, SIGTERM 90+100failed, SIGKILL 190+10");
    Script::new()
        .at(3, down("already-stopped"))
        .end(4, 0)
        .check("ok; web skipped: stop 3+0skipped");
    Script::new()
        .at(90, down("SIGKILL"))
        .at(95, down("failed"))
        .end(100, 1)
        .check("failed; web failed: queued 0+90waiting, SIGKILL 90+5failed (it could not be stopped)");
    // A restart is both in one run.
    Script::new()
        .at(100, down("ok"))
        .at(100, down("graceful"))
        .launched(300)
        .end(310, 0)
        .exited(110)
        .exited(400)
        .check("ok; web ok: power-button 10+90, launch 200+100, @300 launched, @400 QEMU gone");
}

#[test]
fn failed_vms_stay_and_names_have_their_order() {
    let vm = |name: &str, state: State| {
        let mut report = VmHistory::new(&name.parse().unwrap()).finish(Outcome::Ok, 0, &[]);
        report.state = state;
        report
    };
    let mut vms: Vec<VmReport> = (0..10)
        .map(|number| vm(&format!("w-{number}"), State::Ok))
        .collect();
    vms[7].state = State::Failed;
    vms[9].state = State::Failed;
    let names = |vms: &[VmReport]| vms.iter().map(|vm| vm.vm.clone()).collect::<Vec<_>>().join(" ");
    for (most, left) in [(4, "w-0 w-1 w-7 w-9"), (1, "w-7"), (0, "")] {
        let mut cut = vms.clone();
        keep_failed_first(&mut cut, most);
        assert_eq!(names(&cut), left);
    }
    let mut names = [
        "web-10",
        "web-2",
        "DB",
        "web",
        "a9b",
        "a10",
        "99999999999999999999999",
    ];
    names.sort_by_cached_key(|name| natural(name));
    assert_eq!(
        names,
        [
            "99999999999999999999999",
            "a9b",
            "a10",
            "DB",
            "web",
            "web-2",
            "web-10"
        ]
    );
}

/// What all VMs wait for has a bar with its name; the rest of the waiting stays `queued`.
#[test]
fn what_a_run_waits_for_is_named() {
    let ended = |stage: Stage, ms| {
        let message = Event::message(Severity::Progress, None, "done");
        stage.end(std::time::Duration::from_millis(ms), message)
    };
    Script::new()
        .at(8_500, ended(Stage::ImageBuild, 8_400))
        .at(12_000, ended(Stage::KvmTrial, 3_000))
        .overlay(12_100)
        .launched(12_300)
        .end(13_000, 0)
        .check(
            "ok; web ok: queued 0+100waiting, image-build 100+8400, queued 8500+500waiting, kvm-trial 9000+3000, queued \
             12000+90waiting, overlay 12090+10, launch 12200+100, @12300 launched",
        );
    // A VM that had its turn before isn't said to have waited for it.
    Script::new()
        .launched(100)
        .at(300, ended(Stage::KvmTrial, 200))
        .end(400, 0)
        .check("ok; web ok: launch 0+100, @100 launched");
    // Messages that name a stage of another version are messages.
    let mut foreign = Event::message(Severity::Progress, None, "done");
    if let Event::Message { data, .. } = &mut foreign {
        *data = Some(serde_json::json!({"stage": "nap", "elapsed_ms": 100}));
    }
    Script::new()
        .at(150, foreign)
        .launched(300)
        .end(400, 0)
        .check("ok; web ok: queued 0+200waiting, launch 200+100, @300 launched");
}
