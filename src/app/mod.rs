//! The commands: arguments become options, an operation runs, its outcome becomes text. One file a command.
//!
//! Here: what the commands share: the context they print through, dispatch, exit codes. Not here:
//! any decision about VMs (`core`).

mod bootstrap;
mod broker;
mod broker_pipe;
mod bus;
mod bus_bench;
mod clean;
mod completions;
mod console;
mod context;
mod cp;
mod doctor;
mod down;
mod events;
mod failure;
mod find_project;
mod harness;
mod image;
mod init;
mod interrupt;
mod live;
mod logs;
mod man;
mod meter;
mod operands;
mod output;
mod plan;
mod ports;
mod progress;
mod report;
mod restart;
mod screen;
mod sentence;
mod ssh;
mod ssh_config;
mod status;
mod style;
mod terminal;
mod up;
mod vm_names;
mod wait;
mod width;
mod workspaces;

use std::io::{self, Write};

use castra::core::failure::{Exit, Result};
use castra::core::human;

use crate::cli::{self, Command, Raw, Refused};
use context::Context;
use screen::Screen;

/// Runs one command line; what it returns is the exit code.
pub fn run(parsed: Result<Raw, Refused>) -> u8 {
    interrupt::outlive_file_limits();
    match parsed {
        Ok(raw) => {
            let mut context = Context::new(&raw);
            let result = dispatch(&mut context, &raw);
            context.end(&raw, result)
        }
        Err(Refused { failure, raw }) => Context::new(&raw).end(&raw, Err(failure)),
    }
}

/// A message that is printed even if the screen's lock was left by a panic.
pub fn say_if_free(text: &str) {
    Screen.say_if_free(text);
}

/// Where log lines go: to stderr, above what changes there.
pub struct LogLines;

impl Write for LogLines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Screen.say_if_free(String::from_utf8_lossy(bytes).trim_end_matches('\n'));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn dispatch(context: &mut Context, raw: &Raw) -> Result<Exit> {
    if raw.version {
        context.out.line(concat!("castra ", env!("CARGO_PKG_VERSION")));
        return Ok(Exit::Done);
    }
    if raw.first_steps {
        context.out.text(cli::first_steps());
        return Ok(Exit::Done);
    }
    if let Some(kind) = raw.help {
        context.out.verbatim(match raw.command {
            Some(command) => cli::help(command, kind),
            None => cli::overview(raw.group, kind),
        });
        return Ok(Exit::Done);
    }
    let command = raw.command.expect("the parser refuses a line without command");
    match command {
        Command::Completions => completions::run(context, raw),
        Command::Man => man::run(context, raw),
        Command::BrokerPipe => broker_pipe::run(raw),
        Command::ExecFeed => ssh::feed(raw),
        Command::Broker => broker::run(context, raw),
        Command::BusPublish => bus::publish(context, raw),
        Command::BusRequest => bus::request(context, raw),
        Command::BusSubscribe => bus::subscribe(context, raw),
        Command::BusTail => bus::tail(context, raw),
        Command::BusBench => bus_bench::run(context, raw),
        Command::Status => status::run(context, raw),
        Command::Wait => wait::run(context, raw),
        Command::Bootstrap => bootstrap::run(context, raw),
        Command::Down => down::run(context, raw),
        Command::Restart => restart::run(context, raw),
        Command::Up => up::run(context, raw),
        Command::Events => events::run(context, raw),
        Command::Report => report::run(context, raw),
        Command::HarnessRun => harness::run(context, raw),
        Command::HarnessRelay => harness::relay(context, raw),
        Command::HarnessList => harness::list(context, raw),
        Command::HarnessShow => harness::show(context, raw),
        Command::HarnessUsage => harness::usage(context, raw),
        Command::ImageBuild => image::build(context, raw),
        Command::ImageList => image::list(context),
        Command::ImagePath => image::path(context, raw),
        Command::Init => init::run(context, raw),
        Command::Logs => logs::run(context, raw),
        Command::Clean => clean::run(context, raw),
        Command::Ports => ports::run(context, raw),
        Command::Doctor => doctor::run(context, raw),
        Command::Ssh | Command::Exec => ssh::run(context, raw),
        Command::Cp => cp::run(context, raw),
        Command::Console => console::run(context, raw),
        Command::SshConfig => ssh_config::run(context, raw),
        Command::VmNames => vm_names::run(context, raw),
        Command::Workspaces => workspaces::run(context),
    }
}
