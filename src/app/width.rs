//! How many columns text takes on a terminal.
//!
//! Here: the width of a character, and cutting text to a width. Not here: colours, which take none
//! (`style`).
//!
//! Where terminals disagree (emoji, combining marks) the larger width is taken: a line that is cut a little
//! early does no harm, but a line that wraps garbles the lines below it.

/// Marks a cut.
const CUT: char = '…';

/// Columns of one character.
pub fn of_char(c: char) -> usize {
    match u32::from(c) {
        // Most text is ASCII, so this is decided first.
        0x20..=0x10ff => 1,
        // Hangul, the CJK blocks with their full-width forms, signs drawn as pictures.
        0x1100..=0x115f
        | 0x231a..=0x231b
        | 0x2329..=0x232a
        | 0x23e9..=0x23f3
        | 0x25fd..=0x25fe
        | 0x2600..=0x27bf
        | 0x2b1b..=0x2b55
        | 0x2e80..=0xa4cf
        | 0xa960..=0xa97f
        | 0xac00..=0xd7a3
        | 0xf900..=0xfaff
        | 0xfe10..=0xfe6f
        | 0xff01..=0xff60
        | 0xffe0..=0xffe6
        | 0x16fe0..=0x18d08
        | 0x1aff0..=0x1b2ff
        | 0x1f000..=0x1faff
        | 0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

/// Columns of a text without control characters.
pub fn of(text: &str) -> usize {
    text.chars().map(of_char).sum()
}

/// `text` in at most `columns`; the cut is shown by `…`.
pub fn cut(text: &str, columns: usize) -> String {
    if of(text) <= columns {
        return text.to_owned();
    }
    let mut short = String::new();
    let mut left = match columns.checked_sub(of_char(CUT)) {
        Some(left) => left,
        None => return short,
    };
    for c in text.chars() {
        match left.checked_sub(of_char(c)) {
            Some(less) => left = less,
            None => break,
        }
        short.push(c);
    }
    short.push(CUT);
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths() {
        for (text, columns) in [
            ("", 0),
            ("web-0", 5),
            ("grün …", 6),
            ("日本語", 6),
            ("█░", 2),
            ("🚀", 2),
            ("한글", 4),
        ] {
            assert_eq!(of(text), columns, "{text}");
        }
    }

    #[test]
    fn cuts() {
        for (text, columns, short) in [
            ("web", 3, "web"),
            ("webs", 3, "we…"),
            ("日本語", 6, "日本語"),
            ("日本語", 5, "日本…"),
            ("日本語", 4, "日…"),
            ("web", 1, "…"),
            ("web", 0, ""),
            ("", 0, ""),
        ] {
            assert_eq!(cut(text, columns), short, "{text} {columns}");
        }
    }
}
