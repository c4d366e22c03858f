//! One file of a journal, read by position.
//!
//! Here: lines forwards and backwards, and the place where a time begins, found without reading
//! what lies before it. Not here: which files a journal has (`super::trail`).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::core::cancel::Cancel;
use crate::core::events::kept::read;
use crate::core::host;

/// Read so much at a time.
const READ_BYTES: usize = 64 * 1024;
/// A longer line is no event: what a journal holds is bounded far below this.
const MAX_LINE_BYTES: usize = 4 * 1024 * 1024;

/// A file of a journal and how far it has been read.
#[derive(Debug)]
pub(crate) struct Segment {
    path: PathBuf,
    file: File,
    /// Bytes of the file from `at` on; lines before `used` have been handed out.
    buffer: Vec<u8>,
    used: usize,
    /// Where the buffer begins in the file.
    at: u64,
    /// Inside a line that is longer than any event.
    skipping: bool,
    /// Looked at between two reads: such a line may have gigabytes.
    stop: Cancel,
}

/// A step of reading.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A line, at this place in [`Segment::bytes`].
    Line(Range<usize>),
    /// A line too long to be an event has ended.
    TooLong,
    /// No whole line is there now.
    Pending,
}

impl Segment {
    /// `None`: it is no file, whatever else it is. Looking at that doesn't wait for anybody, as
    /// opening a named pipe would.
    pub(crate) fn open(path: &Path) -> io::Result<Option<Segment>> {
        let file = host::open_without_waiting(path)?;
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        Ok(Some(Segment {
            path: path.to_owned(),
            file,
            buffer: Vec::new(),
            used: 0,
            at: 0,
            skipping: false,
            stop: Cancel::new(),
        }))
    }

    /// Reading ends with an error of the kind `Interrupted` soon after this flag is raised.
    pub(crate) fn until(&mut self, stop: &Cancel) {
        self.stop = stop.clone();
    }

    /// The name it was opened by.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Device and inode: who the file is, whatever it is called by now.
    pub(crate) fn identity(&self) -> io::Result<(u64, u64)> {
        let meta = self.file.metadata()?;
        Ok((meta.dev(), meta.ino()))
    }

    /// Its length now.
    pub(crate) fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Where the next line begins.
    pub(crate) fn position(&self) -> u64 {
        self.at + self.used as u64
    }

    /// Goes on at this place, which must be the beginning of a line.
    pub(crate) fn go_to(&mut self, position: u64) {
        self.at = position;
        self.used = 0;
        self.buffer.clear();
        self.skipping = false;
    }

    /// The bytes that [`Step::Line`] speaks of.
    pub(crate) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.buffer[range]
    }

    /// The next whole line. What has no line end yet is left alone: its writer may be at work, or
    /// dead, and then somebody will cut it and write something else in its place.
    pub(crate) fn next_line(&mut self) -> io::Result<Step> {
        loop {
            let rest = &self.buffer[self.used..];
            if let Some(length) = rest.iter().position(|byte| *byte == b'\n') {
                let line = self.used..self.used + length;
                self.used = line.end + 1;
                if std::mem::take(&mut self.skipping) {
                    return Ok(Step::TooLong);
                }
                return Ok(Step::Line(line));
            }
            if rest.len() > MAX_LINE_BYTES {
                self.skipping = true;
                self.used = self.buffer.len();
            }
            if !self.refill()? {
                return Ok(Step::Pending);
            }
        }
    }

    /// What follows the last line end: torn, or about to be ended.
    pub(crate) fn unended(&self) -> &[u8] {
        &self.buffer[self.used..]
    }

    /// Reads on. Bytes of an unended line are read again, because they may have changed.
    fn refill(&mut self) -> io::Result<bool> {
        go_on(&self.stop)?;
        let known = self.buffer.len() - self.used;
        self.at += self.used as u64;
        self.used = 0;
        // Twice as much where a piece held no line end, so that long lines aren't read too often.
        let wanted = READ_BYTES.max(known * 2);
        self.buffer.resize(wanted, 0);
        let read = read_at(&self.file, &mut self.buffer, self.at);
        self.buffer.truncate(*read.as_ref().unwrap_or(&0));
        if read? == 0 && self.at > self.length()? {
            // Somebody emptied the file; its lines begin anew.
            self.go_to(0);
            return Ok(self.length()? > 0);
        }
        Ok(self.buffer.len() > known || self.buffer.contains(&b'\n'))
    }

    /// Goes to the first line of this time or later, in a file whose times rise; what lies before
    /// isn't read. True if there is an earlier line in this file.
    pub(crate) fn skip_before(&mut self, ts: &str) -> io::Result<bool> {
        let (mut low, mut high) = (0, self.length()?);
        while high - low > READ_BYTES as u64 {
            let middle = low + (high - low) / 2;
            match self.first_ts_behind(middle, high)? {
                Some((found, end)) if found.as_str() < ts => low = end,
                _ => high = middle,
            }
        }
        self.go_to(low);
        // The last piece is read line by line.
        loop {
            let position = self.position();
            match self.next_line()? {
                Step::Pending => break,
                Step::TooLong => {}
                Step::Line(line) => {
                    if let Some((_, head)) = read(&self.buffer[line]).event
                        && *head.ts >= *ts
                    {
                        self.go_to(position);
                        break;
                    }
                }
            }
        }
        Ok(self.position() > 0)
    }

    /// The time of the first line that begins behind this place and ends before `high`, and where it ends.
    fn first_ts_behind(&self, place: u64, high: u64) -> io::Result<Option<(String, u64)>> {
        const STEP: usize = 4 * 1024;
        let mut size = STEP;
        loop {
            let mut bytes = vec![0; size];
            let read_now = read_at(&self.file, &mut bytes, place)?;
            bytes.truncate(read_now);
            let ends = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
            let ends: Vec<usize> = ends.map(|(at, _)| at).collect();
            for pair in ends.windows(2) {
                let end = place + pair[1] as u64 + 1;
                if end > high {
                    return Ok(None);
                }
                if let Some((_, head)) = read(&bytes[pair[0] + 1..pair[1]]).event {
                    return Ok(Some((head.ts.into_owned(), end)));
                }
            }
            if read_now < size || size > MAX_LINE_BYTES {
                return Ok(None);
            }
            size *= 2;
        }
    }
}

/// The lines of a file from its end.
#[derive(Debug)]
pub(crate) struct Backward<'s> {
    file: &'s File,
    /// Lines that begin before this place aren't looked at.
    floor: u64,
    /// Where the buffer begins in the file.
    at: u64,
    buffer: Vec<u8>,
    /// Lines from here on have been handed out.
    end: usize,
    stop: &'s Cancel,
}

impl<'s> Backward<'s> {
    /// Those between the segment's position and this place.
    pub(crate) fn before(segment: &'s Segment, end: u64) -> Backward<'s> {
        Backward {
            file: segment.file(),
            floor: segment.position(),
            at: end.max(segment.position()),
            buffer: Vec::new(),
            end: 0,
            stop: &segment.stop,
        }
    }

    /// The line before the last one, and where it begins.
    pub(crate) fn next_line(&mut self) -> io::Result<Option<(u64, &[u8])>> {
        loop {
            let text = &self.buffer[..self.end];
            // The line's own end isn't the one before it.
            let inside = text.strip_suffix(b"\n").unwrap_or(text);
            let before = inside.iter().rposition(|byte| *byte == b'\n');
            let begin = match before {
                Some(before) => before + 1,
                None if self.at == self.floor => 0,
                None => {
                    self.read_more()?;
                    continue;
                }
            };
            let line = begin..inside.len();
            if self.end == 0 {
                return Ok(None);
            }
            self.end = begin;
            return Ok(Some((self.at + begin as u64, &self.buffer[line])));
        }
    }

    /// Puts an earlier piece before what is left. Of a line that is too long only its end stays,
    /// which is no event.
    fn read_more(&mut self) -> io::Result<()> {
        go_on(self.stop)?;
        if self.end > MAX_LINE_BYTES {
            self.buffer.drain(..self.end - 1);
            self.end = 1;
        }
        let size = READ_BYTES.max(self.end).min((self.at - self.floor) as usize);
        let at = self.at - size as u64;
        let mut bytes = vec![0; size];
        let read = read_at(self.file, &mut bytes, at)?;
        if read < size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&self.buffer[..self.end]);
        self.end = bytes.len();
        self.buffer = bytes;
        self.at = at;
        Ok(())
    }
}

/// Fails if whoever reads has had enough.
fn go_on(stop: &Cancel) -> io::Result<()> {
    match stop.is_requested() {
        true => Err(io::ErrorKind::Interrupted.into()),
        false => Ok(()),
    }
}

/// Fills the buffer as far as the file goes.
fn read_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;
    use crate::core::scratch::Scratch;

    fn line(number: usize) -> String {
        let (secs, millis) = (number / 1000, number % 1000);
        let ts = format!(
            "2026-11-21T{:02}:{:02}:{:02}.{millis:03}Z",
            secs / 3600,
            secs / 60 % 60,
            secs % 60
        );
        // Lines of very different lengths: the search lands in the midst of long ones too.
        let text = "x".repeat(if number.is_multiple_of(97) {
            30_000
        } else {
            number % 200
        });
        format!("{{\"type\":\"message\",\"ts\":\"{ts}\",\"seq\":{number},\"text\":\"{text}\"}}\n")
    }

    fn seq(segment: &Segment, range: Range<usize>) -> u64 {
        read(segment.bytes(range)).event.unwrap().1.seq.unwrap()
    }

    #[test]
    fn a_time_is_found_wherever_it_is() {
        let scratch = Scratch::new("segment-search");
        let path = scratch.path("x");
        let mut text: String = (0..5000).step_by(2).map(line).collect();
        text.insert_str(0, "garbage\n");
        text.push_str("{\"torn");
        fs::write(&path, &text).unwrap();
        for number in (0..5002).step_by(7).chain([0, 1, 4997, 4998, 4999, 5000]) {
            let mut segment = Segment::open(&path).unwrap().unwrap();
            let ts = read(line(number).as_bytes()).event.unwrap().1.ts.into_owned();
            segment.skip_before(&ts).unwrap();
            let first = match segment.next_line().unwrap() {
                Step::Line(range) => Some(seq(&segment, range)),
                _ => None,
            };
            let wanted = number.next_multiple_of(2) as u64;
            assert_eq!(first, (wanted < 5000).then_some(wanted), "{number}");
        }
    }

    #[test]
    fn lines_come_back_in_reverse() {
        let scratch = Scratch::new("segment-backward");
        let path = scratch.path("x");
        fs::write(&path, (0..2000).map(line).collect::<String>()).unwrap();
        let mut segment = Segment::open(&path).unwrap().unwrap();
        for _ in 0..10 {
            assert!(matches!(segment.next_line().unwrap(), Step::Line(_)));
        }
        let mut lines = Backward::before(&segment, segment.length().unwrap());
        let mut seen = Vec::new();
        let mut last = 0;
        while let Some((place, line)) = lines.next_line().unwrap() {
            seen.push(read(line).event.unwrap().1.seq.unwrap());
            last = place;
        }
        assert!(seen.iter().copied().eq((10..2000).rev()));
        assert_eq!(last, segment.position());
    }

    #[test]
    fn an_unended_line_waits_for_its_end() {
        let scratch = Scratch::new("segment-unended");
        let path = scratch.path("x");
        fs::write(&path, "one\ntw").unwrap();
        let mut segment = Segment::open(&path).unwrap().unwrap();
        assert_eq!(segment.next_line().unwrap(), Step::Line(0..3));
        assert_eq!(segment.next_line().unwrap(), Step::Pending);
        assert_eq!(segment.unended(), b"tw");
        // Cut, and another line in its place.
        fs::write(&path, "one\nthree\n").unwrap();
        match segment.next_line().unwrap() {
            Step::Line(range) => assert_eq!(segment.bytes(range), b"three"),
            other => panic!("{other:?}"),
        }
        // Emptied by somebody.
        fs::write(&path, "four\n").unwrap();
        match segment.next_line().unwrap() {
            Step::Line(range) => assert_eq!(segment.bytes(range), b"four"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_endless_line_takes_no_endless_room() {
        let scratch = Scratch::new("segment-endless");
        let path = scratch.path("x");
        let mut file = File::create(&path).unwrap();
        file.write_all(b"one\n").unwrap();
        file.write_all(&vec![b'x'; 3 * MAX_LINE_BYTES]).unwrap();
        file.write_all(b"\ntwo\n").unwrap();
        let mut segment = Segment::open(&path).unwrap().unwrap();
        assert!(matches!(segment.next_line().unwrap(), Step::Line(_)));
        assert_eq!(segment.next_line().unwrap(), Step::TooLong);
        assert!(segment.buffer.capacity() <= 3 * MAX_LINE_BYTES);
        match segment.next_line().unwrap() {
            Step::Line(range) => assert_eq!(segment.bytes(range), b"two"),
            other => panic!("{other:?}"),
        }
        let segment = Segment::open(&path).unwrap().unwrap();
        let mut lines = Backward::before(&segment, segment.length().unwrap());
        assert_eq!(lines.next_line().unwrap().unwrap().1, b"two");
        assert!(lines.next_line().unwrap().unwrap().1.len() <= 2 * MAX_LINE_BYTES + READ_BYTES);
        assert_eq!(lines.next_line().unwrap().unwrap(), (0, b"one".as_slice()));
        assert_eq!(lines.next_line().unwrap(), None);
    }
}
