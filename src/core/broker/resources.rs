//! What a broker takes before it serves: its lock, its port, its socket, enough file descriptors.
//!
//! Here: taking each, or a failure that names its owner. Not here: what is done with them
//! (`broker::serve`).

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::core::config::{PortChoice, Protocol};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, FileLock, LockError};
use crate::core::id::RunId;
use crate::core::ports::owners::owner_of;
use crate::core::root::alive::any_vm_runs;
use crate::core::root::paths::{StateRoot, castra_home};
use crate::core::root::records::{self, BrokerRecord};

use super::listen::SLACK;

/// The port that a broker takes if the config names none and this one is free.
pub const PREFERRED_PORT: u16 = 7070;

/// Connections of the host at once: a few commands and their pipes.
pub const HOST_CONNECTIONS: usize = 64;

/// Descriptors reserved for everything but guests' connections: listeners, locks, logs, files that
/// are open for a moment, host clients.
const RESERVED_DESCRIPTORS: u64 = 32 + 64 + HOST_CONNECTIONS as u64 + 2 * SLACK as u64;

/// How far the limit of open files is raised, even if a million were allowed.
const MAX_DESCRIPTORS: u64 = 65_536;

/// Takes the lock that a broker holds as long as it runs; `Busy` names its holder.
pub fn take_lock(paths: &StateRoot, run: &RunId, embedded: bool) -> Result<FileLock> {
    let path = paths.broker_pid();
    // Whoever finds the lock held must see whose it is at once; `broker.json` is written later.
    let kind = if embedded { " embedded" } else { "" };
    match FileLock::try_take(&path, &format!("castra broker {run}{kind}")) {
        Ok(lock) => Ok(lock),
        Err(LockError::Held(who)) => {
            let pid = who.split_whitespace().next().unwrap_or("unknown").to_owned();
            Err(Failure::new(
                Exit::Busy,
                format!("a broker of this project is running already (pid {pid})"),
            )
            .because(format!("it holds the lock on {}", path.display())))
        }
        Err(LockError::Io(error)) => Err(Failure::io("create", &path, &error)),
    }
}

/// Raises the soft limit of open files and returns how many guests it allows, at most `wanted`. The
/// limit of a program that embeds the broker stays as it is, and may allow fewer.
pub fn raise_descriptor_limit(wanted: usize, embedded: bool) -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return wanted;
    };
    let goal = hard.min(MAX_DESCRIPTORS).max(soft);
    let raised = !embedded && setrlimit(Resource::RLIMIT_NOFILE, goal, hard).is_ok();
    wanted.min(guests_within_limit(if raised { goal } else { soft }))
}

/// How many guests fit into a limit of open files.
fn guests_within_limit(limit: u64) -> usize {
    let room = limit.saturating_sub(RESERVED_DESCRIPTORS).max(8);
    usize::try_from(room).unwrap_or(usize::MAX)
}

/// The soft and the hard limit of open files, and how many guests a broker could serve with them.
/// Changes nothing.
pub fn guest_capacity() -> Option<(u64, u64, usize)> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    Some((
        soft,
        hard,
        guests_within_limit(hard.min(MAX_DESCRIPTORS).max(soft)),
    ))
}

/// The TCP listener. While a VM runs the port stays the one that guests were told.
pub fn bind(paths: &StateRoot, choice: PortChoice) -> Result<TcpListener> {
    let kept = records::load::<BrokerRecord>(&paths.broker_json())
        .ok()
        .flatten()
        .map(|record| record.port)
        .filter(|_| any_vm_runs(paths));
    let listen = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    let exactly = |port: u16, advice: &str| {
        listen(port).map_err(|error| {
            let why = match (
                error.kind(),
                owner_of(Protocol::Tcp, port, castra_home().as_deref()),
            ) {
                (io::ErrorKind::AddrInUse, Some(owner)) => format!("it is used by {owner}"),
                (io::ErrorKind::AddrInUse, None) => "it is used by another process".to_owned(),
                _ => error.to_string(),
            };
            Failure::new(Exit::Busy, format!("the broker can't listen on 127.0.0.1:{port}"))
                .because(why)
                .advice(advice)
        })
    };
    if let Some(port) = kept {
        return exactly(
            port,
            "free the port, which the running VMs know; or stop the VMs with `castra down`, which removes their disks unless they have `persist`",
        );
    }
    match choice {
        PortChoice::Exactly(port) => exactly(
            port,
            "free the port, or set another `port` under [broker], or 0 for a free one",
        ),
        PortChoice::Preferred => match listen(PREFERRED_PORT) {
            Ok(listener) => Ok(listener),
            Err(_) => exactly(0, "free some ports"),
        },
        PortChoice::Free => exactly(0, "free some ports"),
    }
}

/// The host's socket. It is made under another name, so that it has mode 0600 before anybody can
/// connect.
pub fn bind_host(paths: &StateRoot, root: &File) -> Result<UnixListener> {
    const HIDDEN: &str = ".broker.sock-";
    let path = paths.broker_sock();
    let cant = |error: io::Error| Failure::io("create", &path, &error);
    // Files that a killed broker left; this broker holds the lock, so nobody else uses them.
    for entry in fs::read_dir(paths.dir()).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(HIDDEN) {
            let _ = fs::remove_file(entry.path());
        }
    }
    let hidden = host::short_path(root, &format!("{HIDDEN}{}", std::process::id()));
    let listener = UnixListener::bind(&hidden).map_err(cant)?;
    fs::set_permissions(&hidden, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .and_then(|()| fs::rename(&hidden, host::short_path(root, "broker.sock")))
        .map_err(|error| {
            let _ = fs::remove_file(&hidden);
            cant(error)
        })?;
    Ok(listener)
}
