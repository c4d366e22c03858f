//! `wait`: its exit codes and messages, and that it never waits in vain.

use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::eventually;
use crate::support::project::{ONE, Project, TWO};

/// A `wait` under way, once it has looked for the first time.
fn begin(project: &Project, args: &[&str]) -> Child {
    let mut command = project.castra().command(&[&["wait"], args].concat());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn end(mut child: Child) -> Option<i32> {
    eventually("its end", || child.try_wait().unwrap()).code()
}

#[test]
fn it_ends_when_all_are_as_asked_for() {
    let project = Project::new("wait", TWO);
    let ran = project
        .run(&["wait", "--for", "stopped", "--timeout", "0"])
        .exits(0);
    ran.prints("2 VMs stopped");
    // These VMs may still be started.
    let waiting = begin(&project, &["--for", "bootstrapped"]);
    project.run(&["up"]).exits(0);
    assert_eq!(end(waiting), Some(0), "mode `skip` is all there is to do");
    let ran = project
        .run(&["wait", "web", "--for", "bootstrapped", "--json"])
        .exits(0);
    let events = ran.objects();
    let (said, summary) = (&events[0], &events[1]);
    assert_eq!(
        (&said["vm"], &said["text"]),
        (&"web".into(), &"is bootstrapped".into())
    );
    assert_eq!(summary["operation"], "wait");
    assert_eq!(
        (&summary["exit_status"], &summary["vms"]["total"]),
        (&0.into(), &1.into())
    );

    let waiting = begin(&project, &["--for", "stopped"]);
    project.run(&["down"]).exits(0);
    assert_eq!(end(waiting), Some(0));
    let journal = std::fs::read_to_string(project.state("logs/events.jsonl")).unwrap();
    assert!(!journal.contains("\"wait\""), "it has changed nothing");
}

#[test]
fn time_that_is_over_and_what_cannot_come_any_more_have_codes_of_their_own() {
    let project = Project::new("wait-vain", TWO);
    project.run(&["up"]).exits(0);
    // The stand-in has no guest that would ever be heard.
    let ran = project.run(&["wait", "--timeout", "1", "--json"]).exits(124);
    let events = ran.objects();
    let errors: Vec<&Value> = events
        .iter()
        .filter(|event| event["severity"] == "error")
        .collect();
    assert_eq!(errors.len(), 2, "{events:#?}");
    assert!(
        errors[0]["text"]
            .as_str()
            .unwrap()
            .contains("not heard since its launch"),
        "{errors:?}"
    );
    assert_eq!(events.last().unwrap()["exit_status"], 124);
    let human = project.run(&["wait", "--timeout", "0"]).exits(124);
    human.prints("0 of 2 VMs reachable");

    let waiting = begin(&project, &["--timeout", "1h"]);
    let pid = i32::try_from(project.pid("web")).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    assert_eq!(end(waiting), Some(1), "it crashed");
    let ran = project.run(&["wait"]).exits(1);
    ran.tells("can't become reachable: it crashed");
    project.down();
}

#[test]
fn roles_stand_for_their_replicas_and_unknown_names_are_refused() {
    let project = Project::new("wait-roles", &format!("{ONE}count = 2\n"));
    let ran = project
        .run(&["wait", "web", "--for", "stopped", "--json"])
        .exits(0);
    assert_eq!(ran.objects().last().unwrap()["vms"]["total"], 2);
    let refusal = project.refused(64, &["wait", "wbe-0"]);
    refusal.tells(&["wbe-0", "web-0, web-1"]).advises("web-0");
    project
        .refused(64, &["wait", "--for", "happy"])
        .tells(&["reachable, bootstrapped or stopped"]);
}
