//! `restart`: stops VMs that run and starts them again, with the disks they have.
//!
//! Here: the order of things for the fleet, and one VM's way until it may be launched again. Not
//! here: how a VM is stopped (`operations::fleet::stop_vm`) or launched (`operations::fleet::launch_vm`), or its
//! bootstrap (`core::bootstrap`).
//!
//! The broker runs on throughout, with its port. What can fail without any VM being touched is done
//! first: plans, ports, memory, images, the accelerator. A VM is started again as soon as it has
//! stopped; a slow one delays no other.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::core::bootstrap::keys;
use crate::core::bootstrap::overrides::Overrides;
use crate::core::broker::launcher::{self, BrokerLauncher};
use crate::core::cancel::Cancel;
use crate::core::config::{Config, LifecycleConfig, VmConfig};
use crate::core::events::endings::ShutdownEnding;
use crate::core::events::{Event, Severity, VmCounts};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, FileLock};
use crate::core::name::VmName;
use crate::core::operations::bootstrap::names_of;
use crate::core::operations::fleet::accelerator;
use crate::core::operations::fleet::boot_source::{self, BootSource};
use crate::core::operations::fleet::bring_up::{self, Fleet, LaunchContext, StartFrom, VmTask};
use crate::core::operations::fleet::broker_events::BrokerEvents;
use crate::core::operations::fleet::identity::{self, Identity};
use crate::core::operations::fleet::preflight::{self, PreflightRequest};
use crate::core::operations::fleet::stop_vm::{self, VmStopper};
use crate::core::operations::lost;
use crate::core::operations::run::{self, CountedLock, Operation, Slots};
use crate::core::operations::select;
use crate::core::operations::up::{self, UpOutcome, VmUp};
use crate::core::ports::{PortConflict, PortOwner, owners};
use crate::core::reporter::{Emitter, Reporter};
use crate::core::root::records::{self, RunRecord};
use crate::core::runtime::forwards::PortAllocator;
use crate::core::runtime::launch_plan::VmLaunchMode;
use crate::core::runtime::overlay;

/// What `restart` is asked for.
#[derive(Clone, Debug)]
pub struct RestartOptions {
    /// The project.
    pub config: Config,
    /// `CASTRA_HOME`.
    pub home: PathBuf,
    /// Names of the VMs; empty: all.
    pub vms: Vec<String>,
    /// `--bootstrap` arguments as typed.
    pub bootstrap: Vec<String>,
    /// The shutdown ladder's deadlines.
    pub lifecycle: LifecycleConfig,
    /// Begin with fresh disks, persistent ones too.
    pub discard: bool,
    /// Go on where the host has too little memory.
    pub force: bool,
    /// A castra binary, as in [`UpOptions`](up::UpOptions).
    pub cli: Option<PathBuf>,
    /// Whose children the QEMUs are.
    pub launch_mode: VmLaunchMode,
    /// Raised to stop early: VMs whose turn has not come stay as they are.
    pub cancel: Cancel,
}

impl RestartOptions {
    /// All VMs of a project, as its config says, with their disks; without a castra binary.
    pub fn new(config: Config, home: impl Into<PathBuf>) -> RestartOptions {
        RestartOptions {
            lifecycle: config.lifecycle,
            config,
            home: home.into(),
            vms: Vec::new(),
            bootstrap: Vec::new(),
            discard: false,
            force: false,
            cli: None,
            launch_mode: VmLaunchMode::default(),
            cancel: Cancel::new(),
        }
    }
}

/// Restarts VMs; one that doesn't run is just started. A failure is returned only where the
/// operation as a whole can't go on; a VM that fails is told of in the outcome, whose `exit` is then
/// [`Exit::Failed`].
pub fn restart(options: RestartOptions, reporter: &mut dyn Reporter) -> Result<UpOutcome> {
    let launcher = launcher::of_cli(options.cli.as_deref());
    restart_with_launcher(options, &*launcher, reporter)
}

/// [`restart`] with a broker launcher of the caller's.
pub fn restart_with_launcher(
    options: RestartOptions,
    broker: &dyn BrokerLauncher,
    reporter: &mut dyn Reporter,
) -> Result<UpOutcome> {
    let config = &options.config;
    let selected = select::vms_of(config, &options.vms)?;
    lost::refuse_if_running_elsewhere(config)?;
    let overrides = Overrides::parse(&options.bootstrap, config)?;
    let stopped: Vec<&VmConfig> = selected
        .iter()
        .copied()
        .filter(|vm| !bring_up::runs(config, vm))
        .collect();
    let mut conflicts = owners::conflicts(config, &stopped, &options.home);
    conflicts.extend(conflicts_of_running(config, &selected, &options.home));
    let kept = kept(&options, &selected);
    let found = preflight::examine(PreflightRequest {
        config,
        home: &options.home,
        selected: &selected,
        launches: &selected,
        grows: &stopped,
        overrides: &overrides,
        conflicts,
        cli: options.cli.as_deref(),
        keep_disks: &kept,
        cancel: &options.cancel,
    });
    let (qemu, warnings) = found.into_result(options.force)?;
    let qemu = qemu.expect("the examination of a launch finds QEMU or refuses");
    run::ensure_state_root(&config.state)?;

    let detail = (!options.vms.is_empty()).then(|| options.vms.join(" "));
    let operation = Operation::accept("restart", detail, &config.state, config.bus.rotation, reporter);
    up::emit_warnings(config, warnings, operation.emitter());
    match replace(&options, broker, &selected, &overrides, qemu, operation.emitter()) {
        Ok((vms, port)) => Ok(up::finish(operation, vms, port, &options.cancel)),
        Err(failure) => Err(operation.fail(failure, VmCounts::all_failed(selected.len()))),
    }
}

/// The VMs that keep their disks.
fn kept(options: &RestartOptions, selected: &[&VmConfig]) -> HashSet<VmName> {
    match options.discard {
        true => HashSet::new(),
        false => selected.iter().map(|vm| vm.name.clone()).collect(),
    }
}

/// Fixed ports that VMs which run are to have from now on, and somebody else has: not one of those that
/// restart too, for they may give it up.
pub(crate) fn conflicts_of_running(
    config: &Config,
    selected: &[&VmConfig],
    home: &Path,
) -> Vec<PortConflict> {
    let restarts = |owner: &PortOwner| match owner {
        PortOwner::Vm { vm, workspace, .. } => {
            *workspace == config.workspace && selected.iter().any(|other| other.name == *vm)
        }
        _ => false,
    };
    let mut conflicts = Vec::new();
    for vm in selected.iter().filter(|vm| bring_up::runs(config, vm)) {
        let record: Option<RunRecord> = records::load(&config.state.vm(&vm.name).run()).ok().flatten();
        let has = record.map(|record| record.forwards).unwrap_or_default();
        for wanted in vm.port_forwards.iter().filter(|wanted| wanted.host != 0) {
            let (port, protocol) = (wanted.host, wanted.protocol);
            if has.iter().any(|has| (has.host, has.protocol) == (port, protocol)) {
                continue;
            }
            let owner = owners::owner_of(protocol, port, Some(home)).filter(|owner| !restarts(owner));
            conflicts.extend(owner.map(|owner| PortConflict {
                vm: vm.name.clone(),
                port,
                protocol,
                owner,
            }));
        }
    }
    conflicts
}

fn replace(
    options: &RestartOptions,
    broker: &dyn BrokerLauncher,
    selected: &[&VmConfig],
    overrides: &Overrides,
    qemu: PathBuf,
    emitter: &Emitter<'_>,
) -> Result<(Vec<VmUp>, Option<u16>)> {
    let config = &options.config;
    let cancel = &options.cancel;
    let boots = boot_source::prepare(selected, config, &options.home, emitter, cancel)?;
    let accel = accelerator::decide(config, &qemu, &boots, &options.home, emitter, cancel)?;
    keys::ensure_project_key(config, cancel)?;

    let project = run::lock_project(&config.project, &config.state, "castra restart")?;
    run::clear_abandoned(&config.state, config.registry.as_deref(), emitter);
    up::record_workspace(config, emitter)?;
    up::warn_user_networking(config, selected, emitter);
    identity::issue(config, &[])?;
    let relay = BrokerEvents::from_now(&config.state.broker_events(), names_of(selected));
    relay.during(emitter, || {
        let broker = up::ensure_broker(config, broker, emitter, cancel)?;
        let ports = PortAllocator::new();
        for record in bring_up::running_records(config) {
            ports.note_running(&record.forwards);
        }
        let with = RestartPolicy::new(&options.lifecycle, options.discard);
        let tasks: Vec<VmTask<'_>> = selected
            .iter()
            .map(|vm| VmTask {
                vm,
                from: StartFrom::Restart(&with),
            })
            .collect();
        let fleet = Fleet {
            config,
            home: &options.home,
            overrides,
            emitter,
            cancel,
            broker_port: broker.port,
            project_lock: CountedLock::new(project, tasks.len()),
            slots: Slots::new(host::cores()),
            launch: Some(LaunchContext {
                boot_sources: &boots,
                qemu,
                cli: options.cli.as_deref(),
                mode: options.launch_mode,
                accel,
                ports,
                keep_disks: kept(options, selected),
            }),
        };
        Ok(up::run_fleet(&fleet, tasks, broker))
    })
}

/// What all VMs of one `restart` share until they are launched.
pub(crate) struct RestartPolicy<'f> {
    lifecycle: &'f LifecycleConfig,
    discard: bool,
    /// Held while `guests.json` is replaced: each VM has its new identity once its old QEMU is gone,
    /// so that nothing the old guest says counts for the new one.
    issuing: Mutex<()>,
}

impl<'f> RestartPolicy<'f> {
    pub(crate) fn new(lifecycle: &'f LifecycleConfig, discard: bool) -> RestartPolicy<'f> {
        RestartPolicy {
            lifecycle,
            discard,
            issuing: Mutex::new(()),
        }
    }
}

impl Fleet<'_, '_> {
    /// Stops the VM if it runs, and gives it the identity of its next launch.
    pub(crate) fn stop_first(
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
            stop_vm::discard(name, &path, self.emitter)?;
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
        let launching = self.launch.as_ref();
        let boot = launching.map_or_else(BootSource::default, |launching| {
            launching.boot_source_of(&vm.name)
        });
        let spec = self.overlay_spec(vm, &path, &boot, earlier);
        overlay::check_kept(&spec)?;
        let made_over = earlier.and_then(|record| record.base.as_ref());
        overlay::check_same_base(&spec, made_over, &self.digests(), self.cancel)
    }
}

/// After a launch that failed: the disk is still there, and `up` would begin anew.
pub(crate) fn emit_kept(emitter: &Emitter<'_>, vm: &VmConfig) {
    let name = &vm.name;
    emitter.emit(Event::advice(
        Severity::Warn,
        Some(name),
        "its disk is kept",
        format!("castra restart {name} tries again with this disk, castra up {name} starts with a fresh one"),
    ));
}
