//! The default guest: what a VM boots that names neither image nor kernel. There are two kinds of
//! default guest, because Debian's small kernel for virtual machines can't mount directories of the
//! host.
//!
//! Here: building it on demand and keeping it under `$CASTRA_HOME/images/`. Not here: what goes
//! into it (`scripts/build-guest.sh`, carried by `images::embedded`), or what it is told at boot
//! (`core::runtime::seed`).
//!
//! ```text
//! images/guest-x86_64-<id>/           vmlinux (aarch64: Image), initramfs.cpio, manifest.json, complete.json
//! images/guest-x86_64-<id>.lock       held by whoever builds it
//! images/guest-x86_64-<id>.building/  half of one; the next builder removes it
//! images/guest-x86_64-mounts-<id>…    the same for the kind that mounts folders
//! ```
//!
//! Where both kinds would have the same kernel (Ubuntu), the one that is built first is used as
//! both.
//!
//! A guest directory appears by one rename, and only with `complete.json` in it, which holds length
//! and SHA-256 of the files. The lengths are compared at every use, because a file may be empty
//! after a power cut. `base_hash` is made from the digests, without reading 60 MB again.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::core::arch::Arch;
use crate::core::cancel::Cancel;
use crate::core::events::Severity;
use crate::core::events::stage::Stage;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::images::digest::{combine, sha256_of};
use crate::core::images::download_progress::{PackageDownload, Packages, emit_progress};
use crate::core::images::embedded::{RECIPE, Recipe};
use crate::core::images::{image_message, images_dir, lock_or_wait};
use crate::core::process::{Job, JobError};
use crate::core::reporter::Emitter;
use crate::core::threads::{self, CancelOnDrop};

const INITRD: &str = "initramfs.cpio";
const MANIFEST: &str = "manifest.json";
/// Written last: length and SHA-256 of the other three files.
const COMPLETE: &str = "complete.json";

/// How long a build may take. It usually takes 10 s and downloads up to 50 MB, with mounts 20 s and
/// 80 MB; the rest is for slow mirrors.
const BUILD_DEADLINE: Duration = Duration::from_secs(600);

/// If less space than this is left after a failed build, the lack of space was the cause.
const FULL: u64 = 4 << 20;

/// Which of the two default guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestKind {
    /// With the smallest and fastest kernel of this distribution.
    Plain,
    /// With a kernel that can mount directories of the host.
    Mounts,
}

impl GuestKind {
    /// Both.
    pub const ALL: [GuestKind; 2] = [GuestKind::Plain, GuestKind::Mounts];

    /// The kind that a VM needs, by whether it mounts anything.
    pub fn with_mounts(mounts: bool) -> GuestKind {
        match mounts {
            true => GuestKind::Mounts,
            false => GuestKind::Plain,
        }
    }

    /// The part of the directory's name that tells the kinds apart.
    fn infix(self) -> &'static str {
        match self {
            GuestKind::Plain => "",
            GuestKind::Mounts => "mounts-",
        }
    }
}

/// Memory that kernel, root file system and the first programs need in addition to the files' own
/// size. Measured: with a kernel of 51 MiB and an initramfs of 8.2 MiB the plain guest boots with
/// 84 MiB and panics with 80; with 63 and 11.4 MiB the guest for mounts boots with 108 and panics
/// with 100.
const BOOT_OVERHEAD_BYTES: u64 = 20 << 20;
/// The same for a guest that isn't built yet.
const MIN_PLAIN: u64 = 109 << 20;
const MIN_MOUNTS: u64 = 127 << 20;

/// The memory below which this guest panics before it prints anything, bytes. The initramfs is in
/// memory twice while it is unpacked.
pub fn least_memory(home: &Path, arch: &Arch, kind: GuestKind) -> u64 {
    let Some(guest) = find_default_guest(home, arch, kind) else {
        return match kind {
            GuestKind::Plain => MIN_PLAIN,
            GuestKind::Mounts => MIN_MOUNTS,
        };
    };
    let length = |path: &Path| fs::metadata(path).map_or(0, |meta| meta.len());
    (length(&guest.kernel) + 2 * length(&guest.initrd) + BOOT_OVERHEAD_BYTES).next_multiple_of(1 << 20)
}

/// A default guest, ready to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefaultGuest {
    /// Its kernel, in the form that QEMU boots.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// Its command line.
    pub cmdline: String,
    /// The directory that holds these files.
    pub dir: PathBuf,
    /// `images::digest::base_hash` of kernel, initramfs and command line, computed when the guest
    /// was built.
    pub base_hash: String,
    /// It can mount directories of the host.
    pub mounts: bool,
    /// It can be used as the plain guest: its kernel is the same.
    pub plain: bool,
}

impl DefaultGuest {
    fn serves_as(&self, kind: GuestKind) -> bool {
        match kind {
            GuestKind::Plain => self.plain,
            GuestKind::Mounts => self.mounts,
        }
    }
}

/// What `complete.json` holds about one file.
#[derive(Serialize, Deserialize)]
struct Sealed {
    bytes: u64,
    sha256: String,
}

/// Whether an existing guest is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BuildMode {
    /// An existing guest is used.
    AsCached,
    /// It is built in any case, from the current packages.
    Rebuild,
}

/// The fields of `manifest.json` that castra reads.
#[derive(Deserialize)]
struct Manifest {
    cmdline: String,
    mounts: bool,
    plain: bool,
}

/// The directory where this castra builds the default guest of that kind. The guest of the other
/// kind may be used instead: see `find_default_guest`.
pub fn default_guest_dir(home: &Path, arch: &Arch, kind: GuestKind) -> PathBuf {
    dir_of(&RECIPE, arch, kind, home)
}

/// The default guest of that kind, if it exists and is complete. Reads only.
pub fn find_default_guest(home: &Path, arch: &Arch, kind: GuestKind) -> Option<DefaultGuest> {
    find(&RECIPE, arch, kind, home).ok()
}

/// Whether the kind's own directory holds a complete guest of that kind. Reads only.
pub fn is_whole(home: &Path, arch: &Arch, kind: GuestKind) -> bool {
    load_as(&default_guest_dir(home, arch, kind), arch, kind).is_ok()
}

/// The result of a check of the default guest of a kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It doesn't exist.
    Absent,
    /// It exists, but not as it was built; why.
    Damaged(String),
    /// Every byte of it is as it was built.
    Intact(DefaultGuest),
}

/// Checks the default guest of that kind by its digests, which takes about 0.1 s. Reads only.
pub fn examine(home: &Path, arch: &Arch, kind: GuestKind, cancel: &Cancel) -> Condition {
    let guest = match find(&RECIPE, arch, kind, home) {
        Ok(guest) => guest,
        Err(Damage::Absent) => return Condition::Absent,
        Err(Damage::Broken(why)) => return Condition::Damaged(why),
    };
    match check_digests(&guest.dir, cancel) {
        Ok(()) => Condition::Intact(guest),
        Err(why) => Condition::Damaged(why),
    }
}

fn check_digests(dir: &Path, cancel: &Cancel) -> Result<(), String> {
    let sealed =
        host::read_state_file(&dir.join(COMPLETE)).map_err(|error| format!("{COMPLETE}: {error}"))?;
    let seals: BTreeMap<String, Sealed> =
        serde_json::from_slice(&sealed).map_err(|error| format!("{COMPLETE}: {error}"))?;
    for (name, seal) in seals {
        let sha256 = sha256_of(&dir.join(&name), cancel).map_err(|failure| failure.cause())?;
        if sha256 != seal.sha256 {
            return Err(format!(
                "{name}: its SHA-256 isn't the one recorded when it was built"
            ));
        }
    }
    Ok(())
}

/// The default guest; builds it if it doesn't exist. Waits if another process is building it, so
/// several processes build it only once. Reports progress as `message` events with source `image`.
pub fn ensure_default_guest(
    home: &Path,
    arch: &Arch,
    kind: GuestKind,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> Result<DefaultGuest> {
    ensure(&RECIPE, arch, kind, home, BuildMode::AsCached, emitter, cancel)
}

/// Builds the default guest even if it exists; the old one is used until the new one is complete.
pub fn rebuild_default_guest(
    home: &Path,
    arch: &Arch,
    kind: GuestKind,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> Result<DefaultGuest> {
    ensure(&RECIPE, arch, kind, home, BuildMode::Rebuild, emitter, cancel)
}

fn dir_of(recipe: &Recipe<'_>, arch: &Arch, kind: GuestKind, home: &Path) -> PathBuf {
    // The builder refuses architectures that it doesn't know and says why.
    images_dir(home).join(format!("guest-{}-{}{}", arch.name, kind.infix(), recipe.id()))
}

/// The guest in the kind's own directory, otherwise that of the other kind if it can be used as
/// this kind. A reported damage is that of the own directory.
fn find(recipe: &Recipe<'_>, arch: &Arch, kind: GuestKind, home: &Path) -> Result<DefaultGuest, Damage> {
    load_as(&dir_of(recipe, arch, kind, home), arch, kind).or_else(|damage| {
        GuestKind::ALL
            .iter()
            .filter(|other| **other != kind)
            .find_map(|other| load_as(&dir_of(recipe, arch, *other, home), arch, kind).ok())
            .ok_or(damage)
    })
}

fn beside(dir: &Path, extension: &str) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_os_string();
    name.push(extension);
    dir.with_file_name(name)
}

fn ensure(
    recipe: &Recipe<'_>,
    arch: &Arch,
    kind: GuestKind,
    home: &Path,
    freshness: BuildMode,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> Result<DefaultGuest> {
    let dir = dir_of(recipe, arch, kind, home);
    let reuse = freshness == BuildMode::AsCached;
    if reuse && let Ok(guest) = find(recipe, arch, kind, home) {
        return Ok(guest);
    }
    let images = images_dir(home);
    host::ensure_private_dir(&images).map_err(|error| Failure::io("create", &images, &error))?;
    let _lock = lock_or_wait(
        &beside(&dir, ".lock"),
        "builds the default guest",
        emitter,
        cancel,
    )?;
    match find(recipe, arch, kind, home) {
        // The process that held the lock has built it.
        Ok(guest) if reuse => return Ok(guest),
        Err(Damage::Broken(why)) => emitter.emit(image_message(
            Severity::Warn,
            format!(
                "the default guest in {} is damaged ({why}): building it anew",
                dir.display()
            ),
        )),
        Ok(_) | Err(Damage::Absent) => {}
    }
    build(recipe, arch, kind, &dir, emitter, cancel)
}

/// Why a directory holds no usable guest.
enum Damage {
    Absent,
    Broken(String),
}

fn load_as(dir: &Path, arch: &Arch, kind: GuestKind) -> Result<DefaultGuest, Damage> {
    let guest = load(dir, arch)?;
    match guest.serves_as(kind) {
        true => Ok(guest),
        false => Err(Damage::Broken(format!(
            "{MANIFEST}: it is a guest of the other kind"
        ))),
    }
}

fn load(dir: &Path, arch: &Arch) -> Result<DefaultGuest, Damage> {
    let broken = |name: &str, why: &dyn std::fmt::Display| Damage::Broken(format!("{name}: {why}"));
    let read = |name: &str| match host::read_state_file(&dir.join(name)) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => Err(Damage::Absent),
        Err(error) => Err(broken(name, &error)),
    };
    let seals: BTreeMap<String, Sealed> =
        serde_json::from_slice(&read(COMPLETE)?).map_err(|error| broken(COMPLETE, &error))?;
    for name in [arch.kernel_file, INITRD, MANIFEST] {
        match (fs::metadata(dir.join(name)), seals.get(name)) {
            (Ok(meta), Some(seal)) if meta.is_file() && meta.len() == seal.bytes => {}
            (Ok(meta), _) => {
                return Err(broken(
                    name,
                    &format!(
                        "its length of {} bytes isn't the one recorded when it was built",
                        meta.len()
                    ),
                ));
            }
            (Err(error), _) => return Err(broken(name, &error)),
        }
    }
    let manifest: Manifest =
        serde_json::from_slice(&read(MANIFEST)?).map_err(|error| broken(MANIFEST, &error))?;
    let sha256 = |name| seals.get(name).map_or("", |seal: &Sealed| seal.sha256.as_str());
    Ok(DefaultGuest {
        base_hash: combine(sha256(arch.kernel_file), Some(sha256(INITRD)), &manifest.cmdline),
        kernel: dir.join(arch.kernel_file),
        initrd: dir.join(INITRD),
        cmdline: manifest.cmdline,
        dir: dir.to_owned(),
        mounts: manifest.mounts,
        plain: manifest.plain,
    })
}

/// Runs the builder in a staging directory and moves the result into place. The caller holds the
/// lock.
fn build(
    recipe: &Recipe<'_>,
    arch: &Arch,
    kind: GuestKind,
    dir: &Path,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> Result<DefaultGuest> {
    let staging = beside(dir, ".building");
    let remove = |path: &Path| match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Failure::io("remove", path, &error)),
        _ => Ok(()),
    };
    // A killed builder left it: the lock was free, so nobody is using the directory.
    remove(&staging)?;
    let began = Instant::now();
    let built = run_builder(recipe, arch, kind, &staging, emitter, cancel)
        .and_then(|out| put_in_place(&out, dir, arch, &staging, cancel));
    remove(&staging)?;
    built?;
    let message = image_message(Severity::Progress, "the default guest is built");
    emitter.emit(Stage::ImageBuild.end(began.elapsed(), message));
    load_as(dir, arch, kind).map_err(|damage| {
        let why = match damage {
            Damage::Absent => "it is gone again".to_owned(),
            Damage::Broken(why) => why,
        };
        Failure::new(Exit::Io, "can't use the default guest just built").because(why)
    })
}

fn run_builder(
    recipe: &Recipe<'_>,
    arch: &Arch,
    kind: GuestKind,
    staging: &Path,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> Result<PathBuf> {
    let source = staging.join("source");
    let script = staging.join("build-guest.sh");
    let out = staging.join("out");
    host::ensure_private_dir(&source).map_err(|error| Failure::io("create", &source, &error))?;
    let write = |path: &Path, contents: &str| {
        // The guest gets copies with this mode, whatever the umask of castra is.
        fs::write(path, contents)
            .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o644)))
            .map_err(|error| Failure::io("create", path, &error))
    };
    write(&script, recipe.script)?;
    for (name, contents) in recipe.files {
        write(&source.join(name), contents)?;
    }
    let (which, cost, flags): (_, _, &[&str]) = match kind {
        GuestKind::Plain => ("the default guest", "10 s and 50 MB", &[]),
        GuestKind::Mounts => ("the default guest with mounts", "20 s and 80 MB", &["--mounts"]),
    };
    emitter.emit(image_message(
        Severity::Info,
        format!(
            "building {which}{} from this system's packages (once; about {cost} of downloads)",
            arch.suffix(" for ")
        ),
    ));
    let (fetching, over) = (PackageDownload::default(), Cancel::new());
    let job = Job::new("sh")
        .arg(&script)
        .arg("--output")
        .arg(&out)
        .arg("--source")
        .arg(&source)
        .args(flags)
        .args(["--arch", arch.name])
        .deadline(BUILD_DEADLINE)
        .cancel(cancel)
        .on_stderr_line(|line| {
            let text = line.trim_start_matches("guest: ");
            // The builder's last line names the staging directory, which is about to go. After a
            // request to stop, the shell prints that it was terminated. Neither is progress.
            let told = !text.starts_with("done: ") && !is_complaint(line) && !cancel.is_requested();
            if told && !text.trim().is_empty() {
                let packages = Packages::parse(text);
                emitter.emit(match &packages {
                    Some(packages) => packages.look().event(),
                    None => image_message(Severity::Progress, text),
                });
                fetching.set(packages);
            }
        });
    let ended = thread::scope(|scope| {
        let _end = CancelOnDrop(&over);
        // If no thread can be started, no progress is reported, and the build goes on.
        let _ = threads::spawn_scoped(scope, "progress", || {
            emit_progress(emitter, &over, || fetching.look())
        });
        job.run()
    });
    match ended {
        Ok(_) => Ok(out),
        // Free space is measured before the staging directory is removed: tools that ran out of
        // space give many other reasons.
        Err(error) if host::space_left(staging).is_some_and(|bytes| bytes < FULL) => Err(explain(error)
            .advice("the file system of CASTRA_HOME is full: free some 400 MB there and try again")),
        Err(error) => Err(explain(error)),
    }
}

/// The lines in which the builder says why it failed. They are part of the failure, not of the
/// progress.
fn is_complaint(line: &str) -> bool {
    ["error: ", "  because: ", "  try: "]
        .iter()
        .any(|prefix| line.starts_with(prefix))
}

/// The builder's failure as a [`Failure`]: its exit code gives the kind, its last lines the cause.
fn explain(error: JobError) -> Failure {
    const WHAT: &str = "can't build the default guest";
    let JobError::Failed(ended) = error else {
        return error.into_failure(WHAT, Exit::Failed);
    };
    let exit = match ended.status.code() {
        Some(69) => Exit::Unavailable,
        Some(74) => Exit::Io,
        Some(130) => Exit::Interrupted,
        _ => Exit::Failed,
    };
    let said = |prefix: &str| {
        ended
            .stderr_tail
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix(prefix))
            .map(str::to_owned)
    };
    let why = match (said("error: "), said("  because: ")) {
        (Some(what), Some(why)) => format!("{what}: {why}"),
        (Some(what), None) => what,
        // The lines aren't the builder's own but of the shell or of a tool: all of them are shown.
        _ => format!(
            "the builder ended with {}: {}",
            crate::core::process::show_status(ended.status),
            ended.stderr_tail
        ),
    };
    let next = said("  try: ").unwrap_or_else(|| {
        "run `castra image build` to see it again, or set `base_image` to a disk image of yours".into()
    });
    Failure::new(exit, WHAT).because(why).advice(next)
}

/// Checks what the builder made, writes `complete.json`, and renames the directory to its final
/// name.
fn put_in_place(out: &Path, dir: &Path, arch: &Arch, staging: &Path, cancel: &Cancel) -> Result<()> {
    let mut seals = BTreeMap::new();
    for name in [arch.kernel_file, INITRD, MANIFEST] {
        let path = out.join(name);
        let bytes = match fs::metadata(&path) {
            Ok(meta) if meta.is_file() && meta.len() > 0 => meta.len(),
            _ => {
                return Err(Failure::new(Exit::Failed, "can't build the default guest")
                    .because(format!("the builder made no {name}")));
            }
        };
        let sha256 = sha256_of(&path, cancel)?;
        seals.insert(name, Sealed { bytes, sha256 });
    }
    let seal = serde_json::to_vec(&seals).expect("a map of plain data");
    let seal_path = out.join(COMPLETE);
    host::replace_file(&seal_path, &seal).map_err(|error| Failure::io("create", &seal_path, &error))?;
    // An existing guest is moved into the staging directory first and removed with it. A process
    // that finds no guest at this moment waits for the lock and then finds the new one.
    let moved = match fs::rename(dir, staging.join("replaced")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::rename(out, dir),
    };
    moved.map_err(|error| Failure::io("create", dir, &error))
}

#[cfg(test)]
#[path = "default_guest_tests.rs"]
mod tests;
