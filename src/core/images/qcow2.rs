//! The header of a qcow2 file, read before any tool opens the file.
//!
//! Here: the few fields that castra needs (`docs/interop/qcow2.txt` of QEMU). Not here: making or
//! changing images, which is `qemu-img`'s business alone.
//!
//! castra reads the header itself because `qemu-img info` on a hostile image is already too late: a
//! qcow2 may name a backing file or an external data file, and QEMU opens both.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// `QFI\xfb`.
const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Fields up to and including `incompatible_features`.
const HEADER_BYTES: usize = 80;
/// The longest file name that the format allows; more is damage or malice.
const MAX_BACKING_NAME: u32 = 1023;
/// Bit 2 of `incompatible_features`: guest data lies in another file.
const EXTERNAL_DATA: u64 = 1 << 2;

/// What castra needs to know about a qcow2 file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the guest's disk, bytes.
    pub virtual_size: u64,
    /// The file below, as written in the image.
    pub backing_file: Option<PathBuf>,
    /// Guest data lies in another file, which the image names.
    pub external_data: bool,
    /// Its data is encrypted.
    pub encrypted: bool,
}

/// Reads the header of a file; `None` if it isn't a qcow2. A header that contradicts the format is
/// an error of kind `InvalidData`.
pub fn load_header(path: &Path) -> io::Result<Option<Header>> {
    let file = File::open(path)?;
    let mut head = [0; HEADER_BYTES];
    let got = read_up_to(&file, &mut head, 0)?;
    if !head.starts_with(MAGIC) {
        return Ok(None);
    }
    if got < 72 {
        return Err(damaged("it ends within its header"));
    }
    let version = be32(&head, 4);
    if !(2..=3).contains(&version) {
        return Err(damaged(&format!(
            "its version is {version}, and castra knows 2 and 3"
        )));
    }
    let features = if version >= 3 { be64(&head, 72) } else { 0 };
    let backing_file = match (be64(&head, 8), be32(&head, 16)) {
        (0, _) => None,
        (_, length) if length == 0 || length > MAX_BACKING_NAME => {
            return Err(damaged("the name of its backing file has an impossible length"));
        }
        (offset, length) => {
            let mut name = vec![0; length as usize];
            if read_up_to(&file, &mut name, offset)? < name.len() {
                return Err(damaged("the name of its backing file lies beyond its end"));
            }
            Some(PathBuf::from(OsString::from_vec(name)))
        }
    };
    Ok(Some(Header {
        version,
        virtual_size: be64(&head, 24),
        backing_file,
        external_data: features & EXTERNAL_DATA != 0,
        encrypted: be32(&head, 32) != 0,
    }))
}

fn damaged(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not a valid qcow2: {why}"))
}

fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        let Some(at) = offset
            .checked_add(got as u64)
            .filter(|at| i64::try_from(*at).is_ok())
        else {
            break;
        };
        match file.read_at(&mut buffer[got..], at) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;
    use std::fs;

    /// A head as the format lays it out.
    fn head(version: u32, backing: (u64, u32), features: u64) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(version.to_be_bytes());
        bytes.extend(backing.0.to_be_bytes());
        bytes.extend(backing.1.to_be_bytes());
        bytes.extend(16u32.to_be_bytes());
        bytes.extend(1_048_576u64.to_be_bytes());
        bytes.resize(72, 0);
        bytes.extend(features.to_be_bytes());
        bytes.resize(104, 0);
        bytes
    }

    fn check(bytes: &[u8]) -> String {
        let scratch = Scratch::new("qcow2");
        fs::write(scratch.path("x"), bytes).unwrap();
        match load_header(&scratch.path("x")) {
            Ok(None) => "no qcow2".into(),
            Ok(Some(header)) => format!(
                "v{} {} {:?} {}{}",
                header.version,
                header.virtual_size,
                header.backing_file,
                header.external_data,
                if header.encrypted { " encrypted" } else { "" }
            ),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn heads_sound_and_unsound() {
        assert_eq!(check(b""), "no qcow2");
        assert_eq!(check(b"#!/bin/sh\n"), "no qcow2");
        assert_eq!(check(&head(3, (0, 0), 0)), "v3 1048576 None false");
        assert_eq!(
            check(&head(2, (0, 0), 4)),
            "v2 1048576 None false",
            "version 2 has no features"
        );
        assert_eq!(check(&head(3, (0, 0), 4)), "v3 1048576 None true");
        let mut encrypted = head(3, (0, 0), 0);
        encrypted[35] = 2;
        assert_eq!(check(&encrypted), "v3 1048576 None false encrypted");
        let mut backed = head(3, (104, 9), 0);
        backed.extend(b"/base.img");
        assert_eq!(check(&backed), "v3 1048576 Some(\"/base.img\") false");
        for (bytes, why) in [
            (b"QFI\xfb\0\0\0\x03".to_vec(), "ends within"),
            (head(9, (0, 0), 0), "version is 9"),
            (head(3, (104, 0), 0), "impossible length"),
            (head(3, (104, 5000), 0), "impossible length"),
            (head(3, (1 << 40, 9), 0), "beyond its end"),
            (head(3, (u64::MAX, 9), 0), "beyond its end"),
        ] {
            let said = check(&bytes);
            assert!(
                said.starts_with("not a valid qcow2") && said.contains(why),
                "{said}"
            );
        }
    }
}
