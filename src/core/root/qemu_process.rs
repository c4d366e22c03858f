//! QEMU as a process: signals to a VM's QEMU, and what a dead one leaves.
//!
//! Here: the one place that signals a QEMU, and the files of a dead one. Not here: whether it lives
//! ([`super::alive`]), when to signal it or how to start it (`core::runtime`).

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::core::host;
use crate::core::root::alive::qemu_pid;
use crate::core::root::paths::{VmPaths, vm_file};

/// Sends a signal to a VM's QEMU, after checking again which process that is. Returns its pid;
/// `None` if it has ended.
pub fn signal_qemu(paths: &VmPaths, signal: Signal) -> Option<u32> {
    let pid = qemu_pid(paths)?;
    kill(Pid::from_raw(i32::try_from(pid).ok()?), signal).ok()?;
    Some(pid)
}

/// Removes sockets and pid file of a QEMU that has ended, not those of a running one. True if there
/// was something to remove.
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
