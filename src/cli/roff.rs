//! Roff with the `man` macros: text as it stands, and the Markdown that docs/ is written in.
//!
//! Here: what docs/ uses of Markdown, and no more: headings, paragraphs, lists of one level, fenced
//! blocks, tables, emphasis, links. Not here: which pages there are (`manpage`, `guides`).

use std::fmt::Write;

/// Text that roff prints as it stands: backslashes, hyphens that are to be typed, dots and quotes
/// that would begin a request, characters that older roffs don't know.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (number, line) in text.lines().enumerate() {
        if number > 0 {
            out.push('\n');
        }
        if line.starts_with(['.', '\'']) {
            out.push_str("\\&");
        }
        line.chars().for_each(|letter| push_escaped(&mut out, letter));
    }
    out
}

fn push_escaped(out: &mut String, letter: char) {
    match letter {
        '\\' => out.push_str("\\e"),
        '-' => out.push_str("\\-"),
        '`' => out.push_str("\\(ga"),
        '\'' => out.push_str("\\(aq"),
        '~' => out.push_str("\\(ti"),
        '…' => out.push_str("..."),
        other if other.is_ascii() => out.push(other),
        other => {
            let _ = write!(out, "\\[u{:04X}]", u32::from(other));
        }
    }
}

/// The body of a page in Markdown; its title is left out. `link` names the page of a file that is
/// linked to, where it has one.
pub fn of_markdown(text: &str, link: &dyn Fn(&str) -> Option<String>) -> String {
    let inline = |text: &str| inline(text, link);
    let mut out = String::new();
    let mut lines = text.lines().peekable();
    // Whether a line of text goes on with what stands before it.
    let mut in_block = false;
    while let Some(line) = lines.next() {
        let text = line.trim_start();
        if let Some(heading) = text.strip_prefix("### ") {
            let _ = writeln!(out, ".SS {}", argument(&inline(heading)));
        } else if let Some(heading) = text.strip_prefix("## ") {
            let _ = writeln!(out, ".SH {}", argument(&inline(heading)));
        } else if text.starts_with("```") {
            out.push_str(".PP\n.RS 4\n.nf\n");
            for line in lines
                .by_ref()
                .take_while(|line| !line.trim_start().starts_with("```"))
            {
                let _ = writeln!(out, "{}", escape(line));
            }
            out.push_str(".fi\n.RE\n");
        } else if text.starts_with('|') {
            let head = cells(text);
            while let Some(row) = lines.next_if(|line| line.trim_start().starts_with('|')) {
                row_text(&mut out, &head, &cells(row.trim_start()), &inline);
            }
        } else if !text.is_empty() && !text.starts_with("# ") {
            let item = item(text);
            match item {
                Some((mark, _)) => {
                    let _ = writeln!(out, ".IP {mark} 4");
                }
                None if !in_block => out.push_str(".PP\n"),
                None => {}
            }
            // A paragraph is one line, because its emphasis may go over several.
            let mut paragraph = item.map_or(text, |(_, rest)| rest).to_owned();
            while let Some(more) = lines.next_if(|line| goes_on(line)) {
                paragraph.push(' ');
                paragraph.push_str(more.trim());
            }
            let _ = writeln!(out, "{}", inline(&paragraph));
            in_block = true;
            continue;
        }
        in_block = false;
    }
    out
}

/// Text as an argument of a macro, where a quote would hold words together.
fn argument(text: &str) -> String {
    text.replace('"', "\\(dq")
}

/// Whether a line belongs to the paragraph or item before it.
fn goes_on(line: &str) -> bool {
    let text = line.trim_start();
    !(text.is_empty() || text.starts_with(['#', '|']) || text.starts_with("```") || item(text).is_some())
}

/// The mark of a list's item, and its text.
fn item(text: &str) -> Option<(&str, &str)> {
    if let Some(rest) = text.strip_prefix("- ").or_else(|| text.strip_prefix("* ")) {
        return Some(("\\(bu", rest));
    }
    let (number, rest) = text.split_once(". ")?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then_some((number, rest))
}

/// The cells of a table's row.
fn cells(row: &str) -> Vec<String> {
    let row = row.trim().trim_start_matches('|');
    let row = row.strip_suffix('|').unwrap_or(row);
    let mut cells = vec![String::new()];
    let mut letters = row.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' if letters.peek() == Some(&'|') => {
                cells.last_mut().expect("one at least").extend(letters.next())
            }
            '|' => cells.push(String::new()),
            other => cells.last_mut().expect("one at least").push(other),
        }
    }
    cells.iter().map(|cell| cell.trim().to_owned()).collect()
}

/// A row as a paragraph under its first cell: a terminal is too narrow for tables of sentences.
fn row_text(out: &mut String, head: &[String], row: &[String], inline: &dyn Fn(&str) -> String) {
    if row
        .iter()
        .all(|cell| cell.chars().all(|letter| matches!(letter, '-' | ':')))
    {
        return;
    }
    let Some(((first, between), last)) = row
        .split_first()
        .and_then(|(first, rest)| Some(((first, rest.split_last()?.1), rest.last()?)))
    else {
        return;
    };
    let _ = write!(out, ".TP\n{}\n", inline(first));
    let between: Vec<String> = between
        .iter()
        .zip(head.iter().skip(1))
        .filter(|(cell, _)| !cell.is_empty())
        .map(|(cell, name)| inline(&format!("{name}: {cell}")))
        .collect();
    if !between.is_empty() {
        let _ = writeln!(out, "{}", between.join("; "));
    }
    if !between.is_empty() && !last.is_empty() {
        out.push_str(".br\n");
    }
    if !last.is_empty() {
        let _ = writeln!(out, "{}", inline(last));
    }
}

/// Emphasis and links within a line.
fn inline(text: &str, link: &dyn Fn(&str) -> Option<String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    let mut bold = false;
    while let Some(letter) = rest.chars().next() {
        let after = &rest[letter.len_utf8()..];
        if let Some(code) = letter.eq(&'`').then(|| after.split_once('`')).flatten() {
            let _ = write!(out, "\\fB{}\\fR", escape(code.0));
            rest = code.1;
            out.push_str(if bold { "\\fB" } else { "" });
        } else if let Some(after) = rest.strip_prefix("**") {
            bold = !bold;
            out.push_str(if bold { "\\fB" } else { "\\fR" });
            rest = after;
        } else if let Some((word, after)) = letter.eq(&'*').then(|| emphasised(after)).flatten() {
            let _ = write!(out, "\\fI{}\\fR", escape(word));
            rest = after;
        } else if let Some((words, target, after)) = letter.eq(&'[').then(|| linked(after)).flatten() {
            match link(target.split('#').next().unwrap_or_default()) {
                Some(page) => out.push_str(&escape(&page)),
                None => out.push_str(&inline(words, link)),
            }
            if target.contains("://") {
                let _ = write!(out, " ({})", escape(target));
            }
            rest = after;
        } else {
            push_escaped(&mut out, letter);
            rest = after;
        }
    }
    if out.starts_with(['.', '\'']) {
        out.insert_str(0, "\\&");
    }
    out
}

/// The words up to the closing asterisk, where these are emphasised.
fn emphasised(after: &str) -> Option<(&str, &str)> {
    let (words, rest) = after.split_once('*')?;
    (!words.is_empty() && words.trim() == words && !words.contains('`')).then_some((words, rest))
}

/// The words of a link, where it leads, and what follows.
fn linked(after: &str) -> Option<(&str, &str, &str)> {
    let (words, rest) = after.split_once("](")?;
    let (target, rest) = rest.split_once(')')?;
    (!words.contains(['[', ']'])).then_some((words, target, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_becomes_man_macros() {
        let link = |file: &str| (file == "IMAGES.md").then(|| "castra-images(7)".to_owned());
        let cases = [
            (
                "# Title\n\nOne `--flag`\ntwo.\n\nThree.\n",
                ".PP\nOne \\fB\\-\\-flag\\fR two.\n.PP\nThree.\n",
            ),
            ("## `[[vms]]`\n### Deeper\n", ".SH \\fB[[vms]]\\fR\n.SS Deeper\n"),
            (
                "- **one\n  and** a half\n- two\n\nafter\n",
                ".IP \\(bu 4\n\\fBone and\\fR a half\n.IP \\(bu 4\ntwo\n.PP\nafter\n",
            ),
            ("1. first\n2. second\n", ".IP 1 4\nfirst\n.IP 2 4\nsecond\n"),
            (
                "```sh\n.dot \\n\n\n'x'\n```\n",
                ".PP\n.RS 4\n.nf\n\\&.dot \\en\n\n\\&\\(aqx\\(aq\n.fi\n.RE\n",
            ),
            (
                "| key | type | default | meaning |\n| --- | --- | --- | --- |\n| `port` | a\\|b | | the *port* |\n",
                ".TP\n\\fBport\\fR\ntype: a|b\n.br\nthe \\fIport\\fR\n",
            ),
            (
                "| x | y |\n|---|---|\n| `'a'` | |\n",
                ".TP\n\\fB\\&\\(aqa\\(aq\\fR\n",
            ),
            (
                "[here](IMAGES.md#x), [TOML](https://toml.io), [other](OTHER.md), a[0] and 2 * 3\n",
                ".PP\ncastra\\-images(7), TOML (https://toml.io), other, a[0] and 2 * 3\n",
            ),
            (
                ".dot\n'quote\n→ \"\n## \"q\"\n",
                ".PP\n\\&.dot \\(aqquote \\[u2192] \"\n.SH \\(dqq\\(dq\n",
            ),
        ];
        for (markdown, roff) in cases {
            assert_eq!(of_markdown(markdown, &link), roff, "{markdown}");
        }
    }
}
