//! Cleaning one project: check that nothing of it runs and no command works on it, then remove disks, VMs,
//! logs, other files, and last its record.
//!
//! Here: that order, and what stays together with a kept disk. Not here: which files are castra's
//! (`core::clean`), or several projects (`operations::clean`).

use std::path::{Path, PathBuf};

use crate::core::clean::dir::{Dir, Kind};
use crate::core::clean::{Folder, Swept, sweep, sweep_folder};
use crate::core::config::workspace;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, FileLock, Holder, ImageUse, LockError};
use crate::core::name::VmName;
use crate::core::operations::clean::{CleanTarget, Work, remove_named};
use crate::core::operations::run;
use crate::core::root::alive::{launched_vms, live_broker, qemu_pid, running_vms};
use crate::core::root::paths::StateRoot;
use crate::core::root::records::{self, RunRecord};
use crate::core::root::run_log;
use crate::core::runtime::lost;

/// The name of this command, for others who find the locks held.
const COMMAND: &str = "castra clean";

/// Refuses a project of which anything runs, by its locks. Takes none.
pub(crate) fn refuse_running(target: &CleanTarget) -> Result<()> {
    let state = &target.state;
    let pid_of = |(vm, pid)| format!("vm `{vm}` (pid {pid})");
    let mut running: Vec<String> = running_vms(state)?.into_iter().map(pid_of).collect();
    for qemu in lost::of_roots(&[state.dir().to_owned()]) {
        running.push(format!("vm `{}` (pid {}): {}", qemu.vm, qemu.pid, qemu.fate()));
    }
    if let Some((pid, _)) = live_broker(state) {
        running.push(format!("its broker (pid {pid})"));
    } else if host::lock_holder(&state.broker_pid()) != Holder::Nobody {
        running.push("its broker".to_owned());
    }
    if running.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        Exit::Busy,
        format!("can't clean project `{}` while it runs", target.project),
    )
    .because(format!("still running: {}", running.join(", ")))
    .advice(format!(
        "castra --workspace {} down, then clean again",
        target.workspace
    )))
}

/// The locks of a project, held while its files are removed.
struct Locks {
    project: Option<FileLock>,
    broker: Option<FileLock>,
    vms: Vec<FileLock>,
}

/// Cleans one project; true if a disk of it stays.
pub(crate) fn clean(work: &mut Work<'_, '_>, target: &CleanTarget) -> Result<bool> {
    let state = &target.state;
    let root = match Dir::open(state.dir()) {
        Ok(root) => root,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Failure::io("read", state.dir(), &error)),
    };
    refuse_running(target)?;
    let vms = launched_vms(state)?;
    let locks = match work.options.dry_run {
        true => check_locks(target, &vms)?,
        false => take_locks(target, &root, &vms)?,
    };
    // Checked again under the locks: another command may have been faster.
    refuse_running_vms(target, &vms)?;
    if !work.options.dry_run {
        for vm in &vms {
            run_log::close_abandoned_and_emit(state, vm, work.emitter);
        }
    }
    let disks_stay = clean_files(work, target, &root, &vms, locks);
    work.vms.total += vms.len();
    work.vms.changed += vms.len();
    Ok(disks_stay)
}

fn refuse_running_vms(target: &CleanTarget, vms: &[VmName]) -> Result<()> {
    match vms.iter().any(|vm| qemu_pid(&target.state.vm(vm)).is_some()) {
        true => refuse_running(target),
        false => Ok(()),
    }
}

/// A dry run takes no lock; it only checks that none is held.
fn check_locks(target: &CleanTarget, vms: &[VmName]) -> Result<Locks> {
    let state = &target.state;
    let mut paths = vec![state.lock()];
    paths.extend(vms.iter().map(|vm| state.vm(vm).lock()));
    for path in paths {
        if host::lock_holder(&path) != Holder::Nobody {
            let holder = host::tail_of(&path, 512);
            return Err(run::busy(&format!("project `{}`", target.project), holder.trim()));
        }
    }
    Ok(Locks {
        project: None,
        broker: None,
        vms: Vec::new(),
    })
}

/// Project, VMs by name, broker: nobody begins anything meanwhile.
fn take_locks(target: &CleanTarget, root: &Dir, vms: &[VmName]) -> Result<Locks> {
    let state = &target.state;
    let take = |dir: Option<Dir>, name: &str, path: PathBuf| -> Result<Option<FileLock>> {
        let no_lock = |error: std::io::Error| Failure::io("read", &path, &error);
        let Some(dir) = dir else {
            return Ok(None);
        };
        match dir.entry(name).map_err(no_lock)?.map(|entry| entry.kind) {
            None | Some(Kind::File) => {}
            // Taking it would write into whatever the link leads to.
            Some(_) => {
                return Err(Failure::new(Exit::Io, format!("can't lock {}", path.display()))
                    .because("it isn't a regular file, so castra didn't make it")
                    .advice("see what it is, and remove it yourself"));
            }
        }
        FileLock::try_take(&path, COMMAND)
            .map(Some)
            .map_err(|error| match error {
                LockError::Held(holder) => run::busy(&format!("project `{}`", target.project), &holder),
                LockError::Io(error) => Failure::io("create", &path, &error),
            })
    };
    let reopened = || Dir::open(root.path()).map_err(|error| Failure::io("read", root.path(), &error));
    let project = take(Some(reopened()?), "lock", state.lock())?;
    let mut held = Vec::new();
    for vm in vms {
        let dir = folder_of(root, vm);
        held.extend(take(dir, "lock", state.vm(vm).lock())?);
    }
    // Only an existing file is locked, because taking a lock would create it.
    let broker = match root.entry("broker.pid") {
        Ok(Some(_)) => take(Some(reopened()?), "broker.pid", state.broker_pid())?,
        _ => None,
    };
    Ok(Locks {
        project,
        broker,
        vms: held,
    })
}

/// `vms/<vm>`, without following a link.
fn folder_of(root: &Dir, vm: &VmName) -> Option<Dir> {
    root.folder("vms").ok()??.folder(vm.as_str()).ok()?
}

/// A VM's disk, and whether it is removed.
struct DiskOf {
    path: PathBuf,
    stays: Option<&'static str>,
}

fn clean_files(
    work: &mut Work<'_, '_>,
    target: &CleanTarget,
    root: &Dir,
    vms: &[VmName],
    locks: Locks,
) -> bool {
    let (state, id) = (&target.state, Some(target.workspace.as_str()));
    let dry_run = work.options.dry_run;
    let mut disks_stay = false;
    for vm in vms {
        let mut stays = false;
        for disk in disks_of(state, vm, work.options.force) {
            stays |= clean_disk(work, target, root, disk);
        }
        disks_stay |= stays;
        let place = Folder::Vm {
            disk_stays: stays,
            logs_stay: work.options.keep_logs,
        };
        let Some(folder) = folder_of(root, vm) else {
            continue;
        };
        let mut swept = sweep(&folder, place, dry_run);
        if swept.stays == 0 {
            swept.bytes += remove_named(&folder, "lock", dry_run).bytes;
            if !dry_run && let Ok(Some(vms)) = root.folder("vms") {
                // The directory stays if it holds files that aren't castra's.
                let _ = vms.remove_folder(vm.as_str());
            }
        }
        work.removed(id, state.vm(vm).dir().to_owned(), "vm", swept);
    }
    clean_orphaned_disks(work, target, root, vms, &mut disks_stay);
    drop(locks.vms);

    let mut stays = disks_stay;
    let mut folder = |work: &mut Work<'_, '_>, name: &str, place: Folder, category: &'static str| {
        let swept = sweep_folder(root, name, place, dry_run);
        stays |= swept.stays > 0 || !swept.failed.is_empty();
        work.removed(id, state.dir().join(name), category, swept);
    };
    folder(work, "images", Folder::Digests, "digests");
    if !work.options.keep_handshakes {
        folder(work, "handshakes", Folder::Handshakes, "handshakes");
    }
    if !work.options.keep_logs {
        folder(work, "logs", Folder::Logs, "logs");
        folder(work, "state", Folder::GuestState, "logs");
    }
    for name in ["broker.sock", "broker.json", "broker.pid", "guests.json"] {
        let swept = remove_named(root, name, dry_run);
        work.removed(id, state.dir().join(name), "broker", swept);
    }
    drop(locks.broker);
    if !disks_stay {
        for name in ["id_ed25519", "id_ed25519.pub"] {
            let swept = remove_named(root, name, dry_run);
            work.removed(id, state.dir().join(name), "keys", swept);
        }
    }
    for name in ["vms", "overlays"] {
        if !dry_run {
            // Usually empty; files in it were reported.
            let _ = root.remove_folder(name);
        }
    }
    let is_left =
        stays || work.options.keep_logs || (work.options.keep_handshakes && has(root, "handshakes"));
    if !is_left {
        forget(work, target, root);
    }
    drop(locks.project);
    disks_stay
}

fn has(root: &Dir, name: &str) -> bool {
    matches!(root.entry(name), Ok(Some(_)))
}

/// The project's record is removed last: until then `--workspace` finds the project.
fn forget(work: &mut Work<'_, '_>, target: &CleanTarget, root: &Dir) {
    let (state, id, dry_run) = (
        &target.state,
        Some(target.workspace.as_str()),
        work.options.dry_run,
    );
    let swept = remove_named(root, "workspace.json", dry_run);
    work.removed(id, state.workspace(), "workspace", swept);
    let lock = remove_named(root, "lock", dry_run);
    work.removed(id, state.lock(), "workspace", lock);
    if dry_run {
        return;
    }
    // Anything of the user's keeps it: a directory that isn't empty can't be removed.
    let _ = std::fs::remove_dir(state.dir());
    let entry_is_ours = |home: &Path| {
        let entry = workspace::projects_dir(home).join(&target.workspace);
        let record = workspace::record_in(&entry);
        entry != state.dir() && record.is_some_and(|record| record.state_root == state.dir())
    };
    if let Some(home) = work.options.home.clone().filter(|home| entry_is_ours(home))
        && let Err(failure) = workspace::forget_workspace(&home, &target.workspace)
    {
        work.fail(failure);
    }
}

/// Where a VM's disk is by its record, and where it is as a rule (a state root that was moved has
/// records of its old place); and whether it may go.
fn disks_of(state: &StateRoot, vm: &VmName, force: bool) -> Vec<DiskOf> {
    let record: Option<RunRecord> = records::load(&state.vm(vm).run()).ok().flatten();
    let stays = match &record {
        Some(record) if record.persist => Some("the disk is persistent; --force removes it"),
        Some(_) => None,
        None => {
            Some("run.json is gone, so castra can't know whether the disk is persistent; --force removes it")
        }
    };
    let usual = state.overlay(vm);
    let recorded = record
        .and_then(|record| record.overlay)
        .filter(|path| *path != usual);
    let stays = stays.filter(|_| !force);
    let paths = recorded.into_iter().chain([usual]);
    paths.map(|path| DiskOf { path, stays }).collect()
}

/// Removes a disk; true if it stays.
fn clean_disk(work: &mut Work<'_, '_>, target: &CleanTarget, root: &Dir, disk: DiskOf) -> bool {
    let id = Some(target.workspace.as_str());
    let path = disk.path;
    let Some((dir, name)) = directory_of(&target.state, root, &path) else {
        // The folder doesn't exist or is a link: castra removes nothing there.
        return false;
    };
    match dir.entry(&name) {
        Ok(Some(entry)) if entry.kind == Kind::File => {}
        Ok(None) => return false,
        _ => {
            work.keep(id, path, "castra didn't make it");
            return false;
        }
    }
    if let Some(why) = disk.stays {
        work.keep(id, path, why);
        return true;
    }
    if host::image_use(&path) != ImageUse::Unlocked {
        work.fail(
            Failure::new(Exit::Failed, format!("overlay {} is in use", path.display()))
                .because("a process has it open")
                .advice(format!(
                    "end that process: {}",
                    host::file_users(&path).join(", ")
                )),
        );
        return true;
    }
    let dry_run = work.options.dry_run;
    let swept = remove_named(&dir, &name, dry_run);
    let failed = !swept.failed.is_empty();
    work.removed(id, path, "overlay", swept);
    // A half-made disk of a castra that was killed.
    let _ = remove_named(&dir, &format!("{name}.new"), dry_run);
    failed
}

/// The folder of a disk, opened without following a link below the state root. A disk elsewhere goes
/// by its record, as with `down`; if the way there has become another one, it isn't touched.
fn directory_of(state: &StateRoot, root: &Dir, path: &Path) -> Option<(Dir, String)> {
    let name = path.file_name()?.to_str()?.to_owned();
    let parent = path.parent()?;
    if let Ok(below) = parent.strip_prefix(state.dir()) {
        let mut dir = Dir::open(root.path()).ok()?;
        for part in below.components() {
            dir = dir.folder(part).ok()??;
        }
        return Some((dir, name));
    }
    let is_straight = parent.canonicalize().is_ok_and(|real| real == parent);
    is_straight
        .then(|| Dir::open(parent).ok())?
        .map(|dir| (dir, name))
}

/// Disks of VMs that have no folder any more; nobody knows whether they are persistent.
fn clean_orphaned_disks(
    work: &mut Work<'_, '_>,
    target: &CleanTarget,
    root: &Dir,
    vms: &[VmName],
    disks_stay: &mut bool,
) {
    let overlays = match root.folder("overlays") {
        Ok(Some(overlays)) => overlays,
        Ok(None) => return,
        Err(_) => {
            let path = target.state.dir().join("overlays");
            return work.keep(Some(&target.workspace), path, "castra didn't make it");
        }
    };
    for entry in overlays.entries().unwrap_or_default() {
        let name = entry.name.to_string_lossy().into_owned();
        let vm = name
            .strip_suffix(".qcow2")
            .and_then(|stem| stem.parse::<VmName>().ok());
        let path = target.state.dir().join("overlays").join(&name);
        match vm {
            Some(vm) if vms.contains(&vm) => {}
            Some(vm) if entry.kind == Kind::File => {
                for disk in disks_of(&target.state, &vm, work.options.force) {
                    *disks_stay |= clean_disk(work, target, root, disk);
                }
            }
            _ if name.ends_with(".qcow2.new") && entry.kind == Kind::File => {
                let swept = remove_named(&overlays, &name, work.options.dry_run);
                work.removed(Some(&target.workspace), path, "overlay", swept);
            }
            _ => {
                let swept = Swept {
                    foreign: vec![path],
                    ..Swept::default()
                };
                work.removed(Some(&target.workspace), PathBuf::new(), "overlay", swept);
            }
        }
    }
}
