//! `castra vm-names`, hidden: what completions offer where a VM is expected.

use castra::core::failure::{Exit, Result};

use super::context::Context;
use super::select;
use crate::cli::Raw;

/// One name a line. A key press is no place for errors: without a config there are none.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    if let Ok(config) = select::config(raw) {
        for vm in &config.vms {
            context.out.line(vm.name.as_str());
        }
    }
    Ok(Exit::Done)
}
