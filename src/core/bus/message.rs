//! One message of the bus, in the form of its log line and of its delivery.
//!
//! Here: parsing a message and writing it as JSON. Not here: frames (`bus::client_frame`), files
//! (`bus::log`).

use std::borrow::Cow;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

/// Deepest nesting of a payload. With the object of the line or delivery around it, the nesting
/// stays below 128, the limit of common parsers such as serde_json.
pub const MAX_DEPTH: usize = 120;

/// A published message. Its JSON form is its line in the log: these keys in this order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Message {
    /// Its number: rises by one per message, never given twice.
    pub seq: u64,
    /// When the broker accepted it, milliseconds since the epoch.
    pub ts: u64,
    /// Who published it: a VM, `host`, or `broker`.
    pub vm: String,
    /// Its topic.
    pub topic: String,
    /// The topic on which its sender awaits answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<String>,
    /// Any JSON value, as its sender wrote it, on one line.
    #[serde(deserialize_with = "on_one_line")]
    pub payload: Box<RawValue>,
}

impl Message {
    /// Reads a line of the log, without line end, or the body of a delivery.
    pub fn parse(bytes: &[u8]) -> Result<Message, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// The message as a line of the log has it, without line end.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a message is numbers, text and JSON")
    }
}

impl PartialEq for Message {
    fn eq(&self, other: &Message) -> bool {
        let fields = |message: &Message| (message.seq, message.ts);
        fields(self) == fields(other)
            && self.vm == other.vm
            && self.topic == other.topic
            && self.reply == other.reply
            && self.payload.get() == other.payload.get()
    }
}

fn on_one_line<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Box<RawValue>, D::Error> {
    let raw = Box::<RawValue>::deserialize(deserializer)?;
    match one_line(raw.get()) {
        Cow::Borrowed(_) => Ok(raw),
        Cow::Owned(text) => RawValue::from_string(text).map_err(serde::de::Error::custom),
    }
}

/// Valid JSON without line ends. Inside strings JSON escapes them, so a raw line end only separates
/// tokens, and a blank can replace it.
pub fn one_line(json: &str) -> Cow<'_, str> {
    if json.bytes().any(|byte| matches!(byte, b'\n' | b'\r')) {
        Cow::Owned(json.replace(['\n', '\r'], " "))
    } else {
        Cow::Borrowed(json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_read_and_written_is_the_same() {
        for line in [
            r#"{"seq":1,"ts":1763719200000,"vm":"web-0","topic":"broadcast","payload":{"a": 1.50,"b":[1e400]}}"#,
            r#"{"seq":18446744073709551615,"ts":0,"vm":"host","topic":"a/b","payload":null}"#,
            r#"{"seq":2,"ts":3,"vm":"x","topic":"t","payload":"\ud83d\u001b é"}"#,
            r#"{"seq":2,"ts":3,"vm":"x","topic":"t","reply":"vm:x/reply/1","payload":{}}"#,
        ] {
            assert_eq!(Message::parse(line.as_bytes()).unwrap().to_json(), line);
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for line in [
            "",
            "{}",
            "[]",
            r#"{"seq":1,"ts":2,"vm":"x","topic":"t"}"#,
            r#"{"seq":-1,"ts":2,"vm":"x","topic":"t","payload":1}"#,
            r#"{"seq":1,"ts":2,"vm":"x","topic":"t","payload":1}x"#,
            r#"{"seq":1,"ts":2,"vm":"x","topic":"t","payload":1"#,
        ] {
            assert!(Message::parse(line.as_bytes()).is_err(), "{line}");
        }
        assert!(Message::parse(b"\xff\xfe").is_err());
    }

    #[test]
    fn a_payload_over_several_lines_comes_on_one() {
        let line = "{\"seq\":1,\"ts\":2,\"vm\":\"x\",\"topic\":\"t\",\"payload\":{\"a\":\r\n1}}";
        let message = Message::parse(line.as_bytes()).unwrap();
        assert_eq!(message.payload.get(), "{\"a\":  1}");
    }
}
