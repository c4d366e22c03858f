//! The records of threads: `logs/harness/<thread>.json`.
//!
//! Here: one small record beside each transcript, with turns, tokens and times of each process
//! that had a part in the thread, so that the next one knows what came before; made anew from the
//! transcript where it is missing. Not here: transcripts themselves (`transcript`), sums over
//! threads and days (`usage`).

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::relay::{Expected, NoStore, Relay, ThreadStore, ThreadTotals, ThreadUpdate};
use super::transcript::{self, name_of};
use super::{Agent, Tokens, Verdict};
use crate::core::failure::{Failure, Result};
use crate::core::host;
use crate::core::id::RunId;
use crate::core::name::VmName;
use crate::core::reporter::wall_clock;
use crate::core::root::records;

/// How many sessions a record lists; older ones are added up.
const MAX_SESSIONS: usize = 500;
/// A record is written at most this often while a stream continues.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);

/// One thread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ThreadRecord {
    /// Its id, as the agent spells it.
    pub thread: String,
    /// The agent.
    pub agent: String,
    /// The processes that had a part in it, oldest first.
    pub sessions: Vec<Session>,
    /// Sessions older than those, summed up.
    #[serde(default)]
    pub earlier: Option<Session>,
}

/// The part of one process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// Id of castra's run, as in the journal.
    pub run: RunId,
    /// The VM it ran in; null: on the host.
    pub vm: Option<VmName>,
    /// Wall clock, RFC 3339.
    pub began: String,
    /// Wall clock of its last line.
    pub ended: String,
    /// Turns begun.
    pub turns: u64,
    /// Messages of the agent.
    pub messages: u64,
    /// Commands that ended well.
    pub commands: u64,
    /// Commands that didn't.
    pub commands_failed: u64,
    /// How it ended.
    pub verdict: Option<Verdict>,
    /// Tokens by day (UTC, `2026-11-21`) of the turn's end.
    pub days: BTreeMap<String, Tokens>,
}

impl Session {
    /// Tokens of all days.
    pub fn tokens(&self) -> Tokens {
        self.days
            .values()
            .fold(Tokens::default(), |sum, day| sum.plus(*day))
    }
}

impl ThreadRecord {
    /// Every session, the sum of the earlier ones first.
    pub fn all(&self) -> impl Iterator<Item = &Session> {
        self.earlier.iter().chain(&self.sessions)
    }

    /// The sum of all sessions.
    pub fn account(&self) -> ThreadTotals {
        self.all()
            .fold(ThreadTotals::default(), |sum, session| ThreadTotals {
                turns: sum.turns + session.turns,
                tokens: sum.tokens.plus(session.tokens()),
                messages: sum.messages + session.messages,
                commands: sum.commands + session.commands,
                commands_failed: sum.commands_failed + session.commands_failed,
            })
    }

    /// How the last session ended.
    pub fn verdict(&self) -> Option<Verdict> {
        self.all().last()?.verdict
    }

    /// Sums up the oldest sessions where there are too many.
    fn shorten(&mut self) {
        while self.sessions.len() > MAX_SESSIONS {
            let old = self.sessions.remove(0);
            match &mut self.earlier {
                None => self.earlier = Some(old),
                Some(sum) => {
                    sum.ended = old.ended;
                    sum.turns += old.turns;
                    sum.messages += old.messages;
                    sum.commands += old.commands;
                    sum.commands_failed += old.commands_failed;
                    sum.verdict = old.verdict;
                    for (day, tokens) in old.days {
                        let of_day = sum.days.entry(day).or_default();
                        *of_day = of_day.plus(tokens);
                    }
                }
            }
        }
    }
}

/// The day of a moment, UTC.
pub fn day_of(moment: SystemTime) -> String {
    let mut text = wall_clock(moment);
    text.truncate("2026-11-21".len());
    text
}

/// The record of one thread; `None` if nothing is known of it.
pub fn load(dir: &Path, thread: &str, agent: &dyn Agent) -> Option<ThreadRecord> {
    by_name(dir, &name_of(thread), agent)
}

/// Every thread that has a record or a transcript here, the most recent last.
pub fn list(dir: &Path, agent: &dyn Agent) -> Result<Vec<ThreadRecord>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::io("read", dir, &error)),
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let stem = name
                .strip_suffix(".jsonl")
                .or_else(|| name.strip_suffix(".json"))?;
            Some(stem.to_owned())
        })
        .collect();
    names.sort();
    names.dedup();
    let mut records: Vec<ThreadRecord> = names
        .iter()
        .filter_map(|name| by_name(dir, name, agent))
        .collect();
    let heard = |record: &ThreadRecord| record.all().last().map(|last| last.ended.clone());
    records.sort_by_key(heard);
    Ok(records)
}

fn by_name(dir: &Path, name: &str, agent: &dyn Agent) -> Option<ThreadRecord> {
    if let Some(record) = record_at(&dir.join(format!("{name}.json")), name) {
        return Some(record);
    }
    from_transcript(&dir.join(format!("{name}.jsonl")), name, agent)
}

/// A record that can't be read counts as missing: it is made from the transcript again.
fn record_at(path: &Path, name: &str) -> Option<ThreadRecord> {
    let record = records::load::<ThreadRecord>(path).ok()??;
    (name_of(&record.thread) == name).then_some(record)
}

/// A thread's record made from its transcript, which has no times: its file's times are used.
fn from_transcript(path: &Path, name: &str, agent: &dyn Agent) -> Option<ThreadRecord> {
    let modified = fs::metadata(path).ok()?.modified().ok()?;
    let mut keeper = NoStore;
    let mut relay = Relay::new(agent, &mut keeper, Expected::default());
    let mut thread = None;
    transcript::read(path, |line| {
        relay.line(line, &mut |_| {});
        if thread.is_none() {
            thread = relay.thread().map(str::to_owned);
        }
        true
    })
    .ok()?;
    let account = relay.account();
    let at = wall_clock(modified);
    Some(ThreadRecord {
        thread: thread.unwrap_or_else(|| name.to_owned()),
        agent: agent.name().to_owned(),
        sessions: vec![Session {
            began: at.clone(),
            ended: at,
            turns: account.turns,
            messages: account.messages,
            commands: account.commands,
            commands_failed: account.commands_failed,
            verdict: Some(relay.verdict()),
            days: BTreeMap::from([(day_of(modified), account.tokens)]),
            ..Session::default()
        }],
        earlier: None,
    })
}

/// Keeps the records of the threads of one stream.
pub struct Ledger<'a> {
    dir: PathBuf,
    agent: &'a dyn Agent,
    run: RunId,
    vm: Option<VmName>,
    parts: HashMap<String, ThreadPart>,
    trouble: Option<Failure>,
}

/// This stream's session in one thread, however often it returns to it.
struct ThreadPart {
    /// The record before this run.
    before: ThreadTotals,
    session: Session,
    /// Tokens of the thread that are counted in the session's days already.
    booked: Tokens,
    written: Option<Instant>,
    changed: bool,
}

impl<'a> Ledger<'a> {
    /// A ledger in this folder for a run, in this VM or on the host.
    pub fn new(dir: PathBuf, agent: &'a dyn Agent, run: &RunId, vm: Option<VmName>) -> Ledger<'a> {
        Ledger {
            dir,
            agent,
            run: run.clone(),
            vm,
            parts: HashMap::new(),
            trouble: None,
        }
    }

    /// The error of a failed write.
    pub fn take_error(&mut self) -> Option<Failure> {
        self.trouble.take()
    }

    /// Read again before each write: another process may have a part in the same thread.
    fn write(&mut self, thread: &str) {
        let Some(part) = self.parts.get_mut(thread) else {
            return;
        };
        part.written = Some(Instant::now());
        part.changed = false;
        let session = part.session.clone();
        // Not made from the transcript, which holds this session's lines by now.
        let path = self.dir.join(format!("{}.json", name_of(thread)));
        let mut record = record_at(&path, &name_of(thread)).unwrap_or_else(|| ThreadRecord {
            thread: thread.to_owned(),
            agent: self.agent.name().to_owned(),
            sessions: Vec::new(),
            earlier: None,
        });
        match record.sessions.iter().position(|known| known.run == session.run) {
            Some(place) => record.sessions[place] = session,
            None => record.sessions.push(session),
        }
        record.shorten();
        self.save(&path, &record);
    }

    fn save(&mut self, path: &Path, record: &ThreadRecord) {
        let saved = host::ensure_private_dir(&self.dir)
            .map_err(|error| Failure::io("create", &self.dir, &error))
            .and_then(|()| records::save(path, record));
        if let Err(failure) = saved {
            self.trouble.get_or_insert(failure);
        }
    }
}

impl ThreadStore for Ledger<'_> {
    fn begin(&mut self, thread: &str) -> Option<ThreadTotals> {
        if let Some(part) = self.parts.get(thread) {
            return Some(part.before);
        }
        let known = load(&self.dir, thread, self.agent);
        // Made from a transcript, it is written now: the transcript is about to grow.
        if let Some(record) = &known {
            let path = self.dir.join(format!("{}.json", name_of(thread)));
            if record_at(&path, &name_of(thread)).is_none() {
                self.save(&path, record);
            }
        }
        let account = known.map(|record| record.account());
        let now = wall_clock(SystemTime::now());
        let part = ThreadPart {
            before: account.unwrap_or_default(),
            session: Session {
                run: self.run.clone(),
                vm: self.vm.clone(),
                began: now.clone(),
                ended: now,
                ..Session::default()
            },
            booked: account.unwrap_or_default().tokens,
            written: None,
            changed: true,
        };
        self.parts.insert(thread.to_owned(), part);
        account
    }

    fn note(&mut self, chapter: &ThreadUpdate) {
        let Some(part) = self.parts.get_mut(&chapter.thread) else {
            return;
        };
        let now = SystemTime::now();
        let (account, before, session) = (chapter.account, part.before, &mut part.session);
        session.ended = wall_clock(now);
        session.turns = account.turns - before.turns;
        session.messages = account.messages - before.messages;
        session.commands = account.commands - before.commands;
        session.commands_failed = account.commands_failed - before.commands_failed;
        session.verdict = Some(chapter.verdict);
        if let Some(new) = account.tokens.minus(part.booked)
            && new != Tokens::default()
        {
            let day = session.days.entry(day_of(now)).or_default();
            *day = day.plus(new);
            part.booked = account.tokens;
        }
        part.changed = true;
        if part.written.is_none_or(|at| at.elapsed() >= WRITE_INTERVAL) {
            self.write(&chapter.thread);
        }
    }

    fn end(&mut self) {
        let changed = self.parts.iter().filter(|(_, part)| part.changed);
        let changed: Vec<String> = changed.map(|(thread, _)| thread.clone()).collect();
        for thread in changed {
            self.write(&thread);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::codex::Codex;
    use super::super::line_splitter::Line;
    use super::*;
    use crate::core::scratch::Scratch;

    /// One process that says these lines, kept in `dir`; the tokens of each scope it reported.
    fn session(dir: &Path, run: &str, lines: &[&str]) -> Vec<(String, Option<u64>, u64)> {
        use crate::core::events::Event;
        let mut ledger = Ledger::new(dir.to_owned(), &Codex, &run.into(), None);
        let mut relay = Relay::new(&Codex, &mut ledger, Expected::default());
        let mut seen = Vec::new();
        let mut note = |event: Event| {
            if let Event::Usage {
                scope,
                turn,
                prompt_tokens,
                ..
            } = event
            {
                seen.push((scope, turn, prompt_tokens));
            }
        };
        for line in lines {
            relay.line(Line::Whole(line.as_bytes()), &mut note);
        }
        let verdict = relay.verdict();
        relay.end(verdict, &mut note);
        assert!(ledger.take_error().is_none());
        seen
    }

    fn scopes(turn: u64, of_turn: u64, of_thread: u64) -> Vec<(String, Option<u64>, u64)> {
        vec![
            ("turn".into(), Some(turn), of_turn),
            ("thread".into(), None, of_thread),
        ]
    }

    const BEGIN: &str = r#"{"type":"thread.started","thread_id":"t-1"}"#;
    const TURN: &str = r#"{"type":"turn.started"}"#;

    #[test]
    fn a_resume_knows_what_came_before_whichever_way_it_is_counted() {
        let scratch = Scratch::new("harness-ledger");
        let dir = scratch.path("logs/harness");
        let new = |input: u64| {
            format!(
                r#"{{"type":"turn.completed","usage":{{"input_tokens":{input},"output_tokens":1,"reasoning_output_tokens":0}}}}"#
            )
        };
        let old = |input: u64| {
            format!(r#"{{"type":"turn.completed","usage":{{"input_tokens":{input},"output_tokens":1}}}}"#)
        };
        assert_eq!(session(&dir, "a", &[BEGIN, TURN, &new(100)]), scopes(1, 100, 100));
        // The newer counts the whole thread.
        assert_eq!(session(&dir, "b", &[BEGIN, TURN, &new(250)]), scopes(2, 150, 250));
        // The older counts its process.
        assert_eq!(session(&dir, "c", &[BEGIN, TURN, &old(300)]), scopes(3, 300, 550));
        // A count that has fallen can't be the whole thread, whoever says so.
        assert_eq!(session(&dir, "d", &[BEGIN, TURN, &new(50)]), scopes(4, 50, 600));
        let record = load(&dir, "t-1", &Codex).unwrap();
        assert_eq!(record.sessions.len(), 4);
        assert_eq!((record.account().turns, record.account().tokens.prompt), (4, 600));
        assert_eq!(record.verdict(), Some(Verdict::Complete));
    }

    #[test]
    fn several_turns_of_one_process_are_told_apart() {
        let scratch = Scratch::new("harness-turns");
        let usage = |input: u64| {
            format!(r#"{{"type":"turn.completed","usage":{{"input_tokens":{input},"output_tokens":0}}}}"#)
        };
        let seen = session(
            scratch.dir(),
            "a",
            &[BEGIN, TURN, &usage(10), TURN, &usage(30), BEGIN, TURN, &usage(5)],
        );
        assert_eq!(
            seen,
            [scopes(1, 10, 10), scopes(2, 20, 30), scopes(3, 5, 35)].concat()
        );
        let record = load(scratch.dir(), "t-1", &Codex).unwrap();
        assert_eq!(record.sessions.len(), 1, "one process, one session");
        assert_eq!(record.account().tokens.prompt, 35);
    }

    #[test]
    fn a_missing_record_is_made_from_the_transcript() {
        let scratch = Scratch::new("harness-rebuilt");
        let line = r#"{"type":"turn.completed","usage":{"input_tokens":7,"output_tokens":2}}"#;
        fs::write(
            scratch.path("t-1.jsonl"),
            format!(
                "{BEGIN}
{TURN}
{line}
"
            ),
        )
        .unwrap();
        fs::write(scratch.path("t-1.json"), "{ torn").unwrap();
        let records = list(scratch.dir(), &Codex).unwrap();
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].thread, "t-1");
        assert_eq!(
            (records[0].account().turns, records[0].account().tokens.completion),
            (1, 2)
        );
        assert_eq!(
            session(scratch.dir(), "b", &[BEGIN, TURN, line]),
            scopes(2, 7, 14)
        );
        assert!(list(&scratch.path("none"), &Codex).unwrap().is_empty());
    }

    #[test]
    fn old_sessions_are_summed_up() {
        let mut record = ThreadRecord {
            thread: "t".into(),
            agent: "codex".into(),
            sessions: vec![
                Session {
                    turns: 1,
                    days: BTreeMap::from([(
                        "2026-11-21".into(),
                        Tokens {
                            prompt: 3,
                            ..Tokens::default()
                        }
                    )]),
                    ..Session::default()
                };
                MAX_SESSIONS + 7
            ],
            earlier: None,
        };
        let before = record.account();
        record.shorten();
        assert_eq!(record.sessions.len(), MAX_SESSIONS);
        assert_eq!(record.account(), before);
    }
}
