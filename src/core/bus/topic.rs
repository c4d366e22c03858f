//! Topics and the patterns that subscriptions name (DESIGN §6).
//!
//! Here: their grammar and what matches what. Not here: who may read which topic
//! (`core::broker`).

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

/// What a subscription names: a topic, or with a trailing `*` all that begin like it. `*` alone
/// is everything.
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

    /// The topic, or what topics must begin with.
    pub fn stem(&self) -> &str {
        self.0.strip_suffix('*').unwrap_or(&self.0)
    }

    /// Whether a message of this topic is meant.
    pub fn matches(&self, topic: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(stem) => topic.starts_with(stem),
            None => topic == self.0,
        }
    }
}

impl FromStr for Pattern {
    type Err = BadPattern;

    fn from_str(text: &str) -> Result<Pattern, BadPattern> {
        let good = match text.strip_suffix('*') {
            Some(stem) => stem.is_empty() || Topic::is_valid(stem),
            None => Topic::is_valid(text),
        };
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
#[allow(clippy::unwrap_used)]
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
        ] {
            assert_eq!(pattern(text).matches(topic), expected, "{text} {topic}");
        }
        assert_eq!((pattern("a/*").stem(), pattern("a").stem()), ("a/", "a"));
    }
}
