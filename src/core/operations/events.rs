//! `events`: what the two journals of a project hold, merged by time, and what is added to them.
//!
//! Here: filters, where to begin, merging, waiting for more. Not here: the journals' files
//! (`core::events::kept`), writing them (`core::lines::journal`), or words for people (`app`). A reading
//! command: it writes nothing to the journal.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use crate::core::cancel::Cancel;
use crate::core::events::contract::Stamped;
use crate::core::events::kept::journal_reader::{BackwardReader, JournalReader};
use crate::core::events::kept::{Head, JournalLine};
use crate::core::failure::{Exit, Result};
use crate::core::lines::rotated_log::Position;
use crate::core::reporter::wall_clock;
use crate::core::root::paths::StateRoot;

/// How often new events are looked for: a watcher feels this as "at once".
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Two writers may append lines in another order than that of their times, if one of them waited in between:
/// reading begins this long before a wanted time.
const SLACK: Duration = Duration::from_secs(10);

/// How many lines are sorted at a time: more than others append on a busy machine while one writer waits
/// between taking the time and its turn.
const AHEAD: usize = 1024;

/// Which events are wanted.
#[derive(Clone, Debug)]
pub struct EventsOptions {
    /// Whose journals.
    pub state: StateRoot,
    /// Types; `*` stands for any letters, `?` for any one. None: all.
    pub types: Vec<String>,
    /// VMs, compared without case; none: all events, those about no VM too.
    pub vms: Vec<String>,
    /// Events of this run alone.
    pub run: Option<String>,
    /// Only those with a higher `seq`: how a reader who knows the last one it saw goes on.
    pub after: Option<u64>,
    /// Only events of this time and later.
    pub since: Option<SystemTime>,
    /// Only this many of the last ones.
    pub tail: Option<usize>,
    /// Then wait for more, until `cancel` is raised.
    pub follow: bool,
    /// Ends the waiting.
    pub cancel: Cancel,
}

impl EventsOptions {
    /// Everything that a state root's journals hold.
    pub fn all(state: StateRoot) -> EventsOptions {
        EventsOptions {
            state,
            types: Vec::new(),
            vms: Vec::new(),
            run: None,
            after: None,
            since: None,
            tail: None,
            follow: false,
            cancel: Cancel::new(),
        }
    }
}

/// What the caller gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventsItem {
    /// An event, in order of time among those that are there.
    Event(JournalLine),
    /// No more for now: a good moment to flush a buffer and to check for a reader that is gone. With `follow`
    /// it comes every 50 ms while nothing happens.
    CaughtUp,
}

/// Counts of what was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventsOutcome {
    /// Events passed on.
    pub told: u64,
    /// Lines, or pieces of lines, that aren't events and were skipped, usually of a writer that was killed.
    pub corrupt: u64,
    /// How often, while following, files may have been rotated away unread.
    pub missed: bool,
}

/// Passes on every wanted event, until `take` returns false. Types and fields of a later castra are passed on
/// like any others.
pub fn events(options: &EventsOptions, mut take: impl FnMut(EventsItem) -> bool) -> Result<EventsOutcome> {
    let mut outcome = EventsOutcome::default();
    match tell(options, &mut take, &mut outcome) {
        // A caller that has had enough needs no error of reading.
        Err(failure) if failure.exit == Exit::Io && options.cancel.is_requested() => Ok(outcome),
        told => told.map(|()| outcome),
    }
}

/// All events of one type that this castra understands.
pub(crate) fn events_of_type(state: StateRoot, kind: &str) -> Result<Vec<Stamped>> {
    let options = EventsOptions {
        types: vec![kind.to_owned()],
        ..EventsOptions::all(state)
    };
    let mut all = Vec::new();
    events(&options, |item| {
        if let EventsItem::Event(line) = item {
            all.extend(line.event());
        }
        true
    })?;
    Ok(all)
}

fn tell(
    options: &EventsOptions,
    take: &mut dyn FnMut(EventsItem) -> bool,
    outcome: &mut EventsOutcome,
) -> Result<()> {
    let pick = EventFilter::of(options);
    let mut journals = [
        JournalReader::open(&options.state.events())?.until(&options.cancel),
        JournalReader::open(&options.state.broker_events())?.until(&options.cancel),
    ];
    if let Some(since) = options.since {
        let earlier = wall_clock(since.checked_sub(SLACK).unwrap_or(SystemTime::UNIX_EPOCH));
        for journal in &mut journals {
            journal.skip_before(&earlier)?;
        }
    }
    if let Some(count) = options.tail {
        let places = last(&journals, count, &pick, options.follow)?;
        for (journal, place) in journals.iter_mut().zip(places) {
            journal.go_to(place);
        }
    }

    let mut queues = [SortBuffer::default(), SortBuffer::default()];
    loop {
        for (queue, journal) in queues.iter_mut().zip(&mut journals) {
            queue.fill(|| journal.next(options.follow, |line, head| pick.kept(line, &head)))?;
        }
        let next = first(queues.each_ref().map(SortBuffer::time));
        let listening = match next.and_then(|number| queues[number].pop()) {
            Some(kept) => {
                outcome.told += 1;
                take(EventsItem::Event(kept))
            }
            None => take(EventsItem::CaughtUp) && options.follow && !options.cancel.pause(POLL_INTERVAL),
        };
        if !listening || options.cancel.is_requested() {
            outcome.corrupt = journals.iter().map(|journal| journal.corrupt).sum();
            outcome.missed = journals.iter().any(|journal| journal.missed);
            return Ok(());
        }
    }
}

/// The next events of one journal, sorted. Two writers at once may append lines in another order than
/// that of their times, so some lines ahead are looked at. The lines of one run keep their order
/// whatever the clock did meanwhile.
#[derive(Default)]
struct SortBuffer {
    /// Each with the time by which it is sorted.
    waiting: VecDeque<(String, JournalLine)>,
    /// The journal had no more; it is read again when all of these have been passed on.
    dry: bool,
}

impl SortBuffer {
    fn fill(&mut self, mut more: impl FnMut() -> Result<Option<JournalLine>>) -> Result<()> {
        self.dry &= !self.waiting.is_empty();
        while !self.dry && self.waiting.len() < AHEAD {
            match more()? {
                Some(kept) => self.push(kept),
                None => self.dry = true,
            }
        }
        Ok(())
    }

    fn push(&mut self, kept: JournalLine) {
        let mut time = kept.ts.clone();
        let mut at = self.waiting.len();
        if self.waiting.back().is_some_and(|(last, _)| *last > time) {
            let own = self.waiting.iter().rfind(|(_, before)| before.run == kept.run);
            if let Some((before, _)) = own.filter(|(before, _)| *before > time) {
                time.clone_from(before);
            }
            at = self.waiting.partition_point(|(before, _)| *before <= time);
        }
        self.waiting.insert(at, (time, kept));
    }

    fn time(&self) -> Option<&str> {
        self.waiting.front().map(|(time, _)| time.as_str())
    }

    fn pop(&mut self) -> Option<JournalLine> {
        self.waiting.pop_front().map(|(_, kept)| kept)
    }
}

/// Which of two is first. The times are RFC 3339 in UTC with milliseconds, so the order of the text is the
/// order of time. At the same time the operators' event is first, because the broker reacts to operations.
fn first(times: [Option<&str>; 2]) -> Option<usize> {
    match times {
        [None, None] => None,
        [Some(_), None] => Some(0),
        [None, Some(_)] => Some(1),
        [Some(own), Some(broker)] => Some(usize::from(broker < own)),
    }
}

/// Where the last `count` wanted events begin, in each journal. Only places are kept in memory, so `count`
/// can be large.
fn last(
    journals: &[JournalReader; 2],
    count: usize,
    pick: &EventFilter<'_>,
    follow: bool,
) -> Result<[Position; 2]> {
    let mut reverses = [journals[0].backward(follow)?, journals[1].backward(follow)?];
    let mut places = [reverses[0].end()?, reverses[1].end()?];
    let step = |reverse: &mut BackwardReader<'_>| {
        reverse.next(|_, head| pick.wants(&head).then(|| head.ts.clone().into_owned()))
    };
    let mut heads = [step(&mut reverses[0])?, step(&mut reverses[1])?];
    for _ in 0..count {
        let latest = match &heads {
            [None, None] => break,
            [Some(_), None] => 0,
            [None, Some(_)] => 1,
            [Some((own, _)), Some((broker, _))] => usize::from(broker >= own),
        };
        let next = step(&mut reverses[latest])?;
        if let Some((_, place)) = std::mem::replace(&mut heads[latest], next) {
            places[latest] = place;
        }
    }
    Ok(places)
}

/// The filters, ready to be compared.
struct EventFilter<'o> {
    options: &'o EventsOptions,
    since: Option<String>,
}

impl EventFilter<'_> {
    fn of(options: &EventsOptions) -> EventFilter<'_> {
        EventFilter {
            since: options.since.map(wall_clock),
            options,
        }
    }

    fn wants(&self, head: &Head<'_>) -> bool {
        let options = self.options;
        self.since.as_deref().is_none_or(|since| *head.ts >= *since)
            && (options.types.is_empty() || options.types.iter().any(|glob| matches(glob, &head.kind)))
            && (options.vms.is_empty()
                || head
                    .vm()
                    .is_some_and(|vm| options.vms.iter().any(|name| name.eq_ignore_ascii_case(vm))))
            && options
                .run
                .as_deref()
                .is_none_or(|run| head.run.as_deref() == Some(run))
            && options
                .after
                .is_none_or(|after| head.seq.is_some_and(|seq| seq > after))
    }

    fn kept(&self, line: &str, head: &Head<'_>) -> Option<JournalLine> {
        self.wants(head).then(|| JournalLine {
            line: line.to_owned(),
            ts: head.ts.clone().into_owned(),
            kind: head.kind.clone().into_owned(),
            run: head.run.clone().map(Cow::into_owned),
        })
    }
}

/// Whether a pattern fits the whole word: `*` stands for any letters, `?` for any one.
fn matches(glob: &str, word: &str) -> bool {
    let (glob, word) = (glob.as_bytes(), word.as_bytes());
    let (mut at, mut behind) = (0, 0);
    // Where the last `*` stands, and how much of the word it has taken so far.
    let mut star: Option<(usize, usize)> = None;
    while behind < word.len() {
        match glob.get(at) {
            Some(b'*') => {
                star = Some((at, behind));
                at += 1;
            }
            Some(letter) if *letter == b'?' || *letter == word[behind] => {
                at += 1;
                behind += 1;
            }
            _ => match &mut star {
                None => return false,
                Some((place, taken)) => {
                    *taken += 1;
                    (at, behind) = (*place + 1, *taken);
                }
            },
        }
    }
    glob[at..].iter().all(|letter| *letter == b'*')
}

/// `--since`: so long ago (`90s`, `10m`, `2h`, `1day`), or a time as RFC 3339 has it.
pub fn parse_since(text: &str, now: SystemTime) -> Option<SystemTime> {
    let text = text.trim();
    if let Ok(ago) = humantime::parse_duration(text) {
        return now.checked_sub(ago);
    }
    let upper = text.to_ascii_uppercase();
    // An offset from UTC stands behind the time of day; humantime reads UTC alone.
    let offset = upper.rfind(['+', '-']).filter(|at| upper[..*at].contains(':'));
    let Some(at) = offset else {
        return humantime::parse_rfc3339_weak(&upper).ok();
    };
    let time = humantime::parse_rfc3339_weak(&upper[..at]).ok()?;
    let (hours, minutes) = upper[at + 1..].split_once(':')?;
    let part = |part: &str, most: u64| {
        let digits = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_digit());
        part.parse::<u64>().ok().filter(|value| digits && *value <= most)
    };
    let ahead = Duration::from_secs(part(hours, 23)? * 3600 + part(minutes, 59)? * 60);
    match upper.as_bytes()[at] {
        b'+' => time.checked_sub(ahead),
        _ => time.checked_add(ahead),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::path::Path;

    use super::*;
    use crate::core::scratch::Scratch;

    fn line(ts: u32, kind: &str, vm: &str) -> String {
        format!(
            "{{\"type\":\"{kind}\",\"v\":1,\"ts\":\"2026-11-21T10:00:00.{ts:03}Z\",\"seq\":{ts},\"run\":\"r{}\",\"vm\":{vm}}}\n",
            ts % 2
        )
    }

    /// A state root with five events in four files.
    fn five(scratch: &Scratch) -> EventsOptions {
        let state = StateRoot::new(scratch.dir());
        fs::create_dir_all(state.logs()).unwrap();
        let logs = state.logs();
        let oldest = line(1, "summary", "null") + "{\"torn";
        fs::write(logs.join("events.jsonl.2"), oldest).unwrap();
        fs::write(
            logs.join("events.jsonl.1"),
            line(3, "bootstrap.step", "\"Web-0\""),
        )
        .unwrap();
        fs::write(state.events(), line(5, "vm.teleported", "\"db\"")).unwrap();
        let broker = line(2, "broker.started", "null") + &line(4, "broker.handshake", "\"web-0\"");
        fs::write(state.broker_events(), broker).unwrap();
        EventsOptions::all(state)
    }

    /// The milliseconds of what is handed over.
    fn ask(options: &EventsOptions) -> Vec<String> {
        let mut seen = Vec::new();
        events(options, |told| {
            if let EventsItem::Event(kept) = told {
                seen.push(kept.ts[20..23].to_owned());
            }
            true
        })
        .unwrap();
        seen
    }

    #[test]
    fn both_journals_and_their_rotated_files_in_order_of_time() {
        let scratch = Scratch::new("events");
        let all = EventsOptions::all(StateRoot::new(scratch.dir()));
        assert!(ask(&all).is_empty(), "no journal yet");
        let all = five(&scratch);
        assert_eq!(ask(&all), ["001", "002", "003", "004", "005"]);
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let types = |types: &[&str]| EventsOptions {
            types: words(types),
            ..all.clone()
        };
        assert_eq!(ask(&types(&["broker.*", "summary"])), ["001", "002", "004"]);
        assert_eq!(ask(&types(&["*.st??*"])), ["002", "003"]);
        assert_eq!(ask(&types(&["bootstrap"])), [""; 0]);
        let vms = EventsOptions {
            vms: words(&["WEB-0"]),
            ..all.clone()
        };
        assert_eq!(ask(&vms), ["003", "004"]);
        let run = EventsOptions {
            run: Some("r1".into()),
            ..all.clone()
        };
        assert_eq!(ask(&run), ["001", "003", "005"]);
        let after = EventsOptions {
            after: Some(3),
            ..run
        };
        assert_eq!(ask(&after), ["005"]);
        let outcome = events(&all, |_| true).unwrap();
        assert_eq!((outcome.told, outcome.corrupt, outcome.missed), (5, 1, false));
    }

    #[test]
    fn since_and_tail_leave_out_what_is_before() {
        let scratch = Scratch::new("events-since");
        let all = five(&scratch);
        for first in 0..7 {
            let since = humantime::parse_rfc3339(&format!("2026-11-21T10:00:00.{first:03}Z")).unwrap();
            let since = EventsOptions {
                since: Some(since),
                ..all.clone()
            };
            let wanted: Vec<String> = (first.max(1)..6).map(|ts| format!("{ts:03}")).collect();
            assert_eq!(ask(&since), wanted);
            for count in 0..7 {
                let tail = EventsOptions {
                    tail: Some(count),
                    ..since.clone()
                };
                let from = wanted.len().saturating_sub(count);
                assert_eq!(ask(&tail), wanted[from..], "{first} {count}");
            }
        }
        let two_of_a_run = EventsOptions {
            run: Some("r1".into()),
            tail: Some(2),
            ..all
        };
        assert_eq!(ask(&two_of_a_run), ["003", "005"]);
    }

    #[test]
    fn what_is_added_follows_until_somebody_ends_it() {
        let scratch = Scratch::new("events-follow");
        let options = EventsOptions {
            follow: true,
            tail: Some(1),
            ..five(&scratch)
        };
        let append = |path: &Path, text: &str| {
            let mut file = fs::File::options().append(true).open(path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        };
        let (mut seen, mut caught_up) = (Vec::new(), 0);
        let outcome = events(&options, |told| {
            match told {
                EventsItem::Event(kept) => seen.push(kept.ts[20..23].to_owned()),
                EventsItem::CaughtUp => {
                    caught_up += 1;
                    match caught_up {
                        1 => append(&options.state.broker_events(), &line(6, "broker.stopped", "null")),
                        2 => append(&options.state.events(), "{\"type\":\"mes"),
                        // The torn piece is never cut, and what follows it isn't lost.
                        3 => append(&options.state.events(), &line(7, "summary", "null")),
                        _ => options.cancel.request(),
                    }
                }
            }
            true
        })
        .unwrap();
        assert_eq!(seen, ["005", "006", "007"]);
        assert_eq!((outcome.told, outcome.corrupt), (3, 1));
    }

    #[test]
    fn writers_at_once_come_in_order_of_time_and_runs_in_their_own() {
        let scratch = Scratch::new("events-order");
        let state = StateRoot::new(scratch.dir());
        fs::create_dir_all(state.logs()).unwrap();
        let line = |ts: u32, run: &str, seq: u32| {
            format!(
                "{{\"type\":\"x\",\"ts\":\"2026-11-21T10:00:00.{ts:03}Z\",\"seq\":{seq},\"run\":\"{run}\"}}\n"
            )
        };
        let text = [
            line(3, "a", 0),
            line(1, "b", 0),
            line(5, "b", 1),
            line(4, "a", 1),
            line(2, "a", 2),
            line(6, "c", 0),
        ]
        .concat();
        fs::write(state.events(), text).unwrap();
        let mut seen = Vec::new();
        events(&EventsOptions::all(state), |told| {
            if let EventsItem::Event(kept) = told {
                seen.push(format!("{}{}", kept.run.unwrap(), &kept.ts[22..23]));
            }
            true
        })
        .unwrap();
        // The clock was set back in the midst of run `a`.
        assert_eq!(seen, ["b1", "a3", "a4", "a2", "b5", "c6"]);
    }

    #[test]
    fn whoever_takes_may_stop() {
        let scratch = Scratch::new("events-stop");
        let outcome = events(&five(&scratch), |_| false).unwrap();
        assert_eq!(outcome.told, 1);
    }

    #[test]
    fn patterns_fit_whole_types() {
        for (glob, word, fits) in [
            ("*", "", true),
            ("*", "summary", true),
            ("summary", "summary", true),
            ("summary", "summary.x", false),
            ("boot*", "bootstrap.step", true),
            ("*.step", "bootstrap.step", true),
            ("*s*p", "bootstrap.step", true),
            ("*s*q", "bootstrap.step", false),
            ("b?otstrap.*", "bootstrap.step", true),
            ("?", "", false),
            ("", "", true),
            ("", "x", false),
            ("a*b*c", "a.b.b.c", true),
            ("**", "x", true),
        ] {
            assert_eq!(matches(glob, word), fits, "{glob} {word}");
        }
    }

    #[test]
    fn since_is_a_time_or_so_long_ago() {
        let at = |text: &str| humantime::parse_rfc3339(text).unwrap();
        let now = at("2026-11-21T10:00:00Z");
        for (text, wanted) in [
            ("10m", Some(at("2026-11-21T09:50:00Z"))),
            ("1h 30m", Some(at("2026-11-21T08:30:00Z"))),
            ("2026-11-21T09:00:00Z", Some(at("2026-11-21T09:00:00Z"))),
            ("2026-11-21t09:00:00.25z", Some(at("2026-11-21T09:00:00.25Z"))),
            ("2026-11-21 09:00:00", Some(at("2026-11-21T09:00:00Z"))),
            ("2026-11-21T09:00:00+02:30", Some(at("2026-11-21T06:30:00Z"))),
            ("2026-11-21T09:00:00.5-01:00", Some(at("2026-11-21T10:00:00.5Z"))),
            ("2026-11-21T09:00:00+2", None),
            ("2026-11-21T09:00:00+99:00", None),
            ("yesterday", None),
            ("", None),
            ("10", None),
            ("-10m", None),
        ] {
            assert_eq!(parse_since(text, now), wanted, "{text}");
        }
    }
}
