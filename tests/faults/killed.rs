//! castra killed by SIGKILL before each single change that it makes: the next command recovers.
//!
//! `tests/support/die.c`, loaded into the real binary, counts what outlasts a process (files made,
//! written, renamed, removed, programs started) and ends it before the N-th. Each N is tried, until
//! a run comes to its own end. What then has to hold: `status` tells something sane, the next command
//! does what it always does, and after a `down` no process runs and no file lies about that wouldn't
//! without the kill.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::{fs, thread};

use crate::support::project::{ONE, Project};
use crate::support::{Ran, eventually, files_below, until};

/// As many runs at once; each waits for processes as much as it works.
const WORKERS: usize = 3;

/// The shared object that ends whom it is loaded into.
fn shim() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/die.c");
        let built = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("die-{}.so", std::process::id()));
        let status = Command::new("cc")
            .args(["-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o"])
            .args([&built, &source])
            .arg("-ldl")
            .status()
            .unwrap();
        assert!(status.success());
        built
    })
}

/// Runs castra until its N-th change. True if it was killed, false if it made fewer.
fn run_until(project: &Project, n: usize, args: &[&str]) -> bool {
    let status = project
        .castra()
        .command(args)
        .env("LD_PRELOAD", shim())
        .env("DIE_AT", n.to_string())
        .env("DIE_LOG", log_of(project))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(
        status.signal() == Some(9) || status.code() == Some(0),
        "{status:?}"
    );
    status.signal() == Some(9)
}

fn log_of(project: &Project) -> PathBuf {
    project.castra().dir().join("changes")
}

/// Before which change it was killed.
fn where_killed(project: &Project) -> String {
    let text = fs::read_to_string(log_of(project)).unwrap();
    let dir = format!("{}/", project.castra().dir().display());
    text.lines().last().unwrap_or_default().replace(&dir, "")
}

/// All files of a project's state and of castra's home, whose only project it is.
fn everything(project: &Project) -> BTreeSet<String> {
    let dir = project.castra().dir();
    let named = |path: PathBuf| -> String {
        let path = path.strip_prefix(dir).unwrap();
        let registered = path.starts_with("home/projects");
        let parts = path.iter().enumerate().map(|(at, part)| match at {
            2 if registered => "ID".into(),
            _ => part.to_string_lossy(),
        });
        parts.collect::<Vec<_>>().join("/")
    };
    [project.state(""), project.castra().home()]
        .iter()
        .flat_map(|root| files_below(root))
        .map(named)
        .collect()
}

/// What an `up`, `restart` and `down` that nobody kills leave.
fn leaves() -> &'static BTreeSet<String> {
    static LEFT: OnceLock<BTreeSet<String>> = OnceLock::new();
    LEFT.get_or_init(|| {
        let project = Project::new("whole", ONE);
        project.run(&["up"]).exits(0);
        project.run(&["restart"]).exits(0);
        project.run(&["down"]).exits(0);
        everything(&project)
    })
}

/// What is run after the kill.
#[derive(Clone, Copy)]
enum Next<'n> {
    /// Each of these, after every change.
    Each(&'n [&'n [&'n str]]),
    /// One of these, the next one after the next change.
    InTurn(&'n [&'n [&'n str]]),
}

/// Runs a command that somebody else's last work may keep waiting: a child of a castra that was
/// killed still has a lock for a moment.
#[track_caller]
fn run_when_free(project: &Project, args: &[&str]) -> Ran {
    eventually("a lock that is free", || {
        let ran = project.run(args);
        (ran.code != Some(75)).then_some(ran)
    })
}

/// For every N: `before` is run, then `killed` up to its N-th change, then what comes `next` for this N,
/// each in a project of its own. How many changes there are.
fn at_every_change(label: &str, before: &[&[&str]], killed: &[&str], next: Next<'_>) -> usize {
    leaves();
    let (turn, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let wrong = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let turn = turn.fetch_add(1, Ordering::Relaxed);
                    let (n, next) = match next {
                        Next::Each(next) => (turn / next.len() + 1, next[turn % next.len()]),
                        Next::InTurn(next) => (turn + 1, next[turn % next.len()]),
                    };
                    let project = Project::new(label, ONE);
                    for args in before {
                        project.run(args).exits(0);
                    }
                    if !run_until(&project, n, killed) {
                        return;
                    }
                    most.fetch_max(n, Ordering::Relaxed);
                    if let Err(why) = recovers(&project, next) {
                        let place = where_killed(&project);
                        let case = format!("{killed:?} killed before {place}, then {next:?}: {why}");
                        wrong.lock().unwrap().push(case);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    most.into_inner()
}

/// What has to hold after a castra was killed.
fn recovers(project: &Project, next: &[&str]) -> Result<(), String> {
    let sane = |when: &str| -> Result<String, String> {
        let vm = project.vm("web");
        let state = vm["state"].as_str().unwrap_or_default().to_owned();
        match (state.as_str(), vm["pid"].is_u64()) {
            ("running" | "stopping", true) | ("stopped" | "starting" | "crashed", false) => Ok(state),
            _ => Err(format!("{when}: {vm}")),
        }
    };
    let well = |args: &[&str]| -> Result<(), String> {
        let ran = run_when_free(project, args);
        match ran.code {
            Some(0) => Ok(()),
            _ => Err(format!("{ran:#?}")),
        }
    };
    sane("at first")?;
    well(next)?;
    let state = sane("after the next command")?;
    match (next[0], state.as_str()) {
        ("down", "stopped") | ("up" | "restart", "running") => {}
        _ => return Err(format!("it is {state}")),
    }
    if next[0] != "down" {
        well(&["down"])?;
    }
    if sane("at the end")? != "stopped" {
        return Err("it isn't stopped at the end".to_owned());
    }
    let what = format!("the end of {:?}", project.processes());
    until(&what, || project.processes().is_empty());
    let left: Vec<String> = everything(project).difference(leaves()).cloned().collect();
    project.assert_journal_whole();
    match left.is_empty() {
        true => Ok(()),
        false => Err(format!("{left:?} is left")),
    }
}

#[test]
fn up_killed_anywhere() {
    let changes = at_every_change("killed-up", &[], &["up"], Next::Each(&[&["down"], &["up"]]));
    assert!(changes > 50, "only {changes} changes were seen");
}

#[test]
fn down_killed_anywhere() {
    let changes = at_every_change(
        "killed-down",
        &[&["up"]],
        &["down"],
        Next::Each(&[&["down"], &["up"]]),
    );
    assert!(changes > 20, "only {changes} changes were seen");
}

#[test]
fn restart_killed_anywhere() {
    let changes = at_every_change(
        "killed-restart",
        &[&["up"]],
        &["restart"],
        Next::InTurn(&[&["restart"], &["down"]]),
    );
    assert!(changes > 50, "only {changes} changes were seen");
}
