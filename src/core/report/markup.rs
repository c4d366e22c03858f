//! Text into markup that no text can leave.
//!
//! Here: the one function by which anything gets into a page, and a small writer of elements that is
//! well-formed by construction, as XML too. Not here: what a page holds (`super::html`).

use crate::core::escape::escape_line;

/// A text as markup has it, inside of elements and of quoted attributes alike. What would move a
/// reader's eye or is no character of XML (controls, marks of direction) is written out.
pub(super) fn escape(text: &str) -> String {
    // Everything shown was cut before; what castra itself says is short.
    let plain = escape_line(text, usize::MAX);
    let mut markup = String::with_capacity(plain.len() + 8);
    for c in plain.chars() {
        match c {
            '&' => markup.push_str("&amp;"),
            '<' => markup.push_str("&lt;"),
            '>' => markup.push_str("&gt;"),
            '"' => markup.push_str("&quot;"),
            '\'' => markup.push_str("&#39;"),
            // Not in XML 1.0.
            '\u{fffe}' | '\u{ffff}' => markup.push('\u{fffd}'),
            c => markup.push(c),
        }
    }
    markup
}

/// A page being written.
#[derive(Debug, Default)]
pub(super) struct Markup {
    text: String,
    open: Vec<&'static str>,
}

impl Markup {
    /// Markup of ours: no text of others may be in it.
    pub(super) fn raw(&mut self, markup: &str) -> &mut Markup {
        self.text.push_str(markup);
        self
    }

    /// Opens an element; attributes are escaped.
    pub(super) fn open(&mut self, name: &'static str, attributes: &[(&str, &str)]) -> &mut Markup {
        self.tag(name, attributes);
        self.text.push('>');
        self.open.push(name);
        self
    }

    /// Closes the element that was opened last.
    pub(super) fn close(&mut self) -> &mut Markup {
        if let Some(name) = self.open.pop() {
            self.text.push_str("</");
            self.text.push_str(name);
            self.text.push('>');
        }
        self
    }

    /// An element that holds nothing.
    pub(super) fn empty(&mut self, name: &'static str, attributes: &[(&str, &str)]) -> &mut Markup {
        self.tag(name, attributes);
        self.text.push_str("/>");
        self
    }

    /// Escaped text.
    pub(super) fn text(&mut self, text: &str) -> &mut Markup {
        self.text.push_str(&escape(text));
        self
    }

    /// An element with text in it.
    pub(super) fn leaf(
        &mut self,
        name: &'static str,
        attributes: &[(&str, &str)],
        text: &str,
    ) -> &mut Markup {
        self.open(name, attributes).text(text).close()
    }

    /// A line end, so that the page can be read as a file.
    pub(super) fn line(&mut self) -> &mut Markup {
        self.text.push('\n');
        self
    }

    /// All of it; what is open is closed.
    pub(super) fn finish(mut self) -> String {
        while !self.open.is_empty() {
            self.close();
        }
        self.text
    }

    fn tag(&mut self, name: &str, attributes: &[(&str, &str)]) {
        self.text.push('<');
        self.text.push_str(name);
        for (name, value) in attributes {
            self.text.push(' ');
            self.text.push_str(name);
            self.text.push_str("=\"");
            self.text.push_str(&escape(value));
            self.text.push('"');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_gets_out() {
        for (text, markup) in [
            ("plain Grüße 名前", "plain Grüße 名前"),
            (
                "<script>alert(1)</script>",
                "&lt;script&gt;alert(1)&lt;/script&gt;",
            ),
            ("\" onload='x'", "&quot; onload=&#39;x&#39;"),
            ("a & b &lt;", "a &amp; b &amp;lt;"),
            ("]]> --> <!--", "]]&gt; --&gt; &lt;!--"),
            ("\u{1b}[2J\u{0}\r\n", "\\x1b[2J\\x00\\r\\n"),
            ("\u{202e}gnp.exe\u{2066}", "\\u{202e}gnp.exe\\u{2066}"),
            ("\u{ffff}", "\u{fffd}"),
        ] {
            assert_eq!(escape(text), markup);
        }
        assert_eq!(escape(&String::from_utf8_lossy(b"a\xff<b")), "a\u{fffd}&lt;b");
    }

    #[test]
    fn what_is_written_is_well_formed() {
        let mut page = Markup::default();
        page.open("p", &[("title", "\"><script>")])
            .text("a<b")
            .empty("br", &[]);
        page.open("b", &[]).leaf("i", &[], "&");
        assert_eq!(
            page.finish(),
            "<p title=\"&quot;&gt;&lt;script&gt;\">a&lt;b<br/><b><i>&amp;</i></b></p>"
        );
    }
}
