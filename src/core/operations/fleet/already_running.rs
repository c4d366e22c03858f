//! VMs that an operation finds running: paused ones run on, and settings that they weren't launched
//! with are named.
//!
//! Here: both, for one VM. Not here: how a pause is read or ended (`core::runtime::pause`), which
//! settings are compared (`core::config::launched`), or bringing a VM up (`operations::fleet::bring_up`).

use std::time::Duration;

use crate::core::config::launched::{differing, keeps_disk, launch_settings, still_open};
use crate::core::config::{Config, VmConfig};
use crate::core::events::{Event, Severity};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::reporter::Emitter;
use crate::core::root::records::{self, RunRecord};
use crate::core::runtime::pause;

/// How long QMP may take; somebody else may hold its one session.
const QMP_LIMIT: Duration = Duration::from_secs(5);

/// Lets a VM run on that is paused, or says why it can't.
pub(super) fn unpause(
    config: &Config,
    vm: &VmConfig,
    record: &RunRecord,
    emitter: &Emitter<'_>,
) -> Result<()> {
    let paths = config.state.vm(&vm.name);
    let Some(found) = pause::read(&paths) else {
        return Ok(());
    };
    let disk = record.overlay.as_deref();
    let room = disk.and_then(|disk| host::space_left(disk.parent()?));
    let is_full = found.waits_for_space() && room.is_some_and(|room| room < pause::MIN_FREE_BYTES);
    if !found.can_resume() || is_full {
        return Err(found.failure(&vm.name, disk));
    }
    match pause::resume(&paths, QMP_LIMIT) {
        Ok(None) => {
            let text = format!("was paused ({}) and runs again", found.reason);
            emitter.emit(Event::message(Severity::Info, Some(&vm.name), text));
            Ok(())
        }
        Ok(Some(again)) => Err(again.failure(&vm.name, disk)),
        Err(error) => Err(Failure::new(
            Exit::Failed,
            format!(
                "vm `{}` is paused ({}), and castra can't resume it",
                vm.name, found.reason
            ),
        )
        .because(error)
        .advice(format!(
            "castra restart {} starts it again with its disk",
            vm.name
        ))),
    }
}

/// Settings in which a running VM differs from the config, by name.
pub(crate) fn stale_settings(config: &Config, vm: &VmConfig) -> Vec<String> {
    let record = record_of(config, vm);
    record.map_or_else(Vec::new, |record| {
        differing(&record.settings, &launch_settings(config, vm))
    })
}

/// Says in which settings a running VM differs from the config, and what applies them. What the config
/// closes and the VM has open comes first.
pub(super) fn warn_stale_settings(config: &Config, vm: &VmConfig, emitter: &Emitter<'_>) {
    let Some(record) = record_of(config, vm) else {
        return;
    };
    let declared = launch_settings(config, vm);
    let stale = differing(&record.settings, &declared);
    if stale.is_empty() {
        return;
    }
    let open = still_open(&record.settings, &declared);
    let names = stale.join(", ");
    let text = match open.is_empty() {
        true => format!("runs with other settings than castra.toml has now: {names}"),
        false => format!(
            "NOT AS CONFIGURED: {}. It runs with other settings than castra.toml has now: {names}",
            open.join("; ")
        ),
    };
    let name = &vm.name;
    let advice = match keeps_disk(&stale) {
        true => {
            format!("castra restart {name} applies them and keeps its disk, as castra up --recreate does")
        }
        false => format!("castra restart --discard {name} applies them, with a fresh disk"),
    };
    let mut event = Event::advice(Severity::Warn, Some(name), text, advice);
    if let Event::Message { data, .. } = &mut event {
        *data = Some(serde_json::json!({"stale_config": stale, "still_open": open}));
    }
    emitter.emit(event);
}

fn record_of(config: &Config, vm: &VmConfig) -> Option<RunRecord> {
    records::load(&config.state.vm(&vm.name).run()).ok().flatten()
}
