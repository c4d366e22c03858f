//! A scan of every line of a log of the bus: its highest number, and whether the numbers ascend.
//!
//! Not here: what a line says (`bus::line`), delivering messages whose numbers don't ascend
//! (`broker::replay`).
//!
//! In the broker's own lines numbers always ascend. In a log that was pasted together or damaged
//! they may not, and a bisection would miss messages.

use std::io;
use std::path::Path;

use crate::core::bus::line::seq_of;
use crate::core::bus::log::MAX_LINE_BYTES;
use crate::core::lines::rotated_log::{LogStep, RotatedLog};

/// What the scan found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogScan {
    /// The highest number; 0: there is none.
    pub highest: u64,
    /// Whether each number is higher than the one before it.
    pub ascending: bool,
}

/// Scans the log and its rotated files.
pub fn scan_log(path: &Path) -> io::Result<LogScan> {
    let mut found = LogScan {
        highest: 0,
        ascending: true,
    };
    let mut log = RotatedLog::open(path, MAX_LINE_BYTES)?;
    loop {
        match log.next_line(false)? {
            LogStep::Line(line) => {
                if let Some(seq) = seq_of(log.bytes(line)) {
                    found.ascending &= seq > found.highest;
                    found.highest = found.highest.max(seq);
                }
            }
            // No frame could have brought so long a line, so the number in it was never given.
            LogStep::Waste => {}
            LogStep::End => return Ok(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::core::bus::line::MAX_SEQ;
    use crate::core::lines::journal::rotated;
    use crate::core::scratch::Scratch;

    fn line(seq: u64) -> String {
        format!("{{\"seq\":{seq},\"ts\":1,\"vm\":\"web-0\",\"topic\":\"a\",\"payload\":1}}\n")
    }

    #[test]
    fn numbers_that_rise_and_numbers_that_do_not() {
        let scratch = Scratch::new("survey");
        let path = scratch.path("bus.log");
        let look = || {
            let found = scan_log(&path).unwrap();
            (found.highest, found.ascending)
        };
        assert_eq!(look(), (0, true));
        fs::write(rotated(&path, 1), line(1) + &line(2)).unwrap();
        fs::write(
            &path,
            line(3) + &"x".repeat(200_000) + "\n" + &line(7) + "{\"seq\":9,\"t",
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
