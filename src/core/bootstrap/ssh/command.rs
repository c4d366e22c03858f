//! A user's own command in the guest: the shell text that reports the command's end correctly and ends the
//! command with its client.
//!
//! Here: the shell text and how words get into it. Not here: which ssh carries it (`app::ssh`), what a bootstrap runs
//! (`bootstrap::guest_scripts`), an agent (`harness::guest`).
//!
//! An SSH server has two habits that a person doesn't expect. A command that a signal ended has no exit code, and ssh
//! makes 255 of that, its own code for "no connection". And a command without a terminal isn't told that its client is
//! gone. So a shell stays beside the command: it makes 128 + signal of such an end, and has a watch that looks now and
//! then who its parent is. The parent is the server's process for this connection, which ends with the connection; then
//! the whole session of the command gets SIGTERM, and two seconds later SIGKILL. Nothing needs to be installed for that,
//! stdin stays the command's alone, and no round trip is added. Without /proc there is no watch.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::core::process::in_single_quotes;

/// A longer line goes by stdin. Dropbear closes the connection at 9,000 bytes; Linux takes no argument of 128 KiB, and
/// the line is one argument of ssh's here and of the login shell's there.
const MAX_LINE_BYTES: usize = 8_000;

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Words<'a> {
    /// A command and its arguments; each reaches it as it is.
    Argv(&'a [OsString]),
    /// Words for the guest's login shell, joined by blanks, as with `ssh`.
    Line(&'a [OsString]),
}

/// How a command gets to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteCommand {
    /// For the login shell of the guest's user.
    pub line: OsString,
    /// What stdin has to begin with, before the user's own.
    pub preamble: Option<Vec<u8>>,
}

impl RemoteCommand {
    /// The command for these words: all in one line, or, where that would be too long, with the words by stdin.
    pub fn new(words: Words<'_>) -> RemoteCommand {
        let (before, words) = match words {
            Words::Argv(words) => ("", words.to_vec()),
            Words::Line(words) => (LOGIN_SHELL, vec![joined(words)]),
        };
        let take = take_words(words.len());
        let mut line = script(&format!("{take} {before}"), &words);
        if line.len() <= MAX_LINE_BYTES {
            return RemoteCommand {
                line: OsString::from_vec(line),
                preamble: None,
            };
        }
        let mut preamble = Vec::new();
        for word in &words {
            let quoted = in_single_quotes(word.as_bytes());
            preamble.extend(
                quoted
                    .split(|byte| *byte == b'\n')
                    .collect::<Vec<_>>()
                    .join(LINE_END),
            );
            preamble.push(b' ');
        }
        preamble.push(b'\n');
        line = script(&format!("{READ_WORDS} {before}"), &[]);
        RemoteCommand {
            line: OsString::from_vec(line),
            preamble: Some(preamble),
        }
    }
}

/// Reads the words from the environment, and removes them from it.
fn take_words(count: usize) -> String {
    let all = |before: &str, after: &str| {
        (1..=count)
            .map(|n| format!(" {before}{n}{after}"))
            .collect::<String>()
    };
    format!(
        "set --{};{};",
        all("\"$castra_", "\""),
        all("unset castra_", ";").trim_end_matches(';')
    )
}

/// Lets the user's own shell interpret the line. bash would read its start-up files a second time if SHLVL
/// were low.
const LOGIN_SHELL: &str = r#"SHLVL=1; export SHLVL; set -- "${SHELL:-sh}" -c "$1";"#;

/// Takes the words from the first line of stdin. `read` takes nothing beyond that line's end.
const READ_WORDS: &str =
    r#"n=$(printf "\nx"); n=${n%x}; IFS= read -r w || exit 255; eval "set -- $w"; unset w;"#;

/// A line end within that one line.
const LINE_END: &[u8] = br#"'"$n"'"#;

/// One line, without `!`, line ends and single quotes: csh and fish have to get it through, too.
///
/// `p` and `s` are the parent and the session at the start. Where the session is neither the command's own (OpenSSH
/// makes one) nor the connection's (Dropbear makes that), only the command itself is ended. The command runs in a
/// subshell, so that `exit` and `exec` of it leave this shell alone, and a shell's remarks such as "Killed" go nowhere.
const BESIDE: &str = r#"
exec 3>&2 2>/dev/null; trap : INT QUIT; p= s=;
IFS=" " read -r a a a p a s a </proc/$$/stat;
case $s in $$|"$p") ;; *) s=-;; esac;
all() {
  some=; for f in /proc/[0-9]*/stat; do
    IFS= read -r l <"$f" || continue;
    i=${f#/proc/}; i=${i%/stat};
    set -- ${l##*) };
    [ "$1" = Z ] || [ "$i" = "$me" ] || { [ "$4" = "$s" ] || { [ "$s" = - ] && [ "$2" = $$ ]; } && some=y && kill -$sig "$i"; };
  done;
};
{
  trap "" HUP INT QUIT PIPE;
  n=1; while x=; IFS=" " read -r a a a x a </proc/$$/stat && [ "$x" = "$p" ]; do
    sleep $n & t=$! ; trap "kill $t; exit" TERM; wait $t;
    [ $n -ge 3 ] || n=$((n+1));
  done;
  trap "" TERM; [ "$x" ] || exit;
  IFS=" " read -r me a </proc/self/stat;
  sig=TERM; all; [ "$some" ] || exit; sleep 2;
  sig=KILL; for n in 1 2 3 4 5; do all; [ "$some" ] || exit; done;
} </dev/null >/dev/null 3>&- & w=$! ;
("$@") 2>&3 3>&-; c=$?; kill $w; exit $c"#;

/// The text and the words are in the environment of the shell, which takes them out of there. On its command line
/// `pkill -f` would find them: a command that is to end others by name would end the shell beside it first.
fn script(before: &str, words: &[OsString]) -> Vec<u8> {
    let text = BESIDE.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut line = format!("exec env castra_exec='unset castra_exec; {before} {text}'").into_bytes();
    for (number, word) in words.iter().enumerate() {
        line.extend(format!(" castra_{}=", number + 1).bytes());
        line.extend(in_single_quotes(word.as_bytes()));
    }
    // The last word is `$0`, with which a shell begins its messages.
    line.extend_from_slice(b" sh -c 'eval \"$castra_exec\"' sh");
    line
}

fn joined(words: &[OsString]) -> OsString {
    OsString::from_vec(
        words
            .iter()
            .map(|word| word.as_bytes())
            .collect::<Vec<_>>()
            .join(&b' '),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Child, Command, Output, Stdio};

    const SHELLS: [&[&str]; 3] = [&["dash"], &["busybox", "ash"], &["bash"]];

    /// Run as a login shell would; the `sh` of the line is `shell`, too.
    fn start(shell: &[&str], command: &RemoteCommand) -> Child {
        let start = command
            .line
            .as_bytes()
            .strip_suffix(b" sh -c 'eval \"$castra_exec\"' sh")
            .unwrap();
        let end = format!(" {} -c 'eval \"$castra_exec\"' sh", shell.join(" "));
        let line = [start, end.as_bytes()].concat();
        Command::new(shell[0])
            .args(&shell[1..])
            .arg("-c")
            .arg(OsString::from_vec(line))
            .env("SHELL", "/bin/sh")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn run(shell: &[&str], words: Words<'_>, stdin: &[u8]) -> Output {
        let command = RemoteCommand::new(words);
        let mut child = start(shell, &command);
        let mut pipe = child.stdin.take().unwrap();
        let bytes = [&command.preamble.unwrap_or_default(), stdin].concat();
        let writer = std::thread::spawn(move || {
            let _ = pipe.write_all(&bytes);
        });
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        output
    }

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn words_stdin_outputs_and_code_pass_through() {
        let stdin: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        let odd = ["it's", "a b", "$HOME `x` \\", "", "-n", "two\nlines\n", "größe"];
        for shell in SHELLS {
            for filler in ["", &"x".repeat(20_000)] {
                let script = "printf '<%s>' \"$@\" >&2; cat; exit 7";
                let argv = words(&[&["sh", "-c", script, "sh"], &odd[..], &[filler]].concat());
                let output = run(shell, Words::Argv(&argv), &stdin);
                assert_eq!(output.status.code(), Some(7), "{shell:?}");
                assert!(output.stdout == stdin, "{shell:?}: {}", output.stdout.len());
                let shown: String = odd
                    .iter()
                    .chain([&filler])
                    .map(|word| format!("<{word}>"))
                    .collect();
                assert_eq!(String::from_utf8(output.stderr).unwrap(), shown, "{shell:?}");
            }
        }
    }

    #[test]
    fn bytes_that_are_no_text_pass_through() {
        let word = OsString::from_vec(b"\xff\n\xfe".to_vec());
        for count in [1, 5_000] {
            let mut argv = words(&["printf", "%s."]);
            argv.extend(std::iter::repeat_n(word.clone(), count));
            let output = run(SHELLS[0], Words::Argv(&argv), b"");
            assert_eq!(output.stdout, b"\xff\n\xfe.".repeat(count));
        }
    }

    #[test]
    fn an_end_by_a_signal_has_a_code_and_no_remark() {
        for shell in SHELLS {
            for (argv, code, said) in [
                (&["sh", "-c", "kill -9 $$"][..], 137, ""),
                (&["sh", "-c", "kill -TERM $$"], 143, ""),
                (&["exit", "5"], 5, ""),
                (&["exec", "false"], 1, ""),
                (&["castra-none"], 127, "not found"),
            ] {
                let output = run(shell, Words::Argv(&words(argv)), b"");
                assert_eq!(output.status.code(), Some(code), "{shell:?} {argv:?}");
                let stderr = String::from_utf8(output.stderr).unwrap();
                assert!(
                    stderr.contains(said) && stderr.is_empty() == said.is_empty(),
                    "{stderr}"
                );
            }
        }
    }

    #[test]
    fn the_login_shell_reads_joined_words() {
        for shell in SHELLS {
            for filler in ["", &"x".repeat(20_000)] {
                let line = words(&["x=1;", "echo $x \"a  b\" | cat; kill -TERM $$", "#", filler]);
                let output = run(shell, Words::Line(&line), b"");
                assert_eq!(output.status.code(), Some(143), "{output:?}");
                assert_eq!(output.stdout, b"1 a  b\n");
            }
        }
    }

    #[test]
    fn csh_and_fish_can_read_the_line() {
        for words in [&words(&["true"])[..], &vec![OsString::from("x"); 5_000]] {
            let command = RemoteCommand::new(Words::Argv(words));
            let line = command.line.into_string().unwrap();
            assert!(
                line.len() < 1_800,
                "{} bytes are left for words",
                MAX_LINE_BYTES - line.len()
            );
            assert!(!line.contains('\n'));
            // fish treats these two the same.
            assert!(!line.contains("\\\\") && !line.contains("\\'"), "{line}");
            // csh leaves a `!` alone before a blank only.
            assert!(
                line.match_indices('!')
                    .all(|(at, _)| line[at + 1..].starts_with(' ')),
                "{line}"
            );
        }
    }

    #[test]
    fn neither_words_nor_text_are_on_a_command_line_or_left_in_the_environment() {
        for shell in SHELLS {
            for filler in ["", &"x".repeat(20_000)] {
                let show = "tr '\\0' '\\n' </proc/$PPID/cmdline; env | grep -c ^castra_";
                let output = run(shell, Words::Argv(&words(&["sh", "-c", show, "sh", filler])), b"");
                let shown = String::from_utf8(output.stdout).unwrap();
                let expected = format!("{}\n-c\neval \"$castra_exec\"\nsh\n0\n", shell.join("\n"));
                assert_eq!(shown, expected);
            }
        }
    }
}
