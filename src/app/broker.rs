//! `castra broker`.

use castra::core::broker::{BrokerOptions, run_process};
use castra::core::failure::{Exit, Result};
use castra::core::operations::lost;

use super::context::Context;
use super::find_project;
use crate::cli::Raw;

/// Runs the broker until it is told to stop.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let config = find_project::config(raw)?;
    lost::refuse_if_running_elsewhere(&config)?;
    context.say(&format!(
        "broker of {}: it logs to {}; Ctrl-C stops it",
        config.project,
        config.state.broker_log().display()
    ));
    run_process(BrokerOptions::of(&config))?;
    Ok(Exit::Done)
}
