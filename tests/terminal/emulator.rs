//! A terminal, as far as castra uses one: rows that wrap, scroll, and reflow when the window changes.
//!
//! Here: CR, LF, TAB, `CSI n A`, `CSI J`, `CSI K`, colours. Anything else is a failure: castra has no
//! business with it. Not here: the pseudo-terminal (`window`).

/// One row of the screen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Row {
    text: Vec<char>,
    /// It goes on in the next row.
    wraps: bool,
}

/// What a person would see.
#[derive(Debug)]
pub struct Terminal {
    rows: usize,
    columns: usize,
    /// Scrolled off first; the last `rows` of it are on the screen.
    lines: Vec<Row>,
    row: usize,
    column: usize,
    /// The beginning of a sequence whose end hasn't come yet.
    pending: Vec<u8>,
    /// Whether anything was painted.
    pub colours: bool,
    /// Whether the cursor was ever moved up.
    pub redraws: bool,
}

impl Terminal {
    pub fn new(rows: usize, columns: usize) -> Terminal {
        Terminal {
            rows,
            columns,
            lines: vec![Row::default()],
            row: 0,
            column: 0,
            pending: Vec::new(),
            colours: false,
            redraws: false,
        }
    }

    /// Everything ever shown that wasn't overwritten, a line as it was written.
    pub fn text(&self) -> Vec<String> {
        let mut lines = vec![String::new()];
        for row in &self.lines {
            let line = lines.last_mut().unwrap();
            line.extend(&row.text);
            if !row.wraps {
                lines.push(String::new());
            }
        }
        lines.pop();
        lines.iter().map(|line| line.trim_end().to_owned()).collect()
    }

    /// The rows on the screen.
    pub fn screen(&self) -> Vec<String> {
        let rows = &self.lines[self.top()..];
        let text = |row: &Row| row.text.iter().collect::<String>().trim_end().to_owned();
        rows.iter().map(text).collect()
    }

    /// Whether whatever is written next begins a row.
    pub fn is_at_line_start(&self) -> bool {
        self.column == 0 && self.lines[self.row].text.is_empty()
    }

    /// The window has another size: lines wrap anew, as in most terminals of today.
    pub fn resize(&mut self, rows: usize, columns: usize) {
        while self.lines.len() > self.row + 1 && self.lines.last() == Some(&Row::default()) {
            self.lines.pop();
        }
        let mut lines = Vec::new();
        let mut whole: Vec<char> = Vec::new();
        let mut cursor = None;
        for (index, row) in self.lines.iter().enumerate() {
            if index == self.row {
                cursor = Some(whole.len() + self.column);
            }
            whole.extend(&row.text);
            if row.wraps {
                continue;
            }
            let first = lines.len();
            let mut chunks = whole.chunks(columns).peekable();
            while let Some(chunk) = chunks.next() {
                lines.push(Row {
                    text: chunk.to_vec(),
                    wraps: chunks.peek().is_some(),
                });
            }
            if lines.len() == first {
                lines.push(Row::default());
            }
            if let Some(offset) = cursor.take() {
                self.row = (first + offset / columns).min(lines.len() - 1);
                self.column = offset % columns;
            }
            whole.clear();
        }
        self.lines = lines;
        (self.rows, self.columns) = (rows, columns);
    }

    /// Takes in what was written.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.pending.extend(bytes);
        let pending = std::mem::take(&mut self.pending);
        let mut rest = pending.as_slice();
        while let Some((first, after)) = rest.split_first() {
            match first {
                0x1b => match sequence(rest) {
                    Some((numbers, letter, after)) => {
                        self.obey(&numbers, letter);
                        rest = after;
                    }
                    None => break,
                },
                b'\r' => {
                    self.column = 0;
                    rest = after;
                }
                b'\n' => {
                    self.down(false);
                    rest = after;
                }
                _ => {
                    let length = match first {
                        0x00..=0x7f => 1,
                        0xc0..=0xdf => 2,
                        0xe0..=0xef => 3,
                        _ => 4,
                    };
                    let Some(bytes) = rest.get(..length) else { break };
                    let text = std::str::from_utf8(bytes).unwrap();
                    self.put(text.chars().next().unwrap());
                    rest = &rest[length..];
                }
            }
        }
        self.pending = rest.to_vec();
    }

    fn top(&self) -> usize {
        self.lines.len().saturating_sub(self.rows)
    }

    fn put(&mut self, c: char) {
        assert!(!c.is_control(), "a control character: {c:?}");
        if self.column == self.columns {
            self.lines[self.row].wraps = true;
            self.down(true);
            self.column = 0;
        }
        let row = &mut self.lines[self.row].text;
        while row.len() <= self.column {
            row.push(' ');
        }
        row[self.column] = c;
        self.column += 1;
    }

    fn down(&mut self, wraps: bool) {
        self.lines[self.row].wraps = wraps;
        self.row += 1;
        if self.row == self.lines.len() {
            self.lines.push(Row::default());
        }
    }

    fn obey(&mut self, numbers: &str, letter: u8) {
        match (numbers, letter) {
            (_, b'm') => self.colours = true,
            (count, b'A') => {
                let count: usize = count.parse().unwrap();
                self.row = self.row.saturating_sub(count).max(self.top());
                self.redraws = true;
            }
            ("", b'K') => {
                self.lines[self.row].text.truncate(self.column);
                self.lines[self.row].wraps = false;
            }
            ("", b'J') => {
                self.lines[self.row].text.truncate(self.column);
                self.lines[self.row].wraps = false;
                // They stay where they are, blank: nothing scrolls back.
                self.lines[self.row + 1..].fill(Row::default());
            }
            _ => panic!("ESC [ {numbers} {}", char::from(letter)),
        }
    }
}

/// `ESC [ numbers letter`, if it is all there.
fn sequence(bytes: &[u8]) -> Option<(String, u8, &[u8])> {
    let body = bytes.get(1..)?;
    let (bracket, body) = body.split_first()?;
    assert_eq!(*bracket, b'[', "a sequence castra doesn't use");
    let end = body.iter().position(|byte| (b'@'..=b'~').contains(byte))?;
    let numbers = String::from_utf8(body[..end].to_vec()).unwrap();
    Some((numbers, body[end], &body[end + 1..]))
}
