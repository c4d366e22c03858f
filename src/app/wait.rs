//! `castra wait`.

use castra::core::failure::{Exit, Result};
use castra::core::operations::wait::{DEFAULT_TIMEOUT, WaitOptions, wait};

use super::context::Context;
use super::{find_project, human, operands};
use crate::cli::Raw;

/// Waits until VMs are in the wanted state.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let wait_for = raw.wait_for.unwrap_or_default();
    let options = WaitOptions {
        project: find_project::project(raw)?.project(),
        vms: operands::names(&raw.operands)?,
        wait_for,
        timeout: raw.time_limit.unwrap_or(DEFAULT_TIMEOUT),
        cancel: context.cancel_on_signals(),
    };
    let outcome = context.reporting(|reporter| wait(options, reporter))?;
    if !context.json && !context.quiet {
        let met = outcome.vms.iter().filter(|vm| vm.met).count();
        let after = human::duration(outcome.elapsed_ms);
        let word = wait_for.as_str();
        let all = human::plural(outcome.vms.len(), "VM");
        let what = match outcome.exit {
            Exit::Done => format!("{all} {word} after {after}"),
            Exit::TimedOut => format!("timed out after {after}: {met} of {all} {word}"),
            Exit::Interrupted => format!("interrupted after {after}: {met} of {all} {word}"),
            _ => format!("{met} of {all} {word} after {after}"),
        };
        context.out.line(what);
        context.out.flush();
    }
    Ok(outcome.exit)
}
