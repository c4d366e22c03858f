//! Room on the host: memory, space for disks, open files.
//!
//! Here: what there is. Not here: what the VMs of a project need of it (`core::operations::fleet::memory_check`).

use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};
use serde_json::json;

use super::Finding;
use crate::core::broker::guest_capacity;
use crate::core::host;
use crate::core::human::{bytes as size, plural};

/// With less than this left on a file system castra's own records may not fit.
const FULL: u64 = 64 << 20;
/// With less than this left a few guests that write fill it.
const NEARLY_FULL: u64 = 1 << 30;

/// Memory that is available.
pub fn memory() -> Finding {
    const ID: &str = "memory.available";
    match host::memory() {
        Some(memory) => {
            let limit = if memory.limited {
                " to this control group"
            } else {
                ""
            };
            Finding::ok(
                ID,
                format!(
                    "{} of {} memory are available{limit}, {}",
                    size(memory.available),
                    size(memory.total),
                    plural(host::cores(), "core")
                ),
            )
            .data(json!({
                "available_bytes": memory.available, "total_bytes": memory.total, "limited": memory.limited,
                "cores": host::cores(),
            }))
        }
        None => Finding::warn(
            ID,
            "castra can't find out how much memory is available",
            "check that /proc/meminfo is readable",
        ),
    }
}

/// The file system and the writability of a directory castra writes to, which may not be there yet.
pub fn directory(id: &str, dir: &Path, purpose: &str) -> Vec<Finding> {
    let there = nearest(dir);
    let shown = dir.display();
    if !there.is_dir() {
        return vec![
            Finding::error(
                "disk.writable",
                format!("{shown} can't be made: {} is no directory", there.display()),
                "put it elsewhere: `state_dir` under [project], or CASTRA_HOME",
            )
            .data(json!({"path": dir})),
        ];
    }
    let mut findings = Vec::new();
    if let Some(free) = host::space_left(&there) {
        let text = format!("{} free for {purpose} in {shown}", size(free));
        let remedy =
            "free some space there, or put it elsewhere: `state_dir` under [project], or CASTRA_HOME";
        let finding = match free {
            0..FULL => Finding::error(id, text, remedy),
            FULL..NEARLY_FULL => Finding::warn(id, text, remedy),
            _ => Finding::ok(id, text),
        };
        findings.push(finding.data(json!({"path": dir, "free_bytes": free})));
    }
    if let Err(errno) = access(&there, AccessFlags::W_OK | AccessFlags::X_OK) {
        findings.push(
            Finding::error(
                "disk.writable",
                format!("can't write to {}: {}", there.display(), errno.desc()),
                "make that place writable, or put it elsewhere: `state_dir` under [project], or CASTRA_HOME",
            )
            .data(json!({"path": dir})),
        );
    }
    findings
}

/// The directory itself, or the nearest one above it that is there.
fn nearest(dir: &Path) -> PathBuf {
    dir.ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

/// Open files, against the connections a broker may have to serve.
pub fn descriptors(wanted: usize) -> Option<Finding> {
    const ID: &str = "limits.open-files";
    let (soft, hard, room) = guest_capacity()?;
    let data = json!({"soft": soft, "hard": hard, "max_connections": wanted, "room": room});
    Some(
        match room >= wanted {
            true => Finding::ok(
                ID,
                format!("up to {hard} open files, enough for {wanted} connections to a broker"),
            ),
            false => Finding::warn(
                ID,
                format!("at most {hard} open files: a broker can serve {room} connections, not the {wanted} of `max_connections`"),
                "raise the hard limit (`ulimit -Hn`, limits.conf), or lower `max_connections` under [broker]",
            ),
        }
        .data(data),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::doctor::Level;
    use crate::core::scratch::Scratch;

    #[test]
    fn a_directory_that_is_not_there_is_judged_by_the_one_above() {
        let scratch = Scratch::new("doctor-room");
        assert_eq!(nearest(&scratch.path("a/b/c")), scratch.dir());
        let findings = directory("disk.state", &scratch.path("a/b"), "state");
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert!(findings[0].data["free_bytes"].as_u64().unwrap() > 0);
        assert!(!scratch.path("a").exists());
        std::fs::write(scratch.path("file"), "").unwrap();
        let findings = directory("disk.state", &scratch.path("file/b"), "state");
        assert!(
            findings.len() == 1 && findings[0].text.contains("is no directory"),
            "{findings:?}"
        );
    }

    #[test]
    fn what_no_machine_has_is_a_warning() {
        let few = descriptors(1).unwrap();
        let many = descriptors(usize::MAX).unwrap();
        assert_eq!((few.level, many.level), (Level::Ok, Level::Warn));
        assert_eq!(memory().level, Level::Ok);
    }
}
