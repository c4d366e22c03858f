//! Whether QEMU executes its guest, and if not, why: by what QEMU has left in `qmp.log`.
//!
//! Here: reading that (it takes nothing and waits for nothing), what a pause means in words, and
//! ending one by QMP. Not here: who ends one and when (`broker::vm_watch`, `operations::unpause`), or how a
//! VM ended (`core::status`).
//!
//! QEMU says STOP and RESUME on QMP whoever is attached, and what led to a STOP just before it:
//! BLOCK_IO_ERROR where its disk can't be written. What `query-status` was answered stands there too;
//! so castra's own question at launch tells of a QEMU that has not begun yet (`-S`, `-incoming`).

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::core::escape::escape_line;
use crate::core::failure::{Exit, Failure};
use crate::core::host;
use crate::core::name::VmName;
use crate::core::reporter::wall_clock;
use crate::core::root::paths::{VmPaths, vm_file};

use super::fault::own_words;
use super::qmp::{Qmp, QmpError};

/// As much of the end of `qmp.log` as is read. A guest that is paused can't make QEMU say anything.
const QMP_TAIL: u64 = 16 * 1024;
/// As much of the end of `qemu.log` as is searched for an accelerator's fault.
const LOG_TAIL: u64 = 4096;
/// A disk is full until an unprivileged user may write this much again: a guest that was held up
/// writes more than one block.
pub const ROOM: u64 = 16 << 20;
/// How long a resumed guest has to run to count as running: it tries again at once what it was stopped
/// over.
const HOLDS: Duration = Duration::from_millis(300);
/// Between two looks at that.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// `run-state` of a guest whose disk can't be written.
const IO_ERROR: &str = "io-error";
/// That of one somebody has stopped.
const PAUSED: &str = "paused";
/// That of one whose accelerator has met something it can't do.
const INTERNAL_ERROR: &str = "internal-error";

/// Why QEMU executes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pause {
    /// QEMU's word for it: `io-error`, `paused`, `internal-error`, `guest-panicked`, `prelaunch`, …
    pub reason: String,
    /// The host had no room for what the guest wrote.
    pub no_space: bool,
    /// Wall clock, RFC 3339. `None`: QEMU didn't say.
    pub at: Option<String>,
}

impl Pause {
    /// QMP's `cont` may help.
    pub fn can_resume(&self) -> bool {
        matches!(self.reason.as_str(), IO_ERROR | PAUSED | "watchdog")
    }

    /// It ends by itself once there is room again: nobody asked for it.
    pub fn waits_for_room(&self) -> bool {
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
            "inmigrate" => "QEMU waits for a migration to come in".to_owned(),
            "watchdog" => "its watchdog has run out".to_owned(),
            _ => return None,
        })
    }

    /// What to do about it.
    pub fn remediation(&self, vm: &VmName) -> String {
        match self.reason.as_str() {
            IO_ERROR if self.no_space => {
                format!("make room there: it then runs on by itself, and castra up {vm} tries at once")
            }
            IO_ERROR => format!(
                "castra logs {vm} --source qemu and `dmesg` say more; castra up {vm} lets it try again"
            ),
            PAUSED | "watchdog" => format!("castra up {vm} lets it run on"),
            "prelaunch" => "`cont` over QMP lets it begin; or take -S out of `qemu_args`".to_owned(),
            "inmigrate" => "it runs once that has come; or take -incoming out of `qemu_args`".to_owned(),
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

/// Why a QEMU that lives executes nothing; `None`: it does.
pub fn read(paths: &VmPaths) -> Option<Pause> {
    let mut pause = parse(&host::tail_of(&paths.file(vm_file::QMP_LOG), QMP_TAIL))?;
    // It says no more of that on QMP than that it stopped.
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
    // What QEMU said led to the next STOP.
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
                    at: time_of(&message),
                });
            }
            Some("RESUME") => (pause, cause) = (None, None),
            Some(_) => {}
            None => {
                // An answer to `query-status`: the very state at that moment.
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

/// When QEMU says that it happened.
fn time_of(message: &Value) -> Option<String> {
    let seconds = message["timestamp"]["seconds"].as_u64()?;
    let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?;
    Some(wall_clock(at))
}

/// Looks often, reads seldom: only when `qmp.log` has changed.
#[derive(Debug)]
pub struct PauseWatch {
    paths: VmPaths,
    log: PathBuf,
    seen: RefCell<(LogLook, Option<Pause>)>,
}

/// By what a log is known to be unchanged: its inode and length.
type LogLook = Option<(u64, u64)>;

impl PauseWatch {
    /// A watch over one VM, which has seen nothing yet.
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

/// Lets the guest run on; `Ok(None)` once it does, `Ok(Some(why))` if it stopped again over what it was
/// stopped over.
pub fn resume(paths: &VmPaths, limit: Duration) -> Result<Option<Pause>, QmpError> {
    Qmp::connect(paths.dir(), limit)?.cont(limit)?;
    let watch = PauseWatch::new(paths);
    let until = Instant::now() + HOLDS;
    while Instant::now() < until {
        if let Some(pause) = watch.look() {
            return Ok(Some(pause));
        }
        thread::sleep(LOOK_EVERY);
    }
    Ok(None)
}

#[cfg(test)]
#[path = "pause_tests.rs"]
mod tests;
