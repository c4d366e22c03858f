//! `castra harness`: a coding agent at work, and what it did.
//!
//! Here: arguments to options, threads and sums as tables. Not here: the agent (`core::harness`).

use std::env;
use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::Duration;

use castra::core::escape::escape_line;
use castra::core::events::{Event, Severity};
use castra::core::failure::{Exit, Failure, Result};
use castra::core::harness::usage::{DayUse, Usage};
use castra::core::harness::{AGENTS, Agent, AgentRequest, Tokens, agent_named};
use castra::core::lines::journal::Rotation;
use castra::core::operations::harness::{self, HarnessOutcome, Input, RelayOptions, RunOptions, ThreadRow};
use castra::core::process::shell_quote;
use castra::core::root::paths::StateRoot;
use serde::Serialize;

use super::context::Context;
use super::find_project::{self, Selected};
use super::human;
use super::progress::render;
use super::sentence::sentence;
use crate::cli::Raw;

/// The default time limit: Codex waits for ever for a server that doesn't answer.
const IDLE_LIMIT: Duration = Duration::from_secs(30 * 60);
/// The longest line of a message shown.
const LINE_LIMIT: usize = 64 * 1024;
/// The columns of `usage`.
const USAGE_HEAD: [&str; 6] = ["", "PROMPT", "CACHED", "COMPLETION", "AGENT", "VMS"];

/// `harness run`.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let config = find_project::config(raw)?;
    let vm = match &raw.inside {
        Some(name) => Some(find_project::vm(
            &Selected::Config(Box::new(config.clone())),
            name,
        )?),
        None => None,
    };
    let limit = |given: Option<Duration>, default: Option<Duration>| {
        given.or(default).filter(|limit| !limit.is_zero())
    };
    let options = RunOptions {
        config: &config,
        agent: agent(raw),
        program: raw.codex.clone(),
        ask: AgentRequest {
            model: raw.model.clone(),
            resume: raw.resume.clone(),
            extra: raw.codex_args.clone(),
            prompt: prompt(&raw.operands)?,
        },
        dir: raw.cwd.clone(),
        vm,
        time_limit: limit(raw.time_limit, None),
        idle_limit: limit(raw.idle_limit, Some(IDLE_LIMIT)),
        castra: own_program(),
        bare: raw.no_preamble,
        cancel: context.cancel_on_signals(),
    };
    let outcome = context.reporting(|reporter| harness::run(options, reporter))?;
    Ok(finish(context, &outcome))
}

/// The agent that `--agent` names.
fn agent(raw: &Raw) -> &'static dyn Agent {
    let named = raw.agent.as_deref().and_then(agent_named);
    named.unwrap_or(AGENTS[0])
}

/// The words as one text, as a shell's `echo` would join them.
fn prompt(words: &[OsString]) -> Result<String> {
    let words: Option<Vec<&str>> = words.iter().map(|word| word.to_str()).collect();
    words.map(|words| words.join(" ")).ok_or_else(|| {
        Failure::new(Exit::Usage, "the prompt isn't UTF-8 text").advice("castra harness run --help")
    })
}

/// `harness relay`.
pub fn relay(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let input = match raw.operands.first() {
        Some(path) if path != "-" => Input::File(PathBuf::from(path)),
        _ => Input::Stream(Box::new(io::stdin())),
    };
    let options = RelayOptions {
        agent: agent(raw),
        input,
        kept_in: if raw.no_record { None } else { kept_in(raw)? },
        cancel: context.cancel_on_signals(),
    };
    let outcome = context.reporting(|reporter| harness::relay(options, reporter))?;
    Ok(finish(context, &outcome))
}

/// Relaying needs no project; in a project the stream is also kept.
fn kept_in(raw: &Raw) -> Result<Option<(StateRoot, Rotation)>> {
    match find_project::project(raw) {
        Ok(Selected::Config(config)) => Ok(Some((config.state.clone(), config.bus.rotation))),
        Ok(selected @ Selected::Record(_)) => Ok(Some((selected.state(), Rotation::default()))),
        Err(failure) if failure.exit == Exit::NoInput && raw.config.is_none() && raw.workspace.is_none() => {
            Ok(None)
        }
        Err(failure) => Err(failure),
    }
}

/// The last message is the result; stderr has had the rest already.
fn finish(context: &mut Context, outcome: &HarnessOutcome) -> Exit {
    if context.json {
        return outcome.exit;
    }
    // If both streams go to one terminal, the message would appear twice.
    let both = io::stdout().is_terminal() && io::stderr().is_terminal() && !context.quiet;
    if let Some(text) = outcome.last_message.as_ref().filter(|_| !both) {
        for line in text.split('\n') {
            context.out.line(escape_line(line, LINE_LIMIT));
        }
        context.out.flush();
    }
    let verdict = outcome.verdict.as_str();
    match &outcome.reason {
        Some(reason) => context.warn(&format!("{verdict}: {}", escape_line(reason, LINE_LIMIT))),
        None => context.say(&format!("{verdict}, {}", tokens_text(outcome.counts.tokens))),
    }
    if let Some(thread) = &outcome.thread {
        let thread = escape_line(thread, 256);
        context.say(&format!("`castra harness show {thread}` shows it again"));
    }
    outcome.exit
}

/// How the agent calls this castra: by name if PATH leads here.
fn own_program() -> String {
    let Ok(own) = env::current_exe() else {
        return "castra".to_owned();
    };
    let path = env::var_os("PATH").unwrap_or_default();
    let first = env::split_paths(&path)
        .map(|dir| dir.join("castra"))
        .find(|candidate| candidate.is_file());
    match first.and_then(|candidate| candidate.canonicalize().ok()) {
        Some(found) if own.canonicalize().is_ok_and(|own| own == found) => "castra".to_owned(),
        _ => shell_quote(&own.to_string_lossy()),
    }
}

#[derive(Serialize)]
struct Listing {
    threads: Vec<ThreadRow>,
}

/// `harness list`.
pub fn list(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let threads = harness::list(&find_project::project(raw)?.state())?;
    if context.json {
        context.out.json(&Listing { threads });
        return Ok(Exit::Done);
    }
    for row in &threads {
        let place = row.vm.as_ref().map(|vm| format!(" in {vm}")).unwrap_or_default();
        context.out.line(format!(
            "{}  {}  {:<10}  {}, {}{place}",
            context.style.bold(&escape_line(&row.thread, 64)),
            context.style.dim(&row.ended),
            row.verdict.map_or("unknown", |verdict| verdict.as_str()),
            human::plural(row.turns, "turn"),
            tokens_text(row.tokens),
        ));
    }
    context.out.flush();
    if threads.is_empty() {
        context.say("no agent has worked here yet; `castra harness run -- PROMPT` starts one");
    }
    Ok(Exit::Done)
}

/// `harness show`.
pub fn show(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let thread = harness::find(
        &find_project::project(raw)?.state(),
        &raw.operands[0].to_string_lossy(),
    )?;
    if context.json {
        harness::lines(&thread, |line| {
            // Wrapped in an object, because an agent's lines could look like castra's own events.
            let json = match serde_json::from_str::<serde::de::IgnoredAny>(line) {
                Ok(_) => line.trim_ascii().to_owned(),
                Err(_) => serde_json::Value::from(line).to_string(),
            };
            context.out.json_line(format!("{{\"line\":{json}}}"));
            context.out.is_open()
        })?;
        return Ok(Exit::Done);
    }
    harness::replay(&thread, |event| {
        if is_said(&event) {
            let line = render(&sentence(&event), context.style, 0);
            context.out.line(line);
        }
        context.out.is_open()
    })?;
    Ok(Exit::Done)
}

/// An item that only began is shown when it ends.
fn is_said(event: &Event) -> bool {
    match event {
        Event::Message { severity, data, .. } => {
            let reasoning = data.as_ref().is_some_and(|data| data["kind"] == "reasoning");
            *severity != Severity::Progress || reasoning
        }
        Event::CommandAccepted { .. } => false,
        Event::Usage { scope, .. } => scope == "turn",
        _ => true,
    }
}

/// `harness usage`.
pub fn usage(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let selected = find_project::project(raw)?;
    let usage = harness::usage(selected.project(), context.cancel_on_signals())?;
    if context.json {
        context.out.json(&usage);
        return Ok(Exit::Done);
    }
    if usage.threads.is_empty() && usage.days.is_empty() {
        context.say("no agent has worked here and no VM has run");
        return Ok(Exit::Done);
    }
    let rows = usage_rows(&usage);
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..USAGE_HEAD.len()).map(width).collect();
    for (number, row) in rows.iter().enumerate() {
        let mut line = format!("{:<width$}", row[0], width = widths[0]);
        for (cell, width) in row.iter().zip(&widths).skip(1) {
            line.push_str(&format!("  {cell:>width$}"));
        }
        let line = line.trim_end();
        context.out.line(match number {
            0 => context.style.dim(line),
            _ => line.to_owned(),
        });
    }
    context.out.flush();
    Ok(Exit::Done)
}

fn usage_rows(usage: &Usage) -> Vec<[String; 6]> {
    let row = |name: &str, tokens: Tokens, agent_ms: u64, vm_ms: u64| {
        [
            escape_line(name, 64),
            tokens.prompt.to_string(),
            tokens.cached.to_string(),
            tokens.completion.to_string(),
            human::duration(agent_ms),
            human::duration(vm_ms),
        ]
    };
    let of_day = |day: &DayUse| row(&day.day, day.tokens, day.agent_ms, day.vm_ms);
    let mut rows = vec![USAGE_HEAD.map(str::to_owned)];
    rows.extend(
        usage
            .threads
            .iter()
            .map(|thread| row(&thread.thread, thread.tokens, thread.agent_ms, thread.vm_ms)),
    );
    rows.extend(usage.days.iter().map(of_day));
    rows.push(of_day(&usage.total));
    rows
}

fn tokens_text(tokens: Tokens) -> String {
    format!("{} tokens in, {} out", tokens.prompt, tokens.completion)
}
