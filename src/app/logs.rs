//! `castra logs`.

use castra::core::escape::escape_line;
use castra::core::failure::{Exit, Result};
use castra::core::logs::{Log, Source, last_lines, logs};
use castra::core::name::VmName;
use serde::Serialize;

use super::context::Context;
use super::select::{self, Selected};
use super::typed;
use crate::cli::{LogSource, Raw};

/// Last lines of each log, unless --tail says otherwise.
const USUAL_TAIL: usize = 50;
/// Longer lines are cut for the terminal, bytes.
const LIMIT: usize = 4096;

#[derive(Serialize)]
struct Line<'l> {
    vm: Option<&'l VmName>,
    source: &'static str,
    text: &'l str,
}

/// Prints the last lines of each.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let selected = select::project(raw)?;
    let known: Vec<VmName> = match &selected {
        Selected::Config(config) => config.vms.iter().map(|vm| vm.name.clone()).collect(),
        Selected::Record(_) => Vec::new(),
    };
    let sources: Vec<Source> = raw.sources.iter().map(|source| source_of(*source)).collect();
    let logs = logs(&selected.state(), &typed::names(&raw.operands)?, &sources, &known)?;
    let width = logs.iter().map(|log| label(log).len()).max().unwrap_or(0);
    let mut printed = 0;
    for log in &logs {
        for line in last_lines(&log.path, raw.tail.unwrap_or(USUAL_TAIL))? {
            printed += 1;
            if context.json {
                context.out.json(&Line {
                    vm: log.vm.as_ref(),
                    source: log.source.as_str(),
                    text: &line,
                });
            } else {
                let prefix = context.style.faint(&format!("{:<width$} |", label(log)));
                context
                    .out
                    .line(format!("{prefix} {}", escape_line(&line, LIMIT)));
            }
            if !context.out.is_open() {
                return Ok(Exit::Done);
            }
        }
    }
    context.out.flush();
    if printed == 0 && !context.json {
        context.say("these logs are empty: nothing has run yet, or nothing has been said");
    }
    Ok(Exit::Done)
}

fn source_of(source: LogSource) -> Source {
    match source {
        LogSource::Serial => Source::Serial,
        LogSource::Qemu => Source::Qemu,
        LogSource::Broker => Source::Broker,
    }
}

fn label(log: &Log) -> String {
    match &log.vm {
        Some(vm) => format!("{vm} {}", log.source.as_str()),
        None => log.source.as_str().to_owned(),
    }
}
