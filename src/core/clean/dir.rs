//! A directory that is held open while it is emptied.
//!
//! Here: opening one without following a link, listing it, removing from it by name. Not here: what
//! is removed ([`super`]).
//!
//! Everything is reached from the open directory and not by its path again, so that nobody can put a
//! link in the way of a removal between the look and the deed.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;

use crate::core::host;

/// An open directory.
#[derive(Debug)]
pub struct Dir {
    file: File,
    path: PathBuf,
}

/// What an entry is, links not followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Folder,
    /// A Unix socket.
    Socket,
    /// A link, a device, a pipe: nothing that castra makes.
    Other,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: OsString,
    /// What it is.
    pub kind: Kind,
    /// Bytes it takes on disk.
    pub bytes: u64,
}

impl Dir {
    /// Opens a directory; a link in its place is an error ([`is_no_folder`]).
    pub fn open(path: &Path) -> io::Result<Dir> {
        Ok(Dir {
            file: open_folder(path)?,
            path: path.to_owned(),
        })
    }

    /// Its path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn at(&self, name: &Path) -> io::Result<PathBuf> {
        // A name with a slash in it could lead anywhere.
        match name.file_name() {
            Some(only) if only == name.as_os_str() => Ok(host::short_path(&self.file, "").join(only)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// A folder in it; `None`: there is no such name.
    pub fn folder(&self, name: impl AsRef<Path>) -> io::Result<Option<Dir>> {
        let name = name.as_ref();
        match open_folder(&self.at(name)?) {
            Ok(file) => Ok(Some(Dir {
                file,
                path: self.path.join(name),
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What lies in it, by name.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(host::short_path(&self.file, ""))? {
            let name = entry?.file_name();
            // Gone meanwhile: nothing to do.
            if let Some(entry) = self.entry(&name)? {
                entries.push(entry);
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// One entry; `None`: there is no such name.
    pub fn entry(&self, name: impl AsRef<Path>) -> io::Result<Option<Entry>> {
        let name = name.as_ref();
        let meta = match fs::symlink_metadata(self.at(name)?) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let kind = match meta.file_type() {
            kind if kind.is_file() => Kind::File,
            kind if kind.is_dir() => Kind::Folder,
            kind if kind.is_socket() => Kind::Socket,
            _ => Kind::Other,
        };
        Ok(Some(Entry {
            name: name.as_os_str().to_owned(),
            kind,
            bytes: meta.blocks() * 512,
        }))
    }

    /// Removes a file; that it is gone already is fine.
    pub fn remove_file(&self, name: impl AsRef<Path>) -> io::Result<()> {
        host::remove_if_there(&self.at(name.as_ref())?).map(drop)
    }

    /// Removes an empty folder; that it is gone already is fine.
    pub fn remove_folder(&self, name: impl AsRef<Path>) -> io::Result<()> {
        match fs::remove_dir(self.at(name.as_ref())?) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

fn open_folder(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path)
}

/// Whether opening failed because a link or something else lies in a folder's place.
pub fn is_no_folder(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR))
}
