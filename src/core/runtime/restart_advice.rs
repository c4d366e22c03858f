//! What starts a VM again without losing what it has on its disk.
//!
//! Here: the advice of every message about a VM that doesn't run. Not here: starting it (`core::operations`).

use crate::core::host;
use crate::core::name::VmName;
use crate::core::root::paths::VmPaths;
use crate::core::root::records::{self, RunRecord};

/// `up` would discard the disk that the VM's last launch has left; `restart` goes on with it.
pub fn restart_keeps_more(paths: &VmPaths) -> bool {
    let run: Option<RunRecord> = records::load(&paths.run()).ok().flatten();
    run.filter(|run| !run.persist)
        .and_then(|run| run.overlay)
        .is_some_and(|overlay| host::is_there(&overlay))
}

/// The command, and what the other one would do.
pub fn advice(paths: &VmPaths, vm: &VmName) -> String {
    match restart_keeps_more(paths) {
        true => format!("castra restart {vm} starts it again with its disk, castra up {vm} with a fresh one"),
        false => format!("castra up {vm}"),
    }
}
