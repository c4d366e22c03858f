//! What lies in the image cache.
//!
//! Here: what each file and directory in it is, by its name. Not here: making, fetching or removing
//! any of them, or showing them (`castra image list`, `core::doctor`).

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::core::arch::{Arch, KNOWN};
use crate::core::failure::{Failure, Result};
use crate::core::host;
use crate::core::images::default_guest::{self, GuestKind};
use crate::core::images::images_dir;

/// One thing in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachedImage {
    /// Its name in the cache, relative to it.
    pub name: PathBuf,
    /// What it is.
    pub kind: CachedKind,
    /// The architecture of this castra's default guest where it isn't the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arch: Option<String>,
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
    /// The downloaded part of one.
    PartialDownload,
    /// A build in progress, or the directory that a killed build left.
    Building,
}

impl CachedKind {
    /// Its name for people.
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

/// What lies in the cache of a castra home, by name. Reads only.
pub fn list(home: &Path) -> Result<Vec<CachedImage>> {
    let root = images_dir(home);
    let of_arch = |arch: &'static Arch| GuestKind::ALL.map(|kind| (arch, kind));
    let current = KNOWN.iter().flat_map(of_arch).map(|(arch, kind)| {
        let whole = default_guest::is_whole(home, arch, kind);
        let found = match kind {
            _ if !whole => CachedKind::Damaged,
            GuestKind::Plain => CachedKind::DefaultGuest,
            GuestKind::Mounts => CachedKind::MountsGuest,
        };
        (default_guest::default_guest_dir(home, arch, kind), arch, found)
    });
    let current: Vec<_> = current.collect();
    let mut images = Vec::new();
    for name in names_in(&root)? {
        let path = root.join(&name);
        let ours = current.iter().find(|(dir, ..)| path == *dir);
        let kind = match (ours, name.as_str()) {
            (Some((.., kind)), _) => *kind,
            _ if !path.is_dir() => continue,
            (_, name) if name.ends_with(".building") => CachedKind::Building,
            (_, name) if name.starts_with("guest-") => CachedKind::OtherGuest,
            _ => continue,
        };
        let bytes = bytes_in(&path);
        images.push(CachedImage {
            name: PathBuf::from(name),
            kind,
            arch: ours.and_then(|(_, arch, _)| arch.is_foreign().then(|| arch.name.to_owned())),
            bytes,
        });
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
        images.push(CachedImage {
            name,
            kind,
            arch: None,
            bytes,
        });
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
pub fn bytes_in(dir: &Path) -> u64 {
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
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;

    #[test]
    fn everything_in_the_cache_has_its_kind() {
        let scratch = Scratch::new("image-list");
        let current = default_guest::default_guest_dir(scratch.dir(), Arch::host(), GuestKind::Mounts);
        fs::create_dir_all(&current).unwrap();
        fs::create_dir_all(scratch.path("images/guest-x86_64-0123456789ab")).unwrap();
        fs::create_dir_all(scratch.path("images/guest-x86_64-0123456789ab.building")).unwrap();
        fs::create_dir_all(scratch.path("images/download")).unwrap();
        for name in ["a-debian.qcow2", "b-x.img.part", "b-x.img.etag", "b-x.img.lock"] {
            fs::write(scratch.path("images/download").join(name), vec![1; 5000]).unwrap();
        }
        fs::write(scratch.path("images/guest-x86_64-0123456789ab.lock"), "").unwrap();
        let images = list(scratch.dir()).unwrap();
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
