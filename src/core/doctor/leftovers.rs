//! What runs, and what is left of what ran: by the same evidence as `status`.
//!
//! Here: which of it somebody should act on, and how. Not here: the evidence and its rules
//! (`core::status`), or clearing any of it (`down`, `up`, `clean`).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::Finding;
use crate::core::cancel::Cancel;
use crate::core::config::workspace;
use crate::core::host::{self, Holder, ImageUse};
use crate::core::human::{bytes as size, plural};
use crate::core::name::VmName;
use crate::core::root::ending::HOST_REBOOT;
use crate::core::root::paths::{StateRoot, vm_file};
use crate::core::root::records::{RunPhase, Stamp, WorkspaceRecord};
use crate::core::runtime::lost::{self, LostQemu};
use crate::core::status::evidence::{Loaded, Snapshot, VmEvidence};
use crate::core::status::{BrokerState, StatusOutcome, VmState, VmStatus};

/// The name of a broker's state thread where it isn't the first of its process.
const STATE_THREAD: &str = "broker-state";

/// How long a broker may do nothing; it wakes up once a second.
const BROKER_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two looks at it.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A log that nothing rotates is worth a word from this size on.
const LARGE_LOG: u64 = 1 << 30;

/// Judges what a project has running and left over.
pub fn check(snapshot: &Snapshot, status: &StatusOutcome) -> Vec<Finding> {
    let project = LeftoverCheck {
        snapshot,
        status,
        state: &snapshot.project.state,
    };
    let mut findings = Vec::new();
    for (evidence, vm) in snapshot.vms.iter().zip(&status.vms) {
        findings.extend(project.vm(evidence, vm));
        findings.extend(project.logs(&vm.name));
        findings.extend(project.base(evidence));
    }
    findings.extend(project.broker());
    findings.extend(project.silent_broker());
    findings.extend(project.disks());
    for note in &status.notes {
        let remedy = note.advice.clone().unwrap_or_else(|| project.down(""));
        findings.push(project.of(
            Finding::warn("state.unreadable", note.text.clone(), remedy),
            note.vm.as_ref(),
        ));
    }
    if findings.is_empty() {
        findings.push(project.all_well());
    }
    findings
}

struct LeftoverCheck<'a> {
    snapshot: &'a Snapshot,
    status: &'a StatusOutcome,
    state: &'a StateRoot,
}

impl LeftoverCheck<'_> {
    fn of(&self, finding: Finding, vm: Option<&VmName>) -> Finding {
        let finding = finding.field("workspace", self.status.workspace.as_str());
        match vm {
            Some(vm) => finding.field("vm", vm.as_str()),
            None => finding,
        }
    }

    fn command(&self, words: &str) -> String {
        format!("`castra --workspace {} {words}`", self.status.workspace)
    }

    fn down(&self, vm: &str) -> String {
        self.command(format!("down {vm}").trim_end())
    }

    fn all_well(&self) -> Finding {
        let running = self.status.vms.iter().filter(|vm| vm.pid.is_some()).count();
        let text = match (running, self.status.broker.state) {
            (0, BrokerState::Offline) => format!("nothing of `{}` runs or is left over", self.status.project),
            (0, BrokerState::Running) => {
                format!(
                    "the broker of `{}` runs, nothing is left over",
                    self.status.project
                )
            }
            (running, _) => format!(
                "{} of `{}` and its broker run, nothing is left over",
                plural(running, "VM"),
                self.status.project
            ),
        };
        self.of(Finding::ok("state.clean", text), None)
            .field("vms_running", running)
    }

    fn vm(&self, evidence: &VmEvidence, vm: &VmStatus) -> Option<Finding> {
        let name = &vm.name;
        let warn = |id: &str, text: String, remedy: String| {
            Some(self.of(Finding::warn(id, text, remedy), Some(name)))
        };
        let run = evidence.run.known();
        let reason = vm.ended.as_ref().map(|ended| ended.reason.as_str());
        // How a VM ended stays on record until its next start: where nothing is left of it, that is
        // history, which `status` tells.
        if matches!(vm.state, VmState::Crashed | VmState::Stopped) && !self.has_left(evidence) {
            return None;
        }
        match vm.state {
            VmState::Crashed => {
                let ended = vm.ended.as_ref();
                let words = ended
                    .and_then(|ended| ended.last_words.as_deref())
                    .map(|words| format!(": {words}"))
                    .unwrap_or_default();
                let text = format!("vm `{name}` crashed ({}){words}", reason.unwrap_or("unknown"));
                warn(
                    "state.crashed",
                    text,
                    format!(
                        "{} shows more; {} starts the VM again with its disk; {} removes what is left of it, also the disk unless it has `persist`",
                        self.command(&format!("logs {name}")),
                        self.command(&format!("restart {name}")),
                        self.down(name.as_str())
                    ),
                )
            }
            VmState::Stopped if reason == Some(HOST_REBOOT) => warn(
                "state.earlier-boot",
                format!("vm `{name}` ended when the host rebooted"),
                format!(
                    "{} starts the VM again with its disk; {} removes what is left of it, also the disk unless it has `persist`",
                    self.command(&format!("restart {name}")),
                    self.down(name.as_str())
                ),
            ),
            VmState::Stopped if run.is_some_and(|run| run.phase == RunPhase::Starting) => warn(
                "state.half-started",
                format!("the start of vm `{name}` was interrupted"),
                format!(
                    "`castra up` starts it again; {} removes what is left of that start",
                    self.down(name.as_str())
                ),
            ),
            VmState::Stopping if !evidence.lock_held => warn(
                "state.half-stopped",
                format!("vm `{name}` was asked to stop but is still running, and no castra waits for it"),
                format!("{} ends it", self.down(name.as_str())),
            ),
            VmState::Running if evidence.declared.is_none() && self.snapshot.project.vms.is_some() => warn(
                "state.undeclared",
                format!(
                    "vm `{name}` runs, but {} doesn't name it any more",
                    self.status.config_path.display()
                ),
                format!("{} ends it", self.down(name.as_str())),
            ),
            _ => None,
        }
    }

    /// A disk whose base is rewritten while its VM runs changes under the guest.
    fn base(&self, evidence: &VmEvidence) -> Option<Finding> {
        evidence.qemu?;
        let base = evidence.run.known()?.base.as_ref()?;
        let is_same = match fs::metadata(&base.path) {
            Ok(meta) => Stamp::of(&meta) == base.stamp,
            // QEMU has the removed file open and goes on with it.
            Err(_) => true,
        };
        if is_same {
            return None;
        }
        let text = format!(
            "the base image {} of vm `{}` was rewritten while the VM runs: its disk may be damaged",
            base.path.display(),
            evidence.name
        );
        let remedy = format!(
            "give each new image a name of its own; {} and `castra up` begin with a fresh disk",
            self.down(&format!("{} --discard", evidence.name))
        );
        Some(
            self.of(
                Finding::warn("state.base-changed", text, remedy),
                Some(&evidence.name),
            )
            .field("path", base.path.display().to_string()),
        )
    }

    /// Whether a VM that doesn't run has left what only a running one needs.
    fn has_left(&self, evidence: &VmEvidence) -> bool {
        let paths = self.state.vm(&evidence.name);
        let disk = evidence.run.known().filter(|run| !run.persist);
        let disk = disk.and_then(|run| run.overlay.as_deref());
        disk.is_some_and(host::is_there)
            || [vm_file::QEMU_PID, vm_file::QMP_SOCK, vm_file::SERIAL_SOCK]
                .iter()
                .any(|name| host::is_there(&paths.file(name)))
    }

    fn broker(&self) -> Option<Finding> {
        // Those whose state is lost have no broker to be told of, and `state.lost` tells them.
        let with_state = self
            .snapshot
            .vms
            .iter()
            .filter(|vm| vm.qemu.is_some() && vm.lost.is_none());
        let running = with_state.count();
        if self.status.broker.state == BrokerState::Running || running == 0 {
            return None;
        }
        let died = matches!(&self.snapshot.broker, Loaded::Value(record) if !record.clean_stop);
        let how = if died { "its broker died" } else { "no broker runs" };
        Some(self.of(
            Finding::warn(
                "state.broker-offline",
                format!(
                    "{} of `{}` {}, but {how}: no guest can be heard",
                    plural(running, "VM"),
                    self.status.project,
                    if running == 1 { "runs" } else { "run" }
                ),
                format!(
                    "`castra up` starts a broker on the port that the guests know; {} ends the VMs",
                    self.down("")
                ),
            ),
            None,
        ))
    }

    /// A broker that holds its lock and does nothing. Its state thread wakes up once a second: where
    /// the kernel counts no turn of it, nobody will be answered. Asked without a word to it, since
    /// what a broker hears it writes down.
    fn silent_broker(&self) -> Option<Finding> {
        let (pid, _) = self.snapshot.live_broker.as_ref()?;
        let pid = *pid;
        let project = &self.status.project;
        let (text, remedy) = if host::is_stopped(pid) {
            (
                format!(
                    "the broker of `{project}` (pid {pid}) is stopped: no guest is heard, nothing is delivered"
                ),
                format!("`kill -CONT {pid}` lets it go on"),
            )
        } else if is_stuck(pid) {
            (
                format!(
                    "the broker of `{project}` (pid {pid}) does nothing: no guest is heard, nothing is delivered"
                ),
                format!(
                    "`kill -KILL {pid}` ends it, and `castra up` starts it again, on the port that the guests know"
                ),
            )
        } else {
            return None;
        };
        Some(
            self.of(Finding::error("state.broker-silent", text, remedy), None)
                .field("pid", pid),
        )
    }

    /// QEMU writes these logs itself and nothing can rotate them.
    fn logs(&self, vm: &VmName) -> Vec<Finding> {
        let paths = self.state.vm(vm);
        let large =
            |name: &&'static str| fs::metadata(paths.file(name)).is_ok_and(|meta| meta.len() >= LARGE_LOG);
        [vm_file::SERIAL_LOG, vm_file::QEMU_LOG, vm_file::QMP_LOG]
            .into_iter()
            .filter(large)
            .map(|name| {
                let path = paths.file(name);
                let bytes = fs::metadata(&path).map_or(0, |meta| meta.len());
                let text = format!("{} has grown to {}", path.display(), size(bytes));
                let remedy = format!(
                    "QEMU can't rotate this file: let the guest print less on its console; {} and a new start begin a fresh file",
                    self.down(vm.as_str())
                );
                self.of(Finding::warn("state.large-log", text, remedy), Some(vm))
                    .field("path", path.display().to_string())
                    .field("bytes", bytes)
            })
            .collect()
    }

    /// Disposable layers that nobody uses.
    fn disks(&self) -> Vec<Finding> {
        let dir = self.state.dir().join("overlays");
        let mut names: Vec<PathBuf> = fs::read_dir(&dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        names.sort();
        names.iter().filter_map(|path| self.disk(path)).collect()
    }

    fn disk(&self, path: &Path) -> Option<Finding> {
        let name = path.file_name()?.to_str()?;
        // Whatever isn't a plain file castra hasn't made; opening it might wait for ever.
        if !path.symlink_metadata().is_ok_and(|meta| meta.is_file()) {
            return None;
        }
        if host::image_use(path) != ImageUse::Unlocked {
            return None;
        }
        let bytes = host::disk_usage(path);
        let data = |finding: Finding, vm: Option<&VmName>| {
            self.of(finding, vm)
                .field("path", path.display().to_string())
                .field("bytes", bytes)
        };
        let left = |what: &str, remedy: String| {
            let text = format!("{what}: {}, {}", path.display(), size(bytes));
            Finding::warn("state.disk", text, remedy)
        };
        if name.ends_with(".qcow2.new") && host::lock_holder(&self.state.lock()) == Holder::Nobody {
            let what = "a disk whose creation was interrupted";
            return Some(data(left(what, self.command("clean")), None));
        }
        let vm: VmName = name.strip_suffix(".qcow2")?.parse().ok()?;
        let mut known = self.snapshot.vms.iter().zip(&self.status.vms);
        let Some((evidence, status)) = known.find(|(evidence, _)| evidence.name.key() == vm.key()) else {
            let what = format!("the disk of vm `{vm}`, which castra.toml doesn't name");
            let remedy = match host::is_there(self.state.vm(&vm).dir()) {
                true => format!("{} discards it", self.down(vm.as_str())),
                // Nobody knows any more whether it was to be kept.
                false => format!("{} removes it", self.command("clean --force")),
            };
            return Some(data(left(&what, remedy), Some(&vm)));
        };
        let busy = host::lock_holder(&self.state.vm(&vm).lock()) != Holder::Nobody;
        let persists = evidence.run.known().is_some_and(|run| run.persist);
        // What is to be said of the VM itself has the same remedy.
        if evidence.qemu.is_some() || busy || persists || self.vm(evidence, status).is_some() {
            return None;
        }
        let what = format!("the disk of vm `{vm}`, which doesn't run");
        Some(data(
            left(&what, format!("{} discards it", self.down(vm.as_str()))),
            Some(&vm),
        ))
    }
}

/// Whether a broker's state thread takes no turn for so long that it takes none any more.
fn is_stuck(pid: u32) -> bool {
    let Some(before) = host::context_switches_of(pid, STATE_THREAD) else {
        return false;
    };
    // Gone meanwhile is not stuck.
    let moves = || host::context_switches_of(pid, STATE_THREAD) != Some(before);
    !Cancel::new().wait_until(BROKER_TIMEOUT, POLL_INTERVAL, moves)
}

/// Projects on record that have lost their config or their state.
pub fn registry(home: &Path, records: &[WorkspaceRecord]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let lost: Vec<&WorkspaceRecord> = records
        .iter()
        .filter(|record| !host::is_there(&record.config_path))
        .collect();
    for record in &lost {
        let text = format!(
            "the config of project {} is gone: {}",
            record.id,
            record.config_path.display()
        );
        let remedy = format!(
            "if you moved the project, castra sees a new one; for the old one, `castra --workspace {0} status` shows what is left, \
             `… {0} down` ends its VMs, `… {0} clean` removes its files",
            record.id
        );
        findings.push(Finding::warn("state.config-gone", text, remedy).data(json!({
            "workspace": record.id, "config_path": record.config_path, "state_root": record.state_root,
        })));
    }
    findings.extend(workspace::unreadable_workspaces(home).into_iter().map(|failure| {
        let remedy = failure.next.clone().unwrap_or_default();
        Finding::error("state.unreadable", failure.cause(), remedy)
    }));
    let gone = workspace::lost_workspaces(home);
    if !gone.is_empty() {
        let text = match gone.as_slice() {
            [only] => format!("the state of project {only} is gone; only its entry in the registry is left"),
            [first, ..] => format!(
                "the state of {} is gone; only their entries in the registry are left: {first} and others",
                plural(gone.len(), "project")
            ),
            [] => String::new(),
        };
        findings.push(
            Finding::warn(
                "state.root-gone",
                text,
                "`castra clean --global` removes these entries",
            )
            .data(json!({"workspaces": gone})),
        );
    }
    findings.extend(lost_vms(home, records));
    let text = match records.len() {
        0 => "castra knows no project yet".to_owned(),
        count => format!("castra knows {}", plural(count, "project")),
    };
    findings.push(
        Finding::ok("state.projects", text)
            .data(json!({"projects": records.len(), "config_gone": lost.len()})),
    );
    findings
}

/// QEMUs of whatever project that no pid file leads to any more.
fn lost_vms(home: &Path, records: &[WorkspaceRecord]) -> Vec<Finding> {
    let known: Vec<WorkspaceRecord> = records
        .iter()
        .cloned()
        .chain(workspace::records_without_root(home))
        .collect();
    let is_found_elsewhere = |qemu: &LostQemu| {
        let place = qemu.moved_to.as_deref();
        qemu.moved_with.is_some()
            || place.is_some_and(|place| known.iter().any(|record| record.state_root == place))
    };
    let owner_of = |qemu: &LostQemu| {
        let was_its = |record: &&WorkspaceRecord| {
            record.state_root == qemu.state_root || record.former_roots.contains(&qemu.state_root)
        };
        known.iter().find(was_its)
    };
    let mut lost = lost::find();
    // What belongs to another castra home is that one's to tell.
    lost.retain(|qemu| {
        !is_found_elsewhere(qemu) && (owner_of(qemu).is_some() || qemu.state_root.starts_with(home))
    });
    let finding = |qemu: &LostQemu| {
        let owner = owner_of(qemu);
        let remedy = match owner {
            Some(record) => format!("`castra --workspace {} down` ends it", record.id),
            None => format!("castra knows no project for it: `kill {}` ends it", qemu.pid),
        };
        let text = format!("vm `{}` runs on as pid {}: {}", qemu.vm, qemu.pid, qemu.fate());
        Finding::warn("state.lost", text, remedy).data(json!({
            "workspace": owner.map(|record| &record.id), "vm": qemu.vm.as_str(), "pid": qemu.pid,
            "state_root": qemu.state_root.display().to_string(),
            "moved_to": qemu.moved_to.as_ref().map(|place| place.display().to_string()),
        }))
    };
    lost.iter().map(finding).collect()
}
