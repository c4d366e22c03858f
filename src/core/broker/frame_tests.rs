//! Tests of frames: good and bad ones, every split, the broker's own.

use super::*;

fn framed(body: &str) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    [length.to_be_bytes().as_slice(), body.as_bytes()].concat()
}

/// A burst in words, so that the cases below don't know the types.
fn said(bytes: &[u8]) -> Vec<String> {
    let mut decoder = Decoder::new(65536, bytes);
    let Some(burst) = decoder.take_burst() else {
        return Vec::new();
    };
    let text = |range: &Range<usize>| String::from_utf8(burst.text[range.clone()].to_vec()).unwrap();
    burst
        .frames
        .iter()
        .map(|frame| match frame {
            Frame::Publish {
                topic,
                payload,
                reply,
                id,
            } => {
                let reply = match text(reply) {
                    reply if reply.is_empty() => reply,
                    reply => format!(" reply {reply}"),
                };
                format!("publish {} {} {}{reply}", text(topic), text(payload), text(id))
            }
            Frame::Subscribe { pattern, terms, id } => {
                let last = if terms.last { " last" } else { "" };
                let group = terms.group.iter().map(|name| format!(" group {name}"));
                let group: String = group.collect();
                format!("subscribe {pattern} {:?} {id}{last}{group}", terms.from)
            }
            Frame::Unsubscribe { pattern, id } => format!("unsubscribe {pattern} {id}"),
            Frame::Ack { seq } => format!("ack {seq:?}"),
            Frame::Heartbeat { metrics, id } => {
                format!("heartbeat {} {id}", metrics.clone().unwrap_or(Value::Null))
            }
            Frame::Bad { kind, id, reason, .. } => format!("bad {kind} {id} {}", reason.as_str()),
            Frame::Broken { length } => format!("broken {length}"),
        })
        .collect()
}

#[test]
fn frames_good_and_bad() {
    let deep = |levels: usize| {
        let body = format!("{}1{}", "[".repeat(levels), "]".repeat(levels));
        format!(r#"{{"type":"publish","payload":{body}}}"#)
    };
    let long = "t".repeat(128);
    let cases = [
        (
            r#"{"type":"publish","payload":1}"#.to_owned(),
            "publish broadcast 1 ".to_owned(),
        ),
        (
            r#"{"type":"publish","topic":"a/b","payload":null,"id":"x"}"#.into(),
            r#"publish a/b null "x""#.into(),
        ),
        (
            r#" {"payload":{"a": "b\n"},"id":7,"type":"publish","topic":"vm:web-0"}"#.into(),
            r#"publish vm:web-0 {"a": "b\n"} 7"#.into(),
        ),
        (
            "{\"type\":\"publish\",\"payload\":[1,\r\n2]}".into(),
            "publish broadcast [1,  2] ".into(),
        ),
        (
            r#"{"type":"publish","payload":"\ud83d\ude00"}"#.into(),
            r#"publish broadcast "\ud83d\ude00" "#.into(),
        ),
        (
            r#"{"type":"publish","payload":"\\ud800"}"#.into(),
            r#"publish broadcast "\\ud800" "#.into(),
        ),
        (
            r#"{"type":"publish","payload":"\ud800"}"#.into(),
            r#"bad "publish"  malformed"#.into(),
        ),
        (
            r#"{"type":"publish","payload":"\ud800\u0041"}"#.into(),
            r#"bad "publish"  malformed"#.into(),
        ),
        (
            r#"{"type":"publish","payload":"\udc00"}"#.into(),
            r#"bad "publish"  malformed"#.into(),
        ),
        (
            deep(120),
            format!("publish broadcast {}1{} ", "[".repeat(120), "]".repeat(120)),
        ),
        (deep(121), r#"bad "publish"  malformed"#.into()),
        (deep(10_000), r#"bad "publish"  malformed"#.into()),
        (
            format!(r#"{{"x":{},"type":"heartbeat"}}"#, "[".repeat(10_000)),
            "bad   malformed".into(),
        ),
        (
            r#"{"type":"publish"}"#.into(),
            r#"bad "publish"  malformed"#.into(),
        ),
        (
            r#"{"type":"publish","payload":1,"payload":2}"#.into(),
            "bad   malformed".into(),
        ),
        (
            r#"{"type":"publish","type":"publish","payload":1}"#.into(),
            "bad   malformed".into(),
        ),
        (
            r#"{"type":"publish","payload":1,"topic":""}"#.into(),
            r#"bad "publish"  bad-topic"#.into(),
        ),
        (
            r#"{"type":"publish","payload":1,"topic":"a*"}"#.into(),
            r#"bad "publish"  bad-topic"#.into(),
        ),
        (
            r#"{"type":"publish","payload":1,"topic":"a\nb"}"#.into(),
            r#"bad "publish"  bad-topic"#.into(),
        ),
        (
            r#"{"type":"publish","payload":1,"topic":"\u001b[31m"}"#.into(),
            r#"bad "publish"  bad-topic"#.into(),
        ),
        (
            r#"{"type":"publish","payload":1,"topic":7}"#.into(),
            r#"bad "publish"  bad-topic"#.into(),
        ),
        (
            format!(r#"{{"type":"publish","payload":1,"topic":"{long}"}}"#),
            format!("publish {long} 1 "),
        ),
        (
            format!(r#"{{"type":"publish","payload":1,"topic":"{long}t"}}"#),
            r#"bad "publish"  bad-topic"#.into(),
        ),
        (
            r#"{"type":"publish","payload":1,"topic":"\u0061"}"#.into(),
            "publish a 1 ".into(),
        ),
        (
            r#"{"type":"publish","payload":1,"id":{"a":1}}"#.into(),
            "bad   malformed".into(),
        ),
        (
            format!(r#"{{"type":"publish","payload":1,"id":"{}"}}"#, "i".repeat(127)),
            "bad   malformed".into(),
        ),
        (
            r#"{"type":"subscribe","topic":"ci/*","from":12,"id":"s"}"#.into(),
            r#"subscribe ci/* Some(12) "s""#.into(),
        ),
        (
            r#"{"type":"subscribe","topic":"*"}"#.into(),
            "subscribe * None ".into(),
        ),
        (
            r#"{"type":"subscribe"}"#.into(),
            r#"bad "subscribe"  bad-topic"#.into(),
        ),
        (
            r#"{"type":"subscribe","topic":"a*b"}"#.into(),
            r#"bad "subscribe"  bad-topic"#.into(),
        ),
        (
            r#"{"type":"subscribe","topic":"a","from":-1}"#.into(),
            r#"bad "subscribe"  malformed"#.into(),
        ),
        (
            r#"{"type":"unsubscribe","topic":"a"}"#.into(),
            "unsubscribe a ".into(),
        ),
        (r#"{"type":"ack","seq":3}"#.into(), "ack Some(3)".into()),
        (r#"{"type":"ack"}"#.into(), "ack None".into()),
        (
            r#"{"type":"heartbeat","payload":{"load":[0.1]},"id":1}"#.into(),
            r#"heartbeat {"load":[0.1]} 1"#.into(),
        ),
        (
            format!(r#"{{"type":"heartbeat","payload":"{}"}}"#, "m".repeat(511)),
            "heartbeat null ".into(),
        ),
        (
            r#"{"type":"teleport","id":1}"#.into(),
            r#"bad "teleport" 1 unknown-type"#.into(),
        ),
        (
            r#"{"type":"\u001b"}"#.into(),
            r#"bad "\u001b"  unknown-type"#.into(),
        ),
        (r#"{"type":7}"#.into(), "bad   malformed".into()),
        (r#"{"topic":"a"}"#.into(), "bad   malformed".into()),
        ("{}".into(), "bad   malformed".into()),
        ("[]".into(), "bad   malformed".into()),
        (r#"["publish","a",1]"#.into(), "bad   malformed".into()),
        ("\"publish\"".into(), "bad   malformed".into()),
        ("not json".into(), "bad   malformed".into()),
        ("".into(), "bad   malformed".into()),
        ("{\"type\":\"heartbeat\"} x".into(), "bad   malformed".into()),
    ];
    for (body, expected) in cases {
        let shown: String = body.chars().take(80).collect();
        assert_eq!(said(&framed(&body)), [expected], "{shown}");
    }
    let invalid = [&8_u32.to_be_bytes(), b"\"\xff\xfe\"    ".as_slice()].concat();
    assert_eq!(said(&invalid), ["bad   malformed"]);
    let mut half = framed("{\"type\":\"publish\",\"payload\":\"xx\"}");
    let at = half.len() - 4;
    half[at] = 0xff;
    assert_eq!(said(&half), ["bad   malformed"]);
}

#[test]
fn lengths_at_the_limits() {
    let sized = |length: usize| {
        let head = r#"{"type":"publish","payload":""#;
        framed(&format!("{head}{}\"}}", "x".repeat(length - head.len() - 2)))
    };
    assert!(said(&sized(65536))[0].starts_with("publish"));
    assert_eq!(said(&sized(65537)), ["broken 65537"]);
    assert_eq!(said(&u32::MAX.to_be_bytes()), ["broken 4294967295"]);
    assert_eq!(said(&[0, 0, 0, 0]), ["bad   malformed"]);
    let after = [sized(100), u32::MAX.to_be_bytes().to_vec(), sized(100)].concat();
    assert_eq!(
        said(&after).len(),
        2,
        "nothing behind a broken length is looked at"
    );
}

#[test]
fn every_split_of_a_stream_reads_the_same() {
    let stream: Vec<u8> = (0..40)
        .flat_map(|n| {
            framed(&format!(
                r#"{{"type":"publish","topic":"t","payload":"{}"}}"#,
                "x".repeat(n * 7)
            ))
        })
        .collect();
    for step in [1, 2, 3, 5, 64, 4096] {
        let mut decoder = Decoder::new(65536, &[]);
        let (mut frames, mut wire, mut sent) = (0, 0, 0);
        while sent < stream.len() {
            let space = decoder.read_buffer();
            let more = step.min(space.len()).min(stream.len() - sent);
            space[..more].copy_from_slice(&stream[sent..sent + more]);
            decoder.advance(more);
            sent += more;
            if let Some(burst) = decoder.take_burst() {
                frames += burst.frames.len();
                wire += burst.wire_bytes;
                assert!(
                    burst
                        .frames
                        .iter()
                        .all(|frame| matches!(frame, Frame::Publish { .. }))
                );
            }
            decoder.shrink();
        }
        assert_eq!((frames, wire), (40, stream.len()));
    }
}

#[test]
fn answers_are_frames_of_json() {
    let mut out = Vec::new();
    Answer {
        kind: "\"publish\"",
        id: b"7",
        seq: Some(u64::MAX),
        ..Answer::default()
    }
    .render(&mut out);
    Answer {
        refused: Some(RefusalReason::Malformed),
        topic: Some("a*"),
        ..Answer::default()
    }
    .render(&mut out);
    let expected = [
        framed(r#"{"type":"ack","ack":"publish","status":"ok","id":7,"seq":18446744073709551615}"#),
        framed(r#"{"type":"ack","ack":null,"status":"error","topic":"a*","reason":"malformed"}"#),
    ];
    assert_eq!(out, expected.concat());
    assert_eq!(close("idle"), framed(r#"{"type":"close","reason":"idle"}"#));
    assert_eq!(gap(3, 9), framed(r#"{"type":"gap","from":3,"to":9}"#));
    let mut out = Vec::new();
    delivery(br#"{"seq":1,"payload":2}"#, &mut out);
    assert_eq!(out, framed(r#"{"type":"publish","seq":1,"payload":2}"#));
    let mut out = Vec::new();
    for number in [0, 9, 10, 1_795_255_200_123] {
        push_number(&mut out, number);
    }
    assert_eq!(out, b"09101795255200123");
}
