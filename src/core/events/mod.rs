//! Every fact castra tells, defined once (docs/EVENTS.md).
//!
//! Here: the [`Event`] enum and the words inside it. Its derived serde form is what embedders
//! see (`{"BootstrapStarted":{…}}`). Not here: the contract line that scripts read
//! ([`contract`]), who receives events (`core::reporter`), or where they are kept
//! (`core::lines::journal`).

pub mod contract;
pub mod endings;
pub mod kept;
mod planned_vm;
pub mod stage;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::core::failure::Failure;
use crate::core::name::VmName;
use endings::{LaunchEnding, OpenEnum, ShutdownEnding};

pub use planned_vm::{PlannedForward, PlannedMount, VmPlan};

/// How much attention a message asks for (docs/EVENTS.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Information.
    Info,
    /// Progress; the next message may replace it.
    Progress,
    /// The operation goes on; somebody should look at it later.
    Warn,
    /// This VM or step failed.
    Error,
    /// The operation can't go on until somebody acts; it has a remediation.
    Blocker,
}

/// The accelerator a guest runs under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualisation by the kernel.
    Kvm,
    /// QEMU's own translator.
    Tcg,
}

impl Accel {
    /// QEMU's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        }
    }
}

/// Transport of a forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// When the bootstrap runs (docs/BOOTSTRAP.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootstrapMode {
    /// Runs on every `up`; without a script it ends after `connect`.
    Auto,
    /// Never runs.
    Skip,
    /// Runs on every `up` and needs a script.
    Always,
}

/// The mode a run was triggered by, after overrides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootstrapTrigger {
    /// Mode `auto`.
    Auto,
    /// Mode `always`.
    Always,
}

/// What the plan says will happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootstrapPlanAction {
    /// The pipeline will run.
    Run,
    /// It won't; `reason` says why.
    Skip,
    /// It can't; `reason` says why.
    Error,
}

/// The resolved SSH connection of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootstrapPlanSsh {
    /// Login name.
    pub user: String,
    /// Address, as a rule `127.0.0.1`.
    pub host: String,
    /// Port on the host; null until allocated.
    pub port: Option<u16>,
    /// Path of the private key.
    pub identity: Option<PathBuf>,
    /// Further `ssh -o` options, `Key=value`.
    pub options: Vec<String>,
}

/// What `verify` will check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootstrapPlanVerify {
    /// A command run in `remote_dir`.
    pub command: Option<String>,
    /// A path that must exist, relative to `remote_dir`.
    pub path: Option<String>,
}

/// What is expected of the in-guest Vizier service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VizierPlanStatus {
    /// Switched off in the config.
    Disabled,
    /// Not there yet.
    Install,
    /// An older version is there.
    Update,
    /// This version is there.
    Current,
    /// Nothing is known of the guest yet.
    Unknown,
}

/// The stages of a bootstrap, in their order (docs/BOOTSTRAP.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootstrapStepKind {
    /// The first proof of life.
    WaitHandshake,
    /// The in-guest service is copied.
    VizierInstall,
    /// … enabled and started.
    VizierEnable,
    /// … and has shaken hands.
    VizierHandshake,
    /// SSH runs commands as the right user in `remote_dir`.
    Connect,
    /// Script and payload are copied.
    Transfer,
    /// The script runs.
    Apply,
    /// The result is checked.
    Verify,
}

impl BootstrapStepKind {
    /// All stages, in their order.
    pub const ALL: [BootstrapStepKind; 8] = [
        BootstrapStepKind::WaitHandshake,
        BootstrapStepKind::VizierInstall,
        BootstrapStepKind::VizierEnable,
        BootstrapStepKind::VizierHandshake,
        BootstrapStepKind::Connect,
        BootstrapStepKind::Transfer,
        BootstrapStepKind::Apply,
        BootstrapStepKind::Verify,
    ];

    /// The contract's word.
    pub fn as_str(self) -> &'static str {
        match self {
            BootstrapStepKind::WaitHandshake => "wait-handshake",
            BootstrapStepKind::VizierInstall => "vizier-install",
            BootstrapStepKind::VizierEnable => "vizier-enable",
            BootstrapStepKind::VizierHandshake => "vizier-handshake",
            BootstrapStepKind::Connect => "connect",
            BootstrapStepKind::Transfer => "transfer",
            BootstrapStepKind::Apply => "apply",
            BootstrapStepKind::Verify => "verify",
        }
    }
}

/// How a stage ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootstrapStepStatus {
    /// It worked.
    Success,
    /// There was nothing to do; `detail` says why.
    Skipped,
    /// It failed; `detail` says why.
    Failed,
}

impl BootstrapStepStatus {
    /// The contract's word.
    pub fn as_str(self) -> &'static str {
        match self {
            BootstrapStepStatus::Success => "success",
            BootstrapStepStatus::Skipped => "skipped",
            BootstrapStepStatus::Failed => "failed",
        }
    }
}

/// What the broker answered to a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HandshakeOutcome {
    /// Accepted.
    Ok,
    /// Refused; `reason` is one of the closed list.
    Declined,
}

/// Whether a bus session began or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SessionPhase {
    /// Granted.
    Opened,
    /// Gone; `reason` says why.
    Closed,
}

/// The dry-run summary of one VM's bootstrap: what would run, from what, over which
/// connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BootstrapPlan {
    /// The VM.
    pub vm: VmName,
    /// The mode after overrides.
    pub mode: BootstrapMode,
    /// Run, skip or error.
    pub action: BootstrapPlanAction,
    /// Why this action.
    pub reason: String,
    /// What triggers it; null when it is skipped.
    pub trigger: Option<BootstrapTrigger>,
    /// The host script.
    pub script_path: Option<PathBuf>,
    /// The host directory copied beside it.
    pub payload_path: Option<PathBuf>,
    /// Bytes of all files in it.
    pub payload_bytes: Option<u64>,
    /// Deadline of `wait-handshake`, seconds.
    pub handshake_timeout_secs: Option<u64>,
    /// Deadline of every other step, seconds; of `transfer` as long as nothing moves.
    pub step_timeout_secs: Option<u64>,
    /// Deadline of `apply`, seconds.
    pub apply_timeout_secs: Option<u64>,
    /// Where the guest keeps it.
    pub remote_dir: Option<String>,
    /// The resolved connection.
    pub ssh: Option<BootstrapPlanSsh>,
    /// Names of the variables the script gets; never their values.
    pub env_keys: Vec<String>,
    /// What `verify` checks.
    pub verify: Option<BootstrapPlanVerify>,
    /// SHA-256 of script, payload, environment and metadata.
    pub artifact_hash: Option<String>,
    /// The `bootstrap.toml` that took part.
    pub metadata_path: Option<PathBuf>,
    /// Things worth a look before it runs.
    pub warnings: Vec<String>,
    /// Expected state of the in-guest service.
    pub vizier_status: Option<VizierPlanStatus>,
    /// Where its log will be on the host.
    pub vizier_log_path: Option<PathBuf>,
    /// What to do if it isn't healthy.
    pub vizier_remediation: Option<String>,
    /// The VM as it would be launched; null but in plans of `up`.
    #[serde(default)]
    pub machine: Option<VmPlan>,
}

/// One fact, in the past tense. Defined here and nowhere else. Durations are milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(
    missing_docs,
    reason = "each field is named after its contract field; docs/EVENTS.md defines them"
)]
pub enum Event {
    /// Text for people.
    Message {
        severity: Severity,
        text: String,
        vm: Option<VmName>,
        remediation: Option<String>,
        source: Option<String>,
        thread: Option<String>,
        turn: Option<u64>,
        data: Option<Value>,
    },

    /// The disposable layer is there; `reused` if it was kept from an earlier launch.
    OverlayPrepared {
        vm: VmName,
        path: PathBuf,
        base: Option<PathBuf>,
        reused: bool,
        elapsed_ms: u64,
    },
    /// QEMU runs and answers QMP.
    VmLaunched {
        vm: VmName,
        pid: u32,
        accel: Accel,
        accel_reason: String,
        elapsed_ms: u64,
    },
    /// QEMU is gone without `down`; `reason`, `last_words`, `qemu_words` and `remediation` as in the
    /// status contract's `ended`.
    VmExited {
        vm: VmName,
        pid: Option<u32>,
        reason: String,
        outcome: OpenEnum<LaunchEnding>,
        last_words: Option<String>,
        #[serde(default)]
        qemu_words: Option<String>,
        #[serde(default)]
        remediation: Option<String>,
    },
    /// QEMU runs, but executes nothing of the guest; `reason` and the rest as in the status contract's
    /// `paused`.
    VmPaused {
        vm: VmName,
        reason: String,
        detail: Option<String>,
        remediation: Option<String>,
    },
    /// The guest runs again; `reason` is what it was paused for, `elapsed_ms` for how long, if known.
    VmResumed {
        vm: VmName,
        reason: String,
        elapsed_ms: Option<u64>,
    },
    /// The guest has rebooted under the same QEMU; `boots` counts since its launch, so 2 is the
    /// first reboot.
    VmRebooted { vm: VmName, boots: u64 },
    /// `down` begins with this VM.
    ShutdownRequested { vm: VmName, pid: u32 },
    /// The guest was asked to power off.
    CooperativeAttempted {
        vm: VmName,
        method: String,
        timeout_ms: u64,
    },
    /// It did.
    CooperativeSucceeded {
        vm: VmName,
        method: String,
        elapsed_ms: u64,
    },
    /// It didn't in time, or couldn't be asked.
    CooperativeTimedOut {
        vm: VmName,
        method: String,
        elapsed_ms: u64,
        detail: Option<String>,
    },
    /// A signal was sent to QEMU.
    Escalated {
        vm: VmName,
        pid: u32,
        signal: String,
        timeout_ms: u64,
    },
    /// QEMU is gone, or can't be stopped.
    ShutdownComplete {
        vm: VmName,
        outcome: OpenEnum<ShutdownEnding>,
        elapsed_ms: u64,
        changed: bool,
    },
    /// The overlay was removed.
    OverlayDiscarded {
        vm: VmName,
        path: PathBuf,
        reclaimed_bytes: u64,
    },

    /// What the bootstrap of one VM will do.
    BootstrapPlanned(Box<BootstrapPlan>),
    /// It began.
    BootstrapStarted {
        vm: VmName,
        base_hash: Option<String>,
        artifact_hash: Option<String>,
        trigger: BootstrapTrigger,
    },
    /// One stage ended.
    BootstrapStep {
        vm: VmName,
        step: BootstrapStepKind,
        status: BootstrapStepStatus,
        duration_ms: u64,
        detail: Option<String>,
    },
    /// All stages ended well; `noop`: the script declared that there was nothing to change, which the contract
    /// spells `status`. `stamp` is always null.
    BootstrapCompleted {
        vm: VmName,
        #[serde(rename = "status", with = "endings::noop_status")]
        noop: bool,
        duration_ms: u64,
        stamp: Option<String>,
    },
    /// The pipeline was aborted.
    BootstrapFailed {
        vm: VmName,
        duration_ms: u64,
        error: String,
    },

    /// The broker listens.
    BrokerStarted { pid: u32, port: u16 },
    /// It stopped.
    BrokerStopped { pid: u32, port: u16 },
    /// One attempt to shake hands, or `repeated` of them merged.
    BrokerHandshake {
        vm: Option<VmName>,
        capabilities: Vec<String>,
        outcome: HandshakeOutcome,
        reason: Option<String>,
        session: Option<String>,
        remote: String,
        repeated: Option<u64>,
    },
    /// A bus session began or ended, or `repeated` of them merged.
    BrokerSession {
        vm: VmName,
        session: String,
        phase: SessionPhase,
        reason: Option<String>,
        repeated: Option<u64>,
    },
    /// A VM entered or left the freshness window.
    BrokerFreshness {
        vm: VmName,
        reachable: bool,
        last_handshake_age_ms: Option<u64>,
    },
    /// A session sent too much or read too slowly, or `repeated` such events merged.
    BrokerBackpressure {
        vm: Option<VmName>,
        session: Option<String>,
        reason: String,
        queued_bytes: Option<u64>,
        repeated: Option<u64>,
    },

    /// A file was removed, or would be.
    Cleanup {
        path: PathBuf,
        category: String,
        bytes: u64,
        dry_run: bool,
    },

    /// A command begins.
    CommandAccepted {
        command: String,
        detail: Option<String>,
        source: String,
        thread: Option<String>,
        turn: Option<u64>,
        #[serde(default)]
        duration_ms: Option<u64>,
        #[serde(default)]
        exit_status: Option<i32>,
    },
    /// A command was refused before anything ran.
    CommandRejected {
        command: String,
        detail: String,
        remediation: Option<String>,
        exit_status: Option<i32>,
        source: String,
        thread: Option<String>,
        turn: Option<u64>,
        #[serde(default)]
        duration_ms: Option<u64>,
    },
    /// It ended well.
    CommandCompleted {
        command: String,
        detail: Option<String>,
        duration_ms: Option<u64>,
        exit_status: Option<i32>,
        source: String,
        thread: Option<String>,
        turn: Option<u64>,
    },
    /// It ran and failed.
    CommandFailed {
        command: String,
        detail: String,
        duration_ms: Option<u64>,
        exit_status: Option<i32>,
        source: String,
        thread: Option<String>,
        turn: Option<u64>,
    },
    /// Tokens an agent used.
    Usage {
        source: String,
        scope: String,
        turn: Option<u64>,
        prompt_tokens: u64,
        cached_tokens: u64,
        completion_tokens: u64,
        thread: Option<String>,
    },
    /// The end of an operation.
    Summary {
        operation: String,
        duration_ms: u64,
        exit_status: i32,
        vms: VmCounts,
        bytes: u64,
        verdict: Option<String>,
    },
}

/// How many VMs an operation touched, and how they fared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmCounts {
    /// All VMs the operation was about.
    pub total: usize,
    /// Those it changed: started, stopped, bootstrapped.
    pub changed: usize,
    /// Those that needed no change.
    pub unchanged: usize,
    /// Those that failed.
    pub failed: usize,
}

impl VmCounts {
    /// Those that neither changed nor failed needed no change.
    pub(crate) fn of(total: usize, changed: usize, failed: usize) -> VmCounts {
        VmCounts {
            total,
            changed,
            unchanged: total - changed - failed,
            failed,
        }
    }

    /// Of an operation that failed as a whole.
    pub(crate) fn all_failed(total: usize) -> VmCounts {
        VmCounts {
            total,
            failed: total,
            ..VmCounts::default()
        }
    }
}

impl Event {
    /// A message without further data.
    pub fn message(severity: Severity, vm: Option<&VmName>, text: impl Into<String>) -> Event {
        Event::about(severity, vm, text.into(), None)
    }

    /// A message that says what to do about it.
    pub fn advice(
        severity: Severity,
        vm: Option<&VmName>,
        text: impl Into<String>,
        remediation: impl Into<String>,
    ) -> Event {
        Event::about(severity, vm, text.into(), Some(remediation.into()))
    }

    /// Tells of a failure: what happened and why, and what to do if the failure says so.
    pub fn of_failure(severity: Severity, vm: Option<&VmName>, failure: &Failure) -> Event {
        Event::about(severity, vm, failure.cause(), failure.next.clone())
    }

    fn about(severity: Severity, vm: Option<&VmName>, text: String, remediation: Option<String>) -> Event {
        Event::Message {
            severity,
            text,
            vm: vm.cloned(),
            remediation,
            source: None,
            thread: None,
            turn: None,
            data: None,
        }
    }

    /// A refusal: what happened and why, what to do, and the exit code it means.
    pub fn rejected(command: &str, failure: &Failure, source: &str) -> Event {
        Event::CommandRejected {
            command: command.to_owned(),
            detail: failure.cause(),
            remediation: failure.next.clone(),
            exit_status: Some(i32::from(failure.exit.code())),
            source: source.to_owned(),
            thread: None,
            turn: None,
            duration_ms: None,
        }
    }
}
