//! Copying files between this machine and a guest, as one tar stream over ssh.
//!
//! Here: the two directions, and what is told of them. Not here: the stream (`send`, `receive`), the guest's side
//! (`script`), the connection (`bootstrap::ssh`), which word is of a VM (`app::cp`).
//!
//! scp follows every link, so links to folders and dangling ones can't be copied by it, and what it follows may be
//! anywhere. Here links stay links, but for a source that is one itself. What a guest sends is as hostile as everything
//! of a guest: nothing is written through a link, outside the destination, under a
//! name that wasn't asked for, or as more than a file, folder or link.

mod asked;
mod receive;
mod script;
mod send;

use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::core::bootstrap::bounded_lines::LineCutter;
use crate::core::bootstrap::ssh::SshTarget;
use crate::core::bootstrap::ssh::command::{RemoteCommand, Words};
use crate::core::escape::escape_line;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::process::show_status;
use crate::core::threads;

/// Longest text of a line of the guest's stderr, and how many are kept.
const LINE_BYTES: usize = 400;
const LINES_KEPT: usize = 100;
/// Start-up files of a login shell may print this much before the guest's script does.
const MAX_NOISE: u64 = 1 << 20;

/// How a copy went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes of files.
    pub bytes: u64,
    /// What wasn't copied, and why, each on one line; the rest was.
    pub left_out: Vec<String>,
    /// What the guest's side has said beside that.
    pub said: Vec<String>,
}

/// Copies these of this machine into a guest, to a path there.
pub fn put(target: &SshTarget, sources: &[PathBuf], to: &OsStr) -> Result<Copied> {
    let mut copied = Copied::default();
    let there: Vec<&PathBuf> = sources
        .iter()
        .filter(|source| match send::check(source) {
            Ok(()) => true,
            Err(why) => {
                copied.left_out.push(why);
                false
            }
        })
        .collect();
    if there.is_empty() {
        return Ok(copied);
    }
    let mut remote = Remote::start(target, |mark| {
        let kind = match sources {
            [one] if one.is_dir() => "folder",
            [_] => "file",
            _ => "many",
        };
        script::put(mark, to, kind)
    })?;
    let place = match remote.next_mark()? {
        Some(word) if word == "into" => None,
        Some(word) if word == "as" => Some(OsString::from(script::temporary(&remote.mark))),
        _ => return remote.end(copied),
    };
    let mut stdin = remote.stdin.take().expect("stdin is piped");
    let sent = send::write(&mut stdin, &there, place.as_deref(), &mut copied);
    drop(stdin);
    match sent {
        Ok(()) => {
            remote.next_mark()?;
        }
        // The guest's side has ended, and says why.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(error) => {
            remote.kill();
            return Err(Failure::new(Exit::Io, "the copy failed midway").because(error));
        }
    }
    remote.end(copied)
}

/// Copies what these patterns mean in a guest to a path of this machine.
pub fn get(target: &SshTarget, sources: &[OsString], to: &Path) -> Result<Copied> {
    let mut place = receive::Destination::find(to, sources.len() > 1)?.asked(sources);
    let mut copied = Copied::default();
    let mut remote = Remote::start(target, |mark| script::get(mark, sources))?;
    // Nothing more goes there; a watch in the guest looks after its end.
    loop {
        let whole = match remote.next_mark()?.as_deref() {
            Some("tar") => false,
            Some("whole") => true,
            _ => break,
        };
        let received = place
            .begin(whole)
            .and_then(|()| receive::unpack(&mut remote.stdout, &mut place, &mut copied));
        if let Err(error) = received {
            remote.kill();
            return Err(
                Failure::new(Exit::Io, format!("the copy to {} failed midway", to.display())).because(error),
            );
        }
    }
    place.finish();
    remote.end(copied)
}

/// The guest's side of a copy.
struct Remote {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    said: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
    mark: String,
    /// The script has begun: there is a connection.
    begun: bool,
    /// Its last word: the exit code.
    code: Option<i32>,
}

impl Remote {
    fn start(target: &SshTarget, words: impl FnOnce(&str) -> Vec<OsString>) -> Result<Remote> {
        let random = host::random_hex(8)
            .map_err(|error| Failure::new(Exit::Internal, "can't read random bytes").because(error))?;
        let mark = format!("castra-cp-{random}");
        let command = RemoteCommand::new(Words::Argv(&words(&mark)));
        let cannot = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Failure::new(Exit::Unavailable, "there is no `ssh`")
                .advice("install the package openssh-client"),
            _ => threads::no_thread_failure("ssh", &error),
        };
        let mut child = Command::new("ssh")
            .args(target.exec_argv(&command.line))
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(cannot)?;
        let mut stdin = child.stdin.take().expect("stdin is piped");
        let stdout = child.stdout.take().expect("stdout is piped");
        let stderr = child.stderr.take().expect("stderr is piped");
        let said = Arc::new(Mutex::new(Vec::new()));
        let lines = Arc::clone(&said);
        let reader = std::thread::Builder::new()
            .name("cp-stderr".to_owned())
            .spawn(move || read_lines(stderr, &lines))
            .map_err(|error| threads::no_thread_failure("cp", &error))?;
        // An ssh that ends before it reads says why itself.
        let _ = stdin.write_all(&command.preamble.unwrap_or_default());
        Ok(Remote {
            child,
            stdin: Some(stdin),
            stdout: BufReader::new(stdout),
            said,
            reader: Some(reader),
            mark,
            begun: false,
            code: None,
        })
    }

    /// What the script says next behind its mark; `None`: it has said all.
    fn next_mark(&mut self) -> Result<Option<String>> {
        let mut seen = 0;
        loop {
            let mut line = Vec::new();
            let read = (&mut self.stdout).take(MAX_NOISE).read_until(b'\n', &mut line);
            let count = read.map_err(|error| Failure::new(Exit::Io, "ssh can't be read").because(error))?;
            seen += count as u64;
            if count == 0 || seen > MAX_NOISE {
                return Ok(None);
            }
            let line = String::from_utf8_lossy(&line);
            let Some(word) = line.trim_end_matches('\n').strip_prefix(&self.mark) else {
                continue;
            };
            self.begun = true;
            let word = word.trim_start();
            if let Some(code) = word.strip_prefix("end ") {
                self.code = code.parse().ok();
                return Ok(None);
            }
            return Ok(Some(word.to_owned()));
        }
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end; what it has complained about is left out of the copy, or the reason why there is none.
    fn end(mut self, mut copied: Copied) -> Result<Copied> {
        drop(self.stdin.take());
        let status = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        let said = std::mem::take(&mut *self.said.lock().unwrap_or_else(PoisonError::into_inner));
        let status =
            status.map_err(|error| Failure::new(Exit::Io, "ssh can't be waited for").because(error))?;
        if !self.begun {
            return Err(no_connection(status, &said));
        }
        let well = self.code == Some(0);
        if !well && said.is_empty() {
            copied
                .left_out
                .push(format!("the guest's side ended with {}", show_status(status)));
        }
        if well {
            copied.said = said;
        } else {
            copied.left_out.extend(said);
        }
        Ok(copied)
    }
}

fn no_connection(status: ExitStatus, said: &[String]) -> Failure {
    let exit = if status.code() == Some(255) {
        Exit::NoConnection
    } else {
        Exit::Failed
    };
    let why = match said.last() {
        Some(line) => line.clone(),
        None => format!("ssh ended with {}", show_status(status)),
    };
    Failure::new(exit, "nothing was copied").because(why)
}

fn read_lines(mut pipe: impl Read, lines: &Mutex<Vec<String>>) {
    let mut cutter = LineCutter::new(LINE_BYTES);
    let mut buffer = [0; 4096];
    let mut keep = |line: &str| {
        let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
        if !line.trim().is_empty() && lines.len() < LINES_KEPT {
            lines.push(escape_line(line, LINE_BYTES));
        }
    };
    while let Ok(count) = pipe.read(&mut buffer) {
        if count == 0 {
            break;
        }
        cutter.push(&buffer[..count], &mut keep);
    }
    cutter.finish(&mut keep);
}
