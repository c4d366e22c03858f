//! The text of a config file: places in it, and the errors found in it.
//!
//! Here: reading a bounded amount, lines and columns, collecting errors and warnings. Not here:
//! what the text means (`section`, `settings`, `vms`).

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::reader::{quoted, shown};
use crate::core::failure::{Exit, Failure, Result};

/// Largest config file that is read. Ours are a few KiB; a thousand VMs fit well.
pub(super) const MAX_BYTES: u64 = 1 << 20;

/// How many errors, and how many warnings, are shown; further ones are mostly consequences of the
/// first.
const MAX_SHOWN: usize = 20;

/// A byte offset into a source.
pub(super) type Offset = usize;

/// One config file and what was found in it.
pub(super) struct Source {
    /// The file's base name, which messages begin with.
    pub(super) name: String,
    pub(super) text: String,
    /// Where each line begins.
    lines: Vec<Offset>,
    found: RefCell<Findings>,
}

#[derive(Default)]
struct Findings {
    /// Sets, in the order of the file: two replicas of one entry have the same error, which is
    /// shown once.
    errors: BTreeSet<Problem>,
    warnings: BTreeSet<Problem>,
    /// Every key that was looked for, as `section.key`: the schema, for the test of docs/CONFIG.md.
    #[cfg(test)]
    keys: BTreeSet<String>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Problem {
    at: Offset,
    text: String,
    fix: String,
}

impl Source {
    /// A source from text in memory. Line ends become LF, as TOML allows: strings of several lines
    /// go to shells and to cloud-init, which don't accept CR LF as a line end. An escaped `\r`
    /// stays.
    pub(super) fn new(name: impl Into<String>, text: impl Into<String>) -> Source {
        let text = text.into().replace("\r\n", "\n");
        Source {
            name: name.into(),
            lines: std::iter::once(0)
                .chain(text.match_indices('\n').map(|(at, _)| at + 1))
                .collect(),
            text,
            found: RefCell::default(),
        }
    }

    /// Reads a file; refuses what can't be a config file.
    pub(super) fn read(path: &Path) -> Result<Source> {
        let name = path.file_name().map_or_else(
            || path.display().to_string(),
            |name| name.to_string_lossy().into_owned(),
        );
        let shown = path.display();
        let bytes = read_bounded(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                Failure::new(Exit::NoInput, format!("there is no {shown}")).advice(
                    "`castra init` writes a config to start from; `--config PATH` names one elsewhere",
                )
            }
            io::ErrorKind::IsADirectory => Failure::new(
                Exit::NoInput,
                format!("{shown} is a directory, not a config file"),
            )
            .advice(format!(
                "name the file in it: {}",
                path.join("castra.toml").display()
            )),
            io::ErrorKind::InvalidInput => {
                Failure::new(Exit::NoInput, format!("{shown} is not a regular file"))
                    .advice("name a file that holds the config")
            }
            _ => {
                let failure = Failure::new(Exit::Io, format!("can't read {shown}")).because(&error);
                match error.kind() {
                    io::ErrorKind::PermissionDenied => failure.advice("make the file readable for you"),
                    _ => failure,
                }
            }
        })?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(
                Failure::new(Exit::Config, format!("{name}:1:1: larger than {MAX_BYTES} bytes"))
                    .because("a config file is never that large; put large values into files that the config names")
                    .advice("check which file `--config` names"),
            );
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Source::new(name, text)),
            Err(error) => {
                let valid = error.utf8_error().valid_up_to();
                let text = String::from_utf8_lossy(&error.as_bytes()[..valid]).into_owned();
                let (line, column) = position(&text, valid);
                Err(Failure::new(
                    Exit::Config,
                    format!("{name}:{line}:{column}: not UTF-8 from here on"),
                )
                .advice("save the file as UTF-8"))
            }
        }
    }

    /// Something is wrong; `fix` says what to write instead.
    pub(super) fn error(&self, at: Offset, text: impl Into<String>, fix: impl Into<String>) {
        let (text, fix) = (text.into(), fix.into());
        self.found.borrow_mut().errors.insert(Problem { at, text, fix });
    }

    /// Something is odd.
    pub(super) fn warn(&self, at: Offset, text: impl Into<String>, fix: impl Into<String>) {
        let (text, fix) = (text.into(), fix.into());
        self.found.borrow_mut().warnings.insert(Problem { at, text, fix });
    }

    /// Adds the TOML parser's errors. Of several in one line only the first is added: the others
    /// follow from it.
    pub(super) fn syntax_errors(&self, errors: &[toml::de::Error]) {
        let mut lines = BTreeSet::new();
        for error in errors {
            let at = error.span().map_or(0, |span| span.start);
            if lines.insert(self.line(at)) {
                let (text, fix) = self.syntax(at, error.message());
                self.error(at, text, fix);
            }
        }
    }

    /// The parser's message and what to write instead. The parser has no kinds of errors, so its
    /// messages are matched by their text; an unknown message is passed on as it is.
    fn syntax(&self, at: Offset, message: &str) -> (String, String) {
        let says = |start: &str| message.starts_with(start);
        let here = self
            .text
            .get(at..)
            .and_then(|rest| rest.lines().next())
            .unwrap_or_default();
        // A word that begins like a number, a boolean, `inf` or `nan` is refused as one of them.
        let like_a_value = says("invalid float") || says("invalid integer") || says("invalid boolean");
        let word = match says("string values must be quoted") || like_a_value {
            true => self.bare_word(at),
            false => None,
        };
        let fix = if let Some(word) = word {
            let meant = match word.to_ascii_lowercase().as_str() {
                "true" | "yes" | "on" => Some("true"),
                "false" | "no" | "off" => Some("false"),
                _ => None,
            };
            return match meant {
                Some(meant) => (
                    format!("{} isn't a TOML value", shown(word)),
                    format!("write `{meant}`, or {} for a text", quoted(word)),
                ),
                None => (
                    format!("{} stands without quotes", shown(word)),
                    format!("write {}", quoted(word)),
                ),
            };
        } else if says("duplicate key") {
            let key = here.split(['=', ']', '.']).next().unwrap_or_default().trim();
            return (
                format!("{} is there twice", shown(key)),
                "leave one of the two out".to_owned(),
            );
        } else if says("invalid basic string") || says("invalid literal string") {
            "close the string with a quote on the same line; write `\\\\` for a backslash"
        } else if says("unclosed array table") {
            "close it with `]]`"
        } else if says("unclosed table") || says("unclosed array") {
            "close it with `]`"
        } else if says("unclosed inline table") {
            "close it with `}`"
        } else if says("key with no value") {
            "write `key = value`"
        } else if says("extra assignment") {
            "put a comma between the two"
        } else if says("unexpected key or value") {
            "begin a new line for each key"
        } else {
            "see https://toml.io for how TOML is written"
        };
        (message.to_owned(), fix.to_owned())
    }

    /// The unquoted word around this place; `None` if it is rather an invalid number.
    fn bare_word(&self, at: Offset) -> Option<&str> {
        let before = self.text.get(..at)?;
        let of_a_word = |c: char| c.is_alphanumeric() || "_-+.".contains(c);
        let start = before.trim_end_matches(of_a_word).len();
        let line = self.text.get(start..)?.lines().next()?;
        let word = line.split(['#', ',', '"', ']', '}']).next()?.trim();
        let begins = word.chars().next()?;
        let text =
            begins.is_alphabetic() || word.contains(|c: char| c.is_alphabetic() && !"eExobn_".contains(c));
        text.then_some(word)
    }

    /// Records that the schema has this key.
    #[cfg(test)]
    pub(super) fn note_key(&self, section: &str, key: &str) {
        let full = if section.is_empty() {
            key.to_owned()
        } else {
            format!("{section}.{key}")
        };
        self.found.borrow_mut().keys.insert(full);
    }

    /// Every key looked for so far.
    #[cfg(test)]
    pub(super) fn keys(&self) -> BTreeSet<String> {
        self.found.borrow().keys.clone()
    }

    /// The warnings, in the order of the file.
    pub(super) fn warnings(&self) -> Vec<String> {
        self.render(&self.found.borrow().warnings)
    }

    /// The errors, in the order of the file.
    pub(super) fn errors(&self) -> Vec<String> {
        self.render(&self.found.borrow().errors)
    }

    /// All errors so far as one failure.
    pub(super) fn check(&self) -> Result<()> {
        let found = self.found.borrow();
        let mut errors = found.errors.iter();
        match (errors.next(), errors.next()) {
            (None, _) => Ok(()),
            (Some(only), None) => {
                Err(Failure::new(Exit::Config, self.format_problem(only)).advice(only.fix.clone()))
            }
            _ => Err(failure_of(&self.name, &self.render(&found.errors))),
        }
    }

    /// The line, from 1, in which something stands.
    pub(super) fn line(&self, at: Offset) -> usize {
        self.lines.partition_point(|&start| start <= at).max(1)
    }

    /// `castra.toml:4:8`.
    pub(super) fn place(&self, at: Offset) -> String {
        let line = self.line(at);
        let start = self.lines[line - 1];
        let (_, column) = position(&self.text[start..], at - start);
        format!("{}:{line}:{column}", self.name)
    }

    fn format_problem(&self, problem: &Problem) -> String {
        format!("{}: {}", self.place(problem.at), problem.text)
    }

    fn render(&self, problems: &BTreeSet<Problem>) -> Vec<String> {
        let shown = problems.iter().take(MAX_SHOWN);
        let mut lines: Vec<String> = shown
            .map(|problem| format!("{}; {}", self.format_problem(problem), problem.fix))
            .collect();
        if problems.len() > MAX_SHOWN {
            lines.push(format!(
                "{}: … and {} more",
                self.name,
                problems.len() - MAX_SHOWN
            ));
        }
        lines
    }
}

/// One failure for all these errors, each beginning with its place and ending with its remedy.
pub(super) fn failure_of(name: &str, errors: &[String]) -> Failure {
    match errors {
        [only] => Failure::new(Exit::Config, only.clone()).advice("correct that line"),
        _ => Failure::new(Exit::Config, format!("{name} has several mistakes"))
            .because(errors.join("\n"))
            .advice("correct these lines; each says how"),
    }
}

/// Line and column of a byte offset, both from 1, the column in characters.
fn position(text: &str, at: Offset) -> (usize, usize) {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    let before = &text[..at];
    let line = before.matches('\n').count() + 1;
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    // A byte order mark at the start of the file doesn't count as a column.
    let column = before[start..].chars().filter(|&c| c != '\u{feff}').count() + 1;
    (line, column)
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    // Checked before opening: opening a FIFO would wait for its writer.
    let kind = std::fs::metadata(path)?;
    if kind.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !kind.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
