//! `artifact_hash`: one hash over everything that a bootstrap copies into a guest (docs/IMAGES.md).
//!
//! Here: the canonical order and form of script, payload, environment and metadata. Not here:
//! copying any of it (`core::bootstrap`), or the hash of what the guest booted (`images::digest`).
//!
//! The same tree gives the same hash on every machine: the hash covers names relative to the
//! payload, the executable bit, link targets and contents, but neither owners nor times nor the
//! order in which a directory lists its entries. Memory is bounded by the largest single directory.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirEntry, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;

const READ_BYTES: usize = 256 * 1024;
/// Deeper trees don't fit into a path that Linux takes (4096 bytes).
const MAX_DEPTH: usize = 2048;

/// SHA-256 over script, payload directory, environment and metadata file, in that order; each may
/// be missing. Lower-case hex.
pub fn artifact_hash(
    script: Option<&Path>,
    payload: Option<&Path>,
    env: &BTreeMap<String, String>,
    metadata: Option<&Path>,
) -> Result<String> {
    // The first record holds the version of this form, so a later form can't give the same hash by
    // chance.
    let mut form = TreeHash(Sha256::new());
    form.record(b'V', b"castra-artifact-1", b"");
    if let Some(script) = script {
        form.file(b'S', b"", script)?;
    }
    if let Some(payload) = payload {
        form.record(b'P', b"", b"");
        walk(payload, &mut |relative, path, meta| {
            form.entry(relative, path, meta)
        })?;
    }
    for (key, value) in env {
        form.record(b'E', key.as_bytes(), value.as_bytes());
    }
    if let Some(metadata) = metadata {
        form.file(b'M', b"", metadata)?;
    }
    Ok(host::hex(&form.0.finalize()))
}

/// The hash of what was added so far. Every part is added with its length, so that two different
/// trees never give the same bytes.
struct TreeHash(Sha256);

impl TreeHash {
    fn record(&mut self, kind: u8, name: &[u8], value: &[u8]) {
        self.0.update([kind]);
        for part in [name, value] {
            self.0.update((part.len() as u64).to_be_bytes());
            self.0.update(part);
        }
    }

    /// A file: executable or not, and the hash of its contents, whose length needn't be known.
    fn file(&mut self, kind: u8, name: &[u8], path: &Path) -> Result<()> {
        let read = |path: &Path| -> io::Result<(bool, Vec<u8>)> {
            let mut file = File::open(path)?;
            let executable = is_executable(&file.metadata()?);
            let mut hasher = Sha256::new();
            let mut buffer = vec![0; READ_BYTES];
            loop {
                match file.read(&mut buffer) {
                    Ok(0) => return Ok((executable, hasher.finalize().to_vec())),
                    Ok(n) => hasher.update(&buffer[..n]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        };
        let (executable, mut value) = read(path).map_err(|error| Failure::io("read", path, &error))?;
        value.push(u8::from(executable));
        self.record(kind, name, &value);
        Ok(())
    }

    fn entry(&mut self, relative: &[u8], path: &Path, meta: &Metadata) -> Result<()> {
        let kind = meta.file_type();
        if kind.is_symlink() {
            let target = fs::read_link(path).map_err(|error| Failure::io("read", path, &error))?;
            self.record(b'L', relative, target.as_os_str().as_bytes());
        } else if kind.is_dir() {
            self.record(b'D', relative, b"");
        } else {
            self.file(b'F', relative, path)?;
        }
        Ok(())
    }
}

fn is_executable(meta: &Metadata) -> bool {
    meta.permissions().mode() & 0o100 != 0
}

type Visit<'a> = dyn FnMut(&[u8], &Path, &Metadata) -> Result<()> + 'a;

/// Calls `visit` for everything below a directory: each directory before its entries, names in the
/// order of their bytes, without sockets, pipes and devices. Links are not followed, but the root
/// itself may be one.
fn walk(root: &Path, visit: &mut Visit<'_>) -> Result<()> {
    let refused = |why: &str| {
        Failure::new(Exit::Config, format!("can't use payload {}", root.display()))
            .because(why)
            .advice("`payload` must name a directory of files, directories and symbolic links")
    };
    match fs::metadata(root) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Err(refused("it is not a directory")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(refused("there is no such directory"));
        }
        Err(error) => return Err(Failure::io("read", root, &error)),
    }
    // The open directories, innermost last, each with its remaining entries in reverse order.
    let mut open: Vec<(usize, Vec<OsString>)> = vec![(0, names_in(root)?)];
    let mut relative: Vec<u8> = Vec::new();
    while let Some((length, names)) = open.last_mut() {
        relative.truncate(*length);
        let Some(name) = names.pop() else {
            open.pop();
            continue;
        };
        if !relative.is_empty() {
            relative.push(b'/');
        }
        relative.extend(name.as_bytes());
        let path = root.join(std::ffi::OsStr::from_bytes(&relative));
        let meta = fs::symlink_metadata(&path).map_err(|error| Failure::io("read", &path, &error))?;
        let kind = meta.file_type();
        if !(kind.is_file() || kind.is_dir() || kind.is_symlink()) {
            // A socket, pipe or device isn't copied, so it isn't part of the artifact.
            continue;
        }
        visit(&relative, &path, &meta)?;
        if kind.is_dir() {
            if open.len() == MAX_DEPTH {
                return Err(refused("its directories are nested too deeply"));
            }
            open.push((relative.len(), names_in(&path)?));
        }
    }
    Ok(())
}

/// The names in a directory, last first.
fn names_in(directory: &Path) -> Result<Vec<OsString>> {
    let read = || -> io::Result<Vec<OsString>> {
        fs::read_dir(directory)?
            .map(|entry: io::Result<DirEntry>| Ok(entry?.file_name()))
            .collect()
    };
    let mut names = read().map_err(|error| Failure::io("read", directory, &error))?;
    names.sort_unstable_by(|one, other| other.cmp(one));
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;
    use std::os::unix::fs::symlink;

    fn payload_hash(dir: &Path) -> String {
        artifact_hash(None, Some(dir), &BTreeMap::new(), None).unwrap()
    }

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn sample(scratch: &Scratch, name: &str, order: &[&str]) -> std::path::PathBuf {
        let dir = scratch.path(name);
        fs::create_dir_all(dir.join("etc/empty")).unwrap();
        for file in order {
            fs::write(dir.join(file), format!("contents of {file}")).unwrap();
            mode(&dir.join(file), 0o644);
        }
        mode(&dir.join("run.sh"), 0o755);
        symlink("../run.sh", dir.join("etc/link")).unwrap();
        dir
    }

    #[test]
    fn the_form_is_fixed() {
        let scratch = Scratch::new("artifact-form");
        let dir = sample(&scratch, "payload", &["run.sh", "b", "etc/a"]);
        let script = scratch.path("script");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        mode(&script, 0o644);
        let env = BTreeMap::from([("APP".to_owned(), "demo".to_owned())]);
        // A changed number here means that every artifact hash ever told has changed.
        assert_eq!(
            artifact_hash(Some(&script), Some(&dir), &env, Some(&script)).unwrap(),
            "aeae4f35ab9a2e054d71c1df025af221a7acf4ea61be64d3ebd468ef15cbb2ce"
        );
    }

    #[test]
    fn the_same_tree_anywhere_is_the_same() {
        let scratch = Scratch::new("artifact-same");
        let one = sample(&scratch, "one", &["run.sh", "b", "etc/a"]);
        let two = sample(&scratch, "two", &["etc/a", "b", "run.sh"]);
        mode(&two.join("b"), 0o600);
        mode(&two.join("run.sh"), 0o711);
        let past = std::time::SystemTime::UNIX_EPOCH;
        File::options()
            .write(true)
            .open(two.join("b"))
            .unwrap()
            .set_modified(past)
            .unwrap();
        assert_eq!(payload_hash(&one), payload_hash(&two));
        symlink(&one, scratch.path("link")).unwrap();
        assert_eq!(payload_hash(&one), payload_hash(&scratch.path("link")));
    }

    #[test]
    fn every_change_shows() {
        let scratch = Scratch::new("artifact-change");
        type Change<'a> = (&'a str, &'a dyn Fn(&Path));
        let changes: [Change<'_>; 8] = [
            ("contents", &|dir| fs::write(dir.join("b"), "other").unwrap()),
            ("executable", &|dir| mode(&dir.join("b"), 0o755)),
            ("renamed", &|dir| {
                fs::rename(dir.join("b"), dir.join("c")).unwrap()
            }),
            ("moved", &|dir| {
                fs::rename(dir.join("b"), dir.join("etc/b")).unwrap()
            }),
            ("added", &|dir| fs::write(dir.join("new"), "").unwrap()),
            ("empty directory", &|dir| {
                fs::remove_dir(dir.join("etc/empty")).unwrap()
            }),
            ("file for directory", &|dir| {
                fs::remove_dir(dir.join("etc/empty")).unwrap();
                fs::write(dir.join("etc/empty"), "").unwrap();
            }),
            ("link target", &|dir| {
                fs::remove_file(dir.join("etc/link")).unwrap();
                symlink("../b", dir.join("etc/link")).unwrap();
            }),
        ];
        let order = ["run.sh", "b", "etc/a"];
        let mut seen = vec![payload_hash(&sample(&scratch, "untouched", &order))];
        for (name, change) in changes {
            let dir = sample(&scratch, name, &order);
            change(&dir);
            let hash = payload_hash(&dir);
            assert!(!seen.contains(&hash), "{name} makes no difference");
            seen.push(hash);
        }
    }

    #[test]
    fn the_parts_are_not_interchangeable() {
        let scratch = Scratch::new("artifact-parts");
        let file = scratch.path("file");
        fs::write(&file, "x").unwrap();
        let none = BTreeMap::new();
        let env = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect()
        };
        let empty = scratch.path("empty");
        fs::create_dir(&empty).unwrap();
        let hashes = [
            artifact_hash(None, None, &none, None).unwrap(),
            artifact_hash(Some(&file), None, &none, None).unwrap(),
            artifact_hash(None, None, &none, Some(&file)).unwrap(),
            artifact_hash(None, Some(&empty), &none, None).unwrap(),
            artifact_hash(None, None, &env(&[("A", "bc")]), None).unwrap(),
            artifact_hash(None, None, &env(&[("AB", "c")]), None).unwrap(),
            artifact_hash(None, None, &env(&[("A", ""), ("bc", "")]), None).unwrap(),
        ];
        let distinct: std::collections::BTreeSet<_> = hashes.iter().collect();
        assert_eq!(distinct.len(), hashes.len());
    }

    #[test]
    fn sockets_and_pipes_count_for_nothing() {
        let scratch = Scratch::new("artifact-special");
        let dir = scratch.path("dir");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("file"), "text").unwrap();
        let before = payload_hash(&dir);
        let _socket = std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap();
        nix::unistd::mkfifo(&dir.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(payload_hash(&dir), before);
    }

    #[test]
    fn what_can_not_be_brought_is_refused() {
        let scratch = Scratch::new("artifact-refuse");
        fs::write(scratch.path("file"), "").unwrap();
        for (path, why) in [("file", "not a directory"), ("gone", "no such directory")] {
            let dir = scratch.path(path);
            let failure = artifact_hash(None, Some(&dir), &BTreeMap::new(), None).unwrap_err();
            assert_eq!(failure.exit, Exit::Config);
            assert!(failure.why.unwrap().contains(why));
        }
        let gone = scratch.path("gone");
        let failure = artifact_hash(Some(&gone), None, &BTreeMap::new(), None).unwrap_err();
        assert!(failure.what.contains("gone"), "{failure}");
    }
}
