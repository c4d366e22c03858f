//! Watches for guests that reboot under the same QEMU: an ordinary reboot, a panic, a boot loop.
//!
//! Here: noticing reboots once a second, reporting them, and ending a guest that has panicked or is
//! in a boot loop. Not here: how reboots are detected (`runtime::resets`), what a reboot means for
//! sessions and records (`broker::state`, which treats it as a new launch), VMs whose QEMU has
//! ended (`broker::vm_watch`).
//!
//! Nothing here waits: a thread per VM speaks QMP, and a later check sees its effect.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::core::events::Event;
use crate::core::name::VmName;
use crate::core::root::alive::qemu_pid;
use crate::core::root::ending::EndReason;
use crate::core::root::paths::{StateRoot, VmPaths};
use crate::core::root::records::GuestsRecord;
use crate::core::runtime::resets::{self, ResetWatch};

use super::guests::GuestTable;
use super::state::Timestamp;

/// How long QMP may take; somebody else may hold its one session.
const QMP_LIMIT: Duration = Duration::from_secs(5);

/// What one look has found.
#[derive(Debug, Default)]
pub(super) struct RebootChanges {
    /// Facts for the journal.
    pub events: Vec<Event>,
    /// Lines for the broker's log, with their level.
    pub lines: Vec<(&'static str, String)>,
    /// Some guest has rebooted: its older handshakes count no more.
    pub changed: bool,
}

/// The VMs that are watched.
#[derive(Debug, Default)]
pub(super) struct RebootWatch {
    /// There was a check before: a VM that is new in this one was launched since.
    looked: bool,
    vms: BTreeMap<VmName, WatchedVm>,
}

#[derive(Debug)]
struct WatchedVm {
    pid: u32,
    watch: ResetWatch,
    /// CLOCK_BOOTTIME of the last reset, ms.
    began_ms: Option<u64>,
    end_reason: Option<EndReason>,
    /// A thread is ending it over QMP.
    ending: Arc<AtomicBool>,
}

impl RebootWatch {
    /// Checks every VM that runs.
    pub(super) fn look(&mut self, state: &StateRoot, guests: &GuestsRecord, at: Timestamp) -> RebootChanges {
        let mut changes = RebootChanges::default();
        let launched = guests.guests.iter().filter(|guest| guest.launch_id.is_some());
        for guest in launched {
            let paths = state.vm(&guest.name);
            let Some(pid) = qemu_pid(&paths) else {
                self.vms.remove(&guest.name);
                continue;
            };
            if self.vms.get(&guest.name).is_none_or(|known| known.pid != pid) {
                let watched = WatchedVm::new(pid, &paths, at, self.looked);
                changes.changed |= watched.began_ms.is_some();
                self.vms.insert(guest.name.clone(), watched);
            }
            if let Some(watched) = self.vms.get_mut(&guest.name) {
                watched.follow(&guest.name, &paths, at, &mut changes);
            }
        }
        self.looked = true;
        changes
    }

    /// Notes all reboots in the table of guests.
    pub(super) fn apply(&self, table: &mut GuestTable) {
        for (vm, watched) in &self.vms {
            if let Some(began_ms) = watched.began_ms {
                table.note_reboot(&vm.key(), began_ms);
            }
        }
    }
}

impl WatchedVm {
    fn new(pid: u32, paths: &VmPaths, at: Timestamp, launched_since: bool) -> WatchedVm {
        let watch = match launched_since {
            true => ResetWatch::new(paths),
            // Earlier reboots were reported by an earlier broker.
            false => ResetWatch::from_now(paths),
        };
        WatchedVm {
            pid,
            began_ms: watch.resets().last_boottime_ms(at.boot_ms, at.wall_ms),
            watch,
            end_reason: None,
            ending: Arc::default(),
        }
    }

    fn follow(&mut self, vm: &VmName, paths: &VmPaths, at: Timestamp, changes: &mut RebootChanges) {
        if let Some(new_resets) = self.watch.look() {
            self.began_ms = new_resets.resets.last_boottime_ms(at.boot_ms, at.wall_ms);
            self.end_reason = self.end_reason.or(new_resets.end_reason);
            changes.changed = true;
            let boots = new_resets.resets.boots();
            changes
                .lines
                .push(("INFO", format!("reboot of vm:{vm} boots={boots}")));
            changes.events.push(Event::VmRebooted {
                vm: vm.clone(),
                boots,
            });
        }
        let Some(end_reason) = self.end_reason else {
            return;
        };
        if self.ending.swap(true, Ordering::AcqRel) {
            return;
        }
        changes
            .lines
            .push(("WARN", format!("ending vm:{vm} reason={}", end_reason.as_str())));
        if let Err(error) = self.end(vm, paths, end_reason) {
            self.ending.store(false, Ordering::Release);
            let text = format!("no thread can be started to end vm:{vm}: {error}");
            changes.lines.push(("ERROR", text));
        }
    }

    /// Ends a guest over QMP, in a thread. If that fails, the next check starts another.
    fn end(&self, vm: &VmName, paths: &VmPaths, end_reason: EndReason) -> std::io::Result<()> {
        let (vm, paths, ending) = (vm.clone(), paths.clone(), Arc::clone(&self.ending));
        let work = move || {
            if let Err(error) = resets::end(&paths, end_reason, QMP_LIMIT) {
                log::warn!("vm {vm} can't be ended: {error}");
                ending.store(false, Ordering::Release);
            }
        };
        thread::Builder::new()
            .name("broker-end".to_owned())
            .spawn(work)
            .map(drop)
    }
}
