//! From an agent's output to castra's events.
//!
//! Here: what a single line doesn't tell: the turn and thread it belongs to, earlier token counts, commands
//! that never ended, and the verdict. Not here: an agent's own format (`codex`), bytes and files (`pump`,
//! `transcript`).

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use serde_json::{Value, json};

use super::line_splitter::{Line, text_of};
use super::{Agent, AgentEvent, Since, Tokens, Verdict};
use crate::core::events::{Event, Severity};
use crate::core::time::millis;

/// How many commands at once are followed; beyond that the oldest counts as abandoned.
const MAX_OPEN: usize = 256;
/// How many threads of one stream are kept, so that a stream can't fill a folder with files. A stream has one
/// thread, or a few if several were joined.
const MAX_THREADS: usize = 1024;
/// Ids of threads are cut to this length in events.
const ID_LIMIT: usize = 256;

/// The sums of a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadTotals {
    /// Turns begun.
    pub turns: u64,
    /// Tokens of all turns.
    pub tokens: Tokens,
    /// Messages of the agent.
    pub messages: u64,
    /// Commands that ended well.
    pub commands: u64,
    /// Commands that didn't.
    pub commands_failed: u64,
}

/// The state of a thread after one stream, or a part of it.
#[derive(Clone, Debug, PartialEq)]
pub struct ThreadUpdate {
    /// The thread.
    pub thread: String,
    /// The agent.
    pub agent: &'static str,
    /// Its sums now.
    pub account: ThreadTotals,
    /// Its verdict so far.
    pub verdict: Verdict,
}

/// Remembers threads from one stream to the next.
pub trait ThreadStore {
    /// The sums of this thread; `None` if it is new.
    fn begin(&mut self, thread: &str) -> Option<ThreadTotals>;

    /// Called with the new state at every turn's end, and when the stream leaves the thread.
    fn note(&mut self, chapter: &ThreadUpdate);

    /// The stream has ended.
    fn end(&mut self);
}

/// Remembers nothing.
#[derive(Debug, Default)]
pub struct NoStore;

impl ThreadStore for NoStore {
    fn begin(&mut self, _thread: &str) -> Option<ThreadTotals> {
        None
    }

    fn note(&mut self, _chapter: &ThreadUpdate) {}

    fn end(&mut self) {}
}

/// What is expected of a stream.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// It is live, so the time between lines is the commands' time.
    pub live: bool,
    /// The thread that the agent was asked to continue.
    pub resume: Option<String>,
}

/// Turns one stream into events.
pub struct Relay<'a> {
    agent: &'a dyn Agent,
    keeper: &'a mut dyn ThreadStore,
    expected: Expected,
    known: HashMap<String, ThreadTotals>,
    chapter: Option<ThreadUpdate>,
    /// The tokens that this process reported and that are counted already.
    process: Tokens,
    open: VecDeque<OpenCommand>,
    /// `None` before the first turn and after each.
    in_turn: bool,
    last_turn: Option<Verdict>,
    last_message: Option<String>,
    failure: Option<String>,
    counts: Counts,
    said_too_many: bool,
}

/// A command that has not ended.
struct OpenCommand {
    item: String,
    command: String,
    since: Instant,
    turn: Option<u64>,
}

/// Counts over a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Lines.
    pub lines: u64,
    /// Messages of the agent.
    pub messages: u64,
    /// Commands that ended well.
    pub commands: u64,
    /// Commands that didn't.
    pub commands_failed: u64,
    /// Tokens of all its turns.
    pub tokens: Tokens,
}

impl<'a> Relay<'a> {
    /// A relay for one stream.
    pub fn new(agent: &'a dyn Agent, keeper: &'a mut dyn ThreadStore, expected: Expected) -> Relay<'a> {
        Relay {
            agent,
            keeper,
            expected,
            known: HashMap::new(),
            chapter: None,
            process: Tokens::default(),
            open: VecDeque::new(),
            in_turn: false,
            last_turn: None,
            last_message: None,
            failure: None,
            counts: Counts::default(),
            said_too_many: false,
        }
    }

    /// The thread the stream is in.
    pub fn thread(&self) -> Option<&str> {
        self.chapter.as_ref().map(|chapter| chapter.thread.as_str())
    }

    /// The sums of that thread.
    pub fn account(&self) -> ThreadTotals {
        self.chapter
            .as_ref()
            .map_or_else(ThreadTotals::default, |chapter| chapter.account)
    }

    /// The agent's last message.
    pub fn last_message(&self) -> Option<&str> {
        self.last_message.as_deref()
    }

    /// Why the last turn failed.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// The counts so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The verdict so far, by the stream alone.
    pub fn verdict(&self) -> Verdict {
        match self.last_turn {
            Some(verdict) if !self.in_turn => verdict,
            _ => Verdict::Incomplete,
        }
    }

    /// Takes one line.
    pub fn line(&mut self, line: Line<'_>, emit: &mut dyn FnMut(Event)) {
        self.counts.lines += 1;
        match line {
            Line::Whole(bytes) | Line::Torn(bytes) => {
                for said in self.agent.read(&text_of(bytes)) {
                    self.on_agent_event(said, emit);
                }
            }
            Line::TooLong(head, length) => {
                let raw = text_of(head).into_owned();
                self.message(
                    Severity::Warn,
                    format!("castra left out a line of {length} bytes, which is too long"),
                    Some(json!({"kind": "too-long", "bytes": length, "raw": raw})),
                    emit,
                );
            }
        }
    }

    /// The stream has ended, with this verdict.
    pub fn end(&mut self, verdict: Verdict, emit: &mut dyn FnMut(Event)) {
        self.abandon("the stream ended before the command did", emit);
        if let Some(chapter) = &mut self.chapter {
            chapter.verdict = verdict;
            self.keeper.note(chapter);
        }
        self.keeper.end();
    }

    fn on_agent_event(&mut self, said: AgentEvent, emit: &mut dyn FnMut(Event)) {
        match said {
            AgentEvent::Thread { id } => self.begin_thread(&id, emit),
            AgentEvent::TurnStarted => {
                self.in_turn = true;
                self.failure = None;
                if let Some(chapter) = &mut self.chapter {
                    chapter.account.turns += 1;
                }
                let text = match self.turn() {
                    Some(turn) => format!("turn {turn} begins"),
                    None => "a turn begins".to_owned(),
                };
                self.message(Severity::Progress, text, Some(json!({"kind": "turn"})), emit);
            }
            AgentEvent::Usage { tokens, since } => self.count_tokens(tokens, since, emit),
            AgentEvent::TurnCompleted => self.end_turn(Verdict::Complete, emit),
            AgentEvent::TurnFailed { reason } => {
                self.message(
                    Severity::Error,
                    format!("the turn failed: {reason}"),
                    Some(json!({"kind": "turn_failed"})),
                    emit,
                );
                self.failure = Some(reason);
                self.end_turn(Verdict::Failed, emit);
            }
            AgentEvent::Message { severity, text, data } => {
                if data["kind"] == "agent_message" && severity == Severity::Info {
                    self.counts.messages += 1;
                    if let Some(chapter) = &mut self.chapter {
                        chapter.account.messages += 1;
                    }
                    self.last_message = Some(text.clone());
                }
                self.message(severity, text, Some(data), emit);
            }
            AgentEvent::CommandStarted { item, command } => self.begin_command(item, command, emit),
            AgentEvent::CommandEnded {
                item,
                command,
                ok,
                exit_status,
                output,
                note,
            } => {
                if !self.open.iter().any(|open| open.item == item) {
                    self.begin_command(item.clone(), command.clone(), emit);
                }
                self.end_command(&item, command, ok, exit_status, output, note, emit);
            }
        }
    }

    fn begin_thread(&mut self, id: &str, emit: &mut dyn FnMut(Event)) {
        self.abandon("another thread began before the command ended", emit);
        let verdict = self.verdict();
        self.end_chapter(verdict);
        self.process = Tokens::default();
        self.in_turn = false;
        self.last_turn = None;
        if self.known.len() >= MAX_THREADS && !self.known.contains_key(id) {
            if !std::mem::replace(&mut self.said_too_many, true) {
                let text =
                    format!("more than {MAX_THREADS} threads in one stream: castra doesn't keep the rest");
                self.message(Severity::Warn, text, Some(json!({"kind": "thread"})), emit);
            }
            return;
        }
        let kept = self.keeper.begin(id);
        let before = self.known.get(id).copied().or(kept);
        self.chapter = Some(ThreadUpdate {
            thread: id.to_owned(),
            agent: self.agent.name(),
            account: before.unwrap_or_default(),
            verdict: Verdict::Incomplete,
        });
        let verb = if before.is_some() { "resumed" } else { "begun" };
        self.message(
            Severity::Info,
            format!("thread {} {verb}", super::json::cut(id, ID_LIMIT)),
            Some(json!({"kind": "thread", "resumed": before.is_some()})),
            emit,
        );
        self.check_resumed_thread(id, before.is_some(), emit);
    }

    /// If Codex is asked to continue a thread that it doesn't know, it begins a new one and doesn't say so.
    fn check_resumed_thread(&mut self, id: &str, known: bool, emit: &mut dyn FnMut(Event)) {
        let Some(wish) = self.expected.resume.take() else {
            return;
        };
        let agent = self.agent.name();
        if wish == id {
            if !known {
                let text = format!(
                    "castra has not seen this thread before: the tokens that {agent} reports for this turn may include earlier turns"
                );
                self.message(Severity::Info, text, Some(json!({"kind": "thread"})), emit);
            }
        } else if !known {
            let mut event = self.event(
                Severity::Warn,
                format!("castra asked {agent} to continue {wish}, but it began the new thread {id}"),
                Some(json!({"kind": "thread", "asked": wish})),
            );
            if let Event::Message { remediation, .. } = &mut event {
                *remediation = Some("`castra harness list` names the threads castra knows".to_owned());
            }
            emit(event);
        }
    }

    fn end_chapter(&mut self, verdict: Verdict) {
        let Some(mut chapter) = self.chapter.take() else {
            return;
        };
        chapter.verdict = verdict;
        self.keeper.note(&chapter);
        self.known.insert(chapter.thread, chapter.account);
    }

    fn end_turn(&mut self, verdict: Verdict, emit: &mut dyn FnMut(Event)) {
        self.abandon("the turn ended before the command did", emit);
        self.in_turn = false;
        self.last_turn = Some(verdict);
        if let Some(chapter) = &mut self.chapter {
            chapter.verdict = verdict;
            self.keeper.note(chapter);
        }
    }

    /// Turns the agent's count into this turn's tokens: the difference to the last count, by either version's
    /// way of counting.
    fn count_tokens(&mut self, said: Tokens, since: Since, emit: &mut dyn FnMut(Event)) {
        let of_process = said.minus(self.process).unwrap_or(said);
        let before = self.chapter.as_ref().map(|chapter| chapter.account.tokens);
        let before = before.unwrap_or(self.process);
        let (turn, total) = match since {
            // Less than was counted before can't be the whole thread, whatever the version.
            Since::Thread => match said.minus(before) {
                Some(turn) => (turn, said),
                None => (of_process, before.plus(of_process)),
            },
            Since::Process => (of_process, before.plus(of_process)),
        };
        self.process = match since {
            Since::Thread => self.process.plus(turn),
            Since::Process => said,
        };
        self.counts.tokens = self.counts.tokens.plus(turn);
        if let Some(chapter) = &mut self.chapter {
            chapter.account.tokens = total;
        }
        for (scope, number, tokens) in [("turn", self.turn(), turn), ("thread", None, total)] {
            emit(Event::Usage {
                source: self.agent.name().to_owned(),
                scope: scope.to_owned(),
                turn: number,
                prompt_tokens: tokens.prompt,
                cached_tokens: tokens.cached,
                completion_tokens: tokens.completion,
                thread: self.thread_id(),
            });
        }
    }

    fn begin_command(&mut self, item: String, command: String, emit: &mut dyn FnMut(Event)) {
        if let Some(place) = self.open.iter().position(|open| open.item == item) {
            self.abandon_one(place, "another began under its name", emit);
        }
        if self.open.len() >= MAX_OPEN {
            self.abandon_one(0, "too many run at once", emit);
        }
        emit(Event::CommandAccepted {
            command: command.clone(),
            detail: None,
            source: self.agent.name().to_owned(),
            thread: self.thread_id(),
            turn: self.turn(),
            duration_ms: None,
            exit_status: None,
        });
        self.open.push_back(OpenCommand {
            item,
            command,
            since: Instant::now(),
            turn: self.turn(),
        });
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "the fields of one line, named by its caller"
    )]
    fn end_command(
        &mut self,
        item: &str,
        command: String,
        ok: bool,
        exit_status: Option<i32>,
        output: String,
        note: Option<String>,
        emit: &mut dyn FnMut(Event),
    ) {
        let Some(place) = self.open.iter().position(|open| open.item == item) else {
            return;
        };
        let Some(open) = self.open.remove(place) else {
            return;
        };
        // With the command line from its start, so that the two events match.
        let command = if open.command.is_empty() {
            command
        } else {
            open.command
        };
        let duration_ms = self.expected.live.then(|| millis(open.since.elapsed()));
        let source = self.agent.name().to_owned();
        let thread = self.thread_id();
        self.count_command(ok);
        let output = output.trim_end().to_owned();
        emit(if ok {
            Event::CommandCompleted {
                command,
                detail: (!output.is_empty()).then_some(output),
                duration_ms,
                exit_status,
                source,
                thread,
                turn: open.turn,
            }
        } else {
            let how = match (note, exit_status) {
                (Some(note), _) => note,
                (None, Some(code)) => format!("exit status {code}"),
                (None, None) => "failed".to_owned(),
            };
            Event::CommandFailed {
                command,
                detail: if output.is_empty() {
                    how
                } else {
                    format!("{how}: {output}")
                },
                duration_ms,
                exit_status,
                source,
                thread,
                turn: open.turn,
            }
        });
    }

    fn abandon(&mut self, why: &str, emit: &mut dyn FnMut(Event)) {
        while !self.open.is_empty() {
            self.abandon_one(0, why, emit);
        }
    }

    fn abandon_one(&mut self, place: usize, why: &str, emit: &mut dyn FnMut(Event)) {
        let Some(open) = self.open.remove(place) else {
            return;
        };
        self.count_command(false);
        emit(Event::CommandFailed {
            command: open.command,
            detail: format!("abandoned: {why}"),
            duration_ms: self.expected.live.then(|| millis(open.since.elapsed())),
            exit_status: None,
            source: self.agent.name().to_owned(),
            thread: self.thread_id(),
            turn: open.turn,
        });
    }

    fn count_command(&mut self, ok: bool) {
        let (of_stream, of_chapter) = match ok {
            true => (
                &mut self.counts.commands,
                self.chapter.as_mut().map(|chapter| &mut chapter.account.commands),
            ),
            false => (
                &mut self.counts.commands_failed,
                self.chapter
                    .as_mut()
                    .map(|chapter| &mut chapter.account.commands_failed),
            ),
        };
        *of_stream += 1;
        if let Some(count) = of_chapter {
            *count += 1;
        }
    }

    fn turn(&self) -> Option<u64> {
        let turns = self.chapter.as_ref()?.account.turns;
        (turns > 0).then_some(turns)
    }

    fn thread_id(&self) -> Option<String> {
        self.thread().map(|id| super::json::cut(id, ID_LIMIT))
    }

    fn message(&self, severity: Severity, text: String, data: Option<Value>, emit: &mut dyn FnMut(Event)) {
        emit(self.event(severity, text, data));
    }

    fn event(&self, severity: Severity, text: String, data: Option<Value>) -> Event {
        Event::Message {
            severity,
            text,
            vm: None,
            remediation: None,
            source: Some(self.agent.name().to_owned()),
            thread: self.thread_id(),
            turn: self.turn(),
            data,
        }
    }
}
