//! The failures of a connection, as kinds with different remedies.
//!
//! Here: the kinds, and the one place that interprets ssh's messages: ssh has a single exit status for all
//! its failures. Not here: a remote command that failed; that is its caller's result.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::core::bootstrap::keys::SSH_PACKAGE;
use crate::core::bootstrap::ssh::{FATAL_WORDS, SshTarget};
use crate::core::bootstrap::watch::StopReason;
use crate::core::escape::escape_line;

/// Most bytes of ssh's own words in a message.
const SAID_BYTES: usize = 400;

/// Why there is no connection.
#[derive(Debug)]
pub enum SshError {
    /// `ssh` can't be started.
    NoTool(io::Error),
    /// No server answers, or it closed the connection during the setup.
    Unreachable(String),
    /// The guest doesn't accept the key.
    AuthRefused(String),
    /// The guest shows another host key than before.
    HostKeyChanged,
    /// The private key can't be used.
    KeyUnusable(String),
    /// ssh ended for another reason, in its own words.
    Ended(String),
    /// It wasn't open in time.
    NotReady(Duration, String),
    /// It broke after it was open.
    Lost(String),
    /// The operation was stopped.
    Stopped(StopReason),
}

impl SshError {
    /// Tells why an ssh that never connected ended.
    pub fn of_ended(status: &str, stderr: &str) -> SshError {
        let has = |words: &[&str]| words.iter().any(|word| stderr.contains(word));
        let said = said(stderr, status);
        if has(&[
            "REMOTE HOST IDENTIFICATION HAS CHANGED",
            "Host key verification failed",
        ]) {
            SshError::HostKeyChanged
        } else if has(&["UNPROTECTED PRIVATE KEY", "invalid format", "error in libcrypto"])
            || stderr.lines().any(|line| line.starts_with("Load key"))
            || stderr.contains("no such identity")
        {
            SshError::KeyUnusable(said)
        } else if has(&[
            "Permission denied",
            "Too many authentication failures",
            "pam_nologin",
        ]) {
            SshError::AuthRefused(said)
        } else if has(&[
            "Connection refused",
            "Connection reset",
            "Connection closed",
            "timed out",
            "kex_exchange_identification",
            "banner exchange",
            "No route to host",
            "Could not resolve",
            "Broken pipe",
        ]) {
            SshError::Unreachable(said)
        } else {
            SshError::Ended(said)
        }
    }

    /// What to do about it, if anything is known.
    pub fn advice(&self, target: &SshTarget) -> Option<String> {
        let vm = &target.vm;
        match self {
            SshError::NoTool(_) => Some(format!("install the package {SSH_PACKAGE}")),
            SshError::AuthRefused(_) => Some(format!(
                "the guest must accept {}.pub for user `{}`: check `user` and `identity` under [ssh]",
                target.identity.display(),
                target.user
            )),
            SshError::HostKeyChanged => Some(format!(
                "if the guest was made anew, remove {} and try again",
                target
                    .dir
                    .join(crate::core::root::paths::vm_file::KNOWN_HOSTS)
                    .display()
            )),
            SshError::KeyUnusable(_) => Some(format!(
                "check the owner, mode (0600) and passphrase of {}",
                target.identity.display()
            )),
            SshError::Unreachable(_) | SshError::NotReady(..) => {
                Some(format!("see whether its SSH server runs: castra logs {vm}"))
            }
            SshError::Ended(_) | SshError::Lost(_) | SshError::Stopped(_) => None,
        }
    }
}

/// The end of ssh's words on one line, or how it ended if it said nothing.
pub fn said(stderr: &str, status: &str) -> String {
    let lines: Vec<&str> = stderr
        .lines()
        .map(|line| without_place(line.trim()))
        .filter(|line| !line.is_empty())
        .collect();
    match lines.split_at_checked(lines.len().saturating_sub(3)) {
        Some((_, last)) if !last.is_empty() => escape_line(&last.join("; "), SAID_BYTES),
        _ => format!("ssh ended with {status}"),
    }
}

/// The message without the place in ssh's source that LogVerbose puts before it.
fn without_place(line: &str) -> &str {
    match line.split_once("): ") {
        Some((place, words)) if place.starts_with(FATAL_WORDS) => words,
        _ => line,
    }
}

impl fmt::Display for SshError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SshError::NoTool(error) => write!(f, "`ssh` can't be started: {error}"),
            SshError::Unreachable(said) => write!(f, "SSH can't be reached: {said}"),
            SshError::AuthRefused(said) => write!(f, "the guest refused the SSH key: {said}"),
            SshError::HostKeyChanged => write!(f, "the guest shows another host key than before"),
            SshError::KeyUnusable(said) => write!(f, "ssh can't use the private key: {said}"),
            SshError::Ended(said) => write!(f, "ssh failed: {said}"),
            SshError::NotReady(after, said) => {
                write!(f, "no command ran over SSH within {} s", after.as_secs())?;
                if said.is_empty() {
                    Ok(())
                } else {
                    write!(f, ": {said}")
                }
            }
            SshError::Lost(said) => write!(f, "the SSH connection broke: {said}"),
            SshError::Stopped(stop) => write!(f, "{stop}"),
        }
    }
}

impl std::error::Error for SshError {}

#[cfg(test)]
mod tests {
    use super::SshError;

    #[test]
    fn complaints_are_told_apart() {
        for (stderr, kind) in [
            ("root@127.0.0.1: Permission denied (publickey).", "AuthRefused"),
            (
                "@@@@@@@\n@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\nHost key verification failed.",
                "HostKeyChanged",
            ),
            (
                "ssh: connect to host 127.0.0.1 port 1: Connection refused",
                "Unreachable",
            ),
            (
                "kex_exchange_identification: read: Connection reset by peer",
                "Unreachable",
            ),
            ("Connection timed out during banner exchange", "Unreachable"),
            (
                "packet.c:sshpkt_vfatal():1912 (pid=9): Connection to 127.0.0.1 port 1 timed out",
                "Unreachable(\"Connection to 127.0.0.1 port 1 timed out\")",
            ),
            ("Connection closed by 127.0.0.1 port 1", "Unreachable"),
            (
                "Load key \"/k\": error in libcrypto\r\nroot@127.0.0.1: Permission denied (publickey).",
                "KeyUnusable",
            ),
            ("command-line line 0: Bad configuration option: foo", "Ended"),
            ("", "Ended"),
        ] {
            let error = SshError::of_ended("exit status 255", stderr);
            let shown = format!("{error:?}");
            assert!(shown.starts_with(kind), "{stderr:?}: {shown}");
        }
    }
}
