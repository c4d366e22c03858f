//! Who lives under a state root: its VMs' QEMUs and its broker.
//!
//! Here: the one rule for each, which asks the kernel who holds the lock on a pid file. Not here: signals to a QEMU
//! ([`super::qemu_process`]), a QEMU that its pid file doesn't lead to (`core::runtime::lost`), or what a VM's life
//! means for its state (`core::status`).

use std::fs;
use std::io;

use crate::core::failure::{Failure, Result};
use crate::core::host::{self, Holder};
use crate::core::id::RunId;
use crate::core::name::VmName;
use crate::core::root::paths::{StateRoot, VmPaths};
use crate::core::root::records::{self, BrokerRecord};

/// The pid of a VM's QEMU: the process that holds the record lock on its pid file, as the kernel names it.
/// The number in the file counts for nothing. `None`: QEMU doesn't run, or nobody may ask.
pub fn qemu_pid(paths: &VmPaths) -> Option<u32> {
    find_qemu_pid(paths).ok().flatten()
}

/// As [`qemu_pid`], for a caller who concludes something from QEMU's absence: a pid file that may not be
/// looked at is a failure, so that nobody takes another user's VM for a stopped one.
pub fn find_qemu_pid(paths: &VmPaths) -> Result<Option<u32>> {
    let path = paths.qemu_pid();
    match host::ask_lock_holder(&path) {
        Ok(Holder::Process(pid)) => Ok(Some(pid)),
        // A copy of the file, or a lock that another program took on it: no QEMU, and nobody to signal.
        Ok(Holder::Nobody | Holder::Description | Holder::Unknown) => Ok(None),
        Err(error) => Err(Failure::io("read", &path, &error)),
    }
}

/// Whether a VM's QEMU may live. Where nobody may ask it may.
pub fn may_live(paths: &VmPaths) -> bool {
    !matches!(find_qemu_pid(paths), Ok(None))
}

/// The VMs that were ever launched under a state root, by name. A state root that may not be looked
/// into is a failure: it isn't an empty one.
pub fn launched_vms(state: &StateRoot) -> Result<Vec<VmName>> {
    let dir = state.vms();
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::io("read", &dir, &error)),
    };
    let mut names: Vec<VmName> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    names.sort();
    Ok(names)
}

/// The VMs under a state root whose QEMU runs, with its pid, by name. What may not be looked at is a failure.
pub fn running_vms(state: &StateRoot) -> Result<Vec<(VmName, u32)>> {
    let mut running = Vec::new();
    for vm in launched_vms(state)? {
        if let Some(pid) = find_qemu_pid(&state.vm(&vm))? {
            running.push((vm, pid));
        }
    }
    Ok(running)
}

/// Whether any QEMU under a state root is seen to run.
pub fn any_vm_runs(state: &StateRoot) -> bool {
    let launched = launched_vms(state).unwrap_or_default();
    launched.iter().any(|vm| qemu_pid(&state.vm(vm)).is_some())
}

/// Pid and run id of the broker that holds `broker.pid`. What its record says counts only if the record
/// is of the same run.
pub fn live_broker(state: &StateRoot) -> Option<(u32, RunId)> {
    let path = state.broker_pid();
    let pid = host::locked_pid(&path)?;
    let note = host::tail_of(&path, 512);
    let run = note.split_whitespace().nth(3).unwrap_or_default();
    Some((pid, run.into()))
}

/// The broker of this state root, if one lives: its pid, and its record once it listens. Writes
/// nothing and waits for nothing.
pub fn find_broker(state: &StateRoot) -> Option<(u32, Option<BrokerRecord>)> {
    let (pid, run) = live_broker(state)?;
    // The record of an earlier run says nothing about this one: it has not bound its port yet.
    let record = records::load::<BrokerRecord>(&state.broker_json())
        .ok()
        .flatten()
        .filter(|record| record.run == run);
    Some((pid, record))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::host::FileLock;
    use crate::core::scratch::{RecordLock, Scratch};

    #[test]
    fn only_a_process_with_a_record_lock_is_a_qemu() {
        let scratch = Scratch::new("alive");
        let state = StateRoot::new(scratch.dir());
        let vm: VmName = "web".parse().unwrap();
        let paths = state.vm(&vm);
        fs::create_dir_all(paths.dir()).unwrap();
        assert!(!may_live(&paths), "it was never launched");
        let qemu = RecordLock::hold(&paths.qemu_pid());
        assert_eq!(qemu_pid(&paths), Some(qemu.pid()));
        assert!(may_live(&paths) && any_vm_runs(&state));
        assert_eq!(running_vms(&state).unwrap(), [(vm, qemu.pid())]);
        drop(qemu);
        let lock = FileLock::try_take(&paths.qemu_pid(), "a backup").unwrap();
        assert_eq!(find_qemu_pid(&paths).unwrap(), None, "it isn't QEMU's lock");
        assert!(!may_live(&paths) && !any_vm_runs(&state));
        drop(lock);
    }
}
