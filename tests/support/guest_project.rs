//! Projects for real guests: each in a directory of its own, all with one cache of guest images.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::journals;

/// A project in a fresh directory, taken down and removed at the end of its test.
pub struct Project {
    /// Where its castra.toml lies.
    pub dir: PathBuf,
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
        let dir = std::env::temp_dir().join(format!("castra-guests-{label}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        let head = format!(
            "version = \"0.2.0\"\n[project]\nname = \"{label}\"\nstate_dir = \"state\"\n[broker]\nport = 0\n{head}"
        );
        Project { dir, head }
    }

    /// Writes castra.toml anew, with these VMs.
    pub fn config(&self, vms: &str) {
        fs::write(self.dir.join("castra.toml"), format!("{}{vms}", self.head)).unwrap();
    }

    /// Writes a file that can be executed.
    pub fn file(&self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, contents).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A file of the state root.
    pub fn state(&self, name: &str) -> PathBuf {
        self.dir.join("state").join(name)
    }

    /// castra in the project's directory.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_castra"));
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
        let output = self.run(args);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(
            output.status.code(),
            Some(code),
            "castra {args:?}\n--- stdout\n{out}\n--- stderr\n{err}"
        );
        out
    }

    /// Runs it with `--json`, expects this exit code; the objects on stdout.
    pub fn events(&self, code: i32, args: &[&str]) -> Vec<Value> {
        let args = [args, &["--json"]].concat();
        self.expect(code, &args)
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    pub fn status(&self) -> Value {
        serde_json::from_str(&self.expect(0, &["status", "--json"])).unwrap()
    }

    /// A VM in the status.
    pub fn vm(&self, name: &str) -> Value {
        let status = self.status();
        status["vms"]
            .as_array()
            .unwrap()
            .iter()
            .find(|vm| vm["name"] == name)
            .unwrap()
            .clone()
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        let _ = self.run(&["down", "--quiet", "--graceful-wait-secs", "5"]);
        if std::thread::panicking() {
            eprintln!("what the test left is in {}", self.dir.display());
        } else {
            journals::check_below(&self.dir);
            let _ = fs::remove_dir_all(&self.dir);
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
