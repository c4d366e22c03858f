//! The progress of a download that another program does.
//!
//! Here: the progress message, repeated until the download is over. Not here: how people see it
//! (the command line draws a bar).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;

use crate::core::cancel::Cancel;
use crate::core::events::{Event, Severity};
use crate::core::images::image_message;
use crate::core::reporter::Emitter;

/// Time between two messages.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// How many bytes of how many have come, and what is downloaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DownloadProgress {
    /// `fetching` and its object.
    pub what: String,
    /// The same in short, for the line of a bar.
    pub label: String,
    pub bytes: u64,
    /// If the server has said it.
    pub total: Option<u64>,
}

impl DownloadProgress {
    pub fn event(&self) -> Event {
        let bytes = megabytes(self.bytes);
        let mut event = image_message(
            Severity::Progress,
            match self.total {
                Some(total) => format!("{}: {bytes} of {}", self.what, megabytes(total)),
                None => format!("{}: {bytes}", self.what),
            },
        );
        if let Event::Message { data, .. } = &mut event {
            *data = Some(json!({
                "label": self.label, "bytes": self.bytes, "total_bytes": self.total
            }));
        }
        event
    }
}

/// Reports the progress that `look` returns again and again, until `done`.
pub(super) fn emit_progress(
    emitter: &Emitter<'_>,
    done: &Cancel,
    look: impl Fn() -> Option<DownloadProgress>,
) {
    while !done.pause(PROGRESS_INTERVAL) {
        if let Some(fetched) = look() {
            emitter.emit(fetched.event());
        }
    }
}

/// Packages on their way into a directory, as the builder announces them:
/// `fetching 18 packages, 51234567 bytes, into /some/where`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packages {
    label: String,
    total: Option<u64>,
    dir: PathBuf,
}

impl Packages {
    /// Parses the builder's line; `None` if it is another one.
    pub fn parse(line: &str) -> Option<Packages> {
        let (what, dir) = line.split_once(", into ")?;
        let (label, total) = match what.split_once(", ") {
            Some((label, size)) => (label, Some(size.strip_suffix(" bytes")?.parse().ok()?)),
            None => (what, None),
        };
        label.starts_with("fetching ").then(|| Packages {
            label: label.to_owned(),
            total,
            dir: PathBuf::from(dir),
        })
    }

    /// How many bytes have come.
    pub fn look(&self) -> DownloadProgress {
        DownloadProgress {
            what: self.label.clone(),
            label: self.label.clone(),
            bytes: bytes_in(&self.dir),
            total: self.total,
        }
    }
}

/// What the builder is fetching now.
#[derive(Debug, Default)]
pub(super) struct PackageDownload(Mutex<Option<Packages>>);

impl PackageDownload {
    /// The download began, or the builder does something else now.
    pub fn set(&self, packages: Option<Packages>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = packages;
    }

    /// How far it is.
    pub fn look(&self) -> Option<DownloadProgress> {
        let packages = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        packages.map(|packages| packages.look())
    }
}

fn bytes_in(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some(entry.metadata().ok()?.len()))
        .sum()
}

pub(super) fn megabytes(bytes: u64) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;

    #[test]
    fn the_builders_line() {
        for (line, known) in [
            (
                "fetching 18 packages, 512 bytes, into /a b, c",
                Some((Some(512), "/a b, c")),
            ),
            ("fetching 18 packages, into /tmp", Some((None, "/tmp"))),
            ("fetching 18 packages", None),
            ("fetching 18 packages, many bytes, into /tmp", None),
            ("unpacking, into /tmp", None),
        ] {
            let packages = Packages::parse(line);
            let expected = known.map(|(total, dir)| Packages {
                label: "fetching 18 packages".to_owned(),
                total,
                dir: PathBuf::from(dir),
            });
            assert_eq!(packages, expected, "{line}");
        }
    }

    #[test]
    fn what_has_come_is_what_lies_there() {
        let scratch = Scratch::new("packages");
        fs::write(scratch.path("a.deb"), "12345").unwrap();
        fs::write(scratch.path("b.deb"), "678").unwrap();
        let line = format!(
            "fetching 2 packages, 10 bytes, into {}",
            scratch.path("").display()
        );
        let fetching = PackageDownload::default();
        assert_eq!(fetching.look(), None);
        fetching.set(Packages::parse(&line));
        let fetched = fetching.look().unwrap();
        assert_eq!((fetched.bytes, fetched.total), (8, Some(10)));
        let Event::Message { text, data, .. } = fetched.event() else {
            panic!("a message");
        };
        assert_eq!(text, "fetching 2 packages: 0.0 MB of 0.0 MB");
        assert_eq!(
            data.unwrap(),
            json!({"label": "fetching 2 packages", "bytes": 8, "total_bytes": 10})
        );
    }
}
