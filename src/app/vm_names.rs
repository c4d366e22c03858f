//! `castra vm-names`, hidden: the names that completions offer for a VM: VMs, and roles with replicas.

use castra::core::failure::{Exit, Result};

use super::context::Context;
use super::find_project;
use crate::cli::Raw;

/// One name a line. Completion shows no errors: without a config there are no names.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    if let Ok(config) = find_project::config(raw) {
        let mut role = None;
        for vm in &config.vms {
            // A role stands for its replicas.
            if role.replace(&vm.role) != Some(&vm.role) && config.vm(&vm.role).is_none() {
                context.out.line(vm.role.as_str());
            }
            context.out.line(vm.name.as_str());
        }
    }
    Ok(Exit::Done)
}
