//! Whether QEMU executes its guest, and if not, why, by what `qmp.log` says.
//!
//! Here: reading the log, what a pause means in words, and resuming over QMP. Not here: when a
//! guest is resumed (`broker::vm_watch`, `operations::fleet::already_running`), how a VM ended
//! (`root::ending`).
//!
//! QEMU logs the QMP events STOP and RESUME, also without a client, and the cause of a STOP just
//! before it: BLOCK_IO_ERROR if its disk can't be written. The log also has the answers to
//! `query-status`, which castra asks at launch; they show a QEMU that hasn't begun yet (`-S`,
//! `-incoming`).

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::core::cancel::{Cancel, POLL_INTERVAL};
use crate::core::escape::escape_line;
use crate::core::failure::{Exit, Failure};
use crate::core::host;
use crate::core::name::VmName;
use crate::core::reporter::wall_clock;
use crate::core::root::ending::qmp_time;
use crate::core::root::paths::{VmPaths, vm_file};
use crate::core::time::of_unix_ms;

use super::fault::own_words;
use super::qmp::{Qmp, QmpError};

/// How many bytes of the end of `qmp.log` are read. A paused guest can't make QEMU log anything.
const QMP_TAIL: u64 = 16 * 1024;
/// How many bytes of the end of `qemu.log` are searched for a failure of the accelerator.
const LOG_TAIL: u64 = 4096;
/// A guest is resumed once an unprivileged user may write this much again: a guest that had to wait
/// writes more than one block.
pub const MIN_FREE_BYTES: u64 = 16 << 20;
/// How long a resumed guest must run to count as running: it repeats the failed write at once.
const RESUME_CHECK: Duration = Duration::from_millis(300);

/// QEMU's run state of a guest whose disk can't be written.
const IO_ERROR: &str = "io-error";
/// The run state of a guest that was stopped over QMP.
const PAUSED: &str = "paused";
/// The run state of a guest that the accelerator can't execute.
const INTERNAL_ERROR: &str = "internal-error";

/// Why QEMU doesn't execute the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pause {
    /// QEMU's run state: `io-error`, `paused`, `internal-error`, `guest-panicked`, `prelaunch`, …
    pub reason: String,
    /// The host had no room for what the guest wrote.
    pub no_space: bool,
    /// Wall clock, RFC 3339. `None`: QEMU didn't say.
    pub at: Option<String>,
}

impl Pause {
    /// Whether QMP's `cont` may help.
    pub fn can_resume(&self) -> bool {
        matches!(self.reason.as_str(), IO_ERROR | PAUSED | "watchdog")
    }

    /// Whether it ends by itself once there is disk space again.
    pub fn waits_for_space(&self) -> bool {
        self.no_space && self.reason == IO_ERROR
    }

    /// What it means; `disk` is the VM's.
    pub fn detail(&self, disk: Option<&Path>) -> Option<String> {
        let disk = disk.map_or("its disk".to_owned(), |disk| {
            format!("its disk {}", escape_line(&disk.to_string_lossy(), 1000))
        });
        Some(match self.reason.as_str() {
            IO_ERROR if self.no_space => format!("no space is left on the host for {disk}"),
            IO_ERROR => format!("{disk} can't be read or written"),
            PAUSED => "somebody stopped it over QMP".to_owned(),
            INTERNAL_ERROR => "QEMU met something that it can't execute".to_owned(),
            "guest-panicked" => "its kernel has panicked".to_owned(),
            "prelaunch" => "QEMU was started with -S and waits to be told to begin".to_owned(),
            "inmigrate" => "QEMU waits for an incoming migration".to_owned(),
            "watchdog" => "its watchdog has run out".to_owned(),
            _ => return None,
        })
    }

    /// What to do about it.
    pub fn remediation(&self, vm: &VmName) -> String {
        match self.reason.as_str() {
            IO_ERROR if self.no_space => {
                format!("make room there: the VM then runs again by itself, and castra up {vm} tries at once")
            }
            IO_ERROR => format!(
                "castra logs {vm} --source qemu and `dmesg` say more; castra up {vm} lets it try again"
            ),
            PAUSED | "watchdog" => format!("castra up {vm} resumes it"),
            "prelaunch" => "`cont` over QMP starts it; or take -S out of `qemu_args`".to_owned(),
            "inmigrate" => {
                "it runs once the migration has come; or take -incoming out of `qemu_args`".to_owned()
            }
            _ => format!("castra restart {vm} starts it again with its disk"),
        }
    }

    /// The failure of whatever needs the guest to run.
    pub fn failure(&self, vm: &VmName, disk: Option<&Path>) -> Failure {
        let failure = Failure::new(Exit::Failed, format!("vm `{vm}` is paused ({})", self.reason));
        let failure = match self.detail(disk) {
            Some(why) => failure.because(why),
            None => failure,
        };
        failure.advice(self.remediation(vm))
    }
}

/// Why a running QEMU doesn't execute its guest; `None`: it does.
pub fn read(paths: &VmPaths) -> Option<Pause> {
    let mut pause = parse(&host::tail_of(&paths.file(vm_file::QMP_LOG), QMP_TAIL))?;
    // On QMP QEMU only says that it stopped.
    if pause.reason == PAUSED {
        let words = own_words(&host::tail_of(&paths.file(vm_file::QEMU_LOG), LOG_TAIL));
        if words.contains("internal error") {
            pause.reason = INTERNAL_ERROR.to_owned();
        }
    }
    Some(pause)
}

/// What the end of `qmp.log` says.
fn parse(qmp: &str) -> Option<Pause> {
    let mut pause: Option<Pause> = None;
    // The cause of the next STOP.
    let mut cause: Option<(&str, bool)> = None;
    for message in qmp
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
    {
        let data = &message["data"];
        let holds = |action: &str| data["action"] == action;
        match message["event"].as_str() {
            Some("BLOCK_IO_ERROR") if holds("stop") => {
                cause = Some((IO_ERROR, data["nospace"] == true));
            }
            Some("GUEST_PANICKED") if holds("pause") => cause = Some(("guest-panicked", false)),
            Some("WATCHDOG") if holds("pause") => cause = Some(("watchdog", false)),
            Some("STOP") => {
                let (reason, no_space) = cause.take().unwrap_or((PAUSED, false));
                pause = Some(Pause {
                    reason: reason.to_owned(),
                    no_space,
                    at: qmp_time(&message).map(|ms| wall_clock(of_unix_ms(ms))),
                });
            }
            Some("RESUME") => (pause, cause) = (None, None),
            Some(_) => {}
            None => {
                // An answer to `query-status`: the run state at that time.
                let answer = &message["return"];
                let (Some(status), Some(runs)) = (answer["status"].as_str(), answer["running"].as_bool())
                else {
                    continue;
                };
                let before = pause.take();
                pause = (!runs).then(|| Pause {
                    reason: escape_line(status, 40),
                    no_space: before.as_ref().is_some_and(|before| before.no_space),
                    at: before.and_then(|before| before.at),
                });
            }
        }
    }
    pause
}

/// Reads `qmp.log` only when it has changed, so it may be called often.
#[derive(Debug)]
pub struct PauseWatch {
    paths: VmPaths,
    log: PathBuf,
    seen: RefCell<(LogStamp, Option<Pause>)>,
}

/// What tells whether a log has changed: its inode and length.
type LogStamp = Option<(u64, u64)>;

impl PauseWatch {
    /// A watch over one VM that hasn't read anything yet.
    pub fn new(paths: &VmPaths) -> PauseWatch {
        PauseWatch {
            log: paths.file(vm_file::QMP_LOG),
            paths: paths.clone(),
            seen: RefCell::new((None, None)),
        }
    }

    /// As [`read`].
    pub fn look(&self) -> Option<Pause> {
        let now = fs::metadata(&self.log).ok().map(|meta| (meta.ino(), meta.len()));
        let mut seen = self.seen.borrow_mut();
        if seen.0 != now {
            *seen = (now, read(&self.paths));
        }
        seen.1.clone()
    }
}

/// Resumes the guest; `Ok(None)` once it runs, `Ok(Some(why))` if it stopped again for the same
/// reason.
pub fn resume(paths: &VmPaths, limit: Duration) -> Result<Option<Pause>, QmpError> {
    Qmp::connect(paths.dir(), limit)?.cont(limit)?;
    let watch = PauseWatch::new(paths);
    Ok(Cancel::new().wait_for(RESUME_CHECK, POLL_INTERVAL, || watch.look()))
}

#[cfg(test)]
#[path = "pause_tests.rs"]
mod tests;
