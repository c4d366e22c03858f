//! An agent inside a VM: the `ssh` that starts it there and ends it together with castra.
//!
//! Here: arguments and the script for the guest's shell. Not here: running them (`agent_process`), the
//! preamble (`preamble`).
//!
//! Without a terminal sshd tells nobody when its client is gone. So castra holds the stdin of its
//! `ssh` open for as long as the agent may run, and beside the agent a watch reads it: at its end,
//! whether castra closed it, was killed or lost the connection, the agent's session gets SIGTERM,
//! then SIGKILL. The agent's own stdin is empty, as on the host.
//!
//! The script goes by stdin too: a prompt may be longer than a command line, of which an SSH server takes 9,000 bytes
//! (Dropbear) and Linux 128 KiB.

use std::ffi::{OsStr, OsString};

use crate::core::bootstrap::ssh::SshTarget;
use crate::core::process::shell_quote;

/// Seconds between SIGTERM and SIGKILL in the guest.
pub const GRACE_SECS: u64 = 5;
/// The exit code by which a shell says that there is no such program.
pub const NOT_FOUND: i32 = 127;
/// Linux takes no argument longer than this, in the guest too.
pub const MAX_ARG_BYTES: usize = 128 * 1024 - 1;
/// The command line for the login shell of the guest's user, which may be any shell; the script needs a POSIX
/// one.
const REMOTE_COMMAND: &str = "exec sh";

/// What the guest's shell reads first. One compound command: the shell has read all of it before it runs any.
pub fn remote_script(program: &OsStr, args: &[OsString], dir: Option<&OsStr>) -> String {
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
    let missing = quote(OsStr::new(&not_found(&program.to_string_lossy())));
    let program = quote(program);
    format!(
        "{{\n\
         exec 3<&0 0</dev/null\n\
         echo\n\
         {go_there}\
         command -v {program} >/dev/null 2>&1 || {{ echo {missing} >&2; exit {NOT_FOUND}; }}\n\
         if command -v setsid >/dev/null 2>&1; then session=setsid; else session=; fi\n\
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
         exit $code\n\
         }}\n"
    )
}

/// The script's message on stderr together with [`NOT_FOUND`]; an agent may end with that code, too.
pub fn not_found(program: &str) -> String {
    format!("{program}: not found")
}

/// The arguments of the `ssh` that runs it.
pub fn ssh_argv(target: &SshTarget) -> Vec<OsString> {
    target.exec_argv(OsStr::new(REMOTE_COMMAND))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Child, ChildStdin, Command, Stdio};

    use super::*;

    const SHELLS: [&[&str]; 3] = [&["dash"], &["busybox", "ash"], &["bash"]];

    /// A shell that has got this script, and its stdin held open as castra does.
    fn start(shell: &[&str], script: &str) -> (Child, ChildStdin) {
        let mut child = Command::new(shell[0])
            .args(&shell[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(script.as_bytes()).unwrap();
        (child, stdin)
    }

    #[test]
    fn words_output_and_exit_code_pass_through() {
        for shell in SHELLS {
            let long = "x".repeat(100_000);
            let args: Vec<OsString> = [
                "-c",
                "pwd; cat; printf '%s|' \"$@\"; exit 3",
                "it's",
                "a b",
                "$HOME\n`x`",
                &long,
                &long,
            ]
            .map(OsString::from)
            .to_vec();
            let script = remote_script("sh".as_ref(), &args, Some("/usr".as_ref()));
            let (child, held) = start(shell, &script);
            let output = child.wait_with_output().unwrap();
            drop(held);
            let expected = format!("\n/usr\na b|$HOME\n`x`|{long}|{long}|");
            assert!(String::from_utf8_lossy(&output.stdout) == expected, "{shell:?}");
            assert_eq!(output.status.code(), Some(3), "{shell:?}");
        }
    }

    #[test]
    fn a_missing_agent_is_told_by_its_code() {
        let (child, held) = start(
            SHELLS[0],
            &remote_script("castra-no-such-agent".as_ref(), &[], None),
        );
        let output = child.wait_with_output().unwrap();
        drop(held);
        assert_eq!(output.status.code(), Some(NOT_FOUND));
        assert!(String::from_utf8_lossy(&output.stderr).contains("castra-no-such-agent: not found"));
    }

    #[test]
    fn the_end_of_stdin_ends_the_agent_and_its_children() {
        let args: Vec<OsString> = ["-c", "sleep 1000 & echo ready; sleep 1000"]
            .map(OsString::from)
            .to_vec();
        for shell in SHELLS {
            let (mut child, held) = start(shell, &remote_script("sh".as_ref(), &args, None));
            let mut stdout = child.stdout.take().unwrap();
            let mut ready = [0; 7];
            std::io::Read::read_exact(&mut stdout, &mut ready).unwrap();
            assert_eq!(&ready, b"\nready\n");
            drop(held);
            let status = child.wait().unwrap();
            assert_eq!(status.code(), Some(128 + 15));
            // The background child held this pipe: its end proves that it is gone.
            let mut rest = Vec::new();
            std::io::Read::read_to_end(&mut stdout, &mut rest).unwrap();
            assert!(rest.is_empty());
        }
    }
}
