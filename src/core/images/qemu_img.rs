//! Calls of `qemu-img`, each bounded and with its message kept.
//!
//! Here: the three subcommands castra uses, and the failure when the tool is missing. Not here:
//! which image to make (`core::runtime::overlay`) or accept (`core::images::base`).

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use crate::core::cancel::Cancel;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::FileLock;
use crate::core::process::{Ended, Job, JobError};

/// How long a call may take. It usually takes 10 to 30 ms; a minute means a network file system
/// that hangs.
const DEADLINE: Duration = Duration::from_secs(60);

/// The fields of `qemu-img info` that castra needs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    /// `qcow2`, `raw`, `vmdk`, …: by the file's own magic.
    pub format: String,
    /// Size of the guest's disk, bytes.
    pub virtual_size: u64,
}

/// Why `qemu-img` failed.
#[derive(Debug)]
pub enum QemuImgError {
    /// It can't be run, was interrupted or was too slow.
    Unusable(Box<Failure>),
    /// It ran and refused; its own message.
    Refused(String),
}

/// Format and size of an image, found by its magic.
pub fn info(image: &Path, cancel: &Cancel) -> Result<Info, QemuImgError> {
    let ended = run(
        ["info".as_ref(), "--output=json".as_ref(), image.as_os_str()],
        None,
        cancel,
    )?;
    serde_json::from_slice(&ended.stdout)
        .map_err(|error| QemuImgError::Refused(format!("`{}` answered something else: {error}", ended.argv)))
}

/// Makes a qcow2 file: over `base` (its format, its path) or empty. `qemu-img` inherits `lock`, so
/// the lock stays held until it ends, even if castra is killed meanwhile.
pub fn create(
    image: &Path,
    base: Option<(&str, &Path)>,
    size: Option<u64>,
    lock: Option<&FileLock>,
    cancel: &Cancel,
) -> Result<(), QemuImgError> {
    let size = size.map(|bytes| bytes.to_string());
    let mut args: Vec<&OsStr> = ["create", "-q", "-f", "qcow2"].iter().map(OsStr::new).collect();
    if let Some((format, path)) = base {
        args.extend(["-F".as_ref(), format.as_ref(), "-b".as_ref(), path.as_os_str()]);
    }
    args.push(image.as_os_str());
    args.extend(size.as_deref().map(OsStr::new));
    run(args, lock, cancel).map(drop)
}

/// Grows a qcow2 file to `size` bytes.
pub fn grow(image: &Path, size: u64, lock: Option<&FileLock>, cancel: &Cancel) -> Result<(), QemuImgError> {
    let size = size.to_string();
    let args: [&OsStr; 6] = [
        "resize".as_ref(),
        "-q".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
        image.as_os_str(),
        size.as_ref(),
    ];
    run(args, lock, cancel).map(drop)
}

fn run<'a>(
    args: impl IntoIterator<Item = &'a OsStr>,
    lock: Option<&FileLock>,
    cancel: &Cancel,
) -> Result<Ended, QemuImgError> {
    const WHAT: &str = "can't run qemu-img";
    Job::new("qemu-img")
        .args(args)
        // Its messages are shown as they are, so they shouldn't be translated.
        .env("LC_ALL", "C")
        .deadline(DEADLINE)
        .holding(lock)
        .cancel(cancel)
        .run()
        .map_err(|error| match error {
            JobError::Failed(ended) => QemuImgError::Refused(own_words(&ended.stderr_tail)),
            JobError::NotStarted { .. } => QemuImgError::Unusable(Box::new(
                Failure::new(Exit::Unavailable, WHAT)
                    .because(error)
                    .advice("install it: `apt-get install qemu-utils` (Fedora: qemu-img)"),
            )),
            other => QemuImgError::Unusable(Box::new(other.into_failure(WHAT, Exit::Io))),
        })
}

/// Its message without its own name before it.
fn own_words(stderr: &str) -> String {
    match stderr.trim() {
        "" => "qemu-img gave no reason".to_owned(),
        text => text.trim_start_matches("qemu-img: ").to_owned(),
    }
}
