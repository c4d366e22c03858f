//! A path handed to another program that reads it as a language: commas for QEMU, tokens and quotes for
//! ssh, colons for scp and library paths.

use std::fs;
use std::process::Command;

use crate::support::project::{ONE, Project};

/// What a home may be called.
const HOME: &str = "ho,me: %h \"x\"";

#[test]
fn a_home_may_have_any_name() {
    let project = Project::new("nasty", ONE);
    let castra = project.castra();
    let initrd = castra.write("in,it: %d rd", "not really an initramfs");
    castra.write("sh,a:re/file", "");
    let config = castra.project().join("castra.toml");
    let text = fs::read_to_string(&config).unwrap();
    // The state lies in the home, as it does by default.
    let text = text.replace("state_dir = \"state\"\n", "");
    let vm = "initrd = \"in,it: %d rd\"\nmounts = [{ host = \"sh,a:re\", guest = \"/a\" }]\n";
    fs::write(&config, format!("{text}{vm}")).unwrap();
    let home = castra.dir().join(HOME);
    let run = |args: &[&str]| {
        let output = castra.command(args).env("CASTRA_HOME", &home).output().unwrap();
        let shown = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "castra {args:?}: {shown}");
        String::from_utf8(output.stdout).unwrap()
    };
    run(&["up"]);
    let status: serde_json::Value = serde_json::from_str(&run(&["status", "--json"])).unwrap();
    let pid = status["vms"][0]["pid"].as_u64().unwrap();
    let argv = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let argv: Vec<String> = argv
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    let after = |option: &str| {
        let at = argv.iter().position(|word| word == option);
        argv[at.unwrap_or_else(|| panic!("no {option} in {argv:?}")) + 1].clone()
    };
    // As they are: QEMU opens just these files.
    assert_eq!(after("-initrd"), initrd.to_str().unwrap());
    assert!(std::path::Path::new(&after("-kernel")).is_file());
    // Lists: a comma is doubled.
    assert!(after("-fsdev").contains("/sh,,a:re,readonly=on"), "{argv:?}");
    assert!(
        after("-blockdev").contains("/ho,,me: %h \"x\"/projects/"),
        "{argv:?}"
    );

    // What ssh makes of the printed config.
    let printed = castra.write("printed", &run(&["ssh-config"]));
    let ssh = Command::new("ssh")
        .arg("-G")
        .arg("-F")
        .arg(&printed)
        .arg("web")
        .output()
        .unwrap();
    assert!(ssh.status.success(), "{ssh:?}");
    let understood = String::from_utf8(ssh.stdout).unwrap();
    let state = status["state_root"].as_str().unwrap();
    for (key, file) in [
        ("identityfile", "id_ed25519"),
        ("userknownhostsfile", "vms/web/known_hosts"),
    ] {
        let line = understood
            .lines()
            .find(|line| line.starts_with(&format!("{key} ")))
            .unwrap();
        // One of the two is shown before its tokens are expanded.
        assert_eq!(line.replace("%%", "%"), format!("{key} {state}/{file}"));
    }
    run(&["down"]);
}
