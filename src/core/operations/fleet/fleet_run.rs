//! What `up`, `restart` and `bootstrap` do alike for the VMs of a project.
//!
//! Here: what launching takes, the project's lock and its entry in the register, the broker, and the VMs brought up
//! while the broker's events pass through. Not here: which VMs, and how each begins (the verbs), or one VM's way
//! (`operations::fleet::bring_up`).

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::already_running::warn_stale_settings;
use super::bring_up::{Fleet, LaunchContext, StartFrom, VmTask, running_records};
use super::broker_events::BrokerEvents;
use super::fleet_outcome::VmUp;
use super::stop_broker::stop_broker_if_last;
use super::{accelerator, boot_source};
use crate::core::bootstrap::keys;
use crate::core::bootstrap::overrides::Overrides;
use crate::core::broker::launcher::{self, BrokerHandle, BrokerLauncher};
use crate::core::cancel::Cancel;
use crate::core::config::{Config, VmConfig, workspace};
use crate::core::events::{Event, Severity};
use crate::core::failure::Result;
use crate::core::host::{self, FileLock};
use crate::core::name::VmName;
use crate::core::operations::lost;
use crate::core::operations::run::{self, CountedLock, Slots};
use crate::core::reporter::Emitter;
use crate::core::runtime::forwards::PortAllocator;
use crate::core::runtime::launch_plan::VmLaunchMode;

/// How long a broker may take until it listens.
const BROKER_DEADLINE: Duration = Duration::from_secs(10);

/// What bringing VMs of a project up takes, whichever verb asks for it.
pub(crate) struct FleetRun<'f, 'e> {
    pub config: &'f Config,
    /// `CASTRA_HOME`.
    pub home: &'f Path,
    pub overrides: &'f Overrides,
    pub broker: &'f dyn BrokerLauncher,
    pub emitter: &'f Emitter<'e>,
    pub cancel: &'f Cancel,
}

impl FleetRun<'_, '_> {
    /// The images of the VMs to be launched, the accelerator and the project's key: what can take minutes and
    /// needs no lock of the project. `None`: nothing is to be launched.
    pub(crate) fn prepare_launch<'c>(
        &self,
        vms: &[&VmConfig],
        qemu: PathBuf,
        cli: Option<&'c Path>,
        mode: VmLaunchMode,
        keep_disks: HashSet<VmName>,
    ) -> Result<Option<LaunchContext<'c>>> {
        let (config, cancel) = (self.config, self.cancel);
        let boot_sources = boot_source::prepare(vms, config, self.home, self.emitter, cancel)?;
        let accel = match vms.is_empty() {
            true => None,
            false => Some(accelerator::decide(
                config,
                &qemu,
                &boot_sources,
                self.home,
                self.emitter,
                cancel,
            )?),
        };
        keys::ensure_project_key(config, cancel)?;
        Ok(accel.map(|accel| LaunchContext {
            boot_sources,
            qemu,
            cli,
            mode,
            accel,
            ports: PortAllocator::new(),
            keep_disks,
        }))
    }

    /// Makes sure that a broker runs, and brings these VMs up. `tasks` hands out what each begins with; by then
    /// the broker's events on them are followed. If a VM fails and none of the project runs at the end, the broker
    /// goes again if it was started for this; its port is then none.
    pub(crate) fn bring_up<'t>(
        &self,
        project: FileLock,
        launch: Option<LaunchContext<'_>>,
        vms: &[&VmConfig],
        tasks: impl FnOnce() -> Result<Vec<VmTask<'t>>>,
    ) -> Result<(Vec<VmUp>, Option<u16>)> {
        let (config, emitter) = (self.config, self.emitter);
        let names = vms.iter().map(|vm| vm.name.key()).collect();
        let relay = BrokerEvents::from_now(&config.state.broker_events(), names);
        let tasks = tasks()?;
        relay.during(emitter, || {
            let broker = ensure_broker(config, self.broker, emitter, self.cancel)?;
            for task in &tasks {
                if let StartFrom::Running { is_news, .. } = task.from {
                    if is_news {
                        let text = "is running already";
                        emitter.emit(Event::message(Severity::Info, Some(&task.vm.name), text));
                    }
                    warn_stale_settings(config, task.vm, emitter);
                }
            }
            if let Some(launch) = &launch {
                for record in running_records(config) {
                    launch.ports.note_running(&record.forwards);
                }
            }
            let fleet = Fleet {
                config,
                home: self.home,
                overrides: self.overrides,
                emitter,
                cancel: self.cancel,
                broker_port: broker.port,
                project_lock: CountedLock::new(project, tasks.len()),
                slots: Slots::new(host::cores()),
                launch,
            };
            let vms = fleet.run(tasks);
            let failed = vms.iter().any(|vm| vm.error.is_some());
            let gone = broker.started && failed && stop_idle_broker(config, emitter);
            Ok((vms, (!gone).then_some(broker.port)))
        })
    }
}

/// The project's lock; what killed castras left is cleared, and the project is put on record.
pub(crate) fn lock_on_record(config: &Config, command: &str, emitter: &Emitter<'_>) -> Result<FileLock> {
    let project = run::lock_project(&config.project, &config.state, command)?;
    run::clear_abandoned(&config.state, config.registry.as_deref(), emitter);
    record_workspace(config, emitter)?;
    Ok(project)
}

/// Without its entry in the registry the project is found by its config alone: worth a warning.
fn record_workspace(config: &Config, emitter: &Emitter<'_>) -> Result<()> {
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

/// The broker of the project, started if none runs.
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

/// Whoever else has the project's lock now needs the broker, or stops it.
fn stop_idle_broker(config: &Config, emitter: &Emitter<'_>) -> bool {
    let project = run::lock_project(&config.project, &config.state, "castra up");
    project.is_ok_and(|_project| stop_broker_if_last(&config.state, emitter).0)
}
