//! Diagnostics: what an operation's events say that somebody should look at.
//!
//! Here: picking them out of the events. Not here: the events (`core::events`), why an operation as
//! a whole ended (`core::failure`), or a VM's own error, which stands in the outcome.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::core::events::endings::LaunchEnding;
use crate::core::events::{Event, Severity};
use crate::core::name::VmName;

/// One thing worth somebody's attention.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnostic {
    /// `warn`, `error` or `blocker`.
    pub severity: Severity,
    /// The VM it is about.
    pub vm: Option<VmName>,
    /// What is wrong. May hold words of a guest: escape it (`core::escape`) before a terminal sees it.
    pub text: String,
    /// What to do about it.
    pub remediation: Option<String>,
}

impl Diagnostic {
    /// What an event says that somebody should look at, if anything.
    pub fn of(event: &Event) -> Option<Diagnostic> {
        match event {
            Event::Message {
                severity: severity @ (Severity::Warn | Severity::Error | Severity::Blocker),
                text,
                vm,
                remediation,
                ..
            } => Some(Diagnostic {
                severity: *severity,
                vm: vm.clone(),
                text: text.clone(),
                remediation: remediation.clone(),
            }),
            Event::BootstrapFailed { vm, error, .. } => Some(Diagnostic {
                severity: Severity::Error,
                vm: Some(vm.clone()),
                text: format!("the bootstrap failed: {error}"),
                remediation: None,
            }),
            Event::VmExited {
                vm,
                reason,
                outcome,
                remediation,
                ..
            } if *outcome == LaunchEnding::Crashed => Some(Diagnostic {
                severity: Severity::Warn,
                vm: Some(vm.clone()),
                text: format!("it crashed: {reason}"),
                remediation: remediation.clone(),
            }),
            _ => None,
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.severity {
            Severity::Info => "info",
            Severity::Progress => "progress",
            Severity::Warn => "warning",
            Severity::Error => "error",
            Severity::Blocker => "blocker",
        };
        write!(f, "{word}: ")?;
        if let Some(vm) = &self.vm {
            write!(f, "{vm}: ")?;
        }
        f.write_str(&self.text)?;
        match &self.remediation {
            Some(next) => write!(f, " ({next})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_asks_for_attention_is_picked_out() {
        let web: VmName = "web".parse().unwrap();
        for (event, shown) in [
            (Event::message(Severity::Info, None, "hello"), None),
            (Event::message(Severity::Progress, Some(&web), "1 of 3"), None),
            (
                Event::advice(Severity::Warn, Some(&web), "odd", "look"),
                Some("warning: web: odd (look)"),
            ),
            (
                Event::advice(Severity::Blocker, None, "stuck", "act"),
                Some("blocker: stuck (act)"),
            ),
            (
                Event::BootstrapFailed {
                    vm: web.clone(),
                    duration_ms: 3,
                    error: "no ssh".into(),
                },
                Some("error: web: the bootstrap failed: no ssh"),
            ),
        ] {
            let found = Diagnostic::of(&event).map(|found| found.to_string());
            assert_eq!(found.as_deref(), shown);
        }
    }
}
