//! Which accelerator this project's guests run under, and what they do to that answer.
//!
//! Here: the question `up` asks before it launches, and the watch over guests that run under KVM.
//! Not here: the evidence and the memory of it (`core::runtime::accel`).

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::core::cancel::Cancel;
use crate::core::config::Config;
use crate::core::events::{Accel, Event, Severity};
use crate::core::failure::Result;
use crate::core::images::default_guest::find_default_guest;
use crate::core::name::VmName;
use crate::core::operations::boot::Boots;
use crate::core::paths::VmPaths;
use crate::core::reporter::Emitter;
use crate::core::runtime::accel::{self, AccelQuestion, Decision, KVM_DEVICE, ProbeKernel};
use crate::core::runtime::launch::{BootFault, boot_fault};
use crate::core::runtime::process::signal_qemu;

/// How often a guest under KVM is looked at while it boots.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Decides for all VMs about to be launched. Where that takes a test guest, it says so.
pub(crate) fn decide(
    config: &Config,
    qemu: &Path,
    boots: &Boots,
    home: &Path,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> Result<Decision> {
    let default_guest = find_default_guest(home).map(|guest| guest.kernel);
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
        binary: qemu,
        kernel,
        home: Some(home),
        device: Path::new(KVM_DEVICE),
    };
    if kernel.is_some() && accel::known(&question).is_none() {
        let text = "trying KVM with a test guest, once per boot of this host";
        emitter.emit(Event::message(Severity::Progress, None, text));
    }
    accel::decide(&question, cancel)
}

/// A guest that boots under KVM, watched until it lives or its bootstrap is over.
pub(crate) struct KvmWatch<'a, 'e> {
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
    pub(crate) fn watch(&self, alive: &AtomicBool, over: &AtomicBool, fault: &Mutex<Option<String>>) {
        if self.decision.accel != Accel::Kvm {
            return;
        }
        loop {
            if alive.load(Ordering::Acquire) {
                if !self.decision.proven {
                    accel::note_proof(self.home, self.qemu, self.cancel);
                }
                return;
            }
            if over.load(Ordering::Acquire) {
                return;
            }
            match boot_fault(&self.paths) {
                None => {}
                Some(BootFault::Gone(_)) => return,
                Some(BootFault::InternalError(words)) => {
                    let text = format!("KVM can't run this guest (QMP: internal-error): {words}");
                    let next =
                        "castra up again runs it under TCG, as is now remembered for this boot of the host";
                    self.emitter
                        .emit(Event::advice(Severity::Error, Some(self.vm), &*text, next));
                    *fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
                    accel::note_failure(self.home, self.qemu, &words, self.cancel);
                    signal_qemu(&self.paths, Signal::SIGKILL);
                    return;
                }
            }
            if self.cancel.pause(LOOK_EVERY) {
                return;
            }
        }
    }
}
