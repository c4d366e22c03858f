//! What holds of a port, case by case.

use std::time::Duration;

use super::*;
use crate::core::root::paths::StateRoot;
use crate::core::root::records::LaunchSettings;

fn name(text: &str) -> VmName {
    text.parse().unwrap()
}

fn forward(host: u16, guest: u16) -> ForwardRecord {
    ForwardRecord {
        host,
        guest,
        protocol: Protocol::Tcp,
    }
}

fn project(vms: &[(&str, &[ForwardRecord])], broker_port: Option<u16>) -> Project {
    let declared = vms.iter().map(|(vm, forwards)| Declared {
        name: name(vm),
        role: (*vm).to_owned(),
        cpus: 1,
        memory_bytes: 1 << 28,
        forwards: forwards.to_vec(),
        settings: LaunchSettings::new(),
    });
    Project {
        project: "demo".into(),
        workspace: "demo-1".into(),
        config_path: "/demo/castra.toml".into(),
        state: StateRoot::new("/state"),
        vms: Some(declared.collect()),
        freshness: Duration::from_secs(45),
        broker_port,
    }
}

fn vm_of(project: &str, vm: &str, port: u16) -> HeldPort {
    HeldPort {
        port,
        protocol: Protocol::Tcp,
        owner: PortOwner::Vm {
            vm: name(vm),
            project: project.into(),
            workspace: format!("{project}-1"),
            pid: Some(7),
        },
    }
}

fn broker_of(project: &str, port: u16, pid: Option<u32>) -> HeldPort {
    HeldPort {
        port,
        protocol: Protocol::Tcp,
        owner: PortOwner::Broker {
            project: project.into(),
            workspace: format!("{project}-1"),
            pid,
        },
    }
}

/// `who port>guest state (owner)`, one a line.
fn shown(project: &Project, running: &[Running], held: &[HeldPort]) -> String {
    let nginx = |protocol, port| {
        (protocol == Protocol::Tcp && port == 80).then(|| PortOwner::Process {
            name: Some("nginx (pid 3)".into()),
        })
    };
    let evidence = PortEvidence {
        running,
        held,
        wanted_elsewhere: &[vm_of("far", "x", 9000)],
        foreign: &nginx,
    };
    let line = |row: &PortRow| {
        let who = row.vm.as_ref().map_or("broker", VmName::as_str);
        let port = row.port.map_or("auto".to_owned(), |port| port.to_string());
        let guest = row.guest.map(|guest| format!(">{guest}")).unwrap_or_default();
        let owner = row
            .owner
            .as_ref()
            .map(|owner| format!(" ({owner})"))
            .unwrap_or_default();
        let also = if row.also_declared_by.is_empty() {
            ""
        } else {
            " also"
        };
        format!("{who} {port}{guest} {}{owner}{also}\n", row.state.as_str())
    };
    rows(project, &evidence).iter().map(line).collect()
}

#[test]
fn free_ones_never_conflict() {
    let demo = project(
        &[
            ("web", &[forward(0, 80), forward(0, 22)]),
            ("db", &[forward(2022, 22)]),
        ],
        None,
    );
    assert_eq!(
        shown(&demo, &[], &[]),
        "web auto>80 declared\nweb auto>22 declared\ndb 2022>22 declared\n"
    );
}

#[test]
fn who_is_in_the_way_is_named() {
    let demo = project(
        &[
            ("web", &[forward(80, 80), forward(8080, 8080), forward(0, 22)]),
            ("db", &[forward(7070, 22)]),
        ],
        None,
    );
    let held = [vm_of("other", "api", 8080), broker_of("other", 7070, None)];
    assert_eq!(
        shown(&demo, &[], &held),
        "web 80>80 conflicting (nginx (pid 3))\n\
         web 8080>8080 conflicting (vm `api` of castra project `other` (pid 7))\n\
         web auto>22 declared\n\
         db 7070>22 broker-reserved (the broker of castra project `other`, whose running VMs were told it)\n"
    );
}

#[test]
fn a_running_vm_has_its_ports_and_keeps_them_from_its_siblings() {
    let demo = project(
        &[("web", &[forward(80, 80)]), ("db", &[forward(40001, 22)])],
        Some(7070),
    );
    let running = [
        Running {
            vm: name("Web"),
            pid: 7,
            forwards: vec![ForwardRecord {
                host: 40001,
                guest: 22,
                protocol: Protocol::Tcp,
            }],
        },
        Running {
            vm: name("gone"),
            pid: 8,
            forwards: vec![ForwardRecord {
                host: 40002,
                guest: 22,
                protocol: Protocol::Tcp,
            }],
        },
    ];
    let held = [
        vm_of("demo", "web", 40001),
        vm_of("demo", "gone", 40002),
        broker_of("demo", 7070, Some(9)),
    ];
    assert_eq!(
        shown(&demo, &running, &held),
        "broker 7070 broker-reserved\n\
         Web 40001>22 active\n\
         db 40001>22 conflicting (vm `web` of castra project `demo` (pid 7))\n\
         gone 40002>22 active\n"
    );
}

#[test]
fn a_brokers_own_port_can_be_taken_too() {
    let demo = project(&[], Some(80));
    assert_eq!(shown(&demo, &[], &[]), "broker 80 conflicting (nginx (pid 3))\n");
    let other = project(&[], Some(81));
    assert_eq!(shown(&other, &[], &[]), "broker 81 broker-reserved\n");
    assert_eq!(
        shown(&other, &[], &[broker_of("other", 81, Some(2))]),
        "broker 81 conflicting (the broker of castra project `other` (pid 2))\n"
    );
}

#[test]
fn what_others_would_like_is_no_conflict() {
    let demo = project(&[("web", &[forward(9000, 22)])], None);
    assert_eq!(shown(&demo, &[], &[]), "web 9000>22 declared also\n");
}

#[test]
fn a_conflict_says_what_frees_the_port() {
    let conflict = |owner: PortOwner| PortConflict {
        vm: name("web"),
        port: 80,
        protocol: Protocol::Udp,
        owner,
    };
    let other = conflict(vm_of("other", "api", 80).owner);
    assert_eq!(
        other.to_string(),
        "vm `web` wants UDP port 80 of 127.0.0.1, which vm `api` of castra project `other` (pid 7) has"
    );
    assert!(
        other
            .advice()
            .starts_with("`castra --workspace other-1 down api` frees it, or set `host = 0`")
    );
    let unknown = conflict(PortOwner::Process { name: None });
    assert!(unknown.to_string().ends_with("which another process has"));
}
