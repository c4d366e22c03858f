//! The installation under every init that Vizier knows, each a directory with stand-ins for its programs.

use super::*;
use crate::core::bootstrap::bootstrap_plan::tests::config_of;
use crate::core::root::paths::StateRoot;
use crate::core::scratch::{RecordLock, Scratch};
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const SHELLS: [&[&str]; 3] = [&["dash"], &["busybox", "sh"], &["bash"]];
const MARK: &str = "castra-vizier-0123";

/// A guest in a directory.
struct Guest {
    scratch: Scratch,
}

impl Guest {
    fn new(label: &str) -> Guest {
        let guest = Guest {
            scratch: Scratch::new(label),
        };
        for dir in ["root/etc", "root/run", "root/proc/1", "home", "bin"] {
            fs::create_dir_all(guest.path(dir)).unwrap();
        }
        guest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// A stand-in that records its arguments.
    fn program(&self, name: &str) {
        let path = self.path("bin").join(name);
        let text = format!(
            "#!/bin/sh\necho {name} \"$@\" >>'{}'\n",
            self.path("calls").display()
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn calls(&self) -> String {
        fs::read_to_string(self.path("calls")).unwrap_or_default()
    }

    fn run(&self, shell: &[&str], command: &str, stdin: &str) -> String {
        let path = std::env::var("PATH").unwrap();
        let mut child = Command::new(shell[0])
            .args(&shell[1..])
            .args(["-c", command])
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("HOME", self.path("home"))
            .env("CASTRA_ROOT", self.path("root"))
            .env("CASTRA_INIT_PID", "nobody")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
        let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        // Every line of an answer has a line end before it, too.
        output.replace("\n\n", "\n").trim_start().to_owned()
    }

    /// Installs by way of the shell; the answer.
    fn install(&self, shell: &[&str], scripts: &[(&str, &str)]) -> String {
        let text = remote::install(&Parcel {
            scripts,
            stamp: "v1 s1",
            settings: &[
                ("vm", "web-0"),
                ("broker", "10.0.2.2:7070"),
                ("token", "it's $secret"),
            ],
            mark: MARK,
        });
        self.run(shell, &shell.join(" "), &text)
    }
}

fn answer(how: &str, guest: &Guest) -> String {
    let lib = guest.path("root/usr/local/lib/castra");
    format!(
        "{MARK} installed {}\n{MARK} enabled {how}\n{MARK} 0\n",
        lib.display()
    )
}

/// Only root can install a system service; these tests run if the user is root.
fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn the_files_are_what_they_should_be() {
    if !is_root() {
        return;
    }
    for shell in SHELLS {
        let guest = Guest::new("vizier-files");
        fs::create_dir_all(guest.path("root/run/systemd/system")).unwrap();
        guest.program("systemctl");
        assert_eq!(
            guest.install(shell, &SCRIPTS),
            answer("systemd", &guest),
            "{shell:?}"
        );
        for (name, contents) in SCRIPTS {
            assert_eq!(guest.text(&format!("root/usr/local/lib/castra/{name}")), contents);
        }
        assert_eq!(guest.text("root/etc/castra/token"), "it's $secret\n");
        let mode = |name: &str| fs::metadata(guest.path(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode("root/etc/castra/token"), 0o600);
        assert_eq!(mode("root/etc/castra/broker"), 0o644);
        assert_eq!(mode("root/usr/local/lib/castra/castra-vizier"), 0o755);
        // A second time without the scripts: they stay.
        assert_eq!(guest.install(shell, &[]), answer("systemd", &guest), "{shell:?}");
        assert!(guest.path("root/usr/local/lib/castra/castra-bus").exists());
    }
}

#[test]
fn systemd_gets_a_unit() {
    if !is_root() {
        return;
    }
    let guest = Guest::new("vizier-systemd");
    fs::create_dir_all(guest.path("root/run/systemd/system")).unwrap();
    guest.program("systemctl");
    assert_eq!(guest.install(&["dash"], &SCRIPTS), answer("systemd", &guest));
    assert_eq!(
        guest.calls(),
        "systemctl daemon-reload\nsystemctl -q enable castra-vizier.service\nsystemctl restart castra-vizier.service\n"
    );
    let unit = guest.text("root/etc/systemd/system/castra-vizier.service");
    assert!(unit.contains("\n[Service]\n") && !unit.contains('@'), "{unit}");
    assert!(unit.contains("WantedBy=multi-user.target"), "{unit}");
}

#[test]
fn openrc_runit_and_busybox_are_told_in_their_own_ways() {
    if !is_root() {
        return;
    }
    for shell in SHELLS {
        let guest = Guest::new("vizier-openrc");
        fs::create_dir_all(guest.path("root/run/openrc")).unwrap();
        fs::create_dir_all(guest.path("root/etc/init.d")).unwrap();
        guest.program("rc-service");
        guest.program("rc-update");
        assert_eq!(
            guest.install(shell, &SCRIPTS),
            answer("OpenRC", &guest),
            "{shell:?}"
        );
        assert_eq!(
            guest.calls(),
            "rc-update -q add castra-vizier default\nrc-service -q castra-vizier restart\n"
        );
        let script = guest.text("root/etc/init.d/castra-vizier");
        assert!(script.starts_with("#!/sbin/openrc-run\n"), "{script}");
        let checked = guest.run(
            &["dash"],
            "sh -n \"$CASTRA_ROOT/etc/init.d/castra-vizier\" && echo fine",
            "",
        );
        assert_eq!(checked, "fine\n");

        let guest = Guest::new("vizier-runit");
        fs::create_dir_all(guest.path("root/etc/service")).unwrap();
        guest.program("sv");
        assert_eq!(
            guest.install(shell, &SCRIPTS),
            answer("runit", &guest),
            "{shell:?}"
        );
        let linked = fs::read_link(guest.path("root/etc/service/castra-vizier")).unwrap();
        assert!(linked.join("run").exists());
        assert_eq!(guest.install(shell, &[]), answer("runit", &guest), "{shell:?}");
        assert_eq!(guest.calls(), "sv restart castra-vizier\n");

        let guest = Guest::new("vizier-busybox");
        fs::write(guest.path("root/etc/inittab"), "::sysinit:/etc/init.d/rcS\n").unwrap();
        symlink("/bin/busybox", guest.path("root/proc/1/exe")).unwrap();
        // init can't be signalled: no process runs under its pid here.
        let told = guest.install(shell, &SCRIPTS);
        assert!(
            told.ends_with(&format!("{MARK} failed init can't be told\n{MARK} 1\n")),
            "{told}"
        );
        let lib = guest.path("root/usr/local/lib/castra");
        let line = format!("::respawn:/bin/sh {}/castra-vizier run\n", lib.display());
        assert!(guest.text("root/etc/inittab").ends_with(&line));
        assert_eq!(
            guest.install(shell, &[]),
            answer("BusyBox init", &guest),
            "{shell:?}"
        );
        assert_eq!(guest.text("root/etc/inittab").matches("::respawn").count(), 1);
    }
}

#[test]
fn what_is_missing_is_named() {
    for shell in SHELLS {
        let guest = Guest::new("vizier-missing");
        fs::write(guest.path("root/usr"), "no directory").unwrap();
        fs::write(guest.path("home/.castra"), "no directory").unwrap();
        let told = guest.install(shell, &SCRIPTS);
        assert!(
            told.contains("failed") && told.contains("can't be made"),
            "{told}"
        );
        assert!(!told.contains("enabled"), "{told}");
    }
}

#[test]
fn the_guest_says_what_it_has() {
    for shell in SHELLS {
        let guest = Guest::new("vizier-probe");
        let probe = || {
            let said = guest.run(shell, remote::PROBE, "");
            said.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        assert!(probe().is_empty(), "{shell:?}");
        fs::create_dir_all(guest.path("root/usr/local/lib/castra")).unwrap();
        fs::write(guest.path("root/usr/local/lib/castra/vizier.version"), "v1 s1\n").unwrap();
        fs::create_dir_all(guest.path("root/run/castra")).unwrap();
        let active = guest.path("root/run/castra/vizier.active");
        fs::write(&active, format!("{}\nv1 s1\n", std::process::id())).unwrap();
        let lines = probe();
        let answer = Answer::of(&lines);
        assert_eq!(answer.has, Some("v1"), "{shell:?}");
        assert_eq!(
            answer.runs, None,
            "{shell:?}: a process of that number, but no Vizier"
        );
        let mut stand_in = Command::new("sh")
            .args(["-c", "read _", "castra-vizier"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let process = stand_in.id().to_string();
        fs::write(&active, format!("{process}\nv1 s1\n")).unwrap();
        let lines = probe();
        assert_eq!(
            Answer::of(&lines).runs,
            Some(("v1 s1", process.as_str())),
            "{shell:?}"
        );
        stand_in.kill().unwrap();
        stand_in.wait().unwrap();
        // A hostile guest's answer is just a wrong answer.
        let lines = ["castra-vizier-runs".to_owned(), "castra-vizier-has ".to_owned()];
        let answer = Answer::of(&lines);
        assert_eq!((answer.has, answer.runs), (Some(""), None));
    }
}

#[test]
fn the_plan_goes_by_what_was_enabled() {
    let scratch = Scratch::new("vizier-plan");
    let mut config = config_of(&["web"]);
    config.state = StateRoot::new(scratch.dir());
    let paths = config.state.vm(&config.vms[0].name);
    fs::create_dir_all(paths.dir()).unwrap();
    let status = |config: &Config| expected(&config.vms[0], config).0;
    assert_eq!(status(&config), VizierPlanStatus::Install);
    let note = |version: &str| {
        let enabled = Enabled {
            launch_id: "launch-1".into(),
            version: version.into(),
        };
        records::save(&paths.file(vm_file::VIZIER), &enabled).unwrap();
    };
    note(&VERSION);
    assert_eq!(status(&config), VizierPlanStatus::Install, "gone with its launch");
    config.vms[0].persist = true;
    config.vms[0].base_image = Some(crate::core::config::BaseImage {
        source: crate::core::config::ImageSource::Path("disk.qcow2".into()),
        digest: None,
    });
    assert_eq!(status(&config), VizierPlanStatus::Current);
    note("an older one");
    assert_eq!(status(&config), VizierPlanStatus::Update);
    config.vms[0].persist = false;
    let qemu = RecordLock::hold(&paths.qemu_pid());
    assert_eq!(
        status(&config),
        VizierPlanStatus::Unknown,
        "it runs, and nobody knows since when"
    );
    drop(qemu);
    config.vizier_enabled = false;
    let (status, remediation) = expected(&config.vms[0], &config);
    assert_eq!(status, VizierPlanStatus::Disabled);
    assert!(remediation.unwrap().contains("enabled = true"));
}
