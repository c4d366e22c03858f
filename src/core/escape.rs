//! Text that came from a guest, or holds a path, made fit for a terminal, a log line or an event.
//!
//! Here: what is replaced, and by what; how deep JSON is nested. Not here: cutting a stream into lines
//! (`core::bootstrap::bounded_lines`), or quoting for a shell (`core::process::shell_quote`).

use std::borrow::Cow;

/// What stands at the end of a text that was cut.
const CUT: char = '…';

/// `text` as one harmless line of at most `limit` bytes: control characters (ESC, CR, LF, NUL,
/// C1), bidirectional overrides, line separators and invisible characters are written as
/// `\n`, `\x1b` or `\u{202e}`. A tab stays: it moves the cursor and nothing else. What doesn't
/// fit is cut off, and the cut is shown by `…`.
///
/// The result is for reading. It isn't reversible, because doubling every backslash would
/// disfigure honest text for the sake of no one.
pub fn escape_line(text: &str, limit: usize) -> String {
    let mut line = String::with_capacity(text.len().min(limit));
    // The last place where a cut with its sign still fits.
    let mut cut_at = 0;
    for c in text.chars() {
        let before = line.len();
        if before + CUT.len_utf8() <= limit {
            cut_at = before;
        }
        if is_harmless(c) {
            line.push(c);
        } else {
            push_escaped(&mut line, c);
        }
        if line.len() > limit {
            line.truncate(cut_at);
            if limit >= CUT.len_utf8() {
                line.push(CUT);
            }
            return line;
        }
    }
    line
}

/// Text of several lines, coloured by castra, as a terminal may be given it: everything [`escape_line`]
/// would replace is, but for line feeds and colours (`ESC [ … m`). It is the net below all that is
/// printed, which holds where a field wasn't escaped, such as a path; a hostile field is escaped before
/// it is coloured.
pub fn escape_text(text: &str) -> Cow<'_, str> {
    let is_fine = |c: char| c == '\n' || is_harmless(c);
    let Some(first) = text.find(|c| !is_fine(c)) else {
        return Cow::Borrowed(text);
    };
    let (fine, mut rest) = text.split_at(first);
    let mut shown = String::with_capacity(text.len() + 16);
    shown.push_str(fine);
    while let Some(c) = rest.chars().next() {
        let length = colour_length(rest);
        if length > 0 {
            shown.push_str(&rest[..length]);
            rest = &rest[length..];
            continue;
        }
        match is_fine(c) {
            true => shown.push(c),
            false => push_escaped(&mut shown, c),
        }
        rest = &rest[c.len_utf8()..];
    }
    Cow::Owned(shown)
}

/// How long the colour is with which `text` begins; 0: it begins with none.
fn colour_length(text: &str) -> usize {
    let Some(numbers) = text.strip_prefix("\x1b[") else {
        return 0;
    };
    let end = numbers.find(|c: char| !matches!(c, '0'..='9' | ';'));
    match end.filter(|end| numbers[*end..].starts_with('m')) {
        Some(end) => "\x1b[".len() + end + "m".len(),
        None => 0,
    }
}

/// JSON text with everything [`escape_line`] would replace written as `\u202e`: the same value
/// to whoever parses it, harmless to a terminal. Such characters only occur inside strings, where
/// that is allowed.
pub fn escape_json(json: &str) -> Cow<'_, str> {
    let is_fine = |c: char| c == '\n' || is_harmless(c);
    if json.chars().all(is_fine) {
        return Cow::Borrowed(json);
    }
    let mut text = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if is_fine(c) {
            text.push(c);
            continue;
        }
        // Beyond 16 bits JSON wants two halves.
        for unit in c.encode_utf16(&mut [0; 2]) {
            text.push_str(&format!("\\u{unit:04x}"));
        }
    }
    Cow::Owned(text)
}

fn push_escaped(line: &mut String, c: char) {
    match c {
        '\n' => line.push_str("\\n"),
        '\r' => line.push_str("\\r"),
        '\0'..='\x7f' => line.push_str(&format!("\\x{:02x}", u32::from(c))),
        _ => line.extend(c.escape_unicode()),
    }
}

/// Whether a character only shows itself.
pub(crate) fn is_harmless(c: char) -> bool {
    match c {
        '\t' => true,
        // What most text is made of, decided first.
        ' '..='~' => true,
        _ if c.is_control() => false,
        // Soft hyphen, Arabic letter mark, Mongolian vowel separator.
        '\u{ad}' | '\u{61c}' | '\u{180e}' => false,
        // Zero-width space; marks, separators and overrides that change direction or line. The
        // joiners U+200C and U+200D stay: Persian, Hindi and emoji are spelled with them.
        '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' => false,
        '\u{feff}' | '\u{fff9}'..='\u{fffb}' => false,
        // Tag characters: invisible, and able to spell a whole hidden text.
        '\u{e0000}'..='\u{e007f}' => false,
        _ => true,
    }
}

/// How deep valid JSON is nested, by its brackets: what others have to parse must not end them.
pub fn json_depth(json: &[u8]) -> usize {
    let (mut deepest, mut depth, mut quoted, mut escaped) = (0_usize, 0_usize, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => quoted = !quoted,
            b'{' | b'[' if !quoted => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !quoted => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::{escape_json, escape_line, escape_text};

    #[test]
    fn what_moves_the_terminal_is_written_out() {
        for (text, shown) in [
            ("plain text, tab\there", "plain text, tab\there"),
            ("Grüße, 名前, 👩‍💻", "Grüße, 名前, 👩‍💻"),
            ("\x1b[2J\x07", "\\x1b[2J\\x07"),
            ("a\r\nb\0", "a\\r\\nb\\x00"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("\u{202e}gnp.exe", "\\u{202e}gnp.exe"),
            ("\u{2066}\u{2028}\u{feff}", "\\u{2066}\\u{2028}\\u{feff}"),
            ("\u{e0041}", "\\u{e0041}"),
            ("\x7f", "\\x7f"),
        ] {
            assert_eq!(escape_line(text, 1000), shown);
        }
    }

    #[test]
    fn castras_own_colours_and_lines_stay() {
        for (text, shown) in [
            ("plain\n\tlines\n", "plain\n\tlines\n"),
            ("\x1b[1;31merror:\x1b[0m x\n", "\x1b[1;31merror:\x1b[0m x\n"),
            ("\x1b[m", "\x1b[m"),
            ("/tmp/a\x1b[2Jb\rc", "/tmp/a\\x1b[2Jb\\rc"),
            ("\x1b[1;31", "\\x1b[1;31"),
            ("\x1b[?25m\x1b[3:1m\x1b", "\\x1b[?25m\\x1b[3:1m\\x1b"),
            ("\u{9b}31m\x7f\u{202e}é", "\\u{9b}31m\\x7f\\u{202e}é"),
        ] {
            assert_eq!(escape_text(text), shown);
        }
    }

    #[test]
    fn a_cut_is_shown_and_never_exceeds_the_limit() {
        assert_eq!(escape_line("abcdef", 6), "abcdef");
        assert_eq!(escape_line("abcdefg", 6), "abc…");
        assert_eq!(escape_line("ab\x1bcd", 6), "ab…");
        assert_eq!(escape_line("ééé", 5), "é…");
        assert_eq!(escape_line("abc", 2), "");
        for limit in 0..40 {
            let text = "é\x1b[0m\u{202e}日本\n".repeat(3);
            assert!(escape_line(&text, limit).len() <= limit);
        }
    }

    #[test]
    fn json_keeps_its_value_and_loses_its_tricks() {
        for text in [
            "plain",
            "Grüße 名前",
            "\u{202e}gnp",
            "\u{e0041}\u{9b}\x7f",
            "\x1b[2J\n\t\"\\",
        ] {
            let json = serde_json::to_string(text).unwrap();
            let escaped = escape_json(&json);
            assert!(escape_line(&escaped, 1000) == escaped, "{escaped}");
            assert_eq!(serde_json::from_str::<String>(&escaped).unwrap(), text);
        }
        assert_eq!(escape_json("{\n}\n"), "{\n}\n", "line ends between tokens stay");
    }
}
