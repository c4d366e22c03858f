//! What may be published: topics, and JSON that fits into a frame.
//!
//! Here: the checks that need no broker, and their words. Not here: sending (`publishing`). The
//! broker checks once more: it doesn't trust its host clients either.

use serde_json::value::RawValue;

use crate::core::bus::frame::{HEAD_BYTES, Request};
use crate::core::bus::message::{MAX_DEPTH, one_line};
use crate::core::bus::topic::{MAX_TOPIC_BYTES, Topic};
use crate::core::escape::json_depth;
use crate::core::failure::{Exit, Failure, Result};

/// Refuses what is no topic to publish on.
pub(super) fn check_topic(topic: &str) -> Result<()> {
    let bad = |why: String| {
        Err(
            Failure::new(Exit::Usage, format!("{topic:?} is no topic to publish on"))
                .because(why)
                .advice(
                    "use 1 to 128 of A-Z a-z 0-9 . _ : / -, such as ci/build; the usual one is broadcast",
                ),
        )
    };
    if topic.len() > MAX_TOPIC_BYTES {
        return bad(format!("it has {} bytes", topic.len()));
    }
    if !Topic::is_valid(topic) {
        let odd = topic
            .chars()
            .find(|c| !c.is_ascii() || !Topic::is_valid(&c.to_string()));
        return bad(match odd {
            Some('*') => "only subscriptions may end in `*`".to_owned(),
            Some(odd) => format!("it holds {odd:?}"),
            None => "it is empty".to_owned(),
        });
    }
    if topic.starts_with("castra/") {
        return bad("topics that begin with castra/ are the broker's own".to_owned());
    }
    Ok(())
}

/// A payload of the command line that is none, and how to quote it.
pub(super) fn not_json(payload: &str, why: &str) -> Failure {
    // A word that a shell has stripped of its quotes is what most get wrong.
    let shown: String = payload.chars().take(40).collect();
    let is_word = !payload.trim_start().starts_with(['{', '[', '"']) && payload.len() == shown.len();
    let failure = Failure::new(Exit::Usage, format!("the payload can't be {shown:?}")).because(why);
    if is_word && !payload.is_empty() && !payload.contains(['\'', '"', '\\']) {
        failure.advice(format!(
            "a text needs quotes of its own inside the shell's: --payload '\"{payload}\"'"
        ))
    } else {
        failure
            .advice("put it into single quotes, as in --payload '{\"state\": \"ready\", \"load\": [0.1, 2]}'")
    }
}

/// The payload on one line if it is JSON and fits into a frame; else what is wrong.
pub(super) fn check_payload(bytes: &[u8], topic: &str, longest: usize) -> Result<String, String> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| format!("it is no UTF-8, from byte {} on", error.valid_up_to() + 1))?;
    serde_json::from_str::<&RawValue>(text)
        .map_err(|error| format!("it is no JSON: {}", in_words(&error)))?;
    let depth = json_depth(text.as_bytes());
    if depth > MAX_DEPTH {
        return Err(format!("it is nested {depth} deep, more than {MAX_DEPTH}"));
    }
    let bytes = frame_bytes(topic, text);
    if bytes > longest {
        return Err(format!(
            "its frame has {bytes} bytes, more than the {longest} of `max_frame_bytes` under [bus]"
        ));
    }
    Ok(one_line(text.trim()).into_owned())
}

fn in_words(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let what = text.strip_suffix(&place).unwrap_or(&text);
    match error.line() {
        1 => format!("{what}, column {}", error.column()),
        line => format!("{what}, line {line} column {}", error.column()),
    }
}

/// What the frame of a publish takes, its number at its longest.
fn frame_bytes(topic: &str, payload: &str) -> usize {
    let mut empty = Vec::new();
    let (topic_bytes, id) = (topic.len(), u64::MAX);
    Request::Publish {
        topic: "",
        payload: "",
        id,
    }
    .render(&mut empty);
    empty.len() - HEAD_BYTES + topic_bytes + payload.len()
}

#[cfg(test)]
#[path = "payload_tests.rs"]
mod tests;
