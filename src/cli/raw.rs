//! What was typed, before anybody asks what it means.
//!
//! Here: one field per flag. Arguments stay `OsString` until a type claims them. Not here: the
//! file system, the config, defaults that depend on either (`app`).

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use castra::core::operations::wait::WaitFor;

use super::table::{Command, LogSource, Shell};

/// `--color`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ColorChoice {
    /// On a terminal, unless `NO_COLOR` or `TERM=dumb` says otherwise.
    #[default]
    Auto,
    /// Even into a pipe.
    Always,
    /// Not at all.
    Never,
}

/// How much help was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HelpKind {
    /// `-h`.
    Short,
    /// `--help`.
    Long,
}

/// One command line as typed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Raw {
    /// The command; `None` only together with `help`, `version` or `first_steps`.
    pub command: Option<Command>,
    /// The group whose help is wanted (`castra image --help`).
    pub group: Option<&'static str>,
    /// Its operands, those after `--` included.
    pub operands: Vec<OsString>,
    /// All operands stood after `--`.
    pub all_after_dashes: bool,
    /// `-h`, `--help`.
    pub help: Option<HelpKind>,
    /// `castra` alone: the first steps are wanted.
    pub first_steps: bool,
    /// `--version`.
    pub version: bool,
    /// `--config PATH`.
    pub config: Option<PathBuf>,
    /// `--workspace ID`.
    pub workspace: Option<String>,
    /// `--json`.
    pub json: bool,
    /// `--quiet`.
    pub quiet: bool,
    /// `--color WHEN`.
    pub color: ColorChoice,
    /// `--bootstrap MODE|VM=MODE`, in the order given, commas taken apart.
    pub bootstrap: Vec<String>,
    /// `--plan`.
    pub plan: bool,
    /// `--recreate`.
    pub recreate: bool,
    /// `--broker-only`.
    pub broker_only: bool,
    /// `--graceful-wait-secs N`.
    pub graceful_wait: Option<Duration>,
    /// `--sigterm-wait-secs N`.
    pub sigterm_wait: Option<Duration>,
    /// `--sigkill-wait-secs N`.
    pub sigkill_wait: Option<Duration>,
    /// `--discard`.
    pub discard: bool,
    /// `--all`.
    pub all: bool,
    /// `--active`.
    pub active: bool,
    /// `--verbose`.
    pub verbose: bool,
    /// `--raw`.
    pub raw: bool,
    /// `--watch`.
    pub watch: bool,
    /// `--wide`.
    pub wide: bool,
    /// `--legend`.
    pub legend: bool,
    /// `--source SOURCE`, in the order given.
    pub sources: Vec<LogSource>,
    /// `--tail N`.
    pub tail: Option<usize>,
    /// `--type PATTERN`, in the order given.
    pub types: Vec<String>,
    /// `--vm VM`, in the order given.
    pub vms: Vec<String>,
    /// `--follow`.
    pub follow: bool,
    /// `--no-follow`.
    pub no_follow: bool,
    /// `--run ID`.
    pub run: Option<String>,
    /// `--after SEQ`.
    pub after: Option<u64>,
    /// `--html FILE`.
    pub html: Option<PathBuf>,
    /// `--last N`.
    pub last: Option<usize>,
    /// `--since WHEN`, a time by now.
    pub since: Option<SystemTime>,
    /// `--topic TOPIC`, in the order given.
    pub topics: Vec<String>,
    /// `--payload JSON`.
    pub payload: Option<String>,
    /// `--for STATE`.
    pub wait_for: Option<WaitFor>,
    /// `bus subscribe --last`.
    pub last_values: bool,
    /// `--group NAME`.
    pub shared_by: Option<String>,
    /// `--wait SPAN`.
    pub wait: Option<Duration>,
    /// `--from SEQ`.
    pub from: Option<u64>,
    /// `--count N`.
    pub count: Option<u64>,
    /// `--shared`.
    pub shared: bool,
    /// `--messages N`.
    pub messages: Option<u64>,
    /// `--size BYTES`.
    pub size: Option<usize>,
    /// `--in-flight N`.
    pub in_flight: Option<usize>,
    /// `--publishers N`.
    pub publishers: Option<usize>,
    /// `--dry-run`.
    pub dry_run: bool,
    /// `--global`.
    pub global: bool,
    /// `--state-root P`.
    pub state_root: Option<PathBuf>,
    /// `--no-logs`.
    pub no_logs: bool,
    /// `--no-handshakes`.
    pub no_handshakes: bool,
    /// `--force`.
    pub force: bool,
    /// `--mounts`.
    pub mounts: bool,
    /// `--project-name NAME`.
    pub project_name: Option<String>,
    /// `--output PATH`.
    pub output: Option<PathBuf>,
    /// `--prefix TEXT`.
    pub prefix: Option<String>,
    /// `--dir DIR`.
    pub dir: Option<PathBuf>,
    /// `--agent NAME`, which is in the list.
    pub agent: Option<String>,
    /// `--codex PATH`.
    pub codex: Option<PathBuf>,
    /// `--codex-arg ARG`, in the order given.
    pub codex_args: Vec<OsString>,
    /// `--model MODEL`.
    pub model: Option<String>,
    /// `--resume THREAD`.
    pub resume: Option<String>,
    /// `--cwd DIR`.
    pub cwd: Option<PathBuf>,
    /// `--in VM`.
    pub inside: Option<String>,
    /// `--timeout TIME`; zero: none.
    pub time_limit: Option<Duration>,
    /// `--idle-timeout TIME`; zero: none.
    pub idle_limit: Option<Duration>,
    /// `--no-preamble`.
    pub no_preamble: bool,
    /// `--no-record`.
    pub no_record: bool,
    /// The shell of `completions`.
    pub shell: Option<Shell>,
}
