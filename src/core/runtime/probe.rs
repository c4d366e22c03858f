//! Proof of an accelerator: a throw-away QEMU boots a kernel, and its guest either prints a line or
//! doesn't.
//!
//! Here: one such boot, within limits. Not here: what follows from it and its cache
//! ([`super::accel`]), the guest ([`super::probe_guest`]).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::core::arch::{Arch, PROBE_TEXT};
use crate::core::cancel::{Cancel, POLL_INTERVAL};
use crate::core::events::Accel;
use crate::core::host;
use crate::core::process::{Job, JobError};
use crate::core::root::paths::{VmPaths, vm_file};
use crate::core::threads::{self, CancelOnDrop};

use super::fault::own_words;
use super::probe_guest::initramfs;
use crate::core::root::alive::qemu_pid;

/// How much CPU time a guest may use before it prints its line. Under KVM a kernel takes well under
/// half a second to its first program; under TCG, to which castra falls back, 2 s. So a KVM that
/// takes longer isn't worth using. CPU time is measured, because a busy host must not change the
/// answer.
const KVM_CPU_BUDGET: Duration = Duration::from_millis(2500);
const TCG_CPU_BUDGET: Duration = Duration::from_secs(30);
/// A guest that uses no CPU time for this long counts as stuck: it was stopped by `internal-error`,
/// or waits for an interrupt that never comes.
const STUCK_AFTER: Duration = Duration::from_secs(3);
/// How much CPU time within [`STUCK_AFTER`] counts as none.
const STUCK_CPU: Duration = Duration::from_millis(300);
/// No probe takes longer, whatever the host's load.
const LIMIT: Duration = Duration::from_secs(20);

/// What a probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeResult {
    /// The guest ran a program; how long that took.
    Lives(Duration),
    /// It didn't; why, as the end of a sentence that begins with "under KVM".
    Fails(String),
    /// The probe itself couldn't be done; why.
    Unknown(String),
}

/// Boots `kernel` under `accel` and waits for the guest's line.
pub fn probe(arch: &Arch, binary: &Path, accel: Accel, kernel: &Path, cancel: &Cancel) -> ProbeResult {
    let Some(initramfs) = initramfs(arch) else {
        return ProbeResult::Unknown("castra has no test guest for this architecture".into());
    };
    let place = match ProbeDir::new(&initramfs) {
        Ok(place) => place,
        Err(error) => return ProbeResult::Unknown(format!("no space for a test guest: {error}")),
    };
    let enough = Cancel::new();
    let began = Instant::now();
    thread::scope(|scope| {
        let _end = CancelOnDrop(&enough);
        let qemu = match threads::spawn_scoped(scope, "probe", || {
            run(arch, binary, accel, kernel, &place, &enough)
        }) {
            Ok(qemu) => qemu,
            Err(failure) => return ProbeResult::Unknown(failure.cause()),
        };
        let verdict = watch(&place, accel, began, || qemu.is_finished(), cancel);
        enough.request();
        let ended = qemu.join();
        // A QEMU that ended by itself tells why.
        match (verdict, ended) {
            (Some(verdict), _) => verdict,
            (None, Ok(Err(JobError::NotStarted { program, error }))) => {
                ProbeResult::Unknown(format!("`{program}` can't be started: {error}"))
            }
            (None, _) => match own_words(&place.read(vm_file::QEMU_LOG)) {
                words if words.is_empty() => ProbeResult::Fails("QEMU ended and printed nothing".into()),
                words => ProbeResult::Fails(format!("QEMU ended: {words}")),
            },
        }
    })
}

/// Watches until the result is certain; `None`: QEMU ended before the guest printed its line.
fn watch(
    place: &ProbeDir,
    accel: Accel,
    began: Instant,
    ended: impl Fn() -> bool,
    cancel: &Cancel,
) -> Option<ProbeResult> {
    let budget = match accel {
        Accel::Kvm => KVM_CPU_BUDGET,
        Accel::Tcg => TCG_CPU_BUDGET,
    };
    let mut moved = (began, Duration::ZERO);
    loop {
        // Checked before the logs are read, so that the last output of a QEMU that ended is read.
        let has_ended = ended();
        if place.read(vm_file::SERIAL_LOG).contains(PROBE_TEXT.trim_end()) {
            return Some(ProbeResult::Lives(began.elapsed()));
        }
        if place.read(vm_file::QEMU_LOG).contains("internal error") {
            let words = own_words(&place.read(vm_file::QEMU_LOG));
            return Some(ProbeResult::Fails(format!(
                "a test guest was stopped: {}",
                first_words(&words)
            )));
        }
        if has_ended {
            return None;
        }
        if cancel.is_requested() {
            return Some(ProbeResult::Unknown("interrupted".into()));
        }
        let now = Instant::now();
        let used = qemu_pid(&place.paths).and_then(host::cpu_time).unwrap_or(moved.1);
        if used >= moved.1 + STUCK_CPU {
            moved = (now, used);
        }
        let silent = if place.read(vm_file::SERIAL_LOG).is_empty() {
            "wrote nothing"
        } else {
            "never ran a program"
        };
        if used >= budget {
            return Some(ProbeResult::Fails(format!(
                "a test guest {silent} in {:.1} s of CPU time",
                used.as_secs_f32()
            )));
        }
        if now - moved.0 >= STUCK_AFTER {
            return Some(ProbeResult::Fails(format!("a test guest got stuck and {silent}")));
        }
        if began.elapsed() >= LIMIT {
            return Some(ProbeResult::Unknown(format!(
                "the host is too busy: a test guest {silent} in {} s",
                LIMIT.as_secs()
            )));
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// The first parts of QEMU's output: a register dump may follow them.
fn first_words(words: &str) -> String {
    words.split("; ").take(2).collect::<Vec<_>>().join("; ")
}

fn run(
    arch: &Arch,
    binary: &Path,
    accel: Accel,
    kernel: &Path,
    place: &ProbeDir,
    enough: &Cancel,
) -> Result<(), JobError> {
    let log = host::private_file()
        .append(true)
        .create(true)
        .open(place.paths.file(vm_file::QEMU_LOG))
        .map_err(|error| JobError::NotStarted {
            program: vm_file::QEMU_LOG.into(),
            error,
        })?;
    let model = match accel {
        Accel::Kvm => "host",
        Accel::Tcg => arch.tcg_cpu,
    };
    // Behind `timeout`, because a guest that spins must not outlive a castra that was killed.
    Job::new("timeout")
        .args(["-k", "1", "60"])
        .arg(binary)
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-machine",
            arch.machine,
        ])
        .args([
            "-accel",
            accel.as_str(),
            "-cpu",
            model,
            "-m",
            "256M",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(kernel)
        .args(["-initrd", ProbeDir::INITRD, "-append"])
        .arg(format!("console={} panic=-1 rdinit=/init", arch.console))
        .args(["-pidfile", vm_file::QEMU_PID, "-serial"])
        .arg(format!("file:{}", vm_file::SERIAL_LOG))
        .dir(place.paths.dir())
        .deadline(LIMIT * 2)
        .cancel(enough)
        .output_to(log)
        .run_any()
        .map(drop)
}

/// A temporary directory for one probe.
struct ProbeDir {
    dir: PathBuf,
    paths: VmPaths,
}

impl ProbeDir {
    const INITRD: &str = "initramfs.cpio";

    fn new(initramfs: &[u8]) -> io::Result<ProbeDir> {
        let dir = std::env::temp_dir().join(format!("castra-probe-{}", host::random_hex(8)?));
        host::ensure_private_dir(&dir)?;
        let place = ProbeDir {
            paths: VmPaths::at(&dir),
            dir,
        };
        host::replace_file(&place.dir.join(ProbeDir::INITRD), initramfs)?;
        Ok(place)
    }

    fn read(&self, name: &str) -> String {
        host::tail_of(&self.paths.file(name), 64 * 1024)
    }
}

impl Drop for ProbeDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}
