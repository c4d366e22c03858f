//! What can be published, and how what can't is told.

use super::*;

#[test]
fn topics_to_publish_on() {
    for good in ["broadcast", "vm:web-0", "ci/build", "castra"] {
        assert!(check_topic(good).is_ok(), "{good}");
    }
    let long = "t".repeat(129);
    for (bad, why) in [
        ("", "it is empty"),
        ("ci/*", "only subscriptions may end in `*`"),
        ("a b", "it holds ' '"),
        ("a\u{1b}[2J", "it holds '\\u{1b}'"),
        ("grün", "it holds 'ü'"),
        ("castra/handshake/web", "are the broker's own"),
        (long.as_str(), "it has 129 bytes"),
    ] {
        let failure = check_topic(bad).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.to_string().contains(why), "{failure}");
        assert!(!failure.to_string().contains('\u{1b}'), "{failure}");
    }
}

#[test]
fn payloads_good_and_bad() {
    let check = |text: &str| check_payload(text.as_bytes(), "t", 100);
    assert_eq!(check(" {\"a\":\n[1]} ").unwrap(), "{\"a\": [1]}");
    assert_eq!(check("null").unwrap(), "null");
    assert_eq!(check("1e999").unwrap(), "1e999");
    for (bad, why) in [
        ("hello", "invalid JSON: expected value, column 1"),
        ("", "invalid JSON: EOF while parsing a value"),
        ("{\"a\":1", "invalid JSON: EOF while parsing an object"),
        ("1 2", "invalid JSON: trailing characters, column 3"),
        ("\n\nx", "invalid JSON: expected value, line 3 column 1"),
    ] {
        let error = check(bad).unwrap_err();
        assert!(error.contains(why), "{bad}: {error}");
    }
    let error = check_payload(b"\"ab\xff\"", "t", 100).unwrap_err();
    assert_eq!(error, "it isn't UTF-8 from byte 4 on");
}

#[test]
fn the_largest_message_fits_exactly() {
    let limit = 1024;
    let topic = "t/u";
    let payload_of = |bytes: usize| format!("\"{}\"", "x".repeat(bytes - 2));
    let room = limit - frame_bytes(topic, "");
    let largest = check_payload(payload_of(room).as_bytes(), topic, limit).unwrap();
    let mut out = Vec::new();
    Request::Publish {
        topic,
        payload: &largest,
        reply: None,
        id: u64::MAX,
    }
    .render(&mut out);
    assert_eq!(out.len() - HEAD_BYTES, limit);
    let error = check_payload(payload_of(room + 1).as_bytes(), topic, limit).unwrap_err();
    assert!(error.contains("1025 bytes, more than the 1024"), "{error}");
}

#[test]
fn what_is_no_json_is_shown_how_to_quote() {
    for (payload, next) in [
        ("hello", "--payload '\"hello\"'"),
        ("{state: 1}", "single quotes"),
        ("it's", "single quotes"),
        ("", "single quotes"),
    ] {
        let failure = not_json(payload, "it isn't JSON");
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.next.as_ref().unwrap().contains(next), "{failure}");
    }
}
