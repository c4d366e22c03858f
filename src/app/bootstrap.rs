//! `castra bootstrap`.

use castra::core::failure::{Exit, Result};
use castra::core::operations::bootstrap::{BootstrapOptions, bootstrap};

use super::context::Context;
use super::{find_project, human, operands, plan, up};
use crate::cli::Raw;

/// Bootstraps running VMs again.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let options = BootstrapOptions {
        config: find_project::config(raw)?,
        home: find_project::home()?,
        vms: operands::names(&raw.operands)?,
        bootstrap: raw.bootstrap.clone(),
        plan: raw.plan,
        cli: Some(up::own_binary()?),
        cancel: context.cancel_on_signals(),
    };
    context.expect(&options.config, &options.vms);
    if raw.plan && !context.json {
        let mut told = Vec::new();
        let outcome = bootstrap(options, &mut told)?;
        plan::show(context, &outcome, &told);
        return Ok(outcome.exit);
    }
    let outcome = context.reporting(|reporter| bootstrap(options, reporter))?;
    if !context.json && !context.quiet {
        let well = outcome.vms.iter().filter(|vm| vm.error.is_none()).count();
        let took = human::duration(outcome.elapsed_ms);
        context.out.line(match outcome.vms.len() {
            all if all == well => format!("{} done, in {took}", human::plural(all, "VM")),
            all => format!("{well} of {} done, in {took}", human::plural(all, "VM")),
        });
        up::show_vms(context, &outcome.vms);
        context.out.flush();
        up::next(context, &outcome.vms, outcome.exit);
    }
    Ok(outcome.exit)
}
