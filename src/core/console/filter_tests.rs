use super::*;

fn filtered(input: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    TerminalFilter::new().feed(input, &mut out);
    out
}

#[track_caller]
fn check(input: &str, output: &str) {
    let out = filtered(input.as_bytes());
    assert_eq!(String::from_utf8_lossy(&out), output, "{input:?}");
}

#[test]
fn what_a_console_needs_is_let_through() {
    for text in [
        "plain text\r\n\ttab\x08\x07",
        "Grüße, 名前, 👩‍💻",
        "\x1b[1;31mred\x1b[0m \x1b[38;5;200mpink\x1b[38:2::1:2:3m",
        "\x1b[H\x1b[2J\x1b[K\x1b[10;20H\x1b[A\x1b[2B\x1b[3C\x1b[4D\x1b[5G\x1b[6d\x1b[f\x1b[r\x1b[1;24r",
        "\x1b7\x1b8\x1b[s\x1b[u\x1bM\x1bD\x1bE\x1bH\x1b=\x1b>",
        "\x1b(0lqqk\x1b(B \x0elqqk\x0f",
        "\x1b[?25l\x1b[?25h\x1b[?1049h\x1b[?1049l\x1b[?1h\x1b[?7l\x1b[?2004h",
        "\x1b[4h\x1b[4l\x1b[2 q\x1b[3S\x1b[3T\x1b[2@\x1b[2P\x1b[2X\x1b[2L\x1b[2M",
    ] {
        check(text, text);
    }
}

#[test]
fn what_acts_on_anything_but_the_picture_is_left_out() {
    for (text, left) in [
        // Titles, clipboard, palette, links.
        ("a\x1b]0;owned\x07b", "ab"),
        ("a\x1b]52;c;ZWNobyBoaQ==\x1b\\b", "ab"),
        ("a\x1b]8;;http://x\x1b\\b", "ab"),
        // Programs and data for the terminal.
        ("a\x1bP$q\"p\x1b\\b", "ab"),
        (
            "a\x1bPq#0;2;0;0;0~\x1b\\b\x1b_Ga=q\x1b\\c\x1b^x\x1b\\d\x1bXx\x1b\\e",
            "abcde",
        ),
        // Whatever is answered: the answer would be typed.
        (
            "a\x1b[c\x1b[>c\x1b[=c\x1b[0c\x1b[5n\x1b[6n\x1b[?6n\x1b[x\x1bZ\x05b",
            "ab",
        ),
        (
            "a\x1b[?1$p\x1b[?u\x1b[>q\x1b[>0q\x1b[18t\x1b[21t\x1b[?996n\x1b+q\x1b[?4mb",
            "ab",
        ),
        // Windows, printer, scrollback, wide columns, tests, keyboard.
        (
            "a\x1b[3;0;0t\x1b[5i\x1b[?5i\x1b[3J\x1b[?3h\x1b[2y\x1b[>4;2m\x1b[?2026h\x1b#8b",
            "ab",
        ),
        // Mouse tracking that locks a terminal up; far too many repeats.
        (
            "a\x1b[1;2;3;4;5T\x1b[99999999b\x1b[99999999C\x1b[1;2s\x1b[20hb",
            "ab",
        ),
        // The same begun by one character.
        ("a\u{9b}31mb\u{9d}0;x\u{9c}c\u{90}d", "a31mb0;xcd"),
        // Control characters; text that isn't what it seems.
        ("a\x00\x7f\x01b", "ab"),
        ("\u{202e}gnp\u{200b}", "\u{fffd}gnp\u{fffd}"),
    ] {
        check(text, left);
    }
    // Modes are judged one by one.
    check("\x1b[?3;25;1049h", "\x1b[?25h\x1b[?1049h");
    assert_eq!(filtered(b"a\x9b31m\xffb"), "a\u{fffd}31m\u{fffd}b".as_bytes());
    assert_eq!(
        filtered(b"\xc3(\xe2\x82(\xed\xa0\x80"),
        "\u{fffd}(\u{fffd}(\u{fffd}".as_bytes()
    );
}

#[test]
fn nothing_silences_the_console_for_good() {
    // A string without end costs a line, or 4 KiB.
    check("\x1b]0;never ended\r\nlogin: ", "\nlogin: ");
    let endless = format!("\x1bP{}tail", "x".repeat(MAX_STRING_BYTES));
    check(&endless, "tail");
    // A sequence within a string, or within another.
    check("\x1b]0;x\x1b[31mred", "\x1b[31mred");
    check("\x1b[12\x1b[31mred", "\x1b[31mred");
    check("\x1b[1\r\n2", "\r\n2");
    let long = format!("a\x1b[{}mb", "1;".repeat(100));
    check(&long, "ab");
    check("a\x1b\x1b\x1b[mb", "a\x1b[mb");
}

#[test]
fn the_terminal_is_brought_back_to_rest() {
    let undo = |text: &str| {
        let mut filter = TerminalFilter::new();
        filter.feed(text.as_bytes(), &mut Vec::new());
        String::from_utf8(filter.undo()).unwrap_or_default()
    };
    assert_eq!(undo("plain text\r\n"), "");
    assert_eq!(undo("\x1b[?25l\x1b[?1049h\x1b[?25h"), "\x1b[?1049l");
    assert_eq!(undo("\x1b[?25l\x1b[?7l"), "\x1b[?7h\x1b[?25h");
    let colours = undo("\x1b[31m");
    assert!(
        colours.contains("\x1b[0m") && colours.contains("\x1b(B"),
        "{colours:?}"
    );
    // What undoes is itself let through, so a console within a console works.
    let all = undo("\x1b[31m\x1b[?1049h\x1b[?25l\x1b[?1000h\x1b[?2004h");
    assert_eq!(filtered(all.as_bytes()), all.as_bytes());
}

#[test]
fn no_reset_and_no_erasure_reaches_the_scrollback() {
    let rest = "\x1b[4l\x1b7\x1b[r\x1b8\x1b[0m\x1b(B\x0f\x1b>";
    let screen = "\x1b[H\x1b[2J";
    // Full and soft reset: what was let through is undone, and the screen cleared.
    check("a\x1bcb", &format!("a{rest}{screen}b"));
    check("a\x1b[!pb", &format!("a{rest}b"));
    check("a\x1b[1!pb", &format!("a{rest}b"));
    check(
        "\x1b[?1049h\x1b[?25l\x1bcb",
        &format!("\x1b[?1049h\x1b[?25l\x1b[?25h\x1b[?1049l{rest}{screen}b"),
    );
    // Erasures that aren't of the screen: the scrollback in all its spellings, and what is like it elsewhere.
    for erasure in [
        "3J", "03J", "0;3J", "3;J", "3:J", ";3J", "?3J", "22J", "4J", "+J", "!J", "61\"p", "0$p",
    ] {
        check(&format!("a\x1b[{erasure}b"), "ab");
        // The same begun by one character, which is a control character of the second set.
        assert!(!filtered(format!("\u{9b}{erasure}").as_bytes()).contains(&0x1b));
    }
    // A reset has no such form; what looks like one is text.
    check("a\u{9b}!pb", "a!pb");
}

/// A generator of hostile streams: mostly sequences and pieces of them.
struct Hostile(u64);

impl Hostile {
    fn next(&mut self, below: usize) -> usize {
        // xorshift64*: deterministic, and good enough to stir.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below
    }

    fn stream(&mut self) -> Vec<u8> {
        const PIECES: [&[u8]; 27] = [
            b"\x1b",
            b"\x1b[",
            b"\x1b]",
            b"\x1bP",
            b"\x1b_",
            b"\x1b\\",
            b"?",
            b">",
            b";",
            b":",
            b"25",
            b"1049",
            b"52;c;",
            b"h",
            b"n",
            b"m",
            b"c",
            b"\x07",
            b"\r\n",
            b"!p",
            b"3J",
            b"\x1bc",
            b"\xc2\x9b",
            b"\xe2\x80\xae",
            b"\xf0\x9f",
            b"\x9b",
            b" ",
        ];
        let mut stream = Vec::new();
        for _ in 0..self.next(60) {
            match self.next(4) {
                0 => stream.push(self.next(256) as u8),
                _ => stream.extend_from_slice(PIECES[self.next(PIECES.len())]),
            }
        }
        stream
    }
}

/// A second, simpler reader of what was let through: names the first thing that shouldn't be in it.
fn fault(text: &str) -> Option<String> {
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match c {
            '\x1b' => {}
            '\r' | '\n' | '\t' | '\x08' | '\x07' | '\x0e' | '\x0f' => continue,
            c if c.is_control() => return Some(format!("{c:?}")),
            _ => continue,
        }
        match rest.next() {
            Some('[') => {
                let mut sequence = String::new();
                let end = rest.by_ref().find(|c| {
                    sequence.push(*c);
                    ('@'..='~').contains(c)
                });
                match end {
                    Some('c' | 'n' | 't' | 'x' | 'i' | 'y' | 'b' | 'p') | None => return Some(sequence),
                    Some('J') if !["J", "0J", "1J", "2J"].contains(&sequence.as_str()) => {
                        return Some(sequence);
                    }
                    _ if sequence.starts_with(['>', '=', '<']) || sequence.contains('$') => {
                        return Some(sequence);
                    }
                    _ => {}
                }
            }
            Some('(' | ')') => drop(rest.next()),
            Some('7' | '8' | 'D' | 'E' | 'H' | 'M' | '=' | '>') => {}
            other => return Some(format!("ESC {other:?}")),
        }
    }
    None
}

#[test]
fn any_stream_in_any_pieces_comes_out_harmless_and_the_same() {
    for seed in 1..=20_000_u64 {
        let mut hostile = Hostile(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let stream = hostile.stream();
        let whole = filtered(&stream);
        let mut pieces = Vec::new();
        let mut filter = TerminalFilter::new();
        let mut rest = &stream[..];
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(1 + hostile.next(rest.len()));
            filter.feed(piece, &mut pieces);
            rest = after;
        }
        assert_eq!(whole, pieces, "seed {seed}: {stream:?}");
        let text =
            String::from_utf8(whole).unwrap_or_else(|error| panic!("seed {seed}: {error}: {stream:?}"));
        assert_eq!(fault(&text), None, "seed {seed}: {stream:?} became {text:?}");
        assert_eq!(
            filtered(text.as_bytes()),
            text.as_bytes(),
            "seed {seed}: not the same twice"
        );
        let undo = String::from_utf8(filter.undo()).unwrap_or_default();
        assert_eq!(fault(&undo), None, "seed {seed}");
    }
}
