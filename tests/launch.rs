//! Launching and stopping, against a stand-in for QEMU that fails on demand, and against a real
//! QEMU without a guest (its firmware is enough to answer QMP and to ignore the power button).

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use castra::core::arch::Arch;
use castra::core::cancel::Cancel;
use castra::core::config::{LifecycleConfig, PortForward, Protocol, QemuConfig};
use castra::core::events::contract::Stamped;
use castra::core::events::endings::{LaunchEnding, ShutdownEnding};
use castra::core::events::{Accel, Event};
use castra::core::failure::{Exit, Failure};
use castra::core::host;
use castra::core::name::VmName;
use castra::core::reporter::Emitter;
use castra::core::root::alive::qemu_pid;
use castra::core::root::ending;
use castra::core::root::paths::{StateRoot, VmPaths, vm_file};
use castra::core::root::qemu_process::signal_qemu;
use castra::core::runtime::binary::{find_qemu, qemu_version};
use castra::core::runtime::fault::{LaunchError, StartFailure};
use castra::core::runtime::forwards::PortAllocator;
use castra::core::runtime::launch::{BootFault, Launched, boot_fault, launch, launch_with_ports};
use castra::core::runtime::launch_plan::{LaunchPlan, PlannedNetwork, VmLaunchMode};
use castra::core::runtime::qmp::Qmp;
use castra::core::runtime::shutdown::{PowerOff, shutdown};

use support::project::FAKE_QEMU;
use support::{AMPLE, Scratch, eventually, until};

/// One VM in a fresh state root; at the end its QEMU is gone and the root removed.
struct Vm {
    _root: Scratch,
    paths: VmPaths,
    plan: LaunchPlan,
}

impl Vm {
    /// A VM whose QEMU is the stand-in, told to do `fake`.
    fn faked(fake: &str) -> Vm {
        let mut vm = Vm::new("state", FAKE_QEMU.into());
        vm.plan.qemu_args = vec!["-fake".into(), format!("start,{fake}")];
        vm
    }

    /// A VM of the real QEMU: a machine without any disk or kernel.
    fn real(depth: &str) -> Vm {
        Vm::new(depth, find_qemu(&QemuConfig::default()).unwrap())
    }

    fn new(below: &str, binary: PathBuf) -> Vm {
        let root = Scratch::new("launch");
        let name: VmName = "web-0".parse().unwrap();
        let paths = StateRoot::new(root.path(below)).vm(&name);
        let plan = LaunchPlan {
            vm: name,
            dir: paths.dir().to_owned(),
            arch: Arch::host(),
            binary,
            accel: Accel::Tcg,
            cpus: 1,
            memory_bytes: 64 << 20,
            kernel: None,
            disk: None,
            seed_dir: None,
            network: PlannedNetwork::User,
            forwards: Vec::new(),
            fw_cfg: Vec::new(),
            mounts: Vec::new(),
            qemu_args: Vec::new(),
            mode: VmLaunchMode::Daemonize,
        };
        Vm {
            _root: root,
            paths,
            plan,
        }
    }

    fn launch(&self) -> Result<Launched, LaunchError> {
        launch(&self.plan, AMPLE, &Cancel::new())
    }

    /// Stops one that ignores its power button, and maybe SIGTERM; the ending, the phases told, and
    /// the details in them.
    fn stop_stubborn(&self, sigterm_wait: Duration) -> (ShutdownEnding, Vec<String>) {
        let waits = LifecycleConfig {
            // Enough for QMP to be spoken on a loaded machine.
            graceful_shutdown_wait: Duration::from_secs(3),
            sigterm_wait,
            ..patient()
        };
        self.stop_within(PowerOff::Button, &waits, &Cancel::new())
    }

    /// Stops it, with more patience than it needs.
    fn stop(&self) -> (ShutdownEnding, Vec<String>) {
        self.stop_within(PowerOff::Button, &patient(), &Cancel::new())
    }

    fn stop_within(
        &self,
        how: PowerOff<'_>,
        waits: &LifecycleConfig,
        cancel: &Cancel,
    ) -> (ShutdownEnding, Vec<String>) {
        let mut told: Vec<Stamped> = Vec::new();
        let outcome = shutdown(
            &self.plan.vm,
            &self.paths,
            how,
            waits,
            &Emitter::new(&mut told),
            cancel,
        );
        let phases = told.iter().map(|stamped| phase(&stamped.event)).collect();
        (outcome.ending, phases)
    }

    fn file(&self, name: &str) -> String {
        fs::read_to_string(self.paths.file(name)).unwrap_or_default()
    }

    /// Nothing that only a living QEMU may have.
    fn assert_nothing_left(&self) {
        assert_eq!(qemu_pid(&self.paths), None, "a QEMU is left running");
        for name in [vm_file::QEMU_PID, vm_file::QMP_SOCK, vm_file::SERIAL_SOCK] {
            assert!(!self.paths.file(name).exists(), "{name} is left");
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        signal_qemu(&self.paths, nix::sys::signal::Signal::SIGKILL);
    }
}

/// No wait takes this long, unless the test is about to fail.
fn patient() -> LifecycleConfig {
    LifecycleConfig {
        graceful_shutdown_wait: AMPLE,
        sigterm_wait: AMPLE,
        sigkill_wait: AMPLE,
    }
}

fn phase(event: &Event) -> String {
    match event {
        Event::ShutdownRequested { .. } => "requested".into(),
        Event::CooperativeAttempted { .. } => "attempted".into(),
        Event::CooperativeSucceeded { .. } => "succeeded".into(),
        Event::CooperativeTimedOut { detail, .. } => {
            format!("timed out: {}", detail.as_deref().unwrap_or_default())
        }
        Event::Escalated { signal, .. } => signal.clone(),
        Event::ShutdownComplete { outcome, changed, .. } => format!("complete {outcome} {changed}"),
        other => panic!("{other:?} doesn't belong here"),
    }
}

const IGNORED: &str = "timed out: the guest ignored the power button";

// --- the stand-in -----------------------------------------------------------------------------

#[test]
fn a_launch_and_a_graceful_stop() {
    let vm = Vm::faked("");
    let launched = vm.launch().unwrap();
    assert_eq!(qemu_pid(&vm.paths), Some(launched.pid));
    assert_eq!(boot_fault(&vm.paths), None);
    let again = vm.launch().unwrap_err();
    assert!(matches!(again, LaunchError::AlreadyRunning(pid) if pid == launched.pid));
    let (ending, phases) = vm.stop();
    assert_eq!(ending, ShutdownEnding::Graceful);
    assert_eq!(
        phases,
        ["requested", "attempted", "succeeded", "complete graceful true"]
    );
    vm.assert_nothing_left();
    assert_eq!(ending::read(&vm.paths).unwrap().outcome, LaunchEnding::Stopped);
    // And once more: there is nothing to stop.
    let (ending, phases) = vm.stop();
    assert_eq!(ending, ShutdownEnding::AlreadyStopped);
    assert_eq!(phases, ["complete already-stopped false"]);
}

#[test]
fn a_guest_that_is_asked_over_ssh_is_asked_again() {
    let vm = Vm::faked("");
    vm.launch().unwrap();
    let asked = AtomicU32::new(0);
    let refuse_once = |_: Duration, _: &Cancel| match asked.fetch_add(1, Ordering::SeqCst) {
        0 => Err(Failure::new(Exit::Failed, "the guest still boots")),
        _ => {
            signal_qemu(&vm.paths, nix::sys::signal::Signal::SIGTERM).unwrap();
            // As ssh says it whose server ended with the guest.
            Err(Failure::new(Exit::Failed, "closed by remote host"))
        }
    };
    let (ending, phases) = vm.stop_within(PowerOff::Ssh(&refuse_once), &patient(), &Cancel::new());
    assert_eq!(ending, ShutdownEnding::Graceful, "{phases:?}");
    assert_eq!(asked.into_inner(), 2);
}

#[test]
fn each_rung_is_climbed_down_in_order() {
    let vm = Vm::faked("ignore-powerdown");
    vm.launch().unwrap();
    let (ending, phases) = vm.stop_stubborn(AMPLE);
    assert_eq!(ending, ShutdownEnding::Terminated);
    assert_eq!(
        phases,
        [
            "requested",
            "attempted",
            IGNORED,
            "SIGTERM",
            "complete terminated true"
        ]
    );
    vm.assert_nothing_left();

    let vm = Vm::faked("ignore-powerdown,ignore-term");
    vm.launch().unwrap();
    let (ending, phases) = vm.stop_stubborn(Duration::from_secs(1));
    assert_eq!(ending, ShutdownEnding::Killed);
    assert_eq!(
        phases,
        [
            "requested",
            "attempted",
            IGNORED,
            "SIGTERM",
            "SIGKILL",
            "complete killed true"
        ]
    );
    vm.assert_nothing_left();
}

#[test]
fn a_second_request_skips_the_patience() {
    let vm = Vm::faked("ignore-powerdown,ignore-term");
    vm.launch().unwrap();
    let cancel = Cancel::new();
    cancel.request();
    let began = Instant::now();
    let phases = thread::scope(|scope| {
        let stopping = scope.spawn(|| vm.stop_within(PowerOff::Button, &patient(), &cancel));
        until("the power button", || {
            vm.file(vm_file::QMP_LOG).contains("POWERDOWN")
        });
        cancel.request();
        stopping.join().unwrap()
    });
    assert_eq!(phases.0, ShutdownEnding::Killed);
    assert_eq!(phases.1[3], "SIGKILL", "{:?}", phases.1);
    assert!(began.elapsed() < patient().graceful_shutdown_wait, "it waited on");
}

#[test]
fn a_guest_that_cannot_hear_is_not_waited_for() {
    let vm = Vm::faked("internal-error");
    assert!(
        matches!(vm.launch(), Err(LaunchError::InternalError(words)) if words.contains("KVM internal error"))
    );
    vm.assert_nothing_left();

    let vm = Vm::faked("mute");
    let error = launch(&vm.plan, Duration::from_secs(2), &Cancel::new()).unwrap_err();
    assert!(matches!(error, LaunchError::Mute(_)), "{error}");
    vm.assert_nothing_left();
}

#[test]
fn a_guest_that_the_accelerator_stops_later_is_noticed() {
    let vm = Vm::faked("internal-error=0.2");
    vm.launch().unwrap();
    eventually("the fault", || boot_fault(&vm.paths));
    match boot_fault(&vm.paths) {
        Some(BootFault::InternalError(words)) => assert!(words.contains("KVM internal error"), "{words}"),
        other => panic!("{other:?}"),
    }
    // Its power button doesn't work: castra doesn't wait for it.
    let (ending, phases) = vm.stop();
    assert_eq!(ending, ShutdownEnding::Terminated);
    assert_eq!(
        phases[2],
        "timed out: the guest can't react: QMP says `internal-error`"
    );
}

#[test]
fn refusals_keep_qemus_words() {
    let vm = Vm::faked("refuse=-m 1: cannot set up guest memory 'pc.ram': Cannot allocate memory");
    let error = vm.launch().unwrap_err();
    assert!(
        matches!(&error, LaunchError::Refused(StartFailure::NoMemory(words)) if words.contains("pc.ram")),
        "{error}"
    );
    vm.assert_nothing_left();
    let mut vm = Vm::faked("refuse-kvm");
    vm.plan.accel = Accel::Kvm;
    let error = vm.launch().unwrap_err();
    assert!(
        matches!(error, LaunchError::Refused(StartFailure::NoKvm(_))),
        "{error}"
    );
}

#[test]
fn a_qemu_that_dies_is_noticed_at_once() {
    for fake in ["die", "die-greeted"] {
        let vm = Vm::faked(fake);
        let began = Instant::now();
        let error = vm.launch().unwrap_err();
        assert!(matches!(error, LaunchError::Died(_)), "{fake}: {error}");
        assert!(began.elapsed() < AMPLE / 2, "{fake}: its death was waited out");
        vm.assert_nothing_left();
    }
}

#[test]
fn a_qemu_that_never_gets_ready_is_ended() {
    let vm = Vm::faked("hang");
    let error = launch(&vm.plan, Duration::from_secs(1), &Cancel::new()).unwrap_err();
    assert!(matches!(error, LaunchError::Job(_)), "{error}");
    vm.assert_nothing_left();
    let cancel = Cancel::new();
    cancel.request();
    let error = launch(&vm.plan, AMPLE, &cancel).unwrap_err();
    assert!(matches!(error, LaunchError::Cancelled), "{error}");
    vm.assert_nothing_left();
}

#[test]
fn deaths_after_the_launch_are_told() {
    let vm = Vm::faked("die-after=0.3");
    vm.launch().unwrap();
    until("its death", || {
        matches!(boot_fault(&vm.paths), Some(BootFault::Gone(_)))
    });
    assert_eq!(ending::read(&vm.paths).unwrap().outcome, LaunchEnding::Crashed);

    let vm = Vm::faked("panic");
    let launched = vm.launch();
    until("the panic", || qemu_pid(&vm.paths).is_none());
    drop(launched);
    let ended = ending::read(&vm.paths).unwrap();
    assert_eq!(ended.outcome, LaunchEnding::Crashed);
    assert!(ended.ended.last_words.unwrap().contains("Kernel panic"));
}

// --- the stand-in as our own child --------------------------------------------------------------

/// The same VM, whose QEMU stays our child.
fn attached(fake: &str) -> Vm {
    let mut vm = Vm::faked(fake);
    vm.plan.mode = VmLaunchMode::Attached;
    vm
}

/// The state letter in `/proc/PID/stat`; `None`: there is no such process, not even a zombie.
fn process_state(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let state = stat.rsplit_once(')')?.1.split_whitespace().next()?;
    Some(state.to_owned())
}

#[test]
fn an_attached_qemu_is_our_child_and_is_reaped() {
    let vm = attached("");
    let launched = vm.launch().unwrap();
    let qemu = launched.attached.unwrap();
    assert_eq!(
        (qemu_pid(&vm.paths), qemu.pid()),
        (Some(launched.pid), launched.pid)
    );
    let stat = fs::read_to_string(format!("/proc/{}/stat", qemu.pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    assert_eq!(
        fields[1],
        std::process::id().to_string(),
        "it has another parent: {stat}"
    );
    assert_eq!(fields[2], qemu.pid().to_string(), "Ctrl-C would reach it: {stat}");
    assert_eq!(qemu.ended(), None);
    assert_eq!(qemu.wait(Duration::from_millis(1)), None);
    let (ending, _) = vm.stop();
    assert_eq!(ending, ShutdownEnding::Graceful);
    assert!(qemu.wait(AMPLE).unwrap().success());
    assert_eq!(process_state(qemu.pid()), None, "a zombie is left");
    vm.assert_nothing_left();
    assert_eq!(ending::read(&vm.paths).unwrap().outcome, LaunchEnding::Stopped);
}

#[test]
fn the_end_of_an_attached_qemu_is_noticed_with_its_status_and_last_words() {
    let vm = attached("die-after=0.1");
    let qemu = vm.launch().unwrap().attached.unwrap();
    assert_eq!(qemu.wait(AMPLE).unwrap().code(), Some(1));
    assert_eq!(ending::read(&vm.paths).unwrap().outcome, LaunchEnding::Crashed);

    let vm = attached("");
    let qemu = vm.launch().unwrap().attached.unwrap();
    signal_qemu(&vm.paths, nix::sys::signal::Signal::SIGTERM);
    qemu.wait(AMPLE).unwrap();
    assert!(vm.file(vm_file::QEMU_LOG).contains("terminating on signal 15"));

    let vm = attached("ignore-powerdown,ignore-term");
    let qemu = vm.launch().unwrap().attached.unwrap();
    assert_eq!(vm.stop_stubborn(Duration::from_secs(1)).0, ShutdownEnding::Killed);
    assert_eq!(qemu.wait(AMPLE).unwrap().code(), None, "a signal ended it");
    vm.assert_nothing_left();
}

#[test]
fn an_attached_qemu_that_fails_is_gone_and_reaped() {
    let children = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
        tasks
            .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
            .collect::<String>()
    };
    for (fake, expected) in [
        (
            "refuse=-m 1: cannot set up guest memory 'pc.ram': Cannot allocate memory",
            "pc.ram",
        ),
        ("die", "ended before it answered"),
        ("die-greeted", "ended before it answered"),
        ("internal-error", "KVM internal error"),
    ] {
        let vm = attached(fake);
        let error = vm.launch().unwrap_err();
        assert!(error.to_string().contains(expected), "{fake}: {error}");
        vm.assert_nothing_left();
    }
    let vm = attached("mute");
    let error = launch(&vm.plan, Duration::from_secs(1), &Cancel::new()).unwrap_err();
    assert!(matches!(error, LaunchError::Mute(_)), "{error}");
    vm.assert_nothing_left();
    let cancel = Cancel::new();
    cancel.request();
    let vm = attached("");
    let error = launch(&vm.plan, AMPLE, &cancel).unwrap_err();
    assert!(matches!(error, LaunchError::Cancelled), "{error}");
    vm.assert_nothing_left();
    let mut vm = attached("");
    vm.plan.binary = "/nonexistent/qemu".into();
    let error = vm.launch().unwrap_err();
    assert!(matches!(error, LaunchError::Job(_)), "{error}");
    // Those of other tests come and go; none of them stays a zombie.
    until("no zombie", || {
        let zombie = |pid: &str| process_state(pid.parse().unwrap()).as_deref() == Some("Z");
        !children().split_whitespace().any(zombie)
    });
}

#[test]
fn an_attached_qemu_tries_other_ports_too() {
    let mut vm = attached("snatch=1");
    let ports = PortAllocator::new();
    let launched = launch_with_ports(&mut vm.plan, &ports, &[], &[], None, &Cancel::new(), |_| Ok(()));
    assert!(launched.unwrap().attached.is_some());
}

#[test]
fn an_old_qmp_log_is_not_believed() {
    let vm = Vm::faked("");
    vm.launch().unwrap();
    vm.stop();
    assert!(vm.file(vm_file::QMP_LOG).contains("guest-shutdown"));
    vm.launch().unwrap();
    assert!(!vm.file(vm_file::QMP_LOG).contains("guest-shutdown"));
    assert!(!vm.file(vm_file::QMP_LOG).contains("SHUTDOWN"));
}

#[test]
fn ports_snatched_away_are_replaced() {
    let mut vm = Vm::faked("snatch=2");
    let mut tried = Vec::new();
    let ports = PortAllocator::new();
    let launched = launch_with_ports(&mut vm.plan, &ports, &[], &[], None, &Cancel::new(), |plan| {
        tried.push(plan.forwards[0].host);
        Ok(())
    });
    launched.unwrap();
    assert_eq!(tried.len(), 3);
    assert!(tried[0] != tried[1] && tried[1] != tried[2], "{tried:?}");
    assert_eq!(vm.plan.forwards[0].host, tried[2]);
}

#[test]
fn a_fixed_port_is_never_replaced() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let wanted = [PortForward {
        host: port,
        guest: 80,
        protocol: Protocol::Tcp,
    }];
    let mut vm = Vm::faked("");
    let go = |vm: &mut Vm| {
        launch_with_ports(
            &mut vm.plan,
            &PortAllocator::new(),
            &wanted,
            &[],
            None,
            &Cancel::new(),
            |_| Ok(()),
        )
    };
    let error = go(&mut vm).unwrap_err();
    assert!(
        matches!(&error, LaunchError::Port(taken) if taken.port == port),
        "{error}"
    );
    let failure = error.into_failure(&vm.plan.vm);
    assert!(
        failure
            .to_string()
            .contains(&format!("pid {}", std::process::id())),
        "{failure}"
    );
    drop(taken);
    let mut vm = Vm::faked("snatch=1");
    let error = go(&mut vm).unwrap_err();
    assert!(
        matches!(error, LaunchError::Refused(StartFailure::PortTaken(p)) if p == port),
        "{error}"
    );
    vm.assert_nothing_left();
}

// --- the real one -----------------------------------------------------------------------------

#[test]
fn a_real_qemu_starts_answers_and_is_terminated() {
    // A state root longer than any socket address, in all kinds of characters.
    let deep = format!("{}/with space, comma/{}", "d".repeat(120), "é".repeat(80));
    let mut vm = Vm::real(&deep);
    assert!(vm.paths.dir().as_os_str().len() > 300);
    let wanted = [PortForward {
        host: 0,
        guest: 53,
        protocol: Protocol::Udp,
    }];
    let ports = PortAllocator::new();
    let launched = launch_with_ports(&mut vm.plan, &ports, &wanted, &[], None, &Cancel::new(), |_| {
        Ok(())
    });
    let launched = launched.unwrap();
    assert_eq!(vm.plan.forwards.len(), 2);
    assert_eq!(qemu_pid(&vm.paths), Some(launched.pid));
    assert!(host::process_name(launched.pid).unwrap().starts_with("qemu"));
    let mut qmp = Qmp::connect(vm.paths.dir(), AMPLE).unwrap();
    assert_eq!(qmp.query_status(AMPLE).unwrap(), "running");
    drop(qmp);
    assert_eq!(boot_fault(&vm.paths), None);
    for name in [vm_file::QEMU_LOG, vm_file::QMP_LOG, vm_file::SERIAL_LOG] {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(vm.paths.file(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name} is readable by others");
    }
    // Firmware ignores the power button.
    let (ending, phases) = vm.stop_stubborn(AMPLE);
    assert_eq!(ending, ShutdownEnding::Terminated);
    assert_eq!(
        phases,
        [
            "requested",
            "attempted",
            IGNORED,
            "SIGTERM",
            "complete terminated true"
        ]
    );
    vm.assert_nothing_left();
    let ended = ending::read(&vm.paths).unwrap().ended;
    assert_eq!(ended.reason, "host-signal");
    assert!(ended.at.is_some());
}

#[test]
fn a_real_qemu_that_is_stopped_is_killed() {
    let vm = Vm::real("state");
    vm.launch().unwrap();
    signal_qemu(&vm.paths, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let (ending, phases) = vm.stop_stubborn(Duration::from_secs(1));
    assert_eq!(ending, ShutdownEnding::Killed);
    assert!(phases[2].starts_with("timed out: QMP gave no"), "{phases:?}");
    vm.assert_nothing_left();
}

#[test]
fn a_real_qemu_says_why_it_refuses() {
    let mut vm = Vm::real("state");
    vm.plan.qemu_args = vec!["-nonsense".into()];
    let error = vm.launch().unwrap_err();
    assert!(
        matches!(&error, LaunchError::Refused(StartFailure::Other(words)) if words == "-nonsense: invalid option"),
        "{error}"
    );
    assert_eq!(
        error.blames(&["-snapshot".into(), "-nonsense".into()]),
        Some(1),
        "{error}"
    );
    let failure = error.into_failure(&vm.plan.vm).to_string();
    assert!(
        failure.contains("did not start") && failure.contains("invalid option"),
        "{failure}"
    );
    vm.assert_nothing_left();

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    vm.plan.qemu_args = Vec::new();
    vm.plan.forwards = vec![castra::core::root::records::ForwardRecord {
        host: port,
        guest: 22,
        protocol: Protocol::Tcp,
    }];
    let error = vm.launch().unwrap_err();
    assert!(
        matches!(error, LaunchError::Refused(StartFailure::PortTaken(p)) if p == port),
        "{error}"
    );
    vm.assert_nothing_left();
}

#[test]
fn the_real_qemu_tells_its_version() {
    let binary = find_qemu(&QemuConfig::default()).unwrap();
    let version = qemu_version(&binary, &Cancel::new()).unwrap();
    assert!(version.starts_with(|c: char| c.is_ascii_digit()), "{version}");
}
