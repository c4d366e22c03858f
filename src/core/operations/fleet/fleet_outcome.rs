//! What `up`, `restart` and `bootstrap` leave behind.
//!
//! Here: the outcome of the fleet and of each VM in it, and how an operation ends by it. Not here: how it comes
//! about (`operations::fleet::fleet_run`).

use serde::Serialize;

use crate::core::cancel::Cancel;
use crate::core::events::endings::{BootstrapStatus, ShutdownEnding};
use crate::core::events::{BootstrapPlan, VmCounts};
use crate::core::failure::{Exit, Failure};
use crate::core::name::VmName;
use crate::core::operations::run::{Operation, failed_names};
use crate::core::operations::verdict::FleetVerdict;
use crate::core::ports::PortConflict;
use crate::core::root::records::{BootstrapRecord, ForwardRecord};
use crate::core::runtime::attached::AttachedQemu;

/// What `up` left behind.
#[derive(Clone, Debug, Serialize)]
pub struct UpOutcome {
    /// The VMs asked for, in config order.
    pub vms: Vec<VmUp>,
    /// The plans, each with its machine, when only a plan was asked for.
    pub plans: Vec<BootstrapPlan>,
    /// Why nothing would be started, but for ports and memory, when only a plan was asked for.
    pub refusals: Vec<Failure>,
    /// Ports that would keep VMs from starting, when only a plan was asked for.
    pub port_conflicts: Vec<PortConflict>,
    /// The broker's port; `None`: there is only a plan, or nothing runs and the broker was stopped again.
    pub broker_port: Option<u16>,
    /// What the host has too little of, when only a plan was asked for.
    pub shortage: Option<Failure>,
    /// All, some or none of the VMs are as asked for.
    pub verdict: FleetVerdict,
    /// How it all ended.
    pub exit: Exit,
    /// How long it took, ms.
    pub elapsed_ms: u64,
}

/// One VM after `up` or `bootstrap`.
#[derive(Clone, Debug, Serialize)]
pub struct VmUp {
    /// The VM.
    pub vm: VmName,
    /// How `restart` stopped it first; `None`: it didn't run, or nobody was to stop it.
    pub stopped: Option<ShutdownEnding>,
    /// This run started it; false: it ran already, or failed before it did.
    pub started: bool,
    /// Forwards as allocated.
    pub forwards: Vec<ForwardRecord>,
    /// Settings in which it runs otherwise than the config has now, by name: they take a restart.
    pub stale_config: Vec<String>,
    /// Its bootstrap, if one ran or was skipped.
    pub bootstrap: Option<BootstrapRecord>,
    /// The handle on its QEMU, if this run started it with [`VmLaunchMode::Attached`](crate::core::runtime::launch_plan::VmLaunchMode::Attached).
    #[serde(skip)]
    pub attached: Option<AttachedQemu>,
    /// Why it is not as asked for.
    pub error: Option<Failure>,
}

impl VmUp {
    /// Nothing has been done with it yet.
    pub(crate) fn of(vm: &VmName) -> VmUp {
        VmUp {
            vm: vm.clone(),
            stopped: None,
            started: false,
            forwards: Vec::new(),
            stale_config: Vec::new(),
            bootstrap: None,
            attached: None,
            error: None,
        }
    }
}

/// Ends the operation by what became of its VMs.
pub(crate) fn finish(
    operation: Operation<'_>,
    vms: Vec<VmUp>,
    port: Option<u16>,
    cancel: &Cancel,
) -> UpOutcome {
    let exit = exit_of(&vms, cancel);
    let elapsed_ms = operation.emitter().elapsed_ms();
    let sent = operation.emitter().bytes_sent();
    let counts = count(&vms);
    let failed = vms.iter().filter(|vm| vm.error.is_some());
    let detail = failed_names(failed.map(|vm| &vm.vm));
    operation.end(exit, detail, counts, sent);
    UpOutcome {
        vms,
        plans: Vec::new(),
        refusals: Vec::new(),
        port_conflicts: Vec::new(),
        shortage: None,
        verdict: FleetVerdict::of(counts.total, counts.failed),
        broker_port: port,
        exit,
        elapsed_ms,
    }
}

fn exit_of(vms: &[VmUp], cancel: &Cancel) -> Exit {
    if cancel.is_requested() {
        Exit::Interrupted
    } else if vms.iter().any(|vm| vm.error.is_some()) {
        Exit::Failed
    } else {
        Exit::Done
    }
}

/// Whether a bootstrap has done anything to its guest.
fn changes(bootstrap: &BootstrapRecord) -> bool {
    bootstrap.status != BootstrapStatus::Skipped && !bootstrap.noop
}

fn count(vms: &[VmUp]) -> VmCounts {
    let failed = vms.iter().filter(|vm| vm.error.is_some()).count();
    let changed = vms
        .iter()
        .filter(|vm| vm.error.is_none() && (vm.started || vm.bootstrap.as_ref().is_some_and(changes)))
        .count();
    VmCounts::of(vms.len(), changed, failed)
}
