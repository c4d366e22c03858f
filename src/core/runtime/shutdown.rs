//! Stopping a VM: by the power button or over ssh, by SIGTERM, by SIGKILL.
//!
//! Here: these three steps in this order, each with its deadline and its events. Not here:
//! `stop.json`, locks, overlays (`core::operations`), how a VM ended that wasn't stopped
//! (`root::ending`).

use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::core::cancel::{Cancel, POLL_INTERVAL};
use crate::core::config::LifecycleConfig;
use crate::core::events::Event;
use crate::core::events::endings::ShutdownEnding;
use crate::core::failure::Result;
use crate::core::host;
use crate::core::name::VmName;
use crate::core::reporter::Emitter;
use crate::core::root::paths::VmPaths;

use super::launch::gone_within;
use super::qmp::Qmp;
use crate::core::root::alive::qemu_pid;
use crate::core::root::qemu_process::{clear_leftovers, signal_qemu};
use crate::core::threads::{self, CancelOnDrop};
use crate::core::time::millis;

/// How the guest is asked, the first step.
#[derive(Clone, Copy)]
pub enum PowerOff<'a> {
    /// By its power button.
    Button,
    /// Its kernel has none: by this, which runs a command over ssh until it is done, the time is
    /// over or the flag is raised.
    Ssh(PowerOffCommand<'a>),
}

/// Asks the guest, and ends when the time is over or the flag is raised.
pub type PowerOffCommand<'a> = &'a (dyn Fn(Duration, &Cancel) -> Result<()> + Sync);

/// [`PowerOff::Ssh`] in events.
pub const SSH_POWEROFF: &str = "ssh-poweroff";

impl PowerOff<'_> {
    /// The word in events.
    fn as_str(self) -> &'static str {
        match self {
            PowerOff::Button => "qmp-system-powerdown",
            PowerOff::Ssh(_) => SSH_POWEROFF,
        }
    }
}

/// How long QMP may take to answer; part of the first step's deadline.
const QMP_LIMIT: Duration = Duration::from_secs(2);
/// How often the power button is pressed again: a guest that was still booting didn't notice it.
const PRESS_AGAIN: Duration = Duration::from_secs(3);
/// How long QEMU's process may take to end after its pid file is gone.
const LAST_MOMENT: Duration = Duration::from_secs(2);

/// The result of a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownOutcome {
    /// How.
    pub ending: ShutdownEnding,
    /// How long it took.
    pub elapsed: Duration,
    /// Whether a running VM was stopped.
    pub changed: bool,
}

/// Stops a VM's QEMU and removes its sockets. A second request to stop skips the remaining waits
/// and goes straight to SIGKILL.
pub fn shutdown(
    vm: &VmName,
    paths: &VmPaths,
    power_off: PowerOff<'_>,
    lifecycle: &LifecycleConfig,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> ShutdownOutcome {
    let ladder = Ladder {
        vm,
        paths,
        power_off,
        lifecycle,
        emitter,
        cancel,
        began: Instant::now(),
    };
    let pid = qemu_pid(paths);
    let ending = ladder.descend();
    clear_leftovers(paths);
    if let Some(pid) = pid.filter(|_| ending != ShutdownEnding::Failed) {
        wait_for_end(pid);
    }
    let outcome = ShutdownOutcome {
        ending,
        elapsed: ladder.began.elapsed(),
        changed: !matches!(ending, ShutdownEnding::AlreadyStopped | ShutdownEnding::Failed),
    };
    emitter.emit(Event::ShutdownComplete {
        vm: vm.clone(),
        outcome: ending.into(),
        elapsed_ms: millis(outcome.elapsed),
        changed: outcome.changed,
    });
    outcome
}

/// QEMU removes its pid file before it ends, but keeps its ports until it has ended, and the next
/// launch needs them.
fn wait_for_end(pid: u32) {
    const EVERY: Duration = Duration::from_millis(1);
    Cancel::new().wait_until(LAST_MOMENT, EVERY, || !host::has_descriptors(pid));
}

struct Ladder<'a, 'e> {
    vm: &'a VmName,
    paths: &'a VmPaths,
    power_off: PowerOff<'a>,
    lifecycle: &'a LifecycleConfig,
    emitter: &'a Emitter<'e>,
    cancel: &'a Cancel,
    began: Instant,
}

impl Ladder<'_, '_> {
    fn descend(&self) -> ShutdownEnding {
        let Some(pid) = qemu_pid(self.paths) else {
            return ShutdownEnding::AlreadyStopped;
        };
        self.emitter.emit(Event::ShutdownRequested {
            vm: self.vm.clone(),
            pid,
        });
        if self.power_down() {
            return ShutdownEnding::Graceful;
        }
        for (signal, wait, ending) in [
            (
                Signal::SIGTERM,
                self.lifecycle.sigterm_wait,
                ShutdownEnding::Terminated,
            ),
            (
                Signal::SIGKILL,
                self.lifecycle.sigkill_wait,
                ShutdownEnding::Killed,
            ),
        ] {
            if signal == Signal::SIGTERM && self.is_impatient() {
                continue;
            }
            if self.escalate(signal, wait) {
                return ending;
            }
        }
        ShutdownEnding::Failed
    }

    /// The first step: the guest is asked. True if it powered off.
    fn power_down(&self) -> bool {
        let limit = self.lifecycle.graceful_shutdown_wait;
        self.emitter.emit(Event::CooperativeAttempted {
            vm: self.vm.clone(),
            method: self.power_off.as_str().to_owned(),
            timeout_ms: millis(limit),
        });
        let began = Instant::now();
        let detail = match self.ask_and_wait(began + limit) {
            Ok(true) => {
                self.emitter.emit(Event::CooperativeSucceeded {
                    vm: self.vm.clone(),
                    method: self.power_off.as_str().to_owned(),
                    elapsed_ms: millis(began.elapsed()),
                });
                return true;
            }
            Ok(false) if self.is_impatient() => "castra was asked to stop at once".to_owned(),
            Ok(false) => match self.power_off {
                PowerOff::Button => "the guest ignored the power button".to_owned(),
                PowerOff::Ssh(_) => "the guest didn't obey `poweroff`".to_owned(),
            },
            Err(why) => why,
        };
        self.emitter.emit(Event::CooperativeTimedOut {
            vm: self.vm.clone(),
            method: self.power_off.as_str().to_owned(),
            elapsed_ms: millis(began.elapsed()),
            detail: Some(detail),
        });
        false
    }

    /// Asks the guest until it has powered off; false: it hasn't by the deadline. An error says why it
    /// couldn't be asked.
    fn ask_and_wait(&self, until: Instant) -> Result<bool, String> {
        let left = || until.saturating_duration_since(Instant::now());
        let mut qmp = match Qmp::connect(self.paths.dir(), left().min(QMP_LIMIT)) {
            Ok(qmp) => qmp,
            // The guest may be powering itself off just now.
            Err(_) if qemu_pid(self.paths).is_none() => return Ok(true),
            Err(error) => return Err(error.to_string()),
        };
        let status = qmp.query_status(left().min(QMP_LIMIT)).unwrap_or_default();
        // A guest that is paused, or hasn't begun, can't react.
        if !matches!(status.as_str(), "" | "running" | "suspended") {
            return Err(format!("the guest can't react: QMP says `{status}`"));
        }
        if let PowerOff::Ssh(run) = self.power_off {
            return self.run_and_wait(run, until);
        }
        loop {
            if let Err(error) = qmp.system_powerdown(left().min(QMP_LIMIT)) {
                return match self.wait_gone(left().min(QMP_LIMIT)) {
                    true => Ok(true),
                    false => Err(error.to_string()),
                };
            }
            if self.wait_gone(left().min(PRESS_AGAIN)) {
                return Ok(true);
            }
            if left().is_zero() || self.is_impatient() {
                return Ok(false);
            }
        }
    }

    /// Has the command run, again if it failed: the guest may still be booting, and may have obeyed although
    /// the command failed.
    fn run_and_wait(&self, run: PowerOffCommand<'_>, until: Instant) -> Result<bool, String> {
        loop {
            let failure = match self.run_once(run, until) {
                Ok(gone) => return Ok(gone),
                Err(failure) => failure,
            };
            let left = until.saturating_duration_since(Instant::now());
            if self.wait_gone(left.min(PRESS_AGAIN)) {
                return Ok(true);
            }
            if left <= PRESS_AGAIN || self.is_impatient() {
                return Err(failure.cause());
            }
        }
    }

    /// Has the command run. Beside it the guest is watched: it may be gone before ssh has noticed.
    fn run_once(&self, run: PowerOffCommand<'_>, until: Instant) -> crate::core::failure::Result<bool> {
        let left = || until.saturating_duration_since(Instant::now());
        let over = Cancel::new();
        thread::scope(|scope| {
            let _end = CancelOnDrop(&over);
            let command = threads::spawn_scoped(scope, "poweroff", || run(left(), &over))?;
            while !command.is_finished() {
                if self.wait_gone(left().min(POLL_INTERVAL)) {
                    return Ok(true);
                }
                if left().is_zero() || self.is_impatient() {
                    return Ok(false);
                }
            }
            match command.join() {
                Ok(Err(failure)) => Err(failure),
                _ => Ok(self.wait_gone(left())),
            }
        })
    }

    /// A step with a signal. True if QEMU has ended.
    fn escalate(&self, signal: Signal, wait: Duration) -> bool {
        let Some(pid) = qemu_pid(self.paths) else {
            return true;
        };
        self.emitter.emit(Event::Escalated {
            vm: self.vm.clone(),
            pid,
            signal: signal.as_str().to_owned(),
            timeout_ms: millis(wait),
        });
        signal_qemu(self.paths, signal);
        match signal {
            // There is no step after the last one.
            Signal::SIGKILL => gone_within(self.paths, wait),
            _ => self.wait_gone(wait),
        }
    }

    fn wait_gone(&self, limit: Duration) -> bool {
        let is_gone = || qemu_pid(self.paths).is_none();
        Cancel::new().wait_until(limit, POLL_INTERVAL, || is_gone() || self.is_impatient()) && is_gone()
    }

    fn is_impatient(&self) -> bool {
        self.cancel.requests() >= 2
    }
}
