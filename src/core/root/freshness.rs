//! Whether a guest gave a recent proof of life.
//!
//! Here: the one rule by which a handshake record proves life. Not here: the record (`handshake_record`), what
//! follows from a proof of life (`core::status`, `broker::state`, `core::bootstrap`).

use std::path::Path;
use std::time::Duration;

use crate::core::host;
use crate::core::id::BootId;
use crate::core::name::VmName;
use crate::core::time::millis;

use super::handshake_record::{HandshakeRecord, RecordRead, read_record};

/// The launch to which a proof of life must belong.
#[derive(Clone, Copy, Debug)]
pub struct OfLaunch<'a> {
    /// The guest.
    pub vm: &'a VmName,
    /// When it began, CLOCK_BOOTTIME; `None`: each handshake of this host boot counts.
    pub since_ms: Option<u64>,
}

/// The current time.
#[derive(Clone, Copy, Debug)]
pub struct Now<'a> {
    /// The host boot.
    pub boot_id: &'a BootId,
    /// CLOCK_BOOTTIME, ms.
    pub boottime_ms: u64,
}

impl Now<'static> {
    /// By the host's clock.
    pub fn read() -> Now<'static> {
        Now {
            boot_id: host::boot_id(),
            boottime_ms: host::boottime_ms(),
        }
    }
}

/// Whether the record proves life now: it belongs to this launch, and its last proof of life is
/// within `window`.
pub fn is_fresh(record: &HandshakeRecord, launch: OfLaunch<'_>, window: Duration, now: Now<'_>) -> bool {
    is_of_launch(record, launch, now.boot_id) && is_recent(record, millis(window), now.boottime_ms)
}

/// Whether the record belongs to this guest: a record that was copied to another VM's name proves
/// nothing.
pub fn is_of_guest(record: &HandshakeRecord, vm: &VmName) -> bool {
    record.vm.as_str().eq_ignore_ascii_case(vm.as_str())
}

/// Whether the record belongs to this guest and this host boot, and its handshake isn't older than
/// the launch.
pub fn is_of_launch(record: &HandshakeRecord, launch: OfLaunch<'_>, boot_id: &BootId) -> bool {
    is_of_guest(record, launch.vm)
        && record.boot_id == *boot_id
        && launch
            .since_ms
            .is_none_or(|since| record.handshake_boottime_ms >= since)
}

/// Whether the guest's last proof of life is inside the window.
pub fn is_recent(record: &HandshakeRecord, window_ms: u64, now_ms: u64) -> bool {
    now_ms < stale_at(record, window_ms)
}

/// The first millisecond outside the window, if no further proof of life comes.
pub fn stale_at(record: &HandshakeRecord, window_ms: u64) -> u64 {
    record
        .heard_boottime_ms
        .saturating_add(window_ms)
        .saturating_add(1)
}

/// Whether the record at `path` proves life now.
pub fn has_been_heard(path: &Path, launch: OfLaunch<'_>, window: Duration) -> bool {
    match read_record(path) {
        RecordRead::Record(record) => is_fresh(&record, launch, window, Now::read()),
        RecordRead::Absent | RecordRead::Unreadable(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_recent_record_of_this_guest_and_launch_proves_life() {
        for (vm, boot_id, handshake_ms, heard_ms, since_ms, expected) in [
            ("web", "boot", 1_000, 1_000, Some(900), true),
            ("Web", "boot", 1_000, 1_000, Some(900), true),
            ("db", "boot", 1_000, 1_000, Some(900), false),
            ("web", "other", 1_000, 1_000, Some(900), false),
            ("web", "other", 1_000, 1_000, None, false),
            ("web", "boot", 900, 1_000, Some(900), true),
            ("web", "boot", 899, 46_000, Some(900), false),
            ("web", "boot", 899, 1_000, None, true),
            ("web", "boot", 999, 999, Some(900), false),
            ("web", "boot", 999, 999, None, false),
            ("web", "boot", 900, 46_001, Some(900), true),
            ("web", "boot", 900, u64::MAX, Some(900), true),
        ] {
            let record = HandshakeRecord {
                vm: vm.parse().unwrap(),
                boot_id: boot_id.into(),
                broker_run: "run".into(),
                handshake_boottime_ms: handshake_ms,
                heard_boottime_ms: heard_ms,
                heard_at: String::new(),
                capabilities: Vec::new(),
                bus_session: false,
                bus_subscribed: false,
                last_publish_boottime_ms: None,
                last_heartbeat_boottime_ms: None,
                last_acked_seq: None,
                guest_metrics: None,
            };
            let web = "web".parse().unwrap();
            let launch = OfLaunch { vm: &web, since_ms };
            let now = Now {
                boot_id: &"boot".into(),
                boottime_ms: 46_000,
            };
            let found = is_fresh(&record, launch, Duration::from_secs(45), now);
            assert_eq!(
                found, expected,
                "{vm} {boot_id} {handshake_ms} {heard_ms} {since_ms:?}"
            );
        }
    }
}
