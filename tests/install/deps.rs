//! `scripts/install-deps.sh` on machines that a stand-in of apt plays.
//!
//! Here: what is installed, what is refused and how both are told. Not here: real packages, which
//! `make demo` and `make test` install on a fresh machine.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::Castra;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/install-deps.sh");
const FAKE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/fake-apt.sh");

/// What the script itself calls.
const TOOLS: [&str; 17] = [
    "sh", "awk", "cat", "chmod", "cp", "dirname", "env", "grep", "ln", "mkdir", "mktemp", "rm", "sed",
    "tail", "tr", "true", "tee",
];
/// What castra needs and the machine has; it lacks qemu-system-x86_64.
const THERE: [&str; 10] = [
    "qemu-img",
    "ssh",
    "ssh-keygen",
    "curl",
    "tar",
    "gzip",
    "xz",
    "zstd",
    "dpkg-deb",
    "cpio",
];
const PLAYED: [&str; 6] = ["apt-get", "apt-cache", "apt-config", "dpkg-query", "id", "sudo"];

struct Machine {
    castra: Castra,
    case: &'static str,
}

struct Ended {
    code: Option<i32>,
    said: String,
    /// Each call of apt-get.
    calls: Vec<String>,
}

impl Machine {
    fn new(case: &'static str) -> Machine {
        let machine = Machine {
            castra: Castra::new(case),
            case,
        };
        fs::create_dir(machine.bin()).unwrap();
        for tool in TOOLS {
            let dirs = std::env::var_os("PATH").unwrap();
            let found = std::env::split_paths(&dirs)
                .map(|dir| dir.join(tool))
                .find(|path| path.exists());
            machine.put(tool, &found.unwrap_or_else(|| panic!("no {tool} in PATH")));
        }
        THERE
            .iter()
            .for_each(|command| machine.put(command, Path::new("/bin/true")));
        PLAYED
            .iter()
            .for_each(|command| machine.put(command, Path::new(FAKE)));
        machine
    }

    fn bin(&self) -> PathBuf {
        self.castra.dir().join("bin")
    }

    /// A link, because a program that a test has just written may be busy still.
    fn put(&self, command: &str, target: &Path) {
        symlink(target, self.bin().join(command)).unwrap();
    }

    fn has(&self, command: &str) -> bool {
        self.bin().join(command).exists()
    }

    fn environment(&self, command: &mut Command) {
        command
            .env_clear()
            .env("PATH", self.bin())
            .env("SHELL", "/bin/sh")
            .env("FAKE_CASE", self.case)
            .env("FAKE_LOG", self.castra.dir().join("calls"))
            .env("FAKE_BIN", self.bin());
    }

    fn ended(&self, code: Option<i32>, said: &[u8]) -> Ended {
        let calls = fs::read_to_string(self.castra.dir().join("calls")).unwrap_or_default();
        Ended {
            code,
            said: String::from_utf8_lossy(said).replace("\r\n", "\n"),
            calls: calls.lines().map(str::to_owned).collect(),
        }
    }

    /// Without a terminal.
    fn run(&self, purpose: &str) -> Ended {
        let mut command = Command::new("/bin/sh");
        self.environment(command.args([SCRIPT, purpose]).stdin(Stdio::null()));
        let output = command.output().unwrap();
        self.ended(output.status.code(), &output.stderr)
    }

    /// At a terminal, with this as the answer to its question.
    fn run_at_terminal(&self, purpose: &str, answer: &str) -> Ended {
        let mut command = Command::new("/usr/bin/script");
        let line = format!("{SCRIPT} {purpose}");
        self.environment(command.args(["-qec", &line, "/dev/null"]));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut said = Vec::new();
        let mut byte = [0];
        while !said.ends_with(b"[y/N] ") {
            let read = stdout.read(&mut byte).unwrap();
            assert_eq!(read, 1, "no question in {}", String::from_utf8_lossy(&said));
            said.push(byte[0]);
        }
        // The terminal stays until it has ended: a closed one would be an answer, too.
        let mut stdin = child.stdin.take().unwrap();
        writeln!(stdin, "{answer}").unwrap();
        stdout.read_to_end(&mut said).unwrap();
        let code = child.wait().unwrap().code();
        self.ended(code, &said)
    }
}

impl Ended {
    /// The calls that change something.
    fn installs(&self) -> Vec<&str> {
        let calls = self.calls.iter().map(String::as_str);
        calls.filter(|call| call.contains(" install -y ")).collect()
    }

    #[track_caller]
    fn refused(&self, words: &[&str]) {
        assert_eq!(self.code, Some(69), "{}", self.said);
        for word in words.iter().chain(&["error: ", "\n  try: "]) {
            assert!(self.said.contains(word), "no {word:?} in {}", self.said);
        }
    }
}

#[test]
fn what_is_missing_is_tried_without_effect_and_then_installed_in_one_transaction() {
    let machine = Machine::new("plain");
    let ended = machine.run("run");
    assert_eq!(ended.code, Some(0), "{}", ended.said);
    assert_eq!(ended.said, "installing: qemu-system-x86\n");
    assert_eq!(
        ended.calls,
        [
            "-q update",
            "-q -s install --no-install-recommends qemu-system-x86",
            "-q install -y --no-install-recommends --no-remove qemu-system-x86",
        ]
    );
    // Nothing is missing now, so apt isn't asked.
    let again = machine.run("run");
    assert_eq!(
        (again.code, again.said.as_str(), again.calls.len()),
        (Some(0), "", 3)
    );
}

#[test]
fn nothing_is_removed_where_nobody_can_be_asked() {
    for purpose in ["run", "test", "bench"] {
        let machine = Machine::new("removes");
        let ended = machine.run(purpose);
        ended.refused(&[
            "apt would remove: qemu-utils\n",
            "nothing was installed",
            "sudo apt-get install",
            "qemu-system-x86",
        ]);
        assert_eq!(ended.installs(), Vec::<&str>::new(), "{purpose}");
        assert!(machine.has("qemu-img"), "{purpose}");
    }
}

#[test]
fn who_is_asked_decides() {
    let no = Machine::new("removes");
    no.run_at_terminal("run", "").refused(&["nothing was installed"]);
    assert!(no.has("qemu-img"));

    // Agreed to, it is done, and what is missing because of it is said.
    let yes = Machine::new("removes");
    let ended = yes.run_at_terminal("run", "y");
    ended.refused(&["Go on? [y/N]", "still missing: qemu-img\n"]);
    assert_eq!(ended.installs().len(), 1);

    // An older version that fits is a smaller loss than none.
    let older = Machine::new("older");
    older
        .run("run")
        .refused(&["older version: qemu-utils\n", "--allow-downgrades"]);
    let ended = older.run_at_terminal("run", "y");
    assert_eq!(ended.code, Some(0), "{}", ended.said);
    assert!(older.has("qemu-img") && older.has("qemu-system-x86_64"));
    assert!(ended.installs()[0].contains("--no-remove --allow-downgrades qemu-system-x86 qemu-utils/"));
}

#[test]
fn what_fits_a_package_of_another_release_comes_from_there() {
    let machine = Machine::new("backports");
    let ended = machine.run("run");
    assert_eq!(ended.code, Some(0), "{}", ended.said);
    assert!(
        ended.said.contains("-backports, which is no source of apt here"),
        "{}",
        ended.said
    );
    let new = "1:10.0.2~bpo12+1";
    let wanted = format!("--no-remove qemu-system-data={new} qemu-system-x86={new} qemu-utils");
    let installs = ended.installs();
    assert!(
        installs.len() == 1 && installs[0].ends_with(&wanted),
        "{installs:?}"
    );
    assert!(
        installs[0].contains("Dir::Etc::SourceParts="),
        "the source is lent"
    );
    let lent = ended.calls.iter().find(|call| call.starts_with("deb "));
    assert!(lent.is_some_and(
        |line| line.contains("http://mirror.example/debian/ ") && line.ends_with("-backports main")
    ));
    assert!(machine.has("qemu-img") && machine.has("qemu-system-x86_64"));
}

#[test]
fn what_apt_could_not_do_is_told() {
    Machine::new("offline")
        .run("run")
        .refused(&["could not read its package sources", "qemu-system-x86"]);
    Machine::new("fails").run("run").refused(&[
        "E: the archive is broken\n",
        "could not install: qemu-system-x86\n",
    ]);
    // Its word isn't taken for it.
    Machine::new("nothing")
        .run("run")
        .refused(&["still missing: qemu-system-x86_64\n"]);
    let without = Machine::new("no-rights").run("run");
    without.refused(&[
        "neither root nor a sudo",
        "sudo apt-get install qemu-system-x86\n",
    ]);
    assert_eq!(without.installs(), Vec::<&str>::new());
}
