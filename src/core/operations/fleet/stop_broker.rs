//! Stopping the broker of a project of which nothing runs any more.
//!
//! Here: whether anything runs, and what a broker that was killed leaves. Not here: how a broker is stopped
//! (`core::broker::launcher`).

use std::fs;
use std::time::Duration;

use crate::core::broker::launcher::{self, BrokerStop};
use crate::core::events::{Event, Severity};
use crate::core::failure::Failure;
use crate::core::host::{self, FileLock};
use crate::core::operations::select;
use crate::core::reporter::Emitter;
use crate::core::root::alive::qemu_pid;
use crate::core::root::paths::StateRoot;

/// How long the broker may take to stop in order.
const BROKER_DEADLINE: Duration = Duration::from_secs(5);

/// The broker stops last, and only when no VM of the project runs any more.
pub(crate) fn stop_broker_if_last(state: &StateRoot, emitter: &Emitter<'_>) -> (bool, Option<Failure>) {
    let running = select::launched_vms(state, &[], &[]).unwrap_or_default();
    if running.iter().any(|vm| qemu_pid(&state.vm(vm)).is_some()) {
        return (false, None);
    }
    let stopped = launcher::stop_broker(state, BROKER_DEADLINE);
    let failure = match stopped {
        Ok(BrokerStop::NotRunning) => {
            clear_broker_socket(state);
            return (false, None);
        }
        Ok(BrokerStop::Stopped { .. }) => return (true, None),
        Ok(BrokerStop::Killed { pid }) => {
            clear_broker_socket(state);
            let text = format!("the broker (pid {pid}) didn't stop when asked, so castra killed it");
            emitter.emit(Event::message(Severity::Warn, None, text));
            return (true, None);
        }
        Ok(BrokerStop::Embedded { pid }) => {
            let text = format!("the broker is a thread of process {pid}; only that process can stop it");
            emitter.emit(Event::message(Severity::Info, None, text));
            return (false, None);
        }
        Err(failure) => failure,
    };
    emitter.emit(Event::of_failure(Severity::Error, None, &failure));
    (false, Some(failure))
}

/// A broker that was killed leaves its socket. It goes under the broker's own lock, so that one
/// somebody starts just now keeps its own.
fn clear_broker_socket(state: &StateRoot) {
    let path = state.broker_sock();
    if fs::symlink_metadata(&path).is_err() {
        return;
    }
    if let Ok(_lock) = FileLock::try_take(&state.broker_pid(), "castra down") {
        let _ = host::remove_if_there(&path);
    }
}
