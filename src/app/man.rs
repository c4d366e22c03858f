//! `castra man`.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::process::{Command, Stdio};

use castra::core::failure::{Exit, Failure, Result};

use super::context::Context;
use super::human;
use crate::cli::{self, Raw};

/// Shows or prints a page, or writes all of them.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let words: Vec<_> = raw.operands.iter().map(|word| word.to_string_lossy()).collect();
    let words = words.join(" ");
    let page = cli::manpage(&words)?;
    let Some(dir) = &raw.dir else {
        if !(io::stdout().is_terminal() && shown(&page)) {
            context.out.verbatim(page);
        }
        return Ok(Exit::Done);
    };
    if !words.is_empty() {
        return Err(
            Failure::new(Exit::Usage, "--dir writes all pages, but a page was named").advice(format!(
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

/// Whether man(1) has shown the page: some systems have no man(1), and some can't show a page that isn't
/// installed.
fn shown(page: &str) -> bool {
    let child = Command::new("man")
        .args(["-l", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return false };
    if let Some(mut pipe) = child.stdin.take() {
        // A user who leaves the pager early closes the pipe, which is no error.
        let _ = pipe.write_all(page.as_bytes());
    }
    child.wait().is_ok_and(|status| status.success())
}
