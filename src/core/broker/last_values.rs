//! The newest message of each topic, for a subscription that asks for it: found in the log, which
//! is read from its end.
//!
//! Here: the search, in steps, and its limits. Not here: other messages from the log
//! (`broker::replay`), who may ask (`broker::state`).
//!
//! The log is the only store: so the values survive every restart, a publish doesn't pay for them,
//! and they go back as far as the log does.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io;

use crate::core::bus::line::BusLine;
use crate::core::lines::line_file::{Backward, LineFile};

use super::frame;
use super::state::topics::Reader;
use super::state::{ReplayPlan, ReplaySubscription};

/// How many last values of one sender a session gets, and how many bytes: a sender with many topics
/// leaves room for others.
const TOPICS_PER_SENDER: usize = 256;
const BYTES_PER_SENDER: usize = 256 * 1024;

/// The same for all senders together.
const MAX_TOPICS: usize = 4096;
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// How many topics are remembered whose newest message was skipped; about 1 MiB.
const MAX_SKIPPED_TOPICS: usize = 64 * 1024;

/// Read at once.
const PIECE_BYTES: usize = 64 * 1024;

/// Bytes read in one step; between steps the thread looks at its socket.
const STEP_BYTES: usize = 4 * 1024 * 1024;

/// A search that goes on.
#[derive(Debug)]
pub struct LastValues {
    reader: Reader,
    wanted: Vec<ReplaySubscription>,
    /// Oldest first; the last one is being read.
    files: VecDeque<LineFile>,
    backward: Option<Backward>,
    seen: HashSet<String>,
    /// Hashes of topics whose newest message was skipped: an older message isn't the last value.
    skipped: HashSet<u64>,
    hasher: RandomState,
    /// By sender: topics and bytes.
    taken: BTreeMap<String, (usize, usize)>,
    bytes: usize,
    /// Newest first.
    found: Vec<(u64, Vec<u8>)>,
}

impl LastValues {
    /// Searches these files, oldest first, for these subscriptions of a plan.
    pub fn new(plan: &ReplayPlan, wanted: Vec<ReplaySubscription>, files: VecDeque<LineFile>) -> LastValues {
        LastValues {
            reader: plan.reader.clone(),
            wanted,
            files,
            backward: None,
            seen: HashSet::new(),
            skipped: HashSet::new(),
            hasher: RandomState::new(),
            taken: BTreeMap::new(),
            bytes: 0,
            found: Vec::new(),
        }
    }

    /// Continues the search; true: it is done.
    pub fn step(&mut self) -> io::Result<bool> {
        let mut read = 0;
        while read < STEP_BYTES {
            if self.is_enough() {
                return Ok(true);
            }
            let Some(file) = self.files.back() else {
                return Ok(true);
            };
            let mut lines = match self.backward.take() {
                Some(lines) => lines,
                None => Backward::whole(file)?,
            };
            match lines.next_line(file)? {
                Some((_, line)) => {
                    read += line.len() + 1;
                    self.consider(line);
                    self.backward = Some(lines);
                }
                None => drop(self.files.pop_back()),
            }
        }
        Ok(false)
    }

    /// The messages found, as deliveries in the order of their numbers, in pieces of about 64 KiB.
    pub fn pieces(mut self) -> VecDeque<Vec<u8>> {
        self.found.sort_by_key(|(seq, _)| *seq);
        let mut pieces = VecDeque::new();
        let mut piece = Vec::new();
        for (_, line) in self.found {
            frame::delivery(&line, &mut piece);
            if piece.len() >= PIECE_BYTES {
                pieces.push_back(std::mem::take(&mut piece));
            }
        }
        if !piece.is_empty() {
            pieces.push_back(piece);
        }
        pieces
    }

    /// Whether no further line could be added.
    fn is_enough(&self) -> bool {
        let is_exact =
            |wanted: &ReplaySubscription| !wanted.pattern.is_prefix() && !wanted.pattern.has_inner_wildcard();
        self.found.len() >= MAX_TOPICS
            || self.bytes >= MAX_BYTES
            || (self.wanted.iter().all(is_exact)
                && self
                    .wanted
                    .iter()
                    .all(|wanted| self.seen.contains(wanted.pattern.as_str())))
    }

    fn consider(&mut self, line: &[u8]) {
        let Some(parsed) = BusLine::parse(line) else {
            return;
        };
        let is_past = |wanted: &ReplaySubscription| wanted.last.is_some_and(|last| parsed.seq <= last);
        let wants = |wanted: &ReplaySubscription| is_past(wanted) && wanted.pattern.matches(parsed.topic);
        if !self.wanted.iter().any(wants)
            || self.seen.contains(parsed.topic)
            || !self.reader.may_read(parsed.topic)
        {
            return;
        }
        let hash = self.hasher.hash_one(parsed.topic);
        if self.skipped.contains(&hash) {
            return;
        }
        let taken = self.taken.entry(parsed.vm.to_owned()).or_default();
        // A sender's newest value is always taken, however long it is.
        if taken.0 >= TOPICS_PER_SENDER || (taken.0 > 0 && taken.1 + line.len() > BYTES_PER_SENDER) {
            if self.skipped.len() < MAX_SKIPPED_TOPICS {
                self.skipped.insert(hash);
            }
            return;
        }
        *taken = (taken.0 + 1, taken.1 + line.len());
        self.seen.insert(parsed.topic.to_owned());
        self.bytes += line.len();
        self.found.push((parsed.seq, line.to_vec()));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::core::broker::state::Peer;
    use crate::core::bus::log::MAX_LINE_BYTES;
    use crate::core::scratch::Scratch;

    fn line(seq: u64, vm: &str, topic: &str, pad: usize) -> String {
        let pad = "x".repeat(pad);
        format!("{{\"seq\":{seq},\"ts\":1,\"vm\":\"{vm}\",\"topic\":\"{topic}\",\"payload\":\"{pad}\"}}\n")
    }

    /// The numbers found by web-0 in these files, oldest first.
    fn found(files: &[&Path], patterns: &[&str], first: u64) -> Vec<u64> {
        let wanted: Vec<ReplaySubscription> = (0..)
            .zip(patterns)
            .map(|(number, pattern)| ReplaySubscription {
                pattern: pattern.parse().unwrap(),
                number,
                first,
                next: first,
                last: Some(first - 1),
            })
            .collect();
        let plan = ReplayPlan {
            upto: 1 << 40,
            reader: Reader {
                peer: Peer::Guest,
                key: "web-0".into(),
                second: None,
            },
            subscriptions: wanted.clone(),
        };
        let open = |path: &&Path| LineFile::open(path, MAX_LINE_BYTES).unwrap().unwrap();
        let files = files.iter().map(open).collect();
        let mut lasts = LastValues::new(&plan, wanted, files);
        while !lasts.step().unwrap() {}
        let bytes: Vec<u8> = lasts.pieces().into_iter().flatten().collect();
        let mut rest = bytes.as_slice();
        let mut seqs = Vec::new();
        while let Some((head, body)) = rest.split_first_chunk::<4>() {
            let (body, more) = body.split_at(u32::from_be_bytes(*head) as usize);
            let value: serde_json::Value = serde_json::from_slice(body).unwrap();
            seqs.push(value["seq"].as_u64().unwrap());
            rest = more;
        }
        seqs
    }

    #[test]
    fn the_newest_of_each_topic_that_may_be_read() {
        let scratch = Scratch::new("lasts");
        let (old, new) = (scratch.path("bus.log.1"), scratch.path("bus.log"));
        let text = [
            line(1, "a", "x/a", 10),
            line(2, "a", "x/b", 100_000),
            line(3, "b", "x/a", 10),
            line(4, "b", "vm:db", 10),
            line(5, "b", "vm:web-0", 10),
        ];
        fs::write(&old, text.concat()).unwrap();
        let text = [
            "no message\n".to_owned(),
            line(6, "a", "y/1/z", 10),
            line(7, "a", "x/c", 70_000),
            line(8, "b", "x/c", 10),
            line(9, "a", "x/c", 10).trim_end().to_owned(),
        ];
        fs::write(&new, text.concat()).unwrap();
        let both = [old.as_path(), new.as_path()];
        assert_eq!(found(&both, &["*"], 100), [2, 3, 5, 6, 8]);
        assert_eq!(found(&both, &["x/*"], 8), [2, 3, 7], "before the first number");
        assert_eq!(found(&both, &["x/a"], 3), [1]);
        assert_eq!(found(&both, &["y/*/z", "x/a"], 100), [3, 6]);
        assert_eq!(found(&both, &["vm:*"], 100), [5]);
        assert!(found(&both, &["none"], 100).is_empty() && found(&[], &["*"], 100).is_empty());
    }

    #[test]
    fn one_sender_takes_no_place_of_others() {
        let scratch = Scratch::new("lasts-caps");
        let path = scratch.path("bus.log");
        let mut text = line(1, "quiet", "q", 10);
        for seq in 2..=1000 {
            text += &line(seq, "loud", &format!("t/{seq}"), 10);
        }
        for seq in 1001..=1005 {
            text += &line(seq, "large", &format!("l/{seq}"), 60_000);
        }
        fs::write(&path, text).unwrap();
        let seqs = found(&[&path], &["*"], 9999);
        let of = |range: std::ops::RangeInclusive<u64>| seqs.iter().filter(|seq| range.contains(seq)).count();
        assert_eq!(seqs[0], 1);
        assert_eq!((of(2..=1000), of(1001..=1005)), (TOPICS_PER_SENDER, 4));
        assert_eq!(seqs[1], 1000 - TOPICS_PER_SENDER as u64 + 1, "the newest ones");
    }

    #[test]
    fn an_older_value_never_stands_for_one_that_found_no_place() {
        let scratch = Scratch::new("lasts-stale");
        let path = scratch.path("bus.log");
        let text = [
            line(1, "a", "x", 10),
            line(2, "a", "x", BYTES_PER_SENDER),
            line(3, "b", "x/old", 10),
            line(4, "a", "x/old", 10),
            line(5, "a", "y", BYTES_PER_SENDER - 250),
        ];
        fs::write(&path, text.concat()).unwrap();
        assert_eq!(
            found(&[&path], &["x"], 100),
            [2],
            "the newest of a sender always does"
        );
        assert_eq!(found(&[&path], &["*"], 100), [4, 5]);
        // Another sender's older one isn't the last either.
        let flood: String = (0..=TOPICS_PER_SENDER)
            .map(|n| line(10 + n as u64, "a", &format!("t/{n}"), 1))
            .collect();
        fs::write(&path, text.concat() + &flood).unwrap();
        assert!(found(&[&path], &["x*"], 100).contains(&4));
        let seqs = found(&[&path], &["*"], 1000);
        assert!(seqs.iter().all(|seq| *seq >= 10), "{seqs:?}");
    }
}
