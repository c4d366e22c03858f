//! A stream of bytes cut into lines.
//!
//! Here: the cut at LF and nothing else (U+2028 stands raw in what agents say, and CR in what
//! their commands print), the bound on a line, the torn last one. Not here: where the bytes come
//! from (`pump`), what a line says (`codex`).

use std::borrow::Cow;
use std::io::BufRead;

/// The longest line that is parsed.
pub const MAX_LINE_BYTES: usize = 16 * 1024 * 1024;
/// How much of a longer line is kept, for the warning.
const KEPT_OF_TOO_LONG: usize = 4096;
/// The buffer's size that is kept between lines.
const KEPT_ROOM: usize = 1024 * 1024;

/// One line, without its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// It ended in LF.
    Whole(&'a [u8]),
    /// The stream ended in it.
    Torn(&'a [u8]),
    /// It was longer than [`MAX_LINE_BYTES`]: how it began, and how long it was.
    TooLong(&'a [u8], u64),
}

/// Cuts a stream into lines. Holds at most one line.
#[derive(Debug, Default)]
pub struct LineSplitter {
    begun: Vec<u8>,
    /// Length of a line that is being skipped because it is too long.
    skipped: Option<u64>,
}

impl LineSplitter {
    /// Takes the next bytes and passes on each line that ends in them.
    pub fn feed(&mut self, mut bytes: &[u8], mut take: impl FnMut(Line<'_>)) {
        while !bytes.is_empty() {
            let mut rest = bytes;
            // Reading from memory can't fail, and this searches many bytes at a time.
            let length = rest.skip_until(b'\n').unwrap_or(bytes.len());
            let (piece, ended) = match bytes[..length].strip_suffix(b"\n") {
                Some(piece) => (piece, true),
                None => (&bytes[..length], false),
            };
            bytes = rest;
            self.piece(piece, ended, &mut take);
        }
    }

    fn piece(&mut self, piece: &[u8], ended: bool, take: &mut impl FnMut(Line<'_>)) {
        if let Some(length) = &mut self.skipped {
            *length += piece.len() as u64;
        } else if self.begun.len() + piece.len() > MAX_LINE_BYTES {
            let length = self.begun.len() + piece.len();
            self.begun
                .extend_from_slice(&piece[..piece.len().min(KEPT_OF_TOO_LONG)]);
            self.begun.truncate(KEPT_OF_TOO_LONG);
            self.begun.shrink_to(KEPT_ROOM);
            self.skipped = Some(length as u64);
        } else if ended && self.begun.is_empty() {
            return take(Line::Whole(piece));
        } else {
            self.begun.extend_from_slice(piece);
        }
        if ended {
            self.hand_over(true, take);
        }
    }

    /// The stream has ended: passes on an unfinished line.
    pub fn end(mut self, mut take: impl FnMut(Line<'_>)) {
        if !self.begun.is_empty() || self.skipped.is_some() {
            self.hand_over(false, &mut take);
        }
    }

    fn hand_over(&mut self, whole: bool, take: &mut impl FnMut(Line<'_>)) {
        match self.skipped.take() {
            Some(length) => take(Line::TooLong(&self.begun, length)),
            None if whole => take(Line::Whole(&self.begun)),
            None => take(Line::Torn(&self.begun)),
        }
        self.begun.clear();
        self.begun.shrink_to(KEPT_ROOM);
    }
}

/// A line as text: what is no UTF-8 becomes U+FFFD. In lines so long that the copy would hurt, it
/// is replaced in place by `?`, which takes no more room than what it replaces.
pub fn text_of(line: &[u8]) -> Cow<'_, str> {
    if line.len() <= KEPT_ROOM {
        return String::from_utf8_lossy(line);
    }
    match std::str::from_utf8(line) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => {
            let mut copy = String::with_capacity(line.len());
            for chunk in line.utf8_chunks() {
                copy.push_str(chunk.valid());
                copy.extend(chunk.invalid().iter().map(|_| '?'));
            }
            Cow::Owned(copy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(pieces: &[&[u8]]) -> Vec<String> {
        let mut seen = Vec::new();
        let mut note = |line: Line<'_>| {
            seen.push(match line {
                Line::Whole(line) => format!("{}|", text_of(line)),
                Line::Torn(line) => format!("{}~", text_of(line)),
                Line::TooLong(head, length) => format!("{} of {length}", head.len()),
            });
        };
        let mut lines = LineSplitter::default();
        for piece in pieces {
            lines.feed(piece, &mut note);
        }
        lines.end(&mut note);
        seen
    }

    #[test]
    fn only_lf_ends_a_line() {
        assert_eq!(
            cut(&["a\u{2028}b\r\n\nc\u{85}d".as_bytes()]),
            ["a\u{2028}b\r|", "|", "c\u{85}d~"]
        );
        assert!(cut(&[b""]).is_empty());
        assert_eq!(cut(&[b"one\n"]), ["one|"]);
    }

    #[test]
    fn lines_come_in_pieces_of_any_size() {
        let text = b"first\nsecond line\n\nlast";
        let expected = cut(&[text]);
        for size in 1..text.len() {
            let pieces: Vec<&[u8]> = text.chunks(size).collect();
            assert_eq!(cut(&pieces), expected, "in pieces of {size}");
        }
    }

    #[test]
    fn what_is_too_long_is_skipped_and_told() {
        let long = vec![b'x'; MAX_LINE_BYTES + 1];
        let most = &long[1..];
        assert_eq!(
            cut(&[&long, b"yy\nnext\n", most, b"\n", &long]),
            [
                format!("4096 of {}", MAX_LINE_BYTES + 3),
                "next|".to_owned(),
                format!("{}|", text_of(most)),
                format!("4096 of {}", MAX_LINE_BYTES + 1)
            ]
        );
    }

    #[test]
    fn what_is_no_utf8_is_replaced() {
        assert_eq!(text_of(b"a\xffb"), "a\u{fffd}b");
        let mut long = vec![b'x'; KEPT_ROOM];
        long.extend_from_slice(b"\xff\xe2\x82!");
        assert!(text_of(&long).ends_with("x???!"));
    }
}
