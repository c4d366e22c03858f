//! `bootstrap`: runs the pipeline again on VMs that run, without restarting them.
//!
//! Here: which VMs, and the order of things. Not here: the pipeline (`core::bootstrap`), or one
//! VM's way through it (`core::operations::fleet`, which `up` shares).

use std::path::PathBuf;

use crate::core::bootstrap::overrides::Overrides;
use crate::core::broker::launcher::{self, BrokerLauncher};
use crate::core::cancel::Cancel;
use crate::core::config::{Config, VmConfig};
use crate::core::events::VmCounts;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::operations::fleet::{self, FleetRun, StartFrom, UpOutcome, VmTask, VmUp};
use crate::core::operations::lost;
use crate::core::operations::run::{self, Operation};
use crate::core::operations::select;
use crate::core::reporter::{Emitter, Reporter};
use crate::core::root::alive::find_qemu_pid;
use crate::core::runtime::restart_advice;

/// The options of `bootstrap`.
#[derive(Clone, Debug)]
pub struct BootstrapOptions {
    /// The project.
    pub config: Config,
    /// `CASTRA_HOME`.
    pub home: PathBuf,
    /// Names of the VMs; empty: all that run.
    pub vms: Vec<String>,
    /// `--bootstrap` arguments as typed.
    pub bootstrap: Vec<String>,
    /// Say what would happen, touch nothing.
    pub plan: bool,
    /// A castra binary, by which [`bootstrap`] starts a missing broker.
    pub cli: Option<PathBuf>,
    /// Raised to stop early.
    pub cancel: Cancel,
}

impl BootstrapOptions {
    /// All running VMs of a project, as its config says; without a castra binary.
    pub fn new(config: Config, home: impl Into<PathBuf>) -> BootstrapOptions {
        BootstrapOptions {
            config,
            home: home.into(),
            vms: Vec::new(),
            bootstrap: Vec::new(),
            plan: false,
            cli: None,
            cancel: Cancel::new(),
        }
    }
}

/// Bootstraps running VMs. A VM that was named and doesn't run is refused before anything starts.
pub fn bootstrap(options: BootstrapOptions, reporter: &mut dyn Reporter) -> Result<UpOutcome> {
    let launcher = launcher::of_cli(options.cli.as_deref());
    bootstrap_with_launcher(options, &*launcher, reporter)
}

/// [`bootstrap`] with a broker launcher of the caller's.
pub fn bootstrap_with_launcher(
    options: BootstrapOptions,
    broker: &dyn BrokerLauncher,
    reporter: &mut dyn Reporter,
) -> Result<UpOutcome> {
    let config = &options.config;
    let mut selected = select::vms_of(config, &options.vms)?;
    lost::refuse_if_running_elsewhere(config)?;
    let overrides = Overrides::parse(&options.bootstrap, config)?;
    refuse_stopped(config, &selected, &options.vms)?;
    selected.retain(|vm| fleet::runs(config, vm));
    let found = fleet::examine_bootstrap(config, &selected, &overrides);
    if options.plan {
        return Ok(found.into_plan(config, false, reporter));
    }
    let (_, warnings) = found.into_result(false)?;

    let detail = (!options.vms.is_empty()).then(|| options.vms.join(" "));
    let operation = Operation::accept("bootstrap", detail, &config.state, config.bus.rotation, reporter);
    fleet::emit_warnings(config, warnings, operation.emitter());
    match run_again(&options, broker, &selected, &overrides, operation.emitter()) {
        Ok((vms, port)) => Ok(fleet::finish(operation, vms, port, &options.cancel)),
        Err(failure) => Err(operation.fail(failure, VmCounts::all_failed(selected.len()))),
    }
}

fn run_again(
    options: &BootstrapOptions,
    broker: &dyn BrokerLauncher,
    selected: &[&VmConfig],
    overrides: &Overrides,
    emitter: &Emitter<'_>,
) -> Result<(Vec<VmUp>, Option<u16>)> {
    let config = &options.config;
    let project = run::lock_project(&config.project, &config.state, "castra bootstrap")?;
    run::clear_abandoned(&config.state, config.registry.as_deref(), emitter);
    let locks = fleet::lock_vms(config, selected, "castra bootstrap")?;
    let fleet = FleetRun {
        config,
        home: &options.home,
        overrides,
        broker,
        emitter,
        cancel: &options.cancel,
    };
    fleet.bring_up(project, None, selected, || {
        let tasks = selected.iter().zip(locks).map(|(vm, lock)| VmTask {
            vm,
            from: StartFrom::Running { lock, is_news: false },
        });
        Ok(tasks.collect())
    })
}

fn refuse_stopped(config: &Config, selected: &[&VmConfig], named: &[String]) -> Result<()> {
    // A VM whose state can't be read doesn't count as stopped.
    for vm in selected {
        find_qemu_pid(&config.state.vm(&vm.name))?;
    }
    let stopped: Vec<&str> = selected
        .iter()
        .filter(|vm| !fleet::runs(config, vm))
        .map(|vm| vm.name.as_str())
        .collect();
    let nothing_runs = stopped.len() == selected.len();
    if stopped.is_empty() || (named.is_empty() && !nothing_runs) {
        return Ok(());
    }
    let what = if named.is_empty() {
        format!("no VM of project `{}` runs", config.project)
    } else {
        format!("not running: {}", stopped.join(", "))
    };
    let has_disk = |vm: &&VmConfig| restart_advice::restart_keeps_more(&config.state.vm(&vm.name));
    let with_disks: Vec<&str> = selected
        .iter()
        .filter(|vm| !fleet::runs(config, vm) && has_disk(vm))
        .map(|vm| vm.name.as_str())
        .collect();
    let next = if !with_disks.is_empty() {
        format!(
            "castra restart {} starts the VMs that have run before, with their disks; castra up starts them with fresh disks",
            with_disks.join(" ")
        )
    } else if named.is_empty() {
        "castra up".to_owned()
    } else {
        format!("castra up {}", stopped.join(" "))
    };
    Err(Failure::new(Exit::Failed, what)
        .because("a bootstrap needs a running VM")
        .advice(next))
}
