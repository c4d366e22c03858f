//! Finds bytes of a payload that need a closer look, eight bytes at a time.
//!
//! Every byte of every publish passes here, and hardly any needs a closer look. So eight bytes are
//! compared at once by a few operations on one register, which is fast however castra is compiled.
//! Not here: what is then done about them (`super::frame`).

/// A word in which every byte is this one.
const fn all(byte: u8) -> u64 {
    u64::from_le_bytes([byte; 8])
}

/// What some bytes of JSON contain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ByteScan {
    /// How many opening brackets there are, those in strings included.
    pub opened: usize,
    /// A backslash is among them.
    pub escaped: bool,
    /// A line feed or carriage return is among them.
    pub line_ends: bool,
}

impl ByteScan {
    /// Scans all bytes.
    pub(super) fn of(bytes: &[u8]) -> ByteScan {
        let (words, rest) = bytes.as_chunks::<8>();
        let (mut opened, mut escaped, mut line_ends) = (0, 0, 0);
        // A byte of a word can count the brackets at its place in this many words.
        for some in words.chunks(usize::from(u8::MAX)) {
            let mut counts = 0;
            for word in some {
                let word = u64::from_le_bytes(*word);
                // `[` and `{` differ in this one bit, and no other bytes become `{` by it.
                counts += equal(word | all(b'[' ^ b'{'), b'{') >> 7;
                escaped |= equal(word, b'\\');
                line_ends |= equal(word, b'\n') | equal(word, b'\r');
            }
            opened += counts.to_le_bytes().into_iter().map(usize::from).sum::<usize>();
        }
        ByteScan {
            opened: opened + rest.iter().filter(|byte| matches!(byte, b'{' | b'[')).count(),
            escaped: escaped != 0 || rest.contains(&b'\\'),
            line_ends: line_ends != 0 || rest.iter().any(|byte| matches!(byte, b'\n' | b'\r')),
        }
    }
}

/// The highest bit of each byte of the word that equals this one.
fn equal(word: u64, byte: u8) -> u64 {
    const LOW: u64 = all(0x7f);
    let differs = word ^ all(byte);
    // Adding to seven bits carries into the eighth unless they are all zero, and never beyond it.
    !(((differs & LOW) + LOW) | differs | LOW)
}

#[cfg(test)]
mod tests {
    use super::ByteScan;

    fn one_by_one(bytes: &[u8]) -> ByteScan {
        let has = |these: &[u8]| bytes.iter().any(|byte| these.contains(byte));
        ByteScan {
            opened: bytes.iter().filter(|byte| b"{[".contains(byte)).count(),
            escaped: has(b"\\"),
            line_ends: has(b"\r\n"),
        }
    }

    #[test]
    fn every_byte_in_every_place() {
        for length in 1..=17 {
            for place in 0..length {
                for byte in 0..=u8::MAX {
                    for around in [b' ', 0, 0x7f, 0xff, b'Z', b'|'] {
                        let mut bytes = vec![around; length];
                        bytes[place] = byte;
                        assert_eq!(ByteScan::of(&bytes), one_by_one(&bytes), "{bytes:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn more_than_a_byte_can_count() {
        for length in [255 * 8 - 1, 255 * 8, 255 * 8 + 9, 70_000] {
            assert_eq!(ByteScan::of(&vec![b'['; length]).opened, length);
        }
    }
}
