//! QEMUs of castra whose state root was removed, moved or replaced: they still run, and no pid file
//! leads to them.
//!
//! Here: finding them and signalling one. Not here: which project they belong to and what to do
//! with them (`core::operations::lost`).
//!
//! As for every other QEMU the kernel names the holder of the record lock on its pid file; only the
//! file is found another way. castra gives QEMU the pid file by its full path, so the command line
//! shows for which VM and state root it was started, and the process has that file open, also if it
//! was removed. Both must agree, or the process isn't castra's.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::core::config::{self, workspace};
use crate::core::failure::{Exit, Failure};
use crate::core::host::{self, Holder};
use crate::core::name::VmName;
use crate::core::root::paths::{StateRoot, vm_file};

/// A QEMU that its pid file's path doesn't lead to.
#[derive(Debug)]
pub struct LostQemu {
    /// The VM that it was started as.
    pub vm: VmName,
    /// Its process.
    pub pid: u32,
    /// The state root that it was started for.
    pub state_root: PathBuf,
    /// Where that state root is now; `None`: it was removed.
    pub moved_to: Option<PathBuf>,
    /// The config that was moved together with the state root and leads to it: the VM belongs to
    /// that project, and is lost only if one looks in the old place.
    pub moved_with: Option<PathBuf>,
    /// Its pid file, which it holds a lock on.
    pid_file: File,
}

/// All of them that this user may see, sorted by state root and name.
pub fn find() -> Vec<LostQemu> {
    let mut found: Vec<LostQemu> = host::command_lines()
        .into_iter()
        .filter_map(|(pid, words)| lost_qemu_of(pid, &words))
        .collect();
    found.sort_by(|a, b| (&a.state_root, &a.vm, a.pid).cmp(&(&b.state_root, &b.vm, b.pid)));
    found
}

/// The lost QEMUs that were started for these state roots. A QEMU whose state root was moved to one
/// of them isn't lost: its pid file is found there. Nor is one whose project was moved as a whole:
/// it is found from its new place, and a new project in the old place must not end it.
pub fn of_roots(roots: &[PathBuf]) -> Vec<LostQemu> {
    let mut lost = find();
    lost.retain(|qemu| {
        let is_one = |path: &Path| roots.iter().any(|root| root == path);
        is_one(&qemu.state_root) && !qemu.moved_to.as_deref().is_some_and(is_one) && qemu.moved_with.is_none()
    });
    lost
}

fn lost_qemu_of(pid: u32, words: &[OsString]) -> Option<LostQemu> {
    let (vm, state_root) = started_for(words)?;
    let path = StateRoot::new(&state_root).vm(&vm).qemu_pid();
    // If the lock can't be queried, nothing is concluded.
    if host::ask_lock_holder(&path).ok()? == Holder::Process(pid) {
        return None;
    }
    let held = host::held_file(pid, OsStr::new(vm_file::QEMU_PID))?;
    // The process has a file system of its own: the path is right there, only this process doesn't
    // see the file.
    if held.path.as_deref() == Some(&path) || !host::shares_file_system(pid, &state_root) {
        return None;
    }
    let moved_to = held.path.and_then(|path| Some(root_of(&path)?.1.to_owned()));
    let moved_with = moved_to.as_deref().and_then(config_beside);
    Some(LostQemu {
        vm,
        pid,
        state_root,
        moved_to,
        moved_with,
        pid_file: held.file,
    })
}

/// The VM and the state root that a QEMU's command line names.
fn started_for(words: &[OsString]) -> Option<(VmName, PathBuf)> {
    let value = |option: &str| {
        let at = words.iter().position(|word| word == option)?;
        words.get(at + 1)
    };
    let (vm, root) = root_of(Path::new(value("-pidfile")?))?;
    let named = value("-name")?.to_str()?;
    (named == vm.as_str() && root.is_absolute()).then(|| (vm, root.to_owned()))
}

/// The VM and the state root of a path `ROOT/vms/VM/qemu.pid`.
fn root_of(pid_file: &Path) -> Option<(VmName, &Path)> {
    let dir = pid_file
        .parent()
        .filter(|_| pid_file.ends_with(vm_file::QEMU_PID))?;
    let vms = dir.parent().filter(|vms| vms.ends_with("vms"))?;
    let vm = dir.file_name()?.to_str()?.parse().ok()?;
    Some((vm, vms.parent()?))
}

/// The config of a project that was moved together with its state root: it has the same place
/// relative to the state root, and leads to it. A config that can't be read counts, too.
fn config_beside(state_root: &Path) -> Option<PathBuf> {
    let record = workspace::record_in(state_root)?;
    let inside = record
        .state_root
        .strip_prefix(record.config_path.parent()?)
        .ok()?;
    let dir = state_root
        .ancestors()
        .nth(inside.components().count())
        .filter(|dir| dir.join(inside) == state_root)?;
    let config = dir.join(record.config_path.file_name()?);
    let leads_there = match config::load(&config) {
        Ok(config) => config.state.dir() == state_root,
        Err(_) => config.is_file(),
    };
    leads_there.then_some(config)
}

impl LostQemu {
    /// Whether it still runs, by its lock.
    pub fn is_alive(&self) -> bool {
        host::lock_holder_of(&self.pid_file) == Holder::Process(self.pid)
    }

    /// Sends it a signal, after checking again that its process holds the lock. False: it has
    /// ended, or may not be signalled.
    pub fn signal(&self, signal: Signal) -> bool {
        let Ok(pid) = i32::try_from(self.pid) else {
            return false;
        };
        self.is_alive() && kill(Pid::from_raw(pid), signal).is_ok()
    }

    /// What happened to its state root, in words.
    pub fn fate(&self) -> String {
        let root = self.state_root.display();
        match &self.moved_to {
            Some(place) => format!("its state root {root} was moved to {}", place.display()),
            None => format!("its state root {root} was removed or replaced"),
        }
    }

    /// The failure of whatever needs that state root.
    pub fn failure(&self, exit: Exit) -> Failure {
        Failure::new(
            exit,
            format!("vm `{}` runs on as pid {} without its state", self.vm, self.pid),
        )
        .because(self.fate())
        .advice("`castra down` ends it; then start it again")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn only_a_command_line_of_castras_names_a_state_root() {
        let qemu = "qemu-system-x86_64 -name web -m 1 -pidfile /s/vms/web/qemu.pid -daemonize";
        let (vm, root) = started_for(&words(qemu)).unwrap();
        assert_eq!((vm.as_str(), root.as_path()), ("web", Path::new("/s")));
        for other in [
            "qemu-system-x86_64 -name db -pidfile /s/vms/web/qemu.pid",
            "qemu-system-x86_64 -name web -pidfile qemu.pid",
            "qemu-system-x86_64 -name web -pidfile /s/web/qemu.pid",
            "qemu-system-x86_64 -name web -pidfile /s/vms/web/other.pid",
            "qemu-system-x86_64 -name web -pidfile s/vms/web/qemu.pid",
            "qemu-system-x86_64 -pidfile /s/vms/web/qemu.pid",
            "qemu-system-x86_64 -name web -pidfile",
            "vi /s/vms/web/qemu.pid",
        ] {
            assert!(started_for(&words(other)).is_none(), "{other}");
        }
    }
}
