//! A scan of every line of a log of the bus: its highest number, and whether the numbers ascend.
//!
//! Here: reading the beginnings of lines, with little memory however long the lines are. Not here:
//! what a line says (`broker::bus_log`), delivering messages whose numbers don't ascend
//! (`broker::replay`).
//!
//! In the broker's own lines numbers always ascend. In a log that was pasted together or damaged
//! they may not, and a bisection would miss messages.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::core::host;
use crate::core::lines::journal::rotated;

use super::bus_log::seq_of;

/// Read at once.
const READ_BYTES: usize = 64 * 1024;

/// How many bytes of a line hold its number.
const HEAD: usize = 32;

/// What the scan found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogScan {
    /// The highest number; 0: there is none.
    pub highest: u64,
    /// Whether each number is higher than the one before it.
    pub ascending: bool,
}

/// Scans the log and its rotated files.
pub fn scan_log(path: &Path, keep: u32) -> io::Result<LogScan> {
    let mut found = LogScan {
        highest: 0,
        ascending: true,
    };
    for file in files(path, keep)? {
        for_each_head(file, |head| {
            if let Some(seq) = seq_of(head) {
                found.ascending &= seq > found.highest;
                found.highest = found.highest.max(seq);
            }
        })?;
    }
    Ok(found)
}

/// The files of a log, oldest first, each once. A rotation gives files higher numbers, so reading
/// them in that order may meet a file twice, but misses none.
pub fn files(path: &Path, keep: u32) -> io::Result<Vec<File>> {
    let mut found: Vec<((u64, u64), File)> = Vec::new();
    for number in 0..=keep.saturating_add(1) {
        let name = match number {
            0 => path.to_owned(),
            number => rotated(path, number),
        };
        let file = match host::open_state_file(&name) {
            Ok(file) => file,
            // A path that isn't a regular file holds no lines.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => {
                continue;
            }
            Err(error) => return Err(error),
        };
        let meta = file.metadata()?;
        let id = (meta.dev(), meta.ino());
        if found.iter().all(|(known, _)| *known != id) {
            found.push((id, file));
        }
    }
    found.reverse();
    Ok(found.into_iter().map(|(_, file)| file).collect())
}

/// Hands over the first bytes of each whole line.
fn for_each_head(mut file: File, mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let mut piece = vec![0; READ_BYTES];
    let mut head: Vec<u8> = Vec::with_capacity(HEAD);
    loop {
        let mut rest = match file.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(count) => &piece[..count],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        while !rest.is_empty() {
            let end = rest.iter().position(|byte| *byte == b'\n');
            let line = &rest[..end.unwrap_or(rest.len())];
            head.extend_from_slice(&line[..line.len().min(HEAD - head.len())]);
            match end {
                None => break,
                Some(end) => {
                    take(&head);
                    head.clear();
                    rest = &rest[end + 1..];
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;
    use crate::core::broker::bus_log::MAX_SEQ;
    use crate::core::scratch::Scratch;

    fn line(seq: u64) -> String {
        format!("{{\"seq\":{seq},\"ts\":1,\"vm\":\"web-0\",\"topic\":\"a\",\"payload\":1}}\n")
    }

    #[test]
    fn numbers_that_rise_and_numbers_that_do_not() {
        let scratch = Scratch::new("survey");
        let path = scratch.path("bus.log");
        let look = || {
            let found = scan_log(&path, 2).unwrap();
            (found.highest, found.ascending)
        };
        assert_eq!(look(), (0, true));
        fs::write(rotated(&path, 1), line(1) + &line(2)).unwrap();
        fs::write(
            &path,
            line(3) + &"x".repeat(3 * READ_BYTES) + "\n" + &line(7) + "{\"seq\":9,\"t",
        )
        .unwrap();
        assert_eq!(
            look(),
            (7, true),
            "what is no message and what is torn doesn't count"
        );
        for (text, expected) in [
            (line(3) + &line(9) + &line(4), (9, false)),
            (line(3) + &line(3), (3, false)),
            (line(1), (2, false)),
            (line(3) + &line(u64::MAX) + &line(4), (4, true)),
            (line(3) + &line(MAX_SEQ), (MAX_SEQ, true)),
        ] {
            fs::write(&path, &text).unwrap();
            assert_eq!(look(), expected, "{text}");
        }
    }
}
