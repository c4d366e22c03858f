//! `castra cp`: files into or out of a VM.
//!
//! Here: telling places in a VM from places on this machine, and the messages at the end. Not here: the
//! copying (`core::copy`).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use castra::core::bootstrap::ssh::login;
use castra::core::copy;
use castra::core::failure::{Exit, Failure, Result};

use super::context::Context;
use super::ssh::no_connection;
use super::{find_project, human, operands};
use crate::cli::Raw;

/// How many of the files that weren't copied are named.
const NAMED: usize = 20;

/// A place as typed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum CpPath<'a> {
    /// A path on this machine.
    Here(&'a OsStr),
    /// `vm:path`.
    There(&'a OsStr, &'a OsStr),
}

/// Copies, and names what wasn't copied.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let places: Vec<CpPath<'_>> = raw.operands.iter().map(|word| place(word)).collect();
    let name = the_vm(&places)?;
    let typed_name = operands::name(&name.to_owned()).map_err(|failure| failure.because(LOCAL_ADVICE))?;
    let selected = find_project::project(raw)?;
    let vm = find_project::vm(&selected, &typed_name).map_err(|failure| {
        if failure.why.is_none() {
            failure.because(LOCAL_ADVICE)
        } else {
            failure
        }
    })?;
    let target = login::running_target(&selected.state(), &vm).map_err(no_connection)?;
    let (to, from) = places.split_last().expect("the parser refuses fewer than two");
    let copied = match to {
        CpPath::There(_, path) => {
            let sources: Vec<PathBuf> = from.iter().map(|place| PathBuf::from(place.path())).collect();
            copy::put(&target, &sources, path)?
        }
        CpPath::Here(path) => {
            let sources: Vec<OsString> = from.iter().map(|place| place.path().to_owned()).collect();
            copy::get(&target, &sources, Path::new(path))?
        }
    };
    for line in copied.said.iter().chain(copied.left_out.iter()).take(NAMED) {
        context.warn(line);
    }
    match copied.left_out.len() {
        0 => Ok(Exit::Done),
        all => {
            let more = all.saturating_sub(NAMED);
            let what = format!("not everything was copied; {} were", human::bytes(copied.bytes));
            let mut failure = Failure::new(Exit::Failed, what);
            if let CpPath::There(..) = to
                && copied.left_out.iter().any(|line| no_room(line))
            {
                failure = failure.advice(format!(
                    "castra exec {vm} -- df -h shows where there is room; the default guest keeps /root, /home, /srv, /opt and /var on \
                     its disk (`disk_size`), everything else in its memory"
                ));
            }
            Err(if more > 0 {
                failure.because(format!("{more} more lines like these"))
            } else {
                failure
            })
        }
    }
}

/// How tar and cat report a full disk.
fn no_room(line: &str) -> bool {
    line.contains("No space left on device")
}

impl<'a> CpPath<'a> {
    fn path(&self) -> &'a OsStr {
        match self {
            CpPath::Here(path) | CpPath::There(_, path) => path,
        }
    }
}

const LOCAL_ADVICE: &str =
    "a word with a colon before any slash is vm:path; `./a:b` is a file on this machine";

/// Splits a word as scp does: a colon before any slash ends the name of a VM.
fn place(word: &OsStr) -> CpPath<'_> {
    let bytes = word.as_bytes();
    let colon = bytes.iter().position(|byte| *byte == b':');
    match colon {
        Some(at) if at > 0 && !bytes[..at].contains(&b'/') => CpPath::There(
            OsStr::from_bytes(&bytes[..at]),
            OsStr::from_bytes(&bytes[at + 1..]),
        ),
        _ => CpPath::Here(word),
    }
}

/// The one VM that the words are about: all sources or the destination.
fn the_vm<'a>(places: &[CpPath<'a>]) -> Result<&'a OsStr> {
    let usage = |what: &str, next: &str| Failure::new(Exit::Usage, what.to_owned()).advice(next);
    let (to, from) = places.split_last().expect("the parser refuses fewer than two");
    let there = |place: &CpPath<'a>| match place {
        CpPath::There(vm, _) => Some(*vm),
        CpPath::Here(_) => None,
    };
    let sources: Vec<&OsStr> = from.iter().filter_map(there).collect();
    match (sources.first(), there(to)) {
        (None, None) => Err(usage(
            "neither side is in a VM",
            "write one side as vm:path, for example `castra cp notes.txt web:/root/`",
        )),
        (Some(_), Some(_)) => Err(usage(
            "both sides are in a VM",
            "copy through this machine: `castra exec A -- tar c … | castra exec B -- tar x`",
        )),
        (None, Some(vm)) => Ok(vm),
        (Some(vm), None) => {
            let alike = |other: &&OsStr| other.as_bytes().eq_ignore_ascii_case(vm.as_bytes());
            if sources.len() < from.len() || !sources.iter().all(alike) {
                return Err(usage(
                    "the sources are in different places",
                    "one command copies from one VM, or from this machine",
                ));
            }
            Ok(vm)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places<'a>(words: &'a [&'a str]) -> Vec<CpPath<'a>> {
        words.iter().map(|word| place(OsStr::new(word))).collect()
    }

    #[test]
    fn words_of_vms_and_of_this_machine() {
        let there = |vm: &'static str, path: &'static str| CpPath::There(OsStr::new(vm), OsStr::new(path));
        for (word, expected) in [
            ("web:/etc/a b", there("web", "/etc/a b")),
            ("web:", there("web", "")),
            ("web-0.x:a:b", there("web-0.x", "a:b")),
            ("./a:b", CpPath::Here(OsStr::new("./a:b"))),
            ("/a:b", CpPath::Here(OsStr::new("/a:b"))),
            (":a", CpPath::Here(OsStr::new(":a"))),
            ("-a", CpPath::Here(OsStr::new("-a"))),
        ] {
            assert_eq!(place(OsStr::new(word)), expected, "{word}");
        }
    }

    #[test]
    fn one_vm_on_one_side() {
        for (words, expected) in [
            (&["a", "web:b"][..], Ok("web")),
            (&["a", "./c:d", "web:"], Ok("web")),
            (&["web:a", "WEB:c", "here"], Ok("web")),
            (&["a", "b"], Err("neither side")),
            (&["web:a", "db:b"], Err("both sides")),
            (&["web:a", "db:b", "."], Err("different places")),
            (&["web:a", "b", "."], Err("different places")),
        ] {
            match (the_vm(&places(words)), expected) {
                (Ok(found), Ok(vm)) => assert_eq!(found, vm, "{words:?}"),
                (Err(failure), Err(part)) => assert!(failure.to_string().contains(part), "{failure}"),
                (found, _) => panic!("{words:?}: {found:?}"),
            }
        }
    }
}
