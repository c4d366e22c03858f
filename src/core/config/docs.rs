//! Tests docs/CONFIG.md against the schema: every key is in it, and every example has the result
//! that the page shows. Compiled for tests only.

use std::fs;

use super::load::{Environment, parse_keys};
use crate::core::failure::Failure;
use crate::core::scratch::Scratch;

const DOCS: &str = include_str!("../../../docs/CONFIG.md");

/// The fenced blocks: the info string after the fence, and the text.
fn blocks() -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut open: Option<(String, String)> = None;
    for line in DOCS.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(info)) => open = Some((info.to_owned(), String::new())),
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some((_, text)), None) => {
                text.push_str(line);
                text.push('\n');
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "an open fence");
    blocks
}

/// What castra prints on a terminal.
fn printed(failure: &Failure) -> String {
    let mut text = format!("error: {}\n", failure.what);
    if let Some(why) = &failure.why {
        text += &format!("  because: {}\n", why.replace('\n', "\n    "));
    }
    if let Some(next) = &failure.next {
        text += &format!("  try: {next}\n");
    }
    text
}

#[test]
fn every_example_does_what_it_says_and_every_key_is_told() {
    let scratch = Scratch::new("config-docs");
    let environment = Environment {
        castra_home: Some(scratch.path("home")),
        user_home: Some(scratch.path("user")),
    };
    let path = scratch.path("castra.toml");
    let mut known = std::collections::BTreeSet::new();
    let blocks = blocks();
    for (index, (info, text)) in blocks.iter().enumerate() {
        let said = || blocks[index + 1].1.clone();
        let text = match info.as_str() {
            "toml" if !text.contains("[[vms]]") => format!("{text}\n[[vms]]\nname = \"web\"\n"),
            "toml,bootstrap" => {
                fs::write(scratch.path("bootstrap.toml"), text).unwrap();
                "[[vms]]\nname = \"web\"\nbootstrap.script = \"run.sh\"\n".to_owned()
            }
            _ => text.clone(),
        };
        let load = || {
            fs::write(&path, &text).unwrap();
            super::load_in(&path, &environment)
        };
        match info.as_str() {
            "toml" | "toml,bootstrap" => {
                let config = load().unwrap_or_else(|failure| panic!("{failure}\n{text}"));
                assert_eq!(config.warnings, Vec::<String>::new(), "{text}");
                known.extend(parse_keys(&path, &environment));
            }
            "toml,bad" => assert_eq!(printed(&load().unwrap_err()), said(), "{text}"),
            "toml,odd" => assert_eq!(load().unwrap().warnings.join("\n") + "\n", said(), "{text}"),
            "text" => {}
            other => panic!("a block of {other:?}"),
        }
    }

    assert!(known.len() > 60, "{known:?}");
    for full in known {
        let (file, full) = full.split_once(':').unwrap_or(("", &full));
        let (section, key) = full.rsplit_once('.').unwrap_or(("", full));
        // Replicas have the keys of VMs, and VMs those of [bootstrap].
        let section = match section.strip_prefix("vms.instances") {
            Some(rest) if key != "id" => format!("vms{rest}"),
            _ => section.to_owned(),
        };
        let is_told = |heading: &str| {
            let start = DOCS
                .find(heading)
                .unwrap_or_else(|| panic!("no heading {heading} for {full}"));
            let text = &DOCS[start + heading.len()..];
            let end = text
                .find("\n## ")
                .into_iter()
                .chain(text.find("\n### "))
                .min()
                .unwrap_or(text.len());
            text[..end].contains(&format!("| `{key}` |"))
        };
        let told = match (file, section.as_str()) {
            ("bootstrap.toml", "") => is_told("\n## bootstrap.toml\n"),
            ("bootstrap.toml", _) => {
                DOCS[DOCS.find("\n## bootstrap.toml\n").unwrap()..].contains(&format!("`{key}`"))
            }
            (_, "") => is_table(key) || is_told("\n## The root\n"),
            (_, "vms") => is_told("\n## `[[vms]]`\n"),
            (_, "vms.bootstrap") => is_told("\n### `[vms.bootstrap]`\n") || is_told("\n## `[bootstrap]`\n"),
            (_, section) if section.starts_with("vms.") => is_told(&format!("\n### `[[{section}]]`\n")),
            (_, section) => is_told(&format!("\n## `[{section}]`\n")),
        };
        assert!(told, "{full} is not in docs/CONFIG.md");
    }
}

/// Each table at the root has its own heading.
fn is_table(key: &str) -> bool {
    DOCS.contains(&format!("\n## `[{key}]`\n")) || DOCS.contains(&format!("\n## `[[{key}]]`\n"))
}
