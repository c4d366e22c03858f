//! The tables of `castra.toml` that hold for the whole project.
//!
//! Here: `version`, `[project] [qemu] [broker] [bus] [lifecycle] [vizier] [workflows]`, with ranges
//! and defaults. Not here: `[[vms]]` with `[bootstrap]` and `[ssh]`, which VMs inherit (`vms`,
//! `bootstrap`).

use std::path::PathBuf;
use std::time::Duration;

use crate::core::arch;

use super::path_values::PathBases;
use super::reader::{Located, Section, shown};
use super::{
    AccelChoice, AuthMode, BrokerConfig, BusConfig, LifecycleConfig, PortChoice, QemuConfig, SyncMode,
};
use crate::core::lines::journal::Rotation;

/// Longest deadline that can be configured: a year. It keeps sums of deadlines far from overflow.
pub(super) const MAX_SECS: u64 = 31_536_000;

/// `version` and `[project]`.
#[derive(Debug, Default)]
pub(super) struct Project {
    pub(super) name: Option<String>,
    pub(super) state_dir: Option<PathBuf>,
}

/// `version`: a later one than this castra knows only gives a warning, because the file may use
/// nothing new.
pub(super) fn version(root: &mut Section<'_>) {
    let ours = env!("CARGO_PKG_VERSION");
    let Some(version) = root.text("version", ours) else {
        return;
    };
    let mut parts = version.value.trim().split('.').map(str::parse::<u64>);
    let (major, minor, patch) = (parts.next(), parts.next(), parts.next());
    let numbers = match (major, minor, patch, parts.next()) {
        (Some(Ok(major)), None, None, None) => Some((major, 0)),
        (Some(Ok(major)), Some(Ok(minor)), None | Some(Ok(_)), None) => Some((major, minor)),
        _ => None,
    };
    match numbers {
        None => root.wrong(
            version.at,
            format!("`version` can't be {}", shown(&version.value)),
            "version",
            &format!("\"{ours}\""),
        ),
        Some(numbers) if numbers > (0, 2) => root.source.warn(
            version.at,
            format!(
                "the file was written for castra {}, and this is {ours}",
                version.value.trim()
            ),
            "castra ignores keys that it doesn't know",
        ),
        Some(_) => {}
    }
}

pub(super) fn project(root: &mut Section<'_>, bases: &PathBases) -> Project {
    let mut section = root.section("project");
    let name = section.line("name", "demo").filter(|name| {
        let fits = name.value.chars().count() <= 100;
        if !fits {
            section.wrong(name.at, "`name` has more than 100 characters", "name", "\"demo\"");
        }
        fits
    });
    let state_dir = section.line("state_dir", ".castra/state").and_then(|dir| {
        let at = dir.at;
        let dir = bases.resolve(section.source, dir)?;
        // `castra clean` empties it, and names in it such as `logs` may be the project's own.
        if bases.dir.starts_with(&dir) {
            let text = "`state_dir` would hold the project itself";
            section.wrong(at, text, "state_dir", "\".castra/state\"");
            return None;
        }
        Some(dir)
    });
    // Upstream castra had one switch here and has retired it.
    if let Some(at) = section.ignore("features") {
        section
            .source
            .warn(at, "`features` is no longer used", "use `enabled` in [vizier]");
    }
    section.finish();
    Project {
        name: name.map(|name| name.value.trim().to_owned()),
        state_dir,
    }
}

pub(super) fn qemu(root: &mut Section<'_>, bases: &PathBases) -> QemuConfig {
    let mut section = root.section("qemu");
    let accel = section.choice(
        "accel",
        &[
            ("auto", AccelChoice::Auto),
            ("kvm", AccelChoice::Kvm),
            ("tcg", AccelChoice::Tcg),
        ],
    );
    let words: Vec<_> = arch::KNOWN.iter().map(|arch| (arch.name, arch)).collect();
    let arch = section.choice("arch", &words);
    // A bare name is looked up on PATH; only what has a slash is a path.
    let binary = section
        .line("binary", "/usr/bin/qemu-system-x86_64")
        .and_then(|binary| {
            if binary.value.contains('/') {
                bases.resolve(section.source, binary)
            } else {
                Some(PathBuf::from(binary.value))
            }
        });
    section.finish();
    QemuConfig {
        arch: arch.map(|arch| arch.value).unwrap_or_default(),
        accel: accel.map(|accel| accel.value).unwrap_or_default(),
        binary,
    }
}

pub(super) fn broker(root: &mut Section<'_>) -> (BrokerConfig, Option<Located<u16>>) {
    let mut section = root.section("broker");
    let mut config = BrokerConfig::default();
    let mut fixed = None;
    if let Some(port) = section.number("port", 0..=65535, 7070) {
        let number = u16::try_from(port.value).expect("the range was checked");
        config.port = match number {
            0 => PortChoice::Free,
            number => PortChoice::Exactly(number),
        };
        fixed = (number != 0).then_some(Located {
            value: number,
            at: port.at,
        });
    }
    // Three heartbeats must fit into the window, and their interval is at least a second.
    seconds(&mut section, "freshness_secs", 3, &mut config.freshness);
    let auth = section.choice(
        "auth",
        &[
            ("auto", AuthMode::Auto),
            ("token", AuthMode::Token),
            ("open", AuthMode::Open),
        ],
    );
    config.auth = auth.map(|auth| auth.value).unwrap_or_default();
    seconds(&mut section, "hello_timeout_secs", 1, &mut config.hello_timeout);
    count(
        &mut section,
        "max_connections",
        1..=1_000_000,
        &mut config.max_connections,
    );
    section.finish();
    (config, fixed)
}

pub(super) fn bus(root: &mut Section<'_>, freshness: Duration) -> BusConfig {
    let mut section = root.section("bus");
    let mut config = BusConfig {
        session_idle: freshness.max(Duration::from_secs(60)),
        ..BusConfig::default()
    };
    // A frame must hold the smallest useful message; beyond 16 MiB it is a file, not a message.
    count(
        &mut section,
        "max_frame_bytes",
        1024..=1 << 24,
        &mut config.max_frame_bytes,
    );
    seconds(&mut section, "session_idle_secs", 3, &mut config.session_idle);
    let queue = 1024..=1 << 40;
    let outbound_at = section.place("outbound_queue_bytes");
    count(
        &mut section,
        "outbound_queue_bytes",
        queue.clone(),
        &mut config.outbound_queue_bytes,
    );
    count(
        &mut section,
        "total_queue_bytes",
        queue,
        &mut config.total_queue_bytes,
    );
    // With a queue that can't hold one frame, every subscriber would be disconnected at its first
    // message.
    if let Some(at) = outbound_at.filter(|_| config.outbound_queue_bytes < config.max_frame_bytes) {
        section.wrong(
            at,
            format!(
                "`outbound_queue_bytes` is smaller than one frame (`max_frame_bytes = {}`)",
                config.max_frame_bytes
            ),
            "outbound_queue_bytes",
            &(config.max_frame_bytes.saturating_mul(64)).to_string(),
        );
    }
    count(
        &mut section,
        "sessions_per_vm",
        1..=10_000,
        &mut config.sessions_per_vm,
    );
    let subscriptions = &mut config.subscriptions_per_session;
    count(
        &mut section,
        "subscriptions_per_session",
        1..=10_000,
        subscriptions,
    );
    let rate = section.number("publishes_per_sec_per_vm", 0..=u64::from(u32::MAX), 0);
    config.publishes_per_sec_per_vm = rate.map_or(0, |rate| {
        u32::try_from(rate.value).expect("the range was checked")
    });
    let Rotation { max_bytes, keep } = Rotation::default();
    let log_max_bytes = section.number("log_max_bytes", 65536..=1 << 50, max_bytes);
    let log_keep = section.number("log_keep", 0..=1000, u64::from(keep));
    config.rotation = Rotation {
        max_bytes: log_max_bytes.map_or(max_bytes, |bytes| bytes.value),
        keep: log_keep.map_or(keep, |keep| {
            u32::try_from(keep.value).expect("the range was checked")
        }),
    };
    let sync = section.choice(
        "sync",
        &[
            ("interval", SyncMode::Interval),
            ("none", SyncMode::None),
            ("batch", SyncMode::Batch),
        ],
    );
    config.sync = sync.map(|sync| sync.value).unwrap_or_default();
    section.finish();
    config
}

pub(super) fn lifecycle(root: &mut Section<'_>) -> LifecycleConfig {
    let mut section = root.section("lifecycle");
    let mut config = LifecycleConfig::default();
    // 0 skips the step; only the last step must leave the kernel time to act.
    seconds(
        &mut section,
        "graceful_shutdown_wait_secs",
        0,
        &mut config.graceful_shutdown_wait,
    );
    seconds(&mut section, "sigterm_wait_secs", 0, &mut config.sigterm_wait);
    seconds(&mut section, "sigkill_wait_secs", 1, &mut config.sigkill_wait);
    section.finish();
    config
}

pub(super) fn vizier_enabled(root: &mut Section<'_>) -> bool {
    let mut section = root.section("vizier");
    let enabled = section.flag("enabled").is_none_or(|enabled| enabled.value);
    section.finish();
    enabled
}

/// `[workflows]` is a table of upstream castra; its keys are ignored.
pub(super) fn workflows(root: &mut Section<'_>) {
    let _ = root.section("workflows").place("init");
}

/// A deadline in whole seconds, left as it is where the key is missing.
pub(super) fn seconds(section: &mut Section<'_>, key: &'static str, least: u64, slot: &mut Duration) {
    if let Some(secs) = section.number(key, least..=MAX_SECS, slot.as_secs().max(least)) {
        *slot = Duration::from_secs(secs.value);
    }
}

fn count(
    section: &mut Section<'_>,
    key: &'static str,
    range: std::ops::RangeInclusive<u64>,
    slot: &mut usize,
) {
    if let Some(number) = section.number(key, range, *slot as u64) {
        *slot = usize::try_from(number.value).unwrap_or(usize::MAX);
    }
}
