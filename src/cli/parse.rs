//! argv to [`Raw`].
//!
//! Here: finding the command, looking up flags, counting operands, suggestions for what isn't
//! known. Not here: the table, or what anything means.

use std::ffi::{OsStr, OsString};

use castra::core::failure::{Exit, Failure};
use castra::core::nearest::nearest;
use lexopt::Arg;

use super::raw::{HelpKind, Raw};
use super::table::other_tools::habit;
use super::table::{self, Arity, COMMANDS, Command, CommandRow, FLAGS, Flag, GROUPS, Scope, Section, Shell};

/// A command line that castra doesn't understand, and how its refusal is to be shown.
#[derive(Debug)]
pub struct Refused {
    /// What is wrong.
    pub failure: Failure,
    /// What was understood before; `json`, `quiet` and `color` of it count.
    pub raw: Box<Raw>,
}

/// Reads a command line, program name left out.
pub fn parse(args: Vec<OsString>) -> Result<Raw, Refused> {
    let mut raw = Raw::default();
    // Asked for before the first error or after it, the refusal has to be JSON.
    let json = args
        .iter()
        .take_while(|arg| *arg != "--")
        .any(|arg| arg == "--json");
    let after_dashes = args
        .iter()
        .position(|arg| arg == "--")
        .map(|at| args.len() - at - 1);
    match read(&mut raw, args) {
        Ok(()) => {
            raw.all_after_dashes = after_dashes == Some(raw.operands.len());
            Ok(raw)
        }
        Err(failure) => {
            raw.json = json;
            Err(Refused {
                failure,
                raw: Box::new(raw),
            })
        }
    }
}

fn read(raw: &mut Raw, args: Vec<OsString>) -> Result<(), Failure> {
    let is_bare = args.is_empty();
    let mut parser = lexopt::Parser::from_args(args);
    // `castra help up` is what many type first.
    let mut asked_help = false;
    let mut unplaced: Option<(&'static Flag, OsString)> = None;
    loop {
        let arg = match parser.next() {
            Ok(Some(arg)) => arg,
            Ok(None) => break,
            Err(lexopt::Error::UnexpectedValue { option, .. }) => {
                return Err(usage(format!("{option} takes no value"), raw.command));
            }
            Err(error) => return Err(usage(error.to_string(), raw.command)),
        };
        if let Arg::Value(word) = arg {
            match (raw.command, raw.group) {
                (Some(_), _) => raw.operands.push(word),
                (None, None) if word == "help" && !asked_help => asked_help = true,
                (None, None) => place_word(raw, &word)?,
                (None, Some(group)) => place_in_group(raw, group, &word)?,
            }
            continue;
        }
        let short = matches!(arg, Arg::Short(_));
        let flag = lookup(&arg, raw)?;
        if flag.long == "help" {
            raw.help = Some(if short { HelpKind::Short } else { HelpKind::Long });
            return Ok(());
        }
        let value = match flag.value {
            None => OsString::new(),
            Some(placeholder) => parser.value().map_err(|_| {
                usage(
                    format!("--{} needs a value: --{} {placeholder}", flag.long, flag.long),
                    raw.command,
                )
            })?,
        };
        apply(raw, flag, value)?;
        if !flag.takes(raw.command) && unplaced.is_none() {
            unplaced = Some((flag, OsString::new()));
        }
    }
    if raw.version {
        return Ok(());
    }
    if asked_help {
        raw.help = Some(HelpKind::Long);
        return Ok(());
    }
    if let Some((flag, _)) = unplaced.filter(|(flag, _)| !flag.takes(raw.command)) {
        return Err(misplaced(flag, raw.command));
    }
    match (raw.command, raw.group) {
        (Some(command), _) => check_operands(raw, command.row()),
        (None, Some(group)) => {
            let words = in_group(group).collect::<Vec<_>>().join(", ");
            Err(
                Failure::new(Exit::Usage, format!("`castra {group}` needs one more word"))
                    .because(format!("it is one of {words}"))
                    .advice(format!("castra {group} --help")),
            )
        }
        (None, None) if is_bare => {
            raw.first_steps = true;
            Ok(())
        }
        (None, None) => Err(Failure::new(Exit::Usage, "no command given").advice("castra --help")),
    }
}

fn apply(raw: &mut Raw, flag: &Flag, value: OsString) -> Result<(), Failure> {
    let shown = value.to_string_lossy().into_owned();
    (flag.apply)(raw, value).map_err(|table::BadValue(expected)| {
        usage(
            format!("--{} can't be {shown:?}: {expected}", flag.long),
            raw.command,
        )
    })
}

fn place_word(raw: &mut Raw, word: &OsStr) -> Result<(), Failure> {
    let text = word.to_string_lossy();
    if let Some(row) = table::by_words(&text) {
        raw.command = Some(row.command);
        return Ok(());
    }
    if let Some((group, _)) = GROUPS.iter().find(|(group, _)| *group == text) {
        raw.group = Some(group);
        return Ok(());
    }
    if let Some(habit) = habit(&text) {
        return Err(Failure::new(Exit::Usage, format!("there is no command {text:?}")).advice(habit));
    }
    let known = listed()
        .filter(|row| !row.words.contains(' '))
        .map(|row| row.words)
        .chain(GROUPS.iter().map(|(group, _)| *group));
    Err(unknown(
        &format!("there is no command {text:?}"),
        nearest(&text, known).map(|near| format!("castra {near}")),
        "castra --help",
    ))
}

fn place_in_group(raw: &mut Raw, group: &'static str, word: &OsStr) -> Result<(), Failure> {
    let text = word.to_string_lossy();
    if let Some(row) = table::by_words(&format!("{group} {text}")) {
        raw.command = Some(row.command);
        return Ok(());
    }
    if let Some(habit) = habit(&format!("{group} {text}")) {
        let what = format!("`castra {group}` has no command {text:?}");
        return Err(Failure::new(Exit::Usage, what).advice(habit));
    }
    Err(unknown(
        &format!("`castra {group}` has no command {text:?}"),
        nearest(&text, in_group(group)).map(|near| format!("castra {group} {near}")),
        &format!("castra {group} --help"),
    ))
}

/// The command that these words name, as `castra man` takes them; it has pages of these names, too.
pub fn listed_command(
    words: &str,
    others: impl Iterator<Item = &'static str>,
) -> Result<&'static CommandRow, Failure> {
    let found = listed().find(|row| row.words == words);
    found.ok_or_else(|| {
        unknown(
            &format!("there is no command or page {words:?}"),
            nearest(words, listed().map(|row| row.words).chain(others))
                .map(|near| format!("castra man {near}")),
            "castra man --help",
        )
    })
}

fn in_group(group: &'static str) -> impl Iterator<Item = &'static str> {
    listed().filter_map(move |row| row.words.strip_prefix(group)?.strip_prefix(' '))
}

fn listed() -> impl Iterator<Item = &'static CommandRow> {
    COMMANDS.iter().filter(|row| row.section != Section::Hidden)
}

/// The flag typed. Before the command any flag may stand; whether the command takes it is asked
/// at the end.
fn lookup(arg: &Arg<'_>, raw: &Raw) -> Result<&'static Flag, Failure> {
    let (typed, found) = match arg {
        Arg::Short(letter) => (
            format!("-{letter}"),
            FLAGS.iter().find(|flag| flag.short == Some(*letter)),
        ),
        Arg::Long(word) => {
            // Some names mean different things to different commands.
            let mut named = FLAGS.iter().filter(|flag| flag.long == *word);
            let first = named.clone().next();
            let own = named.find(|flag| raw.command.is_some() && flag.takes(raw.command));
            (format!("--{word}"), own.or(first))
        }
        Arg::Value(_) => unreachable!("operands are placed before flags are looked up"),
    };
    let Some(flag) = found else {
        let known = FLAGS
            .iter()
            .filter(|flag| raw.command.is_none() || flag.takes(raw.command))
            .map(|flag| flag.long);
        let near = match arg {
            Arg::Long(word) => nearest(word, known),
            _ => None,
        };
        let help = raw.command.map_or("castra --help".to_owned(), help_of);
        // `castra ssh web ls -l`: the flag was meant for the guest.
        if matches!(raw.command, Some(Command::Ssh | Command::Exec)) && !raw.operands.is_empty() {
            let words = raw.command.map_or("ssh", |command| command.row().words);
            return Err(unknown(
                &format!("there is no flag {typed}"),
                None,
                &format!("castra {words} VM -- COMMAND, with `--` before the guest's command"),
            ));
        }
        return Err(unknown(
            &format!("there is no flag {typed}"),
            near.map(|near| format!("--{near}")),
            &help,
        ));
    };
    if raw.command.is_some() && !flag.takes(raw.command) {
        return Err(misplaced(flag, raw.command));
    }
    Ok(flag)
}

fn misplaced(flag: &Flag, command: Option<Command>) -> Failure {
    let owners = match flag.scope {
        Scope::Global => String::new(),
        Scope::Only(commands) => commands
            .iter()
            .map(|command| format!("`castra {}`", command.row().words))
            .collect::<Vec<_>>()
            .join(" and "),
    };
    let what = match command {
        Some(command) => format!("`castra {}` has no flag --{}", command.row().words, flag.long),
        None => format!("--{} needs a command", flag.long),
    };
    Failure::new(Exit::Usage, what)
        .because(format!("it belongs to {owners}"))
        .advice(command.map_or("castra --help".to_owned(), help_of))
}

fn check_operands(raw: &mut Raw, row: &'static CommandRow) -> Result<(), Failure> {
    let ones = row
        .operands
        .iter()
        .filter(|operand| operand.arity == Arity::One)
        .count();
    let last = row.operands.last().map(|operand| operand.arity);
    let many = row.operands.iter().any(|operand| operand.arity == Arity::Many);
    let least = ones + usize::from(many || last == Some(Arity::Rest));
    let most = match last {
        Some(Arity::One) if many => usize::MAX,
        None | Some(Arity::One) => ones,
        Some(Arity::Optional) => row.operands.len(),
        Some(Arity::Any | Arity::Many | Arity::Rest | Arity::OptionalRest) => usize::MAX,
    };
    if raw.operands.len() < least {
        let missing = row.operands[raw.operands.len()];
        return Err(usage(
            format!("`castra {}` needs {}", row.words, missing.placeholder),
            Some(row.command),
        ));
    }
    if raw.operands.len() > most {
        let extra = raw.operands[most].to_string_lossy().into_owned();
        if matches!(row.command, Command::BusPublish | Command::BusRequest) {
            return Err(usage(
                format!(
                    "`castra {}` takes one word as payload, and {extra:?} is one more",
                    row.words
                ),
                Some(row.command),
            )
            .because("the shell cuts at spaces and takes quotes away")
            .advice("put the payload in single quotes, such as '{\"ok\": true}' or '\"some text\"'"));
        }
        return Err(usage(
            format!("`castra {}` can't take {extra:?}", row.words),
            Some(row.command),
        ));
    }
    if row.command == Command::Completions {
        raw.shell = Some(shell(&raw.operands[0])?);
    }
    Ok(())
}

fn shell(word: &OsStr) -> Result<Shell, Failure> {
    let text = word.to_string_lossy();
    match text.as_ref() {
        "bash" => Ok(Shell::Bash),
        "zsh" => Ok(Shell::Zsh),
        "fish" => Ok(Shell::Fish),
        _ => Err(unknown(
            &format!("there are no completions for {text:?}"),
            nearest(&text, table::SHELLS.iter().copied()).map(|near| format!("castra completions {near}")),
            "castra completions bash, zsh or fish",
        )),
    }
}

fn help_of(command: Command) -> String {
    format!("castra {} --help", command.row().words)
}

fn usage(what: String, command: Option<Command>) -> Failure {
    match command {
        Some(command) => Failure::new(Exit::Usage, what).advice(format!(
            "{}, or {}",
            command.row().usage(),
            help_of(command)
        )),
        None => Failure::new(Exit::Usage, what).advice("castra --help"),
    }
}

fn unknown(what: &str, near: Option<String>, help: &str) -> Failure {
    let failure = Failure::new(Exit::Usage, what);
    match near {
        Some(near) => failure.advice(format!("{near}, the nearest known word; or {help}")),
        None => failure.advice(help),
    }
}
