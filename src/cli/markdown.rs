//! docs/CLI.md, from the table.
//!
//! Here: the page. Compiled for the test that holds the file to it (`CASTRA_BLESS=1` rewrites it).

use std::fmt::Write;

use castra::core::failure::Exit;

use super::help::{globals, sentence};
use super::table::reference::{ABOUT, ENVIRONMENT, FILES, FIRST_STEPS};
use super::table::{COMMANDS, Flag, Section};

/// The whole page.
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "only the test that keeps docs/CLI.md current needs it")
)]
pub fn markdown() -> String {
    let mut page = String::from(
        "# Command line\n\n\
         <!-- Generated from src/cli/table.rs; `CASTRA_BLESS=1 cargo test --bin castra` rewrites it. -->\n\n",
    );
    let _ = write!(page, "{ABOUT}\n\nFirst steps:\n\n```sh\n");
    for (command, about) in FIRST_STEPS {
        let _ = writeln!(page, "{command:<16} # {about}");
    }
    page.push_str("```\n");
    for section in Section::LISTED {
        let _ = write!(page, "\n## {}\n", section.heading());
        for row in COMMANDS.iter().filter(|row| row.section == section) {
            let _ = write!(
                page,
                "\n### `castra {}`\n\n{}\n\n```text\n{}\n```\n\n{}\n",
                row.words,
                sentence(row.brief),
                row.usage(),
                row.manual
            );
            let flags: Vec<Flag> = row.flags().collect();
            if !flags.is_empty() {
                page.push_str("\n| flag | |\n| --- | --- |\n");
                flags.iter().for_each(|flag| flag_row(&mut page, flag));
            }
            if !row.examples.is_empty() {
                let _ = write!(page, "\n```sh\n{}\n```\n", row.examples.join("\n"));
            }
        }
    }
    page.push_str(
        "\n## Global flags\n\nThey may stand before or after the command.\n\n| flag | |\n| --- | --- |\n",
    );
    globals().iter().for_each(|flag| flag_row(&mut page, flag));
    page.push_str("\n## Exit codes\n\n| code | |\n| --- | --- |\n");
    for exit in Exit::ALL {
        let _ = writeln!(page, "| {} | {} |", exit.code(), exit.meaning());
    }
    page.push_str(
        "\n`castra ssh` and `castra exec` pass on the remote command's exit code, 128 + signal if a signal ended it, 255 if there was no connection or the VM doesn't run.\n",
    );
    page.push_str("\n## Environment\n\n| variable | |\n| --- | --- |\n");
    for (name, about) in ENVIRONMENT {
        let _ = writeln!(page, "| `{name}` | {about} |");
    }
    page.push_str("\n## Files\n\n| file | |\n| --- | --- |\n");
    for (name, about) in FILES {
        let _ = writeln!(page, "| `{name}` | {about} |");
    }
    page
}

fn flag_row(page: &mut String, flag: &Flag) {
    let usage = flag.usage().replace('|', "\\|");
    let manual = flag.manual.replace('|', "\\|").replace("\n\n", " ");
    let gap = if manual.is_empty() { "" } else { " " };
    let _ = writeln!(
        page,
        "| `{usage}` | {}{gap}{manual} |",
        sentence(flag.brief).replace('|', "\\|")
    );
}
