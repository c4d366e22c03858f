//! What only Linux has: `/proc`, the boot-time clock, open-file-description locks.
//!
//! Here: thin, safe questions to the kernel, so that a port is one file. Not here: what the
//! answers mean for a VM or the broker (`core::status`, `core::runtime`, `core::broker`).

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};

use crate::core::id::BootId;
use crate::core::time::millis;

mod lock;
mod memory;
mod processes;
pub use lock::{
    FileLock, Holder, ImageUse, LockError, ask_lock_holder, image_use, lock_holder, lock_holder_of,
    lock_open_file, locked_pid, unlock_open_file,
};
mod sparse;
pub use memory::{Memory, memory};
pub use processes::{
    HeldFile, command_lines, context_switches_of, held_file, is_stopped, shares_file_system,
};
pub use sparse::punch_hole;

/// Time since the host booted, suspend included (CLOCK_BOOTTIME): the clock that processes
/// compare with each other. A change of the wall clock doesn't bend it, nor does a time namespace,
/// whose offset is taken off: two processes in different ones read the same.
pub fn boottime() -> Duration {
    static OFFSET: OnceLock<i128> = OnceLock::new();
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has CLOCK_BOOTTIME since 2.6.39");
    let offset = OFFSET.get_or_init(namespace_offset);
    let nanos = i128::from(now.tv_sec()) * 1_000_000_000 + i128::from(now.tv_nsec()) - offset;
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(0))
}

/// By how many nanoseconds this process's time namespace has shifted CLOCK_BOOTTIME against the
/// host's; 0 on a kernel without such namespaces.
fn namespace_offset() -> i128 {
    let link = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).ok();
    // The file tells of the namespace that children get, which is another one between `unshare` and
    // the next process.
    if link("time") != link("time_for_children") {
        return 0;
    }
    fs::read_to_string("/proc/self/timens_offsets")
        .ok()
        .and_then(|text| offset_in(&text))
        .unwrap_or(0)
}

/// The line `boottime SECS NANOS` of such a file.
fn offset_in(text: &str) -> Option<i128> {
    let line = text.lines().find_map(|line| line.strip_prefix("boottime"))?;
    let mut numbers = line.split_whitespace().map(str::parse::<i128>);
    Some(numbers.next()?.ok()? * 1_000_000_000 + numbers.next()?.ok()?)
}

/// [`boottime`] in whole milliseconds.
pub fn boottime_ms() -> u64 {
    millis(boottime())
}

/// The kernel's id of this boot of the host; read once per process.
pub fn boot_id() -> &'static BootId {
    static ID: OnceLock<BootId> = OnceLock::new();
    ID.get_or_init(|| {
        fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map(|text| text.trim().into())
            .unwrap_or_default()
    })
}

/// `bytes` random bytes from the kernel as lower-case hex.
pub fn random_hex(bytes: usize) -> io::Result<String> {
    let mut buffer = vec![0; bytes];
    File::open("/dev/urandom")?.read_exact(&mut buffer)?;
    Ok(hex(&buffer))
}

/// Lower-case hex of some bytes.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]])
        .map(char::from)
        .collect()
}

// --- files ------------------------------------------------------------------------------------

/// Makes a directory and what is missing above it, mode 0700 (docs/SECURITY.md).
pub fn ensure_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Options for a file that only its owner may read (0600).
pub fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}

/// Writes a file whole or not at all: a temporary name beside it, then rename. Mode 0600.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary_beside(path)?;
    let written = private_file()
        .write(true)
        .create_new(true)
        .open(&temporary)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// The name that something has beside `path` while it is made: it tells who makes it.
pub fn temporary_beside(path: &Path) -> io::Result<PathBuf> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".tmp-{}-{}", std::process::id(), random_hex(4)?));
    Ok(path.with_file_name(name))
}

/// What processes that are gone were making in a directory and left half-done: names of
/// [`temporary_beside`].
pub fn abandoned_in(dir: &Path) -> Vec<PathBuf> {
    let is_abandoned = |name: &str| -> Option<bool> {
        let (pid, random) = name.rsplit_once(".tmp-")?.1.split_once('-')?;
        let pid: u32 = pid.parse().ok()?;
        let ours = random.len() == 8 && random.bytes().all(|byte| byte.is_ascii_hexdigit());
        Some(ours && !Path::new(&format!("/proc/{pid}")).exists())
    };
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().and_then(is_abandoned) == Some(true))
        .map(|entry| entry.path())
        .collect()
}

/// Removes a file; that it is not there is fine. True if there was one.
pub fn remove_if_there(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The last `limit` bytes of a file as text (lossy); empty if it can't be read.
pub fn tail_of(path: &Path, limit: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = open_state_file(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// Bytes a file takes on disk; 0 if it isn't there.
pub fn disk_usage(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

/// Bytes an unprivileged user may still write on the file system that holds `path`.
pub fn space_left(path: &Path) -> Option<u64> {
    let answer = nix::sys::statvfs::statvfs(path).ok()?;
    Some(answer.blocks_available() * answer.fragment_size())
}

/// Whether `path` still leads to the open `file` (same device and inode).
pub fn names_this_file(path: &Path, file: &File) -> bool {
    match (fs::metadata(path), file.metadata()) {
        (Ok(named), Ok(open)) => named.dev() == open.dev() && named.ino() == open.ino(),
        _ => false,
    }
}

/// Opens a file of a state root for reading, at once: a regular file or nothing. A named pipe in its
/// place would keep its opener waiting for ever, and anything else was not made by castra.
pub fn open_state_file(path: &Path) -> io::Result<File> {
    regular(open_without_waiting(path)?)
}

/// All bytes of a file of a state root, under the rule of [`open_state_file`].
pub fn read_state_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_state_file(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The file, if it is a regular one.
pub fn regular(file: File) -> io::Result<File> {
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it isn't a regular file",
        )),
    }
}

/// Whether there may be something at `path`: false only where the system says that there is nothing.
/// A place that may not be looked into is not an empty one.
pub fn is_there(path: &Path) -> bool {
    path.try_exists().unwrap_or(true)
}

/// Whether this error says that there is nothing at a path; every other one leaves it open.
pub fn is_absent_error(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// Opens a path for reading, whatever it is, at once: a named pipe without a writer too.
pub fn open_without_waiting(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

/// Whether the other end of a pipe or socket that we write to is closed. Files and terminals have
/// no such end.
pub fn reader_has_gone(writer: impl AsFd) -> bool {
    // Errors and hang-ups are reported whatever was asked for.
    let mut asked = [PollFd::new(writer.as_fd(), PollFlags::empty())];
    let answered = poll(&mut asked, PollTimeout::ZERO);
    let gone = PollFlags::POLLERR | PollFlags::POLLHUP;
    answered.is_ok() && asked[0].revents().is_some_and(|events| events.intersects(gone))
}

/// A path to `name` in an open directory that is short whatever the directory's own length:
/// Unix socket addresses end at 108 bytes. Valid while `directory` is open.
pub fn short_path(directory: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
}

// --- processes --------------------------------------------------------------------------------

/// A process's short name (`comm`), for messages.
pub fn process_name(pid: u32) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .ok()
        .map(|name| name.trim_end().to_owned())
}

/// Whether a process has this very file open; false where `/proc` doesn't show it.
pub fn has_open(pid: u32, path: &Path) -> bool {
    let Ok(wanted) = fs::metadata(path) else {
        return false;
    };
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    descriptors
        .flatten()
        .filter_map(|entry| fs::metadata(entry.path()).ok())
        .any(|open| open.dev() == wanted.dev() && open.ino() == wanted.ino())
}

/// Whether a process has a client on a Unix socket of this name that it listens on. For a process
/// of this user; the name is the one it bound, which may be relative.
pub fn has_client(pid: u32, name: &str) -> bool {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let connected: HashSet<String> = table
        .lines()
        .filter_map(|line| accepted_as(line, name))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    if connected.is_empty() {
        return false;
    }
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    descriptors
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|target| target.to_str().is_some_and(|target| connected.contains(target)))
}

/// The inode of a connected socket that bears the name of the one it was accepted from: a line of
/// that table, `Num RefCount Protocol Flags Type St Inode Path`.
fn accepted_as<'t>(line: &'t str, name: &str) -> Option<&'t str> {
    const CONNECTED: &str = "03";
    let mut fields = line.split_whitespace();
    let state = fields.nth(5)?;
    let inode = fields.next()?;
    let path = fields.next()?;
    let named = path == name || path.strip_suffix(name).is_some_and(|rest| rest.ends_with('/'));
    (state == CONNECTED && named).then_some(inode)
}

/// Processes that have a file open, as `name (pid N)`, at most four and not ourselves; processes
/// of other users stay hidden to all but root. For messages: it looks through all of `/proc`.
pub fn file_users(path: &Path) -> Vec<String> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id() && has_open(*pid, path))
        .map(|pid| {
            let name = process_name(pid).unwrap_or_else(|| "a process".to_owned());
            format!("{name} (pid {pid})")
        })
        .take(4)
        .collect()
}

/// Processes of this user, ourselves left out, that were started with the variable `name` set to
/// `value`. Zombies have no environment any more and so don't count.
pub fn processes_with(name: &str, value: &str) -> Vec<u32> {
    let wanted = format!("{name}={value}").into_bytes();
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id())
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|environment| environment.split(|byte| *byte == 0).any(|entry| entry == wanted))
        })
        .collect()
}

/// Whether this process ignores a signal, as whoever started it may have wished (`nohup`, a job in
/// the background of a script).
pub fn ignores_signal(number: i32) -> bool {
    let Some(bit) = u32::try_from(number)
        .ok()
        .and_then(|number| number.checked_sub(1))
    else {
        return false;
    };
    fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|text| {
            let mask = text.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
            u64::from_str_radix(mask.trim(), 16).ok()
        })
        .is_some_and(|mask| mask.checked_shr(bit).is_some_and(|mask| mask & 1 == 1))
}

/// Whether a process still has what it had open: it is there, and no zombie.
pub fn has_descriptors(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.trim_start().chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X' | 'x'))
}

/// CPU time a process has used so far, all its threads together.
pub fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and brackets: fields are counted after the last bracket.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    // USER_HZ is 100 on every Linux architecture that QEMU's system emulation runs on.
    Some(Duration::from_millis(ticks * 10))
}

/// Cores this process may run on.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Transport of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP, listening.
    Tcp,
    /// UDP, bound.
    Udp,
}

/// A socket that keeps others from a port of 127.0.0.1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundPort {
    /// Transport.
    pub transport: Transport,
    /// The port.
    pub port: u16,
    inode: String,
}

impl BoundPort {
    /// Who has it, as `name (pid N)`, where `/proc` shows it; processes of other users stay hidden
    /// to all but root. It looks through all of `/proc`.
    pub fn owner(&self) -> Option<String> {
        socket_owner(&HashSet::from([self.inode.clone()]))
    }
}

/// Every socket that keeps others from a port of 127.0.0.1: bound to it, or to all addresses.
/// Opens nothing but the kernel's tables (proc(5)), so nobody else's bind can fail of it.
pub fn bound_ports() -> Vec<BoundPort> {
    const TABLES: [(&str, Transport); 4] = [
        ("/proc/net/tcp", Transport::Tcp),
        ("/proc/net/tcp6", Transport::Tcp),
        ("/proc/net/udp", Transport::Udp),
        ("/proc/net/udp6", Transport::Udp),
    ];
    let mut found = Vec::new();
    for (path, transport) in TABLES {
        let table = fs::read_to_string(path).unwrap_or_default();
        found.extend(
            table
                .lines()
                .skip(1)
                .filter_map(|line| bound_port(line, transport)),
        );
    }
    found
}

/// One line of such a table: `sl local_address rem_address st … inode`.
fn bound_port(line: &str, transport: Transport) -> Option<BoundPort> {
    const LISTEN: &str = "0A";
    let mut fields = line.split_whitespace();
    let (address, port) = fields.nth(1)?.split_once(':')?;
    let listens = fields.nth(1)? == LISTEN;
    let inode = fields.nth(5)?.to_owned();
    (covers_loopback(address) && (listens || transport == Transport::Udp)).then_some(BoundPort {
        transport,
        port: u16::from_str_radix(port, 16).ok()?,
        inode,
    })
}

/// Whether a socket at this address keeps others from 127.0.0.1. The kernel prints addresses as
/// words of the host's own byte order.
fn covers_loopback(address: &str) -> bool {
    let word = |bytes: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(bytes));
    let v4 = match address.len() {
        8 => address,
        // An IPv4 address in an IPv6 socket. One bound to `::` takes IPv4 too, as a rule.
        32 if address.bytes().all(|digit| digit == b'0') => return true,
        32 if address.starts_with(&format!("{}{}", "0".repeat(16), word([0, 0, 0xff, 0xff]))) => {
            &address[24..]
        }
        _ => return false,
    };
    v4 == word([127, 0, 0, 1]) || v4 == word([0; 4])
}

/// The process that has one of these sockets, as `name (pid N)`.
fn socket_owner(inodes: &HashSet<String>) -> Option<String> {
    if inodes.is_empty() {
        return None;
    }
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(descriptors) = fs::read_dir(entry.path().join("fd")) else {
            continue;
        };
        for descriptor in descriptors.flatten() {
            let Ok(target) = fs::read_link(descriptor.path()) else {
                continue;
            };
            let inode = target
                .to_str()
                .and_then(|text| text.strip_prefix("socket:["))
                .and_then(|text| text.strip_suffix(']'));
            if inode.is_some_and(|inode| inodes.contains(inode)) {
                let name = process_name(pid).unwrap_or_else(|| "a process".to_owned());
                return Some(format!("{name} (pid {pid})"));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;

    #[test]
    fn what_keeps_others_from_a_loopback_port_is_known() {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let any = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let elsewhere = std::net::TcpListener::bind("127.0.0.2:0").unwrap();
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let me = format!("pid {}", std::process::id());
        let bound = bound_ports();
        let owner = |transport: Transport, port: u16| {
            let found = bound
                .iter()
                .find(|bound| (bound.transport, bound.port) == (transport, port))?;
            Some(found.owner().unwrap_or_default())
        };
        for (transport, port) in [
            (Transport::Tcp, tcp.local_addr().unwrap().port()),
            (Transport::Tcp, any.local_addr().unwrap().port()),
            (Transport::Udp, udp.local_addr().unwrap().port()),
        ] {
            assert!(
                owner(transport, port).unwrap().contains(&me),
                "{transport:?} {port}"
            );
        }
        let port = elsewhere.local_addr().unwrap().port();
        if tcp.local_addr().unwrap().port() != port && any.local_addr().unwrap().port() != port {
            assert_eq!(owner(Transport::Tcp, port), None);
        }
    }

    #[test]
    fn addresses_as_the_kernel_prints_them() {
        if cfg!(target_endian = "big") {
            return;
        }
        for (address, stands) in [
            ("0100007F", true),
            ("00000000", true),
            ("0200007F", false),
            ("0101A8C0", false),
            ("00000000000000000000000000000000", true),
            ("00000000000000000000000001000000", false),
            ("0000000000000000FFFF00000100007F", true),
            ("0000000000000000FFFF00000200007F", false),
        ] {
            assert_eq!(covers_loopback(address), stands, "{address}");
        }
    }

    #[test]
    fn files_are_replaced_whole_and_private() {
        let scratch = Scratch::new("host-replace");
        let path = scratch.path("file");
        replace_file(&path, b"one").unwrap();
        replace_file(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(
            fs::read_dir(scratch.dir()).unwrap().count(),
            1,
            "no temporary file is left"
        );
    }

    #[test]
    fn the_offset_of_a_time_namespace_is_read() {
        for (text, offset) in [
            (
                "monotonic           0         0\nboottime            0         0\n",
                Some(0),
            ),
            ("monotonic  5 0\nboottime  100000 7\n", Some(100_000_000_000_007)),
            ("boottime  -3  500000000\n", Some(-2_500_000_000)),
            ("monotonic 1 1\n", None),
            ("boottime x 0\n", None),
            ("boottime 1\n", None),
            ("", None),
        ] {
            assert_eq!(offset_in(text), offset, "{text:?}");
        }
    }

    #[test]
    fn clocks_and_counters_answer() {
        assert!(boottime() > Duration::ZERO);
        assert_eq!(boot_id().as_str().len(), 36);
        assert!(memory().unwrap().available > 0);
        assert!(cpu_time(std::process::id()).is_some());
        // Rust programs ignore SIGPIPE (13) from the start.
        assert!(ignores_signal(13) && !ignores_signal(15) && !ignores_signal(0) && !ignores_signal(99));
        assert_eq!(hex(&[0, 255, 16]), "00ff10");
    }
}
