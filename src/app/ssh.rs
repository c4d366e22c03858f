//! `castra ssh` and `castra exec`: castra becomes `ssh`.
//!
//! Here: which VM, the words after `--`, the stdin of a command too long for a command line. Not here:
//! whether the VM runs, the options that make a connection the same as the bootstrap's, and what the guest's
//! shell is told (`core::bootstrap::ssh`).

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{ChildStdout, Command, Stdio};

use castra::core::bootstrap::ssh::command::{RemoteCommand, Words};
use castra::core::bootstrap::ssh::{SshTarget, alive_options, login};
use castra::core::failure::{Exit, Failure, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::context::Context;
use super::{find_project, operands};
use crate::cli::{self, Raw};

/// How long the guest's sshd may take to answer: connecting to the loopback takes no time, but sshd may be
/// slow under emulation.
const CONNECT_TIMEOUT_SECS: u32 = 30;
/// Linux takes no longer argument, and a login shell gets its line as one.
const MAX_LINE_BYTES: usize = 128 * 1024 - 1;
/// How many bytes of stdin are read at once.
const FEED_BYTES: usize = 64 * 1024;

/// Becomes `ssh`, and returns only if that fails. The exit code is then the remote command's.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let command = raw.command.unwrap_or(cli::Command::Ssh);
    let interactive = command == cli::Command::Ssh;
    let typed_name = raw.operands.first().map(operands::name).transpose()?;
    let selected = find_project::project(raw)?;
    let vm = match &typed_name {
        Some(name) => find_project::vm(&selected, name).map_err(|failure| match raw.all_after_dashes {
            true => failure.advice(format!(
                "castra {} VM -- COMMAND: the VM stands before `--`",
                command.row().words
            )),
            false => failure,
        })?,
        None => find_project::only_vm(&selected, cli::Command::Ssh)?,
    };
    let target = login::running_target(&selected.state(), &vm).map_err(no_connection)?;
    let words = raw.operands.get(1..).unwrap_or_default();
    if interactive && words.iter().map(|word| word.len() + 1).sum::<usize>() > MAX_LINE_BYTES {
        let why = "the guest's shell reads it as one line, of less than 128 KiB";
        return Err(Failure::new(Exit::Usage, "the command is too long")
            .because(why)
            .advice(format!("castra exec {vm} -- …, which sends each word by itself")));
    }
    let command = (!words.is_empty()).then(|| RemoteCommand::new(as_words(interactive, words)));
    context.out.finish()?;
    let mut ssh = Command::new("ssh");
    ssh.args(argv(&target, interactive, command.as_ref()));
    if command.is_some_and(|command| command.preamble.is_some()) {
        ssh.stdin(start_feeder(interactive, words)?);
    }
    let error = ssh.exec();
    Err(match error.kind() {
        io::ErrorKind::NotFound => {
            Failure::new(Exit::Unavailable, "there is no `ssh`").advice("install the package openssh-client")
        }
        _ => Failure::new(Exit::Internal, "can't become `ssh`").because(error),
    })
}

/// castra uses `ssh`'s exit code for a failed connection.
pub(super) fn no_connection(failure: Failure) -> Failure {
    match failure.exit {
        Exit::Failed => Failure {
            exit: Exit::NoConnection,
            ..failure
        },
        _ => failure,
    }
}

/// `exec` has each word reach the command as it is, `ssh` has the guest's shell read them joined by blanks.
fn as_words(interactive: bool, words: &[OsString]) -> Words<'_> {
    if interactive {
        Words::Line(words)
    } else {
        Words::Argv(words)
    }
}

/// The user's own ssh config takes no part: a `Host *` in it must not decide how a VM is reached.
fn argv(target: &SshTarget, interactive: bool, command: Option<&RemoteCommand>) -> Vec<OsString> {
    let mut argv: Vec<OsString> = vec!["-F".into(), "/dev/null".into()];
    if !interactive {
        argv.push("-T".into());
    }
    let options = target
        .client_options()
        .into_iter()
        .chain(common_options(interactive));
    for option in options {
        argv.extend(["-o".into(), option.into()]);
    }
    argv.extend(["-l".into(), target.user.as_str().into()]);
    argv.extend(["-p".into(), target.port.to_string().into()]);
    argv.extend(["--".into(), target.host.as_str().into()]);
    argv.extend(command.map(|command| command.line.clone()));
    argv
}

/// Starts the process whose output is the stdin of `ssh`: the words, then our stdin. castra doesn't do it
/// itself, because `ssh` would then outlive a castra that is killed.
fn start_feeder(interactive: bool, words: &[OsString]) -> Result<ChildStdout> {
    let cannot = |error: io::Error| {
        Failure::new(Exit::Internal, "castra can't start itself to send a long command").because(error)
    };
    let program = std::env::current_exe().map_err(cannot)?;
    let mut feeder = Command::new(program)
        .args(["exec-feed", if interactive { LINE } else { ARGV }, "--"])
        .args(words)
        .stdin(Stdio::inherit())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(cannot)?;
    Ok(feeder.stdout.take().expect("stdout was asked to be a pipe"))
}

const ARGV: &str = "argv";
const LINE: &str = "line";

/// `castra exec-feed`: passes on the words of a long command, then stdin, until either side has ended.
pub fn feed(raw: &Raw) -> Result<Exit> {
    let words = &raw.operands[1..];
    let command = RemoteCommand::new(as_words(raw.operands[0] == LINE, words));
    // If `ssh` is gone, it reports the reason itself.
    match pass_on(&command.preamble.unwrap_or_default()) {
        Ok(()) => Ok(Exit::Done),
        Err(_) => Ok(Exit::Io),
    }
}

fn pass_on(preamble: &[u8]) -> io::Result<()> {
    let (stdin, mut stdout) = (io::stdin(), io::stdout().lock());
    stdout.write_all(preamble)?;
    stdout.flush()?;
    // Without `io`'s buffers: input is passed on at once.
    let mut buffer = vec![0; FEED_BYTES];
    loop {
        let sides = [
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
            PollFd::new(stdout.as_fd(), PollFlags::empty()),
        ];
        let mut asked = sides;
        poll(&mut asked, PollTimeout::NONE)?;
        // poll reports a closed pipe without being asked: `ssh` is gone, and may have been killed.
        if asked[1].any().unwrap_or(true) {
            return Ok(());
        }
        let count = nix::unistd::read(stdin.as_fd(), &mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        stdout.write_all(&buffer[..count])?;
        stdout.flush()?;
    }
}

/// Options added after the VM's.
fn common_options(interactive: bool) -> Vec<String> {
    let mut options = vec![
        format!("ConnectTimeout={CONNECT_TIMEOUT_SECS}"),
        // Hides "Permanently added … to the list of known hosts".
        "LogLevel=ERROR".to_owned(),
    ];
    options.extend(alive_options());
    if !interactive {
        options.push("BatchMode=yes".to_owned());
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(target: &SshTarget, interactive: bool, command: &[&str]) -> Vec<String> {
        let command: Vec<OsString> = command.iter().map(OsString::from).collect();
        let command = (!command.is_empty()).then(|| RemoteCommand::new(as_words(interactive, &command)));
        argv(target, interactive, command.as_ref())
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect()
    }

    #[test]
    fn ssh_joins_words_and_exec_keeps_them_apart() {
        let target = SshTarget {
            vm: "web-0".parse().unwrap(),
            user: "root".into(),
            host: "127.0.0.1".into(),
            port: 2222,
            identity: "/state/id_ed25519".into(),
            own_key: true,
            options: vec!["Compression=yes".into()],
            dir: "/state/vms/web-0".into(),
        };
        let login = words(&target, true, &[]);
        assert_eq!(login[..2], ["-F", "/dev/null"]);
        assert_eq!(
            login[login.len() - 6..],
            ["-l", "root", "-p", "2222", "--", "127.0.0.1"]
        );
        assert!(login.contains(&"Compression=yes".to_owned()));
        assert!(!login.contains(&"-T".to_owned()) && !login.contains(&"BatchMode=yes".to_owned()));
        for (interactive, expected) in [(true, "a b it\ns\n"), (false, "a b\nit's $x\n")] {
            let words = match interactive {
                true => words(&target, true, &["printf '%s\\n'", "'a b it'", "s"]),
                false => words(&target, false, &["printf", "%s\\n", "a b", "it's $x"]),
            };
            assert_eq!(words.contains(&"-T".to_owned()), !interactive);
            assert_eq!(words.contains(&"BatchMode=yes".to_owned()), !interactive);
            let line = words.last().unwrap();
            let output = Command::new("sh").args(["-c", line]).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
        }
    }
}
