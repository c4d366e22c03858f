//! What runs in the guest: small POSIX shell texts, decided from data alone.
//!
//! Here: their wording. Not here: running them (`bootstrap::ssh::channel`). Tests run them under
//! dash and BusyBox ash.
//!
//! The guest's login shell may be any shell, so it only gets `exec sh` or one quoted line for `exec sh -c`.
//! Secrets are passed by stdin: every user of the guest could read an environment on a command line.
//!
//! Start-up files of the login shell may print, with or without a line end, also from a background process.
//! So every line for castra begins with a line end of its own and is printed at once (`say`); castra ignores
//! other output.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use crate::core::bootstrap::archive::{COMPLETE_MARK, PAYLOAD_NAME};
use crate::core::bootstrap::ssh::master::READY;
use crate::core::bootstrap::vizier_remote::{LOG_TAIL, PROBE};
use crate::core::id::RunId;
use crate::core::process::in_single_quotes;

/// The answer of [`greeting`] if the directory can be used.
pub const DIR_OK: &str = "castra-dir ok";

/// The master's own command: makes `remote_dir`, reports whether it can be used, then waits for the end of
/// its stdin. `vizier`: it first reports what it has of Vizier, and at its end shows Vizier's log.
pub fn greeting(remote_dir: &str, vizier: bool) -> String {
    let (before, wait) = if vizier {
        (PROBE, format!("cat >/dev/null; {LOG_TAIL}"))
    } else {
        ("", "exec cat >/dev/null".to_owned())
    };
    let script = format!(
        "d={dir}; if {{ [ -d \"$d\" ] || mkdir -p \"$d\"; }} && [ -w \"$d\" ] && [ -x \"$d\" ]; \
         then {ok}; else [ ! -d \"$d\" ] || echo \"$d is not writable\" >&2; fi; \
         {before}{ready}; {wait}",
        ok = say(DIR_OK),
        ready = say(READY),
        dir = quote(remote_dir.as_bytes()),
    );
    format!("exec sh -c {}", quote(script.as_bytes()))
}

/// A command that prints these words as a line of their own, whatever else is printed. The words are
/// castra's, with variables at most.
pub(super) fn say(words: &str) -> String {
    format!("printf \"\\n%s\\n\" \"{words}\"")
}

/// What a session prints before its program starts.
pub fn begin_mark(mark: &str) -> String {
    format!("{mark}-begin")
}

/// Prints the state of the guest's mounts, once it is known or after so many seconds; then `mark`, a blank
/// and 0.
pub fn mounts(secs: u64, mark: &str) -> String {
    let script = format!(
        "f=/run/castra/mounts; n=0; \
         while [ ! -e $f ] && [ $n -lt {secs} ]; do sleep 1; n=$((n+1)); done; \
         echo; [ ! -e $f ] || cat $f; {end}",
        end = say(&format!("{mark} 0"))
    );
    format!("exec sh -c {}", quote(script.as_bytes()))
}

/// Where a transfer unpacks before anything is moved into place.
pub fn incoming(run: &RunId) -> String {
    format!(".incoming-{run}")
}

/// Unpacks a stream of `bootstrap::archive` and moves its parts into place; it moves nothing unless the
/// stream was whole. First it removes what an earlier, broken transfer left. It starts few programs, because
/// each costs an emulated guest ten milliseconds.
pub fn unpack(remote_dir: &str, run: &RunId, script: Option<&OsStr>, payload: bool) -> String {
    let mut text = format!(
        "set -e; cd {dir}; i={incoming}; \
         for x in .incoming-*; do [ ! -e \"$x\" ] || rm -rf \"$x\"; done; \
         trap 'rm -rf \"$i\"' 0; trap 'exit 1' 1 2 13 15; \
         tar -xpf -; \
         [ -f \"$i/{COMPLETE_MARK}\" ] || {{ echo 'the stream was cut off' >&2; exit 1; }}; ",
        dir = quote(remote_dir.as_bytes()),
        incoming = incoming(run),
    );
    let mut parts = String::new();
    if let Some(name) = script {
        let name = name.as_bytes();
        text.push_str(&format!(
            "[ ! -d {0} ] || {{ echo 'a directory lies where the script goes:' {0} >&2; exit 1; }}; ",
            quote(&[b"./", name].concat())
        ));
        parts.push_str(&format!(" \"$i\"/{}", quote(name)));
    }
    if payload {
        // A directory with files can't be replaced by a rename, so the old one is moved away first.
        text.push_str(&format!(
            "if [ -e {PAYLOAD_NAME} ] || [ -L {PAYLOAD_NAME} ]; then mv {PAYLOAD_NAME} \"$i/{OLD}\"; fi; "
        ));
        parts.push_str(&format!(" \"$i/{PAYLOAD_NAME}\""));
    }
    if !parts.is_empty() {
        text.push_str(&format!("mv -f{parts} ."));
    }
    if payload {
        text.push_str(&format!(
            " || {{ [ ! -e \"$i/{OLD}\" ] || mv \"$i/{OLD}\" {PAYLOAD_NAME}; exit 1; }}"
        ));
    }
    format!("exec sh -c {}", quote(text.trim_end().as_bytes()))
}

/// The earlier payload, until the new one is in its place. No member of a stream has this name.
const OLD: &str = ".castra-old";

/// What a session runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program<'a> {
    /// A script in `remote_dir`; through `sh` if it names no interpreter itself.
    Script {
        /// Its file name.
        name: &'a OsStr,
        /// The system can execute it.
        direct: bool,
    },
    /// A command for `sh -c`.
    Command(&'a str),
    /// A check whether this path exists.
    Exists(&'a str),
}

/// The command line of a [`session`].
pub const SESSION_COMMAND: &str = "exec sh";

/// The stdin of [`SESSION_COMMAND`]: runs a program in `remote_dir` with these variables, as a
/// session of its own, and prints `mark`, a blank and its exit code when it has ended; [`begin_mark`] before it starts.
/// When stdin
/// ends first, the program and its children get SIGTERM and, two seconds later, SIGKILL.
///
/// The whole text is one compound command: the shell has parsed all of it before it runs any of it, so the
/// shell's read-ahead takes nothing away from the watcher.
pub fn session(remote_dir: &str, env: &[(&str, &str)], program: Program<'_>, mark: &str) -> String {
    let mut text = String::from("{\nexec 3<&0 0</dev/null\n");
    text.push_str(&format!(
        "{begin}\ncd {dir} || {{ {end}; exit 1; }}\n",
        begin = say(&begin_mark(mark)),
        dir = quote(remote_dir.as_bytes()),
        end = say(&format!("{mark} 1")),
    ));
    for (key, value) in env {
        text.push_str(&format!("export {key}={}\n", quote(value.as_bytes())));
    }
    let argv = match program {
        Program::Script { name, direct } => {
            let path = quote(&[b"./", name.as_bytes()].concat());
            if direct { path } else { format!("sh {path}") }
        }
        Program::Command(command) => format!("sh -c {}", quote(command.as_bytes())),
        Program::Exists(path) => {
            text.push_str(&format!(
                "test -e {path}; c=$?; {end}; exit $c\n}}\n",
                path = quote(path.as_bytes()),
                end = say(&format!("{mark} $c")),
            ));
            return text;
        }
    };
    // `setsid` gives the program a process group, which can be ended as a whole. Where there is no `setsid`,
    // a shell with job control does the same.
    text.push_str(&format!(
        "if command -v setsid >/dev/null 2>&1; then setsid {argv} 3<&- &\nelse set -m 2>/dev/null; {argv} 3<&- &\nfi\n"
    ));
    text.push_str(
        // From here on the shell's own messages, such as "Terminated", must not reach the script's output.
        "p=$!\n\
         exec 2>/dev/null\n\
         (\n\
         IFS= read -r x <&3\n\
         trap '' TERM\n\
         kill -TERM -$p || kill -TERM $p\n\
         n=0\n\
         while kill -0 -$p || kill -0 $p; do\n\
         [ $n -lt 10 ] || { kill -KILL -$p || kill -KILL $p; exit; }\n\
         sleep 0.2 || sleep 1\n\
         n=$((n+1))\n\
         done\n\
         ) >/dev/null 2>&1 &\n\
         w=$!\n\
         wait $p\n\
         c=$?\n",
    );
    // The watcher is ended first: castra closes stdin at the mark, and the watcher would then end what the
    // script has left running.
    text.push_str(&format!(
        "exec 3<&-\nkill $w\n{end}\nexit $c\n}}\n",
        end = say(&format!("{mark} $c")),
    ));
    text
}

/// Bytes as one word of a POSIX shell.
pub(super) fn quote(bytes: &[u8]) -> String {
    // ssh's arguments are UTF-8 here; a file name that isn't UTF-8 gives a clear "not found" from the guest.
    String::from_utf8_lossy(&in_single_quotes(bytes)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::bootstrap::archive;
    use crate::core::scratch::Scratch;
    use std::fs;
    use std::io::{Read, Write};
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    const SHELLS: [&[&str]; 3] = [&["dash"], &["busybox", "ash"], &["bash"]];
    const MARK: &str = "castra-end-0123";

    fn spawn(shell: &[&str], args: &[&str]) -> Child {
        Command::new(shell[0])
            .args(&shell[1..])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Runs a session with its stdin open to the end; returns its stdout and stderr.
    fn converse(shell: &[&str], text: &str) -> (String, String) {
        let mut child = spawn(shell, &[]);
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(text.as_bytes()).unwrap();
        let (mut out, mut err) = (String::new(), String::new());
        child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        drop(stdin);
        child.wait().unwrap();
        let begin = format!("\n{}\n", begin_mark(MARK));
        let out = out.strip_prefix(&begin).unwrap_or_else(|| panic!("{out}"));
        // The end mark begins with a line end.
        (out.replacen(&format!("\n{MARK} "), &format!("{MARK} "), 1), err)
    }

    #[test]
    fn a_session_runs_in_its_place_with_its_variables() {
        let scratch = Scratch::new("remote session's");
        let dir = scratch.dir().to_str().unwrap();
        let value = "it's \"a\" $HOME `id` \\ \nsecond line\tGrüße";
        let env = [("APP", value), ("EMPTY", "")];
        for shell in SHELLS {
            let command = "printf '%s|%s|' \"$APP\" \"$EMPTY\"; pwd; cat; echo oops >&2; exit 3";
            let (out, err) = converse(shell, &session(dir, &env, Program::Command(command), MARK));
            assert_eq!(out, format!("{value}||{dir}\n{MARK} 3\n"), "{shell:?}");
            assert_eq!(err, "oops\n", "{shell:?}");
        }
    }

    #[test]
    fn scripts_run_by_their_own_interpreter_or_by_sh() {
        let scratch = Scratch::new("remote-script");
        let dir = scratch.dir().to_str().unwrap();
        let name = OsStr::new("-it's a script");
        for (text, direct) in [("#!/bin/sh\necho ran \"$0\"\n", true), ("echo ran \"$0\"", false)] {
            let path = scratch.dir().join(name);
            fs::write(&path, text).unwrap();
            let mode = if direct { 0o755 } else { 0o644 };
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
            for shell in SHELLS {
                let (out, err) = converse(shell, &session(dir, &[], Program::Script { name, direct }, MARK));
                assert_eq!(
                    out,
                    format!("ran ./-it's a script\n{MARK} 0\n"),
                    "{shell:?} {err}"
                );
            }
        }
        for shell in SHELLS {
            let there = session(dir, &[], Program::Exists("-it's a script"), MARK);
            assert_eq!(converse(shell, &there).0, format!("{MARK} 0\n"));
            let missing = session(dir, &[], Program::Exists("nothing"), MARK);
            assert_eq!(converse(shell, &missing).0, format!("{MARK} 1\n"));
            let nowhere = session("/no such dir", &[], Program::Command("true"), MARK);
            assert_eq!(converse(shell, &nowhere).0, format!("{MARK} 1\n"));
        }
    }

    #[test]
    fn the_end_of_stdin_ends_the_program_and_its_children() {
        let scratch = Scratch::new("remote-kill");
        let dir = scratch.dir().to_str().unwrap();
        for shell in SHELLS {
            // The script and its child ignore SIGTERM.
            let command = "trap '' TERM; sleep 600 & echo $$ $!; wait; sleep 600; sleep 600";
            let mut child = spawn(shell, &[]);
            let mut stdin = child.stdin.take().unwrap();
            stdin
                .write_all(session(dir, &[], Program::Command(command), MARK).as_bytes())
                .unwrap();
            let mut stdout = child.stdout.take().unwrap();
            let mut pids = Vec::new();
            while pids.iter().filter(|byte| **byte == b'\n').count() < 3 {
                let mut byte = [0];
                stdout.read_exact(&mut byte).unwrap();
                pids.push(byte[0]);
            }
            let pids = pids.split_off(format!("\n{}\n", begin_mark(MARK)).len());
            let began = Instant::now();
            drop(stdin);
            let mut rest = String::new();
            stdout.read_to_string(&mut rest).unwrap();
            assert_eq!(rest, format!("\n{MARK} 137\n"), "{shell:?}");
            assert!(began.elapsed() < Duration::from_secs(10), "{shell:?}");
            child.wait().unwrap();
            for pid in String::from_utf8(pids).unwrap().split_whitespace() {
                // It has closed its stdout, and may take a moment to end.
                let until = Instant::now() + Duration::from_secs(10);
                loop {
                    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                    if state.is_empty() || state.contains(") Z ") {
                        break;
                    }
                    assert!(Instant::now() < until, "{shell:?}: {state}");
                    std::thread::yield_now();
                }
            }
        }
    }

    #[test]
    fn a_background_process_survives_the_script() {
        let scratch = Scratch::new("remote-daemon");
        let dir = scratch.dir().to_str().unwrap();
        for shell in SHELLS {
            let command = "sleep 600 >/dev/null 2>&1 & echo $!";
            let text = session(dir, &[], Program::Command(command), MARK);
            // Once the mark is printed the watcher is gone, however soon stdin is closed.
            assert!(text.find("kill $w").unwrap() < text.find(&format!("{MARK} $c")).unwrap());
            let (out, _) = converse(shell, &text);
            let pid: i32 = out.lines().next().unwrap().parse().unwrap();
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
                .unwrap();
        }
    }

    #[test]
    fn a_cut_stream_changes_nothing() {
        let scratch = Scratch::new("remote unpack");
        let payload = scratch.path("from");
        fs::create_dir(&payload).unwrap();
        fs::write(payload.join("a"), "new").unwrap();
        let script = scratch.path("-run it's.sh");
        fs::write(&script, "new").unwrap();
        let mut whole = Vec::new();
        archive::write(&mut whole, &incoming(&"r1".into()), Some(&script), Some(&payload)).unwrap();
        for shell in SHELLS {
            let dir = scratch.path("to it's");
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(dir.join("payload/old")).unwrap();
            fs::create_dir_all(dir.join(".incoming-r0/left")).unwrap();
            let name = script.file_name().unwrap();
            let line = unpack(dir.to_str().unwrap(), &"r1".into(), Some(name), true);
            let feed = |bytes: &[u8]| {
                let mut child = spawn(shell, &["-c", &line]);
                let _ = child.stdin.take().unwrap().write_all(bytes);
                child.wait_with_output().unwrap()
            };
            // Cut between two members, which tar doesn't notice.
            for length in [0, 512, 1024, whole.len() - 1536 - 512] {
                let ended = feed(&whole[..length]);
                assert!(!ended.status.success(), "{shell:?} {length}");
                assert!(dir.join("payload/old").exists() && !dir.join(name).exists());
                assert_eq!(
                    fs::read_dir(&dir).unwrap().count(),
                    1,
                    "{shell:?}: something is left over"
                );
            }
            let ended = feed(&whole);
            assert!(
                ended.status.success(),
                "{shell:?} {}",
                String::from_utf8_lossy(&ended.stderr)
            );
            assert_eq!(fs::read_to_string(dir.join("payload/a")).unwrap(), "new");
            assert!(!dir.join("payload/old").exists() && dir.join(name).exists());
            assert_eq!(
                fs::read_dir(&dir).unwrap().count(),
                2,
                "{shell:?}: something is left over"
            );
        }
    }

    #[test]
    fn what_cannot_be_put_in_place_leaves_the_old_payload() {
        let scratch = Scratch::new("remote restore");
        let payload = scratch.path("from");
        fs::create_dir(&payload).unwrap();
        let script = scratch.path("run.sh");
        fs::write(&script, "new").unwrap();
        let mut stream = Vec::new();
        archive::write(
            &mut stream,
            &incoming(&"r1".into()),
            Some(&script),
            Some(&payload),
        )
        .unwrap();
        let tools = scratch.path("bin");
        fs::create_dir(&tools).unwrap();
        fs::write(
            tools.join("mv"),
            "#!/bin/sh\n[ \"$1\" != -f ] || exit 1\nexec /bin/mv \"$@\"\n",
        )
        .unwrap();
        fs::set_permissions(
            tools.join("mv"),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        let dir = scratch.path("to");
        fs::create_dir_all(dir.join("payload/old")).unwrap();
        let line = unpack(dir.to_str().unwrap(), &"r1".into(), script.file_name(), true);
        let mut child = Command::new("dash")
            .args(["-c", &line])
            .env("PATH", format!("{}:/usr/bin:/bin", tools.display()))
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&stream).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(dir.join("payload/old").exists());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "something is left over");
    }
}
