//! `castra man`.

use castra::core::failure::{Exit, Result};

use super::context::Context;
use crate::cli;

/// Prints the page.
pub fn run(context: &mut Context) -> Result<Exit> {
    context.out.text(cli::manpage());
    Ok(Exit::Done)
}
