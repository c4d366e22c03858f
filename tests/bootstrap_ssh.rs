//! The whole bootstrap pipeline against a real sshd on this machine: everything but the guest.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use castra::core::bootstrap::bootstrap_plan::{self, LastLaunch};
use castra::core::bootstrap::context::{Context, Launch};
use castra::core::bootstrap::keys;
use castra::core::bootstrap::pipeline::{self, BootstrapError, BootstrapOutcome};
use castra::core::cancel::Cancel;
use castra::core::config::{Config, load_with_home};
use castra::core::events::contract::Stamped;
use castra::core::events::endings::BootstrapStatus;
use castra::core::events::{Accel, BootstrapStepKind, BootstrapStepStatus, Event};
use castra::core::failure::{Exit, Failure};
use castra::core::host;
use castra::core::reporter::Emitter;
use castra::core::root::handshake_record::{HandshakeRecord, RecordWriter};
use castra::core::root::records::{self, StopRecord};
use castra::core::root::run_log::RunLog;
use serde_json::Value;
use support::scratch::RecordLock;
use support::sshd::{self, Sshd, keygen};
use support::{Scratch, is_alive, program, until};

const LAUNCH: &str = "launch-1";

/// A project with one VM, `web`, whose QEMU is a lock and whose SSH server is this machine's.
struct Fixture {
    dir: Scratch,
    config: Config,
    sshd: Option<Sshd>,
    qemu: Mutex<Option<RecordLock>>,
    cancel: Cancel,
    port: u16,
}

struct Ran {
    outcome: BootstrapOutcome,
    events: Vec<Stamped>,
}

impl Fixture {
    /// `bootstrap` are lines below [vms.bootstrap]; `script` becomes run.sh if there is one.
    fn new(label: &str, bootstrap: &str, script: Option<&str>) -> Fixture {
        Fixture::with_path(label, bootstrap, script, sshd::PATH)
    }

    fn with_path(label: &str, bootstrap: &str, script: Option<&str>, path: &str) -> Fixture {
        let scratch = Scratch::new(&format!("bootstrap {label}"));
        let dir = scratch.dir();
        fs::create_dir(dir.join("project")).unwrap();
        let user = sshd::login();
        let script_line = script.map_or("", |_| "script = \"run it.sh\"");
        let remote = if bootstrap.contains("remote_dir") {
            String::new()
        } else {
            format!("remote_dir = \"{}\"", dir.join("guest's dir").display())
        };
        let toml = format!(
            "[project]\nname = \"demo\"\nstate_dir = \"state 50% of it\"\n[vizier]\nenabled = false\n[ssh]\nuser = \"{user}\"\n\
             [[vms]]\nname = \"web\"\n[vms.bootstrap]\n{script_line}\n{remote}\n{bootstrap}\n"
        );
        let project = dir.join("project");
        fs::write(project.join("castra.toml"), toml).unwrap();
        if let Some(script) = script {
            fs::write(project.join("run it.sh"), script).unwrap();
        }
        let config = load_with_home(&project.join("castra.toml"), Some(&dir.join("home")))
            .unwrap_or_else(|failure| panic!("{failure}"));
        let cancel = Cancel::new();
        keys::ensure_project_key(&config, &cancel).unwrap();
        let mut authorized = config.state.ssh_key().into_os_string();
        authorized.push(".pub");
        let sshd = Sshd::start_with(&dir.join("sshd"), Path::new(&authorized), path, "");
        let vm = config.state.vm(&config.vms[0].name);
        fs::create_dir_all(vm.dir()).unwrap();
        let qemu = RecordLock::hold(&vm.qemu_pid());
        Fixture {
            port: sshd.port(),
            dir: scratch,
            config,
            sshd: Some(sshd),
            qemu: Mutex::new(Some(qemu)),
            cancel,
        }
    }

    fn remote(&self) -> PathBuf {
        PathBuf::from(&self.config.vms[0].bootstrap.remote_dir)
    }

    fn shake_hands(&self) {
        let now = host::boottime_ms();
        let vm = &self.config.vms[0].name;
        let record = HandshakeRecord {
            vm: vm.clone(),
            boot_id: host::boot_id().clone(),
            broker_run: "run".into(),
            handshake_boottime_ms: now,
            heard_boottime_ms: now,
            heard_at: "2026-11-21T10:00:00.000Z".into(),
            capabilities: Vec::new(),
            bus_session: false,
            bus_subscribed: false,
            last_publish_boottime_ms: None,
            last_heartbeat_boottime_ms: None,
            last_acked_seq: None,
            guest_metrics: None,
        };
        RecordWriter::new(self.config.state.handshake(vm))
            .write(&record)
            .unwrap();
    }

    fn run(&self) -> Ran {
        self.run_watched(&|_| ())
    }

    /// Runs the pipeline; `on_event` sees every event as it comes.
    fn run_watched(&self, on_event: &(dyn Fn(&Event) + Sync)) -> Ran {
        self.run_hashing(on_event, || Ok("base".to_owned()))
    }

    /// The same with a base image whose hash comes from `base`.
    fn run_hashing(
        &self,
        on_event: &(dyn Fn(&Event) + Sync),
        base: impl FnOnce() -> Result<String, Failure> + Send,
    ) -> Ran {
        let vm = &self.config.vms[0];
        let known = LastLaunch {
            ssh_port: Some(self.port),
            accel: Some(Accel::Tcg),
        };
        let plan = bootstrap_plan::plan(vm, &self.config, vm.bootstrap.mode, known);
        let mut reporter = Watching {
            events: Vec::new(),
            on_event,
        };
        let outcome = {
            let emitter = Emitter::new(&mut reporter);
            let context = Context {
                vm,
                config: &self.config,
                launch: Launch {
                    launch_id: LAUNCH.into(),
                    launched_boottime_ms: 0,
                    started_now: false,
                },
                broker_address: Some("10.0.2.2:7070".into()),
                emitter: &emitter,
                cancel: &self.cancel,
                base_hash: Mutex::new(Some(Box::new(base))),
                artifact_hash: Mutex::new(Some(Box::new(|| Ok("artifact".to_owned())))),
                why_ended: &|| "guest-panic".to_owned(),
                on_alive: &|| (),
            };
            pipeline::run(plan, &context)
        };
        let left = self.config.state.vm(&vm.name).file("ssh.ctl");
        assert!(!left.exists(), "the master's socket is left over");
        Ran {
            outcome,
            events: reporter.events,
        }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.sshd = None;
        support::journals::check_below(self.dir.dir());
    }
}

struct Watching<'a> {
    events: Vec<Stamped>,
    on_event: &'a (dyn Fn(&Event) + Sync),
}

impl castra::core::reporter::Reporter for Watching<'_> {
    fn report(&mut self, event: &Stamped) {
        (self.on_event)(&event.event);
        self.events.push(event.clone());
    }
}

impl Ran {
    /// `step:status` in order.
    fn steps(&self) -> String {
        let words: Vec<String> = self
            .outcome
            .steps
            .iter()
            .map(|step| format!("{}:{}", step.step, status_word(step.status)))
            .collect();
        words.join(" ")
    }

    #[track_caller]
    /// The types of all events but messages.
    fn kinds(&self) -> String {
        let kind = |event: &Stamped| {
            let line: Value = serde_json::from_str(&event.contract_line()).unwrap();
            line["type"]
                .as_str()
                .unwrap()
                .trim_start_matches("bootstrap.")
                .to_owned()
        };
        let told = self.events.iter();
        told.filter(|event| !matches!(event.event, Event::Message { .. }))
            .map(kind)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Whether it had nothing to change, or why it didn't end well.
    fn end(&self) -> Result<bool, &BootstrapError> {
        let end = self.outcome.end.as_ref();
        end.map(|record| record.status == BootstrapStatus::Success && record.noop)
    }

    fn error(&self) -> &str {
        match &self.outcome.end {
            Err(BootstrapError::Failed(error)) => error,
            other => panic!("{other:?}; {}", self.steps()),
        }
    }

    fn detail(&self, step: &str) -> &str {
        self.outcome
            .steps
            .iter()
            .find(|record| record.step == step)
            .and_then(|record| record.detail.as_deref())
            .unwrap_or_default()
    }

    fn log(&self) -> RunLog {
        serde_json::from_slice(&fs::read(self.outcome.log.as_ref().unwrap()).unwrap()).unwrap()
    }

    /// Lines of the script's output, as events.
    fn output(&self) -> Vec<&str> {
        self.events
            .iter()
            .filter_map(|event| match &event.event {
                Event::Message {
                    text,
                    source: Some(source),
                    data: Some(data),
                    ..
                } if source == "bootstrap" && data.get("stream").is_some() => Some(text.as_str()),
                _ => None,
            })
            .collect()
    }
}

fn status_word(status: BootstrapStepStatus) -> &'static str {
    match status {
        BootstrapStepStatus::Success => "ok",
        BootstrapStepStatus::Skipped => "skipped",
        BootstrapStepStatus::Failed => "failed",
    }
}

const VIZIER: &str = "vizier-install:skipped vizier-enable:skipped vizier-handshake:skipped";

fn whole_pipeline(fixture: &Fixture) {
    let payload = fixture.dir.path("project/pay load");
    fs::create_dir_all(payload.join("empty dir")).unwrap();
    fs::write(payload.join("it's \"odd\"\n$HOME"), "odd").unwrap();
    fs::write(payload.join("big"), vec![42; 3 << 20]).unwrap();
    fs::write(payload.join("tool"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(payload.join("tool"), fs::Permissions::from_mode(0o750)).unwrap();
    symlink("../elsewhere", payload.join("link")).unwrap();

    let ran = fixture.run();
    assert_eq!(ran.end(), Ok(false), "{:?}", ran.outcome.steps);
    assert_eq!(
        ran.steps(),
        format!("wait-handshake:ok {VIZIER} connect:ok transfer:ok apply:ok verify:ok")
    );
    assert!(
        ran.detail("wait-handshake").starts_with("SSH banner SSH-2.0-"),
        "{}",
        ran.detail("wait-handshake")
    );
    let remote = fixture.remote();
    let there = remote.join("payload");
    assert_eq!(fs::read(there.join("big")).unwrap().len(), 3 << 20);
    assert_eq!(
        fs::read_to_string(there.join("it's \"odd\"\n$HOME")).unwrap(),
        "odd"
    );
    assert_eq!(
        fs::read_link(there.join("link")).unwrap(),
        Path::new("../elsewhere")
    );
    assert!(there.join("empty dir").is_dir());
    assert_eq!(
        fs::metadata(there.join("tool")).unwrap().permissions().mode() & 0o777,
        0o750
    );
    let mut names: Vec<_> = fs::read_dir(&remote)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["payload", "run it.sh", "seen", "state"],
        "nothing else is left"
    );

    let log = ran.log();
    let seen = fs::read_to_string(remote.join("seen")).unwrap();
    let expected = format!(
        "web|{}|{}|10.0.2.2:7070|it's \"a\"\n$HOME `id` Grüße|{}",
        log.run_id,
        there.display(),
        remote.display()
    );
    assert_eq!(seen, expected);
    assert_eq!(ran.output(), ["first \\x1b[2J", "to stderr", "no line end"]);
    let out = ran.outcome.log.as_ref().unwrap().with_extension("out");
    assert_eq!(
        fs::read_to_string(out).unwrap(),
        "first \\x1b[2J\nto stderr\nno line end\n"
    );

    assert_eq!(
        (log.status.as_str(), log.noop, log.error.as_deref()),
        ("success", false, None)
    );
    assert_eq!(
        (log.base_hash.as_deref(), log.artifact_hash.as_deref()),
        (Some("base"), Some("artifact"))
    );
    assert_eq!(log.steps, ran.outcome.steps);
    assert_eq!(ran.kinds(), IN_ORDER);

    let again = fixture.run();
    assert_eq!(again.end(), Ok(false), "a second run on a warm guest");
}

const IN_ORDER: &str = "planned started step step step step step step step step completed";
const WHOLE: &str = "payload = \"pay load\"\nverify_command = \"test -f state/ready && test \\\"$APP\\\"\"\n\
    verify_path = \"state/ready\"\nenv = { APP = \"it's \\\"a\\\"\\n$HOME `id` Grüße\" }";
const WHOLE_SCRIPT: &str = "#!/bin/sh\nprintf 'first \\033[2J\\n'\nsleep 0.2\necho to stderr >&2\nsleep 0.2\n\
    mkdir -p state; : > state/ready\n\
    printf '%s|%s|%s|%s|%s|%s' \"$CASTRA_VM\" \"$CASTRA_RUN_ID\" \"$CASTRA_PAYLOAD_DIR\" \"$CASTRA_BROKER\" \"$APP\" \"$PWD\" > seen\n\
    printf 'no line end'\n";

#[test]
fn the_whole_pipeline() {
    whole_pipeline(&Fixture::new("whole", WHOLE, Some(WHOLE_SCRIPT)));
}

#[test]
fn the_whole_pipeline_with_nothing_but_busybox() {
    let tools = Scratch::new("busybox");
    let installed = Command::new("busybox")
        .args(["--install", "-s"])
        .arg(tools.dir())
        .status();
    assert!(
        installed
            .expect("busybox is needed: install the package busybox-static")
            .success()
    );
    let fixture = Fixture::with_path(
        "busybox",
        WHOLE,
        Some(WHOLE_SCRIPT),
        tools.dir().to_str().unwrap(),
    );
    whole_pipeline(&fixture);
}

#[test]
fn a_large_image_is_hashed_beside_the_work() {
    let fixture = Fixture::new("slow-hash", "", Some("#!/bin/sh\necho applied\n"));
    let script = fixture.remote().join("run it.sh");
    let ran = fixture.run_hashing(&|_| (), || {
        // This hash is known only after the transfer.
        until("the script to be in the guest", || script.exists());
        Ok("base".to_owned())
    });
    assert_eq!(ran.end(), Ok(false), "{:?}", ran.outcome.steps);
    assert_eq!(ran.kinds(), IN_ORDER);
    let at = |wanted: &dyn Fn(&Event) -> bool| ran.events.iter().position(|event| wanted(&event.event));
    let started = at(&|event| matches!(event, Event::BootstrapStarted { .. }));
    let output = at(&|event| matches!(event, Event::Message { text, .. } if text == "applied"));
    assert!(started < output, "the script's words come after the start");
    assert_eq!(ran.log().base_hash.as_deref(), Some("base"));
}

/// The guest lives, and its SSH server is silent: its hash is known while the connection is waited for.
#[test]
fn plan_start_and_the_first_step_do_not_wait_for_the_next_steps_end() {
    let mut fixture = Fixture::new("at-once", "step_timeout_secs = 2", Some("#!/bin/sh\n"));
    fixture.shake_hands();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    fixture.port = silent.local_addr().unwrap().port();
    let ran = fixture.run_hashing(&|_| (), || {
        silent.accept().unwrap();
        Ok("base".to_owned())
    });
    assert_eq!(ran.kinds(), "planned started step step step step step failed");
    let at = |wanted: BootstrapStepKind| {
        let is =
            |event: &&Stamped| matches!(&event.event, Event::BootstrapStep { step, .. } if *step == wanted);
        ran.events.iter().find(is).unwrap().offset_ms
    };
    let (handshake, connect) = (
        at(BootstrapStepKind::WaitHandshake),
        at(BootstrapStepKind::Connect),
    );
    assert!(handshake + 1000 <= connect, "{handshake} {connect}");
    assert_eq!(ran.log().base_hash.as_deref(), Some("base"));
}

#[test]
fn a_plan_that_turned_bad_leaves_a_run_log() {
    let fixture = Fixture::new("turned-bad", "", Some("#!/bin/sh\n"));
    fs::remove_file(fixture.dir.path("project/run it.sh")).unwrap();
    let ran = fixture.run();
    assert_eq!(ran.kinds(), "planned failed");
    let log = ran.log();
    assert_eq!((log.status.as_str(), log.steps.len()), ("failed", 1));
    assert_eq!(log.error.as_deref(), Some(ran.error()));
}

#[test]
fn an_image_that_cannot_be_hashed_fails_the_run_before_the_script() {
    let fixture = Fixture::new("no-hash", "", Some("#!/bin/sh\necho > applied\n"));
    let ran = fixture.run_hashing(&|_| (), || Err(Failure::new(Exit::Failed, "the image is gone")));
    assert!(ran.error().contains("the image is gone"), "{}", ran.error());
    let kinds = ran.kinds();
    assert!(kinds.starts_with("planned started step"), "{kinds}");
    assert!(kinds.ends_with("step failed"), "{kinds}");
    assert!(!fixture.remote().join("applied").exists());
    assert_eq!(ran.log().base_hash, None);
}

#[test]
fn a_noop_is_a_success_that_says_so() {
    let fixture = Fixture::new(
        "noop",
        "",
        Some("echo nothing to do; echo '  Castra:noop'; exit 0"),
    );
    let ran = fixture.run();
    assert_eq!(ran.end(), Ok(true));
    assert_eq!(
        ran.detail("verify"),
        "neither verify_command nor verify_path is set"
    );
    let log = ran.log();
    assert_eq!((log.status.as_str(), log.noop), ("success", true));
    assert!(matches!(
        ran.events.last().unwrap().event,
        Event::BootstrapCompleted {
            noop: true,
            stamp: None,
            ..
        }
    ));
}

#[test]
fn an_exit_code_and_the_last_words_are_reported() {
    let fixture = Fixture::new("exit", "", Some("#!/bin/sh\necho going wrong >&2\nexit 3\n"));
    let ran = fixture.run();
    assert!(
        ran.error().contains("exit status 3") && ran.error().contains("going wrong"),
        "{}",
        ran.error()
    );
    assert!(ran.steps().ends_with("apply:failed"), "{}", ran.steps());
    let log = ran.log();
    assert_eq!(log.status, BootstrapStatus::Failed);
    let last = log.steps.last().unwrap();
    assert_eq!(
        (last.step.as_str(), last.status, last.duration_ms),
        ("error", BootstrapStepStatus::Failed, 0)
    );
    assert!(matches!(
        ran.events.last().unwrap().event,
        Event::BootstrapFailed { .. }
    ));
    // ssh uses 255 for its own failures, but a script may end with it too.
    let fixture = Fixture::new("exit-255", "", Some("#!/bin/sh\nexit 255\n"));
    assert!(fixture.run().error().contains("exit status 255"));
    let fixture = Fixture::new("no-interpreter", "", Some("#!/no/such/interpreter\n"));
    let ran = fixture.run();
    assert!(ran.error().contains("exit status 12"), "{}", ran.error());
}

#[test]
fn a_hanging_script_ends_at_its_deadline_with_its_children() {
    let script = "#!/bin/sh\nsleep 600 &\necho $! $$ > pids\necho hanging\nwait\nsleep 600\n";
    let fixture = Fixture::new("hang", "apply_timeout_secs = 1", Some(script));
    let began = Instant::now();
    let ran = fixture.run();
    assert!(
        ran.error().contains("within 1 s") && ran.error().contains("hanging"),
        "{}",
        ran.error()
    );
    assert!(began.elapsed() < Duration::from_secs(20));
    let pids = fs::read_to_string(fixture.remote().join("pids")).unwrap();
    until("script and child to end", || {
        !pids.split_whitespace().any(is_alive)
    });
}

#[test]
fn ctrl_c_ends_the_script_and_closes_the_log() {
    let script = "#!/bin/sh\nsleep 600 &\necho $! $$ > pids\necho ready\nwait\n";
    let fixture = Fixture::new("cancel", "", Some(script));
    let ran = fixture.run_watched(&|event| {
        if matches!(event, Event::Message { text, .. } if text == "ready") {
            fixture.cancel.request();
        }
    });
    assert_eq!(ran.end(), Err(&BootstrapError::Interrupted));
    assert_eq!(ran.log().error.as_deref(), Some("interrupted"));
    let pids = fs::read_to_string(fixture.remote().join("pids")).unwrap();
    until("script and child to end", || {
        !pids.split_whitespace().any(is_alive)
    });
}

#[test]
fn a_process_left_in_the_background_holds_nobody_up() {
    let script = "#!/bin/sh\nsleep 600 &\necho $! > pid\necho done\n";
    let fixture = Fixture::new("daemon", "", Some(script));
    let began = Instant::now();
    let ran = fixture.run();
    assert_eq!(ran.end(), Ok(false), "{:?}", ran.outcome.steps);
    assert!(began.elapsed() < Duration::from_secs(20));
    let pid = fs::read_to_string(fixture.remote().join("pid")).unwrap();
    assert!(is_alive(pid.trim()), "it goes on");
    Command::new("kill").arg(pid.trim()).status().unwrap();
}

#[test]
fn a_broken_connection_is_told_and_ends_the_script() {
    let script = "#!/bin/sh\necho $$ > pids\necho ready\nsleep 600\n";
    let fixture = Fixture::new("cut", "", Some(script));
    let ran = fixture.run_watched(&|event| {
        if matches!(event, Event::Message { text, .. } if text == "ready") {
            fixture.sshd.as_ref().unwrap().cut();
        }
    });
    assert!(
        ran.error().contains("the SSH connection broke"),
        "{}",
        ran.error()
    );
    let pids = fs::read_to_string(fixture.remote().join("pids")).unwrap();
    until("the script to end", || !is_alive(pids.trim()));
}

#[test]
fn the_end_of_the_vm_ends_it() {
    for (by_down, expected) in [
        (true, "stopped by castra down"),
        (false, "the VM ended: guest-panic"),
    ] {
        let fixture = Fixture::new("down", "", Some("#!/bin/sh\necho ready\nsleep 600\n"));
        let vm = fixture.config.state.vm(&fixture.config.vms[0].name);
        let ran = fixture.run_watched(&|event| {
            if matches!(event, Event::Message { text, .. } if text == "ready") {
                if by_down {
                    let stop = StopRecord {
                        launch_id: LAUNCH.into(),
                        by: "castra down".into(),
                        at: "2026-11-21T10:00:00.000Z".into(),
                    };
                    records::save(&vm.stop(), &stop).unwrap();
                }
                fixture.qemu.lock().unwrap().take();
            }
        });
        assert_eq!(ran.error(), expected);
    }
}

#[test]
fn verify_failures_name_what_was_missed() {
    let fixture = Fixture::new(
        "verify",
        "verify_command = \"echo not there >&2; test -f state/ready\"",
        Some("true"),
    );
    let ran = fixture.run();
    assert!(
        ran.error().contains("exit status 1") && ran.error().contains("not there"),
        "{}",
        ran.error()
    );
    assert!(ran.steps().ends_with("apply:ok verify:failed"));
    let fixture = Fixture::new("verify-path", "verify_path = \"state/ready\"", Some("true"));
    assert!(fixture.run().error().contains("state/ready doesn't exist in"),);
    let fixture = Fixture::new(
        "verify-hang",
        "step_timeout_secs = 6\nverify_command = \"sleep 600\"",
        Some("true"),
    );
    assert!(fixture.run().error().contains("within 6 s"));
}

#[test]
fn a_key_the_guest_does_not_know() {
    let mut fixture = Fixture::new("key", "step_timeout_secs = 10", Some("true"));
    let other = fixture.dir.path("other key");
    keygen(&other);
    fixture.config.vms[0].ssh.identity = Some(other.clone());
    let ran = fixture.run();
    assert!(
        ran.error().contains("refused the SSH key") && ran.error().contains("other key.pub"),
        "{}",
        ran.error()
    );
    assert!(ran.steps().ends_with("connect:failed"));
    fixture.config.vms[0].ssh.identity = Some(fixture.dir.path("missing"));
    assert!(
        fixture.run().error().contains("SSH key"),
        "a key that isn't there"
    );
}

#[test]
fn another_host_key_than_before() {
    let fixture = Fixture::new("host-key", "", Some("true"));
    let other = fixture.dir.path("other");
    keygen(&other);
    let public = fs::read_to_string(other.with_extension("pub")).unwrap();
    let known = fixture
        .config
        .state
        .vm(&fixture.config.vms[0].name)
        .file("known_hosts");
    fs::write(&known, format!("castra-web {public}")).unwrap();
    let ran = fixture.run();
    assert!(
        ran.error().contains("another host key") && ran.error().contains("known_hosts"),
        "{}",
        ran.error()
    );
    fs::remove_file(&known).unwrap();
    assert_eq!(fixture.run().end(), Ok(false), "as advised");
}

#[test]
fn a_place_that_cannot_be_written() {
    let fixture = Fixture::new("remote-dir", "remote_dir = \"/dev/null/castra\"", Some("true"));
    let ran = fixture.run();
    assert!(
        ran.error().contains("can't use /dev/null/castra") && ran.error().contains("remote_dir"),
        "{}",
        ran.error()
    );
    let fixture = Fixture::new("in-the-way", "", Some("true"));
    fs::create_dir_all(fixture.remote().join("run it.sh")).unwrap();
    let ran = fixture.run();
    assert!(
        ran.error().contains("a directory lies where the script goes"),
        "{}",
        ran.error()
    );
}

#[test]
fn a_transfer_that_stalls() {
    let tools = Scratch::new("stall");
    let tar = format!(
        "#!/bin/sh\necho $$ > '{}'\nexec sleep 600\n",
        tools.path("pid").display()
    );
    program(&tools.path("tar"), &tar);
    let path = format!("{}:/usr/bin:/bin", tools.dir().display());
    let fixture = Fixture::with_path("stall", "step_timeout_secs = 6", Some("true"), &path);
    let ran = fixture.run();
    assert!(
        ran.error().contains("the transfer made no progress for 6 s")
            && ran.steps().ends_with("transfer:failed"),
        "{}",
        ran.error()
    );
    let pid = fs::read_to_string(tools.path("pid")).unwrap();
    Command::new("kill").arg(pid.trim()).status().unwrap();
}

#[test]
fn auto_without_a_script_only_connects() {
    let fixture = Fixture::new("auto", "", None);
    fixture.shake_hands();
    let ran = fixture.run();
    assert_eq!(ran.end(), Ok(false));
    assert_eq!(
        ran.steps(),
        format!("wait-handshake:ok {VIZIER} connect:ok transfer:skipped apply:skipped verify:skipped")
    );
    assert_eq!(ran.detail("wait-handshake"), "handshake");
    assert!(fixture.remote().is_dir(), "the place for later is there");
}

#[test]
fn a_server_that_says_nothing_behind_its_banner() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut fixture = Fixture::new("mute", "step_timeout_secs = 2", Some("true"));
    fixture.port = listener.local_addr().unwrap().port();
    fixture.shake_hands();
    // Every connection gets a banner and nothing else, and is held.
    std::thread::spawn(move || {
        let mut held = Vec::new();
        for stream in listener.incoming().map_while(Result::ok) {
            let mut stream = stream;
            let _ = stream.write_all(b"SSH-2.0-mute\r\n");
            held.push(stream);
        }
    });
    let ran = fixture.run();
    assert!(
        ran.error().contains("no command ran over SSH within 2 s"),
        "{}",
        ran.error()
    );
}

/// Start-up files that print without a line end, before and while the commands run.
#[test]
fn a_login_shell_that_prints() {
    let script = "#!/bin/sh\n[ -e done ] && { echo Castra:noop; exit; }\ncat \"$CASTRA_PAYLOAD_DIR/file\"; sleep 0.3; printf 'no line end'; sleep 0.3; : >done\n";
    let more = "payload = \"pay load\"\nverify_path = \"done\"\nverify_command = \"test -e done\"";
    let fixture = Fixture::new("noise", more, Some(script));
    fs::create_dir(fixture.dir.path("project/pay load")).unwrap();
    fs::write(fixture.dir.path("project/pay load/file"), "first\n").unwrap();
    let noise = "printf '\\033]0;title\\007'; printf 'castra-dir no'; (for n in 1 2 3 4 5 6; do sleep 0.1; printf '\\033[K'; done) &\n";
    let dir = fixture.dir.path("sshd");
    for name in [".bashrc", ".profile", ".zshenv"] {
        fs::write(dir.join(name), noise).unwrap();
    }
    let ran = fixture.run();
    assert_eq!(ran.end(), Ok(false), "{}", ran.steps());
    // Output of the shell's background process can't be told from the script's.
    let output: Vec<String> = ran
        .output()
        .iter()
        .map(|line| line.replace("\\x1b[K", ""))
        .collect();
    let output: Vec<&String> = output.iter().filter(|line| !line.is_empty()).collect();
    assert_eq!(
        output,
        ["first", "no line end"],
        "noise is in the script's output"
    );
    let ran = fixture.run();
    assert_eq!(ran.end(), Ok(true), "{:?}", ran.output());
}

#[test]
fn a_guest_without_an_ssh_server() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let mut fixture = Fixture::new("no-sshd", "step_timeout_secs = 1", None);
    fixture.port = port;
    fixture.shake_hands();
    let ran = fixture.run();
    assert_eq!(ran.end(), Ok(false));
    assert_eq!(ran.detail("connect"), "no SSH server answered within 1 s");
    assert!(
        ran.steps()
            .ends_with("connect:skipped transfer:skipped apply:skipped verify:skipped")
    );

    // The server answered before: skipping the steps would hide that its connections are used up.
    let mut fixture = Fixture::new("no-sshd-any-more", "step_timeout_secs = 1", None);
    fixture.shake_hands();
    let ran = fixture.run();
    assert_eq!(ran.end(), Ok(false));
    assert!(ran.steps().contains("connect:ok"), "{}", ran.steps());
    fixture.port = port;
    fixture.shake_hands();
    let ran = fixture.run();
    assert!(
        ran.error()
            .contains("no SSH server answered within 1 s, though one answered before"),
        "{}",
        ran.error()
    );
    assert!(ran.steps().ends_with("connect:failed"), "{}", ran.steps());

    let mut fixture = Fixture::new("no-sshd-script", "step_timeout_secs = 1", Some("true"));
    fixture.port = port;
    fixture.shake_hands();
    assert!(fixture.run().error().contains("no SSH server answered"));

    let mut fixture = Fixture::new("nothing", "handshake_timeout_secs = 1", Some("true"));
    fixture.port = port;
    let ran = fixture.run();
    assert!(
        ran.error().contains("no proof of life within 1 s"),
        "{}",
        ran.error()
    );
    assert_eq!(ran.steps(), "wait-handshake:failed");
}

#[test]
fn a_guest_known_to_live_is_connected_to_once() {
    let fixture = Fixture::new("known", "", Some("true"));
    fixture.shake_hands();
    let ran = fixture.run();
    assert_eq!(ran.end(), Ok(false), "{:?}", ran.outcome.steps);
    assert_eq!(ran.detail("wait-handshake"), "handshake");
    assert!(
        !ran.detail("connect").contains("answered"),
        "{}",
        ran.detail("connect")
    );
    assert_eq!(fixture.sshd.as_ref().unwrap().connections(), 1);
}

#[test]
fn a_flood_of_output_stays_bounded_in_the_events() {
    let script = "#!/bin/sh\ni=0; while [ $i -lt 30000 ]; do echo line $i; i=$((i+1)); done; head -c 20000 /dev/zero | tr '\\0' x\n";
    let fixture = Fixture::new("flood", "", Some(script));
    let ran = fixture.run();
    assert_eq!(ran.end(), Ok(false), "{:?}", ran.outcome.steps);
    assert!(ran.output().len() < 3000, "{}", ran.output().len());
    assert!(ran.output().iter().all(|line| line.len() <= 2048));
    let out = fs::read_to_string(ran.outcome.log.as_ref().unwrap().with_extension("out")).unwrap();
    assert!(out.contains("line 29999\n") && out.ends_with("xxx\n"));
}

#[test]
fn a_transfer_says_how_far_it_is_and_a_cut_one_changes_nothing() {
    // A slow guest: the progress of the transfer is reported.
    let tools = Scratch::new("slow");
    program(
        &tools.path("tar"),
        "#!/bin/sh\nhead -c 1000000 | /usr/bin/tar -xpf - 2>/dev/null\nsleep 4 </dev/null\ncat >/dev/null\nexit 2\n",
    );
    let path = format!("{}:/usr/bin:/bin", tools.dir().display());
    let fixture = Fixture::with_path("progress", "payload = \"pay load\"", Some("true"), &path);
    let payload = fixture.dir.path("project/pay load");
    fs::create_dir_all(&payload).unwrap();
    fs::write(payload.join("big"), vec![7; 40 << 20]).unwrap();
    let old = fixture.remote().join("payload/old");
    fs::create_dir_all(&old).unwrap();
    fs::create_dir_all(fixture.remote().join(".incoming-killed/left")).unwrap();
    let told = Mutex::new(Vec::new());
    let ran = fixture.run_watched(&|event| {
        if let Event::Message {
            text,
            data: Some(data),
            ..
        } = event
            && let Some(sent) = data["sent_bytes"].as_u64()
        {
            told.lock()
                .unwrap()
                .push((text.clone(), sent, data["total_bytes"].as_u64()));
            fixture.sshd.as_ref().unwrap().cut();
        }
    });
    assert!(
        ran.error().contains("the SSH connection broke"),
        "{}",
        ran.error()
    );
    assert!(ran.steps().ends_with("transfer:failed"), "{}", ran.steps());
    let told = told.into_inner().unwrap();
    let (text, sent, total) = &told[0];
    assert!(*sent > 0 && *sent <= 41 << 20, "{sent}");
    assert_eq!(*total, Some(40 << 20));
    assert!(text.contains("of 40.0 MiB sent ("), "{text}");
    until("the guest's side to tidy up", || {
        let names: Vec<_> = fs::read_dir(fixture.remote())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names == ["payload"]
    });
    assert!(old.exists(), "what was there before is gone");
}
