//! Completions, as each shell offers them at a key press.
//!
//! bash, zsh and fish are run themselves; `scripts/install-deps.sh test` installs them.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use support::{CASTRA, Castra};

/// A command line, and the completions of its last word, in alphabetical order. `…` at the end: and more.
const CASES: [(&str, &str); 14] = [
    ("castra bro", "broker"),
    ("castra image ", "build list path"),
    ("castra --config castra.toml wor", "workspaces"),
    ("castra up --br", "--broker-only"),
    ("castra up a", "api api-0 api-1"),
    ("castra up api-0 d", "db"),
    ("castra up --bootstrap s", "skip"),
    ("castra image build --fo", "--force"),
    ("castra image list --fo", ""),
    ("castra logs --source s", "serial"),
    ("castra --color ", "always auto never"),
    ("castra completions z", "zsh"),
    ("castra status --gr", ""),
    ("castra down --gr", "--graceful-wait-secs"),
];

/// A project with three VMs, the castra of which stands in PATH.
fn project(name: &str) -> Castra {
    let castra = Castra::new(name);
    castra.write(
        "castra.toml",
        "[[vms]]\nname = \"api\"\ncount = 2\n[[vms]]\nname = \"db\"\n",
    );
    castra
}

/// Runs a shell in the project; what it prints, in alphabetical order.
fn offers(castra: &Castra, shell: &str, args: &[&str]) -> String {
    let binary = Path::new(CASTRA);
    let path = format!(
        "{}:{}",
        binary.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let output = Command::new(shell)
        .args(args)
        .current_dir(castra.project())
        .env_clear()
        .env("PATH", &path)
        .env("HOME", castra.dir())
        .env("TERM", "xterm")
        .env("CASTRA_HOME", castra.home())
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{shell}: {error}: run scripts/install-deps.sh test"));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{shell} {args:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    let mut words: Vec<&str> = printed.lines().filter(|line| !line.is_empty()).collect();
    words.sort_unstable();
    words.join(" ")
}

fn script(castra: &Castra, shell: &str) -> String {
    let text = castra.run(&["completions", shell]).exits(0).stdout;
    castra
        .write(&format!("castra.{shell}"), &text)
        .display()
        .to_string()
}

#[test]
fn bash() {
    let castra = project("bash");
    let script = script(&castra, "bash");
    for (line, expected) in CASES {
        // `read` into an array drops only separators; an empty last word is added again.
        let program = "source \"$1\"; read -ra COMP_WORDS <<<\"$2\"; [[ $2 != *' ' ]] || COMP_WORDS+=('')
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _castra; printf '%s\\n' \"${COMPREPLY[@]}\"";
        let found = offers(&castra, "bash", &["-c", program, "bash", &script, line]);
        assert_eq!(found, expected, "{line}");
    }
    // As bash cuts lines with `=` and `--` into words.
    let words = |words: &str| {
        let program = format!(
            "source \"$1\"; COMP_WORDS=(castra {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _castra; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        offers(&castra, "bash", &["-c", &program, "bash", &script])
    };
    assert_eq!(words("ssh db -- u"), "");
    assert_eq!(words("up --bootstrap = s"), "skip");
    assert_eq!(words("completions --color ="), "always auto never");
    assert_eq!(words("--color = never up a"), "api api-0 api-1");
    castra.write("z a.toml", "");
    assert_eq!(words("up --config z"), "z a.toml");
}

#[test]
fn zsh() {
    let castra = project("zsh");
    let script = script(&castra, "zsh");
    let helper = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/zsh-complete.zsh");
    for (line, expected) in CASES {
        let found = offers(&castra, "zsh", &["-f", helper.to_str().unwrap(), &script, line]);
        assert_eq!(found, expected, "{line}");
    }
}

#[test]
fn fish() {
    let castra = project("fish");
    let script = script(&castra, "fish");
    for (line, expected) in CASES {
        // A candidate, a tab, a description. fish adds words that only contain the typed letters (from
        // version 4 on at any distance); castra promises only those that begin with them.
        let program = "source $argv[1]; complete -C $argv[2] | string replace -r '\\t.*' ''";
        let found = offers(&castra, "fish", &["-c", program, &script, line]);
        let typed = line.rsplit(' ').next().unwrap();
        let found: Vec<_> = found.split(' ').filter(|word| word.starts_with(typed)).collect();
        assert_eq!(found.join(" "), expected, "{line}");
    }
}
