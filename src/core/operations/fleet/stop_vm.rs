//! How `down` and `restart` stop one VM.
//!
//! Here: saying that it is to stop, the ladder, waiting for whoever works on it, and clearing what
//! QEMU left; discarding a disk and telling of it. Not here: the ladder itself
//! (`core::runtime::shutdown`), or which disks go (`operations::down`, `operations::restart`).

use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::core::arch::Arch;
use crate::core::bootstrap::ssh::login::running_target;
use crate::core::cancel::{Cancel, POLL_INTERVAL};
use crate::core::config::LifecycleConfig;
use crate::core::events::endings::ShutdownEnding;
use crate::core::events::{Event, Severity};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, FileLock, LockError};
use crate::core::name::VmName;
use crate::core::operations::run;
use crate::core::process::Job;
use crate::core::reporter::{Emitter, wall_clock};
use crate::core::root::alive::qemu_pid;
use crate::core::root::paths::{StateRoot, VmPaths};
use crate::core::root::qemu_process::clear_leftovers;
use crate::core::root::records::{self, RunRecord, StopRecord};
use crate::core::root::run_log;
use crate::core::runtime::overlay::discard_overlay;
use crate::core::runtime::shutdown::{self, PowerOff};

/// How long whoever holds a VM's lock (a bootstrap) may take to notice that the VM is gone.
const LOCK_DEADLINE: Duration = Duration::from_secs(15);

/// What stopping takes. The caller holds the project's lock.
pub(crate) struct VmStopper<'s, 'e> {
    pub state: &'s StateRoot,
    pub lifecycle: &'s LifecycleConfig,
    /// Who asks, as `stop.json` and the lock say.
    pub command: &'static str,
    pub emitter: &'s Emitter<'e>,
    pub cancel: &'s Cancel,
}

/// One VM after it was to stop.
pub(crate) struct StopOutcome {
    /// How.
    pub ending: ShutdownEnding,
    /// It ran and doesn't any more.
    pub changed: bool,
    /// What it leaves; or why it isn't ours to go on with.
    pub left: Result<StoppedVm>,
}

/// What a stopped VM leaves.
pub(crate) struct StoppedVm {
    /// The VM's lock, which nobody else has now.
    pub lock: FileLock,
    /// Its `run.json`; `None` if there is none, or none that can be read.
    pub record: Option<RunRecord>,
}

impl VmStopper<'_, '_> {
    /// Says that the VM is to stop, shuts it down, waits for whoever works on it, and clears what
    /// its QEMU and killed bootstraps left.
    pub(crate) fn stop(&self, vm: &VmName) -> StopOutcome {
        let paths = self.state.vm(vm);
        let mut done = StopOutcome {
            ending: ShutdownEnding::AlreadyStopped,
            changed: false,
            left: Err(not_stopped(vm)),
        };
        let record: Option<RunRecord> = match records::load(&paths.run()) {
            Ok(record) => record,
            Err(failure) => {
                // A damaged record doesn't keep a VM alive: the lock on its pid file says what runs.
                self.warn(vm, &failure);
                None
            }
        };
        if !self.shut_down(vm, &paths, record.as_ref(), &mut done) {
            return done;
        }
        let lock = match self.wait_for_lock(&paths) {
            Ok(lock) => lock,
            Err(failure) => {
                done.left = Err(failure);
                return done;
            }
        };
        // A castra was killed while it launched the VM, and now its QEMU is there.
        let launched = records::load(&paths.run()).ok().flatten();
        if !self.shut_down(vm, &paths, launched.as_ref(), &mut done) {
            return done;
        }
        // A QEMU that was killed leaves its sockets and pid file.
        clear_leftovers(&paths);
        run_log::close_abandoned_and_emit(self.state, vm, self.emitter);
        done.left = Ok(StoppedVm { lock, record });
        done
    }

    /// Shuts the VM down if it runs; false if it still does.
    fn shut_down(
        &self,
        vm: &VmName,
        paths: &VmPaths,
        record: Option<&RunRecord>,
        done: &mut StopOutcome,
    ) -> bool {
        if qemu_pid(paths).is_none() {
            return true;
        }
        if let Err(failure) = self.save_stop_record(paths, record) {
            self.warn(vm, &failure);
        }
        let by_ssh = |limit: Duration, over: &Cancel| poweroff_by_ssh(self.state, vm, limit, over);
        let how = match record.is_none_or(has_power_button) {
            true => PowerOff::Button,
            false => PowerOff::Ssh(&by_ssh),
        };
        let shut = shutdown::shutdown(vm, paths, how, self.lifecycle, self.emitter, self.cancel);
        done.ending = shut.ending;
        done.changed = shut.changed;
        shut.ending != ShutdownEnding::Failed
    }

    /// Somebody has taken note of a VM that ended by itself: from now on it reads as stopped. That the
    /// host was rebooted says more, and stays.
    pub(crate) fn acknowledge_end(&self, vm: &VmName, record: &RunRecord) {
        let paths = self.state.vm(vm);
        let earlier: Option<StopRecord> = records::load(&paths.stop()).ok().flatten();
        let noted = earlier.is_some_and(|stop| stop.launch_id == record.launch_id);
        if noted || record.boot_id != *host::boot_id() {
            return;
        }
        if let Err(failure) = self.save_stop_record(&paths, Some(record)) {
            self.warn(vm, &failure);
        }
    }

    /// `stop.json` tells a bootstrap of this launch why its VM goes, and `status` that it was meant.
    fn save_stop_record(&self, paths: &VmPaths, record: Option<&RunRecord>) -> Result<()> {
        let Some(record) = record else {
            return Ok(());
        };
        let stop = StopRecord {
            launch_id: record.launch_id.clone(),
            by: format!("{} (pid {})", self.command, std::process::id()),
            at: wall_clock(SystemTime::now()),
        };
        records::save(&paths.stop(), &stop)
    }

    /// The VM's lock, once whoever had it has seen that QEMU is gone.
    fn wait_for_lock(&self, paths: &VmPaths) -> Result<FileLock> {
        let path = paths.lock();
        let mut holder = String::new();
        let try_take = || match FileLock::try_take(&path, self.command) {
            Ok(lock) => Some(Ok(lock)),
            Err(LockError::Io(error)) => Some(Err(Failure::io("create", &path, &error))),
            Err(LockError::Held(who)) => {
                holder = who;
                None
            }
        };
        let taken = Cancel::new().wait_for(LOCK_DEADLINE, POLL_INTERVAL, try_take);
        taken.unwrap_or_else(|| Err(run::busy(&path.display().to_string(), &holder)))
    }

    /// Removes an overlay and tells of it; the bytes given back.
    pub(crate) fn discard(&self, vm: &VmName, path: &Path) -> Result<u64> {
        let was_there = host::is_there(path);
        let bytes = discard_overlay(path)?;
        if was_there {
            run::emit_discarded(self.emitter, vm, path, bytes);
        }
        Ok(bytes)
    }

    fn warn(&self, vm: &VmName, failure: &Failure) {
        self.emitter
            .emit(Event::of_failure(Severity::Warn, Some(vm), failure));
    }
}

/// Whether a launched guest's kernel has a driver for the power button. Of other guests than the default one
/// castra doesn't know; most have.
fn has_power_button(record: &RunRecord) -> bool {
    let setting = |name: &str| record.settings.get(name).and_then(Value::as_str);
    let arch = setting("arch").and_then(Arch::named).unwrap_or_default();
    let is_default_guest = setting("kernel").is_none() && setting("base_image").is_none();
    arch.power_button || !is_default_guest
}

/// Asks a guest without a power button to power off.
fn poweroff_by_ssh(state: &StateRoot, vm: &VmName, limit: Duration, over: &Cancel) -> Result<()> {
    // By its path: a BusyBox shell would run its own. In the background: the connection ends before the guest does.
    let command = OsStr::new("/sbin/poweroff </dev/null >/dev/null 2>&1 &");
    let ended = Job::new("ssh")
        .args(running_target(state, vm)?.exec_argv(command))
        .deadline(limit)
        .cancel(over)
        .run();
    ended
        .map(drop)
        .map_err(|error| error.into_failure("can't run `poweroff` in the guest", Exit::Failed))
}

fn not_stopped(vm: &VmName) -> Failure {
    Failure::new(Exit::Failed, format!("vm `{vm}` could not be stopped"))
        .because("its QEMU survived SIGKILL, so the kernel is holding it")
        .advice("look at `dmesg`, then run it again")
}
