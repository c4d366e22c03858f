//! Nothing that castra prints is obeyed by a terminal, whatever paths, names and agents' words hold.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::project::{ONE, Project};
use crate::support::{CASTRA, Castra, Ran};

/// A folder's name that clears the screen (by ESC and by one character), deletes and turns text around.
const FOLDER: &str = "ev\x1b[2Jil\u{9b}2J\u{7f}\u{202e}txt";

/// What a terminal may be given: text, line ends, tabs.
#[track_caller]
fn assert_harmless(what: &str, text: &str) {
    let bad = text.chars().find(|c| {
        (c.is_control() && !matches!(c, '\n' | '\t'))
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    });
    assert_eq!(bad, None, "{what}: {text:?}");
}

/// Runs it for people and for scripts; what scripts read.
#[track_caller]
fn check(castra: &Castra, args: &[&str]) -> Vec<Value> {
    for json in [false, true] {
        let args = if json {
            [args, &["--json"]].concat()
        } else {
            args.to_vec()
        };
        let ran: Ran = castra.run(&args);
        assert_harmless(&format!("stdout of {args:?}"), &ran.stdout);
        assert_harmless(&format!("stderr of {args:?}"), &ran.stderr);
        if json {
            return ran.objects();
        }
    }
    Vec::new()
}

#[test]
fn paths_and_names_are_shown_and_not_obeyed() {
    let project = Project::new("controls", ONE);
    let castra = project.castra();
    let config = castra.project().join("castra.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let text = text.replace("name = \"faults\"", "name = \"fa\u{202e}ults\"");
    let config = castra.write(&format!("../{FOLDER}/castra.toml"), &text);
    castra.write(&format!("../{FOLDER}/vmlinuz"), "not really a kernel");
    let config = config.to_str().unwrap();
    let check = |args: &[&str]| check(castra, &[&["--config", config], args].concat());

    let plan = check(&["up", "--plan"]);
    assert!(!plan.is_empty());
    check(&["up"]);
    check(&["up", "web", "--bootstrap", "always"]);
    check(&["status"]);
    check(&["ports"]);
    // For ssh it is as it must be; on a terminal it is harmless.
    let ran = castra.run(&["--config", config, "ssh-config"]).exits(0);
    ran.prints(FOLDER);
    let ran = castra.run(&["--config", config, "ssh-config", "--json"]).exits(0);
    assert_harmless("ssh-config --json", &ran.stdout);
    let on_terminal = Command::new("script")
        .args(["-qec", "\"$CASTRA\" --config \"$CONFIG\" ssh-config", "/dev/null"])
        .env("CASTRA", CASTRA)
        .env("CONFIG", config)
        .env("CASTRA_HOME", castra.home())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&on_terminal.stdout).replace("\r\n", "\n");
    assert!(shown.contains("Host web"), "{shown:?}");
    assert_harmless("ssh-config on a terminal", &shown);
    check(&["logs"]);
    check(&["events"]);
    check(&["report"]);
    check(&["doctor"]);
    check(&["clean"]);
    check(&["restart"]);
    check(&["down"]);
    check(&["clean", "--dry-run"]);
    check(&["nonsense\x1b[2J\u{202e}"]);

    // The same value to whoever parses it.
    let listed = self::check(castra, &["workspaces"]);
    let paths: Vec<&str> = listed[0]["workspaces"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|row| row["config_path"].as_str())
        .collect();
    assert!(paths.iter().any(|path| path.contains(FOLDER)), "{paths:?}");
    check(&["clean"]);
}

#[test]
fn what_an_agent_calls_itself_is_shown_and_not_obeyed() {
    let project = Project::new("controls-agent", ONE);
    let castra = project.castra();
    let stream = "{\"type\":\"thread.started\",\"thread_id\":\"t\u{9b}2J\u{7f}\u{202e}x\"}\n{\"type\":\"turn.started\"}\n\
                  {\"type\":\"item.completed\",\"item\":{\"id\":\"i\",\"type\":\"agent_message\",\"text\":\"\u{9b}2J\u{202e}\"}}\n\
                  {\"type\":\"turn.completed\",\"usage\":{\"input_tokens\":1,\"cached_input_tokens\":0,\"output_tokens\":1}}\n";
    for json in [&[][..], &["--json"]] {
        let ran = castra.run_with_stdin(&[&["harness", "relay"], json].concat(), stream.as_bytes());
        assert_harmless("relay", &ran.stdout);
        assert_harmless("relay", &ran.stderr);
    }
    let listed = check(castra, &["harness", "list"]);
    assert_eq!(listed[0]["threads"][0]["thread"], "t\u{9b}2J\u{7f}\u{202e}x");
    check(castra, &["harness", "usage"]);
    check(castra, &["harness", "show", "t"]);
}
