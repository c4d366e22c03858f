//! What `up`, `restart`, `bootstrap` and `down` share: VMs that are checked, launched, watched and stopped together.
//!
//! Here: the examination before anything is made, one VM's way up, and one VM's way down. Not here: the verbs
//! themselves.

pub(crate) mod accelerator;
pub(crate) mod already_running;
pub(crate) mod boot_source;
pub(crate) mod bring_up;
pub(crate) mod broker_events;
pub(crate) mod identity;
pub(crate) mod launch_vm;
pub(crate) mod memory_check;
pub(crate) mod preflight;
pub(crate) mod stop_vm;
pub(crate) mod vm_check;
