//! `castra broker-pipe PORT`, hidden: what QEMU runs for each connection of an isolated guest.

use std::io;

use castra::core::failure::{Exit, Failure, Result};
use castra::core::runtime::broker_pipe::broker_pipe;

use crate::cli::Raw;

/// Joins stdin and stdout to the broker until it closes. Our stderr is the guest's connection
/// too, so a broker that can't be reached shows in the exit code alone.
pub fn run(raw: &Raw) -> Result<Exit> {
    let word = raw.operands[0].to_string_lossy();
    let port = word.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(|| {
        Failure::new(Exit::Usage, format!("{word:?} is no port")).because("ports are 1 to 65535")
    })?;
    match broker_pipe(port, io::stdin(), io::stdout()) {
        Ok(()) => Ok(Exit::Done),
        Err(_) => Ok(Exit::Io),
    }
}
