//! `-h` and `--help`, from the table.
//!
//! Here: the text for a terminal of 79 columns. Not here: the man page (`manpage`), colour (there
//! is none in help: it is read through pagers and pasted into issues).

use std::fmt::Write;

use castra::core::failure::Exit;

use super::raw::HelpKind;
use super::table::reference::{ABOUT, ENVIRONMENT, FILES, FIRST_STEPS, TAGLINE};
use super::table::{COMMANDS, Command, CommandRow, FLAGS, Flag, GROUPS, Scope, Section};

/// Lines are no longer than this, in characters.
pub const WIDTH: usize = 79;

/// Help for one command.
pub fn help(command: Command, kind: HelpKind) -> String {
    let row = command.row();
    let mut text = format!("{}\n\nUsage: {}\n", sentence(row.brief), row.usage());
    if kind == HelpKind::Long {
        text.push('\n');
        text.push_str(&wrap(row.manual, 0));
    }
    let flags: Vec<Flag> = row.flags().collect();
    if !flags.is_empty() {
        text.push_str("\nFlags:\n");
        flags_text(&mut text, &flags.iter().collect::<Vec<_>>(), kind);
    }
    match kind {
        HelpKind::Short => {
            let _ = write!(
                text,
                "\n`castra {} --help` says more, `castra -h` lists the global flags.\n",
                row.words
            );
        }
        HelpKind::Long => {
            text.push_str("\nGlobal flags:\n");
            flags_text(&mut text, &globals(), HelpKind::Short);
            if !row.examples.is_empty() {
                text.push_str("\nExamples:\n");
                for example in row.examples {
                    let _ = writeln!(text, "  {example}");
                }
            }
            text.push_str("\nExit codes:\n");
            for exit in Exit::ALL {
                let _ = writeln!(text, "  {:<4} {}", exit.code(), exit.meaning());
            }
            match command {
                Command::Ssh | Command::Exec => {
                    text.push_str("  255  no connection to the VM, or it doesn't run\n  else the remote command's own, 128 + signal if a signal ended it\n");
                }
                Command::Cp => text.push_str("  255  no connection to the VM\n"),
                _ => {}
            }
        }
    }
    text
}

/// What somebody reads who has typed `castra` and nothing else.
pub fn first_steps() -> String {
    let mut text = format!(
        "castra {}: {TAGLINE}\n\nFirst steps:\n",
        env!("CARGO_PKG_VERSION")
    );
    pairs(&mut text, FIRST_STEPS);
    text.push_str("\n`castra --help` lists all commands, `castra COMMAND --help` describes one.\n");
    text
}

/// Help for castra as a whole, or for one group of commands.
pub fn overview(group: Option<&str>, kind: HelpKind) -> String {
    let mut text = String::new();
    match group.and_then(|group| GROUPS.iter().find(|(name, _)| *name == group)) {
        Some((name, about)) => {
            let _ = write!(text, "castra {name}: {about}\n\nUsage: castra {name} COMMAND\n");
            let rows = COMMANDS.iter().filter(|row| {
                row.words
                    .strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with(' '))
            });
            text.push_str("\nCommands:\n");
            commands_text(&mut text, rows);
            let _ = write!(text, "\n`castra {name} COMMAND --help` says more.\n");
            return text;
        }
        None => {
            let _ = write!(
                text,
                "castra {}: {TAGLINE}\n\nUsage: castra [GLOBAL FLAGS] COMMAND …\n",
                env!("CARGO_PKG_VERSION")
            );
        }
    }
    if kind == HelpKind::Long {
        text.push('\n');
        text.push_str(&wrap(ABOUT, 0));
        text.push_str("\nFirst steps:\n");
        pairs(&mut text, FIRST_STEPS);
    }
    for section in Section::LISTED {
        let _ = write!(text, "\n{}:\n", section.heading());
        commands_text(&mut text, COMMANDS.iter().filter(|row| row.section == section));
    }
    text.push_str("\nGlobal flags, before or after the command:\n");
    flags_text(&mut text, &globals(), kind);
    if kind == HelpKind::Long {
        text.push_str("\nExit codes:\n");
        for exit in Exit::ALL {
            let _ = writeln!(text, "  {:<4} {}", exit.code(), exit.meaning());
        }
        text.push_str("  `ssh` and `exec` pass on the remote command's exit code; 255: no connection\n");
        text.push_str("\nEnvironment:\n");
        pairs(&mut text, ENVIRONMENT);
        text.push_str("\nFiles:\n");
        pairs(&mut text, FILES);
    }
    text.push_str("\n`castra COMMAND --help` says more.\n");
    text
}

/// The flags every command takes.
pub fn globals() -> Vec<&'static Flag> {
    FLAGS
        .iter()
        .filter(|flag| matches!(flag.scope, Scope::Global))
        .collect()
}

fn commands_text<'a>(text: &mut String, rows: impl Iterator<Item = &'a CommandRow>) {
    for row in rows {
        let _ = writeln!(text, "  {:<13} {}", row.words, row.brief);
    }
}

fn flags_text(text: &mut String, flags: &[&Flag], kind: HelpKind) {
    let names: Vec<String> = flags
        .iter()
        .map(|flag| {
            // Long flags line up, with or without a short form.
            let gap = if flag.short.is_some() { "" } else { "    " };
            format!("{gap}{}", flag.usage())
        })
        .collect();
    let width = names.iter().map(String::len).max().unwrap_or(0).min(26);
    for (flag, name) in flags.iter().zip(names) {
        match kind {
            HelpKind::Short if 4 + width.max(name.len()) + flag.brief.len() > WIDTH => {
                let _ = writeln!(text, "  {name}\n          {}", flag.brief);
            }
            HelpKind::Short => {
                let _ = writeln!(text, "  {name:<width$}  {}", flag.brief);
            }
            HelpKind::Long => {
                let _ = writeln!(text, "  {name}");
                text.push_str(&wrap(&sentence(flag.brief), 10));
                if !flag.manual.is_empty() {
                    text.push_str(&wrap(flag.manual, 10));
                }
            }
        }
    }
}

fn pairs(text: &mut String, rows: &[(&str, &str)]) {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, about) in rows {
        let _ = writeln!(text, "  {name:<width$}  {about}");
    }
}

/// A brief as a sentence of its own.
pub fn sentence(brief: &str) -> String {
    let mut letters = brief.chars();
    let Some(first) = letters.next() else {
        return String::new();
    };
    format!("{}{}.", first.to_uppercase(), letters.as_str())
}

/// Paragraphs filled to [`WIDTH`], each line indented, ended by a line feed.
pub fn wrap(paragraphs: &str, indent: usize) -> String {
    let mut out = String::new();
    for (number, paragraph) in paragraphs.split("\n\n").enumerate() {
        if number > 0 {
            out.push('\n');
        }
        let mut column = 0;
        for word in paragraph.split_whitespace() {
            let length = word.chars().count();
            if column > 0 && column + 1 + length > WIDTH {
                out.push('\n');
                column = 0;
            }
            if column == 0 {
                out.push_str(&" ".repeat(indent));
                column = indent;
            } else {
                out.push(' ');
                column += 1;
            }
            out.push_str(word);
            column += length;
        }
        out.push('\n');
    }
    out
}
