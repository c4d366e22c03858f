//! Which names a guest may send for what it was asked for.
//!
//! Here: the last part of each pattern, against the first part of each name. Not here: writing files (`receive`), or
//! finding in the guest what a pattern means (`script`).
//!
//! `castra cp web:report.txt ~` must not bring a `.bashrc`. The guest's shell says what a pattern means, so the guest
//! could say anything; here the names are looked at once more.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

/// What was asked for: the last part of each pattern.
pub struct RequestedNames(Vec<Vec<u8>>);

impl RequestedNames {
    /// These patterns were asked for.
    pub fn new(patterns: &[OsString]) -> RequestedNames {
        let last = |pattern: &OsString| {
            let bytes = pattern.as_bytes();
            let end = bytes
                .iter()
                .rposition(|byte| *byte != b'/')
                .map_or(0, |at| at + 1);
            let part = bytes[..end].rsplit(|byte| *byte == b'/').next();
            part.unwrap_or_default().to_vec()
        };
        RequestedNames(patterns.iter().map(last).collect())
    }

    /// Whether a folder without a name of its own may come: what is in it, whatever that is called.
    pub fn takes_whole(&self) -> bool {
        self.0.iter().any(|part| {
            part.is_empty() || part == b"." || part == b".." || (part.starts_with(b".") && is_glob(part))
        })
    }

    /// Whether a file or folder of this name may come.
    pub fn takes(&self, name: &[u8]) -> bool {
        self.0.iter().any(|part| match part.as_slice() {
            // What a home is called only the guest knows.
            b"~" => !name.starts_with(b"."),
            part => part == name || fits(part, name),
        })
    }
}

fn is_glob(part: &[u8]) -> bool {
    part.iter().any(|byte| matches!(byte, b'*' | b'?' | b'['))
}

/// As a shell has it, or wider: a dot at the beginning is matched by a dot alone; `?` and a set in brackets stand for any
/// byte and more, since shells differ in how many bytes a character has, and in what is in a set.
fn fits(part: &[u8], name: &[u8]) -> bool {
    if name.first() == Some(&b'.') && !matches!(part, [b'.', ..] | [b'\\', b'.', ..]) {
        return false;
    }
    // Where to go on if what follows the last wildcard doesn't fit: that takes one byte more.
    let (mut pattern, mut rest, mut again) = (part, name, None);
    loop {
        if let [b'*', behind @ ..] = pattern {
            (pattern, again) = (behind, Some((behind, rest)));
            continue;
        }
        if let ([_, left @ ..], Some(behind)) = (rest, behind_one(pattern)) {
            (pattern, rest, again) = (behind, left, Some((behind, left)));
            continue;
        }
        (pattern, rest) = match (pattern, rest) {
            ([], []) => return true,
            ([b'\\', escaped, behind @ ..], [byte, left @ ..]) if escaped == byte => (behind, left),
            ([literal, behind @ ..], [byte, left @ ..]) if literal == byte => (behind, left),
            _ => match again {
                Some((behind, [_, left @ ..])) => {
                    again = Some((behind, left));
                    (behind, left)
                }
                _ => return false,
            },
        };
    }
}

/// What is behind a `?` or a set in brackets.
fn behind_one(pattern: &[u8]) -> Option<&[u8]> {
    match pattern {
        [b'?', behind @ ..] => Some(behind),
        [b'[', first, set @ ..] => {
            // In the first place a `]` is a member, also after the sign that turns a set round.
            let skipped = usize::from(matches!(first, b'!' | b'^'));
            let end = set.iter().skip(skipped).position(|byte| *byte == b']')?;
            Some(&set[skipped + end + 1..])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_and_nothing_else() {
        for (pattern, name, expected) in [
            ("/root/report.txt", "report.txt", true),
            ("report.txt", ".bashrc", false),
            ("/etc/ssh/", "ssh", true),
            ("logs/*", "a.log", true),
            ("logs/*", ".ssh", false),
            ("logs/.*", ".ssh", true),
            ("*.log", "a.log", true),
            ("*.log", "a.logs", false),
            ("*.log", "a.log.log", true),
            ("a*b*c", "aXbXbc", true),
            ("a*b*c", "acb", false),
            ("?.txt", "a.txt", true),
            ("?.txt", "ä.txt", true),
            ("?.txt", "€.txt", true),
            ("?.txt", ".txt", false),
            ("?.txt", "a.doc", false),
            ("[ab].txt", "a.txt", true),
            ("[]a].txt", "a.txt", true),
            ("[!]a].txt", "b.txt", true),
            ("[ab].txt", ".txt", false),
            ("[ab", "a", false),
            ("x[0-9]*y?", "x1..yz", true),
            ("a[1].txt", "a[1].txt", true),
            ("[", "[", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "axb", false),
            ("a\\b", "a\\b", true),
            ("~/x", "x", true),
            ("~", "root", true),
            ("~", ".ssh", false),
            ("*", "", true),
        ] {
            let asked = RequestedNames::new(&[OsString::from(pattern)]);
            assert_eq!(asked.takes(name.as_bytes()), expected, "{pattern} {name}");
        }
        for (pattern, expected) in [
            ("/", true),
            (".", true),
            ("", true),
            ("/root/.", true),
            ("..", true),
            (".*", true),
            ("/root", false),
            ("*", false),
            ("~", false),
        ] {
            assert_eq!(
                RequestedNames::new(&[OsString::from(pattern)]).takes_whole(),
                expected,
                "{pattern}"
            );
        }
    }
}
