//! From evidence to status: the rules of docs/STATUS.md, each in one function.
//!
//! Here: pure decisions under whatever clock the snapshot holds. Not here: files, locks, clocks
//! ([`super::read`]).

use crate::core::config::launched::differing;
use crate::core::events::Accel;
use crate::core::events::endings::BootstrapStatus;
use crate::core::id::BootId;
use crate::core::root::ending::HOST_REBOOT;
use crate::core::root::freshness::{self, is_of_guest, is_of_launch, is_recent};
use crate::core::root::handshake_record::{HandshakeRecord, RecordRead};
use crate::core::root::records::{BootstrapRecord, BrokerRecord, GuestsRecord, RunPhase, RunRecord};
use crate::core::runtime::resets::Resets;
use crate::core::time::{millis, parse_ms};

use super::evidence::{Loaded, Now, Snapshot, VmEvidence};
use super::{
    BrokerState, BrokerStatus, EndedStatus, GuestState, Note, PausedStatus, SCHEMA, StatusOutcome, VmState,
    VmStatus,
};

/// What the evidence means.
pub fn assemble(snapshot: &Snapshot) -> StatusOutcome {
    let project = &snapshot.project;
    let broker = LiveBroker::of(snapshot);
    let window_ms = broker
        .record
        .or(snapshot.broker.known().filter(|_| project.vms.is_none()))
        .map_or(millis(project.freshness), |record| record.freshness_window_ms);
    let scene = ProjectFacts {
        now: &snapshot.now,
        broker,
        window_ms,
        guests: snapshot.guests.known(),
    };
    let vms: Vec<VmStatus> = snapshot.vms.iter().map(|vm| scene.vm(vm)).collect();
    let youngest = vms
        .iter()
        .filter_map(|vm| Some((vm.last_handshake_age_ms?, &vm.name)))
        .min_by_key(|(age, _)| *age);
    StatusOutcome {
        schema: SCHEMA.to_owned(),
        project: project.project.clone(),
        workspace: project.workspace.clone(),
        config_path: project.config_path.clone(),
        state_root: project.state.dir().to_owned(),
        broker: broker.status(),
        accel: accel_of(&snapshot.vms),
        reachable: vms.iter().any(|vm| vm.reachable),
        all_reachable: !vms.is_empty() && vms.iter().all(|vm| vm.reachable),
        last_handshake_vm: youngest.map(|(_, name)| name.clone()),
        last_handshake_age_ms: youngest.map(|(age, _)| age),
        freshness_window_ms: window_ms,
        notes: notes_on(snapshot),
        vms,
    }
}

/// The broker as the evidence shows it. What a dead one left in `broker.json` isn't in here.
#[derive(Clone, Copy)]
struct LiveBroker<'a> {
    pid: Option<u32>,
    record: Option<&'a BrokerRecord>,
}

impl<'a> LiveBroker<'a> {
    fn of(snapshot: &'a Snapshot) -> LiveBroker<'a> {
        let live = snapshot.live_broker.as_ref();
        // A broker takes its lock before it writes `broker.json`: until then the file is that of
        // an earlier run.
        let record = snapshot
            .broker
            .known()
            .filter(|record| live.is_some_and(|(_, run)| *run == record.run));
        LiveBroker {
            pid: live.map(|(pid, _)| *pid),
            record,
        }
    }

    fn runs(self) -> bool {
        self.pid.is_some()
    }

    fn status(self) -> BrokerStatus {
        let state = if self.runs() {
            BrokerState::Running
        } else {
            BrokerState::Offline
        };
        BrokerStatus {
            state,
            pid: self.pid,
            port: self.record.map(|record| record.port),
        }
    }
}

/// What all VMs of a project are judged against.
struct ProjectFacts<'a> {
    now: &'a Now,
    broker: LiveBroker<'a>,
    window_ms: u64,
    guests: Option<&'a GuestsRecord>,
}

impl ProjectFacts<'_> {
    fn vm(&self, vm: &VmEvidence) -> VmStatus {
        let run = vm.run.known();
        let (state, ended) = self.state_of(vm);
        let alive = vm.qemu.is_some();
        // A guest that executes nothing hears nobody, however lately it was heard.
        let runs = alive && vm.pause.is_none();
        let heard = proof_of_life(vm, self.now, self.launch_of(vm));
        let age = heard.as_ref().map(|heard| heard.age_ms);
        // What belongs to another host boot tells an age and nothing else.
        let record = heard.as_ref().and_then(|heard| heard.current);
        let fresh = self.broker.runs()
            && vm.lost.is_none()
            && record.is_some_and(|record| is_recent(record, self.window_ms, self.now.boottime_ms));
        let ended_or_never = matches!(state, VmState::Stopped | VmState::Crashed);
        let external = fresh && ended_or_never && record.is_some_and(|record| self.is_nobodys_launch(record));
        let (state, ended) = match external {
            true => (VmState::External, None),
            false => (state, ended),
        };
        let reachable = fresh && (runs || external);
        let back = |then: Option<u64>| Some(self.now.boottime_ms.saturating_sub(then?));
        let session = record.is_some_and(|record| {
            record.bus_session
                && self
                    .broker
                    .record
                    .is_some_and(|broker| broker.run == record.broker_run)
        });
        let declared = vm.declared.as_ref();
        VmStatus {
            name: vm.name.clone(),
            role: declared
                .map(|declared| declared.role.clone())
                .or(run.map(|run| run.role.clone()))
                .unwrap_or_else(|| vm.name.to_string()),
            state,
            pid: vm.qemu,
            cpus: run.map(|run| run.cpus).or(declared.map(|declared| declared.cpus)),
            memory_bytes: run
                .map(|run| run.memory_bytes)
                .or(declared.map(|declared| declared.memory_bytes)),
            uptime_ms: run
                .filter(|run| alive && run.boot_id == self.now.boot_id)
                .map(|run| self.now.boottime_ms.saturating_sub(run.launched_boottime_ms)),
            broker: match (self.broker.runs(), reachable) {
                (false, _) => GuestState::Offline,
                (true, false) => GuestState::Waiting,
                (true, true) => GuestState::Reachable,
            },
            reachable,
            last_handshake_age_ms: age,
            capabilities: record.map_or_else(Vec::new, |record| record.capabilities.clone()),
            bus_session: session,
            bus_subscribed: session && record.is_some_and(|record| record.bus_subscribed),
            last_publish_age_ms: record.and_then(|record| back(record.last_publish_boottime_ms)),
            last_acked_seq: record.and_then(|record| record.last_acked_seq),
            last_heartbeat_age_ms: record.and_then(|record| back(record.last_heartbeat_boottime_ms)),
            guest_metrics: record.and_then(|record| record.guest_metrics.clone()),
            forwards: run
                .filter(|_| alive)
                .map_or_else(Vec::new, |run| run.forwards.clone()),
            ssh: run.filter(|_| alive).map(|run| run.ssh.clone()),
            bootstrap: run.and_then(|run| bootstrap_of(run, vm.lock_held)),
            ended,
            boots: vm.resets.as_ref().filter(|_| alive).map(Resets::boots),
            last_reset: vm.resets.as_ref().filter(|_| alive).and_then(Resets::last_at),
            paused: vm.pause.as_ref().filter(|_| alive).map(|pause| PausedStatus {
                reason: pause.reason.clone(),
                at: pause.at.clone(),
                detail: pause.detail(run.and_then(|run| run.overlay.as_deref())),
                remediation: pause.remediation(&vm.name),
            }),
            stale_config: match (run, declared) {
                (Some(run), Some(declared)) if alive => differing(&run.settings, &declared.settings),
                _ => Vec::new(),
            },
            lost: vm.lost.clone(),
        }
    }

    /// The list of docs/STATUS.md, in its order. One case is not in it: QEMU holds its pid file, but
    /// `run.json` is gone or spoilt. The lock alone decides what runs, so that VM runs.
    fn state_of(&self, vm: &VmEvidence) -> (VmState, Option<EndedStatus>) {
        let alive = vm.qemu.is_some();
        let Some(run) = vm.run.known() else {
            let state = match (alive, &vm.pause) {
                (true, None) => VmState::Running,
                (true, Some(_)) => VmState::Paused,
                (false, _) => VmState::Stopped,
            };
            return (state, None);
        };
        if run.phase == RunPhase::Starting && vm.lock_held {
            return (VmState::Starting, None);
        }
        let stop = vm.stop.known().filter(|stop| stop.launch_id == run.launch_id);
        if stop.is_some() && (alive || vm.lock_held) {
            return (VmState::Stopping, None);
        }
        if alive {
            let paused = vm.pause.is_some();
            return (if paused { VmState::Paused } else { VmState::Running }, None);
        }
        let last_words = vm
            .ending
            .as_ref()
            .and_then(|ending| ending.ended.last_words.clone());
        if let Some(stop) = stop {
            let log = vm.ending.as_ref().map(|ending| &ending.ended);
            let ended = EndedStatus {
                reason: log.cloned().unwrap_or_else(EndedStatus::unknown).reason,
                at: log.and_then(|ended| ended.at.clone()).or(Some(stop.at.clone())),
                last_words,
                ..EndedStatus::default()
            };
            return (VmState::Stopped, Some(ended));
        }
        if run.boot_id != self.now.boot_id {
            let ended = EndedStatus {
                reason: HOST_REBOOT.to_owned(),
                at: None,
                last_words,
                ..EndedStatus::default()
            };
            return (VmState::Stopped, Some(ended));
        }
        match &vm.ending {
            Some(ending) => (ending.outcome.into(), Some(ending.ended.clone())),
            None => (VmState::Stopped, Some(EndedStatus::unknown())),
        }
    }

    /// Whether what the broker heard is of a VM that castra hasn't launched: by `guests.json` there is
    /// no launch, and what was heard is newer than the end of the last one.
    fn is_nobodys_launch(&self, record: &HandshakeRecord) -> bool {
        let key = record.vm.key();
        let mut listed = self.guests.iter().flat_map(|guests| &guests.guests);
        let listed = listed.find(|guest| guest.name.key() == key);
        listed.is_some_and(|guest| {
            let since = guest
                .launched_boottime_ms
                .filter(|_| guest.boot_id.as_ref() == Some(&self.now.boot_id));
            guest.launch_id.is_none()
                && !guest.closed
                && since.is_none_or(|since| record.handshake_boottime_ms >= since)
        })
    }

    /// When its guest was reset last, CLOCK_BOOTTIME; 0: never.
    fn reset_ms(&self, vm: &VmEvidence) -> u64 {
        let resets = vm.resets.as_ref().filter(|_| vm.qemu.is_some());
        resets
            .and_then(|resets| resets.last_boottime_ms(self.now.boottime_ms, self.now.wall_ms))
            .unwrap_or(0)
    }

    /// The boot a proof of life must not be older than: the launch, or the last reset since.
    fn launch_of<'a>(&'a self, vm: &'a VmEvidence) -> Launch<'a> {
        if let Some(run) = vm.run.known() {
            return Launch::At {
                boot_id: &run.boot_id,
                boottime_ms: run.launched_boottime_ms.max(self.reset_ms(vm)),
                wall: Some(&run.launched_at),
            };
        }
        if vm.qemu.is_none() {
            return Launch::Never;
        }
        // QEMU runs without a readable `run.json`: what the broker was told of this launch
        // stands in. Without that nothing proves that a handshake isn't of an earlier one.
        let guest = self
            .guests
            .and_then(|guests| guests.guests.iter().find(|guest| guest.name == vm.name))
            .and_then(|guest| guest.boot_id.as_ref().zip(guest.launched_boottime_ms));
        guest.map_or(Launch::Unknown, |(boot_id, boottime_ms)| Launch::At {
            boot_id,
            boottime_ms: boottime_ms.max(self.reset_ms(vm)),
            wall: None,
        })
    }
}

/// When a VM was launched last.
enum Launch<'a> {
    /// Never, as far as anything shows.
    Never,
    /// It runs, but nothing says since when.
    Unknown,
    /// Then.
    At {
        boot_id: &'a BootId,
        boottime_ms: u64,
        wall: Option<&'a str>,
    },
}

/// A proof of life that belongs to a VM's last launch.
struct ProofOfLife<'a> {
    age_ms: u64,
    /// The record, if it is of this host boot.
    current: Option<&'a HandshakeRecord>,
}

/// A record counts if it is of this host boot and its handshake isn't before the VM's launch.
/// One of an earlier boot tells an age by the wall clock, if the VM wasn't launched since.
fn proof_of_life<'a>(vm: &'a VmEvidence, now: &Now, launch: Launch<'_>) -> Option<ProofOfLife<'a>> {
    let record = match &vm.record {
        RecordRead::Record(record) if is_of_guest(record, &vm.name) => record,
        _ => return None,
    };
    let of_this_boot = record.boot_id == now.boot_id;
    let before_launch = match launch {
        Launch::Never => false,
        Launch::Unknown => true,
        Launch::At {
            boot_id, boottime_ms, ..
        } if *boot_id == record.boot_id => {
            let launch = freshness::OfLaunch {
                vm: &vm.name,
                since_ms: Some(boottime_ms),
            };
            !is_of_launch(record, launch, boot_id)
        }
        Launch::At { boot_id, .. } if *boot_id == now.boot_id => true,
        // Launched in an earlier boot, heard in this one.
        Launch::At { .. } if of_this_boot => false,
        // Two boots, both over: only the wall clock has an opinion. RFC 3339 in UTC sorts as text.
        Launch::At { wall, .. } => wall.is_none_or(|wall| record.heard_at.as_str() < wall),
    };
    if before_launch {
        return None;
    }
    if of_this_boot {
        return Some(ProofOfLife {
            age_ms: now.boottime_ms.saturating_sub(record.heard_boottime_ms),
            current: Some(record),
        });
    }
    // It is at least as old as this boot, whatever somebody did to the wall clock.
    let by_wall_clock = parse_ms(&record.heard_at).map_or(0, |at| now.wall_ms.saturating_sub(at));
    Some(ProofOfLife {
        age_ms: by_wall_clock.max(now.boottime_ms),
        current: None,
    })
}

/// A bootstrap runs while somebody holds the VM's lock; a leftover `running` was cut short.
fn bootstrap_of(run: &RunRecord, lock_held: bool) -> Option<BootstrapRecord> {
    let mut bootstrap = run.bootstrap.clone()?;
    if bootstrap_runs(run) && !lock_held {
        bootstrap.status = BootstrapStatus::Failed.into();
    }
    Some(bootstrap)
}

/// Whether the record says that a bootstrap is at work.
pub(super) fn bootstrap_runs(run: &RunRecord) -> bool {
    run.bootstrap
        .as_ref()
        .is_some_and(|bootstrap| bootstrap.status == BootstrapStatus::Running)
}

/// Under both accelerators at once the slow one is the news.
fn accel_of(vms: &[VmEvidence]) -> Option<Accel> {
    let running = vms.iter().filter(|vm| vm.qemu.is_some());
    let accels: Vec<Accel> = running.filter_map(|vm| Some(vm.run.known()?.accel)).collect();
    if accels.contains(&Accel::Tcg) {
        return Some(Accel::Tcg);
    }
    accels.first().copied()
}

fn notes_on(snapshot: &Snapshot) -> Vec<Note> {
    let mut notes = Vec::new();
    if let Loaded::Unreadable(text) = &snapshot.broker {
        notes.push(Note {
            vm: None,
            text: text.clone(),
            advice: Some(
                "remove it: a broker that runs writes it anew within a second, else the next `castra up`"
                    .to_owned(),
            ),
        });
    }
    if let Loaded::Unreadable(text) = &snapshot.guests {
        notes.push(Note {
            vm: None,
            text: text.clone(),
            advice: Some("the next `castra up` writes it anew".to_owned()),
        });
    }
    for vm in &snapshot.vms {
        let mut note = |text: &str, advice: &str| {
            notes.push(Note {
                vm: Some(vm.name.clone()),
                text: text.to_owned(),
                advice: Some(advice.to_owned()),
            });
        };
        if let (Some(fate), Some(pid)) = (&vm.lost, vm.qemu) {
            note(
                &format!("it runs on as pid {pid}, and castra can't reach it: {fate}"),
                "`castra down` ends it",
            );
        }
        if let Loaded::Unreadable(text) = &vm.run {
            note(text, "castra writes it anew at the VM's next launch");
        }
        if let Loaded::Unreadable(text) = &vm.stop {
            note(text, "castra removes it at the VM's next launch");
        }
        let path = snapshot.project.state.handshake(&vm.name);
        match &vm.record {
            RecordRead::Unreadable(why) => note(
                &format!("can't read the handshake record {}: {why}", path.display()),
                "the broker writes it anew when it next hears the guest",
            ),
            RecordRead::Record(record) if !is_of_guest(record, &vm.name) => note(
                &format!(
                    "the handshake record {} is that of vm `{}`",
                    path.display(),
                    record.vm
                ),
                "the broker writes it anew when it next hears the guest",
            ),
            RecordRead::Record(_) | RecordRead::Absent => {}
        }
    }
    notes
}
