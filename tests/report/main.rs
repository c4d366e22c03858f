//! `castra report`: its text, its JSON and its page, of kept journals, of broken and hostile ones, and of
//! runs that have just happened.

#![allow(clippy::unwrap_used, missing_docs)]

mod broken;
mod journal;
mod long;
mod page;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use castra::core::operations::report::{ReportOptions, report};
use castra::core::report::html;
use castra::core::report::model::{Outcome, Report, State};
use castra::core::reporter::Silent;
use castra::core::root::paths::StateRoot;
use serde_json::{Value, json};

use page::{check, page};
use support::project::FAKE_QEMU;
use support::{Castra, golden};

/// A project whose state is in its own folder.
fn project(name: &str) -> Castra {
    let castra = Castra::new(name);
    castra.write(
        "castra.toml",
        "[project]\nname = \"demo\"\nstate_dir = \"state\"\n[[vms]]\nname = \"web\"\n",
    );
    castra
}

/// With the journals and logs of four real runs.
fn kept_project(name: &str) -> Castra {
    let castra = project(name);
    castra.makes_up_events();
    copy(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/report/state"),
        &castra.project().join("state"),
    );
    castra
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => {
                fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
            }
        }
    }
}

fn told(castra: &Castra, args: &[&str]) -> Value {
    let mut all = vec!["report", "--json"];
    all.extend(args);
    let mut objects = castra.run(&all).exits(0).objects();
    assert_eq!(objects.len(), 1);
    objects.remove(0)
}

#[test]
fn four_real_runs_as_text_json_and_page() {
    let castra = kept_project("report-golden");
    let here = castra.project().display().to_string();
    let text = castra.run(&["report"]).exits(0).stdout;
    golden("report/report.txt", &text.replace(&here, "/home/u/demo"));

    let state = StateRoot::new(castra.project().join("state"));
    let mut made = report(ReportOptions::of(state, "demo", "demo-51b8443e"), &mut Silent).unwrap();
    made.generated_at = "2026-11-21T17:48:23.000Z".into();
    made.version = "0.2.0".into();
    for log in made
        .runs
        .iter_mut()
        .flat_map(|run| &mut run.vms)
        .filter_map(|vm| vm.log.as_mut())
    {
        log.path = log.path.as_ref().map(|path| path.replace(&here, "/home/u/demo"));
    }
    let json = serde_json::to_string_pretty(&made).unwrap();
    assert_eq!(
        serde_json::from_str::<Report>(&json).unwrap(),
        made,
        "a program can read it back"
    );
    golden("report/report.json", &(json + "\n"));
    let page = html::page(&made);
    check(&page);
    golden("report/report.html", &page);

    // The commands say the same as the library.
    let printed = told(&castra, &[]);
    let mut expected = serde_json::to_value(&made).unwrap();
    for key in ["generated_at", "workspace", "version"] {
        expected[key] = printed[key].clone();
    }
    let log = |report: &Value| report["runs"][3]["vms"][0]["log"]["path"].clone();
    assert!(log(&printed).as_str().unwrap().starts_with(&here));
    expected["runs"][3]["vms"][0]["log"]["path"] = log(&printed);
    assert_eq!(printed, expected);
    let written = castra.run(&["report", "--html", "-"]).exits(0).stdout;
    assert!(written.starts_with("<!DOCTYPE html>") && written.ends_with("</html>\n"));
}

#[test]
fn the_guide_names_every_field() {
    fn fields(value: &Value, into: &mut Vec<String>) {
        match value {
            Value::Object(object) => object.iter().for_each(|(key, value)| {
                into.push(key.clone());
                fields(value, into);
            }),
            Value::Array(array) => array.iter().for_each(|value| fields(value, into)),
            _ => {}
        }
    }
    let file = |name: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    let (guide, mut all) = (file("docs/REPORT.md"), Vec::new());
    fields(
        &serde_json::from_str(&file("tests/golden/report/report.json")).unwrap(),
        &mut all,
    );
    for field in all {
        assert!(
            guide.contains(&format!("`{field}`")),
            "docs/REPORT.md doesn't name `{field}`"
        );
    }
}

#[test]
fn vms_and_times_pick_the_runs() {
    let castra = kept_project("report-pick");
    let commands = |args: &[&str]| -> Vec<String> {
        let report = told(&castra, args);
        let runs = report["runs"].as_array().unwrap();
        runs.iter()
            .map(|run| run["command"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(commands(&[]), ["up", "down", "bootstrap", "up"]);
    assert_eq!(commands(&["--last", "2"]), ["up", "down"]);
    assert_eq!(commands(&["WEB"]), ["up"]);
    assert_eq!(commands(&["db", "--last", "3"]), ["up", "down", "bootstrap"]);
    assert_eq!(commands(&["--since", "2026-11-21T17:37:28.500Z"]), ["up", "down"]);
    assert_eq!(
        commands(&["--since", "2026-11-21T17:37:28.500Z", "--last", "1"]),
        ["up"]
    );
    let web = told(&castra, &["web"]);
    let run = &web["runs"][0];
    assert_eq!((&run["vms_total"], &run["vms_failed"]), (&json!(1), &json!(0)));
    assert_eq!(run["vms"].as_array().unwrap().len(), 1);
    assert_eq!(run["bus"]["senders"].as_array().unwrap().len(), 1);
    // A VM that isn't in the config may have runs; a name without runs that isn't in the config is a mistake.
    castra.run(&["report", "db"]).exits(0);
    let refused = castra.run(&["report", "wen"]).exits(64);
    refused.tells("did you mean `web`");
    for bad in ["0", "101", "x", "-1"] {
        castra.run(&["report", "--last", bad]).exits(64);
    }
    castra.run(&["report", "--json", "--html", "x.html"]).exits(64);
    assert!(!castra.project().join("x.html").exists());
}

#[test]
fn a_project_in_which_nothing_has_run() {
    let castra = project("report-empty");
    let ran = castra.run(&["report"]).exits(0);
    assert_eq!(ran.stdout, "");
    ran.tells("nothing has run here yet");
    let empty = told(&castra, &[]);
    assert_eq!(
        (&empty["schema"], &empty["runs"]),
        (&json!("castra.report.v1"), &json!([]))
    );
    assert!(page(&castra, &[]).contains("Nothing has run here yet"));
    assert!(
        !castra.project().join("state").exists(),
        "a reading command writes nothing else"
    );
    castra.run(&["report", "nosuch"]).exits(64);
    castra.run(&["report", "web"]).exits(0);
    assert_eq!(Castra::new("report-none").run(&["report"]).exits(66).stdout, "");
}

#[test]
fn where_a_page_may_be_written() {
    let castra = kept_project("report-file");
    let there = castra.write("old.html", "old");
    fs::set_permissions(&there, fs::Permissions::from_mode(0o644)).unwrap();
    symlink("old.html", castra.project().join("link.html")).unwrap();
    let ran = castra.run(&["report", "--html", "link.html"]).exits(0);
    assert_eq!(ran.stdout, "");
    ran.tells("link.html written: 4 runs, ");
    assert!(castra.project().join("link.html").is_symlink());
    assert!(fs::read_to_string(&there).unwrap().starts_with("<!DOCTYPE html>"));
    assert_eq!(fs::metadata(&there).unwrap().permissions().mode() & 0o777, 0o600);

    fs::create_dir(castra.project().join("folder")).unwrap();
    let files = || -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(castra.project())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        files
    };
    let before = files();
    for (path, why) in [
        ("folder", "it is a directory"),
        ("folder/", "it is a directory"),
        ("..", "it is a directory"),
        ("/dev/null", "isn't a regular file"),
        ("nosuch/report.html", "make its folder first"),
        ("old.html/report.html", "Not a directory"),
    ] {
        let refused = castra.run(&["report", "--html", path]).exits(73);
        assert!(refused.stderr.contains(why), "{path}: {}", refused.stderr);
    }
    castra.run(&["report", "--html", ""]).exits(64);
    assert_eq!(files(), before, "nothing half-written stays");
}

#[test]
fn a_fleet_on_the_stand_in() {
    let castra = Castra::new("report-fleet");
    castra.write("vmlinuz", "not really a kernel");
    castra.write("run.sh", "#!/bin/sh\n");
    let vm = |name: &str, fake: &str, rest: &str| {
        format!(
            "[[vms]]\nname = \"{name}\"\nkernel = \"vmlinuz\"\nqemu_args = [\"-fake\", \"{fake}\"]\n{rest}"
        )
    };
    castra.write(
        "castra.toml",
        &[
            format!(
                "[project]\nname = \"fleet\"\nstate_dir = \"state\"\n[qemu]\nbinary = \"{FAKE_QEMU}\"\naccel = \"tcg\"\n\
                 [broker]\nport = 0\n[bootstrap]\nmode = \"skip\"\n"
            ),
            vm("good", "start", ""),
            vm("refused", "refuse=the flux capacitor is missing", ""),
            vm(
                "silent",
                "console=kernel panic <not syncing>",
                "[vms.bootstrap]\nmode = \"always\"\nscript = \"run.sh\"\nhandshake_timeout_secs = 1\n",
            ),
        ]
        .concat(),
    );
    castra.run(&["up"]).exits(1);
    let report: Report = serde_json::from_str(&castra.run(&["report", "--json"]).exits(0).stdout).unwrap();
    let run = &report.runs[0];
    assert_eq!(
        (run.command.as_str(), run.outcome, run.vms_total, run.vms_failed),
        ("up", Outcome::Failed, 3, 2)
    );
    let vm = |name: &str| run.vms.iter().find(|vm| vm.vm == name).unwrap();
    let phases = |name: &str| -> Vec<String> {
        let phases = vm(name)
            .phases
            .iter()
            .filter(|phase| !["queued", "overlay"].contains(&phase.phase.as_str()));
        phases
            .map(|phase| format!("{} {}", phase.phase, phase.state.as_str()))
            .collect()
    };
    assert_eq!(
        (vm("good").state, phases("good")),
        (State::Ok, vec!["launch ok".to_owned()])
    );
    assert_eq!(vm("refused").state, State::Failed);
    assert!(
        vm("refused").error.as_ref().unwrap().contains("flux capacitor"),
        "{:?}",
        vm("refused")
    );
    assert_eq!(phases("silent"), ["launch ok", "wait-handshake failed"]);
    let log = vm("silent").log.as_ref().unwrap();
    assert_eq!(log.source, "console");
    assert!(
        log.lines
            .iter()
            .any(|line| line.contains("kernel panic <not syncing>")),
        "{log:?}"
    );
    castra.run(&["down"]).exits(0);
    let page = page(&castra, &[]);
    assert!(page.contains("kernel panic &lt;not syncing&gt;") && page.contains("power-button"));
}
