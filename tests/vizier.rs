//! Vizier, the in-guest service: the script against the real broker, and its steps against a real sshd.
//!
//! Here: what it tells, how it survives its broker, that there is one of it, how it is stopped; a guest in a directory
//! that is bootstrapped again and again. Not here: inits (`core::bootstrap::vizier`), a booted guest (`guests.rs`).
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;
use support::guest_scripts::{self, Running, SHELLS, scripts};
use support::project::Project;
use support::sshd::{self, Sshd};
use support::{Castra, free_port, of_type, processes_of, until};

// --- the script ---------------------------------------------------------------------------------

/// A broker, and a directory for a guest's files.
struct Guest {
    castra: Castra,
    port: u16,
}

impl Guest {
    fn new(name: &str) -> Guest {
        let castra = Castra::new(name);
        let port = free_port();
        castra.write(
            "castra.toml",
            &format!(
                "[project]\nname = \"demo\"\nstate_dir = \"state\"\n[broker]\nport = {port}\nfreshness_secs = 3\n\
                 [[vms]]\nname = \"web-0\"\n"
            ),
        );
        fs::create_dir_all(castra.dir().join("tmp")).unwrap();
        let guest = Guest { castra, port };
        guest.start_broker();
        guest
    }

    fn start_broker(&self) {
        let ran = self.castra.run(&["up", "--broker-only"]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
    }

    fn vm(&self) -> Value {
        self.castra.vm("web-0")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.castra.dir().join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn service_log(&self) -> String {
        self.text("project/state/state/vizier/web-0/service.log")
    }

    fn command(&self, shell: &[&str], verb: &str) -> Command {
        let script = scripts().join("castra-vizier");
        let mut command = guest_scripts::command(shell, &script, &self.path("tmp"), &[verb]);
        command
            .args([
                "--vm",
                "web-0",
                "--broker",
                &format!("127.0.0.1:{}", self.port),
                "--timeout",
                "20",
            ])
            .env("CASTRA_VIZIER_ACTIVE", self.path("vizier.active"))
            .env("CASTRA_VIZIER_LOG", self.path("vizier.log"));
        command
    }

    fn run(&self, shell: &[&str], verb: &str) -> (Option<i32>, String) {
        let output = self.command(shell, verb).output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    }

    /// Nothing of it is left: no process, no file but the log.
    fn is_clean(&self) -> bool {
        !self.path("vizier.active").exists()
            && fs::read_dir(self.path("tmp")).unwrap().next().is_none()
            && processes_of(&self.path("tmp")).is_empty()
    }
}

#[test]
fn it_tells_how_the_guest_is_and_outlives_the_broker() {
    for shell in SHELLS {
        let guest = Guest::new("vizier-life");
        let mut vizier = Running::start(guest.command(shell, "run"));
        until("its heartbeat tells load, memory and uptime", || {
            let vm = guest.vm();
            let metrics = &vm["guest_metrics"];
            vm["bus_session"] == true
                && metrics["load"].as_array().is_some_and(|load| load.len() == 3)
                && metrics["mem_available_kib"].as_u64().is_some_and(|free| free > 0)
                && metrics["uptime_secs"].as_u64().is_some_and(|up| up > 0)
        });
        assert_eq!(
            guest.vm()["capabilities"],
            serde_json::json!(["bus-v1", "vizier-v1"])
        );
        until("it is heard again without another hello", || {
            guest.vm()["last_heartbeat_age_ms"]
                .as_u64()
                .is_some_and(|age| age < 900)
        });
        let active = guest.text("vizier.active");
        assert_eq!(active.lines().next(), Some(vizier.pid().to_string().as_str()));
        assert_eq!(
            guest.run(shell, "status"),
            (
                Some(0),
                format!("castra-vizier runs as process {}\n", vizier.pid())
            )
        );

        guest.castra.kill_broker();
        until("it notices", || {
            guest.text("vizier.log").contains("nothing answers")
        });
        guest.start_broker();
        // The broker's record may still tell of the session before.
        until("it is back", || {
            guest.text("vizier.log").matches("has a session").count() >= 2
                && guest.vm()["bus_session"] == true
        });

        assert_eq!(guest.run(shell, "stop").0, Some(0), "{shell:?}");
        vizier.wait();
        until("nothing is left over", || guest.is_clean());
        assert_eq!(guest.run(shell, "status").0, Some(3));
        // Its log lines from the time without a broker came later, and its last lines came too.
        let log = guest.text("vizier.log");
        for part in [
            "started as process",
            "has a session",
            "nothing answers",
            "stopped",
        ] {
            assert!(log.contains(part), "{shell:?}: {part}: {log}");
        }
        until("all its lines are on the host", || guest.service_log() == log);
    }
}

#[test]
fn there_is_one_of_it() {
    for shell in SHELLS {
        let guest = Guest::new("vizier-one");
        let first = Running::start(guest.command(shell, "run"));
        until("the first one has its session", || {
            guest.vm()["bus_session"] == true
        });
        let mut second = Running::start(guest.command(shell, "run"));
        let told = second.next_said();
        assert_eq!(
            told,
            format!(
                "castra-vizier: already running as process {}: waiting until that ends",
                first.pid()
            )
        );
        // `start` leaves it at that.
        assert_eq!(guest.run(shell, "start").0, Some(0));
        second.signal(Signal::SIGTERM);
        second.wait();
        assert_eq!(
            guest.text("vizier.active").lines().next(),
            Some(first.pid().to_string().as_str()),
            "{shell:?}: the one that waited took nothing away"
        );
        // Killed, it leaves its file behind; that of a process that is no Vizier counts for nothing.
        first.signal(Signal::SIGKILL);
        drop(first);
        fs::write(guest.path("vizier.active"), format!("{}\n", std::process::id())).unwrap();
        assert_eq!(guest.run(shell, "start").0, Some(0));
        until("the next one has its place", || {
            let (code, told) = guest.run(shell, "status");
            code == Some(0) && told.starts_with("castra-vizier runs as process")
        });
        assert_eq!(guest.run(shell, "stop").0, Some(0));
        until("nothing is left over", || guest.is_clean());
    }
}

#[test]
fn its_end_may_come_at_any_moment() {
    for shell in SHELLS {
        let guest = Guest::new("vizier-early");
        for round in 0..10 {
            assert_eq!(guest.run(shell, "start").0, Some(0), "{shell:?}");
            // From the very beginning to an open session.
            for _ in 0..round % 5 {
                assert_eq!(guest.run(shell, "status").0, Some(0), "{shell:?}");
            }
            assert_eq!(guest.run(shell, "stop").0, Some(0), "{shell:?}");
            until("nothing is left over", || guest.is_clean());
        }
    }
}

#[test]
fn its_log_is_bounded() {
    let guest = Guest::new("vizier-log");
    fs::write(guest.path("vizier.log"), "x".repeat(65_500)).unwrap();
    let vizier = Running::start(guest.command(&["dash"], "run"));
    until("the full log steps aside", || {
        guest.text("vizier.log.1").len() == 65_500 && guest.text("vizier.log").contains("started")
    });
    drop(vizier);
}

// --- the steps ----------------------------------------------------------------------------------

/// A VM on the stand-in for QEMU; its guest is a directory, in which this machine's sshd works.
struct Booted {
    project: Project,
    /// Last, so that the guest's Vizier is stopped before its files go.
    root: PathBuf,
    _sshd: Sshd,
}

impl Booted {
    fn up(label: &str, vizier: &str) -> Booted {
        let vms = format!(
            "[vizier]\n{vizier}\n[[vms]]\nname = \"web\"\nkernel = \"vmlinuz\"\n\
             [vms.bootstrap]\nmode = \"auto\"\nscript = \"boot/run.sh\"\n"
        );
        let project = Project::new(label, &vms);
        let port = free_port();
        project.config_with(&format!("[broker]\nport = {port}\nfreshness_secs = 3\n"), &vms);
        let castra = project.castra();
        castra.write("boot/run.sh", "#!/bin/sh\ntrue\n");
        let dir = castra.dir().join("sshd");
        let root = dir.join("root");
        fs::create_dir_all(&root).unwrap();
        // The guest's way to the broker isn't there without a guest.
        let variables = format!("CASTRA_BROKER=\"127.0.0.1:{port}\" CASTRA_FW_CFG_DIR=\"/nonexistent\"");
        let sshd = Sshd::start_with(&dir, &project.state("id_ed25519.pub"), sshd::PATH, &variables);
        let metadata = sshd.metadata(&castra.dir().join("guest"));
        castra.write("boot/bootstrap.toml", &metadata);
        project.run(&["up", "--bootstrap", "skip"]).exits(0);
        Booted {
            project,
            root,
            _sshd: sshd,
        }
    }

    /// Where the guest keeps it, whoever we are.
    fn lib(&self) -> PathBuf {
        if nix::unistd::geteuid().is_root() {
            self.root.join("usr/local/lib/castra")
        } else {
            self.root.with_file_name(".castra/vizier")
        }
    }

    /// Steps and details of another bootstrap.
    fn bootstrap(&self, code: i32) -> Vec<(String, String, String)> {
        let ran = self.project.run(&["bootstrap", "--json"]).exits(code);
        let word = |event: &Value, key: &str| event[key].as_str().unwrap_or_default().to_owned();
        of_type(&ran.objects(), "bootstrap.step")
            .into_iter()
            .map(|event| (word(event, "step"), word(event, "status"), word(event, "detail")))
            .filter(|(step, ..)| step.starts_with("vizier"))
            .collect()
    }

    fn planned(&self) -> Value {
        let ran = self.project.run(&["bootstrap", "--plan", "--json"]).exits(0);
        of_type(&ran.objects(), "bootstrap.planned")[0].clone()
    }

    fn stop_vizier(&self) {
        if !self.lib().exists() {
            return;
        }
        let run = if nix::unistd::geteuid().is_root() {
            self.root.join("run/castra")
        } else {
            self.lib()
        };
        let _ = Command::new("sh")
            .arg(self.lib().join("castra-vizier"))
            .arg("stop")
            .env("CASTRA_VIZIER_ACTIVE", run.join("vizier.active"))
            .status();
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        self.stop_vizier();
    }
}

fn statuses(steps: &[(String, String, String)]) -> Vec<(&str, &str)> {
    steps
        .iter()
        .map(|(step, status, _)| (step.as_str(), status.as_str()))
        .collect()
}

const ALL_WELL: [(&str, &str); 3] = [
    ("vizier-install", "success"),
    ("vizier-enable", "success"),
    ("vizier-handshake", "success"),
];

#[test]
fn it_is_installed_once_and_started_when_it_must_be() {
    let guest = Booted::up("vizier-steps", "enabled = true");
    assert_eq!(guest.planned()["vizier_status"], "install");
    let first = guest.bootstrap(0);
    assert_eq!(statuses(&first), ALL_WELL, "{first:?}");
    assert!(first[0].2.starts_with("copied version"), "{first:?}");
    assert!(first[1].2.contains("started under"), "{first:?}");
    assert_eq!(first[2].2, "vizier-v1, in a session");
    let planned = guest.planned();
    assert_eq!(planned["vizier_status"], "current");
    let log = PathBuf::from(planned["vizier_log_path"].as_str().unwrap());
    assert!(fs::read_to_string(&log).unwrap().contains("started as process"));

    let copied = |name: &str| modified(&guest.lib().join(name));
    let before = copied("castra-vizier");
    let second = guest.bootstrap(0);
    assert_eq!(statuses(&second), ALL_WELL);
    assert!(second[0].2.starts_with("current"), "{second:?}");
    assert!(second[1].2.starts_with("runs already"), "{second:?}");

    // Stopped in the guest: started again, and not copied.
    guest.stop_vizier();
    let third = guest.bootstrap(0);
    assert_eq!(statuses(&third), ALL_WELL);
    assert!(
        third[0].2.starts_with("version") && third[1].2.contains("started"),
        "{third:?}"
    );
    assert_eq!(copied("castra-vizier"), before);

    // Another version is there: this one takes its place, in the running process too.
    let stamp = fs::read_to_string(guest.lib().join("vizier.version")).unwrap();
    fs::write(guest.lib().join("vizier.version"), "000000000000 000000000000\n").unwrap();
    guest.stop_vizier();
    let fourth = guest.bootstrap(0);
    assert!(fourth[0].2.starts_with("copied version"), "{fourth:?}");
    assert_ne!(copied("castra-vizier"), before);
    assert_eq!(
        fs::read_to_string(guest.lib().join("vizier.version")).unwrap(),
        stamp
    );
    let lines: Vec<String> = fs::read_to_string(&log)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    let mut once = lines.clone();
    once.dedup();
    assert_eq!(
        lines, once,
        "the broker and the bootstrap bring the same lines once"
    );
    assert_eq!(
        lines
            .iter()
            .filter(|line| line.contains("started as process"))
            .count(),
        3
    );
}

fn modified(path: &Path) -> std::time::SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

#[test]
fn a_broker_that_was_gone_is_found_again() {
    let guest = Booted::up("vizier-broker", "enabled = true");
    assert_eq!(statuses(&guest.bootstrap(0)), ALL_WELL);
    guest.project.castra().kill_broker();
    // It starts a broker, and waits until Vizier has found that.
    let again = guest.bootstrap(0);
    assert_eq!(statuses(&again), ALL_WELL, "{again:?}");
    assert!(again[0].2.starts_with("current"), "{again:?}");
}

#[test]
fn without_vizier_nothing_is_installed() {
    let guest = Booted::up("vizier-off", "enabled = false");
    let steps = guest.bootstrap(0);
    assert!(
        steps
            .iter()
            .all(|(_, status, detail)| status == "skipped" && detail == "`enabled` under [vizier] is false"),
        "{steps:?}"
    );
    let planned = guest.planned();
    assert_eq!(
        (&planned["vizier_status"], &planned["vizier_log_path"]),
        (&"disabled".into(), &Value::Null)
    );
    assert!(!guest.lib().join("castra-vizier").exists());
}
