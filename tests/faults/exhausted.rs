//! No thread or process more for this user: each command ends with a sentence, none hangs or panics,
//! and `down` takes down what runs.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};

use crate::support::project::{FAKE_QEMU, ONE, Project, SCRIPT, TWO, finish};
use crate::support::{CASTRA, Claim, Ran, copy_program, eventually};

/// A user that nobody else is, for the limit counts all tasks of a user. Root has no limit.
struct Lonely<'p> {
    project: &'p Project,
    uid: u32,
    binary: PathBuf,
    _claim: Claim,
}

impl Lonely<'_> {
    /// `None`: these tests don't run as root, and whoever runs them has other processes.
    fn of(project: &Project) -> Option<Lonely<'_>> {
        if !nix::unistd::geteuid().is_root() {
            return None;
        }
        // Users that every Linux has and that run nothing; `ssh-keygen` wants one with a name.
        const USERS: [&str; 8] = ["games", "man", "lp", "news", "uucp", "backup", "list", "irc"];
        let (uid, claim) = eventually("a user without a process", || {
            let known = USERS.iter().filter_map(|name| User::from_name(name).ok()?);
            known.map(|user| user.uid.as_raw()).find_map(|uid| {
                let claim = Claim::of(&format!("user-{uid}"))?;
                (tasks_of(uid) == 0).then_some((uid, claim))
            })
        });
        let (dir, home) = (project.castra().project(), project.castra().home());
        fs::create_dir_all(&home).unwrap();
        for dir in [&dir, &home] {
            std::os::unix::fs::chown(dir, Some(uid), Some(uid)).unwrap();
        }
        // A build directory that nobody may enter: copies will do.
        let binary = project.castra().dir().join("castra");
        copy_program(CASTRA, &binary);
        let fake = dir.join("qemu.py");
        copy_program(FAKE_QEMU, &fake);
        let text = fs::read_to_string(dir.join("castra.toml")).unwrap();
        let text = text.replace(FAKE_QEMU, &fake.display().to_string());
        project.castra().write("castra.toml", &text);
        Some(Lonely {
            project,
            uid,
            binary,
            _claim: claim,
        })
    }

    /// Runs castra with room for so many tasks in all; none: as many as it likes.
    fn command(&self, tasks: Option<u64>, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--signal=KILL", "120", "setpriv", "--clear-groups"])
            .args([format!("--reuid={0}", self.uid), format!("--regid={0}", self.uid)]);
        if let Some(tasks) = tasks {
            command.args(["prlimit".to_owned(), format!("--nproc={tasks}:{tasks}")]);
        }
        command
            .arg(&self.binary)
            .args(args)
            .current_dir(self.project.castra().project())
            // A Python of root's own is not for everybody.
            .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
            .env("CASTRA_HOME", self.project.castra().home());
        command
    }

    #[track_caller]
    fn run(&self, tasks: Option<u64>, args: &[&str]) -> Ran {
        let ran = finish(self.command(tasks, args), args);
        assert!(
            ran.code.is_some_and(|code| code != 70 && code != 101),
            "with {tasks:?} tasks: {ran:?}"
        );
        assert!(!ran.stderr.contains("panicked"), "with {tasks:?} tasks: {ran:?}");
        ran
    }
}

/// Tasks of a user now.
fn tasks_of(uid: u32) -> u64 {
    let mut count = 0;
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let status = fs::read_to_string(process.path().join("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        if line.and_then(|line| line.split_whitespace().next()) == Some(uid.to_string().as_str()) {
            count += fs::read_dir(process.path().join("task")).map_or(0, |tasks| tasks.count() as u64);
        }
    }
    count
}

#[test]
fn up_and_doctor_end_with_a_sentence_however_few_tasks_there_may_be() {
    let project = Project::new("tasks-up", TWO);
    let Some(lonely) = Lonely::of(&project) else {
        return;
    };
    let mut failed = 0;
    for room in 1..16 {
        let ran = lonely.run(Some(room), &["up", "--quiet"]);
        if ran.code != Some(0) {
            failed += 1;
            assert!(ran.stderr.contains("error: "), "with {room} tasks: {ran:?}");
        }
        lonely.run(Some(room), &["doctor", "--quiet"]);
        lonely.run(None, &["down", "--quiet"]).exits(0);
        project.assert_no_process();
    }
    assert!(failed > 3, "the limit limited nothing");
}

#[test]
fn down_takes_all_down_without_a_thread_to_be_had() {
    let project = Project::new("tasks-down", TWO);
    let Some(lonely) = Lonely::of(&project) else {
        return;
    };
    for room in 1..6 {
        lonely.run(None, &["up", "--quiet"]).exits(0);
        // The command itself is one of them.
        let tasks = tasks_of(lonely.uid) + room;
        lonely.run(Some(tasks), &["down", "--quiet"]).exits(0);
        project.assert_no_process();
        project.assert_nothing_left();
    }
}

#[test]
fn up_obeys_sigterm_however_few_tasks_there_may_be() {
    let project = Project::new("tasks-term", &format!("{ONE}{SCRIPT}"));
    let Some(lonely) = Lonely::of(&project) else {
        return;
    };
    for room in [2, 6, 9, 10, 11, 12, 14] {
        let mut child = lonely
            .command(Some(room), &["up", "--quiet"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let ended = eventually("a bootstrap or the end", || {
            let waits = fs::read_dir(project.state("logs/bootstrap")).is_ok_and(|entries| {
                entries
                    .flatten()
                    .any(|entry| entry.path().extension().is_some_and(|end| end == "open"))
            });
            let ended = child.try_wait().unwrap();
            (waits || ended.is_some()).then_some(ended)
        });
        if ended.is_none() {
            // `timeout` passes it on.
            kill(pid, Signal::SIGTERM).unwrap();
            eventually("the end that SIGTERM asks for", || child.try_wait().unwrap());
        }
        lonely.run(None, &["down", "--quiet"]).exits(0);
        project.assert_no_process();
    }
}
