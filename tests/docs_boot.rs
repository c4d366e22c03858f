//! The boot-time snippets of docs/PROTOCOL.md: each starts the agent, and as it must be started.
//!
//! Here: what a guest's init would run is taken out of each snippet and run beside a stand-in for
//! the agent. Not here: the agent itself (tests/guest_hello.rs), the seed that castra writes
//! (`runtime::nocloud`).
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use support::{Scratch, eventually, program};

const AGENT: &str = "/usr/local/sbin/castra-hello";

fn manual(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name)).unwrap()
}

/// The one block of this kind.
fn snippet(kind: &str) -> String {
    let page = manual("PROTOCOL.md");
    let fence = format!("```{kind}\n");
    let blocks: Vec<&str> = page.split(&fence).skip(1).collect();
    assert_eq!(blocks.len(), 1, "blocks of {kind}");
    blocks[0].split("```").next().unwrap().to_owned()
}

/// A directory with a stand-in for the agent that notes its arguments.
struct Guest {
    dir: Scratch,
}

impl Guest {
    fn new(label: &str) -> Guest {
        let guest = Guest {
            dir: Scratch::new(label),
        };
        let told = guest.dir.path("told");
        guest.write(
            "agent",
            &format!(
                "#!/bin/sh\necho \"$@\" >{0}.new\nmv {0}.new {0}\n",
                told.display()
            ),
        );
        guest
    }

    fn write(&self, name: &str, text: &str) {
        program(&self.dir.path(name), text);
    }

    /// Runs this as the guest's init would; what the agent was given.
    fn boots(&self, script: &str) -> String {
        let here = |name: &str| self.dir.path(name).display().to_string();
        let script = script
            .replace(AGENT, &here("agent"))
            .replace("/var/log/castra-hello.log", &here("log"))
            .replace("/etc/castra", &here("castra"));
        self.write("script", &script);
        let done = Command::new("sh").arg(self.dir.path("script")).output().unwrap();
        assert!(
            done.status.success() && done.stderr.is_empty(),
            "{script}\n{done:?}"
        );
        eventually(&format!("the agent to be started by {script}"), || {
            fs::read_to_string(self.dir.path("told")).ok()
        })
    }
}

#[test]
fn inittab_respawns_it() {
    let line = snippet("inittab");
    let fields: Vec<&str> = line.trim_end().splitn(4, ':').collect();
    assert_eq!(fields[..3], ["", "", "respawn"]);
    assert_eq!(Guest::new("inittab").boots(fields[3]), "--loop\n");
}

#[test]
fn openrc_supervises_it() {
    let script = snippet("openrc");
    assert!(script.starts_with("#!/sbin/openrc-run\n"));
    // openrc-run reads the file as a shell does and starts what the variables say.
    let started = format!("{script}\n\"$command\" $command_args\n");
    assert!(script.contains("\nsupervisor=supervise-daemon\n"));
    assert_eq!(Guest::new("openrc").boots(&started), "--loop\n");
}

#[test]
fn systemd_restarts_it() {
    let unit = snippet("systemd");
    let value = |key: &str| {
        let head = format!("{key}=");
        unit.lines()
            .find_map(|line| line.strip_prefix(&head))
            .unwrap()
            .to_owned()
    };
    assert_eq!(value("Restart"), "always");
    assert_eq!(value("WantedBy"), "multi-user.target");
    assert_eq!(
        Guest::new("systemd").boots(&format!("exec {}", value("ExecStart"))),
        "--loop\n"
    );
}

#[test]
fn rc_local_and_cloud_init_leave_it_running() {
    let rc_local = snippet("rc.local");
    assert!(rc_local.starts_with("#!/bin/sh\n"));
    assert_eq!(Guest::new("rc-local").boots(&rc_local), "--loop\n");

    let user_data = snippet("cloud-init");
    assert!(user_data.starts_with("#cloud-config\n"));
    let (_, script) = user_data.split_once("    content: |\n").unwrap();
    let script: String = script
        .lines()
        .map(|line| format!("{}\n", line.strip_prefix("      ").unwrap()))
        .collect();
    assert_eq!(Guest::new("cloud-init").boots(&script), "--loop\n");
}

#[test]
fn the_interval_is_a_third_of_the_window() {
    let page = manual("PROTOCOL.md");
    let window = castra::core::config::BrokerConfig::default().freshness.as_secs();
    let third = (window / 3).to_string();
    let told = page
        .lines()
        .find(|line| line.contains(">/etc/castra/heartbeat_secs"))
        .unwrap();
    assert_eq!(told.split_whitespace().nth(1), Some(third.as_str()), "{told}");
    assert!(snippet("cloud-init").contains(&format!("heartbeat_secs\n    content: \"{third}\\n\"")));
    let agent =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/guest/castra-hello")).unwrap();
    assert!(
        agent.contains(&format!("default {third}\n")),
        "the agent's own default"
    );
}
