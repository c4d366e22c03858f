//! How a command talks to its user.
//!
//! Here: stdout, stderr, their colours, the reporter that fits the flags, and the end of a
//! command: its failure shown, its exit code. Not here: any command.

use std::io;

use castra::core::cancel::Cancel;
use castra::core::config::{AccelChoice, Config, VmConfig};
use castra::core::failure::{Exit, Failure, Result};
use castra::core::reporter::Reporter;

use super::failure;
use super::interrupt::{cancel_on_signals, end_on_signals};
use super::output::Output;
use super::progress::{Expected, HumanReporter, JsonReporter, Trace, Verbosity};
use super::screen::Screen;
use super::style::Style;
use crate::cli::Raw;

/// What a command prints with.
pub struct Context {
    /// stdout: the result.
    pub out: Output,
    /// stderr: the conversation.
    pub screen: Screen,
    /// Colours of stdout.
    pub style: Style,
    /// Colours of stderr.
    pub err_style: Style,
    /// `--json`.
    pub json: bool,
    /// `--quiet`.
    pub quiet: bool,
    /// `--verbose`.
    pub verbose: bool,
    expected: Option<Expected>,
    trace: Trace,
}

impl Context {
    /// A context for these global flags.
    pub fn new(raw: &Raw) -> Context {
        Context {
            out: Output::default(),
            screen: Screen,
            expected: None,
            style: Style::decide(raw.color, &io::stdout()),
            err_style: Style::decide(raw.color, &io::stderr()),
            json: raw.json,
            quiet: raw.quiet,
            verbose: raw.verbose,
            trace: Trace::default(),
        }
    }

    /// A sentence on stderr, unless `--quiet`.
    pub fn say(&self, text: &str) {
        if !self.quiet {
            self.screen.say(text);
        }
    }

    /// A warning on stderr, even with `--quiet`.
    pub fn warn(&self, text: &str) {
        self.screen
            .say(&format!("{} {text}", self.err_style.warning("warning:")));
    }

    /// From now on signals ask the operation to stop.
    pub fn cancel_on_signals(&self) -> Cancel {
        cancel_on_signals(self.screen)
    }

    /// From now on signals end a command that only watches.
    pub fn end_on_signals(&self) -> Cancel {
        end_on_signals()
    }

    /// Runs an operation with the reporter that fits: contract lines on stdout with `--json`,
    /// else sentences on stderr.
    pub fn reporting<T>(&mut self, operation: impl FnOnce(&mut dyn Reporter) -> T) -> T {
        self.out.flush();
        if self.json {
            operation(&mut JsonReporter::new(&mut self.out, &mut self.trace))
        } else {
            operation(&mut self.people_reporter())
        }
    }

    /// The reporter of sentences on stderr, for the next operation.
    pub fn people_reporter(&mut self) -> HumanReporter {
        HumanReporter::new(self.screen, self.err_style, self.detail(), self.expected.take())
    }

    fn detail(&self) -> Verbosity {
        match (self.quiet, self.verbose) {
            (true, _) => Verbosity::Quiet,
            (false, true) => Verbosity::Verbose,
            (false, false) => Verbosity::Usual,
        }
    }

    /// Names the VMs that the next operation will work on; none: all declared VMs.
    pub fn expect(&mut self, config: &Config, vms: &[String]) {
        let asked = |vm: &&VmConfig| vms.is_empty() || vms.iter().any(|name| config.means(name, vm));
        let declared = config.vms.iter().filter(asked);
        self.expected = Some(Expected {
            vms: declared.map(|vm| vm.name.clone()).collect(),
            state: config.state.clone(),
            wants_emulation: config.qemu.accel == AccelChoice::Tcg,
        });
    }

    /// The end of a command: shows a failure, empties stdout, says the exit code.
    pub fn end(mut self, raw: &Raw, result: Result<Exit>) -> u8 {
        let exit = match result {
            Ok(exit) => exit,
            Err(failure) => {
                self.show(raw, &failure);
                failure.exit
            }
        };
        match self.out.finish() {
            Ok(()) => exit.code(),
            Err(failure) => {
                self.screen.say(&failure::render(&failure, self.err_style));
                if exit == Exit::Done {
                    failure.exit.code()
                } else {
                    exit.code()
                }
            }
        }
    }

    /// With `--json`, a refusal prints `command.rejected` exactly once: either the operation did it, or this
    /// does. So a script reads at least one line also where an operation couldn't begin for another reason.
    fn show(&mut self, raw: &Raw, failure: &Failure) {
        let silent = self.trace.last.is_none() && failure.exit != Exit::Interrupted;
        if self.json && !self.trace.rejected && (failure.exit.is_refusal() || silent) {
            let command = raw.command.map_or("castra", |command| command.row().words);
            self.out
                .json_line(failure::rejected(command, failure, &self.trace).contract_line());
        }
        self.out.flush();
        self.screen.say(&failure::render(failure, self.err_style));
    }
}
