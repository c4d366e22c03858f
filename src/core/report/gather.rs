//! Makes a report from the files under a state root.
//!
//! Here: which runs are in it, found from the journal's end; their events and those of the broker,
//! read once from the oldest of these runs on. Not here: what an event means for a report
//! (`super::from_events`), logs (`super::log_tails`), the bus (`super::traffic`).
//!
//! Memory is bounded by the limits of the report, not by the length of the journals: lines are read one by
//! one, and only the report's cut form of them is kept.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::core::events::Event;
use crate::core::events::contract::Stamped;
use crate::core::events::kept::Head;
use crate::core::events::kept::journal_reader::JournalReader;
use crate::core::failure::Result;
use crate::core::host::{self, Holder};
use crate::core::lines::rotated_log::Position;
use crate::core::name::VmName;
use crate::core::reporter::wall_clock;
use crate::core::root::paths::StateRoot;
use crate::core::time::{of_unix_ms, parse_ms, wall_ms};

use super::from_events::{RunBuilder, keep_failed_first};
use super::model::RunReport;
use super::{MAX_RUNS, MAX_VMS_IN_ALL, log_tails, traffic};

/// The commands whose runs have a timeline.
const COMMANDS: [&str; 4] = ["up", "down", "restart", "bootstrap"];
/// Two writers at once may append lines of about the same time in the other order.
const SLACK: Duration = Duration::from_secs(10);
/// Runs that named a wanted VM and whose beginning is still looked for; more are never under way.
const MAX_OPEN: usize = 10_000;

/// Which runs are wanted.
#[derive(Clone, Debug)]
pub struct RunFilter {
    /// How many of the last runs; at most 100.
    pub last: usize,
    /// Only those that began at this time or later.
    pub since: Option<SystemTime>,
    /// Only those about one of these VMs, and of them only these VMs; compared without case. None: all.
    pub vms: Vec<String>,
}

/// The runs, newest first, and what isn't in them.
pub fn gather(state: &StateRoot, wanted: &RunFilter) -> Result<(Vec<RunReport>, Vec<String>)> {
    let keys: Vec<String> = wanted.vms.iter().map(|vm| vm.to_ascii_lowercase()).collect();
    let mut journal = JournalReader::open(&state.events())?;
    if let Some(since) = wanted.since {
        journal.skip_before(&clock(since.checked_sub(SLACK)))?;
    }
    let Some((mut runs_so_far, place)) = choose(&journal, wanted, &keys)? else {
        return Ok((Vec::new(), Vec::new()));
    };
    journal.go_to(place);
    read_runs(&mut journal, &mut runs_so_far)?;
    let mut left_out = corrupt_lines(&journal);
    read_broker(state, &mut runs_so_far)?;

    mark_running(state, &mut runs_so_far);
    let begins: Vec<u64> = runs_so_far.iter().map(|run| run.began_ms).collect();
    let ends: Vec<u64> = runs_so_far.iter().map(RunBuilder::ended_ms).collect();
    let mut runs: Vec<RunReport> = runs_so_far.into_iter().map(|run| run.finish(&keys)).collect();
    left_out.extend(limit_vms(&mut runs));
    log_tails::explain(state, &mut runs, &begins, &ends);
    left_out.extend(traffic::add(state, &mut runs, &begins, &keys)?);
    runs.reverse();
    Ok((runs, left_out))
}

fn clock(time: Option<SystemTime>) -> String {
    wall_clock(time.unwrap_or(UNIX_EPOCH))
}

/// The runs that are wanted, oldest first, and where the journal begins to tell of them.
fn choose(
    journal: &JournalReader,
    wanted: &RunFilter,
    keys: &[String],
) -> Result<Option<(Vec<RunBuilder>, Position)>> {
    let since = wanted.since.map(wall_clock);
    // Runs that had to do with a wanted VM: their first line is the last to be met.
    let mut about: HashSet<String> = HashSet::new();
    let mut chosen = Vec::new();
    let mut begins = None;
    let mut lines = journal.backward(false)?;
    let mut look = |line: &str, head: Head<'_>| -> Option<RunBuilder> {
        let run = head.run.as_deref()?;
        let is_wanted_vm = |vm: &str| keys.iter().any(|key| vm.eq_ignore_ascii_case(key));
        if head.kind != "command.accepted" {
            if head.vm().is_some_and(is_wanted_vm) && about.len() < MAX_OPEN && !about.contains(run) {
                about.insert(run.to_owned());
            }
            return None;
        }
        if !(keys.is_empty() || about.remove(run)) || since.as_deref().is_some_and(|since| *head.ts < *since)
        {
            return None;
        }
        let Event::CommandAccepted { command, detail, .. } = Stamped::from_contract_line(line)?.event else {
            return None;
        };
        COMMANDS.contains(&command.as_str()).then_some(())?;
        let began = parse_ms(&head.ts)?;
        Some(RunBuilder::new(
            run.to_owned(),
            command,
            detail.as_deref(),
            &head.ts,
            began,
        ))
    };
    while chosen.len() < wanted.last.min(MAX_RUNS) {
        let Some((run, place)) = lines.next(&mut look)? else {
            break;
        };
        chosen.push(run);
        begins = Some(place);
    }
    chosen.reverse();
    Ok(begins.map(|place| (chosen, place)))
}

/// Gives each event to its run.
fn read_runs(journal: &mut JournalReader, runs_so_far: &mut [RunBuilder]) -> Result<()> {
    let index: HashMap<String, usize> = (0..)
        .zip(runs_so_far.iter())
        .map(|(at, run)| (run.run().to_owned(), at))
        .collect();
    while let Some((at, stamped)) = journal.next(false, |line, head| {
        let at = *index.get(head.run.as_deref()?)?;
        if head.kind == "message" && is_chatter(line) {
            return None;
        }
        Some((at, Stamped::from_contract_line(line)?))
    })? {
        runs_so_far[at].add_event(&stamped);
    }
    Ok(())
}

/// Skips output of scripts and progress: most lines of a journal, and not part of a report.
fn is_chatter(line: &str) -> bool {
    [r#""severity":"progress""#, r#""severity":"info""#]
        .iter()
        .any(|mark| line.contains(mark))
}

fn corrupt_lines(journal: &JournalReader) -> Vec<String> {
    match journal.corrupt {
        0 => Vec::new(),
        1 => vec!["1 invalid line of the journal was skipped".to_owned()],
        count => vec![format!("{count} invalid lines of the journal were skipped")],
    }
}

/// Gives the broker's events about a VM to the last run before them that was about this VM.
fn read_broker(state: &StateRoot, runs_so_far: &mut [RunBuilder]) -> Result<()> {
    let mut journal = JournalReader::open(&state.broker_events())?;
    let Some(first) = runs_so_far.first() else {
        return Ok(());
    };
    journal.skip_before(&wall_clock(of_unix_ms(first.began_ms)))?;
    let mut about: HashMap<String, Vec<usize>> = HashMap::new();
    for (at, run) in runs_so_far.iter().enumerate() {
        for key in run.keys() {
            about.entry(key.to_owned()).or_default().push(at);
        }
    }
    let begins: Vec<u64> = runs_so_far.iter().map(|run| run.began_ms).collect();
    while let Some((at, key, after, event)) = journal.next(false, |line, head| {
        matches!(
            &*head.kind,
            "broker.handshake" | "broker.freshness" | "vm.lifecycle"
        )
        .then_some(())?;
        let key = head.vm()?.to_ascii_lowercase();
        let ts = parse_ms(&head.ts)?;
        let at = *about.get(&key)?.iter().rev().find(|at| begins[**at] <= ts)?;
        let event = Stamped::from_contract_line(line)?.event;
        if let Event::BrokerHandshake { outcome, .. } = &event
            && *outcome != crate::core::events::HandshakeOutcome::Ok
        {
            return None;
        }
        Some((at, key, ts - begins[at], event))
    })? {
        runs_so_far[at].add_broker_event(&key, after, &event);
    }
    Ok(())
}

/// A run without an end is under way if it is the last about a VM whose lock somebody holds.
fn mark_running(state: &StateRoot, runs_so_far: &mut [RunBuilder]) {
    let now = wall_ms();
    let mut later: HashSet<String> = HashSet::new();
    for run in runs_so_far.iter_mut().rev() {
        let held = |vm: &VmName| host::lock_holder(&state.vm(vm).lock()) != Holder::Nobody;
        if !run.has_ended() && run.vms().any(|vm| !later.contains(&vm.key()) && held(vm)) {
            run.mark_running(now);
        }
        later.extend(run.keys().map(str::to_owned));
    }
}

/// Newest runs keep their VMs, older ones their sums, when there are more VMs than a page should hold.
fn limit_vms(runs: &mut [RunReport]) -> Option<String> {
    let mut room = MAX_VMS_IN_ALL;
    let mut cut = 0;
    for run in runs.iter_mut().rev() {
        let before = run.vms.len();
        keep_failed_first(&mut run.vms, room);
        room -= run.vms.len();
        cut += before - run.vms.len();
        run.vms_left_out += before - run.vms.len();
    }
    (cut > 0)
        .then(|| format!("{cut} VMs of older runs aren't shown one by one: at most {MAX_VMS_IN_ALL} are"))
}
