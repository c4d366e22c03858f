//! Disk images and the default guest: where they come from, which are accepted, and their hashes.
//!
//! Here: one module for each of these, and the functions of the cache that these modules share. Not
//! here: the overlays that VMs write to (`core::runtime::overlay`), and the configuration of a
//! guest at boot (`core::runtime::seed`).

pub mod artifact;
pub mod base;
pub mod cache;
pub mod default_guest;
pub mod digest;
mod download_progress;
pub mod embedded;
pub mod fetch;
pub mod qcow2;
pub mod qemu_img;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::core::cancel::Cancel;
use crate::core::events::{Event, Severity};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{FileLock, LockError};
use crate::core::reporter::Emitter;

/// How often a process that waits for another one checks again.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The image cache that all projects share, under `CASTRA_HOME`.
pub fn images_dir(home: &Path) -> PathBuf {
    home.join("images")
}

/// A message about images: its `source` is `image`.
fn image_message(severity: Severity, text: impl Into<String>) -> Event {
    let mut event = Event::message(severity, None, text);
    if let Event::Message { source, .. } = &mut event {
        *source = Some("image".into());
    }
    event
}

/// Takes the lock of something that one process at a time may make in the cache. While it waits, it
/// says so once, and it stops waiting when cancelled. `doing` completes "another castra …".
fn lock_or_wait(path: &Path, doing: &str, emitter: &Emitter<'_>, cancel: &Cancel) -> Result<FileLock> {
    let mut told = false;
    let try_take = || match FileLock::try_take(path, doing) {
        Ok(lock) => Some(Ok(lock)),
        Err(LockError::Io(error)) => Some(Err(Failure::io("create", path, &error))),
        Err(LockError::Held(who)) => {
            if !std::mem::replace(&mut told, true) {
                let pid = who.split_whitespace().next().unwrap_or("?").to_owned();
                let text = format!("another castra (pid {pid}) {doing}: waiting for it");
                emitter.emit(image_message(Severity::Info, text));
            }
            None
        }
    };
    let taken = cancel.wait_for(Duration::MAX, POLL_INTERVAL, try_take);
    taken.unwrap_or_else(|| {
        let what = format!("interrupted while another castra {doing}");
        Err(Failure::new(Exit::Interrupted, what))
    })
}
