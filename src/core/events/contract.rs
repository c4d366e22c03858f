//! The contract line: an [`Event`] as the NDJSON object that scripts read (docs/EVENTS.md).
//!
//! Here: the `type` and `phase` words and the envelope. Not here: the events themselves
//! (`core::events`), or writing lines anywhere (`core::reporter`, `core::lines::journal`).

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Event;
use crate::core::escape::escape_json;
use crate::core::id::RunId;

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
    pub run: RunId,
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

/// The table of all facts, by variant: a variant that it lacks doesn't compile.
macro_rules! facts {
    (@phase) => { None };
    (@phase $phase:literal) => { Some($phase) };
    ($($variant:ident => $kind:literal $(, $phase:literal)?;)*) => {
        /// Every fact.
        pub const FACTS: &[Fact] = &[$(Fact {
            variant: stringify!($variant),
            kind: $kind,
            phase: facts!(@phase $($phase)?),
        }),*];

        impl Event {
            /// The contract's names for this fact.
            pub fn fact(&self) -> Fact {
                match self {
                    $(Event::$variant { .. } => Fact {
                        variant: stringify!($variant),
                        kind: $kind,
                        phase: facts!(@phase $($phase)?),
                    },)*
                }
            }
        }
    };
}

facts! {
    Message => "message";
    OverlayPrepared => "vm.lifecycle", "overlay-prepared";
    VmLaunched => "vm.lifecycle", "launched";
    VmExited => "vm.lifecycle", "exited";
    VmPaused => "vm.lifecycle", "paused";
    VmResumed => "vm.lifecycle", "resumed";
    VmRebooted => "vm.lifecycle", "rebooted";
    ShutdownRequested => "vm.lifecycle", "shutdown-requested";
    CooperativeAttempted => "vm.lifecycle", "cooperative-attempted";
    CooperativeSucceeded => "vm.lifecycle", "cooperative-succeeded";
    CooperativeTimedOut => "vm.lifecycle", "cooperative-timed-out";
    Escalated => "vm.lifecycle", "escalated";
    ShutdownComplete => "vm.lifecycle", "shutdown-complete";
    OverlayDiscarded => "vm.lifecycle", "overlay-discarded";
    BootstrapPlanned => "bootstrap.planned";
    BootstrapStarted => "bootstrap.started";
    BootstrapStep => "bootstrap.step";
    BootstrapCompleted => "bootstrap.completed";
    BootstrapFailed => "bootstrap.failed";
    BrokerStarted => "broker.started";
    BrokerStopped => "broker.stopped";
    BrokerHandshake => "broker.handshake";
    BrokerSession => "broker.session";
    BrokerFreshness => "broker.freshness";
    BrokerBackpressure => "broker.backpressure";
    Cleanup => "cleanup";
    CommandAccepted => "command.accepted";
    CommandRejected => "command.rejected";
    CommandCompleted => "command.completed";
    CommandFailed => "command.failed";
    Usage => "usage";
    Summary => "summary";
}

impl Event {
    /// The `type` of the contract line.
    pub fn contract_type(&self) -> &'static str {
        self.fact().kind
    }

    /// The fields as a JSON object, in the order in which [`Event`] declares them: the embedders' encoding,
    /// `{"Variant":{fields}}`, without its wrapping. So no field can be in one encoding and not in the other.
    pub fn fields(&self) -> serde_json::Result<String> {
        let tagged = serde_json::to_string(self)?;
        let wrapping = format!("{{\"{}\":", self.fact().variant);
        let fields = tagged
            .strip_prefix(&wrapping)
            .and_then(|rest| rest.strip_suffix('}'));
        Ok(fields.unwrap_or("{}").to_owned())
    }
}

impl Stamped {
    /// The contract line, without its line end: the envelope, then the fields in the order in which
    /// [`Event`] declares them, with `phase` after `vm`.
    pub fn contract_line(&self) -> String {
        let Fact { kind, phase, .. } = self.event.fact();
        let Ok(fields) = self.event.fields() else {
            // JSON can't hold a path that isn't UTF-8, such as that of a file which somebody put
            // below a state root. The event is still written, without its fields.
            let text = format!("an event `{kind}` names a path that is no UTF-8");
            let told = Stamped {
                event: Event::message(super::Severity::Warn, None, text),
                ..self.clone()
            };
            return told.contract_line();
        };
        // `vm` comes first in the family that has phases, and no comma is in a VM's name.
        let fields = match (phase, fields.split_once(',')) {
            (Some(phase), Some((vm, rest))) => format!(r#"{vm},"phase":"{phase}",{rest}"#),
            _ => fields,
        };
        harmless(format!(
            r#"{{"type":"{kind}","v":{CONTRACT_VERSION},"ts":{},"offset_ms":{},"seq":{},"run":{},{}"#,
            Quoted(&self.ts),
            self.offset_ms,
            self.seq,
            Quoted(self.run.as_str()),
            fields.trim_start_matches('{')
        ))
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
        let run = object.remove("run")?.as_str()?.into();
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

/// Escapes characters that JSON leaves as they are, but that readers take for a line end (Python's
/// `splitlines` takes U+2028) or that terminals obey. All of them stand inside texts, where an
/// escape means the same.
fn harmless(line: String) -> String {
    // Nearly every line is plain ASCII, which is quickly checked.
    if line.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return line;
    }
    match escape_json(&line) {
        Cow::Borrowed(_) => line,
        Cow::Owned(escaped) => escaped,
    }
}

/// A text of the envelope as JSON. castra's own need no escapes; one that was read from a file may.
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
mod tests {
    use super::*;
    use crate::core::events::Severity;
    use crate::core::failure::{Exit, Failure};

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
    fn a_failure_is_told_with_its_advice_if_it_has_one() {
        let failure = Failure::new(Exit::Failed, "it broke").because("a reason");
        for (failure, next) in [
            (failure.clone(), None),
            (failure.advice("mend it"), Some("mend it".to_owned())),
        ] {
            let event = Event::of_failure(Severity::Warn, None, &failure);
            let Event::Message {
                text, remediation, ..
            } = event
            else {
                panic!("no message");
            };
            assert_eq!((text.as_str(), remediation), ("it broke: a reason", next));
        }
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
