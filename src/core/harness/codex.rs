//! The stream of the Codex CLI (`codex exec --json`).
//!
//! Here: the meaning of each line, for versions 0.55 to 0.169 and unknown later ones, and the program's
//! arguments. Not here: turns, totals and commands that never end (`relay`), or the process
//! (`agent_process`).
//!
//! Facts this rests on: the `error` line is no end, `turn.failed` is one; `item` may carry a key
//! twice; types of lines and items are added with every version, so an unknown one is handed on
//! as it is; usage counts from the beginning of the thread in those versions that also count
//! reasoning tokens, and from the beginning of the process in those before.

use std::ffi::OsString;

use serde_json::{Map, Value, json};

use super::json::{self, Raw, count, cut, head, members, number, opaque, opaque_text, tail, word};
use super::{Agent, AgentEvent, AgentRequest, Since, Tokens};
use crate::core::events::Severity;

/// Longer messages are cut; the transcript has all of the text.
const TEXT_LIMIT: usize = 256 * 1024;
/// Longer command lines are cut.
const COMMAND_LIMIT: usize = 16 * 1024;
/// How much of the end of a command's output an event has.
const OUTPUT_LIMIT: usize = 4096;
/// Longer structured fields are kept as text, cut.
const DATA_LIMIT: usize = 64 * 1024;
/// Unknown lines are shown up to this length.
const GARBAGE_LIMIT: usize = 4096;
/// How many files a text names.
const MAX_NAMED: usize = 5;
/// Paths and names in a text are cut to this length.
const NAME_LIMIT: usize = 512;

/// The Codex CLI.
#[derive(Clone, Copy, Debug, Default)]
pub struct Codex;

/// The state of an item.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Started,
    Updated,
    Completed,
}

impl Agent for Codex {
    fn name(&self) -> &'static str {
        "codex"
    }

    fn program(&self) -> &'static str {
        "codex"
    }

    fn install(&self) -> &'static str {
        "`npm install -g @openai/codex` installs Codex"
    }

    fn argv(&self, ask: &AgentRequest) -> Vec<OsString> {
        let mut argv: Vec<OsString> = vec!["exec".into(), "--json".into()];
        if let Some(model) = &ask.model {
            argv.push(format!("--model={model}").into());
        }
        argv.extend(ask.extra.iter().cloned());
        if ask.resume.is_some() {
            argv.push("resume".into());
        }
        // Behind `--`, because a thread or a prompt must not be taken for a flag.
        argv.push("--".into());
        argv.extend(ask.resume.iter().map(OsString::from));
        argv.push(ask.prompt.as_str().into());
        argv
    }

    fn read(&self, line: &str) -> Vec<AgentEvent> {
        if line.trim_ascii().is_empty() {
            return Vec::new();
        }
        let wanted = ["type", "thread_id", "item", "usage", "error", "message"];
        let Some([kind, thread, item, usage, error, message]) = members(line, wanted) else {
            return vec![garbage(line)];
        };
        let phase = match word(kind).as_deref() {
            Some("thread.started") => match word(thread) {
                Some(id) => return vec![AgentEvent::Thread { id: id.into_owned() }],
                None => return vec![unknown(line, "thread.started")],
            },
            Some("turn.started") => return vec![AgentEvent::TurnStarted],
            Some("turn.completed") => {
                let mut said: Vec<AgentEvent> = usage.and_then(read_usage).into_iter().collect();
                said.push(AgentEvent::TurnCompleted);
                return said;
            }
            Some("turn.failed") => {
                let reason = error
                    .and_then(reason_of)
                    .unwrap_or_else(|| "no reason given".to_owned());
                return vec![AgentEvent::TurnFailed { reason }];
            }
            Some("error") => {
                let text = message.and_then(|raw| head(raw, TEXT_LIMIT)).unwrap_or_default();
                return vec![message_event(Severity::Warn, text, json!({"kind": "error"}))];
            }
            Some("item.started") => Phase::Started,
            Some("item.updated") => Phase::Updated,
            Some("item.completed") => Phase::Completed,
            other => return vec![unknown(line, other.unwrap_or("no type"))],
        };
        match item.and_then(Item::read) {
            Some(item) => item.say(phase).into_iter().collect(),
            None => vec![unknown(line, "an item without type")],
        }
    }
}

/// The members of an item that any type has.
struct Item<'a> {
    raw: Raw<'a>,
    id: String,
    kind: String,
    text: Option<Raw<'a>>,
    message: Option<Raw<'a>>,
    command: Option<Raw<'a>>,
    output: Option<Raw<'a>>,
    exit_code: Option<Raw<'a>>,
    status: Option<Raw<'a>>,
    changes: Option<Raw<'a>>,
    server: Option<Raw<'a>>,
    tool: Option<Raw<'a>>,
    arguments: Option<Raw<'a>>,
    result: Option<Raw<'a>>,
    error: Option<Raw<'a>>,
    query: Option<Raw<'a>>,
    items: Option<Raw<'a>>,
}

impl<'a> Item<'a> {
    fn read(raw: Raw<'a>) -> Option<Item<'a>> {
        let wanted = [
            "id",
            "type",
            "text",
            "message",
            "command",
            "aggregated_output",
            "exit_code",
            "status",
            "changes",
            "server",
            "tool",
            "arguments",
            "result",
            "error",
            "query",
            "items",
        ];
        let [
            id,
            kind,
            text,
            message,
            command,
            output,
            exit_code,
            status,
            changes,
            server,
            tool,
            arguments,
            result,
            error,
            query,
            items,
        ] = members(raw.get(), wanted)?;
        Some(Item {
            raw,
            id: word(id).unwrap_or_default().into_owned(),
            kind: word(kind)?.into_owned(),
            text,
            message,
            command,
            output,
            exit_code,
            status,
            changes,
            server,
            tool,
            arguments,
            result,
            error,
            query,
            items,
        })
    }

    fn say(&self, phase: Phase) -> Option<AgentEvent> {
        match self.kind.as_str() {
            "command_execution" => self.command_execution(phase),
            "agent_message" => self.prose(phase, Severity::Info),
            "reasoning" => self.prose(phase, Severity::Progress),
            "file_change" => Some(self.file_change(phase)),
            "mcp_tool_call" => Some(self.mcp_tool_call(phase)),
            "web_search" => Some(self.web_search(phase)),
            "todo_list" => Some(self.todo_list(phase)),
            "error" => {
                let text = self
                    .message
                    .and_then(|raw| head(raw, TEXT_LIMIT))
                    .unwrap_or_default();
                Some(message_event(Severity::Warn, text, self.data(phase, [])))
            }
            other => Some(message_event(
                severity(phase, Severity::Info),
                format!("an item of type {}", cut(other, NAME_LIMIT)),
                self.data(phase, [("raw", Some(opaque(self.raw, DATA_LIMIT)))]),
            )),
        }
    }

    /// The data of every message about an item: its type, id and state, and its own fields.
    fn data<const N: usize>(&self, phase: Phase, own: [(&str, Option<Value>); N]) -> Value {
        let mut data = Map::new();
        data.insert("kind".into(), self.kind.as_str().into());
        data.insert("item".into(), self.id.as_str().into());
        let state = word(self.status).map(|status| status.into_owned());
        let state = state.unwrap_or_else(|| match phase {
            Phase::Started | Phase::Updated => "in_progress".to_owned(),
            Phase::Completed => "completed".to_owned(),
        });
        data.insert("status".into(), state.into());
        for (name, value) in own {
            data.insert(name.into(), value.unwrap_or_default());
        }
        Value::Object(data)
    }

    /// Whether a completed item says that it failed.
    fn failed(&self) -> bool {
        self.error.is_some() || matches!(word(self.status).as_deref(), Some("failed" | "declined"))
    }

    /// Only the last form of a text counts: earlier ones are its beginning.
    fn prose(&self, phase: Phase, at_most: Severity) -> Option<AgentEvent> {
        let text = self
            .text
            .and_then(|raw| head(raw, TEXT_LIMIT))
            .unwrap_or_default();
        Some(message_event(
            severity(phase, at_most),
            text,
            self.data(phase, []),
        ))
    }

    fn command_execution(&self, phase: Phase) -> Option<AgentEvent> {
        let item = self.id.clone();
        let command = self
            .command
            .and_then(|raw| head(raw, COMMAND_LIMIT))
            .unwrap_or_default();
        match phase {
            Phase::Started => return Some(AgentEvent::CommandStarted { item, command }),
            // The command still runs; its end will be reported.
            Phase::Updated => return None,
            Phase::Completed => {}
        }
        let exit_status = number(self.exit_code);
        let status = word(self.status);
        let ok = match (status.as_deref(), exit_status) {
            (Some("failed" | "declined"), _) => false,
            (Some("completed"), None) => true,
            (_, code) => code == Some(0),
        };
        let note = match status.as_deref() {
            Some("completed" | "failed") => None,
            Some(other) => Some(other.to_owned()),
            None => None,
        };
        Some(AgentEvent::CommandEnded {
            item,
            command,
            ok,
            exit_status,
            output: self
                .output
                .and_then(|raw| tail(raw, OUTPUT_LIMIT))
                .unwrap_or_default(),
            note,
        })
    }

    fn file_change(&self, phase: Phase) -> AgentEvent {
        let changes = self.changes.map(|raw| opaque(raw, DATA_LIMIT));
        let list = changes.as_ref().and_then(Value::as_array);
        let named: Vec<String> = list
            .into_iter()
            .flatten()
            .take(MAX_NAMED)
            .map(|change| {
                let of = |name: &str| change[name].as_str().unwrap_or("?");
                format!("{} {}", cut(of("kind"), NAME_LIMIT), cut(of("path"), NAME_LIMIT))
            })
            .collect();
        let more = list.map_or(0, Vec::len).saturating_sub(named.len());
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        let verb = match (phase, self.failed()) {
            (Phase::Completed, true) => "could not change files",
            (Phase::Completed, false) => "changed files",
            _ => "changes files",
        };
        let text = match named.is_empty() {
            true => verb.to_owned(),
            false => format!("{verb}: {}{more}", named.join(", ")),
        };
        message_event(
            self.severity(phase),
            text,
            self.data(phase, [("changes", changes.clone())]),
        )
    }

    fn mcp_tool_call(&self, phase: Phase) -> AgentEvent {
        let server = word(self.server).unwrap_or_default();
        let tool = word(self.tool).unwrap_or_default();
        let what = format!("{server}/{tool}");
        let text = match (phase, self.failed()) {
            (Phase::Completed, true) => {
                let why = self
                    .error
                    .and_then(reason_of)
                    .unwrap_or_else(|| "no reason given".to_owned());
                format!("tool {what} failed: {}", cut(&why, GARBAGE_LIMIT))
            }
            (Phase::Completed, false) => format!("called tool {what}"),
            _ => format!("calls tool {what}"),
        };
        let own = [
            ("server", Some(server.as_ref().into())),
            ("tool", Some(tool.as_ref().into())),
            ("arguments", self.arguments.map(|raw| opaque(raw, DATA_LIMIT))),
            ("result", self.result.map(|raw| opaque(raw, DATA_LIMIT))),
            ("error", self.error.map(|raw| opaque(raw, DATA_LIMIT))),
        ];
        message_event(self.severity(phase), text, self.data(phase, own))
    }

    fn web_search(&self, phase: Phase) -> AgentEvent {
        let query = self
            .query
            .and_then(|raw| head(raw, GARBAGE_LIMIT))
            .unwrap_or_default();
        let verb = if phase == Phase::Completed {
            "searched"
        } else {
            "searches"
        };
        let text = match query.is_empty() {
            true => format!("{verb} the web"),
            false => format!("{verb} the web: {query}"),
        };
        // Later versions say more of a search (`action`), and say its id twice.
        let raw = opaque(self.raw, DATA_LIMIT);
        let action = raw.get("action").cloned();
        message_event(
            self.severity(phase),
            text,
            self.data(phase, [("query", Some(query.into())), ("action", action)]),
        )
    }

    fn todo_list(&self, phase: Phase) -> AgentEvent {
        let items = self.items.map(|raw| opaque(raw, DATA_LIMIT));
        let list = items
            .as_ref()
            .and_then(Value::as_array)
            .map_or(&[][..], Vec::as_slice);
        let done = list.iter().filter(|item| item["completed"] == true).count();
        let next = list.iter().find(|item| item["completed"] != true);
        let next = next.and_then(|item| item["text"].as_str());
        let next = next.map(|text| format!("; next: {}", cut(text, NAME_LIMIT)));
        message_event(
            self.severity(phase),
            format!("plan: {done} of {} done{}", list.len(), next.unwrap_or_default()),
            self.data(phase, [("items", items.clone())]),
        )
    }

    fn severity(&self, phase: Phase) -> Severity {
        if phase == Phase::Completed && self.failed() {
            return Severity::Warn;
        }
        severity(phase, Severity::Info)
    }
}

/// An item that only began is progress, which its end replaces.
fn severity(phase: Phase, completed: Severity) -> Severity {
    match phase {
        Phase::Completed => completed,
        Phase::Started | Phase::Updated => Severity::Progress,
    }
}

fn message_event(severity: Severity, text: String, data: Value) -> AgentEvent {
    AgentEvent::Message { severity, text, data }
}

/// A line of a type that isn't known, as it is.
fn unknown(line: &str, kind: &str) -> AgentEvent {
    message_event(
        Severity::Info,
        format!("a line of type {}", cut(kind, NAME_LIMIT)),
        json!({"kind": "unknown", "raw": opaque_text(line, DATA_LIMIT)}),
    )
}

/// A line that is no JSON object.
fn garbage(line: &str) -> AgentEvent {
    message_event(
        Severity::Warn,
        "a line that isn't a JSON object".to_owned(),
        json!({"kind": "garbage", "raw": cut(line, GARBAGE_LIMIT)}),
    )
}

/// The text of `{"message": …}`, or of a plain string.
fn reason_of(error: Raw<'_>) -> Option<String> {
    if json::is_object(error) {
        let [message] = members(error.get(), ["message"])?;
        return head(message?, TEXT_LIMIT);
    }
    head(error, TEXT_LIMIT)
}

fn read_usage(usage: Raw<'_>) -> Option<AgentEvent> {
    let wanted = [
        "input_tokens",
        "cached_input_tokens",
        "output_tokens",
        "reasoning_output_tokens",
        "cache_write_input_tokens",
    ];
    let [input, cached, output, reasoning, cache_write] = members(usage.get(), wanted)?;
    if input.is_none() && output.is_none() {
        return None;
    }
    Some(AgentEvent::Usage {
        tokens: Tokens {
            prompt: count(input).unwrap_or(0),
            cached: count(cached).unwrap_or(0),
            completion: count(output).unwrap_or(0),
        },
        since: match (reasoning, cache_write) {
            (None, None) => Since::Process,
            _ => Since::Thread,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> AgentEvent {
        let mut said = Codex.read(line);
        assert_eq!(said.len(), 1, "{said:?}");
        said.remove(0)
    }

    fn message(line: &str) -> (Severity, String, Value) {
        match one(line) {
            AgentEvent::Message { severity, text, data } => (severity, text, data),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn arguments_are_never_taken_for_flags() {
        let mut ask = AgentRequest {
            prompt: "--help".into(),
            ..AgentRequest::default()
        };
        assert_eq!(Codex.argv(&ask), ["exec", "--json", "--", "--help"]);
        ask.model = Some("-m".into());
        ask.resume = Some("--last".into());
        ask.extra = vec!["--oss".into()];
        assert_eq!(
            Codex.argv(&ask),
            [
                "exec",
                "--json",
                "--model=-m",
                "--oss",
                "resume",
                "--",
                "--last",
                "--help"
            ]
        );
    }

    #[test]
    fn a_key_that_comes_twice_counts_the_second_time() {
        let line = r#"{"type":"item.completed","item":{"id":"a","id":"ws_1","type":"web_search","query":"q","action":{"type":"search"},"query":"weather"},"type":"item.completed"}"#;
        let (severity, text, data) = message(line);
        assert_eq!(
            (severity, text.as_str()),
            (Severity::Info, "searched the web: weather")
        );
        assert_eq!(data["item"], "ws_1");
        assert_eq!(data["action"]["type"], "search");
    }

    #[test]
    fn what_is_unknown_is_handed_on() {
        let (_, text, data) =
            message(r#"{"type":"item.completed","item":{"id":"i","type":"teleport","x":[1]}}"#);
        assert_eq!(text, "an item of type teleport");
        assert_eq!(data["raw"]["x"][0], 1);
        let (_, text, data) = message(r#"{"type":"turn.paused","why":"tea"}"#);
        assert_eq!(text, "a line of type turn.paused");
        assert_eq!(data["raw"]["why"], "tea");
        for odd in [
            r#"{"type":7}"#,
            r#"{}"#,
            r#"{"type":"item.completed"}"#,
            r#"{"type":"item.completed","item":[]}"#,
            r#"{"type":"thread.started"}"#,
        ] {
            assert_eq!(message(odd).2["kind"], "unknown", "{odd}");
        }
        for none in [
            "no json",
            "[1]",
            "{\"type\":\"turn.started\"",
            "{\"type\":\"turn.started\"}{}",
        ] {
            let (severity, _, data) = message(none);
            assert_eq!(
                (severity, &data["kind"]),
                (Severity::Warn, &json!("garbage")),
                "{none}"
            );
        }
        assert!(Codex.read(" \r").is_empty());
    }

    #[test]
    fn a_state_nobody_has_heard_of_goes_by_the_exit_code() {
        let ended = |status: &str, code: &str| {
            let line = format!(
                r#"{{"type":"item.completed","item":{{"id":"i","type":"command_execution","command":"c","aggregated_output":"o","exit_code":{code},"status":{status}}}}}"#
            );
            match one(&line) {
                AgentEvent::CommandEnded {
                    ok,
                    exit_status,
                    note,
                    ..
                } => (ok, exit_status, note),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(ended("\"completed\"", "0"), (true, Some(0), None));
        assert_eq!(ended("\"completed\"", "null"), (true, None, None));
        assert_eq!(ended("\"failed\"", "0"), (false, Some(0), None));
        assert_eq!(
            ended("\"declined\"", "null"),
            (false, None, Some("declined".into()))
        );
        assert_eq!(
            ended("\"cancelled\"", "0"),
            (true, Some(0), Some("cancelled".into()))
        );
        assert_eq!(ended("{\"new\":1}", "3"), (false, Some(3), None));
    }

    #[test]
    fn usage_tells_its_generation() {
        let since = |usage: &str| match Codex
            .read(&format!(r#"{{"type":"turn.completed","usage":{usage}}}"#))
            .remove(0)
        {
            AgentEvent::Usage { tokens, since } => (tokens.prompt, since),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            since(r#"{"input_tokens":5,"output_tokens":1}"#),
            (5, Since::Process)
        );
        assert_eq!(
            since(r#"{"input_tokens":5,"output_tokens":1,"reasoning_output_tokens":0}"#),
            (5, Since::Thread)
        );
        assert_eq!(
            Codex.read(r#"{"type":"turn.completed"}"#),
            [AgentEvent::TurnCompleted]
        );
        assert_eq!(
            Codex.read(r#"{"type":"turn.completed","usage":{}}"#),
            [AgentEvent::TurnCompleted]
        );
    }

    #[test]
    fn large_values_are_cut() {
        let long = "x".repeat(1 << 20);
        let (_, text, _) = message(&format!(
            r#"{{"type":"item.completed","item":{{"id":"i","type":"agent_message","text":"{long}"}}}}"#
        ));
        assert!(text.len() <= TEXT_LIMIT + 4);
        let (_, _, data) = message(&format!(r#"{{"type":"new","x":"{long}"}}"#));
        assert!(data["raw"].as_str().unwrap().len() <= DATA_LIMIT + 4);
        let (_, text, _) = message(&format!(r#"{{"type":"{long}"}}"#));
        assert!(text.len() < 1024);
    }
}
