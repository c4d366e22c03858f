//! `up`: brings the VMs of a project to life, each through overlay, QEMU, handshake and
//! bootstrap.
//!
//! Here: the order of things for the fleet. Not here: one VM's way (`operations::fleet::bring_up`), or
//! what each step does (`core::runtime`, `core::broker`, `core::bootstrap`).

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::core::bootstrap::keys;
use crate::core::bootstrap::overrides::Overrides;
use crate::core::broker::launcher::{self, BrokerHandle, BrokerLauncher};
use crate::core::cancel::Cancel;
use crate::core::config::{Config, Network, VmConfig, workspace};
use crate::core::events::endings::{BootstrapStatus, ShutdownEnding};
use crate::core::events::{BootstrapPlan, Event, Severity, VmCounts};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, Holder};
use crate::core::name::VmName;
use crate::core::operations::bootstrap::names_of;
use crate::core::operations::down;
use crate::core::operations::fleet::accelerator;
use crate::core::operations::fleet::already_running;
use crate::core::operations::fleet::boot_source;
use crate::core::operations::fleet::bring_up::{self, Fleet, LaunchContext, StartFrom, VmTask};
use crate::core::operations::fleet::broker_events::BrokerEvents;
use crate::core::operations::fleet::identity;
use crate::core::operations::fleet::preflight::{self, PreflightRequest};
use crate::core::operations::lost;
use crate::core::operations::restart::{self, RestartPolicy};
use crate::core::operations::run::{self, CountedLock, Operation, Slots};
use crate::core::operations::select;
use crate::core::operations::verdict::FleetVerdict;
use crate::core::ports::PortConflict;
use crate::core::ports::owners;
use crate::core::reporter::{Emitter, Reporter};
use crate::core::root::alive::qemu_pid;
use crate::core::root::records::{BootstrapRecord, ForwardRecord};
use crate::core::runtime::attached::AttachedQemu;
use crate::core::runtime::forwards::PortAllocator;
use crate::core::runtime::launch_plan::{GATEWAY, VmLaunchMode};

/// How long a broker may take until it listens.
const BROKER_DEADLINE: Duration = Duration::from_secs(10);

/// What `up` is asked for.
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
    /// Restart, with the disks they have, VMs that run with other settings than the config has.
    pub recreate: bool,
    /// Go on where the host has too little memory.
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

/// What `up` left behind.
#[derive(Clone, Debug, Serialize)]
pub struct UpOutcome {
    /// The VMs asked for, in config order.
    pub vms: Vec<VmUp>,
    /// The plans, each with its machine, when only a plan was asked for.
    pub plans: Vec<BootstrapPlan>,
    /// Why nothing would be started, but for ports and memory, when only a plan was asked for.
    pub refusals: Vec<Failure>,
    /// Ports that would keep VMs from starting, when only a plan was asked for.
    pub port_conflicts: Vec<PortConflict>,
    /// The broker's port; `None`: there is only a plan, or nothing runs and the broker was stopped again.
    pub broker_port: Option<u16>,
    /// What the host has too little of, when only a plan was asked for.
    pub shortage: Option<Failure>,
    /// All, some or none of the VMs are as asked for.
    pub verdict: FleetVerdict,
    /// How it all ended.
    pub exit: Exit,
    /// How long it took, ms.
    pub elapsed_ms: u64,
}

/// One VM after `up` or `bootstrap`.
#[derive(Clone, Debug, Serialize)]
pub struct VmUp {
    /// The VM.
    pub vm: VmName,
    /// How `restart` stopped it first; `None`: it didn't run, or nobody was to stop it.
    pub stopped: Option<ShutdownEnding>,
    /// This run started it; false: it ran already, or failed before it did.
    pub started: bool,
    /// Forwards as allocated.
    pub forwards: Vec<ForwardRecord>,
    /// Settings in which it runs otherwise than the config has now, by name: they take a restart.
    pub stale_config: Vec<String>,
    /// Its bootstrap, if one ran or was skipped.
    pub bootstrap: Option<BootstrapRecord>,
    /// The handle on its QEMU, if this run started it with [`VmLaunchMode::Attached`].
    #[serde(skip)]
    pub attached: Option<AttachedQemu>,
    /// Why it is not as asked for.
    pub error: Option<Failure>,
}

impl VmUp {
    /// Nothing has been done with it yet.
    pub(crate) fn of(vm: &VmName) -> VmUp {
        VmUp {
            vm: vm.clone(),
            stopped: None,
            started: false,
            forwards: Vec::new(),
            stale_config: Vec::new(),
            bootstrap: None,
            attached: None,
            error: None,
        }
    }
}

/// Brings VMs up; a missing broker is started as a process of the castra binary that the options
/// name. A failure is returned only where the operation as a whole can't go on; a VM that fails is
/// told of in the outcome, whose `exit` is then [`Exit::Failed`].
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
        .filter(|vm| !options.broker_only && !bring_up::runs(config, vm))
        .collect();
    let stale = stale_ones(&options, &selected);
    let to_launch = [missing.clone(), stale.clone()].concat();
    let found = match options.broker_only {
        true => preflight::examine_broker(config),
        false => preflight::examine(PreflightRequest {
            config,
            home: &options.home,
            selected: &selected,
            launches: &to_launch,
            grows: &missing,
            overrides: &overrides,
            conflicts: [
                owners::conflicts(config, &missing, &options.home),
                restart::conflicts_of_running(config, &stale, &options.home),
            ]
            .concat(),
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
    emit_warnings(config, warnings, operation.emitter());
    let raised = match qemu {
        None => {
            start_broker(&options, broker, operation.emitter()).map(|broker| (Vec::new(), Some(broker.port)))
        }
        Some(qemu) => raise(&options, broker, &selected, &overrides, qemu, operation.emitter()),
    };
    match raised {
        Ok((vms, port)) => Ok(finish(operation, vms, port, &options.cancel)),
        Err(failure) => Err(operation.fail(failure, VmCounts::all_failed(selected.len()))),
    }
}

/// What the config says that castra doesn't heed, and what the preflight found that stops nobody.
pub(crate) fn emit_warnings(config: &Config, found: Vec<Event>, emitter: &Emitter<'_>) {
    for warning in &config.warnings {
        emitter.emit(Event::message(Severity::Warn, None, warning.clone()));
    }
    for warning in found {
        emitter.emit(warning);
    }
}

/// Ends the operation by what became of its VMs.
pub(crate) fn finish(
    operation: Operation<'_>,
    vms: Vec<VmUp>,
    port: Option<u16>,
    cancel: &Cancel,
) -> UpOutcome {
    let exit = exit_of(&vms, cancel);
    let elapsed_ms = operation.emitter().elapsed_ms();
    let sent = operation.emitter().bytes_sent();
    let counts = count(&vms);
    operation.end(exit, failed_names(&vms), counts, sent);
    UpOutcome {
        vms,
        plans: Vec::new(),
        refusals: Vec::new(),
        port_conflicts: Vec::new(),
        shortage: None,
        verdict: FleetVerdict::of(counts.total, counts.failed),
        broker_port: port,
        exit,
        elapsed_ms,
    }
}

/// `up --broker-only`: identities without tokens, a broker, no VM.
fn start_broker(
    options: &UpOptions,
    broker: &dyn BrokerLauncher,
    emitter: &Emitter<'_>,
) -> Result<BrokerHandle> {
    let config = &options.config;
    let _project = run::lock_project(&config.project, &config.state, "castra up --broker-only")?;
    run::clear_abandoned(&config.state, config.registry.as_deref(), emitter);
    record_workspace(config, emitter)?;
    identity::open_to_all(config, |vm| {
        let paths = config.state.vm(vm);
        qemu_pid(&paths).is_some() || host::lock_holder(&paths.lock()) != Holder::Nobody
    })?;
    let relay = BrokerEvents::from_now(&config.state.broker_events(), HashSet::new());
    relay.during(emitter, || {
        ensure_broker(config, broker, emitter, &options.cancel)
    })
}

/// Without its entry in the registry the project is found by its config alone: worth a warning.
pub(crate) fn record_workspace(config: &Config, emitter: &Emitter<'_>) -> Result<()> {
    if let Some(warning) = lost::disks_left_behind(config) {
        emitter.emit(warning);
    }
    if let Some(unregistered) = workspace::record_workspace(config)? {
        emitter.emit(Event::advice(
            Severity::Warn,
            None,
            unregistered.to_string(),
            "`--workspace` and `--all` won't find this project; run castra in its folder instead",
        ));
    }
    Ok(())
}

pub(crate) fn ensure_broker(
    config: &Config,
    launcher: &dyn BrokerLauncher,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> Result<BrokerHandle> {
    let broker = launcher::ensure_broker(config, launcher, BROKER_DEADLINE, cancel)?;
    // One that was started tells so itself.
    if !broker.started {
        let text = format!(
            "broker is running on 127.0.0.1:{} (pid {})",
            broker.port, broker.pid
        );
        emitter.emit(Event::message(Severity::Info, None, text));
    }
    Ok(broker)
}

/// Brings the fleet up. If that fails and no VM of the project runs at the end, the broker goes again
/// if it was started for this; its port is then none.
pub(crate) fn run_fleet(
    fleet: &Fleet<'_, '_>,
    tasks: Vec<VmTask<'_>>,
    broker: BrokerHandle,
) -> (Vec<VmUp>, Option<u16>) {
    let vms = fleet.run(tasks);
    let failed = vms.iter().any(|vm| vm.error.is_some());
    let gone = broker.started && failed && stop_idle_broker(fleet.config, fleet.emitter);
    (vms, (!gone).then_some(broker.port))
}

/// Whoever else has the project's lock now needs the broker, or stops it.
fn stop_idle_broker(config: &Config, emitter: &Emitter<'_>) -> bool {
    let project = run::lock_project(&config.project, &config.state, "castra up");
    project.is_ok_and(|_project| down::stop_broker_if_last(&config.state, emitter).0)
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
    let cancel = &options.cancel;
    // What can take minutes comes first and needs no lock of the project.
    let missing: Vec<&VmConfig> = selected
        .iter()
        .copied()
        .filter(|vm| !bring_up::runs(config, vm))
        .collect();
    let stale = stale_ones(options, selected);
    let to_launch = [missing.clone(), stale.clone()].concat();
    let boots = boot_source::prepare(&to_launch, config, &options.home, emitter, cancel)?;
    let accel = match to_launch.is_empty() {
        true => None,
        false => Some(accelerator::decide(
            config,
            &qemu,
            &boots,
            &options.home,
            emitter,
            cancel,
        )?),
    };
    keys::ensure_project_key(config, cancel)?;

    let project = run::lock_project(&config.project, &config.state, "castra up")?;
    run::clear_abandoned(&config.state, config.registry.as_deref(), emitter);
    record_workspace(config, emitter)?;
    let is_stale = |vm: &VmConfig| stale.iter().any(|other| other.name == vm.name);
    // One to be restarted is locked once it is stopped: a bootstrap of it ends by that.
    let stay: Vec<&VmConfig> = selected.iter().copied().filter(|vm| !is_stale(vm)).collect();
    let mut locks = bring_up::lock_vms(config, &stay, "castra up")?.into_iter();
    // Asked again under the locks: another `up` may have started some since.
    let missing: Vec<&VmConfig> = missing
        .into_iter()
        .filter(|vm| !bring_up::runs(config, vm))
        .collect();
    warn_user_networking(config, &missing, emitter);
    let relay = BrokerEvents::from_now(&config.state.broker_events(), names_of(selected));
    let mut identities = identity::issue(config, &missing)?;
    relay.during(emitter, || {
        let broker = ensure_broker(config, broker, emitter, cancel)?;
        emit_already_running(config, &stay, &missing, emitter);

        let ports = PortAllocator::new();
        for record in bring_up::running_records(config) {
            ports.note_running(&record.forwards);
        }
        let lifecycle = config.lifecycle;
        let restarting = RestartPolicy::new(&lifecycle, false);
        let mut tasks: Vec<VmTask<'_>> = Vec::new();
        for vm in selected.iter().copied() {
            let way = match is_stale(vm) {
                true => StartFrom::Restart(&restarting),
                false => {
                    let lock = locks.next().expect("each that stays has a lock");
                    match identities.remove(&vm.name) {
                        Some(identity) => StartFrom::Stopped(lock, identity),
                        None => StartFrom::Running(lock),
                    }
                }
            };
            tasks.push(VmTask { vm, from: way });
        }
        let fleet = Fleet {
            config,
            home: &options.home,
            overrides,
            emitter,
            cancel,
            broker_port: broker.port,
            project_lock: CountedLock::new(project, tasks.len()),
            slots: Slots::new(host::cores()),
            launch: accel.map(|accel| LaunchContext {
                boot_sources: &boots,
                qemu,
                cli: options.cli.as_deref(),
                mode: options.launch_mode,
                accel,
                ports,
                keep_disks: stale.iter().map(|vm| vm.name.clone()).collect(),
            }),
        };
        Ok(run_fleet(&fleet, tasks, broker))
    })
}

/// What a guest on user networking can reach surprises whoever doesn't know it, and bores whoever
/// does: it is said before the first such guest of a project is launched, and never again.
/// Called before this launch is noted in `guests.json`.
pub(crate) fn warn_user_networking(config: &Config, launching: &[&VmConfig], emitter: &Emitter<'_>) {
    let is_open = |vm: &VmConfig| vm.network == Network::User;
    let open_before = config
        .vms
        .iter()
        .filter(|vm| is_open(vm))
        .map(|vm| vm.name.clone());
    if !launching.iter().any(|vm| is_open(vm)) || identity::was_launched(config, open_before) {
        return;
    }
    emitter.emit(Event::advice(
        Severity::Info,
        None,
        format!("note: these guests can reach services on your localhost, at {GATEWAY}"),
        "`network = \"isolated\"` in castra.toml keeps a guest from all but castra's broker",
    ));
}

fn emit_already_running(
    config: &Config,
    selected: &[&VmConfig],
    missing: &[&VmConfig],
    emitter: &Emitter<'_>,
) {
    for vm in selected
        .iter()
        .filter(|vm| !missing.iter().any(|other| other.name == vm.name))
    {
        emitter.emit(Event::message(
            Severity::Info,
            Some(&vm.name),
            "is running already",
        ));
        already_running::warn_stale_settings(config, vm, emitter);
    }
}

/// VMs to be restarted, because they run with other settings than the config has and that was asked for.
fn stale_ones<'c>(options: &UpOptions, selected: &[&'c VmConfig]) -> Vec<&'c VmConfig> {
    let config = &options.config;
    let is_stale = |vm: &&VmConfig| {
        bring_up::runs(config, vm) && !already_running::stale_settings(config, vm).is_empty()
    };
    match options.recreate && !options.broker_only {
        true => selected.iter().copied().filter(is_stale).collect(),
        false => Vec::new(),
    }
}

fn exit_of(vms: &[VmUp], cancel: &Cancel) -> Exit {
    if cancel.is_requested() {
        Exit::Interrupted
    } else if vms.iter().any(|vm| vm.error.is_some()) {
        Exit::Failed
    } else {
        Exit::Done
    }
}

fn failed_names(vms: &[VmUp]) -> Option<String> {
    let failed: Vec<&str> = vms
        .iter()
        .filter(|vm| vm.error.is_some())
        .map(|vm| vm.vm.as_str())
        .collect();
    (!failed.is_empty()).then(|| format!("failed: {}", failed.join(", ")))
}

/// Whether a bootstrap has done anything to its guest.
fn changes(bootstrap: &BootstrapRecord) -> bool {
    bootstrap.status != BootstrapStatus::Skipped && !bootstrap.noop
}

fn count(vms: &[VmUp]) -> VmCounts {
    let failed = vms.iter().filter(|vm| vm.error.is_some()).count();
    let changed = vms
        .iter()
        .filter(|vm| vm.error.is_none() && (vm.started || vm.bootstrap.as_ref().is_some_and(changes)))
        .count();
    VmCounts {
        total: vms.len(),
        changed,
        unchanged: vms.len() - changed - failed,
        failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::bootstrap::bootstrap_plan::tests::config_of;
    use crate::core::root::paths::StateRoot;
    use crate::core::scratch::Scratch;

    /// Launches these VMs as far as identities go; how often user networking was explained.
    fn said(config: &Config, launching: &[&str]) -> usize {
        let launching: Vec<&VmConfig> = launching.iter().map(|name| config.vm(name).unwrap()).collect();
        let mut events = Vec::new();
        warn_user_networking(config, &launching, &Emitter::new(&mut events));
        identity::issue(config, &launching).unwrap();
        events.len()
    }

    #[test]
    fn user_networking_is_explained_at_its_first_launch_alone() {
        let scratch = Scratch::new("up-user-network");
        let mut config = config_of(&["web", "db", "vault"]);
        config.state = StateRoot::new(scratch.dir());
        config.vms[2].network = Network::Isolated;
        assert_eq!(said(&config, &[]), 0, "only a broker");
        assert_eq!(said(&config, &["vault"]), 0, "an isolated guest");
        assert_eq!(said(&config, &["web", "vault"]), 1);
        assert_eq!(said(&config, &["web"]), 0);
        assert_eq!(said(&config, &["db"]), 0, "known from web");
    }
}
