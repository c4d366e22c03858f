//! The accelerator, by evidence: KVM only where a guest has really run under it (docs/CONFIG.md).
//!
//! Here: the decision, its reason in words, and its cache in `accel.json`. Not here: the boot that
//! proves it ([`super::probe`]). A `/dev/kvm` that opens proves nothing: on some hosts every stock
//! kernel hangs or crashes under KVM.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::unistd::{Gid, Group};
use serde::{Deserialize, Serialize};

use crate::core::arch::Arch;
use crate::core::cancel::Cancel;
use crate::core::config::AccelChoice;
use crate::core::events::Accel;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::id::BootId;
use crate::core::reporter::wall_clock;
use crate::core::root::records;

use super::binary::qemu_version;
use super::probe::{ProbeResult, probe};

/// The inputs of a decision.
#[derive(Clone, Debug)]
pub struct AccelQuestion<'a> {
    /// What the config says.
    pub choice: AccelChoice,
    /// The guests' architecture.
    pub arch: &'static Arch,
    /// The QEMU that will run.
    pub binary: &'a Path,
    /// A kernel to prove KVM with.
    pub kernel: Option<ProbeKernel<'a>>,
    /// Where answers are remembered; `None`: nowhere.
    pub home: Option<&'a Path>,
    /// `/dev/kvm`; tests name another file.
    pub device: &'a Path,
}

/// A kernel to prove KVM with.
#[derive(Clone, Copy, Debug)]
pub struct ProbeKernel<'a> {
    /// bzImage or PVH vmlinux.
    pub path: &'a Path,
    /// It is castra's own, known to boot the test guest. With another kernel a failure under KVM
    /// counts only if the same kernel boots under TCG.
    pub known_good: bool,
}

/// The kernel's KVM device.
pub const KVM_DEVICE: &str = "/dev/kvm";

/// Which accelerator runs, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The accelerator.
    pub accel: Accel,
    /// Why, for people.
    pub reason: String,
    /// False: KVM wasn't tried, for lack of a kernel. The first guest proves it: call
    /// [`note_proof`] or [`note_failure`].
    pub proven: bool,
}

/// Decides, probing if it has to (once per host boot and QEMU). `accel = "kvm"` without a usable
/// KVM is a failure that says what is missing.
pub fn decide(question: &AccelQuestion<'_>, cancel: &Cancel) -> Result<Decision> {
    let decision = match known(question) {
        Some(decision) => decision,
        None => probe_with_guest(question, cancel)?,
    };
    refuse_without_kvm(question, &decision)?;
    Ok(decision)
}

/// What [`decide`] would refuse, as far as that is known without a probe: for plans.
pub fn check(question: &AccelQuestion<'_>) -> Result<()> {
    match known(question) {
        Some(decision) => refuse_without_kvm(question, &decision),
        None => Ok(()),
    }
}

fn refuse_without_kvm(question: &AccelQuestion<'_>, decision: &Decision) -> Result<()> {
    if question.choice == AccelChoice::Kvm && decision.accel == Accel::Tcg {
        return Err(no_kvm(question, decision.reason.clone()));
    }
    Ok(())
}

/// The decision, if it is known without a probe. Starts nothing and writes nothing.
pub fn known(question: &AccelQuestion<'_>) -> Option<Decision> {
    let tcg = |reason: String| Decision {
        accel: Accel::Tcg,
        reason,
        proven: true,
    };
    if question.choice == AccelChoice::Tcg {
        return Some(tcg("`accel = \"tcg\"` in castra.toml".into()));
    }
    if question.arch.is_foreign() {
        return Some(tcg(foreign_reason(question.arch)));
    }
    // This is checked each time: it is cheap, and a user may have joined the group since.
    if let Err(error) = open_device(question.device) {
        return Some(tcg(why_not_open(question.device, &error)));
    }
    let answer = load_answers(question.home)
        .into_iter()
        .find(|answer| answer.is_about(question.binary))?;
    Some(Decision {
        accel: answer.accel,
        reason: answer.reason,
        proven: true,
    })
}

/// Why guests of an architecture that isn't the host's run under TCG.
pub fn foreign_reason(arch: &Arch) -> String {
    format!(
        "guests of another architecture than this host's ({}) are always emulated",
        arch.name
    )
}

/// A guest on this QEMU has run under KVM: the decision is proven from now on.
pub fn note_proof(home: &Path, binary: &Path, cancel: &Cancel) {
    remember(
        Some(home),
        binary,
        Accel::Kvm,
        "a guest has run under KVM since the host booted",
        cancel,
    );
}

/// A guest on this QEMU failed under KVM: the next one gets TCG.
pub fn note_failure(home: &Path, binary: &Path, words: &str, cancel: &Cancel) {
    let reason = format!("KVM can't run guests here: {words}");
    remember(Some(home), binary, Accel::Tcg, &reason, cancel);
}

/// Why the KVM device can't be used, and what would help; `None`: it opens.
pub fn device_trouble(device: &Path) -> Option<(String, String)> {
    let error = open_device(device).err()?;
    Some((why_not_open(device, &error), access_advice(device, &error)))
}

// --- evidence ---------------------------------------------------------------------------------

fn probe_with_guest(question: &AccelQuestion<'_>, cancel: &Cancel) -> Result<Decision> {
    let trusted = |why: &str| {
        // A user who wrote `kvm` may know what castra can't find out.
        let hinted = has_hardware_module() || question.choice == AccelChoice::Kvm;
        Decision {
            accel: if hinted { Accel::Kvm } else { Accel::Tcg },
            reason: if hinted {
                format!("/dev/kvm opens; castra couldn't try it: {why}")
            } else {
                format!(
                    "/dev/kvm opens, but neither kvm_intel nor kvm_amd is loaded, and castra couldn't try it: {why}"
                )
            },
            proven: !hinted,
        }
    };
    let Some(kernel) = question.kernel else {
        return Ok(trusted("there is no kernel to try it with"));
    };
    let verdict = match probe(question.arch, question.binary, Accel::Kvm, kernel.path, cancel) {
        ProbeResult::Fails(why) if !kernel.known_good => {
            match probe(question.arch, question.binary, Accel::Tcg, kernel.path, cancel) {
                ProbeResult::Lives(_) => ProbeResult::Fails(why),
                _ => ProbeResult::Unknown(format!(
                    "{} doesn't boot castra's test guest under any accelerator",
                    kernel.path.display()
                )),
            }
        }
        verdict => verdict,
    };
    if cancel.is_requested() {
        return Err(Failure::new(Exit::Interrupted, "interrupted").because("while KVM was being tried"));
    }
    let (accel, reason) = match verdict {
        ProbeResult::Lives(after) => (
            Accel::Kvm,
            format!("a test guest ran under KVM after {} ms", after.as_millis()),
        ),
        ProbeResult::Fails(why) => (Accel::Tcg, format!("under KVM {why}{}", module_note())),
        ProbeResult::Unknown(why) => return Ok(trusted(&why)),
    };
    remember(question.home, question.binary, accel, &reason, cancel);
    Ok(Decision {
        accel,
        reason,
        proven: true,
    })
}

fn open_device(device: &Path) -> io::Result<()> {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .map(drop)
}

fn why_not_open(device: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => format!("there is no {}", device.display()),
        io::ErrorKind::PermissionDenied => match group_of(device) {
            Some(group) => format!(
                "{} is for members of group `{group}`, and you aren't one",
                device.display()
            ),
            None => format!("you may not open {}", device.display()),
        },
        _ => format!("{} can't be opened: {error}", device.display()),
    }
}

/// The group that a device belongs to, unless that is root's.
fn group_of(device: &Path) -> Option<String> {
    let gid = fs::metadata(device).ok()?.gid();
    if gid == 0 {
        return None;
    }
    Some(Group::from_gid(Gid::from_raw(gid)).ok()??.name)
}

/// Whether one of the modules that need real hardware support is loaded. A hint, no more; other
/// architectures have it in the kernel itself.
fn has_hardware_module() -> bool {
    let modules = Arch::host().kvm_modules;
    let is_loaded = |module: &&str| Path::new("/sys/module").join(module).exists();
    modules.is_empty() || modules.iter().any(is_loaded)
}

/// Names a paravirtual KVM, the most frequent cause of a guest that doesn't start.
fn module_note() -> &'static str {
    if Path::new("/sys/module/kvm_pvm").exists() && !has_hardware_module() {
        " (this host's KVM is a paravirtual one, kvm_pvm)"
    } else {
        ""
    }
}

/// What would make the device open.
fn access_advice(device: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => match group_of(device) {
            Some(group) => format!("`sudo usermod -aG {group} $USER`, then log in again"),
            None => format!("give yourself access to {}", device.display()),
        },
        io::ErrorKind::NotFound => {
            "switch on virtualisation in the firmware (or nested virtualisation in the VM's host) and load kvm_intel or \
             kvm_amd; or set `accel = \"auto\"` under [qemu]"
                .into()
        }
        _ => "set `accel = \"auto\"` under [qemu]".into(),
    }
}

fn no_kvm(question: &AccelQuestion<'_>, reason: String) -> Failure {
    let next = match open_device(question.device) {
        Err(error) if !question.arch.is_foreign() => access_advice(question.device, &error),
        _ => "set `accel = \"auto\"` under [qemu]".into(),
    };
    Failure::new(Exit::Unavailable, "`accel = \"kvm\"`, but KVM can't be used")
        .because(reason)
        .advice(next)
}

// --- memory -----------------------------------------------------------------------------------

/// `$CASTRA_HOME/accel.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
struct CachedAnswers {
    answers: Vec<CachedAnswer>,
}

/// One answer, for one boot of the host and one QEMU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct CachedAnswer {
    boot_id: BootId,
    /// The binary, its links resolved, and what tells an upgraded one.
    binary: PathBuf,
    binary_bytes: u64,
    binary_mtime: i64,
    /// The version it reports.
    version: String,
    accel: Accel,
    reason: String,
    decided_at: String,
}

impl CachedAnswer {
    fn is_about(&self, binary: &Path) -> bool {
        let Some((path, bytes, mtime)) = identity(binary) else {
            return false;
        };
        self.boot_id == *host::boot_id()
            && self.binary == path
            && self.binary_bytes == bytes
            && self.binary_mtime == mtime
    }
}

/// What tells one QEMU from another without running it.
fn identity(binary: &Path) -> Option<(PathBuf, u64, i64)> {
    let path = fs::canonicalize(binary).ok()?;
    let meta = fs::metadata(&path).ok()?;
    Some((path, meta.len(), meta.mtime()))
}

fn file(home: &Path) -> PathBuf {
    home.join("accel.json")
}

/// The cached answers of this host boot. An invalid file counts as empty: a probe writes it again.
fn load_answers(home: Option<&Path>) -> Vec<CachedAnswer> {
    let answers = home.and_then(|home| records::load::<CachedAnswers>(&file(home)).ok().flatten());
    let mut answers = answers.unwrap_or_default().answers;
    answers.retain(|answer| answer.boot_id == *host::boot_id());
    answers
}

/// Caches an answer. If that fails the next `up` probes again.
fn remember(home: Option<&Path>, binary: &Path, accel: Accel, reason: &str, cancel: &Cancel) {
    let (Some(home), Some((path, bytes, mtime))) = (home, identity(binary)) else {
        return;
    };
    let mut answers = load_answers(Some(home));
    answers.retain(|answer| answer.binary != path);
    answers.push(CachedAnswer {
        boot_id: host::boot_id().clone(),
        binary: path,
        binary_bytes: bytes,
        binary_mtime: mtime,
        version: qemu_version(binary, cancel).unwrap_or_default(),
        accel,
        reason: reason.to_owned(),
        decided_at: wall_clock(SystemTime::now()),
    });
    let kept = host::ensure_private_dir(home)
        .map_err(|error| Failure::io("create", home, &error))
        .and_then(|()| records::save(&file(home), &CachedAnswers { answers }));
    if let Err(failure) = kept {
        log::warn!("castra can't remember whether KVM works: {failure}");
    }
}

#[cfg(test)]
#[path = "accel_tests.rs"]
mod tests;
