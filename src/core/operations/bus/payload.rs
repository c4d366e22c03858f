//! What can be published: topics, and JSON that fits into a frame.
//!
//! Here: the checks that need no broker, and their messages. Not here: sending (`publisher`). The broker
//! checks again: it doesn't trust its host clients either.

use serde_json::value::RawValue;

use super::BusProject;
use crate::core::bus::client_frame::{HEAD_BYTES, Request};
use crate::core::bus::message::{MAX_DEPTH, one_line};
use crate::core::bus::topic::{MAX_TOPIC_BYTES, Topic};
use crate::core::escape::json_depth;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::name::VmName;
use crate::core::nearest::nearest;
use crate::core::root::records::{self, GuestsRecord};

/// Refuses what isn't a topic you can publish on.
pub(super) fn check_topic(topic: &str) -> Result<()> {
    let bad = |why: String| {
        Err(
            Failure::new(Exit::Usage, format!("{topic:?} isn't a topic you can publish on"))
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

/// The VM that a topic `vm:NAME` or `vm:NAME/…` names, if the project has none of that name. Without a
/// config and before any `up` nobody knows.
pub(super) fn unknown_vm_in(project: &BusProject, topic: &str) -> Option<String> {
    let rest = topic.strip_prefix("vm:")?;
    let name = rest.split_once('/').map_or(rest, |(name, _)| name);
    let known = names_of(project);
    let is_known = name.contains('*')
        || name.eq_ignore_ascii_case("host")
        || known.is_empty()
        || known
            .iter()
            .any(|known| known.as_str().eq_ignore_ascii_case(name));
    (!is_known).then(|| name.to_owned())
}

/// Refuses a message to an unknown VM: it would be kept, and nobody would read it.
pub(super) fn check_vm(project: &BusProject, topic: &str) -> Result<()> {
    let Some(stranger) = unknown_vm_in(project, topic) else {
        return Ok(());
    };
    let known = names_of(project);
    let names: Vec<&str> = known.iter().map(VmName::as_str).collect();
    let failure = Failure::new(
        Exit::Usage,
        format!("the project has no vm `{stranger}` to publish to"),
    )
    .because(format!("its VMs are {}", names.join(", ")));
    Err(match nearest(&stranger, names.iter().copied()) {
        Some(near) => failure.advice(format!(
            "did you mean vm:{near}? --force publishes the message anyway"
        )),
        None => failure.advice("--force publishes the message anyway, for a VM that you will add"),
    })
}

/// The VMs of the config, and those that the broker lets in.
fn names_of(project: &BusProject) -> Vec<VmName> {
    let config = project.config.iter().flat_map(|config| &config.vms);
    let mut names: Vec<VmName> = config.map(|vm| vm.name.clone()).collect();
    let guests = records::load::<GuestsRecord>(&project.state.guests());
    let guests = guests.ok().flatten().unwrap_or_default().guests;
    for guest in guests {
        if !names.contains(&guest.name) {
            names.push(guest.name);
        }
    }
    names
}

/// The failure of an invalid payload on the command line, with how to quote it.
pub(super) fn not_json(payload: &str, why: &str) -> Failure {
    // The most frequent mistake is a word whose quotes the shell has removed.
    let shown: String = payload.chars().take(40).collect();
    let is_word = !payload.trim_start().starts_with(['{', '[', '"']) && payload.len() == shown.len();
    let failure = Failure::new(Exit::Usage, format!("{shown:?} isn't a JSON payload")).because(why);
    if is_word && !payload.is_empty() && !payload.contains(['\'', '"', '\\']) {
        failure.advice(format!(
            "text needs JSON quotes inside the shell's quotes: --payload '\"{payload}\"'"
        ))
    } else {
        failure
            .advice("put it into single quotes, as in --payload '{\"state\": \"ready\", \"load\": [0.1, 2]}'")
    }
}

/// The payload on one line if it is JSON and fits into a frame; else what is wrong.
pub(super) fn check_payload(bytes: &[u8], topic: &str, longest: usize) -> Result<String, String> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| format!("it isn't UTF-8 from byte {} on", error.valid_up_to() + 1))?;
    serde_json::from_str::<&RawValue>(text).map_err(|error| format!("invalid JSON: {}", in_words(&error)))?;
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
        reply: None,
        id,
    }
    .render(&mut empty);
    empty.len() - HEAD_BYTES + topic_bytes + payload.len()
}

#[cfg(test)]
#[path = "payload_tests.rs"]
mod tests;
