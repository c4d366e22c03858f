//! Who the broker may expect: `guests.json`, renewed before each launch (docs/PROTOCOL.md).
//!
//! Here: launch ids, launch times and the hashes of the tokens; and what is said before the first launch of a guest
//! on user networking. Not here: how a token reaches
//! its guest (`core::runtime::seed`) or how the broker judges it.

use std::collections::HashMap;

use crate::core::config::{Config, Network, VmConfig};
use crate::core::events::{Event, Severity};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::id::LaunchId;
use crate::core::name::VmName;
use crate::core::reporter::Emitter;
use crate::core::root::records::{self, GuestRecord, GuestsRecord};
use crate::core::runtime::launch_plan::GATEWAY;
use crate::core::runtime::seed;

/// What one launch of a VM is known by.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// Random, new for each launch.
    pub launch_id: LaunchId,
    /// CLOCK_BOOTTIME when it was given out, ms. A handshake before it is not of this launch.
    pub launched_boottime_ms: u64,
    /// Secret the guest presents; `None` where castra can't hand one to it.
    pub token: Option<String>,
}

/// Gives each VM to be launched a new identity and writes `guests.json`: those VMs, and all others
/// as they were. The caller holds the project's lock.
pub(crate) fn issue(config: &Config, launching: &[&VmConfig]) -> Result<HashMap<VmName, Identity>> {
    let path = config.state.guests();
    // A damaged file is no reason to refuse: it is about to be replaced.
    let before: GuestsRecord = records::load(&path).ok().flatten().unwrap_or_default();
    let mut issued = HashMap::new();
    for vm in launching {
        issued.insert(vm.name.clone(), new_identity(vm)?);
    }
    let mut guests: Vec<GuestRecord> = config
        .vms
        .iter()
        .map(|vm| {
            let record = match issued.get(&vm.name) {
                Some(identity) => record_of(&vm.name, identity),
                None => earlier(&before, &vm.name).unwrap_or_else(|| GuestRecord {
                    closed: true,
                    ..never_launched(&vm.name)
                }),
            };
            with_second_name(vm, record)
        })
        .collect();
    guests.extend(undeclared(&before, config));
    records::save(&path, &GuestsRecord { guests })?;
    Ok(issued)
}

/// Writes `guests.json` for a broker without VMs: those that run stay as they are; all others are
/// whoever says their names, without a token. That of a launch that has ended would decline every
/// hello of a VM that somebody starts himself. The caller holds the project's lock.
pub(crate) fn open_to_all(config: &Config, runs: impl Fn(&VmName) -> bool) -> Result<()> {
    let path = config.state.guests();
    let before: GuestsRecord = records::load(&path).ok().flatten().unwrap_or_default();
    let now = host::boottime_ms();
    let launched_nowhere = |guest: GuestRecord| match guest.launch_id.is_some() && !runs(&guest.name) {
        // Whoever was heard before now was the one that has ended.
        true => GuestRecord {
            launched_boottime_ms: Some(now),
            boot_id: Some(host::boot_id().clone()),
            ..never_launched(&guest.name)
        },
        false => GuestRecord {
            closed: false,
            ..guest
        },
    };
    let mut guests: Vec<GuestRecord> = config
        .vms
        .iter()
        .map(|vm| {
            let record = earlier(&before, &vm.name).unwrap_or_else(|| never_launched(&vm.name));
            with_second_name(vm, launched_nowhere(record))
        })
        .collect();
    guests.extend(undeclared(&before, config));
    records::save(&path, &GuestsRecord { guests })
}

/// What a guest on user networking can reach surprises whoever doesn't know it, and bores whoever
/// does: it is said before the first such guest of a project is launched, and never again.
/// Called before this launch is noted in `guests.json`.
pub(crate) fn warn_user_networking(config: &Config, launching: &[&VmConfig], emitter: &Emitter<'_>) {
    let is_open = |vm: &VmConfig| vm.network == Network::User;
    let open_before = config
        .vms
        .iter()
        .filter(|vm| is_open(vm))
        .map(|vm| vm.name.clone());
    if !launching.iter().any(|vm| is_open(vm)) || was_launched(config, open_before) {
        return;
    }
    emitter.emit(Event::advice(
        Severity::Info,
        None,
        format!("note: these guests can reach services on your localhost, at {GATEWAY}"),
        "`network = \"isolated\"` in castra.toml keeps a guest from all but castra's broker",
    ));
}

/// Whether one of these VMs was launched before, as far as `guests.json` tells.
fn was_launched(config: &Config, mut vms: impl Iterator<Item = VmName>) -> bool {
    let before: GuestsRecord = records::load(&config.state.guests())
        .ok()
        .flatten()
        .unwrap_or_default();
    vms.any(|vm| earlier(&before, &vm).is_some_and(|guest| guest.launched_boottime_ms.is_some()))
}

fn new_identity(vm: &VmConfig) -> Result<Identity> {
    let random = |bytes| {
        host::random_hex(bytes)
            .map_err(|error| Failure::new(Exit::Io, "can't read random bytes from the system").because(error))
    };
    Ok(Identity {
        launch_id: random(8)?.into(),
        launched_boottime_ms: host::boottime_ms(),
        token: if seed::takes_token(vm) {
            Some(seed::new_token()?)
        } else {
            None
        },
    })
}

/// The second name is the config's to say, whenever the VM was launched.
fn with_second_name(vm: &VmConfig, record: GuestRecord) -> GuestRecord {
    GuestRecord {
        second_name: vm.second_name.clone(),
        ..record
    }
}

fn record_of(name: &VmName, identity: &Identity) -> GuestRecord {
    GuestRecord {
        closed: false,
        name: name.clone(),
        second_name: None,
        launch_id: Some(identity.launch_id.clone()),
        launched_boottime_ms: Some(identity.launched_boottime_ms),
        boot_id: Some(host::boot_id().clone()),
        token_sha256: identity.token.as_deref().map(seed::token_sha256),
    }
}

/// VMs that the config no longer has: they may still run.
fn undeclared(before: &GuestsRecord, config: &Config) -> impl Iterator<Item = GuestRecord> {
    let guests = before.guests.iter();
    guests
        .filter(|guest| config.vm(guest.name.as_str()).is_none())
        .cloned()
}

fn earlier(before: &GuestsRecord, name: &VmName) -> Option<GuestRecord> {
    before
        .guests
        .iter()
        .find(|guest| guest.name.key() == name.key())
        .cloned()
}

fn never_launched(name: &VmName) -> GuestRecord {
    GuestRecord {
        closed: false,
        name: name.clone(),
        second_name: None,
        launch_id: None,
        launched_boottime_ms: None,
        boot_id: None,
        token_sha256: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::bootstrap::bootstrap_plan::tests::config_of;
    use crate::core::root::paths::StateRoot;
    use crate::core::scratch::Scratch;

    /// Launches these VMs as far as identities go; how often user networking was explained.
    fn said(config: &Config, launching: &[&str]) -> usize {
        let launching: Vec<&VmConfig> = launching.iter().map(|name| config.vm(name).unwrap()).collect();
        let mut events = Vec::new();
        warn_user_networking(config, &launching, &Emitter::new(&mut events));
        issue(config, &launching).unwrap();
        events.len()
    }

    #[test]
    fn user_networking_is_explained_at_its_first_launch_alone() {
        let scratch = Scratch::new("up-user-network");
        let mut config = config_of(&["web", "db", "vault"]);
        config.state = StateRoot::new(scratch.dir());
        config.vms[2].network = Network::Isolated;
        assert_eq!(said(&config, &[]), 0, "only a broker");
        assert_eq!(said(&config, &["vault"]), 0, "an isolated guest");
        assert_eq!(said(&config, &["web", "vault"]), 1);
        assert_eq!(said(&config, &["web"]), 0);
        assert_eq!(said(&config, &["db"]), 0, "known from web");
    }
}
