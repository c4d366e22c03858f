//! `report`: what the last runs of a project did, as a model, and that model as a page in a file.
//!
//! Here: the options, and where a page may be written. Not here: where the model comes from and how
//! it is drawn (`core::report`). A reading command: beside the page it writes nothing, and nothing is
//! journaled.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::report::gather::{RunFilter, gather};
use crate::core::report::html;
use crate::core::report::model::{Report, SCHEMA};
use crate::core::reporter::{Reporter, wall_clock};
use crate::core::root::paths::StateRoot;

/// How many runs a report has by default.
pub const DEFAULT_RUNS: usize = 5;

/// Which runs are wanted.
#[derive(Clone, Debug)]
pub struct ReportOptions {
    /// Whose runs.
    pub state: StateRoot,
    /// The project's name.
    pub project: String,
    /// Its id.
    pub workspace: String,
    /// VMs, compared without case: only runs about one of them, and only them. None: all.
    pub vms: Vec<String>,
    /// So many of the last runs; unset: 5, with `since` as many as a report holds.
    pub last: Option<usize>,
    /// Only runs that began at this time or later.
    pub since: Option<SystemTime>,
}

impl ReportOptions {
    /// The last runs of a project.
    pub fn of(state: StateRoot, project: &str, workspace: &str) -> ReportOptions {
        ReportOptions {
            state,
            project: project.to_owned(),
            workspace: workspace.to_owned(),
            vms: Vec::new(),
            last: None,
            since: None,
        }
    }
}

/// The report; for a project in which nothing has run, a report without runs.
pub fn report(options: ReportOptions, _reporter: &mut dyn Reporter) -> Result<Report> {
    let last = match (options.last, options.since) {
        (Some(last), _) => last,
        (None, Some(_)) => usize::MAX,
        (None, None) => DEFAULT_RUNS,
    };
    let wanted = RunFilter {
        last,
        since: options.since,
        vms: options.vms,
    };
    let (runs, left_out) = gather(&options.state, &wanted)?;
    Ok(Report {
        schema: SCHEMA.to_owned(),
        generated_at: wall_clock(SystemTime::now()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        project: options.project,
        workspace: options.workspace,
        runs,
        left_out,
    })
}

/// Writes the page whole or not at all, mode 0600: it holds what scripts and guests have printed. Returns
/// its length in bytes.
pub fn save_page(report: &Report, path: &Path) -> Result<u64> {
    let path = &place(path)?;
    let page = html::page(report);
    host::replace_file(path, page.as_bytes()).map_err(|error| {
        let failure = Failure::io("create", path, &error);
        match error.kind() {
            io::ErrorKind::NotFound => failure.advice("make its folder first, or name another place"),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                failure.advice("name a place you may write to, or - for stdout")
            }
            _ => failure,
        }
    })?;
    Ok(page.len() as u64)
}

/// Where the page goes. What is there and is no file stays: a rename would put the page in the place of
/// a device.
fn place(path: &Path) -> Result<PathBuf> {
    let refused = |why: &str| {
        Failure::new(Exit::CantCreate, format!("can't create {}", path.display()))
            .because(why)
            .advice("name a file, such as report.html, or - for stdout")
    };
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => Err(refused("it is a directory")),
        Ok(meta) if !meta.is_file() => Err(refused("it exists and isn't a regular file")),
        // Through a link to the file itself, so that the link stays.
        Ok(_) => fs::canonicalize(path).map_err(|error| Failure::io("create", path, &error)),
        Err(_) if path.file_name().is_none() => Err(refused("it doesn't name a file")),
        Err(_) => Ok(path.to_owned()),
    }
}
