//! castra(1), a page for each command, from the table, and those of `guides`.
//!
//! Here: which page the words after `castra man` name, and the text of the commands'. Not here: where
//! the pages are installed (the Makefile), how roff is written (`roff`).

use std::fmt::Write;

use castra::core::failure::{Exit, Failure};

use super::guides::{GUIDES, guide_named};
use super::help::{globals, sentence};
use super::parse::listed_command;
use super::roff::escape;
use super::table::reference::{ABOUT, ENVIRONMENT, FILES, FIRST_STEPS, TAGLINE};
use super::table::{COMMANDS, CommandRow, Flag, Section};

/// The page that these words name; castra(1) without any.
pub fn manpage(words: &str) -> Result<String, Failure> {
    // The section of all commands.
    let command = words.strip_prefix("1 ").unwrap_or(words);
    if matches!(command, "" | "1" | "castra") {
        return Ok(whole_page());
    }
    let others = GUIDES.iter().map(|guide| guide.name);
    match (listed_command(command, others), guide_named(words)) {
        (Ok(row), _) => Ok(page_of(row)),
        (Err(_), Some(guide)) => Ok(guide.page()),
        (Err(failure), None) => Err(failure),
    }
}

/// All pages under their file names.
pub fn pages() -> Vec<(String, String)> {
    let listed = COMMANDS.iter().filter(|row| row.section != Section::Hidden);
    let mut pages = vec![("castra.1".to_owned(), whole_page())];
    pages.extend(listed.map(|row| (format!("{}.1", page_name(row)), page_of(row))));
    pages.extend(
        GUIDES
            .iter()
            .map(|guide| (format!("{}.{}", guide.name, guide.section), guide.page())),
    );
    pages
}

fn page_name(row: &CommandRow) -> String {
    format!("castra-{}", row.words.replace(' ', "-"))
}

fn head(name: &str, about: &str) -> String {
    format!(
        ".TH {} 1 \"\" \"castra {}\" \"User Commands\"\n.SH NAME\n{} \\- {}\n",
        escape(&name.to_uppercase()),
        env!("CARGO_PKG_VERSION"),
        escape(name),
        escape(about)
    )
}

fn page_of(row: &'static CommandRow) -> String {
    let mut page = head(&page_name(row), row.brief);
    let _ = write!(page, ".SH SYNOPSIS\n\\fB{}\\fR\n", escape(&row.usage()));
    page.push_str(".SH DESCRIPTION\n");
    paragraphs(&mut page, row.manual);
    let flags: Vec<Flag> = row.flags().collect();
    if !flags.is_empty() {
        page.push_str(".SH FLAGS\n");
        flags.iter().for_each(|flag| flag_text(&mut page, flag));
    }
    page.push_str(".SH GLOBAL FLAGS\nThey may stand before or after the command.\n");
    globals().iter().for_each(|flag| flag_text(&mut page, flag));
    if !row.examples.is_empty() {
        page.push_str(".SH EXAMPLES\n.nf\n");
        for example in row.examples {
            let _ = writeln!(page, "{}", escape(&format!("$ {example}")));
        }
        page.push_str(".fi\n");
    }
    page.push_str(".SH SEE ALSO\n.BR castra (1),\nwhich lists exit codes, environment and files.\n");
    page
}

fn whole_page() -> String {
    let mut page = head("castra", TAGLINE);
    page.push_str(".SH SYNOPSIS\n.B castra\n[\\fIGLOBAL FLAGS\\fR] \\fICOMMAND\\fR \\&...\n");
    page.push_str(".SH DESCRIPTION\n");
    paragraphs(&mut page, ABOUT);
    page.push_str(".PP\nFirst steps:\n");
    for (command, about) in FIRST_STEPS {
        definition(&mut page, command, &sentence(about));
    }
    page.push_str(".SH COMMANDS\n");
    for section in Section::LISTED {
        let _ = writeln!(page, ".SS {}", escape(section.heading()));
        for row in COMMANDS.iter().filter(|row| row.section == section) {
            let _ = write!(page, ".TP\n\\fB{}\\fR\n", escape(&row.usage()));
            let _ = writeln!(page, "{}", escape(&sentence(row.brief)));
            for paragraph in row.manual.split("\n\n") {
                let _ = write!(page, ".IP\n{}\n", escape(paragraph));
            }
            let flags: Vec<Flag> = row.flags().collect();
            if !flags.is_empty() {
                page.push_str(".RS\n");
                flags.iter().for_each(|flag| flag_text(&mut page, flag));
                page.push_str(".RE\n");
            }
            if !row.examples.is_empty() {
                page.push_str(".IP\n.nf\n");
                for example in row.examples {
                    let _ = writeln!(page, "{}", escape(&format!("$ {example}")));
                }
                page.push_str(".fi\n");
            }
        }
    }
    page.push_str(".SH GLOBAL FLAGS\nThey may stand before or after the command.\n");
    globals().iter().for_each(|flag| flag_text(&mut page, flag));
    page.push_str(".SH EXIT STATUS\n");
    for exit in Exit::ALL {
        definition(&mut page, &exit.code().to_string(), &sentence(exit.meaning()));
    }
    page.push_str(".PP\n");
    let _ = writeln!(
        page,
        "{}",
        escape(
            "`castra ssh` and `castra exec` pass on the remote command's exit code, 128 + signal if a signal ended it, 255 if there was no connection or the VM doesn't run."
        )
    );
    page.push_str(".SH ENVIRONMENT\n");
    for (name, about) in ENVIRONMENT {
        definition(&mut page, name, &sentence(about));
    }
    page.push_str(".SH FILES\n");
    for (name, about) in FILES {
        definition(&mut page, name, &sentence(about));
    }
    page.push_str(".SH SEE ALSO\nEach command has its own page, such as\n.BR castra\\-up (1).\n.PP\n");
    for guide in &GUIDES {
        let _ = writeln!(page, ".BR {} ({}),", escape(guide.name), guide.section);
    }
    page.push_str(".BR qemu (1),\n.BR ssh (1)\n");
    page
}

fn flag_text(page: &mut String, flag: &Flag) {
    let _ = write!(
        page,
        ".TP\n\\fB{}\\fR\n{}\n",
        escape(&flag.usage()),
        escape(&sentence(flag.brief))
    );
    if !flag.manual.is_empty() {
        let _ = writeln!(page, "{}", escape(flag.manual));
    }
}

fn definition(page: &mut String, name: &str, about: &str) {
    let _ = write!(page, ".TP\n\\fB{}\\fR\n{}\n", escape(name), escape(about));
}

fn paragraphs(page: &mut String, text: &str) {
    for paragraph in text.split("\n\n") {
        let _ = write!(page, ".PP\n{}\n", escape(paragraph));
    }
}
