//! `castra logs`.

use castra::core::bus::message::Message;
use castra::core::cancel::Cancel;
use castra::core::escape::escape_line;
use castra::core::failure::{Exit, Result};
use castra::core::logs::{LogLine, Source};
use castra::core::name::VmName;
use castra::core::operations::logs::{LogsItem, LogsOptions, logs};

use super::context::Context;
use super::find_project::{self, Selected};
use super::operands;
use crate::cli::{LogSource, Raw};

/// Longer lines are cut for the terminal, bytes.
const LIMIT: usize = 4096;
/// `bootstrap`, the longest word for a source.
const SOURCE_COLUMN: usize = 9;

/// Prints the last lines of each log, and with `-f` new ones.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let selected = find_project::project(raw)?;
    let known: Vec<VmName> = match &selected {
        Selected::Config(config) => config.vms.iter().map(|vm| vm.name.clone()).collect(),
        Selected::Record(_) => Vec::new(),
    };
    // All names that may precede a line, so that the column keeps its width when another VM speaks.
    let widest = known.iter().map(|vm| vm.as_str().len()).max();
    let mut column = widest.unwrap_or(0);
    let options = LogsOptions {
        vms: find_project::vms(&selected, operands::names(&raw.operands)?)?,
        known,
        sources: raw.sources.iter().map(|source| source_of(*source)).collect(),
        tail: raw.tail,
        since: raw.since,
        follow: raw.follow,
        // Without `-f` reading ends by itself, and Ctrl-C ends castra at once.
        cancel: match raw.follow {
            true => context.end_on_signals(),
            false => Cancel::new(),
        },
        ..LogsOptions::of(selected.state())
    };
    let outcome = logs(&options, |told| {
        match told {
            LogsItem::Line(line) if context.json => {
                let json = serde_json::to_string(&line).expect("a line is plain data");
                context.out.json_line(json);
            }
            LogsItem::Line(line) => {
                let name = line.vm.as_ref().map_or(0, |vm| vm.as_str().len());
                column = column.max(name);
                let shown = in_words(&line, column, context);
                context.out.line(shown);
            }
            LogsItem::CaughtUp => {
                context.out.flush();
                if options.follow {
                    context.out.look_for_reader();
                }
            }
        }
        context.out.is_open()
    })?;
    context.out.flush();
    if outcome.told == 0 && !context.json && !options.follow {
        context.say("these logs are empty: nothing has run yet, or nothing was printed");
    }
    Ok(match options.cancel.is_requested() {
        true => Exit::Interrupted,
        false => Exit::Done,
    })
}

fn source_of(source: LogSource) -> Source {
    match source {
        LogSource::Serial => Source::Serial,
        LogSource::Qemu => Source::Qemu,
        LogSource::Bootstrap => Source::Bootstrap,
        LogSource::Broker => Source::Broker,
        LogSource::Bus => Source::Bus,
    }
}

/// `web-0 serial    | login:`.
fn in_words(line: &LogLine, column: usize, context: &Context) -> String {
    let vm = line.vm.as_ref().map_or("", VmName::as_str);
    let prefix = format!("{vm:<column$} {:<SOURCE_COLUMN$} |", line.source.as_str());
    let prefix = context.style.source(line.source, &prefix);
    let text = match line.source {
        Source::Bus => bus_words(line),
        _ => line.line.clone(),
    };
    format!("{prefix} {}", escape_line(&text, LIMIT))
}

/// `host to vm:web: {"x":1}`; a line that isn't a message stays as it is.
fn bus_words(line: &LogLine) -> String {
    match Message::parse(line.line.as_bytes()) {
        Ok(message) if line.vm.is_some() => format!("to {}: {}", message.topic, message.payload.get()),
        Ok(message) => format!("{} to {}: {}", message.vm, message.topic, message.payload.get()),
        Err(_) => line.line.clone(),
    }
}
