//! Base images: from what `castra.toml` names to a file that an overlay may be based on.
//!
//! Here: which files are accepted, their format, and the refusals. Not here: fetching a URL
//! (`images::fetch`), computing digests (`images::digest`), the layer itself
//! (`core::runtime::overlay`).
//!
//! Images aren't trusted, and QEMU opens whatever file an image names: a qcow2 with the backing
//! file `/etc/shadow` would show that file to its guest. So an image that names another file is
//! refused before any tool of QEMU opens it. The overlay is later made with the format found here,
//! so QEMU never probes for it: probing lets a guest that writes a qcow2 header onto its raw disk
//! choose a backing file for the next boot.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::core::cancel::Cancel;
use crate::core::config::{BaseImage, ImageDigest, ImageSource};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, ImageUse};
use crate::core::images::digest::{Algorithm, DigestCache};
use crate::core::images::qemu_img::{self, QemuImgError};
use crate::core::images::{fetch, qcow2};
use crate::core::reporter::Emitter;
use crate::core::root::paths::StateRoot;

const GET_AGAIN: &str = "get the image again: it is damaged, or made for a newer QEMU than this host's";

/// Why an encrypted image is refused: QEMU would need the key on its command line, which other
/// users can read.
pub const ENCRYPTED: &str = "it is encrypted, and castra has no way to give QEMU its key";

/// The formats a base image may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// QEMU's own format, which may be sparse, compressed or hold snapshots.
    Qcow2,
    /// The plain bytes of the disk.
    Raw,
}

impl DiskFormat {
    /// QEMU's name of the format.
    pub fn as_str(self) -> &'static str {
        match self {
            DiskFormat::Qcow2 => "qcow2",
            DiskFormat::Raw => "raw",
        }
    }
}

/// A base image that was checked and accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedBase {
    /// The file, absolute.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// Size of the guest's disk, bytes.
    pub virtual_size: u64,
}

/// Turns what the config names into a file on this host: fetches a URL if necessary, verifies a
/// pinned digest, and checks that the file is a disk image that QEMU may open. `home` is
/// `CASTRA_HOME`.
pub fn resolve_base_image(
    image: &BaseImage,
    home: &Path,
    state: &StateRoot,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> Result<ResolvedBase> {
    let digests = DigestCache::new(state.images());
    match &image.source {
        ImageSource::Path(path) => {
            let found = inspect(path, cancel)?;
            if let Some(pinned) = &image.digest {
                verify(path, pinned, &digests, cancel)?;
            }
            Ok(found)
        }
        ImageSource::Url(url) => {
            let path = fetch::ensure_fetched(url, image.digest.as_ref(), home, &digests, emitter, cancel)?;
            inspect(&path, cancel)
        }
    }
}

/// The same for plans: fetches nothing and writes nothing. `None`: the image has to be fetched
/// first.
pub fn look_at_base_image(
    image: &BaseImage,
    home: &Path,
    state: &StateRoot,
    cancel: &Cancel,
) -> Result<Option<ResolvedBase>> {
    let path = expected_path(image, home);
    if matches!(image.source, ImageSource::Url(_)) {
        // A file in the cache was verified when it was put there.
        return match path.exists() {
            true => inspect(&path, cancel).map(Some),
            false => Ok(None),
        };
    }
    let found = inspect(&path, cancel)?;
    if let Some(pinned) = &image.digest {
        verify(&path, pinned, &DigestCache::reading(state.images()), cancel)?;
    }
    Ok(Some(found))
}

/// The file of a base image as far as it is known without fetching anything, for plans.
pub fn expected_path(image: &BaseImage, home: &Path) -> PathBuf {
    match &image.source {
        ImageSource::Path(path) => path.clone(),
        ImageSource::Url(url) => fetch::cache_path(url, image.digest.as_ref(), home),
    }
}

/// Whether a file has the digest the config pins.
fn verify(path: &Path, pinned: &ImageDigest, digests: &DigestCache, cancel: &Cancel) -> Result<()> {
    let (algorithm, wanted) = Algorithm::of(pinned);
    let found = digests.digest(path, algorithm, cancel)?;
    if found == *wanted {
        return Ok(());
    }
    Err(refused(path)
        .because(format!(
            "its {algorithm} is {found}, but castra.toml pins {wanted}"
        ))
        .advice(format!(
            "get the image again, or set `{}` to its new digest if the change is meant",
            algorithm.key()
        )))
}

/// Checks a file: is it a disk image, of which format, and may QEMU open it?
pub fn inspect(path: &Path, cancel: &Cancel) -> Result<ResolvedBase> {
    let path = std::path::absolute(path).map_err(|error| Failure::io("read", path, &error))?;
    check_file(&path)?;
    let expected = check_contents(&path)?;
    refuse_if_written(&path)?;
    let info = match qemu_img::info(&path, cancel) {
        Ok(info) => info,
        Err(QemuImgError::Unusable(failure)) => return Err(*failure),
        Err(QemuImgError::Refused(words)) => return Err(refused(&path).because(words).advice(GET_AGAIN)),
    };
    let format = match (info.format.as_str(), expected) {
        ("qcow2", DiskFormat::Qcow2) => DiskFormat::Qcow2,
        ("raw", DiskFormat::Raw) => DiskFormat::Raw,
        (other, _) => {
            return Err(refused(&path)
                .because(format!("its format is {other}; castra takes qcow2 and raw"))
                .advice(format!(
                    "convert it: qemu-img convert -f {other} -O qcow2 {} NEW.qcow2",
                    crate::core::process::shell_quote(&path.to_string_lossy())
                )));
        }
    };
    Ok(ResolvedBase {
        path,
        format,
        virtual_size: info.virtual_size,
    })
}

fn refused(path: &Path) -> Failure {
    Failure::new(Exit::Config, format!("can't use base image {}", path.display()))
}

/// Refuses an image that is open for writing elsewhere: its contents may change under a layer.
pub fn refuse_if_written(path: &Path) -> Result<()> {
    if host::image_use(path) != ImageUse::Written {
        return Ok(());
    }
    let users = host::file_users(path);
    let who = match users.as_slice() {
        [] => "another process, which this user may not see,".to_owned(),
        users => users.join(", "),
    };
    Err(
        Failure::new(Exit::Busy, format!("can't use base image {}", path.display()))
            .because(format!("{who} has it open for writing"))
            .advice("stop that VM, or give this one a copy of the image"),
    )
}

fn check_file(path: &Path) -> Result<()> {
    const HINT: &str = "`base_image` must name a qcow2 or raw disk image (relative paths start at castra.toml); \
         without it the VM boots the default guest";
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let why = match fs::symlink_metadata(path) {
                Ok(_) => "it is a symbolic link to a file that isn't there",
                Err(_) => "there is no such file",
            };
            return Err(refused(path).because(why).advice(HINT));
        }
        Err(error) => return Err(Failure::io("read", path, &error)),
    };
    if meta.is_dir() {
        return Err(refused(path).because("it is a directory").advice(HINT));
    }
    if !meta.is_file() && !meta.file_type().is_block_device() {
        return Err(refused(path)
            .because("it is neither a file nor a block device")
            .advice(HINT));
    }
    match File::open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Err(refused(path).because("this user may not read it").advice(format!(
                "chmod a+r {}",
                crate::core::process::shell_quote(&path.to_string_lossy())
            )))
        }
        Err(error) => Err(Failure::io("read", path, &error)),
    }
}

/// The format according to the first bytes, before any tool opens the file. Refuses an image that
/// names other files, and a file that is plainly no disk. Everything else counts as raw until
/// `qemu-img` says otherwise.
fn check_contents(path: &Path) -> Result<DiskFormat> {
    match qcow2::load_header(path) {
        Ok(None) => {}
        Ok(Some(header)) => {
            if let Some(backing) = header.backing_file {
                return Err(refused(path)
                    .because(format!(
                        "it is itself a layer over {}, and an image could name any file of this host that way",
                        backing.display()
                    ))
                    .advice(format!(
                        "flatten it if you trust it: qemu-img convert -O qcow2 {} FLAT.qcow2",
                        crate::core::process::shell_quote(&path.to_string_lossy())
                    )));
            }
            if header.external_data {
                return Err(refused(path)
                    .because("its data lies in another file, and an image could name any file of this host that way")
                    .advice(format!(
                        "flatten it if you trust it: qemu-img convert -O qcow2 {} FLAT.qcow2",
                        crate::core::process::shell_quote(&path.to_string_lossy())
                    )));
            }
            if header.encrypted {
                return Err(refused(path).because(ENCRYPTED).advice(format!(
                    "decrypt it: qemu-img convert, with its key by --object and --image-opts, -O qcow2 {} PLAIN.qcow2",
                    crate::core::process::shell_quote(&path.to_string_lossy())
                )));
            }
            return Ok(DiskFormat::Qcow2);
        }
        Err(error) if error.kind() == ErrorKind::InvalidData => {
            return Err(refused(path).because(error).advice(GET_AGAIN));
        }
        Err(error) => return Err(Failure::io("read", path, &error)),
    }
    let head = head_of(path).map_err(|error| Failure::io("read", path, &error))?;
    let length = fs::metadata(path).map_or(0, |meta| if meta.is_file() { meta.len() } else { 512 });
    match not_a_disk(&head, length) {
        Some(why) => Err(refused(path)
            .because(why)
            .advice("`base_image` takes qcow2 and raw disk images; unpack or convert it first")),
        None => Ok(DiskFormat::Raw),
    }
}

fn head_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    File::open(path)?.take(512).read_to_end(&mut head)?;
    Ok(head)
}

/// A raw disk has no magic number, so any file would pass as one, and its guest wouldn't boot.
/// These are the files that people name by mistake.
fn not_a_disk(head: &[u8], length: u64) -> Option<String> {
    const PACKED: [(&[u8], &str); 6] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh", "bzip2"),
        (b"PK\x03\x04", "zip"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
    ];
    if length == 0 {
        return Some("it is empty".into());
    }
    if let Some((_, name)) = PACKED.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Some(format!("it is packed with {name}"));
    }
    if head.starts_with(b"\x7fELF") {
        return Some("it is a program or kernel (ELF), not a disk; a kernel goes under `kernel`".into());
    }
    let is_text = |byte: &u8| matches!(byte, b'\t' | b'\n' | b'\r' | 0x20..=0x7e);
    if head.iter().all(is_text) {
        let first: String = String::from_utf8_lossy(head)
            .lines()
            .next()
            .unwrap_or_default()
            .chars()
            .take(40)
            .collect();
        return Some(format!("it is a text file beginning `{first}`"));
    }
    // Other formats keep their headers in different places of the file, so qemu-img is asked for
    // the format.
    let has_magic = [&b"KDMV"[..], b"vhdxfile", b"QED\0", b"<<< ", b"conectix", b"LUKS"]
        .iter()
        .any(|magic| head.starts_with(magic));
    if !has_magic && !length.is_multiple_of(512) {
        return Some(format!(
            "it has no head of a known disk format, and its length of {length} bytes is no multiple of 512, \
             which every raw disk's is"
        ));
    }
    None
}

#[cfg(test)]
#[path = "base_tests.rs"]
mod tests;
