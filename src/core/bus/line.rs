//! The beginning of a line of the bus's log, as the broker writes it.
//!
//! Here: its number, time, sender and topic, found without parsing the payload. Not here: the message
//! as JSON (`bus::message`), which other writers may have written in another way; files (`bus::log`).

/// Highest number of a message: the highest integer that every reader of JSON keeps exact. A line
/// with a higher number is damaged, and isn't a message.
pub const MAX_SEQ: u64 = (1 << 53) - 1;

/// What stands on a line of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusLine<'a> {
    /// Its number.
    pub seq: u64,
    /// When the broker accepted it, milliseconds since the epoch.
    pub ts: u64,
    /// Its sender.
    pub vm: &'a str,
    /// Its topic.
    pub topic: &'a str,
    /// Its payload, JSON that isn't checked here.
    pub payload: &'a [u8],
}

impl<'a> BusLine<'a> {
    /// Reads a line, without line end, that the broker has written; `None` for anything else.
    pub fn parse(line: &'a [u8]) -> Option<BusLine<'a>> {
        let (seq, rest) = number(line.strip_prefix(b"{\"seq\":")?)?;
        if seq > MAX_SEQ {
            return None;
        }
        let (ts, rest) = number(rest.strip_prefix(b",\"ts\":")?)?;
        let (vm, rest) = text(rest.strip_prefix(b",\"vm\":\"")?)?;
        let (topic, rest) = text(rest.strip_prefix(b",\"topic\":\"")?)?;
        let rest = match rest.strip_prefix(b",\"reply\":\"") {
            Some(reply) => text(reply)?.1,
            None => rest,
        };
        Some(BusLine {
            seq,
            ts,
            vm,
            topic,
            payload: rest.strip_prefix(b",\"payload\":")?.strip_suffix(b"}")?,
        })
    }
}

/// The number of a line, of which the first bytes are enough.
pub fn seq_of(line: &[u8]) -> Option<u64> {
    let (seq, _) = number(line.strip_prefix(b"{\"seq\":")?)?;
    (seq <= MAX_SEQ).then_some(seq)
}

fn number(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let digits = bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let value = std::str::from_utf8(&bytes[..digits]).ok()?.parse().ok()?;
    Some((value, &bytes[digits..]))
}

/// A string without escapes: names and topics need none.
fn text(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let end = bytes.iter().position(|byte| matches!(byte, b'"' | b'\\'))?;
    let rest = bytes[end..].strip_prefix(b"\"")?;
    Some((std::str::from_utf8(&bytes[..end]).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_are_written() {
        for reply in ["", ",\"reply\":\"vm:x/reply/1\""] {
            let line =
                format!("{{\"seq\":12,\"ts\":3,\"vm\":\"web-0\",\"topic\":\"a/b\"{reply},\"payload\":{{}}}}");
            let expected = BusLine {
                seq: 12,
                ts: 3,
                vm: "web-0",
                topic: "a/b",
                payload: b"{}",
            };
            assert_eq!(BusLine::parse(line.as_bytes()), Some(expected));
            assert_eq!(seq_of(&line.as_bytes()[..12]), Some(12));
        }
        for other in [
            "",
            "{}",
            "{\"seq\":}",
            "{\"seq\":1}",
            "{\"seq\":x",
            "{\"seq\":1,\"ts\":1,\"vm\":\"a",
            "{\"seq\":1,\"ts\":1,\"vm\":\"a\\\"\",\"topic\":\"x\",\"payload\":1}",
            "{\"seq\":1,\"ts\":1,\"vm\":\"x\",\"topic\":\"\\u0061\",\"payload\":1}",
            "{\"seq\":1,\"ts\":1,\"vm\":\"x\",\"topic\":\"cut}",
            "{\"seq\":1,\"ts\":1,\"vm\":\"x\",\"topic\":\"x\",\"payload\":1",
            "{\"ts\":1,\"seq\":1,\"vm\":\"x\",\"topic\":\"x\",\"payload\":1}",
            "{\"seq\":99999999999999999999",
        ] {
            assert_eq!(BusLine::parse(other.as_bytes()), None, "{other}");
        }
        assert_eq!(seq_of(b"{\"seq\":9007199254740992,"), None);
    }
}
