//! What one run did with one VM, event after event.
//!
//! Here: which event becomes which bar or mark, and when a VM has failed. Not here: the run as a whole
//! (`super::from_events`), or drawing (`super::timeline`).

use crate::core::events::endings::{LaunchEnding, ShutdownEnding};
use crate::core::events::{BootstrapPlanAction, BootstrapStepKind, BootstrapStepStatus, Event};
use crate::core::name::VmName;
use crate::core::runtime::shutdown::SSH_POWEROFF;

use super::MAX_PHASES;
use super::from_events::shown;
use super::model::{Mark, MarkKind, Outcome, Phase, QUEUED, State, VmReport};

/// A shorter wait before a VM's first event isn't worth a bar.
const QUEUED_FROM_MS: u64 = 50;
/// The phase in which a disk is made.
const OVERLAY: &str = "overlay";
/// The phase in which a guest is asked to power off by its power button; over ssh it is called as in events.
const POWER_BUTTON: &str = "power-button";
/// The capability by which the in-guest service is known.
const SERVICE: &str = "vizier-v1";
/// How the detail of `wait-handshake` begins where a banner was the proof of life.
const BANNER: &str = "SSH banner";

fn power_off(method: &str) -> &'static str {
    match method {
        SSH_POWEROFF => SSH_POWEROFF,
        _ => POWER_BUTTON,
    }
}

/// One VM in one run.
pub(super) struct VmHistory {
    pub(super) vm: VmName,
    report: VmReport,
    /// A verdict on it has come.
    is_final: bool,
    launched: bool,
    bootstrapped: bool,
    /// A signal it was sent and when: the bar ends with the next event.
    signal: Option<(String, u64)>,
}

impl VmHistory {
    pub(super) fn new(vm: &VmName) -> VmHistory {
        VmHistory {
            vm: vm.clone(),
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
            is_final: false,
            launched: false,
            bootstrapped: false,
            signal: None,
        }
    }

    pub(super) fn add_event(&mut self, at: u64, event: &Event) {
        match event {
            Event::OverlayPrepared {
                elapsed_ms, reused, ..
            } => {
                let detail = reused.then(|| "kept from an earlier launch".to_owned());
                self.phase(OVERLAY, State::Ok, at, *elapsed_ms, detail);
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
            // `up` finds what is left of an earlier launch.
            Event::VmExited { .. } => {
                let text = format!("an earlier launch {}", ending(event));
                self.mark(MarkKind::Exited, at, Some(shown(&text)));
            }
            Event::BootstrapPlanned(plan) => match plan.action {
                BootstrapPlanAction::Run => {}
                BootstrapPlanAction::Skip => self.set_final_state(State::Ok),
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
            Event::BootstrapCompleted { .. } => self.set_final_state(State::Ok),
            Event::BootstrapFailed { error, .. } => {
                // Its last step has said it with the script's last lines; this is the short form.
                self.report.error = Some(shown(error));
                self.report.state = State::Failed;
                self.is_final = true;
            }
            Event::ShutdownRequested { .. } => self.queued(at),
            Event::CooperativeSucceeded {
                method, elapsed_ms, ..
            } => self.phase(power_off(method), State::Ok, at, *elapsed_ms, Some(shown(method))),
            Event::CooperativeTimedOut {
                method,
                elapsed_ms,
                detail,
                ..
            } => {
                let detail = detail.as_deref().map(shown);
                self.phase(power_off(method), State::Failed, at, *elapsed_ms, detail);
            }
            Event::Escalated { signal, .. } => {
                self.end_signal(at, State::Failed);
                self.signal = Some((shown(signal), at));
            }
            Event::ShutdownComplete { outcome, .. } => {
                let state = match outcome.known() {
                    Some(ShutdownEnding::Failed) => State::Failed,
                    Some(ShutdownEnding::AlreadyStopped) => State::Skipped,
                    _ => State::Ok,
                };
                self.end_signal(at, state);
                if self.report.phases.is_empty() {
                    self.phase("stop", state, at, 0, Some(shown(outcome.as_str())));
                }
                match state {
                    State::Failed => self.fail("it could not be stopped"),
                    state => self.set_final_state(state),
                }
            }
            _ => {}
        }
    }

    pub(super) fn add_broker_event(&mut self, at: u64, event: &Event, end: Option<u64>) {
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
            Event::VmExited { outcome, .. } => {
                let meanwhile = end.is_none_or(|end| at <= end);
                let text = ending(event);
                self.mark(MarkKind::Exited, at, Some(shown(&text)));
                // What came after the run doesn't make it fail.
                if meanwhile && *outcome == LaunchEnding::Crashed && self.report.error.is_none() {
                    self.fail(&text);
                }
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
        let asked = |phase: &Phase| [POWER_BUTTON, SSH_POWEROFF].contains(&phase.phase.as_str());
        self.report.phases.iter().any(asked)
    }

    fn launched_at(&self) -> u64 {
        let launched = self
            .report
            .marks
            .iter()
            .rfind(|mark| mark.mark == MarkKind::Launched);
        launched.map_or(0, |mark| mark.at_ms)
    }

    /// Its disk was there, and then came an error: there is no event of a launch that didn't work.
    pub(super) fn not_launched(&mut self, at: u64) {
        let last = self
            .report
            .phases
            .last()
            .filter(|_| !self.launched && !self.is_final);
        if let Some(end) = last.filter(|phase| phase.phase == OVERLAY).map(Phase::end_ms) {
            self.phase("launch", State::Failed, at, at.saturating_sub(end), None);
        }
    }

    fn set_final_state(&mut self, state: State) {
        if !self.is_final {
            self.report.state = state;
            self.is_final = true;
        }
    }

    /// The first reason is the cause of those that follow.
    pub(super) fn fail(&mut self, error: &str) {
        self.report.state = State::Failed;
        self.is_final = true;
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
        if self.report.phases.len() < MAX_PHASES {
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
        if self.report.marks.len() < MAX_PHASES {
            self.report.marks.push(Mark { mark, at_ms, detail });
        } else {
            self.report.left_out += 1;
        }
    }

    pub(super) fn finish(mut self, outcome: Outcome, known: u64, stages: &[Phase]) -> VmReport {
        let report = &mut self.report;
        let end = report.phases.iter().map(Phase::end_ms).max().unwrap_or(0);
        let open = self.signal.take();
        if !self.is_final {
            report.state = match outcome {
                // Started and not bootstrapped, or found as it should be.
                Outcome::Ok | Outcome::Failed => State::Ok,
                Outcome::Interrupted | Outcome::Running | Outcome::Unfinished => State::Waiting,
            };
            if report.state == State::Waiting && known > end && report.phases.len() < MAX_PHASES {
                let (name, detail) = match outcome {
                    Outcome::Running => ("under-way", None),
                    _ => ("unfinished", Some("its end is not known".to_owned())),
                };
                report.phases.push(Phase {
                    phase: open.map_or_else(|| name.to_owned(), |(signal, _)| signal),
                    state: State::Waiting,
                    start_ms: end,
                    duration_ms: known - end,
                    detail,
                });
            }
        }
        name_the_wait(&mut report.phases, stages);
        // Steps that ran side by side were told when they ended.
        report.phases.sort_by_key(|phase| phase.start_ms);
        report.marks.sort_by_key(|mark| mark.at_ms);
        self.report
    }
}

/// Puts what the VM has waited for in place of the part of its waiting.
fn name_the_wait(phases: &mut Vec<Phase>, stages: &[Phase]) {
    let Some(until) = phases
        .first()
        .filter(|phase| phase.phase == QUEUED)
        .map(Phase::end_ms)
    else {
        return;
    };
    let queued = |from: u64, to: u64| {
        (to.saturating_sub(from) >= QUEUED_FROM_MS).then(|| Phase {
            phase: QUEUED.to_owned(),
            state: State::Waiting,
            start_ms: from,
            duration_ms: to - from,
            detail: None,
        })
    };
    let mut named = Vec::new();
    let mut at = 0;
    for stage in stages {
        let (start, end) = (stage.start_ms.max(at), stage.end_ms().min(until));
        if end <= start {
            continue;
        }
        named.extend(queued(at, start));
        named.push(Phase {
            start_ms: start,
            duration_ms: end - start,
            ..stage.clone()
        });
        at = end;
    }
    named.extend(queued(at, until));
    phases.splice(..1, named);
}

/// How a VM ended, in words: `crashed (sigkill): what its console said last; QEMU: what that said; → what to do`.
fn ending(event: &Event) -> String {
    let Event::VmExited {
        reason,
        outcome,
        last_words,
        qemu_words,
        remediation,
        ..
    } = event
    else {
        return String::new();
    };
    let mut text = format!("{outcome} ({reason})");
    let said = [
        last_words.clone(),
        qemu_words.as_ref().map(|words| format!("QEMU: {words}")),
        remediation.as_ref().map(|advice| format!("→ {advice}")),
    ];
    for (number, words) in said.into_iter().flatten().enumerate() {
        text.push_str(if number == 0 { ": " } else { "; " });
        text.push_str(&words);
    }
    text
}
