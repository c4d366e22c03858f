//! What each VM boots from: its base image or kernel, resolved to files on this host, and the
//! QEMU that will run it.
//!
//! Here: what can take minutes (building the default guest, fetching images) and must be done
//! before anything of the project is locked. Not here: how it is done (`core::images`), or the
//! launch (`operations::fleet::bring_up`).

use std::collections::HashMap;
use std::path::Path;

use crate::core::arch::Arch;
use crate::core::cancel::Cancel;
use crate::core::config::{Config, DirectKernel, VmConfig};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::images::base::{self, ResolvedBase, resolve_base_image};
use crate::core::images::default_guest::{DefaultGuest, GuestKind, ensure_default_guest, find_default_guest};
use crate::core::images::digest::{self, DigestCache, HashedSource};
use crate::core::name::VmName;
use crate::core::reporter::Emitter;

/// What one VM boots from.
#[derive(Clone, Debug, Default)]
pub(super) struct BootSource {
    /// Direct kernel boot.
    pub kernel: Option<DirectKernel>,
    /// What its disk stands on.
    pub base: Option<ResolvedBase>,
    /// Its `base_hash`, where that was taken already.
    pub base_hash: Option<String>,
}

/// What every VM to be started boots from.
pub(super) type BootSources = HashMap<VmName, BootSource>;

/// Finds, fetches or builds what these VMs boot from; what several share, once.
pub(super) fn prepare(
    vms: &[&VmConfig],
    config: &Config,
    home: &Path,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> Result<BootSources> {
    let mut boots = BootSources::new();
    for vm in vms {
        let shared = find_shared(vms, &boots, vm);
        let boot = match shared {
            Some(boot) => boot,
            None => prepare_one(vm, config, home, emitter, cancel)?,
        };
        boots.insert(vm.name.clone(), boot);
    }
    Ok(boots)
}

fn find_shared(vms: &[&VmConfig], boots: &BootSources, vm: &VmConfig) -> Option<BootSource> {
    let same = |other: &&&VmConfig| {
        other.base_image == vm.base_image
            && other.kernel == vm.kernel
            && (!vm.is_default_guest() || kind_for(other) == kind_for(vm))
    };
    vms.iter()
        .filter(same)
        .find_map(|other| boots.get(&other.name))
        .cloned()
}

/// The default guest that this VM needs.
fn kind_for(vm: &VmConfig) -> GuestKind {
    GuestKind::with_mounts(!vm.mounts.is_empty())
}

fn prepare_one(
    vm: &VmConfig,
    config: &Config,
    home: &Path,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> Result<BootSource> {
    if vm.is_default_guest() {
        let guest = ensure_default_guest(home, config.qemu.arch, kind_for(vm), emitter, cancel)?;
        return Ok(boot_of(guest));
    }
    let base = match &vm.base_image {
        Some(image) => Some(resolve_base_image(image, home, &config.state, emitter, cancel)?),
        None => None,
    };
    Ok(BootSource {
        kernel: vm.kernel.clone(),
        base,
        base_hash: None,
    })
}

fn boot_of(guest: DefaultGuest) -> BootSource {
    let kernel = DirectKernel {
        kernel: guest.kernel,
        initrd: Some(guest.initrd),
        cmdline: Some(guest.cmdline),
    };
    BootSource {
        kernel: Some(kernel),
        base: None,
        base_hash: Some(guest.base_hash),
    }
}

/// What a VM that runs already booted from, as far as its files are still on this host. Fetches
/// and builds nothing.
pub(super) fn expected(vm: &VmConfig, arch: &Arch, home: &Path, cancel: &Cancel) -> Result<BootSource> {
    if vm.is_default_guest() {
        let missing = || Failure::new(Exit::Failed, "the default guest is no longer in the image cache");
        // The other one if its mounts were added or removed in castra.toml since it was launched.
        let other = GuestKind::with_mounts(vm.mounts.is_empty());
        return find_default_guest(home, arch, kind_for(vm))
            .or_else(|| find_default_guest(home, arch, other))
            .map(boot_of)
            .ok_or_else(missing);
    }
    let base = match &vm.base_image {
        Some(image) => Some(base::inspect(&base::expected_path(image, home), cancel)?),
        None => None,
    };
    Ok(BootSource {
        kernel: vm.kernel.clone(),
        base,
        base_hash: None,
    })
}

/// `base_hash` of what a VM boots from (docs/IMAGES.md). Reads whole images the first time, so it is
/// called while the guest boots.
pub(super) fn base_hash(boot: &BootSource, config: &Config, cancel: &Cancel) -> Result<String> {
    if let Some(known) = &boot.base_hash {
        return Ok(known.clone());
    }
    let cache = DigestCache::new(config.state.images());
    let source = match (&boot.base, &boot.kernel) {
        (Some(base), _) => HashedSource::Image(&base.path),
        (None, Some(kernel)) => HashedSource::Kernel {
            kernel: &kernel.kernel,
            initrd: kernel.initrd.as_deref(),
            cmdline: kernel.cmdline.as_deref().unwrap_or_default(),
        },
        // A disk that starts empty.
        (None, None) => return Ok(digest::sha256_hex(b"")),
    };
    digest::base_hash(source, &cache, cancel)
}
