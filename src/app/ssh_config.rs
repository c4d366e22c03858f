//! `castra ssh-config`: what editors, rsync and ssh itself need to know of the running VMs.
//!
//! Here: which VMs, and how it is printed. Not here: the options (`core::bootstrap::ssh`).

use castra::core::bootstrap::ssh::login;
use castra::core::failure::{Exit, Result};
use castra::core::name::VmName;
use castra::core::root::alive::{launched_vms, may_live};
use serde_json::json;

use super::context::Context;
use super::{find_project, operands};
use crate::cli::Raw;

/// Prints one block a VM; reads and writes nothing else.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let selected = find_project::project(raw)?;
    let state = selected.state();
    let prefix = raw.prefix.as_deref().unwrap_or_default();
    let mut vms: Vec<VmName> = Vec::new();
    for name in find_project::vms(&selected, operands::names(&raw.operands)?)? {
        let vm = find_project::vm(&selected, &name)?;
        if !vms.contains(&vm) {
            vms.push(vm);
        }
    }
    let named = !vms.is_empty();
    if !named {
        vms = launched_vms(&state)?
            .into_iter()
            .filter(|vm| may_live(&state.vm(vm)))
            .collect();
        vms.sort();
    }
    if vms.is_empty() {
        context.say("no VM of this project runs");
    }
    for (number, vm) in vms.iter().enumerate() {
        let target = match login::target(&state, vm) {
            Ok(target) => target,
            Err(failure) if named => return Err(failure),
            // The VM ended meanwhile, or has no port for SSH: it is left out.
            Err(_) => continue,
        };
        if context.json {
            let line = json!({
                "vm": target.vm, "user": target.user, "host": target.host, "port": target.port,
                "identity": target.identity, "options": target.config_options(),
                "alias": format!("{prefix}{vm}"),
            });
            context.out.json_line(line.to_string());
        } else {
            if number > 0 {
                context.out.data("\n");
            }
            context.out.data(target.config_block(prefix));
        }
    }
    Ok(Exit::Done)
}
