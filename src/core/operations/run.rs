//! The frame of every operation that changes something: it is accepted, ends and is summed up, and its events
//! are kept in the journal (docs/EVENTS.md).
//!
//! Here: that frame, and the slots that bound how much goes on at once. Not here: what any
//! operation does.

use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::core::cancel::Cancel;
use crate::core::config::Config;
use crate::core::events::{Event, Severity, VmCounts};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, FileLock, LockError};
use crate::core::lines::journal::{Journal, Rotation};
use crate::core::name::VmName;
use crate::core::operations::verdict::FleetVerdict;
use crate::core::reporter::{Emitter, Reporter, journal_failed};
use crate::core::root::paths::StateRoot;

/// One run of a changing operation.
pub(crate) struct Operation<'a> {
    command: &'static str,
    emitter: Emitter<'a>,
}

impl<'a> Operation<'a> {
    /// Begins: `command.accepted` goes to the reporter and, if the state root can take one, to
    /// the journal.
    pub(crate) fn accept(
        command: &'static str,
        detail: Option<String>,
        state: &StateRoot,
        rotation: Rotation,
        reporter: &'a mut dyn Reporter,
    ) -> Operation<'a> {
        Operation::begin(command, detail, Some((state, rotation)), reporter)
    }

    /// Begins an operation that belongs to no state root: nothing keeps its events.
    pub(crate) fn accept_unkept(
        command: &'static str,
        detail: Option<String>,
        reporter: &'a mut dyn Reporter,
    ) -> Operation<'a> {
        Operation::begin(command, detail, None, reporter)
    }

    fn begin(
        command: &'static str,
        detail: Option<String>,
        kept_in: Option<(&StateRoot, Rotation)>,
        reporter: &'a mut dyn Reporter,
    ) -> Operation<'a> {
        let emitter = Emitter::new(reporter);
        let mut trouble = None;
        if let Some((state, rotation)) = kept_in {
            match Journal::open(state.events(), rotation) {
                Ok(journal) => emitter.attach_journal(journal),
                Err(error) => trouble = Some(journal_failed(&state.events(), &error)),
            }
        }
        emitter.emit(Event::CommandAccepted {
            command: command.to_owned(),
            detail,
            source: emitter.source().to_owned(),
            thread: None,
            turn: None,
            duration_ms: None,
            exit_status: None,
        });
        if let Some(trouble) = trouble {
            emitter.emit(trouble);
        }
        Operation { command, emitter }
    }

    /// Where its events go.
    pub(crate) fn emitter(&self) -> &Emitter<'a> {
        &self.emitter
    }

    /// Ends: `command.completed` or `.failed`, then `summary`, with how the VMs fared.
    pub(crate) fn end(self, exit: Exit, detail: Option<String>, vms: VmCounts, bytes: u64) {
        self.end_with(exit, detail, vms, bytes, FleetVerdict::in_summary(&vms));
    }

    /// As [`Operation::end`], with a verdict on what somebody else did.
    pub(crate) fn end_with(
        self,
        exit: Exit,
        detail: Option<String>,
        vms: VmCounts,
        bytes: u64,
        verdict: Option<&str>,
    ) {
        let command = self.command.to_owned();
        let duration_ms = Some(self.emitter.elapsed_ms());
        let exit_status = Some(i32::from(exit.code()));
        let source = self.emitter.source().to_owned();
        let (thread, turn) = (None, None);
        self.emitter.emit(if exit == Exit::Done {
            Event::CommandCompleted {
                command,
                detail,
                duration_ms,
                exit_status,
                source,
                thread,
                turn,
            }
        } else {
            let detail = detail.unwrap_or_else(|| exit.meaning().to_owned());
            Event::CommandFailed {
                command,
                detail,
                duration_ms,
                exit_status,
                source,
                thread,
                turn,
            }
        });
        self.emitter.emit(Event::Summary {
            operation: self.command.to_owned(),
            duration_ms: self.emitter.elapsed_ms(),
            exit_status: i32::from(exit.code()),
            vms,
            bytes,
            verdict: verdict.map(str::to_owned),
        });
    }

    /// Ends with a failure of the operation as a whole, and hands it back. What nothing can go on
    /// without is a `blocker`, and a refusal one `command.rejected`; the frame's end follows as
    /// always.
    pub(crate) fn fail(self, failure: Failure, vms: VmCounts) -> Failure {
        self.fail_with(failure, vms, FleetVerdict::in_summary(&vms))
    }

    /// As [`Operation::fail`], with a verdict on what somebody else did.
    pub(crate) fn fail_with(self, failure: Failure, vms: VmCounts, verdict: Option<&str>) -> Failure {
        if failure.exit.blocks() {
            let next = failure.next.clone();
            let next = next.unwrap_or_else(|| format!("fix that, then run `castra {}` again", self.command));
            self.emitter
                .emit(Event::advice(Severity::Blocker, None, failure.cause(), next));
        }
        if failure.exit.is_refusal() {
            let source = self.emitter.source();
            self.emitter.emit(Event::rejected(self.command, &failure, source));
        }
        let sent = self.emitter.bytes_sent();
        let said = Some(failure.to_string());
        self.end_with(failure.exit, said, vms, sent, verdict);
        failure
    }
}

/// These VMs as the detail of an operation's end, if there are any.
pub(crate) fn failed_names<'v>(failed: impl Iterator<Item = &'v VmName>) -> Option<String> {
    let failed: Vec<&str> = failed.map(VmName::as_str).collect();
    (!failed.is_empty()).then(|| format!("failed: {}", failed.join(", ")))
}

/// An overlay is gone: as a fact of its VM, and as room given back.
pub(crate) fn emit_discarded(emitter: &Emitter<'_>, vm: &VmName, path: &Path, bytes: u64) {
    emitter.emit(Event::OverlayDiscarded {
        vm: vm.clone(),
        path: path.to_owned(),
        reclaimed_bytes: bytes,
    });
    emitter.emit(Event::Cleanup {
        path: path.to_owned(),
        category: "overlay".into(),
        bytes,
        dry_run: false,
    });
}

/// The failure of finding `what` locked; `holder` is what its holder wrote into the lock file.
pub(crate) fn busy(what: &str, holder: &str) -> Failure {
    let who = match holder.split_once(' ') {
        Some((pid, command)) => format!("{command} (pid {pid})"),
        None if holder.is_empty() => "another castra".to_owned(),
        None => format!("pid {holder}"),
    };
    Failure::new(Exit::Busy, format!("{what} is busy"))
        .because(format!("{who} is working on it"))
        .advice("try again when it has ended")
}

/// Takes the project's lock, making the state root if needed. Never waits.
pub(crate) fn lock_project(config_name: &str, state: &StateRoot, command: &str) -> Result<FileLock> {
    ensure_state_root(state)?;
    FileLock::try_take(&state.lock(), command).map_err(|error| match error {
        LockError::Held(holder) => busy(&format!("project `{config_name}`"), &holder),
        LockError::Io(error) => Failure::io("create", &state.lock(), &error),
    })
}

/// Removes what castras that were killed had begun to write, below the state root and in the
/// project's entry of the registry if that is elsewhere, and says so. The
/// caller holds the project's lock; whoever else may write there now is alive, and its files stay.
pub(crate) fn clear_abandoned(state: &StateRoot, registry: Option<&Path>, emitter: &Emitter<'_>) {
    let mut dirs = vec![
        state.dir().to_owned(),
        state.images(),
        state.bootstrap_logs(),
        state.dir().join("handshakes"),
    ];
    dirs.extend(registry.map(Path::to_owned));
    let vms = std::fs::read_dir(state.dir().join("vms"));
    dirs.extend(vms.into_iter().flatten().flatten().map(|entry| entry.path()));
    for path in dirs.iter().flat_map(|dir| host::abandoned_in(dir)) {
        let bytes = host::disk_usage(&path);
        let removed = match path.is_dir() {
            true => std::fs::remove_dir_all(&path),
            false => std::fs::remove_file(&path),
        };
        if removed.is_ok() {
            emitter.emit(Event::Cleanup {
                path,
                category: "temporary".into(),
                bytes,
                dry_run: false,
            });
        }
    }
}

/// Fails if somebody holds the project's lock now; takes nothing.
pub(crate) fn check_project_free(config: &Config) -> Result<()> {
    let path = config.state.lock();
    if host::ask_lock_holder(&path).map_err(|error| Failure::io("read", &path, &error))?
        == host::Holder::Nobody
    {
        return Ok(());
    }
    Err(busy(
        &format!("project `{}`", config.project),
        host::tail_of(&path, 512).trim(),
    ))
}

/// Makes the state root, mode 0700.
pub(crate) fn ensure_state_root(state: &StateRoot) -> Result<()> {
    host::ensure_private_dir(state.dir()).map_err(|error| {
        let failure = Failure::io("create", state.dir(), &error);
        match failure.next {
            Some(_) => failure,
            None => {
                failure.advice("move away what is in the way, or set another `state_dir` under [project]")
            }
        }
    })
}

/// The project's lock, given up as soon as the last of several has passed.
#[derive(Debug)]
pub(crate) struct CountedLock(Mutex<(Option<FileLock>, usize)>);

/// One who has yet to pass the gate; dropping it is passing.
#[derive(Debug)]
pub(crate) struct LockShare<'a>(&'a CountedLock);

impl CountedLock {
    pub(crate) fn new(lock: FileLock, count: usize) -> CountedLock {
        CountedLock(Mutex::new(((count > 0).then_some(lock), count)))
    }

    /// Whether all have passed.
    pub(crate) fn is_released(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1 == 0
    }

    /// For each of the `count`, once.
    pub(crate) fn share(&self) -> LockShare<'_> {
        LockShare(self)
    }
}

impl Drop for LockShare<'_> {
    fn drop(&mut self) {
        let mut gate = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        gate.1 = gate.1.saturating_sub(1);
        if gate.1 == 0 {
            gate.0 = None;
        }
    }
}

/// So many things may go on at once.
#[derive(Debug)]
pub(crate) struct Slots {
    free: Mutex<usize>,
    changed: Condvar,
}

/// One of the slots, taken until dropped.
#[derive(Debug)]
pub(crate) struct Slot<'a>(&'a Slots);

impl Slots {
    pub(crate) fn new(count: usize) -> Slots {
        Slots {
            free: Mutex::new(count.max(1)),
            changed: Condvar::new(),
        }
    }

    /// Waits for a slot; `None` when somebody asks to stop.
    pub(crate) fn take(&self, cancel: &Cancel) -> Option<Slot<'_>> {
        // A request to stop doesn't reach this condition, so the wait looks up now and then.
        const POLL_INTERVAL: Duration = Duration::from_millis(100);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            if cancel.is_requested() {
                return None;
            }
            free = self
                .changed
                .wait_timeout(free, POLL_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        if cancel.is_requested() {
            return None;
        }
        *free -= 1;
        Some(Slot(self))
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn no_more_than_the_slots_go_on_at_once() {
        let slots = Slots::new(2);
        let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let _slot = slots.take(&Cancel::new());
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    std::thread::yield_now();
                    now.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        assert!(most.load(Ordering::SeqCst) <= 2);
    }

    #[test]
    fn a_request_to_stop_ends_the_wait() {
        let (slots, cancel) = (Slots::new(1), Cancel::new());
        let _held = slots.take(&cancel);
        cancel.request();
        assert!(slots.take(&cancel).is_none());
    }

    #[test]
    fn who_is_at_work_is_named() {
        assert!(
            busy("project `x`", "12 castra up")
                .to_string()
                .contains("castra up (pid 12)")
        );
    }
}
