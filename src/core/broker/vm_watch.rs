//! What becomes of the project's VMs, looked at once a second.
//!
//! Here: ends that nobody asked for, guests that QEMU has paused and their way back once there is room,
//! and keeping QEMU's own logs from filling the disk. Not here: how an end or a pause is read
//! (`core::status`, `core::runtime::pause`), whether a guest is heard (`broker::state`), or who writes
//! the journal (`broker::effects`).
//!
//! Nothing here waits: QMP is spoken by a thread of its own, one a VM, and what it brings about is seen
//! at the next look.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::core::events::Event;
use crate::core::host::{self, Holder};
use crate::core::lines::journal::Rotation;
use crate::core::name::VmName;
use crate::core::root::alive::qemu_pid;
use crate::core::root::ending::{self, EndedStatus, VmState};
use crate::core::root::paths::{StateRoot, VmPaths, vm_file};
use crate::core::root::records::{self, GuestsRecord, RunPhase, RunRecord, StopRecord};
use crate::core::runtime::pause::{self, Pause, PauseWatch};

/// Between two tries to let a guest run on; doubled at each, for a disk on which others are quicker.
const RETRY_MS: u64 = 1000;
/// … up to this.
const RETRY_MOST_MS: u64 = 60_000;
/// How long QMP may take; somebody else may hold its one session.
const QMP_LIMIT: Duration = Duration::from_secs(5);

/// What one look has found.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Facts for the journal.
    pub events: Vec<Event>,
    /// Lines for the broker's log, with their level.
    pub lines: Vec<(&'static str, String)>,
    /// VMs whose guests can't speak any more: gone, or paused.
    pub silent: Vec<VmName>,
}

/// What earlier looks have found.
#[derive(Debug, Default)]
pub(super) struct Vms {
    running: BTreeMap<VmName, Running>,
    /// The launch whose end was told, or is an earlier broker's story.
    ended: BTreeMap<VmName, String>,
    /// A file system that can't give back the middle of a file was spoken of.
    said_no_holes: bool,
}

/// A VM whose QEMU lives.
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
    tries: Tries,
    /// A thread speaks QMP for it.
    trying: Arc<AtomicBool>,
}

/// When to let a guest run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tries {
    count: u32,
    next_ms: u64,
}

impl Tries {
    /// Whether to try now, and what follows if so. `room`: bytes that can be written again.
    fn due(self, pause: &Pause, now_ms: u64, room: impl FnOnce() -> Option<u64>) -> Option<Tries> {
        if !pause.waits_for_room() || now_ms < self.next_ms || room()? < pause::ROOM {
            return None;
        }
        let wait = RETRY_MS
            .saturating_mul(1 << self.count.min(16))
            .min(RETRY_MOST_MS);
        Some(Tries {
            count: self.count + 1,
            next_ms: now_ms + wait,
        })
    }
}

impl Vms {
    /// Looks at every VM that was launched. At the first look what has ended already is an earlier
    /// broker's story.
    pub(super) fn look(
        &mut self,
        state: &StateRoot,
        guests: &GuestsRecord,
        now_ms: u64,
        logs: Rotation,
        first: bool,
    ) -> Seen {
        let mut seen = Seen::default();
        for guest in &guests.guests {
            let Some(launch) = &guest.launch_id else {
                continue;
            };
            let paths = state.vm(&guest.name);
            match qemu_pid(&paths) {
                Some(pid) => self.look_at_running(&guest.name, &paths, pid, now_ms, logs, &mut seen),
                None => self.look_at_gone(&guest.name, &paths, launch, first, &mut seen),
            }
        }
        seen
    }

    /// Each launch's end is told once, unless `down` asked for it and tells it itself.
    fn look_at_gone(&mut self, vm: &VmName, paths: &VmPaths, launch: &str, first: bool, seen: &mut Seen) {
        let pid = self.running.remove(vm).map(|running| running.pid);
        if self.ended.get(vm).is_some_and(|ended| ended == launch) {
            return;
        }
        // One that ran and ended between two looks counts too; one that still starts doesn't.
        let run = record_of(paths).filter(|run| run.launch_id == launch);
        if pid.is_none() && run.is_none_or(|run| run.phase != RunPhase::Running) {
            return;
        }
        seen.silent.push(vm.clone());
        if !first && !tell_exit(vm, paths, launch, pid, seen) {
            return;
        }
        self.ended.insert(vm.clone(), launch.to_owned());
    }

    fn look_at_running(
        &mut self,
        vm: &VmName,
        paths: &VmPaths,
        pid: u32,
        now_ms: u64,
        logs: Rotation,
        seen: &mut Seen,
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
        running.follow(vm, paths, now_ms, seen);
        for name in [vm_file::QEMU_LOG, vm_file::SERIAL_LOG, vm_file::QMP_LOG] {
            let path = paths.file(name);
            if let Err(error) = host::thin_out(&path, logs.max_bytes)
                && !std::mem::replace(&mut self.said_no_holes, true)
            {
                let text = format!("{} can't be kept from growing: {error}", path.display());
                seen.lines.push(("WARN", text));
            }
        }
    }
}

impl Running {
    /// Tells of pauses and their ends, and ends those that nobody asked for.
    fn follow(&mut self, vm: &VmName, paths: &VmPaths, now_ms: u64, seen: &mut Seen) {
        let Some(pause) = self.watch.look() else {
            if let Some(paused) = self.paused.take() {
                let elapsed_ms = now_ms.saturating_sub(paused.since_ms);
                let reason = paused.pause.reason;
                let line = format!("resumed vm:{vm} reason={reason} after_ms={elapsed_ms}");
                seen.lines.push(("INFO", line));
                seen.events.push(Event::VmResumed {
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
            seen.lines.push(("WARN", line));
            seen.events.push(Event::VmPaused {
                vm: vm.clone(),
                reason: pause.reason.clone(),
                detail: pause.detail(disk().as_deref()),
                remediation: Some(pause.remediation(vm)),
            });
            seen.silent.push(vm.clone());
        }
        let paused = self.paused.get_or_insert_with(|| Paused {
            pause: pause.clone(),
            since_ms: now_ms,
            tries: Tries::default(),
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
            seen.lines.push(("INFO", text));
            if let Err(error) = try_to_resume(vm, paths, &paused.trying) {
                seen.lines
                    .push(("ERROR", format!("no thread to resume vm:{vm}: {error}")));
            }
        }
    }
}

/// Speaks QMP in a thread of its own.
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

/// Tells how a launch ended, unless somebody else does; false: that can't be known yet.
fn tell_exit(vm: &VmName, paths: &VmPaths, launch: &str, pid: Option<u32>, seen: &mut Seen) -> bool {
    let stop = records::load::<StopRecord>(&paths.stop()).ok().flatten();
    if stop.is_some_and(|stop| stop.launch_id == launch) {
        return true;
    }
    let ending = ending::read(paths);
    // Whoever launches the VM again has its lock: it tells of the end itself if nobody meant it, and
    // takes away first what QEMU said, last what `down` or `restart` said. So what was read counts only
    // while the record is of no other launch and, where QEMU said nothing, nobody is at work.
    if record_of(paths).is_some_and(|run| run.launch_id != launch) {
        return true;
    }
    if ending.is_none() && host::lock_holder(&paths.lock()) != Holder::Nobody {
        return false;
    }
    let (outcome, ended) = match ending {
        Some(ending) => (ending.state, ending.ended),
        None => {
            let reason = "unknown".to_owned();
            let ended = EndedStatus {
                reason,
                ..EndedStatus::default()
            };
            (VmState::Stopped, ended)
        }
    };
    let outcome = outcome.as_str().to_owned();
    let line = format!("exit of vm:{vm} outcome={outcome} reason={}", ended.reason);
    seen.lines.push(("WARN", line));
    seen.events.push(Event::VmExited {
        vm: vm.clone(),
        pid,
        reason: ended.reason,
        outcome,
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
