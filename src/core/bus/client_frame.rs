//! bus-v1 frames as a client writes and reads them: four bytes of length, then one JSON object
//! (docs/PROTOCOL.md).
//!
//! Here: encoding a client's frames, and decoding a broker's stream. Not here: the broker's side of
//! the protocol (`broker::frame`), sockets (`bus::client`).

use std::fmt;
use std::io::{self, Read};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::message::Message;
use super::topic::Pattern;

/// Bytes of a frame's length.
pub const HEAD_BYTES: usize = 4;

/// Longest frame that a client accepts from a broker: the largest `max_frame_bytes`, and what a
/// delivery has beside the payload.
pub const MAX_FRAME_BYTES: usize = (1 << 24) + 4096;

/// The decoder's buffer at first, and the least that one read may bring.
const READ_BYTES: usize = 64 * 1024;

/// A frame of a client.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Keep this and deliver it.
    Publish {
        /// A valid topic.
        topic: &'a str,
        /// Valid JSON on one line.
        payload: &'a str,
        /// The topic for answers, which the publisher may read.
        reply: Option<&'a str>,
        /// Comes back in the ack.
        id: u64,
    },
    /// Deliver messages of these topics from now on, or from a number on.
    Subscribe {
        /// Which.
        topic: &'a Pattern,
        /// First number wanted.
        from: Option<u64>,
        /// The newest message of each topic first.
        last: bool,
        /// Each message goes to one member of this group; a name of the same form as a VM's.
        group: Option<&'a str>,
        /// Comes back in the ack.
        id: u64,
    },
    /// End this subscription.
    Unsubscribe {
        /// As it was subscribed.
        topic: &'a Pattern,
        /// Comes back in the ack.
        id: u64,
    },
    /// The last message that this client has dealt with, which status shows.
    Ack {
        /// The last message dealt with.
        seq: u64,
    },
    /// A heartbeat.
    Heartbeat {
        /// Valid JSON to be shown in status.
        payload: Option<&'a str>,
        /// Comes back in the ack.
        id: u64,
    },
}

impl Request<'_> {
    /// Appends it as one frame, length first. Length and body are sent in one write: two writes
    /// cost 40 ms whenever Nagle's algorithm meets a delayed acknowledgement.
    pub fn render(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; HEAD_BYTES]);
        // Topics hold nothing that JSON would have to escape; payloads are JSON.
        let body = match self {
            Request::Publish {
                topic,
                payload,
                reply,
                id,
            } => {
                // A publish is in the hot path.
                out.extend_from_slice(b"{\"type\":\"publish\",\"topic\":\"");
                out.extend_from_slice(topic.as_bytes());
                out.extend_from_slice(b"\",\"payload\":");
                out.extend_from_slice(payload.as_bytes());
                if let Some(reply) = reply {
                    out.extend_from_slice(format!(",\"reply\":\"{reply}\"").as_bytes());
                }
                format!(",\"id\":{id}}}")
            }
            Request::Subscribe {
                topic,
                from,
                last,
                group,
                id,
            } => {
                let from = from.map(|from| format!("\"from\":{from},")).unwrap_or_default();
                let last = if *last { "\"last\":true," } else { "" };
                let group = group.map(|group| format!("\"group\":\"{group}\","));
                let terms = from + last + &group.unwrap_or_default();
                format!("{{\"type\":\"subscribe\",\"topic\":\"{topic}\",{terms}\"id\":{id}}}")
            }
            Request::Unsubscribe { topic, id } => {
                format!("{{\"type\":\"unsubscribe\",\"topic\":\"{topic}\",\"id\":{id}}}")
            }
            Request::Ack { seq } => format!("{{\"type\":\"ack\",\"seq\":{seq}}}"),
            Request::Heartbeat { payload, id } => {
                let payload = payload
                    .map(|payload| format!("\"payload\":{payload},"))
                    .unwrap_or_default();
                format!("{{\"type\":\"heartbeat\",{payload}\"id\":{id}}}")
            }
        };
        out.extend_from_slice(body.as_bytes());
        let length = u32::try_from(out.len() - start - HEAD_BYTES).unwrap_or(u32::MAX);
        out[start..start + HEAD_BYTES].copy_from_slice(&length.to_be_bytes());
    }
}

/// A frame of the broker.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// A message of a subscription.
    Delivery(Message),
    /// The answer to one request.
    Ack(Ack),
    /// These numbers of the subscription are no longer in the log.
    Gap {
        /// First one missing.
        from: u64,
        /// Last one missing.
        to: u64,
    },
    /// The broker closes the session in an orderly way.
    Close {
        /// Why.
        reason: String,
    },
    /// A frame of a later version, which is ignored.
    Unknown {
        /// Its type.
        kind: String,
    },
}

/// The answer to one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ack {
    /// The type of the acknowledged request; `None` if the broker couldn't read it.
    pub of: Option<String>,
    /// The request's id, if it was a number.
    pub id: Option<u64>,
    /// For a publish its number; for a subscribe the last number given.
    pub seq: Option<u64>,
    /// Why the request was refused; `None`: it was done.
    pub refused: Option<String>,
    /// The reason for people, where the code doesn't say everything.
    pub detail: Option<String>,
    /// A warning about a request that was done: `unknown-vm`.
    pub warning: Option<String>,
}

/// Why a stream can't be decoded any further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadFrame {
    /// This is no valid length.
    Length(u32),
    /// The body is no object of the protocol; the text says what is wrong.
    Body(String),
}

impl fmt::Display for BadFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadFrame::Length(length) => write!(f, "it announced a frame of {length} bytes"),
            BadFrame::Body(why) => write!(f, "a frame isn't an object of the protocol: {why}"),
        }
    }
}

impl std::error::Error for BadFrame {}

/// Splits a stream of bytes into frames. An incomplete frame stays in the buffer until the rest
/// comes, however long that takes. Memory grows with the received bytes, never with an announced
/// length.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Decoder {
    /// A decoder that begins with bytes already received.
    pub fn new(already: &[u8]) -> Decoder {
        Decoder {
            bytes: already.to_vec(),
            start: 0,
            end: already.len(),
        }
    }

    /// Adds the bytes of one read; 0 is the stream's end. An error, such as a timeout, loses none
    /// of the earlier bytes.
    pub fn read_from(&mut self, stream: &mut impl Read) -> io::Result<usize> {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.bytes.len() - self.end < READ_BYTES / 2 {
            // Doubled, so that a long frame that comes in small pieces is copied twice at most.
            self.bytes.resize((self.end * 2).max(READ_BYTES), 0);
        }
        let count = stream.read(&mut self.bytes[self.end..])?;
        self.end += count;
        Ok(count)
    }

    /// Adds bytes that the caller has read.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            // Reading from memory can't fail.
            let _ = self.read_from(&mut bytes);
        }
    }

    /// Whether the stream, should it end now, would end within a frame.
    pub fn is_torn(&self) -> bool {
        self.start < self.end
    }

    /// The next complete frame, if there is one. After an error the rest of the stream can't be
    /// trusted.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, BadFrame> {
        let rest = &self.bytes[self.start..self.end];
        let Some((head, rest)) = rest.split_first_chunk::<HEAD_BYTES>() else {
            return Ok(None);
        };
        let claimed = u32::from_be_bytes(*head);
        let length = usize::try_from(claimed).unwrap_or(usize::MAX);
        if length == 0 || length > MAX_FRAME_BYTES {
            return Err(BadFrame::Length(claimed));
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = parse(body)?;
        self.start += HEAD_BYTES + length;
        Ok(Some(frame))
    }
}

/// How the broker writes the beginning of a delivery. Deliveries in another form are read, too,
/// only slower.
const DELIVERY: &[u8] = b"{\"type\":\"publish\",";

/// All fields of all types in one struct, because serde's tagged enums don't support raw values.
#[derive(Deserialize)]
struct Wire {
    #[serde(rename = "type")]
    kind: String,
    ack: Option<String>,
    status: Option<String>,
    id: Option<Box<RawValue>>,
    seq: Option<u64>,
    reason: Option<String>,
    detail: Option<String>,
    warning: Option<String>,
    from: Option<u64>,
    to: Option<u64>,
}

fn parse(body: &[u8]) -> Result<Frame, BadFrame> {
    let bad = |error: serde_json::Error| BadFrame::Body(error.to_string());
    if body.starts_with(DELIVERY) {
        return Message::parse(body).map(Frame::Delivery).map_err(bad);
    }
    let wire: Wire = serde_json::from_slice(body).map_err(bad)?;
    let missing = |field: &str| BadFrame::Body(format!("`{}` without `{field}`", wire.kind));
    match wire.kind.as_str() {
        "publish" => Message::parse(body).map(Frame::Delivery).map_err(bad),
        "ack" => Ok(Frame::Ack(Ack {
            of: wire.ack,
            id: wire.id.and_then(|id| id.get().parse().ok()),
            seq: wire.seq,
            refused: match wire.status.as_deref() {
                Some("ok") => None,
                _ => Some(wire.reason.unwrap_or_else(|| "no reason given".to_owned())),
            },
            detail: wire.detail,
            warning: wire.warning,
        })),
        "gap" => Ok(Frame::Gap {
            from: wire.from.ok_or_else(|| missing("from"))?,
            to: wire.to.ok_or_else(|| missing("to"))?,
        }),
        "close" => Ok(Frame::Close {
            reason: wire.reason.unwrap_or_else(|| "no reason given".to_owned()),
        }),
        _ => Ok(Frame::Unknown { kind: wire.kind }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(body: &str) -> Vec<u8> {
        let length = u32::try_from(body.len()).unwrap();
        [length.to_be_bytes().as_slice(), body.as_bytes()].concat()
    }

    fn read(bytes: &[u8]) -> Result<Option<Frame>, BadFrame> {
        Decoder::new(bytes).next_frame()
    }

    #[test]
    fn requests_are_one_frame_each() {
        let pattern: Pattern = "ci/*".parse().unwrap();
        for (request, body) in [
            (
                Request::Publish {
                    topic: "a/b",
                    payload: "{\"x\":1}",
                    reply: None,
                    id: 7,
                },
                r#"{"type":"publish","topic":"a/b","payload":{"x":1},"id":7}"#,
            ),
            (
                Request::Publish {
                    topic: "a/b",
                    payload: "1",
                    reply: Some("vm:host/reply/1"),
                    id: 7,
                },
                r#"{"type":"publish","topic":"a/b","payload":1,"reply":"vm:host/reply/1","id":7}"#,
            ),
            (
                Request::Subscribe {
                    topic: &pattern,
                    from: Some(2),
                    last: true,
                    group: Some("w"),
                    id: 1,
                },
                r#"{"type":"subscribe","topic":"ci/*","from":2,"last":true,"group":"w","id":1}"#,
            ),
            (
                Request::Subscribe {
                    topic: &pattern,
                    from: Some(12),
                    last: false,
                    group: None,
                    id: 1,
                },
                r#"{"type":"subscribe","topic":"ci/*","from":12,"id":1}"#,
            ),
            (
                Request::Subscribe {
                    topic: &pattern,
                    from: None,
                    last: false,
                    group: None,
                    id: 1,
                },
                r#"{"type":"subscribe","topic":"ci/*","id":1}"#,
            ),
            (
                Request::Unsubscribe {
                    topic: &pattern,
                    id: 2,
                },
                r#"{"type":"unsubscribe","topic":"ci/*","id":2}"#,
            ),
            (Request::Ack { seq: 9 }, r#"{"type":"ack","seq":9}"#),
            (
                Request::Heartbeat {
                    payload: Some("{\"load\":1}"),
                    id: 3,
                },
                r#"{"type":"heartbeat","payload":{"load":1},"id":3}"#,
            ),
            (
                Request::Heartbeat { payload: None, id: 3 },
                r#"{"type":"heartbeat","id":3}"#,
            ),
        ] {
            let mut out = b"before".to_vec();
            request.render(&mut out);
            assert_eq!(out[6..], framed(body), "{body}");
            serde_json::from_str::<serde_json::Value>(body).unwrap();
        }
    }

    #[test]
    fn what_the_broker_says() {
        let ack = |of: Option<&str>, id, seq, refused: Option<&str>| {
            Frame::Ack(Ack {
                of: of.map(str::to_owned),
                id,
                seq,
                refused: refused.map(str::to_owned),
                detail: None,
                warning: None,
            })
        };
        for (body, frame) in [
            (
                r#"{"type":"ack","ack":"publish","status":"ok","id":7,"seq":41}"#,
                ack(Some("publish"), Some(7), Some(41), None),
            ),
            (
                r#"{"type":"ack","ack":null,"status":"error","id":"x","reason":"malformed"}"#,
                ack(None, None, None, Some("malformed")),
            ),
            (
                r#"{"type":"ack","ack":"heartbeat"}"#,
                ack(Some("heartbeat"), None, None, Some("no reason given")),
            ),
            (r#"{"type":"gap","from":3,"to":9}"#, Frame::Gap { from: 3, to: 9 }),
            (
                r#"{"type":"close","reason":"idle"}"#,
                Frame::Close {
                    reason: "idle".to_owned(),
                },
            ),
            (
                r#"{"type":"weather","id":{"a":[1]}}"#,
                Frame::Unknown {
                    kind: "weather".to_owned(),
                },
            ),
        ] {
            assert_eq!(read(&framed(body)).unwrap().unwrap(), frame, "{body}");
        }
        let line = r#""seq":1,"ts":2,"vm":"web-0","topic":"t","payload":{"a":1.0}}"#;
        let expected = Message::parse(format!("{{{line}").as_bytes()).unwrap();
        for head in [r#"{"type":"publish","#, r#"{ "type": "publish", "later": [], "#] {
            let body = format!("{head}{line}");
            let Some(Frame::Delivery(message)) = read(&framed(&body)).unwrap() else {
                panic!("{body}");
            };
            assert_eq!(message, expected);
        }
    }

    #[test]
    fn what_can_not_be_trusted_ends_it() {
        assert_eq!(read(&[0, 0, 0, 0]), Err(BadFrame::Length(0)));
        assert_eq!(read(&[0xff; 4]), Err(BadFrame::Length(u32::MAX)));
        for body in [
            "x",
            "[]",
            "{}",
            r#"{"type":7}"#,
            r#"{"type":"gap","from":1}"#,
            r#"{"type":"publish","seq":1}"#,
        ] {
            assert!(matches!(read(&framed(body)), Err(BadFrame::Body(_))), "{body}");
        }
    }

    /// A stream that gives little at a time and times out between.
    struct Slow<'a> {
        bytes: &'a [u8],
        step: usize,
        calls: usize,
    }

    impl Read for Slow<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.calls += 1;
            if self.calls.is_multiple_of(2) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let step = self.step.min(self.bytes.len());
            (&self.bytes[..step]).read(out).inspect(|count| {
                self.bytes = &self.bytes[*count..];
            })
        }
    }

    #[test]
    fn a_stream_in_pieces_and_time_outs_loses_nothing() {
        let long = "x".repeat(200_000);
        let bodies: Vec<String> = (0..60)
            .map(|seq| {
                let payload = if seq == 30 { long.as_str() } else { "y" };
                format!(
                    r#"{{"type":"publish","seq":{seq},"ts":0,"vm":"v","topic":"t","payload":"{payload}"}}"#
                )
            })
            .collect();
        let stream: Vec<u8> = bodies.iter().flat_map(|body| framed(body)).collect();
        for step in [1, 3, 7, 1000, 100_000] {
            let mut slow = Slow {
                bytes: &stream,
                step,
                calls: 0,
            };
            let mut decoder = Decoder::new(&[]);
            let mut seen = Vec::new();
            loop {
                match decoder.read_from(&mut slow) {
                    Ok(0) => break,
                    Ok(_) => {
                        while let Some(frame) = decoder.next_frame().unwrap() {
                            let Frame::Delivery(message) = frame else {
                                panic!("{frame:?}")
                            };
                            seen.push(message.seq);
                        }
                    }
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
            }
            assert!(!decoder.is_torn());
            assert_eq!(seen, (0..60).collect::<Vec<u64>>(), "pieces of {step}");
        }
    }

    #[test]
    fn a_claimed_length_costs_no_memory() {
        let mut decoder = Decoder::new(&[]);
        decoder.push(&u32::try_from(MAX_FRAME_BYTES).unwrap().to_be_bytes());
        decoder.push(b"{");
        assert_eq!(decoder.next_frame(), Ok(None));
        assert!(decoder.bytes.len() <= 2 * READ_BYTES && decoder.is_torn());
    }
}
