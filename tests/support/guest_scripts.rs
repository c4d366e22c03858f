//! The scripts that run inside guests, run here: under every shell, sealed off from this machine's own castra files.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use super::AMPLE;

/// The shells that the scripts are written for.
pub const SHELLS: &[&[&str]] = &[&["dash"], &["bash"], &["busybox", "sh"]];

/// A transport as `--via` names it, the program it takes, and the Debian package that holds this.
pub const TRANSPORTS: &[(&str, &str, &str)] = &[
    ("auto", "busybox", "busybox-static"),
    ("busybox", "busybox", "busybox-static"),
    ("nc", "nc", "netcat-openbsd"),
    ("openbsd", "nc.openbsd", "netcat-openbsd"),
    ("traditional", "nc.traditional", "netcat-traditional"),
    ("ncat", "ncat", "ncat"),
    ("socat", "socat", "socat"),
    ("bash", "bash", "bash"),
    ("python3", "python3", "python3"),
    ("perl", "perl", "perl-base"),
];

/// Where the scripts lie.
pub fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/guest")
}

/// Fails with the name of the package that holds `program` if it isn't there.
pub fn require(program: &str, package: &str) {
    let found =
        std::env::split_paths(&std::env::var_os("PATH").unwrap()).any(|dir| dir.join(program).exists());
    assert!(
        found,
        "`{program}` is missing: apt-get install {package} (or run scripts/install-deps.sh test)"
    );
}

/// `script` under `shell`, with stdin empty and both outputs piped. Its temporary files go into `tmp`.
pub fn command(shell: &[&str], script: &Path, tmp: &Path, args: &[&str]) -> Command {
    let package = if shell[0] == "busybox" {
        "busybox-static"
    } else {
        shell[0]
    };
    require(shell[0], package);
    let mut command = Command::new(shell[0]);
    command
        .args(&shell[1..])
        .arg(script)
        .args(args)
        .env("CASTRA_FW_CFG_DIR", "/nonexistent")
        .env("CASTRA_ETC_DIR", "/nonexistent")
        .env("CASTRA_VIZIER_ACTIVE", "/nonexistent")
        .env("TMPDIR", tmp)
        .env("LANG", "C.UTF-8")
        .env_remove("LC_ALL")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for name in [
        "CASTRA_BROKER",
        "CASTRA_VM",
        "CASTRA_TOKEN",
        "CASTRA_HEARTBEAT_SECS",
    ] {
        command.env_remove(name);
    }
    command
}

/// A script that runs until it is told otherwise; ended with the test. Its lines come by channels.
pub struct Running {
    child: Child,
    /// What it prints.
    pub out: Receiver<String>,
    /// What it says on stderr.
    pub said: Receiver<String>,
}

impl Running {
    pub fn start(mut command: Command) -> Running {
        let mut child = command.spawn().unwrap();
        let out = lines_of(child.stdout.take().unwrap());
        let said = lines_of(child.stderr.take().unwrap());
        Running { child, out, said }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn next_out(&self) -> String {
        self.out
            .recv_timeout(AMPLE)
            .unwrap_or_else(|_| panic!("nothing more is printed; said: {:?}", self.all_said()))
    }

    pub fn next_said(&self) -> String {
        self.said.recv_timeout(AMPLE).expect("something is said")
    }

    /// Waits for a line on stderr that holds this.
    pub fn wait_said(&self, part: &str) -> String {
        loop {
            let line = self.next_said();
            if line.contains(part) {
                return line;
            }
        }
    }

    fn all_said(&self) -> Vec<String> {
        self.said.try_iter().collect()
    }

    /// Sends SIGTERM, or whatever else.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Waits for its end; the exit code.
    pub fn wait(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // In order, so that it takes its own children with it.
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal(nix::sys::signal::Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

fn lines_of(from: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (send, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let _ = send.send(line);
        }
    });
    lines
}
