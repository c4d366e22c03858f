//! Script and payload as one tar stream, written here so that castra decides every name and mode
//! in it and knows its length beforehand.
//!
//! Here: walking the payload and the bytes of the format. Not here: sending the stream or
//! unpacking it (`bootstrap::transfer`, `bootstrap::guest_scripts`).
//!
//! The format is what GNU tar, BusyBox and libarchive all read: ustar headers, GNU's `L` and `K`
//! records for long names, binary sizes above 8 GiB. Owners are left at root: an unpacking root
//! keeps them, everybody else gets their own.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The folder of the payload beside the script, in the guest.
pub const PAYLOAD_NAME: &str = "payload";
/// The last member; an archive without it was cut off, and nothing of it is used.
pub const COMPLETE_MARK: &str = ".castra-complete";

const BLOCK: usize = 512;
const COPY_BYTES: usize = 256 * 1024;
/// Special files named in a warning; more are counted.
const NAMES_SHOWN: usize = 5;

/// What a payload holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PayloadStats {
    /// Bytes of all regular files.
    pub bytes: u64,
    /// Files, directories and links.
    pub entries: u64,
    /// Sockets, pipes and devices, which aren't copied.
    pub special: Vec<PathBuf>,
}

impl PayloadStats {
    /// What a person should know before it is copied.
    pub fn warnings(&self) -> Option<String> {
        let first = self
            .special
            .iter()
            .take(NAMES_SHOWN)
            .map(|path| path.display().to_string())
            .collect::<Vec<_>>()
            .join(", ");
        match self.special.len() {
            0 => None,
            count if count <= NAMES_SHOWN => Some(format!(
                "{first}: not copied, as it is neither file, directory nor link"
            )),
            count => Some(format!(
                "{first} and {} more: not copied, as it is neither file, directory nor link",
                count - NAMES_SHOWN
            )),
        }
    }
}

/// Looks through a payload without reading its files.
pub fn scan_payload(payload: &Path) -> io::Result<PayloadStats> {
    let mut stats = PayloadStats::default();
    walk(payload, &mut |path, meta| {
        let kind = meta.file_type();
        if kind.is_file() {
            stats.bytes += meta.len();
        }
        if kind.is_file() || kind.is_dir() || kind.is_symlink() {
            stats.entries += 1;
        } else {
            stats.special.push(path.to_owned());
        }
        Ok(())
    })?;
    Ok(stats)
}

/// Writes the archive, everything below the folder `top`: the script under its own name with mode
/// 0755, the payload under [`PAYLOAD_NAME`], the mark of completeness last.
pub fn write(
    out: &mut dyn Write,
    top: &str,
    script: Option<&Path>,
    payload: Option<&Path>,
) -> io::Result<()> {
    let mut out = io::BufWriter::with_capacity(COPY_BYTES, out);
    let below = |name: &OsStr| [top.as_bytes(), b"/", name.as_bytes()].concat();
    if let Some(script) = script {
        let name = below(script.file_name().unwrap_or_else(|| OsStr::new("script")));
        let file = File::open(script).map_err(|error| naming(script, &error))?;
        let meta = file.metadata().map_err(|error| naming(script, &error))?;
        let member = Member {
            mode: 0o755,
            size: meta.len(),
            ..Member::of(&name, &meta, b'0')
        };
        member.write_to(&mut out)?;
        copy_contents(script, file, meta.len(), &mut out)?;
    }
    if let Some(payload) = payload {
        let base = below(OsStr::new(PAYLOAD_NAME));
        walk(payload, &mut |path, meta| {
            let mut name = base.clone();
            let inner = path.strip_prefix(payload).unwrap_or(Path::new(""));
            if !inner.as_os_str().is_empty() {
                name.push(b'/');
                name.extend_from_slice(inner.as_os_str().as_bytes());
            }
            write_entry(&mut out, name, path, meta)
        })?;
    }
    Member {
        name: &below(OsStr::new(COMPLETE_MARK)),
        link: b"",
        kind: b'0',
        mode: 0o600,
        size: 0,
        mtime: 0,
    }
    .write_to(&mut out)?;
    out.write_all(&END)?;
    out.flush()
}

fn write_entry(out: &mut dyn Write, mut name: Vec<u8>, path: &Path, meta: &Metadata) -> io::Result<()> {
    let kind = meta.file_type();
    if kind.is_dir() {
        name.push(b'/');
        Member::of(&name, meta, b'5').write_to(out)
    } else if kind.is_symlink() {
        let target = fs::read_link(path).map_err(|error| naming(path, &error))?;
        Member {
            link: target.as_os_str().as_bytes(),
            mode: 0o777,
            ..Member::of(&name, meta, b'2')
        }
        .write_to(out)
    } else if kind.is_file() {
        let file = File::open(path).map_err(|error| naming(path, &error))?;
        // Its length as it is now: it may have grown since its folder was read.
        let meta = file.metadata().map_err(|error| naming(path, &error))?;
        Member {
            size: meta.len(),
            ..Member::of(&name, &meta, b'0')
        }
        .write_to(out)?;
        copy_contents(path, file, meta.len(), out)
    } else {
        Ok(())
    }
}

/// Visits a directory and everything below it, parents first, names in byte order, links not
/// followed (the directory itself may be one).
fn walk(root: &Path, visit: &mut dyn FnMut(&Path, &Metadata) -> io::Result<()>) -> io::Result<()> {
    let meta = fs::metadata(root)?;
    if !meta.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    visit(root, &meta)?;
    let mut folders = vec![sorted_entries(root)?.into_iter()];
    while let Some(folder) = folders.last_mut() {
        let Some(path) = folder.next() else {
            folders.pop();
            continue;
        };
        let meta = fs::symlink_metadata(&path).map_err(|error| naming(&path, &error))?;
        visit(&path, &meta)?;
        if meta.is_dir() {
            folders.push(
                sorted_entries(&path)
                    .map_err(|error| naming(&path, &error))?
                    .into_iter(),
            );
        }
    }
    Ok(())
}

fn sorted_entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = fs::read_dir(folder)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// Writes `size` bytes of a file, filled up to a whole block.
pub fn copy_contents(path: &Path, file: File, size: u64, out: &mut dyn Write) -> io::Result<()> {
    let mut left = size;
    let mut file = file.take(size);
    let mut buffer = vec![0; COPY_BYTES.min(usize::try_from(size).unwrap_or(COPY_BYTES)).max(1)];
    while left > 0 {
        let count = file.read(&mut buffer).map_err(|error| naming(path, &error))?;
        if count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{} became shorter while it was copied", path.display()),
            ));
        }
        out.write_all(&buffer[..count])?;
        left -= count as u64;
    }
    let rest = usize::try_from(size % BLOCK as u64).unwrap_or(0);
    if rest > 0 {
        out.write_all(&[0; BLOCK][rest..])?;
    }
    Ok(())
}

fn naming(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Two empty blocks.
pub const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// One header.
pub struct Member<'a> {
    /// Where it goes; a folder's ends in a slash.
    pub name: &'a [u8],
    /// Where a link leads.
    pub link: &'a [u8],
    /// `0` a file, `2` a link, `5` a folder.
    pub kind: u8,
    /// Permissions.
    pub mode: u32,
    /// Bytes of contents that follow.
    pub size: u64,
    /// Seconds since 1970.
    pub mtime: u64,
}

impl<'a> Member<'a> {
    /// The header of something without contents.
    pub fn of(name: &'a [u8], meta: &Metadata, kind: u8) -> Member<'a> {
        Member {
            name,
            link: b"",
            kind,
            mode: meta.permissions().mode() & 0o7777,
            size: 0,
            mtime: u64::try_from(meta.mtime()).unwrap_or(0),
        }
    }

    /// Writes it, a long name before it.
    pub fn write_to(&self, out: &mut dyn Write) -> io::Result<()> {
        for (text, kind) in [(self.link, b'K'), (self.name, b'L')] {
            if text.len() > 100 {
                let long = [text, b"\0"].concat();
                let size = long.len() as u64;
                let header = Member {
                    name: b"././@LongLink",
                    link: b"",
                    kind,
                    mode: 0o644,
                    size,
                    mtime: 0,
                };
                out.write_all(&header.block())?;
                out.write_all(&long)?;
                let rest = long.len() % BLOCK;
                if rest > 0 {
                    out.write_all(&[0; BLOCK][rest..])?;
                }
            }
        }
        out.write_all(&self.block())
    }

    fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        put(&mut block[0..100], self.name);
        put_number(&mut block[100..108], u64::from(self.mode));
        put_number(&mut block[108..116], 0);
        put_number(&mut block[116..124], 0);
        put_number(&mut block[124..136], self.size);
        put_number(&mut block[136..148], self.mtime);
        block[148..156].fill(b' ');
        block[156] = self.kind;
        put(&mut block[157..257], self.link);
        put(&mut block[257..265], b"ustar  \0");
        put(&mut block[265..297], b"root");
        put(&mut block[297..329], b"root");
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        put(&mut block[148..156], format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// As much of `text` as the field holds; longer names have gone before in a record of their own.
fn put(field: &mut [u8], text: &[u8]) {
    let count = text.len().min(field.len());
    field[..count].copy_from_slice(&text[..count]);
}

/// Octal with a closing NUL, or GNU's binary form for what doesn't fit.
fn put_number(field: &mut [u8], number: u64) {
    let digits = field.len() - 1;
    let octal = format!("{number:0digits$o}");
    if octal.len() <= digits {
        put(field, octal.as_bytes());
    } else {
        let length = field.len();
        field[length - 8..].copy_from_slice(&number.to_be_bytes());
        field[0] |= 0x80;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::process::Job;
    use crate::core::scratch::Scratch;
    use std::os::unix::fs::symlink;

    fn fill(payload: &Path) {
        let long = "n".repeat(120);
        fs::create_dir_all(payload.join("empty dir")).unwrap();
        fs::create_dir_all(payload.join(&long).join(&long)).unwrap();
        fs::write(payload.join(&long).join(&long).join("deep"), vec![7; 100_000]).unwrap();
        fs::write(payload.join("it's \"quoted\" $HOME\nand more"), "odd").unwrap();
        fs::write(payload.join("-rf"), "").unwrap();
        fs::write(payload.join("exact"), vec![1; 512]).unwrap();
        fs::write(payload.join("名前"), "name").unwrap();
        symlink("../elsewhere", payload.join("link")).unwrap();
        symlink(format!("{long}/{long}/deep"), payload.join("long link")).unwrap();
        fs::set_permissions(payload.join("exact"), fs::Permissions::from_mode(0o640)).unwrap();
        nix::unistd::mkfifo(
            &payload.join("pipe"),
            nix::sys::stat::Mode::from_bits_truncate(0o600),
        )
        .unwrap();
    }

    fn unpack(tar: &[&str], bytes: &[u8], into: &Path) {
        fs::create_dir_all(into).unwrap();
        Job::new(tar[0])
            .args(&tar[1..])
            .args(["-xpf", "-"])
            .dir(into)
            .stdin(bytes)
            .run()
            .unwrap();
    }

    /// Every path below with kind, mode, and contents or target.
    fn listing(root: &Path) -> Vec<String> {
        let mut seen = Vec::new();
        walk(root, &mut |path, meta| {
            let kind = meta.file_type();
            let body = if kind.is_symlink() {
                format!("-> {:?}", fs::read_link(path).unwrap())
            } else if kind.is_file() {
                format!(
                    "{:o} {:?}",
                    meta.mode() & 0o777,
                    crate::core::host::hex(&fs::read(path).unwrap())
                )
            } else {
                "folder".to_owned()
            };
            if !kind.is_file() && !kind.is_dir() && !kind.is_symlink() {
                return Ok(());
            }
            seen.push(format!("{:?} {body}", path.strip_prefix(root).unwrap()));
            Ok(())
        })
        .unwrap();
        seen
    }

    #[test]
    fn every_tar_unpacks_what_was_packed() {
        let scratch = Scratch::new("archive");
        let payload = scratch.path("pay load");
        fill(&payload);
        let script = scratch.path("run it.sh");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        let mut bytes = Vec::new();
        write(&mut bytes, ".in", Some(&script), Some(&payload)).unwrap();
        assert_eq!(bytes.len() % BLOCK, 0);
        for (number, tar) in [&["tar"][..], &["busybox", "tar"]].iter().enumerate() {
            let into = scratch.path(&format!("out-{number}"));
            unpack(tar, &bytes, &into);
            let into = into.join(".in");
            assert_eq!(listing(&into.join("payload")), listing(&payload), "{tar:?}");
            assert!(into.join(COMPLETE_MARK).exists());
            let mode = fs::metadata(into.join("run it.sh")).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o755);
        }
    }

    #[test]
    fn a_survey_counts_and_warns() {
        let scratch = Scratch::new("archive-survey");
        let payload = scratch.path("payload");
        fill(&payload);
        let found = scan_payload(&payload).unwrap();
        assert_eq!(found.bytes, 100_000 + 3 + 512 + 4);
        assert!(found.warnings().unwrap().contains("pipe"));
        assert!(scan_payload(&scratch.path("nothing")).is_err());
    }

    #[test]
    fn large_sizes_are_binary() {
        let mut field = [0; 12];
        put_number(&mut field, 8 << 30);
        assert_eq!(field, [0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]);
        put_number(&mut field, (8 << 30) - 1);
        assert_eq!(&field, b"77777777777\0");
    }
}
