//! `up`: brings the VMs of a project to life, each through overlay, QEMU, handshake and
//! bootstrap.
//!
//! Here: the order of steps for all VMs. Not here: one VM's steps (`core::operations::fleet`), or what
//! each step does (`core::runtime`, `core::broker`, `core::bootstrap`).

use std::collections::HashSet;
use std::path::PathBuf;

use crate::core::bootstrap::overrides::Overrides;
use crate::core::broker::launcher::{self, BrokerHandle, BrokerLauncher};
use crate::core::cancel::Cancel;
use crate::core::config::{Config, VmConfig};
use crate::core::events::VmCounts;
use crate::core::failure::Result;
use crate::core::host::{self, Holder};
use crate::core::operations::fleet::{
    self, BrokerEvents, FleetRun, PreflightRequest, RestartPolicy, StartFrom, VmTask,
};
pub use crate::core::operations::fleet::{UpOutcome, VmUp};
use crate::core::operations::run::{self, Operation};
use crate::core::operations::{lost, select};
use crate::core::reporter::{Emitter, Reporter};
use crate::core::root::alive::qemu_pid;
use crate::core::runtime::launch_plan::VmLaunchMode;

/// The options of `up`.
#[derive(Clone, Debug)]
pub struct UpOptions {
    /// The project.
    pub config: Config,
    /// `CASTRA_HOME`: where images and answers shared by all projects are kept.
    pub home: PathBuf,
    /// Names of the VMs; empty: all.
    pub vms: Vec<String>,
    /// `--bootstrap` arguments as typed: `MODE` or `VM=MODE[,VM=MODE…]`.
    pub bootstrap: Vec<String>,
    /// Restart VMs that run with other settings than the config has; they keep their disks.
    pub recreate: bool,
    /// Go on even if the host has too little memory.
    pub force: bool,
    /// Say what would happen, touch nothing.
    pub plan: bool,
    /// Write `guests.json`, start the broker, no VM.
    pub broker_only: bool,
    /// A castra binary: [`up`] starts a missing broker by it, and isolated guests reach the broker
    /// through it. castra never looks for one: what runs as `current_exe` is the embedder's program.
    pub cli: Option<PathBuf>,
    /// Whose children the QEMUs are.
    pub launch_mode: VmLaunchMode,
    /// Raised to stop early.
    pub cancel: Cancel,
}

impl UpOptions {
    /// All VMs of a project, as its config says; without a castra binary.
    pub fn new(config: Config, home: impl Into<PathBuf>) -> UpOptions {
        UpOptions {
            config,
            home: home.into(),
            vms: Vec::new(),
            bootstrap: Vec::new(),
            recreate: false,
            force: false,
            plan: false,
            broker_only: false,
            cli: None,
            launch_mode: VmLaunchMode::default(),
            cancel: Cancel::new(),
        }
    }
}

/// Brings VMs up; a missing broker is started as a process of the castra binary that the options
/// name. A failure is returned only where the operation as a whole can't go on; a VM that fails is
/// told of in the outcome, whose `exit` is then [`Exit::Failed`](crate::core::failure::Exit::Failed).
pub fn up(options: UpOptions, reporter: &mut dyn Reporter) -> Result<UpOutcome> {
    let launcher = launcher::of_cli(options.cli.as_deref());
    up_with_launcher(options, &*launcher, reporter)
}

/// [`up`] with a broker launcher of the caller's, such as one that runs the broker in a thread.
pub fn up_with_launcher(
    options: UpOptions,
    broker: &dyn BrokerLauncher,
    reporter: &mut dyn Reporter,
) -> Result<UpOutcome> {
    let config = &options.config;
    let selected = select::vms_of(config, &options.vms)?;
    lost::refuse_if_running_elsewhere(config)?;
    let overrides = Overrides::parse(&options.bootstrap, config)?;
    let missing: Vec<&VmConfig> = selected
        .iter()
        .copied()
        .filter(|vm| !options.broker_only && !fleet::runs(config, vm))
        .collect();
    let stale = stale_ones(&options, &selected);
    let to_launch = [missing.clone(), stale.clone()].concat();
    let found = match options.broker_only {
        true => fleet::examine_broker(config),
        false => fleet::examine(PreflightRequest {
            config,
            home: &options.home,
            selected: &selected,
            launches: &to_launch,
            grows: &missing,
            overrides: &overrides,
            cli: options.cli.as_deref(),
            keep_disks: &stale.iter().map(|vm| vm.name.clone()).collect(),
            cancel: &options.cancel,
        }),
    };
    if options.plan {
        return Ok(found.into_plan(config, options.force, reporter));
    }
    let (qemu, warnings) = found.into_result(options.force)?;
    run::ensure_state_root(&config.state)?;

    let detail = (!options.vms.is_empty()).then(|| options.vms.join(" "));
    let operation = Operation::accept("up", detail, &config.state, config.bus.rotation, reporter);
    fleet::emit_warnings(config, warnings, operation.emitter());
    let raised = match qemu {
        None => {
            start_broker(&options, broker, operation.emitter()).map(|broker| (Vec::new(), Some(broker.port)))
        }
        Some(qemu) => raise(&options, broker, &selected, &overrides, qemu, operation.emitter()),
    };
    match raised {
        Ok((vms, port)) => Ok(fleet::finish(operation, vms, port, &options.cancel)),
        Err(failure) => Err(operation.fail(failure, VmCounts::all_failed(selected.len()))),
    }
}

/// `up --broker-only`: identities without tokens, a broker, no VM.
fn start_broker(
    options: &UpOptions,
    broker: &dyn BrokerLauncher,
    emitter: &Emitter<'_>,
) -> Result<BrokerHandle> {
    let config = &options.config;
    let _project = fleet::lock_on_record(config, "castra up --broker-only", emitter)?;
    fleet::open_to_all(config, |vm| {
        let paths = config.state.vm(vm);
        qemu_pid(&paths).is_some() || host::lock_holder(&paths.lock()) != Holder::Nobody
    })?;
    let relay = BrokerEvents::from_now(&config.state.broker_events(), HashSet::new());
    relay.during(emitter, || {
        fleet::ensure_broker(config, broker, emitter, &options.cancel)
    })
}

/// Everything that makes something: images, keys, identities, the broker, the VMs.
fn raise(
    options: &UpOptions,
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
    let stopped = |vm: &&VmConfig| !fleet::runs(config, vm);
    let missing: Vec<&VmConfig> = selected.iter().copied().filter(stopped).collect();
    let stale = stale_ones(options, selected);
    let launch = fleet.prepare_launch(
        &[missing.clone(), stale.clone()].concat(),
        qemu,
        options.cli.as_deref(),
        options.launch_mode,
        stale.iter().map(|vm| vm.name.clone()).collect(),
    )?;
    let project = fleet::lock_on_record(config, "castra up", emitter)?;
    let is_stale = |vm: &VmConfig| stale.iter().any(|other| other.name == vm.name);
    // One to be restarted is locked once it is stopped: a bootstrap of it ends by that.
    let stay: Vec<&VmConfig> = selected.iter().copied().filter(|vm| !is_stale(vm)).collect();
    let mut locks = fleet::lock_vms(config, &stay, "castra up")?.into_iter();
    // Asked again under the locks: another `up` may have started some since.
    let missing: Vec<&VmConfig> = missing.into_iter().filter(stopped).collect();
    fleet::warn_user_networking(config, &missing, emitter);
    let lifecycle = config.lifecycle;
    let restarting = RestartPolicy::new(&lifecycle, false);
    fleet.bring_up(project, launch, selected, || {
        let mut identities = fleet::issue_identities(config, &missing)?;
        let tasks = selected.iter().copied().map(|vm| {
            if is_stale(vm) {
                let from = StartFrom::Restart(&restarting);
                return VmTask { vm, from };
            }
            let lock = locks.next().expect("each that stays has a lock");
            let from = match identities.remove(&vm.name) {
                Some(identity) => StartFrom::Stopped(lock, identity),
                None => StartFrom::Running { lock, is_news: true },
            };
            VmTask { vm, from }
        });
        Ok(tasks.collect())
    })
}

/// VMs to be restarted, because they run with other settings than the config has and that was asked for.
fn stale_ones<'c>(options: &UpOptions, selected: &[&'c VmConfig]) -> Vec<&'c VmConfig> {
    let config = &options.config;
    let is_stale = |vm: &&VmConfig| fleet::runs(config, vm) && !fleet::stale_settings(config, vm).is_empty();
    match options.recreate && !options.broker_only {
        true => selected.iter().copied().filter(is_stale).collect(),
        false => Vec::new(),
    }
}
