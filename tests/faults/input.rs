//! Requests that can't be met: tools, images, ports, names, places to write.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::project::{FAKE_QEMU, ONE, Project, Refusal, SCRIPT, TWO, finish};
use crate::support::{CASTRA, Ran, copy_program, files_below};

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
    if let Some(nobody) = Nobody::of(&project) {
        let refusal = Refusal::of(nobody.run(&["--json", "up"]).exits(73));
        refusal.tells(&["state", "ermission denied"]);
    }
    assert!(!project.state("").exists());
    project.config(ONE);
}

/// Runs castra as nobody, in a project that others may enter. Root may write everywhere, so a file
/// system that refuses is shown by somebody who isn't root.
pub struct Nobody<'p> {
    project: &'p Project,
    binary: PathBuf,
}

impl Nobody<'_> {
    /// `None`: these tests don't run as root.
    pub fn of(project: &Project) -> Option<Nobody<'_>> {
        if !nix::unistd::geteuid().is_root() {
            return None;
        }
        let dir = project.castra().project();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        // A build directory that nobody may enter: copies will do.
        let binary = project.castra().dir().join("castra");
        copy_program(CASTRA, &binary);
        let fake = dir.join("qemu.py");
        copy_program(FAKE_QEMU, &fake);
        let text = fs::read_to_string(dir.join("castra.toml")).unwrap();
        let text = text.replace(FAKE_QEMU, &fake.display().to_string());
        project.castra().write("castra.toml", &text);
        Some(Nobody { project, binary })
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&self.binary)
            .args(args)
            .current_dir(self.project.castra().project())
            // A Python of root's own is not for nobody.
            .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
            .env("CASTRA_HOME", self.project.castra().home());
        finish(command, args)
    }
}

#[test]
fn a_state_root_that_became_read_only_is_said_and_what_runs_can_be_stopped() {
    let project = Project::new("read-only", ONE);
    let nobody = Nobody::of(&project);
    let run = |args: &[&str]| match &nobody {
        Some(nobody) => nobody.run(args),
        None => project.run(args),
    };
    let dirs = [project.castra().project(), project.castra().home()];
    for dir in &dirs {
        fs::create_dir_all(dir).unwrap();
        if nobody.is_some() {
            std::os::unix::fs::chown(dir, Some(65_534), Some(65_534)).unwrap();
        }
    }
    run(&["up"]).exits(0);
    let set = |file: u32, dir: u32| {
        for path in files_below(&project.state("")) {
            if fs::symlink_metadata(&path).unwrap().is_file() {
                fs::set_permissions(&path, fs::Permissions::from_mode(file)).unwrap();
            }
        }
        for name in ["", "vms", "vms/web", "overlays", "logs", "logs/bus", "handshakes"] {
            let path = project.state(name);
            if path.exists() {
                fs::set_permissions(path, fs::Permissions::from_mode(dir)).unwrap();
            }
        }
    };
    set(0o400, 0o500);
    let status = run(&["status", "--json"]).exits(0).objects();
    assert_eq!(status[0]["vms"][0]["state"], "running", "{status:#?}");
    for command in ["up", "restart"] {
        let refusal = Refusal::of(run(&["--json", command]).exits(73));
        refusal.tells(&["state", "ermission denied"]).advises("writable");
    }
    let down = run(&["down"]).exits(1);
    down.tells("their disks stay").prints("1 VM down");
    let status = run(&["status", "--json"]).exits(0).objects();
    assert_ne!(status[0]["vms"][0]["state"], "running", "{status:#?}");
    project.assert_no_process();
    set(0o600, 0o700);
    run(&["down"]).exits(0);
    project.assert_nothing_left();
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
            .args(["-c", program, &limit.to_string(), CASTRA])
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
    plan.tells("too little memory");
    assert!(!project.state("").exists());
    // The rest of the fleet needs no more than there is.
    project.run(&["up", "web"]).exits(0);
    let forced = project.run(&["up", "--force"]).exits(0);
    forced.tells("--force").tells("vm `huge`");
    project.pid("huge");
    // What runs is in its place already.
    project.run(&["restart", "huge"]).exits(0);
    project.down();
}

/// castra writes paths into JSON, which holds no other: such a place is refused before anything is made.
#[test]
fn a_place_that_is_no_utf8_is_refused_and_nothing_is_made() {
    use std::os::unix::ffi::OsStrExt;
    let odd = |name: &[u8]| std::ffi::OsStr::from_bytes(name).to_owned();
    let project = Project::new("utf8", ONE);
    let text = fs::read_to_string(project.castra().project().join("castra.toml")).unwrap();
    let dir = project.castra().dir().join(odd(b"nu\xff"));
    fs::create_dir(&dir).unwrap();
    let run = |home: Option<&Path>, args: &[&str]| {
        let mut command = project.castra().command(args);
        command.current_dir(&dir);
        if let Some(home) = home {
            command.env("CASTRA_HOME", home);
        }
        let ran = finish(command, args);
        assert!(
            !matches!(ran.code, Some(70 | 101)) && !ran.stderr.contains("internal error"),
            "{ran:?}"
        );
        ran
    };
    let refused = |ran: Ran| {
        assert_eq!(ran.code, Some(65), "{ran:?}");
        ran.tells("no UTF-8");
    };
    refused(run(None, &["init"]));
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    fs::write(dir.join("castra.toml"), &text).unwrap();
    for args in [
        &["up"][..],
        &["up", "--plan"],
        &["down"],
        &["status", "--json"],
        &["ports", "--json"],
        &["logs"],
        &["report", "--json"],
        &["clean"],
        &["bootstrap"],
        &["exec", "web", "--", "true"],
    ] {
        refused(run(None, args));
    }
    run(None, &["doctor", "--json"]);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing is made");
    assert!(!project.castra().home().join("projects").exists());
    // The same for castra's home, and for what lies below.
    let home = project.castra().dir().join(odd(b"ho\xfe"));
    let there = project.castra().project();
    for args in [
        &["up"][..],
        &["workspaces", "--json"],
        &["image", "list", "--json"],
        &["doctor", "--json"],
        &["ports", "--all", "--json"],
    ] {
        let mut command = project.castra().command(args);
        command.current_dir(&there).env("CASTRA_HOME", &home);
        refused(finish(command, args));
    }
    assert!(!home.exists());
    // Odd names of others below a state root are no obstacle.
    project.run(&["up"]).exits(0);
    for name in ["logs", "images", "vms", "handshakes", "overlays", ""] {
        let dir = project.state(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(odd(b"od\xfd.json")), "{}").unwrap();
    }
    let tools = project.castra().dir().join(odd(b"to\xfc"));
    fs::create_dir(&tools).unwrap();
    for args in [
        &["status", "--json"][..],
        &["doctor", "--json"],
        &["report", "--json"],
        &["down"],
        &["clean", "--json"],
    ] {
        let mut command = project.castra().command(args);
        let mut path = tools.clone().into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap());
        command.env("PATH", path);
        let ran = finish(command, args);
        assert!(!matches!(ran.code, Some(70 | 101)), "{ran:?}");
    }
}
