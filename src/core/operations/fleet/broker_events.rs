//! The broker's events on some VMs, and its own start and stop, passed through while an operation
//! runs (docs/EVENTS.md).
//!
//! Here: following the broker's journal from where it ended when the operation began. Not here:
//! reading journals (`events::kept`), or keeping the events again: the broker has.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::core::cancel::Cancel;
use crate::core::events::contract::Stamped;
use crate::core::events::kept::journal_reader::JournalReader;
use crate::core::events::{Event, Severity};
use crate::core::failure::Result;
use crate::core::reporter::Emitter;
use crate::core::threads::{self, CancelOnDrop};

/// How long a pass waits before it looks for more: what a watcher feels as "at once".
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A place in the broker's journal.
pub(crate) struct BrokerEvents {
    journal: Result<JournalReader>,
    names: HashSet<String>,
}

impl BrokerEvents {
    /// Starts at the journal's present end, for events on these VMs (lower-case names).
    pub(crate) fn from_now(path: &Path, names: HashSet<String>) -> BrokerEvents {
        BrokerEvents {
            journal: at_its_end(path),
            names,
        }
    }

    /// Runs `work` and passes events on meanwhile, up to what the broker has told by its end; all of
    /// them at the end where no thread is to be had.
    pub(crate) fn during<T>(self, emitter: &Emitter<'_>, work: impl FnOnce() -> T) -> T {
        let over = Cancel::new();
        let relay = Mutex::new(Some(self));
        let follow = || {
            let relay = relay.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(relay) = relay {
                relay.follow(emitter, &over);
            }
        };
        thread::scope(|scope| {
            // The follower ends however this is left.
            let ended = CancelOnDrop(&over);
            let follower = threads::spawn_scoped(scope, "events", follow);
            let done = work();
            drop(ended);
            match follower {
                Ok(follower) => drop(follower.join()),
                Err(_) => follow(),
            }
            done
        })
    }

    /// Passes events on until `done` is raised, and then what was written until that moment. A
    /// journal that can't be read costs no more than these events; it is said once.
    pub(crate) fn follow(self, emitter: &Emitter<'_>, done: &Cancel) {
        let BrokerEvents { journal, names } = self;
        let passed = journal.and_then(|mut journal| {
            loop {
                let last = done.pause(POLL_INTERVAL);
                let forward = |line: &str| {
                    emitter.forward(&of_interest(line, &names)?, line);
                    Some(())
                };
                while journal.next(true, |line, _| forward(line))?.is_some() {}
                if last {
                    return Ok(());
                }
            }
        });
        if let Err(failure) = passed {
            emitter.emit(Event::advice(
                Severity::Warn,
                None,
                format!("the broker's events are not shown: {}", failure.cause()),
                "castra status shows what the broker knows",
            ));
        }
    }
}

fn at_its_end(path: &Path) -> Result<JournalReader> {
    let mut journal = JournalReader::open(path)?;
    let end = journal.backward(true)?.end()?;
    journal.go_to(end);
    Ok(journal)
}

fn of_interest(line: &str, names: &HashSet<String>) -> Option<Stamped> {
    let stamped = Stamped::from_contract_line(line)?;
    let vm = match &stamped.event {
        Event::BrokerHandshake { vm, .. } | Event::BrokerBackpressure { vm, .. } => vm.as_ref(),
        Event::BrokerSession { vm, .. }
        | Event::BrokerFreshness { vm, .. }
        | Event::VmExited { vm, .. }
        | Event::VmPaused { vm, .. }
        | Event::VmResumed { vm, .. }
        | Event::VmRebooted { vm, .. } => Some(vm),
        Event::BrokerStarted { .. } | Event::BrokerStopped { .. } => return Some(stamped),
        _ => None,
    }?;
    names.contains(&vm.key()).then_some(stamped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::lines::journal::{Journal, Rotation};
    use crate::core::reporter::Reporter;
    use crate::core::scratch::Scratch;

    fn freshness(vm: &str, seq: u64) -> String {
        let stamped = Stamped {
            ts: "2026-11-21T10:00:00.000Z".to_owned(),
            offset_ms: 0,
            seq,
            run: "r-1".into(),
            event: Event::BrokerFreshness {
                vm: vm.parse().unwrap(),
                reachable: true,
                last_handshake_age_ms: Some(0),
            },
        };
        stamped.contract_line()
    }

    #[test]
    fn only_new_events_on_these_vms_pass_and_rotation_loses_none() {
        let scratch = Scratch::new("relay");
        let path = scratch.path("events-broker.jsonl");
        let small = Rotation {
            max_bytes: 300,
            keep: 900,
        };
        let mut journal = Journal::open(&path, small).unwrap();
        journal.append(&freshness("web", 1)).unwrap();
        let relay = BrokerEvents::from_now(&path, HashSet::from(["web".to_owned()]));
        for seq in 2..200 {
            let vm = if seq % 2 == 0 { "Web" } else { "db" };
            journal.append(&freshness(vm, seq)).unwrap();
        }
        let done = Cancel::new();
        done.request();
        let mut heard: Vec<Stamped> = Vec::new();
        relay.follow(&Emitter::new(&mut heard), &done);
        let seqs: Vec<u64> = heard.iter().map(|stamped| stamped.seq).collect();
        assert_eq!(seqs, (2..200).step_by(2).collect::<Vec<u64>>());
    }

    /// What a reporter that hands on lines gets.
    struct Lines(Vec<String>);

    impl Reporter for Lines {
        fn report(&mut self, event: &Stamped) {
            self.0.push(event.contract_line());
        }

        fn report_line(&mut self, _event: &Stamped, line: &str) {
            self.0.push(line.to_owned());
        }
    }

    #[test]
    fn a_line_passes_byte_for_byte() {
        let scratch = Scratch::new("relay-bytes");
        let path = scratch.path("events-broker.jsonl");
        let mut journal = Journal::open(&path, Rotation::default()).unwrap();
        let relay = BrokerEvents::from_now(&path, HashSet::from(["web".to_owned()]));
        // As a broker of another version may write it.
        let line = freshness("web", 1).replace("\"reachable\":", "\"later\": {\"a\":1}, \"reachable\": ");
        journal.append(&line).unwrap();
        let done = Cancel::new();
        done.request();
        let mut heard = Lines(Vec::new());
        relay.follow(&Emitter::new(&mut heard), &done);
        assert_eq!(heard.0, [line]);
    }

    #[test]
    fn what_the_broker_tells_of_itself_passes_up_to_the_end_of_the_work() {
        let scratch = Scratch::new("relay-own");
        let path = scratch.path("events-broker.jsonl");
        let mut journal = Journal::open(&path, Rotation::default()).unwrap();
        let relay = BrokerEvents::from_now(&path, HashSet::new());
        let mut heard: Vec<Stamped> = Vec::new();
        let emitter = Emitter::new(&mut heard);
        let own = |event: Event| Stamped {
            event,
            ..Stamped::from_contract_line(&freshness("web", 1)).unwrap()
        };
        relay.during(&emitter, || {
            journal.append(&freshness("web", 1)).unwrap();
            let (pid, port) = (1, 2);
            for event in [
                Event::BrokerStarted { pid, port },
                Event::BrokerStopped { pid, port },
            ] {
                journal.append(&own(event).contract_line()).unwrap();
            }
        });
        drop(emitter);
        let kinds: Vec<&str> = heard.iter().map(|heard| heard.event.contract_type()).collect();
        assert_eq!(kinds, ["broker.started", "broker.stopped"]);
    }
}
