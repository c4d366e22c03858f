//! The contract line: an [`Event`] as the NDJSON object that scripts read (DESIGN §8).
//!
//! Here: the `type` and `phase` words and the envelope. Not here: the events themselves
//! (`core::events`), or writing lines anywhere (`core::reporter`, `core::journal`).

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Event;

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

impl Event {
    /// The contract's name for this fact, and the phase for the `vm.lifecycle` family. The
    /// `match` is exhaustive, so a new variant asks for a name.
    pub fn contract_type(&self) -> (&'static str, Option<&'static str>) {
        let lifecycle = |phase| ("vm.lifecycle", Some(phase));
        match self {
            Event::Message { .. } => ("message", None),
            Event::OverlayPrepared { .. } => lifecycle("overlay-prepared"),
            Event::VmLaunched { .. } => lifecycle("launched"),
            Event::VmExited { .. } => lifecycle("exited"),
            Event::ShutdownRequested { .. } => lifecycle("shutdown-requested"),
            Event::CooperativeAttempted { .. } => lifecycle("cooperative-attempted"),
            Event::CooperativeSucceeded { .. } => lifecycle("cooperative-succeeded"),
            Event::CooperativeTimedOut { .. } => lifecycle("cooperative-timed-out"),
            Event::Escalated { .. } => lifecycle("escalated"),
            Event::ShutdownComplete { .. } => lifecycle("shutdown-complete"),
            Event::OverlayDiscarded { .. } => lifecycle("overlay-discarded"),
            Event::BootstrapPlanned(_) => ("bootstrap.planned", None),
            Event::BootstrapStarted { .. } => ("bootstrap.started", None),
            Event::BootstrapStep { .. } => ("bootstrap.step", None),
            Event::BootstrapCompleted { .. } => ("bootstrap.completed", None),
            Event::BootstrapFailed { .. } => ("bootstrap.failed", None),
            Event::BrokerStarted { .. } => ("broker.started", None),
            Event::BrokerStopped { .. } => ("broker.stopped", None),
            Event::BrokerHandshake { .. } => ("broker.handshake", None),
            Event::BrokerSession { .. } => ("broker.session", None),
            Event::BrokerFreshness { .. } => ("broker.freshness", None),
            Event::BrokerBackpressure { .. } => ("broker.backpressure", None),
            Event::Cleanup { .. } => ("cleanup", None),
            Event::CommandAccepted { .. } => ("command.accepted", None),
            Event::CommandRejected { .. } => ("command.rejected", None),
            Event::CommandCompleted { .. } => ("command.completed", None),
            Event::CommandFailed { .. } => ("command.failed", None),
            Event::Usage { .. } => ("usage", None),
            Event::Summary { .. } => ("summary", None),
        }
    }
}

impl Stamped {
    /// The contract line, without its line end.
    pub fn contract_line(&self) -> String {
        self.contract_object().to_string()
    }

    /// The contract object: envelope first, then the family's fields.
    pub fn contract_object(&self) -> Value {
        let (kind, phase) = self.event.contract_type();
        let mut object = Map::new();
        object.insert("type".into(), kind.into());
        object.insert("v".into(), CONTRACT_VERSION.into());
        object.insert("ts".into(), self.ts.as_str().into());
        object.insert("offset_ms".into(), self.offset_ms.into());
        object.insert("seq".into(), self.seq.into());
        object.insert("run".into(), self.run.as_str().into());
        if let Some(phase) = phase {
            object.insert("phase".into(), phase.into());
        }
        let tagged = serde_json::to_value(&self.event).expect("events are plain data with text keys");
        if let Value::Object(tagged) = tagged {
            for fields in tagged.into_iter().map(|(_, fields)| fields) {
                if let Value::Object(fields) = fields {
                    object.extend(fields);
                }
            }
        }
        Value::Object(object)
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
    }
}
