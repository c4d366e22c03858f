//! `events`: what the two journals of a project hold, merged by time.
//!
//! Here: reading them, rotated files included, and picking by type and VM. Not here: writing them
//! (`core::journal`), or words for people (`app`). A reading command: nothing is journaled.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::core::events::contract::Stamped;
use crate::core::failure::{Failure, Result};
use crate::core::paths::StateRoot;

/// Rotated files beyond this number are not looked for: `log_keep` is never that large.
const MOST_ROTATED: u32 = 1000;

/// What is wanted.
#[derive(Clone, Debug)]
pub struct EventsOptions {
    /// Whose journals.
    pub state: StateRoot,
    /// Types, a `*` at the end matching any rest; none: all.
    pub types: Vec<String>,
    /// VMs, compared without case; none: all events, those about no VM too.
    pub vms: Vec<String>,
}

/// One line of a journal.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// The contract line as it was kept.
    pub line: String,
    /// Its time.
    pub ts: String,
    /// Its type; a later castra may have kept some that this one doesn't know.
    pub kind: String,
    /// What it says, if this castra knows the type.
    pub event: Option<Stamped>,
}

/// Hands over every line that is wanted, in order of time, until `take` returns false. Lines that
/// are no contract lines (a torn tail) are passed over.
pub fn events(options: &EventsOptions, mut take: impl FnMut(Kept) -> bool) -> Result<()> {
    let mut streams = [
        Lines::of(&options.state.events())?,
        Lines::of(&options.state.broker_events())?,
    ];
    let mut heads = [streams[0].next_kept(options)?, streams[1].next_kept(options)?];
    loop {
        // RFC 3339 in UTC with milliseconds: the order of the text is the order of time.
        let first = match &heads {
            [None, None] => return Ok(()),
            [Some(_), None] => 0,
            [None, Some(_)] => 1,
            [Some(own), Some(broker)] => usize::from(broker.ts < own.ts),
        };
        let next = streams[first].next_kept(options)?;
        if let Some(kept) = std::mem::replace(&mut heads[first], next)
            && !take(kept)
        {
            return Ok(());
        }
    }
}

/// The fields that lines are picked by.
#[derive(Deserialize)]
struct Head {
    #[serde(rename = "type")]
    kind: String,
    ts: String,
    vm: Option<String>,
}

/// The lines of one journal, oldest file first.
struct Lines {
    files: Vec<(PathBuf, BufReader<File>)>,
}

impl Lines {
    /// The newest is opened first: a rotation in between gives a file a higher number, so it is
    /// met twice at worst, and told by its inode.
    fn of(path: &Path) -> Result<Lines> {
        let mut files = Vec::new();
        let mut seen = HashSet::new();
        for number in 0..MOST_ROTATED {
            let mut name = path.as_os_str().to_owned();
            if number > 0 {
                name.push(format!(".{number}"));
            }
            let name = PathBuf::from(name);
            let opened = File::open(&name).and_then(|file| Ok((file.metadata()?, file)));
            let (meta, file) = match opened {
                Ok(opened) => opened,
                // Right after a rotation there is no newest file yet.
                Err(error) if error.kind() == io::ErrorKind::NotFound && number == 0 => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(Failure::io("read", &name, &error)),
            };
            if meta.is_file() && seen.insert((meta.dev(), meta.ino())) {
                files.push((name, BufReader::new(file)));
            }
        }
        Ok(Lines { files })
    }

    fn next_kept(&mut self, options: &EventsOptions) -> Result<Option<Kept>> {
        while let Some((path, reader)) = self.files.last_mut() {
            let mut bytes = Vec::new();
            let read = reader
                .read_until(b'\n', &mut bytes)
                .map_err(|error| Failure::io("read", path, &error))?;
            if read == 0 {
                self.files.pop();
                continue;
            }
            let kept = std::str::from_utf8(&bytes)
                .ok()
                .and_then(|line| kept(line.trim_end(), options));
            if kept.is_some() {
                return Ok(kept);
            }
        }
        Ok(None)
    }
}

fn kept(line: &str, options: &EventsOptions) -> Option<Kept> {
    let head: Head = serde_json::from_str(line).ok()?;
    let typed = options.types.is_empty() || options.types.iter().any(|pattern| matches(pattern, &head.kind));
    let about = options.vms.is_empty()
        || head
            .vm
            .is_some_and(|vm| options.vms.iter().any(|name| name.eq_ignore_ascii_case(&vm)));
    (typed && about).then(|| Kept {
        line: line.to_owned(),
        ts: head.ts,
        kind: head.kind,
        event: Stamped::from_contract_line(line),
    })
}

fn matches(pattern: &str, kind: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => kind.starts_with(prefix),
        None => pattern == kind,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;
    use crate::core::scratch::Scratch;

    fn line(ts: u32, kind: &str, vm: &str) -> String {
        format!("{{\"type\":\"{kind}\",\"v\":1,\"ts\":\"2026-11-21T10:00:00.{ts:03}Z\",\"vm\":{vm}}}\n")
    }

    fn ask(state: &StateRoot, types: &[&str], vms: &[&str]) -> Vec<String> {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let options = EventsOptions {
            state: state.clone(),
            types: owned(types),
            vms: owned(vms),
        };
        let mut seen = Vec::new();
        events(&options, |kept| {
            seen.push(kept.ts[20..23].to_owned());
            true
        })
        .unwrap();
        seen
    }

    #[test]
    fn both_journals_and_their_rotated_files_in_order_of_time() {
        let scratch = Scratch::new("events");
        let state = StateRoot::new(scratch.dir());
        assert!(ask(&state, &[], &[]).is_empty(), "no journal yet");
        fs::create_dir_all(state.logs()).unwrap();
        fs::write(
            state.logs().join("events.jsonl.2"),
            line(1, "summary", "null") + "{\"torn",
        )
        .unwrap();
        fs::write(
            state.logs().join("events.jsonl.1"),
            line(3, "bootstrap.step", "\"Web-0\""),
        )
        .unwrap();
        fs::write(state.events(), line(5, "vm.teleported", "\"db\"")).unwrap();
        fs::write(
            state.broker_events(),
            line(2, "broker.started", "null") + &line(4, "broker.handshake", "\"web-0\""),
        )
        .unwrap();
        assert_eq!(ask(&state, &[], &[]), ["001", "002", "003", "004", "005"]);
        assert_eq!(ask(&state, &["broker.*", "summary"], &[]), ["001", "002", "004"]);
        assert_eq!(ask(&state, &[], &["WEB-0"]), ["003", "004"]);
        assert_eq!(ask(&state, &["bootstrap"], &[]), [""; 0]);
    }

    #[test]
    fn whoever_takes_may_stop() {
        let scratch = Scratch::new("events-stop");
        let state = StateRoot::new(scratch.dir());
        fs::create_dir_all(state.logs()).unwrap();
        fs::write(state.events(), line(1, "summary", "null").repeat(3)).unwrap();
        let options = EventsOptions {
            state,
            types: Vec::new(),
            vms: Vec::new(),
        };
        let mut count = 0;
        events(&options, |_| {
            count += 1;
            false
        })
        .unwrap();
        assert_eq!(count, 1);
    }
}
