//! `make install` and `make uninstall`, with the binary under test; in `deps` the packages that `make
//! demo` and `make test` need, in `compile` how the release is built, in
//! `sources` where the tests' Debian comes from.
#![allow(clippy::unwrap_used)]

mod compile;
mod deps;
mod sources;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{CASTRA, Castra, files_below, program};

const MAN: &str = "usr/share/man";
const DOCS: &str = "usr/share/doc/castra";

const FILES: [(&str, u32); 10] = [
    ("usr/bin/castra", 0o755),
    ("usr/share/bash-completion/completions/castra", 0o644),
    ("usr/share/doc/castra/SECURITY.md", 0o644),
    ("usr/share/doc/castra/examples/demo/castra.toml", 0o644),
    ("usr/share/fish/vendor_completions.d/castra.fish", 0o644),
    ("usr/share/man/man1/castra.1", 0o644),
    ("usr/share/man/man1/castra-bus-tail.1", 0o644),
    ("usr/share/man/man5/castra.toml.5", 0o644),
    ("usr/share/man/man7/castra-security.7", 0o644),
    ("usr/share/zsh/site-functions/_castra", 0o644),
];

fn make(target: &str, root: &Path) {
    let output = Command::new("make")
        .args([
            "--silent",
            "--no-print-directory",
            "-C",
            env!("CARGO_MANIFEST_DIR"),
            target,
            "PREFIX=/usr",
        ])
        .arg(format!("DESTDIR={}", root.display()))
        .arg(format!("BINARY={}", CASTRA))
        // Cargo must not be needed for a binary that is there; nor is this make part of the one that
        // runs the tests.
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("CARGO", "false")
        .output()
        .expect("make is there: scripts/install-deps.sh test");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "make {target}: {said}");
}

fn found(root: &Path) -> Vec<PathBuf> {
    let mut files = files_below(root);
    files.sort();
    files
}

#[test]
fn what_is_installed_is_uninstalled() {
    let castra = Castra::new("install");
    let root = castra.dir().join("root");
    let bystanders = [
        root.join(DOCS).join("notes.md"),
        root.join(MAN).join("man1/castra-of-somebody-else.1"),
    ];
    for bystander in &bystanders {
        fs::create_dir_all(bystander.parent().unwrap()).unwrap();
        fs::write(bystander, "somebody else's").unwrap();
    }

    make("install", &root);
    let pages = castra.dir().join("pages");
    fs::create_dir(&pages).unwrap();
    castra.run(&["man", "--dir", pages.to_str().unwrap()]).exits(0);
    let mut expected: Vec<PathBuf> = FILES.iter().map(|(name, _)| root.join(name)).collect();
    // All that there are, which the Makefile lists so that they can be uninstalled.
    for page in found(&pages) {
        let section = page.extension().unwrap().to_str().unwrap();
        let dir = root.join(MAN).join(format!("man{section}"));
        expected.push(dir.join(page.file_name().unwrap()));
    }
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    for file in found(&docs) {
        expected.push(root.join(DOCS).join(file.strip_prefix(&docs).unwrap()));
    }
    expected.extend(bystanders.clone());
    expected.sort();
    expected.dedup();
    assert_eq!(found(&root), expected);
    for (name, mode) in FILES {
        let path = root.join(name);
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            mode,
            "{name}"
        );
        assert!(fs::metadata(&path).unwrap().len() > 400, "{name}");
    }
    let read = |name: &str| fs::read_to_string(root.join(name)).unwrap();
    assert_eq!(
        read("usr/share/man/man1/castra.1"),
        castra.run(&["man"]).exits(0).stdout
    );
    let installed = Command::new(root.join("usr/bin/castra"))
        .arg("--version")
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&installed.stdout),
        castra.run(&["--version"]).stdout
    );

    make("uninstall", &root);
    assert_eq!(found(&root), bystanders);
    assert!(!root.join(DOCS).join("examples").exists());
}

#[test]
fn a_terminal_is_shown_the_page_by_man() {
    let castra = Castra::new("man-shown");
    let man = program(
        &castra.project().join("bin/man"),
        "#!/bin/sh\necho \"man $*\"\nsed -n 1p\n",
    );
    let shown = |path: &str| {
        let line = format!("{} man castra.toml", CASTRA);
        let output = Command::new("/usr/bin/script")
            .args(["-qec", &line, "/dev/null"])
            .env("SHELL", "/bin/sh")
            .env("PATH", path)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stdout).replace("\r\n", "\n")
    };
    let bin = man.parent().unwrap();
    let by_man = shown(&format!("{}:/usr/bin:/bin", bin.display()));
    assert!(by_man.starts_with("man -l -\n.TH CASTRA.TOML 5 "), "{by_man}");
    assert_eq!(by_man.lines().count(), 2);
    // A system without it: the page as it is.
    fs::remove_file(&man).unwrap();
    let printed = shown(&bin.display().to_string());
    assert!(printed.starts_with(".TH CASTRA.TOML 5 "), "{printed}");
    assert!(printed.contains(".SH SEE ALSO\n"));
}
