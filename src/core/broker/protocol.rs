//! The text of the handshake: greeting, hello, replies, decline reasons (docs/PROTOCOL.md).
//!
//! Here: pure parsing and rendering. Not here: who is admitted (`broker::state`), sockets and
//! deadlines (`broker::listen`), log lines (`broker::attempts`).

use std::fmt;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::core::name::VmName;

/// The first line that the broker sends.
pub const GREETING: &str = "castra-broker 1 ready\n";

/// Longest hello line, bytes, without its line end.
pub const HELLO_BYTES: usize = 512;

/// Most capabilities of one hello, and most bytes of each. A line of 512 bytes has no room for more
/// useful ones.
const MAX_CAPABILITIES: usize = 64;
const CAPABILITY_BYTES: usize = 64;

/// Versions of the bus this broker speaks.
pub const BUS_VERSIONS: &[u32] = &[1];

/// A valid hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The VM that it claims to be.
    pub vm: VmName,
    /// SHA-256 of the token that it presented. The token itself stays in the parser, so it can't
    /// reach a log.
    pub token_sha256: Option<[u8; 32]>,
    /// The capabilities that it offers, sorted, without repeats.
    pub capabilities: Vec<String>,
}

/// Why a hello is declined. The list is closed (docs/PROTOCOL.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DeclineReason {
    /// The first line is no hello.
    ProtocolError,
    /// No whole hello came in time.
    Timeout,
    /// The project has no such VM.
    UnknownVm,
    /// The token is missing or not this launch's.
    BadToken,
    /// The name is reserved for the host or the broker.
    ReservedIdentity,
    /// Too many connections or sessions.
    SessionLimit,
    /// Only bus versions were offered that this broker doesn't speak.
    UnsupportedCapability,
    /// The record can't be made.
    StorageError,
    /// The broker is stopping.
    ShuttingDown,
}

impl DeclineReason {
    /// All of them.
    pub const ALL: [DeclineReason; 9] = [
        DeclineReason::ProtocolError,
        DeclineReason::Timeout,
        DeclineReason::UnknownVm,
        DeclineReason::BadToken,
        DeclineReason::ReservedIdentity,
        DeclineReason::SessionLimit,
        DeclineReason::UnsupportedCapability,
        DeclineReason::StorageError,
        DeclineReason::ShuttingDown,
    ];

    /// The word on the wire, in the log and in the event.
    pub fn as_str(self) -> &'static str {
        match self {
            DeclineReason::ProtocolError => "protocol-error",
            DeclineReason::Timeout => "timeout",
            DeclineReason::UnknownVm => "unknown-vm",
            DeclineReason::BadToken => "bad-token",
            DeclineReason::ReservedIdentity => "reserved-identity",
            DeclineReason::SessionLimit => "session-limit",
            DeclineReason::UnsupportedCapability => "unsupported-capability",
            DeclineReason::StorageError => "storage-error",
            DeclineReason::ShuttingDown => "shutting-down",
        }
    }
}

impl fmt::Display for DeclineReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A hello that was refused before admission was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelloRefusal {
    /// Its name, where a valid one was read.
    pub vm: Option<VmName>,
    /// Why.
    pub reason: DeclineReason,
}

impl HelloRefusal {
    /// A refusal before a name was read.
    pub fn unnamed(reason: DeclineReason) -> HelloRefusal {
        HelloRefusal { vm: None, reason }
    }
}

/// How much of a hello the bytes so far hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The beginning of a hello; more must come.
    Partial,
    /// The first `line` bytes are the line; `used` counts its end too.
    Line {
        /// Length of the line.
        line: usize,
        /// Length of line and line end.
        used: usize,
    },
    /// They can't become a hello any more.
    Hopeless,
}

/// Looks for the hello line at the start of what was read. It refuses as early as it can: an HTTP
/// `GET` is refused at its first byte, so its body is never read.
pub fn progress(bytes: &[u8]) -> Progress {
    const OPENING: &[u8] = b"hello ";
    let seen = bytes.len().min(OPENING.len());
    if bytes[..seen] != OPENING[..seen] {
        return Progress::Hopeless;
    }
    // The line, and CR LF behind it.
    let window = &bytes[..bytes.len().min(HELLO_BYTES + 2)];
    match window.iter().position(|byte| *byte == b'\n') {
        Some(end) => {
            let line = end - usize::from(end > 0 && bytes[end - 1] == b'\r');
            if line > HELLO_BYTES {
                return Progress::Hopeless;
            }
            Progress::Line { line, used: end + 1 }
        }
        None if window.len() == HELLO_BYTES + 2 => Progress::Hopeless,
        None => Progress::Partial,
    }
}

/// Parses a hello line (without its line end). A refusal has the reason `protocol-error` and the
/// VM's name, if one was read.
pub fn parse_hello(line: &[u8]) -> Result<Hello, HelloRefusal> {
    let unnamed = || HelloRefusal::unnamed(DeclineReason::ProtocolError);
    let text = std::str::from_utf8(line).map_err(|_| unnamed())?;
    if text.chars().any(char::is_control) {
        return Err(unnamed());
    }
    let mut words = text.split(' ').filter(|word| !word.is_empty());
    if words.next() != Some("hello") {
        return Err(unnamed());
    }
    let vm: VmName = words
        .next()
        .and_then(|word| word.strip_prefix("vm:"))
        .and_then(|name| name.parse().ok())
        .ok_or_else(unnamed)?;
    let refusal = || HelloRefusal {
        vm: Some(vm.clone()),
        reason: DeclineReason::ProtocolError,
    };
    let (mut token, mut offered) = (None, None);
    for word in words {
        // A bare word is refused, not skipped: `hello vm:web 0` must not pass as `web`.
        let (key, value) = word.split_once('=').ok_or_else(refusal)?;
        let slot = match key {
            "token" => &mut token,
            "capabilities" => &mut offered,
            _ => continue,
        };
        if slot.replace(value).is_some() {
            return Err(refusal());
        }
    }
    let capabilities = offered.map_or(Some(Vec::new()), parse_capabilities);
    Ok(Hello {
        token_sha256: token.map(|token| Sha256::digest(token.as_bytes()).into()),
        capabilities: capabilities.ok_or_else(refusal)?,
        vm,
    })
}

/// `a,b,a` as sorted words without repeats; `None` if one of them isn't a capability.
fn parse_capabilities(list: &str) -> Option<Vec<String>> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let mut words: Vec<String> = list
        .split(',')
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect();
    if words
        .iter()
        .any(|word| word.len() > CAPABILITY_BYTES || !word.bytes().all(allowed) || word.starts_with('-'))
    {
        return None;
    }
    words.sort_unstable();
    words.dedup();
    (words.len() <= MAX_CAPABILITIES).then_some(words)
}

/// What a hello gets for its capabilities: the highest version of the bus that both sides speak,
/// none (handshake only), or a refusal.
pub fn negotiate(offered: &[String], spoken: &[u32]) -> Result<Option<u32>, DeclineReason> {
    let mut asked = offered.iter().filter(|word| word.starts_with("bus-")).peekable();
    if asked.peek().is_none() || spoken.is_empty() {
        return Ok(None);
    }
    asked
        .filter_map(|word| word.strip_prefix("bus-v")?.parse::<u32>().ok())
        .filter(|version| spoken.contains(version))
        .max()
        .map(Some)
        .ok_or(DeclineReason::UnsupportedCapability)
}

/// The answer to a hello that gets no session.
pub fn ok_reply() -> String {
    "ok\n".to_owned()
}

/// The answer to a hello that gets a session.
pub fn session_reply(session: &str, heartbeat_secs: u64) -> String {
    format!("ok session={session} heartbeat_secs={heartbeat_secs}\n")
}

/// The answer to a hello that is declined.
pub fn declined_reply(reason: DeclineReason, spoken: &[u32]) -> String {
    if reason == DeclineReason::UnsupportedCapability {
        let supported: Vec<String> = spoken.iter().map(|version| format!("bus-v{version}")).collect();
        return format!("declined reason={reason} supported={}\n", supported.join(","));
    }
    format!("declined reason={reason}\n")
}

/// How often a guest should send a heartbeat, so that it stays reachable if one is late: a third of
/// the freshness window or of the idle limit, whichever is shorter, at least a second.
pub fn heartbeat_secs(freshness: Duration, session_idle: Duration) -> u64 {
    (freshness.min(session_idle).as_secs() / 3).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A whole exchange as text, so that the cases below don't know the types.
    fn said(bytes: &[u8]) -> String {
        match progress(bytes) {
            Progress::Partial => "partial".into(),
            Progress::Hopeless => "hopeless".into(),
            Progress::Line { line, used } => {
                let rest = if used < bytes.len() { " +rest" } else { "" };
                match parse_hello(&bytes[..line]) {
                    Ok(hello) => format!(
                        "{} [{}]{}{rest}",
                        hello.vm,
                        hello.capabilities.join(","),
                        if hello.token_sha256.is_some() {
                            " token"
                        } else {
                            ""
                        },
                    ),
                    Err(refusal) => format!(
                        "{} {}{rest}",
                        refusal.reason,
                        refusal.vm.as_ref().map_or("-", VmName::as_str)
                    ),
                }
            }
        }
    }

    #[test]
    fn hellos_good_and_bad() {
        let cases: [(&[u8], &str); 46] = [
            (b"hello vm:web-0\n", "web-0 []"),
            (b"hello vm:web-0\r\n", "web-0 []"),
            (b"hello vm:web-0 \n", "web-0 []"),
            (b"hello  vm:web-0  x=1\n", "web-0 []"),
            (b"hello vm:HOST\n", "HOST []"),
            (
                b"hello vm:a capabilities=x-demo,bus-v1,bus-v1\n",
                "a [bus-v1,x-demo]",
            ),
            (b"hello vm:a capabilities=\n", "a []"),
            (b"hello vm:a capabilities=,b,,\n", "a [b]"),
            (b"hello vm:a token=\n", "a [] token"),
            (b"hello vm:a token=abc later=\xe5\x90\x8d x=y=z\n", "a [] token"),
            (b"hello vm:a\nhello vm:b\n", "a [] +rest"),
            (b"", "partial"),
            (b"h", "partial"),
            (b"hello", "partial"),
            (b"hello vm:a", "partial"),
            (b"\n", "hopeless"),
            (b"\r\n", "hopeless"),
            (b"\0", "hopeless"),
            (b"\xff\xfe", "hopeless"),
            (b"HELLO vm:a\n", "hopeless"),
            (b"G", "hopeless"),
            (b"GET / HTTP/1.1\r\nHost: x\r\n\r\nhello vm:a\n", "hopeless"),
            (b"hello\n", "hopeless"),
            (b"hellovm:a\n", "hopeless"),
            (b" hello vm:a\n", "hopeless"),
            (b"hello \n", "protocol-error -"),
            (b"hello web-0\n", "protocol-error -"),
            (b"hello vm:\n", "protocol-error -"),
            (b"hello vm:..\n", "protocol-error -"),
            (b"hello vm:/\n", "protocol-error -"),
            (b"hello vm:../../etc/passwd\n", "protocol-error -"),
            (b"hello vm:a/b\n", "protocol-error -"),
            (b"hello vm:\xe5\x90\x8d\xe5\x89\x8d\n", "protocol-error -"),
            (b"hello vm:a\0\n", "protocol-error -"),
            (b"hello vm:a\x1b[31m\n", "protocol-error -"),
            (b"hello vm:a x=\x1b[31m\n", "protocol-error -"),
            (b"hello vm:a\xe2\x80\xae\n", "protocol-error -"),
            (b"hello vm:a x=\xff\n", "protocol-error -"),
            (b"hello vm:a\r\r\n", "protocol-error -"),
            (b"hello vm:web 0\n", "protocol-error web"),
            (b"hello vm:a\ttoken=x\n", "protocol-error -"),
            (b"hello vm:a token=x token=y\n", "protocol-error a"),
            (b"hello vm:a capabilities=a capabilities=b\n", "protocol-error a"),
            (b"hello vm:a capabilities=b\xe2\x80\xae\n", "protocol-error a"),
            (b"hello vm:a capabilities=bus-v1;rm\n", "protocol-error a"),
            (b"hello vm:a capabilities==\n", "protocol-error a"),
        ];
        for (bytes, expected) in cases {
            assert_eq!(said(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn lengths_at_the_limits() {
        let name = |length: usize| format!("hello vm:{}\n", "a".repeat(length));
        assert!(said(name(64).as_bytes()).starts_with("aaaa"));
        assert_eq!(said(name(65).as_bytes()), "protocol-error -");
        let line = |length: usize, end: &str| {
            let start = "hello vm:a x=";
            format!("{start}{}{end}", "y".repeat(length - start.len()))
        };
        assert_eq!(said(line(512, "\n").as_bytes()), "a []");
        assert_eq!(said(line(512, "\r\n").as_bytes()), "a []");
        assert_eq!(said(line(513, "\n").as_bytes()), "hopeless");
        assert_eq!(said(line(513, "\r\n").as_bytes()), "hopeless");
        assert_eq!(said(line(512, "").as_bytes()), "partial");
        assert_eq!(said(line(10_000, "\n").as_bytes()), "hopeless");
        let many: Vec<String> = (0..65).map(|n| format!("c{n}")).collect();
        let hello = format!("hello vm:a capabilities={}\n", many.join(","));
        assert_eq!(said(hello.as_bytes()), "protocol-error a");
    }

    #[test]
    fn every_split_of_a_hello_reads_the_same() {
        let hello = b"hello vm:web-0 token=x capabilities=b,a\r\n";
        for split in 0..hello.len() {
            assert_eq!(progress(&hello[..split]), Progress::Partial, "at {split}");
        }
        assert_eq!(said(hello), "web-0 [a,b] token");
    }

    #[test]
    fn capabilities_are_negotiated() {
        let offer = |words: &str, spoken: &[u32]| {
            let words: Vec<String> = words
                .split(',')
                .filter(|w| !w.is_empty())
                .map(str::to_owned)
                .collect();
            negotiate(&words, spoken)
        };
        assert_eq!(offer("", &[1]), Ok(None));
        assert_eq!(offer("x-demo,vizier-v1", &[1]), Ok(None));
        assert_eq!(offer("bus-v1,x-demo", &[1]), Ok(Some(1)));
        assert_eq!(offer("bus-v1,bus-v2,bus-v3", &[1, 2]), Ok(Some(2)));
        assert_eq!(offer("bus-v2", &[1]), Err(DeclineReason::UnsupportedCapability));
        assert_eq!(offer("bus-x", &[1]), Err(DeclineReason::UnsupportedCapability));
        assert_eq!(
            offer("bus-v1", &[]),
            Ok(None),
            "without a bus everybody is handshake-only"
        );
        assert_eq!(
            declined_reply(DeclineReason::UnsupportedCapability, &[1]),
            "declined reason=unsupported-capability supported=bus-v1\n"
        );
        assert_eq!(
            declined_reply(DeclineReason::BadToken, &[1]),
            "declined reason=bad-token\n"
        );
    }

    #[test]
    fn heartbeats_fit_into_the_window_three_times() {
        let beat = |fresh, idle| heartbeat_secs(Duration::from_secs(fresh), Duration::from_secs(idle));
        assert_eq!(
            (beat(45, 60), beat(60, 45), beat(3, 60), beat(4, 4)),
            (15, 15, 1, 1)
        );
    }
}
