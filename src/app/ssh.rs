//! `castra ssh` and `castra exec`: castra becomes `ssh`.
//!
//! Here: who is meant, the words after `--`. Not here: whether it runs, and the options that make
//! a connection the same as the bootstrap's (`core::bootstrap::ssh`).

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use castra::core::bootstrap::ssh::SshTarget;
use castra::core::bootstrap::ssh::client;
use castra::core::failure::{Exit, Failure, Result};
use castra::core::process::shell_quote;

use super::context::Context;
use super::{select, typed};
use crate::cli::{self, Raw};

/// Connecting to the own loopback takes no time; the guest's sshd may, under emulation.
const CONNECT_TIMEOUT_SECS: u32 = 30;

/// Becomes `ssh`; returns only where that can't be. The exit code is then the remote command's.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let interactive = raw.command == Some(cli::Command::Ssh);
    let typed_name = typed::name(&raw.operands[0])?;
    let selected = select::project(raw)?;
    let vm = select::vm(&selected, &typed_name)?;
    let target = client::running_target(&selected.state(), &vm)?;
    context.out.finish()?;
    let error = Command::new("ssh")
        .args(argv(&target, interactive, &raw.operands[1..]))
        .exec();
    Err(match error.kind() {
        io::ErrorKind::NotFound => {
            Failure::new(Exit::Unavailable, "there is no `ssh`").advice("install the package openssh-client")
        }
        _ => Failure::new(Exit::Internal, "can't become `ssh`").because(error),
    })
}

/// The user's own ssh config takes no part: a `Host *` in it must not decide how a VM is reached.
fn argv(target: &SshTarget, interactive: bool, words: &[OsString]) -> Vec<OsString> {
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
    match interactive {
        // As with `ssh`: the guest's shell reads the words joined by blanks.
        true => argv.extend_from_slice(words),
        // Each word reaches the command as it is.
        false => argv.push(quoted(words)),
    }
    argv
}

/// Options after those of the VM, the same for `ssh` and `scp`.
pub fn common_options(interactive: bool) -> Vec<String> {
    let mut options = vec![
        format!("ConnectTimeout={CONNECT_TIMEOUT_SECS}"),
        // Hides "Permanently added … to the list of known hosts", which says nothing to anybody here.
        "LogLevel=ERROR".to_owned(),
    ];
    if !interactive {
        options.push("BatchMode=yes".to_owned());
    }
    options
}

fn quoted(words: &[OsString]) -> OsString {
    let mut line = OsString::new();
    for (number, word) in words.iter().enumerate() {
        if number > 0 {
            line.push(" ");
        }
        line.push(quote(word));
    }
    line
}

fn quote(word: &OsString) -> OsString {
    // A first word with `=` in it would be an assignment.
    if let Some(text) = word.to_str().filter(|text| !text.contains('=')) {
        return shell_quote(text).into();
    }
    // Bytes that are no text: in single quotes, each of those written as '\''.
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut bytes = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => bytes.extend_from_slice(b"'\\''"),
            other => bytes.push(*other),
        }
    }
    bytes.push(b'\'');
    OsString::from_vec(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn words(target: &SshTarget, interactive: bool, command: &[&str]) -> Vec<String> {
        let command: Vec<OsString> = command.iter().map(OsString::from).collect();
        argv(target, interactive, &command)
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
        let ssh = words(&target, true, &["uname", "-a"]);
        assert_eq!(ssh[..2], ["-F", "/dev/null"]);
        let tail = ["-l", "root", "-p", "2222", "--", "127.0.0.1", "uname", "-a"];
        assert_eq!(ssh[ssh.len() - 8..], tail);
        assert!(ssh.contains(&"Compression=yes".to_owned()));
        assert!(!ssh.contains(&"-T".to_owned()) && !ssh.contains(&"BatchMode=yes".to_owned()));
        let exec = words(&target, false, &["printf", "%s\\n", "a b", "it's"]);
        assert!(exec.contains(&"-T".to_owned()) && exec.contains(&"BatchMode=yes".to_owned()));
        let line = exec.last().unwrap();
        let output = Command::new("sh").args(["-c", line]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "a b\nit's\n");
    }
}
