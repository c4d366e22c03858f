//! A page as readers that aren't ours see it.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use crate::support::Castra;

/// The page that `castra report --html` writes, after Python's readers of XML and of HTML have seen it.
pub fn page(castra: &Castra, args: &[&str]) -> String {
    let mut all = vec!["report", "--html", "report.html"];
    all.extend(args);
    castra.run(&all).exits(0);
    let page = fs::read_to_string(castra.project().join("report.html")).unwrap();
    check(&page);
    page
}

/// Well-formed, and nothing on it that could load or run anything.
pub fn check(page: &str) {
    let script = r##"
import sys, html.parser, xml.etree.ElementTree as tree
text = sys.stdin.buffer.read().decode("utf-8")
root = tree.fromstring(text)
ids, names = [], set()
for element in root.iter():
    names.add(element.tag.split("}")[-1])
    for key, value in element.attrib.items():
        assert not key.lower().startswith("on") and key not in ("src", "action", "formaction"), key
        assert "javascript:" not in value.lower(), value
        if key == "href": assert value.startswith("#"), value
        if key == "id": ids.append(value)
assert len(ids) == len(set(ids)), "ids twice"
allowed = set("html head meta title style body svg defs pattern rect path main header div p h1 h2 h3 dl dt dd nav "
    "table thead tbody tr th td a span section code ul li b details summary pre footer g text desc circle".split())
assert names <= allowed, names - allowed
for element in root.iter():
    for key in ("aria-labelledby",):
        if key in element.attrib: assert element.attrib[key] in ids, element.attrib[key]
    if element.attrib.get("href"): assert element.attrib["href"][1:] in ids
class Reader(html.parser.HTMLParser):
    open = []
    def handle_starttag(self, tag, attributes):
        if tag not in ("meta",): self.open.append(tag)
    def handle_startendtag(self, tag, attributes): pass
    def handle_endtag(self, tag): assert self.open.pop() == tag, tag
reader = Reader()
reader.feed(text)
reader.close()
assert reader.open == [], reader.open
for letter in text:
    code = ord(letter)
    assert code >= 32 or letter in "\t\n", hex(code)
    assert not (0x202a <= code <= 0x202e or 0x2066 <= code <= 0x2069 or 0x7f <= code < 0xa0), hex(code)
"##;
    let mut python = Command::new("python3")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    python.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let ended = python.wait_with_output().unwrap();
    assert!(
        ended.status.success(),
        "{}\n{page}",
        String::from_utf8_lossy(&ended.stderr)
    );
}
