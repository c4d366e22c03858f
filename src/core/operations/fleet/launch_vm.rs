//! The launch of one VM in `up`: overlay, seed, `run.json`, QEMU.
//!
//! Here: the order of these, and what is taken back when one fails. Not here: what comes before and
//! after (`operations::fleet::bring_up`), or what each of them does (`core::runtime`).

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use super::boot_source::BootSource;
use super::bring_up::{Fleet, LaunchContext};
use super::identity::Identity;
use crate::core::bootstrap::bootstrap_plan;
use crate::core::bootstrap::keys;
use crate::core::broker::protocol::heartbeat_secs;
use crate::core::config::launched::launch_settings;
use crate::core::config::{Network, VmConfig};
use crate::core::events::{Event, Severity};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, FileLock};
use crate::core::images::digest::DigestCache;
use crate::core::name::VmName;
use crate::core::operations::run::{Slot, emit_discarded};
use crate::core::reporter::{Emitter, wall_clock};
use crate::core::root::ending;
use crate::core::root::paths::{VmPaths, vm_file};
use crate::core::root::records::{self, RunPhase, RunRecord, StopRecord, ssh_port};
use crate::core::runtime::accel;
use crate::core::runtime::attached::AttachedQemu;
use crate::core::runtime::fault::LaunchError;
use crate::core::runtime::launch;
use crate::core::runtime::launch_plan::{Disk, LaunchPlan, PlannedNetwork, broker_address};
use crate::core::runtime::overlay::{self, Keep, OverlayPrepared, OverlaySpec};
use crate::core::runtime::seed::{self, SeedInputs, SeedKind};
use crate::core::time::millis;

/// A VM that was launched.
pub(super) struct LaunchedVm<'s> {
    /// Its `run.json`.
    pub record: RunRecord,
    /// The launch slot it took.
    pub slot: Slot<'s>,
    /// The handle on its QEMU, if that is our child.
    pub attached: Option<AttachedQemu>,
}

impl Fleet<'_, '_> {
    /// Everything until QEMU answers. What was made for a launch that failed is removed again.
    pub(super) fn launch_vm(
        &self,
        vm: &VmConfig,
        lock: &FileLock,
        identity: &Identity,
        with: &LaunchContext<'_>,
    ) -> Result<LaunchedVm<'_>> {
        let interrupted = || {
            Failure::new(Exit::Interrupted, format!("vm `{}` was not started", vm.name))
                .because("interrupted before its turn")
        };
        let slot = self.slots.take(self.cancel).ok_or_else(interrupted)?;
        let paths = self.config.state.vm(&vm.name);
        let earlier: Option<RunRecord> = records::load(&paths.run()).ok().flatten();
        self.clear_leftovers(vm, &paths, earlier.as_ref())?;
        let boot = with.boot_source_of(&vm.name);
        if vm.overlay.is_none() {
            // On record before it is there, so that `down` finds it whatever ends this castra. An
            // overlay elsewhere is put on record once it is made: till then the file there, if any,
            // isn't castra's to discard.
            let path = self.config.state.overlay(&vm.name);
            let mut record = self.record_of(vm, identity, with, &path);
            record.base = earlier.as_ref().and_then(|record| record.base.clone());
            save_launch_record(&paths, &record)?;
        }
        let overlay = self.make_overlay(vm, lock, &boot, earlier.as_ref())?;
        let launched = self.start_qemu(vm, lock, identity, with, &overlay.path, earlier.as_ref());
        if launched.is_err() && !vm.persist {
            match overlay.reused {
                true => emit_kept(self.emitter, vm),
                false => self.discard_new_overlay(&vm.name, &overlay.path),
            }
        }
        let (record, attached) = launched?;
        Ok(LaunchedVm {
            record,
            slot,
            attached,
        })
    }

    /// Removes the overlay of a launch that failed, and says so.
    fn discard_new_overlay(&self, vm: &VmName, overlay: &Path) {
        match overlay::discard_overlay(overlay) {
            Ok(bytes) => emit_discarded(self.emitter, vm, overlay, bytes),
            Err(failure) => self
                .emitter
                .emit(Event::of_failure(Severity::Warn, Some(vm), &failure)),
        }
    }

    /// Says what the last launch came to if it wasn't `down` that ended it, and makes sure that a
    /// fresh disk meets no host key of the one before.
    fn clear_leftovers(&self, vm: &VmConfig, paths: &VmPaths, earlier: Option<&RunRecord>) -> Result<()> {
        let stop: Option<StopRecord> = records::load(&paths.stop()).ok().flatten();
        let unexplained = earlier.is_some_and(|record| {
            let meant = stop.is_some_and(|stop| stop.launch_id == record.launch_id);
            !meant && record.boot_id == *host::boot_id()
        });
        if let Some(found) = unexplained.then(|| ending::read(paths)).flatten() {
            self.emitter.emit(Event::VmExited {
                vm: vm.name.clone(),
                pid: None,
                reason: found.ended.reason,
                outcome: found.outcome.into(),
                last_words: found.ended.last_words,
                qemu_words: found.ended.qemu_words,
                // It is being started again.
                remediation: None,
            });
        }
        // A fresh disk brings fresh host keys. ssh would make the file readable by everybody.
        let known = paths.file(vm_file::KNOWN_HOSTS);
        let keeps = self.keep_of(vm, &self.overlay_of(vm), earlier) != Keep::Nothing;
        if !(keeps && host::is_there(&self.overlay_of(vm)) && host::is_there(&known)) {
            host::replace_file(&known, b"").map_err(|error| Failure::io("create", &known, &error))?;
        }
        Ok(())
    }

    /// Where a VM's overlay lies, as the config says.
    pub(super) fn overlay_of(&self, vm: &VmConfig) -> PathBuf {
        vm.overlay
            .clone()
            .unwrap_or_else(|| self.config.state.overlay(&vm.name))
    }

    /// The overlay that a VM should have at `path`; `earlier` is its last launch.
    pub(super) fn overlay_spec<'s>(
        &self,
        vm: &VmConfig,
        path: &'s Path,
        boot: &'s BootSource,
        earlier: Option<&RunRecord>,
    ) -> OverlaySpec<'s> {
        OverlaySpec {
            path,
            base: boot.base.as_ref(),
            disk_size: vm.disk_size,
            keep: self.keep_of(vm, path, earlier),
            ours: is_made_by_castra(vm, path, earlier),
            lock: None,
        }
    }

    /// Who keeps what an earlier launch left. A restart keeps what castra made, whatever ended it.
    fn keep_of(&self, vm: &VmConfig, path: &Path, earlier: Option<&RunRecord>) -> Keep {
        let restarts = self
            .launch
            .as_ref()
            .is_some_and(|launching| launching.keep_disks.contains(&vm.name));
        keep_of(vm, path, earlier, restarts)
    }

    fn make_overlay(
        &self,
        vm: &VmConfig,
        lock: &FileLock,
        boot: &BootSource,
        earlier: Option<&RunRecord>,
    ) -> Result<OverlayPrepared> {
        let path = self.overlay_of(vm);
        if let Some(dir) = path.parent() {
            host::ensure_private_dir(dir).map_err(|error| Failure::io("create", dir, &error))?;
        }
        let began = Instant::now();
        let mut spec = self.overlay_spec(vm, &path, boot, earlier);
        spec.lock = Some(lock);
        let left = host::is_there(&path).then(|| host::disk_usage(&path));
        let made_over = earlier.and_then(|record| record.base.as_ref());
        overlay::check_same_base(&spec, made_over, &self.digests(), self.cancel)?;
        let prepared = overlay::ensure_overlay(&spec, self.cancel)?;
        // What a crashed guest has left makes room for a fresh disk.
        if let Some(bytes) = left.filter(|_| !prepared.reused) {
            emit_discarded(self.emitter, &vm.name, &path, bytes);
        }
        self.emitter.emit(Event::OverlayPrepared {
            vm: vm.name.clone(),
            path: prepared.path.clone(),
            base: prepared.base.clone(),
            reused: prepared.reused,
            elapsed_ms: millis(began.elapsed()),
        });
        Ok(prepared)
    }

    /// Seed, `run.json`, QEMU, in this order: whatever ends castra, the next command finds what it began.
    fn start_qemu(
        &self,
        vm: &VmConfig,
        lock: &FileLock,
        identity: &Identity,
        with: &LaunchContext<'_>,
        overlay: &Path,
        earlier: Option<&RunRecord>,
    ) -> Result<(RunRecord, Option<AttachedQemu>)> {
        let began = Instant::now();
        let paths = self.config.state.vm(&vm.name);
        let seed = self.write_seed(vm, identity, &paths)?;
        let last_time = earlier.map_or(&[][..], |record| &record.forwards);
        let mut plan = self.launch_plan(vm, with, &seed, overlay)?;
        let mut record = self.record_of(vm, identity, with, overlay);
        record.base = overlay::base_record(with.boot_source_of(&vm.name).base.as_ref(), &self.digests());
        let launched = launch::launch_with_ports(
            &mut plan,
            &with.ports,
            &vm.port_forwards,
            last_time,
            Some(lock),
            self.cancel,
            |plan| {
                record.forwards.clone_from(&plan.forwards);
                record.ssh = bootstrap_plan::ssh_plan(vm, self.config, ssh_port(&plan.forwards));
                save_launch_record(&paths, &record)
            },
        )
        .map_err(|error| {
            if let LaunchError::InternalError(words) = &error {
                accel::note_failure(self.home, &with.qemu, words, self.cancel);
            }
            let blamed = error.blames(&vm.qemu_args);
            let failure = error.into_failure(&vm.name);
            match blamed {
                // What QEMU named stands in castra.toml.
                Some(index) => failure.advice(format!(
                    "{}correct `{}` under `qemu_args`",
                    vm.place(&format!("qemu_args.{index}")),
                    vm.qemu_args[index]
                )),
                None => failure,
            }
        })?;
        record.phase = RunPhase::Running;
        records::save(&paths.run(), &record)?;
        self.emitter.emit(Event::VmLaunched {
            vm: vm.name.clone(),
            pid: launched.pid,
            accel: record.accel,
            accel_reason: record.accel_reason.clone(),
            elapsed_ms: millis(began.elapsed()),
        });
        Ok((record, launched.attached))
    }

    fn write_seed(&self, vm: &VmConfig, identity: &Identity, paths: &VmPaths) -> Result<seed::Seed> {
        let keys = keys::public_key(vm, self.config, self.cancel)?;
        let inputs = SeedInputs {
            vm: &vm.name,
            launch_id: identity.launch_id.as_str(),
            broker: &broker_address(vm.network, self.broker_port),
            token: identity.token.as_deref(),
            heartbeat_secs: heartbeat_secs(self.config.broker.freshness, self.config.bus.session_idle),
            authorized_keys: &keys,
            user: &vm.ssh.user,
            mounts: &vm.mounts,
            user_data: vm.user_data.as_deref(),
        };
        seed::write_seed(SeedKind::of(vm), &paths.seed(), &inputs)
    }

    /// What is known of images.
    pub(super) fn digests(&self) -> DigestCache {
        DigestCache::new(self.config.state.images())
    }

    fn record_of(
        &self,
        vm: &VmConfig,
        identity: &Identity,
        with: &LaunchContext<'_>,
        overlay: &Path,
    ) -> RunRecord {
        RunRecord {
            vm: vm.name.clone(),
            role: vm.role.clone(),
            launch_id: identity.launch_id.clone(),
            phase: RunPhase::Starting,
            // Not when its identity was given out: in a large fleet a VM waits long for its turn, and
            // the guest's deadlines count from here.
            launched_boottime_ms: host::boottime_ms(),
            launched_at: wall_clock(SystemTime::now()),
            boot_id: host::boot_id().clone(),
            accel: with.accel.accel,
            accel_reason: with.accel.reason.clone(),
            cpus: vm.cpus,
            memory_bytes: vm.memory_bytes,
            forwards: Vec::new(),
            ssh: bootstrap_plan::ssh_plan(vm, self.config, None),
            overlay: Some(overlay.to_owned()),
            persist: vm.persist,
            base: None,
            bootstrap: None,
            settings: launch_settings(self.config, vm),
        }
    }

    fn launch_plan(
        &self,
        vm: &VmConfig,
        with: &LaunchContext<'_>,
        seed: &seed::Seed,
        overlay: &Path,
    ) -> Result<LaunchPlan> {
        let network = match vm.network {
            Network::User => PlannedNetwork::User,
            Network::Isolated => PlannedNetwork::Isolated {
                broker_pipe: vec![
                    with.cli.ok_or_else(|| no_cli_for(&vm.name))?.into(),
                    "broker-pipe".into(),
                    self.broker_port.to_string().into(),
                ],
            },
        };
        Ok(LaunchPlan {
            vm: vm.name.clone(),
            dir: self.config.state.vm(&vm.name).dir().to_owned(),
            arch: self.config.qemu.arch,
            binary: with.qemu.clone(),
            accel: with.accel.accel,
            cpus: vm.cpus,
            memory_bytes: vm.memory_bytes,
            kernel: with.boot_source_of(&vm.name).kernel,
            disk: Some(Disk {
                path: overlay.to_owned(),
                persist: vm.persist,
            }),
            seed_dir: seed.nocloud_dir.clone(),
            network,
            forwards: Vec::new(),
            fw_cfg: seed.fw_cfg.clone(),
            mounts: vm.mounts.clone(),
            qemu_args: vm.qemu_args.clone(),
            mode: with.mode,
        })
    }
}

/// Who keeps what an earlier launch left at `path`; `restarts`: castra does, whatever `persist` says.
pub(super) fn keep_of(vm: &VmConfig, path: &Path, earlier: Option<&RunRecord>, restarts: bool) -> Keep {
    match (vm.persist, restarts && is_made_by_castra(vm, path, earlier)) {
        (true, _) => Keep::Persist,
        (false, true) => Keep::Restart,
        (false, false) => Keep::Nothing,
    }
}

/// From now on this launch is the VM's last one. What QEMU said of the launch before goes first, so
/// that it is never read as said of this one; that the one before was meant to stop goes last, so that
/// whoever reads the old record finds it. Until here a launch that fails leaves the old story whole.
fn save_launch_record(paths: &VmPaths, record: &RunRecord) -> Result<()> {
    let log = paths.file(vm_file::QMP_LOG);
    let emptied = host::private_file()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&log);
    emptied.map_err(|error| Failure::io("create", &log, &error))?;
    records::save(&paths.run(), record)?;
    let stop = paths.stop();
    host::remove_if_there(&stop).map_err(|error| Failure::io("remove", &stop, &error))?;
    Ok(())
}

/// Whether castra made what lies at `path`: it is the default place, or the last launch's record
/// names it.
pub(super) fn is_made_by_castra(vm: &VmConfig, path: &Path, earlier: Option<&RunRecord>) -> bool {
    vm.overlay.is_none() || earlier.is_some_and(|record| record.overlay.as_deref() == Some(path))
}

/// An isolated guest reaches the broker through a program that QEMU runs, and none was named.
pub(super) fn no_cli_for(vm: &VmName) -> Failure {
    Failure::new(Exit::Usage, format!("vm `{vm}` can't be isolated"))
        .because("QEMU runs `castra broker-pipe` for it, and no castra binary was given")
        .advice("give the path of one in `UpOptions::cli`, or set `network = \"user\"`")
}

/// After a launch that failed: the disk is still there, and `up` would begin anew.
fn emit_kept(emitter: &Emitter<'_>, vm: &VmConfig) {
    let name = &vm.name;
    emitter.emit(Event::advice(
        Severity::Warn,
        Some(name),
        "its disk is kept",
        format!("castra restart {name} tries again with this disk, castra up {name} starts with a fresh one"),
    ));
}
