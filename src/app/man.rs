//! `castra man`.

use std::fs;

use castra::core::failure::{Exit, Failure, Result};

use super::context::Context;
use super::human;
use crate::cli::{self, Raw};

/// Prints a page, or writes all of them.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let words: Vec<_> = raw.operands.iter().map(|word| word.to_string_lossy()).collect();
    let words = words.join(" ");
    let command = match words.is_empty() {
        true => None,
        false => Some(cli::listed_command(&words)?),
    };
    let Some(dir) = &raw.dir else {
        context.out.verbatim(cli::manpage(command));
        return Ok(Exit::Done);
    };
    if command.is_some() {
        return Err(
            Failure::new(Exit::Usage, "--dir takes all pages, and one was named").advice(format!(
                "castra man {words}, or castra man --dir {}",
                dir.display()
            )),
        );
    }
    let pages = cli::pages();
    for (name, page) in &pages {
        let path = dir.join(name);
        fs::write(&path, page).map_err(|error| Failure::io("write", &path, &error))?;
    }
    context.say(&format!(
        "{} written into {}",
        human::plural(pages.len(), "page"),
        dir.display()
    ));
    Ok(Exit::Done)
}
