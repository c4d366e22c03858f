//! Starting QEMU and seeing that it answers.
//!
//! Here: one launch from clean files to the first QMP answer, ending in a QEMU that runs or in
//! nothing left at all; and whether a running one has met a fault since. Not here: its command line
//! ([`super::qemu`]), the disks it needs ([`super::overlay`]), or what the guest does
//! (`core::bootstrap`).

use std::fs::File;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::core::cancel::{Cancel, POLL_INTERVAL};
use crate::core::config::PortForward;
use crate::core::failure::Failure;
use crate::core::host::{self, FileLock};
use crate::core::process::{Job, show_status};
use crate::core::root::paths::{VmPaths, vm_file};
use crate::core::root::records::ForwardRecord;

use super::attached::{self, AttachedQemu};
use super::fault::{LaunchError, StartFailure, io_error, own_words};
use super::forwards::PortAllocator;
use super::launch_plan::{LaunchPlan, VmLaunchMode};
use super::qemu::qemu_argv;
use super::qmp::{Qmp, QmpError};
use crate::core::root::alive::qemu_pid;
use crate::core::root::qemu_process::{clear_leftovers, signal_qemu};

/// How long QEMU may take to answer. It takes 60 ms on an idle machine; this limit is for an
/// overloaded one.
pub const LAUNCH_DEADLINE: Duration = Duration::from_secs(60);
/// How many bytes of the end of `qemu.log` are read for a message.
const LOG_TAIL: u64 = 4096;
/// How many bytes of the end of `qmp.log` are searched for a failure: an event has some hundred
/// bytes.
const QMP_TAIL: u64 = 4096;
/// How long a QEMU that must go is waited for after SIGKILL.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// How often another program may take a chosen port before the launch gives up.
const PORT_TRIES: usize = 5;

/// A QEMU that runs and answers.
#[derive(Clone, Debug)]
pub struct Launched {
    /// Its pid, as the lock on its pid file names it.
    pub pid: u32,
    /// The handle on it, if it is our own child.
    pub attached: Option<AttachedQemu>,
}

/// Starts QEMU and waits until it answers QMP. On failure no process and no socket is left; the
/// logs stay.
pub fn launch(plan: &LaunchPlan, limit: Duration, cancel: &Cancel) -> Result<Launched, LaunchError> {
    launch_holding(plan, None, limit, cancel)
}

/// [`launch`] for a caller that holds the VM's lock. A QEMU that goes to the background holds the
/// lock too, until it has its pid file: if castra is killed meanwhile, the VM doesn't count as
/// stopped.
fn launch_holding(
    plan: &LaunchPlan,
    lock: Option<&FileLock>,
    limit: Duration,
    cancel: &Cancel,
) -> Result<Launched, LaunchError> {
    let paths = VmPaths::at(&plan.dir);
    if let Some(pid) = qemu_pid(&paths) {
        return Err(LaunchError::AlreadyRunning(pid));
    }
    prepare_files(&paths)?;
    let launched = start(plan, lock, &paths, Instant::now() + limit, cancel);
    if launched.is_err() {
        abandon(&paths);
    }
    launched.map(|(pid, attached)| Launched { pid, attached })
}

/// [`launch`] with host ports chosen for it. `before` is called with the plan and its ports, so
/// that they can be saved before QEMU starts; it is called again if another program took a port and
/// other ones are tried.
pub fn launch_with_ports(
    plan: &mut LaunchPlan,
    ports: &PortAllocator,
    wanted: &[PortForward],
    last_time: &[ForwardRecord],
    lock: Option<&FileLock>,
    cancel: &Cancel,
    mut before: impl FnMut(&LaunchPlan) -> Result<(), Failure>,
) -> Result<Launched, LaunchError> {
    let mut last_time = last_time;
    let mut tries = 1;
    loop {
        let mut reservation = ports.reserve(wanted, last_time).map_err(LaunchError::Port)?;
        plan.forwards = reservation.forwards().to_vec();
        before(plan).map_err(LaunchError::Io)?;
        reservation.release();
        match launch_holding(plan, lock, LAUNCH_DEADLINE, cancel) {
            Err(LaunchError::Refused(StartFailure::PortTaken(port)))
                if tries < PORT_TRIES && reservation.is_automatic(port) =>
            {
                log::warn!(
                    "vm {}: another process took port {port}, trying other ports",
                    plan.vm
                );
                ports.release_fixed(&reservation);
                last_time = &[];
                tries += 1;
            }
            other => return other,
        }
    }
}

/// Removes sockets and pid file of an earlier QEMU and empties its logs. QEMU would make the logs
/// readable for its group; if they exist they keep their mode.
fn prepare_files(paths: &VmPaths) -> Result<(), LaunchError> {
    host::ensure_private_dir(paths.dir()).map_err(|error| io_error("create", paths.dir(), &error))?;
    clear_leftovers(paths);
    for name in [vm_file::QEMU_LOG, vm_file::QMP_LOG, vm_file::SERIAL_LOG] {
        let path = paths.file(name);
        let made = host::private_file()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path);
        made.map_err(|error| io_error("create", &path, &error))?;
    }
    Ok(())
}

fn start(
    plan: &LaunchPlan,
    lock: Option<&FileLock>,
    paths: &VmPaths,
    until: Instant,
    cancel: &Cancel,
) -> Result<(u32, Option<AttachedQemu>), LaunchError> {
    let log_path = paths.file(vm_file::QEMU_LOG);
    let log = host::private_file()
        .append(true)
        .open(&log_path)
        .map_err(|error| io_error("open", &log_path, &error))?;
    match plan.mode {
        VmLaunchMode::Daemonize => daemonize(plan, lock, paths, log, until, cancel).map(|pid| (pid, None)),
        VmLaunchMode::Attached => {
            attached::start(plan, paths, log, until, cancel).map(|(pid, qemu)| (pid, Some(qemu)))
        }
    }
}

fn daemonize(
    plan: &LaunchPlan,
    lock: Option<&FileLock>,
    paths: &VmPaths,
    log: File,
    until: Instant,
    cancel: &Cancel,
) -> Result<u32, LaunchError> {
    // Not into pipes: a QEMU that hangs after it left for the background would hold them open.
    let ended = Job::new(&plan.binary)
        .args(qemu_argv(plan))
        .dir(&plan.dir)
        .deadline(until.saturating_duration_since(Instant::now()))
        .cancel(cancel)
        .output_to(log)
        .holding(lock)
        .run_any()?;
    if !ended.status.success() {
        return Err(LaunchError::Refused(refusal(paths, ended.status)));
    }
    // `-daemonize` returns when QEMU holds its pid file and listens on its sockets.
    let session = Qmp::connect(paths.dir(), until.saturating_duration_since(Instant::now()));
    judge(session, paths, until, cancel)
}

/// Why a QEMU that ended with this status refused to start.
pub(super) fn refusal(paths: &VmPaths, status: ExitStatus) -> StartFailure {
    match StartFailure::from_words(&qemu_words(paths)) {
        StartFailure::Other(words) if words.is_empty() => StartFailure::Other(format!(
            "it ended with {} and printed nothing",
            show_status(status)
        )),
        fault => fault,
    }
}

/// Whether a QEMU whose QMP is connected has started well; its pid.
pub(super) fn judge(
    session: Result<Qmp, QmpError>,
    paths: &VmPaths,
    until: Instant,
    cancel: &Cancel,
) -> Result<u32, LaunchError> {
    let Some(pid) = qemu_pid(paths) else {
        return Err(LaunchError::Died(own_words(&qemu_words(paths))));
    };
    let answer =
        session.and_then(|mut qmp| qmp.query_status(until.saturating_duration_since(Instant::now())));
    if cancel.is_requested() {
        return Err(LaunchError::Cancelled);
    }
    match answer {
        Ok(status) if status == "internal-error" => {
            Err(LaunchError::InternalError(own_words(&qemu_words(paths))))
        }
        Ok(_) => Ok(pid),
        // QEMU has ended: its last message explains more than a broken socket.
        Err(QmpError::Gone(_)) if gone_within(paths, Duration::from_millis(200)) => {
            Err(LaunchError::Died(own_words(&qemu_words(paths))))
        }
        Err(error) => Err(LaunchError::Mute(error)),
    }
}

pub(super) fn qemu_words(paths: &VmPaths) -> String {
    host::tail_of(&paths.file(vm_file::QEMU_LOG), LOG_TAIL)
}

/// Ends whatever a failed launch has left. No user relied on this guest yet, so QEMU is killed at
/// once.
fn abandon(paths: &VmPaths) {
    if signal_qemu(paths, Signal::SIGKILL).is_some() {
        gone_within(paths, KILL_WAIT);
    }
    clear_leftovers(paths);
}

/// Waits until a VM's QEMU has ended; false if it still runs at the end.
pub(crate) fn gone_within(paths: &VmPaths, limit: Duration) -> bool {
    Cancel::new().wait_until(limit, POLL_INTERVAL, || qemu_pid(paths).is_none())
}

/// What can end a boot before the guest shakes hands (docs/CONFIG.md).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootFault {
    /// QMP says `internal-error`: the accelerator met something it can't run. QEMU's words.
    InternalError(String),
    /// QEMU is gone; `core::status` tells how it ended. QEMU's words.
    Gone(String),
}

/// Checks whether a launched VM has failed. This costs a lock query and one small read, so it may
/// be called often; QMP is used only if its log shows that the virtual CPUs were stopped.
pub fn boot_fault(paths: &VmPaths) -> Option<BootFault> {
    if qemu_pid(paths).is_none() {
        return Some(BootFault::Gone(own_words(&qemu_words(paths))));
    }
    let tail = host::tail_of(&paths.file(vm_file::QMP_LOG), QMP_TAIL);
    if !is_stopped(&tail) {
        return None;
    }
    let limit = Duration::from_secs(1);
    let status = Qmp::connect(paths.dir(), limit).and_then(|mut qmp| qmp.query_status(limit));
    matches!(status.as_deref(), Ok("internal-error"))
        .then(|| BootFault::InternalError(own_words(&qemu_words(paths))))
}

/// Whether the last of QEMU's STOP and RESUME events is a STOP.
fn is_stopped(qmp_log: &str) -> bool {
    let event = |line: &str| -> Option<String> {
        let message: Value = serde_json::from_str(line).ok()?;
        Some(message.get("event")?.as_str()?.to_owned())
    };
    let last = qmp_log
        .lines()
        .rev()
        .filter_map(event)
        .find(|name| name == "STOP" || name == "RESUME");
    last.as_deref() == Some("STOP")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_stop_and_resume_counts() {
        let stop = "{\"event\": \"STOP\"}\n";
        let resume = "{\"event\": \"RESUME\"}\n";
        let other = "{\"return\": {\"status\": \"running\"}}\n{\"event\": \"RTC_CHANGE\"}\n";
        for (log, stopped) in [
            (String::new(), false),
            (format!("{resume}{other}"), false),
            (format!("{resume}{stop}{other}"), true),
            (format!("{stop}{resume}"), false),
            (format!("EVENT\": \"STOP\"}}\n{other}"), false),
        ] {
            assert_eq!(is_stopped(&log), stopped, "{log}");
        }
    }
}
