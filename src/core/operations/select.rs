//! Which VMs an operation is about.

use crate::core::config::{Config, VmConfig};
use crate::core::failure::Result;
use crate::core::host;
use crate::core::name::VmName;
use crate::core::nearest::no_such_vm;
use crate::core::root::alive;
use crate::core::root::alive::find_qemu_pid;
use crate::core::root::paths::StateRoot;

/// The named VMs in config order; no name: all. The name of a role stands for all its replicas. An unknown one is
/// refused, naming what exists.
pub(crate) fn vms_of<'c>(config: &'c Config, names: &[String]) -> Result<Vec<&'c VmConfig>> {
    for name in names {
        if !config.vms.iter().any(|vm| config.means(name, vm)) {
            let known: Vec<&str> = config.vms.iter().map(|vm| vm.name.as_str()).collect();
            return Err(no_such_vm(name, &known));
        }
    }
    let wanted = |vm: &&VmConfig| names.is_empty() || names.iter().any(|name| config.means(name, vm));
    Ok(config.vms.iter().filter(wanted).collect())
}

/// The named VMs among those that were ever launched under a state root, by name; no name: all.
/// This is what `down` goes by: a config may have changed or gone since.
pub(crate) fn launched_vms(state: &StateRoot, names: &[String], also_known: &[&str]) -> Result<Vec<VmName>> {
    let mut launched = Vec::new();
    for vm in alive::launched_vms(state)? {
        let paths = state.vm(&vm);
        // A run record that somebody removed hides neither a QEMU nor a disk.
        if find_qemu_pid(&paths)?.is_some()
            || host::is_there(&paths.run())
            || host::is_there(&state.overlay(&vm))
        {
            launched.push(vm);
        }
    }
    for name in names {
        let known = launched.iter().any(|vm| same(name, vm))
            || also_known.iter().any(|vm| vm.eq_ignore_ascii_case(name));
        if !known {
            let mut all: Vec<&str> = launched
                .iter()
                .map(VmName::as_str)
                .chain(also_known.iter().copied())
                .collect();
            all.sort_unstable();
            all.dedup();
            return Err(no_such_vm(name, &all));
        }
    }
    launched.retain(|vm| names.is_empty() || names.iter().any(|name| same(name, vm)));
    Ok(launched)
}

fn same(name: &str, vm: &VmName) -> bool {
    vm.as_str().eq_ignore_ascii_case(name)
}
