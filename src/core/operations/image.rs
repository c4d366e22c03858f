//! `image`: the default guest and the cache it lies in.
//!
//! Here: building it on demand, listing the cache, naming the place. Not here: how any of it is
//! made, or told (`core::images`). No project takes part, so nothing is journaled; `list` and `path` read
//! only and tell no event.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::core::arch::Arch;
use crate::core::cancel::Cancel;
use crate::core::events::VmCounts;
use crate::core::failure::{Exit, Result};
use crate::core::images::cache;
pub use crate::core::images::cache::{CachedImage, CachedKind};
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
        /// Of which architecture.
        arch: &'static Arch,
        /// Which of the two.
        kind: GuestKind,
    },
    /// What lies in the cache.
    List,
    /// Where the default guest lies.
    Path {
        /// Of which architecture.
        arch: &'static Arch,
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
        /// It was built now.
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

/// Runs the action. `build` reports its progress as messages and ends with the usual events.
pub fn image(options: ImageOptions, reporter: &mut dyn Reporter) -> Result<ImageOutcome> {
    match options.action {
        ImageAction::Build { force, arch, kind } => build(&options, force, arch, kind, reporter),
        ImageAction::List => Ok(ImageOutcome::List {
            dir: images_dir(&options.home),
            images: cache::list(&options.home)?,
        }),
        ImageAction::Path { arch, kind } => {
            let found = default_guest::find_default_guest(&options.home, arch, kind);
            Ok(ImageOutcome::Path {
                present: found.is_some(),
                dir: place(found.as_ref(), &options.home, arch, kind),
            })
        }
    }
}

/// Where a guest lies, or will lie.
fn place(guest: Option<&DefaultGuest>, home: &Path, arch: &Arch, kind: GuestKind) -> PathBuf {
    guest.map_or_else(
        || default_guest::default_guest_dir(home, arch, kind),
        |guest| guest.dir.clone(),
    )
}

fn build(
    options: &ImageOptions,
    force: bool,
    arch: &Arch,
    kind: GuestKind,
    reporter: &mut dyn Reporter,
) -> Result<ImageOutcome> {
    let found = default_guest::find_default_guest(&options.home, arch, kind);
    let was_there = found.is_some();
    // A forced build makes the kind's own, even where another one serves as it.
    let dir = place(found.as_ref().filter(|_| !force), &options.home, arch, kind);
    let operation = Operation::accept_unkept("image build", Some(dir.display().to_string()), reporter);
    let emitter = operation.emitter();
    let guest = match force {
        true => default_guest::rebuild_default_guest(&options.home, arch, kind, emitter, &options.cancel),
        false => default_guest::ensure_default_guest(&options.home, arch, kind, emitter, &options.cancel),
    };
    let guest = match guest {
        Ok(guest) => guest,
        Err(failure) => return Err(operation.fail(failure, VmCounts::default())),
    };
    let duration_ms = emitter.elapsed_ms();
    let bytes = cache::bytes_in(&dir);
    let detail = Some(dir.display().to_string());
    operation.end(Exit::Done, detail, VmCounts::default(), bytes);
    Ok(ImageOutcome::Build {
        guest,
        built: force || !was_there,
        bytes,
        duration_ms,
    })
}

#[cfg(test)]
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
                arch: Arch::host(),
                kind: GuestKind::Plain,
            },
        ) else {
            panic!("path answers with a path");
        };
        assert!(!present && dir.starts_with(scratch.path("images")));
        assert!(!scratch.path("images").exists(), "reading commands write nothing");
    }
}
