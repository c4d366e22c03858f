//! What a report says, as data: `castra report --json` prints it, page and text are made of it.
//!
//! Here: the types, and what can be said of them without looking anywhere else. Not here: where they
//! come from (`super::gather`).

use serde::{Deserialize, Serialize};

use crate::core::events::stage::Stage;
use crate::core::events::{Accel, Severity};

/// Name and version of the form.
pub const SCHEMA: &str = "castra.report.v1";

/// The phase before a VM's turn has come.
pub(super) const QUEUED: &str = "queued";

/// The last runs of one project.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// When it was made, RFC 3339.
    pub generated_at: String,
    /// The castra that made it.
    pub version: String,
    /// The project's name.
    pub project: String,
    /// Its id.
    pub workspace: String,
    /// Newest first.
    pub runs: Vec<RunReport>,
    /// What isn't in here, in sentences.
    pub left_out: Vec<String>,
}

/// One run of `up`, `down`, `restart` or `bootstrap`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// Its id, as `castra events --run` takes it.
    pub run: String,
    /// Which command it was.
    pub command: String,
    /// What it was asked to do, or why it failed, in words.
    pub detail: Option<String>,
    /// Wall clock of its beginning, RFC 3339.
    pub started_at: String,
    /// How long it took; null if no end of it was kept.
    pub duration_ms: Option<u64>,
    /// The last moment that is known of it, milliseconds from its beginning.
    pub known_ms: u64,
    /// Its exit code; null if no end of it was kept.
    pub exit_status: Option<i32>,
    /// How it ended.
    pub outcome: Outcome,
    /// How many VMs it was about.
    pub vms_total: usize,
    /// How many of them failed.
    pub vms_failed: usize,
    /// The VMs, by name; failed ones are never left out before others.
    pub vms: Vec<VmReport>,
    /// VMs that aren't listed.
    pub vms_left_out: usize,
    /// VMs of which there is nothing to tell: they were as asked for already.
    pub vms_untouched: usize,
    /// Warnings and errors of the run, in their order.
    pub notes: Vec<Note>,
    /// Notes that aren't listed.
    pub notes_left_out: usize,
    /// What went over the bus from this run's beginning to that of the next run, or until now; null:
    /// nothing.
    pub bus: Option<Traffic>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Exit code 0.
    Ok,
    /// Something failed.
    Failed,
    /// Ctrl-C or SIGTERM.
    Interrupted,
    /// It is under way: somebody holds the lock of one of its VMs.
    Running,
    /// No end was kept: it was killed, or it is under way without a VM yet.
    Unfinished,
}

impl Outcome {
    /// The word of the JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Failed => "failed",
            Outcome::Interrupted => "interrupted",
            Outcome::Running => "running",
            Outcome::Unfinished => "unfinished",
        }
    }
}

/// What one run did with one VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmReport {
    /// The VM.
    pub vm: String,
    /// How it went.
    pub state: State,
    /// What it runs under, if this run launched it.
    pub accel: Option<Accel>,
    /// Why it failed.
    pub error: Option<String>,
    /// What was done, in the order in which it began.
    pub phases: Vec<Phase>,
    /// Moments worth seeing.
    pub marks: Vec<Mark>,
    /// Phases and marks that aren't listed.
    pub left_out: usize,
    /// The last lines of what explains a failure.
    pub log: Option<LogTail>,
}

/// How something ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Well.
    Ok,
    /// It failed.
    Failed,
    /// There was nothing to do.
    Skipped,
    /// Nothing happened but waiting, or no end was kept.
    Waiting,
}

impl State {
    /// The word of the JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Failed => "failed",
            State::Skipped => "skipped",
            State::Waiting => "waiting",
        }
    }
}

/// One bar of the timeline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// `queued`, `image-build`, `image-fetch`, `kvm-trial` (what all VMs of the run wait for), `overlay`, `launch`, a step of the bootstrap, `power-button`, `ssh-poweroff`, `SIGTERM`, `SIGKILL`, `stop`;
    /// `under-way` or `unfinished` behind the last one whose end is known.
    pub phase: String,
    /// How it ended.
    pub state: State,
    /// Milliseconds from the run's beginning.
    pub start_ms: u64,
    /// How long it took.
    pub duration_ms: u64,
    /// More about it.
    pub detail: Option<String>,
}

impl Phase {
    /// Whether the VM has waited for others meanwhile.
    pub(super) fn is_wait(&self) -> bool {
        self.phase == QUEUED || Stage::ALL.iter().any(|stage| stage.as_str() == self.phase)
    }

    /// Where it ends, milliseconds from the run's beginning.
    pub fn end_ms(&self) -> u64 {
        self.start_ms.saturating_add(self.duration_ms)
    }
}

/// What kind of moment it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MarkKind {
    /// QEMU runs and answers.
    Launched,
    /// The first handshake.
    Handshake,
    /// The first handshake of the in-guest service.
    Service,
    /// The guest's SSH server answered before any handshake came.
    Banner,
    /// QEMU was gone without `castra down`.
    Exited,
    /// Nothing was heard for the freshness window.
    Unreachable,
}

impl MarkKind {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            MarkKind::Launched => "launched",
            MarkKind::Handshake => "handshake",
            MarkKind::Service => "handshake of the in-guest service",
            MarkKind::Banner => "SSH banner",
            MarkKind::Exited => "QEMU gone",
            MarkKind::Unreachable => "unreachable",
        }
    }
}

/// One moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mark {
    /// What happened.
    pub mark: MarkKind,
    /// Milliseconds from the run's beginning; may lie behind its end.
    pub at_ms: u64,
    /// More about it.
    pub detail: Option<String>,
}

/// The last lines of a log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogTail {
    /// `script` (what a bootstrap's script printed), `console` (the guest's), `qemu`, or `last words`.
    pub source: String,
    /// Where all of it is, if it was kept.
    pub path: Option<String>,
    /// The lines, oldest first, control characters written out.
    pub lines: Vec<String>,
    /// There are earlier ones.
    pub cut: bool,
}

/// One message of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Note {
    /// Milliseconds from the run's beginning.
    pub at_ms: u64,
    /// `warn`, `error` or `blocker`.
    pub severity: Severity,
    /// The VM it is about.
    pub vm: Option<String>,
    /// What it says.
    pub text: String,
    /// What to do about it.
    pub remediation: Option<String>,
}

/// Messages over time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// The time of the first point, milliseconds from the run's beginning.
    pub start_ms: u64,
    /// How much time one point stands for.
    pub bucket_ms: u64,
    /// Messages of all senders.
    pub messages: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// Of all senders together, one point a bucket: messages and bytes of payload.
    pub points: Vec<[u64; 2]>,
    /// Who sent most comes first.
    pub senders: Vec<Sender>,
    /// Senders that aren't listed; `points` has their messages all the same.
    pub senders_left_out: usize,
    /// Older messages of this time weren't read, because the log is too long.
    pub cut: bool,
}

/// What one sender published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sender {
    /// A VM, `host` or `broker`.
    pub sender: String,
    /// Messages.
    pub messages: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// As those of all.
    pub points: Vec<[u64; 2]>,
}

impl VmReport {
    /// How long it took from the end of its waiting to the end of its last phase; `None`: nothing was done.
    pub fn took_ms(&self) -> Option<u64> {
        let begin = self.phases.iter().find(|phase| !phase.is_wait())?.start_ms;
        let end = self.phases.iter().map(Phase::end_ms).max()?;
        Some(end.saturating_sub(begin))
    }
}

impl RunReport {
    /// Where its timeline ends: nothing of it is known to be later.
    pub fn end_ms(&self) -> u64 {
        let phases = self.vms.iter().flat_map(|vm| &vm.phases).map(Phase::end_ms);
        let known = self.known_ms.max(self.duration_ms.unwrap_or(0));
        phases.max().unwrap_or(0).max(known)
    }

    /// Why it failed; of a run that didn't, `detail` names the VMs that were asked for.
    pub fn why(&self) -> Option<&str> {
        let has_failed = matches!(self.outcome, Outcome::Failed | Outcome::Interrupted);
        self.detail.as_deref().filter(|_| has_failed)
    }

    /// What its VMs run under, each once.
    pub fn accels(&self) -> Vec<Accel> {
        let mut seen = Vec::new();
        for accel in self.vms.iter().filter_map(|vm| vm.accel) {
            if !seen.contains(&accel) {
                seen.push(accel);
            }
        }
        seen
    }
}
