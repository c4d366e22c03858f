//! The builder of the default guest: what it refuses, and that its parts fit together.
//!
//! Here: everything that can be said without fetching a package.
//! Not here: building and booting a guest; the tests with real guests do that.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use support::{Scratch, program};

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts")
}

fn on_path(program: &str) -> PathBuf {
    std::env::split_paths(&std::env::var_os("PATH").unwrap())
        .map(|dir| dir.join(program))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("`{program}` is missing: run scripts/install-deps.sh test"))
}

/// A directory to serve as PATH, with these programs of the host and these stand-ins.
fn path_of(dir: &Path, programs: &[&str], stand_ins: &[(&str, &str)]) {
    for program in programs {
        symlink(on_path(program), dir.join(program)).unwrap();
    }
    for (name, body) in stand_ins {
        program(&dir.join(name), format!("#!/bin/sh\n{body}\n"));
    }
}

fn build(args: &[&str], path: Option<&Path>) -> Output {
    let mut command = Command::new(on_path("dash"));
    command
        .arg(scripts().join("build-guest.sh"))
        .args(args)
        .stdin(Stdio::null());
    if let Some(path) = path {
        command.env("PATH", path);
    }
    command.output().unwrap()
}

/// Exit code, an empty stdout, and the beginning of each line on stderr.
fn check(output: &Output, code: i32, lines: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(output.stdout.is_empty());
    let said: Vec<&str> = stderr.lines().collect();
    assert_eq!(said.len(), lines.len(), "{stderr}");
    for (said, expected) in said.iter().zip(lines) {
        assert!(said.starts_with(expected), "{said:?} begins {expected:?}");
    }
}

const APT: &[(&str, &str)] = &[
    ("apt-get", "exit 1"),
    ("apt-cache", "exit 1"),
    ("dpkg", "echo amd64"),
    ("dpkg-deb", "exit 1"),
];

#[test]
fn every_script_parses_in_every_shell() {
    let guest = scripts().join("guest");
    for name in [
        "../build-guest.sh",
        "acpid",
        "castra-hello",
        "hello",
        "late",
        "power",
        "profile",
        "rcS",
        "sshd",
        "template",
    ] {
        for shell in [&["dash"][..], &["bash"], &["busybox", "sh"]] {
            let ended = Command::new(on_path(shell[0]))
                .args(&shell[1..])
                .arg("-n")
                .arg(guest.join(name))
                .output()
                .unwrap();
            assert!(
                ended.status.success(),
                "{shell:?} {name}: {}",
                String::from_utf8_lossy(&ended.stderr)
            );
        }
    }
}

#[test]
fn init_runs_only_what_the_guest_has() {
    let table = fs::read_to_string(scripts().join("guest/inittab")).unwrap();
    let services: Vec<&str> = table
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once("/etc/init.d/"))
        .map(|(_, rest)| rest.split_whitespace().next().unwrap())
        .collect();
    assert!(services.contains(&"hello") && services.contains(&"sshd"));
    for service in services {
        assert!(
            scripts().join("guest").join(service).is_file(),
            "{service} is in inittab"
        );
    }
}

#[test]
fn refuses_wrong_usage() {
    check(
        &build(&[], None),
        64,
        &["error: no --output DIR was given", "  try: "],
    );
    check(
        &build(&["--output"], None),
        64,
        &["error: --output needs a value", "  try: "],
    );
    check(
        &build(&["--frobnicate"], None),
        64,
        &["error: unknown argument: --frobnicate", "  try: "],
    );
    check(
        &build(&["--output", "x", "--built-by", "a\"b"], None),
        64,
        &["error: --built-by holds more than"],
    );
    let help = build(&["--help"], None);
    assert_eq!(help.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&help.stdout).starts_with("usage: build-guest.sh --output DIR"));
}

#[test]
fn leaves_alone_a_directory_that_holds_something_else() {
    let dir = Scratch::new("image-precious");
    fs::write(dir.path("thesis.txt"), "years of work").unwrap();
    let output = build(&["--output", dir.dir().to_str().unwrap()], None);
    check(&output, 64, &["error: ", "  because: ", "  try: "]);
    assert!(dir.path("thesis.txt").exists());
}

#[test]
fn refuses_an_incomplete_source() {
    let dir = Scratch::new("image-source");
    let (source, out) = (dir.path("source"), dir.path("out"));
    fs::create_dir(&source).unwrap();
    let output = build(
        &[
            "--output",
            out.to_str().unwrap(),
            "--source",
            source.to_str().unwrap(),
        ],
        None,
    );
    check(&output, 64, &["error: ", "  because: ", "  try: "]);
}

#[test]
fn names_the_way_out_on_another_architecture() {
    let dir = Scratch::new("image-arch");
    let tools = dir.path("tools");
    fs::create_dir(&tools).unwrap();
    path_of(&tools, &["dirname", "ls"], &[("uname", "echo riscv64")]);
    let output = build(&["--output", dir.path("out").to_str().unwrap()], Some(&tools));
    let lines = [
        "error: the default guest can't be built for riscv64",
        "  because: ",
        "  try: set `base_image`",
    ];
    check(&output, 69, &lines);
}

#[test]
fn an_aarch64_guest_with_mounts_is_refused() {
    let dir = Scratch::new("image-arch-mounts");
    let out = dir.path("out");
    let args = ["--output", out.to_str().unwrap(), "--arch", "aarch64", "--mounts"];
    let lines = [
        "error: the default guest for aarch64 can't mount",
        "  because: ",
        "  try: build it without --mounts",
    ];
    check(&build(&args, None), 69, &lines);
}

#[test]
fn names_the_way_out_without_apt() {
    let dir = Scratch::new("image-fedora");
    let tools = dir.path("tools");
    fs::create_dir(&tools).unwrap();
    path_of(&tools, &["dirname", "ls"], &[("uname", "echo x86_64")]);
    let output = build(&["--output", dir.path("out").to_str().unwrap()], Some(&tools));
    let lines = [
        "error: the default guest can't be built on this system",
        "  because: ",
        "  try: set `base_image`",
    ];
    check(&output, 69, &lines);
}

#[test]
fn names_every_missing_tool_and_its_package_at_once() {
    let dir = Scratch::new("image-bare");
    let tools = dir.path("tools");
    fs::create_dir(&tools).unwrap();
    let uname = [("uname", "echo x86_64")];
    path_of(&tools, &["dirname", "ls"], &[APT, &uname].concat());
    let output = build(&["--output", dir.path("out").to_str().unwrap()], Some(&tools));
    check(
        &output,
        69,
        &[
            "error: the default guest can't be built: not found: cat chmod cp head",
            "  because: ",
            "  try: apt-get install coreutils findutils sed grep gzip tar",
        ],
    );
}

#[test]
fn leaves_nothing_behind_when_the_mirror_is_out_of_reach() {
    let dir = Scratch::new("image-offline");
    let tools = dir.path("tools");
    fs::create_dir(&tools).unwrap();
    let programs: Vec<&str> =
        "cat chmod cp head ln ls mkdir mktemp mv od rm sort tail tr wc find sed grep gzip tar dirname sh"
            .split(' ')
            .collect();
    path_of(&tools, &programs, &[APT, &[("uname", "echo x86_64")]].concat());
    let parent = dir.path("images");
    let output = build(
        &["--output", parent.join("guest").to_str().unwrap()],
        Some(&tools),
    );
    let lines = [
        "guest: fetching fresh package lists",
        "error: no package lists could be fetched",
    ];
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(74), "{stderr}");
    for line in lines {
        assert!(stderr.contains(line), "{stderr}");
    }
    assert_eq!(fs::read_dir(&parent).unwrap().count(), 0);
}
