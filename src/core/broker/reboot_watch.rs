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
use crate::core::root::ending::Verdict;
use crate::core::root::paths::{StateRoot, VmPaths};
use crate::core::root::records::GuestsRecord;
use crate::core::runtime::resets::{self, ResetWatch};

use super::guests::GuestTable;
use super::state::At;

/// How long QMP may take; somebody else may hold its one session.
const QMP_LIMIT: Duration = Duration::from_secs(5);

/// What one look has found.
#[derive(Debug, Default)]
pub(super) struct SeenAnew {
    /// Facts for the journal.
    pub events: Vec<Event>,
    /// Lines for the broker's log, with their level.
    pub lines: Vec<(&'static str, String)>,
    /// Some guest has rebooted: its older handshakes count no more.
    pub changed: bool,
}

/// The VMs that are watched.
#[derive(Debug, Default)]
pub(super) struct Reboots {
    /// There was a check before: a VM that is new in this one was launched since.
    looked: bool,
    vms: BTreeMap<VmName, Watched>,
}

#[derive(Debug)]
struct Watched {
    pid: u32,
    watch: ResetWatch,
    /// CLOCK_BOOTTIME of the last reset, ms.
    began_ms: Option<u64>,
    verdict: Option<Verdict>,
    /// A thread is ending it over QMP.
    ending: Arc<AtomicBool>,
}

impl Reboots {
    /// Checks every VM that runs.
    pub(super) fn look(&mut self, state: &StateRoot, guests: &GuestsRecord, at: At) -> SeenAnew {
        let mut seen = SeenAnew::default();
        let launched = guests.guests.iter().filter(|guest| guest.launch_id.is_some());
        for guest in launched {
            let paths = state.vm(&guest.name);
            let Some(pid) = qemu_pid(&paths) else {
                self.vms.remove(&guest.name);
                continue;
            };
            if self.vms.get(&guest.name).is_none_or(|known| known.pid != pid) {
                let watched = Watched::new(pid, &paths, at, self.looked);
                seen.changed |= watched.began_ms.is_some();
                self.vms.insert(guest.name.clone(), watched);
            }
            if let Some(watched) = self.vms.get_mut(&guest.name) {
                watched.follow(&guest.name, &paths, at, &mut seen);
            }
        }
        self.looked = true;
        seen
    }

    /// Notes all reboots in the table of guests.
    pub(super) fn apply(&self, table: &mut GuestTable) {
        for (vm, watched) in &self.vms {
            if let Some(began_ms) = watched.began_ms {
                table.began_anew(&vm.key(), began_ms);
            }
        }
    }
}

impl Watched {
    fn new(pid: u32, paths: &VmPaths, at: At, launched_since: bool) -> Watched {
        let watch = match launched_since {
            true => ResetWatch::new(paths),
            // Earlier reboots were reported by an earlier broker.
            false => ResetWatch::from_now(paths),
        };
        Watched {
            pid,
            began_ms: watch.resets().last_boottime_ms(at.boot_ms, at.wall_ms),
            watch,
            verdict: None,
            ending: Arc::default(),
        }
    }

    fn follow(&mut self, vm: &VmName, paths: &VmPaths, at: At, seen: &mut SeenAnew) {
        if let Some(anew) = self.watch.look() {
            self.began_ms = anew.resets.last_boottime_ms(at.boot_ms, at.wall_ms);
            self.verdict = self.verdict.or(anew.verdict);
            seen.changed = true;
            let boots = anew.resets.boots();
            seen.lines
                .push(("INFO", format!("reboot of vm:{vm} boots={boots}")));
            seen.events.push(Event::VmRebooted {
                vm: vm.clone(),
                boots,
            });
        }
        let Some(verdict) = self.verdict else {
            return;
        };
        if self.ending.swap(true, Ordering::AcqRel) {
            return;
        }
        seen.lines
            .push(("WARN", format!("ending vm:{vm} reason={}", verdict.as_str())));
        if let Err(error) = self.end(vm, paths, verdict) {
            self.ending.store(false, Ordering::Release);
            let text = format!("no thread can be started to end vm:{vm}: {error}");
            seen.lines.push(("ERROR", text));
        }
    }

    /// Ends a guest over QMP, in a thread. If that fails, the next check starts another.
    fn end(&self, vm: &VmName, paths: &VmPaths, verdict: Verdict) -> std::io::Result<()> {
        let (vm, paths, ending) = (vm.clone(), paths.clone(), Arc::clone(&self.ending));
        let work = move || {
            if let Err(error) = resets::end(&paths, verdict, QMP_LIMIT) {
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
