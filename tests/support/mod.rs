//! What the tests share; each test crate says `mod support;` and nothing more.
//!
//! Here: fresh directories, waiting, golden files, and in the modules below the real binary, a
//! project on the stand-in for QEMU, brokers, sessions, an sshd, the scripts of guests.
//! Not here: what one suite alone needs.
// No suite uses all of it.
#![allow(dead_code, unused_imports, clippy::unwrap_used)]

pub mod broker;
pub mod castra;
pub mod fleet;
pub mod guest_project;
pub mod guest_scripts;
pub mod holder;
pub mod journals;
pub mod project;
pub mod session;
pub mod sshd;

// Unit tests have these two as well.
#[path = "../../src/core/golden.rs"]
mod golden_file;
#[path = "../../src/core/scratch.rs"]
pub mod scratch;

use std::borrow::BorrowMut;
use std::ffi::OsStr;
use std::fmt::Display;
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

pub use castra::{CASTRA, Castra, Ran, vm_of};
pub use golden_file::check as golden;
pub use scratch::Scratch;

/// Longer than anything here takes on a loaded machine; who waits as long is about to fail.
pub const AMPLE: Duration = Duration::from_secs(60);

/// Starts a command whose stdout and stderr the test reads.
#[track_caller]
pub fn spawn_piped(mut command: impl BorrowMut<Command>) -> Child {
    let command = command.borrow_mut().stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits until there is something, and fails naming it.
#[track_caller]
pub fn eventually<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    eventually_in(what, String::new, look)
}

/// The same; who fails shows where it was looked for.
#[track_caller]
pub fn eventually_in<T>(what: &str, place: impl Fn() -> String, look: impl FnMut() -> Option<T>) -> T {
    wait(AMPLE, what, place, look)
}

#[track_caller]
fn wait<T>(
    limit: Duration,
    what: &str,
    place: impl Fn() -> String,
    mut look: impl FnMut() -> Option<T>,
) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(
            Instant::now() < end,
            "waited {limit:?} in vain for {what}\n{}",
            place()
        );
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until something is so, and fails naming it.
#[track_caller]
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    eventually(what, || holds().then_some(()));
}

/// The same with a limit of its own: a guest under emulation may take minutes.
#[track_caller]
pub fn until_within(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    wait(limit, what, String::new, || holds().then_some(()));
}

/// A name that no other test has, whichever process it runs in, for as long as this is kept.
pub struct Claim(UnixListener);

impl Claim {
    /// Claims it, if nobody has it.
    pub fn of(name: &str) -> Option<Claim> {
        let address = SocketAddr::from_abstract_name(format!("castra-test-{name}")).unwrap();
        UnixListener::bind_addr(&address).ok().map(Claim)
    }
}

/// A port for this process alone, on which nobody listens until the test does. No other test gets
/// it meanwhile: it lies below those that the kernel hands out, and is claimed for good.
pub fn free_port() -> u16 {
    const PORTS: std::ops::Range<u16> = 20_000..30_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(17);
    for _ in PORTS {
        let number = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = PORTS.start + (number % u32::from(PORTS.end - PORTS.start)) as u16;
        if let Some(claim) = Claim::of(&format!("port-{port}"))
            && TcpListener::bind(("127.0.0.1", port)).is_ok()
        {
            std::mem::forget(claim);
            return port;
        }
    }
    panic!("no port is free from {} to {}", PORTS.start, PORTS.end);
}

/// Writes a file that can be run, with the directory above it; its path. A child writes it: a
/// descriptor of ours that another test's child inherits would make it "busy".
pub fn program(path: &Path, text: impl AsRef<[u8]>) -> PathBuf {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut child = Command::new("sh")
        .args(["-c", "cat >\"$0\" && chmod 755 \"$0\""])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_ref()).unwrap();
    assert!(child.wait().unwrap().success());
    path.to_owned()
}

/// Copies a file that can be run, by a child for the same reason.
pub fn copy_program(from: &str, to: &Path) {
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

/// Whether a process is there; one that nobody has reaped yet is not.
pub fn is_alive(pid: impl Display) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| state != 'Z' && state != 'X')
}

/// All files of a directory and of those in it.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(files_below(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found
}

/// The objects of a text, one a line.
#[track_caller]
pub fn objects(text: &str) -> Vec<Value> {
    let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    text.lines().map(parse).collect()
}

/// The objects of a file that may be written to just now: what has no end yet isn't there.
#[track_caller]
pub fn objects_in(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    objects(text.rfind('\n').map_or("", |end| &text[..end]))
}

/// Those of one type.
pub fn of_type<'e>(events: &'e [Value], kind: &str) -> Vec<&'e Value> {
    events.iter().filter(|event| event["type"] == kind).collect()
}

/// Every other process: its directory under /proc, and its command line.
fn processes() -> impl Iterator<Item = (PathBuf, String)> {
    let me = std::process::id().to_string();
    let others = fs::read_dir("/proc").unwrap().flatten();
    others
        .filter(move |entry| entry.file_name() != OsStr::new(&me))
        .filter_map(|entry| {
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            (!line.is_empty()).then(|| (entry.path(), line))
        })
}

/// The command lines that have this in them.
pub fn commands_with(word: &str) -> Vec<String> {
    processes()
        .map(|(_, line)| line)
        .filter(|line| line.contains(word))
        .collect()
}

/// The command lines of what works in a test's own directory: what names it in an argument or a
/// variable, or stands in it.
pub fn processes_of(dir: &Path) -> Vec<String> {
    let name = dir.to_str().unwrap();
    // Not of the directory with the next number.
    let names = |text: &str| {
        text.match_indices(name)
            .any(|(at, _)| !text[at + name.len()..].starts_with(|next: char| next.is_ascii_digit()))
    };
    processes()
        .filter(|(process, line)| {
            let environ = fs::read(process.join("environ")).unwrap_or_default();
            names(line)
                || names(&String::from_utf8_lossy(&environ))
                || fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir))
        })
        .map(|(_, line)| line)
        .collect()
}
