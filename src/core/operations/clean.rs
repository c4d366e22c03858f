//! `clean`: removes files of projects that don't run, and reports what it removed.
//!
//! Here: which projects, the order of steps, what stays and why. Not here: which files are castra's
//! (`core::clean`), the steps for one project (`operations::clean_project`), or taking VMs down
//! (`operations::down`).
//!
//! What stays by default: disks of VMs with `persist = true`, and what their next launch needs (their records
//! and host keys, the project's SSH key). What always stays: whatever runs, and whatever isn't castra's.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::core::clean::dir::{Dir, Kind};
use crate::core::clean::{Folder, Swept, sweep_folder};
use crate::core::config::{Config, workspace};
use crate::core::events::{Event, Severity, VmCounts};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, Holder, ImageUse};
use crate::core::images::images_dir;
use crate::core::lines::journal::Rotation;
use crate::core::operations::clean_project;
use crate::core::operations::run::Operation;
use crate::core::reporter::{Emitter, Reporter};
use crate::core::root::paths::{StateRoot, check_utf8};
use crate::core::root::records::{self, WorkspaceRecord};

/// One project to be cleaned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CleanTarget {
    /// Its name.
    pub project: String,
    /// Its id.
    pub workspace: String,
    /// Where its state is.
    pub state: StateRoot,
}

impl From<&Config> for CleanTarget {
    fn from(config: &Config) -> CleanTarget {
        CleanTarget {
            project: config.project.clone(),
            workspace: config.workspace.clone(),
            state: config.state.clone(),
        }
    }
}

impl From<&WorkspaceRecord> for CleanTarget {
    fn from(record: &WorkspaceRecord) -> CleanTarget {
        CleanTarget {
            project: record.project.clone(),
            workspace: record.id.clone(),
            state: StateRoot::new(&record.state_root),
        }
    }
}

impl CleanTarget {
    /// The project whose state root is this directory, known by the `workspace.json` in it.
    pub fn at(path: &Path) -> Result<CleanTarget> {
        let no_root = |why: String| {
            Failure::new(
                Exit::NoInput,
                format!("{} isn't a state root of castra", path.display()),
            )
            .because(why)
            .advice("`castra workspaces --json` names the state root of every project")
        };
        let root = path.canonicalize().map_err(|error| no_root(error.to_string()))?;
        check_utf8(&root, "the state root")?;
        let state = StateRoot::new(root);
        let record = state.workspace();
        let is_file = record.symlink_metadata().is_ok_and(|meta| meta.is_file());
        match is_file.then(|| records::load::<WorkspaceRecord>(&record)) {
            Some(Ok(Some(record))) => Ok(CleanTarget {
                project: record.project,
                workspace: record.id,
                state,
            }),
            Some(Err(failure)) => Err(no_root(failure.cause())),
            None | Some(Ok(None)) => Err(no_root(format!("there is no {}", record.display()))),
        }
    }
}

/// The options of `clean`.
#[derive(Clone, Debug)]
pub struct CleanOptions {
    /// The projects.
    pub targets: Vec<CleanTarget>,
    /// `CASTRA_HOME`, where projects are on record.
    pub home: Option<PathBuf>,
    /// What all projects share too: records of projects that are gone, the image cache, answers
    /// about accelerators. Takes `home`. Projects that run are then passed over instead of refused.
    pub global: bool,
    /// Say what would be removed, touch nothing.
    pub dry_run: bool,
    /// Logs stay.
    pub keep_logs: bool,
    /// Handshake records stay.
    pub keep_handshakes: bool,
    /// Persistent disks go too.
    pub force: bool,
    /// Rotation of the journal.
    pub rotation: Rotation,
}

impl CleanOptions {
    /// Everything of these projects but their persistent disks.
    pub fn of(targets: Vec<CleanTarget>, home: Option<PathBuf>) -> CleanOptions {
        CleanOptions {
            targets,
            home,
            global: false,
            dry_run: false,
            keep_logs: false,
            keep_handshakes: false,
            force: false,
            rotation: Rotation::default(),
        }
    }
}

/// The outcome of `clean`.
#[derive(Clone, Debug, Serialize)]
pub struct CleanOutcome {
    /// What was removed.
    pub removed: Vec<Removed>,
    /// What stays, and why.
    pub kept: Vec<Kept>,
    /// Bytes on disk of all that was removed.
    pub bytes: u64,
    /// Nothing was touched.
    pub dry_run: bool,
    /// How it ended.
    pub exit: Exit,
    /// How long it took, ms.
    pub elapsed_ms: u64,
}

/// Something that was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Of which project; null: of all.
    pub workspace: Option<String>,
    /// File or folder.
    pub path: PathBuf,
    /// overlay, vm, logs, handshakes, broker, digests, keys, workspace, image or accelerator.
    pub category: &'static str,
    /// Bytes on disk.
    pub bytes: u64,
}

/// Something that stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// Of which project; null: of all.
    pub workspace: Option<String>,
    /// File or folder.
    pub path: PathBuf,
    /// Why.
    pub why: String,
}

/// Cleans up. If one project is given and runs, that is refused; among several, a project that runs is
/// skipped and reported.
pub fn clean(options: CleanOptions, reporter: &mut dyn Reporter) -> Result<CleanOutcome> {
    if let ([only], false) = (options.targets.as_slice(), options.global) {
        clean_project::refuse_running(only)?;
    }
    let detail = detail_of(&options);
    let operation = match options.targets.as_slice() {
        // No event is written to a journal that is about to be removed, and a dry run writes nothing.
        [only] if options.keep_logs && !options.dry_run && only.state.logs().is_dir() => {
            Operation::accept("clean", detail, &only.state, options.rotation, reporter)
        }
        _ => Operation::accept_unkept("clean", detail, reporter),
    };
    let mut work = Work::new(&options, operation.emitter());
    for target in &options.targets {
        work.clean_project(target);
    }
    if options.global
        && let Some(home) = &options.home
    {
        work.clean_shared(home);
    }
    let Work {
        removed,
        kept,
        failures,
        vms,
        ..
    } = work;
    let bytes = removed.iter().map(|removed| removed.bytes).sum();
    let exit = if failures.is_empty() {
        Exit::Done
    } else {
        Exit::Failed
    };
    let elapsed_ms = operation.emitter().elapsed_ms();
    let detail = failures.first().map(Failure::cause);
    operation.end(exit, detail, vms, bytes);
    Ok(CleanOutcome {
        removed,
        kept,
        bytes,
        dry_run: options.dry_run,
        exit,
        elapsed_ms,
    })
}

fn detail_of(options: &CleanOptions) -> Option<String> {
    let words = [
        (options.dry_run, "--dry-run"),
        (options.global, "--global"),
        (options.keep_logs, "--no-logs"),
        (options.keep_handshakes, "--no-handshakes"),
        (options.force, "--force"),
    ];
    let given: Vec<&str> = words
        .iter()
        .filter(|(is, _)| *is)
        .map(|(_, word)| *word)
        .collect();
    (!given.is_empty()).then(|| given.join(" "))
}

/// A running `clean`: its options and its results so far.
pub(crate) struct Work<'w, 'e> {
    pub options: &'w CleanOptions,
    pub emitter: &'w Emitter<'e>,
    removed: Vec<Removed>,
    kept: Vec<Kept>,
    failures: Vec<Failure>,
    pub vms: VmCounts,
    /// A remaining project may need the shared images.
    images_are_needed: bool,
}

impl<'w, 'e> Work<'w, 'e> {
    fn new(options: &'w CleanOptions, emitter: &'w Emitter<'e>) -> Work<'w, 'e> {
        Work {
            options,
            emitter,
            removed: Vec::new(),
            kept: Vec::new(),
            failures: Vec::new(),
            vms: VmCounts::default(),
            images_are_needed: false,
        }
    }

    fn clean_project(&mut self, target: &CleanTarget) {
        match clean_project::clean(self, target) {
            Ok(disks_stay) => self.images_are_needed |= disks_stay,
            Err(failure) => {
                self.images_are_needed = true;
                self.fail(failure);
            }
        }
    }

    /// Records and reports a removal, if there was anything to remove.
    pub(crate) fn removed(
        &mut self,
        workspace: Option<&str>,
        path: PathBuf,
        category: &'static str,
        swept: Swept,
    ) {
        for failure in swept.failed {
            self.fail(failure);
        }
        for path in swept.foreign {
            self.keep(workspace, path, "castra didn't make it");
        }
        if swept.files == 0 {
            return;
        }
        self.emitter.emit(Event::Cleanup {
            path: path.clone(),
            category: category.to_owned(),
            bytes: swept.bytes,
            dry_run: self.options.dry_run,
        });
        self.removed.push(Removed {
            workspace: workspace.map(str::to_owned),
            path,
            category,
            bytes: swept.bytes,
        });
    }

    /// Records and reports a file that stays.
    pub(crate) fn keep(&mut self, workspace: Option<&str>, path: PathBuf, why: &str) {
        let text = format!("{} stays: {why}", path.display());
        self.emitter.emit(Event::message(Severity::Info, None, text));
        self.kept.push(Kept {
            workspace: workspace.map(str::to_owned),
            path,
            why: why.to_owned(),
        });
    }

    /// Records and reports an error; the rest goes on.
    pub(crate) fn fail(&mut self, failure: Failure) {
        self.emitter
            .emit(Event::of_failure(Severity::Error, None, &failure));
        self.failures.push(failure);
    }

    /// Cleans what projects share.
    fn clean_shared(&mut self, home: &Path) {
        self.forget_lost_projects(home);
        let images = images_dir(home);
        match self.who_needs_images(home, &images) {
            Some(why) if images.is_dir() => self.keep(None, images, &why),
            Some(_) => {}
            None => self.clean_images(home, images),
        }
        let accel = home.join("accel.json");
        if let Ok(dir) = Dir::open(home) {
            let swept = remove_named(&dir, "accel.json", self.options.dry_run);
            self.removed(None, accel, "accelerator", swept);
        }
    }

    /// Entries of projects whose state root is gone.
    fn forget_lost_projects(&mut self, home: &Path) {
        for id in workspace::lost_workspaces(home) {
            let path = workspace::projects_dir(home).join(&id).join("workspace.json");
            let swept = Swept {
                files: 1,
                bytes: host::disk_usage(&path),
                ..Swept::default()
            };
            if !self.options.dry_run
                && let Err(failure) = workspace::forget_workspace(home, &id)
            {
                self.fail(failure);
                continue;
            }
            self.removed(Some(&id), path, "workspace", swept);
        }
    }

    /// Why the image cache must stay; `None`: it can go.
    fn who_needs_images(&self, home: &Path, images: &Path) -> Option<String> {
        if self.images_are_needed {
            return Some("a remaining project may need its images".to_owned());
        }
        let cleaned = |record: &WorkspaceRecord| {
            let mut targets = self.options.targets.iter();
            targets.any(|target| target.state.dir() == record.state_root)
        };
        let other = workspace::list_workspaces(home)
            .into_iter()
            .find(|record| !cleaned(record));
        if let Some(other) = other {
            return Some(format!("project {} may need its images", other.id));
        }
        // Images that another castra builds or fetches now, or that a process has open.
        for dir in [images.to_owned(), images.join("download")] {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                let name = entry.file_name();
                let is_lock = name.to_str().is_some_and(|name| name.ends_with(".lock"));
                if is_lock && host::lock_holder(&path) != Holder::Nobody {
                    return Some(format!("{} is locked: an image is being made", path.display()));
                }
                if !is_lock && path.is_file() && host::image_use(&path) != ImageUse::Unlocked {
                    return Some(format!("{} is in use", path.display()));
                }
            }
        }
        None
    }

    fn clean_images(&mut self, home: &Path, images: PathBuf) {
        let swept = match Dir::open(home) {
            Ok(home) => sweep_folder(&home, "images", Folder::ImageCache, self.options.dry_run),
            Err(_) => return,
        };
        self.removed(None, images, "image", swept);
    }
}

/// Removes one file of castra's in a directory; a link or folder of its name isn't castra's.
pub(crate) fn remove_named(dir: &Dir, name: &str, dry_run: bool) -> Swept {
    let path = dir.path().join(name);
    let mut swept = Swept::default();
    match dir.entry(name) {
        Ok(None) => {}
        Ok(Some(entry)) if matches!(entry.kind, Kind::File | Kind::Socket) => {
            match if dry_run { Ok(()) } else { dir.remove_file(name) } {
                Ok(()) => {
                    swept.files = 1;
                    swept.bytes = entry.bytes;
                }
                Err(error) => swept.failed.push(Failure::io("remove", &path, &error)),
            }
        }
        Ok(Some(_)) => swept.foreign.push(path),
        Err(error) => swept.failed.push(Failure::io("read", &path, &error)),
    }
    swept
}
