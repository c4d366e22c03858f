//! The main job on real guests: up, reachable, bootstrapped, down; and what happens when it is
//! disturbed. Run by `make test`; each test has a project of its own, all share the cache of guest
//! images. Without a KVM that is shown to work these guests run under plain emulation.
#![allow(clippy::unwrap_used)]

#[path = "guests/aarch64.rs"]
mod aarch64;
#[path = "guests/disk.rs"]
mod disk;
#[path = "guests/server.rs"]
mod server;
mod support;

use castra::core::events::endings::ShutdownEnding;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::guest_project::{self, Project, home, text};
use support::spawn_piped;

/// Generous: under emulation on a busy machine a boot may take half a minute.
const PATIENCE: Duration = Duration::from_secs(180);

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "waited {PATIENCE:?} for {what}");
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

fn of_type<'e>(events: &'e [Value], kind: &str) -> Vec<&'e Value> {
    events.iter().filter(|event| event["type"] == kind).collect()
}

fn steps_of(events: &[Value], vm: &str) -> Vec<(String, String)> {
    let word = |value: &Value| value.as_str().unwrap().to_owned();
    of_type(events, "bootstrap.step")
        .into_iter()
        .filter(|step| step["vm"] == vm)
        .map(|step| (word(&step["step"]), word(&step["status"])))
        .collect()
}

/// QEMUs and ssh masters whose working directory lies in the project.
fn processes_in(dir: &Path) -> Vec<String> {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|entry| fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir)))
        .map(|entry| text(&fs::read(entry.path().join("cmdline")).unwrap_or_default()))
        .collect()
}

/// Processes that have this text in their command line.
fn processes_named(needle: &str) -> Vec<String> {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .map(|entry| text(&fs::read(entry.path().join("cmdline")).unwrap_or_default()))
        .filter(|line| line.contains(needle))
        .collect()
}

#[test]
fn up_reachable_bootstrapped_down() {
    let project = Project::with(
        "main-job",
        r#"
[[vms]]
name = "web"
  [[vms.port_forwards]]
  host = 0
  guest = 80
  [vms.bootstrap]
  script = "web.sh"
  payload = "site"
  env = { GREETING = "it's \"fine\" $HOME" }
  verify_path = "done"

[[vms]]
name = "db"
"#,
    );
    project.file(
        "web.sh",
        "#!/bin/sh\nset -eu\n[ -f done ] && { echo Castra:noop; exit 0; }\nmkdir -p /srv\ncp -r \"$CASTRA_PAYLOAD_DIR/.\" /srv\n\
         printf '%s\\n' \"$GREETING\" >/srv/greeting\nhttpd -h /srv\necho \"configured $CASTRA_VM\"\ntouch done\n",
    );
    project.file("site/index.html", "hello from the payload\n");
    project.file("site/with space/q'uote", "odd name\n");

    let events = project.events(0, &["up"]);
    for (index, event) in events
        .iter()
        .enumerate()
        .filter(|(_, event)| event["type"] == "command.accepted")
    {
        assert_eq!(index, 0, "{event}");
    }
    assert_eq!(events.last().unwrap()["type"], "summary");
    let steps = [
        "wait-handshake",
        "vizier-install",
        "vizier-enable",
        "vizier-handshake",
        "connect",
        "transfer",
        "apply",
        "verify",
    ];
    let of_web = steps_of(&events, "web");
    assert_eq!(
        of_web.iter().map(|(step, _)| step.as_str()).collect::<Vec<_>>(),
        steps
    );
    assert!(of_web.iter().all(|(_, status)| status == "success"), "{of_web:?}");
    assert_eq!(of_type(&events, "bootstrap.completed").len(), 2);
    let launched = events.iter().find(|event| event["phase"] == "launched").unwrap();
    eprintln!(
        "guests run under {}: {}",
        launched["accel"], launched["accel_reason"]
    );

    let status = project.status();
    assert_eq!(status["reachable"], true);
    assert_eq!(status["broker"]["state"], "running");
    for vm in status["vms"].as_array().unwrap() {
        assert_eq!(
            (&vm["state"], &vm["broker"]),
            (&"running".into(), &"reachable".into()),
            "{vm}"
        );
        assert_eq!(vm["bootstrap"]["status"], "success");
    }

    // The forward leads to what the script set up; the payload and the variable arrived whole.
    let forwards = project.vm("web")["forwards"].clone();
    let web = forwards
        .as_array()
        .unwrap()
        .iter()
        .find(|forward| forward["guest"] == 80)
        .unwrap()["host"]
        .as_u64()
        .unwrap();
    let get = |path: &str| {
        let mut stream = TcpStream::connect(("127.0.0.1", u16::try_from(web).unwrap())).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET /{path} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    assert!(get("").ends_with("hello from the payload\n"));
    assert!(get("with%20space/q'uote").ends_with("odd name\n"));
    assert!(get("greeting").ends_with("it's \"fine\" $HOME\n"));

    assert_eq!(
        project.expect(3, &["exec", "db", "--", "sh", "-c", "hostname; exit 3"]),
        "db\n"
    );
    assert!(
        project
            .expect(0, &["ssh", "db", "--", "uname", "-s"])
            .contains("Linux")
    );

    // Again: all is up already, and the script says that there is nothing to do.
    let again = project.events(0, &["up"]);
    assert!(!again.iter().any(|event| event["phase"] == "launched"));
    let web_again = of_type(&again, "bootstrap.completed")
        .into_iter()
        .find(|event| event["vm"] == "web")
        .unwrap();
    assert_eq!(web_again["status"], "NoOp");
    assert_eq!(project.vm("web")["bootstrap"]["noop"], true);

    let down = project.events(0, &["down"]);
    let phases: Vec<&str> = down
        .iter()
        .filter(|event| event["vm"] == "db")
        .filter_map(|event| event["phase"].as_str())
        .collect();
    assert_eq!(
        phases,
        [
            "shutdown-requested",
            "cooperative-attempted",
            "cooperative-succeeded",
            "shutdown-complete",
            "overlay-discarded"
        ]
    );
    assert!(down.last().unwrap()["bytes"].as_u64().unwrap() > 0);
    assert_eq!(processes_in(&project.dir), [""; 0], "a process is left");
    assert_eq!(
        processes_named(&project.dir.display().to_string()),
        [""; 0],
        "a process is left"
    );
    assert_eq!(
        fs::read_dir(project.state("overlays")).unwrap().count(),
        0,
        "an overlay is left"
    );
    for vm in ["web", "db"] {
        for entry in fs::read_dir(project.state("vms").join(vm)).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            assert!(
                !name.ends_with(".sock") && !name.ends_with(".ctl") && !name.ends_with(".pid"),
                "{name} is left"
            );
        }
    }
    assert!(!project.state("broker.sock").exists());
    let status = project.status();
    assert_eq!(
        (&status["broker"]["state"], &status["reachable"]),
        (&"offline".into(), &false.into())
    );
    assert_eq!(status["vms"][0]["state"], "stopped");
}

#[test]
fn a_failing_script_fails_its_vm_alone() {
    let project = Project::with(
        "one-fails",
        "[[vms]]\nname = \"good\"\n[[vms]]\nname = \"bad\"\n  [vms.bootstrap]\n  script = \"bad.sh\"\n",
    );
    project.file("bad.sh", "#!/bin/sh\necho all is lost >&2\nexit 7\n");
    let events = project.events(1, &["up"]);
    let failed = of_type(&events, "bootstrap.failed");
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0]["vm"], "bad");
    let apply = of_type(&events, "bootstrap.step")
        .into_iter()
        .find(|step| step["step"] == "apply" && step["vm"] == "bad")
        .unwrap();
    let detail = apply["detail"].as_str().unwrap();
    assert!(detail.contains('7') && detail.contains("all is lost"), "{detail}");
    assert_eq!(project.vm("good")["bootstrap"]["status"], "success");
    assert_eq!(project.vm("bad")["bootstrap"]["status"], "failed");
    let log = fs::read_dir(project.state("logs/bootstrap"))
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            path.to_string_lossy().contains("/bad-") && path.extension().is_some_and(|kind| kind == "json")
        })
        .unwrap();
    let log: Value = serde_json::from_slice(&fs::read(log).unwrap()).unwrap();
    assert_eq!(log["status"], "failed");
    assert_eq!(log["steps"].as_array().unwrap().last().unwrap()["step"], "error");
}

#[test]
fn a_killed_qemu_a_powered_off_guest_and_a_killed_broker_are_seen() {
    let project = Project::with("disturbed", "[[vms]]\nname = \"a\"\n[[vms]]\nname = \"b\"\n");
    project.expect(0, &["up"]);
    let kill = |pid: &Value| {
        assert!(
            Command::new("kill")
                .args(["-9", &pid.to_string()])
                .status()
                .unwrap()
                .success()
        );
    };

    // The broker dies: everything reads offline, the VMs go on, and the next `up` starts one again
    // on the same port, which the guests find by themselves.
    let before = project.status();
    kill(&before["broker"]["pid"]);
    eventually("the broker to read offline", || {
        project.status()["broker"]["state"] == "offline"
    });
    assert_eq!(
        (&project.vm("a")["state"], &project.vm("a")["reachable"]),
        (&"running".into(), &false.into())
    );
    project.expect(0, &["up", "--bootstrap", "skip"]);
    assert_eq!(project.status()["broker"]["port"], before["broker"]["port"]);
    eventually("both guests to come back", || {
        project.status()["vms"]
            .as_array()
            .unwrap()
            .iter()
            .all(|vm| vm["reachable"] == true)
    });

    // A guest powers itself off, and a QEMU is killed: castra tells them apart, by evidence.
    project.expect(0, &["exec", "a", "--", "poweroff"]);
    kill(&project.vm("b")["pid"]);
    eventually("a to be gone", || project.vm("a")["state"] != "running");
    eventually("b to be gone", || project.vm("b")["state"] != "running");
    let (a, b) = (project.vm("a"), project.vm("b"));
    assert_eq!(
        (&a["state"], &a["ended"]["reason"]),
        (&"stopped".into(), &"guest-shutdown".into()),
        "{a}"
    );
    assert_eq!(b["state"], "crashed", "{b}");
    assert_eq!((&a["reachable"], &b["reachable"]), (&false.into(), &false.into()));

    // `up` starts both anew.
    project.expect(0, &["up"]);
    assert_eq!(project.vm("b")["state"], "running");
}

/// `broker.freshness` as the journal has it: the VM's reachability, told once at each change.
fn freshness_told(project: &Project) -> Vec<bool> {
    project
        .events(0, &["events", "--type", "broker.freshness"])
        .iter()
        .filter(|event| event["vm"] == "a")
        .map(|event| event["reachable"].as_bool().unwrap())
        .collect()
}

#[test]
fn a_silent_guest_ages_out_and_no_hand_shake_outlives_its_launch() {
    // A hello every 4 s: on a machine where other guests boot, one may come late.
    const WINDOW_MS: u64 = 12_000;
    let project = Project::with(
        "silence",
        "freshness_secs = 12\n[vizier]\nenabled = false\n[[vms]]\nname = \"a\"\n",
    );
    project.expect(0, &["up"]);
    assert!(project.vm("a")["last_handshake_age_ms"].as_u64().unwrap() <= WINDOW_MS);
    let told_before = freshness_told(&project);
    assert_eq!(told_before.last(), Some(&true));

    // The agent stops, the guest goes on: its age grows past the window, then it is waited for.
    let agent = |signal: &str| {
        let command = format!("kill -{signal} $(pidof hello)");
        project.expect(0, &["exec", "a", "--", "sh", "-c", &command]);
    };
    agent("STOP");
    let mut age = 0;
    eventually("the silent guest to leave the window", || {
        let vm = project.vm("a");
        age = vm["last_handshake_age_ms"].as_u64().unwrap();
        assert_eq!(vm["reachable"], age <= WINDOW_MS, "{vm}");
        assert_eq!(
            vm["broker"],
            if age <= WINDOW_MS { "reachable" } else { "waiting" }
        );
        vm["broker"] == "waiting"
    });
    assert_eq!(project.vm("a")["state"], "running");
    assert!(project.vm("a")["last_handshake_age_ms"].as_u64().unwrap() >= age);
    eventually("its leave to be told", || {
        freshness_told(&project).len() > told_before.len()
    });
    agent("CONT");
    eventually("the guest to be heard again", || {
        project.vm("a")["broker"] == "reachable"
    });
    eventually("its return to be told", || {
        freshness_told(&project).len() > told_before.len() + 1
    });
    assert_eq!(freshness_told(&project)[told_before.len()..], [false, true]);

    // QEMU dies within the window: what was heard before proves nothing any more.
    let token = [
        "exec",
        "a",
        "--",
        "cat",
        "/sys/firmware/qemu_fw_cfg/by_name/opt/castra/token/raw",
    ];
    let old_token = project.expect(0, &token).trim().to_owned();
    assert!(
        Command::new("kill")
            .args(["-9", &project.vm("a")["pid"].to_string()])
            .status()
            .unwrap()
            .success()
    );
    eventually("the VM to be gone", || project.vm("a")["state"] != "running");
    let crashed = project.vm("a");
    assert_eq!(
        (&crashed["state"], &crashed["broker"]),
        (&"crashed".into(), &"waiting".into()),
        "{crashed}"
    );

    // Nor does it for the next launch, at any moment of it.
    let mut up = project.command(&["up"]).stdout(Stdio::null()).spawn().unwrap();
    eventually("the next launch to be up", || {
        let vm = project.vm("a");
        if let (Some(age), Some(uptime)) = (vm["last_handshake_age_ms"].as_u64(), vm["uptime_ms"].as_u64()) {
            assert!(age <= uptime, "an older launch's handshake counts: {vm}");
        }
        up.try_wait().unwrap().is_some()
    });
    assert!(up.wait().unwrap().success());
    assert_eq!(project.vm("a")["reachable"], true);

    // The token of the earlier launch is invalid, also from within the guest.
    assert_ne!(project.expect(0, &token).trim(), old_token);
    let with_old_token = format!("CASTRA_TOKEN={old_token} sh /usr/sbin/castra-hello");
    let declined = project.run(&["exec", "a", "--", "sh", "-c", &with_old_token]);
    assert_eq!(declined.status.code(), Some(1));
    assert!(
        text(&declined.stderr).contains("bad-token"),
        "{}",
        text(&declined.stderr)
    );
    let told = project.events(0, &["events", "--type", "broker.handshake"]);
    assert_eq!(
        told.iter().filter(|event| event["reason"] == "bad-token").count(),
        1
    );
    let log = project.expect(0, &["logs"]);
    assert!(
        log.lines().any(|line| line.contains("[host-broker]")
            && line.contains("hello from vm:a outcome=declined reason=bad-token")),
        "{log}"
    );
}

#[test]
fn ctrl_c_during_up_leaves_nothing_unreported() {
    let project = Project::with(
        "interrupted",
        "[[vms]]\nname = \"vm\"\n  [vms.bootstrap]\n  script = \"wait.sh\"\n",
    );
    project.file("wait.sh", "#!/bin/sh\necho waiting\nsleep 1000\n");
    let mut up = project
        .command(&["up", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut seen = Vec::new();
    for line in BufReader::new(up.stdout.take().unwrap()).lines() {
        let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
        if event["text"]
            .as_str()
            .is_some_and(|text| text.contains("waiting"))
            && event["source"] == "bootstrap"
        {
            interrupt(&up);
        }
        seen.push(event);
    }
    assert_eq!(up.wait().unwrap().code(), Some(130));
    assert_eq!(of_type(&seen, "bootstrap.failed").len(), 1, "{seen:#?}");
    assert_eq!(seen.last().unwrap()["exit_status"], 130);
    assert_eq!(
        project.vm("vm")["state"],
        "running",
        "what was started goes on until `down`"
    );
    assert_eq!(project.vm("vm")["bootstrap"]["status"], "failed");
    let left = project.run(&["exec", "vm", "--", "sh", "-c", "ps | grep -c '[s]leep 1000'"]);
    assert_eq!(
        text(&left.stdout).trim(),
        "0",
        "the script's children were ended in the guest"
    );
}

fn interrupt(child: &Child) {
    assert!(
        Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
}

/// Status and detail of a step, from a run's events.
fn step_told<'e>(events: &'e [Value], step: &str) -> (&'e str, &'e str) {
    let event = of_type(events, "bootstrap.step")
        .into_iter()
        .find(|event| event["step"] == step)
        .unwrap();
    (
        event["status"].as_str().unwrap(),
        event["detail"].as_str().unwrap_or_default(),
    )
}

#[test]
fn vizier_keeps_a_guest_in_touch_and_the_bus_goes_both_ways() {
    let project = Project::with("vizier", "[[vms]]\nname = \"a\"\n");
    let first = project.events(0, &["up"]);
    assert_eq!(
        of_type(&first, "bootstrap.planned")[0]["vizier_status"],
        "install"
    );
    assert!(step_told(&first, "vizier-install").1.starts_with("copied"));
    assert_eq!(
        step_told(&first, "vizier-enable"),
        ("success", "started under BusyBox init")
    );
    assert_eq!(
        step_told(&first, "vizier-handshake"),
        ("success", "vizier-v1, in a session")
    );
    eventually("its first heartbeat", || {
        let vm = project.vm("a");
        vm["bus_session"] == true && vm["guest_metrics"]["mem_available_kib"].as_u64() > Some(1000)
    });

    // From the guest to the host, and back.
    let line = |child: Child| {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_str::<Value>(text(&output.stdout).trim()).unwrap()["payload"].clone()
    };
    let host = spawn_piped(
        project
            .command(&["bus", "subscribe", "ci/*", "--count", "1", "--json"])
            .args(["--from", "1"]),
    );
    let payload = r#"{"from":"the guest","ü":[1]}"#;
    project.expect(0, &["exec", "a", "--", "castra-bus", "publish", "ci/x", payload]);
    assert_eq!(line(host), serde_json::from_str::<Value>(payload).unwrap());
    let guest = spawn_piped(project.command(&[
        "exec",
        "a",
        "--",
        "castra-bus",
        "subscribe",
        "vm:a",
        "--count",
        "1",
    ]));
    eventually("the guest's subscription", || {
        project.vm("a")["bus_subscribed"] == true
    });
    project.expect(
        0,
        &[
            "bus",
            "publish",
            "--topic",
            "vm:a",
            "--payload",
            "\"from the host\"",
        ],
    );
    assert_eq!(line(guest), "from the host");

    // Its broker dies; the next one has it back.
    let pid = project.status()["broker"]["pid"].to_string();
    assert!(
        Command::new("kill")
            .args(["-9", &pid])
            .status()
            .unwrap()
            .success()
    );
    // It is dead once the kernel has let go of its lock; until then `bootstrap` finds it running.
    eventually("the end of the broker", || {
        project.status()["broker"]["state"] == "offline"
    });
    let second = project.events(0, &["bootstrap"]);
    assert_eq!(
        of_type(&second, "bootstrap.planned")[0]["vizier_status"],
        "current"
    );
    assert!(step_told(&second, "vizier-install").1.starts_with("current"));
    assert!(step_told(&second, "vizier-enable").1.starts_with("runs already"));
    assert_eq!(project.vm("a")["bus_session"], true);

    // Killed in the guest, init starts it again; its log tells, and the host has it.
    let kill = [
        "exec",
        "a",
        "--",
        "sh",
        "-c",
        "kill -9 $(head -n 1 /run/castra/vizier.active)",
    ];
    project.expect(0, &kill);
    let log = project.state("state/vizier/a/service.log");
    eventually("the next Vizier", || {
        fs::read_to_string(&log).is_ok_and(|log| log.matches("started as process").count() == 2)
    });
    project.expect(0, &["down"]);
    assert_eq!(processes_in(&project.dir), [""; 0]);
}

#[test]
fn an_isolated_guest_reaches_the_broker_and_nothing_else() {
    let project = Project::with("isolated", "[[vms]]\nname = \"cell\"\nnetwork = \"isolated\"\n");
    project.expect(0, &["up"]);
    assert_eq!(project.vm("cell")["reachable"], true);
    let port = project.status()["broker"]["port"].to_string();
    let dial = format!("nc -w 3 10.0.2.2 {port} </dev/null");
    let output = project.run(&["exec", "cell", "--", "sh", "-c", &dial]);
    assert!(
        !text(&output.stdout).contains("castra-broker"),
        "the host's loopback is out of reach"
    );
    project.expect(0, &["down"]);
    assert_eq!(processes_in(&project.dir), [""; 0]);
}

#[test]
fn the_default_guest_is_the_same_bytes_each_time() {
    let project = Project::with("reproducible", "");
    let built = |home: &str| {
        let home = project.dir.join(home);
        let output = project
            .command(&["image", "build", "--json"])
            .env("CASTRA_HOME", &home)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let dir = fs::read_dir(home.join("images"))
            .unwrap()
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.join("manifest.json").exists())
            .unwrap();
        ["vmlinux", "initramfs.cpio", "manifest.json"].map(|name| fs::read(dir.join(name)).unwrap())
    };
    let (one, two) = (built("home-1"), built("home-2"));
    assert!(one == two, "two builds from the same packages differ");
    assert!(one.iter().all(|file| !file.is_empty()));
}

#[test]
fn init_up_status_ssh_down_in_an_empty_folder() {
    let project = Project::with("tour", "");
    fs::remove_file(project.dir.join("castra.toml")).unwrap();
    project.expect(0, &["init"]);
    project.expect(0, &["up"]);
    let status = project.status();
    let name = status["vms"][0]["name"].as_str().unwrap().to_owned();
    assert!(project.expect(0, &["status"]).contains(&name));
    assert!(
        project
            .expect(0, &["ssh", &name, "--", "uname", "-a"])
            .starts_with("Linux ")
    );
    project.expect(0, &["down"]);
}

#[test]
fn folders_lie_in_each_other_and_what_cannot_be_mounted_fails() {
    let mount = |host: &str, guest: &str| format!("{{ host = \"{host}\", guest = \"{guest}\" }}");
    let vm = |mounts: &[String]| format!("[[vms]]\nname = \"m\"\nmounts = [{}]\n", mounts.join(", "));
    // Inner folders before outer ones, the wrong order for mounting.
    let nested = [mount("inner", "/a/b"), mount("outer", "/a")];
    let project = Project::with("nested", &vm(&nested));
    project.file("inner/i", "i\n");
    project.file("outer/o", "o\n");
    project.file("outer/b/hidden", "h\n");
    project.expect(0, &["up"]);
    assert_eq!(
        project.expect(0, &["exec", "m", "--", "cat", "/a/b/i", "/a/o"]),
        "i\no\n"
    );
    project.expect(0, &["down"]);

    // No folder can be made there.
    let config = project.dir.join("castra.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("/a/b", "/proc/b")).unwrap();
    let ran = project.run(&["up"]);
    assert_eq!(ran.status.code(), Some(1), "{ran:?}");
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(said.contains("the guest couldn't mount /proc/b"), "{said}");
    project.expect(0, &["down"]);
}

#[test]
fn a_home_may_have_any_name() {
    let project = Project::with("nasty", "[[vms]]\nname = \"k\"\nnetwork = \"isolated\"\n");
    let home = project.dir.join("ho,me: %h \"x\"");
    fs::create_dir(&home).unwrap();
    // The guest is built in the home that all tests share; building it here would take half a minute.
    let shared = guest_project::home();
    project.expect(0, &["image", "build"]);
    std::os::unix::fs::symlink(
        std::path::absolute(shared).unwrap().join("images"),
        home.join("images"),
    )
    .unwrap();
    let config = project.dir.join("castra.toml");
    let text = fs::read_to_string(&config)
        .unwrap()
        .replace("state_dir = \"state\"\n", "");
    fs::write(&config, text).unwrap();
    let run = |args: &[&str]| {
        let output = project.command(args).env("CASTRA_HOME", &home).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "castra {args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    run(&["up"]);
    assert_eq!(run(&["exec", "k", "--", "echo", "reached"]), "reached\n");
    project.file("a:b", "copied\n");
    run(&["cp", "./a:b", "k:/tmp/"]);
    assert_eq!(run(&["exec", "k", "--", "cat", "/tmp/a:b"]), "copied\n");
    run(&["down"]);
}

#[test]
fn a_disk_and_a_mount_persist() {
    let project = Project::with(
        "persist",
        "[[vms]]\nname = \"keep\"\npersist = true\ndisk_size = \"1 GiB\"\n  [[vms.mounts]]\n  host = \"share\"\n  guest = \"/mnt/share\"\n  readonly = false\n  \
         [[vms.mounts]]\n  host = \"share\"\n  guest = \"/mnt/frozen\"\n  readonly = true\n",
    );
    project.file("share/from-host", "seen\n");
    project.expect(0, &["up"]);
    assert_eq!(
        project.expect(0, &["exec", "keep", "--", "cat", "/mnt/share/from-host"]),
        "seen\n"
    );
    project.expect(
        0,
        &[
            "exec",
            "keep",
            "--",
            "sh",
            "-c",
            "echo back >/mnt/share/from-guest && echo kept >/var/kept",
        ],
    );
    assert_eq!(
        fs::read_to_string(project.dir.join("share/from-guest")).unwrap(),
        "back\n"
    );
    assert_ne!(
        project
            .run(&["exec", "keep", "--", "touch", "/mnt/frozen/x"])
            .status
            .code(),
        Some(0)
    );
    project.expect(0, &["down"]);
    let config = project.dir.join("castra.toml");
    let larger = fs::read_to_string(&config).unwrap().replace("1 GiB", "3 GiB");
    fs::write(&config, larger).unwrap();
    project.expect(0, &["up"]);
    assert_eq!(
        project.expect(0, &["exec", "keep", "--", "cat", "/var/kept"]),
        "kept\n"
    );
    let blocks = project.expect(0, &["exec", "keep", "--", "stat", "-f", "-c", "%b", "/var"]);
    let blocks: u64 = blocks.trim().parse().unwrap();
    assert!(
        blocks > (2 << 30) / 4096,
        "the file system grows with its disk: {blocks} blocks"
    );
    project.expect(0, &["down", "--discard"]);
    assert_eq!(fs::read_dir(project.state("overlays")).unwrap().count(), 0);
}

#[test]
fn a_restarted_guest_has_its_disk_and_its_keys_and_is_reachable_anew() {
    let project = Project::with(
        "restart",
        "[[vms]]\nname = \"web\"\n  [vms.bootstrap]\n  script = \"count.sh\"\n[[vms]]\nname = \"db\"\n",
    );
    project.file("count.sh", "#!/bin/sh\necho x >>/var/boots\n");
    project.expect(0, &["up"]);
    let (before, db) = (project.vm("web"), project.vm("db")["pid"].clone());
    let exec = |vm: &str, command: &str| project.expect(0, &["exec", vm, "--", "sh", "-c", command]);
    let boot_id = exec("web", "cat /proc/sys/kernel/random/boot_id");
    exec("web", "echo kept >/var/kept");

    let events = project.events(0, &["restart", "web"]);
    let phases: Vec<&str> = of_type(&events, "vm.lifecycle")
        .iter()
        .map(|event| event["phase"].as_str().unwrap())
        .collect();
    assert_eq!(
        phases,
        [
            "shutdown-requested",
            "cooperative-attempted",
            "cooperative-succeeded",
            "shutdown-complete",
            "overlay-prepared",
            "launched"
        ]
    );
    assert_eq!(of_type(&events, "bootstrap.completed").len(), 1);
    let after = project.vm("web");
    assert_eq!(after["reachable"], true);
    assert_ne!(after["pid"], before["pid"]);
    assert_ne!(exec("web", "cat /proc/sys/kernel/random/boot_id"), boot_id);
    assert_eq!(exec("web", "cat /var/kept; wc -l </var/boots"), "kept\n2\n");
    assert_eq!(project.vm("db")["pid"], db);

    // One that switched itself off has its disk still; --discard begins anew.
    project.run(&["exec", "web", "--", "sh", "-c", "sync; poweroff"]);
    eventually("the guest to power off", || {
        project.vm("web")["state"] == "stopped"
    });
    project.expect(0, &["restart", "web"]);
    assert_eq!(exec("web", "cat /var/kept"), "kept\n");
    project.expect(0, &["restart", "web", "--discard"]);
    assert_eq!(exec("web", "ls /var/kept 2>/dev/null; wc -l </var/boots"), "1\n");
    project.expect(0, &["down"]);
    assert_eq!(processes_in(&project.dir), [""; 0]);
}

#[test]
fn a_guest_attached_to_an_embedding_program_is_its_child_to_the_end() {
    use castra::core::config::{self, Environment};
    use castra::core::operations::{
        self, DownOptions, StatusOptions, ThreadBrokerLauncher, UpOptions, VmLaunchMode, collect,
    };
    use castra::core::reporter::Silent;
    use std::os::unix::process::ExitStatusExt;

    let project = Project::with("attached", "[[vms]]\nname = \"web\"\n");
    let environment = Environment {
        castra_home: Some(home()),
        user_home: None,
    };
    let config = config::load_in(&project.dir.join("castra.toml"), &environment).unwrap();
    let broker = ThreadBrokerLauncher::new();
    let up = || {
        let options = UpOptions {
            launch_mode: VmLaunchMode::Attached,
            ..UpOptions::new(config.clone(), home())
        };
        let up = collect(|reporter| operations::up_with_launcher(options, &broker, reporter));
        let outcome = up.value.unwrap();
        assert!(
            outcome.vms[0].error.is_none(),
            "{:?}\n{:?}",
            outcome.vms[0],
            up.diagnostics
        );
        outcome.vms[0].attached.clone().unwrap()
    };
    let status = || {
        let options = StatusOptions {
            project: (&config).into(),
            cancel: Default::default(),
        };
        operations::status(options, &mut Silent).unwrap()
    };

    let qemu = up();
    let seen = status();
    assert!(seen.reachable && seen.vms[0].pid == Some(qemu.pid()), "{seen:?}");
    assert_eq!(seen.broker.pid, Some(std::process::id()));
    let stat = fs::read_to_string(format!("/proc/{}/stat", qemu.pid())).unwrap();
    let parent = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .nth(1)
        .unwrap()
        .to_owned();
    assert_eq!(parent, std::process::id().to_string());
    let down = operations::down(DownOptions::of(&config), &mut Silent).unwrap();
    assert_eq!(down.vms[0].outcome, ShutdownEnding::Graceful, "{down:?}");
    assert!(qemu.wait(PATIENCE).unwrap().success());

    // One that is killed is reaped at once, and its end is known from its status.
    let qemu = up();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(qemu.pid()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(qemu.wait(PATIENCE).unwrap().signal(), Some(9));
    assert!(
        !Path::new(&format!("/proc/{}", qemu.pid())).exists(),
        "a zombie is left"
    );
    assert_eq!(format!("{:?}", status().vms[0].state), "Crashed");
    operations::down(DownOptions::of(&config), &mut Silent).unwrap();
    broker.stop();
}

#[test]
fn the_console_has_a_shell_and_a_slow_reader_stalls_nobody() {
    let project = Project::with("console", "[[vms]]\nname = \"a\"\n");
    project.events(0, &["up"]);
    let console = |stdin: Stdio| {
        project
            .command(&["console", "a"])
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    eventually("an answer on the console", || {
        let mut child = console(Stdio::piped());
        writeln!(child.stdin.take().unwrap(), "echo $((6 * 7))-answered").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        text(&output.stdout).contains("42-answered")
    });

    // Somebody is attached and reads nothing, while the guest writes far more than pipe and socket
    // hold: it goes on all the same.
    let mut idle = console(Stdio::piped());
    let lock = project.state("vms/a/console.lock");
    eventually("it to be attached", || {
        castra::core::host::locked_pid(&lock) == Some(idle.id())
    });
    let flood = format!(
        "i=0; while [ $i -lt 6000 ]; do echo {}; i=$((i+1)); done >/dev/console",
        "x".repeat(80)
    );
    project.expect(0, &["exec", "a", "--", "sh", "-c", &flood]);
    assert!(idle.try_wait().unwrap().is_none(), "it was attached all the time");

    // The VM ends, and so does it.
    project.events(0, &["down"]);
    let output = idle.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(output.stdout.len() > 480_000, "{}", output.stdout.len());
    assert!(
        text(&output.stderr).contains("vm `a` has ended"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn commands_end_as_they_should_in_a_default_guest() {
    let project = Project::with("commands", "[vizier]\nenabled = false\n[[vms]]\nname = \"web\"\n");
    project.expect(0, &["up"]);
    project.expect(137, &["exec", "web", "--", "sh", "-c", "kill -9 $$"]);
    let word = "a".repeat(100_000);
    assert_eq!(
        project.expect(
            0,
            &[
                "exec",
                "web",
                "--",
                "sh",
                "-c",
                "echo $((${#1} + ${#2}))",
                "sh",
                &word,
                &word
            ]
        ),
        "200000\n"
    );

    // Eight at once, three times over.
    let at_once = (0..8).map(|_| {
        let mut command = project.command(&["exec", "web", "--", "true"]);
        std::thread::spawn(move || [(); 3].map(|()| command.status().unwrap().code()))
    });
    for run in at_once.collect::<Vec<_>>() {
        assert_eq!(run.join().unwrap(), [Some(0); 3]);
    }

    // A gone reader ends its command; a gone client does, too.
    let mut client = project
        .command(&["exec", "web", "--", "yes"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(client.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    eventually("castra to end with its reader", || {
        client.try_wait().unwrap().is_some()
    });
    let mut client = project
        .command(&["exec", "web", "--", "sh", "-c", "echo ready; sleep 4711"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    line.clear();
    BufReader::new(client.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "ready\n");
    client.kill().unwrap();
    client.wait().unwrap();
    eventually("nothing of both to be left in the guest", || {
        let running = project.expect(0, &["exec", "web", "--", "ps"]);
        !running.contains("sleep 4711") && !running.lines().any(|line| line.ends_with(" yes"))
    });

    // Links are links on both sides of a copy.
    fs::create_dir_all(project.dir.join("tree/lib")).unwrap();
    project.file("tree/lib/f", "x");
    for (link, to) in [("lib64", "lib"), ("dangling", "nowhere")] {
        std::os::unix::fs::symlink(to, project.dir.join("tree").join(link)).unwrap();
    }
    project.expect(0, &["cp", "tree", "web:/tmp/"]);
    project.expect(0, &["cp", "web:/tmp/tree", "back"]);
    for (link, to) in [("lib64", "lib"), ("dangling", "nowhere")] {
        let back = fs::read_link(project.dir.join("back").join(link)).unwrap();
        assert_eq!(back.to_str(), Some(to));
    }
    assert_eq!(fs::read_to_string(project.dir.join("back/lib64/f")).unwrap(), "x");

    project.expect(0, &["down"]);
    project.expect(255, &["exec", "web", "--", "true"]);
}
