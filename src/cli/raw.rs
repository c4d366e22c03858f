//! What was typed, before anybody asks what it means.
//!
//! Here: one field per flag, with the flag's name unless its comment says another. Arguments stay
//! `OsString` until a type claims them. Not here: the file system, the config, defaults that depend
//! on either (`app`).

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use castra::core::arch::Arch;
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
    pub version: bool,
    pub config: Option<PathBuf>,
    pub workspace: Option<String>,
    pub json: bool,
    pub quiet: bool,
    pub color: ColorChoice,
    /// `--bootstrap MODE|VM=MODE`, in the order given, commas taken apart.
    pub bootstrap: Vec<String>,
    pub plan: bool,
    pub recreate: bool,
    pub broker_only: bool,
    /// `--graceful-wait-secs N`.
    pub graceful_wait: Option<Duration>,
    /// `--sigterm-wait-secs N`.
    pub sigterm_wait: Option<Duration>,
    /// `--sigkill-wait-secs N`.
    pub sigkill_wait: Option<Duration>,
    pub discard: bool,
    pub all: bool,
    pub active: bool,
    pub verbose: bool,
    pub raw: bool,
    pub watch: bool,
    pub wide: bool,
    pub legend: bool,
    /// `--source SOURCE`, in the order given.
    pub sources: Vec<LogSource>,
    pub tail: Option<usize>,
    /// `--type PATTERN`, in the order given.
    pub types: Vec<String>,
    /// `--vm VM`, in the order given.
    pub vms: Vec<String>,
    pub follow: bool,
    pub no_follow: bool,
    pub run: Option<String>,
    pub after: Option<u64>,
    pub html: Option<PathBuf>,
    pub last: Option<usize>,
    /// `--since WHEN`, a time by now.
    pub since: Option<SystemTime>,
    /// `--topic TOPIC`, in the order given.
    pub topics: Vec<String>,
    pub payload: Option<String>,
    /// `--for STATE`.
    pub wait_for: Option<WaitFor>,
    /// `bus subscribe --last`.
    pub last_values: bool,
    /// `--group NAME`.
    pub shared_by: Option<String>,
    pub wait: Option<Duration>,
    pub from: Option<u64>,
    pub count: Option<u64>,
    pub shared: bool,
    pub messages: Option<u64>,
    pub size: Option<usize>,
    pub in_flight: Option<usize>,
    pub publishers: Option<usize>,
    pub dry_run: bool,
    pub global: bool,
    pub state_root: Option<PathBuf>,
    pub no_logs: bool,
    pub no_handshakes: bool,
    pub force: bool,
    pub arch: Option<&'static Arch>,
    pub mounts: bool,
    pub project_name: Option<String>,
    pub output: Option<PathBuf>,
    pub prefix: Option<String>,
    pub dir: Option<PathBuf>,
    /// `--agent NAME`, which is in the list.
    pub agent: Option<String>,
    pub codex: Option<PathBuf>,
    /// `--codex-arg ARG`, in the order given.
    pub codex_args: Vec<OsString>,
    pub model: Option<String>,
    pub resume: Option<String>,
    pub cwd: Option<PathBuf>,
    /// `--in VM`.
    pub inside: Option<String>,
    /// `--timeout TIME`; zero: none.
    pub time_limit: Option<Duration>,
    /// `--idle-timeout TIME`; zero: none.
    pub idle_limit: Option<Duration>,
    pub no_preamble: bool,
    pub no_record: bool,
    /// The shell of `completions`.
    pub shell: Option<Shell>,
}
