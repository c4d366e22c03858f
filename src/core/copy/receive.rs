//! A tar stream of a guest as files of this machine.
//!
//! Here: reading the format, and writing below one folder. Not here: what made the stream (`script`).
//!
//! The guest is hostile. Every folder on the way to a file is opened without following a link, from the open folder
//! above it; a name may not lead upwards; only files, folders and links are made, with plain permissions; every length
//! is bounded. What can't be made is named and left out, and the rest goes on. Read are ustar, GNU's long names, and the
//! names and sizes of pax.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{self, BufRead, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::libc;

use super::asked::RequestedNames;
use super::{Copied, send::shown};
use crate::core::failure::{Exit, Failure, Result as Done};
use crate::core::host;

const BLOCK: usize = 512;
/// Longest name, link or pax record.
const MAX_NAME_BYTES: u64 = 64 * 1024;
/// Linux takes no longer path. Folders below each other could be made beyond it, and few programs would remove them.
const MAX_PATH_BYTES: usize = 4096;
const COPY_BYTES: usize = 256 * 1024;
/// Names of what was left out; more are counted nowhere, the first ones say enough.
const MAX_LEFT_OUT: usize = 1000;

/// Where a copy goes.
pub struct Destination {
    /// The folder that everything goes into.
    base: File,
    /// The name that the one source shall have instead of its own.
    name: Option<OsString>,
    /// A source has come.
    taken: bool,
    /// The source that comes has no name of its own.
    whole: bool,
    /// What may come into the folder; `None`: anything.
    asked: Option<RequestedNames>,
    /// Folders with what they shall have once nothing is written into them any more.
    folders: BTreeMap<PathBuf, Attributes>,
}

#[derive(Clone, Copy)]
struct Attributes {
    mode: u32,
    mtime: u64,
}

impl Destination {
    /// The folder of this path; or the folder above it, in which the only source gets its name.
    pub fn find(to: &Path, several: bool) -> Done<Destination> {
        let open = |folder: &Path| {
            let opened = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECTORY)
                .open(folder);
            opened.map_err(|error| {
                Failure::new(Exit::CantCreate, format!("can't copy to {}", to.display())).because(error)
            })
        };
        let new = |base: File, name: Option<OsString>| Destination {
            base,
            name,
            taken: false,
            whole: false,
            asked: None,
            folders: BTreeMap::new(),
        };
        if to.is_dir() {
            return Ok(new(open(to)?, None));
        }
        let no_folder = || Failure::new(Exit::CantCreate, format!("{} isn't a folder", to.display()));
        if several || to.as_os_str().as_bytes().ends_with(b"/") {
            return Err(no_folder().advice("create it first, or name an existing one"));
        }
        // What a link leads to is written, not the link.
        let to = fs::canonicalize(to).unwrap_or_else(|_| to.to_owned());
        let name = to.file_name().ok_or_else(no_folder)?.to_owned();
        let above = match to.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        Ok(new(open(above)?, Some(name)))
    }

    /// Only what these patterns mean may come.
    pub fn asked(mut self, patterns: &[OsString]) -> Destination {
        self.asked = Some(RequestedNames::new(patterns));
        self
    }

    /// The next source.
    pub fn begin(&mut self, whole: bool) -> io::Result<()> {
        if self.name.is_some() && std::mem::replace(&mut self.taken, true) {
            return Err(io::Error::other("several sources need an existing folder"));
        }
        if whole && self.asked.as_ref().is_some_and(|asked| !asked.takes_whole()) {
            return Err(io::Error::other(
                "the guest sent a file that castra didn't ask for",
            ));
        }
        self.whole = whole;
        Ok(())
    }

    /// Gives the folders their permissions and times.
    pub fn finish(&mut self) {
        for (path, attributes) in std::mem::take(&mut self.folders).into_iter().rev() {
            if let Ok(folder) = self.folder(&path) {
                attributes.give(&folder);
            }
        }
    }

    /// A member's path below the base; `None`: it is the base itself.
    fn path_of(&self, name: &[u8]) -> io::Result<Option<PathBuf>> {
        if name.len() > MAX_PATH_BYTES {
            return Err(io::Error::other("its name is too long"));
        }
        let mut parts: Vec<&OsStr> = Vec::new();
        for part in name.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(io::Error::other("its name leads out of the copy")),
                part if part.contains(&0) => return Err(io::Error::other("its name is invalid")),
                part => parts.push(OsStr::from_bytes(part)),
            }
        }
        if let Some(name) = &self.name {
            if self.whole {
                parts.insert(0, name);
            } else if let Some(first) = parts.first_mut() {
                *first = name;
            }
        } else if !self.whole
            && let (Some(asked), Some(first)) = (&self.asked, parts.first())
            && !asked.takes(first.as_bytes())
        {
            return Err(io::Error::other("castra didn't ask for it"));
        }
        Ok((!parts.is_empty()).then(|| parts.iter().collect()))
    }

    /// Opens a folder below the base and makes what is missing of it.
    fn folder(&self, path: &Path) -> io::Result<File> {
        let mut folder = self.base.try_clone()?;
        for part in path {
            let below = host::short_path(&folder, "").join(part);
            if let Err(error) = fs::create_dir(&below)
                && error.kind() != io::ErrorKind::AlreadyExists
            {
                return Err(error);
            }
            folder = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
                .open(&below)
                .map_err(|error| match error.raw_os_error() {
                    Some(libc::ELOOP | libc::ENOTDIR) => {
                        io::Error::other(format!("{} is a link or a file here", shown(part.as_bytes())))
                    }
                    _ => error,
                })?;
        }
        Ok(folder)
    }

    /// The folder that a member lies in, and the member's path there.
    fn above(&self, path: &Path) -> io::Result<(File, PathBuf)> {
        let folder = self.folder(path.parent().unwrap_or(Path::new("")))?;
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let at = host::short_path(&folder, "").join(name);
        Ok((folder, at))
    }
}

impl Attributes {
    fn give(self, file: &File) {
        // As the guest has no say in who may run what as whom, the upper bits are none of its.
        let _ = file.set_permissions(Permissions::from_mode(self.mode & 0o777));
        let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.mtime));
        if let Some(time) = time {
            let _ = file.set_times(FileTimes::new().set_modified(time));
        }
    }
}

/// One member's head.
struct Head {
    name: Vec<u8>,
    link: Vec<u8>,
    kind: u8,
    size: u64,
    attributes: Attributes,
}

/// Unpacks one archive. Fails where the stream is none, or is cut off.
pub fn unpack(stream: &mut impl BufRead, place: &mut Destination, copied: &mut Copied) -> io::Result<()> {
    let mut long = Long::default();
    while let Some(mut head) = read_head(stream)? {
        match head.kind {
            b'L' => long.name = Some(trimmed(read_short(stream, head.size)?)),
            b'K' => long.link = Some(trimmed(read_short(stream, head.size)?)),
            b'x' => long.take_pax(&read_short(stream, head.size)?),
            b'g' => drop(read_short(stream, head.size)?),
            _ => {
                let Long { name, link, size } = std::mem::take(&mut long);
                head.name = name.unwrap_or(head.name);
                head.link = link.unwrap_or(head.link);
                head.size = size.unwrap_or(head.size);
                let mut contents = Contents {
                    left: head.size,
                    padded: head.size.next_multiple_of(BLOCK as u64) - head.size,
                    stream,
                };
                let made = make(&head, &mut contents, place, copied);
                // What wasn't taken of it is passed over.
                let rest = contents.left + contents.padded;
                let passed = io::copy(&mut stream.take(rest), &mut io::sink())?;
                if passed < rest {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                if let Err(error) = made
                    && copied.left_out.len() < MAX_LEFT_OUT
                {
                    copied.left_out.push(format!("{}: {error}", shown(&head.name)));
                }
            }
        }
    }
    Ok(())
}

/// What comes before a member whose head has no room for it.
#[derive(Default)]
struct Long {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

impl Long {
    /// Records of `LENGTH KEY=VALUE`, each with a line end.
    fn take_pax(&mut self, mut records: &[u8]) {
        while let Some(blank) = records.iter().position(|byte| *byte == b' ') {
            let length = std::str::from_utf8(&records[..blank])
                .ok()
                .and_then(|text| text.parse::<usize>().ok());
            let Some(record) = length.and_then(|length| records.get(blank + 1..length)) else {
                return;
            };
            records = &records[blank + 1 + record.len()..];
            let record = record.strip_suffix(b"\n").unwrap_or(record);
            let Some(equals) = record.iter().position(|byte| *byte == b'=') else {
                continue;
            };
            let value = &record[equals + 1..];
            match &record[..equals] {
                b"path" => self.name = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()),
                _ => {}
            }
        }
    }
}

fn trimmed(mut text: Vec<u8>) -> Vec<u8> {
    while text.last() == Some(&0) {
        text.pop();
    }
    text
}

/// The contents of a member and what they are filled up with.
struct Contents<'s, S> {
    left: u64,
    padded: u64,
    stream: &'s mut S,
}

impl<S: BufRead> Contents<'_, S> {
    /// Writes all of them; a failure to write leaves the rest.
    fn write_to(&mut self, out: &mut impl Write) -> io::Result<u64> {
        let mut buffer = vec![0; COPY_BYTES];
        let mut written = 0;
        while self.left > 0 {
            let most = usize::try_from(self.left).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            let count = self.stream.read(&mut buffer[..most])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.left -= count as u64;
            out.write_all(&buffer[..count])?;
            written += count as u64;
        }
        Ok(written)
    }
}

fn make<S: BufRead>(
    head: &Head,
    contents: &mut Contents<'_, S>,
    place: &mut Destination,
    copied: &mut Copied,
) -> io::Result<()> {
    let path = place.path_of(&head.name)?;
    let Some(path) = path else {
        // The folder that was there before the copy keeps what it has.
        return if head.kind == b'5' {
            Ok(())
        } else {
            Err(io::Error::other("it has no name"))
        };
    };
    match head.kind {
        b'5' => {
            place.folder(&path)?;
            place.folders.insert(path, head.attributes);
            Ok(())
        }
        b'0' | 0 | b'7' => {
            let (folder, at) = place.above(&path)?;
            let random = host::random_hex(8)?;
            let temporary = host::short_path(&folder, "").join(format!(".castra-cp-{random}"));
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&temporary)?;
            let done = contents.write_to(&mut file).and_then(|bytes| {
                head.attributes.give(&file);
                fs::rename(&temporary, &at)?;
                Ok(bytes)
            });
            if done.is_err() {
                let _ = fs::remove_file(&temporary);
            }
            copied.bytes += done?;
            Ok(())
        }
        b'1' => {
            let from = place.path_of(&head.link)?.ok_or(io::ErrorKind::InvalidInput)?;
            let (_from_folder, from) = place.above(&from)?;
            if !fs::symlink_metadata(&from)?.is_file() {
                return Err(io::Error::other("its link target isn't a file"));
            }
            let (_folder, at) = place.above(&path)?;
            if from == at {
                return Ok(());
            }
            remove_if_no_folder(&at)?;
            fs::hard_link(&from, &at)
        }
        b'2' => {
            let (_folder, at) = place.above(&path)?;
            remove_if_no_folder(&at)?;
            symlink(OsStr::from_bytes(&head.link), &at)
        }
        b'3' | b'4' | b'6' => Err(io::Error::other("a pipe or device, left out")),
        _ => Err(io::Error::other("a file of an unknown kind, left out")),
    }
}

fn remove_if_no_folder(at: &Path) -> io::Result<()> {
    match fs::symlink_metadata(at) {
        Ok(meta) if meta.is_dir() => Err(io::Error::other("a folder is in its place here")),
        Ok(_) => fs::remove_file(at),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// The next member's head; `None` at the end of the archive.
fn read_head(stream: &mut impl Read) -> io::Result<Option<Head>> {
    let mut block = [0; BLOCK];
    stream.read_exact(&mut block)?;
    if block.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let sum: u64 = block
        .iter()
        .enumerate()
        .map(|(at, byte)| {
            if (148..156).contains(&at) {
                u64::from(b' ')
            } else {
                u64::from(*byte)
            }
        })
        .sum();
    if number(&block[148..156]) != Some(sum) {
        return Err(io::Error::other("the guest's tar sent no archive"));
    }
    let text = |field: &[u8]| field.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
    let mut name = text(&block[0..100]);
    // GNU's own form has other things in the place of the prefix.
    if &block[257..263] == b"ustar\0" && block[345] != 0 {
        name = [&text(&block[345..500])[..], b"/", &name].concat();
    }
    let size = number(&block[124..136]).ok_or_else(|| io::Error::other("its size is invalid"))?;
    let kind = block[156];
    Ok(Some(Head {
        name,
        link: text(&block[157..257]),
        kind,
        // Links, folders and devices have no contents, whatever their head says.
        size: if matches!(kind, b'1'..=b'6') { 0 } else { size },
        attributes: Attributes {
            mode: u32::try_from(number(&block[100..108]).unwrap_or(0o600) & 0o7777).unwrap_or(0o600),
            mtime: number(&block[136..148]).unwrap_or(0),
        },
    }))
}

/// Octal digits between blanks, or GNU's binary form.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let (high, low) = field.split_at(field.len() - 8);
        // Below zero, or more than 64 bits.
        if field[0] != 0x80 || high.iter().skip(1).any(|byte| *byte != 0) {
            return None;
        }
        // A field of eight bytes has its flag within the number.
        return low
            .try_into()
            .ok()
            .map(|low| u64::from_be_bytes(low) & !(u64::from(high.is_empty()) << 63));
    }
    let text = std::str::from_utf8(field).ok()?;
    let text = text.trim_matches([' ', '\0']);
    if text.is_empty() {
        return Some(0);
    }
    u64::from_str_radix(text, 8).ok()
}

fn read_short(stream: &mut impl Read, size: u64) -> io::Result<Vec<u8>> {
    if size > MAX_NAME_BYTES {
        return Err(io::Error::other("its name is invalid"));
    }
    let mut text = vec![0; usize::try_from(size.next_multiple_of(BLOCK as u64)).unwrap_or(0)];
    stream.read_exact(&mut text)?;
    text.truncate(usize::try_from(size).unwrap_or(0));
    Ok(text)
}

#[cfg(test)]
#[path = "receive_tests.rs"]
mod tests;
