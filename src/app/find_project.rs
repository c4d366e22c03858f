//! Which project a command is about: `--config`, `--workspace`, or what discovery finds.
//!
//! Here: that choice, and the failures if there is no such project. Not here: reading configs
//! (`core::config`).

use std::env;
use std::path::{Path, PathBuf};

use castra::core::config::workspace::config_on_record;
use castra::core::config::{self, CONFIG_FILE, Config};
use castra::core::failure::{Exit, Failure, Result};
use castra::core::name::VmName;
use castra::core::nearest::no_such_vm;
use castra::core::operations::lost;
use castra::core::operations::status::status_all;
use castra::core::process::shell_quote;
use castra::core::reporter::Silent;
use castra::core::root::alive::launched_vms;
use castra::core::root::paths::{StateRoot, castra_home, check_utf8};
use castra::core::root::project::Project;
use castra::core::root::records::{self, RunRecord, WorkspaceRecord};
use castra::core::status::{BrokerState, StatusOutcome};

use super::human;
use super::screen::Screen;
use crate::cli::{Command, Raw};

/// How many names a message lists; further ones are counted.
const NAMES_SHOWN: usize = 8;

/// A project, with or without a config that can still be read.
pub enum Selected {
    /// It has a config.
    Config(Box<Config>),
    /// Only the record of its workspace is left: the config was moved, removed or changed into
    /// another project's.
    Record(WorkspaceRecord),
}

impl Selected {
    /// Its state root.
    pub fn state(&self) -> StateRoot {
        match self {
            Selected::Config(config) => config.state.clone(),
            Selected::Record(record) => StateRoot::new(&record.state_root),
        }
    }

    /// The project as `status` takes it.
    pub fn project(&self) -> Project {
        match self {
            Selected::Config(config) => Project::from(config.as_ref()),
            Selected::Record(record) => Project::from(record),
        }
    }
}

/// castra's home: `$CASTRA_HOME`, or `~/.castra`.
pub fn home() -> Result<PathBuf> {
    let home = castra_home().ok_or_else(|| {
        Failure::new(Exit::NoInput, "castra has no home directory")
            .because("neither CASTRA_HOME nor HOME is set to a directory")
            .advice("set CASTRA_HOME to a directory castra may write to")
    })?;
    check_utf8(&home, "the directory")?;
    Ok(home)
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

/// The project, for commands that don't need its config. If none is selected, the failure names the projects
/// of which something runs.
pub fn project(raw: &Raw) -> Result<Selected> {
    follow_running_root(project_or(raw, none_found_but_running)?)
}

/// The project, if one is named or found here; for commands that work without one too.
pub fn project_if_any(raw: &Raw) -> Result<Option<Selected>> {
    if raw.config.is_none() && raw.workspace.is_none() {
        let here = env::current_dir().ok();
        return here
            .and_then(|here| config::discover(&here))
            .map(|path| follow_running_root(load(&path)?))
            .transpose();
    }
    follow_running_root(project_or(raw, none_found)?).map(Some)
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

/// A command is about what runs, also if castra.toml now names another state root.
fn follow_running_root(selected: Selected) -> Result<Selected> {
    let Selected::Config(config) = selected else {
        return Ok(selected);
    };
    let wanted = config.state.dir().to_owned();
    let (config, elsewhere) = lost::follow_running_root(*config)?;
    if let Some(elsewhere) = elsewhere {
        Screen.say(&format!(
            "note: castra.toml names the state root {}, but the project still has {}: this command is about those; `castra down` ends them",
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
    // Also if its config is gone, broken or another project's, a user must be able to look at what runs and
    // to stop it.
    match config_on_record(&record) {
        Some(config) => Selected::Config(Box::new(config)),
        None => Selected::Record(record),
    }
}

/// A VM of the project, and the role it has.
struct KnownVm {
    vm: VmName,
    role: String,
}

/// The VMs of the config, then VMs that are no longer in the config and may still run.
fn known(selected: &Selected) -> Result<Vec<KnownVm>> {
    let mut known: Vec<KnownVm> = match selected {
        Selected::Config(config) => config
            .vms
            .iter()
            .map(|vm| KnownVm {
                vm: vm.name.clone(),
                role: vm.role.clone(),
            })
            .collect(),
        Selected::Record(_) => Vec::new(),
    };
    let state = selected.state();
    for vm in launched_vms(&state)? {
        if !known.iter().any(|known| known.vm == vm) {
            // A VM whose record can't be read still has a name.
            let run: Option<RunRecord> = records::load(&state.vm(&vm).run()).ok().flatten();
            let role = run.map_or_else(|| vm.to_string(), |run| run.role);
            known.push(KnownVm { vm, role });
        }
    }
    Ok(known)
}

/// The VMs that a name means, compared without case: one of this name, else those of this role.
fn vms_named<'k>(known: &'k [KnownVm], name: &str) -> Vec<&'k VmName> {
    if let Some(one) = known
        .iter()
        .find(|known| known.vm.as_str().eq_ignore_ascii_case(name))
    {
        return vec![&one.vm];
    }
    let of_role = known.iter().filter(|known| known.role.eq_ignore_ascii_case(name));
    of_role.map(|known| &known.vm).collect()
}

/// Names as typed, with roles replaced by the names of their VMs. Unknown names stay: the operation decides
/// whether they are wrong.
pub fn vms(selected: &Selected, names: Vec<String>) -> Result<Vec<String>> {
    if names.is_empty() {
        return Ok(names);
    }
    let known = known(selected)?;
    let mut all: Vec<String> = Vec::new();
    for name in names {
        let meant: Vec<String> = vms_named(&known, &name)
            .into_iter()
            .map(VmName::to_string)
            .collect();
        for one in if meant.is_empty() { vec![name] } else { meant } {
            if !all.iter().any(|other| other.eq_ignore_ascii_case(&one)) {
                all.push(one);
            }
        }
    }
    Ok(all)
}

/// The one VM of this name or role, in the spelling of config or state root.
pub fn vm(selected: &Selected, name: &str) -> Result<VmName> {
    let known = known(selected)?;
    match vms_named(&known, name)[..] {
        [one] => Ok(one.clone()),
        [] => {
            let names: Vec<&str> = known.iter().map(|known| known.vm.as_str()).collect();
            Err(no_such_vm(name, &names))
        }
        ref several => Err(one_of(several, format!("{name:?} names {} VMs", several.len()))),
    }
}

/// The VM of a command that names none: the project's only VM.
pub fn only_vm(selected: &Selected, command: Command) -> Result<VmName> {
    let known = known(selected)?;
    match &known.iter().map(|known| &known.vm).collect::<Vec<_>>()[..] {
        [one] => Ok((*one).clone()),
        [] => Err(Failure::new(Exit::Usage, "this project has no VM")
            .advice("declare one under [[vms]] in castra.toml")),
        several => {
            let words = command.row().words;
            Err(one_of(
                several,
                format!("`castra {words}` needs the name of a VM"),
            ))
        }
    }
}

/// The failure of a command that must name one of these VMs.
fn one_of(several: &[&VmName], what: String) -> Failure {
    let names: Vec<&str> = several.iter().take(NAMES_SHOWN).map(|vm| vm.as_str()).collect();
    let more = match several.len() - names.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Failure::new(Exit::Usage, what)
        .because(format!("they are {}{more}", names.join(", ")))
        .advice(format!("name one, such as {}", names[0]))
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
        return failure.because("no castra project runs on this machine");
    }
    let lines: Vec<String> = running
        .iter()
        .map(|status| running_line(status, &command))
        .collect();
    failure
        .because(format!("these projects run:\n{}", lines.join("\n")))
        .advice(format!("castra --workspace {} {command}", running[0].workspace))
}

/// The command line, to be shown in advice.
fn typed_command(raw: &Raw) -> String {
    let mut line = raw
        .command
        .map_or("status", |command| command.row().words)
        .to_owned();
    for (number, word) in raw.operands.iter().enumerate() {
        // The words after the VM's name are the guest's command.
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

/// For people: `2 VMs and a broker run`.
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

/// How many VMs run.
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
