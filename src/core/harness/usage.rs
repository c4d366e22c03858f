//! What agents used: tokens by thread and by day, beside the time that VMs ran.
//!
//! Here: the sums, and the spans in which VMs ran, from the journal. Not here: the records they
//! come from (`ledger`), or how a sum is shown (`app`).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::Tokens;
use super::ledger::{Session, ThreadRecord, day_of};
use crate::core::events::Event;
use crate::core::events::contract::Stamped;
use crate::core::name::VmName;
use crate::core::time;

const DAY: Duration = Duration::from_secs(86_400);

/// A time in which a VM ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The VM.
    pub vm: VmName,
    /// From.
    pub began: SystemTime,
    /// To.
    pub ended: SystemTime,
}

/// One thread's use.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ThreadUse {
    /// Its id.
    pub thread: String,
    /// The agent.
    pub agent: String,
    /// Turns begun.
    pub turns: u64,
    /// Tokens of all turns.
    #[serde(flatten)]
    pub tokens: Tokens,
    /// How long its processes ran, ms.
    pub agent_ms: u64,
    /// How long VMs ran meanwhile, each counted, ms.
    pub vm_ms: u64,
}

/// One day's use.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct DayUse {
    /// The day, UTC.
    pub day: String,
    /// Tokens of the turns that ended on it.
    #[serde(flatten)]
    pub tokens: Tokens,
    /// How long agents ran, ms.
    pub agent_ms: u64,
    /// How long VMs ran, each counted, ms.
    pub vm_ms: u64,
}

/// Threads, days and sums.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Usage {
    /// By thread, the most recent last.
    pub threads: Vec<ThreadUse>,
    /// By day; days without use are left out.
    pub days: Vec<DayUse>,
    /// The sums.
    pub total: DayUse,
}

/// Adds up threads and days.
pub fn sum(records: &[ThreadRecord], spans: &[Span]) -> Usage {
    let mut days: BTreeMap<String, DayUse> = BTreeMap::new();
    let mut threads = Vec::new();
    for record in records {
        let account = record.account();
        let (mut agent_ms, mut vm_ms) = (0, 0);
        for session in record.all() {
            for (day, tokens) in &session.days {
                let of_day = days.entry(day.clone()).or_default();
                of_day.tokens = of_day.tokens.plus(*tokens);
            }
        }
        for (began, ended) in record.sessions.iter().filter_map(times) {
            agent_ms += millis(began, ended);
            vm_ms += spans
                .iter()
                .map(|span| millis(span.began.max(began), span.ended.min(ended)))
                .sum::<u64>();
            for (day, ms) in by_day(began, ended) {
                days.entry(day).or_default().agent_ms += ms;
            }
        }
        threads.push(ThreadUse {
            thread: record.thread.clone(),
            agent: record.agent.clone(),
            turns: account.turns,
            tokens: account.tokens,
            agent_ms,
            vm_ms,
        });
    }
    for span in spans {
        for (day, ms) in by_day(span.began, span.ended) {
            days.entry(day).or_default().vm_ms += ms;
        }
    }
    let days: Vec<DayUse> = days
        .into_iter()
        .map(|(day, of_day)| DayUse { day, ..of_day })
        .filter(|of_day| of_day.tokens != Tokens::default() || of_day.agent_ms + of_day.vm_ms > 0)
        .collect();
    let total = days.iter().fold(
        DayUse {
            day: "total".into(),
            ..DayUse::default()
        },
        |sum, day| DayUse {
            day: sum.day,
            tokens: sum.tokens.plus(day.tokens),
            agent_ms: sum.agent_ms + day.agent_ms,
            vm_ms: sum.vm_ms + day.vm_ms,
        },
    );
    Usage { threads, days, total }
}

fn times(session: &Session) -> Option<(SystemTime, SystemTime)> {
    let began = humantime::parse_rfc3339(&session.began).ok()?;
    let ended = humantime::parse_rfc3339(&session.ended).ok()?;
    Some((began, ended))
}

/// Milliseconds from one moment to another; none if that is before it.
fn millis(began: SystemTime, ended: SystemTime) -> u64 {
    time::millis(ended.duration_since(began).unwrap_or_default())
}

/// A span cut at midnight, UTC.
fn by_day(began: SystemTime, ended: SystemTime) -> Vec<(String, u64)> {
    /// Longer spans come from a wrong clock.
    const MAX_DAYS: usize = 4000;
    let mut days = Vec::new();
    let mut from = began;
    while from < ended && days.len() < MAX_DAYS {
        let since_epoch = from.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let into_day = Duration::new(since_epoch.as_secs() % DAY.as_secs(), since_epoch.subsec_nanos());
        let midnight = from + (DAY - into_day);
        let to = midnight.min(ended);
        days.push((day_of(from), millis(from, to)));
        from = to;
    }
    days
}

/// When which VM ran, by these events of the journal: from `launched` to the end that was told. VMs in `running`
/// run until `now`; of others whose end nobody told nothing is known after their launch.
pub fn vm_spans(
    events: impl IntoIterator<Item = Stamped>,
    running: &HashSet<VmName>,
    now: SystemTime,
) -> Vec<Span> {
    let mut open: HashMap<VmName, SystemTime> = HashMap::new();
    let mut spans = Vec::new();
    for stamped in events {
        let Ok(at) = humantime::parse_rfc3339(&stamped.ts) else {
            continue;
        };
        match stamped.event {
            Event::VmLaunched { vm, .. } => {
                open.insert(vm, at);
            }
            Event::VmExited { vm, .. } | Event::ShutdownComplete { vm, .. } => {
                if let Some(began) = open.remove(&vm) {
                    spans.push(Span { vm, began, ended: at });
                }
            }
            _ => {}
        }
    }
    let still = open.into_iter().filter(|(vm, _)| running.contains(vm));
    spans.extend(still.map(|(vm, began)| Span {
        vm,
        began,
        ended: now,
    }));
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SystemTime {
        humantime::parse_rfc3339(text).unwrap()
    }

    #[test]
    fn days_end_at_midnight() {
        assert_eq!(
            by_day(at("2026-11-20T23:59:59.000Z"), at("2026-11-22T00:00:02.500Z")),
            [
                ("2026-11-20".to_owned(), 1000),
                ("2026-11-21".to_owned(), 86_400_000),
                ("2026-11-22".to_owned(), 2500)
            ]
        );
        assert!(by_day(at("2026-11-21T10:00:00Z"), at("2026-11-21T09:00:00Z")).is_empty());
    }

    #[test]
    fn tokens_meet_the_time_that_vms_ran() {
        let tokens = |prompt| Tokens {
            prompt,
            cached: 1,
            completion: 2,
        };
        let session = |began: &str, ended: &str, day: &str, prompt| Session {
            began: began.into(),
            ended: ended.into(),
            turns: 1,
            days: BTreeMap::from([(day.to_owned(), tokens(prompt))]),
            ..Session::default()
        };
        let record = ThreadRecord {
            thread: "t".into(),
            agent: "codex".into(),
            sessions: vec![
                session("2026-11-20T10:00:00Z", "2026-11-20T10:01:00Z", "2026-11-20", 10),
                session("2026-11-21T10:00:00Z", "2026-11-21T10:00:30Z", "2026-11-21", 20),
            ],
            earlier: None,
        };
        let span = |vm: &str, began: &str, ended: &str| Span {
            vm: vm.parse().unwrap(),
            began: at(began),
            ended: at(ended),
        };
        let spans = [
            span("a", "2026-11-20T09:59:00Z", "2026-11-20T10:00:30Z"),
            span("b", "2026-11-20T09:00:00Z", "2026-11-21T12:00:00Z"),
        ];
        let usage = sum(&[record], &spans);
        assert_eq!(usage.threads[0].tokens.prompt, 30);
        assert_eq!(usage.threads[0].agent_ms, 90_000);
        assert_eq!(usage.threads[0].vm_ms, 30_000 + 60_000 + 30_000);
        assert_eq!(usage.days.len(), 2);
        assert_eq!(usage.days[0].tokens.prompt, 10);
        assert_eq!(usage.days[0].agent_ms, 60_000);
        assert_eq!(usage.days[0].vm_ms, 90_000 + 15 * 3_600_000);
        assert_eq!(usage.total.tokens.prompt, 30);
        assert_eq!(usage.total.vm_ms, 90_000 + 27 * 3_600_000);
    }
}
