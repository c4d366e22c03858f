//! Completions for bash, zsh and fish, from the table.
//!
//! Here: three generators. VM names come from `castra vm-names`, which reads the config at the
//! moment of the key press. Not here: installing them (the Makefile).

use std::collections::BTreeMap;
use std::fmt::Write;

use castra::core::harness::agent_names;

use super::table::{COMMANDS, CommandRow, Complete, FLAGS, Flag, GROUPS, Scope, Section, Shell};

/// The script for one shell.
pub fn completions(shell: Shell) -> String {
    match shell {
        Shell::Bash => bash(),
        Shell::Zsh => zsh(),
        Shell::Fish => fish(),
    }
}

fn rows() -> impl Iterator<Item = &'static CommandRow> {
    COMMANDS.iter().filter(|row| row.section != Section::Hidden)
}

/// The words that can stand first, with what they say about themselves.
fn first_words() -> Vec<(&'static str, &'static str)> {
    rows()
        .filter(|row| !row.words.contains(' '))
        .map(|row| (row.words, row.brief))
        .chain(GROUPS.iter().copied())
        .collect()
}

fn second_words(group: &'static str) -> Vec<(&'static str, &'static str)> {
    rows()
        .filter_map(|row| Some((row.words.strip_prefix(group)?.strip_prefix(' ')?, row.brief)))
        .collect()
}

fn flags_of(row: &'static CommandRow) -> impl Iterator<Item = Flag> {
    FLAGS
        .iter()
        .filter(|flag| flag.takes(Some(row.command)))
        .map(|flag| flag.of(row.command))
}

fn names(words: &[(&'static str, &'static str)]) -> String {
    words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(" ")
}

// --- bash -------------------------------------------------------------------------------------

fn bash() -> String {
    let mut script = String::from(
        "# bash completions for castra, printed by `castra completions bash`\n\
         _castra() {\n\
         \x20   local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= word i skip=\n\
         \x20   COMPREPLY=()\n\
         \x20   # bash cuts --flag=value into three words.\n\
         \x20   if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi\n\
         \x20   for ((i = 1; i < COMP_CWORD; i++)); do\n\
         \x20       word=${COMP_WORDS[i]}\n\
         \x20       if [[ $word == = ]]; then skip=1; continue; fi\n\
         \x20       if [[ -n $skip ]]; then skip=; continue; fi\n\
         \x20       case $word in\n",
    );
    let valued: Vec<String> = FLAGS
        .iter()
        .filter(|flag| flag.value.is_some())
        .map(|flag| format!("--{}", flag.long))
        .collect();
    let _ = write!(
        script,
        "            --) return ;;\n\
         \x20           {}) skip=1 ;;\n\
         \x20           -*) ;;\n",
        valued.join("|")
    );
    for (group, _) in GROUPS {
        let _ = writeln!(
            script,
            "            {group}) [[ -z $command ]] && command={group} ;;"
        );
        for (word, _) in second_words(group) {
            let _ = writeln!(
                script,
                "            {word}) case $command in {group}) command='{group} {word}' ;; '') command={word} ;; esac ;;"
            );
        }
    }
    script.push_str(
        "            *) [[ -z $command ]] && command=$word ;;\n        esac\n    done\n    case $prev in\n",
    );
    for flag in FLAGS.iter().filter(|flag| flag.value.is_some()) {
        let _ = writeln!(
            script,
            "        --{}) {} return ;;",
            flag.long,
            bash_reply(flag.complete)
        );
    }
    script.push_str("    esac\n    case $command in\n");
    let globals: Vec<String> = FLAGS
        .iter()
        .filter(|flag| matches!(flag.scope, Scope::Global))
        .map(|flag| format!("--{}", flag.long))
        .collect();
    let _ = writeln!(
        script,
        "        '') COMPREPLY=($(compgen -W '{} {}' -- \"$cur\")) ;;",
        names(&first_words()),
        globals.join(" ")
    );
    for (group, _) in GROUPS {
        let _ = writeln!(
            script,
            "        {group}) COMPREPLY=($(compgen -W '{}' -- \"$cur\")) ;;",
            names(&second_words(group))
        );
    }
    for row in rows() {
        let flags = flags_of(row)
            .map(|flag| format!("--{}", flag.long))
            .collect::<Vec<_>>()
            .join(" ");
        let operand = row
            .operands
            .first()
            .map_or(String::new(), |operand| bash_reply(operand.complete));
        let _ = writeln!(
            script,
            "        '{}') if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W '{flags}' -- \"$cur\")); else :; {operand} fi ;;",
            row.words
        );
    }
    script.push_str("    esac\n}\ncomplete -F _castra castra\n");
    script
}

fn bash_reply(complete: Complete) -> String {
    let one_of = |words: &[&str]| format!("COMPREPLY=($(compgen -W '{}' -- \"$cur\"));", words.join(" "));
    match complete {
        Complete::Nothing => String::new(),
        Complete::Path => {
            "mapfile -t COMPREPLY < <(compgen -f -- \"$cur\"); compopt -o filenames 2>/dev/null;".to_owned()
        }
        Complete::VmName => {
            "COMPREPLY=($(compgen -W \"$(castra vm-names 2>/dev/null)\" -- \"$cur\"));".to_owned()
        }
        Complete::Agent => one_of(&agent_names()),
        Complete::OneOf(words) => one_of(words),
    }
}

// --- zsh --------------------------------------------------------------------------------------

fn zsh() -> String {
    let mut script = String::from(
        "#compdef castra\n\
         # zsh completions for castra, printed by `castra completions zsh`\n\n\
         _castra_vms() {\n\
         \x20   local -a vms\n\
         \x20   vms=(${(f)\"$(castra vm-names 2>/dev/null)\"})\n\
         \x20   compadd -a vms\n\
         }\n\n\
         _castra() {\n\
         \x20   local -a globals words_known\n\
         \x20   local context state state_descr line\n\
         \x20   typeset -A opt_args\n",
    );
    let globals: Vec<&Flag> = FLAGS
        .iter()
        .filter(|flag| matches!(flag.scope, Scope::Global))
        .collect();
    script.push_str("    globals=(\n");
    globals.iter().for_each(|flag| zsh_flag(&mut script, flag, 8));
    script.push_str("    )\n    _arguments -C $globals '1:command:->command' '*::argument:->argument' && return\n    case $state in\n    command)\n        words_known=(\n");
    for (word, about) in first_words() {
        let _ = writeln!(script, "            '{word}:{}'", zsh_quote(about));
    }
    script.push_str("        )\n        _describe -t commands command words_known ;;\n    argument)\n        case $line[1] in\n");
    for row in rows().filter(|row| !row.words.contains(' ')) {
        zsh_command(&mut script, row, row.words, 8);
    }
    for (group, _) in GROUPS {
        let _ = write!(
            script,
            "        {group})\n            if (( CURRENT == 2 )); then\n                words_known=(\n"
        );
        for (word, about) in second_words(group) {
            let _ = writeln!(script, "                    '{word}:{}'", zsh_quote(about));
        }
        script.push_str(
            "                )\n                _describe -t commands command words_known\n            else\n\
             \x20               shift words\n                (( CURRENT-- ))\n                case $words[1] in\n",
        );
        for row in rows() {
            if let Some((_, word)) = row.words.split_once(' ').filter(|(first, _)| first == group) {
                zsh_command(&mut script, row, word, 16);
            }
        }
        script.push_str("                esac\n            fi ;;\n");
    }
    script.push_str("        esac ;;\n    esac\n}\n\nif [[ $zsh_eval_context[-1] == loadautofunc ]]; then\n    _castra \"$@\"\nelse\n    compdef _castra castra\nfi\n");
    script
}

fn zsh_command(script: &mut String, row: &'static CommandRow, word: &str, indent: usize) {
    let pad = " ".repeat(indent);
    let _ = writeln!(script, "{pad}{word})\n{pad}    _arguments $globals \\");
    for flag in row.flags() {
        let mut line = String::new();
        zsh_flag(&mut line, &flag, indent + 8);
        let _ = writeln!(script, "{} \\", line.trim_end());
    }
    let last = match row.operands.first() {
        None => String::new(),
        Some(operand) => {
            let many = if operand.placeholder == "VM" && row.operands.len() == 1 {
                "*"
            } else {
                "1"
            };
            format!(
                "'{many}:{}:{}'",
                operand.placeholder,
                zsh_action(operand.complete)
            )
        }
    };
    let _ = writeln!(script, "{pad}        {last};;");
}

fn zsh_flag(script: &mut String, flag: &Flag, indent: usize) {
    let pad = " ".repeat(indent);
    let about = zsh_quote(flag.brief).replace('[', "\\[").replace(']', "\\]");
    match flag.value {
        None => {
            let _ = writeln!(script, "{pad}'--{}[{about}]'", flag.long);
        }
        Some(placeholder) => {
            let _ = writeln!(
                script,
                "{pad}'*--{}=[{about}]:{placeholder}:{}'",
                flag.long,
                zsh_action(flag.complete)
            );
        }
    }
}

fn zsh_action(complete: Complete) -> String {
    match complete {
        Complete::Nothing => " ".to_owned(),
        Complete::Path => "_files".to_owned(),
        Complete::VmName => "_castra_vms".to_owned(),
        Complete::Agent => format!("({})", agent_names().join(" ")),
        Complete::OneOf(words) => format!("({})", words.join(" ")),
    }
}

fn zsh_quote(text: &str) -> String {
    text.replace('\'', "'\\''").replace(':', "\\:")
}

// --- fish -------------------------------------------------------------------------------------

fn fish() -> String {
    let mut script = String::from(
        "# fish completions for castra, printed by `castra completions fish`\n\
         complete -c castra -f\n",
    );
    let first = names(&first_words());
    let none_yet = format!("not __fish_seen_subcommand_from {first}");
    for (word, about) in first_words() {
        let _ = writeln!(
            script,
            "complete -c castra -n '{none_yet}' -a {word} -d '{}'",
            fish_quote(about)
        );
    }
    for (group, _) in GROUPS {
        let second = names(&second_words(group));
        for (word, about) in second_words(group) {
            let _ = writeln!(
                script,
                "complete -c castra -n '__fish_seen_subcommand_from {group}; and not __fish_seen_subcommand_from {second}' -a {word} -d '{}'",
                fish_quote(about)
            );
        }
    }
    for flag in FLAGS {
        let short = flag
            .short
            .map(|letter| format!(" -s {letter}"))
            .unwrap_or_default();
        let value = flag.value.map_or(String::new(), |_| fish_value(flag.complete));
        for (scope, brief) in fish_scopes(flag) {
            let _ = writeln!(
                script,
                "complete -c castra{scope}{short} -l {}{value} -d '{}'",
                flag.long,
                fish_quote(brief)
            );
        }
    }
    for row in rows() {
        let Some(operand) = row
            .operands
            .first()
            .filter(|operand| operand.complete != Complete::Nothing)
        else {
            continue;
        };
        let _ = writeln!(
            script,
            "complete -c castra -n '{}'{}",
            fish_seen(
                row.words.split_once(' ').map(|(group, _)| group),
                &[last_word(row.words)]
            ),
            fish_value(operand.complete).replacen(" -x", "", 1)
        );
    }
    script
}

/// Where a flag is offered and how it is explained there: everywhere, or behind each of its commands,
/// those together that are of one group and say the same of it.
fn fish_scopes(flag: &Flag) -> Vec<(String, &'static str)> {
    let Scope::Only(commands) = flag.scope else {
        return vec![(String::new(), flag.brief)];
    };
    let mut groups: BTreeMap<(Option<&str>, &'static str), Vec<&str>> = BTreeMap::new();
    for command in commands {
        let words = command.row().words;
        let group = words.split_once(' ').map(|(group, _)| group);
        let brief = flag.of(*command).brief;
        groups.entry((group, brief)).or_default().push(last_word(words));
    }
    groups
        .iter()
        .map(|((group, brief), words)| (format!(" -n '{}'", fish_seen(*group, words)), *brief))
        .collect()
}

fn last_word(words: &str) -> &str {
    words.rsplit(' ').next().unwrap_or(words)
}

fn fish_seen(group: Option<&str>, words: &[&str]) -> String {
    let seen = format!("__fish_seen_subcommand_from {}", words.join(" "));
    match group {
        Some(group) => format!("__fish_seen_subcommand_from {group}; and {seen}"),
        None => seen,
    }
}

fn fish_value(complete: Complete) -> String {
    match complete {
        Complete::Nothing => " -x".to_owned(),
        Complete::Path => " -r -F".to_owned(),
        Complete::VmName => " -x -a '(castra vm-names 2>/dev/null)'".to_owned(),
        Complete::Agent => format!(" -x -a '{}'", agent_names().join(" ")),
        Complete::OneOf(words) => format!(" -x -a '{}'", words.join(" ")),
    }
}

fn fish_quote(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\'', "\\'")
}
