//! Every rule of the status contract under a clock that stands where a test puts it.

use std::time::Duration;

use serde_json::json;

use crate::core::events::endings::{BootstrapStatus, LaunchEnding};
use crate::core::events::{Accel, BootstrapPlanSsh};
use crate::core::root::handshake_record::{HandshakeRecord, RecordRead};
use crate::core::root::paths::StateRoot;
use crate::core::root::records::{
    BootstrapRecord, BrokerRecord, GuestRecord, GuestsRecord, LaunchSettings, RunPhase, RunRecord, StopRecord,
};

use crate::core::runtime::pause::Pause;
use crate::core::runtime::resets::Resets;

use super::assemble::assemble;
use super::evidence::{Loaded, Now, Snapshot, VmEvidence};
use super::{BrokerState, EndedStatus, GuestState, VmState};
use crate::core::root::ending::Ending;
use crate::core::root::project::{Declared, Project};

const NOW: u64 = 1_000_000;
const LAUNCHED: u64 = 900_000;
const WINDOW: u64 = 45_000;
/// 2026-11-21T10:00:00Z.
const WALL: u64 = 1_795_255_200_000;

fn declared(name: &str) -> Declared {
    Declared {
        name: name.parse().unwrap(),
        role: "web".into(),
        cpus: 1,
        memory_bytes: 1 << 30,
        forwards: Vec::new(),
        settings: settings(1 << 30, "user"),
    }
}

fn settings(memory: u64, network: &str) -> LaunchSettings {
    let settings = [("memory", json!(memory)), ("network", json!(network))];
    settings.map(|(name, value)| (name.to_owned(), value)).into()
}

fn run() -> RunRecord {
    RunRecord {
        vm: "web-0".parse().unwrap(),
        role: "web".into(),
        launch_id: "launch-2".into(),
        phase: RunPhase::Running,
        launched_boottime_ms: LAUNCHED,
        launched_at: "2026-11-21T09:58:20.000Z".into(),
        boot_id: "this-boot".into(),
        accel: Accel::Tcg,
        accel_reason: "no /dev/kvm".into(),
        cpus: 2,
        memory_bytes: 2 << 30,
        forwards: Vec::new(),
        ssh: BootstrapPlanSsh {
            user: "root".into(),
            host: "127.0.0.1".into(),
            port: Some(2222),
            identity: None,
            options: Vec::new(),
        },
        overlay: None,
        persist: false,
        base: None,
        bootstrap: None,
        settings: settings(1 << 30, "user"),
    }
}

fn heard(boottime_ms: u64) -> HandshakeRecord {
    HandshakeRecord {
        vm: "web-0".parse().unwrap(),
        boot_id: "this-boot".into(),
        broker_run: "run-1".into(),
        handshake_boottime_ms: boottime_ms,
        heard_boottime_ms: boottime_ms,
        heard_at: "2026-11-21T09:59:00.000Z".into(),
        capabilities: vec!["bus-v1".into()],
        bus_session: true,
        bus_subscribed: true,
        last_publish_boottime_ms: Some(boottime_ms - 1_000),
        last_heartbeat_boottime_ms: Some(boottime_ms),
        last_acked_seq: None,
        guest_metrics: Some(json!({ "load": 1 })),
    }
}

fn stop(launch_id: &str) -> StopRecord {
    StopRecord {
        launch_id: launch_id.into(),
        by: "castra down (pid 9)".into(),
        at: "2026-11-21T09:59:50.000Z".into(),
    }
}

fn ending(outcome: LaunchEnding, reason: &str) -> Ending {
    Ending {
        outcome,
        ended: EndedStatus {
            reason: reason.into(),
            at: Some("2026-11-21T09:59:55.000Z".into()),
            last_words: Some("login: ".into()),
            ..EndedStatus::default()
        },
    }
}

/// A VM that runs under a running broker and was heard 400 ms ago.
fn healthy() -> Snapshot {
    Snapshot {
        project: Project {
            project: "demo".into(),
            workspace: "demo-1a2b3c4d".into(),
            config_path: "/p/castra.toml".into(),
            state: StateRoot::new("/s"),
            freshness: Duration::from_secs(30),
            broker_port: None,
            vms: Some(vec![declared("web-0")]),
        },
        now: Now {
            boottime_ms: NOW,
            boot_id: "this-boot".into(),
            wall_ms: WALL,
        },
        live_broker: Some((4711, "run-1".into())),
        broker: Loaded::Value(BrokerRecord {
            port: 7070,
            run: "run-1".into(),
            started_boottime_ms: 890_000,
            started_at: "2026-11-21T09:58:10.000Z".into(),
            boot_id: "this-boot".into(),
            clean_stop: false,
            embedded: false,
            freshness_window_ms: WINDOW,
            bus_seq: 0,
        }),
        guests: Loaded::Absent,
        vms: vec![VmEvidence {
            name: "web-0".parse().unwrap(),
            declared: Some(declared("web-0")),
            qemu: Some(4712),
            run: Loaded::Value(run()),
            stop: Loaded::Absent,
            lock_held: false,
            record: RecordRead::Record(heard(NOW - 400)),
            pause: None,
            resets: Some(Resets::default()),
            ending: None,
            lost: None,
        }],
    }
}

/// The healthy snapshot after `change`, assembled; the one VM in a line of text.
fn check(what: &str, expected: &str, change: impl FnOnce(&mut Snapshot)) {
    let mut snapshot = healthy();
    change(&mut snapshot);
    let vm = assemble(&snapshot).vms.remove(0);
    let age = vm
        .last_handshake_age_ms
        .map_or("-".to_owned(), |age| age.to_string());
    let ended = vm.ended.map_or("-".to_owned(), |ended| ended.reason);
    let told = format!("{} {} {age} {ended}", vm.state.as_str(), vm.broker.as_str());
    assert_eq!(told, expected, "{what}");
}

fn edit_run(snapshot: &mut Snapshot, change: impl FnOnce(&mut RunRecord)) {
    let Loaded::Value(run) = &mut snapshot.vms[0].run else {
        panic!("no run.json");
    };
    change(run);
}

fn edit_record(snapshot: &mut Snapshot, change: impl FnOnce(&mut HandshakeRecord)) {
    let RecordRead::Record(record) = &mut snapshot.vms[0].record else {
        panic!("no record");
    };
    change(record);
}

#[test]
fn states_in_the_order_of_the_contract() {
    check("healthy", "running reachable 400 -", |_| {});
    check("never ran", "stopped waiting - -", |s| {
        s.vms[0].run = Loaded::Absent;
        s.vms[0].qemu = None;
        s.vms[0].record = RecordRead::Absent;
    });
    check("being launched", "starting waiting - -", |s| {
        edit_run(s, |run| run.phase = RunPhase::Starting);
        s.vms[0].qemu = None;
        s.vms[0].lock_held = true;
        s.vms[0].record = RecordRead::Absent;
    });
    check("QEMU is there but hasn't answered", "starting waiting - -", |s| {
        edit_run(s, |run| run.phase = RunPhase::Starting);
        s.vms[0].lock_held = true;
        s.vms[0].record = RecordRead::Absent;
    });
    check("starting wins over stopping", "starting waiting - -", |s| {
        edit_run(s, |run| run.phase = RunPhase::Starting);
        s.vms[0].lock_held = true;
        s.vms[0].stop = Loaded::Value(stop("launch-2"));
        s.vms[0].record = RecordRead::Absent;
    });
    check("the launcher died, QEMU lives", "running reachable 400 -", |s| {
        edit_run(s, |run| run.phase = RunPhase::Starting);
    });
    check(
        "the launcher died, and no QEMU",
        "stopped waiting - unknown",
        |s| {
            edit_run(s, |run| run.phase = RunPhase::Starting);
            s.vms[0].qemu = None;
            s.vms[0].record = RecordRead::Absent;
        },
    );
    check("asked to stop, still there", "stopping reachable 400 -", |s| {
        s.vms[0].stop = Loaded::Value(stop("launch-2"));
    });
    check("gone, `down` still tidies up", "stopping waiting 400 -", |s| {
        s.vms[0].stop = Loaded::Value(stop("launch-2"));
        s.vms[0].qemu = None;
        s.vms[0].lock_held = true;
    });
    check("its disk is full", "paused waiting 400 -", |s| {
        s.vms[0].pause = Some(pause("io-error"));
    });
    check("paused, and run.json is lost", "paused waiting - -", |s| {
        s.vms[0].pause = Some(pause("paused"));
        s.vms[0].run = Loaded::Absent;
    });
    // The snapshot's wall clock and CLOCK_BOOTTIME show the same moment.
    let resets = |boottime_ms| Some(Resets::at(&[WALL - (NOW - boottime_ms)]));
    check("rebooted, and heard since", "running reachable 400 -", |s| {
        s.vms[0].resets = resets(NOW - 500);
    });
    check("rebooted since it was heard", "running waiting - -", |s| {
        s.vms[0].resets = resets(NOW - 300);
    });
    check("paused, and asked to stop", "stopping waiting 400 -", |s| {
        s.vms[0].pause = Some(pause("paused"));
        s.vms[0].stop = Loaded::Value(stop("launch-2"));
    });
    check(
        "an earlier launch was asked to stop",
        "running reachable 400 -",
        |s| {
            s.vms[0].stop = Loaded::Value(stop("launch-1"));
        },
    );
    check("stopped by `down`", "stopped waiting 400 host-signal", |s| {
        s.vms[0].stop = Loaded::Value(stop("launch-2"));
        s.vms[0].qemu = None;
        s.vms[0].ending = Some(ending(LaunchEnding::Crashed, "host-signal"));
    });
    check(
        "crashed after an earlier stop",
        "crashed waiting 400 guest-panic",
        |s| {
            s.vms[0].stop = Loaded::Value(stop("launch-1"));
            s.vms[0].qemu = None;
            s.vms[0].ending = Some(ending(LaunchEnding::Crashed, "guest-panic"));
        },
    );
    check(
        "powered off by its guest",
        "stopped waiting 400 guest-shutdown",
        |s| {
            s.vms[0].qemu = None;
            s.vms[0].ending = Some(ending(LaunchEnding::Stopped, "guest-shutdown"));
        },
    );
    check("the host rebooted", "stopped offline 1000000 host-reboot", |s| {
        edit_run(s, |run| run.boot_id = "last-boot".into());
        edit_record(s, |record| record.boot_id = "last-boot".into());
        s.live_broker = None;
        s.vms[0].qemu = None;
        s.vms[0].ending = Some(ending(LaunchEnding::Crashed, "host-error"));
    });
}

fn pause(reason: &str) -> Pause {
    Pause {
        reason: reason.into(),
        no_space: true,
        at: Some("2026-11-21T09:59:55.000Z".into()),
    }
}

#[test]
fn a_pause_says_why_and_what_to_do() {
    let mut snapshot = healthy();
    snapshot.vms[0].pause = Some(pause("io-error"));
    edit_run(&mut snapshot, |run| {
        run.overlay = Some("/full/web-0.qcow2".into())
    });
    let status = assemble(&snapshot);
    assert!(!status.reachable && !status.all_reachable);
    let paused = status.vms[0].paused.as_ref().unwrap();
    assert_eq!(paused.reason, "io-error");
    assert!(paused.detail.as_ref().unwrap().contains("/full/web-0.qcow2"));
    assert!(paused.remediation.contains("make room"));
    snapshot.vms[0].qemu = None;
    assert_eq!(assemble(&snapshot).vms[0].paused, None);
}

#[test]
fn all_reachable_is_every_one_of_them() {
    let mut snapshot = healthy();
    assert!(assemble(&snapshot).all_reachable);
    let mut second = snapshot.vms[0].clone();
    second.record = RecordRead::Absent;
    snapshot.vms.push(second);
    let status = assemble(&snapshot);
    assert!(status.reachable && !status.all_reachable);
    snapshot.vms.clear();
    let status = assemble(&snapshot);
    assert!(!status.reachable && !status.all_reachable, "there is none");
}

#[test]
fn settings_that_a_running_vm_was_not_launched_with_are_named() {
    let stale = |change: fn(&mut Snapshot)| {
        let mut snapshot = healthy();
        change(&mut snapshot);
        assemble(&snapshot).vms.remove(0).stale_config
    };
    assert_eq!(stale(|_| {}), [""; 0]);
    let changed = |s: &mut Snapshot| {
        s.vms[0].declared.as_mut().unwrap().settings = settings(2 << 30, "isolated");
    };
    assert_eq!(stale(changed), ["memory", "network"]);
    let of_an_earlier_castra = |s: &mut Snapshot| edit_run(s, |run| run.settings.clear());
    assert_eq!(stale(of_an_earlier_castra), [""; 0]);
    let removed = |s: &mut Snapshot| s.vms[0].declared = None;
    assert_eq!(stale(removed), [""; 0]);
    let gone = |s: &mut Snapshot| {
        s.vms[0].declared.as_mut().unwrap().settings = settings(2 << 30, "isolated");
        s.vms[0].qemu = None;
    };
    assert_eq!(stale(gone), [""; 0], "its next launch applies them");
}

#[test]
fn a_locked_pid_file_outweighs_a_lost_run_json() {
    for run in [
        Loaded::Absent,
        Loaded::Unreadable("can't understand run.json".into()),
    ] {
        // Nothing proves that the handshake is of this launch.
        check("unknown launch", "running waiting - -", |s| {
            s.vms[0].run = run.clone()
        });
        check("launch known from guests.json", "running reachable 400 -", |s| {
            s.vms[0].run = run.clone();
            s.guests = Loaded::Value(GuestsRecord {
                guests: vec![GuestRecord {
                    closed: false,
                    name: "web-0".parse().unwrap(),
                    second_name: None,
                    launch_id: Some("launch-2".into()),
                    launched_boottime_ms: Some(LAUNCHED),
                    boot_id: Some("this-boot".into()),
                    token_sha256: None,
                }],
            });
        });
        check("nothing runs", "stopped waiting 400 -", |s| {
            s.vms[0].run = run.clone();
            s.vms[0].qemu = None;
        });
    }
}

#[test]
fn a_vm_that_somebody_started_himself_is_external() {
    let listed = |launch: Option<&str>, since: Option<u64>| {
        Loaded::Value(GuestsRecord {
            guests: vec![GuestRecord {
                closed: false,
                name: "Web-0".parse().unwrap(),
                second_name: None,
                launch_id: launch.map(Into::into),
                launched_boottime_ms: since,
                boot_id: Some("this-boot".into()),
                token_sha256: None,
            }],
        })
    };
    let ended = |s: &mut Snapshot| {
        s.vms[0].qemu = None;
        s.vms[0].stop = Loaded::Value(stop("launch-2"));
        s.vms[0].ending = Some(ending(LaunchEnding::Stopped, "host-signal"));
    };
    check("castra launched none", "external reachable 400 -", |s| {
        s.vms[0].qemu = None;
        s.vms[0].run = Loaded::Absent;
        s.guests = listed(None, None);
    });
    check(
        "another's name, said beside castra's own VMs",
        "stopped waiting 400 -",
        |s| {
            s.vms[0].qemu = None;
            s.vms[0].run = Loaded::Absent;
            s.guests = listed(None, None);
            if let Loaded::Value(record) = &mut s.guests {
                record.guests[0].closed = true;
            }
        },
    );
    check("after down, and --broker-only", "external reachable 400 -", |s| {
        ended(s);
        s.guests = listed(None, Some(NOW - 400));
    });
    check("heard before that", "stopped waiting 400 host-signal", |s| {
        ended(s);
        s.guests = listed(None, Some(NOW - 399));
    });
    check("no longer heard", "stopped waiting 45001 host-signal", |s| {
        ended(s);
        s.guests = listed(None, None);
        edit_record(s, |record| record.heard_boottime_ms = NOW - WINDOW - 1);
    });
    check("a launch of castra's", "stopped waiting 400 host-signal", |s| {
        ended(s);
        s.guests = listed(Some("launch-2"), Some(LAUNCHED));
    });
    check("without a broker", "stopped offline 400 host-signal", |s| {
        ended(s);
        s.guests = listed(None, None);
        s.live_broker = None;
    });
    let mut snapshot = healthy();
    ended(&mut snapshot);
    snapshot.guests = listed(None, None);
    let status = assemble(&snapshot);
    let vm = &status.vms[0];
    assert!(
        status.reachable && vm.reachable && vm.pid.is_none() && vm.ssh.is_none() && vm.uptime_ms.is_none()
    );
}

#[test]
fn reachable_is_exactly_age_within_window_while_both_run() {
    check("at the edge", "running reachable 45000 -", |s| {
        edit_record(s, |record| record.heard_boottime_ms = NOW - WINDOW);
    });
    check("past the edge", "running waiting 45001 -", |s| {
        edit_record(s, |record| record.heard_boottime_ms = NOW - WINDOW - 1);
    });
    check("written after the clock was read", "running reachable 0 -", |s| {
        edit_record(s, |record| record.heard_boottime_ms = NOW + 3);
    });
    check(
        "the broker is gone: the age stays true",
        "running offline 400 -",
        |s| s.live_broker = None,
    );
    check(
        "another broker run: the handshake counts",
        "running reachable 400 -",
        |s| {
            edit_record(s, |record| record.broker_run = "run-0".into());
        },
    );
    check("never heard", "running waiting - -", |s| {
        s.vms[0].record = RecordRead::Absent
    });
    check("unreadable", "running waiting - -", |s| {
        s.vms[0].record = RecordRead::Unreadable("it is only partly written".into());
    });
    check("another VM's record", "running waiting - -", |s| {
        edit_record(s, |record| record.vm = "db".parse().unwrap());
    });
    check("QEMU is gone", "crashed waiting 400 unknown", |s| {
        s.vms[0].qemu = None;
        s.vms[0].ending = Some(ending(LaunchEnding::Crashed, "unknown"));
    });
}

#[test]
fn a_record_counts_for_one_boot_of_one_vm() {
    check("hello at the launch", "running reachable 100000 -", |s| {
        edit_record(s, |record| {
            record.handshake_boottime_ms = LAUNCHED;
            record.heard_boottime_ms = LAUNCHED;
        });
        let Loaded::Value(broker) = &mut s.broker else {
            panic!()
        };
        broker.freshness_window_ms = 100_000;
    });
    check("hello before this launch", "running waiting - -", |s| {
        edit_record(s, |record| record.handshake_boottime_ms = LAUNCHED - 1);
    });
    check(
        "an earlier host boot's record, launched in this one",
        "running waiting - -",
        |s| {
            edit_record(s, |record| record.boot_id = "last-boot".into());
        },
    );
    let rebooted = |s: &mut Snapshot, heard_at: &str| {
        edit_run(s, |run| run.boot_id = "last-boot".into());
        edit_record(s, |record| {
            record.boot_id = "last-boot".into();
            record.heard_at = heard_at.into();
        });
        s.vms[0].qemu = None;
    };
    check(
        "an hour ago by the wall clock",
        "stopped waiting 3600000 host-reboot",
        |s| {
            rebooted(s, "2026-11-21T09:00:00.000Z");
        },
    );
    check(
        "the wall clock was set back",
        "stopped waiting 1000000 host-reboot",
        |s| {
            rebooted(s, "2026-11-21T11:00:00.000Z");
        },
    );
    check(
        "the stamp is no time",
        "stopped waiting 1000000 host-reboot",
        |s| rebooted(s, "soon"),
    );
    check(
        "before a launch of the earlier boot",
        "stopped waiting - host-reboot",
        |s| {
            rebooted(s, "2026-11-21T09:00:00.000Z");
            edit_record(s, |record| record.handshake_boottime_ms = LAUNCHED - 1);
        },
    );
    check(
        "two boots ago, launched after",
        "stopped waiting - host-reboot",
        |s| {
            rebooted(s, "2026-11-21T09:00:00.000Z");
            edit_record(s, |record| record.boot_id = "boot-before-last".into());
        },
    );
    check(
        "launched in an earlier boot, heard in this one",
        "stopped waiting 400 host-reboot",
        |s| {
            edit_run(s, |run| run.boot_id = "last-boot".into());
            s.vms[0].qemu = None;
        },
    );
}

#[test]
fn the_bus_fields_come_from_the_record() {
    let vm = assemble(&healthy()).vms.remove(0);
    assert_eq!(vm.capabilities, ["bus-v1"]);
    assert!(vm.bus_session && vm.bus_subscribed);
    assert_eq!(vm.last_publish_age_ms, Some(1_400));
    assert_eq!(vm.last_heartbeat_age_ms, Some(400));
    assert_eq!(vm.guest_metrics, Some(json!({ "load": 1 })));

    // A session of an earlier broker run, or of none, is over.
    for gone in [true, false] {
        let mut snapshot = healthy();
        if gone {
            snapshot.live_broker = None;
        } else {
            edit_record(&mut snapshot, |record| record.broker_run = "run-0".into());
        }
        let vm = assemble(&snapshot).vms.remove(0);
        assert!(!vm.bus_session && !vm.bus_subscribed);
        assert_eq!(vm.capabilities, ["bus-v1"]);
    }

    // Of an earlier host boot only the age is told.
    let mut snapshot = healthy();
    snapshot.vms[0].qemu = None;
    edit_run(&mut snapshot, |run| run.boot_id = "last-boot".into());
    edit_record(&mut snapshot, |record| record.boot_id = "last-boot".into());
    let vm = assemble(&snapshot).vms.remove(0);
    assert!(vm.last_handshake_age_ms.is_some() && vm.capabilities.is_empty() && !vm.bus_session);
    assert_eq!(
        (vm.last_publish_age_ms, vm.last_heartbeat_age_ms, vm.guest_metrics),
        (None, None, None)
    );
}

#[test]
fn figures_come_from_the_launch_else_from_the_config() {
    let vm = assemble(&healthy()).vms.remove(0);
    assert_eq!((vm.cpus, vm.memory_bytes), (Some(2), Some(2 << 30)));
    assert_eq!((vm.pid, vm.uptime_ms), (Some(4712), Some(NOW - LAUNCHED)));
    assert_eq!(vm.ssh.and_then(|ssh| ssh.port), Some(2222));

    let mut snapshot = healthy();
    snapshot.vms[0].run = Loaded::Absent;
    snapshot.vms[0].qemu = None;
    let vm = assemble(&snapshot).vms.remove(0);
    assert_eq!((vm.cpus, vm.memory_bytes), (Some(1), Some(1 << 30)));
    assert_eq!((vm.pid, vm.uptime_ms, vm.ssh), (None, None, None));

    snapshot.vms[0].declared = None;
    let vm = assemble(&snapshot).vms.remove(0);
    assert_eq!(
        (vm.role.as_str(), vm.cpus, vm.memory_bytes),
        ("web-0", None, None)
    );
}

#[test]
fn the_top_level_sums_up() {
    let mut snapshot = healthy();
    let mut older = snapshot.vms[0].clone();
    older.name = "web-1".parse().unwrap();
    older.record = RecordRead::Record(HandshakeRecord {
        vm: older.name.clone(),
        ..heard(NOW - 90_000)
    });
    let mut kvm = run();
    kvm.accel = Accel::Kvm;
    older.run = Loaded::Value(kvm);
    snapshot.vms.insert(0, older);
    let status = assemble(&snapshot);
    assert_eq!(status.last_handshake_vm, Some("web-0".parse().unwrap()));
    assert_eq!(status.last_handshake_age_ms, Some(400));
    assert!(status.reachable);
    assert_eq!(status.accel, Some(Accel::Tcg), "the slow one is the news");
    assert_eq!(status.freshness_window_ms, WINDOW, "the running broker's window");
    assert_eq!((status.broker.pid, status.broker.port), (Some(4711), Some(7070)));

    // A broker that has only just taken its lock: `broker.json` is still that of an earlier run.
    snapshot.live_broker = Some((4713, "run-2".into()));
    let status = assemble(&snapshot);
    assert_eq!((status.broker.pid, status.broker.port), (Some(4713), None));
    assert!(status.reachable && !status.vms.iter().any(|vm| vm.bus_session));

    snapshot.live_broker = None;
    let status = assemble(&snapshot);
    assert!(!status.reachable);
    assert_eq!(status.broker.state, BrokerState::Offline);
    assert_eq!((status.broker.pid, status.broker.port), (None, None));
    assert_eq!(status.freshness_window_ms, 30_000, "the config's");
    assert_eq!(status.last_handshake_age_ms, Some(400));

    snapshot.vms.clear();
    let status = assemble(&snapshot);
    assert_eq!(
        (
            status.accel,
            status.last_handshake_vm,
            status.last_handshake_age_ms
        ),
        (None, None, None)
    );
}

#[test]
fn a_bootstrap_nobody_runs_any_more_has_failed() {
    let mut snapshot = healthy();
    let running = BootstrapRecord {
        status: BootstrapStatus::Running.into(),
        noop: false,
        duration_ms: None,
    };
    edit_run(&mut snapshot, |run| run.bootstrap = Some(running.clone()));
    snapshot.vms[0].lock_held = true;
    assert_eq!(assemble(&snapshot).vms[0].bootstrap, Some(running));
    snapshot.vms[0].lock_held = false;
    let bootstrap = assemble(&snapshot).vms[0].bootstrap.clone().unwrap();
    assert_eq!(
        (bootstrap.status.as_str(), bootstrap.duration_ms),
        ("failed", None)
    );
}

#[test]
fn what_is_unreadable_is_told() {
    let mut snapshot = healthy();
    snapshot.broker = Loaded::Unreadable("can't understand /s/broker.json".into());
    snapshot.vms[0].run = Loaded::Unreadable("can't understand /s/vms/web-0/run.json".into());
    snapshot.vms[0].record = RecordRead::Unreadable("it is only partly written".into());
    let notes = assemble(&snapshot).notes;
    assert_eq!(notes.len(), 3);
    assert!(
        notes[2]
            .text
            .contains("/s/handshakes/web-0.json: it is only partly written"),
        "{}",
        notes[2].text
    );
    assert!(notes.iter().all(|note| note.advice.is_some()));
}

/// All combinations of what decides a state; the invariants hold in each.
#[test]
fn invariants_hold_in_every_combination() {
    let phases = [None, Some(RunPhase::Starting), Some(RunPhase::Running)];
    let stops = [None, Some("launch-1"), Some("launch-2")];
    let endings = [None, Some(LaunchEnding::Stopped), Some(LaunchEnding::Crashed)];
    let ages = [
        None,
        Some(0),
        Some(WINDOW),
        Some(WINDOW + 1),
        Some(NOW - LAUNCHED + 1),
    ];
    let boots = ["this-boot", "last-boot"];
    let mut seen = std::collections::HashSet::new();
    for bits in 0..8_u8 {
        let (qemu, lock, broker) = (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0);
        for phase in phases {
            for stopped in stops {
                for end in endings {
                    for age in ages {
                        for boot in boots {
                            let mut snapshot = healthy();
                            snapshot.live_broker = broker.then(|| (4711, "run-1".into()));
                            let vm = &mut snapshot.vms[0];
                            vm.run = phase.map_or(Loaded::Absent, |phase| {
                                Loaded::Value(RunRecord {
                                    phase,
                                    boot_id: boot.into(),
                                    ..run()
                                })
                            });
                            vm.stop = stopped.map_or(Loaded::Absent, |launch| Loaded::Value(stop(launch)));
                            vm.ending = end.map(|state| ending(state, "host-error"));
                            vm.qemu = qemu.then_some(4712);
                            vm.lock_held = lock;
                            vm.record =
                                age.map_or(RecordRead::Absent, |age| RecordRead::Record(heard(NOW - age)));
                            let status = assemble(&snapshot);
                            let vm = &status.vms[0];
                            let context = format!("{:?}", snapshot.vms[0]);
                            seen.insert((vm.state, vm.broker));

                            let fresh = vm.last_handshake_age_ms.is_some_and(|age| age <= WINDOW);
                            assert_eq!(vm.reachable, broker && qemu && fresh, "{context}");
                            assert_eq!(vm.reachable, vm.broker == GuestState::Reachable, "{context}");
                            assert_eq!(!broker, vm.broker == GuestState::Offline, "{context}");
                            assert_eq!(status.reachable, vm.reachable, "{context}");
                            assert_eq!(qemu, vm.pid.is_some(), "{context}");
                            assert!(qemu || (vm.uptime_ms.is_none() && vm.ssh.is_none()), "{context}");
                            let over = matches!(vm.state, VmState::Stopped | VmState::Crashed);
                            assert!(!(over && qemu), "what runs isn't over: {context}");
                            assert_eq!(vm.ended.is_some(), over && phase.is_some(), "{context}");
                            let starting = phase == Some(RunPhase::Starting) && lock;
                            assert_eq!(vm.state == VmState::Starting, starting, "{context}");
                        }
                    }
                }
            }
        }
    }
    // Offline and waiting in every state, reachable in the three in which QEMU may run.
    assert_eq!(seen.len(), 5 + 5 + 3, "{seen:?}");
}
