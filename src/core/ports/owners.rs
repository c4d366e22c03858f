//! What is known about ports: from the state roots of all projects, and from the kernel.
//!
//! Here: reading it; nothing is bound, written or waited for. Not here: what it means ([`super`]).

use std::path::Path;

use crate::core::config::{Config, VmConfig, workspace};
use crate::core::events::Protocol;
use crate::core::host::{self, BoundPort, Transport};
use crate::core::root::alive::{find_broker, launched_vms, qemu_pid};
use crate::core::root::paths::StateRoot;
use crate::core::root::project::Project;
use crate::core::root::records::{self, BrokerRecord, RunRecord, WorkspaceRecord};

use super::{HeldPort, PortConflict, PortEvidence, PortOwner, PortsOutcome, Running};
use super::{PORTS_SCHEMA, conflicts_of, rows};

/// A project's ports, judged. `home` is where all other projects are found.
pub fn ports_of(project: &Project, home: &Path) -> PortsOutcome {
    let records = workspace::list_workspaces(home);
    let wanted_elsewhere = wanted_elsewhere(project, &records);
    let rows = rows_of(project, &records, &wanted_elsewhere);
    PortsOutcome {
        schema: PORTS_SCHEMA.to_owned(),
        project: project.project.clone(),
        workspace: project.workspace.clone(),
        config_path: project.config_path.clone(),
        state_root: project.state.dir().to_owned(),
        conflicts: rows.iter().filter(|row| row.owner.is_some()).count(),
        ports: rows,
    }
}

/// Which of the fixed ports of these VMs, which don't run, somebody else has.
pub fn conflicts(config: &Config, vms: &[&VmConfig], home: &Path) -> Vec<PortConflict> {
    let mut project = Project::from(config);
    if let Some(declared) = &mut project.vms {
        declared.retain(|declared| vms.iter().any(|vm| vm.name == declared.name));
        if declared
            .iter()
            .all(|declared| declared.forwards.iter().all(|forward| forward.host == 0))
        {
            return Vec::new();
        }
    }
    conflicts_of(&rows_of(&project, &workspace::list_workspaces(home), &[]))
}

/// Who has a port, in castra's own terms where it is one of its VMs or brokers.
pub fn owner_of(protocol: Protocol, port: u16, home: Option<&Path>) -> Option<PortOwner> {
    let records = home.map(workspace::list_workspaces).unwrap_or_default();
    records
        .iter()
        .flat_map(held_on_record)
        .find(|held| (held.protocol, held.port) == (protocol, port))
        .map(|held| held.owner)
        .or_else(|| foreign(&host::bound_ports(), protocol, port))
}

fn rows_of(
    project: &Project,
    records: &[WorkspaceRecord],
    wanted_elsewhere: &[HeldPort],
) -> Vec<super::PortRow> {
    let mut held: Vec<HeldPort> = records
        .iter()
        .filter(|record| record.state_root != project.state.dir())
        .flat_map(held_on_record)
        .collect();
    held.extend(ports_held_in(
        &project.state,
        &project.project,
        &project.workspace,
    ));
    let bound = host::bound_ports();
    rows(
        project,
        &PortEvidence {
            running: &running_in(&project.state),
            held: &held,
            wanted_elsewhere,
            foreign: &|protocol, port| foreign(&bound, protocol, port),
        },
    )
}

fn foreign(bound: &[BoundPort], protocol: Protocol, port: u16) -> Option<PortOwner> {
    let transport = match protocol {
        Protocol::Tcp => Transport::Tcp,
        Protocol::Udp => Transport::Udp,
    };
    let found = bound
        .iter()
        .find(|bound| (bound.transport, bound.port) == (transport, port))?;
    Some(PortOwner::Process { name: found.owner() })
}

/// The VMs under a state root that run.
fn running_in(state: &StateRoot) -> Vec<Running> {
    launched_vms(state)
        .unwrap_or_default()
        .into_iter()
        .filter_map(|vm| {
            let paths = state.vm(&vm);
            let pid = qemu_pid(&paths)?;
            let record: Option<RunRecord> = records::load(&paths.run()).ok().flatten();
            let forwards = record.map(|record| record.forwards).unwrap_or_default();
            Some(Running { vm, pid, forwards })
        })
        .collect()
}

fn held_on_record(record: &WorkspaceRecord) -> Vec<HeldPort> {
    ports_held_in(&StateRoot::new(&record.state_root), &record.project, &record.id)
}

/// What the VMs and the broker of a state root have.
fn ports_held_in(state: &StateRoot, project: &str, workspace: &str) -> Vec<HeldPort> {
    let running = running_in(state);
    let mut held: Vec<HeldPort> = Vec::new();
    for vm in &running {
        held.extend(vm.forwards.iter().map(|forward| HeldPort {
            port: forward.host,
            protocol: forward.protocol,
            owner: PortOwner::Vm {
                vm: vm.vm.clone(),
                project: project.to_owned(),
                workspace: workspace.to_owned(),
                pid: Some(vm.pid),
            },
        }));
    }
    let (port, pid) = match find_broker(state) {
        Some((pid, record)) => (record.map(|record| record.port), Some(pid)),
        // The guests were told this port; a broker started again takes it or fails.
        None if !running.is_empty() => {
            let record: Option<BrokerRecord> = records::load(&state.broker_json()).ok().flatten();
            (record.map(|record| record.port), None)
        }
        None => (None, None),
    };
    held.extend(port.map(|port| HeldPort {
        port,
        protocol: Protocol::Tcp,
        owner: PortOwner::Broker {
            project: project.to_owned(),
            workspace: workspace.to_owned(),
            pid,
        },
    }));
    held
}

/// Fixed ports in the configs of the other projects, of VMs that don't run. A config that can't be
/// read says nothing.
fn wanted_elsewhere(project: &Project, records: &[WorkspaceRecord]) -> Vec<HeldPort> {
    let mut wanted = Vec::new();
    for record in records {
        if record.state_root == project.state.dir() {
            continue;
        }
        let Some(config) = workspace::config_on_record(record) else {
            continue;
        };
        let idle = config
            .vms
            .iter()
            .filter(|vm| qemu_pid(&config.state.vm(&vm.name)).is_none());
        for vm in idle {
            let fixed = vm.port_forwards.iter().filter(|forward| forward.host != 0);
            wanted.extend(fixed.map(|forward| HeldPort {
                port: forward.host,
                protocol: forward.protocol,
                owner: PortOwner::Vm {
                    vm: vm.name.clone(),
                    project: record.project.clone(),
                    workspace: record.id.clone(),
                    pid: None,
                },
            }));
        }
    }
    wanted
}
