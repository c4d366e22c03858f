//! A process that holds the record locks of a whole fleet; one alone is held by `scratch::RecordLock`.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The process that stands in for QEMU, and holds the locks of pid files: a POSIX record lock needs
/// a process of its own, as it is gone as soon as its owner closes any descriptor of the file.
pub struct Holder {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Holder {
    /// One that holds nothing yet.
    pub fn start() -> Holder {
        let mut child = Command::new("python3")
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/tests/support/lock-holder.py"
            ))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Holder {
            commands: child.stdin.take().unwrap(),
            answers: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Its pid, which the files say.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes a pid file and locks it.
    pub fn hold(&mut self, pid_file: &Path) {
        fs::write(pid_file, format!("{}\n", self.pid())).unwrap();
        self.tell("hold", pid_file);
    }

    /// Lets it go, as by SIGKILL: the file stays.
    pub fn free(&mut self, pid_file: &Path) {
        self.tell("free", pid_file);
    }

    fn tell(&mut self, word: &str, path: &Path) {
        writeln!(self.commands, "{word} {}", path.display()).unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert_eq!(line, "done\n", "the lock holder answers");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
