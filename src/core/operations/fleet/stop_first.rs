//! One VM's way in `restart` and `up --recreate` until it may be launched again.
//!
//! Here: the check of its disk, its stop, its next identity. Not here: how a VM is stopped
//! (`operations::fleet::stop_vm`) or launched (`operations::fleet::launch_vm`).

use std::sync::PoisonError;

use super::bring_up::{Fleet, RestartPolicy};
use super::fleet_outcome::VmUp;
use super::identity::{self, Identity};
use super::stop_vm::VmStopper;
use crate::core::config::VmConfig;
use crate::core::events::endings::ShutdownEnding;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, FileLock};
use crate::core::root::records::{self, RunRecord};
use crate::core::runtime::overlay;

impl Fleet<'_, '_> {
    /// Stops the VM if it runs, and gives it the identity of its next launch.
    pub(super) fn stop_first(
        &self,
        vm: &VmConfig,
        with: &RestartPolicy<'_>,
        done: &mut VmUp,
    ) -> Result<(FileLock, Identity)> {
        let name = &vm.name;
        if self.cancel.is_requested() {
            return Err(
                Failure::new(Exit::Interrupted, format!("vm `{name}` was not restarted"))
                    .because("interrupted before its turn; the VM is unchanged"),
            );
        }
        let paths = self.config.state.vm(name);
        host::ensure_private_dir(paths.dir()).map_err(|error| Failure::io("create", paths.dir(), &error))?;
        let earlier: Option<RunRecord> = records::load(&paths.run()).ok().flatten();
        if !with.discard {
            self.check_disk(vm, earlier.as_ref())?;
        }
        let stopping = VmStopper {
            state: &self.config.state,
            lifecycle: with.lifecycle,
            command: "castra restart",
            emitter: self.emitter,
            cancel: self.cancel,
        };
        let stopped = stopping.stop(name);
        if stopped.ending != ShutdownEnding::AlreadyStopped {
            done.stopped = Some(stopped.ending);
        }
        let left = stopped.left?;
        if let (Some(record), Some(launching)) = (&left.record, &self.launch) {
            launching.ports.forget(&record.forwards);
        }
        if with.discard {
            let path = left.record.and_then(|record| record.overlay);
            let path = path.unwrap_or_else(|| self.config.state.overlay(name));
            stopping.discard(name, &path)?;
        }
        if self.cancel.is_requested() {
            return Err(
                Failure::new(Exit::Interrupted, format!("vm `{name}` was not started again"))
                    .because("interrupted")
                    .advice(format!("castra restart {name} starts it with the disk it has")),
            );
        }
        let _issuing = with.issuing.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = identity::issue(self.config, &[vm])?.remove(name);
        let identity = identity.expect("who is asked for an identity of a VM gives one");
        Ok((left.lock, identity))
    }

    /// A disk that could not be gone on with is found while the VM still runs.
    fn check_disk(&self, vm: &VmConfig, earlier: Option<&RunRecord>) -> Result<()> {
        let path = self.overlay_of(vm);
        let had = earlier.and_then(|record| record.overlay.as_ref());
        if let Some(had) = had.filter(|had| **had != path && host::is_there(had)) {
            return Err(
                Failure::new(Exit::Failed, format!("vm `{}` was not restarted", vm.name))
                    .because(format!(
                        "its disk is {}, but castra.toml now says {}",
                        had.display(),
                        path.display()
                    ))
                    .advice("undo the change in castra.toml, or start with a fresh disk by --discard"),
            );
        }
        let launch = self.launch.as_ref();
        let boot = launch.map(|launch| launch.boot_source_of(&vm.name));
        let boot = boot.unwrap_or_default();
        let spec = self.overlay_spec(vm, &path, &boot, earlier);
        overlay::check_kept(&spec)?;
        let made_over = earlier.and_then(|record| record.base.as_ref());
        overlay::check_same_base(&spec, made_over, &self.digests(), self.cancel)
    }
}
