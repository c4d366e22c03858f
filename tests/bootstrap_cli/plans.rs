//! `--plan`: the same each time, all that is planned, nothing touched; and `bootstrap` again.

use std::fs;

use serde_json::Value;

use super::Guest;
use crate::support::files_below;
use crate::support::project::Project;

fn snapshot(project: &Project) -> Vec<String> {
    files_below(&project.castra().dir().join("project"))
        .into_iter()
        .chain(files_below(&project.castra().home()))
        .filter(|path| {
            !path.to_string_lossy().contains("broker") && !path.to_string_lossy().contains("handshakes")
        })
        .map(|path| {
            let meta = fs::symlink_metadata(&path).unwrap();
            format!("{} {} {:?}", path.display(), meta.len(), meta.modified().unwrap())
        })
        .collect()
}

/// `bootstrap.planned` without what is new each time.
fn planned(stdout: &str) -> Vec<Value> {
    stdout
        .lines()
        .map(|line| {
            let mut event: Value = serde_json::from_str(line).unwrap();
            assert_eq!(event["type"], "bootstrap.planned", "{event}");
            for key in ["run", "ts", "offset_ms"] {
                event.as_object_mut().unwrap().remove(key);
            }
            event
        })
        .collect()
}

const FIELDS: [&str; 22] = [
    "vm",
    "mode",
    "action",
    "reason",
    "trigger",
    "script_path",
    "payload_path",
    "payload_bytes",
    "handshake_timeout_secs",
    "step_timeout_secs",
    "apply_timeout_secs",
    "remote_dir",
    "ssh",
    "env_keys",
    "verify",
    "artifact_hash",
    "metadata_path",
    "warnings",
    "vizier_status",
    "vizier_log_path",
    "vizier_remediation",
    "v",
];

#[test]
fn a_plan_of_what_does_not_run_yet() {
    let vms = "[[vms]]\nname = \"web\"\nkernel = \"vmlinuz\"\ncount = 2\n[vms.bootstrap]\nmode = \"auto\"\nscript = \"run.sh\"\n\
        payload = \"site\"\nenv = { B = \"2\", A = \"secret\" }\nverify_path = \"done\"\n\
        [[vms]]\nname = \"db\"\nkernel = \"vmlinuz\"\n";
    let project = Project::new("plan", vms);
    project.castra().write("site/index.html", "hello");
    let before = snapshot(&project);
    let args = ["up", "--plan", "--json", "--bootstrap", "db=auto,web-1=skip"];
    let first = project.run(&args).exits(0).stdout;
    let plans = planned(&first);
    assert_eq!(
        planned(&project.run(&args).exits(0).stdout),
        plans,
        "not the same again"
    );
    assert_eq!(snapshot(&project), before, "something was written");
    let names: Vec<&Value> = plans.iter().map(|plan| &plan["vm"]).collect();
    assert_eq!(names, ["web-0", "web-1", "db"]);
    for plan in &plans {
        for field in FIELDS {
            assert!(plan.get(field).is_some(), "{field} is missing: {plan}");
        }
    }
    let web = &plans[0];
    assert_eq!(
        (&web["action"], &web["trigger"], &web["mode"]),
        (&"run".into(), &"auto".into(), &"auto".into())
    );
    assert_eq!(web["env_keys"], serde_json::json!(["A", "B"]));
    assert_eq!(web["payload_bytes"], 5);
    assert_eq!(web["verify"]["path"], "done");
    assert_eq!(
        (&web["ssh"]["user"], &web["ssh"]["port"]),
        (&"root".into(), &Value::Null)
    );
    assert!(!first.contains("secret"), "a value is shown");
    assert_eq!(
        (&plans[1]["action"], &plans[1]["ssh"]),
        (&"skip".into(), &Value::Null)
    );
    // What people get is the same each time too.
    let shown = project.run(&["up", "--plan"]).exits(0);
    assert_eq!(project.run(&["up", "--plan"]).exits(0).stdout, shown.stdout);
    assert_eq!(snapshot(&project), before);

    let ran = project.run(&["bootstrap", "--plan"]);
    assert_eq!(ran.code, Some(1), "nothing runs: {ran:?}");
    // Unknown names and contradictions, before anything starts.
    for (value, part) in [
        ("web-2=skip", "web-2"),
        ("skip,always", "always"),
        ("db=skip,DB=auto", "both `skip` and `auto`"),
        ("perhaps", "perhaps"),
    ] {
        let ran = project.run(&["up", "--bootstrap", value]).exits(64);
        ran.tells(part);
    }
    assert!(
        project
            .run(&["up", "--bootstrap", "nix=skip"])
            .exits(64)
            .stderr
            .contains("web-0")
    );
    assert_eq!(snapshot(&project), before);
}

#[test]
fn bootstrap_again_without_a_restart() {
    let script = "#!/bin/sh\n[ -e done ] && echo Castra:noop\ntouch done\nprintf '%s' \"$ODD\" >odd\n";
    let more = "verify_path = \"done\"\nenv = { ODD = \"it's \\\"odd\\\"\\n$HOME\" }\n";
    let guest = Guest::up("again", script, more);
    let project = &guest.project;
    let pid = project.pid("web");
    let before = snapshot(project);
    let args = ["bootstrap", "--plan", "--json"];
    let plans = planned(&project.run(&args).exits(0).stdout);
    assert_eq!(
        plans[0]["ssh"]["port"],
        guest.sshd.port(),
        "the port it really has"
    );
    assert!(
        plans[0]["metadata_path"]
            .as_str()
            .unwrap()
            .ends_with("boot/bootstrap.toml")
    );
    assert_eq!(planned(&project.run(&args).exits(0).stdout), plans);
    assert_eq!(snapshot(project), before);

    let status = |args: &[&str]| {
        let ran = project.run(&[args, &["--json"]].concat()).exits(0);
        let objects = ran.objects();
        let end = objects
            .iter()
            .find(|event| event["type"] == "bootstrap.completed")
            .unwrap()
            .clone();
        assert_eq!(end["stamp"], Value::Null);
        let started = objects
            .iter()
            .find(|event| event["type"] == "bootstrap.started")
            .unwrap();
        for hash in ["base_hash", "artifact_hash"] {
            assert_eq!(started[hash].as_str().unwrap().len(), 64, "{started}");
        }
        (
            end["status"].as_str().unwrap().to_owned(),
            started["artifact_hash"].clone(),
        )
    };
    let (first, hash) = status(&["bootstrap"]);
    assert_eq!(first, "Success");
    assert_eq!(
        fs::read_to_string(guest.remote().join("odd")).unwrap(),
        "it's \"odd\"\n$HOME"
    );
    let (again, same) = status(&["bootstrap", "web"]);
    assert_eq!((again.as_str(), &same), ("NoOp", &hash));
    let (by_up, same) = status(&["up"]);
    assert_eq!((by_up.as_str(), &same), ("NoOp", &hash));
    assert_eq!(project.pid("web"), pid, "it was restarted");
    assert_eq!(
        guest.logs().iter().filter(|name| name.ends_with(".json")).count(),
        3
    );
    // Another script is another artifact.
    project.castra().write("boot/run.sh", "#!/bin/sh\ntouch done\n");
    assert_ne!(status(&["bootstrap"]).1, hash);
}

#[test]
fn sockets_and_pipes_of_a_payload_are_left_out_and_named() {
    let script = "#!/bin/sh\nls \"$CASTRA_PAYLOAD_DIR\"\n";
    let guest = Guest::up("special", script, "payload = \"site\"\n");
    let castra = guest.project.castra();
    castra.write("site/file", "x");
    nix::unistd::mkfifo(
        &castra.project().join("site/a-pipe"),
        nix::sys::stat::Mode::S_IRWXU,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(castra.project().join("site/a-socket")).unwrap();
    let ran = guest.project.run(&["bootstrap"]).exits(0);
    ran.tells("warning").tells("a-pipe").tells("a-socket");
    assert_eq!(fs::read_dir(guest.remote().join("payload")).unwrap().count(), 1);
}
