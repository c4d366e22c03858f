//! Host ports: which ones a project wants, which it has, and who is in the way.
//!
//! Here: the contract of `castra ports --json` and the rules that yield it, as pure functions. Not
//! here: reading their inputs ([`owners`]), or choosing and binding a port for a launch
//! (`core::runtime::forwards`).
//!
//! A forward is `active` while its VM runs. One with a fixed host port whose VM doesn't run is
//! `conflicting` if somebody else has that port, `broker-reserved` if that somebody is a broker, and
//! `declared` otherwise, as is every forward for which castra will choose a free port. A broker's
//! port is `broker-reserved` too: while a VM of its project runs it stays the broker's even when no
//! broker runs, because the guests were told it.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::core::events::Protocol;
use crate::core::name::VmName;
use crate::core::root::project::{Declared, Project};
use crate::core::root::records::ForwardRecord;

pub mod owners;

/// Name and version of the contract.
pub const PORTS_SCHEMA: &str = "castra.ports.v1";

/// What `ports` answers: one object, `schema` first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortsOutcome {
    /// [`PORTS_SCHEMA`].
    pub schema: String,
    /// The project's name.
    pub project: String,
    /// Its id.
    pub workspace: String,
    /// The config file.
    pub config_path: PathBuf,
    /// Where its state is.
    pub state_root: PathBuf,
    /// How many of its wanted ports somebody else has, whatever `--active` leaves out.
    pub conflicts: usize,
    /// The broker's port, then those of the VMs in config order.
    pub ports: Vec<PortRow>,
}

/// One port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRow {
    /// The VM; null: the broker.
    pub vm: Option<VmName>,
    /// The port on the host's loopback; null: a free port is chosen at launch.
    pub port: Option<u16>,
    /// The port in the guest; null: the broker's row.
    pub guest: Option<u16>,
    /// Transport.
    pub protocol: Protocol,
    /// What holds of it.
    pub state: PortState,
    /// QEMU or broker, where it runs.
    pub pid: Option<u32>,
    /// Who else has it; null: nobody.
    pub owner: Option<PortOwner>,
    /// VMs of other projects that want the same host port, though they don't run now: the first one
    /// up gets it.
    pub also_declared_by: Vec<PortOwner>,
}

/// What holds of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortState {
    /// Wanted; nobody is in the way.
    Declared,
    /// A running VM has it.
    Active,
    /// Wanted, but somebody else has it: the VM, or the broker, can't start.
    Conflicting,
    /// It is a broker's. With an owner: another broker's than that of this project's own row, so
    /// the VM can't start.
    BrokerReserved,
}

impl PortState {
    /// The word in contract and table.
    pub fn as_str(self) -> &'static str {
        match self {
            PortState::Declared => "declared",
            PortState::Active => "active",
            PortState::Conflicting => "conflicting",
            PortState::BrokerReserved => "broker-reserved",
        }
    }
}

/// Who has or wants a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum PortOwner {
    /// A VM that castra runs, or would.
    Vm {
        /// The VM.
        vm: VmName,
        /// Its project.
        project: String,
        /// Its project's id.
        workspace: String,
        /// Its QEMU; null: it doesn't run.
        pid: Option<u32>,
    },
    /// A castra broker.
    Broker {
        /// Its project.
        project: String,
        /// Its project's id.
        workspace: String,
        /// Its process; null: none runs, but the project's running VMs were told this port.
        pid: Option<u32>,
    },
    /// Something that castra knows nothing of.
    Process {
        /// `name (pid N)`; null where the kernel doesn't show it to us.
        name: Option<String>,
    },
}

impl fmt::Display for PortOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PortOwner::Vm { vm, project, pid, .. } => {
                write!(f, "vm `{vm}` of castra project `{project}`")?;
                pid.map_or(Ok(()), |pid| write!(f, " (pid {pid})"))
            }
            PortOwner::Broker {
                project,
                pid: Some(pid),
                ..
            } => write!(f, "the broker of castra project `{project}` (pid {pid})"),
            PortOwner::Broker { project, .. } => write!(
                f,
                "the broker of castra project `{project}`, whose running VMs were told it"
            ),
            PortOwner::Process { name: Some(name) } => f.write_str(name),
            PortOwner::Process { name: None } => write!(f, "another process"),
        }
    }
}

impl PortOwner {
    /// What frees a port of this owner.
    pub fn how_to_free(&self) -> String {
        match self {
            PortOwner::Vm { vm, workspace, .. } => {
                format!("`castra --workspace {workspace} down {vm}` frees it")
            }
            PortOwner::Broker { workspace, .. } => {
                format!("`castra --workspace {workspace} down` frees it")
            }
            PortOwner::Process { .. } => "stop that process".to_owned(),
        }
    }
}

/// A port that castra itself has given to somebody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldPort {
    /// The port.
    pub port: u16,
    /// Transport.
    pub protocol: Protocol,
    /// Whose it is.
    pub owner: PortOwner,
}

/// A wanted port that somebody else has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortConflict {
    /// The VM that wants it.
    pub vm: VmName,
    /// The port.
    pub port: u16,
    /// Transport.
    pub protocol: Protocol,
    /// Who has it.
    pub owner: PortOwner,
}

impl fmt::Display for PortConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
        };
        let PortConflict { vm, port, owner, .. } = self;
        write!(
            f,
            "vm `{vm}` wants {protocol} port {port} of 127.0.0.1, which {owner} has"
        )
    }
}

impl PortConflict {
    /// What to do about it.
    pub fn advice(&self) -> String {
        format!(
            "{}, or set `host = 0` in that forward, and castra chooses a free port",
            self.owner.how_to_free()
        )
    }
}

/// A VM that runs: its QEMU and its forwards as allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// The VM.
    pub vm: VmName,
    /// Its QEMU.
    pub pid: u32,
    /// Its forwards; empty where its record is lost.
    pub forwards: Vec<ForwardRecord>,
}

/// All that is known about ports when a project's own are judged.
pub struct PortEvidence<'e> {
    /// Its VMs that run.
    pub running: &'e [Running],
    /// What castra has given to anybody, this project included.
    pub held: &'e [HeldPort],
    /// What other projects' VMs that don't run want.
    pub wanted_elsewhere: &'e [HeldPort],
    /// Who has a port that castra hasn't given to anybody.
    pub foreign: &'e dyn Fn(Protocol, u16) -> Option<PortOwner>,
}

impl PortEvidence<'_> {
    /// Who is in the way of this VM (`None`: of the broker) at a port it wants.
    fn in_the_way(
        &self,
        project: &Project,
        vm: Option<&VmName>,
        protocol: Protocol,
        port: u16,
    ) -> Option<PortOwner> {
        let is_own = |owner: &PortOwner| match (owner, vm) {
            (
                PortOwner::Vm {
                    vm: other, workspace, ..
                },
                Some(vm),
            ) => *workspace == project.workspace && other.key() == vm.key(),
            (PortOwner::Broker { workspace, .. }, None) => *workspace == project.workspace,
            _ => false,
        };
        let mut holders = self
            .held
            .iter()
            .filter(|held| (held.protocol, held.port) == (protocol, port))
            .peekable();
        if holders.peek().is_none() {
            return (self.foreign)(protocol, port);
        }
        holders
            .find(|held| !is_own(&held.owner))
            .map(|held| held.owner.clone())
    }

    fn also_declared(&self, protocol: Protocol, port: u16) -> Vec<PortOwner> {
        self.wanted_elsewhere
            .iter()
            .filter(|wanted| (wanted.protocol, wanted.port) == (protocol, port))
            .map(|wanted| wanted.owner.clone())
            .collect()
    }
}

/// The rows of one project: the broker's, then the VMs' in config order, then those of running VMs
/// that the config doesn't name.
pub fn rows(project: &Project, evidence: &PortEvidence<'_>) -> Vec<PortRow> {
    let mut rows: Vec<PortRow> = broker_row(project, evidence).into_iter().collect();
    let declared = project.vms.as_deref().unwrap_or_default();
    for declared in declared {
        let running = evidence
            .running
            .iter()
            .find(|running| running.vm.key() == declared.name.key());
        match running {
            Some(running) => rows.extend(active_rows(running)),
            None => rows.extend(declared_rows(project, declared, evidence)),
        }
    }
    let is_declared = |running: &&Running| {
        declared
            .iter()
            .any(|declared| declared.name.key() == running.vm.key())
    };
    let others = evidence.running.iter().filter(|running| !is_declared(running));
    rows.extend(others.flat_map(active_rows));
    rows
}

fn broker_row(project: &Project, evidence: &PortEvidence<'_>) -> Option<PortRow> {
    let row = |port: Option<u16>, state: PortState| PortRow {
        vm: None,
        port,
        guest: None,
        protocol: Protocol::Tcp,
        state,
        pid: None,
        owner: None,
        also_declared_by: Vec::new(),
    };
    let own = evidence.held.iter().find_map(|held| match &held.owner {
        PortOwner::Broker { workspace, pid, .. } if *workspace == project.workspace => {
            Some((held.port, *pid))
        }
        _ => None,
    });
    match (own, project.broker_port) {
        (Some((port, pid)), _) => Some(PortRow {
            pid,
            ..row(Some(port), PortState::BrokerReserved)
        }),
        (None, Some(port)) => {
            let owner = evidence.in_the_way(project, None, Protocol::Tcp, port);
            let state = match owner {
                Some(_) => PortState::Conflicting,
                None => PortState::BrokerReserved,
            };
            Some(PortRow {
                owner,
                ..row(Some(port), state)
            })
        }
        // Whatever is free when it starts.
        (None, None) => None,
    }
}

fn active_rows(running: &Running) -> Vec<PortRow> {
    running
        .forwards
        .iter()
        .map(|forward| PortRow {
            vm: Some(running.vm.clone()),
            port: Some(forward.host),
            guest: Some(forward.guest),
            protocol: forward.protocol,
            state: PortState::Active,
            pid: Some(running.pid),
            owner: None,
            also_declared_by: Vec::new(),
        })
        .collect()
}

fn declared_rows(project: &Project, declared: &Declared, evidence: &PortEvidence<'_>) -> Vec<PortRow> {
    declared
        .forwards
        .iter()
        .map(|forward| {
            let fixed = Some(forward.host).filter(|port| *port != 0);
            let owner = fixed
                .and_then(|port| evidence.in_the_way(project, Some(&declared.name), forward.protocol, port));
            PortRow {
                vm: Some(declared.name.clone()),
                port: fixed,
                guest: Some(forward.guest),
                protocol: forward.protocol,
                state: match &owner {
                    None => PortState::Declared,
                    Some(PortOwner::Broker { .. }) => PortState::BrokerReserved,
                    Some(PortOwner::Vm { .. } | PortOwner::Process { .. }) => PortState::Conflicting,
                },
                pid: None,
                owner,
                also_declared_by: fixed
                    .map(|port| evidence.also_declared(forward.protocol, port))
                    .unwrap_or_default(),
            }
        })
        .collect()
}

/// The conflicts among these rows, the broker's own left out: it says so itself when it starts.
pub fn conflicts_of(rows: &[PortRow]) -> Vec<PortConflict> {
    rows.iter()
        .filter_map(|row| {
            Some(PortConflict {
                vm: row.vm.clone()?,
                port: row.port?,
                protocol: row.protocol,
                owner: row.owner.clone()?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests;
