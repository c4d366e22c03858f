//! The program with which a guest of a snapshot waits at castra's port, run on this host with a terminal as its port.
//!
//! Here: what it says and when it gives up. Not here: a guest that goes on behind it; the tests with real guests do that.
#![cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use support::{AMPLE, Scratch, until};

const GREETING: &[u8] = b"castra-port 1\n";

/// The program as `build-guest.sh` makes it: two hexadecimal digits a byte, up to the bar.
fn program(dir: &Scratch) -> PathBuf {
    let listing = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("scripts/guest")
        .join(format!("castra-port-{}", std::env::consts::ARCH));
    let text = fs::read_to_string(listing).unwrap();
    let digits: Vec<u8> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split('|').next())
        .flat_map(|digits| digits.trim().bytes())
        .collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    let bytes: Vec<u8> = digits.chunks_exact(2).map(byte).collect();
    let path = dir.path("castra-port");
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path
}

/// A terminal that passes bytes on as they are, and the program at its other end.
struct Port {
    host: PtyMaster,
    /// Keeps the terminal open when the program is gone.
    _guest: File,
    child: Child,
}

impl Port {
    fn open(dir: &Scratch) -> Port {
        let host = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).unwrap();
        grantpt(&host).unwrap();
        unlockpt(&host).unwrap();
        let name = ptsname_r(&host).unwrap();
        let guest = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NOCTTY.bits())
            .open(&name)
            .unwrap();
        let mut settings = tcgetattr(&guest).unwrap();
        cfmakeraw(&mut settings);
        tcsetattr(&guest, SetArg::TCSANOW, &settings).unwrap();
        let child = Command::new(program(dir))
            .arg(name)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Port {
            host,
            _guest: guest,
            child,
        }
    }

    fn hear(&mut self, expected: &[u8]) {
        let mut heard = vec![0; expected.len()];
        for byte in &mut heard {
            let mut waiting = [PollFd::new(self.host.as_fd(), PollFlags::POLLIN)];
            let limit = PollTimeout::try_from(AMPLE).unwrap();
            assert_eq!(poll(&mut waiting, limit), Ok(1), "nothing came from the program");
            self.host.read_exact(std::slice::from_mut(byte)).unwrap();
        }
        assert_eq!(heard, expected);
    }

    /// Whether it says more before it ends: it asks again where an answer took long.
    fn asks(&mut self) -> bool {
        let mut asks = false;
        until("the program to ask or to end", || {
            let mut waiting = [PollFd::new(self.host.as_fd(), PollFlags::POLLIN)];
            asks = poll(&mut waiting, PollTimeout::ZERO) == Ok(1);
            asks || self.child.try_wait().unwrap().is_some()
        });
        asks
    }

    /// How it ended, and what it wrote to stdout.
    fn end(mut self) -> (ExitStatus, String) {
        let mut ended = None;
        until("the program to end", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        let mut said = String::new();
        self.child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        (ended.unwrap(), said)
    }
}

/// Whether this process may feed the kernel's random number generator.
fn may_add_entropy() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    u64::from_str_radix(line.unwrap().trim(), 16).unwrap() >> CAP_SYS_ADMIN & 1 == 1
}

#[test]
fn it_fails_where_entropy_or_clock_cannot_be_set() {
    let dir = Scratch::new("guest-port");
    let mut port = Port::open(&dir);
    port.hear(GREETING);
    let text = b"vm=web\ntoken=0123\n";
    let length = u32::try_from(text.len()).unwrap().to_be_bytes();
    // However it is cut.
    for piece in [
        &length[..2],
        &length[2..],
        &[7; 30],
        &[8; 34],
        &text[..5],
        &text[5..],
    ] {
        port.host.write_all(piece).unwrap();
    }
    // A test must not set the host's clock: no clock has this time.
    let answer = [1_u64, 1_000_000_000].map(u64::to_le_bytes).concat();
    let mut asked = 0;
    while port.asks() {
        port.hear(b"?");
        port.host.write_all(&answer).unwrap();
        asked += 1;
    }
    assert!(asked <= 20);
    assert!(
        asked == 0 || may_add_entropy(),
        "it went on although it could add no entropy"
    );
    let (ended, said) = port.end();
    assert_eq!((ended.code(), said.as_str()), (Some(1), ""));
}

#[test]
fn it_takes_no_more_than_64_kib() {
    let dir = Scratch::new("guest-port-long");
    let mut port = Port::open(&dir);
    port.hear(GREETING);
    port.host.write_all(&65_537_u32.to_be_bytes()).unwrap();
    port.host.write_all(&[0; 64]).unwrap();
    let (ended, said) = port.end();
    assert_eq!((ended.code(), said.as_str()), (Some(1), ""));
}

#[test]
fn it_fails_without_a_port() {
    let dir = Scratch::new("guest-port-none");
    let absent = dir.path("absent");
    for args in [
        &[][..],
        &[absent.as_path()],
        &[absent.as_path(), absent.as_path()],
    ] {
        let ended = Command::new(program(&dir)).args(args).output().unwrap();
        assert_eq!(ended.status.code(), Some(1));
    }
}
