//! `init`: a castra.toml to start from.
//!
//! Here: the starter file and writing it without replacing another file. Not here: the schema it follows
//! (`core::config`, docs/CONFIG.md).

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::core::config::{CONFIG_FILE, workspace};
use crate::core::events::VmCounts;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::lines::journal::Rotation;
use crate::core::operations::run::Operation;
use crate::core::reporter::Reporter;
use crate::core::root::paths::{StateRoot, castra_home, check_utf8};

/// The starter, with `@PROJECT@` in the place of the name.
const TEMPLATE: &str = include_str!("init.toml");

/// What to write, and where.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// The project's directory.
    pub dir: PathBuf,
    /// Its name; unset: the folder's.
    pub project_name: Option<String>,
    /// The file, relative to `dir`; unset: `castra.toml`.
    pub output: Option<PathBuf>,
    /// Replace a file that is there.
    pub force: bool,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitOutcome {
    /// The file.
    pub path: PathBuf,
    /// The project's name in it.
    pub project: String,
}

/// Writes the starter. A refusal (a bad name, an existing file) emits no event: nothing ran.
pub fn init(options: InitOptions, reporter: &mut dyn Reporter) -> Result<InitOutcome> {
    let dir = fs::canonicalize(&options.dir).map_err(|error| {
        Failure::new(
            Exit::NoInput,
            format!("can't use the directory {}", options.dir.display()),
        )
        .because(error)
    })?;
    let path = dir.join(options.output.as_deref().unwrap_or(Path::new(CONFIG_FILE)));
    check_utf8(&path, "the config")?;
    check_place(&path, options.force)?;
    let folder = path.parent().unwrap_or(&dir);
    let project = match &options.project_name {
        Some(name) => checked_name(name)?,
        None => folder_project(folder),
    };

    let detail = Some(path.display().to_string());
    let operation = match state_root_of(&project, folder) {
        Some(state) => Operation::accept("init", detail.clone(), &state, Rotation::default(), reporter),
        None => Operation::accept_unkept("init", detail.clone(), reporter),
    };
    if let Err(failure) = write(&path, &starter(&project), options.force) {
        return Err(operation.fail(failure, VmCounts::default()));
    }
    operation.end(Exit::Done, detail, VmCounts::default(), 0);
    Ok(InitOutcome { path, project })
}

/// The state root that the new config will have, if it exists: if a project that has been up gets a new
/// config, its journal records that. `init` doesn't make the state root, so that it leaves only one file.
fn state_root_of(project: &str, folder: &Path) -> Option<StateRoot> {
    let folder = fs::canonicalize(folder).ok()?;
    let root = workspace::projects_dir(&castra_home()?).join(workspace::id(project, &folder));
    root.is_dir().then(|| StateRoot::new(root))
}

/// The text of a starter for a project of this name.
fn starter(project: &str) -> String {
    let escaped = project.replace('\\', "\\\\").replace('"', "\\\"");
    TEMPLATE.replace("@PROJECT@", &escaped)
}

fn checked_name(name: &str) -> Result<String> {
    let name = name.trim();
    if name.is_empty() || name.chars().count() > 100 || name.chars().any(char::is_control) {
        return Err(
            Failure::new(Exit::Usage, format!("a project can't be called {name:?}"))
                .advice("use 1 to 100 characters without line breaks, for example `demo`"),
        );
    }
    Ok(name.to_owned())
}

/// A folder's name with what is awkward in listings and shells replaced.
fn folder_project(folder: &Path) -> String {
    let name = folder
        .file_name()
        .map(|name| name.to_string_lossy())
        .unwrap_or_default();
    let kept = |c: char| c.is_alphanumeric() || "._-".contains(c);
    let name: String = name
        .chars()
        .take(100)
        .map(|c| if kept(c) { c } else { '-' })
        .collect();
    match name.trim_matches('-') {
        "" => workspace::slug(""),
        name => name.to_owned(),
    }
}

fn check_place(path: &Path, force: bool) -> Result<()> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => Err(Failure::new(Exit::CantCreate, format!("{shown} is a directory"))
            .advice(format!("name a file: {}", path.join(CONFIG_FILE).display()))),
        Ok(_) if !force => Err(in_the_way(path)),
        _ if !path.parent().is_some_and(Path::is_dir) => {
            Err(Failure::new(Exit::CantCreate, format!("can't create {shown}"))
                .because("its directory doesn't exist")
                .advice("make the directory first"))
        }
        _ => Ok(()),
    }
}

fn in_the_way(path: &Path) -> Failure {
    Failure::new(Exit::CantCreate, format!("{} already exists", path.display()))
        .advice("edit it, replace it with `--force`, or name another file with `--output`")
}

/// A new file is made in its place, so that one which appeared meanwhile is kept. A replaced one is
/// whole at every moment: written beside it first, then renamed.
fn write(path: &Path, text: &str, force: bool) -> Result<()> {
    let target = if force {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".new-{}", std::process::id()));
        path.with_file_name(name)
    } else {
        path.to_owned()
    };
    let opened = OpenOptions::new().write(true).create_new(true).open(&target);
    let mut file = opened.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists if !force => in_the_way(path),
        _ => Failure::io("create", path, &error),
    })?;
    let written = file.write_all(text.as_bytes()).and_then(|()| match force {
        true => fs::rename(&target, path),
        false => Ok(()),
    });
    written.map_err(|error| {
        let _ = fs::remove_file(&target);
        Failure::io("create", path, &error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::config;
    use crate::core::events::contract::Stamped;
    use crate::core::scratch::Scratch;

    fn options(dir: &Path) -> InitOptions {
        InitOptions {
            dir: dir.to_owned(),
            project_name: None,
            output: None,
            force: false,
        }
    }

    #[test]
    fn the_starter_loads_without_a_warning() {
        let scratch = Scratch::new("init");
        let dir = scratch.path("My demo (2)");
        fs::create_dir(&dir).unwrap();
        let mut events: Vec<Stamped> = Vec::new();
        let outcome = init(options(&dir), &mut events).unwrap();
        assert_eq!(outcome.project, "My-demo--2");
        assert_eq!(outcome.path, fs::canonicalize(&dir).unwrap().join("castra.toml"));
        let config = config::load_with_home(&outcome.path, Some(&scratch.path("home"))).unwrap();
        assert_eq!(config.warnings, Vec::<String>::new());
        assert_eq!(config.project, outcome.project);
        assert!(config.vms.iter().all(config::VmConfig::is_default_guest));
        assert!(!config.vms.is_empty());
        let types: Vec<&str> = events
            .iter()
            .map(|stamped| stamped.event.contract_type())
            .collect();
        assert_eq!(types, ["command.accepted", "command.completed", "summary"]);
        let left: Vec<_> = fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["castra.toml"]);
    }

    /// What the starter offers in comments must work when the marks are taken off.
    #[test]
    fn what_the_starter_offers_loads_too() {
        let scratch = Scratch::new("init-offers");
        let offered: String = starter("demo")
            .lines()
            .map(|line| {
                let start = line.trim_start();
                let is_key = start
                    .strip_prefix("# ")
                    .is_some_and(|rest| rest.starts_with('[') || rest.split_whitespace().nth(1) == Some("="));
                if is_key {
                    start.replacen("# ", "", 1)
                } else {
                    line.to_owned()
                }
            })
            .map(|line| line + "\n")
            .collect();
        let path = scratch.path("castra.toml");
        fs::write(&path, &offered).unwrap();
        let config = config::load_with_home(&path, Some(&scratch.path("home")))
            .unwrap_or_else(|failure| panic!("{failure}\n{offered}"));
        assert_eq!(config.warnings, Vec::<String>::new());
        assert!(config.vms.len() > 1);
    }

    #[test]
    fn nobody_is_overwritten() {
        let scratch = Scratch::new("init-there");
        let path = scratch.path("castra.toml");
        fs::write(&path, "mine").unwrap();
        let mut events: Vec<Stamped> = Vec::new();
        let failure = init(options(scratch.dir()), &mut events).unwrap_err();
        assert_eq!(failure.exit, Exit::CantCreate);
        assert!(failure.next.unwrap().contains("--force"));
        assert!(events.is_empty());
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        let forced = InitOptions {
            force: true,
            project_name: Some("a \"b\" \\ c".to_owned()),
            ..options(scratch.dir())
        };
        let outcome = init(forced, &mut events).unwrap();
        let config = config::load_with_home(&outcome.path, Some(&scratch.path("home"))).unwrap();
        assert_eq!(config.project, "a \"b\" \\ c");
    }

    #[test]
    fn refusals_name_the_way_on() {
        let scratch = Scratch::new("init-bad");
        fs::create_dir(scratch.path("sub")).unwrap();
        let base = options(scratch.dir());
        let name = |name: &str| InitOptions {
            project_name: Some(name.to_owned()),
            ..base.clone()
        };
        let output = |path: &str| InitOptions {
            output: Some(path.into()),
            force: true,
            ..base.clone()
        };
        let elsewhere = InitOptions {
            dir: scratch.path("missing"),
            ..base.clone()
        };
        for (options, exit) in [
            (name(" "), Exit::Usage),
            (name("a\nb"), Exit::Usage),
            (name(&"x".repeat(101)), Exit::Usage),
            (output("sub"), Exit::CantCreate),
            (output("missing/castra.toml"), Exit::CantCreate),
            (elsewhere, Exit::NoInput),
        ] {
            let failure = init(options.clone(), &mut crate::core::reporter::Silent).unwrap_err();
            assert_eq!(failure.exit, exit, "{options:?}");
        }
        assert_eq!(fs::read_dir(scratch.dir()).unwrap().count(), 1);
        let named = InitOptions {
            output: Some("sub/other.toml".into()),
            ..base.clone()
        };
        let outcome = init(named, &mut crate::core::reporter::Silent).unwrap();
        assert_eq!(outcome.project, "sub");
    }
}
