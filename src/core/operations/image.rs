//! `image`: the default guest and the cache it lies in.
//!
//! Here: building it on demand, listing the cache, naming the place. Not here: how any of it is
//! made (`core::images`). No project takes part, so nothing is journaled; `list` and `path` read
//! only and tell no event.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::core::cancel::Cancel;
use crate::core::events::VmCounts;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::images::default_guest::{self, DefaultGuest, GuestKind};
use crate::core::images::images_dir;
use crate::core::operations::run::Operation;
use crate::core::reporter::Reporter;

/// What to do with the cache.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// `CASTRA_HOME`.
    pub home: PathBuf,
    /// The verb.
    pub action: ImageAction,
    /// Ends a build early.
    pub cancel: Cancel,
}

/// `image build`, `list`, `path`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageAction {
    /// Makes the default guest.
    Build {
        /// Even if it is there.
        force: bool,
        /// Which of the two.
        kind: GuestKind,
    },
    /// What lies in the cache.
    List,
    /// Where the default guest lies.
    Path {
        /// Which of the two.
        kind: GuestKind,
    },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "lowercase")]
pub enum ImageOutcome {
    /// It is there now.
    Build {
        /// The guest.
        guest: DefaultGuest,
        /// It had to be made.
        built: bool,
        /// Bytes it takes on disk.
        bytes: u64,
        /// How long it took.
        duration_ms: u64,
    },
    /// The cache, by name.
    List {
        /// The directory.
        dir: PathBuf,
        /// What lies there.
        images: Vec<CachedImage>,
    },
    /// Its place.
    Path {
        /// The directory.
        dir: PathBuf,
        /// It is there and whole.
        present: bool,
    },
}

/// One thing in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachedImage {
    /// Its name in the cache, relative to it.
    pub name: PathBuf,
    /// What it is.
    pub kind: CachedKind,
    /// Bytes it takes on disk.
    pub bytes: u64,
}

/// What lies in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CachedKind {
    /// This castra's default guest.
    DefaultGuest,
    /// This castra's default guest for VMs with mounts.
    MountsGuest,
    /// This castra's default guest with a file missing or cut short; the next use builds it anew.
    Damaged,
    /// A default guest of another castra.
    OtherGuest,
    /// A base image fetched from a URL.
    Download,
    /// What has come of one so far.
    PartialDownload,
    /// A build under way, or what a killed one left.
    Building,
}

impl CachedKind {
    /// The word for people.
    pub fn as_str(self) -> &'static str {
        match self {
            CachedKind::DefaultGuest => "default guest",
            CachedKind::MountsGuest => "default guest for mounts",
            CachedKind::Damaged => "default guest, damaged",
            CachedKind::OtherGuest => "guest of another castra",
            CachedKind::Download => "download",
            CachedKind::PartialDownload => "partial download",
            CachedKind::Building => "unfinished build",
        }
    }
}

/// Does it. `build` tells its progress as messages and ends with the usual events.
pub fn image(options: ImageOptions, reporter: &mut dyn Reporter) -> Result<ImageOutcome> {
    match options.action {
        ImageAction::Build { force, kind } => build(&options, force, kind, reporter),
        ImageAction::List => Ok(ImageOutcome::List {
            dir: images_dir(&options.home),
            images: list(&options.home)?,
        }),
        ImageAction::Path { kind } => {
            let found = default_guest::find_default_guest(&options.home, kind);
            Ok(ImageOutcome::Path {
                present: found.is_some(),
                dir: place(found.as_ref(), &options.home, kind),
            })
        }
    }
}

/// Where a guest lies, or will lie.
fn place(guest: Option<&DefaultGuest>, home: &Path, kind: GuestKind) -> PathBuf {
    guest.map_or_else(
        || default_guest::default_guest_dir(home, kind),
        |guest| guest.dir.clone(),
    )
}

fn build(
    options: &ImageOptions,
    force: bool,
    kind: GuestKind,
    reporter: &mut dyn Reporter,
) -> Result<ImageOutcome> {
    let found = default_guest::find_default_guest(&options.home, kind);
    let was_there = found.is_some();
    // A forced build makes the kind's own, even where another one serves as it.
    let dir = place(found.as_ref().filter(|_| !force), &options.home, kind);
    let operation = Operation::accept_unkept("image build", Some(dir.display().to_string()), reporter);
    let emitter = operation.emitter();
    let guest = match force {
        true => default_guest::rebuild_default_guest(&options.home, kind, emitter, &options.cancel),
        false => default_guest::ensure_default_guest(&options.home, kind, emitter, &options.cancel),
    };
    let guest = match guest {
        Ok(guest) => guest,
        Err(failure) => return Err(operation.fail(failure, VmCounts::default())),
    };
    let duration_ms = emitter.elapsed_ms();
    let bytes = bytes_in(&dir);
    let detail = Some(dir.display().to_string());
    operation.end(Exit::Done, detail, VmCounts::default(), bytes);
    Ok(ImageOutcome::Build {
        guest,
        built: force || !was_there,
        bytes,
        duration_ms,
    })
}

fn list(home: &Path) -> Result<Vec<CachedImage>> {
    let root = images_dir(home);
    let current = GuestKind::ALL.map(|kind| {
        let whole = default_guest::is_whole(home, kind);
        let found = match kind {
            _ if !whole => CachedKind::Damaged,
            GuestKind::Plain => CachedKind::DefaultGuest,
            GuestKind::Mounts => CachedKind::MountsGuest,
        };
        (default_guest::default_guest_dir(home, kind), found)
    });
    let mut images = Vec::new();
    for name in names_in(&root)? {
        let path = root.join(&name);
        let ours = current.iter().find(|(dir, _)| path == *dir);
        let kind = match (ours, name.as_str()) {
            (Some((_, kind)), _) => *kind,
            _ if !path.is_dir() => continue,
            (_, name) if name.ends_with(".building") => CachedKind::Building,
            (_, name) if name.starts_with("guest-") => CachedKind::OtherGuest,
            _ => continue,
        };
        let bytes = bytes_in(&path);
        let name = PathBuf::from(name);
        images.push(CachedImage { name, kind, bytes });
    }
    let downloads = Path::new("download");
    for name in names_in(&root.join(downloads))? {
        let kind = match Path::new(&name)
            .extension()
            .and_then(|extension| extension.to_str())
        {
            Some("lock" | "etag" | "headers") => continue,
            Some("part") => CachedKind::PartialDownload,
            _ => CachedKind::Download,
        };
        let name = downloads.join(name);
        let bytes = host::disk_usage(&root.join(&name));
        images.push(CachedImage { name, kind, bytes });
    }
    Ok(images)
}

/// The names in a directory, sorted; none if it isn't there.
fn names_in(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::io("read", dir, &error)),
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

/// Bytes that the files below a directory take on disk.
fn bytes_in(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => bytes_in(&entry.path()),
            Ok(kind) if kind.is_file() => host::disk_usage(&entry.path()),
            _ => 0,
        })
        .sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::core::reporter::Silent;
    use crate::core::scratch::Scratch;

    fn run(home: &Path, action: ImageAction) -> ImageOutcome {
        let options = ImageOptions {
            home: home.to_owned(),
            action,
            cancel: Cancel::new(),
        };
        image(options, &mut Silent).unwrap()
    }

    #[test]
    fn an_empty_cache_is_listed_and_not_made() {
        let scratch = Scratch::new("image-empty");
        let ImageOutcome::List { images, .. } = run(scratch.dir(), ImageAction::List) else {
            panic!("list answers with a list");
        };
        assert_eq!(images, []);
        let ImageOutcome::Path { dir, present } = run(
            scratch.dir(),
            ImageAction::Path {
                kind: GuestKind::Plain,
            },
        ) else {
            panic!("path answers with a path");
        };
        assert!(!present && dir.starts_with(scratch.path("images")));
        assert!(!scratch.path("images").exists(), "reading commands write nothing");
    }

    #[test]
    fn everything_in_the_cache_has_its_kind() {
        let scratch = Scratch::new("image-list");
        let current = default_guest::default_guest_dir(scratch.dir(), GuestKind::Mounts);
        fs::create_dir_all(&current).unwrap();
        fs::create_dir_all(scratch.path("images/guest-x86_64-0123456789ab")).unwrap();
        fs::create_dir_all(scratch.path("images/guest-x86_64-0123456789ab.building")).unwrap();
        fs::create_dir_all(scratch.path("images/download")).unwrap();
        for name in ["a-debian.qcow2", "b-x.img.part", "b-x.img.etag", "b-x.img.lock"] {
            fs::write(scratch.path("images/download").join(name), vec![1; 5000]).unwrap();
        }
        fs::write(scratch.path("images/guest-x86_64-0123456789ab.lock"), "").unwrap();
        let ImageOutcome::List { images, .. } = run(scratch.dir(), ImageAction::List) else {
            panic!("list answers with a list");
        };
        let found: Vec<_> = images
            .iter()
            .map(|image| (image.name.to_str().unwrap(), image.kind))
            .collect();
        let expected = [
            ("guest-x86_64-0123456789ab", CachedKind::OtherGuest),
            ("guest-x86_64-0123456789ab.building", CachedKind::Building),
            (
                current.file_name().unwrap().to_str().unwrap(),
                CachedKind::Damaged,
            ),
            ("download/a-debian.qcow2", CachedKind::Download),
            ("download/b-x.img.part", CachedKind::PartialDownload),
        ];
        let mut expected = expected.to_vec();
        expected[..3].sort_unstable_by_key(|(name, _)| *name);
        assert_eq!(found, expected);
        assert!(
            images
                .iter()
                .filter(|image| image.kind == CachedKind::Download)
                .all(|image| image.bytes >= 5000)
        );
    }
}
