//! QEMU as a process: whether a VM's QEMU lives, and signals to it.
//!
//! Here: the one question that decides (the record lock on its pid file), the one place
//! that signals a QEMU, and the files a dead one leaves. Not here: when to signal
//! ([`super::shutdown`]) or starting one ([`super::launch`]).

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::core::failure::{Failure, Result};
use crate::core::host::{self, Holder};
use crate::core::root::paths::{VmPaths, vm_file};

/// The pid of a VM's QEMU, told by the kernel: the process that holds the lock on its pid file.
/// The number in the file counts for nothing. `None`: it doesn't run, or nobody may ask.
pub fn qemu_pid(paths: &VmPaths) -> Option<u32> {
    find_qemu_pid(paths).ok().flatten()
}

/// As [`qemu_pid`], for whoever concludes something from its absence: a pid file that may not be
/// looked at is a failure, lest a VM of somebody else's reads as stopped.
pub fn find_qemu_pid(paths: &VmPaths) -> Result<Option<u32>> {
    let path = paths.qemu_pid();
    match host::ask_lock_holder(&path) {
        Ok(Holder::Process(pid)) => Ok(Some(pid)),
        // A copy of the file, or somebody's own lock on it: no QEMU, and nobody to signal.
        Ok(Holder::Nobody | Holder::Description | Holder::Unknown) => Ok(None),
        Err(error) => Err(Failure::io("read", &path, &error)),
    }
}

/// Sends a signal to a VM's QEMU, asking who that is just before. The pid it went to; `None` if it
/// was gone.
pub fn signal_qemu(paths: &VmPaths, signal: Signal) -> Option<u32> {
    let pid = qemu_pid(paths)?;
    kill(Pid::from_raw(i32::try_from(pid).ok()?), signal).ok()?;
    Some(pid)
}

/// Removes sockets and pid file of a QEMU that is gone; one that lives keeps them. True if there
/// was something.
pub fn clear_leftovers(paths: &VmPaths) -> bool {
    if qemu_pid(paths).is_some() {
        return false;
    }
    [
        vm_file::QMP_SOCK,
        vm_file::SERIAL_SOCK,
        vm_file::SSH_CTL,
        vm_file::QEMU_PID,
    ]
    .map(|name| host::remove_if_there(&paths.file(name)).unwrap_or(false))
    .contains(&true)
}
