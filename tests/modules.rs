//! The order of core's modules, as the table in docs/ARCHITECTURE.md has it: each uses only those above it.
//!
//! Here: that order, file names that are used twice, and files that the page names. Not here: what any module does.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Names that several files may have, and what these files have in common.
const SAME_MEANING: &[(&str, &str)] = &[
    ("mod.rs", "a module's own file"),
    ("tests.rs", "a module's unit tests"),
    (
        "broker_pipe.rs",
        "QEMU's pipe to the broker: starting it, and being it",
    ),
    (
        "bus.rs",
        "the bus: its command, and the tests of the broker's part",
    ),
    ("completions.rs", "completions: the command, and what it prints"),
    ("context.rs", "what the parts of one command share"),
    ("error.rs", "a module's errors"),
    ("failure.rs", "failures: the type, and its words"),
    (
        "freshness.rs",
        "whether a guest was heard recently: the rule, and the broker's use of it",
    ),
    (
        "lost.rs",
        "QEMUs without a state root: finding them, and ending them",
    ),
];

#[test]
fn modules_use_only_those_before_them() {
    let order = order();
    let place = |module: &str| order.iter().position(|other| other == module);
    let mut wrong = Vec::new();
    for module in declared() {
        if place(&module).is_none() {
            wrong.push(format!(
                "docs/ARCHITECTURE.md: the table has no row for core::{module}"
            ));
        }
    }
    for (file, text) in files("src/core") {
        let below_core: Vec<&str> = file.strip_prefix("src/core/").unwrap().split('/').collect();
        let module = below_core[0].trim_end_matches(".rs");
        if module == "mod" || is_test(&file) {
            continue;
        }
        // `super::` of a module's own file is core, `super::super::` that of a file below it.
        let depth = below_core.len() - usize::from(below_core.ends_with(&["mod.rs"]));
        let code = product_code(&text);
        for core in ["crate::core::".to_owned(), "super::".repeat(depth)] {
            for (at, _) in code.match_indices(&core) {
                if code[..at].ends_with("super::") {
                    continue;
                }
                let behind = names_behind(&code[at + core.len()..]);
                for used in behind.into_iter().filter(|used| used != module) {
                    let is_below =
                        place(&used).is_some_and(|used| place(module).is_none_or(|own| own < used));
                    if is_below {
                        let line = code[..at].matches('\n').count();
                        let said = text.lines().nth(line).unwrap_or_default().trim();
                        wrong.push(format!("{file}:{}: {module} uses {used}: {said}", line + 1));
                    }
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "a module of core uses only those above it in docs/ARCHITECTURE.md's table:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn files_have_names_of_their_own() {
    let mut by_name: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (file, _) in files("src") {
        let name = file.rsplit('/').next().unwrap().to_owned();
        by_name.entry(name).or_default().push(file);
    }
    for (name, files) in by_name {
        let listed = SAME_MEANING.iter().any(|(same, _)| *same == name);
        // A command: what it does, and its words.
        let command = ["src/app/", "src/core/operations/"].map(|dir| format!("{dir}{name}"));
        assert!(
            files.len() == 1 || listed || files == command,
            "give these files different names, or say in SAME_MEANING what they have in common: {files:?}"
        );
    }
}

#[test]
fn files_that_the_page_names_exist() {
    let page = fs::read_to_string(root().join("docs/ARCHITECTURE.md")).unwrap();
    let in_code = page
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| word.contains('/'));
    let top = ["src/", "docs/", "tests/", "scripts/"];
    let named: Vec<&str> = in_code
        .filter(|word| top.iter().any(|top| word.starts_with(top)))
        .collect();
    let is_new = |word: &str| page.contains(&format!("*`{word}`*"));
    let missing: Vec<_> = named
        .iter()
        .filter(|word| !is_new(word) && !root().join(word).exists())
        .collect();
    assert!(named.len() > 30, "{named:?}");
    assert!(
        missing.is_empty(),
        "docs/ARCHITECTURE.md names files that aren't there: {missing:?}"
    );
}

/// The modules of core in the order of the table.
fn order() -> Vec<String> {
    let table = fs::read_to_string(root().join("docs/ARCHITECTURE.md")).unwrap();
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `core::"));
    rows.map(|row| row.split('`').next().unwrap().to_owned())
        .collect()
}

/// The modules that core has.
fn declared() -> Vec<String> {
    let text = fs::read_to_string(root().join("src/core/mod.rs")).unwrap();
    let lines = text
        .lines()
        .filter_map(|line| line.strip_suffix(';')?.split_once("mod "));
    lines.map(|(_, name)| name.to_owned()).collect()
}

/// The modules that a path or a `use` names right behind `core::`.
fn names_behind(text: &str) -> Vec<String> {
    let word = |text: &str| {
        text.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect::<String>()
    };
    let Some(list) = text.strip_prefix('{') else {
        return vec![word(text)];
    };
    let mut names = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, letter) in list.char_indices() {
        match letter {
            '{' => depth += 1,
            ',' | '}' if depth == 0 => {
                names.push(word(list[start..at].trim_start()));
                start = at + 1;
                if letter == '}' {
                    break;
                }
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    names
}

/// The text without comments and without what is compiled for tests only, line by line.
fn product_code(text: &str) -> String {
    let mut code = String::new();
    let mut test_item: Option<&str> = None;
    for line in text.lines() {
        let indent = &line[..line.len() - line.trim_start().len()];
        if let Some(of_item) = test_item {
            if indent == of_item && line.ends_with([';', '}', ',']) {
                test_item = None;
            }
        } else if line.trim_start() == "#[cfg(test)]" {
            test_item = Some(indent);
        } else {
            code.push_str(line.split("//").next().unwrap_or_default());
        }
        code.push('\n');
    }
    code
}

fn is_test(file: &str) -> bool {
    let of_tests = |part: &str| ["tests", "simulation"].contains(&part) || part.ends_with("tests.rs");
    file.split('/').any(of_tests)
}

/// All Rust files below a directory, by name, with their texts.
fn files(dir: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut dirs = vec![root().join(dir)];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                found.push((name, fs::read_to_string(path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}
