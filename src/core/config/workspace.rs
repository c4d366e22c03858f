//! Projects by id: which workspaces this user has, wherever their config files lie.
//!
//! A project's entry in the registry is `<castra home>/projects/<id>/workspace.json`. By default
//! that directory is also the project's state root. A project with a `state_dir` keeps its state
//! there, with the same `workspace.json` in it; the directory under `projects/` then holds only
//! that file, whose `state_root` names the state root. So `projects/` lists all projects.
//!
//! Here: ids, the record's path, reading and writing it, the project that it stands for. Not here: what else is in a
//! state root (`core::root::paths`), or whether anything runs there (`core::status`).

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::launched::launch_settings;
use super::{BrokerConfig, Config, PortChoice, PortForward, load, with_ssh};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::nearest::nearest;
use crate::core::root::paths::StateRoot;
use crate::core::root::project::{Declared, Project};
use crate::core::root::records::{self, ForwardRecord, WorkspaceRecord};

/// Longest readable part of an id; a longer project name is cut.
const MAX_SLUG: usize = 40;

/// How many former state roots of a project are remembered.
const MAX_FORMER: usize = 16;

/// Where a castra home keeps its projects.
pub fn projects_dir(castra_home: &Path) -> PathBuf {
    castra_home.join("projects")
}

/// `<slug>-<hash8>`: the project's name, and the directory of its config file so that two
/// projects of one name differ. The directory must be canonical.
pub fn id(project: &str, dir: &Path) -> String {
    let digest = Sha256::digest(dir.as_os_str().as_bytes());
    let hash: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{hash}", slug(project))
}

/// Lower-case letters and digits, everything else one `-`; `project` where nothing is left.
pub fn slug(project: &str) -> String {
    let mut slug = String::new();
    for letter in project.chars() {
        if letter.is_ascii_alphanumeric() {
            slug.push(letter.to_ascii_lowercase());
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
        if slug.len() == MAX_SLUG {
            break;
        }
    }
    let slug = slug.trim_matches('-');
    if slug.is_empty() { "project" } else { slug }.to_owned()
}

/// The default project name: that of the config file's directory.
pub(super) fn folder_name(dir: &Path) -> String {
    let name = dir
        .file_name()
        .map(|name| name.to_string_lossy())
        .unwrap_or_default();
    let name: String = name.chars().filter(|c| !c.is_control()).take(100).collect();
    if name.trim().is_empty() {
        "project".to_owned()
    } else {
        name.trim().to_owned()
    }
}

impl From<&Config> for Project {
    fn from(config: &Config) -> Project {
        let declared = config.vms.iter().map(|vm| Declared {
            name: vm.name.clone(),
            role: vm.role.clone(),
            cpus: vm.cpus,
            memory_bytes: vm.memory_bytes,
            forwards: with_ssh(&vm.port_forwards).iter().map(recorded).collect(),
            settings: launch_settings(config, vm),
        });
        Project {
            project: config.project.clone(),
            workspace: config.workspace.clone(),
            config_path: config.path.clone(),
            state: config.state.clone(),
            freshness: config.broker.freshness,
            broker_port: match config.broker.port {
                PortChoice::Exactly(port) => Some(port),
                PortChoice::Preferred | PortChoice::Free => None,
            },
            vms: Some(declared.collect()),
        }
    }
}

fn recorded(forward: &PortForward) -> ForwardRecord {
    ForwardRecord {
        host: forward.host,
        guest: forward.guest,
        protocol: forward.protocol,
    }
}

impl From<&WorkspaceRecord> for Project {
    /// A project whose config was moved or removed, or can't be understood.
    fn from(record: &WorkspaceRecord) -> Project {
        Project {
            project: record.project.clone(),
            workspace: record.id.clone(),
            config_path: record.config_path.clone(),
            state: StateRoot::new(&record.state_root),
            freshness: BrokerConfig::default().freshness,
            broker_port: None,
            vms: None,
        }
    }
}

/// The config of a project on record, if it is there, can be understood, and still is this project's.
pub fn config_on_record(record: &WorkspaceRecord) -> Option<Config> {
    let config = load(&record.config_path).ok()?;
    record.is_of(&config.workspace, &config.state).then_some(config)
}

/// A project on record, with what its config declares if that is still its own.
pub fn project_on_record(record: &WorkspaceRecord) -> Project {
    match config_on_record(record) {
        Some(config) => Project::from(&config),
        None => Project::from(record),
    }
}

/// Writes the project's record into its state root and, if the state root isn't under the castra
/// home, the project's entry there. For operations that change something; makes the directories,
/// mode 0700. Such a project works without the entry, so the error of an entry that can't be
/// written is returned as a warning.
pub fn record_workspace(config: &Config) -> Result<Option<Failure>> {
    let record = WorkspaceRecord {
        id: config.workspace.clone(),
        project: config.project.clone(),
        config_path: config.path.clone(),
        state_root: config.state.dir().to_owned(),
        former_roots: former_roots(config)
            .into_iter()
            .filter(|root| host::is_there(root))
            .take(MAX_FORMER)
            .collect(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    write_record(config.state.dir(), &record)?;
    let entry = config
        .registry
        .as_deref()
        .filter(|entry| *entry != config.state.dir());
    Ok(entry.and_then(|entry| write_record(entry, &record).err()))
}

fn write_record(dir: &Path, record: &WorkspaceRecord) -> Result<()> {
    let file = dir.join(WORKSPACE_FILE);
    // Every `up` calls this; an unchanged record isn't written again.
    if read_record(&file).as_ref() == Some(record) {
        return Ok(());
    }
    let mut private = DirBuilder::new();
    private.recursive(true).mode(0o700);
    private
        .create(dir)
        .map_err(|error| Failure::io("create", dir, &error))?;
    records::save(&file, record)
}

/// Removes the entry of a project whose state root lies elsewhere, after that root was removed.
/// A directory that holds more than the entry stays.
pub fn forget_workspace(castra_home: &Path, id: &str) -> Result<()> {
    if Path::new(id).file_name() != Some(id.as_ref()) {
        return Err(Failure::new(
            Exit::NoInput,
            format!("there is no workspace {id:?}"),
        ));
    }
    let dir = projects_dir(castra_home).join(id);
    let file = dir.join(WORKSPACE_FILE);
    match fs::remove_file(&file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Failure::io("remove", &file, &error));
        }
        _ => {}
    }
    let _ = fs::remove_dir(&dir);
    Ok(())
}

/// Why projects can't be listed: the registry, or entries of it, can't be read. Damaged entries
/// don't count.
pub fn unreadable_workspaces(castra_home: &Path) -> Vec<Failure> {
    let dir = projects_dir(castra_home);
    let failed = |path: &Path, error: io::Error| Failure::io("read", path, &error);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if host::is_absent_error(&error) => return Vec::new(),
        Err(error) => return vec![failed(&dir, error)],
    };
    let mut unreadable: Vec<Failure> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path().join(WORKSPACE_FILE);
            let error = host::open_state_file(&path).err()?;
            let is_hidden = error.kind() == io::ErrorKind::PermissionDenied;
            is_hidden.then(|| failed(&path, error))
        })
        .collect();
    unreadable.sort_by(|a, b| a.what.cmp(&b.what));
    unreadable
}

/// Ids of projects whose state root doesn't exist any more.
pub fn lost_workspaces(castra_home: &Path) -> Vec<String> {
    records_without_root(castra_home)
        .into_iter()
        .map(|record| record.id)
        .collect()
}

/// Projects on record whose state root is gone, by id.
pub fn records_without_root(castra_home: &Path) -> Vec<WorkspaceRecord> {
    let entries = fs::read_dir(projects_dir(castra_home)).into_iter().flatten();
    let mut lost: Vec<WorkspaceRecord> = entries
        .filter_map(|entry| {
            let id = entry.ok()?.file_name().into_string().ok()?;
            let record = record_in(&projects_dir(castra_home).join(&id))?;
            let is_gone = record.state_root.is_absolute() && !host::is_there(&record.state_root);
            (record.id == id && is_gone).then_some(record)
        })
        .collect();
    lost.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    lost
}

/// Former state roots of the project: those that the registry remembers, and the default one. They
/// may not exist any more.
pub fn former_roots(config: &Config) -> Vec<PathBuf> {
    let entry = config.registry.as_deref();
    entry
        .map(|entry| former_roots_of(entry, &config.state))
        .unwrap_or_default()
}

/// The same by the project's entry in the registry.
pub fn former_roots_of(entry: &Path, state: &StateRoot) -> Vec<PathBuf> {
    let mut roots = Vec::new();
    if let Some(record) = record_in(entry) {
        roots.push(record.state_root);
        roots.extend(record.former_roots);
    }
    // The entry of a project with a `state_dir` is one file. If that can't be read, the project
    // does without its entry.
    if StateRoot::new(entry).vms().is_dir() {
        roots.push(entry.to_owned());
    }
    let mut former: Vec<PathBuf> = Vec::new();
    for root in roots {
        if root.is_absolute() && root != state.dir() && !former.contains(&root) {
            former.push(root);
        }
    }
    former
}

/// The record in a state root or an entry.
pub fn record_in(dir: &Path) -> Option<WorkspaceRecord> {
    read_record(&dir.join(WORKSPACE_FILE))
}

/// Every project on record whose state root still exists, by id. Unreadable records are skipped:
/// one damaged record must not hide the others.
pub fn list_workspaces(castra_home: &Path) -> Vec<WorkspaceRecord> {
    let Ok(entries) = fs::read_dir(projects_dir(castra_home)) else {
        return Vec::new();
    };
    let mut found: Vec<WorkspaceRecord> = entries
        .filter_map(|entry| {
            let dir = entry.ok()?.path();
            let record = read_record(&dir.join(WORKSPACE_FILE))?;
            let is_own = dir.file_name().is_some_and(|name| name == record.id.as_str());
            (is_own && record.state_root.is_absolute() && host::is_there(&record.state_root))
                .then_some(record)
        })
        .collect();
    found.sort_by(|a, b| a.id.cmp(&b.id));
    found
}

/// The project of this id, or of this name if only one project has it.
pub fn find_workspace(castra_home: &Path, wanted: &str) -> Result<WorkspaceRecord> {
    let mut all = list_workspaces(castra_home);
    if all.is_empty()
        && let Some(failure) = unreadable_workspaces(castra_home).into_iter().next()
    {
        return Err(failure);
    }
    if let Some(index) = all.iter().position(|record| record.id == wanted) {
        return Ok(all.swap_remove(index));
    }
    let named: Vec<&WorkspaceRecord> = all.iter().filter(|record| record.project == wanted).collect();
    let missing = Failure::new(Exit::NoInput, format!("there is no workspace {wanted:?}"));
    match named.as_slice() {
        [only] => Ok((*only).clone()),
        [] => {
            let known = all
                .iter()
                .flat_map(|record| [record.id.as_str(), record.project.as_str()]);
            Err(match nearest(wanted, known) {
                Some(meant) => missing.advice(format!(
                    "did you mean `--workspace {meant}`? `castra workspaces` lists all"
                )),
                None => missing.advice("`castra workspaces` lists all; `castra up` adds a project to them"),
            })
        }
        several => {
            let ids: Vec<&str> = several.iter().map(|record| record.id.as_str()).collect();
            Err(missing
                .because(format!("{} projects have this name", several.len()))
                .advice(format!("name one by its id: {}", ids.join(", "))))
        }
    }
}

/// The record's file name in a state root and in an entry; `StateRoot::workspace` is the same file.
const WORKSPACE_FILE: &str = "workspace.json";

fn read_record(path: &Path) -> Option<WorkspaceRecord> {
    records::load(path).ok().flatten()
}
