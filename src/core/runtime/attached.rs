//! A QEMU that stays a child of this process: `VmLaunchMode::Attached`.
//!
//! Here: starting it without `-daemonize`, seeing it through to its first QMP answer while watching
//! the process itself, and reaping it whenever it ends. Not here: what comes before and after a
//! start ([`super::launch`]); stopping it, which goes by the lock on its pid file as for any other
//! ([`super::shutdown`]).
//!
//! It gets a process group of its own, so that a Ctrl-C for the program that launched it doesn't
//! reach it, no stdin, and `qemu.log` as stdout and stderr. One thread waits for its end, so no
//! zombie is left, whether or not anybody asks for the exit status. It doesn't end with this
//! process: a program that ends without stopping its VMs leaves them running, and the next castra
//! finds them by their locks.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::core::cancel::Cancel;
use crate::core::process::{JobError, ended_within, show_argv, show_status};
use crate::core::root::paths::{VmPaths, vm_file};

use super::fault::{LaunchError, StartFailure, own_words};
use super::launch::{judge, qemu_words, refusal};
use super::launch_plan::LaunchPlan;
use super::qemu::qemu_argv;
use super::qmp::{Qmp, QmpError};

/// How often a QEMU that doesn't listen yet is checked. It takes some 50 ms until it does.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A QEMU that is a child of this process. Clones share it; dropping all of them neither ends it
/// nor leaves a zombie.
#[derive(Clone, Debug)]
pub struct AttachedQemu {
    pid: u32,
    end: Arc<End>,
}

#[derive(Debug, Default)]
struct End {
    status: Mutex<Option<ExitStatus>>,
    changed: Condvar,
}

impl AttachedQemu {
    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its exit status, once it has ended.
    pub fn ended(&self) -> Option<ExitStatus> {
        *self.end.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for its end, at most this long.
    pub fn wait(&self, limit: Duration) -> Option<ExitStatus> {
        let status = self.end.status.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .end
            .changed
            .wait_timeout_while(status, limit, |status| status.is_none());
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Hands a child to the thread that reaps it.
    fn reap(mut child: Child, name: &str) -> io::Result<AttachedQemu> {
        let qemu = AttachedQemu {
            pid: child.id(),
            end: Arc::default(),
        };
        let (end, name) = (Arc::clone(&qemu.end), name.to_owned());
        thread::Builder::new()
            .name(format!("qemu {name}"))
            .spawn(move || {
                let Ok(status) = child.wait() else {
                    return;
                };
                log::debug!(
                    "vm {name}: QEMU (pid {}) ended with {}",
                    child.id(),
                    show_status(status)
                );
                *end.status.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
                end.changed.notify_all();
            })?;
        Ok(qemu)
    }
}

/// Starts QEMU as our child and waits until it answers QMP. On failure it is gone and reaped.
pub(super) fn start(
    plan: &LaunchPlan,
    paths: &VmPaths,
    log: File,
    until: Instant,
    cancel: &Cancel,
) -> Result<(u32, AttachedQemu), LaunchError> {
    let not_started = |error: io::Error| {
        LaunchError::Job(JobError::NotStarted {
            program: plan.binary.to_string_lossy().into_owned(),
            error,
        })
    };
    let as_stdout = log.try_clone().map_err(not_started)?;
    let began = Instant::now();
    let mut child = Command::new(&plan.binary)
        .args(qemu_argv(plan))
        .current_dir(&plan.dir)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(as_stdout)
        .stderr(log)
        .spawn()
        .map_err(not_started)?;
    let answered = connect(&mut child, plan, paths, (began, until), cancel)
        .and_then(|session| judge(session, paths, until, cancel));
    match answered {
        Ok(pid) => {
            let qemu = AttachedQemu::reap(child, plan.vm.as_str()).map_err(not_started)?;
            Ok((pid, qemu))
        }
        Err(error) => {
            // No user relied on this guest yet, so QEMU is killed at once.
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

/// Connects to its QMP as soon as it listens, unless it ends before.
fn connect(
    child: &mut Child,
    plan: &LaunchPlan,
    paths: &VmPaths,
    (began, until): (Instant, Instant),
    cancel: &Cancel,
) -> Result<Result<Qmp, QmpError>, LaunchError> {
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Err(ended(paths, status));
        }
        match Qmp::connect(paths.dir(), until.saturating_duration_since(Instant::now())) {
            Err(QmpError::Gone(error)) if listens_not(&error) => {}
            Err(QmpError::Gone(error)) => {
                // QEMU has ended: its last message explains more than a broken socket.
                return match ended_within(child, Duration::from_millis(200)) {
                    Some(status) => Err(ended(paths, status)),
                    None => Ok(Err(QmpError::Gone(error))),
                };
            }
            other => return Ok(other),
        }
        if Instant::now() >= until {
            return Err(LaunchError::Job(JobError::TimedOut {
                argv: show_argv(plan.binary.as_os_str(), &qemu_argv(plan)),
                after: until.saturating_duration_since(began),
                stderr_tail: own_words(&qemu_words(paths)),
            }));
        }
        if cancel.pause(POLL_INTERVAL) {
            return Err(LaunchError::Cancelled);
        }
    }
}

fn listens_not(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

/// Why a QEMU has ended: it refused to start, or it crashed. One that had opened its socket and
/// names no reason has crashed.
fn ended(paths: &VmPaths, status: ExitStatus) -> LaunchError {
    let got_far = paths.file(vm_file::QMP_SOCK).exists();
    match refusal(paths, status) {
        StartFailure::Other(_) if got_far => LaunchError::Died(own_words(&qemu_words(paths))),
        fault => LaunchError::Refused(fault),
    }
}
