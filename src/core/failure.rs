//! Failures fit to show a person, and the exit code each kind has.
//!
//! Here: the one error type operations return, and the documented exit codes (docs/CLI.md, after
//! BSD sysexits). Not here: errors that code branches on (an enum beside the code that raises
//! it), or printing (`app`).

use std::fmt;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// How castra ends; the number is the process's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// Everything asked for was done.
    Done,
    /// It ran, but something failed: a VM, a bootstrap, a verify.
    Failed,
    /// Wrong usage: an unknown command, flag or VM.
    Usage,
    /// The config file is invalid.
    Config,
    /// No config or workspace was found.
    NoInput,
    /// A needed host tool is missing, or the host is too small for what is asked.
    Unavailable,
    /// A fault of castra itself.
    Internal,
    /// A file or directory can't be created.
    CantCreate,
    /// Input or output failed.
    Io,
    /// Somebody else has the lock, the port or the memory; try again.
    Busy,
    /// What was waited for did not come in time.
    TimedOut,
    /// Ended by Ctrl-C or SIGTERM.
    Interrupted,
    /// There is no connection to the VM, or it doesn't run.
    NoConnection,
}

impl Exit {
    /// Every kind that any command may end by, in the order of the numbers; [`Exit::NoConnection`] is of `ssh` and `exec`.
    pub const ALL: [Exit; 12] = [
        Exit::Done,
        Exit::Failed,
        Exit::Usage,
        Exit::Config,
        Exit::NoInput,
        Exit::Unavailable,
        Exit::Internal,
        Exit::CantCreate,
        Exit::Io,
        Exit::Busy,
        Exit::TimedOut,
        Exit::Interrupted,
    ];

    /// The process exit code.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 64,
            Exit::Config => 65,
            Exit::NoInput => 66,
            Exit::Unavailable => 69,
            Exit::Internal => 70,
            Exit::CantCreate => 73,
            Exit::Io => 74,
            Exit::Busy => 75,
            Exit::TimedOut => 124,
            Exit::Interrupted => 130,
            Exit::NoConnection => 255,
        }
    }

    /// Whether the contract calls this a refusal (exit codes 64 to 75, docs/EVENTS.md).
    pub fn is_refusal(self) -> bool {
        (64..=75).contains(&self.code())
    }

    /// Whether the same will happen again until somebody acts: something is missing, wrong or
    /// full. A lock that somebody holds is not of that kind.
    pub fn blocks(self) -> bool {
        match self {
            Exit::Config | Exit::NoInput | Exit::Unavailable | Exit::CantCreate | Exit::Io => true,
            Exit::Done
            | Exit::Failed
            | Exit::Usage
            | Exit::Internal
            | Exit::Busy
            | Exit::Interrupted
            | Exit::TimedOut
            | Exit::NoConnection => false,
        }
    }

    /// What the code means, one line for the man page.
    pub fn meaning(self) -> &'static str {
        match self {
            Exit::Done => "done",
            Exit::Failed => "it ran, but something failed: a VM, a bootstrap, a verify",
            Exit::Usage => "wrong usage",
            Exit::Config => "the config is invalid",
            Exit::NoInput => "no config or workspace was found",
            Exit::Unavailable => "a needed host tool is missing, or the host is too small",
            Exit::Internal => "internal error",
            Exit::CantCreate => "a file can't be created",
            Exit::Io => "input or output failed",
            Exit::Busy => "busy: another process has the lock, the port or the memory; try again",
            Exit::TimedOut => "the wait timed out",
            Exit::Interrupted => "interrupted",
            Exit::NoConnection => "no connection to the VM, or it doesn't run",
        }
    }
}

/// A failure fit to show a person. Built by whoever knows the most, printed once, at the edge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind, which fixes the exit code.
    pub exit: Exit,
    /// The operation and its object, lower case, no full stop.
    pub what: String,
    /// The cause we know, never a guess.
    pub why: Option<String>,
    /// A command to run or a key to change.
    pub next: Option<String>,
}

/// What operations return.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure of this kind; add the cause and the way on with [`Failure::because`] and
    /// [`Failure::advice`].
    pub fn new(exit: Exit, what: impl Into<String>) -> Failure {
        Failure {
            exit,
            what: what.into(),
            why: None,
            next: None,
        }
    }

    /// What happened and why, on one line, without what to do about it.
    pub fn cause(&self) -> String {
        match &self.why {
            Some(why) => format!("{}: {why}", self.what),
            None => self.what.clone(),
        }
    }

    /// Adds the cause.
    pub fn because(mut self, why: impl fmt::Display) -> Failure {
        self.why = Some(why.to_string());
        self
    }

    /// Adds what to do next.
    pub fn advice(mut self, next: impl Into<String>) -> Failure {
        self.next = Some(next.into());
        self
    }

    /// An I/O error on `path` while doing `verb` ("read", "create"). What can't be made is
    /// `CantCreate`, all else `Io`; a full disk and missing permission come with advice.
    pub fn io(verb: &str, path: &Path, error: &io::Error) -> Failure {
        let exit = match verb {
            "create" => Exit::CantCreate,
            _ => Exit::Io,
        };
        let failure = Failure::new(exit, format!("can't {verb} {}", path.display())).because(error);
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                failure.advice("free some space on that file system and try again")
            }
            io::ErrorKind::PermissionDenied if verb == "read" => failure.advice(
                "run castra as the owner (`ls -ld` shows the owners of a file and of the folders above it), or let this user read it",
            ),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => failure.advice(
                "make that place writable, or put the state elsewhere with `state_dir` under [project] or CASTRA_HOME",
            ),
            _ => failure,
        }
    }
}

impl fmt::Display for Failure {
    /// One line: `what: why (next)`. The several-line form for a terminal is `app`'s.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause())?;
        if let Some(next) = &self.next {
            write!(f, " ({next})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}
