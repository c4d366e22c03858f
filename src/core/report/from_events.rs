//! Makes one run of a report from its events.
//!
//! Here: the run's end, its notes, which VM an event is about, and which VMs are left out. Not here: a VM's
//! bars and marks (`super::vm_history`), reading the journals (`super::gather`).

use std::collections::HashMap;

use crate::core::escape::escape_line;
use crate::core::events::contract::Stamped;
use crate::core::events::stage::Stage;
use crate::core::events::{Event, Severity};
use crate::core::failure::Exit;
use crate::core::name::VmName;

use super::model::{Note, Outcome, Phase, RunReport, State, VmReport};
use super::vm_history::VmHistory;
use super::{MAX_NOTES, MAX_TEXT_BYTES, MAX_VMS};

/// How many VMs of a run are followed, before the failed ones are picked from them.
const MAX_FOLLOWED: usize = 2_000;

/// How many images of a run have bars of their own.
const MAX_STAGES: usize = 8;

/// A run being put together.
pub(super) struct RunBuilder {
    report: RunReport,
    vms: Vec<VmHistory>,
    index: HashMap<String, usize>,
    /// There were VMs beyond those that are followed.
    beyond: usize,
    /// How many VMs failed, if the run has summed itself up.
    failed: Option<usize>,
    /// Stages that all VMs waited for.
    stages: Vec<Phase>,
    /// Wall clock of its beginning, milliseconds.
    pub began_ms: u64,
}

/// Foreign text, cut and escaped for the report.
pub(super) fn shown(text: &str) -> String {
    escape_line(text, MAX_TEXT_BYTES)
}

impl RunBuilder {
    /// A run of this command that began then; `detail`: the VMs that were named.
    pub(super) fn new(
        run: String,
        command: String,
        detail: Option<&str>,
        ts: &str,
        began_ms: u64,
    ) -> RunBuilder {
        RunBuilder {
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
                vms_untouched: 0,
                notes: Vec::new(),
                notes_left_out: 0,
                bus: None,
            },
            vms: Vec::new(),
            index: HashMap::new(),
            beyond: 0,
            failed: None,
            stages: Vec::new(),
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

    /// The VMs it is about.
    pub(super) fn vms(&self) -> impl Iterator<Item = &VmName> {
        self.vms.iter().map(|history| &history.vm)
    }

    /// Whether its end was kept.
    pub(super) fn has_ended(&self) -> bool {
        self.report.outcome != Outcome::Unfinished
    }

    /// It is under way, now being that wall clock.
    pub(super) fn mark_running(&mut self, now_ms: u64) {
        let so_far = now_ms.saturating_sub(self.began_ms);
        self.report.known_ms = self.report.known_ms.max(so_far);
        self.report.outcome = Outcome::Running;
    }

    fn vm(&mut self, vm: &VmName) -> Option<&mut VmHistory> {
        let key = vm.key();
        let at = match self.index.get(&key) {
            Some(at) => *at,
            None if self.vms.len() >= MAX_FOLLOWED => {
                self.beyond += 1;
                return None;
            }
            None => {
                self.index.insert(key, self.vms.len());
                self.vms.push(VmHistory::new(vm));
                self.vms.len() - 1
            }
        };
        self.vms.get_mut(at)
    }

    /// The next event of this run.
    pub(super) fn add_event(&mut self, stamped: &Stamped) {
        let at = stamped.offset_ms;
        self.report.known_ms = self.report.known_ms.max(at);
        if let Some((stage, ms)) = Stage::ended_by(&stamped.event) {
            self.stage(stage, at, ms);
        }
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
                    && let Some(history) = self.vm(&vm)
                {
                    history.add_event(at, event);
                }
            }
        }
    }

    /// Takes an event of the broker about one of the run's VMs, this long after the run's beginning.
    pub(super) fn add_broker_event(&mut self, key: &str, at: u64, event: &Event) {
        let end = self.report.duration_ms;
        if let Some(history) = self.index.get(key).and_then(|at| self.vms.get_mut(*at)) {
            history.add_broker_event(at, event, end);
        }
    }

    fn stage(&mut self, stage: Stage, at: u64, ms: u64) {
        if self.stages.len() < MAX_STAGES {
            self.stages.push(Phase {
                phase: stage.as_str().to_owned(),
                state: State::Ok,
                start_ms: at.saturating_sub(ms),
                duration_ms: ms.min(at),
                detail: None,
            });
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
            && let Some(history) = self.vm(vm)
        {
            history.not_launched(at);
            history.fail(text);
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
        if self.report.notes.len() < MAX_NOTES {
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
            .map(|vm| vm.finish(outcome, known, &self.stages))
            .filter(|vm| wanted.is_empty() || wanted.contains(&vm.vm.to_ascii_lowercase()))
            .collect();
        let failed = vms.iter().filter(|vm| vm.state == State::Failed).count();
        match wanted.is_empty() {
            true => {
                self.report.vms_total = self.report.vms_total.max(vms.len());
                // One that was up and crashed before the run ended isn't among those that the run counts.
                self.report.vms_failed = self.failed.unwrap_or(0).max(failed);
            }
            false => {
                self.report.vms_total = vms.len();
                self.report.vms_failed = failed;
            }
        }
        if self.beyond == 0 {
            self.report.vms_untouched = self.report.vms_total.saturating_sub(vms.len());
        }
        keep_failed_first(&mut vms, MAX_VMS);
        vms.sort_by_cached_key(|vm| natural(&vm.vm));
        let told = vms.len() + self.report.vms_untouched;
        self.report.vms_left_out = self.report.vms_total.saturating_sub(told);
        self.report.vms = vms;
        self.report
    }
}

/// Names in natural order: `web-2` before `web-10`.
fn natural(name: &str) -> Vec<(u64, String)> {
    let mut key: Vec<(u64, String)> = Vec::new();
    for piece in name.split_inclusive(|c: char| !c.is_ascii_digit()) {
        let digits = piece.trim_end_matches(|c: char| !c.is_ascii_digit());
        let number = digits.parse().unwrap_or(0);
        key.push((number, piece[digits.len()..].to_ascii_lowercase()));
    }
    key
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

/// The VM whose timeline an event belongs to.
fn vm_of(event: &Event) -> Option<&VmName> {
    Some(match event {
        Event::OverlayPrepared { vm, .. }
        | Event::VmLaunched { vm, .. }
        | Event::VmExited { vm, .. }
        | Event::VmPaused { vm, .. }
        | Event::VmResumed { vm, .. }
        | Event::VmRebooted { vm, .. }
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

#[cfg(test)]
#[path = "from_events_tests.rs"]
mod tests;
