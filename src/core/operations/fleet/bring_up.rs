//! One VM's way in `up`: its launch, its first proof of life, its bootstrap.
//!
//! Here: the threads of the VMs, each VM's steps in their order, and its outcome. Not here: the
//! order of things for the fleet (`operations::fleet::fleet_run`), the launch (`operations::fleet::launch_vm`), or what a
//! bootstrap does (`core::bootstrap`).

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::accelerator::KvmWatch;
use super::already_running;
use super::boot_source::{self, BootSource, BootSources};
use super::fleet_outcome::VmUp;
use super::identity::Identity;
use crate::core::bootstrap::bootstrap_plan::{self, LastLaunch};
use crate::core::bootstrap::context::{Context, Launch};
use crate::core::bootstrap::overrides::Overrides;
use crate::core::bootstrap::pipeline::{self, BootstrapError};
use crate::core::cancel::Cancel;
use crate::core::config::launched::{differing, launch_settings};
use crate::core::config::{Config, LifecycleConfig, VmConfig};
use crate::core::events::{Event, Severity};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, FileLock, LockError};
use crate::core::human;
use crate::core::images::artifact::artifact_hash;
use crate::core::name::VmName;
use crate::core::operations::run::{self, CountedLock, Slot, Slots};
use crate::core::operations::select;
use crate::core::reporter::Emitter;
use crate::core::root::alive::qemu_pid;
use crate::core::root::ending;
use crate::core::root::freshness::{OfLaunch, has_been_heard};
use crate::core::root::paths::vm_file;
use crate::core::root::records::{self, BootstrapRecord, RunRecord, ssh_port};
use crate::core::runtime::accel::Decision;
use crate::core::runtime::attached::AttachedQemu;
use crate::core::runtime::cpu_load::CpuLoad;
use crate::core::runtime::forwards::PortAllocator;
use crate::core::runtime::launch_plan::{VmLaunchMode, broker_address};
use crate::core::threads;

/// A launch slot is free again after this at the latest (docs/ARCHITECTURE.md).
const SLOT_LIMIT: Duration = Duration::from_secs(10);
/// How often the holder of a slot looks at its guest.
const POLL_INTERVAL: Duration = Duration::from_millis(25);

/// What all VMs of one `up` share.
pub(super) struct Fleet<'f, 'e> {
    pub config: &'f Config,
    /// `CASTRA_HOME`.
    pub home: &'f Path,
    pub overrides: &'f Overrides,
    pub emitter: &'f Emitter<'e>,
    pub cancel: &'f Cancel,
    pub broker_port: u16,
    pub project_lock: CountedLock,
    pub slots: Slots,
    /// What launching takes; `None` where nothing is launched.
    pub launch: Option<LaunchContext<'f>>,
}

/// What only launching takes.
pub(crate) struct LaunchContext<'f> {
    pub(super) boot_sources: BootSources,
    pub qemu: PathBuf,
    /// A castra binary, through which isolated guests reach the broker.
    pub cli: Option<&'f Path>,
    pub mode: VmLaunchMode,
    pub accel: Decision,
    pub ports: PortAllocator,
    /// VMs that keep the disks of earlier launches, whatever `persist` says.
    pub keep_disks: HashSet<VmName>,
}

impl LaunchContext<'_> {
    /// What this VM boots from.
    pub(super) fn boot_source_of(&self, vm: &VmName) -> BootSource {
        self.boot_sources.get(vm).cloned().unwrap_or_default()
    }
}

/// One VM's part.
pub(crate) struct VmTask<'f> {
    pub vm: &'f VmConfig,
    pub from: StartFrom<'f>,
}

/// Where a VM's way begins. The lock is the VM's own, held until its bootstrap has ended.
pub(crate) enum StartFrom<'f> {
    /// It runs already: a bootstrap is all. `is_news`: it was asked to be started.
    Running { lock: FileLock, is_news: bool },
    /// It doesn't run.
    Stopped(FileLock, Identity),
    /// It is stopped first if it runs; who works on it has its lock till then.
    Restart(&'f RestartPolicy<'f>),
}

/// What all VMs of one `restart` share until they are launched.
pub(crate) struct RestartPolicy<'f> {
    pub(super) lifecycle: &'f LifecycleConfig,
    pub(super) discard: bool,
    /// Held while `guests.json` is replaced: each VM has its new identity once its old QEMU is gone,
    /// so that nothing the old guest says counts for the new one.
    pub(super) issuing: Mutex<()>,
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

/// A VM that runs: its lock, its record, the slot of its launch and the handle on its QEMU if this
/// run started it.
type RunningVm<'s> = (FileLock, RunRecord, Option<Slot<'s>>, Option<AttachedQemu>);

/// Whether a VM's QEMU runs.
pub(crate) fn runs(config: &Config, vm: &VmConfig) -> bool {
    qemu_pid(&config.state.vm(&vm.name)).is_some()
}

/// The locks of these VMs, by name, as docs/ARCHITECTURE.md orders; each goes back to its VM's place.
pub(crate) fn lock_vms(config: &Config, vms: &[&VmConfig], command: &str) -> Result<Vec<FileLock>> {
    let mut by_name: Vec<usize> = (0..vms.len()).collect();
    by_name.sort_by(|a, b| vms[*a].name.cmp(&vms[*b].name));
    let mut locks: Vec<Option<FileLock>> = vms.iter().map(|_| None).collect();
    for index in by_name {
        locks[index] = Some(lock_vm(config, &vms[index].name, command)?);
    }
    Ok(locks.into_iter().flatten().collect())
}

fn lock_vm(config: &Config, vm: &VmName, command: &str) -> Result<FileLock> {
    let paths = config.state.vm(vm);
    host::ensure_private_dir(paths.dir()).map_err(|error| Failure::io("create", paths.dir(), &error))?;
    FileLock::try_take(&paths.lock(), command).map_err(|error| match error {
        LockError::Held(holder) => run::busy(&format!("vm `{vm}`"), &holder),
        LockError::Io(error) => Failure::io("create", &paths.lock(), &error),
    })
}

/// What a plan can know of a VM from its last launch, if that still runs.
pub(super) fn last_launch_of(config: &Config, vm: &VmConfig) -> LastLaunch {
    let record: Option<RunRecord> = records::load(&config.state.vm(&vm.name).run()).ok().flatten();
    match record.filter(|_| runs(config, vm)) {
        Some(record) => LastLaunch {
            ssh_port: ssh_port(&record.forwards),
            accel: Some(record.accel),
        },
        None => LastLaunch::default(),
    }
}

/// The records of all VMs of the project that run.
pub(super) fn running_records(config: &Config) -> Vec<RunRecord> {
    let names = select::launched_vms(&config.state, &[], &[]).unwrap_or_default();
    names
        .iter()
        .map(|vm| config.state.vm(vm))
        .filter(|paths| qemu_pid(paths).is_some())
        .filter_map(|paths| records::load(&paths.run()).ok().flatten())
        .collect()
}

impl<'e> Fleet<'_, 'e> {
    /// Brings all of them up, each in a thread of its own. The outcomes stand in the order of the tasks.
    pub(super) fn run(&self, tasks: Vec<VmTask<'_>>) -> Vec<VmUp> {
        thread::scope(|scope| {
            let threads: Vec<_> = tasks
                .into_iter()
                .map(|task| {
                    let name = task.vm.name.clone();
                    let thread = threads::spawn_scoped(scope, &format!("up {name}"), || self.bring_up(task));
                    (name, thread)
                })
                .collect();
            threads
                .into_iter()
                .map(|(name, thread)| match thread {
                    Ok(thread) => thread.join().unwrap_or_else(|_| panicked(name)),
                    Err(failure) => self.without_thread(&name, failure),
                })
                .collect()
        })
    }

    /// A VM whose way could not begin. Its locks went with its task.
    fn without_thread(&self, vm: &VmName, failure: Failure) -> VmUp {
        drop(self.project_lock.share());
        self.emitter
            .emit(Event::of_failure(Severity::Error, Some(vm), &failure));
        VmUp {
            error: Some(failure),
            ..VmUp::of(vm)
        }
    }

    /// Starts the VM if need be, and bootstraps it.
    fn bring_up(&self, task: VmTask<'_>) -> VmUp {
        let passage = self.project_lock.share();
        let vm = task.vm;
        let name = &vm.name;
        let mut done = VmUp::of(name);
        let began = self.begin(task, &mut done);
        drop(passage);
        let (lock, record, slot, attached) = match began {
            Ok(began) => began,
            Err(failure) => {
                self.emitter
                    .emit(Event::of_failure(Severity::Error, Some(name), &failure));
                done.error = Some(failure);
                return done;
            }
        };
        done.started = slot.is_some();
        done.attached = attached;
        done.forwards.clone_from(&record.forwards);
        done.stale_config = differing(&record.settings, &launch_settings(self.config, vm));
        let slot = Mutex::new(slot);
        let release = || drop(slot.lock().unwrap_or_else(PoisonError::into_inner).take());
        let alive = AtomicBool::new(false);
        let over = AtomicBool::new(false);
        let fault = Mutex::new(None);
        thread::scope(|scope| {
            if let Some(watch) = self.kvm_watch(vm).filter(|_| done.started) {
                let (alive, over, fault) = (&alive, &over, &fault);
                let started = threads::spawn_scoped(scope, &format!("kvm {name}"), move || {
                    watch.watch(alive, over, fault);
                });
                if let Err(failure) = started {
                    let text = format!(
                        "castra can't watch whether KVM fails this guest: {}",
                        failure.cause()
                    );
                    self.emitter
                        .emit(Event::message(Severity::Warn, Some(name), text));
                }
            }
            if done.started {
                let started = threads::spawn_scoped(scope, &format!("slot {name}"), || {
                    self.watch_start(&record, &alive);
                    release();
                });
                if started.is_err() {
                    // Nobody can tell when its start is over: the next one needn't wait for it.
                    release();
                }
            }
            // The watchers end however this is left.
            let _end = WatcherGuard(&over, &alive);
            let end = self.bootstrap(vm, &record, done.started, &fault, &|| {
                alive.store(true, Ordering::Release)
            });
            match end {
                Ok(ended) => done.bootstrap = Some(ended),
                Err(failure) => done.error = Some(failure),
            }
        });
        if done.error.is_some() {
            let record: Option<RunRecord> = records::load(&self.config.state.vm(name).run()).ok().flatten();
            done.bootstrap = record.and_then(|record| record.bootstrap);
        }
        drop(lock);
        done
    }

    /// As far as a QEMU that runs and its record.
    fn begin(&self, task: VmTask<'_>, done: &mut VmUp) -> Result<RunningVm<'_>> {
        let (lock, identity) = match task.from {
            StartFrom::Running { lock, .. } => {
                self.forget_stop(&task.vm.name);
                let record = self.running_record(&task.vm.name)?;
                already_running::unpause(self.config, task.vm, &record, self.emitter)?;
                return Ok((lock, record, None, None));
            }
            StartFrom::Stopped(lock, identity) => (lock, identity),
            StartFrom::Restart(with) => self.stop_first(task.vm, with, done)?,
        };
        let launching = self
            .launch
            .as_ref()
            .expect("a fleet with VMs to launch has what that takes");
        let started = self.launch_vm(task.vm, &lock, &identity, launching)?;
        Ok((lock, started.record, Some(started.slot), started.attached))
    }

    /// A VM that runs, and nobody has the locks of whoever was to stop it: that castra was killed.
    fn forget_stop(&self, vm: &VmName) {
        if host::remove_if_there(&self.config.state.vm(vm).stop()).unwrap_or(false) {
            let text = "the castra that was stopping the VM was killed; the VM is still running";
            self.emitter.emit(Event::message(Severity::Warn, Some(vm), text));
        }
    }

    fn kvm_watch<'w>(&'w self, vm: &'w VmConfig) -> Option<KvmWatch<'w, 'e>> {
        let launching = self.launch.as_ref()?;
        Some(KvmWatch {
            vm: &vm.name,
            paths: self.config.state.vm(&vm.name),
            home: self.home,
            qemu: &launching.qemu,
            decision: &launching.accel,
            emitter: self.emitter,
            cancel: self.cancel,
        })
    }

    fn running_record(&self, vm: &VmName) -> Result<RunRecord> {
        let path = self.config.state.vm(vm).run();
        let again = format!("castra down {vm}, then castra up {vm}");
        let record = records::load(&path).map_err(|failure| failure.advice(again.clone()))?;
        record.ok_or_else(|| {
            Failure::new(
                Exit::Io,
                format!("vm `{vm}` runs, but {} is gone", path.display()),
            )
            .because("somebody removed it, so castra doesn't know how to reach the VM")
            .advice(again)
        })
    }

    /// Returns when the VM's launch slot can be given up: at its first proof of life, when its QEMU
    /// rests or is gone, after a while, or when nobody needs slots any more.
    fn watch_start(&self, record: &RunRecord, alive: &AtomicBool) {
        let paths = self.config.state.vm(&record.vm);
        let handshake = self.config.state.handshake(&record.vm);
        let launch = OfLaunch {
            vm: &record.vm,
            since_ms: Some(record.launched_boottime_ms),
        };
        let began = Instant::now();
        let mut busy = CpuLoad::new();
        self.cancel.wait_until(SLOT_LIMIT, POLL_INTERVAL, || {
            let used = qemu_pid(&paths).and_then(host::cpu_time);
            self.project_lock.is_released()
                || alive.load(Ordering::Relaxed)
                || used.is_none_or(|used| busy.is_idle(began.elapsed(), used))
                || has_been_heard(&handshake, launch, self.config.broker.freshness)
        });
    }

    fn bootstrap(
        &self,
        vm: &VmConfig,
        record: &RunRecord,
        started_now: bool,
        fault: &Mutex<Option<String>>,
        on_alive: &(dyn Fn() + Sync),
    ) -> Result<BootstrapRecord> {
        let config = self.config;
        let known = LastLaunch {
            ssh_port: ssh_port(&record.forwards),
            accel: Some(record.accel),
        };
        let plan = bootstrap_plan::plan(vm, config, self.overrides.mode_for(vm), known);
        let paths = config.state.vm(&vm.name);
        let found_wrong = || {
            let fault = fault.lock().unwrap_or_else(PoisonError::into_inner);
            fault.clone()
        };
        let why_ended = || match ending::read(&paths) {
            _ if found_wrong().is_some() => found_wrong().unwrap_or_default(),
            Some(found) => match found.ended.last_words {
                Some(words) => format!("{} ({words}){}", found.ended.reason, likely_cause(&words, vm)),
                None => found.ended.reason,
            },
            None => host::tail_of(&paths.file(vm_file::QEMU_LOG), 512)
                .trim()
                .to_owned(),
        };
        let boot = match self
            .launch
            .as_ref()
            .and_then(|launching| launching.boot_sources.get(&vm.name))
        {
            Some(boot) => Ok(boot.clone()),
            None => boot_source::expected(vm, self.config.qemu.arch, self.home, self.cancel),
        };
        let bootstrap = &vm.bootstrap;
        let context = Context {
            vm,
            config,
            launch: Launch {
                launch_id: record.launch_id.clone(),
                launched_boottime_ms: record.launched_boottime_ms,
                started_now,
            },
            broker_address: Some(broker_address(vm.network, self.broker_port)),
            emitter: self.emitter,
            cancel: self.cancel,
            base_hash: Mutex::new(Some(Box::new(move || {
                boot_source::base_hash(&boot?, config, self.cancel)
            }))),
            artifact_hash: Mutex::new(Some(Box::new(|| {
                artifact_hash(
                    bootstrap.script.as_deref(),
                    bootstrap.payload.as_deref(),
                    &bootstrap.env,
                    bootstrap.metadata_path.as_deref(),
                )
            }))),
            why_ended: &why_ended,
            on_alive,
        };
        let what =
            |text: &str| Failure::new(Exit::Failed, format!("the bootstrap of vm `{}` {text}", vm.name));
        let outcome = pipeline::run(plan, &context);
        match outcome.end {
            Ok(record) => Ok(record),
            Err(BootstrapError::Interrupted) => {
                Err(what("was interrupted").advice("it runs again with the next castra up"))
            }
            Err(BootstrapError::Failed(error)) => {
                let failure = what("failed").because(error);
                Err(match outcome.log {
                    Some(log) => failure.advice(format!("its log is {}", log.display())),
                    None => failure,
                })
            }
        }
    }
}

/// Ends the watchers of a start when it is dropped.
struct WatcherGuard<'w>(&'w AtomicBool, &'w AtomicBool);

impl Drop for WatcherGuard<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
        if thread::panicking() {
            self.1.store(true, Ordering::Release);
        }
    }
}

/// What a guest's last words most likely come from, where castra.toml can change that.
fn likely_cause(words: &str, vm: &VmConfig) -> String {
    let short = ["deadlocked on memory", "out of memory", "Out of memory"];
    match short.iter().any(|part| words.contains(part)) {
        true => format!(
            ": {} of memory are too little for it, write more under {}`memory`",
            human::bytes(vm.memory_bytes),
            vm.place("memory")
        ),
        false => String::new(),
    }
}

fn panicked(vm: VmName) -> VmUp {
    let failure = Failure::new(
        Exit::Internal,
        format!("castra failed while it worked on vm `{vm}`"),
    )
    .because("a thread panicked")
    .advice("run it again with CASTRA_LOG=debug and report what it says");
    VmUp {
        error: Some(failure),
        ..VmUp::of(&vm)
    }
}
