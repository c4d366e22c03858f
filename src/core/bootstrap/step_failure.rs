//! Why a step of a bootstrap failed, in the words for the step and for the whole bootstrap.
//!
//! Here: the reason, the failing command's last output, the advice. Not here: what ssh's messages mean
//! (`ssh::error`), or the events (`bootstrap::pipeline`).

use std::fmt;

use crate::core::bootstrap::ssh::SshTarget;
use crate::core::bootstrap::ssh::channel::ExecError;
use crate::core::bootstrap::ssh::error::SshError;
use crate::core::bootstrap::watch::StopReason;
use crate::core::human;

/// Why a step failed.
#[derive(Debug)]
pub(super) enum StepFailure {
    /// In words.
    Reason {
        /// The reason, on one line.
        why: String,
        /// The last lines of the failing command's output.
        tail: String,
        /// What to do about it.
        advice: Option<String>,
    },
    /// The operation was stopped, or the VM ended.
    Stopped(StopReason),
}

impl StepFailure {
    pub(super) fn because(why: impl Into<String>) -> StepFailure {
        StepFailure::Reason {
            why: why.into(),
            tail: String::new(),
            advice: None,
        }
    }

    pub(super) fn with_tail(mut self, text: &str) -> StepFailure {
        if let StepFailure::Reason { tail, .. } = &mut self {
            *tail = text.to_owned();
        }
        self
    }

    pub(super) fn with_advice(mut self, text: impl Into<String>) -> StepFailure {
        if let StepFailure::Reason { advice, .. } = &mut self {
            *advice = Some(text.into());
        }
        self
    }

    pub(super) fn of_ssh(error: SshError, target: &SshTarget) -> StepFailure {
        if let SshError::Stopped(stop) = error {
            return StepFailure::Stopped(stop);
        }
        let failure = StepFailure::because(error.to_string());
        match error.advice(target) {
            Some(advice) => failure.with_advice(advice),
            None => failure,
        }
    }

    /// The failure of a command that has no exit code; `tail` is the end of its output.
    pub(super) fn of_exec(error: ExecError, tail: &str, what: &str, target: &SshTarget) -> StepFailure {
        match error {
            ExecError::Ssh(error) => StepFailure::of_ssh(error, target).with_tail(tail),
            ExecError::Stopped(stop) => StepFailure::Stopped(stop),
            ExecError::TimedOut(after) => StepFailure::because(format!(
                "{what} didn't end within {}, so castra ended it and its children",
                human::limit(after)
            ))
            .with_tail(tail),
            ExecError::Feed(error) => StepFailure::because(format!("{what} can't be sent: {error}")),
        }
    }

    /// All parts in one text, with this much of the tail.
    fn in_words(&self, tail: &str) -> String {
        let (why, advice) = match self {
            StepFailure::Reason { why, advice, .. } => (why.clone(), advice.as_deref()),
            StepFailure::Stopped(stop) => (stop.to_string(), None),
        };
        let tail = if tail.is_empty() {
            String::new()
        } else {
            format!(": {tail}")
        };
        let advice = advice.map(|advice| format!(" ({advice})")).unwrap_or_default();
        format!("{why}{tail}{advice}")
    }

    fn tail(&self) -> &str {
        match self {
            StepFailure::Reason { tail, .. } => tail,
            StepFailure::Stopped(_) => "",
        }
    }

    /// The step's detail: all that is known, on one line.
    pub(super) fn detail(&self) -> String {
        self.in_words(&self.tail().replace('\n', " | "))
    }
}

impl fmt::Display for StepFailure {
    /// The bootstrap's failure: the reason and the last line of output.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.in_words(self.tail().lines().last().unwrap_or_default()))
    }
}
