//! Which project a command is about: `--config`, `--workspace`, or what discovery finds.
//!
//! Here: that choice, and what is said where there is none. Not here: reading configs
//! (`core::config`).

use std::env;
use std::path::{Path, PathBuf};

use castra::core::config::{self, CONFIG_FILE, Config};
use castra::core::failure::{Exit, Failure, Result};
use castra::core::logs::launched_vms;
use castra::core::name::VmName;
use castra::core::nearest::nearest;
use castra::core::operations::lost;
use castra::core::operations::status::status_all;
use castra::core::paths::{StateRoot, castra_home};
use castra::core::process::shell_quote;
use castra::core::records::WorkspaceRecord;
use castra::core::reporter::Silent;
use castra::core::status::evidence::Project;
use castra::core::status::{BrokerState, StatusOutcome};

use super::human;
use super::screen::Screen;
use crate::cli::{Command, Raw};

/// A project, with or without a config that can still be read.
pub enum Selected {
    /// The config says what it is.
    Config(Box<Config>),
    /// Only the record of its workspace is left: the config was moved, removed or changed into
    /// another project's.
    Record(WorkspaceRecord),
}

impl Selected {
    /// Where its state is.
    pub fn state(&self) -> StateRoot {
        match self {
            Selected::Config(config) => config.state.clone(),
            Selected::Record(record) => StateRoot::new(&record.state_root),
        }
    }

    /// As status wants it.
    pub fn project(&self) -> Project {
        match self {
            Selected::Config(config) => Project::from(config.as_ref()),
            Selected::Record(record) => Project::from(record),
        }
    }
}

/// `~/.castra` or what stands for it.
pub fn home() -> Result<PathBuf> {
    castra_home().ok_or_else(|| {
        Failure::new(Exit::NoInput, "castra has no home")
            .because("neither CASTRA_HOME nor HOME is set to a directory")
            .advice("set CASTRA_HOME to a directory castra may write to")
    })
}

/// The config, for commands that need one.
pub fn config(raw: &Raw) -> Result<Config> {
    match project_or(raw, none_found)? {
        Selected::Config(config) => Ok(*config),
        Selected::Record(record) => Err(Failure::new(
            Exit::NoInput,
            format!("workspace {} has no config any more", record.id),
        )
        .because(format!(
            "{} is gone or is another project's",
            record.config_path.display()
        ))
        .advice(format!(
            "`castra --workspace {} down` ends what runs; --config PATH names the new place",
            record.id
        ))),
    }
}

/// The project, for commands that can do without its config. Where none is selected they name
/// what runs anywhere.
pub fn project(raw: &Raw) -> Result<Selected> {
    addressed(project_or(raw, none_found_but_running)?)
}

/// The project, if one is named or there is one here. For commands that have something to say
/// without any.
pub fn project_if_any(raw: &Raw) -> Result<Option<Selected>> {
    if raw.config.is_none() && raw.workspace.is_none() {
        let here = env::current_dir().ok();
        return here
            .and_then(|here| config::discover(&here))
            .map(|path| addressed(load(&path)?))
            .transpose();
    }
    addressed(project_or(raw, none_found)?).map(Some)
}

fn project_or(raw: &Raw, none: fn(&Path, &Raw) -> Failure) -> Result<Selected> {
    match (&raw.config, &raw.workspace) {
        (Some(_), Some(_)) => Err(
            Failure::new(Exit::Usage, "both --config and --workspace are given")
                .because("each of them names a project")
                .advice("leave one out"),
        ),
        (Some(path), None) => {
            let path = if path.is_dir() {
                path.join(CONFIG_FILE)
            } else {
                path.clone()
            };
            load(&path)
        }
        (None, Some(id)) => by_id(id),
        (None, None) => {
            let here = env::current_dir().map_err(|error| {
                Failure::new(Exit::NoInput, "the current directory can't be read")
                    .because(error)
                    .advice("go to one that exists, or name the project by --config or --workspace")
            })?;
            match config::discover(&here) {
                Some(path) => load(&path),
                None => Err(none(&here, raw)),
            }
        }
    }
}

fn load(path: &Path) -> Result<Selected> {
    config::load(path).map(|config| Selected::Config(Box::new(config)))
}

/// What runs is what a command is about, also where castra.toml names another state root by now.
fn addressed(selected: Selected) -> Result<Selected> {
    let Selected::Config(config) = selected else {
        return Ok(selected);
    };
    let wanted = config.state.dir().to_owned();
    let (config, elsewhere) = lost::addressed(*config)?;
    if let Some(elsewhere) = elsewhere {
        Screen.say(&format!(
            "note: castra.toml names the state root {}, but there is {}: this is about those; `castra down` ends them",
            wanted.display(),
            elsewhere.what()
        ));
    }
    Ok(Selected::Config(Box::new(config)))
}

fn by_id(id: &str) -> Result<Selected> {
    Ok(of_record(lost::find_workspace(&home()?, id)?))
}

/// A project on record, with its config if that is still its own.
pub fn of_record(record: WorkspaceRecord) -> Selected {
    // A config that is gone, broken or another project's by now must not keep anybody from
    // looking at, or stopping, what runs.
    match config::load(&record.config_path) {
        Ok(config) if config.workspace == record.id && config.state.dir() == record.state_root => {
            Selected::Config(Box::new(config))
        }
        _ => Selected::Record(record),
    }
}

/// The VM of this name, compared without case, in the spelling of config or state root.
pub fn vm(selected: &Selected, name: &str) -> Result<VmName> {
    let mut known: Vec<VmName> = match selected {
        Selected::Config(config) => config.vms.iter().map(|vm| vm.name.clone()).collect(),
        Selected::Record(_) => Vec::new(),
    };
    // A VM that the config has lost may still run.
    known.extend(launched_vms(&selected.state())?);
    if let Some(vm) = known.iter().find(|vm| vm.as_str().eq_ignore_ascii_case(name)) {
        return Ok(vm.clone());
    }
    let failure = Failure::new(Exit::Usage, format!("there is no VM {name:?} in this project"));
    Err(match nearest(name, known.iter().map(VmName::as_str)) {
        Some(near) => failure.advice(format!("`{near}` is the nearest there is")),
        None => failure.advice("`castra status` lists its VMs"),
    })
}

fn none_found(here: &Path, _raw: &Raw) -> Failure {
    Failure::new(
        Exit::NoInput,
        format!("there is no {CONFIG_FILE} in {} or above it", here.display()),
    )
    .advice("`castra init` writes one; --config PATH or --workspace ID name another project")
}

fn none_found_but_running(here: &Path, raw: &Raw) -> Failure {
    let command = typed_command(raw);
    let running = running_anywhere();
    let failure = none_found(here, raw);
    if running.is_empty() {
        return failure.because("nothing of castra's runs on this machine");
    }
    let lines: Vec<String> = running
        .iter()
        .map(|status| running_line(status, &command))
        .collect();
    failure
        .because(format!("elsewhere something runs:\n{}", lines.join("\n")))
        .advice(format!("castra --workspace {} {command}", running[0].workspace))
}

/// The command with its words, as it may be typed again.
fn typed_command(raw: &Raw) -> String {
    let mut line = raw
        .command
        .map_or("status", |command| command.row().words)
        .to_owned();
    for (number, word) in raw.operands.iter().enumerate() {
        // What stands behind the name of the VM is a command of its own.
        let dashes = number == 1 && matches!(raw.command, Some(Command::Ssh | Command::Exec));
        line.push_str(if dashes { " -- " } else { " " });
        line.push_str(&shell_quote(&word.to_string_lossy()));
    }
    line
}

fn running_line(status: &StatusOutcome, command: &str) -> String {
    format!(
        "castra --workspace {} {command}    # {}, {}",
        status.workspace,
        running_text(status),
        status.config_path.display()
    )
}

/// `2 VMs and a broker run`, for people.
pub fn running_text(status: &StatusOutcome) -> String {
    let vms = running_vms(status);
    let broker = status.broker.state == BrokerState::Running;
    match (vms, broker) {
        (0, false) => "nothing runs".to_owned(),
        (0, true) => "a broker runs".to_owned(),
        (vms, true) => format!("{} and a broker run", human::plural(vms, "VM")),
        (1, false) => "1 VM runs".to_owned(),
        (vms, false) => format!("{} run", human::plural(vms, "VM")),
    }
}

/// How many VMs have a process.
pub fn running_vms(status: &StatusOutcome) -> usize {
    status.vms.iter().filter(|vm| vm.pid.is_some()).count()
}

/// Every project of this user in which something runs.
fn running_anywhere() -> Vec<StatusOutcome> {
    let mut all = all_projects();
    all.retain(|status| running_vms(status) > 0 || status.broker.state == BrokerState::Running);
    all
}

/// The status of every project of this user, by what its records say.
pub fn all_projects() -> Vec<StatusOutcome> {
    let records = castra_home()
        .map(|home| lost::workspaces(&home))
        .unwrap_or_default();
    let projects = records.iter().map(Project::from).collect();
    status_all(projects, &mut Silent).projects
}
