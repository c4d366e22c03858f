//! Every event that the castras of the tests have told and kept, checked.
//!
//! Here: reading the journals that a test leaves, holding each line to be exactly what this
//! castra's encoding of the event says, and keeping the lines for an independent validator:
//! with CASTRA_TEST_EVENTS set to a directory, `scripts/check-events.sh` finds them there.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use castra::core::events::contract::Stamped;
use castra::core::events::{BootstrapStepKind, Event};
use castra::core::id::RunId;
use castra::core::name::VmName;

/// Checks all journals below a directory. For the end of a test; one that fails already is left
/// to fail for its own reason.
pub fn check_below(dir: &Path) {
    if std::thread::panicking() {
        return;
    }
    for path in journals_below(dir) {
        let text = String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
        // What was killed in the middle of a line leaves a torn one.
        let whole = text.rfind('\n').map_or("", |at| &text[..at]);
        check_lines(whole.lines(), &path.display().to_string());
    }
}

/// Checks the lines of what a command printed that are events.
pub fn check_printed(stdout: &str, args: &str) {
    check_lines(
        stdout.lines().filter(|line| line.starts_with(r#"{"type":""#)),
        args,
    );
}

fn check_lines<'l>(lines: impl Iterator<Item = &'l str>, place: &str) {
    let mut kept = String::new();
    let mut ranks: HashMap<(RunId, VmName), usize> = HashMap::new();
    for line in lines {
        let stamped = Stamped::from_contract_line(line);
        let again = stamped.as_ref().map(Stamped::contract_line);
        assert_eq!(again.as_deref(), Some(line), "{place}: not as events are written");
        let stamped = stamped.unwrap();
        if let Some((vm, mut rank)) = rank(&stamped.event) {
            let key = (stamped.run.clone(), vm.clone());
            let before = ranks.get(&key).copied();
            if matches!(stamped.event, Event::OverlayDiscarded { .. }) && before == Some(PREPARED) {
                rank = LAST; // The launch failed.
            }
            assert!(before <= Some(rank), "{place}: out of the VM's order: {line}");
            ranks.insert(key, rank);
        }
        kept.push_str(line);
        kept.push('\n');
    }
    if let Some(dir) = std::env::var_os("CASTRA_TEST_EVENTS").filter(|_| !kept.is_empty()) {
        fs::create_dir_all(&dir).unwrap();
        let path = Path::new(&dir).join(format!("{}.jsonl", std::process::id()));
        let mut file = File::options().append(true).create(true).open(path).unwrap();
        file.write_all(kept.as_bytes()).unwrap();
    }
}

/// An overlay is there.
const PREPARED: usize = 7;
/// Nothing comes behind this.
const LAST: usize = 30;

/// Where an event stands in the order that docs/EVENTS.md promises for each VM of a run.
fn rank(event: &Event) -> Option<(&VmName, usize)> {
    Some(match event {
        Event::ShutdownRequested { vm, .. } => (vm, 1),
        Event::CooperativeAttempted { vm, .. } => (vm, 2),
        Event::CooperativeSucceeded { vm, .. } | Event::CooperativeTimedOut { vm, .. } => (vm, 3),
        Event::Escalated { vm, .. } => (vm, 4),
        Event::ShutdownComplete { vm, .. } => (vm, 5),
        Event::OverlayDiscarded { vm, .. } => (vm, 6),
        Event::OverlayPrepared { vm, .. } => (vm, PREPARED),
        Event::VmLaunched { vm, .. } => (vm, 8),
        Event::BootstrapPlanned(plan) => (&plan.vm, 9),
        Event::BootstrapStarted { vm, .. } => (vm, 10),
        Event::BootstrapStep { vm, step, .. } => {
            let at = BootstrapStepKind::ALL.iter().position(|known| known == step);
            (vm, 11 + at.unwrap())
        }
        Event::BootstrapCompleted { vm, .. } | Event::BootstrapFailed { vm, .. } => (vm, LAST),
        _ => return None,
    })
}

fn journals_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        let kind = entry.file_type();
        if kind.as_ref().is_ok_and(fs::FileType::is_dir) {
            found.extend(journals_below(&path));
        } else if kind.is_ok_and(|kind| kind.is_file())
            && ["events.jsonl", "events-broker.jsonl"]
                .iter()
                .any(|journal| name.starts_with(journal))
        {
            found.push(path);
        }
    }
    found
}
