//! An agent for tests alone: it shows that one file and one line in [`super::AGENTS`] make an agent.
//!
//! Here: its stream, in which each line is a word and a text. Not here: the list's agents for people.

use std::ffi::OsString;

use serde_json::json;

use super::{Agent, AgentEvent, AgentRequest};
use crate::core::events::Severity;

/// Its lines are `thread ID`, `say TEXT` and `end`.
#[derive(Clone, Copy, Debug)]
pub struct TestAgent;

impl Agent for TestAgent {
    fn name(&self) -> &'static str {
        "test-agent"
    }

    fn program(&self) -> &'static str {
        "cat"
    }

    fn install(&self) -> &'static str {
        "every system has it"
    }

    fn argv(&self, ask: &AgentRequest) -> Vec<OsString> {
        ask.extra.clone()
    }

    fn read(&self, line: &str) -> Vec<AgentEvent> {
        match line.split_once(' ').unwrap_or((line, "")) {
            ("thread", id) => vec![AgentEvent::Thread { id: id.to_owned() }, AgentEvent::TurnStarted],
            ("say", text) => vec![AgentEvent::Message {
                severity: Severity::Info,
                text: text.to_owned(),
                data: json!({"kind": "agent_message"}),
            }],
            _ => vec![AgentEvent::TurnCompleted],
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::core::cancel::Cancel;
    use crate::core::harness::{AGENTS, Verdict, agent_named, agent_names};
    use crate::core::lines::journal::Rotation;
    use crate::core::operations::harness::{Input, RelayOptions, list, relay, replay};
    use crate::core::reporter::Silent;
    use crate::core::root::paths::StateRoot;
    use crate::core::scratch::Scratch;

    #[test]
    fn an_agent_of_the_list_is_found_relayed_kept_and_shown_again() {
        assert_eq!(agent_names(), ["codex", "test-agent"]);
        assert_eq!(AGENTS[0].name(), "codex", "the default");
        assert!(agent_named("nobody").is_none());
        let scratch = Scratch::new("test-agent");
        let state = StateRoot::new(scratch.path("state"));
        let stream = "thread t-1\nsay hello\nend\n";
        let options = RelayOptions {
            agent: agent_named("test-agent").unwrap(),
            input: Input::Stream(Box::new(stream.as_bytes())),
            kept_in: Some((state.clone(), Rotation::default())),
            cancel: Cancel::new(),
        };
        let outcome = relay(options, &mut Silent).unwrap();
        assert_eq!(outcome.verdict, Verdict::Complete);
        let threads = list(&state).unwrap();
        assert_eq!(
            (threads[0].thread.as_str(), threads[0].agent.as_str()),
            ("t-1", "test-agent")
        );
        let mut said = Vec::new();
        replay(&threads[0], |event| {
            if let crate::core::events::Event::Message { text, source, .. } = event {
                said.push((source.unwrap_or_default(), text));
            }
            true
        })
        .unwrap();
        assert!(
            said.contains(&("test-agent".to_owned(), "hello".to_owned())),
            "{said:?}"
        );
    }
}
