//! One run's events, one after the other, made into what a report says of it.
//!
//! Here: which event becomes which bar, mark or note. Not here: reading the journals
//! (`super::gather`), logs (`super::tails`), or the bus (`super::traffic`).

use std::collections::HashMap;

use crate::core::escape::escape_line;
use crate::core::events::contract::Stamped;
use crate::core::events::{BootstrapPlanAction, BootstrapStepKind, BootstrapStepStatus, Event, Severity};
use crate::core::failure::Exit;
use crate::core::name::VmName;

use super::model::{Mark, MarkKind, Note, Outcome, Phase, QUEUED, RunReport, State, VmReport};
use super::{LONGEST_TEXT, MOST_NOTES, MOST_PHASES, MOST_VMS};

/// So many VMs of a run are followed before the failed ones are picked from them.
const MOST_FOLLOWED: usize = 2_000;
/// A shorter wait before a VM's first event isn't worth a bar.
const QUEUED_FROM_MS: u64 = 50;
/// The phase in which a guest is asked to power off.
const POWER_BUTTON: &str = "power-button";
/// The capability by which the in-guest service is known.
const SERVICE: &str = "vizier-v1";
/// How the detail of `wait-handshake` begins where a banner was the proof of life.
const BANNER: &str = "SSH banner";

/// A run being put together.
pub(super) struct Fold {
    report: RunReport,
    vms: Vec<Building>,
    index: HashMap<String, usize>,
    /// VMs beyond those that are followed were heard of.
    beyond: usize,
    /// How many VMs failed, if the run has summed itself up.
    failed: Option<usize>,
    /// Wall clock of its beginning, milliseconds.
    pub began_ms: u64,
}

struct Building {
    report: VmReport,
    /// A verdict on it has come.
    settled: bool,
    launched: bool,
    bootstrapped: bool,
    /// A signal it was sent and when: the bar ends with the next event.
    signal: Option<(String, u64)>,
}

/// Text of others, fit to be shown.
pub(super) fn shown(text: &str) -> String {
    escape_line(text, LONGEST_TEXT)
}

impl Fold {
    /// A run of this command that began then; `detail`: the VMs that were named.
    pub(super) fn new(run: String, command: String, detail: Option<&str>, ts: &str, began_ms: u64) -> Fold {
        Fold {
            report: RunReport {
                run,
                command,
                detail: detail.map(shown),
                started_at: shown(ts),
                duration_ms: None,
                known_ms: 0,
                exit_status: None,
                outcome: Outcome::Unfinished,
                vms_total: 0,
                vms_failed: 0,
                vms: Vec::new(),
                vms_left_out: 0,
                notes: Vec::new(),
                notes_left_out: 0,
                bus: None,
            },
            vms: Vec::new(),
            index: HashMap::new(),
            beyond: 0,
            failed: None,
            began_ms,
        }
    }

    /// Its id.
    pub(super) fn run(&self) -> &str {
        &self.report.run
    }

    /// The last moment known of it, by the wall clock.
    pub(super) fn ended_ms(&self) -> u64 {
        self.began_ms.saturating_add(self.report.known_ms)
    }

    /// The keys of the VMs it is about.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    fn vm(&mut self, vm: &VmName) -> Option<&mut Building> {
        let key = vm.key();
        let at = match self.index.get(&key) {
            Some(at) => *at,
            None if self.vms.len() >= MOST_FOLLOWED => {
                self.beyond += 1;
                return None;
            }
            None => {
                self.index.insert(key, self.vms.len());
                self.vms.push(Building::new(vm));
                self.vms.len() - 1
            }
        };
        self.vms.get_mut(at)
    }

    /// The next event of this run.
    pub(super) fn take(&mut self, stamped: &Stamped) {
        let at = stamped.offset_ms;
        self.report.known_ms = self.report.known_ms.max(at);
        match &stamped.event {
            Event::Message { severity, .. } if *severity >= Severity::Warn => self.note(at, &stamped.event),
            Event::CommandRejected {
                detail,
                remediation,
                exit_status,
                ..
            } => {
                self.report.exit_status = self.report.exit_status.or(*exit_status);
                self.push_note(Note {
                    at_ms: at,
                    severity: Severity::Error,
                    vm: None,
                    text: shown(detail),
                    remediation: remediation.as_deref().map(shown),
                });
            }
            Event::CommandCompleted {
                duration_ms,
                exit_status,
                ..
            } => self.ended(at, *duration_ms, *exit_status),
            Event::CommandFailed {
                duration_ms,
                exit_status,
                detail,
                ..
            } => {
                self.report.detail = Some(shown(detail));
                self.ended(at, *duration_ms, *exit_status);
            }
            Event::Summary {
                duration_ms,
                exit_status,
                vms,
                ..
            } => {
                self.report.vms_total = vms.total;
                self.failed = Some(vms.failed);
                self.ended(at, Some(*duration_ms), Some(*exit_status));
            }
            event => {
                if let Some(vm) = vm_of(event).cloned()
                    && let Some(building) = self.vm(&vm)
                {
                    building.take(at, event);
                }
            }
        }
    }

    /// What the broker has told of one of its VMs, so long after this run's beginning.
    pub(super) fn take_of_broker(&mut self, key: &str, at: u64, event: &Event) {
        let end = self.report.duration_ms;
        if let Some(building) = self.index.get(key).and_then(|at| self.vms.get_mut(*at)) {
            building.take_of_broker(at, event, end);
        }
    }

    fn note(&mut self, at: u64, event: &Event) {
        let Event::Message {
            severity,
            text,
            vm,
            remediation,
            ..
        } = event
        else {
            return;
        };
        if let Some(vm) = vm
            && *severity >= Severity::Error
            && let Some(building) = self.vm(vm)
        {
            building.fail(text);
        }
        self.push_note(Note {
            at_ms: at,
            severity: *severity,
            vm: vm.as_ref().map(|vm| vm.as_str().to_owned()),
            text: shown(text),
            remediation: remediation.as_deref().map(shown),
        });
    }

    fn push_note(&mut self, note: Note) {
        if self.report.notes.len() < MOST_NOTES {
            self.report.notes.push(note);
        } else {
            self.report.notes_left_out += 1;
        }
    }

    fn ended(&mut self, at: u64, duration_ms: Option<u64>, exit_status: Option<i32>) {
        self.report.duration_ms = Some(duration_ms.unwrap_or(at));
        self.report.exit_status = exit_status.or(self.report.exit_status);
        self.report.outcome = match self.report.exit_status {
            Some(0) => Outcome::Ok,
            Some(status) if status == i32::from(Exit::Interrupted.code()) => Outcome::Interrupted,
            _ => Outcome::Failed,
        };
    }

    /// The report. With `wanted` only those VMs, by their keys.
    pub(super) fn finish(mut self, wanted: &[String]) -> RunReport {
        let (outcome, known) = (self.report.outcome, self.report.known_ms);
        let mut vms: Vec<VmReport> = self
            .vms
            .into_iter()
            .map(|vm| vm.finish(outcome, known))
            .filter(|vm| wanted.is_empty() || wanted.contains(&vm.vm.to_ascii_lowercase()))
            .collect();
        let failed = vms.iter().filter(|vm| vm.state == State::Failed).count();
        match wanted.is_empty() {
            true => {
                self.report.vms_total = self.report.vms_total.max(vms.len());
                self.report.vms_failed = self.failed.unwrap_or(failed);
            }
            false => {
                self.report.vms_total = vms.len();
                self.report.vms_failed = failed;
            }
        }
        keep_failed_first(&mut vms, MOST_VMS);
        self.report.vms_left_out = self.report.vms_total.saturating_sub(vms.len());
        self.report.vms = vms;
        self.report
    }
}

/// Cuts a list of VMs: failed ones stay before others, all keep their order.
pub(super) fn keep_failed_first(vms: &mut Vec<VmReport>, most: usize) {
    let failed = vms.iter().filter(|vm| vm.state == State::Failed).count();
    let (mut bad, mut good) = (failed.min(most), most.saturating_sub(failed));
    vms.retain(|vm| {
        let room = match vm.state {
            State::Failed => &mut bad,
            _ => &mut good,
        };
        let stays = *room > 0;
        *room = room.saturating_sub(1);
        stays
    });
}

impl Building {
    fn new(vm: &VmName) -> Building {
        Building {
            report: VmReport {
                vm: vm.as_str().to_owned(),
                state: State::Waiting,
                accel: None,
                error: None,
                phases: Vec::new(),
                marks: Vec::new(),
                left_out: 0,
                log: None,
            },
            settled: false,
            launched: false,
            bootstrapped: false,
            signal: None,
        }
    }

    fn take(&mut self, at: u64, event: &Event) {
        match event {
            Event::OverlayPrepared {
                elapsed_ms, reused, ..
            } => {
                let detail = reused.then(|| "kept from an earlier launch".to_owned());
                self.phase("overlay", State::Ok, at, *elapsed_ms, detail);
            }
            Event::VmLaunched {
                accel,
                accel_reason,
                elapsed_ms,
                pid,
                ..
            } => {
                self.launched = true;
                self.report.accel = Some(*accel);
                let detail = format!("{}: {}", accel.as_str(), shown(accel_reason));
                self.phase("launch", State::Ok, at, *elapsed_ms, Some(detail));
                self.mark(MarkKind::Launched, at, Some(format!("QEMU is pid {pid}")));
            }
            Event::VmExited {
                reason,
                outcome,
                last_words,
                ..
            } => {
                // `up` finds what is left of an earlier launch.
                let text = format!("an earlier launch: {reason}");
                self.exited(at, &text, outcome, last_words.as_deref(), false);
            }
            Event::BootstrapPlanned(plan) => match plan.action {
                BootstrapPlanAction::Run => {}
                BootstrapPlanAction::Skip => self.settle(State::Ok),
                BootstrapPlanAction::Error => self.fail(&plan.reason),
            },
            Event::BootstrapStarted { .. } => {
                self.bootstrapped = true;
                self.queued(at);
            }
            Event::BootstrapStep {
                step,
                status,
                duration_ms,
                detail,
                ..
            } => {
                self.bootstrapped = true;
                let state = match status {
                    BootstrapStepStatus::Success => State::Ok,
                    BootstrapStepStatus::Skipped => State::Skipped,
                    BootstrapStepStatus::Failed => State::Failed,
                };
                let banner = detail.as_deref().filter(|detail| detail.starts_with(BANNER));
                if *step == BootstrapStepKind::WaitHandshake
                    && let Some(banner) = banner
                {
                    self.mark(MarkKind::Banner, at, Some(shown(banner)));
                }
                let detail = detail.as_deref().map(shown);
                self.phase(step.as_str(), state, at, *duration_ms, detail);
            }
            Event::BootstrapCompleted { .. } => self.settle(State::Ok),
            Event::BootstrapFailed { error, .. } => {
                // Its last step has said it with the script's last lines; this is the short form.
                self.report.error = Some(shown(error));
                self.report.state = State::Failed;
                self.settled = true;
            }
            Event::ShutdownRequested { .. } => self.queued(at),
            Event::CooperativeSucceeded {
                method, elapsed_ms, ..
            } => self.phase(POWER_BUTTON, State::Ok, at, *elapsed_ms, Some(shown(method))),
            Event::CooperativeTimedOut {
                elapsed_ms, detail, ..
            } => {
                let detail = detail.as_deref().map(shown);
                self.phase(POWER_BUTTON, State::Failed, at, *elapsed_ms, detail);
            }
            Event::Escalated { signal, .. } => {
                self.end_signal(at, State::Failed);
                self.signal = Some((shown(signal), at));
            }
            Event::ShutdownComplete { outcome, .. } => {
                let state = match outcome.as_str() {
                    "failed" => State::Failed,
                    "already-stopped" => State::Skipped,
                    _ => State::Ok,
                };
                self.end_signal(at, state);
                if self.report.phases.is_empty() {
                    self.phase("stop", state, at, 0, Some(shown(outcome)));
                }
                match state {
                    State::Failed => self.fail("it could not be stopped"),
                    state => self.settle(state),
                }
            }
            _ => {}
        }
    }

    fn take_of_broker(&mut self, at: u64, event: &Event, end: Option<u64>) {
        match event {
            Event::BrokerHandshake {
                capabilities,
                session,
                ..
            } => {
                if self.launched {
                    self.mark_once(MarkKind::Handshake, at, session.as_deref().map(shown));
                }
                if self.bootstrapped && capabilities.iter().any(|word| word == SERVICE) {
                    self.mark_once(MarkKind::Service, at, session.as_deref().map(shown));
                }
            }
            Event::BrokerFreshness { reachable: false, .. } if self.was_here() => {
                self.mark(MarkKind::Unreachable, at, None);
            }
            // That of an earlier launch was told a little late, or `down` has ended it.
            Event::VmExited { .. }
                if (!self.launched && self.is_stopping()) || (self.launched && at < self.launched_at()) => {}
            Event::VmExited {
                reason,
                outcome,
                last_words,
                ..
            } => {
                let meanwhile = end.is_none_or(|end| at <= end);
                self.exited(at, reason, outcome, last_words.as_deref(), meanwhile);
            }
            _ => {}
        }
    }

    /// Whether a VM that isn't heard any more is news: not of the boot before this one, nor of one that is
    /// being shut down.
    fn was_here(&self) -> bool {
        let heard = self
            .report
            .marks
            .iter()
            .any(|mark| mark.mark == MarkKind::Handshake);
        (heard || !self.launched) && self.bootstrapped
    }

    fn is_stopping(&self) -> bool {
        self.report.phases.iter().any(|phase| phase.phase == POWER_BUTTON)
    }

    fn launched_at(&self) -> u64 {
        let launched = self
            .report
            .marks
            .iter()
            .rfind(|mark| mark.mark == MarkKind::Launched);
        launched.map_or(0, |mark| mark.at_ms)
    }

    /// QEMU is gone. What died before this run, or after it, doesn't make the run fail.
    fn exited(&mut self, at: u64, reason: &str, outcome: &str, last_words: Option<&str>, meanwhile: bool) {
        let text = match last_words {
            Some(words) => format!("{outcome} ({reason}): {words}"),
            None => format!("{outcome} ({reason})"),
        };
        self.mark(MarkKind::Exited, at, Some(shown(&text)));
        if meanwhile && outcome == "crashed" && self.report.error.is_none() {
            self.fail(&text);
        }
    }

    fn settle(&mut self, state: State) {
        if !self.settled {
            self.report.state = state;
            self.settled = true;
        }
    }

    /// The first reason is the cause of those that follow.
    fn fail(&mut self, error: &str) {
        self.report.state = State::Failed;
        self.settled = true;
        self.report.error.get_or_insert_with(|| shown(error));
    }

    fn end_signal(&mut self, at: u64, state: State) {
        if let Some((signal, since)) = self.signal.take() {
            self.phase(&signal, state, at, at.saturating_sub(since), None);
        }
    }

    /// Until its first event a VM has waited for its turn.
    fn queued(&mut self, until: u64) {
        if self.report.phases.is_empty() && until >= QUEUED_FROM_MS {
            self.push(Phase {
                phase: QUEUED.to_owned(),
                state: State::Waiting,
                start_ms: 0,
                duration_ms: until,
                detail: None,
            });
        }
    }

    fn phase(&mut self, phase: &str, state: State, end: u64, duration_ms: u64, detail: Option<String>) {
        let start_ms = end.saturating_sub(duration_ms);
        self.queued(start_ms);
        self.push(Phase {
            phase: phase.to_owned(),
            state,
            start_ms,
            duration_ms,
            detail,
        });
    }

    fn push(&mut self, phase: Phase) {
        if self.report.phases.len() < MOST_PHASES {
            self.report.phases.push(phase);
        } else {
            self.report.left_out += 1;
        }
    }

    fn mark_once(&mut self, mark: MarkKind, at: u64, detail: Option<String>) {
        if !self.report.marks.iter().any(|seen| seen.mark == mark) {
            self.mark(mark, at, detail);
        }
    }

    fn mark(&mut self, mark: MarkKind, at_ms: u64, detail: Option<String>) {
        if self.report.marks.len() < MOST_PHASES {
            self.report.marks.push(Mark { mark, at_ms, detail });
        } else {
            self.report.left_out += 1;
        }
    }

    fn finish(mut self, outcome: Outcome, known: u64) -> VmReport {
        let report = &mut self.report;
        let end = report.phases.iter().map(Phase::end_ms).max().unwrap_or(0);
        let open = self.signal.take();
        if !self.settled {
            report.state = match outcome {
                // Started and not bootstrapped, or found as it should be.
                Outcome::Ok | Outcome::Failed => State::Ok,
                Outcome::Interrupted | Outcome::Unfinished => State::Waiting,
            };
            if report.state == State::Waiting && known > end && report.phases.len() < MOST_PHASES {
                report.phases.push(Phase {
                    phase: open.map_or_else(|| "unfinished".to_owned(), |(signal, _)| signal),
                    state: State::Waiting,
                    start_ms: end,
                    duration_ms: known - end,
                    detail: Some("its end is not known".to_owned()),
                });
            }
        }
        // Steps that ran side by side were told when they ended.
        report.phases.sort_by_key(|phase| phase.start_ms);
        report.marks.sort_by_key(|mark| mark.at_ms);
        self.report
    }
}

/// The VM whose timeline an event belongs to.
fn vm_of(event: &Event) -> Option<&VmName> {
    Some(match event {
        Event::OverlayPrepared { vm, .. }
        | Event::VmLaunched { vm, .. }
        | Event::VmExited { vm, .. }
        | Event::ShutdownRequested { vm, .. }
        | Event::CooperativeSucceeded { vm, .. }
        | Event::CooperativeTimedOut { vm, .. }
        | Event::Escalated { vm, .. }
        | Event::ShutdownComplete { vm, .. }
        | Event::BootstrapStarted { vm, .. }
        | Event::BootstrapStep { vm, .. }
        | Event::BootstrapCompleted { vm, .. }
        | Event::BootstrapFailed { vm, .. } => vm,
        Event::BootstrapPlanned(plan) => &plan.vm,
        _ => return None,
    })
}
