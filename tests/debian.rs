//! The bootstrap on real guests: castra's own (BusyBox init) and Debians with OpenSSH that are built
//! here, one with systemd, another with OpenRC and runit. Run by `make test`. Each boots
//! once; what is tested is told by rewriting castra.toml between two `castra bootstrap`.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use sha2::{Digest, Sha256};
use support::guest_project::{Project, home, text};
use support::{CASTRA, objects, until_within};

/// A Debian under emulation takes its time.
const PATIENCE: Duration = Duration::from_secs(300);

const BUILDER: &str = "tests/support/build-debian.sh";

/// The Debian guest of systemd.
fn debian() -> &'static Path {
    static DEBIAN: LazyLock<PathBuf> = LazyLock::new(|| built("systemd"));
    &DEBIAN
}

/// A Debian guest, built if this script never built it.
fn built(init: &str) -> PathBuf {
    let builder = Path::new(env!("CARGO_MANIFEST_DIR")).join(BUILDER);
    let sum = castra::core::host::hex(&Sha256::digest(fs::read(&builder).unwrap()));
    let dir = home().join(format!("debian-{init}-{}", &sum[..12]));
    let built = Command::new(&builder).arg(init).arg(&dir).status().unwrap();
    assert!(built.success(), "{BUILDER} {init} failed");
    dir
}

/// What one bootstrap came to.
struct Ran {
    code: Option<i32>,
    events: Vec<Value>,
}

impl Ran {
    fn of(project: &Project, args: &[&str]) -> Ran {
        let output = project.run(&[args, &["--json"]].concat());
        let events = objects(&text(&output.stdout));
        Ran {
            code: output.status.code(),
            events,
        }
    }

    /// The end of this VM's bootstrap: `Success`, `NoOp` or the error.
    #[track_caller]
    fn end(&self, vm: &str) -> String {
        let of_vm = |kind: &str, key: &str| {
            let event = self
                .events
                .iter()
                .find(|event| event["type"] == kind && event["vm"] == vm)?;
            Some(event[key].as_str().unwrap().to_owned())
        };
        of_vm("bootstrap.completed", "status")
            .or_else(|| of_vm("bootstrap.failed", "error"))
            .unwrap_or_else(|| panic!("no end of {vm} in {:#?}", self.events))
    }

    fn step(&self, vm: &str, step: &str) -> &Value {
        let found = self
            .events
            .iter()
            .find(|event| event["type"] == "bootstrap.step" && event["vm"] == vm && event["step"] == step);
        found.unwrap_or_else(|| panic!("no {step} of {vm} in {:#?}", self.events))
    }

    #[track_caller]
    fn all_end(&self, code: i32, end: &str) {
        for vm in BOTH {
            assert!(self.end(vm).contains(end), "{vm}: {}", self.end(vm));
        }
        assert_eq!(self.code, Some(code));
    }
}

const BOTH: [&str; 2] = ["small", "stock"];

const PATIENT: &str = "[bootstrap]\nhandshake_timeout_secs = 900\nstep_timeout_secs = 180\n";

/// castra.toml's VMs; `small` and `stock` go below their [vms.bootstrap].
fn vms(debian: &Path, small: &str, stock: &str) -> String {
    format!(
        "{PATIENT}[[vms]]\nname = \"small\"\n[vms.bootstrap]\n{small}\n{}[vms.bootstrap]\n{stock}\n",
        stock_vm(debian, "stock", "cpus = 2\n", "")
    )
}

/// The [[vms]] entry of a Debian guest; `more` goes to its kernel.
fn stock_vm(debian: &Path, name: &str, keys: &str, more: &str) -> String {
    format!(
        "[[vms]]\nname = \"{name}\"\nmemory = \"512 MiB\"\nseed = \"none\"\n{keys}\
         base_image = \"{0}/disk.raw\"\nkernel = \"{0}/vmlinuz\"\ninitrd = \"{0}/initrd\"\n\
         cmdline = \"root=/dev/vda rw console=ttyS0 quiet{more}\"\n",
        debian.display()
    )
}

const PIPELINE: &str = "script = \"site.sh\"\npayload = \"site\"\nverify_path = \"/srv/site/it's \\\"odd\\\"\"\n\
    verify_command = \"test \\\"$(cat /srv/site/greeting)\\\" = \\\"$GREETING\\\"\"\n\
    env = { GREETING = \"it's \\\"fine\\\" $HOME\" }\n";
const SITE: &str = "#!/bin/sh\nset -eu\n\
    if [ -d /srv/site ] && cmp -s \"$CASTRA_PAYLOAD_DIR/big\" /srv/site/big; then echo Castra:noop; exit 0; fi\n\
    mkdir -p /srv/site\ncp -r \"$CASTRA_PAYLOAD_DIR/.\" /srv/site\nprintf '%s' \"$GREETING\" >/srv/site/greeting\n\
    echo \"configured $CASTRA_VM\"\n";

#[test]
fn both_guests_through_everything_a_bootstrap_may_meet() {
    let debian = debian();
    // The key that the stock guest was built with; castra gives its own guest the same.
    let key = format!("[ssh]\nidentity = \"{}/id_ed25519\"\n", debian.display());
    let project = Project::new("both", &key);
    project.file("site.sh", SITE.as_bytes());
    let big: Vec<u8> = (0..3_000_000_u32).map(|byte| (byte % 251) as u8).collect();
    project.file("site/big", &big);
    project.file("site/it's \"odd\"", b"odd\n");
    fs::create_dir_all(project.dir.join("site/empty")).unwrap();

    // Boot, and the whole pipeline on both.
    project.config(&vms(debian, PIPELINE, PIPELINE));
    let began = Instant::now();
    let up = Ran::of(&project, &["up"]);
    up.all_end(0, "Success");
    eprintln!("both guests up and bootstrapped after {:?}", began.elapsed());
    for vm in BOTH {
        for step in ["wait-handshake", "connect", "transfer", "apply", "verify"] {
            assert_eq!(up.step(vm, step)["status"], "success", "{vm} {step}");
        }
        let seen = project.expect(
            0,
            &[
                "exec",
                vm,
                "--",
                "sh",
                "-c",
                "wc -c </srv/site/big; ls -d /srv/site/empty",
            ],
        );
        assert_eq!(
            seen.split_whitespace().collect::<Vec<_>>(),
            ["3000000", "/srv/site/empty"],
            "{vm}"
        );
    }
    assert!(
        project
            .expect(0, &["exec", "stock", "--", "cat", "/proc/1/comm"])
            .starts_with("systemd")
    );

    // The same again: nothing is left to do, and both say so.
    Ran::of(&project, &["bootstrap"]).all_end(0, "NoOp");

    a_broker_restarted_in_between(&project);
    files_by_cp(&project);
    failing_verify(&project, debian);
    a_deadline_ends_script_and_children(&project, debian);
    a_full_disk(&project, debian);
    users_and_keys(&project, debian);
    vizier_for_any_user(&project, debian);
    a_guest_without_sshd(&project, debian);
    a_reboot_during_apply(&project);
}

fn a_broker_restarted_in_between(project: &Project) {
    let before = project.status()["broker"].clone();
    let killed = Command::new("kill")
        .args(["-9", &before["pid"].to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    until_within(PATIENCE, "the broker to read offline", || {
        project.status()["broker"]["state"] == "offline"
    });
    let ran = Ran::of(project, &["bootstrap"]);
    ran.all_end(0, "NoOp");
    let after = project.status()["broker"].clone();
    assert_eq!(after["port"], before["port"]);
    assert_ne!(after["pid"], before["pid"]);
}

fn files_by_cp(project: &Project) {
    for vm in BOTH {
        project.expect(0, &["cp", "site", &format!("{vm}:/tmp/c:o py")]);
        project.expect(
            0,
            &["cp", &format!("{vm}:/tmp/c:o py/big"), &format!("back-{vm}")],
        );
        let back = fs::read(project.dir.join(format!("back-{vm}"))).unwrap();
        assert!(back == fs::read(project.dir.join("site/big")).unwrap(), "{vm}");
        let config = project.expect(0, &["ssh-config", vm]);
        project.file("ssh.conf", config.as_bytes());
        let reached = Command::new("ssh")
            .args(["-F", "ssh.conf", "-o", "BatchMode=yes", vm, "echo reached"])
            .current_dir(&project.dir)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(
            text(&reached.stdout),
            "reached\n",
            "{vm}: {}",
            text(&reached.stderr)
        );
    }
}

fn failing_verify(project: &Project, debian: &Path) {
    project.file("true.sh", b"#!/bin/sh\ntrue\n");
    let missing = "script = \"true.sh\"\nverify_path = \"/no/such\"\n";
    project.config(&vms(debian, missing, missing));
    let ran = Ran::of(project, &["bootstrap"]);
    ran.all_end(1, "/no/such doesn't exist");
    for vm in BOTH {
        assert_eq!(ran.step(vm, "apply")["status"], "success", "{vm}");
        assert_eq!(ran.step(vm, "verify")["status"], "failed", "{vm}");
    }
}

fn a_deadline_ends_script_and_children(project: &Project, debian: &Path) {
    project.file(
        "hang.sh",
        b"#!/bin/sh\ntrap '' TERM\nsleep 4711 &\na=$!\nsh -c 'trap \"\" TERM; sleep 4712; :' &\n\
          echo $$ $a $! >pids\necho hanging\nwait\nwait\n",
    );
    let hang = "script = \"hang.sh\"\napply_timeout_secs = 8\n";
    project.config(&vms(debian, hang, hang));
    let ran = Ran::of(project, &["bootstrap"]);
    ran.all_end(1, "didn't end within 8 s");
    for vm in BOTH {
        assert!(
            ran.step(vm, "apply")["detail"]
                .as_str()
                .unwrap()
                .contains("hanging"),
            "{vm}"
        );
        // Also the processes that don't heed SIGTERM.
        let alive =
            "for pid in $(cat /var/tmp/castra/pids); do ! kill -0 $pid 2>/dev/null || echo $pid; done";
        until_within(PATIENCE, "the script's children to end", || {
            project
                .expect(0, &["exec", vm, "--", "sh", "-c", alive])
                .is_empty()
        });
    }
}

fn a_full_disk(project: &Project, debian: &Path) {
    let full = "script = \"site.sh\"\npayload = \"site\"\nremote_dir = \"/mnt/full\"\n";
    for vm in BOTH {
        project.expect(
            0,
            &["exec", vm, "--", "sh", "-c", "mkdir -p /mnt/full && mount -t tmpfs -o size=1m none /mnt/full && mkdir /mnt/full/payload && echo old >/mnt/full/payload/mark"],
        );
    }
    project.config(&vms(debian, full, full));
    let ran = Ran::of(project, &["bootstrap"]);
    ran.all_end(1, "No space left");
    for vm in BOTH {
        assert!(ran.end(vm).contains("disk_size"), "{vm}: {}", ran.end(vm));
        let left = project.expect(
            0,
            &[
                "exec",
                vm,
                "--",
                "sh",
                "-c",
                "ls -A /mnt/full; cat /mnt/full/payload/mark",
            ],
        );
        assert_eq!(
            left, "payload\nold\n",
            "{vm}: a part of the transfer was applied or is left"
        );
    }
}

/// Only Debian has more users, and asks for passwords: castra never does.
fn users_and_keys(project: &Project, debian: &Path) {
    let keygen = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(project.dir.join("wrong"))
        .status()
        .unwrap();
    assert!(keygen.success());
    let script = "script = \"boot/true.sh\"\n";
    project.file("boot/true.sh", b"#!/bin/sh\nid -un; touch mine\n");
    project.config(&vms(debian, "", script));
    let with = |metadata: &str| {
        project.file("boot/bootstrap.toml", metadata.as_bytes());
        Ran::of(project, &["bootstrap", "stock"])
    };
    let ran = with(&format!(
        "[ssh]\nidentity = \"{}\"\n",
        project.dir.join("wrong").display()
    ));
    assert!(
        ran.end("stock").contains("refused the SSH key"),
        "{}",
        ran.end("stock")
    );
    // /var/tmp/castra is root's by now.
    let ran = with("[ssh]\nuser = \"plain\"\n");
    assert!(
        ran.end("stock")
            .contains("user `plain` can't use /var/tmp/castra")
            && ran.end("stock").contains("remote_dir"),
        "{}",
        ran.end("stock")
    );
    let ran = with("remote_dir = \"/tmp/of plain\"\n[ssh]\nuser = \"plain\"\n[verify]\npath = \"mine\"\n");
    assert_eq!(ran.end("stock"), "Success");
    let texts: Vec<&Value> = ran.events.iter().map(|event| &event["text"]).collect();
    assert!(texts.iter().any(|text| **text == "plain"), "{texts:?}");
}

/// Vizier for root by sudo, for a user whose systemd stays after the last login, and for one whose systemd
/// doesn't.
fn vizier_for_any_user(project: &Project, debian: &Path) {
    let script = "script = \"boot/true.sh\"\n";
    project.config(&vms(debian, "", script));
    let root = |command: &str| project.expect(0, &["exec", "stock", "--", "sh", "-c", command]);
    root(
        "systemctl -q disable --now castra-vizier; \
         rm -rf /usr/local/lib/castra /etc/castra /etc/systemd/system/castra-vizier.service",
    );
    let of_user = |user: &str| {
        let text = format!("remote_dir = \"/tmp/of {user}\"\n[ssh]\nuser = \"{user}\"\n");
        project.file("boot/bootstrap.toml", text.as_bytes());
        let ran = Ran::of(project, &["bootstrap", "stock"]);
        assert_eq!(ran.end("stock"), "Success", "{user}");
        assert_eq!(
            ran.step("stock", "vizier-handshake")["status"],
            "success",
            "{user}"
        );
        ran
    };
    for (user, place, how, remove) in [
        (
            "op",
            "to /usr/local/lib/castra",
            "started under systemd",
            "systemctl -q disable --now castra-vizier; rm -rf /usr/local/lib/castra",
        ),
        (
            "linger",
            "to /home/linger/.castra/vizier (for this user alone: ",
            "started under systemd --user",
            "loginctl terminate-user linger; rm /var/lib/systemd/linger/linger",
        ),
        (
            "plain",
            "to /home/plain/.castra/vizier (for this user alone: ",
            "started under nohup, not started again after a reboot (systemd --user would end it at the last logout",
            "sh /home/plain/.castra/vizier/castra-vizier stop",
        ),
    ] {
        let first = of_user(user);
        let installed = first.step("stock", "vizier-install")["detail"].as_str().unwrap();
        let enabled = first.step("stock", "vizier-enable")["detail"].as_str().unwrap();
        assert!(installed.contains(place), "{user}: {installed}");
        assert!(enabled.starts_with(how), "{user}: {enabled}");
        // That user's last login is over, and Vizier is still there.
        let again = of_user(user);
        let still = again.step("stock", "vizier-enable")["detail"].as_str().unwrap();
        assert!(still.starts_with("runs already"), "{user}: {still}");
        root(remove);
    }
}

fn a_guest_without_sshd(project: &Project, debian: &Path) {
    let stopped = |vm: &str, how: &str| project.expect(0, &["exec", vm, "--", "sh", "-c", how]);
    // A server that answers keeps running; init has none to start.
    stopped(
        "small",
        "mv /usr/sbin/sshd /usr/sbin/sshd.off; kill $(cat /run/sshd.pid)",
    );
    stopped("stock", "systemctl stop ssh.socket ssh.service");
    let script = "script = \"true.sh\"\nhandshake_timeout_secs = 6\nstep_timeout_secs = 6\n";
    project.config(&vms(debian, script, script));
    let ran = Ran::of(project, &["bootstrap"]);
    assert!(
        ran.end("small").contains("no SSH server answered within 6 s"),
        "{}",
        ran.end("small")
    );
    let stock = ran.end("stock");
    // Whether it shakes hands depends on the in-guest service.
    assert!(
        stock.contains("no proof of life within 6 s") || stock.contains("no SSH server answered within 6 s"),
        "{stock}"
    );
    assert_eq!(ran.code, Some(1));
}

/// A guest that reboots under a script ends that bootstrap, not its QEMU.
fn a_reboot_during_apply(project: &Project) {
    project.expect(0, &["down", "--quiet", "--graceful-wait-secs", "30"]);
    project.file("reboot.sh", b"#!/bin/sh\necho going\nreboot\nsleep 600\n");
    project.config("[[vms]]\nname = \"small\"\n[vms.bootstrap]\nscript = \"reboot.sh\"\n");
    let ran = Ran::of(project, &["up"]);
    // Its sshd ends before its QEMU; if QEMU takes long, only the connection's end is known.
    let end = ran.end("small");
    assert!(
        end.contains("the VM ended") || end.contains("the SSH connection broke"),
        "{end}"
    );
    assert_eq!(ran.step("small", "apply")["status"], "failed");
    assert_eq!(ran.code, Some(1));
}

#[test]
fn vizier_under_openrc_and_runit() {
    let debian = &built("others");
    let key = format!("[ssh]\nidentity = \"{}/id_ed25519\"\n", debian.display());
    let project = Project::new("inits", &key);
    project.file("true.sh", b"#!/bin/sh\ntrue\n");
    let inits = [
        ("rc", "/sbin/openrc-init", "OpenRC"),
        ("sv", "/sbin/runit", "runit"),
    ];
    let vms: String = inits
        .iter()
        .map(|(vm, init, _)| {
            let vm = stock_vm(debian, vm, "", &format!(" init={init}"));
            format!("{vm}[vms.bootstrap]\nscript = \"true.sh\"\n")
        })
        .collect();
    project.config(&format!("{PATIENT}{vms}"));
    let detail = |ran: &Ran, vm: &str, step: &str| {
        assert_eq!(ran.end(vm), "Success", "{vm}");
        ran.step(vm, step)["detail"].as_str().unwrap().to_owned()
    };
    let root = |vm: &str, command: &str| project.run(&["exec", vm, "--", "sh", "-c", command]);

    let up = Ran::of(&project, &["up"]);
    for (vm, init, how) in inits {
        assert_eq!(detail(&up, vm, "vizier-enable"), format!("started under {how}"));
        let one = text(&root(vm, "tr '\\0' ' ' </proc/1/cmdline").stdout);
        assert!(one.starts_with(init), "{vm}: {one}");
    }
    // Nothing to do; then another version, which takes the place of the first.
    let again = Ran::of(&project, &["bootstrap"]);
    for (vm, ..) in inits {
        let enabled = detail(&again, vm, "vizier-enable");
        assert!(enabled.starts_with("runs already"), "{vm}: {enabled}");
        let process = enabled.rsplit(' ').next().unwrap().to_owned();
        let older = format!("echo older >/usr/local/lib/castra/vizier.version; kill -9 {process}");
        assert!(root(vm, &older).status.success(), "{vm}");
        until_within(PATIENCE, "its supervisor to start it again", || {
            let started = root(vm, "sed -n 1p /run/castra/vizier.active");
            let started = text(&started.stdout);
            !started.trim().is_empty() && started.trim() != process
        });
    }
    let updated = Ran::of(&project, &["bootstrap"]);
    for (vm, _, how) in inits {
        let installed = detail(&updated, vm, "vizier-install");
        assert!(installed.starts_with("copied version"), "{vm}: {installed}");
        assert_eq!(
            detail(&updated, vm, "vizier-enable"),
            format!("started under {how}"),
            "{vm}"
        );
    }
    let says = |vm: &str, command: &str| text(&root(vm, command).stdout);
    assert!(says("rc", "rc-service castra-vizier status").contains("started"));
    assert!(says("sv", "sv status castra-vizier").starts_with("run: castra-vizier"));
}

#[test]
fn the_example_of_the_documentation_runs() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/examples/bootstrap");
    let project = Project::new("example", "");
    let copied = Command::new("cp")
        .arg("-r")
        .arg(example.join("."))
        .arg(&project.dir)
        .status()
        .unwrap();
    assert!(copied.success());
    let config = fs::read_to_string(example.join("castra.toml")).unwrap();
    let config = config.replace("[project]\n", "[project]\nstate_dir = \"state\"\n");
    // Its time limits are for an idle machine.
    let config = config.replace(
        "[vms.bootstrap]\n",
        "[vms.bootstrap]\n  handshake_timeout_secs = 900\n",
    );
    fs::write(project.dir.join("castra.toml"), config).unwrap();

    let binary = Path::new(CASTRA).parent().unwrap();
    let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap());
    let ran = Command::new("sh")
        .args(["on-reachable.sh", "web", "900"])
        .current_dir(&project.dir)
        .env("CASTRA_HOME", home())
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    eprintln!("{}{}", text(&ran.stdout), text(&ran.stderr));
    assert!(ran.status.success());

    let again = Ran::of(&project, &["up"]);
    assert_eq!(again.end("web"), "NoOp");
    assert_eq!(again.step("web", "verify")["status"], "success");
    let page = project.expect(
        0,
        &["exec", "web", "--", "wget", "-q", "-O", "-", "http://127.0.0.1/"],
    );
    assert!(
        page.contains("it's \"good\" to be here (served by web)"),
        "{page}"
    );
}
