//! A stream of bytes as lines of bounded length.
//!
//! Here: cutting, nothing else. Not here: making lines harmless (`core::escape`).

/// Cuts a stream into lines. A line longer than the limit comes in pieces, cut between
/// characters; bytes that are no UTF-8 come as `U+FFFD`.
#[derive(Debug)]
pub struct LineCutter {
    pending: Vec<u8>,
    limit: usize,
}

impl LineCutter {
    /// A cutter for lines of at most `limit` bytes.
    pub fn new(limit: usize) -> LineCutter {
        LineCutter {
            pending: Vec::new(),
            limit: limit.max(4),
        }
    }

    /// Takes the bytes of one read and passes on the lines that they complete, without line ends.
    pub fn push(&mut self, mut bytes: &[u8], mut each: impl FnMut(&str)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.extend(&bytes[..end], &mut each);
            if self.pending.last() == Some(&b'\r') {
                self.pending.pop();
            }
            each(&String::from_utf8_lossy(&self.pending));
            self.pending.clear();
            bytes = &bytes[end + 1..];
        }
        self.extend(bytes, &mut each);
    }

    /// Passes on the last line, if the stream ended without a line end.
    pub fn finish(&mut self, mut each: impl FnMut(&str)) {
        if !self.pending.is_empty() {
            each(&String::from_utf8_lossy(&self.pending));
            self.pending.clear();
        }
    }

    fn extend(&mut self, mut bytes: &[u8], each: &mut impl FnMut(&str)) {
        while self.pending.len() + bytes.len() > self.limit {
            let (now, later) = bytes.split_at(self.limit - self.pending.len());
            self.pending.extend_from_slice(now);
            bytes = later;
            let cut = last_boundary(&self.pending);
            let rest = self.pending.split_off(cut);
            each(&String::from_utf8_lossy(&self.pending));
            self.pending = rest;
        }
        self.pending.extend_from_slice(bytes);
    }
}

/// Where an unfinished character at the end of these bytes begins; their end if there is none.
fn last_boundary(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        // Only an unfinished character at the end can still be completed.
        Err(error) if error.error_len().is_none() && error.valid_up_to() > 0 => error.valid_up_to(),
        _ => bytes.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::LineCutter;

    fn lines(limit: usize, pieces: &[&[u8]]) -> Vec<String> {
        let mut lines = Vec::new();
        let mut cutter = LineCutter::new(limit);
        for piece in pieces {
            cutter.push(piece, |line| lines.push(line.to_owned()));
        }
        cutter.finish(|line| lines.push(line.to_owned()));
        lines
    }

    #[test]
    fn lines_come_whole_however_they_were_read() {
        let text = "one\ntwo\r\n\nGrüße 名前\nlast".as_bytes();
        let expected = ["one", "two", "", "Grüße 名前", "last"];
        for size in 1..text.len() {
            let pieces: Vec<&[u8]> = text.chunks(size).collect();
            assert_eq!(lines(100, &pieces), expected, "pieces of {size}");
        }
    }

    #[test]
    fn long_lines_come_in_pieces_between_characters() {
        assert_eq!(lines(4, &[b"abcdefgh\nij"]), ["abcd", "efgh", "ij"]);
        assert_eq!(lines(4, &["aaaé\n".as_bytes()]), ["aaa", "é"]);
        assert_eq!(lines(4, &[b"\xff\xff\xff\xff\xff\n"]).concat().chars().count(), 5);
        assert_eq!(lines(8, &[&[b'x'; 20]]).concat().len(), 20);
    }
}
