//! Replay: a session that is behind gets messages from the log, read by its own thread
//! (docs/PROTOCOL.md).
//!
//! Here: in which file a number stands, which lines a session gets, gaps. Not here:
//! when a session is behind or has caught up (`broker::state`), sending (`broker::session_loop`),
//! the newest message of each topic (`broker::last_values`).
//!
//! Numbers ascend in everything that a broker has written, so a number is found by bisection. In a
//! log that was damaged or pasted together they may not. Lines that weren't in order when the
//! broker started are delivered in the order in which they stand in the files; only lines after
//! them are found by bisection.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::core::bus::line::{BusLine, seq_of};
use crate::core::bus::log::MAX_LINE_BYTES;
use crate::core::lines::line_file::{LineFile, Step};
use crate::core::lines::rotated_log::{self, NewestFirst};

use super::frame;
use super::last_values::LastValues;
use super::state::{ReplayPlan, ReplaySubscription};

/// Bytes of one piece, give or take a message (docs/PROTOCOL.md).
const PIECE_BYTES: usize = 64 * 1024;

/// Bytes that are read without finding anything for the session before the thread looks at its
/// socket again.
const SCAN_BYTES: usize = 4 * 1024 * 1024;

/// How often a number that must be in the log is searched: a rotation takes some microseconds.
const FIND_TRIES: u32 = 50;

/// The log of the bus, for sessions that read it.
#[derive(Clone, Debug)]
pub struct ReplayLog {
    path: PathBuf,
    /// The highest number of the lines that weren't in order when the log was opened; 0: all were.
    unordered_upto: Arc<AtomicU64>,
}

impl ReplayLog {
    /// The log at `path` and its rotated files.
    pub fn new(path: PathBuf) -> ReplayLog {
        ReplayLog {
            path,
            unordered_upto: Arc::default(),
        }
    }

    /// Notes that lines up to this number may stand in any order.
    pub fn set_unordered_upto(&self, highest: u64) {
        self.unordered_upto.store(highest, Ordering::Relaxed);
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files, oldest first.
    fn files(&self) -> io::Result<VecDeque<LineFile>> {
        Ok(rotated_log::files(&self.path, MAX_LINE_BYTES, None)?.0)
    }
}

/// What one step of a replay has read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Frames to send; there is more.
    Frames(Vec<u8>),
    /// Frames to send, and the first number that wasn't read: the replay has reached its end.
    End(Vec<u8>, u64),
}

/// The replay of one session.
#[derive(Debug)]
pub struct Replay {
    replay_log: ReplayLog,
    plan: ReplayPlan,
    /// The first number not read.
    next: u64,
    source: Option<LineFile>,
    /// The scan of lines that aren't in order, while it goes on.
    unordered: Option<UnorderedScan>,
    /// The search for the newest messages, while it goes on.
    last_values: Option<Box<LastValues>>,
    newest: VecDeque<Vec<u8>>,
    /// Numbers of subscriptions that got their newest messages.
    served: BTreeSet<u64>,
}

/// A scan of lines in the order in which they stand, oldest file first.
#[derive(Debug)]
struct UnorderedScan {
    upto: u64,
    /// The subscriptions that this scan serves; others may have come since it began.
    serving: Vec<u64>,
    files: VecDeque<LineFile>,
}

impl Replay {
    /// A replay for a session that fell behind.
    pub fn new(replay_log: ReplayLog, plan: ReplayPlan) -> Replay {
        Replay {
            next: first_of(&plan.subscriptions),
            replay_log,
            plan,
            source: None,
            unordered: None,
            last_values: None,
            newest: VecDeque::new(),
            served: BTreeSet::new(),
        }
    }

    /// Goes on with a newer plan. Subscriptions that were in the old plan go on where the replay
    /// is.
    pub fn update(&mut self, mut plan: ReplayPlan) {
        for wanted in &mut plan.subscriptions {
            let known = self
                .plan
                .subscriptions
                .iter()
                .find(|known| known.number == wanted.number);
            if let Some(known) = known {
                wanted.next = known.next.max(self.next);
            }
        }
        let first = first_of(&plan.subscriptions);
        if first < self.next {
            self.source = None;
        }
        // Bytes beyond the end of the old plan may have been cut off since, and other messages may
        // stand there now.
        if let Some(source) = &mut self.source {
            source.go_to(source.position());
        }
        if !plan.subscriptions.is_empty() {
            self.next = first;
        }
        self.plan = plan;
    }

    /// The next frames.
    pub fn next_piece(&mut self) -> io::Result<Piece> {
        if let Some(piece) = self.newest_first()? {
            return Ok(piece);
        }
        let mut out = Vec::new();
        let mut scanned = 0;
        let mut tries = 0;
        if self.plan.subscriptions.is_empty() {
            self.next = self.next.max(self.plan.upto + 1);
        }
        while self.next <= self.plan.upto {
            if out.len() >= PIECE_BYTES || scanned >= SCAN_BYTES {
                return Ok(Piece::Frames(out));
            }
            if self.next <= self.replay_log.unordered_upto.load(Ordering::Relaxed) {
                self.deliver_unordered(&mut out, &mut scanned)?;
                continue;
            }
            if self.source.is_none() && !self.find(&mut out)? {
                tries += 1;
                self.missing(tries, &mut out);
                continue;
            }
            let Some(source) = self.source.as_mut() else {
                continue;
            };
            let line = match source.next_line()? {
                Step::Line(line) => source.bytes(line),
                Step::TooLong => continue,
                Step::Pending => {
                    // The end of this file: after a rotated file comes a newer one.
                    self.source = None;
                    tries += 1;
                    if tries > 2 {
                        self.missing(tries, &mut out);
                    }
                    continue;
                }
            };
            scanned += line.len() + 1;
            let Some(parsed) = BusLine::parse(line) else {
                continue;
            };
            if parsed.seq < self.next {
                continue;
            }
            if parsed.seq > self.plan.upto {
                self.next = self.plan.upto + 1;
                // This line is read again with the next plan.
                self.source = None;
                break;
            }
            tries = 0;
            if self.plan.wants(parsed.seq, parsed.topic, &|_| true) {
                frame::delivery(line, &mut out);
            }
            self.next = parsed.seq + 1;
        }
        Ok(Piece::End(out, self.next))
    }

    /// The newest messages for subscriptions that haven't got them yet.
    fn newest_first(&mut self) -> io::Result<Option<Piece>> {
        if let Some(piece) = self.newest.pop_front() {
            return Ok(Some(Piece::Frames(piece)));
        }
        if self.last_values.is_none() {
            let is_due =
                |wanted: &&ReplaySubscription| wanted.last.is_some() && !self.served.contains(&wanted.number);
            let due: Vec<ReplaySubscription> =
                self.plan.subscriptions.iter().filter(is_due).cloned().collect();
            if due.is_empty() {
                return Ok(None);
            }
            self.served.extend(due.iter().map(|wanted| wanted.number));
            let files = self.replay_log.files()?;
            self.last_values = Some(Box::new(LastValues::new(&self.plan, due, files)));
        }
        if let Some(mut last_values) = self.last_values.take() {
            match last_values.step()? {
                true => self.newest = last_values.pieces(),
                false => self.last_values = Some(last_values),
            }
        }
        Ok(Some(Piece::Frames(self.newest.pop_front().unwrap_or_default())))
    }

    /// Delivers lines that aren't in order, one after the other.
    fn deliver_unordered(&mut self, out: &mut Vec<u8>, scanned: &mut usize) -> io::Result<()> {
        let mut unordered = match self.unordered.take() {
            Some(unordered) => unordered,
            None => {
                let upto = self.replay_log.unordered_upto.load(Ordering::Relaxed);
                let wanted = self.plan.subscriptions.iter();
                UnorderedScan {
                    upto,
                    serving: wanted
                        .filter(|wanted| wanted.next.max(wanted.first) <= upto)
                        .map(|wanted| wanted.number)
                        .collect(),
                    files: self.replay_log.files()?,
                }
            }
        };
        while out.len() < PIECE_BYTES && *scanned < SCAN_BYTES {
            let Some(source) = unordered.files.front_mut() else {
                return self.finish_unordered(&unordered);
            };
            let line = match source.next_line()? {
                Step::Line(line) => source.bytes(line),
                Step::TooLong => continue,
                Step::Pending => {
                    unordered.files.pop_front();
                    continue;
                }
            };
            *scanned += line.len() + 1;
            if let Some(parsed) = BusLine::parse(line).filter(|parsed| parsed.seq <= unordered.upto)
                && self.plan.wants(parsed.seq, parsed.topic, &|wanted| {
                    wanted.next > unordered.upto || unordered.serving.contains(&wanted.number)
                })
            {
                frame::delivery(line, out);
            }
        }
        self.unordered = Some(unordered);
        Ok(())
    }

    fn finish_unordered(&mut self, unordered: &UnorderedScan) -> io::Result<()> {
        for wanted in &mut self.plan.subscriptions {
            if unordered.serving.contains(&wanted.number) {
                wanted.next = wanted.next.max(unordered.upto + 1);
            }
        }
        self.next = first_of(&self.plan.subscriptions);
        self.source = None;
        Ok(())
    }

    /// A number that should be in the log wasn't found: at first a rotation may be under way, after
    /// some tries it counts as gone.
    fn missing(&mut self, tries: u32, out: &mut Vec<u8>) {
        if tries < FIND_TRIES {
            std::thread::sleep(std::time::Duration::from_millis(1));
            return;
        }
        out.extend_from_slice(&frame::gap(self.next, self.plan.upto));
        self.next = self.plan.upto + 1;
    }

    /// Opens the file that holds the next number. False: there is none.
    fn find(&mut self, out: &mut Vec<u8>) -> io::Result<bool> {
        // The oldest file that begins after the number.
        let mut oldest: Option<(u64, LineFile)> = None;
        let path = self.replay_log.path.clone();
        let mut newest_first = NewestFirst::of(&path, MAX_LINE_BYTES);
        while let Some(mut file) = newest_first.next_file()? {
            let Some(first) = first_seq(&mut file)? else {
                continue;
            };
            if first <= self.next {
                go_to_seq(&mut file, self.next)?;
                let at = file.position();
                let reaches = first_seq(&mut file)?.is_some();
                file.go_to(at);
                if oldest.is_none() || reaches {
                    self.source = Some(file);
                    return Ok(true);
                }
                // This file ends before the number, and the next one begins after it: there is a
                // gap.
                break;
            }
            oldest = Some((first, file));
        }
        let Some((first, mut file)) = oldest else {
            return Ok(false);
        };
        let to = (first - 1).min(self.plan.upto);
        out.extend_from_slice(&frame::gap(self.next, to));
        self.next = to + 1;
        go_to_seq(&mut file, self.next)?;
        self.source = Some(file);
        Ok(true)
    }
}

fn first_of(wanted: &[ReplaySubscription]) -> u64 {
    wanted
        .iter()
        .map(|wanted| wanted.next.max(wanted.first))
        .min()
        .unwrap_or(0)
}

impl ReplayPlan {
    /// Whether a session gets this message now: a subscription wants it, and no subscription has
    /// delivered it already. `counts`: which subscriptions are considered.
    pub fn wants(&self, seq: u64, topic: &str, counts: &dyn Fn(&ReplaySubscription) -> bool) -> bool {
        let mut wanted = false;
        for one in self.subscriptions.iter().filter(|one| counts(one)) {
            if seq < one.first || !one.pattern.matches(topic) {
                continue;
            }
            if seq < one.next {
                return false;
            }
            wanted = true;
        }
        wanted && self.reader.may_read(topic)
    }
}

/// The first number in a file, read from its beginning; it goes on behind that line.
fn first_seq(file: &mut LineFile) -> io::Result<Option<u64>> {
    loop {
        match file.next_line()? {
            Step::Line(line) => {
                if let Some(seq) = seq_of(file.bytes(line)) {
                    return Ok(Some(seq));
                }
            }
            Step::TooLong => {}
            Step::Pending => return Ok(None),
        }
    }
}

/// Goes to the line of this number, or the next one after it.
fn go_to_seq(file: &mut LineFile, seq: u64) -> io::Result<()> {
    file.skip_while(&|line| Some(seq_of(line)? < seq)).map(drop)
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::broker::state::Peer;
    use crate::core::broker::state::topics::Reader;
    use crate::core::lines::journal::rotated;
    use crate::core::scratch::Scratch;
    use std::fs;

    fn line(seq: u64) -> String {
        let topic = ["a", "b", "vm:db"][usize::try_from(seq % 3).unwrap()];
        format!("{{\"seq\":{seq},\"ts\":1,\"vm\":\"web-0\",\"topic\":\"{topic}\",\"payload\":{seq}}}\n")
    }

    fn plan(upto: u64, wanted: &[(&str, u64, u64)]) -> ReplayPlan {
        ReplayPlan {
            upto,
            reader: Reader {
                peer: Peer::Guest,
                key: "web-0".into(),
                second: None,
            },
            subscriptions: wanted
                .iter()
                .enumerate()
                .map(|(number, (pattern, first, next))| ReplaySubscription {
                    pattern: pattern.parse().unwrap(),
                    number: number as u64,
                    first: *first,
                    next: *next,
                    last: None,
                })
                .collect(),
        }
    }

    /// Frames as `5 6 gap1-4`.
    fn said(frames: &[u8]) -> String {
        let mut words = Vec::new();
        let mut rest = frames;
        while let Some((head, body)) = rest.split_first_chunk::<4>() {
            let (body, more) = body.split_at(usize::try_from(u32::from_be_bytes(*head)).unwrap());
            let value: serde_json::Value = serde_json::from_slice(body).unwrap();
            words.push(match value["type"].as_str().unwrap() {
                "gap" => format!("gap{}-{}", value["from"], value["to"]),
                _ => value["seq"].to_string(),
            });
            rest = more;
        }
        words.join(" ")
    }

    fn all(replay: &mut Replay) -> (String, u64) {
        let mut frames = Vec::new();
        loop {
            match replay.next_piece().unwrap() {
                Piece::Frames(more) => frames.extend(more),
                Piece::End(more, next) => {
                    frames.extend(more);
                    return (said(&frames), next);
                }
            }
        }
    }

    #[test]
    fn every_number_is_found_in_every_file() {
        let scratch = Scratch::new("replay");
        let path = scratch.path("bus.log");
        let text = |range: std::ops::RangeInclusive<u64>| range.map(line).collect::<String>();
        fs::write(rotated(&path, 2), text(10..=3000)).unwrap();
        fs::write(rotated(&path, 1), text(3001..=6000)).unwrap();
        fs::write(&path, text(6001..=9000)).unwrap();
        let expected = |from: u64, upto: u64| -> String {
            let wanted = (from..=upto).filter(|seq| seq % 3 == 0);
            wanted.map(|seq| seq.to_string()).collect::<Vec<_>>().join(" ")
        };
        for from in [10, 11, 12, 2999, 3000, 3001, 4321, 6000, 6001, 8998, 9000] {
            let mut replay = Replay::new(ReplayLog::new(path.clone()), plan(9000, &[("a", from, from)]));
            assert_eq!(all(&mut replay), (expected(from, 9000), 9001), "from {from}");
        }
        let mut replay = Replay::new(ReplayLog::new(path.clone()), plan(20, &[("*", 1, 1)]));
        let (told, next) = all(&mut replay);
        assert_eq!(
            (told.as_str(), next),
            ("gap1-9 10 12 13 15 16 18 19", 21),
            "nothing of another VM's"
        );
        replay.update(plan(24, &[("*", 1, 1)]));
        assert_eq!(
            all(&mut replay),
            ("21 22 24".into(), 25),
            "it goes on where it was"
        );
    }

    #[test]
    fn what_one_subscription_had_another_does_not_bring_again() {
        let plan = plan(100, &[("a", 10, 50), ("*", 1, 1)]);
        let got: Vec<bool> = [(9, "a"), (10, "a"), (10, "b"), (49, "a"), (50, "a")]
            .iter()
            .map(|(seq, topic)| plan.wants(*seq, topic, &|_| true))
            .collect();
        assert_eq!(got, [true, false, true, false, true]);
    }

    #[test]
    fn a_hole_between_two_files_is_no_end() {
        let scratch = Scratch::new("replay-hole");
        let path = scratch.path("bus.log");
        let text = |range: std::ops::RangeInclusive<u64>| range.map(line).collect::<String>();
        fs::write(rotated(&path, 1), text(1..=6)).unwrap();
        fs::write(&path, text(100..=105)).unwrap();
        let from = |first: u64| {
            let mut replay = Replay::new(ReplayLog::new(path.clone()), plan(105, &[("a", first, first)]));
            all(&mut replay)
        };
        let behind = "gap7-99 102 105";
        assert_eq!(from(7), (behind.into(), 106));
        assert_eq!(from(5), (format!("6 {behind}"), 106));
        assert_eq!(from(50).0, "gap50-99 102 105");
        assert_eq!(from(100).0, "102 105");
    }

    #[test]
    fn what_was_read_ahead_and_cut_back_is_not_told() {
        let scratch = Scratch::new("replay-cut");
        let path = scratch.path("bus.log");
        let said = |seq: u64, payload: &str| {
            format!("{{\"seq\":{seq},\"ts\":1,\"vm\":\"web-0\",\"topic\":\"a\",\"payload\":{payload}}}\n")
        };
        // Number 2 is being written, but the disk is full.
        fs::write(&path, said(1, "1") + &said(2, "\"never acked\"")).unwrap();
        let mut replay = Replay::new(ReplayLog::new(path.clone()), plan(1, &[("a", 1, 1)]));
        assert!(matches!(replay.next_piece().unwrap(), Piece::End(_, 2)));
        fs::write(&path, said(1, "1") + &said(2, "\"acked\"")).unwrap();
        replay.update(plan(2, &[("a", 1, 1)]));
        let Piece::End(frames, 3) = replay.next_piece().unwrap() else {
            panic!("no end");
        };
        let text = String::from_utf8_lossy(&frames).into_owned();
        assert!(text.contains("\"acked\"") && !text.contains("never"), "{text}");
    }

    #[test]
    fn numbers_that_go_back_lose_no_message() {
        let scratch = Scratch::new("replay-unordered");
        let path = scratch.path("bus.log");
        let text = |seqs: &[u64]| seqs.iter().map(|seq| line(*seq)).collect::<String>();
        // Pasted together: 9 before 3, 12 twice, and a number that is none; then our own.
        fs::write(rotated(&path, 1), text(&[6, 9, 3])).unwrap();
        fs::write(&path, text(&[12, u64::MAX, 99, 12, 15, 102, 105])).unwrap();
        let replay_log = ReplayLog::new(path);
        replay_log.set_unordered_upto(99);
        let from = |wanted: &[(&str, u64, u64)]| all(&mut Replay::new(replay_log.clone(), plan(105, wanted)));
        assert_eq!(from(&[("a", 1, 1)]), ("6 9 3 12 99 12 15 102 105".into(), 106));
        assert_eq!(from(&[("a", 10, 10)]).0, "12 99 12 15 102 105");
        assert_eq!(from(&[("a", 100, 100)]).0, "102 105");
        assert_eq!(
            from(&[("a", 1, 100), ("*", 1, 1)]).0,
            "102 105",
            "it had them all"
        );
        // A subscription that comes on the way gets all of it, and the others nothing twice.
        let mut replay = Replay::new(replay_log.clone(), plan(105, &[("a", 12, 12)]));
        let mut out = Vec::new();
        replay
            .deliver_unordered(&mut out, &mut (SCAN_BYTES - 100))
            .unwrap();
        replay.update(plan(105, &[("a", 12, 12), ("*", 1, 1)]));
        let rest = all(&mut replay).0;
        assert_eq!(said(&out) + " " + &rest, " 12 99 12 15 6 9 3 102 105");
    }

    #[test]
    fn a_log_that_is_gone_is_a_gap() {
        let scratch = Scratch::new("replay-gone");
        let mut replay = Replay::new(ReplayLog::new(scratch.path("bus.log")), plan(7, &[("*", 3, 3)]));
        assert_eq!(all(&mut replay), ("gap3-7".into(), 8));
        let empty = Replay::new(ReplayLog::new(scratch.path("bus.log")), plan(7, &[]))
            .next_piece()
            .unwrap();
        assert_eq!(empty, Piece::End(Vec::new(), 8));
    }
}
