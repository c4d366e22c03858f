//! Whether the host has room for the VMs that `up` and `restart` are about to start.
//!
//! Here: how much memory a fleet needs, and what is said where memory, cores or disk are short. Not
//! here: asking the kernel (`core::host`), or bounding how many start at once (`operations::run`).
//!
//! A guest doesn't touch all its memory: the kernel hands out a page when the guest first writes to
//! it. So a fleet is refused only where it could not even live: where the host has less than a quarter
//! of what castra.toml gives the guests. Where it has that, but less than all of it, the fleet starts
//! and the shortfall is said. Swap counts for nothing: a guest that swaps is a guest that hangs.

use std::path::{Path, PathBuf};

use crate::core::config::{Config, VmConfig};
use crate::core::events::{Event, Severity};
use crate::core::failure::{Exit, Failure};
use crate::core::host::{self, Memory};
use crate::core::human;

const MIB: u64 = 1 << 20;
/// What QEMU takes besides its guest's memory: itself, and the code it has translated. With what a
/// default guest touches that makes 224 MiB; sixteen of them took 206 to 251 MiB each.
const OVERHEAD: u64 = 96 * MIB;
/// A Linux guest that idles has touched about so much, if it has it.
const LEAST: u64 = 128 * MIB;
/// With less disk than this, guests soon meet a full one.
const DISK_FLOOR: u64 = 512 * MIB;

/// Memory that VMs need, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Need {
    /// To start and idle.
    least: u64,
    /// If every guest uses all it was given.
    most: u64,
}

impl Need {
    fn of(memory: u64) -> Need {
        Need {
            least: (memory / 4).max(memory.min(LEAST)).saturating_add(OVERHEAD),
            most: memory.saturating_add(OVERHEAD),
        }
    }

    fn of_all(vms: &[&VmConfig]) -> Need {
        let needs = vms.iter().map(|vm| Need::of(vm.memory_bytes));
        needs.fold(Need::default(), |sum, need| Need {
            least: sum.least.saturating_add(need.least),
            most: sum.most.saturating_add(need.most),
        })
    }
}

/// What a fleet lacks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shortage {
    /// It can't live; only `--force` goes on.
    pub refusal: Option<Failure>,
    /// It can, and whoever looks for the cause of trouble later should have heard of this.
    pub warnings: Vec<Event>,
}

impl Shortage {
    /// The refusal, unless it is to be gone on; then it is one more warning.
    pub(super) fn unless(mut self, force: bool) -> Result<Vec<Event>, Failure> {
        match self.refusal {
            Some(failure) if !force => Err(failure),
            Some(failure) => {
                let text = format!("{}; started anyway (--force)", failure.cause());
                self.warnings.push(Event::advice(
                    Severity::Warn,
                    None,
                    text,
                    "if a VM crashes because memory is short, start fewer VMs, or give them less `memory`",
                ));
                Ok(self.warnings)
            }
            None => Ok(self.warnings),
        }
    }
}

/// What the host lacks for these VMs, none of which runs.
pub(super) fn shortage(config: &Config, to_start: &[&VmConfig]) -> Shortage {
    let mut short = memory_shortage(to_start);
    short.warnings.extend(core_shortage(to_start));
    short.warnings.extend(of_disk(config, to_start));
    short
}

/// The memory that the host lacks for these VMs.
pub(crate) fn memory_shortage(vms: &[&VmConfig]) -> Shortage {
    host::memory().map_or_else(Shortage::default, |memory| of_memory(memory, vms))
}

/// Which of these VMs have more virtual CPUs than the host has cores.
pub(crate) fn core_shortage<'v>(vms: &'v [&VmConfig]) -> impl Iterator<Item = Event> + use<'v> {
    of_cores(host::cores(), vms)
}

fn of_memory(memory: Memory, vms: &[&VmConfig]) -> Shortage {
    let need = Need::of_all(vms);
    let mut short = Shortage::default();
    if need.most <= memory.available {
        return short;
    }
    let count = match vms {
        [vm] => format!("vm `{}`", vm.name),
        vms => human::plural(vms.len(), "VM"),
    };
    let limit = match memory.limited {
        true => " of what this control group may use",
        false => "",
    };
    let advice = match vms {
        [_] => "give it less `memory` in castra.toml, end what else runs, or go on with --force".to_owned(),
        [first, ..] => format!(
            "start fewer VMs by naming them (castra up {}), give them less `memory` in castra.toml, end what else \
             runs, or go on with --force",
            first.name
        ),
        [] => String::new(),
    };
    if need.least > memory.available {
        // Nothing is wrong with the config, and the same command works once there is room: as for a
        // port that is taken. Unless no waiting will ever help.
        let exit = match need.least > memory.total {
            true => Exit::Unavailable,
            false => Exit::Busy,
        };
        let failure = Failure::new(exit, format!("this host has too little memory for {count}"))
            .because(format!(
                "starting takes at least {}, and {}{limit} are available: {} are missing",
                size(need.least),
                size(memory.available),
                size(need.least - memory.available)
            ))
            .advice(advice);
        short.refusal = Some(failure);
        return short;
    }
    short.warnings.push(Event::advice(
        Severity::Warn,
        None,
        format!(
            "if {count} used all the memory castra.toml gives, {} would be missing: {}{limit} are available",
            size(need.most - memory.available),
            size(memory.available)
        ),
        "if they really use it all, start fewer VMs or give them less `memory`",
    ));
    short
}

fn of_cores<'v>(cores: usize, vms: &'v [&VmConfig]) -> impl Iterator<Item = Event> + use<'v> {
    vms.iter()
        .filter(move |vm| usize::try_from(vm.cpus).is_ok_and(|cpus| cpus > cores))
        .map(move |vm| {
            let text = format!(
                "it has {} virtual CPUs, but this host has only {cores}, which they share",
                vm.cpus
            );
            Event::advice(
                Severity::Warn,
                Some(&vm.name),
                text,
                format!("`cpus = {cores}` is as fast or faster"),
            )
        })
}

/// One warning for each file system that holds overlays and is nearly full.
fn of_disk(config: &Config, vms: &[&VmConfig]) -> Vec<Event> {
    let mut dirs: Vec<PathBuf> = Vec::new();
    for vm in vms {
        let path = vm
            .overlay
            .clone()
            .unwrap_or_else(|| config.state.overlay(&vm.name));
        let dir = path.ancestors().skip(1).find(|dir| dir.is_dir());
        let dir = dir.unwrap_or(Path::new("/")).to_owned();
        if !dirs.contains(&dir) {
            dirs.push(dir);
        }
    }
    dirs.iter()
        .filter_map(|dir| Some((dir, host::space_left(dir)?)))
        .filter(|(_, left)| *left < DISK_FLOOR)
        .map(|(dir, left)| {
            let text = format!(
                "{} are left where the VMs' disks lie ({})",
                size(left),
                dir.display()
            );
            Event::advice(
                Severity::Warn,
                None,
                text,
                "free some space (castra clean --global removes what stopped projects left), or move `state_dir`",
            )
        })
        .collect()
}

/// In whole MiB, of which too little is never told.
fn size(bytes: u64) -> String {
    match bytes.next_multiple_of(MIB) {
        small if small < 1 << 30 => human::bytes(small),
        large => human::bytes_to_a_tenth(large),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::bootstrap::bootstrap_plan::tests::config_of;

    const fn memory(available: u64, total: u64) -> Memory {
        Memory {
            available: available * MIB,
            total: total * MIB,
            limited: false,
        }
    }

    /// VMs with so much memory each, in MiB.
    fn fleet(memories: &[u64]) -> Config {
        let names: Vec<String> = (0..memories.len()).map(|id| format!("web-{id}")).collect();
        let mut config = config_of(&names.iter().map(String::as_str).collect::<Vec<_>>());
        for (vm, memory) in config.vms.iter_mut().zip(memories) {
            vm.memory_bytes = memory * MIB;
        }
        config
    }

    fn judged(memories: &[u64], memory: Memory) -> Shortage {
        let config = fleet(memories);
        of_memory(memory, &config.vms.iter().collect::<Vec<_>>())
    }

    fn text(events: &[Event]) -> String {
        format!("{events:?}")
    }

    #[test]
    fn a_fleet_is_refused_only_where_it_could_not_live() {
        // The default guest has 256 MiB, of which it touches about half.
        let sixteen = &[256; 16];
        let short = judged(sixteen, memory(16 * 224, 8192));
        assert!(short.refusal.is_none(), "{short:?}");
        assert!(
            text(&short.warnings).contains("2.0 GiB would be missing"),
            "{short:?}"
        );
        let short = judged(sixteen, memory(16 * 352, 8192));
        assert!(short.refusal.is_none() && short.warnings.is_empty(), "{short:?}");

        let failure = judged(sixteen, memory(16 * 224 - 1, 8192)).refusal.unwrap();
        assert_eq!(failure.exit, Exit::Busy);
        let words = failure.to_string();
        for part in ["16 VMs", "1 MiB are missing", "castra up web-0", "--force"] {
            assert!(words.contains(part), "{words}");
        }
        // No waiting helps where the host is too small.
        let failure = judged(sixteen, memory(500, 1024)).refusal.unwrap();
        assert_eq!(failure.exit, Exit::Unavailable);
        let mut limited = memory(500, 1024);
        limited.limited = true;
        let failure = judged(sixteen, limited).refusal.unwrap();
        assert!(failure.to_string().contains("control group"), "{failure}");
    }

    #[test]
    fn a_guest_counts_with_a_quarter_but_no_less_than_it_idles_with() {
        let least = |mib: u64| Need::of(mib * MIB).least / MIB;
        assert_eq!(least(64), 64 + 96);
        assert_eq!(least(128), 128 + 96);
        assert_eq!(least(512), 128 + 96);
        assert_eq!(least(8192), 2048 + 96);
        assert_eq!(Need::of(u64::MAX).most, u64::MAX);
    }

    #[test]
    fn force_turns_a_refusal_into_a_warning() {
        let short = judged(&[8192], memory(100, 1024));
        assert!(short.clone().unless(false).is_err());
        let warnings = short.unless(true).unwrap();
        assert_eq!(warnings.len(), 1);
        assert!(text(&warnings).contains("--force"), "{warnings:?}");
    }

    #[test]
    fn more_cpus_than_cores_are_said() {
        let mut config = fleet(&[256, 256]);
        (config.vms[0].cpus, config.vms[1].cpus) = (2, 3);
        let vms: Vec<&VmConfig> = config.vms.iter().collect();
        let said: Vec<Event> = of_cores(2, &vms).collect();
        assert_eq!(said.len(), 1);
        assert!(text(&said).contains("3 virtual CPUs"), "{said:?}");
    }
}
