//! What a guest writes on its console, made fit for somebody's terminal as it comes.
//!
//! A console is of use only with its colours and cursor movements, so unlike [`crate::core::escape`]
//! this lets those through. It goes by a list of what is let through; everything else is left out:
//! what sets titles, the clipboard or the palette (OSC), what carries data or programs (DCS, APC, PM,
//! SOS), what makes the terminal *answer* (such an answer is typed into the shell as if the user had
//! typed it), what moves or resizes windows, prints, clears the scrollback, or switches to other
//! character sets than line drawing. A reset, full or soft, erases the scrollback in many terminals:
//! instead of it, what was let through is undone, and after a full one the screen is cleared.
//!
//! Here: that filter, over any split of the stream, with bounded memory. Not here: where the bytes
//! come from or go to ([`super::bridge`]).

use std::collections::BTreeSet;

use crate::core::escape::is_harmless;

/// Longest control sequence that is let through, bytes. A sane one has a few numbers.
const MAX_SEQUENCE_BYTES: usize = 64;

/// How much of a string (a title, say) is left out before its missing end is given up on: a guest
/// that never ends one must not silence its console for good.
const MAX_STRING_BYTES: usize = 4096;

/// Largest number in a sequence: no terminal has more lines or columns.
const MAX_PARAMETER: u32 = 9999;

/// Private modes that a guest may set, all of them undone at the end: cursor keys, reverse video,
/// origin, wrapping, blinking and hidden cursor, the other screen, mouse reports, focus reports,
/// bracketed paste.
const MODES: [u32; 18] = [
    1, 5, 6, 7, 9, 12, 25, 47, 1000, 1002, 1003, 1004, 1006, 1015, 1047, 1048, 1049, 2004,
];

/// Those of them that are on in a terminal at rest.
const ON_AT_REST: [u32; 2] = [7, 25];

/// A stream through the filter.
#[derive(Debug, Default)]
pub struct TerminalFilter {
    state: State,
    /// Private modes that aren't as they are at rest.
    changed: BTreeSet<u32>,
    /// Colours, line drawing, keypad or insert mode may be on.
    touched: bool,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Ground,
    /// In a character of several bytes.
    Char {
        bytes: [u8; 4],
        have: usize,
        need: usize,
    },
    /// After ESC.
    Escape,
    /// After ESC and one of `(` and `)`.
    Charset(u8),
    /// After ESC and other intermediate bytes: left out up to its end.
    EscapeOther,
    /// After ESC [.
    Control(Vec<u8>),
    /// In a control sequence too long to be let through.
    ControlTooLong,
    /// In a string.
    String { seen: usize },
    /// In a string, after ESC.
    StringEscape,
}

impl TerminalFilter {
    /// At the beginning of a stream.
    pub fn new() -> TerminalFilter {
        TerminalFilter::default()
    }

    /// Takes what came and appends what of it is let through.
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) {
        for byte in input {
            self.take(*byte, out);
        }
    }

    /// What brings the terminal back to rest after all that was let through.
    pub fn undo(&self) -> Vec<u8> {
        let mut undo = Vec::new();
        for mode in &self.changed {
            let end = if ON_AT_REST.contains(mode) { 'h' } else { 'l' };
            undo.extend(format!("\x1b[?{mode}{end}").bytes());
        }
        if self.touched {
            // Insert mode, scroll region, colours, line drawing, keypad. Setting the region moves the
            // cursor, hence the two around it.
            undo.extend(b"\x1b[4l\x1b7\x1b[r\x1b8\x1b[0m\x1b(B\x0f\x1b>");
        }
        undo
    }

    fn take(&mut self, byte: u8, out: &mut Vec<u8>) {
        match (std::mem::take(&mut self.state), byte) {
            // Inside a string only its end, and what begins something new, means anything.
            (State::String { .. }, 0x1b) => self.state = State::StringEscape,
            (State::String { .. }, 0x07 | 0x18 | 0x1a) => {}
            (State::String { .. }, b'\n') => self.ground(byte, out),
            (State::String { seen }, _) if seen < MAX_STRING_BYTES => {
                self.state = State::String { seen: seen + 1 };
            }
            (State::String { .. }, _) => self.ground(byte, out),
            (State::StringEscape, b'\\') => {}
            (State::StringEscape, _) => self.escape(byte, out),

            (State::Char { bytes, have, need }, 0x80..=0xbf) => self.continued(bytes, have, need, byte, out),
            (State::Char { .. }, _) => {
                push(out, char::REPLACEMENT_CHARACTER);
                self.ground(byte, out);
            }

            // A control character within a sequence: terminals obey it and go on with the sequence.
            // Here the sequence is given up, so that what is let through is never in doubt.
            (State::Ground, _) | (_, 0x00..=0x1f | 0x7f..) => self.ground(byte, out),

            (State::Escape, _) => self.escape(byte, out),
            (State::Charset(which), _) => self.charset(which, byte, out),
            (State::EscapeOther, 0x20..=0x2f) => self.state = State::EscapeOther,
            (State::EscapeOther, _) => {}
            (State::Control(mut sequence), 0x20..=0x3f) => {
                sequence.push(byte);
                self.state = match sequence.len() < MAX_SEQUENCE_BYTES {
                    true => State::Control(sequence),
                    false => State::ControlTooLong,
                };
            }
            (State::Control(sequence), end) => self.control(&sequence, end, out),
            (State::ControlTooLong, 0x20..=0x3f) => self.state = State::ControlTooLong,
            (State::ControlTooLong, _) => {}
        }
    }

    fn ground(&mut self, byte: u8, out: &mut Vec<u8>) {
        self.state = State::Ground;
        match byte {
            0x20..=0x7e | b'\r' | b'\n' | 0x08 | b'\t' | 0x07 => out.push(byte),
            // Line drawing on and off.
            0x0e | 0x0f => {
                self.touched = true;
                out.push(byte);
            }
            0x1b => self.state = State::Escape,
            0xc2..=0xdf => self.begin(byte, 2),
            0xe0..=0xef => self.begin(byte, 3),
            0xf0..=0xf4 => self.begin(byte, 4),
            // ENQ (terminals answer it), NUL, DEL, and the like.
            0x00..=0x1f | 0x7f => {}
            0x80.. => push(out, char::REPLACEMENT_CHARACTER),
        }
    }

    fn begin(&mut self, byte: u8, need: usize) {
        self.state = State::Char {
            bytes: [byte, 0, 0, 0],
            have: 1,
            need,
        };
    }

    fn continued(&mut self, mut bytes: [u8; 4], have: usize, need: usize, byte: u8, out: &mut Vec<u8>) {
        bytes[have] = byte;
        let have = have + 1;
        if have < need {
            self.state = State::Char { bytes, have, need };
            return;
        }
        self.state = State::Ground;
        match std::str::from_utf8(&bytes[..need])
            .ok()
            .and_then(|text| text.chars().next())
        {
            // Control characters of the second set begin sequences, as ESC does.
            Some(c) if c.is_control() => {}
            Some(c) if is_harmless(c) => push(out, c),
            _ => push(out, char::REPLACEMENT_CHARACTER),
        }
    }

    /// The byte after ESC.
    fn escape(&mut self, byte: u8, out: &mut Vec<u8>) {
        self.state = match byte {
            b'[' => State::Control(Vec::new()),
            b']' | b'P' | b'X' | b'^' | b'_' => State::String { seen: 0 },
            b'(' | b')' => State::Charset(byte),
            0x20..=0x2f => State::EscapeOther,
            // Save and restore the cursor, line feeds both ways, tab stops, keypad.
            b'7' | b'8' | b'D' | b'E' | b'H' | b'M' | b'=' | b'>' => {
                self.touched = true;
                out.extend([0x1b, byte]);
                State::Ground
            }
            // Full reset.
            b'c' => {
                self.reset(out);
                out.extend(b"\x1b[H\x1b[2J");
                State::Ground
            }
            // Among them Z, which is answered.
            0x30..=0x7e => State::Ground,
            _ => return self.ground(byte, out),
        };
    }

    fn charset(&mut self, which: u8, byte: u8, out: &mut Vec<u8>) {
        match byte {
            b'0' | b'A' | b'B' | b'K' | b'U' => {
                self.touched = true;
                out.extend([0x1b, which, byte]);
            }
            0x20..=0x2f => self.state = State::EscapeOther,
            _ => {}
        }
    }

    /// A whole control sequence, `end` its last byte.
    fn control(&mut self, sequence: &[u8], end: u8, out: &mut Vec<u8>) {
        let (private, rest) = match sequence {
            [first @ (b'<' | b'=' | b'>' | b'?'), rest @ ..] => (Some(*first), rest),
            all => (None, all),
        };
        let split = rest.iter().position(|byte| *byte < 0x30).unwrap_or(rest.len());
        let (parameters, intermediate) = rest.split_at(split);
        let Some(numbers) = numbers(parameters) else {
            return;
        };
        match private {
            Some(b'?') if intermediate.is_empty() => self.modes(&numbers, end, out),
            // Soft reset.
            None if (intermediate, end) == (b"!", b'p') => self.reset(out),
            None if is_let_through(&numbers, intermediate, end) => {
                self.touched = true;
                out.extend(b"\x1b[");
                out.extend(sequence);
                out.push(end);
            }
            _ => {}
        }
    }

    /// What a reset is good for: a garbled screen becomes readable again.
    fn reset(&mut self, out: &mut Vec<u8>) {
        self.touched = true;
        out.extend(self.undo());
        self.changed.clear();
    }

    /// Private modes: those of the list, each on its own.
    fn modes(&mut self, numbers: &[Option<u32>], end: u8, out: &mut Vec<u8>) {
        if !matches!(end, b'h' | b'l') {
            return;
        }
        for mode in numbers.iter().flatten().filter(|mode| MODES.contains(mode)) {
            let at_rest = ON_AT_REST.contains(mode) == (end == b'h');
            match at_rest {
                true => self.changed.remove(mode),
                false => self.changed.insert(*mode),
            };
            out.extend(format!("\x1b[?{mode}{}", char::from(end)).bytes());
        }
    }
}

fn push(out: &mut Vec<u8>, c: char) {
    out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

/// The numbers between `;` and `:`, empty ones as `None`; `None`: there is something else among
/// them, or one is too large.
fn numbers(parameters: &[u8]) -> Option<Vec<Option<u32>>> {
    parameters
        .split(|byte| matches!(byte, b';' | b':'))
        .map(|digits| match digits {
            [] => Some(None),
            _ => {
                let number: u32 = std::str::from_utf8(digits).ok()?.parse().ok()?;
                (digits[0].is_ascii_digit() && number <= MAX_PARAMETER).then_some(Some(number))
            }
        })
        .collect()
}

/// Whether a sequence without a private mark does nothing but paint or move the cursor.
fn is_let_through(numbers: &[Option<u32>], intermediate: &[u8], end: u8) -> bool {
    match (intermediate, end) {
        // Cursor, tab stops, insert and delete, scroll region, colours.
        (
            [],
            b'A'..=b'I' | b'K'..=b'M' | b'P' | b'X' | b'Z' | b'@' | b'`' | b'a' | b'd'..=b'g' | b'm' | b'r',
        ) => true,
        // Save and restore the cursor. With numbers `s` sets margins.
        ([], b's' | b'u') => numbers == [None],
        // Scroll. With five numbers `T` waits for the mouse.
        ([], b'S' | b'T') => numbers.len() == 1,
        // Erase the screen or a part of it; not the scrollback, which is the user's.
        ([], b'J') => matches!(numbers, [None | Some(0..=2)]),
        // Insert mode.
        ([], b'h' | b'l') => numbers == [Some(4)],
        // The cursor's shape.
        ([b' '], b'q') => numbers.len() == 1,
        _ => false,
    }
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
