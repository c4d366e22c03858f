//! `castra completions SHELL`.

use castra::core::failure::{Exit, Result};

use super::context::Context;
use crate::cli::{self, Raw};

pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let shell = raw.shell.expect("the parser claims the shell");
    context.out.verbatim(cli::completions(shell));
    Ok(Exit::Done)
}
