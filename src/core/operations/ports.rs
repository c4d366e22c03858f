//! `ports`: which host ports a project wants and has, and who has ports that it can't get.
//!
//! Here: one project or all of them. Not here: the contract and its rules (`core::ports`), or what
//! `up` does about a conflict (`operations::up`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::core::config::workspace;
use crate::core::failure::Result;
use crate::core::ports::owners::ports_of;
use crate::core::ports::{PortRow, PortState, PortsOutcome};
use crate::core::reporter::Reporter;
use crate::core::root::alive;
use crate::core::root::project::Project;

/// Whose ports are asked about.
#[derive(Clone, Debug)]
pub struct PortsOptions {
    /// The project: `Project::from(&config)`, or from its workspace record.
    pub project: Project,
    /// `CASTRA_HOME`, where the other projects are found.
    pub home: PathBuf,
    /// Only those in use now.
    pub active: bool,
}

/// Reports which ports a project wants and has. It binds no port and changes nothing.
pub fn ports(options: PortsOptions, _reporter: &mut dyn Reporter) -> Result<PortsOutcome> {
    // A state root that can't be read is an error, because VMs may run there.
    alive::launched_vms(&options.project.state)?;
    let mut outcome = ports_of(&options.project, &options.home);
    if options.active {
        outcome.ports.retain(in_use);
    }
    Ok(outcome)
}

fn in_use(row: &PortRow) -> bool {
    row.state == PortState::Active || row.pid.is_some()
}

/// Every project.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortsAllOutcome {
    /// By id.
    pub projects: Vec<PortsOutcome>,
}

/// Reports the ports of every project under a castra home.
pub fn ports_all(home: PathBuf, active: bool, reporter: &mut dyn Reporter) -> Result<PortsAllOutcome> {
    let records = workspace::list_workspaces(&home);
    if records.is_empty()
        && let Some(failure) = workspace::unreadable_workspaces(&home).into_iter().next()
    {
        return Err(failure);
    }
    let all = records.iter().map(|record| {
        let project = workspace::project_on_record(record);
        let home = home.clone();
        ports(
            PortsOptions {
                project,
                home,
                active,
            },
            reporter,
        )
    });
    Ok(PortsAllOutcome {
        projects: all.collect::<Result<_>>()?,
    })
}
