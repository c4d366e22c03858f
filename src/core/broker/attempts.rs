//! The report of every handshake attempt: one log line and one event each, merged when there are
//! too many (docs/PROTOCOL.md).
//!
//! Here: the line and the event, and whether an attempt gets a line of its own. Not here: who is
//! admitted (`broker::state`), writing (`broker::effects`).

use crate::core::events::{Event, HandshakeOutcome};
use crate::core::name::VmName;
use crate::core::reporter::wall_clock;
use crate::core::time::of_unix_ms;

use super::protocol::DeclineReason;
use super::throttle::Throttle;

/// One attempt and its outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Who it claimed to be, where a valid name was read.
    pub vm: Option<VmName>,
    /// The project has a VM of that name. Only such attempts are merged under their own name.
    pub listed: bool,
    /// `None`: accepted.
    pub declined: Option<DeclineReason>,
    /// The session granted, public id.
    pub session: Option<String>,
    /// What it offered.
    pub capabilities: Vec<String>,
    /// Where it came from: `127.0.0.1:41000`, or `unix`.
    pub remote: String,
}

/// A log line and the event that says the same.
#[derive(Clone, Debug, PartialEq)]
pub struct AttemptReport {
    /// The VM, where the project knows it.
    pub known: Option<VmName>,
    /// The line, complete, without line end.
    pub line: String,
    /// The event.
    pub event: Event,
}

/// Attempts that are alike in this are merged.
type MergeKey = (Option<VmName>, Option<DeclineReason>);

/// Counts attempts and merges those beyond 20 a second.
#[derive(Debug, Default)]
pub struct Attempts(Throttle<MergeKey, Attempt>);

impl Attempts {
    /// Adds an attempt; returns its report, or `None` if it will be part of a merged line.
    pub fn note(&mut self, boot_ms: u64, wall_ms: u64, attempt: Attempt) -> Option<AttemptReport> {
        let told = self.0.note(boot_ms, attempt, |attempt| {
            if !attempt.listed {
                attempt.vm = None;
            }
            (attempt.vm.clone(), attempt.declined)
        });
        told.map(|attempt| report_of(wall_ms, &attempt, None))
    }

    /// When [`Attempts::flush`] is next worth a call.
    pub fn due(&self) -> Option<u64> {
        self.0.due()
    }

    /// The merged reports of the last second; with `at_once` also those of the current second.
    pub fn flush(&mut self, boot_ms: u64, wall_ms: u64, at_once: bool) -> Vec<AttemptReport> {
        let merged = self.0.flush(boot_ms, at_once);
        merged
            .into_iter()
            .map(|(attempt, count)| report_of(wall_ms, &attempt, Some(count)))
            .collect()
    }
}

/// The head of every line of the broker's log.
pub fn log_prefix(wall_ms: u64, level: &str) -> String {
    let stamp = wall_clock(of_unix_ms(wall_ms));
    format!("[host-broker] {stamp} {level}")
}

/// The line and the event of one attempt, or of `repeated` merged ones. The order of words is part
/// of the contract (docs/PROTOCOL.md); all text in it is checked or castra's own.
fn report_of(wall_ms: u64, attempt: &Attempt, repeated: Option<u64>) -> AttemptReport {
    let vm = attempt.vm.as_ref().map_or("-", VmName::as_str);
    let level = if attempt.declined.is_some() {
        "WARN"
    } else {
        "INFO"
    };
    let verdict = match attempt.declined {
        Some(reason) => format!("outcome=declined reason={reason}"),
        None => format!(
            "outcome=ok session={}",
            attempt.session.as_deref().unwrap_or("none")
        ),
    };
    let capabilities = if attempt.capabilities.is_empty() {
        "-".to_owned()
    } else {
        attempt.capabilities.join(",")
    };
    let mut line = format!(
        "{} hello from vm:{vm} {verdict} capabilities={capabilities} remote={}",
        log_prefix(wall_ms, level),
        attempt.remote,
    );
    if let Some(count) = repeated {
        line.push_str(&format!(" repeated={count}"));
    }
    let event = Event::BrokerHandshake {
        vm: attempt.vm.clone(),
        capabilities: attempt.capabilities.clone(),
        outcome: match attempt.declined {
            Some(_) => HandshakeOutcome::Declined,
            None => HandshakeOutcome::Ok,
        },
        reason: attempt.declined.map(|reason| reason.as_str().to_owned()),
        session: attempt.session.clone(),
        remote: attempt.remote.clone(),
        repeated,
    };
    AttemptReport {
        known: attempt.vm.clone().filter(|_| attempt.listed),
        line,
        event,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // 2026-11-21T10:00:00.123Z
    const WALL: u64 = 1_795_255_200_123;

    fn attempt(vm: &str, declined: Option<DeclineReason>) -> Attempt {
        Attempt {
            vm: vm.parse().ok(),
            listed: vm == "web-0",
            declined,
            session: None,
            capabilities: Vec::new(),
            remote: "127.0.0.1:41000".into(),
        }
    }

    #[test]
    fn the_lines_of_the_design() {
        let mut accepted = attempt("web-0", None);
        accepted.session = Some("s-17".into());
        accepted.capabilities = vec!["bus-v1".into(), "x-demo".into()];
        let mut attempts = Attempts::default();
        let mut line = |attempt| attempts.note(0, WALL, attempt).unwrap().line;
        assert_eq!(
            line(accepted),
            "[host-broker] 2026-11-21T10:00:00.123Z INFO hello from vm:web-0 outcome=ok session=s-17 capabilities=bus-v1,x-demo remote=127.0.0.1:41000"
        );
        assert_eq!(
            line(attempt("db", None)),
            "[host-broker] 2026-11-21T10:00:00.123Z INFO hello from vm:db outcome=ok session=none capabilities=- remote=127.0.0.1:41000"
        );
        assert_eq!(
            line(attempt("evil", Some(DeclineReason::UnknownVm))),
            "[host-broker] 2026-11-21T10:00:00.123Z WARN hello from vm:evil outcome=declined reason=unknown-vm capabilities=- remote=127.0.0.1:41000"
        );
        assert!(line(attempt("..", Some(DeclineReason::ProtocolError))).contains(" vm:- "));
    }

    #[test]
    fn beyond_twenty_a_second_lines_are_merged() {
        let mut attempts = Attempts::default();
        for _ in 0..20 {
            assert!(attempts.note(5, WALL, attempt("web-0", None)).is_some());
        }
        for number in 0..100 {
            assert_eq!(attempts.note(6, WALL, attempt("web-0", None)), None);
            let evil = attempt(&format!("evil-{number}"), Some(DeclineReason::UnknownVm));
            assert_eq!(attempts.note(7, WALL, evil), None);
        }
        assert_eq!(attempts.due(), Some(1005));
        assert_eq!(attempts.flush(1004, WALL, false), []);
        let lines: Vec<String> = attempts
            .flush(1005, WALL, false)
            .into_iter()
            .map(|e| e.line)
            .collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].contains("vm:- outcome=declined reason=unknown-vm"));
        assert!(lines[0].ends_with(" repeated=100"));
        assert!(lines[1].contains("vm:web-0 outcome=ok session=none") && lines[1].ends_with(" repeated=100"));
        assert!(
            attempts.note(1006, WALL, attempt("web-0", None)).is_some(),
            "a new second"
        );
    }
}
