//! Overlays: the disposable qcow2 layer each VM writes to, over its base image or over nothing.
//!
//! Here: making, reusing, growing and discarding that one file. Not here: finding the base image
//! (`core::images::base`), when to keep or discard it (`up`, `down`, `restart`), or events about it.
//!
//! The caller holds the VM's lock, so nobody else makes this overlay meanwhile. Whether a running
//! QEMU still has it is another question, and the kernel answers it: QEMU locks its images.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::core::cancel::Cancel;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, FileLock, Holder, ImageUse};
use crate::core::images::base::{ENCRYPTED, ResolvedBase, refuse_if_written};
use crate::core::images::digest::{self, Algorithm, DigestCache};
use crate::core::images::qcow2::{self, Header};
use crate::core::images::qemu_img::{self, QemuImgError};
use crate::core::root::records::{BaseRecord, Stamp};

/// Size of a VM's empty disk when the config gives none (docs/CONFIG.md). It is sparse: it takes what
/// the guest writes.
pub const EMPTY_DISK_BYTES: u64 = 4 << 30;

/// Disks are counted in these; `qemu-img` rounds up to it as well.
const SECTOR: u64 = 512;

/// The overlay a VM should have.
#[derive(Clone, Copy, Debug)]
pub struct OverlaySpec<'a> {
    /// Where it lies, absolute.
    pub path: &'a Path,
    /// Its backing file; `None`: an empty disk.
    pub base: Option<&'a ResolvedBase>,
    /// Size the disk is grown to, bytes; `None`: the base's, or [`EMPTY_DISK_BYTES`].
    pub disk_size: Option<u64>,
    /// Who keeps what an earlier launch left.
    pub keep: Keep,
    /// castra made whatever lies at `path`: it is the default place, or this VM's `run.json`
    /// names it. What castra didn't make is never replaced, unless it is a layer over this base.
    pub ours: bool,
    /// The VM's lock: whoever makes the file holds it too.
    pub lock: Option<&'a FileLock>,
}

/// Who keeps what an earlier launch left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nobody: each launch has a fresh disk.
    Nothing,
    /// `persist = true`.
    Persist,
    /// `castra restart`.
    Restart,
}

impl Keep {
    fn who(self) -> &'static str {
        match self {
            Keep::Nothing => "nobody",
            Keep::Persist => "`persist`",
            Keep::Restart => "`castra restart`",
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Keep::Nothing | Keep::Persist => {
                "undo the change in castra.toml, or move the file away to start with a fresh disk"
            }
            Keep::Restart => "undo the change in castra.toml, or start with a fresh disk by --discard",
        }
    }
}

/// The overlay as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayPrepared {
    /// Where it lies.
    pub path: PathBuf,
    /// It was kept from an earlier launch.
    pub reused: bool,
    /// Its backing file.
    pub base: Option<PathBuf>,
    /// Size of the guest's disk, bytes.
    pub virtual_size: u64,
}

/// Makes the overlay, or finds it there. Either it is whole under its name or nothing of it is.
pub fn ensure_overlay(spec: &OverlaySpec<'_>, cancel: &Cancel) -> Result<OverlayPrepared> {
    let wanted = target_size(spec)?;
    if let Some(base) = spec.base {
        // `qemu-img create` would accept a base that somebody writes to; the guest would suffer.
        refuse_if_written(&base.path)?;
    }
    let prepared = |reused, virtual_size| OverlayPrepared {
        path: spec.path.to_owned(),
        reused,
        base: spec.base.map(|base| base.path.clone()),
        virtual_size,
    };
    if let Some(found) = inspect(spec.path)? {
        refuse_if_held(spec.path)?;
        if spec.keep != Keep::Nothing {
            let size = reuse(spec, &found, cancel)?;
            return Ok(prepared(true, size));
        }
        check_replaceable(spec, &found)?;
    }
    create(spec, wanted, cancel)?;
    Ok(prepared(false, wanted))
}

/// Removes an overlay; returns the bytes it took on disk, 0 if there was none. An overlay that a process has
/// open is refused: its QEMU would go on writing to a file that nobody can find.
pub fn discard_overlay(path: &Path) -> Result<u64> {
    // A half-made overlay of a castra that was killed.
    let _ = host::remove_if_there(&temporary_name(path));
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Failure::io("read", path, &error)),
        Ok(meta) if !meta.is_file() => {
            return Err(
                Failure::new(Exit::Io, format!("can't discard overlay {}", path.display()))
                    .because("it isn't a regular file, so castra didn't make it")
                    .advice("see what it is, and remove it yourself"),
            );
        }
        Ok(_) => {}
    }
    refuse_if_held(path)?;
    let bytes = host::disk_usage(path);
    match host::remove_if_there(path) {
        Ok(true) => Ok(bytes),
        Ok(false) => Ok(0),
        Err(error) => Err(Failure::io("remove", path, &error)),
    }
}

fn failed(path: &Path) -> Failure {
    Failure::new(Exit::CantCreate, format!("can't make overlay {}", path.display()))
}

/// The disk's size in bytes, in whole sectors; a disk smaller than its base is refused, because
/// the guest's file system would lose its end.
fn target_size(spec: &OverlaySpec<'_>) -> Result<u64> {
    let floor = spec.base.map(|base| base.virtual_size);
    let Some(asked) = spec.disk_size else {
        return Ok(floor.unwrap_or(EMPTY_DISK_BYTES));
    };
    let asked = asked
        .checked_next_multiple_of(SECTOR)
        .filter(|size| i64::try_from(*size).is_ok())
        .ok_or_else(|| {
            let mut failure =
                failed(spec.path).because(format!("`disk_size` of {asked} bytes is beyond any disk"));
            failure.exit = Exit::Config;
            failure
        })?;
    match floor {
        Some(floor) if asked < floor => {
            let mut failure = failed(spec.path)
                .because(format!(
                    "`disk_size` is {asked} bytes, but the disk in its base image has {floor}, and a disk can't be shrunk"
                ))
                .advice(format!("set `disk_size` to at least {floor}, or leave it out"));
            failure.exit = Exit::Config;
            Err(failure)
        }
        _ => Ok(asked),
    }
}

/// What lies at an overlay's place.
enum ExistingFile {
    /// A qcow2 file.
    Layer(Header),
    /// A regular file of another kind.
    Other,
}

fn inspect(path: &Path) -> Result<Option<ExistingFile>> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::io("read", path, &error)),
        Ok(meta) if !meta.is_file() => {
            return Err(failed(path)
                .because("something exists there that isn't a regular file")
                .advice("set `overlay` to another place"));
        }
        Ok(_) => {}
    }
    match qcow2::load_header(path) {
        Ok(Some(header)) => Ok(Some(ExistingFile::Layer(header))),
        Ok(None) => Ok(Some(ExistingFile::Other)),
        Err(error) if error.kind() == ErrorKind::InvalidData => Ok(Some(ExistingFile::Other)),
        Err(error) => Err(Failure::io("read", path, &error)),
    }
}

fn refuse_if_held(path: &Path) -> Result<()> {
    if host::lock_holder(path) == Holder::Nobody && host::image_use(path) == ImageUse::Unlocked {
        return Ok(());
    }
    let users = host::file_users(path);
    let who = match users.as_slice() {
        [] => "another process, which this user may not see, has it open".to_owned(),
        users => format!("{} has it open", users.join(", ")),
    };
    Err(
        Failure::new(Exit::Busy, format!("overlay {} is in use", path.display()))
            .because(who)
            .advice("stop that process: the disk is being written"),
    )
}

/// Everything about the overlay that can be found wrong without making it. Changes nothing.
pub fn check(spec: &OverlaySpec<'_>) -> Result<()> {
    target_size(spec)?;
    if !spec.path.parent().is_some_and(Path::is_dir) {
        // The folder is made together with the overlay.
        return Ok(());
    }
    match inspect(spec.path)? {
        None => Ok(()),
        Some(found) if spec.keep != Keep::Nothing => kept_sizes(spec, &found).map(drop),
        Some(found) => check_replaceable(spec, &found),
    }
}

/// Whether what lies there, if anything, can be kept as it is asked for. Changes nothing, and doesn't
/// mind a QEMU that runs on it.
pub fn check_kept(spec: &OverlaySpec<'_>) -> Result<()> {
    match inspect(spec.path)? {
        Some(found) if spec.keep != Keep::Nothing => kept_sizes(spec, &found).map(drop),
        _ => Ok(()),
    }
}

/// The base of a layer as it is now, to be compared later. `None`: it has no base, or one that isn't
/// a file, of which nobody can say whether it was changed.
pub fn base_record(base: Option<&ResolvedBase>, digests: &DigestCache) -> Option<BaseRecord> {
    let path = &base?.path;
    let meta = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    let stamp = Stamp::of(&meta);
    let (sha256, sha512) = digests.known_of(path, &stamp);
    Some(BaseRecord {
        path: path.clone(),
        stamp,
        sha256,
        sha512,
    })
}

/// Refuses to keep a layer over a base that was rewritten since the layer was made over it: what the
/// guest wrote belongs to other blocks. A file whose state has changed and whose digest hasn't, as
/// after a copy, is the same base.
pub fn check_same_base(
    spec: &OverlaySpec<'_>,
    made_over: Option<&BaseRecord>,
    digests: &DigestCache,
    cancel: &Cancel,
) -> Result<()> {
    let (Some(base), Some(then)) = (spec.base, made_over) else {
        return Ok(());
    };
    if spec.keep == Keep::Nothing || inspect(spec.path)?.is_none() {
        return Ok(());
    }
    let Some(now) = base_record(Some(base), digests) else {
        return Ok(());
    };
    if now.stamp == then.stamp || same_contents(&now, then, digests, cancel)? {
        return Ok(());
    }
    let who = spec.keep.who();
    Err(failed(spec.path)
        .because(format!(
            "{who} keeps the existing one, but its base image {} was rewritten since the disk was made over it",
            base.path.display()
        ))
        .advice(match spec.keep {
            Keep::Restart => "put that image back as it was, or begin with a fresh disk by --discard",
            _ => "put that image back as it was and give the new one a name of its own, or begin with a fresh disk: `castra down --discard`",
        }))
}

/// Whether a base that has another stamp still has the same contents. Without an earlier digest nobody knows,
/// which counts as no.
fn same_contents(
    now: &BaseRecord,
    then: &BaseRecord,
    digests: &DigestCache,
    cancel: &Cancel,
) -> Result<bool> {
    let (known256, known512) = digests.known_of(&then.path, &then.stamp);
    let before = [
        (Algorithm::Sha256, then.sha256.clone().or(known256), &now.sha256),
        (Algorithm::Sha512, then.sha512.clone().or(known512), &now.sha512),
    ];
    for (algorithm, then, now_known) in before {
        if let Some(then) = then {
            // The new digest isn't cached, because that would replace the digest of the file's earlier state.
            return Ok(match now_known {
                Some(now) => *now == then,
                None => digest::compute(&now.path, algorithm, cancel)? == then,
            });
        }
    }
    Ok(false)
}

/// Keeps the existing disk, and grows it if a larger size is wanted.
fn reuse(spec: &OverlaySpec<'_>, found: &ExistingFile, cancel: &Cancel) -> Result<u64> {
    let (now, wanted) = kept_sizes(spec, found)?;
    if wanted > now {
        qemu_img::grow(spec.path, wanted, spec.lock, cancel).map_err(|error| explain(spec, error))?;
    }
    Ok(wanted)
}

/// Checks that the existing file is the wanted disk; returns its size now, and the size that it should have.
fn kept_sizes(spec: &OverlaySpec<'_>, found: &ExistingFile) -> Result<(u64, u64)> {
    let who = spec.keep.who();
    let ExistingFile::Layer(header) = found else {
        return Err(failed(spec.path)
            .because(format!(
                "{who} would keep the file there, but it isn't a qcow2 overlay"
            ))
            .advice("move it away, or set `overlay` to another place"));
    };
    if header.encrypted {
        return Err(failed(spec.path)
            .because(ENCRYPTED)
            .advice("move it away, or set `overlay` to another place"));
    }
    if !has_base(header, spec.base) {
        let name = |path: Option<&Path>| match path {
            Some(path) => path.display().to_string(),
            None => "nothing (an empty disk)".to_owned(),
        };
        return Err(failed(spec.path)
            .because(format!(
                "{who} keeps the existing one, but its base image is {}, and castra.toml now says {}",
                name(header.backing_file.as_deref()),
                name(spec.base.map(|base| base.path.as_path()))
            ))
            .advice(spec.keep.advice()));
    }
    let now = header.virtual_size;
    let asked = spec
        .disk_size
        .and_then(|size| size.checked_next_multiple_of(SECTOR));
    let wanted = asked.unwrap_or(now);
    if wanted < now {
        let mut failure = failed(spec.path)
            .because(format!(
                "{who} keeps the existing one, whose disk has {now} bytes; `disk_size` is {wanted}, \
                 and a disk can't be shrunk"
            ))
            .advice(spec.keep.advice());
        failure.exit = Exit::Config;
        return Err(failure);
    }
    Ok((now, wanted))
}

/// Whether this is the layer's base: the same path, or another path to the same file.
fn has_base(header: &Header, base: Option<&ResolvedBase>) -> bool {
    match (&header.backing_file, base) {
        (None, None) => true,
        (Some(named), Some(base)) => *named == base.path || same_file(named, &base.path),
        _ => false,
    }
}

fn same_file(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => one.dev() == other.dev() && one.ino() == other.ino(),
        _ => false,
    }
}

/// Allows to replace a leftover of a crash, but never a disk that castra didn't make.
fn check_replaceable(spec: &OverlaySpec<'_>, found: &ExistingFile) -> Result<()> {
    let layer_over_base = match found {
        ExistingFile::Layer(header) => spec.base.is_some() && has_base(header, spec.base),
        ExistingFile::Other => false,
    };
    if spec.ours || layer_over_base {
        return Ok(());
    }
    Err(failed(spec.path)
        .because("there is a file that castra didn't make, and without `persist` it would be replaced")
        .advice("move it away, set `overlay` to another place, or set `persist = true` to use it as it is"))
}

fn create(spec: &OverlaySpec<'_>, size: u64, cancel: &Cancel) -> Result<()> {
    if let Some(dir) = spec.path.parent() {
        host::ensure_private_dir(dir).map_err(|error| Failure::io("create", dir, &error))?;
    }
    // One temporary name is enough, since the VM's lock is held: a leftover of a killed castra is
    // overwritten.
    let temporary = temporary_name(spec.path);
    let made = host::remove_if_there(&temporary)
        .map_err(|error| Failure::io("create", spec.path, &error))
        .and_then(|_| {
            let base = spec.base.map(|base| (base.format.as_str(), base.path.as_path()));
            // If the size is the base's, qemu-img isn't given one: it takes the base's.
            let size = (spec.base.map(|base| base.virtual_size) != Some(size)).then_some(size);
            qemu_img::create(&temporary, base, size, spec.lock, cancel).map_err(|error| explain(spec, error))
        })
        .and_then(|()| {
            fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))
                .and_then(|()| fs::rename(&temporary, spec.path))
                .map_err(|error| Failure::io("create", spec.path, &error))
        });
    if made.is_err() {
        let _ = host::remove_if_there(&temporary);
    }
    made
}

fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    path.with_file_name(name)
}

/// Explains a failure of `qemu-img` in terms of what the user can change.
fn explain(spec: &OverlaySpec<'_>, error: QemuImgError) -> Failure {
    let words = match error {
        QemuImgError::Unusable(failure) => return *failure,
        QemuImgError::Refused(words) => words,
    };
    let failure = failed(spec.path).because(words);
    if host::space_left(spec.path.parent().unwrap_or(spec.path)).is_some_and(|bytes| bytes < 1 << 20) {
        return failure.advice("the file system is full: free some space and try again");
    }
    failure
}

#[cfg(test)]
#[path = "overlay_tests.rs"]
mod tests;
