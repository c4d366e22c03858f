//! castra inside another program: it changes nothing of that program and leaves nothing behind, and the
//! example in docs works. The VMs run on the stand-in for QEMU.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use castra::core::config::{self, Config, Environment};
use castra::core::events::contract::Stamped;
use castra::core::events::{Event, Severity};
use castra::core::failure::Exit;
use castra::core::operations::{
    self, BrokerLauncher, DownOptions, ProcessBrokerLauncher, RestartOptions, StatusOptions,
    ThreadBrokerLauncher, UpOptions, VmLaunchMode, collect,
};
use castra::core::reporter::Silent;
use castra::core::status::BrokerState;
use serde_json::Value;

use support::project::{ONE, Project, TWO};
use support::{AMPLE, CASTRA, eventually};

/// Set for a test that runs again in a process of its own: its project's directory.
const ALONE: &str = "CASTRA_TEST_ALONE_IN";

/// Runs one test of this file again, alone in a process, with this project; what it printed.
fn run_alone(test: &str, project: &Project) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env(ALONE, project.castra().project())
        .env("CASTRA_HOME", project.castra().home())
        .env("HOME", project.castra().dir())
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert!(output.status.success(), "{out}\n{err}");
    assert_eq!(err, "", "the library printed to stderr");
    out
}

fn alone() -> Option<Config> {
    let dir = PathBuf::from(std::env::var_os(ALONE)?);
    Some(config::load(&dir.join("castra.toml")).unwrap())
}

fn home() -> PathBuf {
    std::env::var_os("CASTRA_HOME").unwrap().into()
}

// --- what belongs to the embedding program ----------------------------------------------------

/// Properties of a process that a library must not change.
#[derive(Debug, PartialEq)]
struct Belongings {
    cwd: PathBuf,
    env: BTreeMap<std::ffi::OsString, std::ffi::OsString>,
    /// Blocked, ignored and caught signals.
    signals: Vec<String>,
    umask: String,
    limits: String,
    descriptors: Vec<String>,
    threads: Vec<String>,
    children: String,
}

impl Belongings {
    fn now() -> Belongings {
        // This thread's: glibc blocks all signals of a thread for as long as it starts another, and
        // the harness's own may just be at that.
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        let lines = |keys: &[&str]| -> Vec<String> {
            let wanted = |line: &&str| keys.iter().any(|key| line.starts_with(key));
            status.lines().filter(wanted).map(str::to_owned).collect()
        };
        let tasks: Vec<_> = fs::read_dir("/proc/self/task").unwrap().flatten().collect();
        Belongings {
            cwd: std::env::current_dir().unwrap(),
            env: std::env::vars_os().collect(),
            signals: lines(&["SigBlk", "SigIgn", "SigCgt"]),
            umask: lines(&["Umask"]).concat(),
            limits: fs::read_to_string("/proc/self/limits").unwrap(),
            descriptors: fs::read_dir("/proc/self/fd")
                .unwrap()
                .filter_map(|entry| {
                    let path = entry.ok()?.path();
                    Some(format!(
                        "{} {}",
                        path.display(),
                        fs::read_link(&path).ok()?.display()
                    ))
                })
                .collect(),
            children: tasks
                .iter()
                .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
                .collect(),
            threads: tasks
                .iter()
                .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
                .collect(),
        }
    }
}

/// A thread that was joined is gone from `/proc` a moment later; all else is at once as it was.
#[track_caller]
fn assert_as(before: &Belongings, when: &str) {
    let until = Instant::now() + Duration::from_secs(10);
    let now = eventually("a look", || {
        let now = Belongings::now();
        (now == *before || Instant::now() >= until).then_some(now)
    });
    assert_eq!(now, *before, "after {when}");
}

/// Brings VMs up, reads their status, takes them down.
fn live_once(config: &Config, broker: &dyn BrokerLauncher, mode: VmLaunchMode) {
    let options = UpOptions {
        launch_mode: mode,
        ..UpOptions::new(config.clone(), home())
    };
    let outcome = operations::up_with_launcher(options, broker, &mut Silent).unwrap();
    assert_eq!(outcome.exit, Exit::Done, "{outcome:?}");
    assert_eq!(
        outcome.vms.iter().filter(|vm| vm.attached.is_some()).count(),
        if mode == VmLaunchMode::Attached {
            config.vms.len()
        } else {
            0
        }
    );
    let status = StatusOptions {
        project: config.into(),
        cancel: Default::default(),
    };
    let seen = operations::status(status.clone(), &mut Silent).unwrap();
    assert_eq!(seen.broker.state, BrokerState::Running);
    assert_eq!(seen.broker.pid, Some(std::process::id()));
    assert!(seen.vms.iter().all(|vm| vm.pid.is_some()), "{seen:?}");
    let options = RestartOptions {
        vms: vec![config.vms[0].name.to_string()],
        launch_mode: mode,
        ..RestartOptions::new(config.clone(), home())
    };
    let again = operations::restart_with_launcher(options, broker, &mut Silent).unwrap();
    assert_eq!(again.exit, Exit::Done, "{again:?}");
    assert!(
        again.vms.len() == 1 && again.vms[0].stopped.is_some(),
        "{again:?}"
    );
    assert_eq!(again.broker_port, outcome.broker_port);
    let down = operations::down(DownOptions::of(config), &mut Silent).unwrap();
    assert_eq!(down.exit, Exit::Done, "{down:?}");
    assert!(
        !down.broker_stopped,
        "a thread of ours was stopped by somebody else"
    );
    for vm in outcome.vms.into_iter().chain(again.vms) {
        vm.attached.map(|qemu| qemu.wait(AMPLE).unwrap());
    }
}

#[test]
fn five_lives_of_a_fleet_leave_a_program_as_it_was() {
    let Some(config) = alone() else {
        let project = Project::new("library-lives", TWO);
        let out = run_alone("five_lives_of_a_fleet_leave_a_program_as_it_was", &project);
        let said: Vec<&str> = out.lines().filter(|line| !line.trim().is_empty()).collect();
        assert_eq!(said.len(), 3, "the library printed: {out}");
        project.assert_no_process();
        return;
    };
    let before = Belongings::now();
    for life in 0..5 {
        let broker = ThreadBrokerLauncher::new();
        let mode = match life % 2 {
            0 => VmLaunchMode::Daemonize,
            _ => VmLaunchMode::Attached,
        };
        live_once(&config, &broker, mode);
        broker.stop();
        let found = operations::status(
            StatusOptions {
                project: (&config).into(),
                cancel: Default::default(),
            },
            &mut Silent,
        );
        assert_eq!(found.unwrap().broker.state, BrokerState::Offline);
        assert_as(&before, &format!("life {life}"));
    }
}

#[test]
fn dropping_the_launcher_ends_its_broker() {
    let Some(config) = alone() else {
        let project = Project::new("library-drop", ONE);
        run_alone("dropping_the_launcher_ends_its_broker", &project);
        return;
    };
    let before = Belongings::now();
    live_once(&config, &ThreadBrokerLauncher::new(), VmLaunchMode::Daemonize);
    assert_as(&before, "its life");
}

// --- what operations yield --------------------------------------------------------------------

/// The project's config, read as if CASTRA_HOME were that of the test.
fn config_of(project: &Project) -> Config {
    let environment = Environment {
        castra_home: Some(project.castra().home()),
        user_home: Some(project.castra().dir().to_owned()),
    };
    config::load_in(&project.castra().project().join("castra.toml"), &environment).unwrap()
}

#[test]
fn a_collected_up_holds_value_diagnostics_and_events() {
    let project = Project::new("library-collect", &format!("{ONE}nonsense = 1\n"));
    let config = config_of(&project);
    let broker = ProcessBrokerLauncher { cli: CASTRA.into() };
    let options = UpOptions::new(config.clone(), project.castra().home());
    let up = collect(|reporter| operations::up_with_launcher(options, &broker, reporter));
    let unknown = &up.diagnostics[0];
    assert_eq!(unknown.severity, Severity::Warn);
    assert!(unknown.text.contains("nonsense"), "{unknown}");
    assert!(matches!(up.events[0].event, Event::CommandAccepted { .. }));
    assert!(matches!(up.events.last().unwrap().event, Event::Summary { .. }));
    let up = up.transpose().unwrap();
    assert_eq!(up.value.vms[0].vm.as_str(), "web");
    let journal = fs::read_to_string(project.state("logs/events.jsonl")).unwrap();
    // The broker is a run of its own, with a journal of its own.
    let run = &up.events[0].run;
    let (own, broker): (Vec<&Stamped>, Vec<&Stamped>) = up.events.iter().partition(|event| event.run == *run);
    let lines: Vec<String> = own.into_iter().map(Stamped::contract_line).collect();
    let kinds = |events: &[&Stamped]| -> Vec<&str> {
        events.iter().map(|event| event.event.contract_type()).collect()
    };
    assert_eq!(kinds(&broker), ["broker.started"]);
    for line in lines.iter().filter(|line| line.contains("\"type\":\"command.")) {
        assert!(line.contains("\"source\":\"library\""), "{line}");
    }
    assert_eq!(
        journal.lines().collect::<Vec<_>>(),
        lines,
        "the journal holds the same lines"
    );
    let down = collect(|reporter| operations::down(DownOptions::of(&config), reporter));
    assert!(down.value.unwrap().broker_stopped);
    let stopped = |event: &&Stamped| event.event.contract_type() == "broker.stopped";
    assert_eq!(down.events.iter().filter(stopped).count(), 1);
    project.assert_nothing_left();
}

#[test]
fn without_a_castra_binary_only_a_launcher_starts_brokers() {
    let project = Project::new("library-no-cli", ONE);
    let options = || UpOptions::new(config_of(&project), project.castra().home());
    let refused = operations::up(options(), &mut Silent).unwrap_err();
    assert_eq!(refused.exit, Exit::Usage);
    assert!(
        refused.to_string().contains("no broker can be started"),
        "{refused}"
    );
    let named = UpOptions {
        cli: Some(CASTRA.into()),
        ..options()
    };
    operations::up(named, &mut Silent).unwrap();
    project.down();

    project.config(&format!("{ONE}network = \"isolated\"\n"));
    let broker = ThreadBrokerLauncher::new();
    let refused = operations::up_with_launcher(options(), &broker, &mut Silent).unwrap_err();
    assert!(refused.to_string().contains("broker-pipe"), "{refused}");
    project.assert_nothing_left();
}

// --- the example ------------------------------------------------------------------------------

/// The example with these arguments, as a program of its own, in a project; it has nothing to complain of.
fn example(project: &Project, args: &[&str]) -> (Option<i32>, String) {
    let (code, out, stderr) = run_example(project, args);
    assert_eq!(stderr, "", "{args:?}");
    (code, out)
}

fn run_example(project: &Project, args: &[&str]) -> (Option<i32>, String, String) {
    let built = Command::new(env!("CARGO"))
        .args([
            "build",
            "--quiet",
            "--offline",
            "--locked",
            "--example",
            "library_up",
            "--message-format=json",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    let binary = String::from_utf8(built.stdout)
        .unwrap()
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .unwrap();
    let output = Command::new(binary)
        .args(args)
        .args(["--cli", CASTRA])
        .current_dir(project.castra().project())
        .env("CASTRA_HOME", project.castra().home())
        .env("HOME", project.castra().dir())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// The contract lines in what the example printed; every other line is one of its own.
fn events_in(out: &str) -> Vec<Value> {
    let mut events = Vec::new();
    for line in out.lines() {
        match line.strip_prefix("event ").and_then(|rest| rest.split_once(": ")) {
            Some((_, json)) => events.push(serde_json::from_str(json).unwrap()),
            None => assert!(
                ["plan ", "vm ", "diagnostic: ", "down: "]
                    .iter()
                    .any(|own| line.starts_with(own)),
                "somebody else printed: {line}"
            ),
        }
    }
    events
}

#[test]
fn the_example_plans_without_touching_anything() {
    let project = Project::new("library-plan", TWO);
    let (code, out) = example(&project, &["--plan"]);
    assert_eq!(code, Some(0), "{out}");
    let types: Vec<Value> = events_in(&out)
        .iter()
        .map(|event| event["type"].clone())
        .collect();
    assert_eq!(types, ["bootstrap.planned", "bootstrap.planned"]);
    assert!(out.contains("plan web: Skip"), "{out}");
    assert!(
        !project.state("").exists() && !project.castra().home().exists(),
        "something was made"
    );
}

#[test]
fn the_example_says_what_it_lacks_without_a_config() {
    let project = Project::new("library-lacks", ONE);
    fs::remove_file(project.castra().project().join("castra.toml")).unwrap();
    let (code, out, stderr) = run_example(&project, &["--plan"]);
    assert_eq!((code, out.as_str()), (Some(66), ""));
    assert!(
        stderr.contains("castra.toml") && stderr.contains("--config") && stderr.contains("castra init"),
        "{stderr}"
    );
}

#[test]
fn the_example_brings_a_fleet_up_and_down() {
    for how in [&["--execute"][..], &["--execute", "--thread", "--attached"]] {
        let project = Project::new("library-execute", TWO);
        let (code, out) = example(&project, how);
        assert_eq!(code, Some(0), "{out}");
        let events = events_in(&out);
        let launched = |event: &&Value| event["phase"] == "launched";
        assert_eq!(events.iter().filter(launched).count(), 2, "{out}");
        let gone = |event: &&Value| event["phase"] == "shutdown-complete";
        assert_eq!(events.iter().filter(gone).count(), 2, "{out}");
        assert!(out.contains("down: 2 VMs"), "{out}");
        project.assert_nothing_left();
    }
}

// --- what core never does ---------------------------------------------------------------------

/// The code of one file, without its tests and comments.
fn code_of(text: &str) -> String {
    let code = text.split("mod tests {").next().unwrap();
    code.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// The sources below a directory, without those of modules that are compiled for tests alone.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    let tests: Vec<PathBuf> = found.iter().flat_map(|path| test_modules(path)).collect();
    found.retain(|path| {
        !tests
            .iter()
            .any(|test| path.starts_with(test) || *path == test.with_extension("rs"))
    });
    found
}

/// The modules that this file declares for tests alone, as folders they may have.
fn test_modules(path: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(path).unwrap();
    let folder = match path.file_stem().and_then(|stem| stem.to_str()) {
        Some("mod" | "lib") => path.parent().unwrap().to_owned(),
        _ => path.with_extension(""),
    };
    let mut found = Vec::new();
    for declared in text.split("#[cfg(test)]").skip(1) {
        let line = declared
            .lines()
            .take(4)
            .find(|line| line.contains("mod "))
            .unwrap_or_default();
        let file = declared
            .lines()
            .find_map(|line| line.trim().strip_prefix("#[path = \"")?.strip_suffix("\"]"));
        match (
            line.trim()
                .split_once("mod ")
                .and_then(|(_, name)| name.strip_suffix(';')),
            file,
        ) {
            (Some(_), Some(file)) => found.push(path.with_file_name(file).with_extension("")),
            (Some(name), None) => found.push(folder.join(name)),
            (None, _) => {}
        }
    }
    found
}

/// `core` serves whoever embeds it: what would reach into that program stands in one file, which is
/// the main function of `castra broker` and nobody else's.
#[test]
fn core_never_reaches_into_the_program_around_it() {
    const FORBIDDEN: &[&str] = &[
        "println!",
        "print!(",
        "eprint",
        "dbg!(",
        "io::stdout",
        "io::stderr",
        "process::exit",
        "process::abort",
        "env::args",
        "current_exe",
        "set_var",
        "remove_var",
        "set_current_dir",
        "set_hook",
        "sigaction",
        "ctrlc::",
        "umask(",
    ];
    let own_process = ["broker/daemon.rs", "broker/signals.rs"];
    let core = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/core");
    let mut found = Vec::new();
    for path in sources(&core) {
        let name = path.strip_prefix(&core).unwrap().to_str().unwrap();
        if own_process.contains(&name) {
            continue;
        }
        let code = code_of(&fs::read_to_string(&path).unwrap());
        for word in FORBIDDEN.iter().filter(|word| code.contains(**word)) {
            found.push(format!("{name}: {word}"));
        }
    }
    assert_eq!(found, Vec::<String>::new());
}
