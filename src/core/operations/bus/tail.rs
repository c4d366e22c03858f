//! `bus tail`: the messages in the logs of the bus, and new ones.
//!
//! Here: which log, how much of it, following it. Not here: reading one (`core::bus::log`). No
//! broker is asked, so this works without one. A reading command: nothing is journaled.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{BusSink, POLL_INTERVAL};
use crate::core::bus::log::LogReader;
use crate::core::bus::topic::Pattern;
use crate::core::cancel::Cancel;
use crate::core::failure::{Failure, Result};
use crate::core::root::paths::StateRoot;

/// Between two looks at a log that is followed. Messages are seen well within the 200 ms that a
/// person takes for at once.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(40);

/// What a `tail` is asked for.
#[derive(Clone, Debug)]
pub struct BusTailOptions {
    /// Whose logs.
    pub state: StateRoot,
    /// Which of them.
    pub log: LogOf,
    /// Which messages; none: all.
    pub topics: Vec<Pattern>,
    /// At most so many of the last ones; `None`: all that are kept.
    pub last: Option<u64>,
    /// Wait for more.
    pub follow: bool,
    /// Raised to stop.
    pub cancel: Cancel,
}

impl BusTailOptions {
    /// All that the bus has kept, and no waiting for more.
    pub fn new(state: StateRoot) -> BusTailOptions {
        BusTailOptions {
            state,
            log: LogOf::Bus,
            topics: Vec::new(),
            last: None,
            follow: false,
            cancel: Cancel::new(),
        }
    }
}

/// Which log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogOf {
    /// The bus: everything by everybody.
    Bus,
    /// What this sender published: a VM as the config spells it, `host` or `broker`.
    Sender(String),
}

/// What was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusTailOutcome {
    /// Messages passed on.
    pub messages: u64,
    /// Lines that were no messages and were passed over.
    pub corrupt: u64,
    /// How often files may have been rotated away before they were read.
    pub lost: u64,
}

/// Passes on the last messages, oldest first, and with `follow` new ones. A missing log counts as empty.
pub fn bus_tail(options: &BusTailOptions, sink: &mut dyn BusSink) -> Result<BusTailOutcome> {
    let path = match &options.log {
        LogOf::Bus => options.state.bus_log(),
        LogOf::Sender(sender) => options.state.bus_log_of(sender),
    };
    read(options, &path, sink).map_err(|error| Failure::io("read", &path, &error))
}

fn read(options: &BusTailOptions, path: &Path, sink: &mut dyn BusSink) -> io::Result<BusTailOutcome> {
    let mut reader = LogReader::open(path, options.topics.clone())?.until(&options.cancel);
    let stopped =
        |error: &io::Error| error.kind() == io::ErrorKind::Interrupted && options.cancel.is_requested();
    if let Some(last) = options.last {
        match reader.seek_last(last) {
            Err(error) if stopped(&error) => return Ok(BusTailOutcome::default()),
            sought => sought?,
        }
    }
    let mut messages = 0;
    while sink.is_open() {
        let next = match reader.next_message() {
            Err(error) if stopped(&error) => break,
            next => next?,
        };
        match next {
            Some(message) => {
                sink.message(&message);
                messages += 1;
            }
            None => {
                sink.caught_up();
                let wait = FOLLOW_INTERVAL.min(POLL_INTERVAL);
                if !options.follow || !sink.is_open() || options.cancel.pause(wait) {
                    break;
                }
            }
        }
        if options.cancel.is_requested() {
            break;
        }
    }
    sink.caught_up();
    Ok(BusTailOutcome {
        messages,
        corrupt: reader.skipped(),
        lost: reader.lost(),
    })
}
