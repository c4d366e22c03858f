//! The steps over SSH: `connect`, `apply`, `verify`.
//!
//! Here: what each step does and how it reports a failure. Not here: their order and events
//! (`bootstrap::pipeline`), `transfer` and `wait-handshake` (modules of their own).

use std::fs;
use std::time::{Duration, Instant};

use crate::core::bootstrap::archive::PAYLOAD_NAME;
use crate::core::bootstrap::banner::BannerSearch;
use crate::core::bootstrap::bootstrap_plan;
use crate::core::bootstrap::context::Context;
use crate::core::bootstrap::guest_scripts::{self, Program};
use crate::core::bootstrap::ssh::SshTarget;
use crate::core::bootstrap::ssh::channel::{self, Exec, ExecError, Limit, Stream};
use crate::core::bootstrap::ssh::error::SshError;
use crate::core::bootstrap::ssh::master::Master;
use crate::core::bootstrap::step_failure::StepFailure;
use crate::core::bootstrap::watch::Watch;
use crate::core::cancel::POLL_INTERVAL;
use crate::core::escape::escape_line;
use crate::core::events::{Event, Severity};
use crate::core::host;
use crate::core::id::RunId;
use crate::core::process::Tail;
use crate::core::root::paths::vm_file;
use crate::core::root::run_log::OpenLog;
use crate::core::threads::no_thread_failure;
use crate::core::time::millis;

/// A line with which a script declares that it changed nothing.
pub const NOOP_LINE: &str = "Castra:noop";

/// Limit for a first connection without a banner. A server that takes longer, under a heavy load, is tried
/// once more.
const BLIND_CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// The pause before another attempt when the guest closed the connection.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// A guest that booted this recently may not have its keys yet, or may refuse all users but root
/// (pam_nologin): castra tries again for [`AUTH_RETRY_TIME`].
const RECENT_BOOT: Duration = Duration::from_secs(300);
const AUTH_RETRY_TIME: Duration = Duration::from_secs(10);
/// How long QEMU may run on after a guest that shuts down has ended its SSH server.
const VM_END_TIMEOUT: Duration = Duration::from_secs(5);
/// How many lines of output become events at full speed. Beyond them so many a second do, so that a script
/// with much output doesn't fill the journal. The `.out` file has all lines.
const LINES_AT_ONCE: u32 = 2000;
const LINES_PER_SECOND: u32 = 20;
/// Longest text of a line in an event.
const LINE_BYTES: usize = 2048;
/// Longest text of a line in the detail of a failed step, which has up to twenty.
const DETAIL_BYTES: usize = 400;

/// The result of `connect`.
pub(super) enum Connected {
    /// The master is open.
    Open(Box<Master>, String),
    /// No SSH server answered.
    NoBanner,
}

/// Searches for the banner of this VM's SSH server.
pub(super) fn start_banner_search(
    context: &Context<'_, '_>,
    target: &SshTarget,
) -> Result<BannerSearch, StepFailure> {
    let launched = Duration::from_millis(context.launch.launched_boottime_ms);
    let age = host::boottime().saturating_sub(launched);
    BannerSearch::start(&target.host, target.port, context.vm.name.as_str(), age)
        .map_err(|error| StepFailure::because(no_thread_failure("banner", &error).cause()))
}

/// Whether the guest's SSH server has answered since the guest got its disk: a fresh disk begins with an empty file.
pub(super) fn has_answered(context: &Context<'_, '_>) -> bool {
    let known_hosts = context
        .config
        .state
        .vm(&context.vm.name)
        .file(vm_file::KNOWN_HOSTS);
    fs::metadata(known_hosts).is_ok_and(|meta| meta.is_file() && meta.len() > 0)
}

/// Opens the master once there is a banner. Without a search so far, the guest is known to live: then the
/// master is tried first, which saves the guest a connection, and the search begins if that fails.
pub(super) fn connect(
    context: &Context<'_, '_>,
    watch: &Watch<'_>,
    target: SshTarget,
    banner: &mut Option<BannerSearch>,
) -> Result<Connected, StepFailure> {
    let bootstrap = &context.vm.bootstrap;
    let began = Instant::now();
    let limit = bootstrap.step_timeout;
    let mut refused: Option<Instant> = None;
    let mut answered = None;
    let master = loop {
        if let Some(search) = banner {
            search.retry_faster();
            while search.wait(POLL_INTERVAL).is_none() {
                if let Some(stop) = watch.look() {
                    return Err(StepFailure::Stopped(stop));
                }
                if began.elapsed() >= limit {
                    return Ok(Connected::NoBanner);
                }
            }
            answered.get_or_insert_with(|| began.elapsed());
        }
        let left = limit.saturating_sub(began.elapsed());
        let patience = if banner.is_some() {
            left
        } else {
            left.min(BLIND_CONNECT_TIMEOUT)
        };
        let error = match Master::open(
            target.clone(),
            &guest_scripts::greeting(&bootstrap.remote_dir, context.config.vizier_enabled),
            patience,
            watch,
        ) {
            Ok(master) => break master,
            Err(error) => error,
        };
        if banner.is_none() && matches!(error, SshError::Unreachable(_) | SshError::NotReady(..)) {
            *banner = Some(start_banner_search(context, &target)?);
            continue;
        }
        let again = match &error {
            SshError::Unreachable(_) => true,
            SshError::AuthRefused(_) => {
                has_booted_recently(context)
                    && refused.get_or_insert_with(Instant::now).elapsed() < AUTH_RETRY_TIME
            }
            _ => false,
        };
        if !again || began.elapsed() + RETRY_AFTER >= limit {
            return Err(StepFailure::of_ssh(
                match error {
                    // The time left for this step is no news to the user.
                    SshError::NotReady(_, words) => SshError::NotReady(limit, words),
                    error => error,
                },
                &target,
            ));
        }
        if let Some(stop) = watch.pause(RETRY_AFTER) {
            return Err(StepFailure::Stopped(stop));
        }
    };
    *banner = None;
    let mut detail = format!("{}@{}:{}", target.user, target.host, target.port);
    if let Some(answered) = answered {
        detail.push_str(&format!(
            "; its SSH server answered after {} ms",
            answered.as_millis()
        ));
    }
    Ok(Connected::Open(Box::new(master), detail))
}

/// Checks that the master lives and that its user can work in `remote_dir`.
pub(super) fn check(context: &Context<'_, '_>, master: &mut Master) -> Result<(), StepFailure> {
    let target = master.target().clone();
    if let Some(lost) = master.lost(Duration::ZERO) {
        return Err(StepFailure::of_ssh(lost, &target));
    }
    if !master
        .greeting_lines()
        .iter()
        .any(|line| line == guest_scripts::DIR_OK)
    {
        let complaints = escape_line(&master.stderr_tail().replace('\n', "; "), 400);
        let (user, dir) = (&target.user, &context.vm.bootstrap.remote_dir);
        return Err(
            StepFailure::because(format!("user `{user}` can't use {dir} in the guest"))
                .with_tail(&complaints)
                .with_advice("name another place with `remote_dir`, or another user under [ssh]"),
        );
    }
    Ok(())
}

fn has_booted_recently(context: &Context<'_, '_>) -> bool {
    let age = host::boottime_ms().saturating_sub(context.launch.launched_boottime_ms);
    age < millis(RECENT_BOOT)
}

/// The result of `apply`.
pub(super) struct Applied {
    /// The script declared that there was nothing to change.
    pub noop: bool,
    /// What the step reports.
    pub detail: Option<String>,
}

/// Runs the script.
pub(super) fn apply(
    context: &Context<'_, '_>,
    watch: &Watch<'_>,
    master: &mut Master,
    run: &RunId,
    log: &mut OpenLog,
) -> Result<Applied, StepFailure> {
    let Some(script) = &context.vm.bootstrap.script else {
        return Ok(Applied {
            noop: false,
            detail: None,
        });
    };
    let name = script
        .file_name()
        .ok_or_else(|| StepFailure::because(format!("{} has no file name", script.display())))?;
    let direct = bootstrap_plan::names_interpreter(script)
        .map_err(|error| StepFailure::because(format!("{} can't be read: {error}", script.display())))?;
    let mut noop = false;
    let mut output = Output::new(context);
    let program = Program::Script { name, direct };
    let limit = context.vm.bootstrap.apply_timeout;
    let code = run_session(
        context,
        watch,
        master,
        run,
        program,
        limit,
        &mut |stream, line| {
            noop |= line.trim() == NOOP_LINE;
            log.output(line);
            output.line(stream, line);
        },
    );
    output.finish();
    let tail = output.tail.text();
    match code {
        Ok(0) => Ok(Applied { noop, detail: None }),
        Ok(code) => {
            let failure =
                StepFailure::because(format!("the script ended with {}", code_word(code))).with_tail(&tail);
            Err(match code {
                126 => {
                    failure.with_advice("check whether `remote_dir` is mounted noexec, and whether the script's interpreter can be run")
                }
                127 => failure.with_advice("the guest lacks a program, perhaps the script's interpreter"),
                _ => failure,
            })
        }
        Err(error) => {
            // A guest that reboots or powers itself off ends its SSH server before QEMU ends.
            if matches!(error, ExecError::Ssh(SshError::Lost(_)))
                && let Some(stop) = watch.pause_for_end(VM_END_TIMEOUT)
            {
                return Err(StepFailure::Stopped(stop));
            }
            Err(StepFailure::of_exec(error, &tail, "the script", master.target()))
        }
    }
}

/// Runs the verify command and checks the verify path; returns what to report.
pub(super) fn verify(
    context: &Context<'_, '_>,
    watch: &Watch<'_>,
    master: &mut Master,
    run: &RunId,
) -> Result<String, StepFailure> {
    let bootstrap = &context.vm.bootstrap;
    let limit = bootstrap.step_timeout;
    let mut done = Vec::new();
    if let Some(command) = &bootstrap.verify_command {
        let mut tail = Tail::default();
        let program = Program::Command(command);
        let code = run_session(context, watch, master, run, program, limit, &mut |_, line| {
            tail.push(&escape_line(line, DETAIL_BYTES));
        })
        .map_err(|error| StepFailure::of_exec(error, &tail.text(), "the verify command", master.target()))?;
        if code != 0 {
            return Err(StepFailure::because(format!(
                "`{}` ended with {}",
                escape_line(command, 200),
                code_word(code)
            ))
            .with_tail(&tail.text()));
        }
        done.push(format!("`{}` succeeded", escape_line(command, 200)));
    }
    if let Some(path) = &bootstrap.verify_path {
        let code = run_session(
            context,
            watch,
            master,
            run,
            Program::Exists(path),
            limit,
            &mut |_, _| (),
        )
        .map_err(|error| StepFailure::of_exec(error, "", "the verify path", master.target()))?;
        if code != 0 {
            return Err(StepFailure::because(format!(
                "{path} doesn't exist in {}",
                bootstrap.remote_dir
            )));
        }
        done.push(format!("{path} exists"));
    }
    Ok(done.join(", "))
}

fn run_session(
    context: &Context<'_, '_>,
    watch: &Watch<'_>,
    master: &mut Master,
    run: &RunId,
    program: Program<'_>,
    limit: Duration,
    on_line: &mut dyn FnMut(Stream, &str),
) -> Result<i32, ExecError> {
    let bootstrap = &context.vm.bootstrap;
    let payload = bootstrap
        .payload
        .as_ref()
        .map(|_| format!("{}/{PAYLOAD_NAME}", bootstrap.remote_dir.trim_end_matches('/')))
        .unwrap_or_default();
    let mut env: Vec<(&str, &str)> = bootstrap
        .env
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect();
    // Last, so that castra's own values win.
    env.extend([
        ("CASTRA_VM", context.vm.name.as_str()),
        ("CASTRA_RUN_ID", run.as_str()),
        ("CASTRA_PAYLOAD_DIR", payload.as_str()),
        (
            "CASTRA_BROKER",
            context.broker_address.as_deref().unwrap_or_default(),
        ),
    ]);
    // A script can't print this by chance; a hostile guest can lie anyway.
    let random = host::random_hex(8).unwrap_or_else(|_| run.to_string());
    let mark = format!("castra-end-{random}");
    let text = guest_scripts::session(&bootstrap.remote_dir, &env, program, &mark);
    let exec = Exec {
        command: guest_scripts::SESSION_COMMAND.to_owned(),
        feed: Box::new(move |stdin| stdin.write_all(text.as_bytes())),
        hold_stdin: true,
        limit: Limit::Total(limit),
        begin_mark: Some(guest_scripts::begin_mark(&mark)),
        end_mark: Some(mark),
    };
    channel::run(master, exec, watch, on_line, &mut || ())
}

fn code_word(code: i32) -> String {
    match code {
        // The exit code that shells give a program that a signal ended.
        129..=192 => format!("exit status {code} (signal {})", code - 128),
        _ => format!("exit status {code}"),
    }
}

/// Turns a script's output into events.
struct Output<'a, 'c, 'e> {
    context: &'a Context<'c, 'e>,
    tail: Tail,
    allowance: u32,
    refilled: Instant,
    left_out: u64,
}

impl<'a, 'c, 'e> Output<'a, 'c, 'e> {
    fn new(context: &'a Context<'c, 'e>) -> Output<'a, 'c, 'e> {
        Output {
            context,
            tail: Tail::default(),
            allowance: LINES_AT_ONCE,
            refilled: Instant::now(),
            left_out: 0,
        }
    }

    fn line(&mut self, stream: Stream, line: &str) {
        let text = escape_line(line, LINE_BYTES);
        self.tail.push(&escape_line(line, DETAIL_BYTES));
        if self.refilled.elapsed() >= Duration::from_secs(1) {
            self.refilled = Instant::now();
            self.allowance = self.allowance.max(LINES_PER_SECOND);
        }
        match self.allowance.checked_sub(1) {
            Some(left) => {
                self.allowance = left;
                let word = match stream {
                    Stream::Out => "stdout",
                    Stream::Err => "stderr",
                };
                self.emit(
                    Severity::Progress,
                    text,
                    Some(serde_json::json!({ "stream": word })),
                );
            }
            None => self.left_out += 1,
        }
    }

    fn finish(&mut self) {
        if self.left_out > 0 {
            let text = format!(
                "{} more lines of output are in the run log's .out file alone",
                self.left_out
            );
            self.emit(Severity::Info, text, None);
        }
    }

    fn emit(&self, severity: Severity, text: String, more: Option<serde_json::Value>) {
        let mut event = Event::message(severity, Some(&self.context.vm.name), text);
        if let Event::Message { source, data, .. } = &mut event {
            *source = Some("bootstrap".to_owned());
            *data = more;
        }
        self.context.emitter.emit(event);
    }
}
