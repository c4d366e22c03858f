//! What people see on a terminal while castra works, and what is left of it: the real binary on a
//! pseudo-terminal, with a stand-in for QEMU.
#![allow(clippy::unwrap_used)]

mod emulator;
#[path = "../support/mod.rs"]
mod support;
mod window;

use std::fs;

use emulator::Terminal;
use support::project::FAKE_QEMU;
use support::{CASTRA, Castra, program, until};
use window::Window;

/// A project of `count` VMs whose guests never answer.
fn project(name: &str, count: u32) -> Castra {
    let castra = Castra::new(name);
    castra.write("vmlinuz", "not really a kernel");
    castra.write("run.sh", "#!/bin/sh\n");
    castra.write(
        "castra.toml",
        &format!(
            "version = \"0.2.0\"\n[project]\nname = \"terminal\"\n[qemu]\nbinary = \"{FAKE_QEMU}\"\naccel = \"tcg\"\n\
             [lifecycle]\ngraceful_shutdown_wait_secs = 600\n[broker]\nport = 0\n\
             [[vms]]\nname = \"web\"\ncount = {count}\nkernel = \"vmlinuz\"\n\
             [vms.bootstrap]\nmode = \"auto\"\nscript = \"run.sh\"\nhandshake_timeout_secs = 600\n"
        ),
    );
    castra
}

/// What VMs do there.
const LIVE: [&str; 4] = ["booting,", "powering off,", "SIGTERM sent,", "waiting:"];

/// Whether this line belongs to the block: a name, then a step and its time, which narrow windows
/// cut.
fn is_live(line: &str) -> bool {
    let is_vm =
        line.starts_with("web-") && (LIVE.iter().any(|word| line.contains(word)) || line.ends_with('…'));
    is_vm || (line.starts_with("and ") && line.contains(" more"))
}

/// The lines of the block, none of which may be there twice.
fn live(terminal: &Terminal) -> Vec<String> {
    terminal.text().into_iter().filter(|line| is_live(line)).collect()
}

/// Whether there is one line for each of these VMs, in order, at this step, and nothing below.
fn has_lines(terminal: &Terminal, vms: u32, step: &str) -> bool {
    let lines = live(terminal);
    let screen = terminal.screen();
    let shown: Vec<&String> = screen.iter().filter(|line| !line.is_empty()).collect();
    lines.len() == vms as usize
        && shown.len() >= lines.len()
        && lines
            .iter()
            .eq(shown[shown.len() - lines.len()..].iter().copied())
        && lines.iter().zip(0..).all(|(line, vm)| {
            let rest = line.strip_prefix(&format!("web-{vm} "));
            rest.is_some_and(|rest| rest.trim_start().starts_with(step))
        })
        && terminal.is_at_line_start()
}

#[test]
fn up_and_down_show_a_line_for_each_vm_and_leave_none() {
    for columns in [20, 33, 60, 80, 132] {
        let castra = project("widths", 3);
        let mut window = Window::run(&castra, 24, columns, &[], &["up"]);
        // As much of it as the narrowest has room for.
        window.shows("line per VM", |terminal| has_lines(terminal, 3, "boot"));
        window.interrupt();
        let left = window.ends(130);
        assert!(!left.iter().any(|line| is_live(line)), "{left:#?}");
        assert!(window.see(|terminal| terminal.redraws && terminal.colours));
        let told = |word: &str| left.iter().filter(|line| line.contains(word)).count();
        assert_eq!(told("launched in "), 3, "{left:#?}");
        assert_eq!(told("stopping; a second"), 1, "{left:#?}");
        assert_eq!(told("^C"), 0, "{left:#?}");
        drop(window);

        let down = |fake| Window::run(&castra, 24, columns, &[], fake);
        let mut window = down(&["down"]);
        let left = window.ends(0);
        assert!(!left.iter().any(|line| is_live(line)), "{left:#?}");
        assert_eq!(left.last().unwrap().split(',').next(), Some("3 VMs down"));
        window.interrupt();
    }
}

#[test]
fn a_guest_that_ignores_the_power_button_is_waited_for_in_sight() {
    let castra = project("powers-off", 3);
    let env = [("CASTRA_FAKE_QEMU", "ignore-powerdown")];
    let mut window = Window::run(
        &castra,
        24,
        100,
        &env,
        &["up", "--bootstrap", "web-0=skip,web-1=skip,web-2=skip"],
    );
    let left = window.ends(0);
    assert!(!left.iter().any(|line| is_live(line)), "{left:#?}");
    drop(window);
    window = Window::run(&castra, 24, 100, &[], &["down"]);
    window.shows("line per VM", |terminal| has_lines(terminal, 3, "powering off"));
    window.interrupt();
    window.shows("word on it", |terminal| {
        terminal.text().iter().any(|line| line.starts_with("stopping"))
    });
    window.interrupt();
    let left = window.ends(0);
    assert!(!left.iter().any(|line| is_live(line)), "{left:#?}");
}

#[test]
fn a_restart_shows_the_way_down_and_the_way_up() {
    let castra = project("restarts", 2);
    let env = [("CASTRA_FAKE_QEMU", "ignore-powerdown")];
    let window = Window::run(
        &castra,
        24,
        100,
        &env,
        &["up", "--bootstrap", "web-0=skip,web-1=skip"],
    );
    window.ends(0);
    drop(window);
    let args = ["restart", "--graceful-wait-secs", "5", "--sigterm-wait-secs", "5"];
    let mut window = Window::run(&castra, 24, 100, &[], &args);
    window.shows("way down", |terminal| has_lines(terminal, 2, "powering off"));
    window.shows("way up", |terminal| has_lines(terminal, 2, "booting"));
    window.interrupt();
    let left = window.ends(130);
    assert!(!left.iter().any(|line| is_live(line)), "{left:#?}");
}

#[test]
fn a_fleet_taller_than_the_window_is_summed_up() {
    let castra = project("tall", 12);
    let mut window = Window::run(&castra, 8, 100, &[], &["up"]);
    window.shows("five lines and the rest", |terminal| {
        let lines = live(terminal);
        lines.len() == 6
            && lines[5] == "and 7 more: 7 booting"
            && terminal.screen().last().is_some_and(String::is_empty)
    });
    window.resize(20, 100);
    window.shows("line per VM", |terminal| live(terminal).len() == 12);
    window.interrupt();
    let left = window.ends(130);
    assert!(!left.iter().any(|line| is_live(line)), "{left:#?}");
}

#[test]
fn a_window_that_changes_isnt_garbled() {
    let castra = project("resized", 3);
    let mut window = Window::run(&castra, 24, 120, &[], &["up"]);
    window.shows("line per VM", |terminal| has_lines(terminal, 3, "booting"));
    // What wraps in the smaller window still fits into it: what has scrolled off can't be taken back.
    for (rows, columns) in [(24, 40), (8, 31), (24, 132), (30, 20), (10, 80)] {
        window.resize(rows, columns);
        window.shows("line per VM again", |terminal| has_lines(terminal, 3, "boot"));
    }
    window.interrupt();
    let left = window.ends(130);
    assert!(!left.iter().any(|line| is_live(line)), "{left:#?}");
}

/// A stand-in for curl: half of a file of 1 MiB comes, and then nothing. How long it is, it says if
/// LENGTH is set.
const CURL: &str = r#"#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in
    --output) part=$2 ;;
    --dump-header) headers=$2 ;;
    esac
    shift
done
head -c 524288 /dev/zero >"$part"
printf 'HTTP/1.1 200 OK\r\n%s\r\n' "${LENGTH:+content-length: $LENGTH}" >"$headers"
exec sleep 600
"#;

#[test]
fn a_download_has_a_bar_where_its_length_is_known() {
    for (env, shown) in [
        (&[("LENGTH", "1048576")][..], "fetching disk.qcow2  █"),
        (&[], "fetching disk.qcow2  512 KiB"),
    ] {
        let castra = Castra::new("download");
        castra.write(
            "castra.toml",
            "[project]\nname = \"download\"\n[[vms]]\nname = \"web\"\n\
             base_image = \"https://images.invalid/disk.qcow2\"\n",
        );
        let curl = program(&castra.project().join("bin/curl"), CURL);
        let path = format!(
            "{}:{}",
            curl.parent().unwrap().display(),
            std::env::var("PATH").unwrap()
        );
        let env = [env, &[("PATH", path.as_str())]].concat();
        let mut window = Window::run(&castra, 24, 80, &env, &["up"]);
        window.shows("bytes", |terminal| {
            let text = terminal.text();
            text.iter()
                .any(|line| line.starts_with(shown) && line.contains("512 KiB"))
        });
        window.interrupt();
        let left = window.ends(130);
        assert!(!left.iter().any(|line| line.starts_with("fetching")), "{left:#?}");
    }
}

#[test]
fn a_castra_that_is_killed_leaves_the_cursor_at_the_beginning_of_a_line() {
    let castra = project("killed", 2);
    let window = Window::run(&castra, 24, 80, &[], &["up"]);
    window.shows("line per VM", |terminal| has_lines(terminal, 2, "booting"));
    kill(&castra);
    window.shows("exit code", |terminal| {
        terminal.text().iter().any(|line| line == "exit 137")
    });
}

/// Ends the castra that works on this project, as the kernel does when memory is short.
fn kill(castra: &Castra) {
    let home = format!("CASTRA_HOME={}", castra.home().display());
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&read("cmdline")).into_owned();
        let is_castra = cmdline.starts_with(CASTRA) && cmdline.ends_with("\0up\0");
        if is_castra && String::from_utf8_lossy(&read("environ")).contains(&home) {
            let pid: i32 = entry.file_name().to_str().unwrap().parse().unwrap();
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
                .unwrap();
        }
    }
}

#[test]
fn where_nothing_may_be_drawn_there_are_plain_lines() {
    for (name, env, args) in [
        ("dumb", &[("TERM", "dumb")][..], &["up"][..]),
        ("quiet", &[], &["--quiet", "up"]),
    ] {
        let castra = project(name, 2);
        let mut window = Window::run(&castra, 24, 80, env, args);
        await_launch(&castra, 2);
        window.interrupt();
        let left = window.ends(130);
        let (redraws, colours) = window.see(|terminal| (terminal.redraws, terminal.colours));
        assert!(!redraws, "{name}: {left:#?}");
        assert!(!colours || name == "quiet", "{name}: {left:#?}");
        assert!(!left.iter().any(|line| is_live(line)), "{name}: {left:#?}");
    }
}

#[test]
fn without_colour_there_is_still_a_block() {
    for (name, env, args) in [
        ("no-color", &[("NO_COLOR", "1")][..], &["up"][..]),
        ("color-never", &[], &["--color", "never", "up"]),
    ] {
        let castra = project(name, 2);
        let mut window = Window::run(&castra, 24, 80, env, args);
        window.shows("line per VM", |terminal| has_lines(terminal, 2, "booting"));
        window.interrupt();
        window.ends(130);
        assert!(
            window.see(|terminal| terminal.redraws && !terminal.colours),
            "{name}"
        );
    }
}

/// Waits until QEMU runs for so many VMs.
fn await_launch(castra: &Castra, vms: usize) {
    until("the launches", || {
        let status = castra.status();
        let running = |vm: &&serde_json::Value| vm["state"] == "running";
        let there = status["vms"].as_array().unwrap().iter();
        there.filter(running).count() == vms
    });
}
