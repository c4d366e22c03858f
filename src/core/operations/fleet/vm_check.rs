//! One VM as it would be launched, and everything in its config that only a look at this host can find
//! wrong.
//!
//! Here: images, kernels, disks, mounts, seeds and keys, looked at and not touched. Not here: what holds
//! for the whole fleet (`operations::fleet::preflight`), the rules themselves (each beside the code that makes
//! the thing: `images::base`, `runtime::overlay`, `runtime::seed`), or making any of it.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use super::launch_vm::{is_made_by_castra, keep_of};
use crate::core::bootstrap::keys;
use crate::core::cancel::Cancel;
use crate::core::config::{BaseImage, Config, ImageSource, Mount, Network, PortForward, VmConfig, with_ssh};
use crate::core::events::{Event, PlannedForward, PlannedMount, Severity, VmPlan};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::human;
use crate::core::images::base::{ResolvedBase, look_at_base_image};
use crate::core::images::default_guest::{GuestKind, find_default_guest, least_memory};
use crate::core::images::digest::DigestCache;
use crate::core::name::VmName;
use crate::core::root::records::{self, RunRecord};
use crate::core::runtime::binary::find_tool;
use crate::core::runtime::launch_plan::broker_address;
use crate::core::runtime::overlay::{self, EMPTY_DISK_BYTES, OverlaySpec};
use crate::core::runtime::seed::{self, SeedInputs, SeedKind};

/// What looking at a fleet's machines takes.
pub(super) struct VmCheck<'l> {
    config: &'l Config,
    home: &'l Path,
    cancel: &'l Cancel,
    /// Who keeps its disk, whatever `persist` says.
    keep_disks: &'l HashSet<VmName>,
    /// `qemu-img` is there; without it no image can be looked into.
    reads_images: bool,
    /// Replicas share an image: it is looked at once.
    seen: RefCell<Vec<(BaseImage, Result<Option<ResolvedBase>>)>>,
}

impl<'l> VmCheck<'l> {
    pub(super) fn new(
        config: &'l Config,
        home: &'l Path,
        cancel: &'l Cancel,
        keep_disks: &'l HashSet<VmName>,
    ) -> VmCheck<'l> {
        VmCheck {
            config,
            home,
            cancel,
            keep_disks,
            reads_images: find_tool("qemu-img").is_some(),
            seen: RefCell::default(),
        }
    }

    /// What the VM would be.
    pub(super) fn plan(&self, vm: &VmConfig, running: bool) -> VmPlan {
        let base = self.base(vm).and_then(|found| found.ok());
        let pending = match (&vm.base_image, vm.is_default_guest()) {
            (Some(_), _) => base.as_ref().is_none_or(Option::is_none),
            (None, is_default) => {
                is_default && find_default_guest(self.home, self.config.qemu.arch, kind_of(vm)).is_none()
            }
        };
        let own_size = match &vm.base_image {
            Some(_) => base.flatten().map(|base| base.virtual_size),
            None => Some(EMPTY_DISK_BYTES),
        };
        let forward = |forward: &PortForward| PlannedForward {
            host: (forward.host != 0).then_some(forward.host),
            guest: forward.guest,
            protocol: forward.protocol,
        };
        let mount = |mount: &Mount| PlannedMount {
            host: mount.host.clone(),
            guest: mount.guest.clone(),
            readonly: mount.readonly,
        };
        VmPlan {
            running,
            image: image_of(vm),
            pending,
            kernel: vm.kernel.as_ref().map(|kernel| kernel.kernel.clone()),
            cpus: vm.cpus,
            memory_bytes: vm.memory_bytes,
            disk_bytes: vm.disk_size.or(own_size),
            persist: vm.persist,
            network: match vm.network {
                Network::User => "user",
                Network::Isolated => "isolated",
            }
            .to_owned(),
            forwards: with_ssh(&vm.port_forwards).iter().map(forward).collect(),
            mounts: vm.mounts.iter().map(mount).collect(),
        }
    }

    /// Everything that keeps the VM from being launched, each with its remedy. Nothing is changed.
    pub(super) fn refusals(&self, vm: &VmConfig) -> Vec<Failure> {
        let mut found = Vec::new();
        let mut note = |key: &str, result: Result<()>| {
            found.extend(result.err().map(|failure| placed(vm, key, failure)));
        };
        note("memory", self.check_memory(vm));
        if let Some(kernel) = &vm.kernel {
            note("kernel", check_boot_file(vm, "kernel", &kernel.kernel));
            if let Some(initrd) = &kernel.initrd {
                note("initrd", check_boot_file(vm, "initrd", initrd));
            }
        }
        match self.base(vm) {
            Some(Err(failure)) => note("base_image", Err(failure)),
            Some(Ok(base)) => note("disk_size", self.check_disk(vm, base.as_ref())),
            None => note("disk_size", self.check_disk(vm, None)),
        }
        note("mounts", self.check_9p(vm));
        for (index, mount) in vm.mounts.iter().enumerate() {
            let checked = check_mount(vm, mount).and_then(|()| check_nested(vm, mount));
            note(&format!("mounts.{index}"), checked);
        }
        note("user_data", self.check_seed(vm));
        if vm.ssh.identity.is_some() {
            note(
                "identity",
                keys::public_key(vm, self.config, self.cancel).map(drop),
            );
        }
        found
    }

    /// What is odd about the VM and stops nobody.
    pub(super) fn warnings(&self, vm: &VmConfig) -> Vec<Event> {
        let mut found = Vec::new();
        if vm.user_data.is_some() && SeedKind::of(vm) != SeedKind::NoCloud {
            found.push(Event::advice(
                Severity::Warn,
                Some(&vm.name),
                format!("{}nothing reads its `user_data`", vm.place("user_data")),
                "cloud-init reads it in a stock image: name such an image with `base_image`, and write `seed = \"auto\"`",
            ));
        }
        found
    }

    /// Its base image; `None`: it has none, or no image can be looked into here.
    fn base(&self, vm: &VmConfig) -> Option<Result<Option<ResolvedBase>>> {
        let image = vm.base_image.as_ref().filter(|_| self.reads_images)?;
        let known = self.seen.borrow().iter().find(|(seen, _)| seen == image).cloned();
        if let Some((_, found)) = known {
            return Some(found);
        }
        let found = look_at_base_image(image, self.home, &self.config.state, self.cancel);
        self.seen.borrow_mut().push((image.clone(), found.clone()));
        Some(found)
    }

    fn check_memory(&self, vm: &VmConfig) -> Result<()> {
        let least = least_memory(self.home, self.config.qemu.arch, kind_of(vm));
        if !vm.is_default_guest() || vm.memory_bytes >= least {
            return Ok(());
        }
        Err(
            Failure::new(Exit::Config, format!("vm `{}` has too little memory", vm.name))
                .because(format!(
                    "with {} the default guest{} panics while it boots; it needs {}",
                    human::bytes(vm.memory_bytes),
                    if vm.mounts.is_empty() { "" } else { " for mounts" },
                    human::bytes(least)
                ))
                .advice(format!(
                    "write `memory = \"{}\"` or more, or leave it out: 256 MiB",
                    human::bytes(least)
                )),
        )
    }

    fn check_9p(&self, vm: &VmConfig) -> Result<()> {
        let arch = self.config.qemu.arch;
        if vm.mounts.is_empty() || arch.mounts || !vm.is_default_guest() {
            return Ok(());
        }
        let what = format!("vm `{}` can't mount directories of the host", vm.name);
        Err(Failure::new(Exit::Config, what)
            .because(format!("the default guest for {} has no 9p", arch.name))
            .advice("remove its `mounts`; `castra cp` copies files to a running VM"))
    }

    fn check_disk(&self, vm: &VmConfig, base: Option<&ResolvedBase>) -> Result<()> {
        if vm.base_image.is_some() && base.is_none() {
            // Neither its size nor what stands on it is known before it is there.
            return Ok(());
        }
        let default = self.config.state.overlay(&vm.name);
        let path = vm.overlay.as_ref().unwrap_or(&default);
        let earlier: Option<RunRecord> = records::load(&self.config.state.vm(&vm.name).run())
            .ok()
            .flatten();
        let spec = OverlaySpec {
            path,
            base,
            disk_size: vm.disk_size,
            keep: keep_of(vm, path, earlier.as_ref(), self.keep_disks.contains(&vm.name)),
            ours: is_made_by_castra(vm, path, earlier.as_ref()),
            lock: None,
        };
        overlay::check(&spec)?;
        let made_over = earlier.as_ref().and_then(|record| record.base.as_ref());
        let digests = DigestCache::new(self.config.state.images());
        overlay::check_same_base(&spec, made_over, &digests, self.cancel)
    }

    fn check_seed(&self, vm: &VmConfig) -> Result<()> {
        // What only the launch knows has always the same length.
        let inputs = SeedInputs {
            vm: &vm.name,
            launch_id: "0123456789abcdef0123456789abcdef",
            broker: &broker_address(vm.network, u16::MAX),
            token: Some("0123456789abcdef0123456789abcdef"),
            heartbeat_secs: 15,
            authorized_keys: "ssh-ed25519 AAAA",
            user: &vm.ssh.user,
            mounts: &vm.mounts,
            user_data: vm.user_data.as_deref(),
        };
        seed::check_seed(SeedKind::of(vm), &self.config.state.vm(&vm.name).seed(), &inputs)
    }
}

fn kind_of(vm: &VmConfig) -> GuestKind {
    GuestKind::with_mounts(!vm.mounts.is_empty())
}

fn image_of(vm: &VmConfig) -> String {
    match &vm.base_image {
        Some(image) => match &image.source {
            ImageSource::Path(path) => path.display().to_string(),
            ImageSource::Url(url) => url.clone(),
        },
        None if vm.kernel.is_some() => "none".to_owned(),
        None if vm.mounts.is_empty() => "default guest".to_owned(),
        None => "default guest for mounts".to_owned(),
    }
}

/// The failure with the place in castra.toml that it is about before it.
fn placed(vm: &VmConfig, key: &str, mut failure: Failure) -> Failure {
    failure.what = format!("{}{}", vm.place(key), failure.what);
    failure
}

fn check_boot_file(vm: &VmConfig, key: &str, path: &Path) -> Result<()> {
    let refused = |why: String| {
        Failure::new(
            Exit::Config,
            format!("vm `{}` can't boot {}", vm.name, path.display()),
        )
        .because(why)
        .advice(format!(
            "`{key}` must name a file that you may read (relative paths start at castra.toml)"
        ))
    };
    let meta = fs::metadata(path).map_err(|error| refused(describe(&error)))?;
    if meta.is_dir() {
        return Err(refused("it is a directory".to_owned()));
    }
    // Opening a pipe would wait for its writer.
    if meta.is_file() {
        File::open(path).map_err(|error| refused(describe(&error)))?;
        if meta.len() == 0 {
            return Err(refused("it is empty".to_owned()));
        }
    }
    Ok(())
}

fn check_mount(vm: &VmConfig, mount: &Mount) -> Result<()> {
    let path = &mount.host;
    let refused = |why: String, next: String| {
        Failure::new(
            Exit::Config,
            format!("vm `{}` can't mount {}", vm.name, path.display()),
        )
        .because(why)
        .advice(next)
    };
    let correct = || "correct `host` of that mount (relative paths start at castra.toml)".to_owned();
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(refused(
            describe(&error),
            format!("make the folder, or {}", correct()),
        )),
        Err(error) => Err(refused(describe(&error), correct())),
        Ok(meta) if !meta.is_dir() => Err(refused(
            "it isn't a folder".to_owned(),
            "name the folder that holds it".to_owned(),
        )),
        // Reading a folder takes one permission, reaching what is in it another.
        Ok(_) => fs::read_dir(path)
            .and_then(|_| fs::metadata(path.join(".")))
            .map(drop)
            .map_err(|error| refused(describe(&error), "make it readable for you".to_owned())),
    }
}

/// The guest makes the place of a mount if need be, but not inside a folder that it may not write to.
fn check_nested(vm: &VmConfig, mount: &Mount) -> Result<()> {
    let depth = |mount: &Mount| mount.guest.matches('/').count();
    let is_outer = |outer: &&Mount| {
        let inside = mount.guest.strip_prefix(&outer.guest);
        inside.is_some_and(|inside| inside.starts_with('/'))
    };
    let Some(outer) = vm.mounts.iter().filter(is_outer).max_by_key(|outer| depth(outer)) else {
        return Ok(());
    };
    let place = outer
        .host
        .join(mount.guest[outer.guest.len()..].trim_start_matches('/'));
    if !outer.readonly || place.is_dir() {
        return Ok(());
    }
    Err(Failure::new(
        Exit::Config,
        format!(
            "vm `{}` can't mount {} at {}",
            vm.name,
            mount.host.display(),
            mount.guest
        ),
    )
    .because(format!(
        "{} is read-only in the guest, and {} doesn't exist to mount on",
        outer.guest,
        place.display()
    ))
    .advice(format!(
        "make that folder, or write `readonly = false` at the mount of {}",
        outer.guest
    )))
}

fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such file or folder".to_owned(),
        io::ErrorKind::PermissionDenied => "this user may not read it".to_owned(),
        io::ErrorKind::NotADirectory => "a part of its path isn't a folder".to_owned(),
        _ => error.to_string(),
    }
}
