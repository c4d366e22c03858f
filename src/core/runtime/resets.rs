//! How often a guest has rebooted under the same QEMU, and when that is too often.
//!
//! Here: reading it from `qmp.log`, telling a panic from a reboot by the console, ending a guest in
//! a boot loop. Not here: who watches and reports (`broker::reboot_watch`, `core::status`), how a
//! VM ended (`root::ending`).
//!
//! QEMU logs the QMP event RESET, also without a client. A kernel that panics tells QEMU by the
//! pvpanic device, and QEMU ends at once (`guest-panic`). A kernel without a driver for it resets
//! the machine as for a reboot (`panic=-1`): then the end of the console tells them apart.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use serde_json::Value;

use crate::core::host;
use crate::core::reporter::wall_clock;
use crate::core::root::ending::{EndReason, PANIC, qmp_time};
use crate::core::root::paths::{VmPaths, vm_file};
use crate::core::time::{millis, of_unix_ms};

use super::qmp::{Qmp, QmpError};

/// How many bytes of the end of `qmp.log` are read: they hold some 8000 resets.
const QMP_TAIL: u64 = 1 << 20;
/// How many bytes of the console are searched for a panic: its trace takes some 4 KiB, and the next
/// boot's lines follow.
const CONSOLE_TAIL: u64 = 64 * 1024;
/// One reboot is up to three RESET events, as the kernel tries one way after another.
const SAME_RESET_MS: u64 = 250;
/// A guest that is reset this often …
const LOOP_RESETS: usize = 5;
/// … within this time is in a boot loop. The first boots of an installer or a distribution take two
/// or three.
const LOOP_WITHIN: Duration = Duration::from_secs(120);

/// The resets since a launch, oldest first: wall clock, ms since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resets(Vec<u64>);

impl Resets {
    /// Resets at these moments.
    #[cfg(test)]
    pub fn at(wall_ms: &[u64]) -> Resets {
        Resets(wall_ms.to_vec())
    }

    /// How often the guest has booted, the first boot included.
    pub fn boots(&self) -> u64 {
        self.0.len() as u64 + 1
    }

    /// When it was reset last, RFC 3339.
    pub fn last_at(&self) -> Option<String> {
        let last = self.0.last()?;
        Some(wall_clock(of_unix_ms(*last)))
    }

    /// The same on CLOCK_BOOTTIME, ms: older handshakes were those of an earlier boot.
    pub fn last_boottime_ms(&self, boottime_ms: u64, wall_ms: u64) -> Option<u64> {
        let last = self.0.last()?;
        Some(boottime_ms.saturating_sub(wall_ms.saturating_sub(*last)))
    }

    /// These resets and those that a later read of the log's end has found. Older ones are no
    /// longer in that end as QEMU writes on. The order can't be told by the times, since a wall
    /// clock may be set back.
    fn merge(&self, later: &Resets) -> Resets {
        let known = self.0.last();
        let fresh = later
            .0
            .iter()
            .rposition(|at| Some(at) == known)
            .map_or(0, |at| at + 1);
        Resets([&self.0[..], &later.0[fresh..]].concat())
    }

    /// Whether its last resets came so fast that the guest does nothing else.
    pub fn is_loop(&self) -> bool {
        let (Some(last), Some(first)) = (self.0.last(), self.0.iter().rev().nth(LOOP_RESETS - 1)) else {
            return false;
        };
        last.saturating_sub(*first) <= millis(LOOP_WITHIN)
    }
}

/// The resets since a VM's launch.
pub fn read(paths: &VmPaths) -> Resets {
    parse(&host::tail_of(&paths.file(vm_file::QMP_LOG), QMP_TAIL))
}

/// What the end of `qmp.log` says.
fn parse(qmp: &str) -> Resets {
    let mut resets: Vec<u64> = Vec::new();
    let mut before = None;
    for line in qmp.lines().filter(|line| line.contains("\"RESET\"")) {
        let Ok(message) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        if message["event"] != "RESET" {
            continue;
        }
        let Some(at) = qmp_time(&message) else {
            continue;
        };
        if before.is_none_or(|before: u64| at.abs_diff(before) > SAME_RESET_MS) {
            resets.push(at);
        }
        before = Some(at);
    }
    Resets(resets)
}

/// Reads `qmp.log` only when it has changed, so it may be called often.
#[derive(Debug)]
pub struct ResetWatch {
    paths: VmPaths,
    seen: Option<(u64, u64)>,
    resets: Resets,
    /// The length of the console at the last reset.
    console: u64,
}

/// What is new.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewResets {
    /// All resets since the launch.
    pub resets: Resets,
    /// The guest is to be ended.
    pub end_reason: Option<EndReason>,
}

impl ResetWatch {
    /// A watch over a VM since its launch.
    pub fn new(paths: &VmPaths) -> ResetWatch {
        ResetWatch {
            paths: paths.clone(),
            seen: None,
            resets: Resets::default(),
            console: 0,
        }
    }

    /// A watch over a VM from now on: earlier resets aren't new.
    pub fn from_now(paths: &VmPaths) -> ResetWatch {
        let mut watch = ResetWatch::new(paths);
        watch.seen = watch.length_of(vm_file::QMP_LOG);
        watch.resets = read(paths);
        watch
    }

    /// The resets known so far.
    pub fn resets(&self) -> &Resets {
        &self.resets
    }

    /// The resets since the last call.
    pub fn look(&mut self) -> Option<NewResets> {
        let now = self.length_of(vm_file::QMP_LOG);
        if now == self.seen {
            return None;
        }
        self.seen = now;
        let resets = self.resets.merge(&read(&self.paths));
        if resets == self.resets {
            return None;
        }
        self.resets = resets.clone();
        let until = self
            .length_of(vm_file::SERIAL_LOG)
            .map_or(0, |(_, length)| length);
        let fresh = until.saturating_sub(self.console).min(CONSOLE_TAIL);
        self.console = until;
        let panicked =
            fresh > 0 && host::tail_of(&self.paths.file(vm_file::SERIAL_LOG), fresh).contains(PANIC);
        let end_reason = if panicked {
            Some(EndReason::Panic)
        } else {
            resets.is_loop().then_some(EndReason::BootLoop)
        };
        Some(NewResets { resets, end_reason })
    }

    fn length_of(&self, name: &str) -> Option<(u64, u64)> {
        let meta = fs::metadata(self.paths.file(name)).ok()?;
        Some((meta.ino(), meta.len()))
    }
}

/// Ends a QEMU, with the reason in its `qmp.log`.
pub fn end(paths: &VmPaths, end_reason: EndReason, limit: Duration) -> Result<(), QmpError> {
    Qmp::connect(paths.dir(), limit)?.quit_as(end_reason.quit_id(), limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;

    fn reset(ms: u64) -> String {
        format!(
            "{{\"timestamp\": {{\"seconds\": {}, \"microseconds\": {}}}, \"event\": \"RESET\", \
             \"data\": {{\"guest\": true, \"reason\": \"guest-reset\"}}}}\r\n",
            ms / 1000,
            ms % 1000 * 1000
        )
    }

    fn log(times: &[u64]) -> String {
        times.iter().map(|ms| reset(*ms)).collect()
    }

    #[test]
    fn one_reboot_is_one_however_many_resets_it_takes() {
        let other = "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 0}, \"event\": \"RTC_CHANGE\"}\r\n";
        for (text, boots) in [
            (String::new(), 1),
            (other.repeat(3), 1),
            (log(&[5_000]), 2),
            (log(&[5_000, 5_103]), 2),
            (log(&[5_000, 5_103, 5_300]), 2),
            (log(&[5_000, 5_103, 9_000, 9_001]), 3),
            ("{\"event\": \"RESET\"}\n\"RESET\"\nRESET\n".to_owned(), 1),
        ] {
            assert_eq!(parse(&text).boots(), boots, "{text}");
        }
    }

    #[test]
    fn a_reset_has_its_place_on_both_clocks() {
        let resets = parse(&log(&[5_000, 1_795_964_358_393]));
        assert_eq!(resets.last_at().as_deref(), Some("2026-11-29T14:59:18.393Z"));
        assert_eq!(resets.last_boottime_ms(100_000, 1_795_964_360_393), Some(98_000));
        // A wall clock that was set back.
        assert_eq!(resets.last_boottime_ms(100_000, 7), Some(100_000));
        assert_eq!(Resets::default().last_boottime_ms(1, 1), None);
        assert_eq!(Resets::default().last_at(), None);
    }

    #[test]
    fn five_in_two_minutes_are_a_loop() {
        for (times, is_loop) in [
            (vec![0, 1_000, 2_000, 3_000], false),
            (vec![0, 1_000, 2_000, 3_000, 4_000], true),
            (vec![0, 30_000, 60_000, 90_000, 120_000], true),
            (vec![0, 30_000, 60_000, 90_000, 120_001], false),
            (vec![0, 500_000, 501_000, 502_000, 503_000, 504_000], true),
        ] {
            assert_eq!(parse(&log(&times)).is_loop(), is_loop, "{times:?}");
        }
    }

    #[test]
    fn a_panic_counts_for_the_boot_that_it_ended() {
        let scratch = Scratch::new("resets");
        let paths = VmPaths::at(scratch.path("web"));
        fs::create_dir_all(paths.dir()).unwrap();
        let put = |name: &str, text: &str| fs::write(paths.file(name), text).unwrap();
        put(vm_file::QMP_LOG, &log(&[1_000]));
        let mut watch = ResetWatch::from_now(&paths);
        assert_eq!((watch.look(), watch.resets().boots()), (None, 2));
        // What isn't a reset changes nothing.
        put(
            vm_file::QMP_LOG,
            &format!("{}{{\"return\": {{}}}}\n", log(&[1_000])),
        );
        assert_eq!(watch.look(), None);
        let mut console = "Restarting system\n".to_owned();
        put(vm_file::SERIAL_LOG, &console);
        put(vm_file::QMP_LOG, &log(&[1_000, 10_000]));
        assert_eq!(ResetWatch::new(&paths).look().unwrap().resets.boots(), 3);
        let new_resets = watch.look().unwrap();
        assert_eq!((new_resets.resets.boots(), new_resets.end_reason), (3, None));
        console += &format!("[ 1.0] {PANIC}: VFS\nbooting again\n");
        put(vm_file::SERIAL_LOG, &console);
        put(vm_file::QMP_LOG, &log(&[1_000, 10_000, 200_000]));
        assert_eq!(watch.look().unwrap().end_reason, Some(EndReason::Panic));
        // An earlier panic doesn't make the next reset a panic.
        console += "Restarting system\n";
        put(vm_file::SERIAL_LOG, &console);
        put(vm_file::QMP_LOG, &log(&[1_000, 10_000, 200_000, 400_000]));
        assert_eq!(watch.look().unwrap().end_reason, None);
    }

    #[test]
    fn a_log_that_goes_on_hides_no_reset_and_invents_none() {
        let scratch = Scratch::new("resets-long");
        let paths = VmPaths::at(scratch.path("web"));
        fs::create_dir_all(paths.dir()).unwrap();
        let put = |text: &str| fs::write(paths.file(vm_file::QMP_LOG), text).unwrap();
        let mut text = log(&[1_000, 9_000]);
        put(&text);
        let mut watch = ResetWatch::from_now(&paths);
        let other = "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 0}, \"event\": \"RTC_CHANGE\"}\r\n";
        text += &other.repeat(usize::try_from(QMP_TAIL).unwrap() / other.len());
        put(&text);
        assert_eq!(watch.look(), None, "nothing was reset");
        assert_eq!(watch.resets().last_at(), parse(&log(&[9_000])).last_at());
        text += &log(&[5_000]);
        put(&text);
        assert_eq!(watch.look().unwrap().resets.boots(), 4);
        text += &log(&[20_000]);
        put(&text);
        assert_eq!(watch.look().unwrap().resets.boots(), 5);
    }

    #[test]
    fn the_answer_to_the_quit_bears_the_verdict() {
        let of = |text: &str| EndReason::of_answer(&serde_json::from_str(text).unwrap());
        for end_reason in [EndReason::Panic, EndReason::BootLoop] {
            let id = end_reason.quit_id();
            assert_eq!(
                of(&format!("{{\"return\": {{}}, \"id\": \"{id}\"}}")),
                Some(end_reason)
            );
            assert_eq!(of(&format!("{{\"error\": {{}}, \"id\": \"{id}\"}}")), None);
        }
        assert_eq!(of("{\"return\": {}, \"id\": \"castra-3\"}"), None);
        assert_eq!(of("{\"return\": {}}"), None);
    }
}
