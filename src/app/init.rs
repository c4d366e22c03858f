//! `castra init`.

use std::env;

use castra::core::failure::{Exit, Failure, Result};
use castra::core::operations::init::{InitOptions, init};

use super::context::Context;
use crate::cli::Raw;

pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let dir = env::current_dir().map_err(|error| {
        Failure::new(Exit::NoInput, "the current directory can't be read")
            .because(error)
            .advice("go to one that exists")
    })?;
    if raw.config.is_some() || raw.workspace.is_some() {
        return Err(
            Failure::new(Exit::Usage, "`castra init` takes no --config or --workspace")
                .because("it makes a new config")
                .advice("castra init --output PATH"),
        );
    }
    let options = InitOptions {
        dir,
        project_name: raw.project_name.clone(),
        output: raw.output.clone(),
        force: raw.force,
    };
    let here = options.dir.clone();
    let outcome = context.reporting(|reporter| init(options, reporter))?;
    let shown = outcome.path.strip_prefix(&here).unwrap_or(&outcome.path);
    if !context.json {
        context.out.line(format!(
            "Created {} (project {}, one VM)",
            shown.display(),
            outcome.project
        ));
        context.out.flush();
        context.say("next: `castra up` boots it; the file shows what else you can set");
    }
    Ok(Exit::Done)
}
