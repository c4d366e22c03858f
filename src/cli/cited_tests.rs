//! README.md and docs/*.md against the table: every command and flag they cite is there.
//! Compiled for tests only.

use std::fs;
use std::path::{Path, PathBuf};

use super::table::{Command, FLAGS, Flag, GROUPS, by_words};

/// README.md and every page of docs/.
fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pages = fs::read_dir(root.join("docs")).expect("docs/ is there").flatten();
    let mut found: Vec<PathBuf> = pages
        .map(|page| page.path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "md"))
        .collect();
    found.push(root.join("README.md"));
    found.sort();
    found
}

/// The words behind each `castra ` that a page tells to type: at the beginning of a code span, of a line of
/// shell or behind a prompt, and inside of `$(…)`, pipes and loops of such a line.
fn cited(page: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut prose = String::new();
    let mut fence: Option<&str> = None;
    for line in page.lines() {
        match (fence, line.strip_prefix("```")) {
            (None, Some(info)) => fence = Some(info),
            (Some(_), Some(_)) => fence = None,
            (Some("sh"), None) => lines.push(line.trim_start().to_owned()),
            (Some(_), None) => {
                lines.extend(line.strip_prefix("$ ").map(str::to_owned));
                prose.push_str(line);
                prose.push('\n');
            }
            (None, None) => {
                prose.push_str(line);
                prose.push(' ');
            }
        }
    }
    let mut found = Vec::new();
    for line in &lines {
        let line = line.split("  #").next().unwrap_or(line).trim_end();
        let mut rest = line;
        while let Some(at) = rest.find("castra ") {
            let before = &rest[..at];
            let is_typed = before.is_empty()
                || ["$(", "| ", "if ", "until ", "&& ", "; "]
                    .iter()
                    .any(|lead| before.ends_with(lead));
            rest = &rest[at + "castra ".len()..];
            if is_typed {
                found.push(rest.to_owned());
            }
        }
    }
    for rest in prose.split("`castra ").skip(1) {
        found.push(rest.split('`').next().unwrap_or(rest).to_owned());
    }
    found
}

fn flag_named(word: &str, command: Option<Command>) -> Option<&'static Flag> {
    let name = word.split('=').next().unwrap_or(word);
    FLAGS
        .iter()
        .filter(|flag| flag.takes(command))
        .find(|flag| match name.strip_prefix("--") {
            Some(long) => flag.long == long,
            None => flag.short.is_some_and(|short| name == format!("-{short}")),
        })
}

/// What is wrong with the words behind `castra `.
fn mistake(cited: &str) -> Option<String> {
    let stops = |c: char| "|;)<>&'\"\n".contains(c);
    let mut words = cited
        .split(stops)
        .next()
        .unwrap_or("")
        .split_whitespace()
        .map(|word| word.trim_matches(|c: char| "[],.…".contains(c)))
        .peekable();
    // Global flags come before the command, too.
    while let Some(word) = words.next_if(|word| word.starts_with('-')) {
        match flag_named(word, None) {
            Some(flag) if flag.value.is_some() && !word.contains('=') => {
                words.next();
            }
            Some(_) => {}
            None => return Some(format!("no global flag {word}")),
        }
    }
    let first = words.next()?;
    // `castra [FLAGS]`, `castra COMMAND`
    if first.chars().all(|c| c.is_ascii_uppercase()) {
        return None;
    }
    let command = if GROUPS.iter().any(|(name, _)| *name == first) {
        let second = words.next_if(|word| !word.starts_with('-'))?;
        format!("{first} {second}")
    } else {
        first.to_owned()
    };
    let Some(row) = by_words(&command) else {
        return Some(format!("no command `{command}`"));
    };
    words
        .take_while(|word| *word != "--")
        .filter(|word| word.starts_with('-') && word.len() > 1)
        .find(|word| flag_named(word, Some(row.command)).is_none())
        .map(|word| format!("`{command}` takes no {word}"))
}

#[test]
fn every_command_and_flag_that_the_documents_cite_is_there() {
    let mut wrong = Vec::new();
    let mut commands = 0;
    for path in documents() {
        let page = fs::read_to_string(&path).expect("a page can be read");
        for words in cited(&page) {
            commands += 1;
            wrong.extend(mistake(&words).map(|text| format!("{}: {text}: castra {words}", path.display())));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(commands > 150, "only {commands} are found");
}

#[test]
fn what_is_cited_wrongly_is_found() {
    for words in [
        "up --plan",
        "--workspace ID status --all",
        "-q up",
        "bus tail --no-follow --vm web",
        "bus --help",
        "exec web -- ls --color",
        "image path [--mounts]",
        "cp 'web:/var/*' logs/",
        "--version",
        "harness run [FLAGS] -- PROMPT…",
    ] {
        assert_eq!(mistake(words), None, "{words}");
    }
    for words in [
        "start",
        "up --plam",
        "bus listen",
        "--wrokspace ID status",
        "status --wide --tail 3",
        "down -Z",
    ] {
        assert!(mistake(words).is_some(), "{words}");
    }
    let page = "Say `castra up --x` or\n`castra\ndown`.\n```console\n$ castra a\nnext: `castra b`\ncastra c\n```\n\
                ```sh\nif castra d; then x=$(castra e); fi\ncastra f | castra g   # castra h\n```\n";
    let expected = [
        "a",
        "d; then x=$(castra e); fi",
        "e); fi",
        "f | castra g",
        "g",
        "up --x",
        "down",
        "b",
    ];
    assert_eq!(cited(page), expected);
}

/// docs/README.md has a line for each page, and README.md leads to it.
#[test]
fn the_index_names_every_page() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let index = fs::read_to_string(root.join("docs/README.md")).expect("docs/README.md is there");
    for path in documents() {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name in UTF-8");
        assert!(
            name == "README.md" || index.contains(&format!("[{name}]({name})")),
            "docs/README.md says nothing of {name}"
        );
    }
    let front = fs::read_to_string(root.join("README.md")).expect("README.md is there");
    assert!(front.contains("(docs/README.md)"));
}
