//! A castra that is killed in the middle of a bootstrap, and what the next command makes of it.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::Guest;
use crate::support::{is_alive, until};

const HANGS: &str = "#!/bin/sh\nsleep 600 &\necho $! $$ > pids\necho ready\nwait\n";

/// Bootstraps, kills castra while the script runs, and sees that the script ended too.
fn kill_a_bootstrap(guest: &Guest) {
    let _ = fs::remove_file(guest.remote().join("pids"));
    let mut run = guest.project.begin("", &["bootstrap"]);
    run.until("the script's word", |event| event["text"] == "ready");
    run.signal(Signal::SIGKILL);
    assert_eq!(run.end().0, None);
    let pids = fs::read_to_string(guest.remote().join("pids")).unwrap();
    until("script and child to end with castra", || {
        !pids.split_whitespace().any(is_alive)
    });
    until("the master to end with castra", || {
        !guest.project.state("vms/web/ssh.ctl").exists()
    });
    assert_eq!(open_logs(guest), 1, "{:?}", guest.logs());
}

fn open_logs(guest: &Guest) -> usize {
    guest.logs().iter().filter(|name| name.ends_with(".open")).count()
}

/// The newest run log that is closed.
fn last_log(guest: &Guest) -> Value {
    let name = guest
        .logs()
        .into_iter()
        .rfind(|name| name.ends_with(".json"))
        .unwrap();
    let path = guest.project.state("logs/bootstrap").join(name);
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn assert_closed(guest: &Guest, command: &str) {
    assert_eq!(open_logs(guest), 0, "{command}: {:?}", guest.logs());
    let names = guest.logs();
    let failed: Vec<Value> = names
        .iter()
        .filter(|name| name.ends_with(".json"))
        .map(|name| {
            let path = guest.project.state("logs/bootstrap").join(name);
            serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
        })
        .filter(|log: &Value| log["status"] == "failed")
        .collect();
    let log = failed.last().unwrap_or_else(|| panic!("{command}: {names:?}"));
    let steps = log["steps"].as_array().unwrap();
    let end = steps.last().unwrap();
    assert_eq!(
        (&end["step"], &end["status"], &end["duration_ms"]),
        (&"error".into(), &"failed".into(), &0.into())
    );
    assert!(
        end["detail"].as_str().unwrap().contains("castra ended before"),
        "{command}: {end}"
    );
    let transfer = steps.iter().find(|step| step["step"] == "transfer");
    assert_eq!(
        transfer.unwrap()["status"],
        "success",
        "{command}: what was done before is kept"
    );
}

#[test]
fn the_log_of_a_killed_castra_is_closed_by_the_next_command() {
    let guest = Guest::up("killed", HANGS, "");
    for args in [
        &["up", "--bootstrap", "skip"][..],
        &["bootstrap", "--bootstrap", "skip"],
        &["restart", "--bootstrap", "skip"],
        &["down"],
    ] {
        if !guest.project.status()["vms"][0]["pid"].is_number() {
            guest.project.run(&["up", "--bootstrap", "skip"]).exits(0);
        }
        kill_a_bootstrap(&guest);
        // What only looks leaves it as it is.
        guest.project.run(&["status"]).exits(0);
        guest.project.run(&["bootstrap", "--plan"]).exits(0);
        assert_eq!(open_logs(&guest), 1, "{args:?}");
        let ran = guest.project.run(args).exits(0);
        assert!(
            ran.stderr.contains("never ended"),
            "{args:?} says nothing of it: {}",
            ran.stderr
        );
        assert_closed(&guest, &args.join(" "));
        fs::remove_dir_all(guest.project.state("logs/bootstrap")).unwrap();
    }
}

#[test]
fn clean_closes_the_log_of_a_project_that_ended_without_castra() {
    let guest = Guest::up("killed-clean", HANGS, "");
    kill_a_bootstrap(&guest);
    let status = guest.project.status();
    for pid in [&status["vms"][0]["pid"], &status["broker"]["pid"]] {
        let pid = Pid::from_raw(pid.as_i64().unwrap().try_into().unwrap());
        kill(pid, Signal::SIGKILL).unwrap();
    }
    guest.project.assert_no_process();
    guest.project.run(&["clean", "--dry-run"]).exits(0);
    assert_eq!(open_logs(&guest), 1, "a dry run changes nothing");
    let ran = guest.project.run(&["clean", "--no-logs"]).exits(0);
    assert!(
        ran.stderr.contains("never ended"),
        "clean says nothing of it: {}",
        ran.stderr
    );
    assert_closed(&guest, "clean");
}

#[test]
fn sigterm_and_sigint_close_the_log_themselves() {
    let guest = Guest::up("signalled", HANGS, "");
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut run = guest.project.begin("", &["bootstrap"]);
        run.until("the script's word", |event| event["text"] == "ready");
        run.signal(signal);
        assert_eq!(run.end().0, Some(130));
        assert_eq!(open_logs(&guest), 0);
        assert_eq!(last_log(&guest)["error"], "interrupted");
        let pids = fs::read_to_string(guest.remote().join("pids")).unwrap();
        assert!(!pids.split_whitespace().any(is_alive), "the script goes on");
        assert!(!Path::new(&guest.project.state("vms/web/ssh.ctl")).exists());
    }
}
