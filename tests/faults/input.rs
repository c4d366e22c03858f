//! What is asked for can't be had: tools, images, ports, names, places to write.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::project::{ONE, Project, Refusal, SCRIPT, TWO, finish};

/// A PATH with these programs alone.
fn path_with(project: &Project, programs: &[&str]) -> PathBuf {
    let dir = project.castra().dir().join(format!("bin-{}", programs.len()));
    fs::create_dir_all(&dir).unwrap();
    let path = std::env::var_os("PATH").unwrap();
    for program in programs {
        let found = std::env::split_paths(&path)
            .map(|dir| dir.join(program))
            .find(|path| path.exists());
        symlink(found.unwrap(), dir.join(program)).unwrap();
    }
    dir
}

#[test]
fn missing_tools_are_named_with_their_packages() {
    let project = Project::new("tools", &format!("{ONE}{SCRIPT}"));
    let up = |path: &Path| project.run_with(&[("PATH", path)], &["--json", "up"]);
    let all = ["python3", "env"];
    let refusal =
        Refusal::of(up(&path_with(&project, &[&all[..], &["ssh", "ssh-keygen"]].concat())).exits(69));
    refusal.tells(&["qemu-img"]).advises("qemu-utils");
    let refusal = Refusal::of(up(&path_with(&project, &[&all[..], &["qemu-img"]].concat())).exits(69));
    refusal.tells(&["ssh"]).advises("openssh-client");
    project.assert_nothing_left();

    project.castra().write(
        "castra.toml",
        &format!("version = \"0.2.0\"\n[project]\nname = \"x\"\nstate_dir = \"state\"\n{ONE}"),
    );
    let refusal = Refusal::of(up(&path_with(&project, &["env"])).exits(69)).alone();
    refusal
        .tells(&["qemu-system-"])
        .advises("apt install qemu-system");
    project.castra().write(
        "castra.toml",
        &format!("version = \"0.2.0\"\n[project]\nname = \"x\"\n[qemu]\nbinary = \"/nowhere/qemu\"\n{ONE}"),
    );
    let refusal = project.refused(69, &["up"]).alone();
    refusal
        .tells(&["/nowhere/qemu", "no such file"])
        .advises("[qemu]");
}

#[test]
fn base_images_that_cannot_be_used_are_refused_before_anything_starts() {
    let project = Project::new("images", "");
    let vm = "[[vms]]\nname = \"web\"\nbase_image = \"base.qcow2\"\nport_forwards = []\n";
    project.config(vm);
    let image = project.castra().project().join("base.qcow2");
    let refused = |code: i32, words: &[&str]| {
        let refusal = project.refused(code, &["up", "--bootstrap", "skip"]);
        let refusal = refusal.tells(&["base.qcow2"]).tells(words);
        project.assert_nothing_left();
        refusal
    };
    refused(65, &["no such file"]);
    fs::create_dir(&image).unwrap();
    refused(65, &["director"]);
    fs::remove_dir(&image).unwrap();
    project.castra().write("base.qcow2", "no image");
    refused(65, &["qcow2"]);
    fs::remove_file(&image).unwrap();

    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image)
        .arg("1M")
        .status();
    assert!(made.unwrap().success());
    // qemu-io is a writer as any QEMU is; reading its answer shows that it has the lock.
    let mut writer = Command::new("qemu-io")
        .arg(&image)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ask = writer.stdin.take().unwrap();
    ask.write_all(b"length\n").unwrap();
    let mut answer = [0; 16];
    writer.stdout.as_mut().unwrap().read_exact(&mut answer).unwrap();
    assert!(
        answer.ends_with(b"1 MiB\n") || answer.starts_with(b"qemu-io> 1"),
        "{answer:?}"
    );
    let locked = project.run(&["--json", "up", "--bootstrap", "skip"]);
    writer.kill().unwrap();
    writer.wait().unwrap();
    let said = format!("{}{}", locked.stdout, locked.stderr);
    assert!(
        matches!(locked.code, Some(1 | 75)) && said.contains(&format!("pid {}", writer.id())),
        "{locked:?}"
    );
    project.down();
    project.run(&["up", "--bootstrap", "skip"]).exits(0);
    project.down();
}

#[test]
fn ports_in_use_name_their_owner() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let forward = format!("[[vms.port_forwards]]\nhost = {port}\nguest = 80\n");
    let project = Project::new("ports", &format!("{ONE}{forward}"));
    let me = format!("pid {}", std::process::id());
    project
        .refused(75, &["up"])
        .alone()
        .tells(&[&port.to_string(), &me]);
    assert!(!project.state("").exists(), "something was made");
    let plan = project.run(&["up", "--plan", "--json"]).exits(1).objects();
    let error = plan.iter().find(|event| event["severity"] == "error").unwrap();
    let text = error["text"].as_str().unwrap();
    assert!(text.contains(&port.to_string()) && text.contains(&me), "{text}");
    assert!(error["remediation"].is_string(), "{error}");

    project.config_with(&format!("[broker]\nport = {port}\n"), ONE);
    project.refused(75, &["up"]).tells(&[&port.to_string(), &me]);
    project.assert_nothing_left();
    drop(taken);
    project.run(&["up"]).exits(0);
    assert_eq!(project.status()["broker"]["port"], port);
    project.down();
}

#[test]
fn configs_that_cannot_be_meant_are_refused_with_their_place() {
    let project = Project::new("configs", "");
    let two = |port: u16| format!("{ONE}[[vms.port_forwards]]\nhost = {port}\nguest = 80\n");
    for (vms, words) in [
        (format!("{ONE}{ONE}"), &["web"][..]),
        (
            format!("{}{}", two(18080), two(18080).replace("web", "db")),
            &["18080"],
        ),
        (format!("{ONE}memory = \"lots\"\n"), &["lots"]),
        (
            format!("{ONE}[vms.bootstrap]\nmode = \"auto\"\nscript = \"nowhere.sh\"\n"),
            &["nowhere.sh"],
        ),
    ] {
        project.config(&vms);
        let refusal = project.refused(65, &["up"]).alone().tells(words);
        assert!(
            refusal.stderr.contains("castra.toml") || refusal.remediation.contains("castra.toml"),
            "{refusal:?}"
        );
        assert!(!project.state("").exists(), "something was made for {vms}");
    }
    project.config(ONE);
    let refusal = project.refused(65, &["up", "--bootstrap", "always"]).alone();
    refusal.tells(&["script"]).advises("--bootstrap skip");
    assert!(!project.state("").exists());
}

#[test]
fn unknown_names_are_answered_with_those_there_are() {
    let project = Project::new("names", TWO);
    for args in [
        &["up", "wbe"][..],
        &["down", "wbe"],
        &["bootstrap", "wbe"],
        &["up", "--bootstrap", "wbe=skip"],
        &["up", "--plan", "wbe"],
    ] {
        project.refused(64, args).alone().tells(&["wbe", "web", "db"]);
        assert!(!project.state("").exists(), "{args:?} made something");
    }
    project
        .refused(64, &["up", "--bootstrap", "sometimes"])
        .alone()
        .tells(&["sometimes"]);
}

#[test]
fn a_plan_touches_nothing() {
    let project = Project::new("plan", &format!("{TWO}{SCRIPT}"));
    project.run(&["up", "--plan"]).exits(0);
    project.run(&["up", "--plan", "--json", "web"]).exits(0);
    project.run(&["bootstrap", "--plan"]).exits(1);
    assert!(!project.state("").exists() && !project.castra().home().exists());
    project.run(&["up", "--bootstrap", "skip"]).exits(0);
    let before = stamps(&project.state(""));
    project.run(&["up", "--plan"]).exits(0);
    project.run(&["status"]).exits(0);
    assert_eq!(before, stamps(&project.state("")));
    project.down();
}

/// Every file but the broker's own with its size and time.
fn stamps(dir: &Path) -> Vec<String> {
    let output = Command::new("find")
        .arg(dir)
        .args(["-not", "-path", "*/logs/*", "-not", "-path", "*/handshakes*"])
        .args(["-printf", "%p %s %T@\n"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn a_state_root_that_cannot_be_made_is_said() {
    let project = Project::new("unwritable", ONE);
    fs::write(project.castra().project().join("state"), "in the way").unwrap();
    for args in [&["up"][..], &["up", "--broker-only"]] {
        project.refused(73, args).tells(&["state"]);
    }
    fs::remove_file(project.castra().project().join("state")).unwrap();

    // Somebody else's directory: as nobody where the tests run as root.
    if nix::unistd::geteuid().is_root() {
        let parent = project.castra().project();
        fs::set_permissions(&parent, fs::Permissions::from_mode(0o755)).unwrap();
        let binary = env!("CARGO_BIN_EXE_castra");
        let open = |path: &Path| {
            let mut above: Vec<&Path> = path.ancestors().collect();
            above.pop();
            above
                .iter()
                .all(|dir| fs::metadata(dir).is_ok_and(|meta| meta.permissions().mode() & 0o005 == 0o005))
        };
        // A build directory that nobody may enter: a copy will do.
        let copy = project.castra().dir().join("castra");
        let binary = match open(Path::new(binary)) {
            true => PathBuf::from(binary),
            false => {
                fs::copy(binary, &copy).unwrap();
                copy
            }
        };
        let fake = project.castra().write("qemu.py", "#!/bin/sh\n");
        fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
        let text = fs::read_to_string(parent.join("castra.toml")).unwrap();
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/fake-qemu.py");
        project.castra().write(
            "castra.toml",
            &text.replace(&own.display().to_string(), &fake.display().to_string()),
        );
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(binary)
            .args(["--json", "up"])
            .current_dir(&parent)
            .env("CASTRA_HOME", project.castra().home());
        let refusal = Refusal::of(finish(command, &["up"]).exits(73));
        refusal.tells(&["state", "ermission denied"]);
    }
    assert!(!project.state("").exists());
    project.config(ONE);
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing_running() {
    let project = Project::new("full", ONE);
    project.run(&["up"]).exits(0);
    project.down();
    // No file may grow beyond this: the overlay's own tables do.
    for limit in [100_000_u64, 4_096, 512] {
        let mut command = Command::new("python3");
        let program = "import os,resource,sys; n=int(sys.argv[1]); \
                       resource.setrlimit(resource.RLIMIT_FSIZE,(n,n)); os.execv(sys.argv[2],sys.argv[2:])";
        command
            .args(["-c", program, &limit.to_string(), env!("CARGO_BIN_EXE_castra")])
            .args(["--json", "up"])
            .current_dir(project.castra().project())
            .env("CASTRA_HOME", project.castra().home());
        let ran = finish(command, &["up"]);
        assert!(matches!(ran.code, Some(1 | 73 | 74)), "{limit}: {ran:#?}");
        let said = format!("{}{}", ran.stdout, ran.stderr);
        assert!(
            said.contains("too large") || said.contains("ended with"),
            "{limit}: {said}"
        );
        assert_ne!(project.vm("web")["state"], "running");
        project.down();
    }
    project.run(&["up"]).exits(0);
    project.down();
}

#[test]
fn a_state_path_of_300_bytes_works() {
    let project = Project::new("deep", ONE);
    let deep = format!("{}/{}/{}", "d".repeat(120), "é".repeat(60), "e".repeat(80));
    let text = fs::read_to_string(project.castra().project().join("castra.toml")).unwrap();
    let text = text.replace("state_dir = \"state\"", &format!("state_dir = \"{deep}\""));
    project.castra().write("castra.toml", &text);
    project.run(&["up"]).exits(0);
    let root = project.castra().project().join(deep);
    assert!(root.as_os_str().len() > 300);
    assert_eq!(project.vm("web")["state"], "running");
    project.run(&["down"]).exits(0);
    project.assert_no_process();
    assert!(!root.join("overlays/web.qcow2").exists());
}

#[test]
fn a_fleet_beyond_the_hosts_memory_is_refused_unless_forced() {
    let project = Project::new("memory", ONE);
    let huge = format!("{ONE}[[vms]]\nname = \"huge\"\nkernel = \"vmlinuz\"\nmemory = \"64 TiB\"\n");
    project.config(&huge);
    for command in ["up", "restart"] {
        project
            .refused(69, &[command])
            .alone()
            .tells(&["2 VMs", "are available", "are missing"])
            .advises("castra up web");
    }
    let plan = project.run(&["up", "--plan"]).exits(1);
    assert!(plan.stderr.contains("too little memory"), "{plan:?}");
    assert!(!project.state("").exists());
    // The rest of the fleet needs no more than there is.
    project.run(&["up", "web"]).exits(0);
    let forced = project.run(&["up", "--force"]).exits(0);
    assert!(
        forced.stderr.contains("--force") && forced.stderr.contains("vm `huge`"),
        "{forced:?}"
    );
    project.pid("huge");
    // What runs is in its place already.
    project.run(&["restart", "huge"]).exits(0);
    project.down();
}
