//! An agent inside a VM: the `ssh` that starts it there, and sees to it that it ends with castra.
//!
//! Here: arguments only. Not here: running them (`run`), what the agent is told (`preamble`).
//!
//! Without a terminal sshd tells nobody when its client is gone. So castra holds the stdin of its
//! `ssh` open for as long as the agent may run, and beside the agent a watch reads it: at its end,
//! whether castra closed it, was killed or lost the connection, the agent's session gets SIGTERM,
//! then SIGKILL. The agent's own stdin is empty, as on the host.

use std::ffi::{OsStr, OsString};

use crate::core::bootstrap::ssh::{SshTarget, alive_options};
use crate::core::process::shell_quote;

/// Connecting to the own loopback takes no time; the guest's sshd may, under emulation.
const CONNECT_TIMEOUT_SECS: u32 = 30;
/// Seconds between SIGTERM and SIGKILL in the guest.
pub const GRACE_SECS: u64 = 5;
/// The exit code by which a shell says that there is no such program.
pub const NOT_FOUND: i32 = 127;
/// Linux takes no argument longer than this, and the guest's shell gets all of it as one.
pub const LONGEST_LINE: usize = 128 * 1024 - 1;

/// What the guest's shell is told to run.
pub fn remote_line(program: &OsStr, args: &[OsString], dir: Option<&OsStr>) -> String {
    let quote = |word: &OsStr| shell_quote(&word.to_string_lossy());
    let agent = std::iter::once(program)
        .chain(args.iter().map(OsString::as_os_str))
        .map(quote)
        .collect::<Vec<_>>()
        .join(" ");
    let go_there = match dir {
        Some(dir) => format!("cd -- {} || exit 1\n", quote(dir)),
        None => String::new(),
    };
    let program = quote(program);
    let script = format!(
        "{go_there}\
         command -v {program} >/dev/null 2>&1 || {{ echo {program}: not found >&2; exit {NOT_FOUND}; }}\n\
         if command -v setsid >/dev/null 2>&1; then session=setsid; else session=; fi\n\
         exec 3<&0\n\
         $session {agent} </dev/null 3<&- &\n\
         agent=$!\n\
         end() {{ kill -$1 -$agent || kill -$1 $agent; }}\n\
         {{ cat <&3; end TERM; sleep {GRACE_SECS}; end KILL; }} >/dev/null 2>&1 &\n\
         watch=$!\n\
         exec 3<&-\n\
         wait $agent 2>/dev/null\n\
         code=$?\n\
         kill $watch\n\
         end KILL 2>/dev/null\n\
         exit $code"
    );
    // The login shell of the guest's user may be any; this is written for the POSIX one.
    format!("exec sh -c {}", shell_quote(&script))
}

/// The arguments of the `ssh` that runs it.
pub fn ssh_argv(target: &SshTarget, line: String) -> Vec<OsString> {
    let mut argv: Vec<OsString> = ["-F", "/dev/null", "-T"].map(OsString::from).to_vec();
    let mut options = target.client_options();
    options.extend([
        "BatchMode=yes".to_owned(),
        format!("ConnectTimeout={CONNECT_TIMEOUT_SECS}"),
        "LogLevel=ERROR".to_owned(),
    ]);
    options.extend(alive_options());
    for option in options {
        argv.extend(["-o".into(), option.into()]);
    }
    argv.extend(["-l".into(), target.user.as_str().into()]);
    argv.extend(["-p".into(), target.port.to_string().into()]);
    argv.extend(["--".into(), target.host.as_str().into(), line.into()]);
    argv
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    fn sh(line: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", line]);
        command
    }

    #[test]
    fn words_output_and_exit_code_pass_through() {
        let args: Vec<OsString> = [
            "-c",
            "pwd; cat; printf '%s|' \"$@\"; exit 3",
            "it's",
            "a b",
            "$HOME\n`x`",
        ]
        .map(OsString::from)
        .to_vec();
        let line = remote_line("sh".as_ref(), &args, Some("/usr".as_ref()));
        let mut child = sh(&line)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Held open, as castra does; what is written there isn't the agent's.
        let mut held = child.stdin.take().unwrap();
        let _ = held.write_all(b"not for the agent");
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "/usr\na b|$HOME\n`x`|");
        assert_eq!(output.status.code(), Some(3));
    }

    #[test]
    fn a_missing_agent_is_told_by_its_code() {
        let output = sh(&remote_line("castra-no-such-agent".as_ref(), &[], None))
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(NOT_FOUND));
        assert!(String::from_utf8_lossy(&output.stderr).contains("castra-no-such-agent: not found"));
    }

    #[test]
    fn the_end_of_stdin_ends_the_agent_and_its_children() {
        let args: Vec<OsString> = ["-c", "sleep 1000 & echo ready; sleep 1000"]
            .map(OsString::from)
            .to_vec();
        let line = remote_line("sh".as_ref(), &args, None);
        let mut child = sh(&line)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(&mut stdout, &mut ready).unwrap();
        drop(child.stdin.take());
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(128 + 15));
        // The background child held this pipe: its end proves that it is gone.
        let mut rest = Vec::new();
        std::io::Read::read_to_end(&mut stdout, &mut rest).unwrap();
        assert!(rest.is_empty());
    }
}
