//! `castra ports`, and the ports that `castra up` refuses to fight for.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::project::{FAKE_QEMU, ONE, Project};
use crate::support::{Ran, free_port, until};

fn with_forward(port: u16) -> String {
    format!("{ONE}[[vms.port_forwards]]\nhost = {port}\nguest = 80\n")
}

/// Another project under the same home: the folder `second`, one VM `api`.
fn second(project: &Project, port: u16) -> String {
    let text = format!(
        "[project]\nname = \"second\"\n[qemu]\nbinary = \"{FAKE_QEMU}\"\naccel = \"tcg\"\n[bootstrap]\nmode = \"skip\"\n\
         [broker]\nport = 0\n[[vms]]\nname = \"api\"\nkernel = \"../project/vmlinuz\"\n\
         [[vms.port_forwards]]\nhost = {port}\nguest = 8080\n"
    );
    let config = project.castra().write("../second/castra.toml", &text);
    config.to_str().unwrap().to_owned()
}

fn one(ran: Ran) -> Value {
    serde_json::from_str(&ran.exits(0).stdout).unwrap()
}

/// `vm port>guest state`, one for each row.
fn rows(ports: &Value) -> Vec<String> {
    let rows = ports["ports"].as_array().unwrap();
    rows.iter()
        .map(|row| {
            let vm = row["vm"].as_str().unwrap_or("broker");
            format!(
                "{vm} {}>{} {}",
                row["port"],
                row["guest"],
                row["state"].as_str().unwrap()
            )
        })
        .collect()
}

fn down_second(project: &Project, config: &str) {
    project.run(&["--config", config, "down"]).exits(0);
}

#[test]
fn conflicts_of_all_projects_are_found_before_boot() {
    let port = free_port();
    let project = Project::new("ports-two", &with_forward(port));
    let config = second(&project, port);
    project.run(&["--config", &config, "up"]).exits(0);

    let wanted = one(project.run(&["ports", "--json"]));
    assert_eq!(
        rows(&wanted),
        [
            format!("web {port}>80 conflicting"),
            "web null>22 declared".to_owned()
        ]
    );
    assert_eq!(
        (&wanted["schema"], &wanted["conflicts"]),
        (&json!("castra.ports.v1"), &json!(1))
    );
    let owner = &wanted["ports"][0]["owner"];
    assert_eq!(
        (&owner["kind"], &owner["vm"], &owner["project"]),
        (&json!("vm"), &json!("api"), &json!("second"))
    );
    let text = project.run(&["ports"]).exits(0);
    text.prints("vm `api` of castra project `second`");
    text.tells("host = 0");

    let refusal = project.refused(75, &["up"]).alone();
    let advice = refusal.remediation.clone();
    refusal.tells(&[
        &port.to_string(),
        "vm `web`",
        "vm `api` of castra project `second`",
    ]);
    assert!(
        advice.contains("--workspace second-") && advice.contains("down api"),
        "{advice}"
    );
    let plan = project.run(&["up", "--plan"]).exits(1);
    plan.tells("vm `api` of castra project `second`");
    assert!(!project.state("").exists(), "something was made");

    down_second(&project, &config);
    let free = one(project.run(&["ports", "--json"]));
    assert_eq!(
        (rows(&free)[0].as_str(), &free["conflicts"]),
        (format!("web {port}>80 declared").as_str(), &json!(0))
    );
    assert_eq!(free["ports"][0]["also_declared_by"][0]["vm"], "api");
    project.run(&["up"]).exits(0);
    project.down();
}

#[test]
fn a_running_fleets_ports_are_active_and_its_brokers_reserved() {
    let port = free_port();
    let project = Project::new("ports-active", &with_forward(port));
    let idle = project.run(&["ports", "--active"]).exits(0);
    assert!(
        idle.stdout.is_empty() && idle.stderr.contains("no port is in use"),
        "{idle:?}"
    );
    assert!(!project.state("").exists(), "something was made");

    project.run(&["up"]).exits(0);
    let status = project.status();
    let broker = status["broker"]["port"].as_u64().unwrap();
    let ports = one(project.run(&["ports", "--json", "--active"]));
    let ssh = status["vms"][0]["ssh"]["port"].as_u64().unwrap();
    assert_eq!(
        rows(&ports),
        [
            format!("broker {broker}>null broker-reserved"),
            format!("web {port}>80 active"),
            format!("web {ssh}>22 active"),
        ]
    );
    assert_eq!(ports["ports"][0]["pid"], status["broker"]["pid"]);
    assert_eq!(ports["ports"][1]["pid"], status["vms"][0]["pid"]);
    let verbose = project.run(&["ports", "--verbose"]).exits(0);
    verbose.prints(&format!("QEMU is pid {}", project.pid("web")));

    // The broker is gone, but the guest was told its port: nobody else may have it.
    let pid = i32::try_from(status["broker"]["pid"].as_i64().unwrap()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    until("the broker's end", || {
        project.status()["broker"]["state"] == "offline"
    });
    let config = second(&project, u16::try_from(broker).unwrap());
    let reserved = one(project.run(&["--config", &config, "ports", "--json"]));
    assert_eq!(rows(&reserved)[0], format!("api {broker}>8080 broker-reserved"));
    assert_eq!(reserved["ports"][0]["owner"]["kind"], "broker");
    project.run(&["--config", &config, "up"]).exits(75);
    let all = one(project.run(&["ports", "--all", "--json"]));
    assert_eq!(
        all["projects"].as_array().unwrap().len(),
        1,
        "the second was never up: {all}"
    );
    project.down();
}

#[test]
fn without_a_project_what_runs_anywhere_is_named() {
    let project = Project::new("ports-nowhere", ONE);
    let elsewhere = |args: &[&str]| {
        let mut command = project.castra().command(args);
        command.current_dir(project.castra().dir());
        crate::support::project::finish(command, args)
    };
    let nothing = elsewhere(&["ports"]).exits(66);
    nothing.tells("no castra project runs");
    project.run(&["up"]).exits(0);
    let running = elsewhere(&["ports"]).exits(66);
    assert!(running.stdout.is_empty(), "{running:?}");
    running.tells("castra --workspace faults-").tells(" ports");
    let ssh = elsewhere(&["exec", "web", "--", "echo", "a b"]).exits(66);
    ssh.tells(" exec web -- echo 'a b'\n");
    let all = elsewhere(&["ports", "--all"]).exits(0);
    all.prints("active").prints("faults-");
    project.down();
}
