//! Projects for real guests: each in a directory of its own, all with one cache of guest images.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::journals;
use super::scratch::Scratch;
use super::{CASTRA, Ran, objects, program, vm_of};

/// A project in a fresh directory, taken down and removed at the end of its test.
pub struct Project {
    /// Where its castra.toml lies.
    pub dir: PathBuf,
    scratch: Option<Scratch>,
    head: String,
}

impl Project {
    /// One whose castra.toml has these VMs.
    pub fn with(label: &str, vms: &str) -> Project {
        let project = Project::new(label, "");
        project.config(vms);
        project
    }

    /// One that gets its VMs from [`Project::config`]; `head` stands before them.
    pub fn new(label: &str, head: &str) -> Project {
        let scratch = Scratch::new(label);
        let head = format!(
            "version = \"0.2.0\"\n[project]\nname = \"{label}\"\nstate_dir = \"state\"\n[broker]\nport = 0\n{head}"
        );
        Project {
            dir: scratch.dir().to_owned(),
            scratch: Some(scratch),
            head,
        }
    }

    /// Writes castra.toml anew, with these VMs.
    pub fn config(&self, vms: &str) {
        fs::write(self.dir.join("castra.toml"), format!("{}{vms}", self.head)).unwrap();
    }

    /// Writes a file that can be executed.
    pub fn file(&self, name: &str, contents: impl AsRef<[u8]>) {
        program(&self.dir.join(name), contents);
    }

    /// A file of the state root.
    pub fn state(&self, name: &str) -> PathBuf {
        self.dir.join("state").join(name)
    }

    /// castra in the project's directory.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(CASTRA);
        command
            .args(args)
            .current_dir(&self.dir)
            .env("CASTRA_HOME", home())
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs it and expects this exit code; its stdout.
    #[track_caller]
    pub fn expect(&self, code: i32, args: &[&str]) -> String {
        Ran::of(args, self.run(args)).exits(code).stdout
    }

    /// Runs it with `--json`, expects this exit code; the objects on stdout.
    pub fn events(&self, code: i32, args: &[&str]) -> Vec<Value> {
        let args = [args, &["--json"]].concat();
        objects(&self.expect(code, &args))
    }

    pub fn status(&self) -> Value {
        serde_json::from_str(&self.expect(0, &["status", "--json"])).unwrap()
    }

    /// A VM in the status.
    pub fn vm(&self, name: &str) -> Value {
        vm_of(&self.status(), name)
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        let _ = self.run(&["down", "--quiet", "--graceful-wait-secs", "5"]);
        if std::thread::panicking() {
            eprintln!("what the test left is in {}", self.dir.display());
            std::mem::forget(self.scratch.take());
        } else {
            journals::check_below(&self.dir);
        }
    }
}

/// Where guest images are kept between runs.
pub fn home() -> PathBuf {
    match std::env::var_os("CASTRA_TEST_HOME") {
        Some(home) => home.into(),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("castra-home"),
    }
}

/// Bytes as text, whatever they are.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
