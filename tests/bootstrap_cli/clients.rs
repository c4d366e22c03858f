//! `ssh`, `exec`, `cp`, `ssh-config`: one resolved connection for all.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::Guest;

#[test]
fn files_go_in_and_come_back_as_they_are() {
    let guest = Guest::up("cp", "true\n", "");
    let castra = guest.project.castra();
    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    fs::create_dir_all(castra.project().join("tree/empty dir")).unwrap();
    castra.write("tree/it's: a \"name\"", "odd");
    let tool = castra.write("tree/tool", "#!/bin/sh\n");
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o751)).unwrap();
    fs::write(castra.project().join("a:b c"), &bytes).unwrap();
    let there = castra.dir().join("there: it is");
    fs::create_dir_all(&there).unwrap();

    // In: several sources, a directory among them; into a name with blank and colon.
    let target = format!("web:{}", there.display());
    guest.project.run(&["cp", "./a:b c", "tree", &target]).exits(0);
    assert_eq!(fs::read(there.join("a:b c")).unwrap(), bytes);
    assert_eq!(
        fs::read_to_string(there.join("tree/it's: a \"name\"")).unwrap(),
        "odd"
    );
    assert!(there.join("tree/empty dir").is_dir());
    let mode = fs::metadata(there.join("tree/tool"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o751);

    // And out again, by the name in any case, into a new name.
    let source = format!("WEB:{}/a:b c", there.display());
    guest.project.run(&["cp", &source, "back"]).exits(0);
    assert_eq!(fs::read(castra.project().join("back")).unwrap(), bytes);
    let source = format!("web:{}/tree", there.display());
    guest.project.run(&["cp", "--quiet", &source, "copy"]).exits(0);
    assert_eq!(
        fs::read_to_string(castra.project().join("copy/it's: a \"name\"")).unwrap(),
        "odd"
    );

    // What can't be copied is told.
    let ran = guest.project.run(&["cp", "missing", "web:/tmp/"]);
    assert!(ran.code == Some(1), "{ran:?}");
    ran.tells("missing");
    let ran = guest.project.run(&["cp", "web:/no/such file", "."]);
    assert!(ran.code == Some(1), "{ran:?}");
    ran.tells("no/such file");
    for (args, part) in [
        (&["cp", "a", "b"][..], "neither side"),
        (&["cp", "wib:a", "."], "no VM \"wib\""),
        (&["cp", "web:a", "web:b"], "both sides"),
        (&["cp", "a"], "needs DST"),
    ] {
        let ran = guest.project.run(args).exits(64);
        ran.tells(part);
    }
    // A link isn't a way out: what it names comes as a file of its own.
    symlink("/etc/hostname", there.join("tree/link")).unwrap();
    guest
        .project
        .run(&["cp", &format!("web:{}/tree/link", there.display()), "linked"])
        .exits(0);
    assert!(
        fs::symlink_metadata(castra.project().join("linked"))
            .unwrap()
            .is_file()
    );

    guest.project.run(&["down"]).exits(0);
    let ran = guest.project.run(&["cp", "tree/tool", "web:/tmp/"]).exits(255);
    ran.tells("`web` is not running").tells("castra up web");
}

#[test]
fn links_stay_links_and_what_is_left_out_is_named() {
    let guest = Guest::up("cp-links", "true\n", "");
    let castra = guest.project.castra();
    // Start-up files that print do no harm.
    for name in [".bashrc", ".profile", ".zshenv"] {
        fs::write(
            castra.dir().join("sshd").join(name),
            "printf '\\033]0;title\\007'\n",
        )
        .unwrap();
    }
    let tree = castra.project().join("tree");
    fs::create_dir_all(tree.join("lib")).unwrap();
    fs::write(tree.join("lib/f"), "x").unwrap();
    for (link, to) in [
        ("lib64", "lib"),
        ("l", "lib/f"),
        ("d", "nowhere"),
        ("out", "/etc/hostname"),
    ] {
        symlink(to, tree.join(link)).unwrap();
    }
    let there = castra.dir().join("there");
    fs::create_dir(&there).unwrap();
    let at = |path: &str| format!("web:{}/{path}", there.display());
    guest.project.run(&["cp", "tree", &at("")]).exits(0);
    guest.project.run(&["cp", &at("tree"), "back"]).exits(0);
    for root in [there.join("tree"), castra.project().join("back")] {
        for (link, to) in [
            ("lib64", "lib"),
            ("l", "lib/f"),
            ("d", "nowhere"),
            ("out", "/etc/hostname"),
        ] {
            assert_eq!(
                fs::read_link(root.join(link)).unwrap().to_str(),
                Some(to),
                "{}",
                root.display()
            );
        }
        assert_eq!(fs::read_to_string(root.join("lib64/f")).unwrap(), "x");
    }
    // A second copy goes over the first one.
    fs::write(tree.join("lib/f"), "new").unwrap();
    guest.project.run(&["cp", "tree", &at("")]).exits(0);
    assert_eq!(fs::read_to_string(there.join("tree/l")).unwrap(), "new");

    // The rest is copied, what can't be is named, and the exit code says that it isn't all.
    nix::unistd::mkfifo(&tree.join("p"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(tree.join("s")).unwrap();
    let ran = guest.project.run(&["cp", "tree", &at("again")]).exits(1);
    ran.tells("tree/p: a socket, pipe").tells("tree/s: a");
    assert_eq!(fs::read_to_string(there.join("again/lib/f")).unwrap(), "new");
    nix::unistd::mkfifo(&there.join("again/p"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let ran = guest.project.run(&["cp", &at("again"), "again"]).exits(1);
    ran.tells("/p: a pipe or device, left out");
    assert_eq!(
        fs::read_to_string(castra.project().join("again/lib/f")).unwrap(),
        "new"
    );
    let _socket = std::os::unix::net::UnixListener::bind(there.join("tree/s")).unwrap();
    let ran = guest.project.run(&["cp", &at("tree"), "sockets"]).exits(1);
    ran.tells("socket");
    guest.project.run(&["cp", "tree/p", &at("")]).exits(1);
    guest.project.run(&["cp", &at("again/p"), "."]).exits(1);

    // Wildcards, names that look like them, names that look like flags; `.` has no name of its own.
    for name in ["a1", "a2", "a*", "-n", "it's\n new"] {
        fs::write(there.join(name), name).unwrap();
    }
    let names = |path: &str| {
        let entries = fs::read_dir(castra.project().join(path)).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    for (number, (pattern, expected)) in [
        ("a?", &["a*", "a1", "a2"][..]),
        ("a\\*", &["a*"]),
        ("-n", &["-n"]),
        ("it's\n new", &["it's\n new"]),
        ("tree/lib/.", &["f"]),
        ("tree/lib/", &["lib"]),
    ]
    .into_iter()
    .enumerate()
    {
        let to = format!("to-{number}");
        fs::create_dir(castra.project().join(&to)).unwrap();
        guest.project.run(&["cp", &at(pattern), &to]).exits(0);
        assert_eq!(names(&to), expected, "{pattern}");
    }
    let ran = guest.project.run(&["cp", &at("a?"), "none"]).exits(74);
    ran.tells("several sources need an existing folder");
    // Over a file; into the home.
    castra.write("one", "one");
    guest.project.run(&["cp", "one", &at("a1")]).exits(0);
    assert_eq!(fs::read_to_string(there.join("a1")).unwrap(), "one");
    guest.project.run(&["cp", "one", "tree/lib/f", "web:~/"]).exits(0);
    assert_eq!(fs::read_to_string(castra.dir().join("sshd/one")).unwrap(), "one");
    for args in [["one", "missing/"], ["one", "missing/x"], ["tree", "a1"]] {
        let ran = guest.project.run(&["cp", args[0], &at(args[1])]).exits(1);
        ran.tells("folder");
    }
    guest.project.run(&["cp", "one", "tree", &at("a1")]).exits(1);
    let left: Vec<_> = fs::read_dir(&there)
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(".castra"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn other_programs_reach_a_vm_by_the_printed_config() {
    let guest = Guest::up("ssh-config", "true\n", "");
    let castra = guest.project.castra();
    let before = files(&guest);
    let ran = guest.project.run(&["ssh-config"]).exits(0);
    assert!(
        ran.stdout
            .starts_with("Host web\n    HostName 127.0.0.1\n    Port "),
        "{ran:?}"
    );
    assert_eq!(
        guest.project.run(&["ssh-config", "WEB", "web"]).exits(0).stdout,
        ran.stdout
    );
    assert_eq!(files(&guest), before, "a reading command wrote something");
    let config = castra.write("ssh config", &ran.stdout);
    // From another directory, as an editor would.
    let output = Command::new("ssh")
        .current_dir("/")
        .stdin(Stdio::null())
        .arg("-F")
        .arg(&config)
        .args(["-o", "BatchMode=yes", "web", "echo reached; exit 5"])
        .output()
        .unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(5), &b"reached\n"[..]),
        "{output:?}"
    );

    // Included above a `Host *` of the user's that would have all VMs share one control socket, by way of a bastion.
    let block = guest
        .project
        .run(&["ssh-config", "--prefix", "demo-"])
        .exits(0)
        .stdout;
    assert!(block.starts_with("Host demo-web\n"), "{block}");
    castra.write("block", &block);
    let shared = castra.dir().join("cm-%r-%h");
    let own = format!(
        "Include {}/block\nHost *\n  ControlMaster auto\n  ControlPath {}\n  ControlPersist 20\n  ProxyCommand false\n",
        castra.project().display(),
        shared.display()
    );
    let own = castra.write("own config", &own);
    let by_own = |args: &[&str]| {
        let mut command = Command::new("ssh");
        command
            .current_dir("/")
            .stdin(Stdio::null())
            .arg("-F")
            .arg(&own)
            .args(args)
            .output()
            .unwrap()
    };
    let output = by_own(&["demo-web", "echo reached"]);
    assert_eq!(output.stdout, b"reached\n", "{output:?}");
    let control = guest.project.state("vms/web/client.ctl");
    let fits = control.as_os_str().len() <= 90;
    assert_eq!(control.exists(), fits, "the VM's own control socket");
    assert!(
        !fs::read_dir(castra.dir())
            .unwrap()
            .flatten()
            .any(|entry| { entry.file_name().to_string_lossy().starts_with("cm-") })
    );
    if fits {
        assert!(by_own(&["-O", "exit", "demo-web"]).status.success());
    }
    guest.project.run(&["ssh-config", "--prefix", "a b"]).exits(64);

    let line = guest.project.run(&["ssh-config", "--json"]).exits(0).stdout;
    let object: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(object["alias"], "web");
    assert_eq!(
        (&object["vm"], &object["port"]),
        (&"web".into(), &guest.sshd.port().into())
    );
    assert_eq!(object["host"], "127.0.0.1");

    let ran = guest.project.run(&["ssh-config", "wob"]).exits(64);
    ran.tells("did you mean `web`?");
    // What stdin brings passes through byte for byte, and the exit code comes back.
    let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let ran = castra.run_with_stdin(&["exec", "web", "--", "sh", "-c", "sha256sum; exit 9"], &bytes);
    let ran = ran.exits(9);
    let sum = castra::core::host::hex(&<sha2::Sha256 as sha2::Digest>::digest(&bytes));
    assert!(ran.stdout.starts_with(&sum), "{ran:?}");

    guest.project.run(&["down"]).exits(0);
    let ran = guest.project.run(&["ssh-config"]).exits(0);
    assert_eq!(ran.stdout, "");
    ran.tells("no VM of this project runs");
    guest.project.run(&["ssh-config", "web"]).exits(1);
}

#[test]
fn exec_is_a_raw_pipe_both_ways() {
    let guest = Guest::up("exec-raw", "true\n", "");
    let castra = guest.project.castra();
    // 1 MiB of whatever bytes, from a generator so that every run has the same.
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.to_le_bytes()
    })
    .flatten()
    .take(1 << 20)
    .collect();
    let sent = castra.write("sent", "");
    fs::write(&sent, &bytes).unwrap();
    let output = castra
        .command(&["exec", "web", "--", "cat"])
        .stdin(fs::File::open(&sent).unwrap())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stdout == bytes, "{} bytes came back", output.stdout.len());
    assert!(output.stderr.is_empty(), "{output:?}");

    // stdout and stderr stay apart; every word arrives as it is.
    let script = "printf '<%s>' \"$@\"; echo complaint >&2; exit 42";
    let odd = [
        "a b",
        "it's",
        "\"q\"",
        "$HOME",
        "*",
        "",
        "back\\slash",
        "line\nend",
        "-n",
        "größe",
        "a=b",
        "`x`",
        ";",
    ];
    let args = [&["exec", "web", "--", "sh", "-c", script, "sh"], &odd[..]].concat();
    let ran = guest.project.run(&args).exits(42);
    let whole: String = odd.iter().map(|word| format!("<{word}>")).collect();
    assert_eq!((ran.stdout, ran.stderr.as_str()), (whole, "complaint\n"));
    // `ssh` leaves the words to the guest's shell, as ssh itself does.
    let ran = guest
        .project
        .run(&["ssh", "web", "--", "echo one; exit 3"])
        .exits(3);
    assert_eq!(ran.stdout, "one\n");
    guest.project.run(&["down"]).exits(0);
}

/// Every file of the state root with length and time, but ssh's own `known_hosts`.
fn files(guest: &Guest) -> Vec<String> {
    crate::support::files_below(&guest.project.state(""))
        .into_iter()
        .filter(|path| !path.ends_with("known_hosts") && !path.to_string_lossy().contains("/handshakes/"))
        // The broker lives and writes on.
        .filter(|path| !path.to_string_lossy().contains("broker"))
        .map(|path| {
            let meta = fs::metadata(&path).unwrap();
            format!("{} {} {:?}", path.display(), meta.len(), meta.modified().unwrap())
        })
        .collect()
}
