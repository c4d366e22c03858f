//! "Did you mean …?": the known word nearest to a mistyped one.
//!
//! Here: edit distance over short words, used for config keys and values, commands, flags, VM and
//! workspace names; and the one refusal of a VM that a project doesn't have. Not here: the other
//! sentences around it.

use crate::core::failure::{Exit, Failure};

/// Longest word, in characters, that is compared; a longer one is no typing mistake.
const MAX_CHARS: usize = 64;

/// The candidate nearest to `word`, if one is near enough to be what was meant: at most a third of
/// the longer word's letters differ, two transposed ones counting as one. Case doesn't count. Of
/// equally near ones the first wins.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = letters(word);
    if word.is_empty() || word.len() > MAX_CHARS {
        return None;
    }
    let mut best: Option<(usize, &str)> = None;
    for candidate in candidates {
        let other = letters(candidate);
        if other.len() > MAX_CHARS {
            continue;
        }
        let allowed = (word.len().max(other.len()) / 3).max(1);
        let distance = distance(&word, &other);
        if distance <= allowed && distance < other.len() && best.is_none_or(|(least, _)| distance < least) {
            best = Some((distance, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

/// Names in a message; more are counted.
const NAMES_SHOWN: usize = 8;

/// Refuses the name of a VM that is none of these, which are a project's.
pub fn no_such_vm(name: &str, known: &[&str]) -> Failure {
    let failure = Failure::new(Exit::Usage, format!("there is no VM {name:?} in this project"));
    if known.is_empty() {
        return failure
            .because("it has none")
            .advice("declare one under [[vms]] in castra.toml");
    }
    let mut names = known[..known.len().min(NAMES_SHOWN)].join(", ");
    if known.len() > NAMES_SHOWN {
        names.push_str(&format!(" and {} more", known.len() - NAMES_SHOWN));
    }
    let failure = failure.because(match known {
        [_] => format!("its only VM is {names}"),
        _ => format!("its VMs are {names}"),
    });
    match nearest(name, known.iter().copied()) {
        Some(near) => failure.advice(format!("did you mean `{near}`?")),
        None => failure.advice("`castra status` shows them"),
    }
}

fn letters(word: &str) -> Vec<char> {
    // `state-dir`, `stateDir` and `state_dir` are one typing habit apart, not three mistakes.
    word.chars()
        .map(|letter| {
            if letter == '-' {
                '_'
            } else {
                letter.to_ascii_lowercase()
            }
        })
        .collect()
}

/// Optimal string alignment: insertions, deletions, substitutions, neighbours swapped.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let changed = usize::from(a[i - 1] != b[j - 1]);
            row[j] = (above[j] + 1).min(row[j - 1] + 1).min(above[j - 1] + changed);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = above;
        above = row;
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_meant() {
        let keys = ["cpus", "memory", "persist", "port_forwards", "name", "overlay"];
        for (typed, meant) in [
            ("cpu", Some("cpus")),
            ("CPUS", Some("cpus")),
            ("memroy", Some("memory")),
            ("mem", None),
            ("port-forward", Some("port_forwards")),
            ("portforwards", Some("port_forwards")),
            ("persistent", Some("persist")),
            ("nmae", Some("name")),
            ("x", None),
            ("", None),
            ("something_else", None),
        ] {
            assert_eq!(nearest(typed, keys), meant, "{typed:?}");
        }
    }

    #[test]
    fn long_words_cost_nothing() {
        let long = "a".repeat(1 << 20);
        assert_eq!(nearest(&long, ["a"]), None);
        assert_eq!(nearest("a", [long.as_str(), "b"]), None);
    }
}
