//! The harness: a coding agent's stream as castra's events (docs/HARNESS.md).
//!
//! Here: what every agent's stream is made of ([`AgentEvent`]) and the one trait behind which
//! agents differ ([`Agent`]); in the submodules the Codex CLI's stream ([`codex`]), what turns an
//! agent's words into events ([`relay`]), the bytes and lines they come in ([`pump`],
//! [`line_splitter`], [`json`]), the agent's process ([`agent_process`]), on the host or in a guest ([`guest`]), what it
//! is told at first ([`preamble`]), and what is kept of it ([`transcript`], [`ledger`]). Not here:
//! the operations that put these together (`core::operations::harness`).
//!
//! An agent's output isn't trusted: memory is bounded, and unknown lines are passed on as opaque data.

pub mod agent_process;
pub mod codex;
pub mod guest;
pub mod json;
pub mod ledger;
pub mod line_splitter;
pub mod preamble;
pub mod pump;
pub mod relay;
#[cfg(test)]
mod test_agent;
pub mod transcript;
pub mod usage;

use std::ffi::OsString;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::core::events::Severity;

/// The agents that castra knows, the default first.
pub const AGENTS: &[&dyn Agent] = &[
    &codex::Codex,
    #[cfg(test)]
    &test_agent::TestAgent,
];

/// An agent whose stream castra understands: its program, and one function from a line to events.
pub trait Agent: fmt::Debug + Send + Sync {
    /// Its name, the `source` of its events.
    fn name(&self) -> &'static str;

    /// Its program, as PATH has it.
    fn program(&self) -> &'static str;

    /// How to install it, one sentence.
    fn install(&self) -> &'static str;

    /// The arguments with which its program answers `ask`.
    fn argv(&self, ask: &AgentRequest) -> Vec<OsString>;

    /// The meaning of one line of its stream; a line may have none, or several. A line is any text of at most
    /// [`line_splitter::MAX_LINE_BYTES`] bytes, without line end. An agent keeps no state between lines:
    /// [`relay::Relay`] does.
    fn read(&self, line: &str) -> Vec<AgentEvent>;
}

/// A task for an agent.
#[derive(Clone, Debug, Default)]
pub struct AgentRequest {
    /// The model it is to use; `None`: its own choice.
    pub model: Option<String>,
    /// The thread to continue.
    pub resume: Option<String>,
    /// Further arguments, as they are.
    pub extra: Vec<OsString>,
    /// The prompt.
    pub prompt: String,
}

/// The agent of this name.
pub fn agent_named(name: &str) -> Option<&'static dyn Agent> {
    AGENTS.iter().find(|agent| agent.name() == name).copied()
}

/// The names of all agents, the default first.
pub fn agent_names() -> Vec<&'static str> {
    AGENTS.iter().map(|agent| agent.name()).collect()
}

/// An agent's output, in a form that fits all agents.
#[derive(Clone, Debug, PartialEq)]
pub enum AgentEvent {
    /// A process begins or continues the thread of this name.
    Thread {
        /// Its id, as the agent spells it.
        id: String,
    },
    /// A turn began.
    TurnStarted,
    /// The turn was completed.
    TurnCompleted,
    /// The turn failed.
    TurnFailed {
        /// Why.
        reason: String,
    },
    /// Tokens used so far.
    Usage {
        /// How many.
        tokens: Tokens,
        /// What the count began with.
        since: Since,
    },
    /// Text for people, with what it is made of for scripts.
    Message {
        /// How much attention it asks for.
        severity: Severity,
        /// The text.
        text: String,
        /// `kind` and the fields of that kind.
        data: Value,
    },
    /// The agent runs a command.
    CommandStarted {
        /// Names it among the commands of one process.
        item: String,
        /// The command line.
        command: String,
    },
    /// That command has ended. It counts as started even if that was never said.
    CommandEnded {
        /// Names it among the commands of one process.
        item: String,
        /// The command line.
        command: String,
        /// Whether it ended well.
        ok: bool,
        /// Its exit code, if it has one.
        exit_status: Option<i32>,
        /// The end of its output.
        output: String,
        /// The agent's word for its state, if that says more than `ok`.
        note: Option<String>,
    },
}

/// What a count of tokens begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// The thread, whichever process had its earlier turns.
    Thread,
    /// The process that reports it.
    Process,
}

/// Tokens, as the `usage` event counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokens {
    /// Read by the model, the cached ones included.
    #[serde(rename = "prompt_tokens")]
    pub prompt: u64,
    /// Of those, read from a cache.
    #[serde(rename = "cached_tokens")]
    pub cached: u64,
    /// Written by the model, its reasoning included.
    #[serde(rename = "completion_tokens")]
    pub completion: u64,
}

impl Tokens {
    /// The sum.
    pub fn plus(self, other: Tokens) -> Tokens {
        Tokens {
            prompt: self.prompt.saturating_add(other.prompt),
            cached: self.cached.saturating_add(other.cached),
            completion: self.completion.saturating_add(other.completion),
        }
    }

    /// The difference; `None` if any part is negative.
    pub fn minus(self, other: Tokens) -> Option<Tokens> {
        Some(Tokens {
            prompt: self.prompt.checked_sub(other.prompt)?,
            cached: self.cached.checked_sub(other.cached)?,
            completion: self.completion.checked_sub(other.completion)?,
        })
    }
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The last turn was completed.
    Complete,
    /// The last turn failed, or the agent could not work at all.
    Failed,
    /// The stream ended in the middle of a turn, or before the first.
    Incomplete,
    /// castra ended it because it took too long.
    #[serde(rename = "timed out")]
    TimedOut,
}

impl Verdict {
    /// The contract's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Complete => "complete",
            Verdict::Failed => "failed",
            Verdict::Incomplete => "incomplete",
            Verdict::TimedOut => "timed out",
        }
    }
}
