//! Children that castra runs to their end: `qemu-img`, `ssh`, `tar`, `curl`, the image builder.
//!
//! Here: one way to start, feed, drain, bound and reap them. Not here: QEMU itself, which
//! daemonizes and outlives us (`core::runtime`), or which arguments anybody gets.
//!
//! Every child is treated alike: its own process group (the terminal's Ctrl-C reaches only
//! castra), stdin explicit, stdout and stderr drained by threads, a deadline, the stderr tail in
//! the error, always reaped. A child past its deadline gets SIGTERM to its whole group, then
//! SIGKILL.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::core::cancel::{Cancel, POLL_INTERVAL};
use crate::core::failure::{Exit, Failure};
use crate::core::host::FileLock;
use crate::core::human;
use crate::core::threads::{FREE_RESOURCES, is_out_of_resources};

/// How much of stdout is kept in memory, bytes.
const STDOUT_LIMIT: u64 = 1024 * 1024;
/// How much of stderr is kept for the message: lines, and bytes a line.
const STDERR_TAIL_LINES: usize = 20;
const STDERR_LINE_BYTES: u64 = 4096;
/// The variable that marks every process an agent starts (`core::harness`); its value is the id of castra's run.
pub const AGENT_RUN_MARK: &str = "CASTRA_HARNESS_RUN";
/// Between SIGTERM and SIGKILL to a child that must end.
const TERM_GRACE: Duration = Duration::from_secs(2);

/// Who is told each line of a child's stderr.
type OnLine<'a> = Box<dyn FnMut(&str) + Send + 'a>;

/// A command to run to its end.
pub struct Job<'a> {
    program: OsString,
    args: Vec<OsString>,
    dir: Option<PathBuf>,
    env: Vec<(OsString, OsString)>,
    stdin: Vec<u8>,
    holding: Option<File>,
    deadline: Duration,
    cancel: Option<Cancel>,
    on_stderr_line: Option<OnLine<'a>>,
    output: Option<File>,
}

/// What a child left behind, whatever its exit status.
#[derive(Debug)]
pub struct Ended {
    /// Program and arguments, for messages.
    pub argv: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its stdout, at most 1 MiB.
    pub stdout: Vec<u8>,
    /// The last lines of its stderr.
    pub stderr_tail: String,
}

/// Why a job has no result.
#[derive(Debug)]
pub enum JobError {
    /// The program isn't there or can't be executed.
    NotStarted {
        /// The program.
        program: String,
        /// What the system said.
        error: io::Error,
    },
    /// It ran past its deadline and was ended.
    TimedOut {
        /// Program and arguments.
        argv: String,
        /// The deadline.
        after: Duration,
        /// The last lines of its stderr.
        stderr_tail: String,
    },
    /// Somebody asked to stop, and it was ended.
    Cancelled,
    /// It ended with something other than 0.
    Failed(Box<Ended>),
}

impl<'a> Job<'a> {
    /// A job for `program`, found on PATH; stdin empty, a minute's deadline.
    pub fn new(program: impl AsRef<OsStr>) -> Job<'a> {
        Job {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            dir: None,
            env: Vec::new(),
            stdin: Vec::new(),
            holding: None,
            deadline: Duration::from_secs(60),
            cancel: None,
            on_stderr_line: None,
            output: None,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets the working directory.
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.dir = Some(dir.as_ref().to_owned());
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// What it reads on stdin.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Lets it hold a lock of ours as long as it runs, also when we are killed: so nobody takes what
    /// it makes for a leftover. The locked file is its stdin, the one way to hand it over that can't
    /// reach another child; so it can't read anything.
    pub fn holding(mut self, lock: Option<&FileLock>) -> Self {
        self.holding = lock.and_then(|lock| lock.share().ok());
        self
    }

    /// How long it may take.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Ends it when somebody asks to stop.
    pub fn cancel(mut self, cancel: &Cancel) -> Self {
        self.cancel = Some(cancel.clone());
        self
    }

    /// Lets both its outputs go to this file instead of into the result. For a child that leaves
    /// another one behind: that one would hold the pipes open, and the job would never end.
    pub fn output_to(mut self, file: File) -> Self {
        self.output = Some(file);
        self
    }

    /// Called with each line of its stderr as it comes, lossy UTF-8, without line end.
    pub fn on_stderr_line(mut self, callback: impl FnMut(&str) + Send + 'a) -> Self {
        self.on_stderr_line = Some(Box::new(callback));
        self
    }

    /// Runs it; success is exit status 0.
    pub fn run(self) -> Result<Ended, JobError> {
        let ended = self.run_any()?;
        if ended.status.success() {
            Ok(ended)
        } else {
            Err(JobError::Failed(Box::new(ended)))
        }
    }

    /// Runs it, whatever its exit status.
    pub fn run_any(mut self) -> Result<Ended, JobError> {
        let argv = show_argv(&self.program, &self.args);
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            // What castra starts on an agent's behalf outlives the agent.
            .env_remove(AGENT_RUN_MARK)
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .process_group(0)
            .stdin(match self.holding.take() {
                Some(file) => Stdio::from(file),
                None if self.stdin.is_empty() => Stdio::null(),
                None => Stdio::piped(),
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(file) = &self.output {
            let copy = || file.try_clone().map_or_else(|_| Stdio::null(), Stdio::from);
            command.stdout(copy()).stderr(copy());
        }
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        let began = Instant::now();
        let mut child = command.spawn().map_err(|error| JobError::NotStarted {
            program: self.program.to_string_lossy().into_owned(),
            error,
        })?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        let input = std::mem::take(&mut self.stdin);
        let callback = self.on_stderr_line.take();
        thread::scope(|scope| {
            let thread = |name: &'static str| thread::Builder::new().name(name.to_owned());
            let fed = stdin.map(|mut stdin| {
                // A child that doesn't want its input is no fault of the job.
                thread("job-in").spawn_scoped(scope, move || drop(stdin.write_all(&input)))
            });
            let out =
                thread("job-out").spawn_scoped(scope, move || stdout.map(drain_stdout).unwrap_or_default());
            let err = thread("job-err").spawn_scoped(scope, move || {
                stderr
                    .map(|pipe| drain_stderr(pipe, callback))
                    .unwrap_or_default()
            });
            let (out, err) = match (fed.transpose(), out, err) {
                (Ok(_), Ok(out), Ok(err)) => (out, err),
                (Err(error), _, _) | (_, Err(error), _) | (_, _, Err(error)) => {
                    // Undrained it would stand still at a full pipe.
                    end_group(&mut child);
                    return Err(JobError::NotStarted {
                        program: self.program.to_string_lossy().into_owned(),
                        error,
                    });
                }
            };
            let waited = self.wait(&mut child, began);
            let stdout = out.join().unwrap_or_default();
            let stderr_tail = err.join().unwrap_or_default();
            match waited {
                Waited::Ended(status) => Ok(Ended {
                    argv,
                    status,
                    stdout,
                    stderr_tail,
                }),
                Waited::Late => Err(JobError::TimedOut {
                    argv,
                    after: self.deadline,
                    stderr_tail,
                }),
                Waited::Cancelled => Err(JobError::Cancelled),
            }
        })
    }

    fn wait(&self, child: &mut Child, began: Instant) -> Waited {
        loop {
            if let Ok(Some(status)) = child.try_wait() {
                return Waited::Ended(status);
            }
            if self.cancel.as_ref().is_some_and(Cancel::is_requested) {
                end_group(child);
                return Waited::Cancelled;
            }
            if began.elapsed() >= self.deadline {
                end_group(child);
                return Waited::Late;
            }
            // Looked at more often while it is young: a `qemu-img create` of 12 ms would otherwise
            // be noticed up to 10 ms late, and there is one for each VM.
            let look_after = (began.elapsed() / 8).clamp(Duration::from_micros(500), POLL_INTERVAL);
            thread::sleep(look_after);
        }
    }
}

enum Waited {
    Ended(ExitStatus),
    Late,
    Cancelled,
}

/// How a child has ended, if it ends within this time.
pub fn ended_within(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    const EVERY: Duration = Duration::from_millis(2);
    Cancel::new().wait_for(limit, EVERY, || child.try_wait().ok().flatten())
}

/// Ends a child and its whole group: SIGTERM, after a grace SIGKILL; reaps it.
pub fn end_group(child: &mut Child) {
    let group = Pid::from_raw(i32::try_from(child.id()).expect("pids fit in 31 bits"));
    let _ = killpg(group, Signal::SIGTERM);
    ended_within(child, TERM_GRACE);
    // The leader is gone or not: whoever of its group is left holds our pipes open.
    let _ = killpg(group, Signal::SIGKILL);
    let _ = child.wait();
}

fn drain_stdout(mut stdout: impl Read) -> Vec<u8> {
    let mut kept = Vec::new();
    let _ = (&mut stdout).take(STDOUT_LIMIT).read_to_end(&mut kept);
    let _ = io::copy(&mut stdout, &mut io::sink());
    kept
}

fn drain_stderr<'a>(stderr: impl Read, mut callback: Option<OnLine<'a>>) -> String {
    let mut tail = Tail::default();
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(STDERR_LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return tail.text(),
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                let text = text.trim_end_matches(['\n', '\r']);
                tail.push(text);
                if let Some(callback) = callback.as_mut() {
                    callback(text);
                }
            }
        }
    }
}

/// The last lines of a stream.
#[derive(Debug, Default)]
pub struct Tail(VecDeque<String>);

impl Tail {
    /// Adds a line and forgets the oldest beyond 20.
    pub fn push(&mut self, line: &str) {
        if line.trim().is_empty() {
            return;
        }
        if self.0.len() == STDERR_TAIL_LINES {
            self.0.pop_front();
        }
        self.0.push_back(line.to_owned());
    }

    /// The lines, joined by line feeds.
    pub fn text(&self) -> String {
        self.0.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

/// A command line for messages: arguments with odd characters are quoted.
pub fn show_argv(program: &OsStr, args: &[OsString]) -> String {
    std::iter::once(program)
        .chain(args.iter().map(OsString::as_os_str))
        .map(|word| shell_quote(&word.to_string_lossy()))
        .collect::<Vec<_>>()
        .join(" ")
}

/// One word, quoted for a POSIX shell where it needs to be.
pub fn shell_quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "@%_-+=:,./".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    String::from_utf8_lossy(&in_single_quotes(word.as_bytes())).into_owned()
}

/// Any bytes as one word of a POSIX shell, always in quotes.
pub fn in_single_quotes(word: &[u8]) -> Vec<u8> {
    let parts: Vec<&[u8]> = word.split(|byte| *byte == b'\'').collect();
    [b"'", parts.join(&br"'\''"[..]).as_slice(), b"'"].concat()
}

/// `exit status 3`, `signal 9 (SIGKILL)`.
pub fn show_status(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(number)) => match Signal::try_from(number) {
            Ok(signal) => format!("signal {number} ({signal})"),
            Err(_) => format!("signal {number}"),
        },
        (None, None) => "an unknown status".to_owned(),
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tail = |f: &mut fmt::Formatter<'_>, text: &str| {
            if text.is_empty() {
                Ok(())
            } else {
                write!(f, ": {text}")
            }
        };
        match self {
            JobError::NotStarted { program, error } => write!(f, "`{program}` can't be started: {error}"),
            JobError::TimedOut {
                argv,
                after,
                stderr_tail,
            } => {
                write!(
                    f,
                    "`{argv}` took longer than {}, so castra ended it",
                    human::limit(*after)
                )?;
                tail(f, stderr_tail)
            }
            JobError::Cancelled => write!(f, "interrupted"),
            JobError::Failed(ended) => {
                write!(f, "`{}` ended with {}", ended.argv, show_status(ended.status))?;
                tail(f, &ended.stderr_tail)
            }
        }
    }
}

impl std::error::Error for JobError {}

impl JobError {
    /// As a failure of the operation `what`; a missing program is `Unavailable`, an interruption
    /// `Interrupted`, all else `otherwise`.
    pub fn into_failure(self, what: impl Into<String>, otherwise: Exit) -> Failure {
        let exit = match &self {
            JobError::NotStarted { error, .. } if is_out_of_resources(error) => {
                return Failure::new(Exit::Busy, what)
                    .because(&self)
                    .advice(FREE_RESOURCES);
            }
            JobError::NotStarted { .. } => Exit::Unavailable,
            JobError::Cancelled => Exit::Interrupted,
            JobError::TimedOut { .. } | JobError::Failed(_) => otherwise,
        };
        Failure::new(exit, what).because(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Job<'static> {
        Job::new("sh").args(["-c", script])
    }

    #[test]
    fn output_and_status_come_back() {
        let ended = sh("cat; echo oops >&2").stdin("hello").run().unwrap();
        assert_eq!(ended.stdout, b"hello");
        assert_eq!(ended.stderr_tail, "oops");
    }

    #[test]
    fn a_failure_shows_command_status_and_stderr() {
        let error = sh("echo first >&2; echo no such thing >&2; exit 3")
            .run()
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("exit status 3") && text.contains("no such thing"),
            "{text}"
        );
    }

    #[test]
    fn a_deadline_ends_the_whole_group() {
        let began = Instant::now();
        let error = sh("sleep 100 & sleep 100")
            .deadline(Duration::from_millis(50))
            .run()
            .unwrap_err();
        assert!(matches!(error, JobError::TimedOut { .. }), "{error}");
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "the background child held the pipes open"
        );
    }

    #[test]
    fn a_request_to_stop_ends_it() {
        let cancel = Cancel::new();
        cancel.request();
        assert!(matches!(
            sh("sleep 100").cancel(&cancel).run(),
            Err(JobError::Cancelled)
        ));
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Job::new("castra-no-such-program").run().unwrap_err();
        assert!(error.to_string().contains("castra-no-such-program"));
        assert_eq!(error.into_failure("x", Exit::Failed).exit, Exit::Unavailable);
    }

    #[test]
    fn lines_are_handed_on_as_they_come() {
        let mut lines = Vec::new();
        sh("printf 'a\\nb\\n' >&2")
            .on_stderr_line(|line| lines.push(line.to_owned()))
            .run()
            .unwrap();
        assert_eq!(lines, ["a", "b"]);
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        for (word, quoted) in [
            ("a/b-1", "a/b-1"),
            ("it's", r"'it'\''s'"),
            ("", "''"),
            ("é", "'é'"),
        ] {
            assert_eq!(shell_quote(word), quoted);
        }
        assert_eq!(in_single_quotes(b"a\xff\n"), b"'a\xff\n'");
    }
}
