//! `harness run` and `harness relay`: a coding agent's stream as castra's events; and the records of earlier
//! streams.
//!
//! Here: combining the parts of `core::harness`, and the final verdict. Not here: any of those parts, or
//! words for people (`app`).

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use std::{env, fs, io};

use serde::Serialize;

use super::events::events_of_type;
use super::run::{Operation, ensure_state_root};
use super::status::{StatusOptions, status};
use crate::core::bootstrap::ssh::login::running_target;
use crate::core::cancel::Cancel;
use crate::core::config::Config;
use crate::core::events::{Event, Severity, VmCounts};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::harness::agent_process::{self, AgentCommand, KillReason};
use crate::core::harness::guest::{self, remote_script, ssh_argv};
use crate::core::harness::ledger::{self, Ledger, ThreadRecord};
use crate::core::harness::preamble::{Bootstrapped, View, preamble};
use crate::core::harness::pump::{Pump, Received, StreamReader};
use crate::core::harness::relay::{Counts, Expected, NoStore, Relay, ThreadStore};
use crate::core::harness::transcript::{self, Transcript};
use crate::core::harness::usage::{Usage, sum, vm_spans};
use crate::core::harness::{AGENTS, Agent, AgentRequest, Verdict, agent_named};
use crate::core::human;
use crate::core::lines::journal::Rotation;
use crate::core::name::VmName;
use crate::core::nearest::nearest;
use crate::core::process::show_status;
use crate::core::reporter::{Reporter, Silent};
use crate::core::root::paths::StateRoot;
use crate::core::root::project::Project;
use crate::core::status::StatusOutcome;

/// How often a relayed stream checks for a request to stop.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Longest prompt with its preamble: Linux takes no argument of 128 KiB.
const MAX_PROMPT_BYTES: usize = 120 * 1024;

/// Where a stream comes from.
pub enum Input {
    /// A recorded one.
    File(PathBuf),
    /// A live stream.
    Stream(Box<dyn Read + Send>),
}

/// What to relay.
pub struct RelayOptions {
    /// The agent whose stream it is.
    pub agent: &'static dyn Agent,
    /// The stream.
    pub input: Input,
    /// Where transcript and events are kept, if anywhere.
    pub kept_in: Option<(StateRoot, Rotation)>,
    /// Ends it early.
    pub cancel: Cancel,
}

/// What to run.
#[derive(Debug)]
pub struct RunOptions<'c> {
    /// The project.
    pub config: &'c Config,
    /// The agent.
    pub agent: &'static dyn Agent,
    /// Its program; `None`: the one that PATH has.
    pub program: Option<PathBuf>,
    /// The prompt, without the preamble.
    pub ask: AgentRequest,
    /// Its working directory, in the VM if it runs there.
    pub dir: Option<PathBuf>,
    /// The VM it runs in; `None`: the host.
    pub vm: Option<VmName>,
    /// Longest run.
    pub time_limit: Option<Duration>,
    /// Longest silence.
    pub idle_limit: Option<Duration>,
    /// This castra as a word for a shell.
    pub castra: String,
    /// Leaves out the preamble.
    pub bare: bool,
    /// Ends it early.
    pub cancel: Cancel,
}

/// How a stream ended.
#[derive(Clone, Debug, PartialEq)]
pub struct HarnessOutcome {
    /// The verdict.
    pub verdict: Verdict,
    /// `Done` only for the verdict `complete`.
    pub exit: Exit,
    /// The thread it was in at the end.
    pub thread: Option<String>,
    /// The agent's last message.
    pub last_message: Option<String>,
    /// Why it isn't complete.
    pub reason: Option<String>,
    /// Counts over the stream.
    pub counts: Counts,
}

/// Relays a recorded or piped stream.
pub fn relay(options: RelayOptions, reporter: &mut dyn Reporter) -> Result<HarnessOutcome> {
    const NAME: &str = "harness relay";
    let (reader, live, detail): (Box<dyn Read + Send>, bool, String) = match options.input {
        Input::File(path) => {
            let opened = File::open(&path).and_then(|file| match file.metadata()?.is_dir() {
                true => Err(io::ErrorKind::IsADirectory.into()),
                false => Ok(file),
            });
            let file = opened.map_err(|error| Failure {
                exit: Exit::NoInput,
                ..Failure::io("read", &path, &error)
            })?;
            (Box::new(file), false, path.display().to_string())
        }
        Input::Stream(reader) => (reader, true, "stdin".to_owned()),
    };
    let operation = match &options.kept_in {
        Some((state, rotation)) => {
            ensure_state_root(state)?;
            Operation::accept(NAME, Some(detail), state, *rotation, reporter)
        }
        None => Operation::accept_unkept(NAME, Some(detail), reporter),
    };
    let mut forgetful = NoStore;
    let mut ledger = options.kept_in.as_ref().map(|(state, _)| {
        Ledger::new(
            state.harness_logs(),
            options.agent,
            operation.emitter().run(),
            None,
        )
    });
    let keeper: &mut dyn ThreadStore = match &mut ledger {
        Some(ledger) => ledger,
        None => &mut forgetful,
    };
    let expected = Expected { live, resume: None };
    let transcript = options
        .kept_in
        .map(|(state, rotation)| Transcript::new(state.harness_logs(), rotation));
    let mut pump = Pump::new(Relay::new(options.agent, keeper, expected), transcript);
    let mut emit = |event| operation.emitter().emit(event);
    let trouble = relay_stream(reader, &options.cancel, &mut pump, &mut emit);
    pump.end(&mut emit);
    let verdict = match (&trouble, pump.relay.verdict()) {
        (StreamEnd::Whole, verdict) => verdict,
        _ => Verdict::Incomplete,
    };
    pump.relay.end(verdict, &mut emit);
    let reason = match (&trouble, verdict) {
        (StreamEnd::Interrupted, _) => Some("interrupted".to_owned()),
        (StreamEnd::Broken(error), _) => Some(format!("the stream can't be read: {error}")),
        (StreamEnd::Whole, Verdict::Complete) => None,
        (StreamEnd::Whole, Verdict::Failed) => pump.relay.failure().map(str::to_owned),
        (StreamEnd::Whole, _) => Some(incomplete(&pump.relay)),
    };
    let exit = match (&trouble, verdict) {
        (StreamEnd::Interrupted, _) => Exit::Interrupted,
        (_, Verdict::Complete) => Exit::Done,
        _ => Exit::Failed,
    };
    let outcome = outcome_of(&pump, verdict, exit, reason);
    let bytes = pump.bytes();
    drop(pump);
    emit_ledger_error(ledger.as_mut(), &operation);
    let said = Some(outcome.in_short());
    operation.end_with(exit, said, VmCounts::default(), bytes, Some(verdict.as_str()));
    Ok(outcome)
}

/// How a stream was read.
enum StreamEnd {
    Whole,
    Interrupted,
    Broken(io::Error),
}

fn relay_stream(
    reader: Box<dyn Read + Send>,
    cancel: &Cancel,
    pump: &mut Pump<'_>,
    emit: &mut dyn FnMut(Event),
) -> StreamEnd {
    let source = match StreamReader::start(reader) {
        Ok(source) => source,
        Err(error) => return StreamEnd::Broken(error),
    };
    loop {
        if cancel.is_requested() {
            return StreamEnd::Interrupted;
        }
        let mut heard = source.look();
        if matches!(heard, Received::Nothing) {
            pump.idle(emit);
            heard = source.wait(POLL_INTERVAL);
        }
        match heard {
            Received::Bytes(bytes) => {
                pump.feed(&bytes, emit);
                source.give_back(bytes);
            }
            Received::Nothing => {}
            Received::End(None) => return StreamEnd::Whole,
            Received::End(Some(error)) => return StreamEnd::Broken(error),
        }
    }
}

/// Starts an agent, with a preamble about the VMs, and relays its output.
pub fn run(options: RunOptions<'_>, reporter: &mut dyn Reporter) -> Result<HarnessOutcome> {
    const NAME: &str = "harness run";
    let config = options.config;
    let project = Project::from(config);
    let status_options = StatusOptions {
        project,
        cancel: options.cancel.clone(),
    };
    let fleet = status(status_options, &mut Silent)?;
    let ask = full_ask(&options, &fleet)?;
    let place = place_of(&options, &ask)?;
    ensure_state_root(&config.state)?;
    let rotation = config.bus.rotation;
    let detail = match &options.vm {
        Some(vm) => format!("{} in {vm}", options.agent.name()),
        None => options.agent.name().to_owned(),
    };
    let operation = Operation::accept(NAME, Some(detail), &config.state, rotation, reporter);
    let emitter = operation.emitter();
    let mut emit = |event| emitter.emit(event);
    let logs = config.state.harness_logs();
    let mut ledger = Ledger::new(logs.clone(), options.agent, emitter.run(), options.vm.clone());
    let expected = Expected {
        live: true,
        resume: ask.resume.clone(),
    };
    let relay = Relay::new(options.agent, &mut ledger, expected);
    let mut pump = Pump::new(relay, Some(Transcript::new(logs, rotation)));
    let start = AgentCommand {
        mark: emitter.run().to_string(),
        time_limit: options.time_limit,
        idle_limit: options.idle_limit,
        ..place
    };
    let vms = VmCounts {
        total: usize::from(options.vm.is_some()),
        unchanged: usize::from(options.vm.is_some()),
        ..VmCounts::default()
    };
    let ended = match agent_process::run(&start, &options.cancel, &mut pump, &mut emit) {
        Ok(ended) => ended,
        Err(error) => {
            drop(pump);
            let failure = Failure::new(
                Exit::Unavailable,
                format!("`{}` can't be started", start.program.to_string_lossy()),
            )
            .because(error)
            .advice("--codex PATH names another");
            return Err(operation.fail_with(failure, vms, Some(Verdict::Failed.as_str())));
        }
    };
    pump.end(&mut emit);
    let (verdict, reason) = judge(&ended, &pump.relay);
    pump.relay.end(verdict, &mut emit);
    if ended.left_behind > 0 {
        let text = format!(
            "ended {} that the agent left running",
            human::plural(ended.left_behind, "process")
        );
        emit(Event::message(Severity::Info, None, text));
    }
    let exit = match (verdict, ended.stopped) {
        (Verdict::Complete, _) => Exit::Done,
        (_, Some(KillReason::Interrupted)) => Exit::Interrupted,
        _ => Exit::Failed,
    };
    let outcome = outcome_of(&pump, verdict, exit, reason);
    let bytes = pump.bytes();
    drop(pump);
    emit_ledger_error(Some(&mut ledger), &operation);
    if let Some(vm) = &options.vm
        && ended.status.and_then(|status| status.code()) == Some(guest::NOT_FOUND)
        && let program = program_name(&options).to_string_lossy().into_owned()
        && ended.stderr_tail.contains(&guest::not_found(&program))
    {
        let failure = Failure::new(Exit::Unavailable, format!("there is no `{program}` in vm `{vm}`"))
            .because(ended.stderr_tail)
            .advice(format!(
                "install it there, as a rule by the bootstrap of `{vm}`, or name it by --codex PATH"
            ));
        return Err(operation.fail_with(failure, vms, Some(Verdict::Failed.as_str())));
    }
    if verdict != Verdict::Complete && !ended.stderr_tail.is_empty() {
        emitter.emit(stderr_message(options.agent, &ended.stderr_tail));
    }
    let said = Some(outcome.in_short());
    operation.end_with(exit, said, vms, bytes, Some(verdict.as_str()));
    Ok(outcome)
}

impl HarnessOutcome {
    /// One line: why it isn't complete, or its counts.
    fn in_short(&self) -> String {
        match &self.reason {
            Some(reason) => reason.clone(),
            None => format!(
                "{}, {} ({} failed)",
                human::plural(self.counts.messages, "message"),
                human::plural(self.counts.commands + self.counts.commands_failed, "command"),
                self.counts.commands_failed
            ),
        }
    }
}

fn outcome_of(pump: &Pump<'_>, verdict: Verdict, exit: Exit, reason: Option<String>) -> HarnessOutcome {
    HarnessOutcome {
        verdict,
        exit,
        thread: pump.relay.thread().map(str::to_owned),
        last_message: pump.relay.last_message().map(str::to_owned),
        reason,
        counts: pump.relay.counts(),
    }
}

fn incomplete(relay: &Relay<'_>) -> String {
    match (relay.thread(), relay.counts().lines) {
        (_, 0) => "the stream is empty".to_owned(),
        (None, _) => "the stream doesn't name its thread".to_owned(),
        (Some(_), _) => "the stream ended before its turn did".to_owned(),
    }
}

/// The verdict from the agent's exit and its stream, and why it isn't complete.
fn judge(ended: &agent_process::AgentExit, relay: &Relay<'_>) -> (Verdict, Option<String>) {
    match ended.stopped {
        Some(KillReason::TooLong(limit)) => {
            return (
                Verdict::TimedOut,
                Some(format!(
                    "it took longer than {} and was ended (--timeout)",
                    human::limit(limit)
                )),
            );
        }
        Some(KillReason::TooSilent(limit)) => {
            return (
                Verdict::TimedOut,
                Some(format!(
                    "it said nothing for {} and was ended (--idle-timeout)",
                    human::limit(limit)
                )),
            );
        }
        Some(KillReason::Interrupted) => return (Verdict::Incomplete, Some("interrupted".to_owned())),
        Some(KillReason::Lingered) | None => {}
    }
    if let Some(error) = &ended.trouble {
        return (
            Verdict::Incomplete,
            Some(format!("its output can't be read: {error}")),
        );
    }
    let how = match ended.status {
        Some(status) => show_status(status),
        None => "no status".to_owned(),
    };
    let well = ended.status.is_some_and(|status| status.success()) || ended.stopped.is_some();
    match relay.verdict() {
        Verdict::Complete if well => (Verdict::Complete, None),
        Verdict::Complete => (
            Verdict::Failed,
            Some(format!("its turn was completed, but it ended with {how}")),
        ),
        Verdict::Failed => (Verdict::Failed, relay.failure().map(str::to_owned)),
        _ if relay.thread().is_none() => (
            Verdict::Failed,
            Some(format!(
                "it ended with {how} before it began{}",
                last_line(&ended.stderr_tail)
            )),
        ),
        _ => (
            Verdict::Incomplete,
            Some(format!(
                "it ended with {how} in the middle of a turn{}",
                last_line(&ended.stderr_tail)
            )),
        ),
    }
}

fn last_line(tail: &str) -> String {
    match tail.lines().last() {
        Some(line) => format!(": {line}"),
        None => String::new(),
    }
}

/// stderr isn't empty on success either; if the agent failed, the end of stderr is the best explanation.
fn stderr_message(agent: &dyn Agent, tail: &str) -> Event {
    let mut event = Event::message(
        Severity::Warn,
        None,
        format!("the end of the agent's stderr:\n{tail}"),
    );
    if let Event::Message { source, data, .. } = &mut event {
        *source = Some(agent.name().to_owned());
        *data = Some(serde_json::json!({"kind": "stderr"}));
    }
    event
}

fn emit_ledger_error(ledger: Option<&mut Ledger<'_>>, operation: &Operation<'_>) {
    if let Some(failure) = ledger.and_then(Ledger::take_error) {
        operation.emitter().emit(Event::advice(
            Severity::Warn,
            None,
            format!("the thread's record can't be kept: {}", failure.cause()),
            "castra adds up the transcript instead; make that folder writable",
        ));
    }
}

/// The prompt with the preamble before it, checked.
fn full_ask(options: &RunOptions<'_>, fleet: &StatusOutcome) -> Result<AgentRequest> {
    let mut ask = options.ask.clone();
    for (what, text) in [("prompt", Some(&ask.prompt)), ("thread", ask.resume.as_ref())] {
        let Some(text) = text else {
            continue;
        };
        if text.trim().is_empty() || text.contains('\0') {
            return Err(Failure::new(Exit::Usage, format!("not a valid {what}: {text:?}"))
                .advice("castra harness run --help"));
        }
    }
    // A resumed thread gets the preamble again, because VMs may have come and gone since.
    if !options.bare {
        let view = match &options.vm {
            Some(vm) => View::Inside(vm.clone()),
            None => View::Host {
                castra: options.castra.clone(),
            },
        };
        let told = preamble(fleet, |vm| bootstrapped(options.config, vm), &view);
        ask.prompt = format!("{told}Your task:\n{}", ask.prompt);
    }
    if ask.prompt.len() > MAX_PROMPT_BYTES {
        return Err(Failure::new(Exit::Usage, "the prompt is too long")
            .because(format!(
                "it has {} bytes with what castra puts before it; an argument may have {MAX_PROMPT_BYTES}",
                ask.prompt.len()
            ))
            .advice("put it in a file and ask the agent to read that"));
    }
    Ok(ask)
}

fn bootstrapped(config: &Config, vm: &VmName) -> Option<Bootstrapped> {
    let vm = config.vm(vm.as_str())?;
    Some(Bootstrapped {
        script: vm.bootstrap.script.clone(),
        payload: vm.bootstrap.payload.clone(),
        remote_dir: vm.bootstrap.remote_dir.clone(),
        env_keys: vm.bootstrap.env.keys().cloned().collect(),
        description: vm.description.clone(),
    })
}

fn program_name(options: &RunOptions<'_>) -> OsString {
    match &options.program {
        Some(path) => path.clone().into_os_string(),
        None => options.agent.program().into(),
    }
}

/// The process to start, on the host or by `ssh` in a VM. Whatever is known to be missing is a refusal.
fn place_of(options: &RunOptions<'_>, ask: &AgentRequest) -> Result<AgentCommand> {
    let program = program_name(options);
    let args = options.agent.argv(ask);
    let Some(vm) = &options.vm else {
        let found = find_program(&program, options.agent.install())?;
        if let Some(dir) = options.dir.as_ref().filter(|dir| !dir.is_dir()) {
            return Err(
                Failure::new(Exit::NoInput, format!("there is no directory {}", dir.display()))
                    .advice("--cwd names the directory that the agent works in"),
            );
        }
        let mut start = AgentCommand::new(found, args, "");
        start.dir.clone_from(&options.dir);
        return Ok(start);
    };
    find_program(OsStr::new("ssh"), "")?;
    let target = running_target(&options.config.state, vm)?;
    if args.iter().any(|word| word.len() > guest::MAX_ARG_BYTES) {
        return Err(Failure::new(Exit::Usage, "the prompt is too long")
            .because(
                "with what castra puts before it, it has more than 128 KiB, and no program takes a longer argument",
            )
            .advice("put it in a file there (`castra cp`) and ask the agent to read that"));
    }
    let script = remote_script(&program, &args, options.dir.as_deref().map(Path::as_os_str));
    let mut start = AgentCommand::new("ssh", ssh_argv(&target), "");
    start.held_stdin = Some(script.into_bytes());
    // The watch in the guest sends its own signals; ours begin after those.
    start.grace += Duration::from_secs(guest::GRACE_SECS);
    Ok(start)
}

/// The program's path, found as the system would find it.
fn find_program(program: &OsStr, install: &str) -> Result<OsString> {
    let is_program = |path: &Path| {
        fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let path = Path::new(program);
    let found = if path.components().count() > 1 {
        std::path::absolute(path).ok().filter(|path| is_program(path))
    } else {
        let path = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&path)
            .map(|dir| dir.join(program))
            .find(|candidate| is_program(candidate))
    };
    found.map(PathBuf::into_os_string).ok_or_else(|| {
        let shown = program.to_string_lossy();
        let failure = Failure::new(Exit::Unavailable, format!("there is no program `{shown}`"));
        match shown.as_ref() {
            "ssh" => failure.advice("install the package openssh-client"),
            _ => failure
                .because("the agent isn't installed here, or not on PATH")
                .advice(format!(
                    "{install}; --codex PATH names one elsewhere; --in VM runs one there"
                )),
        }
    })
}

// --- what is kept -----------------------------------------------------------------------------

/// One thread in a list.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ThreadRow {
    /// Its id, as the agent spells it.
    pub thread: String,
    /// The agent.
    pub agent: String,
    /// Wall clock of its beginning, RFC 3339.
    pub began: String,
    /// Wall clock of the last that was heard.
    pub ended: String,
    /// The VM its last process ran in; null: on the host.
    pub vm: Option<VmName>,
    /// Processes that had a part in it.
    pub sessions: usize,
    /// Turns begun.
    pub turns: u64,
    /// Messages of the agent.
    pub messages: u64,
    /// Commands, failed ones included.
    pub commands: u64,
    /// Commands that failed.
    pub commands_failed: u64,
    /// Tokens of all turns.
    #[serde(flatten)]
    pub tokens: crate::core::harness::Tokens,
    /// How its last process ended.
    pub verdict: Option<Verdict>,
    /// Its transcript.
    pub transcript: PathBuf,
    /// The transcript's bytes, rotated files included.
    pub bytes: u64,
}

/// The threads of a project, the most recent last. A reading operation.
pub fn list(state: &StateRoot) -> Result<Vec<ThreadRow>> {
    let dir = state.harness_logs();
    let records = ledger::list(&dir, AGENTS[0])?;
    Ok(records.into_iter().map(|record| row(&dir, record)).collect())
}

fn row(dir: &Path, record: ThreadRecord) -> ThreadRow {
    let account = record.account();
    let path = transcript::path_of(dir, &record.thread);
    let (first, last) = (record.all().next(), record.all().last());
    ThreadRow {
        began: first.map(|session| session.began.clone()).unwrap_or_default(),
        ended: last.map(|session| session.ended.clone()).unwrap_or_default(),
        vm: last.and_then(|session| session.vm.clone()),
        sessions: record.all().count(),
        turns: account.turns,
        messages: account.messages,
        commands: account.commands + account.commands_failed,
        commands_failed: account.commands_failed,
        tokens: account.tokens,
        verdict: record.verdict(),
        bytes: transcript::size(&path),
        transcript: path,
        agent: record.agent,
        thread: record.thread,
    }
}

/// The thread that a word names: its id, or the beginning of exactly one id.
pub fn find(state: &StateRoot, word: &str) -> Result<ThreadRow> {
    let rows = list(state)?;
    if let Some(row) = rows.iter().find(|row| row.thread == word) {
        return Ok(row.clone());
    }
    let mut begins = rows
        .iter()
        .filter(|row| !word.is_empty() && row.thread.starts_with(word));
    match (begins.next(), begins.next()) {
        (Some(row), None) => Ok(row.clone()),
        (Some(_), Some(_)) => Err(
            Failure::new(Exit::Usage, format!("several threads begin with {word:?}"))
                .advice("give more of its id; `castra harness list` shows them"),
        ),
        (None, _) => {
            let failure = Failure::new(
                Exit::Usage,
                format!("there is no thread {word:?} in this project"),
            );
            Err(match nearest(word, rows.iter().map(|row| row.thread.as_str())) {
                Some(near) => failure.advice(format!("castra harness show {near}")),
                None => failure.advice("castra harness list"),
            })
        }
    }
}

/// Passes on the lines of a thread as the agent wrote them, lossy UTF-8, until `take` returns false.
pub fn lines(thread: &ThreadRow, mut take: impl FnMut(&str) -> bool) -> Result<()> {
    use crate::core::harness::line_splitter::{Line, text_of};
    transcript::read(&thread.transcript, |line| match line {
        Line::Whole(bytes) | Line::Torn(bytes) => take(&text_of(bytes)),
        Line::TooLong(..) => true,
    })
    .map_err(|error| Failure::io("read", &thread.transcript, &error))
}

/// Passes on the events that a thread's transcript stands for, until `take` returns false.
pub fn replay(thread: &ThreadRow, mut take: impl FnMut(Event) -> bool) -> Result<()> {
    let mut keeper = NoStore;
    let agent = agent_named(&thread.agent).unwrap_or(AGENTS[0]);
    let mut relay = Relay::new(agent, &mut keeper, Expected::default());
    let mut goes_on = true;
    let mut hand_over = |event| goes_on = goes_on && take(event);
    let read = transcript::read(&thread.transcript, |line| {
        relay.line(line, &mut hand_over);
        true
    });
    relay.end(relay.verdict(), &mut hand_over);
    read.map_err(|error| Failure::io("read", &thread.transcript, &error))
}

/// Tokens by thread and day, beside the time VMs ran. A reading operation.
pub fn usage(project: Project, cancel: Cancel) -> Result<Usage> {
    let state = project.state.clone();
    let records = ledger::list(&state.harness_logs(), AGENTS[0])?;
    let outcome = status(StatusOptions { project, cancel }, &mut Silent)?;
    let running = outcome.vms.into_iter().filter(|vm| vm.pid.is_some());
    let running: HashSet<VmName> = running.map(|vm| vm.name).collect();
    let spans = vm_spans(
        events_of_type(state, "vm.lifecycle")?,
        &running,
        SystemTime::now(),
    );
    Ok(sum(&records, &spans))
}
