//! Which accelerator this project's guests run under, and what they do to that answer.
//!
//! Here: the question `up` asks before it launches, and the watch over guests that run under KVM.
//! Not here: the evidence and the memory of it (`core::runtime::accel`).

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::boot_source::BootSources;
use crate::core::cancel::Cancel;
use crate::core::config::Config;
use crate::core::events::stage::Stage;
use crate::core::events::{Accel, Event, Severity};
use crate::core::failure::Result;
use crate::core::images::default_guest::{GuestKind, find_default_guest};
use crate::core::name::VmName;
use crate::core::reporter::Emitter;
use crate::core::root::paths::VmPaths;
use crate::core::root::qemu_process::signal_qemu;
use crate::core::runtime::accel::{self, AccelQuestion, Decision, KVM_DEVICE, ProbeKernel};
use crate::core::runtime::launch::{BootFault, boot_fault};

/// How often a guest under KVM is looked at while it boots.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Decides for all VMs about to be launched. Where that takes a test guest, it says so.
pub(super) fn decide(
    config: &Config,
    qemu: &Path,
    boots: &BootSources,
    home: &Path,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> Result<Decision> {
    let found = |kind: &GuestKind| find_default_guest(home, config.qemu.arch, *kind);
    let default_guest = GuestKind::ALL.iter().find_map(found).map(|guest| guest.kernel);
    let own = || boots.values().find_map(|boot| boot.kernel.as_ref());
    let kernel = match &default_guest {
        Some(path) => Some(ProbeKernel {
            path,
            known_good: true,
        }),
        None => own().map(|kernel| ProbeKernel {
            path: &kernel.kernel,
            known_good: false,
        }),
    };
    let question = AccelQuestion {
        choice: config.qemu.accel,
        arch: config.qemu.arch,
        binary: qemu,
        kernel,
        home: Some(home),
        device: Path::new(KVM_DEVICE),
    };
    let is_trial = kernel.is_some() && accel::known(&question).is_none();
    if is_trial {
        let text = "trying KVM with a test guest, once per boot of this host";
        emitter.emit(Event::message(Severity::Progress, None, text));
    }
    let began = Instant::now();
    let decision = accel::decide(&question, cancel)?;
    if is_trial {
        let verdict = match decision.accel {
            Accel::Kvm => "KVM works here",
            Accel::Tcg => "KVM can't be used here",
        };
        let message = Event::message(Severity::Progress, None, verdict);
        emitter.emit(Stage::KvmTrial.end(began.elapsed(), message));
    }
    Ok(decision)
}

/// A guest that boots under KVM, watched until it lives or its bootstrap is over.
pub(super) struct KvmWatch<'a, 'e> {
    pub vm: &'a VmName,
    pub paths: VmPaths,
    pub home: &'a Path,
    pub qemu: &'a Path,
    pub decision: &'a Decision,
    pub emitter: &'a Emitter<'e>,
    pub cancel: &'a Cancel,
}

impl KvmWatch<'_, '_> {
    /// Ends a guest that KVM can't run, because it would stay silent for ever, and remembers that;
    /// remembers also the first guest that lives. What it found wrong is left in `fault`.
    pub(super) fn watch(&self, alive: &AtomicBool, over: &AtomicBool, fault: &Mutex<Option<String>>) {
        if self.decision.accel != Accel::Kvm {
            return;
        }
        self.cancel.wait_until(Duration::MAX, POLL_INTERVAL, || {
            if alive.load(Ordering::Acquire) {
                if !self.decision.proven {
                    accel::note_proof(self.home, self.qemu, self.cancel);
                }
                return true;
            }
            if over.load(Ordering::Acquire) {
                return true;
            }
            match boot_fault(&self.paths) {
                None => false,
                Some(BootFault::Gone(_)) => true,
                Some(BootFault::InternalError(words)) => {
                    let text = format!("KVM can't run this guest (QMP: internal-error): {words}");
                    let next = "run castra up again: it uses TCG until the host boots again";
                    self.emitter
                        .emit(Event::advice(Severity::Error, Some(self.vm), &*text, next));
                    *fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
                    accel::note_failure(self.home, self.qemu, &words, self.cancel);
                    signal_qemu(&self.paths, Signal::SIGKILL);
                    true
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::arch::Arch;
    use crate::core::config::AccelChoice;
    use crate::core::reporter::Silent;
    use crate::core::runtime::launch::{gone_within, launch};
    use crate::core::runtime::launch_plan::{LaunchPlan, PlannedNetwork, VmLaunchMode};
    use crate::core::scratch::Scratch;

    /// A guest of the stand-in for QEMU, "under KVM", watched to the watch's end; what was found wrong,
    /// and what is decided afterwards.
    fn watched(fake: &str, lives: bool) -> (Option<String>, Option<Decision>) {
        let scratch = Scratch::new("kvm-watch");
        let paths = VmPaths::at(scratch.path("vm"));
        let qemu = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/fake-qemu.py");
        let plan = LaunchPlan {
            vm: "web".parse().unwrap(),
            dir: paths.dir().to_owned(),
            arch: Arch::host(),
            binary: qemu.clone(),
            accel: Accel::Kvm,
            cpus: 1,
            memory_bytes: 64 << 20,
            kernel: None,
            disk: None,
            seed_dir: None,
            network: PlannedNetwork::User,
            forwards: Vec::new(),
            fw_cfg: Vec::new(),
            mounts: Vec::new(),
            qemu_args: vec!["-fake".into(), fake.into()],
            mode: VmLaunchMode::Daemonize,
        };
        let cancel = Cancel::new();
        launch(&plan, Duration::from_secs(60), &cancel).unwrap();
        let mut silent = Silent;
        let decision = Decision {
            accel: Accel::Kvm,
            reason: "on trust".into(),
            proven: false,
        };
        let watch = KvmWatch {
            vm: &plan.vm,
            paths,
            home: scratch.dir(),
            qemu: &qemu,
            decision: &decision,
            emitter: &Emitter::new(&mut silent),
            cancel: &cancel,
        };
        let fault = Mutex::new(None);
        watch.watch(&AtomicBool::new(lives), &AtomicBool::new(false), &fault);
        if lives {
            signal_qemu(&watch.paths, Signal::SIGKILL).expect("a guest that lives runs on");
        }
        assert!(gone_within(&watch.paths, Duration::from_secs(60)));
        let device = scratch.path("kvm");
        std::fs::write(&device, "").unwrap();
        let question = AccelQuestion {
            choice: AccelChoice::Auto,
            arch: Arch::host(),
            binary: &qemu,
            kernel: None,
            home: Some(scratch.dir()),
            device: &device,
        };
        (fault.into_inner().unwrap(), accel::known(&question))
    }

    #[test]
    fn a_guest_that_kvm_cannot_run_is_ended_and_remembered() {
        let (fault, known) = watched("internal-error=0.1", false);
        assert!(fault.unwrap().contains("KVM internal error"));
        assert_eq!(known.unwrap().accel, Accel::Tcg);
    }

    #[test]
    fn the_first_guest_that_lives_is_the_proof() {
        let (fault, known) = watched("busy", true);
        assert_eq!(fault, None);
        assert_eq!(known.unwrap().accel, Accel::Kvm);
    }
}
