//! The command line: one table of commands and flags, and all that is printed from it.
//!
//! Here: turning argv into [`Raw`], help, the man pages, completions, docs/CLI.md. Not here: what
//! a value means beyond its type, or anything that touches the file system (`app`).

#[cfg(test)]
mod cited_tests;
mod completions;
mod guides;
mod help;
mod manpage;
#[cfg(test)]
mod markdown;
mod parse;
mod raw;
mod roff;
mod table;

pub use completions::completions;
pub use help::{first_steps, help, overview};
pub use manpage::{manpage, pages};
pub use parse::{Refused, parse};
#[cfg(test)]
pub use raw::HelpKind;
pub use raw::{ColorChoice, Raw};
pub use table::{Command, LogSource};

#[cfg(test)]
mod tests;
