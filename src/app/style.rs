//! Whether text has colour, and which.
//!
//! Here: the decision, once per stream, and castra's few colours. Not here: which text gets a colour (each
//! renderer).

use std::env;
use std::io::IsTerminal;

use castra::core::logs::Source;

use crate::cli::ColorChoice;

/// The colours of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    on: bool,
}

impl Style {
    /// Plain text, which golden tests compare.
    #[cfg(test)]
    pub const PLAIN: Style = Style { on: false };

    /// By flag, environment and terminal, in this order (docs/CLI.md).
    pub fn decide(choice: ColorChoice, stream: &impl IsTerminal) -> Style {
        let on = match choice {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            // no-color.org: set and not empty.
            ColorChoice::Auto => {
                env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && is_capable(stream)
            }
        };
        Style { on }
    }

    /// For failures.
    pub fn error(self, text: &str) -> String {
        self.paint("1;31", text)
    }

    /// For warnings.
    pub fn warning(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// For what is well.
    pub fn success(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// For the most important text.
    pub fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    /// For unimportant text.
    pub fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    /// A log's source, each in its own colour.
    pub fn source(self, source: Source, text: &str) -> String {
        self.paint(
            match source {
                Source::Serial => "32",
                Source::Qemu => "33",
                Source::Bootstrap => "34",
                Source::Broker => "36",
                Source::Bus => "35",
            },
            text,
        )
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.on && !text.is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Whether a stream is a terminal that understands escape sequences.
pub fn is_capable(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && env::var_os("TERM").is_some_and(|term| !term.is_empty() && term != "dumb")
}
