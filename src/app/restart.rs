//! `castra restart`.

use castra::core::failure::{Exit, Result};
use castra::core::operations::restart::{RestartOptions, restart};
use castra::core::runtime::launch_plan::VmLaunchMode;

use super::context::Context;
use super::{down, find_project, human, operands, up};
use crate::cli::Raw;

pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let config = find_project::config(raw)?;
    let options = RestartOptions {
        lifecycle: down::deadlines(raw, config.lifecycle),
        config,
        home: find_project::home()?,
        vms: operands::names(&raw.operands)?,
        bootstrap: raw.bootstrap.clone(),
        discard: raw.discard,
        force: raw.force,
        cli: Some(up::own_binary()?),
        launch_mode: VmLaunchMode::Daemonize,
        cancel: context.cancel_on_signals(),
    };
    context.expect(&options.config, &options.vms);
    let outcome = context.reporting(|reporter| restart(options, reporter))?;
    if !context.json && !context.quiet {
        let port = outcome.broker_port.unwrap_or_default();
        let took = human::duration(outcome.elapsed_ms);
        let port = format!("broker on 127.0.0.1:{port}");
        up::show_outcome(context, &outcome.vms, "restarted", &port, &took, outcome.exit);
        up::next(context, &outcome.vms, outcome.exit);
    }
    Ok(outcome.exit)
}
