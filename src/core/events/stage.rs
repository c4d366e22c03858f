//! The parts of a run that all its VMs wait for.
//!
//! Here: their names, and the message that reports the end of one. Not here: who does them
//! (`core::images`, `core::operations::fleet::accelerator`).

use std::time::Duration;

use serde_json::{Value, json};

use crate::core::time::millis;

use super::Event;

/// One such part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The default guest is built.
    ImageBuild,
    /// A base image is fetched.
    ImageFetch,
    /// A test guest shows whether KVM can be used.
    KvmTrial,
}

impl Stage {
    /// All of them.
    pub const ALL: [Stage; 3] = [Stage::ImageBuild, Stage::ImageFetch, Stage::KvmTrial];

    /// Its name in a message's `data`, and in a report.
    pub fn as_str(self) -> &'static str {
        match self {
            Stage::ImageBuild => "image-build",
            Stage::ImageFetch => "image-fetch",
            Stage::KvmTrial => "kvm-trial",
        }
    }

    /// The stage whose end a message reports, and how many milliseconds it took.
    pub fn ended_by(event: &Event) -> Option<(Stage, u64)> {
        let Event::Message {
            vm: None,
            data: Some(data),
            ..
        } = event
        else {
            return None;
        };
        let name = data.get("stage").and_then(Value::as_str)?;
        let stage = Stage::ALL.into_iter().find(|stage| stage.as_str() == name)?;
        Some((stage, data.get("elapsed_ms").and_then(Value::as_u64)?))
    }

    /// The message, with the end of this stage added.
    pub fn end(self, elapsed: Duration, mut message: Event) -> Event {
        if let Event::Message { data, .. } = &mut message {
            *data = Some(json!({"stage": self.as_str(), "elapsed_ms": millis(elapsed)}));
        }
        message
    }
}
