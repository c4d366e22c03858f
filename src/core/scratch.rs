//! A fresh directory for one test, removed at its end, and a process that holds a lock as QEMU does. Compiled for
//! tests only.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that lives as long as this value.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes a new directory with `label` in its name.
    pub fn new(label: &str) -> Scratch {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("castra-{label}-{}-{number}", std::process::id()));
        fs::create_dir_all(&dir).expect("the temporary directory is writable");
        // Tests compare paths with what castra prints, and castra resolves links.
        Scratch(fs::canonicalize(dir).expect("the directory is there"))
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A process that holds a record lock on a file, as QEMU does on its pid file.
pub struct RecordLock(Child);

impl RecordLock {
    /// Makes the file and has a new process lock it.
    pub fn hold(path: &Path) -> RecordLock {
        File::create(path).expect("the file can be made");
        let mut child = Command::new("python3")
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/tests/support/lock-holder.py"
            ))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 holds locks as QEMU does");
        let stdin = child.stdin.as_mut().expect("it is a pipe");
        writeln!(stdin, "hold {}", path.display()).expect("it reads");
        let mut answer = String::new();
        let stdout = child.stdout.as_mut().expect("it is a pipe");
        BufReader::new(stdout).read_line(&mut answer).expect("it answers");
        assert_eq!(answer, "done\n");
        RecordLock(child)
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for RecordLock {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
