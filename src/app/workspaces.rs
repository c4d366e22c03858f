//! `castra workspaces`.

use castra::core::config::workspace;
use castra::core::failure::{Exit, Result};
use castra::core::host;
use castra::core::status::{BrokerState, StatusOutcome};
use serde::Serialize;

use super::context::Context;
use super::{find_project, human};

/// One project in the list.
#[derive(Serialize)]
struct Row<'s> {
    workspace: &'s str,
    project: &'s str,
    config_path: &'s std::path::Path,
    config_exists: bool,
    state_root: &'s std::path::Path,
    vms_running: usize,
    broker_running: bool,
}

#[derive(Serialize)]
struct Listing<'s> {
    workspaces: Vec<Row<'s>>,
}

pub fn run(context: &mut Context) -> Result<Exit> {
    let unreadable = workspace::unreadable_workspaces(&find_project::home()?);
    let all = find_project::all_projects();
    match unreadable.into_iter().next() {
        Some(failure) if all.is_empty() => return Err(failure),
        // A project that can't be read doesn't hide the others.
        Some(failure) => context.warn(&failure.to_string()),
        None => {}
    }
    if context.json {
        let workspaces = all.iter().map(row).collect();
        context.out.json(&Listing { workspaces });
        return Ok(Exit::Done);
    }
    let width = all.iter().map(|status| status.workspace.len()).max().unwrap_or(0);
    for status in &all {
        let gone = if host::is_there(&status.config_path) {
            ""
        } else {
            " (gone)"
        };
        context.out.line(format!(
            "{}  {:<24}  {}{gone}",
            context.style.bold(&format!("{:<width$}", status.workspace)),
            find_project::running_text(status),
            status.config_path.display()
        ));
    }
    context.out.flush();
    if all.is_empty() {
        context.say("castra knows no project yet; `castra init`, then `castra up` makes one");
    } else {
        context.say(&format!(
            "{}; `castra --workspace ID status` shows one",
            human::plural(all.len(), "project")
        ));
    }
    Ok(Exit::Done)
}

fn row(status: &StatusOutcome) -> Row<'_> {
    Row {
        workspace: &status.workspace,
        project: &status.project,
        config_path: &status.config_path,
        config_exists: host::is_there(&status.config_path),
        state_root: &status.state_root,
        vms_running: find_project::running_vms(status),
        broker_running: status.broker.state == BrokerState::Running,
    }
}
