//! One file of lines, read by position.
//!
//! Here: lines forwards and backwards, and the place where a number or a time begins, found without
//! reading what lies before it. Not here: which files a log has (`lines::rotated_log`), or what a
//! line says.

use std::fs::File;
use std::io::{self, BufRead};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::core::cancel::Cancel;
use crate::core::host;

/// Read so much at a time.
const READ_BYTES: usize = 64 * 1024;

/// Device and inode: who a file is, whatever it is called by now.
pub(crate) type Identity = (u64, u64);

/// A file of lines and how far it has been read.
#[derive(Debug)]
pub(crate) struct LineFile {
    path: PathBuf,
    file: File,
    /// A longer line can't be what this file is for.
    max_line: usize,
    /// Bytes of the file from `at` on; lines before `used` have been handed out.
    buffer: Vec<u8>,
    used: usize,
    /// Bytes from `used` on in which there is no line end.
    searched: usize,
    /// Where the buffer begins in the file.
    at: u64,
    /// The bytes before `at` that were handed out last, to know them again if the file is cut back.
    passed: Vec<u8>,
    /// Inside a line that is too long.
    skipping: bool,
    /// Looked at between two reads: such a line may have gigabytes.
    stop: Cancel,
}

/// A step of reading.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A line, at this place in [`LineFile::bytes`].
    Line(Range<usize>),
    /// A line that was too long has ended.
    TooLong,
    /// No whole line is there now.
    Pending,
}

impl LineFile {
    /// `None`: there is no such file, or it is something else than a file. Looking at that doesn't
    /// wait for anybody, as opening a named pipe would.
    pub(crate) fn open(path: &Path, max_line: usize) -> io::Result<Option<LineFile>> {
        let file = match host::open_without_waiting(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        Ok(Some(LineFile {
            path: path.to_owned(),
            file,
            max_line,
            buffer: Vec::new(),
            used: 0,
            searched: 0,
            at: 0,
            passed: Vec::new(),
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

    /// Who the file is.
    pub(crate) fn identity(&self) -> io::Result<Identity> {
        let meta = self.file.metadata()?;
        Ok((meta.dev(), meta.ino()))
    }

    /// Its length now, bytes.
    pub(crate) fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Where the next line begins.
    pub(crate) fn position(&self) -> u64 {
        self.at + self.used as u64
    }

    /// Goes on at this place, which must be the beginning of a line. What was read ahead is read again.
    pub(crate) fn go_to(&mut self, position: u64) {
        self.at = position;
        self.used = 0;
        self.searched = 0;
        self.buffer.clear();
        self.passed.clear();
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
            let from = self.used + self.searched;
            if let Some(length) = line_end(&self.buffer[from..]) {
                let line = self.used..from + length;
                self.used = line.end + 1;
                self.searched = 0;
                if std::mem::take(&mut self.skipping) {
                    return Ok(Step::TooLong);
                }
                return Ok(Step::Line(line));
            }
            self.searched = self.buffer.len() - self.used;
            if self.skipping || self.searched > self.max_line {
                self.skipping = true;
                self.used = self.buffer.len();
                self.searched = 0;
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

    /// Whether something follows the last line end, be it the beginning of a line that is too long.
    pub(crate) fn is_torn(&self) -> bool {
        self.skipping || !self.unended().is_empty()
    }

    /// Where its last whole line ends.
    pub(crate) fn end_of_lines(&self) -> io::Result<u64> {
        let length = self.length()?;
        let mut last = [b'\n'];
        read_at(&self.file, &mut last, length.saturating_sub(1))?;
        if last == [b'\n'] {
            return Ok(length);
        }
        let torn = Backward::before(self, length)
            .next_line(self)?
            .map(|(place, _)| place);
        Ok(torn.unwrap_or(length))
    }

    /// Reads on. Bytes of an unended line are read again, because they may have changed.
    fn refill(&mut self) -> io::Result<bool> {
        go_on(&self.stop)?;
        let known = self.buffer.len() - self.used;
        if self.used > 0 {
            std::mem::swap(&mut self.passed, &mut self.buffer);
            self.passed.truncate(self.used);
            self.at += self.used as u64;
            self.used = 0;
        }
        self.searched = 0;
        // Twice as much where a piece held no line end, so that long lines aren't read too often.
        let wanted = READ_BYTES.max(known * 2);
        self.buffer.resize(wanted, 0);
        let read = read_at(&self.file, &mut self.buffer, self.at);
        self.buffer.truncate(*read.as_ref().unwrap_or(&0));
        if read? == 0 && self.at > self.length()? {
            self.go_to(self.still_there()?);
            return Ok(self.length()? > self.at);
        }
        Ok(self.buffer.len() > known || line_end(&self.buffer).is_some())
    }

    /// Where to go on in a file that was cut back, after a write that failed as a rule: behind the last
    /// line that is still as it was read.
    fn still_there(&self) -> io::Result<u64> {
        let from = self.at - self.passed.len() as u64;
        let mut now = vec![0; self.passed.len()];
        let have = read_at(&self.file, &mut now, from)?;
        let mut before = [b'\n'];
        read_at(&self.file, &mut before, from.saturating_sub(1))?;
        if have == 0 || (from > 0 && before != [b'\n']) {
            // Far more is gone than a failed write: its lines begin anew.
            return Ok(0);
        }
        let same = self.passed.iter().zip(&now[..have]);
        let same = same.take_while(|(was, is)| was == is).count();
        let lines = self.passed[..same].iter().rposition(|byte| *byte == b'\n');
        Ok(from + lines.map_or(0, |end| end as u64 + 1))
    }

    /// Goes to the first line that isn't before some place, by bisection: what lies before that isn't
    /// read. `is_before` says of a line whether it is, or that the line doesn't tell; in the file, lines
    /// before that place must come first. True if there is an earlier line in this file.
    pub(crate) fn skip_while(&mut self, is_before: &dyn Fn(&[u8]) -> Option<bool>) -> io::Result<bool> {
        let (mut low, mut high) = (0, self.length()?);
        while high - low > READ_BYTES as u64 {
            let middle = low + (high - low) / 2;
            match self.first_behind(middle, high, is_before)? {
                Some((true, end)) => low = end,
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
                    if is_before(&self.buffer[line]) == Some(false) {
                        self.go_to(position);
                        break;
                    }
                }
            }
        }
        Ok(self.position() > 0)
    }

    /// What the first telling line says that begins behind this place and ends before `high`, and where
    /// it ends.
    fn first_behind(
        &self,
        place: u64,
        high: u64,
        is_before: &dyn Fn(&[u8]) -> Option<bool>,
    ) -> io::Result<Option<(bool, u64)>> {
        const STEP: usize = 4 * 1024;
        let mut size = STEP;
        loop {
            go_on(&self.stop)?;
            let mut bytes = vec![0; size];
            let read_now = read_at(&self.file, &mut bytes, place)?;
            bytes.truncate(read_now);
            let mut begin = line_end(&bytes).map_or(bytes.len(), |end| end + 1);
            while let Some(length) = line_end(&bytes[begin..]) {
                let end = begin + length;
                if place + end as u64 + 1 > high {
                    return Ok(None);
                }
                if let Some(before) = is_before(&bytes[begin..end]) {
                    return Ok(Some((before, place + end as u64 + 1)));
                }
                begin = end + 1;
            }
            if read_now < size || size > self.max_line {
                return Ok(None);
            }
            size *= 2;
        }
    }
}

/// The lines of a file from its end.
#[derive(Debug)]
pub(crate) struct Backward {
    /// Lines that begin before this place aren't looked at.
    floor: u64,
    /// Where the buffer begins in the file.
    at: u64,
    buffer: Vec<u8>,
    /// Lines from here on have been handed out.
    end: usize,
    /// The line that was handed out last.
    current: Option<Range<usize>>,
}

impl Backward {
    /// Those between the file's position and this place.
    pub(crate) fn before(file: &LineFile, end: u64) -> Backward {
        Backward {
            floor: file.position(),
            at: end.max(file.position()),
            buffer: Vec::new(),
            end: 0,
            current: None,
        }
    }

    /// Those between the file's position and its last line end.
    pub(crate) fn whole(file: &LineFile) -> io::Result<Backward> {
        Ok(Backward::before(file, file.end_of_lines()?))
    }

    /// The line that was handed out last.
    pub(crate) fn current(&self) -> Option<(u64, &[u8])> {
        let line = self.current.clone()?;
        Some((self.at + line.start as u64, &self.buffer[line]))
    }

    /// The line before the last one, and where it begins; of a line that is too long, its end at the
    /// most. The file is always the same.
    pub(crate) fn next_line(&mut self, file: &LineFile) -> io::Result<Option<(u64, &[u8])>> {
        loop {
            let text = &self.buffer[..self.end];
            // The line's own end isn't the one before it.
            let inside = text.strip_suffix(b"\n").unwrap_or(text);
            let before = inside.iter().rposition(|byte| *byte == b'\n');
            let begin = match before {
                Some(before) => before + 1,
                None if self.at == self.floor => 0,
                None => {
                    self.read_more(file)?;
                    continue;
                }
            };
            self.current = (self.end > 0).then_some(begin..inside.len());
            self.end = begin;
            return Ok(self.current());
        }
    }

    /// Puts an earlier piece before what is left. Of a line that is too long only its end stays.
    fn read_more(&mut self, file: &LineFile) -> io::Result<()> {
        go_on(&file.stop)?;
        if self.end > file.max_line {
            self.buffer.drain(..self.end - 1);
            self.end = 1;
        }
        let size = READ_BYTES.max(self.end).min((self.at - self.floor) as usize);
        let at = self.at - size as u64;
        let mut bytes = vec![0; size];
        let read = read_at(&file.file, &mut bytes, at)?;
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

/// Where the first line ends.
fn line_end(bytes: &[u8]) -> Option<usize> {
    // `skip_until` searches many bytes at once; it can't fail on bytes that are here already.
    let passed = (&mut &*bytes).skip_until(b'\n').ok()?;
    let end = passed.checked_sub(1)?;
    (bytes[end] == b'\n').then_some(end)
}

/// Fails if whoever reads has had enough.
fn go_on(stop: &Cancel) -> io::Result<()> {
    match stop.is_requested() {
        true => Err(io::ErrorKind::Interrupted.into()),
        false => Ok(()),
    }
}

/// Fills the buffer as far as the file goes.
pub(crate) fn read_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
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
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;
    use crate::core::scratch::Scratch;

    const MAX_LINE: usize = 1024 * 1024;

    /// Lines of very different lengths: a search lands in the midst of long ones too.
    fn line(number: u64) -> String {
        let length = if number.is_multiple_of(97) {
            30_000
        } else {
            number % 200
        };
        format!("{number} {}\n", "x".repeat(length as usize))
    }

    fn number_of(line: &[u8]) -> Option<u64> {
        let text = std::str::from_utf8(line).ok()?;
        text.split(' ').next()?.parse().ok()
    }

    fn open(path: &Path) -> LineFile {
        LineFile::open(path, MAX_LINE).unwrap().unwrap()
    }

    /// The next line's text, or the step that isn't one.
    fn next(file: &mut LineFile) -> Result<String, Step> {
        match file.next_line().unwrap() {
            Step::Line(range) => Ok(String::from_utf8(file.bytes(range).to_vec()).unwrap()),
            other => Err(other),
        }
    }

    #[test]
    fn a_number_is_found_wherever_it_is() {
        let scratch = Scratch::new("line-file-search");
        let path = scratch.path("x");
        let mut text: String = (0..5000).step_by(2).map(line).collect();
        text.insert_str(0, "garbage\n");
        text.push_str("torn");
        fs::write(&path, &text).unwrap();
        for number in (0..5002).step_by(7).chain([0, 1, 4997, 4998, 4999, 5000]) {
            let mut file = open(&path);
            file.skip_while(&|line| number_of(line).map(|found| found < number))
                .unwrap();
            let first = next(&mut file).ok().and_then(|line| number_of(line.as_bytes()));
            let wanted = number.next_multiple_of(2);
            assert_eq!(first, (wanted < 5000).then_some(wanted), "{number}");
        }
    }

    #[test]
    fn lines_come_back_in_reverse() {
        let scratch = Scratch::new("line-file-backward");
        let path = scratch.path("x");
        for torn in ["", "torn", &"x".repeat(2 * MAX_LINE)] {
            fs::write(&path, (0..2000).map(line).collect::<String>() + torn).unwrap();
            let mut file = open(&path);
            for _ in 0..10 {
                next(&mut file).unwrap();
            }
            let mut lines = Backward::whole(&file).unwrap();
            let mut seen = Vec::new();
            let mut last = 0;
            while let Some((place, line)) = lines.next_line(&file).unwrap() {
                seen.extend(number_of(line));
                last = place;
            }
            assert!(seen.iter().copied().eq((10..2000).rev()), "{seen:?}");
            assert_eq!(last, file.position());
        }
    }

    #[test]
    fn an_unended_line_waits_for_its_end() {
        let scratch = Scratch::new("line-file-unended");
        let path = scratch.path("x");
        fs::write(&path, "one\ntw").unwrap();
        let mut file = open(&path);
        assert_eq!(next(&mut file), Ok("one".to_owned()));
        assert_eq!(next(&mut file), Err(Step::Pending));
        assert_eq!(file.unended(), b"tw");
        // Cut, and another line in its place.
        fs::write(&path, "one\nthree\n").unwrap();
        assert_eq!(next(&mut file), Ok("three".to_owned()));
        // Cut back behind lines that were read: only what is new comes.
        fs::write(&path, "one\nth\n").unwrap();
        assert_eq!(next(&mut file), Ok("th".to_owned()));
        // Emptied by somebody.
        fs::write(&path, "").unwrap();
        assert_eq!(next(&mut file), Err(Step::Pending));
        fs::write(&path, "four\n").unwrap();
        assert_eq!(next(&mut file), Ok("four".to_owned()));
    }

    #[test]
    fn a_file_that_was_begun_anew_is_read_from_its_start() {
        let scratch = Scratch::new("line-file-anew");
        let path = scratch.path("x");
        let lines = |word: &str, count| (0..count).map(|number| format!("{word} {number}\n")).collect();
        let (first, second): (String, String) = (lines("first", 20_000), lines("second one", 13_000));
        assert!(second.len() < first.len() && second.len() > first.len() - READ_BYTES);
        fs::write(&path, first).unwrap();
        let mut file = open(&path);
        while next(&mut file).is_ok() {}
        fs::write(&path, second).unwrap();
        for number in 0..13_000 {
            assert_eq!(next(&mut file), Ok(format!("second one {number}")));
        }
    }

    #[test]
    fn an_endless_line_takes_no_endless_room() {
        let scratch = Scratch::new("line-file-endless");
        let path = scratch.path("x");
        let mut file = File::create(&path).unwrap();
        file.write_all(b"one\n").unwrap();
        file.write_all(&vec![b'x'; 5 * MAX_LINE]).unwrap();
        file.write_all(b"\ntwo\n").unwrap();
        let mut file = open(&path);
        assert_eq!(next(&mut file), Ok("one".to_owned()));
        assert_eq!(next(&mut file), Err(Step::TooLong));
        assert!(file.buffer.capacity() + file.passed.capacity() <= 5 * MAX_LINE);
        assert_eq!(next(&mut file), Ok("two".to_owned()));
        let file = open(&path);
        let mut lines = Backward::whole(&file).unwrap();
        assert_eq!(lines.next_line(&file).unwrap().unwrap().1, b"two");
        assert!(lines.next_line(&file).unwrap().unwrap().1.len() <= 2 * MAX_LINE + READ_BYTES);
        assert_eq!(lines.next_line(&file).unwrap(), Some((0, b"one".as_slice())));
        assert_eq!(lines.next_line(&file).unwrap(), None);
    }
}
