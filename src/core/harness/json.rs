//! Reading JSON that somebody else wrote, as little of it as is needed.
//!
//! Here: the wanted members of an object, text cut to a limit while it is decoded, numbers, and
//! values kept as they are. Not here: what any of it means (`codex`). Whole documents are never
//! turned into trees: a line may have 16 MiB, any depth, a key twice (the last counts) and half a
//! surrogate pair, and none of that may cost more than the limits given or end the stream.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::core::escape::json_depth;

/// Values nested deeper than this are kept as text: whoever reads the events gives up at 128.
const MAX_DEPTH: usize = 32;

/// A part of a JSON text, checked and unread.
pub type Raw<'a> = &'a RawValue;

/// The members of the object `json` with these names; `None` if it is no object. Of members with
/// the same name the last counts; members that are null count as absent.
pub fn members<'a, const N: usize>(json: &'a str, wanted: [&str; N]) -> Option<[Option<Raw<'a>>; N]> {
    let mut reader = serde_json::Deserializer::from_str(json);
    let found = Wanted(wanted).deserialize(&mut reader).ok()?;
    reader.end().ok()?;
    Some(found.map(|member| member.filter(|raw| raw.get() != "null")))
}

struct Wanted<'w, const N: usize>([&'w str; N]);

impl<'de, const N: usize> DeserializeSeed<'de> for Wanted<'_, N> {
    type Value = [Option<Raw<'de>>; N];

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, const N: usize> Visitor<'de> for Wanted<'_, N> {
    type Value = [Option<Raw<'de>>; N];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = [None; N];
        while let Some(place) = map.next_key_seed(Place(&self.0))? {
            match place {
                Some(place) => found[place] = Some(map.next_value::<Raw<'de>>()?),
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(found)
    }
}

/// Which of the wanted names a key is.
struct Place<'w>(&'w [&'w str]);

impl<'de> DeserializeSeed<'de> for Place<'_> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Place<'_> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().position(|wanted| *wanted == key))
    }
}

/// Whether this value is an object.
pub fn is_object(raw: Raw<'_>) -> bool {
    raw.get().starts_with('{')
}

/// The beginning of a string, at most about `limit` bytes; `None` if the value is no string.
pub fn head(raw: Raw<'_>, limit: usize) -> Option<String> {
    let inner = inner(raw)?;
    let mut end = inner.len();
    if end > limit {
        // No escape is split: a piece of one would be decoded into something else.
        end = escape_around(inner, floor_boundary(inner, limit));
    }
    let mut text = decode(&inner[..end]);
    if end < inner.len() {
        text.push('…');
    }
    Some(text)
}

/// The end of a string, at most about `limit` bytes; `None` if the value is no string.
pub fn tail(raw: Raw<'_>, limit: usize) -> Option<String> {
    let inner = inner(raw)?;
    if inner.len() <= limit {
        return Some(decode(inner));
    }
    let from = escape_around(inner, floor_boundary(inner, inner.len() - limit));
    Some(format!("…{}", decode(&inner[from..])))
}

/// A short string whole: the names of types, states and ids.
pub fn word(raw: Option<Raw<'_>>) -> Option<Cow<'_, str>> {
    /// Longer names than this are none of ours.
    const MAX_BYTES: usize = 512;
    let inner = inner(raw?)?;
    if inner.len() <= MAX_BYTES && !inner.contains('\\') {
        return Some(Cow::Borrowed(inner));
    }
    head(raw?, MAX_BYTES).map(Cow::Owned)
}

/// A count: what is no number, or below zero, is none.
pub fn count(raw: Option<Raw<'_>>) -> Option<u64> {
    let text = raw?.get();
    if let Ok(whole) = text.parse() {
        return Some(whole);
    }
    // 1e3 is a number too; beyond 64 bits `as` stops at the largest.
    let number: f64 = text.parse().ok()?;
    (number >= 0.0).then_some(number as u64)
}

/// A whole number, as exit codes are.
pub fn number(raw: Option<Raw<'_>>) -> Option<i32> {
    raw?.get().parse().ok()
}

/// A value kept as it is. What is larger than `limit` bytes, too deep or otherwise no tree is kept
/// as its text, cut.
pub fn opaque(raw: Raw<'_>, limit: usize) -> Value {
    opaque_text(raw.get(), limit)
}

/// As [`opaque`], of a text that may be no JSON at all.
pub fn opaque_text(text: &str, limit: usize) -> Value {
    if text.len() <= limit
        && json_depth(text.as_bytes()) <= MAX_DEPTH
        && let Ok(value) = serde_json::from_str(text)
    {
        return value;
    }
    Value::String(cut(text, limit))
}

/// The beginning of a text, at most `limit` bytes and the sign of the cut.
pub fn cut(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_owned();
    }
    format!("{}…", &text[..floor_boundary(text, limit)])
}

fn inner(raw: Raw<'_>) -> Option<&str> {
    raw.get().strip_prefix('"')?.strip_suffix('"')
}

fn floor_boundary(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// `at`, or the place where the escape begins that `at` would split.
fn escape_around(inner: &str, at: usize) -> usize {
    /// `\u202e`.
    const MAX_BYTES: usize = 6;
    let bytes = inner.as_bytes();
    for start in at.saturating_sub(MAX_BYTES - 1)..at {
        if bytes[start] != b'\\' {
            continue;
        }
        let before = bytes[..start]
            .iter()
            .rev()
            .take_while(|byte| **byte == b'\\')
            .count();
        if before % 2 == 1 {
            continue;
        }
        let length = if bytes.get(start + 1) == Some(&b'u') {
            MAX_BYTES
        } else {
            2
        };
        if start + length > at {
            return start;
        }
    }
    at
}

/// The text that the inside of a JSON string stands for. Half a surrogate pair becomes U+FFFD,
/// where serde_json would refuse the whole string.
fn decode(inner: &str) -> String {
    let mut text = String::with_capacity(inner.len());
    let mut rest = inner;
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let Some(letter) = rest.chars().next() else {
            break;
        };
        rest = &rest[letter.len_utf8()..];
        match letter {
            'n' => text.push('\n'),
            't' => text.push('\t'),
            'r' => text.push('\r'),
            'b' => text.push('\u{8}'),
            'f' => text.push('\u{c}'),
            'u' => {
                let (c, used) = unicode(rest);
                text.push(c);
                rest = &rest[used..];
            }
            other => text.push(other),
        }
    }
    text.push_str(rest);
    text
}

/// The character behind `\u`, and how many bytes of `rest` it took.
fn unicode(rest: &str) -> (char, usize) {
    let unit = |at: usize| {
        rest.get(at..at + 4)
            .and_then(|digits| u16::from_str_radix(digits, 16).ok())
    };
    let Some(first) = unit(0) else {
        return (char::REPLACEMENT_CHARACTER, 0);
    };
    if rest[4..].starts_with("\\u")
        && let Some(second) = unit(6)
        && let Some(Ok(c)) = char::decode_utf16([first, second]).next()
        && c.len_utf16() == 2
    {
        return (c, 10);
    }
    (
        char::from_u32(first.into()).unwrap_or(char::REPLACEMENT_CHARACTER),
        4,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Raw<'_> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_last_of_equal_keys_counts_and_null_is_absent() {
        let [id, kind, gone] = members(
            r#"{"id":1,"type":"a","x":[[[]]],"id":2,"gone":3,"gone":null}"#,
            ["id", "type", "gone"],
        )
        .unwrap();
        assert_eq!(id.unwrap().get(), "2");
        assert_eq!(kind.unwrap().get(), "\"a\"");
        assert!(gone.is_none());
        for none in ["", "[]", "{", "{}x", "nonsense", "{\"a\":1,}"] {
            assert!(members(none, ["a"]).is_none(), "{none}");
        }
    }

    #[test]
    fn depth_of_what_nobody_asked_for_is_no_matter() {
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        let line = format!("{{\"x\":{deep},\"type\":\"t\",\"y\":{deep}}}");
        let [kind, deep] = members(&line, ["type", "y"]).unwrap();
        assert_eq!(word(kind).unwrap(), "t");
        assert!(opaque(deep.unwrap(), 1 << 20).is_string());
        assert!(opaque(raw("[[1]]"), 100).is_array());
    }

    #[test]
    fn strings_are_decoded_as_serde_does() {
        for text in [
            r#""""#,
            r#""plain""#,
            r#""a\"b\\c\/d\b\f\n\r\t""#,
            r#""\u00e9\ud83d\ude00 \u2028""#,
        ] {
            let expected: String = serde_json::from_str(text).unwrap();
            assert_eq!(head(raw(text), 100).unwrap(), expected, "{text}");
            assert_eq!(tail(raw(text), 100).unwrap(), expected, "{text}");
        }
        assert_eq!(head(raw(r#""\ud83d!""#), 100).unwrap(), "\u{fffd}!");
        assert_eq!(head(raw(r#""\ude00\ud83dx""#), 100).unwrap(), "\u{fffd}\u{fffd}x");
        assert_eq!(head(raw("12"), 100), None);
    }

    #[test]
    fn no_cut_splits_an_escape_or_a_character() {
        let text = r#""\\\\\u00e9é\n\ud83d\ude00é\\n\"""#;
        let whole: String = serde_json::from_str(text).unwrap();
        for limit in 0..text.len() {
            let head = head(raw(text), limit).unwrap();
            let kept = head.strip_suffix('…').unwrap_or(&head);
            let kept = kept.strip_suffix('\u{fffd}').unwrap_or(kept);
            assert!(whole.starts_with(kept), "{limit}: {kept:?}");
            let tail = tail(raw(text), limit).unwrap();
            let kept = tail.strip_prefix('…').unwrap_or(&tail);
            let kept = kept.strip_prefix('\u{fffd}').unwrap_or(kept);
            assert!(whole.ends_with(kept), "{limit}: {kept:?}");
        }
    }

    #[test]
    fn numbers_of_all_kinds() {
        for (text, expected) in [
            ("12", Some(12)),
            ("1e3", Some(1000)),
            ("-1", None),
            ("\"12\"", None),
            ("99999999999999999999999", Some(u64::MAX)),
        ] {
            assert_eq!(count(Some(raw(text))), expected, "{text}");
        }
        assert_eq!(number(Some(raw("-9"))), Some(-9));
        assert_eq!(number(Some(raw("99999999999"))), None);
    }
}
