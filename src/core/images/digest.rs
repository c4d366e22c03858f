//! Digests of image files. Each is computed once, until its file changes.
//!
//! Here: hashing in bounded memory, the cache, `base_hash` (docs/IMAGES.md). Not here: whether a digest
//! is the pinned one (`images::base`, `images::fetch`), hashes of bootstrap artifacts
//! (`images::artifact`).
//!
//! The cache is a small file per image under the state root's `images/`. Its key is path, size,
//! mtime, device and inode; a file that changed in any of them is read again.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256, Sha512};

use crate::core::cancel::Cancel;
use crate::core::config::ImageDigest;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::root::records::Stamp;

/// Bytes of one read; large enough that the time is spent in the hash, not in system calls.
const READ_BYTES: usize = 256 * 1024;

/// The digests a config may pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    /// The algorithm and the digits of a pinned digest.
    pub fn of(pinned: &ImageDigest) -> (Algorithm, &str) {
        match pinned {
            ImageDigest::Sha256(digits) => (Algorithm::Sha256, digits),
            ImageDigest::Sha512(digits) => (Algorithm::Sha512, digits),
        }
    }

    /// The config key that pins it.
    pub fn key(self) -> &'static str {
        match self {
            Algorithm::Sha256 => "base_image_sha256",
            Algorithm::Sha512 => "base_image_sha512",
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Algorithm::Sha256 => "SHA-256",
            Algorithm::Sha512 => "SHA-512",
        })
    }
}

/// Computed digests, remembered in a directory.
#[derive(Clone, Debug)]
pub struct DigestCache {
    dir: PathBuf,
    keeps: bool,
}

/// One cache file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    path: PathBuf,
    #[serde(flatten)]
    stamp: Stamp,
    #[serde(default)]
    sha256: Option<String>,
    #[serde(default)]
    sha512: Option<String>,
}

impl Entry {
    fn digest(&self, algorithm: Algorithm) -> Option<&str> {
        match algorithm {
            Algorithm::Sha256 => self.sha256.as_deref(),
            Algorithm::Sha512 => self.sha512.as_deref(),
        }
    }
}

impl DigestCache {
    /// A cache in this directory (`StateRoot::images`), which is created when the first digest is
    /// kept.
    pub fn new(dir: impl Into<PathBuf>) -> DigestCache {
        DigestCache {
            dir: dir.into(),
            keeps: true,
        }
    }

    /// The same cache for a command that writes nothing: a missing digest is computed and not kept.
    pub fn reading(dir: impl Into<PathBuf>) -> DigestCache {
        DigestCache {
            dir: dir.into(),
            keeps: false,
        }
    }

    fn file_for(&self, path: &Path) -> PathBuf {
        let name = host::hex(&Sha256::digest(path.as_os_str().as_bytes())[..8]);
        self.dir.join(format!("digest-{name}.json"))
    }

    /// The digest of a file, if it is known without reading the file.
    pub fn known(&self, path: &Path, algorithm: Algorithm) -> Option<String> {
        let stamp = Stamp::of(&fs::metadata(path).ok()?);
        self.entry(path, &stamp)?.digest(algorithm).map(str::to_owned)
    }

    /// The known digests (SHA-256 and SHA-512) of a file as it was with this stamp, even if it has
    /// changed since.
    pub fn known_of(&self, path: &Path, stamp: &Stamp) -> (Option<String>, Option<String>) {
        self.entry(path, stamp)
            .map_or((None, None), |entry| (entry.sha256, entry.sha512))
    }

    fn entry(&self, path: &Path, stamp: &Stamp) -> Option<Entry> {
        let bytes = host::read_state_file(&self.file_for(path)).ok()?;
        let entry: Entry = serde_json::from_slice(&bytes).ok()?;
        (entry.path == path && entry.stamp == *stamp).then_some(entry)
    }

    /// The digest of a file as lower-case hex; computed if the cache doesn't have it.
    pub fn digest(&self, path: &Path, algorithm: Algorithm, cancel: &Cancel) -> Result<String> {
        if let Some(known) = self.known(path, algorithm) {
            return Ok(known);
        }
        let (stamp, digest) = digest_of(path, algorithm, cancel)?;
        if self.keeps {
            self.keep(path, stamp, algorithm, &digest);
        }
        Ok(digest)
    }

    /// Moves the known digests of a file to the file's new name.
    pub fn renamed(&self, from: &Path, to: &Path) {
        let stamp = fs::metadata(to).ok().map(|meta| Stamp::of(&meta));
        if let Some(stamp) = stamp
            && let Some(entry) = self.entry(from, &stamp)
        {
            for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
                if let Some(digest) = entry.digest(algorithm) {
                    self.keep(to, stamp.clone(), algorithm, digest);
                }
            }
        }
        let _ = host::remove_if_there(&self.file_for(from));
    }

    /// Keeps a digest. One that can't be kept is computed again next time, so the error is ignored.
    fn keep(&self, path: &Path, stamp: Stamp, algorithm: Algorithm, digest: &str) {
        let mut entry = self.entry(path, &stamp).unwrap_or(Entry {
            path: path.to_owned(),
            stamp,
            sha256: None,
            sha512: None,
        });
        match algorithm {
            Algorithm::Sha256 => entry.sha256 = Some(digest.to_owned()),
            Algorithm::Sha512 => entry.sha512 = Some(digest.to_owned()),
        }
        let kept = host::ensure_private_dir(&self.dir)
            .map_err(serde_json::Error::io)
            .and_then(|()| serde_json::to_vec(&entry))
            .and_then(|bytes| {
                host::replace_file(&self.file_for(path), &bytes).map_err(serde_json::Error::io)
            });
        if let Err(error) = kept {
            log::debug!("the digest of {} can't be kept: {error}", path.display());
        }
    }
}

/// SHA-256 of a file, computed now and not kept.
pub fn sha256_of(path: &Path, cancel: &Cancel) -> Result<String> {
    digest_of(path, Algorithm::Sha256, cancel).map(|(_, digest)| digest)
}

/// The digest of a file, computed now and not kept.
pub fn compute(path: &Path, algorithm: Algorithm, cancel: &Cancel) -> Result<String> {
    digest_of(path, algorithm, cancel).map(|(_, digest)| digest)
}

/// Reads a whole file; its stamp, and its digest.
fn digest_of(path: &Path, algorithm: Algorithm, cancel: &Cancel) -> Result<(Stamp, String)> {
    let io = |error: io::Error| Failure::io("read", path, &error);
    let mut file = File::open(path).map_err(io)?;
    let before = Stamp::of(&file.metadata().map_err(io)?);
    let digest = hash(&mut file, algorithm, cancel).map_err(io)?.ok_or_else(|| {
        Failure::new(
            Exit::Interrupted,
            format!("interrupted while reading {}", path.display()),
        )
    })?;
    if Stamp::of(&file.metadata().map_err(io)?) != before {
        return Err(Failure::new(
            Exit::Busy,
            format!("can't compute the {algorithm} of {}", path.display()),
        )
        .because("another process wrote to it meanwhile")
        .advice("try again when nobody writes to it"));
    }
    Ok((before, digest))
}

/// Hashes what a reader gives; `None` if it was told to stop.
fn hash(reader: &mut impl Read, algorithm: Algorithm, cancel: &Cancel) -> io::Result<Option<String>> {
    match algorithm {
        Algorithm::Sha256 => hash_with::<Sha256>(reader, cancel),
        Algorithm::Sha512 => hash_with::<Sha512>(reader, cancel),
    }
}

fn hash_with<D: Digest>(reader: &mut impl Read, cancel: &Cancel) -> io::Result<Option<String>> {
    let mut hasher = D::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        if cancel.is_requested() {
            return Ok(None);
        }
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(Some(host::hex(&hasher.finalize()))),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// SHA-256 of bytes in memory, lower-case hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    host::hex(&Sha256::digest(bytes))
}

/// What a VM boots from, as `base_hash` names it.
#[derive(Clone, Copy, Debug)]
pub enum HashedSource<'a> {
    /// A base image.
    Image(&'a Path),
    /// A kernel, its initramfs and its command line.
    Kernel {
        /// bzImage or vmlinux.
        kernel: &'a Path,
        /// initramfs.
        initrd: Option<&'a Path>,
        /// Command line.
        cmdline: &'a str,
    },
}

/// `base_hash` (docs/IMAGES.md). Of an image it is the file's own SHA-256. Of a kernel it is the
/// SHA-256 over the SHA-256 of kernel and initrd and over the command line, a line each (`-`: no
/// initrd), so that each file's digest can be remembered. Read while the guest boots.
pub fn base_hash(source: HashedSource<'_>, cache: &DigestCache, cancel: &Cancel) -> Result<String> {
    let of = |path: &Path| cache.digest(path, Algorithm::Sha256, cancel);
    match source {
        HashedSource::Image(path) => of(path),
        HashedSource::Kernel {
            kernel,
            initrd,
            cmdline,
        } => {
            let initrd = initrd.map(of).transpose()?;
            Ok(combine(&of(kernel)?, initrd.as_deref(), cmdline))
        }
    }
}

/// The `base_hash` of a kernel from the digests of its files.
pub fn combine(kernel: &str, initrd: Option<&str>, cmdline: &str) -> String {
    sha256_hex(format!("{kernel}\n{}\n{cmdline}\n", initrd.unwrap_or("-")).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;
    use std::time::{Duration, SystemTime};

    const ABC_256: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn digests_are_the_known_ones() {
        let scratch = Scratch::new("digest");
        let file = scratch.path("abc");
        fs::write(&file, "abc").unwrap();
        let cache = DigestCache::new(scratch.path("images"));
        let go = Cancel::new();
        assert_eq!(cache.digest(&file, Algorithm::Sha256, &go).unwrap(), ABC_256);
        let long = cache.digest(&file, Algorithm::Sha512, &go).unwrap();
        assert!(
            long.starts_with("ddaf35a193617aba") && long.len() == 128,
            "{long}"
        );
        assert_eq!(cache.known(&file, Algorithm::Sha256).unwrap(), ABC_256);
        assert_eq!(cache.known(&file, Algorithm::Sha512).unwrap(), long);
    }

    #[test]
    fn a_changed_file_is_read_again_and_an_unchanged_one_is_not() {
        let scratch = Scratch::new("digest-cache");
        let file = scratch.path("disk");
        fs::write(&file, "abc").unwrap();
        let cache = DigestCache::new(scratch.path("images"));
        let go = Cancel::new();
        cache.digest(&file, Algorithm::Sha256, &go).unwrap();
        // Same length, mtime put back: what the cache goes by is unchanged, so it answers from memory.
        let mtime = fs::metadata(&file).unwrap().modified().unwrap();
        let touch = |time: SystemTime| {
            File::options()
                .write(true)
                .open(&file)
                .unwrap()
                .set_modified(time)
                .unwrap()
        };
        fs::write(&file, "xyz").unwrap();
        touch(mtime);
        assert_eq!(cache.digest(&file, Algorithm::Sha256, &go).unwrap(), ABC_256);
        touch(mtime + Duration::from_millis(1));
        assert_eq!(cache.known(&file, Algorithm::Sha256), None);
        assert_ne!(cache.digest(&file, Algorithm::Sha256, &go).unwrap(), ABC_256);
        // The same bytes under a new inode count as another file.
        fs::write(scratch.path("copy"), "abc").unwrap();
        fs::rename(scratch.path("copy"), &file).unwrap();
        assert_eq!(cache.digest(&file, Algorithm::Sha256, &go).unwrap(), ABC_256);
    }

    #[test]
    fn damaged_cache_files_count_for_nothing() {
        let scratch = Scratch::new("digest-damage");
        let file = scratch.path("disk");
        fs::write(&file, "abc").unwrap();
        let cache = DigestCache::new(scratch.path("images"));
        fs::create_dir(scratch.path("images")).unwrap();
        fs::write(cache.file_for(&file), "{").unwrap();
        assert_eq!(
            cache.digest(&file, Algorithm::Sha256, &Cancel::new()).unwrap(),
            ABC_256
        );
    }

    #[test]
    fn a_request_to_stop_ends_it() {
        let scratch = Scratch::new("digest-stop");
        fs::write(scratch.path("disk"), "abc").unwrap();
        let cancel = Cancel::new();
        cancel.request();
        let cache = DigestCache::new(scratch.path("images"));
        let failure = cache
            .digest(&scratch.path("disk"), Algorithm::Sha256, &cancel)
            .unwrap_err();
        assert_eq!(failure.exit, Exit::Interrupted);
    }

    #[test]
    fn the_hash_of_a_kernel_takes_in_all_three() {
        let scratch = Scratch::new("digest-kernel");
        let (kernel, initrd) = (scratch.path("k"), scratch.path("i"));
        fs::write(&kernel, "abc").unwrap();
        fs::write(&initrd, "abc").unwrap();
        let cache = DigestCache::new(scratch.path("images"));
        let of = |initrd, cmdline| {
            let source = HashedSource::Kernel {
                kernel: kernel.as_path(),
                initrd,
                cmdline,
            };
            base_hash(source, &cache, &Cancel::new()).unwrap()
        };
        let whole = of(Some(initrd.as_path()), "quiet");
        assert_eq!(
            whole,
            sha256_hex(format!("{ABC_256}\n{ABC_256}\nquiet\n").as_bytes())
        );
        assert_ne!(whole, of(None, "quiet"));
        assert_ne!(whole, of(Some(initrd.as_path()), ""));
        assert_eq!(
            base_hash(HashedSource::Image(&kernel), &cache, &Cancel::new()).unwrap(),
            ABC_256
        );
    }
}
