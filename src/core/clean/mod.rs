//! Cleaning up: what castra has made under a state root, told from what it hasn't, and removed
//! without following a link.
//!
//! Here: the names that castra gives its files ([`Folder`]), and walking them ([`dir`]). Not here:
//! whether anything runs, who is told, persistent disks, or the order of things
//! (`core::operations::clean`).
//!
//! A `state_dir` may be any directory, the project's own among them, with folders of the user's that
//! are called `logs` or `images`. So a file goes by its place *and* its name, or it stays and is
//! told of; nothing is removed for lying below something that is castra's. castra makes no symbolic
//! links: one that bears the name of a file of castra's is somebody's, and stays.

pub mod dir;

use std::path::{Path, PathBuf};

use crate::core::failure::Failure;
use crate::core::name::VmName;
use crate::core::root::paths::vm_file;

use dir::{Dir, Kind};

/// More names of what stays are not kept.
const MAX_NAMES: usize = 50;

/// A directory under a state root or a castra home, by what lies in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folder {
    /// `vms/<vm>`.
    Vm {
        /// Its record and host keys stay, because its disk does.
        disk_stays: bool,
        /// QEMU's, QMP's and the console's logs stay.
        logs_stay: bool,
    },
    /// `images`: digests of the project's images.
    Digests,
    /// `handshakes`.
    Handshakes,
    /// `logs`.
    Logs,
    /// `logs/bus`.
    BusLogs,
    /// `logs/bootstrap`.
    BootstrapLogs,
    /// `logs/harness`.
    HarnessLogs,
    /// `state`.
    GuestState,
    /// `state/vizier`.
    Vizier,
    /// `state/vizier/<vm>`.
    VizierOf,
    /// `images` under a castra home, which all projects share.
    ImageCache,
    /// `images/download` there.
    Downloads,
    /// Everything in it is castra's: a seed, a built guest.
    Whole,
}

/// What a name in a place means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    /// A file of castra's, to be removed.
    File,
    /// A folder of castra's.
    Folder(Folder),
    /// castra's, but it stays.
    Stays,
    /// Whoever asks for the lock next must find the file that is locked now: whoever holds it
    /// removes it last.
    Lock,
    /// Not castra's.
    Foreign,
}

impl Folder {
    fn meaning(self, name: &str) -> Meaning {
        let file = |is: bool| if is { Meaning::File } else { Meaning::Foreign };
        let name = without_temporary(name);
        match self {
            Folder::Whole => Meaning::File,
            Folder::Vm {
                disk_stays,
                logs_stay,
            } => match name {
                "seed" => Meaning::Folder(Folder::Whole),
                "run.json" | vm_file::KNOWN_HOSTS | "known_hosts.old" if disk_stays => Meaning::Stays,
                "lock" => Meaning::Lock,
                vm_file::QEMU_LOG | vm_file::QMP_LOG | vm_file::SERIAL_LOG if logs_stay => Meaning::Stays,
                "run.json"
                | "stop.json"
                | "vizier.json"
                | "console.lock"
                | vm_file::KNOWN_HOSTS
                | "known_hosts.old" => Meaning::File,
                vm_file::QEMU_LOG | vm_file::QMP_LOG | vm_file::SERIAL_LOG => Meaning::File,
                vm_file::QEMU_PID | vm_file::QMP_SOCK | vm_file::SERIAL_SOCK => Meaning::File,
                // ssh makes its socket under a name of its own first.
                other => file([vm_file::SSH_CTL, vm_file::CLIENT_CTL].iter().any(|socket| {
                    let rest = other.strip_prefix(socket);
                    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                })),
            },
            Folder::Digests => file(name.starts_with("digest-") && name.ends_with(".json")),
            Folder::Handshakes => file(is_of_vm(name, ".json")),
            Folder::Logs => match name {
                "bus" => Meaning::Folder(Folder::BusLogs),
                "bootstrap" => Meaning::Folder(Folder::BootstrapLogs),
                "harness" => Meaning::Folder(Folder::HarnessLogs),
                _ => {
                    let name = without_rotation(name);
                    file(["broker.log", "events.jsonl", "events-broker.jsonl"].contains(&name))
                }
            },
            Folder::BusLogs => file(is_of_vm(without_rotation(name), ".log")),
            Folder::BootstrapLogs => file([".json", ".out", ".open"].iter().any(|end| is_of_vm(name, end))),
            Folder::HarnessLogs => {
                let name = without_rotation(name);
                let stem = name.strip_suffix(".jsonl").or_else(|| name.strip_suffix(".json"));
                file(stem.is_some_and(is_thread))
            }
            Folder::GuestState => match name {
                "vizier" => Meaning::Folder(Folder::Vizier),
                _ => Meaning::Foreign,
            },
            Folder::Vizier => match name.parse::<VmName>() {
                Ok(_) => Meaning::Folder(Folder::VizierOf),
                Err(_) => Meaning::Foreign,
            },
            Folder::VizierOf => file(without_rotation(name) == "service.log"),
            Folder::ImageCache => match name {
                "download" => Meaning::Folder(Folder::Downloads),
                _ if !name.starts_with("guest-") => Meaning::Foreign,
                _ if name.ends_with(".lock") => Meaning::File,
                _ => Meaning::Folder(Folder::Whole),
            },
            Folder::Downloads => file(is_download(name)),
        }
    }
}

/// The name that a file replaced whole has while it is written: `x.tmp-<pid>-<hex>` is `x`.
fn without_temporary(name: &str) -> &str {
    let Some((stem, rest)) = name.split_once(".tmp-") else {
        return name;
    };
    let is_mark = rest
        .split_once('-')
        .is_some_and(|(pid, random)| is_number(pid) && is_hex(random));
    if is_mark { stem } else { name }
}

/// `broker.log.3` is `broker.log`.
fn without_rotation(name: &str) -> &str {
    match name.rsplit_once('.') {
        Some((stem, number)) if is_number(number) => stem,
        _ => name,
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// `<vm>…<end>`, where what stands before the end has the form of a VM's name. Run logs are
/// `<vm>-<timestamp>`, of the same form.
fn is_of_vm(name: &str, end: &str) -> bool {
    let stem = name.strip_suffix(end).unwrap_or_default();
    // A run log's stem is longer than a name by its timestamp, `-20261121T100000.123Z`.
    let name = match stem.rsplit_once('-') {
        Some((vm, stamp)) if stamp.len() == 20 && stamp.ends_with('Z') => vm,
        _ => stem,
    };
    name.parse::<VmName>().is_ok()
}

/// An agent's thread (docs/HARNESS.md).
fn is_thread(stem: &str) -> bool {
    (1..=64).contains(&stem.len())
        && stem
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// `<id>-<name>`, the id 16 hex digits or more.
fn is_download(name: &str) -> bool {
    name.split_once('-')
        .is_some_and(|(id, _)| id.len() >= 8 && is_hex(id))
}

/// What a walk found, and removed unless it only looked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Bytes on disk of what was, or would be, removed.
    pub bytes: u64,
    /// How many files.
    pub files: u64,
    /// What lies there and isn't castra's, as far as it was noted.
    pub foreign: Vec<PathBuf>,
    /// castra's own files that stay.
    pub stays: u64,
    /// What couldn't be removed or looked into.
    pub failed: Vec<Failure>,
}

impl Swept {
    /// Whether nothing is left of the place.
    pub fn is_all(&self) -> bool {
        self.foreign.is_empty() && self.stays == 0 && self.failed.is_empty()
    }

    fn add(&mut self, other: Swept) {
        self.bytes += other.bytes;
        self.files += other.files;
        self.stays += other.stays;
        self.failed.extend(other.failed);
        let room = MAX_NAMES.saturating_sub(self.foreign.len());
        self.foreign.extend(other.foreign.into_iter().take(room));
    }
}

/// Removes (or, with `dry_run`, only counts) what is castra's in a directory; folders that are empty
/// then go too, the directory itself stays.
pub fn sweep(dir: &Dir, place: Folder, dry_run: bool) -> Swept {
    let mut swept = Swept::default();
    let entries = match dir.entries() {
        Ok(entries) => entries,
        Err(error) => {
            swept.failed.push(Failure::io("read", dir.path(), &error));
            return swept;
        }
    };
    for entry in entries {
        let path = dir.path().join(&entry.name);
        let meaning = match (place, entry.name.to_str()) {
            (Folder::Whole, _) if entry.kind == Kind::Folder => Meaning::Folder(Folder::Whole),
            (Folder::Whole, _) => Meaning::File,
            (_, Some(name)) => place.meaning(name),
            (_, None) => Meaning::Foreign,
        };
        match (meaning, entry.kind) {
            (Meaning::File, Kind::File | Kind::Socket) => {
                if !dry_run && let Err(error) = dir.remove_file(&entry.name) {
                    swept.failed.push(Failure::io("remove", &path, &error));
                    continue;
                }
                swept.bytes += entry.bytes;
                swept.files += 1;
            }
            (Meaning::Folder(place), Kind::Folder) => {
                swept.add(sweep_folder(dir, &entry.name, place, dry_run))
            }
            (Meaning::Stays, Kind::File) => swept.stays += 1,
            (Meaning::Lock, Kind::File) => {}
            _ if swept.foreign.len() < MAX_NAMES => swept.foreign.push(path),
            _ => {}
        }
    }
    swept
}

/// The same for a folder in a directory, which goes too if it is empty then. That it isn't there is
/// fine; one that is no folder isn't castra's.
pub fn sweep_folder(dir: &Dir, name: impl AsRef<Path>, place: Folder, dry_run: bool) -> Swept {
    let name = name.as_ref();
    let path = dir.path().join(name);
    let folder = match dir.folder(name) {
        Ok(Some(folder)) => folder,
        Ok(None) => return Swept::default(),
        Err(error) if dir::is_no_folder(&error) => {
            return Swept {
                foreign: vec![path],
                ..Swept::default()
            };
        }
        Err(error) => {
            return Swept {
                failed: vec![Failure::io("read", &path, &error)],
                ..Swept::default()
            };
        }
    };
    let mut swept = sweep(&folder, place, dry_run);
    if swept.is_all()
        && !dry_run
        && let Err(error) = dir.remove_folder(name)
    {
        swept.failed.push(Failure::io("remove", &path, &error));
    }
    swept
}

#[cfg(test)]
mod tests;
