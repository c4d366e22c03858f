//! The names people and guests give to VMs, checked once at the border.
//!
//! Here: what a valid VM name is and which ones are reserved. Not here: which names a project
//! has (`core::config`) or which a guest may claim (`core::broker`).

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize, Serializer};

/// Longest VM name, in bytes (docs/PROTOCOL.md).
pub const MAX_NAME_BYTES: usize = 64;

/// Names that speak for the host or the broker; no VM may have one (docs/PROTOCOL.md).
pub const RESERVED_NAMES: [&str; 5] = ["host", "bus", "broker", "castra", "broadcast"];

/// Name of a VM. Invariant: matches `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
///
/// It becomes a file name, a log label and a bus topic, so nothing wider is safe in all three.
/// Names are compared without case elsewhere through [`VmName::key`]; `Eq` here is exact.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct VmName(String);

// Not by `into = "String"`, which would clone the name for every event about a VM.
impl Serialize for VmName {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.0)
    }
}

/// A text that is no VM name. Keeps the refused text for the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadVmName(pub String);

impl VmName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The form in which names are compared: ASCII lower case.
    pub fn key(&self) -> String {
        self.0.to_ascii_lowercase()
    }

    /// Whether the name is one of [`RESERVED_NAMES`], in any case.
    pub fn is_reserved(&self) -> bool {
        RESERVED_NAMES
            .iter()
            .any(|word| word.eq_ignore_ascii_case(&self.0))
    }
}

impl FromStr for VmName {
    type Err = BadVmName;

    fn from_str(text: &str) -> Result<Self, BadVmName> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let starts_well = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if text.len() <= MAX_NAME_BYTES && starts_well && text.bytes().all(allowed) {
            return Ok(VmName(text.to_owned()));
        }
        Err(BadVmName(text.to_owned()))
    }
}

impl TryFrom<String> for VmName {
    type Error = BadVmName;
    fn try_from(text: String) -> Result<Self, BadVmName> {
        text.parse()
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> String {
        name.0
    }
}

impl Borrow<str> for VmName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for VmName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Display for BadVmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is no VM name: use 1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit",
            self.0
        )
    }
}

impl std::error::Error for BadVmName {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_valid_and_not() {
        let longest = "a".repeat(64);
        for good in ["a", "web-0", "A.b_c-9", "0", longest.as_str()] {
            assert_eq!(good.parse::<VmName>().unwrap().as_str(), good);
        }
        let too_long = "a".repeat(65);
        for bad in [
            "",
            ".",
            "..",
            "/",
            "../../etc/passwd",
            "-a",
            "_a",
            "a b",
            "a\n",
            "名前",
            "a/b",
            "a\u{202e}",
            too_long.as_str(),
        ] {
            assert_eq!(bad.parse::<VmName>(), Err(BadVmName(bad.to_owned())));
        }
    }

    #[test]
    fn reserved_in_any_case() {
        assert!("HOST".parse::<VmName>().unwrap().is_reserved());
        assert!(!"hosts".parse::<VmName>().unwrap().is_reserved());
    }
}
