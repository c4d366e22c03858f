//! `castra cp`: castra becomes `scp`.
//!
//! Here: which word is of a VM and which of this machine. Not here: the connection
//! (`core::bootstrap::ssh::client`), or the copying.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

use castra::core::bootstrap::ssh::SshTarget;
use castra::core::bootstrap::ssh::client;
use castra::core::failure::{Exit, Failure, Result};

use super::context::Context;
use super::ssh::common_options;
use super::{select, typed};
use crate::cli::Raw;

/// A place as typed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place<'a> {
    /// Of this machine.
    Here(&'a OsStr),
    /// `vm:path`.
    There(&'a OsStr, &'a OsStr),
}

/// Becomes `scp`; returns only where that can't be. The exit code is then scp's.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let places: Vec<Place<'_>> = raw.operands.iter().map(|word| place(word)).collect();
    let name = the_vm(&places)?;
    let typed_name = typed::name(&name.to_owned()).map_err(|failure| failure.because(LOCAL_ADVICE))?;
    let selected = select::project(raw)?;
    let vm = select::vm(&selected, &typed_name).map_err(|failure| {
        if failure.why.is_none() {
            failure.because(LOCAL_ADVICE)
        } else {
            failure
        }
    })?;
    let target = client::running_target(&selected.state(), &vm)?;
    context.out.finish()?;
    let error = Command::new("scp")
        .args(argv(&target, &places, context.quiet))
        .exec();
    Err(match error.kind() {
        io::ErrorKind::NotFound => {
            Failure::new(Exit::Unavailable, "there is no `scp`").advice("install the package openssh-client")
        }
        _ => Failure::new(Exit::Internal, "can't become `scp`").because(error),
    })
}

const LOCAL_ADVICE: &str =
    "a word with a colon before any slash is vm:path; `./a:b` is a file of this machine";

/// As scp takes words apart: a colon before any slash ends the name of a VM.
fn place(word: &OsStr) -> Place<'_> {
    let bytes = word.as_bytes();
    let colon = bytes.iter().position(|byte| *byte == b':');
    match colon {
        Some(at) if at > 0 && !bytes[..at].contains(&b'/') => Place::There(
            OsStr::from_bytes(&bytes[..at]),
            OsStr::from_bytes(&bytes[at + 1..]),
        ),
        _ => Place::Here(word),
    }
}

/// The one VM that the words are about: all sources or the destination.
fn the_vm<'a>(places: &[Place<'a>]) -> Result<&'a OsStr> {
    let usage = |what: &str, next: &str| Failure::new(Exit::Usage, what.to_owned()).advice(next);
    let (to, from) = places.split_last().expect("the parser refuses fewer than two");
    let there = |place: &Place<'a>| match place {
        Place::There(vm, _) => Some(*vm),
        Place::Here(_) => None,
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
                    "the sources lie in different places",
                    "one command copies from one VM, or from this machine",
                ));
            }
            Ok(vm)
        }
    }
}

fn argv(target: &SshTarget, places: &[Place<'_>], quiet: bool) -> Vec<OsString> {
    // Directories too, modes and times kept, and by sftp: the older protocol would have the guest's
    // shell take names with blanks apart.
    let mut argv: Vec<OsString> = ["-F", "/dev/null", "-r", "-p", "-s"].map(OsString::from).to_vec();
    if quiet {
        argv.push("-q".into());
    }
    for option in target.named_options().into_iter().chain(common_options(false)) {
        argv.extend(["-o".into(), option.into()]);
    }
    argv.push("--".into());
    argv.extend(places.iter().map(|place| match place {
        Place::There(_, path) => {
            let mut word = OsString::from(target.vm.as_str());
            word.push(":");
            word.push(path);
            word
        }
        // scp would take a name with a colon for a host's.
        Place::Here(path) if path.as_bytes().starts_with(b"/") => (*path).to_owned(),
        Place::Here(path) => OsString::from_vec([b"./", path.as_bytes()].concat()),
    }));
    argv
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn places<'a>(words: &'a [&'a str]) -> Vec<Place<'a>> {
        words.iter().map(|word| place(OsStr::new(word))).collect()
    }

    #[test]
    fn words_of_vms_and_of_this_machine() {
        let there = |vm: &'static str, path: &'static str| Place::There(OsStr::new(vm), OsStr::new(path));
        for (word, expected) in [
            ("web:/etc/a b", there("web", "/etc/a b")),
            ("web:", there("web", "")),
            ("web-0.x:a:b", there("web-0.x", "a:b")),
            ("./a:b", Place::Here(OsStr::new("./a:b"))),
            ("/a:b", Place::Here(OsStr::new("/a:b"))),
            (":a", Place::Here(OsStr::new(":a"))),
            ("-a", Place::Here(OsStr::new("-a"))),
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

    #[test]
    fn no_word_is_a_flag_or_another_host() {
        let target = SshTarget {
            vm: "web-0".parse().unwrap(),
            user: "root".into(),
            host: "::1".into(),
            port: 2222,
            identity: "/state/id_ed25519".into(),
            own_key: true,
            options: Vec::new(),
            dir: "/state/vms/web-0".into(),
        };
        let shown: Vec<String> = argv(&target, &places(&["-a", "./b:c", ":d", "Web-0:/x y"]), true)
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect();
        let end = shown.iter().position(|word| word == "--").unwrap();
        assert_eq!(shown[end + 1..], ["./-a", "././b:c", "./:d", "web-0:/x y"]);
        for word in ["HostName=::1", "Port=2222", "User=root", "BatchMode=yes", "-q"] {
            assert!(shown.contains(&word.to_owned()), "{word}");
        }
    }
}
