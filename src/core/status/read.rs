//! Gathering the evidence: a few small files and questions to the kernel, nothing that waits.
//!
//! Here: what is read, in which order. Not here: what it means ([`super::assemble`]).
//!
//! The order matters, since nothing is locked meanwhile: for each VM first who holds `qemu.pid`,
//! then its launch, then the record, and the clock last. So a QEMU that was seen alive is judged by
//! its own launch or a later one, never by a handshake of an earlier one. A VM that seems not to
//! run is asked again after its logs were read: it may have been launched in between.

use std::cmp::Ordering;
use std::collections::HashSet;

use serde::de::DeserializeOwned;

use crate::core::config::workspace;
use crate::core::failure::{Failure, Result};
use crate::core::host::{self, Holder};
use crate::core::name::VmName;
use crate::core::root::alive::{find_qemu_pid, launched_vms, live_broker, qemu_pid};
use crate::core::root::handshake_record::read_record;
use crate::core::root::paths::{StateRoot, VmPaths, castra_home};
use crate::core::root::records::{self, RunPhase, RunRecord};
use crate::core::runtime::lost;
use crate::core::runtime::{pause, resets};

use super::assemble::bootstrap_runs;
use super::evidence::{Loaded, Now, Snapshot, VmEvidence};
use crate::core::root::ending;
use crate::core::root::project::{Declared, Project};
use crate::core::time::wall_ms;

/// How often a VM that changes while it is looked at is looked at again.
const TRIES: u32 = 3;

/// Gathers all evidence on a project. A file that can't be understood is part of the evidence; a
/// state root that can't be looked into is a failure, lest everything in it reads as stopped.
pub fn read(project: Project) -> Result<Snapshot> {
    let state = &project.state;
    let live_broker = live_broker(state);
    let broker = found(records::load(&state.broker_json()));
    let mut vms: Vec<VmEvidence> = names_of(&project)?
        .into_iter()
        .map(|(name, declared)| read_vm(state, &name, declared))
        .collect();
    find_lost(&project, &mut vms);
    let undated = vms.iter().any(|vm| vm.qemu.is_some() && vm.run.known().is_none());
    // With a broker a VM may be there that somebody started himself.
    let guests = if undated || live_broker.is_some() {
        found(records::load(&state.guests()))
    } else {
        Loaded::Absent
    };
    Ok(Snapshot {
        now: now(),
        live_broker,
        broker,
        guests,
        vms,
        project,
    })
}

/// The clocks.
pub fn now() -> Now {
    Now {
        boottime_ms: host::boottime_ms(),
        boot_id: host::boot_id().clone(),
        wall_ms: wall_ms(),
    }
}

/// With a config its VMs, then those it doesn't name whose QEMU runs; without one those that were
/// ever launched, by name.
fn names_of(project: &Project) -> Result<Vec<(VmName, Option<Declared>)>> {
    let mut on_disk = launched_vms(&project.state)?;
    for name in &on_disk {
        find_qemu_pid(&project.state.vm(name))?;
    }
    on_disk.sort_by(|a, b| by_name(a.as_str(), b.as_str()));
    let runs = |name: &VmName| qemu_pid(&project.state.vm(name)).is_some();
    let Some(declared) = &project.vms else {
        on_disk.retain(|name| host::is_there(&project.state.vm(name).run()) || runs(name));
        return Ok(on_disk.into_iter().map(|name| (name, None)).collect());
    };
    let mut names: Vec<_> = declared
        .iter()
        .map(|declared| (declared.name.clone(), Some(declared.clone())))
        .collect();
    let named: HashSet<&VmName> = declared.iter().map(|declared| &declared.name).collect();
    on_disk.retain(|name| !named.contains(name) && runs(name));
    names.extend(on_disk.into_iter().map(|name| (name, None)));
    Ok(names)
}

/// As people sort: `api-2` before `api-10`.
fn by_name(a: &str, b: &str) -> Ordering {
    fn parts(name: &str) -> (&str, u64) {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        (stem, name[stem.len()..].parse().unwrap_or(0))
    }
    parts(a).cmp(&parts(b)).then_with(|| a.cmp(b))
}

fn read_vm(state: &StateRoot, name: &VmName, declared: Option<Declared>) -> VmEvidence {
    let paths = state.vm(name);
    let mut evidence = look_at(state, &paths, name, declared);
    for _ in 1..TRIES {
        let settled = evidence.qemu.is_some()
            || evidence.run == Loaded::Absent
            || (qemu_pid(&paths).is_none() && evidence.run == found(records::load(&paths.run())));
        if settled {
            break;
        }
        evidence = look_at(state, &paths, name, evidence.declared);
    }
    evidence
}

fn look_at(state: &StateRoot, paths: &VmPaths, name: &VmName, declared: Option<Declared>) -> VmEvidence {
    let qemu = qemu_pid(paths);
    let run: Loaded<RunRecord> = found(records::load(&paths.run()));
    let stop = match run {
        Loaded::Absent => Loaded::Absent,
        Loaded::Value(_) | Loaded::Unreadable(_) => found(records::load(&paths.stop())),
    };
    // The lock says whether a launch, a stop or a bootstrap is still at work; for a VM that
    // simply runs or is simply gone it has nothing to say.
    let lock_matters = run.known().is_some_and(|run| {
        run.phase == RunPhase::Starting
            || bootstrap_runs(run)
            || (qemu.is_none() && matches!(stop, Loaded::Value(_)))
    });
    let lock_held = lock_matters && host::lock_holder(&paths.lock()) != Holder::Nobody;
    let ending = match (&run, qemu) {
        (Loaded::Value(_), None) => ending::read(paths),
        _ => None,
    };
    VmEvidence {
        name: name.clone(),
        declared,
        qemu,
        run,
        stop,
        lock_held,
        record: read_record(&state.handshake(name)),
        pause: qemu.and_then(|_| pause::read(paths)),
        resets: qemu.map(|_| resets::read(paths)),
        ending,
        lost: None,
    }
}

/// QEMUs of this project that no pid file leads to. Looked for only where a VM seems not to run,
/// since that takes a look at every process.
fn find_lost(project: &Project, vms: &mut Vec<VmEvidence>) {
    if !vms.is_empty() && vms.iter().all(|vm| vm.qemu.is_some()) {
        return;
    }
    let mut roots = vec![project.state.dir().to_owned()];
    if let Some(home) = castra_home() {
        let entry = workspace::projects_dir(&home).join(&project.workspace);
        roots.extend(workspace::former_roots_of(&entry, &project.state));
    }
    for qemu in lost::of_roots(&roots) {
        let at = match vms.iter().position(|vm| vm.name == qemu.vm) {
            Some(at) if vms[at].qemu.is_some() => continue,
            Some(at) => at,
            None => {
                let paths = project.state.vm(&qemu.vm);
                vms.push(look_at(&project.state, &paths, &qemu.vm, None));
                vms.len() - 1
            }
        };
        vms[at].qemu = Some(qemu.pid);
        vms[at].ending = None;
        vms[at].lost = Some(qemu.fate());
    }
}

fn found<T: DeserializeOwned>(loaded: Result<Option<T>, Failure>) -> Loaded<T> {
    match loaded {
        Ok(Some(value)) => Loaded::Value(value),
        Ok(None) => Loaded::Absent,
        Err(failure) => Loaded::Unreadable(match failure.why {
            Some(why) => format!("{}: {why}", failure.what),
            None => failure.what,
        }),
    }
}
