//! Files of this machine as a tar stream.
//!
//! Here: walking the sources; what can't be read or isn't a file, folder or link is left out and named. Not here: the
//! bytes of the format (`bootstrap::archive`).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;

use super::Copied;
use crate::core::bootstrap::archive::{self, Member};
use crate::core::escape::escape_line;

const BUFFER_BYTES: usize = 256 * 1024;

/// Whether a source can be copied at all; otherwise why not.
pub fn check(source: &Path) -> Result<(), String> {
    match fs::metadata(source) {
        Ok(meta) if meta.is_file() || meta.is_dir() => Ok(()),
        Ok(_) => Err(special(source)),
        Err(error) => Err(named(source, &error)),
    }
}

/// Writes all sources, each under its own name, or the only one under this.
pub fn write(
    out: &mut dyn Write,
    sources: &[&PathBuf],
    name: Option<&OsStr>,
    copied: &mut Copied,
) -> io::Result<()> {
    let mut out = io::BufWriter::with_capacity(BUFFER_BYTES, out);
    for source in sources {
        // `.` and `/` have no name: what is in them goes into the folder.
        let own = name.or(source.file_name()).unwrap_or(OsStr::new("."));
        // A source that is a link is what it leads to.
        let meta = fs::metadata(source)?;
        entry(&mut out, own.as_bytes().to_vec(), source, &meta, copied)?;
    }
    out.write_all(&archive::END)?;
    out.flush()
}

fn entry(
    out: &mut dyn Write,
    mut name: Vec<u8>,
    path: &Path,
    meta: &Metadata,
    copied: &mut Copied,
) -> io::Result<()> {
    let kind = meta.file_type();
    if kind.is_dir() {
        let names = match names_in(path) {
            Ok(names) => names,
            Err(error) => {
                copied.left_out.push(named(path, &error));
                return Ok(());
            }
        };
        name.push(b'/');
        Member::of(&name, meta, b'5').write_to(out)?;
        for below in names {
            let path = path.join(&below);
            match fs::symlink_metadata(&path) {
                Ok(meta) => entry(out, [&name, below.as_bytes()].concat(), &path, &meta, copied)?,
                Err(error) => copied.left_out.push(named(&path, &error)),
            }
        }
        return Ok(());
    }
    if kind.is_symlink() {
        return match fs::read_link(path) {
            Ok(to) => Member {
                link: to.as_os_str().as_bytes(),
                mode: 0o777,
                ..Member::of(&name, meta, b'2')
            }
            .write_to(out),
            Err(error) => {
                copied.left_out.push(named(path, &error));
                Ok(())
            }
        };
    }
    // Without waiting: it may have become a pipe meanwhile.
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    match opened.and_then(|file| Ok((file.metadata()?, file))) {
        _ if !kind.is_file() => copied.left_out.push(special(path)),
        Ok((meta, file)) if meta.is_file() => {
            Member {
                size: meta.len(),
                ..Member::of(&name, &meta, b'0')
            }
            .write_to(out)?;
            archive::copy_contents(path, file, meta.len(), out)?;
            copied.bytes += meta.len();
        }
        Ok(_) => copied.left_out.push(special(path)),
        Err(error) => copied.left_out.push(named(path, &error)),
    }
    Ok(())
}

fn names_in(folder: &Path) -> io::Result<Vec<OsString>> {
    let mut names = fs::read_dir(folder)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn named(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", shown(path.as_os_str().as_bytes()))
}

fn special(path: &Path) -> String {
    format!(
        "{}: a socket, pipe or device, left out",
        shown(path.as_os_str().as_bytes())
    )
}

/// A name for a message.
pub fn shown(name: &[u8]) -> String {
    escape_line(&OsString::from_vec(name.to_vec()).to_string_lossy(), 400)
}
