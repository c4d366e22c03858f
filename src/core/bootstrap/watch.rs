//! What a bootstrap watches during every wait: the VM, and requests to stop.
//!
//! Here: checking both, cheaply. Not here: how a VM ended (`root::ending`), or the deadlines of the steps.

use std::fmt;
use std::time::Duration;

use crate::core::cancel::Cancel;
use crate::core::id::LaunchId;
use crate::core::root::alive::may_live;
use crate::core::root::paths::VmPaths;
use crate::core::root::records::{self, StopRecord};

/// How often a wait without other work checks.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Why a bootstrap ends before its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// Ctrl-C, SIGTERM or an embedder's request.
    Interrupted,
    /// This command, such as `castra down`, has stopped the VM.
    Stopped(String),
    /// QEMU ended for another reason.
    VmEnded(String),
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StopReason::Interrupted => write!(f, "interrupted"),
            StopReason::Stopped(by) => write!(f, "stopped by {by}"),
            StopReason::VmEnded(why) => write!(f, "the VM ended: {why}"),
        }
    }
}

/// Checks whether to go on.
pub struct Watch<'a> {
    cancel: &'a Cancel,
    vm: &'a VmPaths,
    launch_id: &'a LaunchId,
    why_ended: &'a (dyn Fn() -> String + Sync),
}

impl<'a> Watch<'a> {
    /// A watch over this launch of a VM. `why_ended` tells why QEMU ended; called once it has.
    pub fn new(
        cancel: &'a Cancel,
        vm: &'a VmPaths,
        launch_id: &'a LaunchId,
        why_ended: &'a (dyn Fn() -> String + Sync),
    ) -> Watch<'a> {
        Watch {
            cancel,
            vm,
            launch_id,
            why_ended,
        }
    }

    /// Why to end, if there is a reason. Costs a few microseconds.
    pub fn look(&self) -> Option<StopReason> {
        if self.cancel.is_requested() {
            return Some(StopReason::Interrupted);
        }
        if may_live(self.vm) {
            return None;
        }
        let stop: Option<StopRecord> = records::load(&self.vm.stop()).ok().flatten();
        if let Some(stop) = stop.filter(|stop| stop.launch_id == *self.launch_id) {
            let command = stop.by.split(" (pid ").next().unwrap_or_default();
            return Some(StopReason::Stopped(command.to_owned()));
        }
        Some(StopReason::VmEnded((self.why_ended)()))
    }

    /// Pauses, or returns early at a request to stop; then checks.
    pub fn pause(&self, limit: Duration) -> Option<StopReason> {
        self.cancel.pause(limit);
        self.look()
    }

    /// As [`Cancel::wait_for`], but it ends with the VM, too.
    pub fn wait_for<T>(
        &self,
        limit: Duration,
        every: Duration,
        mut look: impl FnMut() -> Option<T>,
    ) -> Result<Option<T>, StopReason> {
        let look = || look().map(Ok).or_else(|| self.look().map(Err));
        self.cancel.wait_for(limit, every, look).transpose()
    }

    /// Why to end, as soon as there is a reason; `None` if there is none within `limit`.
    pub fn pause_for_end(&self, limit: Duration) -> Option<StopReason> {
        self.cancel.wait_for(limit, POLL_INTERVAL, || self.look())
    }

    /// Whether there was a second request to stop: then nothing is ended cleanly any more.
    pub fn is_forced(&self) -> bool {
        self.cancel.requests() > 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::host::FileLock;
    use crate::core::root::paths::StateRoot;
    use crate::core::scratch::{RecordLock, Scratch};

    #[test]
    fn the_evidence_decides() {
        let scratch = Scratch::new("watch");
        let vm = StateRoot::new(scratch.dir()).vm(&"web".parse().unwrap());
        std::fs::create_dir_all(vm.dir()).unwrap();
        let cancel = Cancel::new();
        let why = || "guest-panic".to_owned();
        let launch = LaunchId::from("launch-1");
        let watch = Watch::new(&cancel, &vm, &launch, &why);
        let lock = RecordLock::hold(&vm.qemu_pid());
        assert_eq!(watch.look(), None);
        assert_eq!(watch.pause_for_end(Duration::from_millis(1)), None);
        drop(lock);
        let lock = FileLock::try_take(&vm.qemu_pid(), "a backup").unwrap();
        let ended = Some(StopReason::VmEnded("guest-panic".into()));
        assert_eq!(watch.look(), ended, "that lock isn't QEMU's");
        drop(lock);
        assert_eq!(watch.look(), ended);
        let stop = |launch: &str| {
            let record = StopRecord {
                launch_id: launch.into(),
                by: "castra down (pid 9)".into(),
                at: "2026-11-21T10:00:00.000Z".into(),
            };
            records::save(&vm.stop(), &record).unwrap();
        };
        stop("launch-0");
        assert!(
            matches!(watch.look(), Some(StopReason::VmEnded(_))),
            "of an earlier launch"
        );
        stop("launch-1");
        assert_eq!(watch.look(), Some(StopReason::Stopped("castra down".into())));
        let end = watch.pause_for_end(Duration::from_secs(60));
        assert_eq!(end, Some(StopReason::Stopped("castra down".into())));
        cancel.request();
        assert_eq!(
            watch.pause(Duration::from_secs(60)),
            Some(StopReason::Interrupted)
        );
    }
}
