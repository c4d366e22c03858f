//! The contract line: an [`Event`] as the NDJSON object that scripts read (docs/EVENTS.md).
//!
//! Here: the `type` and `phase` words and the envelope. Not here: the events themselves
//! (`core::events`), or writing lines anywhere (`core::reporter`, `core::lines::journal`).

use std::borrow::Cow;
use std::fmt;
use std::io::Write;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Event;
use crate::core::escape::escape_json;

/// The contract's version; it stays 1 while fields are only added.
pub const CONTRACT_VERSION: u32 = 1;

/// What is added around each event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stamped {
    /// Wall clock, RFC 3339 with milliseconds, UTC.
    pub ts: String,
    /// Milliseconds since the run began, by a clock that never goes back.
    pub offset_ms: u64,
    /// Counts the events of one run from 0.
    pub seq: u64,
    /// Id of the operation; the broker is a run of its own.
    pub run: String,
    /// The fact.
    pub event: Event,
}

/// The contract's names for one variant of [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fact {
    /// The variant, as the embedders' encoding spells it.
    pub variant: &'static str,
    /// `type` of the contract line.
    pub kind: &'static str,
    /// `phase`, in the `vm.lifecycle` family.
    pub phase: Option<&'static str>,
}

/// Every fact, in the order of the enum. A test holds that no variant is missing.
pub const FACTS: [Fact; 32] = [
    Fact {
        variant: "Message",
        kind: "message",
        phase: None,
    },
    Fact {
        variant: "OverlayPrepared",
        kind: "vm.lifecycle",
        phase: Some("overlay-prepared"),
    },
    Fact {
        variant: "VmLaunched",
        kind: "vm.lifecycle",
        phase: Some("launched"),
    },
    Fact {
        variant: "VmExited",
        kind: "vm.lifecycle",
        phase: Some("exited"),
    },
    Fact {
        variant: "VmPaused",
        kind: "vm.lifecycle",
        phase: Some("paused"),
    },
    Fact {
        variant: "VmResumed",
        kind: "vm.lifecycle",
        phase: Some("resumed"),
    },
    Fact {
        variant: "VmRebooted",
        kind: "vm.lifecycle",
        phase: Some("rebooted"),
    },
    Fact {
        variant: "ShutdownRequested",
        kind: "vm.lifecycle",
        phase: Some("shutdown-requested"),
    },
    Fact {
        variant: "CooperativeAttempted",
        kind: "vm.lifecycle",
        phase: Some("cooperative-attempted"),
    },
    Fact {
        variant: "CooperativeSucceeded",
        kind: "vm.lifecycle",
        phase: Some("cooperative-succeeded"),
    },
    Fact {
        variant: "CooperativeTimedOut",
        kind: "vm.lifecycle",
        phase: Some("cooperative-timed-out"),
    },
    Fact {
        variant: "Escalated",
        kind: "vm.lifecycle",
        phase: Some("escalated"),
    },
    Fact {
        variant: "ShutdownComplete",
        kind: "vm.lifecycle",
        phase: Some("shutdown-complete"),
    },
    Fact {
        variant: "OverlayDiscarded",
        kind: "vm.lifecycle",
        phase: Some("overlay-discarded"),
    },
    Fact {
        variant: "BootstrapPlanned",
        kind: "bootstrap.planned",
        phase: None,
    },
    Fact {
        variant: "BootstrapStarted",
        kind: "bootstrap.started",
        phase: None,
    },
    Fact {
        variant: "BootstrapStep",
        kind: "bootstrap.step",
        phase: None,
    },
    Fact {
        variant: "BootstrapCompleted",
        kind: "bootstrap.completed",
        phase: None,
    },
    Fact {
        variant: "BootstrapFailed",
        kind: "bootstrap.failed",
        phase: None,
    },
    Fact {
        variant: "BrokerStarted",
        kind: "broker.started",
        phase: None,
    },
    Fact {
        variant: "BrokerStopped",
        kind: "broker.stopped",
        phase: None,
    },
    Fact {
        variant: "BrokerHandshake",
        kind: "broker.handshake",
        phase: None,
    },
    Fact {
        variant: "BrokerSession",
        kind: "broker.session",
        phase: None,
    },
    Fact {
        variant: "BrokerFreshness",
        kind: "broker.freshness",
        phase: None,
    },
    Fact {
        variant: "BrokerBackpressure",
        kind: "broker.backpressure",
        phase: None,
    },
    Fact {
        variant: "Cleanup",
        kind: "cleanup",
        phase: None,
    },
    Fact {
        variant: "CommandAccepted",
        kind: "command.accepted",
        phase: None,
    },
    Fact {
        variant: "CommandRejected",
        kind: "command.rejected",
        phase: None,
    },
    Fact {
        variant: "CommandCompleted",
        kind: "command.completed",
        phase: None,
    },
    Fact {
        variant: "CommandFailed",
        kind: "command.failed",
        phase: None,
    },
    Fact {
        variant: "Usage",
        kind: "usage",
        phase: None,
    },
    Fact {
        variant: "Summary",
        kind: "summary",
        phase: None,
    },
];

impl Event {
    /// The contract's names for this fact. The `match` is exhaustive, so a new variant asks for
    /// a row in [`FACTS`].
    pub fn fact(&self) -> Fact {
        let row = match self {
            Event::Message { .. } => 0,
            Event::OverlayPrepared { .. } => 1,
            Event::VmLaunched { .. } => 2,
            Event::VmExited { .. } => 3,
            Event::VmPaused { .. } => 4,
            Event::VmResumed { .. } => 5,
            Event::VmRebooted { .. } => 6,
            Event::ShutdownRequested { .. } => 7,
            Event::CooperativeAttempted { .. } => 8,
            Event::CooperativeSucceeded { .. } => 9,
            Event::CooperativeTimedOut { .. } => 10,
            Event::Escalated { .. } => 11,
            Event::ShutdownComplete { .. } => 12,
            Event::OverlayDiscarded { .. } => 13,
            Event::BootstrapPlanned(_) => 14,
            Event::BootstrapStarted { .. } => 15,
            Event::BootstrapStep { .. } => 16,
            Event::BootstrapCompleted { .. } => 17,
            Event::BootstrapFailed { .. } => 18,
            Event::BrokerStarted { .. } => 19,
            Event::BrokerStopped { .. } => 20,
            Event::BrokerHandshake { .. } => 21,
            Event::BrokerSession { .. } => 22,
            Event::BrokerFreshness { .. } => 23,
            Event::BrokerBackpressure { .. } => 24,
            Event::Cleanup { .. } => 25,
            Event::CommandAccepted { .. } => 26,
            Event::CommandRejected { .. } => 27,
            Event::CommandCompleted { .. } => 28,
            Event::CommandFailed { .. } => 29,
            Event::Usage { .. } => 30,
            Event::Summary { .. } => 31,
        };
        FACTS[row]
    }

    /// The `type` of the contract line.
    pub fn contract_type(&self) -> &'static str {
        self.fact().kind
    }
}

impl Stamped {
    /// The contract line, without its line end: the envelope, then the family's fields in the
    /// order in which [`Event`] declares them, `phase` behind `vm`.
    pub fn contract_line(&self) -> String {
        let Fact { variant, kind, phase } = self.event.fact();
        // Longer than nearly every line; a plan or a script's long line grows it once.
        let mut line = Vec::with_capacity(512);
        let _ = write!(
            line,
            r#"{{"type":"{kind}","v":{CONTRACT_VERSION},"ts":{},"offset_ms":{},"seq":{},"run":{}"#,
            Quoted(&self.ts),
            self.offset_ms,
            self.seq,
            Quoted(&self.run)
        );
        // The embedders' encoding is `{"Variant":{fields}}`: without its wrapping it is the rest
        // of the line. So no field can be in one and not in the other.
        let envelope = line.len();
        if serde_json::to_writer(&mut line, &self.event).is_err() {
            // The one thing that JSON can't hold is a path that is no UTF-8, as of a file that somebody
            // put below a state root. That something happened is told all the same.
            let text = format!(
                "an event `{}` names a path that is no UTF-8",
                self.event.contract_type()
            );
            let told = Stamped {
                event: Event::message(super::Severity::Warn, None, text),
                ..self.clone()
            };
            return told.contract_line();
        }
        let wrapping = r#"{"":{"#.len() + variant.len();
        line.drain(envelope + 1..envelope + wrapping);
        line[envelope] = b',';
        line.pop();
        if let Some(phase) = phase {
            // `vm` comes first in this family, and no comma is in a VM's name.
            let fields = envelope + 1;
            let vm = line[fields..].iter().position(|byte| *byte == b',');
            let behind = vm.map_or(fields, |comma| fields + comma + 1);
            line.splice(behind..behind, format!(r#""phase":"{phase}","#).into_bytes());
        }
        harmless(String::from_utf8(line).expect("JSON is UTF-8"))
    }

    /// The contract line as an object.
    pub fn contract_object(&self) -> Value {
        serde_json::from_str(&self.contract_line()).expect("a contract line is JSON")
    }

    /// Reads a contract line back; `None` for types of a later castra and for lines that are
    /// none. Unknown fields are ignored.
    pub fn from_contract_line(line: &str) -> Option<Stamped> {
        let Value::Object(mut object) = serde_json::from_str(line).ok()? else {
            return None;
        };
        let fact = {
            let kind = object.get("type")?.as_str()?;
            let phase = object.get("phase").and_then(Value::as_str);
            FACTS
                .iter()
                .find(|fact| fact.kind == kind && (fact.phase.is_none() || fact.phase == phase))?
        };
        let ts = object.remove("ts")?.as_str()?.to_owned();
        let offset_ms = object.remove("offset_ms")?.as_u64()?;
        let seq = object.remove("seq")?.as_u64()?;
        let run = object.remove("run")?.as_str()?.to_owned();
        let mut tagged = Map::new();
        tagged.insert(fact.variant.to_owned(), Value::Object(object));
        let event = serde_json::from_value(Value::Object(tagged)).ok()?;
        Some(Stamped {
            ts,
            offset_ms,
            seq,
            run,
            event,
        })
    }
}

/// Readers take more for the end of a line than a line feed, Python's `splitlines` U+2028 for one,
/// and terminals obey characters that JSON leaves as they are. All of these stand inside texts,
/// where an escape says the same.
fn harmless(line: String) -> String {
    // Nearly every line is plain, and that is quickly seen.
    if line.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return line;
    }
    match escape_json(&line) {
        Cow::Borrowed(_) => line,
        Cow::Owned(escaped) => escaped,
    }
}

/// A text of the envelope as JSON. Ours need no escapes; one that was read from a file might.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |byte: u8| byte >= b' ' && byte != b'"' && byte != b'\\';
        match self.0.bytes().all(plain) {
            true => write!(f, "\"{}\"", self.0),
            false => Value::from(self.0).fmt(f),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::core::events::Severity;

    #[test]
    fn a_contract_line_holds_envelope_and_fields() {
        let stamped = Stamped {
            ts: "2026-11-21T10:00:00.000Z".into(),
            offset_ms: 12,
            seq: 3,
            run: "r1".into(),
            event: Event::message(Severity::Info, None, "hello"),
        };
        let object = stamped.contract_object();
        assert_eq!(object["type"], "message");
        assert_eq!(object["v"], 1);
        assert_eq!(object["text"], "hello");
        assert!(object["vm"].is_null(), "optional fields are present and null");
        assert_eq!(object["seq"], 3);
        assert_eq!(
            Stamped::from_contract_line(&stamped.contract_line()),
            Some(stamped)
        );
    }

    #[test]
    fn keys_stand_in_the_documented_order() {
        let stamped = Stamped {
            ts: "2026-11-21T10:00:00.000Z".into(),
            offset_ms: 12,
            seq: 3,
            run: "r1".into(),
            event: Event::ShutdownRequested {
                vm: "web-0".parse().unwrap(),
                pid: 7,
            },
        };
        assert_eq!(
            stamped.contract_line(),
            r#"{"type":"vm.lifecycle","v":1,"ts":"2026-11-21T10:00:00.000Z","offset_ms":12,"seq":3,"run":"r1","vm":"web-0","phase":"shutdown-requested","pid":7}"#
        );
    }

    #[test]
    fn odd_texts_stay_json_on_one_line() {
        let stamped = Stamped {
            ts: "\"\\\n".into(),
            offset_ms: 0,
            seq: 0,
            run: "r\"}\u{1b}".into(),
            event: Event::message(
                Severity::Info,
                None,
                "a \"b\" c, d\r\n\u{b}\u{85}é\u{2028}\u{2029}",
            ),
        };
        let line = stamped.contract_line();
        for end in ['\n', '\r', '\u{b}', '\u{85}', '\u{2028}', '\u{2029}'] {
            assert!(!line.contains(end), "{line}");
        }
        assert_eq!(Stamped::from_contract_line(&line), Some(stamped));
    }

    #[test]
    fn lines_of_later_castras_and_garbage_are_none() {
        for line in [
            "",
            "{}",
            "[]",
            "not json",
            r#"{"type":"vm.teleported","ts":"x","offset_ms":0,"seq":0,"run":"r"}"#,
        ] {
            assert_eq!(Stamped::from_contract_line(line), None, "{line}");
        }
    }
}
