//! `[[vms]]`: names, replicas, and what no two VMs may share.
//!
//! Here: expanding `count`, applying `[[vms.instances]]`, conflicts of names, ports and overlays.
//! Not here: the keys of one VM (`vm`), tables that apply to all VMs (`settings`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::bootstrap_tables::{RawBootstrap, RawSsh, Scope};
use super::metadata::MetadataFiles;
use super::path_values::PathBases;
use super::reader::{Located, Section, quoted, shown};
use super::source::{Offset, Source};
use super::vm::RawVm;
use super::{ImageSource, Protocol, SshConfig, VmConfig};
use crate::core::name::{RESERVED_NAMES, VmName};

/// Most VMs of one project: far more than a host can run, and a bound for everything that exists
/// per VM.
pub(super) const MAX_VMS: u64 = 1000;

/// Default memory of a VM with an image or kernel of its own.
const DEFAULT_MEMORY: u64 = 1 << 30;
/// Default memory of the default guest.
const DEFAULT_GUEST_MEMORY: u64 = 256 << 20;

/// One `[[vms]]` entry as written.
struct Entry {
    role: Located<String>,
    count: Option<u64>,
    vm: RawVm,
    instances: Vec<(Located<String>, RawVm)>,
}

/// The defaults of all VMs.
struct Defaults {
    bootstrap: RawBootstrap,
    ssh: SshConfig,
}

/// All VMs of the file, with the tables of `bootstrap.toml` files applied.
pub(super) fn vms(
    root: &mut Section<'_>,
    bases: &PathBases,
    broker_port: Option<&Located<u16>>,
    metadata: &mut MetadataFiles,
) -> Vec<VmConfig> {
    let source = root.source;
    let bootstrap = RawBootstrap::read(root.section("bootstrap"), bases, Scope::Project);
    let mut section = root.section("ssh");
    let mut ssh = SshConfig::default();
    RawSsh::read(&mut section, bases).apply(&mut ssh);
    section.finish();
    let defaults = Defaults { bootstrap, ssh };

    let found = root.sections("vms");
    let at = found.as_ref().map_or(0, |found| found.at);
    let missing = root.place("vms").is_none() || found.as_ref().is_some_and(|found| found.value.is_empty());
    if missing {
        const FIX: &str = "add one: a line `[[vms]]` and below it `name = \"web\"`";
        match &found {
            Some(_) => source.error(at, "no VM is declared", FIX),
            None => root.missing("vms", "no VM is declared", FIX),
        }
    }
    let sections = found.map_or_else(Vec::new, |found| found.value);
    let entries: Vec<Entry> = sections
        .into_iter()
        .filter_map(|section| read_entry(section, bases))
        .collect();
    let total: u64 = entries.iter().map(|entry| entry.count.unwrap_or(1)).sum();
    if total > MAX_VMS {
        source.error(
            at,
            format!("{total} VMs"),
            format!("a project has at most {MAX_VMS}: lower `count`"),
        );
        return Vec::new();
    }

    let mut clashes = DuplicateCheck::new(source, broker_port);
    let mut vms = Vec::new();
    for entry in &entries {
        check_instances(source, entry);
        for name in names(entry) {
            let instance = entry
                .instances
                .iter()
                .find(|(id, _)| is_meant(entry, &id.value, &name));
            let own = instance.map(|(_, own)| own);
            clashes.check(entry, &name, own);
            let raw = match own {
                Some(own) => entry.vm.clone().merged_with(own),
                None => entry.vm.clone(),
            };
            let Some(name) = check_name(source, &entry.role, &name) else {
                continue;
            };
            vms.push(resolve(
                source,
                name,
                entry,
                raw,
                &defaults,
                metadata,
                bases.home.as_deref(),
            ));
        }
    }
    clashes.check_images(&vms);
    metadata.finish(&mut vms);
    vms
}

fn read_entry(mut section: Section<'_>, bases: &PathBases) -> Option<Entry> {
    let role = section.text("name", "web");
    let count = section.number("count", 1..=MAX_VMS, 2);
    let vm = RawVm::read(&mut section, bases);
    let mut instances = Vec::new();
    for mut instance in section
        .sections("instances")
        .map_or_else(Vec::new, |found| found.value)
    {
        let id = instance.text("id", "web-0");
        let own = RawVm::read(&mut instance, bases);
        if id.is_none() && instance.place("id").is_none() {
            instance.missing(
                "id",
                "an instance has no `id`",
                "write the replica's name, for example `id = \"web-0\"`",
            );
        }
        instance.finish();
        instances.extend(id.map(|id| (id, own)));
    }
    if role.is_none() && section.place("name").is_none() {
        section.missing(
            "name",
            "a VM has no name",
            "write `name = \"web\"` below this [[vms]]",
        );
    }
    section.finish();
    Some(Entry {
        role: role?,
        count: count.map(|count| count.value),
        vm,
        instances,
    })
}

/// The names of an entry's replicas. Without `count` the VM bears the entry's own name.
fn names(entry: &Entry) -> Vec<String> {
    match entry.count {
        None => vec![entry.role.value.clone()],
        Some(count) => (0..count)
            .map(|index| format!("{}-{index}", entry.role.value))
            .collect(),
    }
}

/// Whether an instance's id means this VM. Upstream castra names an entry's only VM `web-0`.
fn is_meant(entry: &Entry, id: &str, name: &str) -> bool {
    id.eq_ignore_ascii_case(name)
        || (entry.count.is_none() && id.eq_ignore_ascii_case(&format!("{}-0", entry.role.value)))
}

fn check_instances(source: &Source, entry: &Entry) {
    let names = names(entry);
    let mut seen: BTreeMap<String, Offset> = BTreeMap::new();
    for (id, _) in &entry.instances {
        let Some(name) = names.iter().find(|name| is_meant(entry, &id.value, name)) else {
            let known = match names.as_slice() {
                [only] => format!("write `id = {}`", quoted(only)),
                _ => format!(
                    "write one of {} to {}",
                    quoted(&names[0]),
                    quoted(names.last().map_or("", String::as_str))
                ),
            };
            source.error(
                id.at,
                format!("{} has no replica {}", shown(&entry.role.value), shown(&id.value)),
                known,
            );
            continue;
        };
        if let Some(first) = seen.insert(name.to_ascii_lowercase(), id.at) {
            source.error(
                id.at,
                format!(
                    "instance {} is there twice (first on line {})",
                    quoted(name),
                    source.line(first)
                ),
                "merge the two",
            );
        }
    }
}

fn check_name(source: &Source, role: &Located<String>, name: &str) -> Option<VmName> {
    match name.parse::<VmName>() {
        Err(error) => {
            source.error(role.at, error.to_string(), "for example `name = \"web\"`");
            None
        }
        Ok(name) if name.is_reserved() => {
            source.error(
                role.at,
                format!("the name {} is castra's own", quoted(name.as_str())),
                format!("write any but {}", RESERVED_NAMES.join(", ")),
            );
            None
        }
        Ok(name) => Some(name),
    }
}

fn resolve(
    source: &Source,
    name: VmName,
    entry: &Entry,
    raw: RawVm,
    defaults: &Defaults,
    metadata: &mut MetadataFiles,
    home: Option<&Path>,
) -> VmConfig {
    let base_image = raw.base_image(source);
    let kernel = raw.direct_kernel(source);
    let default_guest = base_image.is_none() && kernel.is_none();
    let mut ssh = defaults.ssh.clone();
    let bootstrap = defaults.bootstrap.clone().overlaid(&raw.bootstrap);
    let script = bootstrap.script.clone();
    let beside = script.and_then(|script| metadata.beside(source, &script, home));
    let bootstrap = match beside {
        Some(beside) => beside.apply(bootstrap, &mut ssh),
        None => bootstrap.resolved(),
    };
    VmConfig {
        name,
        second_name: None,
        role: entry.role.value.clone(),
        description: raw.description,
        base_image,
        kernel,
        overlay: raw.overlay.map(|overlay| overlay.value),
        disk_size: raw.disk_size,
        persist: raw.persist.unwrap_or(false),
        cpus: raw.cpus.unwrap_or(1),
        memory_bytes: raw.memory.unwrap_or(if default_guest {
            DEFAULT_GUEST_MEMORY
        } else {
            DEFAULT_MEMORY
        }),
        network: raw.network.unwrap_or_default(),
        seed: raw.seed.unwrap_or_default(),
        user_data: raw.user_data,
        qemu_args: raw.qemu_args.unwrap_or_default(),
        port_forwards: raw
            .port_forwards
            .unwrap_or_default()
            .into_iter()
            .map(|forward| forward.value)
            .collect(),
        mounts: raw.mounts.unwrap_or_default(),
        bootstrap,
        ssh,
        bases: raw
            .bases
            .iter()
            .map(|(key, at)| (key.clone(), source.place(*at)))
            .collect(),
    }
}

/// What no two VMs may share, each with the first VM that has it.
struct DuplicateCheck<'a> {
    source: &'a Source,
    names: BTreeMap<String, Offset>,
    ports: BTreeMap<(u16, bool), (String, Offset)>,
    overlays: BTreeMap<PathBuf, String>,
    overlays_at: Vec<Located<PathBuf>>,
}

impl<'a> DuplicateCheck<'a> {
    fn new(source: &'a Source, broker_port: Option<&Located<u16>>) -> DuplicateCheck<'a> {
        let mut ports = BTreeMap::new();
        if let Some(port) = broker_port {
            ports.insert((port.value, false), ("the broker".to_owned(), port.at));
        }
        DuplicateCheck {
            source,
            names: BTreeMap::new(),
            ports,
            overlays: BTreeMap::new(),
            overlays_at: Vec::new(),
        }
    }

    fn check(&mut self, entry: &Entry, name: &str, own: Option<&RawVm>) {
        let key = name.to_ascii_lowercase();
        if let Some(first) = self.names.insert(key.clone(), entry.role.at) {
            self.names.insert(key, first);
            self.source.error(
                entry.role.at,
                format!(
                    "VM {} is there twice (first on line {}); upper and lower case don't differ",
                    quoted(name),
                    self.source.line(first)
                ),
                "write another `name`",
            );
            // Its ports and overlay would only give the same error again.
            return;
        }
        let replicated = entry.count.is_some_and(|count| count > 1);
        match own.and_then(|own| own.port_forwards.as_ref()) {
            Some(own) => self.check_ports(name, own, false),
            None => self.check_ports(
                name,
                entry.vm.port_forwards.as_deref().unwrap_or_default(),
                replicated,
            ),
        }
        match own.and_then(|own| own.overlay.as_ref()) {
            Some(own) => self.check_overlay(name, own, false),
            None => {
                if let Some(shared) = &entry.vm.overlay {
                    self.check_overlay(name, shared, replicated);
                }
            }
        }
    }

    fn check_ports(&mut self, name: &str, forwards: &[Located<super::PortForward>], shared: bool) {
        for forward in forwards.iter().filter(|forward| forward.value.host != 0) {
            let port = forward.value.host;
            if shared {
                self.source.error(
                    forward.at,
                    format!("several replicas can't share the host port {port}"),
                    "write `host = 0` for free ones, or give each its own in [[vms.instances]]",
                );
                continue;
            }
            let key = (port, forward.value.protocol == Protocol::Udp);
            if let Some((owner, first)) = self.ports.get(&key) {
                self.source.error(
                    forward.at,
                    format!(
                        "host port {port} is taken by {owner} (line {})",
                        self.source.line(*first)
                    ),
                    "write another one, or `host = 0` for a free one",
                );
                continue;
            }
            self.ports.insert(key, (quoted(name), forward.at));
        }
    }

    fn check_overlay(&mut self, name: &str, overlay: &Located<PathBuf>, shared: bool) {
        if shared {
            self.source.error(
                overlay.at,
                "several replicas can't share one `overlay`",
                "leave it out, or give each its own in [[vms.instances]]",
            );
        } else if let Some(owner) = self.overlays.get(&overlay.value) {
            self.source.error(
                overlay.at,
                format!("{} has the same `overlay`", quoted(owner)),
                "leave it out, or name another file",
            );
        } else {
            self.overlays.insert(overlay.value.clone(), name.to_owned());
            self.overlays_at.push(overlay.clone());
        }
    }

    /// `up` makes an overlay anew and `down` removes it, so an overlay's path must not be that of
    /// an image.
    fn check_images(&self, vms: &[VmConfig]) {
        for vm in vms {
            let Some(ImageSource::Path(image)) = vm.base_image.as_ref().map(|base| &base.source) else {
                continue;
            };
            for overlay in self.overlays_at.iter().filter(|overlay| overlay.value == *image) {
                self.source.error(
                    overlay.at,
                    format!("`overlay` is the base image of {}", quoted(vm.name.as_str())),
                    "leave it out, or name a file of its own: it is made anew and removed by `down`",
                );
            }
        }
    }
}
