//! What `up`, `restart`, `bootstrap` and `down` share: VMs that are checked, launched, watched and stopped together.
//!
//! Here: the examination before anything is made ([`examine`]), the VMs' way up ([`FleetRun`]) and what it leaves
//! ([`UpOutcome`]), and one VM's way down ([`VmStopper`]). Not here: the verbs themselves.

mod accelerator;
mod already_running;
mod boot_source;
mod bring_up;
mod broker_events;
mod fleet_outcome;
mod fleet_run;
mod identity;
mod launch_vm;
mod memory_check;
mod preflight;
mod stop_broker;
mod stop_first;
mod stop_vm;
mod vm_check;

pub(crate) use already_running::stale_settings;
pub(crate) use bring_up::{RestartPolicy, StartFrom, VmTask, lock_vms, runs};
pub(crate) use broker_events::BrokerEvents;
pub(crate) use fleet_outcome::finish;
pub use fleet_outcome::{UpOutcome, VmUp};
pub(crate) use fleet_run::{FleetRun, ensure_broker, lock_on_record};
pub(crate) use identity::{issue as issue_identities, open_to_all, warn_user_networking};
pub(crate) use memory_check::{core_shortage, memory_shortage};
pub(crate) use preflight::{PreflightRequest, emit_warnings, examine, examine_bootstrap, examine_broker};
pub(crate) use stop_broker::stop_broker_if_last;
pub(crate) use stop_vm::VmStopper;
