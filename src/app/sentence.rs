//! Events as sentences for people.
//!
//! Here: one sentence per event, without colour. Not here: where and when it is shown (`progress`, `events`).
//! Text that may come from a guest is escaped here: castra's own events have it escaped already, but one from
//! a journal might not.

use castra::core::escape::escape_line;
use castra::core::events::endings::{LaunchEnding, ShutdownEnding};
use castra::core::events::{
    BootstrapPlan, BootstrapPlanAction, BootstrapStepStatus, Event, HandshakeOutcome, SessionPhase, Severity,
};
use castra::core::name::VmName;
use castra::core::reporter::{COMMAND_LINE, LIBRARY};

use super::human::{bytes, duration};

/// Whether a `command.*` event is about an operation of castra; an agent's commands carry its name.
pub fn is_own(source: &str) -> bool {
    [COMMAND_LINE, LIBRARY].contains(&source)
}

/// The longest sentence shown, in bytes.
const LIMIT: usize = 4096;

/// An event in words.
#[derive(Debug, PartialEq, Eq)]
pub struct Sentence<'e> {
    /// Its severity.
    pub severity: Severity,
    /// The VM it is about.
    pub vm: Option<&'e VmName>,
    /// What happened.
    pub text: String,
    /// What to do about it.
    pub advice: Option<String>,
}

impl<'e> Sentence<'e> {
    /// Information about a VM.
    pub fn info(vm: &'e VmName, text: impl AsRef<str>) -> Sentence<'e> {
        Sentence::new(Severity::Info, Some(vm), text)
    }

    fn new(severity: Severity, vm: Option<&'e VmName>, text: impl AsRef<str>) -> Sentence<'e> {
        Sentence {
            severity,
            vm,
            text: escape_line(text.as_ref(), LIMIT),
            advice: None,
        }
    }

    /// The same with what to do about it.
    fn advised(mut self, advice: &Option<String>) -> Sentence<'e> {
        self.advice = advice.as_deref().map(|advice| escape_line(advice, LIMIT));
        self
    }
}

/// The event in words.
pub fn sentence(event: &Event) -> Sentence<'_> {
    use Severity::{Error, Info, Progress, Warn};
    let info = |vm, text: String| Sentence::new(Info, Some(vm), text);
    let warn = |vm, text: String| Sentence::new(Warn, Some(vm), text);
    let of_all = |severity, text: String| Sentence::new(severity, None, text);
    match event {
        Event::Message {
            severity,
            text,
            vm,
            remediation,
            source,
            ..
        } => {
            let text = match source.as_deref() {
                // What a script prints.
                Some("bootstrap") => format!("| {text}"),
                Some(source) => format!("{source}: {text}"),
                None => text.clone(),
            };
            let mut sentence = Sentence::new(*severity, vm.as_ref(), &text);
            if source.is_some() {
                sentence.text = escape_lines(&text);
            }
            sentence.advised(remediation)
        }
        Event::OverlayPrepared {
            vm,
            reused,
            elapsed_ms,
            ..
        } if *reused => info(vm, format!("keeps its disk ({})", duration(*elapsed_ms))),
        Event::OverlayPrepared { vm, elapsed_ms, .. } => {
            info(vm, format!("fresh disk made in {}", duration(*elapsed_ms)))
        }
        Event::VmLaunched {
            vm,
            pid,
            accel,
            accel_reason,
            elapsed_ms,
        } => {
            let (took, accel) = (duration(*elapsed_ms), accel.as_str());
            info(
                vm,
                format!("launched in {took}, pid {pid}, {accel} ({accel_reason})"),
            )
        }
        Event::VmExited {
            vm,
            reason,
            outcome,
            last_words,
            qemu_words,
            remediation,
            ..
        } => {
            let mut text = format!("{outcome} ({reason})");
            for (who, words) in [("console", last_words), ("QEMU", qemu_words)] {
                let words = words.as_deref().unwrap_or_default().trim();
                if !words.is_empty() {
                    text.push_str(&format!("; {who}: {words}"));
                }
            }
            let crashed = *outcome == LaunchEnding::Crashed;
            let severity = if crashed { Error } else { Warn };
            Sentence::new(severity, Some(vm), text).advised(remediation)
        }
        Event::VmPaused {
            vm,
            reason,
            detail,
            remediation,
        } => {
            let why = colon(detail.as_deref());
            warn(vm, format!("is paused ({reason}){why}")).advised(remediation)
        }
        Event::VmResumed {
            vm,
            reason,
            elapsed_ms,
        } => {
            let after = elapsed_ms.map(|ms| format!(" after {}", duration(ms)));
            let after = after.unwrap_or_default();
            info(vm, format!("runs again{after}; it was paused ({reason})"))
        }
        Event::VmRebooted { vm, boots } => info(vm, format!("rebooted (boot {boots} since the launch)")),
        Event::ShutdownRequested { vm, pid } => info(vm, format!("shutting down (pid {pid})")),
        Event::CooperativeAttempted {
            vm,
            method,
            timeout_ms,
        } => {
            let most = duration(*timeout_ms);
            info(
                vm,
                format!("asked to power off by {method}; castra waits up to {most}"),
            )
        }
        Event::CooperativeSucceeded { vm, elapsed_ms, .. } => {
            info(vm, format!("QEMU ended after {}", duration(*elapsed_ms)))
        }
        Event::CooperativeTimedOut {
            vm,
            elapsed_ms,
            detail,
            ..
        } => {
            let why = colon(detail.as_deref());
            warn(vm, format!("didn't power off in {}{why}", duration(*elapsed_ms)))
        }
        Event::Escalated {
            vm,
            pid,
            signal,
            timeout_ms,
        } => {
            let most = duration(*timeout_ms);
            warn(
                vm,
                format!("{signal} sent to pid {pid}; castra waits up to {most}"),
            )
        }
        Event::ShutdownComplete {
            vm,
            outcome,
            elapsed_ms,
            changed,
        } => {
            let failed = *outcome == ShutdownEnding::Failed;
            let severity = if failed { Error } else { Info };
            let text = match (outcome.known(), *changed) {
                (Some(ShutdownEnding::Failed), _) => format!("still runs after {}", duration(*elapsed_ms)),
                (_, false) => "was not running".to_owned(),
                (Some(ShutdownEnding::Graceful), true) => format!("powered off in {}", duration(*elapsed_ms)),
                (Some(ShutdownEnding::Terminated), true) => {
                    format!("stopped by SIGTERM after {}", duration(*elapsed_ms))
                }
                (Some(ShutdownEnding::Killed), true) => {
                    format!("stopped by SIGKILL after {}", duration(*elapsed_ms))
                }
                (_, true) => format!("stopped after {} ({outcome})", duration(*elapsed_ms)),
            };
            Sentence::new(severity, Some(vm), text)
        }
        Event::OverlayDiscarded {
            vm, reclaimed_bytes, ..
        } => info(vm, format!("disk discarded, {} freed", bytes(*reclaimed_bytes))),
        Event::BootstrapPlanned(plan) => planned(plan),
        Event::BootstrapStarted { vm, .. } => info(vm, "waiting for the guest to boot".to_owned()),
        Event::BootstrapStep {
            vm,
            step,
            status,
            duration_ms,
            detail,
        } => {
            let (step, took, detail) = (step.as_str(), duration(*duration_ms), colon(detail.as_deref()));
            let (severity, text) = match status {
                BootstrapStepStatus::Success => (Info, format!("{step} in {took}{detail}")),
                BootstrapStepStatus::Skipped => (Info, format!("{step} skipped{detail}")),
                BootstrapStepStatus::Failed => (Error, format!("{step} failed after {took}{detail}")),
            };
            Sentence::new(severity, Some(vm), text)
        }
        Event::BootstrapCompleted {
            vm,
            noop,
            duration_ms,
            ..
        } => {
            let noop = if *noop { ", nothing to change" } else { "" };
            info(vm, format!("bootstrapped in {}{noop}", duration(*duration_ms)))
        }
        Event::BootstrapFailed {
            vm,
            duration_ms,
            error,
        } => {
            let text = format!("bootstrap failed after {}: {error}", duration(*duration_ms));
            Sentence::new(Error, Some(vm), text)
        }
        Event::BrokerStarted { pid, port } => {
            of_all(Info, format!("broker listens on 127.0.0.1:{port} (pid {pid})"))
        }
        Event::BrokerStopped { pid, .. } => of_all(Info, format!("broker stopped (pid {pid})")),
        Event::BrokerHandshake {
            vm,
            capabilities,
            outcome,
            reason,
            remote,
            repeated,
            ..
        } => {
            let times = repeated
                .map(|times| format!(" ({times} times)"))
                .unwrap_or_default();
            let why = reason.as_deref().unwrap_or("no reason given");
            let (severity, text) = match outcome {
                HandshakeOutcome::Ok if capabilities.is_empty() => {
                    (Info, format!("handshake accepted{times}"))
                }
                HandshakeOutcome::Ok => {
                    let with = capabilities.join(", ");
                    (Info, format!("handshake accepted with {with}{times}"))
                }
                HandshakeOutcome::Declined => (Warn, format!("hello from {remote} declined: {why}{times}")),
            };
            Sentence::new(severity, vm.as_ref(), text)
        }
        Event::BrokerSession {
            vm,
            session,
            phase,
            reason,
            repeated,
        } => {
            let times = repeated
                .map(|times| format!(" (the last of {times})"))
                .unwrap_or_default();
            let why = reason.as_deref().unwrap_or("no reason given");
            match phase {
                SessionPhase::Opened => info(vm, format!("bus session {session} opened{times}")),
                SessionPhase::Closed => info(vm, format!("bus session {session} closed: {why}{times}")),
            }
        }
        Event::BrokerFreshness { vm, reachable, .. } if *reachable => info(vm, "reachable".to_owned()),
        Event::BrokerFreshness {
            vm,
            last_handshake_age_ms,
            ..
        } => {
            let silent = last_handshake_age_ms
                .map(|age| format!(": nothing heard for {}", duration(age)))
                .unwrap_or_default();
            warn(vm, format!("no longer reachable{silent}"))
        }
        Event::BrokerBackpressure { vm, reason, .. } => {
            Sentence::new(Warn, vm.as_ref(), format!("back-pressure: {reason}"))
        }
        Event::Cleanup {
            path,
            category,
            bytes: size,
            dry_run,
        } => {
            let verb = if *dry_run { "would remove" } else { "removed" };
            let (path, size) = (path.display(), bytes(*size));
            of_all(Info, format!("{verb} {path} ({category}, {size})"))
        }
        Event::CommandAccepted { command, source, .. } if !is_own(source) => {
            of_all(Progress, format!("{source} runs {}", in_short(command)))
        }
        Event::CommandCompleted {
            command,
            source,
            duration_ms,
            ..
        } if !is_own(source) => {
            let (command, took) = (in_short(command), within(*duration_ms));
            of_all(Info, format!("{source} ran {command}{took}"))
        }
        Event::CommandFailed {
            command,
            source,
            detail,
            duration_ms,
            ..
        } if !is_own(source) => {
            let (command, took) = (in_short(command), within(*duration_ms));
            of_all(Warn, format!("{source} ran {command}{took}: {detail}"))
        }
        Event::CommandAccepted { command, detail, .. } => {
            of_all(Info, format!("{command} begins{}", colon(detail.as_deref())))
        }
        Event::CommandRejected {
            command,
            detail,
            remediation,
            ..
        } => of_all(Error, format!("{command} refused: {detail}")).advised(remediation),
        Event::CommandCompleted {
            command,
            detail,
            duration_ms,
            ..
        } => {
            let (took, detail) = (within(*duration_ms), colon(detail.as_deref()));
            of_all(Info, format!("{command} done{took}{detail}"))
        }
        Event::CommandFailed {
            command,
            detail,
            duration_ms,
            ..
        } => of_all(
            Error,
            format!("{command} failed{}: {detail}", within(*duration_ms)),
        ),
        Event::Usage {
            prompt_tokens,
            completion_tokens,
            scope,
            ..
        } => {
            let text = format!("tokens of this {scope}: {prompt_tokens} in, {completion_tokens} out");
            of_all(Info, text)
        }
        // How long it took is told by the line before, of `command.completed`.
        Event::Summary { operation, vms, .. } => of_all(
            Info,
            format!(
                "{operation}: {} changed, {} unchanged, {} failed",
                vms.changed, vms.unchanged, vms.failed
            ),
        ),
    }
}

fn planned(plan: &BootstrapPlan) -> Sentence<'_> {
    let (severity, text) = match plan.action {
        BootstrapPlanAction::Run => (Severity::Info, format!("bootstrap planned: {}", plan.reason)),
        BootstrapPlanAction::Skip => (Severity::Info, format!("no bootstrap: {}", plan.reason)),
        BootstrapPlanAction::Error => (Severity::Error, format!("can't be bootstrapped: {}", plan.reason)),
    };
    Sentence::new(severity, Some(&plan.vm), text)
}

/// Keeps line breaks, and indents all lines but the first.
fn escape_lines(text: &str) -> String {
    let mut lines = String::new();
    for line in text.trim_end().lines() {
        if !lines.is_empty() {
            lines.push_str("\n  ");
        }
        let room = LIMIT.saturating_sub(lines.len());
        if room < 80 {
            lines.push('…');
            break;
        }
        lines.push_str(&escape_line(line, room));
    }
    lines
}

/// A command line, cut to a length.
fn in_short(command: &str) -> String {
    format!("`{}`", escape_line(command, 200))
}

fn colon(detail: Option<&str>) -> String {
    detail.map(|text| format!(": {text}")).unwrap_or_default()
}

fn within(duration_ms: Option<u64>) -> String {
    duration_ms
        .map(|ms| format!(" in {}", duration(ms)))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
