//! Giving back the middle of a file that somebody else goes on writing.
//!
//! Here: holes in files. Not here: whose logs those are (`broker::vm_watch`), or logs that castra writes
//! itself and can rotate (`core::lines::journal`).

use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;

/// Holes begin and end at multiples of this: no file system has larger blocks.
const BLOCK: u64 = 64 * 1024;

/// Where a file takes more than `most` bytes of the disk, its middle goes: an eighth of `most` stays at
/// the beginning, three eighths at the end. Its length stays, since its writer goes on where it is;
/// readers find zeros there. Nothing that is written meanwhile is lost. True: something was given back.
pub fn punch_hole(path: &Path, most: u64) -> io::Result<bool> {
    let Ok(meta) = std::fs::symlink_metadata(path) else {
        return Ok(false);
    };
    if !meta.is_file() || meta.blocks() * 512 <= most {
        return Ok(false);
    }
    let from = (most / 8).next_multiple_of(BLOCK);
    let until = meta.len().saturating_sub((most / 8 * 3).next_multiple_of(BLOCK)) / BLOCK * BLOCK;
    let Some(length) = until.checked_sub(from).filter(|length| *length > 0) else {
        return Ok(false);
    };
    let file = std::fs::File::options()
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let offset = |bytes: u64| i64::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge));
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, flags, offset(from)?, offset(length)?)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    #[test]
    fn beginning_and_end_stay_and_the_writer_goes_on() {
        let scratch = Scratch::new("thin-out");
        let path = scratch.path("qemu.log");
        let most = 1 << 20;
        let mut writer = std::fs::File::create(&path).unwrap();
        assert!(!punch_hole(&path, most).unwrap(), "it is empty");
        writer.write_all(b"first\n").unwrap();
        let line = [b'x'; 1023].iter().chain(b"\n").copied().collect::<Vec<u8>>();
        for _ in 0..10 {
            for _ in 0..512 {
                writer.write_all(&line).unwrap();
            }
            writer.sync_all().unwrap();
            punch_hole(&path, most).unwrap();
            let taken = std::fs::metadata(&path).unwrap().blocks() * 512;
            assert!(taken <= most + 512 * 1024, "{taken}");
        }
        assert!(punch_hole(&path, most / 4).unwrap());
        writer.write_all(b"last\n").unwrap();
        let length = std::fs::metadata(&path).unwrap().len();
        assert_eq!(length, 6 + 10 * 512 * 1024 + 5);
        let reader = std::fs::File::open(&path).unwrap();
        let mut bytes = [0; 6];
        reader.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"first\n");
        reader.read_exact_at(&mut bytes[..5], length - 5).unwrap();
        assert_eq!(&bytes[..5], b"last\n");
        reader.read_exact_at(&mut bytes, length / 2).unwrap();
        assert_eq!(bytes, [0; 6]);
    }

    #[test]
    fn only_files_are_thinned() {
        let scratch = Scratch::new("thin-out-link");
        assert!(!punch_hole(&scratch.path("none"), 0).unwrap());
        std::os::unix::fs::symlink("/dev/zero", scratch.path("link")).unwrap();
        assert!(!punch_hole(&scratch.path("link"), 0).unwrap());
        assert!(!punch_hole(scratch.dir(), 0).unwrap());
    }
}
