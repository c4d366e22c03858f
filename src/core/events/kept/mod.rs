//! Events as they are kept: reading the journals back.
//!
//! Here: one line of a journal, the fields by which lines are selected, its time; all lines of one journal
//! (`journal_reader`). Not here: a journal's files (`core::lines`), merging journals
//! (`core::operations::events`).

pub(crate) mod journal_reader;

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;

use super::contract::Stamped;

/// One line of a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalLine {
    /// The contract line as it was kept.
    pub line: String,
    /// Its time.
    pub ts: String,
    /// Its type; this castra may not know those of a later one.
    pub kind: String,
    /// Id of its run.
    pub run: Option<String>,
}

impl JournalLine {
    /// What it says, if this castra knows the type.
    pub fn event(&self) -> Option<Stamped> {
        Stamped::from_contract_line(&self.line)
    }
}

/// The fields by which lines are selected. `vm` is any JSON: a later castra may use the name for
/// something else.
#[derive(Deserialize)]
pub(crate) struct Head<'l> {
    #[serde(rename = "type", borrow)]
    pub kind: Cow<'l, str>,
    #[serde(borrow)]
    pub ts: Cow<'l, str>,
    #[serde(borrow)]
    pub run: Option<Cow<'l, str>>,
    pub seq: Option<u64>,
    vm: Option<Value>,
}

impl Head<'_> {
    /// The head of a line; `None` if it is no contract line.
    pub(crate) fn of(line: &str) -> Option<Head<'_>> {
        serde_json::from_str(line).ok()
    }

    /// The VM it is about.
    pub(crate) fn vm(&self) -> Option<&str> {
        self.vm.as_ref().and_then(Value::as_str)
    }
}

/// What a line of a journal holds.
pub(crate) struct Read<'l> {
    /// The event on it, if there is one.
    pub event: Option<(&'l str, Head<'l>)>,
    /// Whether part of the line isn't an event.
    pub corrupt: bool,
}

/// Reads one line, without its line end. A writer that died in the middle of a line leaves a torn
/// line, and another writer may append to it before anybody cuts it off: what follows the torn part
/// is still an event.
pub(crate) fn read(line: &[u8]) -> Read<'_> {
    /// How every line that castra writes begins.
    const BEGINNING: &str = r#"{"type":""#;
    let line = std::str::from_utf8(line).unwrap_or_default().trim_end();
    if let Some(head) = Head::of(line) {
        return Read {
            event: Some((line, head)),
            corrupt: false,
        };
    }
    let rest = line.rfind(BEGINNING).map(|at| &line[at..]);
    Read {
        event: rest.and_then(|rest| Some((rest, Head::of(rest)?))),
        corrupt: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_a_torn_piece_is_read() {
        let whole = r#"{"type":"summary","ts":"2026-11-21T10:00:00.000Z","vm":["later"],"seq":4}"#;
        let seen = read(whole.as_bytes());
        assert!(!seen.corrupt);
        let (_, head) = seen.event.unwrap();
        assert_eq!((head.seq, head.vm()), (Some(4), None));
        for torn in ["{\"type\":\"message\",\"te", "\u{0}\u{0}", "x"] {
            let line = format!("{torn}{whole}");
            let seen = read(line.as_bytes());
            assert!(seen.corrupt);
            assert_eq!(seen.event.unwrap().0, whole);
        }
        for bad in [
            "",
            "x",
            "{}",
            "[1]",
            "null",
            r#"{"type":"#,
            r#"{"type":1,"ts":"x"}"#,
        ] {
            let seen = read(bad.as_bytes());
            assert!(seen.corrupt && seen.event.is_none(), "{bad}");
        }
        assert!(read(b"\xff\xfe").event.is_none());
    }
}
