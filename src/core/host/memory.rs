//! How much memory new processes may take: the host's, and what a control group allows us.
//!
//! Here: `/proc/meminfo` and cgroup v2's `memory.max`, ours and those above it. Not here: how much a
//! fleet needs (`core::operations::fleet::preflight`).

use std::fs;
use std::path::Path;

/// What there is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// May be given to new processes without swapping, as far as the kernel knows.
    pub available: u64,
    /// Could be, if nothing else ran.
    pub total: u64,
    /// A control group allows less than the host has.
    pub limited: bool,
}

/// The memory that processes started by us may take; `None` where the kernel doesn't say.
pub fn memory() -> Option<Memory> {
    let host = of_meminfo(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Some(limited_by(host, &groups, Path::new("/sys/fs/cgroup")))
}

fn of_meminfo(text: &str) -> Option<Memory> {
    let kib = |key: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some(Memory {
        available: kib("MemAvailable:")?.checked_mul(1024)?,
        total: kib("MemTotal:")?.checked_mul(1024)?,
        limited: false,
    })
}

/// `groups` is `/proc/self/cgroup`, `mount` where cgroup v2 is mounted. Each group on the way up may
/// have a limit; its page cache is given back when memory is short, so it counts as free.
fn limited_by(host: Memory, groups: &str, mount: &Path) -> Memory {
    let Some(ours) = groups.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return host;
    };
    let number = |group: &Path, file: &str| -> Option<u64> {
        let text = fs::read_to_string(mount.join(group).join(file)).ok()?;
        text.trim().parse().ok()
    };
    let mut memory = host;
    for group in Path::new(ours).ancestors() {
        // `max`, or no such file at the root: no limit.
        let Some(limit) = number(group, "memory.max") else {
            continue;
        };
        let used = number(group, "memory.current").unwrap_or(0);
        let stat = fs::read_to_string(mount.join(group).join("memory.stat")).unwrap_or_default();
        let left = limit.saturating_sub(used.saturating_sub(reclaimable(&stat)));
        if limit < memory.total {
            memory.total = limit;
            memory.limited = true;
        }
        if left < memory.available {
            memory.available = left;
            memory.limited = true;
        }
    }
    memory
}

fn reclaimable(stat: &str) -> u64 {
    stat.lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(key, _)| matches!(*key, "inactive_file" | "active_file" | "slab_reclaimable"))
        .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;

    const MIB: u64 = 1 << 20;

    const fn mib(available: u64, total: u64, limited: bool) -> Memory {
        Memory {
            available: available * MIB,
            total: total * MIB,
            limited,
        }
    }

    #[test]
    fn meminfo_is_read_by_its_keys() {
        let text =
            "MemTotal:        4096 kB\nMemFree:          512 kB\nMemAvailable:    2048 kB\nSwapFree: 9 kB\n";
        assert_eq!(of_meminfo(text), Some(mib(2, 4, false)));
        for damaged in ["", "MemTotal: 4096 kB\n", "MemTotal: x kB\nMemAvailable: 1 kB\n"] {
            assert_eq!(of_meminfo(damaged), None, "{damaged}");
        }
        assert!(memory().is_some_and(|memory| memory.available <= memory.total));
    }

    #[test]
    fn the_tightest_group_on_the_way_up_counts() {
        let scratch = Scratch::new("cgroups");
        let mount = scratch.dir().to_owned();
        let group = |name: &str, max: &str, current: u64, cache: u64| {
            let dir = mount.join(name);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("memory.max"), format!("{max}\n")).unwrap();
            fs::write(dir.join("memory.current"), format!("{}\n", current * MIB)).unwrap();
            let stat = format!("anon 1\ninactive_file {}\nactive_file 0\n", cache * MIB);
            fs::write(dir.join("memory.stat"), stat).unwrap();
        };
        let host = mib(1000, 4000, false);
        let judged = |groups: &str| limited_by(host, groups, &mount);
        assert_eq!(judged(""), host);
        assert_eq!(judged("4:memory:/a\n"), host, "version 1 alone");
        assert_eq!(judged("0::/\n"), host, "the root has no limit");

        group("ci", &(2000 * MIB).to_string(), 1800, 100);
        group("ci/job", "max", 10, 0);
        assert_eq!(judged("4:memory:/x\n0::/ci/job\n"), mib(300, 2000, true));
        group("ci/job", &(500 * MIB).to_string(), 100, 50);
        assert_eq!(judged("0::/ci/job\n"), mib(300, 500, true));
        // A limit beyond what the host has left is none.
        group("ci", &(8000 * MIB).to_string(), 0, 0);
        group("ci/job", &(8000 * MIB).to_string(), 0, 0);
        assert_eq!(judged("0::/ci/job\n"), host);
    }
}
