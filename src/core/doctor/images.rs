//! The image cache and the images that configs name.
//!
//! Here: whether the default guest is whole, what unfinished work lies about, whether a base image is
//! there. Not here: making or fetching any of it (`core::images`), or listing it for people
//! (`castra image list`).

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Finding, text_of};
use crate::core::arch::Arch;
use crate::core::cancel::Cancel;
use crate::core::config::{Config, ImageSource};
use crate::core::host::{self, Holder};
use crate::core::human::{bytes as size, plural};
use crate::core::images::cache::{CachedImage, CachedKind};
use crate::core::images::default_guest::{self, Condition, GuestKind};
use crate::core::images::{fetch, images_dir};
use crate::core::threads;

/// Which default guests the configs at hand boot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsedGuests(Vec<(&'static Arch, GuestKind)>);

impl UsedGuests {
    /// What these configs boot.
    pub fn of<'c>(configs: impl IntoIterator<Item = &'c Config>) -> UsedGuests {
        let mut wanted = UsedGuests::default();
        for config in configs {
            for vm in config.vms.iter().filter(|vm| vm.is_default_guest()) {
                let guest = (config.qemu.arch, GuestKind::with_mounts(!vm.mounts.is_empty()));
                if !wanted.0.contains(&guest) {
                    wanted.0.push(guest);
                }
            }
        }
        wanted
    }
}

/// Looks at the default guests. Both at once: comparing their digests is most of the doctor's work.
pub fn guests(home: &Path, wanted: &UsedGuests, cancel: &Cancel) -> Vec<Finding> {
    if home.exists() && !home.is_dir() {
        // Nothing can be there, which the look at the disk says.
        return Vec::new();
    }
    let mut looked_at = GuestKind::ALL.map(|kind| (Arch::host(), kind)).to_vec();
    looked_at.extend(wanted.0.iter().filter(|(arch, _)| arch.is_foreign()));
    let looks = threads::map_parallel(
        &looked_at,
        |_| "doctor guest".to_owned(),
        |&guest| (guest, default_guest::examine(home, guest.0, guest.1, cancel)),
    );
    let mut findings = Vec::new();
    let mut seen: Option<PathBuf> = None;
    for (guest, condition) in looks.into_iter().flatten() {
        if let Condition::Intact(whole) = &condition {
            // One guest may serve as both.
            if seen.as_deref() == Some(&whole.dir) {
                continue;
            }
            seen = Some(whole.dir.clone());
        }
        findings.extend(guest_finding(home, guest, &condition, wanted.0.contains(&guest)));
    }
    findings
}

fn guest_finding(
    home: &Path,
    (arch, kind): (&Arch, GuestKind),
    condition: &Condition,
    wanted: bool,
) -> Option<Finding> {
    const ID: &str = "image.default-guest";
    let (name, cost, build) = match kind {
        GuestKind::Plain => ("the default guest", "10 s and 50 MB", "castra image build"),
        GuestKind::Mounts => (
            "the default guest for VMs with mounts",
            "20 s and 80 MB",
            "castra image build --mounts",
        ),
    };
    let name = format!("{name}{}", arch.suffix(" for "));
    let build = format!("{build}{}", arch.suffix(" --arch "));
    let dir = match condition {
        Condition::Intact(guest) => guest.dir.clone(),
        _ => default_guest::default_guest_dir(home, arch, kind),
    };
    let data = |state: &str| {
        json!({
            "path": dir, "state": state, "wanted": wanted,
            "kind": match kind { GuestKind::Plain => "plain", GuestKind::Mounts => "mounts" },
        })
    };
    let finding = match condition {
        Condition::Intact(guest) => Finding::ok(
            ID,
            format!("{name} is built and whole, {}", guest.dir.display()),
        )
        .data(data("intact")),
        Condition::Damaged(why) => Finding::warn(
            ID,
            format!("{name} in {} is damaged: {why}", dir.display()),
            format!("`{build} --force` builds it again"),
        )
        .data(data("damaged")),
        // Nobody asked for it.
        Condition::Absent if !wanted && kind == GuestKind::Mounts => return None,
        Condition::Absent => Finding::ok(ID, format!("{name} isn't built yet"))
            .hint(format!(
                "the first `castra up` builds it from this system's packages ({cost} of downloads), `{build}` does so now"
            ))
            .data(data("absent")),
    };
    Some(finding)
}

/// Looks at what else lies in the cache.
pub fn cache(home: &Path, images: &[CachedImage]) -> Vec<Finding> {
    let dir = images_dir(home);
    let bytes: u64 = images.iter().map(|image| image.bytes).sum();
    let mut findings = Vec::new();
    let others: Vec<&CachedImage> = of_kind(images, CachedKind::OtherGuest);
    if !images.is_empty() {
        let mut all = Finding::ok(
            "image.cache",
            format!(
                "{} in the image cache, {}",
                plural(images.len(), "image"),
                size(bytes)
            ),
        );
        if !others.is_empty() {
            let of_others: u64 = others.iter().map(|image| image.bytes).sum();
            all = all.hint(format!(
                "{} of it are default guests of another castra version: if you no longer use that version, remove {}",
                size(of_others),
                others
                    .iter()
                    .map(|image| dir.join(&image.name).display().to_string())
                    .collect::<Vec<_>>()
                    .join(" ")
            ));
        }
        findings.push(all.data(json!({"path": dir, "images": images.len(), "bytes": bytes})));
    }
    for image in images {
        let (what, remedy) = match image.kind {
            CachedKind::PartialDownload => (
                "an interrupted download",
                "`castra up` of the VM that needs the image continues the download; if no VM needs it, remove the file",
            ),
            CachedKind::Building => (
                "leftovers of an interrupted build of a default guest",
                "`castra image build` removes it and builds the guest again",
            ),
            _ => continue,
        };
        let path = dir.join(&image.name);
        if in_work(&path) {
            continue;
        }
        let text = format!("{what}: {}, {}", path.display(), size(image.bytes));
        findings.push(
            Finding::warn("image.unfinished", text, remedy)
                .data(json!({"path": text_of(&path), "bytes": image.bytes})),
        );
    }
    findings
}

fn of_kind(images: &[CachedImage], kind: CachedKind) -> Vec<&CachedImage> {
    images.iter().filter(|image| image.kind == kind).collect()
}

/// Whether somebody holds the lock beside a download or a build.
fn in_work(path: &Path) -> bool {
    host::lock_holder(&path.with_extension("lock")) != Holder::Nobody
}

/// The base images and kernels a config names.
pub fn of_config(config: &Config, home: Option<&Path>) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    for vm in &config.vms {
        let mut paths: Vec<&Path> = Vec::new();
        match vm.base_image.as_ref().map(|image| (&image.source, &image.digest)) {
            Some((ImageSource::Path(path), _)) => paths.push(path),
            Some((ImageSource::Url(url), digest)) => {
                let cached = home.map(|home| fetch::cache_path(url, digest.as_ref(), home));
                let there = cached.as_deref().is_some_and(Path::exists);
                let text = match there {
                    true => format!("{} of vm `{}` is fetched", fetch::shown(url), vm.name),
                    false => format!("{} of vm `{}` isn't fetched yet", fetch::shown(url), vm.name),
                };
                let finding = Finding::ok("image.base", text);
                let finding = match there {
                    true => finding,
                    false => finding.hint("the next `castra up` fetches it"),
                };
                findings.push(finding.data(json!({
                    "workspace": config.workspace, "vm": vm.name.as_str(), "path": cached, "exists": there,
                })));
            }
            None => {}
        }
        if let Some(kernel) = &vm.kernel {
            paths.push(&kernel.kernel);
            paths.extend(kernel.initrd.as_deref());
        }
        for path in paths {
            if let Some(why) = unreadable(path) {
                findings.push(
                    Finding::error(
                        "image.base",
                        format!("vm `{}` can't boot {}: {why}", vm.name, path.display()),
                        "correct `base_image`, `kernel` or `initrd` in castra.toml, or put the file there",
                    )
                    .data(json!({
                        "workspace": config.workspace, "vm": vm.name.as_str(), "path": path,
                        "exists": path.exists(),
                    })),
                );
            }
        }
    }
    // Replicas share theirs: one finding does.
    let mut seen = std::collections::HashSet::new();
    findings.retain(|finding| seen.insert(finding.data["path"].to_string()));
    findings
}

/// Why a file can't be read; `None`: it can.
fn unreadable(path: &Path) -> Option<String> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => fs::File::open(path).err().map(|error| error.to_string()),
        Ok(meta) if meta.is_dir() => Some("it is a directory".to_owned()),
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::doctor::Level;
    use crate::core::host::FileLock;
    use crate::core::scratch::Scratch;

    #[test]
    fn a_guest_nobody_asked_for_is_not_missed() {
        let scratch = Scratch::new("doctor-guests");
        let found = guests(scratch.dir(), &UsedGuests::default(), &Cancel::new());
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(
            (found[0].level, &found[0].data["state"]),
            (Level::Ok, &json!("absent"))
        );
        let wanted = UsedGuests(GuestKind::ALL.map(|kind| (Arch::host(), kind)).to_vec());
        assert_eq!(guests(scratch.dir(), &wanted, &Cancel::new()).len(), 2);
        let dir = default_guest::default_guest_dir(scratch.dir(), Arch::host(), GuestKind::Plain);
        fs::create_dir_all(dir).unwrap();
        let damaged = guests(scratch.dir(), &wanted, &Cancel::new());
        assert_eq!(
            (damaged[0].level, &damaged[0].data["state"]),
            (Level::Warn, &json!("damaged"))
        );
    }

    #[test]
    fn unfinished_work_counts_only_where_nobody_works() {
        let scratch = Scratch::new("doctor-cache");
        let name = PathBuf::from("download/0123456789ab-x.img.part");
        let path = images_dir(scratch.dir()).join(&name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "half").unwrap();
        let image = CachedImage {
            name,
            kind: CachedKind::PartialDownload,
            arch: None,
            bytes: 4096,
        };
        let ids = |images: &[CachedImage]| -> Vec<String> {
            cache(scratch.dir(), images)
                .into_iter()
                .map(|finding| finding.id)
                .collect()
        };
        let images = [image];
        assert_eq!(ids(&images), ["image.cache", "image.unfinished"]);
        let _lock = FileLock::try_take(&path.with_extension("lock"), "fetches").unwrap();
        assert_eq!(ids(&images), ["image.cache"]);
        assert_eq!(ids(&[]), [""; 0]);
    }
}
