//! Topics and the patterns that subscriptions name (docs/PROTOCOL.md).
//!
//! Here: the grammar of both, and matching. Not here: who may read which topic (`core::broker`).

use std::fmt;
use std::str::FromStr;

/// Longest topic, bytes.
pub const MAX_TOPIC_BYTES: usize = 128;

/// The grammar of topics: `[A-Za-z0-9._:/-]{1,128}`.
#[derive(Clone, Copy, Debug)]
pub struct Topic;

impl Topic {
    /// Whether this text is a topic.
    pub fn is_valid(text: &str) -> bool {
        (1..=MAX_TOPIC_BYTES).contains(&text.len()) && text.bytes().all(is_allowed)
    }
}

fn is_allowed(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b':' | b'/' | b'-')
}

/// What a subscription names: a topic, or with a trailing `*` all topics that begin with the text
/// before it. `*` alone matches every topic. Anywhere else a `*` stands alone between slashes, for
/// exactly one segment that isn't empty: `sensor/*/state`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pattern(String);

/// A text that is neither a topic nor a pattern. Keeps it for the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadPattern(pub String);

impl Pattern {
    /// As it is written, with its `*`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it ends in `*`.
    pub fn is_prefix(&self) -> bool {
        self.0.ends_with('*')
    }

    /// The topic, or the prefix that topics must begin with.
    pub fn stem(&self) -> &str {
        self.0.strip_suffix('*').unwrap_or(&self.0)
    }

    /// Whether a `*` stands for a segment in it.
    pub fn has_inner_wildcard(&self) -> bool {
        self.stem().contains('*')
    }

    /// Whether the pattern matches this topic.
    pub fn matches(&self, topic: &str) -> bool {
        match (self.has_inner_wildcard(), self.is_prefix()) {
            (false, false) => topic == self.0,
            (false, true) => topic.starts_with(self.stem()),
            (true, is_prefix) => fits(self.stem(), topic, is_prefix),
        }
    }
}

/// Whether a topic fits a stem in which `*` stands for segments.
fn fits(stem: &str, topic: &str, is_prefix: bool) -> bool {
    let (mut stem, mut topic) = (stem, topic);
    loop {
        let Some((part, stem_rest)) = stem.split_once('/') else {
            // The last part isn't a wildcard segment: a `*` at the end matches any rest.
            return match is_prefix {
                true => topic.starts_with(stem),
                false => topic == stem,
            };
        };
        let Some((segment, topic_rest)) = topic.split_once('/') else {
            return false;
        };
        if segment != part && (part != "*" || segment.is_empty()) {
            return false;
        }
        (stem, topic) = (stem_rest, topic_rest);
    }
}

impl FromStr for Pattern {
    type Err = BadPattern;

    fn from_str(text: &str) -> Result<Pattern, BadPattern> {
        let stem = text.strip_suffix('*').unwrap_or(text);
        let is_hole = |part: &str| part == "*";
        let is_plain = |part: &str| part.bytes().all(is_allowed);
        let good = match (stem.is_empty(), stem.rsplit_once('/')) {
            (true, _) => text == "*",
            // The text before a `*` at the end is the beginning of a segment, never a wildcard
            // segment.
            (false, Some((parts, last))) => {
                parts.split('/').all(|part| is_hole(part) || is_plain(part)) && is_plain(last)
            }
            (false, None) => is_plain(stem),
        };
        let good = good && stem.len() <= MAX_TOPIC_BYTES;
        if good {
            Ok(Pattern(text.to_owned()))
        } else {
            Err(BadPattern(text.to_owned()))
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_and_patterns() {
        let long = "t".repeat(128);
        for good in ["broadcast", "vm:web-0", "a/b.c_d-e:f", "0", long.as_str()] {
            assert!(Topic::is_valid(good) && good.parse::<Pattern>().is_ok(), "{good}");
        }
        let longer = format!("{long}t");
        for bad in [
            "",
            " ",
            "a b",
            "a\n",
            "\u{1b}[31m",
            "é",
            "a*b",
            "a**",
            "**",
            "a/**",
            "a*/b",
            "a/*b/c",
            "*a/b",
            "a/**/b",
            longer.as_str(),
        ] {
            assert!(!Topic::is_valid(bad) && bad.parse::<Pattern>().is_err(), "{bad}");
        }
        assert!(!Topic::is_valid("a*"));
        let pattern = |text: &str| text.parse::<Pattern>().unwrap();
        for (text, topic, expected) in [
            ("a/b", "a/b", true),
            ("a/b", "a/b/c", false),
            ("a/*", "a/b/c", true),
            ("a/*", "a/", true),
            ("a/*", "a", false),
            ("*", "x", true),
            ("vm:*", "vm:db", true),
            ("a/*/c", "a/b/c", true),
            ("a/*/c", "a/b/d/c", false),
            ("a/*/c", "a//c", false),
            ("a/*/c", "a/b/c/d", false),
            ("a/*/c", "a/c", false),
            ("*/c", "b/c", true),
            ("*/c", "/c", false),
            ("*/*/c", "a/b/c", true),
            ("a/*/c*", "a/b/cd/e", true),
            ("a/*/c*", "a/b/d", false),
            ("a/*/*", "a/b/c/d", true),
            ("a/*/*", "a/b", false),
            ("*/*", "a/b/c", true),
            ("a/*/", "a/b/", true),
        ] {
            assert_eq!(pattern(text).matches(topic), expected, "{text} {topic}");
        }
        assert!(
            pattern("a/*/c").has_inner_wildcard()
                && !pattern("a/*").has_inner_wildcard()
                && !pattern("*").has_inner_wildcard()
        );
        assert_eq!((pattern("a/*").stem(), pattern("a").stem()), ("a/", "a"));
    }
}
