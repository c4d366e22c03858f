//! Watches the project's VMs, once a second.
//!
//! Here: unexpected ends, guests that QEMU has paused and how they resume once there is disk space,
//! and keeping QEMU's own logs from filling the disk. Not here: how an end or a pause is detected
//! (`root::ending`, `core::runtime::pause`), whether a guest is reachable (`broker::state`), who
//! writes the journal (`broker::effects`).
//!
//! Nothing here waits: a thread per VM speaks QMP, and the next check sees its effect.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::core::events::Event;
use crate::core::events::endings::LaunchEnding;
use crate::core::host::{self, Holder};
use crate::core::id::LaunchId;
use crate::core::lines::journal::Rotation;
use crate::core::name::VmName;
use crate::core::root::alive::qemu_pid;
use crate::core::root::ending::{self, EndedStatus};
use crate::core::root::paths::{StateRoot, VmPaths, vm_file};
use crate::core::root::records::{self, GuestsRecord, RunPhase, RunRecord, StopRecord};
use crate::core::runtime::pause::{self, Pause, PauseWatch};

/// How long until a paused guest is resumed again; doubled at each try, in case other programs fill
/// the disk first.
const RETRY_MS: u64 = 1000;
/// … up to this.
const RETRY_MOST_MS: u64 = 60_000;
/// How long QMP may take; another program may hold its one session.
const QMP_LIMIT: Duration = Duration::from_secs(5);

/// What one check has found.
#[derive(Debug, Default)]
pub(super) struct VmChanges {
    /// Facts for the journal.
    pub events: Vec<Event>,
    /// Lines for the broker's log, with their level.
    pub lines: Vec<(&'static str, String)>,
    /// VMs whose guests can't send anything: ended, or paused.
    pub silent: Vec<VmName>,
}

/// What earlier checks have found.
#[derive(Debug, Default)]
pub(super) struct VmWatch {
    running: BTreeMap<VmName, Running>,
    /// The launch whose end was reported, by this broker or an earlier one.
    ended: BTreeMap<VmName, LaunchId>,
    /// It was logged that the file system can't punch holes.
    hole_punch_failed: bool,
}

/// A VM whose QEMU runs.
#[derive(Debug)]
struct Running {
    pid: u32,
    watch: PauseWatch,
    paused: Option<Paused>,
}

/// A guest that QEMU has paused.
#[derive(Debug)]
struct Paused {
    pause: Pause,
    since_ms: u64,
    tries: ResumeTries,
    /// A thread is resuming it over QMP.
    trying: Arc<AtomicBool>,
}

/// When to resume a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct ResumeTries {
    count: u32,
    next_ms: u64,
}

impl ResumeTries {
    /// If it is time to try, the state after that try. `room`: bytes that are free.
    fn due(self, pause: &Pause, now_ms: u64, room: impl FnOnce() -> Option<u64>) -> Option<ResumeTries> {
        if !pause.waits_for_space() || now_ms < self.next_ms || room()? < pause::MIN_FREE_BYTES {
            return None;
        }
        let wait = RETRY_MS
            .saturating_mul(1 << self.count.min(16))
            .min(RETRY_MOST_MS);
        Some(ResumeTries {
            count: self.count + 1,
            next_ms: now_ms + wait,
        })
    }
}

impl VmWatch {
    /// Checks every VM that was launched. Ends found by the first check were reported by an earlier
    /// broker.
    pub(super) fn look(
        &mut self,
        state: &StateRoot,
        guests: &GuestsRecord,
        now_ms: u64,
        logs: Rotation,
        first: bool,
    ) -> VmChanges {
        let mut changes = VmChanges::default();
        for guest in &guests.guests {
            let Some(launch) = &guest.launch_id else {
                continue;
            };
            let paths = state.vm(&guest.name);
            match qemu_pid(&paths) {
                Some(pid) => self.look_at_running(&guest.name, &paths, pid, now_ms, logs, &mut changes),
                None => self.look_at_gone(&guest.name, &paths, launch, first, &mut changes),
            }
        }
        changes
    }

    /// Reports each launch's end once, unless `down` caused it and reports it itself.
    fn look_at_gone(
        &mut self,
        vm: &VmName,
        paths: &VmPaths,
        launch: &LaunchId,
        first: bool,
        changes: &mut VmChanges,
    ) {
        let pid = self.running.remove(vm).map(|running| running.pid);
        if self.ended.get(vm).is_some_and(|ended| ended == launch) {
            return;
        }
        // A VM that started and ended between two checks counts too; one that is still starting
        // doesn't.
        let run = record_of(paths).filter(|run| run.launch_id == *launch);
        if pid.is_none() && run.is_none_or(|run| run.phase != RunPhase::Running) {
            return;
        }
        changes.silent.push(vm.clone());
        if !first && !report_exit(vm, paths, launch, pid, changes) {
            return;
        }
        self.ended.insert(vm.clone(), launch.clone());
    }

    fn look_at_running(
        &mut self,
        vm: &VmName,
        paths: &VmPaths,
        pid: u32,
        now_ms: u64,
        logs: Rotation,
        changes: &mut VmChanges,
    ) {
        let fresh = || Running {
            pid,
            watch: PauseWatch::new(paths),
            paused: None,
        };
        let running = self.running.entry(vm.clone()).or_insert_with(fresh);
        if running.pid != pid {
            *running = fresh();
        }
        running.follow(vm, paths, now_ms, changes);
        for name in [vm_file::QEMU_LOG, vm_file::SERIAL_LOG, vm_file::QMP_LOG] {
            let path = paths.file(name);
            if let Err(error) = host::punch_hole(&path, logs.max_bytes)
                && !std::mem::replace(&mut self.hole_punch_failed, true)
            {
                let text = format!("{} can't be kept from growing: {error}", path.display());
                changes.lines.push(("WARN", text));
            }
        }
    }
}

impl Running {
    /// Reports pauses and their ends, and resumes guests that were paused for lack of disk space.
    fn follow(&mut self, vm: &VmName, paths: &VmPaths, now_ms: u64, changes: &mut VmChanges) {
        let Some(pause) = self.watch.look() else {
            if let Some(paused) = self.paused.take() {
                let elapsed_ms = now_ms.saturating_sub(paused.since_ms);
                let reason = paused.pause.reason;
                let line = format!("resumed vm:{vm} reason={reason} after_ms={elapsed_ms}");
                changes.lines.push(("INFO", line));
                changes.events.push(Event::VmResumed {
                    vm: vm.clone(),
                    reason,
                    elapsed_ms: Some(elapsed_ms),
                });
            }
            return;
        };
        let disk = || record_of(paths).and_then(|run| run.overlay);
        let known = self
            .paused
            .as_ref()
            .is_some_and(|paused| paused.pause.reason == pause.reason);
        if !known {
            let line = format!("paused vm:{vm} reason={}", pause.reason);
            changes.lines.push(("WARN", line));
            changes.events.push(Event::VmPaused {
                vm: vm.clone(),
                reason: pause.reason.clone(),
                detail: pause.detail(disk().as_deref()),
                remediation: Some(pause.remediation(vm)),
            });
            changes.silent.push(vm.clone());
        }
        let paused = self.paused.get_or_insert_with(|| Paused {
            pause: pause.clone(),
            since_ms: now_ms,
            tries: ResumeTries::default(),
            trying: Arc::default(),
        });
        paused.pause = pause;
        let room = || host::space_left(disk().as_deref().and_then(std::path::Path::parent)?);
        if paused.trying.load(Ordering::Acquire) {
            return;
        }
        if let Some(tries) = paused.tries.due(&paused.pause, now_ms, room) {
            paused.tries = tries;
            let text = format!("letting vm:{vm} run on: there is room again");
            changes.lines.push(("INFO", text));
            if let Err(error) = try_to_resume(vm, paths, &paused.trying) {
                changes
                    .lines
                    .push(("ERROR", format!("no thread to resume vm:{vm}: {error}")));
            }
        }
    }
}

/// Resumes a guest over QMP, in a thread.
fn try_to_resume(vm: &VmName, paths: &VmPaths, trying: &Arc<AtomicBool>) -> std::io::Result<()> {
    let (vm, paths, done) = (vm.clone(), paths.clone(), Arc::clone(trying));
    trying.store(true, Ordering::Release);
    let work = move || {
        if let Err(error) = pause::resume(&paths, QMP_LIMIT) {
            log::warn!("vm {vm} can't be resumed: {error}");
        }
        done.store(false, Ordering::Release);
    };
    let spawned = thread::Builder::new()
        .name("broker-resume".to_owned())
        .spawn(work);
    if spawned.is_err() {
        trying.store(false, Ordering::Release);
    }
    spawned.map(drop)
}

/// Reports how a launch ended, unless another process does; false: that can't be known yet.
fn report_exit(
    vm: &VmName,
    paths: &VmPaths,
    launch: &LaunchId,
    pid: Option<u32>,
    changes: &mut VmChanges,
) -> bool {
    let stop = records::load::<StopRecord>(&paths.stop()).ok().flatten();
    if stop.is_some_and(|stop| stop.launch_id == *launch) {
        return true;
    }
    let ending = ending::read(paths);
    // A castra that launches the VM again holds its lock. It reports an unexpected end itself; then
    // it empties `qmp.log` first and removes `stop.json` last. So the files count only if the
    // record is of the same launch and, where QEMU said nothing, nobody holds the VM's lock.
    if record_of(paths).is_some_and(|run| run.launch_id != *launch) {
        return true;
    }
    if ending.is_none() && host::lock_holder(&paths.lock()) != Holder::Nobody {
        return false;
    }
    let (outcome, ended) = match ending {
        Some(ending) => (ending.outcome, ending.ended),
        None => (LaunchEnding::Stopped, EndedStatus::unknown()),
    };
    let line = format!(
        "exit of vm:{vm} outcome={} reason={}",
        outcome.as_str(),
        ended.reason
    );
    changes.lines.push(("WARN", line));
    changes.events.push(Event::VmExited {
        vm: vm.clone(),
        pid,
        reason: ended.reason,
        outcome: outcome.into(),
        last_words: ended.last_words,
        qemu_words: ended.qemu_words,
        remediation: ended.remediation,
    });
    true
}

fn record_of(paths: &VmPaths) -> Option<RunRecord> {
    records::load(&paths.run()).ok().flatten()
}

#[cfg(test)]
#[path = "vm_watch_tests.rs"]
mod tests;
