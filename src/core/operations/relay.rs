//! The broker's events on some VMs, passed through while an operation runs (DESIGN §8).
//!
//! Here: following the broker's journal from where it ended when the operation began. Not here:
//! the journal's format (`core::journal`), or keeping the events again: the broker has.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::core::cancel::Cancel;
use crate::core::events::Event;
use crate::core::events::contract::Stamped;
use crate::core::host;
use crate::core::reporter::Emitter;

/// How long a pass waits before it looks for more: what a watcher feels as "at once".
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Read at most this much in one go; the rest comes in the next.
const PIECE: u64 = 256 * 1024;

/// A place in the broker's journal.
pub(crate) struct Relay {
    path: PathBuf,
    file: Option<File>,
    position: u64,
    torn: Vec<u8>,
    names: HashSet<String>,
}

impl Relay {
    /// Starts at the journal's present end, for events on these VMs (lower-case names).
    pub(crate) fn from_now(path: &Path, names: HashSet<String>) -> Relay {
        let file = File::open(path).ok();
        let position = file
            .as_ref()
            .and_then(|file| file.metadata().ok())
            .map_or(0, |meta| meta.len());
        Relay {
            path: path.to_owned(),
            file,
            position,
            torn: Vec::new(),
            names,
        }
    }

    /// Passes events on until `done` is raised, and then what was written until that moment.
    pub(crate) fn follow(mut self, emitter: &Emitter<'_>, done: &Cancel) {
        loop {
            let last = done.pause(LOOK_EVERY);
            while self.pass(emitter) {}
            if last {
                return;
            }
        }
    }

    /// One piece; true if there may be more.
    fn pass(&mut self, emitter: &Emitter<'_>) -> bool {
        let mut bytes = Vec::new();
        if let Some(file) = self.file.as_mut() {
            let read = file
                .seek(SeekFrom::Start(self.position))
                .and_then(|_| file.take(PIECE).read_to_end(&mut bytes));
            if read.is_err() {
                return false;
            }
        }
        if bytes.is_empty() {
            return self.reopen_if_rotated();
        }
        self.position += bytes.len() as u64;
        self.torn.extend_from_slice(&bytes);
        let whole = self
            .torn
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        for line in self.torn[..whole].split(|byte| *byte == b'\n') {
            let stamped = std::str::from_utf8(line)
                .ok()
                .and_then(Stamped::from_contract_line);
            if let Some(stamped) = stamped.filter(|stamped| self.concerns(&stamped.event)) {
                emitter.pass_on(&stamped);
            }
        }
        self.torn.drain(..whole);
        true
    }

    fn reopen_if_rotated(&mut self) -> bool {
        if self
            .file
            .as_ref()
            .is_some_and(|file| host::names_this_file(&self.path, file))
        {
            return false;
        }
        let Ok(file) = File::open(&self.path) else {
            return false;
        };
        self.file = Some(file);
        self.position = 0;
        self.torn.clear();
        true
    }

    fn concerns(&self, event: &Event) -> bool {
        let vm = match event {
            Event::BrokerHandshake { vm, .. } | Event::BrokerBackpressure { vm, .. } => vm.as_ref(),
            Event::BrokerSession { vm, .. }
            | Event::BrokerFreshness { vm, .. }
            | Event::VmExited { vm, .. } => Some(vm),
            _ => None,
        };
        vm.is_some_and(|vm| self.names.contains(&vm.key()))
    }
}
