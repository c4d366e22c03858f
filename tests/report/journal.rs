//! A journal being made up: a run's events, stamped as castra stamps them.

use castra::core::events::contract::Stamped;
use castra::core::events::{Accel, BootstrapStepKind, BootstrapStepStatus, Event, VmCounts};

/// Its lines so far, and the run of the next event.
pub struct Journal {
    run: String,
    began_ms: u64,
    seq: u64,
    pub lines: String,
}

/// 2026-11-21T10:00:00Z.
pub const NOON: u64 = 1_795_255_200_000;

impl Journal {
    pub fn new() -> Journal {
        Journal {
            run: String::new(),
            began_ms: NOON,
            seq: 0,
            lines: String::new(),
        }
    }

    /// A run that begins so long after noon.
    pub fn begin(&mut self, run: &str, command: &str, after_ms: u64) -> &mut Journal {
        (self.run, self.began_ms, self.seq) = (run.to_owned(), NOON + after_ms, 0);
        self.tell(
            0,
            Event::CommandAccepted {
                command: command.to_owned(),
                detail: None,
                source: "cli".into(),
                thread: None,
                turn: None,
                duration_ms: None,
                exit_status: None,
            },
        )
    }

    pub fn tell(&mut self, offset_ms: u64, event: Event) -> &mut Journal {
        let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(self.began_ms + offset_ms);
        let stamped = Stamped {
            ts: castra::core::reporter::wall_clock(at),
            offset_ms,
            seq: self.seq,
            run: self.run.as_str().into(),
            event,
        };
        self.seq += 1;
        self.lines.push_str(&stamped.contract_line());
        self.lines.push('\n');
        self
    }

    pub fn launched(&mut self, offset_ms: u64, vm: &str) -> &mut Journal {
        self.tell(
            offset_ms,
            Event::VmLaunched {
                vm: vm.parse().unwrap(),
                pid: 7,
                accel: Accel::Tcg,
                accel_reason: "no /dev/kvm".into(),
                elapsed_ms: 100,
            },
        )
    }

    pub fn step(&mut self, offset_ms: u64, vm: &str, step: BootstrapStepKind, detail: &str) -> &mut Journal {
        self.tell(
            offset_ms,
            Event::BootstrapStep {
                vm: vm.parse().unwrap(),
                step,
                status: BootstrapStepStatus::Failed,
                duration_ms: 50,
                detail: Some(detail.to_owned()),
            },
        )
    }

    pub fn failed(&mut self, offset_ms: u64, vm: &str, error: &str) -> &mut Journal {
        self.tell(
            offset_ms,
            Event::BootstrapFailed {
                vm: vm.parse().unwrap(),
                duration_ms: 50,
                error: error.to_owned(),
            },
        )
    }

    pub fn end(&mut self, offset_ms: u64, exit_status: i32, vms: usize, failed: usize) -> &mut Journal {
        self.tell(
            offset_ms,
            Event::Summary {
                operation: "up".into(),
                duration_ms: offset_ms,
                exit_status,
                vms: VmCounts {
                    total: vms,
                    changed: vms - failed,
                    unchanged: 0,
                    failed,
                },
                bytes: 0,
                verdict: None,
            },
        )
    }
}
