//! `restart`: stops VMs that run and starts them again, with the disks they have.
//!
//! Here: the order of steps for all VMs. Not here: one VM's steps (`core::operations::fleet`), or its bootstrap
//! (`core::bootstrap`).
//!
//! The broker runs on throughout, with its port. What can fail without any VM being touched is done
//! first: plans, ports, memory, images, the accelerator. A VM is started again as soon as it has
//! stopped; a slow one delays no other.

use std::collections::HashSet;
use std::path::PathBuf;

use crate::core::bootstrap::overrides::Overrides;
use crate::core::broker::launcher::{self, BrokerLauncher};
use crate::core::cancel::Cancel;
use crate::core::config::{Config, LifecycleConfig, VmConfig};
use crate::core::events::VmCounts;
use crate::core::failure::Result;
use crate::core::name::VmName;
use crate::core::operations::fleet::{
    self, FleetRun, PreflightRequest, RestartPolicy, StartFrom, UpOutcome, VmTask, VmUp,
};
use crate::core::operations::run::{self, Operation};
use crate::core::operations::{lost, select};
use crate::core::reporter::{Emitter, Reporter};
use crate::core::runtime::launch_plan::VmLaunchMode;

/// The options of `restart`.
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
    /// Go on even if the host has too little memory.
    pub force: bool,
    /// A castra binary, as in [`UpOptions`](crate::core::operations::UpOptions).
    pub cli: Option<PathBuf>,
    /// Whose children the QEMUs are.
    pub launch_mode: VmLaunchMode,
    /// Raised to stop early: VMs whose turn hasn't come are left as they are.
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
/// [`Exit::Failed`](crate::core::failure::Exit::Failed).
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
        .filter(|vm| !fleet::runs(config, vm))
        .collect();
    let kept = kept(&options, &selected);
    let found = fleet::examine(PreflightRequest {
        config,
        home: &options.home,
        selected: &selected,
        launches: &selected,
        grows: &stopped,
        overrides: &overrides,
        cli: options.cli.as_deref(),
        keep_disks: &kept,
        cancel: &options.cancel,
    });
    let (qemu, warnings) = found.into_result(options.force)?;
    let qemu = qemu.expect("the examination of a launch finds QEMU or refuses");
    run::ensure_state_root(&config.state)?;

    let detail = (!options.vms.is_empty()).then(|| options.vms.join(" "));
    let operation = Operation::accept("restart", detail, &config.state, config.bus.rotation, reporter);
    fleet::emit_warnings(config, warnings, operation.emitter());
    match replace(&options, broker, &selected, &overrides, qemu, operation.emitter()) {
        Ok((vms, port)) => Ok(fleet::finish(operation, vms, port, &options.cancel)),
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

fn replace(
    options: &RestartOptions,
    broker: &dyn BrokerLauncher,
    selected: &[&VmConfig],
    overrides: &Overrides,
    qemu: PathBuf,
    emitter: &Emitter<'_>,
) -> Result<(Vec<VmUp>, Option<u16>)> {
    let config = &options.config;
    let fleet = FleetRun {
        config,
        home: &options.home,
        overrides,
        broker,
        emitter,
        cancel: &options.cancel,
    };
    let (cli, mode) = (options.cli.as_deref(), options.launch_mode);
    let launch = fleet.prepare_launch(selected, qemu, cli, mode, kept(options, selected))?;
    let project = fleet::lock_on_record(config, "castra restart", emitter)?;
    fleet::warn_user_networking(config, selected, emitter);
    let restarting = RestartPolicy::new(&options.lifecycle, options.discard);
    fleet.bring_up(project, launch, selected, || {
        fleet::issue_identities(config, &[])?;
        let from = || StartFrom::Restart(&restarting);
        let tasks = selected.iter().map(|vm| VmTask { vm, from: from() });
        Ok(tasks.collect())
    })
}
