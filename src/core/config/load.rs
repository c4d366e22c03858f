//! From a path to a checked [`Config`]; finding that path.
//!
//! Here: loading one file, and searching `castra.toml` up the directory tree. Not here: what the
//! tables mean (the other modules of `config`), the registry of projects (`workspace`).

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use super::metadata::MetadataFiles;
use super::path_values::PathBases;
use super::reader::Section;
use super::source::{Source, failure_of};
use super::{
    BrokerConfig, BusConfig, Config, LifecycleConfig, PortChoice, Protocol, QemuConfig, VmConfig, settings,
    vms, workspace,
};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::root::paths::{StateRoot, castra_home, check_utf8};

/// The file name that is searched for.
pub const CONFIG_FILE: &str = "castra.toml";

/// The broker's default port; if it is taken, another one is used.
const PREFERRED_PORT: u16 = 7070;

/// What a config needs from the environment. Explicit, so that embedders and tests can choose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `~/.castra` or `$CASTRA_HOME`: the default place of state roots, and the place of the
    /// registry.
    pub castra_home: Option<PathBuf>,
    /// What `~/` means in paths.
    pub user_home: Option<PathBuf>,
}

impl Environment {
    /// The environment of this process: `CASTRA_HOME` and `HOME`.
    pub fn of_process() -> Environment {
        Environment {
            castra_home: castra_home(),
            user_home: env::var_os("HOME")
                .map(PathBuf::from)
                .filter(|home| home.is_absolute()),
        }
    }
}

/// Loads a config file. An error in its content is `Exit::Config`, with a message that begins
/// `castra.toml:LINE:COLUMN: `; a missing file is `Exit::NoInput`.
pub fn load(path: &Path) -> Result<Config> {
    load_in(path, &Environment::of_process())
}

/// The same with this directory instead of `~/.castra`, and without a home directory.
pub fn load_with_home(path: &Path, castra_home: Option<&Path>) -> Result<Config> {
    let environment = Environment {
        castra_home: castra_home.map(Path::to_owned),
        user_home: None,
    };
    load_in(path, &environment)
}

/// The same with an explicit environment.
pub fn load_in(path: &Path, environment: &Environment) -> Result<Config> {
    let source = Source::read(path)?;
    let path = canonical(path)?;
    check_utf8(&path, "the config")?;
    parse(&source, &path, environment)
}

/// Every key that reading this file looked for, as `section.key`; those of a `bootstrap.toml` with
/// the file's name and a colon before them.
#[cfg(test)]
pub(super) fn parse_keys(path: &Path, environment: &Environment) -> std::collections::BTreeSet<String> {
    let source = Source::read(path).expect("the file is there");
    let (table, _) = DeTable::parse_recoverable(&source.text);
    let mut metadata = MetadataFiles::default();
    let _ = read_tables(
        &source,
        table.get_ref(),
        &places_of(path, environment),
        &mut metadata,
    );
    let mut keys = source.keys();
    keys.extend(
        metadata
            .keys
            .iter()
            .map(|key| format!("{}:{key}", super::metadata::FILE)),
    );
    keys
}

/// `castra.toml` in this directory or the nearest one above it that has one.
pub fn discover(start: &Path) -> Option<PathBuf> {
    let start = fs::canonicalize(start).ok()?;
    start
        .ancestors()
        .map(|dir| dir.join(CONFIG_FILE))
        // One that may not be looked at is told of when it is loaded, and not passed by.
        .find(|path| match fs::metadata(path) {
            Ok(meta) => meta.is_file(),
            Err(error) => !host::is_absent_error(&error),
        })
}

/// The directory with its symbolic links resolved, the file's own name kept: a config that is
/// itself a link belongs to the project it is found in.
fn canonical(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().map(PathBuf::from);
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let resolved = match &name {
        Some(name) => fs::canonicalize(dir).map(|dir| dir.join(name)),
        None => fs::canonicalize(path),
    };
    resolved.map_err(|error| Failure::io("read", path, &error))
}

fn parse(source: &Source, path: &Path, environment: &Environment) -> Result<Config> {
    let (table, errors) = DeTable::parse_recoverable(&source.text);
    if !errors.is_empty() {
        // What could be read of a broken file would only yield errors that aren't there.
        source.syntax_errors(&errors);
        source.check()?;
    }
    let bases = places_of(path, environment);
    let mut metadata = MetadataFiles::default();
    let tables = read_tables(source, table.get_ref(), &bases, &mut metadata);
    if metadata.errors.is_empty() {
        source.check()?;
    } else {
        let mut errors = source.errors();
        errors.append(&mut metadata.errors);
        return Err(failure_of(&source.name, &errors));
    }

    let Tables {
        project,
        mut broker,
        vms,
        ..
    } = tables;
    // A VM that was promised the broker's usual port gets it.
    let takes_preferred = |vm: &VmConfig| {
        let mut forwards = vm.port_forwards.iter();
        forwards.any(|forward| forward.host == PREFERRED_PORT && forward.protocol == Protocol::Tcp)
    };
    if broker.port == PortChoice::Preferred && vms.iter().any(takes_preferred) {
        broker.port = PortChoice::Free;
    }

    let dir = bases.dir;
    let project_name = project.name.unwrap_or_else(|| workspace::folder_name(&dir));
    let id = workspace::id(&project_name, &dir);
    let registry = environment
        .castra_home
        .as_ref()
        .map(|home| workspace::projects_dir(home).join(&id));
    let Some(state) = project.state_dir.or_else(|| registry.clone()) else {
        return Err(
            Failure::new(Exit::Config, "there is no place to keep the project's state")
                .because("neither CASTRA_HOME nor HOME is set, and `state_dir` isn't either")
                .advice("set CASTRA_HOME, or write `state_dir = \".castra/state\"` under [project]"),
        );
    };
    check_utf8(&state, "the state root")?;
    if let Some(registry) = &registry {
        check_utf8(registry, "the registry")?;
    }
    let mut warnings = source.warnings();
    warnings.append(&mut metadata.warnings);
    Ok(Config {
        path: path.to_owned(),
        dir,
        project: project_name,
        workspace: id,
        state: StateRoot::new(state),
        registry,
        qemu: tables.qemu,
        broker,
        bus: tables.bus,
        lifecycle: tables.lifecycle,
        vizier_enabled: tables.vizier_enabled,
        vms,
        warnings,
    })
}

/// What the tables of one file say; worth nothing if its source holds errors.
struct Tables {
    project: settings::Project,
    qemu: QemuConfig,
    broker: BrokerConfig,
    bus: BusConfig,
    lifecycle: LifecycleConfig,
    vizier_enabled: bool,
    vms: Vec<VmConfig>,
}

fn read_tables<'a>(
    source: &'a Source,
    table: &'a DeTable<'a>,
    bases: &PathBases,
    metadata: &mut MetadataFiles,
) -> Tables {
    let mut root = Section::root(source, table);
    settings::version(&mut root);
    let project = settings::project(&mut root, bases);
    let qemu = settings::qemu(&mut root, bases);
    let (broker, broker_port) = settings::broker(&mut root);
    let bus = settings::bus(&mut root, broker.freshness);
    let lifecycle = settings::lifecycle(&mut root);
    let vizier_enabled = settings::vizier_enabled(&mut root);
    settings::workflows(&mut root);
    let vms = vms::vms(&mut root, bases, broker_port.as_ref(), metadata);
    root.finish();
    Tables {
        project,
        qemu,
        broker,
        bus,
        lifecycle,
        vizier_enabled,
        vms,
    }
}

fn places_of(path: &Path, environment: &Environment) -> PathBases {
    PathBases {
        dir: path.parent().unwrap_or(Path::new("/")).to_owned(),
        home: environment.user_home.clone(),
    }
}
