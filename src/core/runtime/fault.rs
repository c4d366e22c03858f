//! Why a VM didn't start, as types that code can branch on and people can read.
//!
//! Here: the list of failures, which of them QEMU's messages mean, and what the user can do about
//! each. QEMU has no error codes, so this module alone searches its texts. Not here: noticing a
//! failure ([`super::launch`]).

use std::fmt;
use std::io;

use crate::core::escape::escape_line;
use crate::core::failure::{Exit, Failure};
use crate::core::name::VmName;
use crate::core::process::JobError;

use super::forwards::PortTaken;
use super::qmp::QmpError;

/// Longest excerpt of QEMU's output in a message, bytes.
const WORDS: usize = 600;

/// Why a launch failed. Nothing of it is left running.
#[derive(Debug)]
pub enum LaunchError {
    /// This VM's QEMU runs already; its pid.
    AlreadyRunning(u32),
    /// A host port is in use.
    Port(PortTaken),
    /// QEMU itself couldn't be run, or not in time.
    Job(JobError),
    /// QEMU refused to start.
    Refused(StartFailure),
    /// QEMU started and was gone before it answered QMP; its last words, if any.
    Died(String),
    /// QEMU runs but QMP doesn't answer.
    Mute(QmpError),
    /// QMP says `internal-error`: the accelerator can't run this guest; QEMU's words.
    InternalError(String),
    /// A file of the VM can't be made.
    Io(Failure),
    /// Somebody asked to stop.
    Cancelled,
}

/// Why QEMU refused to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartFailure {
    /// A forward's host port was taken after it was chosen.
    PortTaken(u16),
    /// KVM can't be used.
    NoKvm(String),
    /// Another process has an image open.
    DiskInUse(String),
    /// An image isn't what it should be.
    BadImage(String),
    /// A file can't be opened.
    NoFile(String),
    /// The host has too little memory.
    NoMemory(String),
    /// This QEMU was built without the system call filter.
    NoSandbox(String),
    /// Anything else.
    Other(String),
}

impl StartFailure {
    /// Which failure the output of a QEMU that refused to start means.
    pub fn from_words(words: &str) -> StartFailure {
        let says = |part: &str| words.contains(part);
        let shown = own_words(words);
        if let Some(port) = refused_port(words) {
            StartFailure::PortTaken(port)
        } else if says("Could not access KVM")
            || says("failed to initialize kvm")
            || says("invalid accelerator kvm")
        {
            StartFailure::NoKvm(shown)
        } else if says("\"write\" lock") || says("Is another process using") {
            StartFailure::DiskInUse(shown)
        } else if says("Image is not in") || says("Unknown driver") || says("Image is corrupt") {
            StartFailure::BadImage(shown)
        } else if says("annot set up guest memory") || says("Cannot allocate memory") {
            StartFailure::NoMemory(shown)
        } else if says("-sandbox") || says("seccomp") {
            StartFailure::NoSandbox(shown)
        } else if says("No such file or directory") || says("Permission denied") {
            StartFailure::NoFile(shown)
        } else {
            // The option may come from the config.
            StartFailure::Other(words_of(words, true))
        }
    }

    fn words(&self) -> Option<&str> {
        match self {
            StartFailure::PortTaken(_) => None,
            StartFailure::NoKvm(words)
            | StartFailure::DiskInUse(words)
            | StartFailure::BadImage(words)
            | StartFailure::NoFile(words)
            | StartFailure::NoMemory(words)
            | StartFailure::NoSandbox(words)
            | StartFailure::Other(words) => Some(words).filter(|words| !words.is_empty()).map(String::as_str),
        }
    }
}

/// The port in `Could not set up host forwarding rule 'tcp:127.0.0.1:7777-:22'`.
fn refused_port(words: &str) -> Option<u16> {
    let (_, rule) = words.split_once("Could not set up host forwarding rule '")?;
    let host = rule.split_once("-:")?.0;
    host.rsplit(':').next()?.parse().ok()
}

/// What QEMU said, as one line: without warnings, without its own name at each line's start, and
/// without the option it repeats before the point.
pub fn own_words(words: &str) -> String {
    words_of(words, false)
}

/// The same; with `names_option` the option that the message is about stays.
fn words_of(words: &str, names_option: bool) -> String {
    let lines: Vec<String> = words
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.contains(": warning:"))
        .map(|line| {
            let line = line
                .split_once(": ")
                .filter(|(program, _)| program.starts_with("qemu"))
                .map_or(line, |(_, rest)| rest);
            let point = (line.starts_with('-') && !names_option)
                .then(|| line.split_once(": "))
                .flatten()
                .map_or(line, |(_, point)| point);
            point.to_owned()
        })
        .collect();
    escape_line(&lines.join("; "), WORDS)
}

impl From<JobError> for LaunchError {
    fn from(error: JobError) -> LaunchError {
        match error {
            JobError::Cancelled => LaunchError::Cancelled,
            other => LaunchError::Job(other),
        }
    }
}

impl fmt::Display for LaunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LaunchError::AlreadyRunning(pid) => write!(f, "its QEMU is running already (pid {pid})"),
            LaunchError::Port(taken) => taken.fmt(f),
            LaunchError::Job(error) => error.fmt(f),
            LaunchError::Refused(StartFailure::PortTaken(port)) => {
                write!(
                    f,
                    "port {port} of 127.0.0.1 was taken by another process just now"
                )
            }
            LaunchError::Refused(fault) => {
                let words = fault.words().unwrap_or("it printed no reason");
                write!(f, "QEMU refused to start: {words}")
            }
            LaunchError::Died(words) if words.is_empty() => {
                write!(f, "QEMU ended before it answered, and printed nothing")
            }
            LaunchError::Died(words) => write!(f, "QEMU ended before it answered: {words}"),
            LaunchError::Mute(error) => write!(f, "QEMU runs but doesn't answer: {error}"),
            LaunchError::InternalError(words) if words.is_empty() => {
                write!(f, "the accelerator can't run this guest (QMP: internal-error)")
            }
            LaunchError::InternalError(words) => {
                write!(
                    f,
                    "the accelerator can't run this guest (QMP: internal-error): {words}"
                )
            }
            LaunchError::Io(failure) => failure.fmt(f),
            LaunchError::Cancelled => write!(f, "interrupted"),
        }
    }
}

impl std::error::Error for LaunchError {}

impl LaunchError {
    /// Which of these further arguments QEMU names as the reason, if it does.
    pub fn blames(&self, qemu_args: &[String]) -> Option<usize> {
        let words = match self {
            LaunchError::Refused(fault) => fault.words()?,
            LaunchError::Died(words) => words,
            _ => return None,
        };
        (0..qemu_args.len()).find(|index| {
            let option = &qemu_args[*index];
            let value = qemu_args.get(index + 1).filter(|value| !value.starts_with('-'));
            let named = match value {
                Some(value) => format!("{option} {value}:"),
                None => format!("{option}:"),
            };
            option.starts_with('-') && words.contains(&named)
        })
    }

    /// The failure for the user, with what to do about it.
    pub fn into_failure(self, vm: &VmName) -> Failure {
        let what = format!("vm `{vm}` did not start");
        let exit = match &self {
            LaunchError::Job(JobError::NotStarted { .. }) => Exit::Unavailable,
            LaunchError::Io(failure) => return failure.clone(),
            LaunchError::Cancelled => Exit::Interrupted,
            LaunchError::AlreadyRunning(_) => Exit::Busy,
            _ => Exit::Failed,
        };
        let next = match &self {
            LaunchError::AlreadyRunning(_) => format!("castra restart {vm}"),
            LaunchError::Port(taken) => taken.advice(),
            LaunchError::Refused(StartFailure::PortTaken(_)) => {
                "start it again, or set `host = 0` in that forward to have a free port chosen".into()
            }
            LaunchError::Refused(StartFailure::NoKvm(_)) => {
                "set `accel = \"tcg\"` or `accel = \"auto\"` under [qemu]".into()
            }
            LaunchError::Refused(StartFailure::DiskInUse(_)) => {
                "stop the process that uses that image; another project may name the same `overlay`".into()
            }
            LaunchError::Refused(StartFailure::BadImage(_)) => {
                "check the file with `qemu-img info`; `base_image` takes qcow2 and raw images".into()
            }
            LaunchError::Refused(StartFailure::NoMemory(_)) => {
                "lower `memory` in castra.toml, or stop other VMs".into()
            }
            LaunchError::Refused(StartFailure::NoSandbox(_)) => {
                "use a QEMU with seccomp support: that of the distribution has it".into()
            }
            LaunchError::InternalError(_) => "set `accel = \"tcg\"` under [qemu]".into(),
            LaunchError::Job(JobError::NotStarted { .. }) => {
                "install QEMU, or set `binary` under [qemu]".into()
            }
            LaunchError::Cancelled => return Failure::new(exit, what).because(self),
            LaunchError::Job(_)
            | LaunchError::Refused(_)
            | LaunchError::Died(_)
            | LaunchError::Mute(_)
            | LaunchError::Io(_) => format!("castra logs {vm} shows what QEMU and the guest said"),
        };
        Failure::new(exit, what).because(self).advice(next)
    }
}

/// A child that didn't end in time, as a launch error.
pub(super) fn io_error(verb: &str, path: &std::path::Path, error: &io::Error) -> LaunchError {
    LaunchError::Io(Failure::io(verb, path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Expected = fn(&StartFailure) -> bool;

    #[test]
    fn words_of_real_qemus_are_sorted() {
        // Copied from QEMU 7.2.
        let cases: [(&str, Expected); 8] = [
            (
                "qemu-system-x86_64: -netdev user,id=n,hostfwd=tcp:127.0.0.1:22-:22,hostfwd=tcp:127.0.0.1:7777-:23: \
                 Could not set up host forwarding rule 'tcp:127.0.0.1:7777-:23'",
                |fault| *fault == StartFailure::PortTaken(7777),
            ),
            (
                "Could not access KVM kernel module: Permission denied\n\
                 qemu-system-x86_64: -accel kvm: failed to initialize kvm: Permission denied",
                |fault| matches!(fault, StartFailure::NoKvm(_)),
            ),
            (
                "qemu-system-x86_64: -blockdev driver=qcow2,node-name=d: Failed to get \"write\" lock\n\
                 Is another process using the image [/a.qcow2]?",
                |fault| matches!(fault, StartFailure::DiskInUse(_)),
            ),
            (
                "qemu-system-x86_64: -drive file=/etc/passwd,format=qcow2: Image is not in qcow2 format",
                |fault| *fault == StartFailure::BadImage("Image is not in qcow2 format".into()),
            ),
            (
                "qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory",
                |fault| matches!(fault, StartFailure::NoMemory(_)),
            ),
            (
                "qemu: could not open kernel file '/nonexistent': No such file or directory",
                |fault| matches!(fault, StartFailure::NoFile(words) if words.starts_with("could not open kernel file")),
            ),
            (
                "qemu-system-x86_64: -sandbox on: There is no option group 'sandbox'",
                |fault| matches!(fault, StartFailure::NoSandbox(_)),
            ),
            ("qemu-system-x86_64: -nonsense: invalid option", |fault| {
                *fault == StartFailure::Other("-nonsense: invalid option".into())
            }),
        ];
        for (words, expected) in cases {
            let fault = StartFailure::from_words(words);
            assert!(expected(&fault), "{words}\n{fault:?}");
        }
    }

    #[test]
    fn words_are_one_harmless_line_without_warnings() {
        let words = "qemu-system-x86_64: warning: TCG doesn't support requested feature\n\
                     qemu-system-x86_64: -kernel x: bad \x1b[31mkernel\n";
        assert_eq!(own_words(words), "bad \\x1b[31mkernel");
        assert!(own_words(&"x".repeat(5000)).len() <= WORDS);
    }

    #[test]
    fn each_failure_says_what_to_do() {
        let vm: VmName = "web-0".parse().unwrap();
        let failure = LaunchError::Refused(StartFailure::NoMemory("no".into())).into_failure(&vm);
        assert_eq!(failure.exit, Exit::Failed);
        assert!(failure.next.unwrap().contains("memory"));
        let died = LaunchError::Died(String::new()).into_failure(&vm);
        assert!(died.next.unwrap().contains("castra logs web-0"));
        assert_eq!(LaunchError::Cancelled.into_failure(&vm).exit, Exit::Interrupted);
    }
}
