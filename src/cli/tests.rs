//! The table's invariants, the parser over valid and invalid lines, docs/CLI.md.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use super::help::WIDTH;
use super::markdown::markdown;
use super::raw::{ColorChoice, HelpKind, Raw};
use super::table::{Arity, COMMANDS, Command, Complete, FLAGS, GROUPS, Scope, Section, Shell};
use super::{help, overview, pages, parse};

fn line(words: &str) -> Vec<OsString> {
    words.split_whitespace().map(OsString::from).collect()
}

fn accepted(words: &str) -> Raw {
    parse(line(words)).unwrap_or_else(|refused| panic!("{words}: {}", refused.failure))
}

fn refused(words: &str) -> String {
    match parse(line(words)) {
        Ok(raw) => panic!("{words} was accepted: {raw:?}"),
        Err(refused) => {
            assert_eq!(refused.failure.exit.code(), 64, "{words}");
            refused.failure.to_string()
        }
    }
}

/// Each hint names a command that is there, and no habit hides a command or is one letter from it by
/// chance alone.
#[test]
fn habits_of_other_tools_lead_to_commands() {
    use super::table::other_tools::{HABITS, habit};
    let mut seen = std::collections::BTreeSet::new();
    for (words, command, _) in HABITS {
        assert!(seen.insert(*words), "{words} is there twice");
        assert!(super::table::by_words(words).is_none(), "{words} is a command");
        let args: Vec<OsString> = words.split(' ').map(OsString::from).collect();
        let refused = parse(args).expect_err(words);
        assert_eq!(refused.failure.exit, castra::core::failure::Exit::Usage);
        assert_eq!(refused.failure.next, habit(words), "{words}");
        // What it names parses, flags and all.
        let args: Vec<OsString> = command.split(' ').skip(1).map(OsString::from).collect();
        let args = match *command {
            "castra cp" => vec!["cp".into(), "a".into(), "web:b".into()],
            "castra harness run" => vec!["harness".into(), "run".into(), "--".into(), "x".into()],
            "castra bus subscribe" => vec!["bus".into(), "subscribe".into(), "x".into()],
            _ => args,
        };
        if let Err(refused) = parse(args) {
            panic!("{words}: {command}: {}", refused.failure);
        }
    }
    for (words, part) in [
        ("start", "castra up"),
        ("stop", "castra down"),
        ("LS", "castra status"),
        ("destroy", "discards the disks"),
        ("run", "castra exec VM -- COMMAND"),
        ("validate", "castra up --plan"),
        ("bus pub", "castra bus publish"),
    ] {
        assert!(habit(words).is_some_and(|hint| hint.contains(part)), "{words}");
    }
    // What is merely misspelt is still answered with the nearest command.
    assert_eq!(habit("stauts"), None);
}

#[test]
fn every_name_is_there_once() {
    let mut seen = HashSet::new();
    for row in COMMANDS {
        assert!(seen.insert(row.words), "{} twice", row.words);
        assert_eq!(row.command.row().words, row.words);
    }
    let mut seen = HashSet::new();
    for flag in FLAGS {
        let commands: Vec<Option<Command>> = match flag.scope {
            Scope::Only(commands) => commands.iter().copied().map(Some).collect(),
            Scope::Global => vec![None],
        };
        for command in commands {
            let name = (command, flag.long.to_owned());
            assert!(seen.insert(name), "--{} twice for {command:?}", flag.long);
        }
        if let Some(short) = flag.short {
            assert!(seen.insert((None, short.to_string())), "-{short} twice");
        }
    }
}

#[test]
fn what_rows_say_fits_and_is_said() {
    for row in COMMANDS {
        assert!(
            row.brief.len() <= WIDTH - 16,
            "{}: the brief is too long",
            row.words
        );
        assert!(
            !row.brief.ends_with('.') && !row.manual.is_empty(),
            "{}",
            row.words
        );
        if let [group, _] = row.words.split(' ').collect::<Vec<_>>()[..] {
            assert!(
                GROUPS.iter().any(|(name, _)| *name == group),
                "{group} has no row"
            );
        }
        let rests = row
            .operands
            .iter()
            .rev()
            .skip(1)
            .filter(|operand| !matches!(operand.arity, Arity::One | Arity::Optional | Arity::Many));
        assert_eq!(
            rests.count(),
            0,
            "{}: only the last operand may repeat",
            row.words
        );
    }
    for flag in FLAGS {
        assert!(
            flag.brief.len() <= WIDTH,
            "--{}: the brief is too long",
            flag.long
        );
        assert!(!flag.brief.ends_with('.'), "--{}", flag.long);
        if let Some(placeholder) = flag.value {
            assert!(
                !placeholder.is_empty() && placeholder.to_uppercase() == placeholder,
                "--{}",
                flag.long
            );
        }
        if flag.complete != Complete::Nothing {
            assert!(
                flag.value.is_some(),
                "--{} completes a value it doesn't take",
                flag.long
            );
        }
        if let Scope::Only(commands) = flag.scope {
            assert!(!commands.is_empty(), "--{} belongs to nobody", flag.long);
        }
    }
}

#[test]
fn every_flag_is_kept() {
    for flag in FLAGS {
        let mut raw = Raw::default();
        let refused = (flag.apply)(&mut raw, "1".into()).is_err();
        assert!(refused || raw != Raw::default(), "--{} does nothing", flag.long);
    }
}

#[test]
fn help_keeps_to_its_width_and_shows_every_flag() {
    let check = |name: &str, text: &str| {
        for line in text.lines() {
            let example = line.starts_with("  castra ") || line.starts_with("  tar ");
            assert!(line.chars().count() <= WIDTH || example, "{name}: {line}");
            assert!(!line.ends_with(' '), "{name}: {line:?}");
        }
    };
    for kind in [HelpKind::Short, HelpKind::Long] {
        for row in COMMANDS {
            let text = help(row.command, kind);
            check(row.words, &text);
            for flag in row.flags() {
                assert!(
                    text.contains(&format!("--{}", flag.long)),
                    "{} --{}",
                    row.words,
                    flag.long
                );
            }
        }
        let text = overview(None, kind);
        check("castra", &text);
        for row in COMMANDS {
            let listed = text
                .lines()
                .any(|line| line.trim_start().starts_with(&format!("{} ", row.words)));
            assert_eq!(listed, row.section != Section::Hidden, "{}", row.words);
        }
    }
    for (name, page) in pages() {
        assert!(page.is_ascii(), "{name}: some roffs know nothing else");
    }
    let groups: HashSet<&str> = GROUPS.iter().map(|(group, _)| *group).collect();
    assert_eq!(groups.len(), GROUPS.len(), "a group is there twice");
}

#[test]
fn lines_that_are_understood() {
    assert_eq!(accepted("--json status --all").command, Some(Command::Status));
    assert!(accepted("status --all").all && accepted("status --json").json);
    let up = accepted("up web-0 --bootstrap skip,db=always --bootstrap web-0=auto db");
    assert_eq!(up.bootstrap, ["skip", "db=always", "web-0=auto"]);
    assert_eq!(up.operands, ["web-0", "db"]);
    let down = accepted("--quiet down --graceful-wait-secs=0 --sigterm-wait-secs 3");
    assert_eq!(down.graceful_wait, Some(Duration::ZERO));
    assert_eq!(down.sigterm_wait, Some(Duration::from_secs(3)));
    assert!(down.quiet);
    let exec = accepted("exec db -- ls -la --json");
    assert_eq!(exec.operands, ["db", "ls", "-la", "--json"]);
    assert!(!exec.json, "what stands after -- is the guest's");
    assert_eq!(accepted("image build").command, Some(Command::ImageBuild));
    assert_eq!(accepted("completions zsh").shell, Some(Shell::Zsh));
    assert_eq!(accepted("--color never man").color, ColorChoice::Never);
    assert_eq!(accepted("-h").help, Some(HelpKind::Short));
    assert_eq!(accepted("up --help").help, Some(HelpKind::Long));
    assert_eq!(accepted("help down").command, Some(Command::Down));
    assert_eq!(accepted("help image").group, Some("image"));
    assert!(accepted("--version").version && accepted("-V").version);
    assert!(accepted("").first_steps && !accepted("up").first_steps);
    assert!(accepted("--plan up").plan, "a flag may come before its command");
}

#[test]
fn lines_that_are_refused_with_the_nearest_word() {
    for (words, expected) in [
        ("--json", "no command given"),
        ("stauts", "castra status, the nearest known word"),
        ("image biuld", "castra image build, the nearest known word"),
        ("image", "it is one of build, list, path"),
        ("up --borker-only", "--broker-only, the nearest known word"),
        ("status --jsn", "--json, the nearest known word"),
        (
            "status --plan",
            "`castra status` has no flag --plan: it belongs to `castra up`",
        ),
        ("--plan status", "`castra status` has no flag --plan"),
        ("up --config", "--config needs a value: --config PATH"),
        ("up --json=yes", "--json takes no value"),
        ("up --bootstrap sometimes", "use auto, skip or always"),
        ("up --bootstrap web=", "use auto, skip or always"),
        ("up --bootstrap =auto", "use auto, skip or always"),
        ("down --graceful-wait-secs soon", "whole number of seconds"),
        ("down --graceful-wait-secs -1", "whole number of seconds"),
        ("down --graceful-wait-secs 99999999", "whole number of seconds"),
        ("status web-0", "`castra status` can't take \"web-0\""),
        ("exec", "`castra exec` needs VM"),
        ("exec web-0", "`castra exec` needs COMMAND"),
        ("ssh web-0 ls -l", "with `--` before the guest's command"),
        ("completions", "`castra completions` needs SHELL"),
        ("completions fsih", "castra completions fish"),
        (
            "logs --source kernel",
            "use serial, qemu, bootstrap, broker or bus",
        ),
        ("--color sometimes up", "use auto, always or never"),
        ("-x up", "there is no flag -x"),
        ("broker-pip 1", "there is no command"),
    ] {
        let text = refused(words);
        assert!(text.contains(expected), "{words}: {text}");
    }
    assert!(
        !refused("broker-pip 1").contains("castra pipe"),
        "hidden commands are not suggested"
    );
}

#[test]
fn arguments_that_are_no_text_are_kept_or_refused() {
    use std::os::unix::ffi::OsStringExt;
    let odd = OsString::from_vec(vec![b'x', 0xff]);
    let raw = parse(vec!["exec".into(), "db".into(), "--".into(), odd.clone()]).unwrap();
    assert_eq!(raw.operands[1], odd);
    let raw = parse(vec!["up".into(), "--config".into(), odd.clone()]).unwrap();
    assert_eq!(raw.config.unwrap().as_os_str(), odd);
    assert!(parse(vec!["--workspace".into(), odd, "up".into()]).is_err());
}

#[test]
fn a_refusal_is_json_wherever_the_flag_stands() {
    for (words, json) in [
        ("--json stauts", true),
        ("stauts --json", true),
        ("stauts -- --json", false),
        ("stauts", false),
    ] {
        assert_eq!(parse(line(words)).unwrap_err().raw.json, json, "{words}");
    }
}

#[test]
fn docs_cli_md_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/CLI.md");
    let page = markdown();
    if std::env::var_os("CASTRA_BLESS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == page,
        "docs/CLI.md is not what the table says; CASTRA_BLESS=1 cargo test rewrites it"
    );
}
