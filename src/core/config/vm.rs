//! The keys of one VM: in `[[vms]]`, and again in `[[vms.instances]]` for a single replica.
//!
//! Here: reading them and overriding one table with another. Not here: names, replicas and
//! conflicts between VMs (`vms`), `[vms.bootstrap]` (`bootstrap_tables`).

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::bootstrap_tables::{RawBootstrap, Scope};
use super::path_values::PathBases;
use super::reader::{Located, Section, quoted, shown};
use super::size::parse_size;
use super::source::Offset;
use super::{
    BaseImage, DirectKernel, ImageDigest, ImageSource, Mount, Network, PortForward, Protocol, SeedMode,
};

/// Least memory. No kernel boots with less; a smaller number was meant in another unit.
const MIN_MEMORY: u64 = 16 << 20;
/// Least disk, for the same reason.
const MIN_DISK: u64 = 1 << 20;
/// Most memory and disk: a larger number was meant in another unit.
const MAX_MEMORY: u64 = 64 << 40;
const MAX_DISK: u64 = 1 << 53;
/// Most CPUs of QEMU's default machine without an interrupt remapper.
const MAX_CPUS: u64 = 255;

/// A VM's table as written; missing keys are inherited.
#[derive(Clone, Debug, Default)]
pub(super) struct RawVm {
    pub(super) description: Option<String>,
    image: Option<Located<ImageSource>>,
    digest: Option<Located<ImageDigest>>,
    kernel: Option<PathBuf>,
    initrd: Option<Located<PathBuf>>,
    cmdline: Option<Located<String>>,
    pub(super) overlay: Option<Located<PathBuf>>,
    pub(super) disk_size: Option<u64>,
    pub(super) persist: Option<bool>,
    pub(super) cpus: Option<u32>,
    pub(super) memory: Option<u64>,
    pub(super) network: Option<Network>,
    pub(super) seed: Option<SeedMode>,
    pub(super) user_data: Option<String>,
    pub(super) qemu_args: Option<Vec<String>>,
    pub(super) port_forwards: Option<Vec<Located<PortForward>>>,
    pub(super) mounts: Option<Vec<Mount>>,
    pub(super) bootstrap: RawBootstrap,
    /// Where its keys stand.
    pub(super) bases: BTreeMap<String, Offset>,
}

/// The places of keys whose values can only be checked against the host or by QEMU.
const PLACED: [&str; 8] = [
    "base_image",
    "kernel",
    "initrd",
    "disk_size",
    "memory",
    "user_data",
    "mounts",
    "qemu_args",
];

impl RawVm {
    pub(super) fn read(section: &mut Section<'_>, bases: &PathBases) -> RawVm {
        let source = section.source;
        let file = |section: &mut Section<'_>, key, example: &str| {
            let path = section.line(key, example)?;
            let at = path.at;
            bases.resolve(source, path).map(|value| Located { value, at })
        };
        RawVm {
            description: section
                .text("description", "what it is for")
                .map(|text| text.value),
            kernel: file(section, "kernel", "images/vmlinuz").map(|path| path.value),
            initrd: file(section, "initrd", "images/initrd.img"),
            overlay: file(section, "overlay", ".castra/web.qcow2"),
            image: base_image(section, bases),
            digest: digest(section),
            cmdline: section.line("cmdline", "console=ttyS0"),
            disk_size: size(section, "disk_size", "20 GiB", MIN_DISK, MAX_DISK),
            persist: section.flag("persist").map(|flag| flag.value),
            cpus: section
                .number("cpus", 1..=MAX_CPUS, 2)
                .map(|cpus| u32::try_from(cpus.value).expect("the range was checked")),
            memory: size(section, "memory", "2 GiB", MIN_MEMORY, MAX_MEMORY),
            network: section
                .choice(
                    "network",
                    &[("user", Network::User), ("isolated", Network::Isolated)],
                )
                .map(|word| word.value),
            seed: section
                .choice("seed", &[("auto", SeedMode::Auto), ("none", SeedMode::None)])
                .map(|word| word.value),
            user_data: section.text("user_data", "#cloud-config").map(|text| text.value),
            qemu_args: qemu_args(section),
            port_forwards: port_forwards(section),
            mounts: mounts(section, bases),
            bootstrap: RawBootstrap::read(section.section("bootstrap"), bases, Scope::Vm),
            bases: placed(section),
        }
    }

    /// Overrides its entry's table with a replica's own one. Lists are replaced, not joined.
    pub(super) fn merged_with(self, over: &RawVm) -> RawVm {
        let over = over.clone();
        // The places of a list are replaced with the list.
        let replaced = |place: &String| {
            let key = place.split('.').next().unwrap_or_default();
            over.bases.contains_key(key)
        };
        let mut bases = self.bases;
        bases.retain(|place, _| !replaced(place));
        bases.extend(over.bases);
        RawVm {
            bases,
            // The digest belongs to the image that was replaced.
            digest: if over.image.is_some() {
                over.digest
            } else {
                over.digest.or(self.digest)
            },
            description: over.description.or(self.description),
            image: over.image.or(self.image),
            kernel: over.kernel.or(self.kernel),
            initrd: over.initrd.or(self.initrd),
            cmdline: over.cmdline.or(self.cmdline),
            overlay: over.overlay.or(self.overlay),
            disk_size: over.disk_size.or(self.disk_size),
            persist: over.persist.or(self.persist),
            cpus: over.cpus.or(self.cpus),
            memory: over.memory.or(self.memory),
            network: over.network.or(self.network),
            seed: over.seed.or(self.seed),
            user_data: over.user_data.or(self.user_data),
            qemu_args: over.qemu_args.or(self.qemu_args),
            port_forwards: over.port_forwards.or(self.port_forwards),
            mounts: over.mounts.or(self.mounts),
            bootstrap: self.bootstrap.overlaid(&over.bootstrap),
        }
    }

    /// What its disk is based on; a URL without a pinned digest gives a warning.
    pub(super) fn base_image(&self, section: &super::source::Source) -> Option<BaseImage> {
        let Some(image) = &self.image else {
            if let Some(digest) = &self.digest {
                section.error(
                    digest.at,
                    "a digest is given, but no `base_image`",
                    "write `base_image = \"…\"` beside it",
                );
            }
            return None;
        };
        if let (ImageSource::Url(_), None) = (&image.value, &self.digest) {
            section.warn(
                image.at,
                "nothing verifies this download",
                "write the digest its publisher gives beside it: `base_image_sha256 = \"…\"`",
            );
        }
        Some(BaseImage {
            source: image.value.clone(),
            digest: self.digest.as_ref().map(|digest| digest.value.clone()),
        })
    }

    pub(super) fn direct_kernel(&self, source: &super::source::Source) -> Option<DirectKernel> {
        let Some(kernel) = self.kernel.clone() else {
            let bases = [
                self.initrd.as_ref().map(|initrd| ("initrd", initrd.at)),
                self.cmdline.as_ref().map(|cmdline| ("cmdline", cmdline.at)),
            ];
            for (key, at) in bases.into_iter().flatten() {
                source.error(
                    at,
                    format!("`{key}` without `kernel`"),
                    "write `kernel = \"…\"` beside it, or leave it out: an image brings its own",
                );
            }
            return None;
        };
        Some(DirectKernel {
            kernel,
            initrd: self.initrd.as_ref().map(|initrd| initrd.value.clone()),
            cmdline: self.cmdline.as_ref().map(|cmdline| cmdline.value.clone()),
        })
    }
}

fn placed(section: &Section<'_>) -> BTreeMap<String, Offset> {
    let mut bases = BTreeMap::new();
    for key in PLACED {
        bases.extend(section.place(key).map(|at| (key.to_owned(), at)));
        let entries = section.entry_places(key).into_iter().enumerate();
        bases.extend(entries.map(|(index, at)| (format!("{key}.{index}"), at)));
    }
    bases
}

fn base_image(section: &mut Section<'_>, bases: &PathBases) -> Option<Located<ImageSource>> {
    const EXAMPLE: &str = "images/debian.qcow2";
    if let Some(at) = section.ignore("managed_image") {
        section.source.warn(
            at,
            "`managed_image` is no longer used",
            "name an image with `base_image`, or none for the default guest",
        );
    }
    let image = section.line("base_image", EXAMPLE)?;
    let text = image.value.trim();
    let Some((scheme, rest)) = text.split_once("://") else {
        let at = image.at;
        let path = bases.resolve(section.source, image)?;
        return Some(Located {
            value: ImageSource::Path(path),
            at,
        });
    };
    let reason = if scheme.eq_ignore_ascii_case("http") {
        "anybody on the way can replace what http fetches"
    } else if !scheme.eq_ignore_ascii_case("https") {
        "only https is fetched"
    } else if rest.is_empty()
        || rest.starts_with('/')
        || text.contains(|c: char| c.is_whitespace() || c == '"')
    {
        "it isn't a valid URL"
    } else if rest.split('/').next().is_some_and(|host| host.contains('@')) {
        "an address with a password in it would be shown in logs"
    } else {
        return Some(Located {
            value: ImageSource::Url(format!("https://{rest}")),
            at: image.at,
        });
    };
    let instead = match scheme.to_ascii_lowercase().as_str() {
        "http" => quoted(&format!("https://{rest}")),
        "file" => quoted(rest),
        _ => quoted("https://example.org/debian.qcow2"),
    };
    let what = format!("`base_image` can't be {}: {reason}", shown(text));
    section.wrong(image.at, what, "base_image", &instead);
    None
}

fn digest(section: &mut Section<'_>) -> Option<Located<ImageDigest>> {
    let sha256 = hex(section, "base_image_sha256", 64).map(|digest| digest.map(ImageDigest::Sha256));
    let sha512 = hex(section, "base_image_sha512", 128).map(|digest| digest.map(ImageDigest::Sha512));
    if let (Some(_), Some(second)) = (&sha256, &sha512) {
        section.source.error(
            second.at,
            "both `base_image_sha256` and `base_image_sha512`",
            "leave one of them out",
        );
    }
    sha512.or(sha256)
}

fn hex(section: &mut Section<'_>, key: &'static str, digits: usize) -> Option<Located<String>> {
    let text = section.text(key, "…")?;
    let digest = text.value.trim().to_ascii_lowercase();
    let reason = match digest.chars().find(|c| !c.is_ascii_hexdigit()) {
        Some(other) => format!("{} is no hexadecimal digit", shown(&other.to_string())),
        None if digest.len() == digits => {
            return Some(Located {
                value: digest,
                at: text.at,
            });
        }
        None => format!("it has {} digits", digest.len()),
    };
    let tool = key.trim_start_matches("base_image_");
    section.source.error(
        text.at,
        format!("`{key}`: {reason}"),
        format!("write the {digits} digits that `{tool}sum` prints"),
    );
    None
}

fn size(section: &mut Section<'_>, key: &'static str, example: &str, least: u64, most: u64) -> Option<u64> {
    // A number without a unit could be bytes or MiB, so it is refused.
    if let Some((at, number)) = section.bare_number(key) {
        section.ignore(key);
        let what = format!("`{key} = {number}` has no unit");
        section.wrong(at, what, key, &quoted(&format!("{number} MiB")));
        return None;
    }
    let text = section.text(key, example)?;
    let Some(size) = parse_size(&text.value) else {
        let what = format!("`{key} = {}` is no size", shown(&text.value));
        section.wrong(text.at, what, key, &quoted(example));
        return None;
    };
    if !(least..=most).contains(&size.bytes) {
        let which = if size.bytes < least { "small" } else { "large" };
        let what = format!("`{key} = {}` is too {which}", shown(&text.value));
        section.wrong(text.at, what, key, &quoted(example));
        return None;
    }
    if size.unitless {
        section.source.warn(
            text.at,
            format!(
                "`{key} = {}` has no unit and was taken as MiB",
                shown(&text.value)
            ),
            format!("write `{key} = \"{} MiB\"`", text.value.trim()),
        );
    }
    Some(size.bytes)
}

fn qemu_args(section: &mut Section<'_>) -> Option<Vec<String>> {
    let args = section.texts("qemu_args", "-snapshot")?;
    for arg in args
        .value
        .iter()
        .filter(|arg| arg.value.is_empty() || arg.value.contains('\0'))
    {
        section
            .source
            .error(arg.at, "an argument is empty or holds a NUL", "leave it out");
    }
    Some(args.value.into_iter().map(|arg| arg.value).collect())
}

fn port_forwards(section: &mut Section<'_>) -> Option<Vec<Located<PortForward>>> {
    let entries = section.sections("port_forwards")?;
    let mut forwards = Vec::new();
    for mut entry in entries.value {
        let port = |port: Located<u64>| u16::try_from(port.value).expect("the range was checked");
        let host_at = entry.place("host").unwrap_or(entry.at);
        // A missing host port is 0, which means a free one. An invalid one is an error, not 0.
        let host = match (entry.number("host", 0..=65535, 0), entry.place("host")) {
            (Some(host), _) => Some(port(host)),
            (None, None) => Some(0),
            (None, Some(_)) => None,
        };
        let guest = entry.number("guest", 1..=65535, 22).map(port);
        let protocol = entry.choice("protocol", &[("tcp", Protocol::Tcp), ("udp", Protocol::Udp)]);
        if guest.is_none() && entry.place("guest").is_none() {
            entry.missing(
                "guest",
                "a port forward has no `guest`",
                "write `guest = 22`, the port in the guest",
            );
        }
        entry.finish();
        if let (Some(host), Some(guest)) = (host, guest) {
            forwards.push(Located {
                value: PortForward {
                    host,
                    guest,
                    protocol: protocol.map(|protocol| protocol.value).unwrap_or_default(),
                },
                at: host_at,
            });
        }
    }
    Some(forwards)
}

fn mounts(section: &mut Section<'_>, bases: &PathBases) -> Option<Vec<Mount>> {
    let entries = section.sections("mounts")?;
    let mut mounts: Vec<Mount> = Vec::new();
    for mut entry in entries.value {
        let source = entry.source;
        let host = entry
            .line("host", ".")
            .and_then(|host| bases.resolve(source, host));
        let guest = entry
            .line("guest", "/work")
            .and_then(|guest| guest_path(&entry, guest));
        // Guests aren't trusted, so write access has to be asked for.
        let readonly = entry.flag("readonly").is_none_or(|readonly| readonly.value);
        for (key, example) in [("host", "host = \".\""), ("guest", "guest = \"/work\"")] {
            if entry.place(key).is_none() {
                entry.missing(
                    key,
                    &format!("a mount has no `{key}`"),
                    &format!("write `{example}`"),
                );
            }
        }
        entry.finish();
        let (Some(host), Some(guest)) = (host, guest) else {
            continue;
        };
        if mounts.iter().any(|mount| mount.guest == guest.value) {
            source.error(
                guest.at,
                format!("two mounts have the same `guest` {}", shown(&guest.value)),
                "write another `guest` for one of them",
            );
            continue;
        }
        mounts.push(Mount {
            host,
            guest: guest.value,
            readonly,
        });
    }
    Some(mounts)
}

fn guest_path(entry: &Section<'_>, path: Located<String>) -> Option<Located<String>> {
    let parts: Vec<&str> = path
        .value
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect();
    let reason = if !path.value.starts_with('/') {
        "is not absolute"
    } else if parts.contains(&"..") {
        "leads through `..`"
    } else if parts.is_empty() {
        "is the guest's root"
    } else {
        let value = format!("/{}", parts.join("/"));
        return Some(Located { value, at: path.at });
    };
    let text = format!("`guest = {}` {reason}", shown(&path.value));
    entry.wrong(path.at, text, "guest", "\"/work\"");
    None
}
