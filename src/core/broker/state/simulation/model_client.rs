//! A simulated client: what it says at random, and a model of all it may be told.
//!
//! Here: requests and the answers they must get, which deliveries are owed, too many or not its
//! own. Not here: sockets and the broker (`super::world`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde_json::Value;

use crate::core::broker::frame::Terms;
use crate::core::broker::state::Peer;
use crate::core::bus::line::{BusLine, seq_of};
use crate::core::bus::topic::Pattern;

use super::Dice;

/// Limits that the model knows too.
pub const SUBSCRIPTIONS: usize = 3;

/// A message as the log has it.
#[derive(Debug)]
pub struct Kept {
    /// Its line, without the end.
    pub line: Vec<u8>,
    /// Its topic.
    pub topic: String,
    /// Its publisher was told that it isn't kept, or nothing: it may be delivered, or not.
    pub ghost: bool,
    /// Not rotated out, not taken away.
    pub in_log: bool,
}

/// Everything that ever got into the log, by number.
#[derive(Debug, Default)]
pub struct Truth {
    /// Messages by number.
    pub messages: BTreeMap<u64, Kept>,
    by_payload: BTreeMap<u64, u64>,
}

impl Truth {
    /// A line that was appended.
    pub fn add(&mut self, line: &[u8], ghost: bool) {
        let parsed = BusLine::parse(line).expect("the broker's own lines are readable");
        if let Some(number) = payload_number(line) {
            let before = self.by_payload.insert(number, parsed.seq);
            assert_eq!(before, None, "message {number} is in the log twice");
        }
        let kept = Kept {
            line: line.to_vec(),
            topic: parsed.topic.to_owned(),
            ghost,
            in_log: true,
        };
        let before = self.messages.insert(parsed.seq, kept);
        assert!(before.is_none(), "number {} was given twice", parsed.seq);
    }

    /// Forgets what a loss of power took.
    pub fn lose(&mut self, seq: u64) {
        if let Some(kept) = self.messages.remove(&seq)
            && let Some(number) = payload_number(&kept.line)
        {
            self.by_payload.remove(&number);
        }
    }

    /// The last number in the log.
    pub fn last(&self) -> u64 {
        self.messages.last_key_value().map_or(0, |(seq, _)| *seq)
    }
}

/// Payloads of clients are `{"n":17,…}`, each number once.
fn payload_number(line: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(line).ok()?;
    let rest = text.split_once(",\"payload\":{\"n\":")?.1;
    rest.split([',', '}']).next()?.parse().ok()
}

/// What a request must be answered with.
#[derive(Debug)]
struct Asked {
    kind: &'static str,
    id: Option<u64>,
    what: What,
}

#[derive(Debug)]
enum What {
    Publish { number: u64, topic: &'static str },
    Subscribe { pattern: String, terms: Terms },
    Unsubscribe,
    Heartbeat,
    Bad(&'static str),
}

#[derive(Debug)]
struct Sub {
    pattern: Pattern,
    first: u64,
    /// Everything before it was dealt with.
    cursor: u64,
    /// What a subscription that is no more had dealt with: it may come once more, or not.
    either: BTreeSet<u64>,
}

/// A share of a group's subscription: what comes by it may come to another member instead.
#[derive(Debug)]
struct Share {
    pattern: Pattern,
    group: String,
    first: u64,
}

/// The newest message of a topic, which is to come before everything else.
#[derive(Debug)]
struct Newest {
    pattern: String,
    topic: String,
    seq: u64,
    /// It needn't come: another one may stand for it.
    may_stay: bool,
}

/// What a client waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// The answer to its hello.
    Hello,
    /// Frames.
    Frames,
    /// Nothing: it was declined, or wanted no session.
    Over,
}

/// One client on one connection.
#[derive(Debug)]
pub struct Client {
    key: String,
    peer: Peer,
    /// What it waits for.
    pub mood: Mood,
    bytes: Vec<u8>,
    asked: VecDeque<Asked>,
    subs: BTreeMap<String, Sub>,
    shares: BTreeMap<String, Share>,
    newest: Vec<Newest>,
    /// What came by a group: which, and its number. Nobody else of the group may have it.
    pub taken: Vec<(String, u64)>,
    gaps: Vec<(u64, u64)>,
    asks: u64,
    /// The word of the close frame.
    pub closed: Option<String>,
    /// It has sent a length that is none.
    pub broke: bool,
    /// Requests that were answered.
    pub answered: u64,
    /// Messages that were delivered.
    pub delivered: u64,
    /// Those of them that came as the newest of their topic.
    pub newest_told: u64,
}

const TOPICS: [&str; 9] = [
    "broadcast",
    "ci/a",
    "ci/b",
    "ci",
    "vm:a",
    "vm:b",
    "vm:A",
    "logs/x",
    "a",
];
const PATTERNS: [&str; 16] = [
    "broadcast",
    "ci/a",
    "ci/*",
    "*",
    "vm:a",
    "vm:b",
    "vm:A",
    "vm:*",
    "logs/x",
    "a*",
    "castra/*",
    "castra/session/a",
    "castra/handshake/b",
    "*/a",
    "castra/*/a",
    "ci/*/none*",
];

impl Client {
    /// A client that has said hello.
    pub fn new(key: &str, peer: Peer) -> Client {
        Client {
            key: key.to_ascii_lowercase(),
            peer,
            mood: Mood::Hello,
            bytes: Vec::new(),
            asked: VecDeque::new(),
            subs: BTreeMap::new(),
            shares: BTreeMap::new(),
            newest: Vec::new(),
            taken: Vec::new(),
            gaps: Vec::new(),
            asks: 0,
            closed: None,
            broke: false,
            answered: 0,
            delivered: 0,
            newest_told: 0,
        }
    }

    fn may_read(&self, topic: &str) -> bool {
        let name = match topic.split_once(':') {
            Some(("vm", name)) => name,
            _ if topic.starts_with("castra/") => topic.rsplit('/').next().unwrap(),
            _ => return true,
        };
        self.peer == Peer::Host || name.to_ascii_lowercase() == self.key
    }

    /// Something to say, as bytes on the wire; `last`: about the last number it could know.
    pub fn say(&mut self, dice: &mut Dice, numbers: &mut u64, last: u64) -> Vec<u8> {
        self.asks += 1;
        let id = dice.one_in(2).then_some(self.asks);
        let word = id.map(|id| format!(",\"id\":{id}")).unwrap_or_default();
        let pattern = PATTERNS[dice.roll(PATTERNS.len() as u64) as usize];
        let (kind, what, body) = match dice.roll(20) {
            0..=9 => {
                let topic = match dice.roll(30) {
                    0 => "castra/mine",
                    1 => "no topic",
                    2 => "vm:-",
                    _ => TOPICS[dice.roll(TOPICS.len() as u64) as usize],
                };
                *numbers += 1;
                let number = *numbers;
                let pad = match dice.roll(40) {
                    0 => 9000,
                    1..=5 => 400,
                    _ => 0,
                };
                let body = format!(
                    "{{\"type\":\"publish\",\"topic\":\"{topic}\",\"payload\":{{\"n\":{number},\"x\":\"{}\"}}{word}}}",
                    "y".repeat(pad)
                );
                ("publish", What::Publish { number, topic }, body)
            }
            10..=13 => {
                let from = match dice.roll(6) {
                    0..=2 => None,
                    3 => Some(0),
                    4 => Some(dice.roll(last + 4)),
                    _ => Some(last.saturating_sub(dice.roll(12))),
                };
                let mut terms = Terms {
                    from,
                    last: dice.one_in(4),
                    group: None,
                };
                if dice.one_in(4) {
                    terms = Terms {
                        group: Some(["g", "h"][dice.roll(2) as usize].to_owned()),
                        ..Terms::default()
                    };
                }
                let mut asks = terms
                    .from
                    .map(|from| format!(",\"from\":{from}"))
                    .unwrap_or_default();
                if terms.last {
                    asks += ",\"last\":true";
                }
                if let Some(group) = &terms.group {
                    asks += &format!(",\"group\":\"{group}\"");
                }
                let body = format!("{{\"type\":\"subscribe\",\"topic\":\"{pattern}\"{asks}{word}}}");
                let pattern = pattern.to_owned();
                ("subscribe", What::Subscribe { pattern, terms }, body)
            }
            14 | 15 => {
                let body = format!("{{\"type\":\"unsubscribe\",\"topic\":\"{pattern}\"{word}}}");
                ("unsubscribe", What::Unsubscribe, body)
            }
            16 | 17 => {
                let body = format!("{{\"type\":\"heartbeat\",\"payload\":{{\"load\":1}}{word}}}");
                ("heartbeat", What::Heartbeat, body)
            }
            18 => {
                // No answer to this one.
                return framed(format!("{{\"type\":\"ack\",\"seq\":{last}}}").as_bytes());
            }
            _ => match dice.roll(40) {
                0 => {
                    self.broke = true;
                    return 70_000_u32.to_be_bytes().to_vec();
                }
                1..=20 => ("", What::Bad("malformed"), "{\"type\":".to_owned()),
                _ => {
                    let body = format!("{{\"type\":\"dance\"{word}}}");
                    ("dance", What::Bad("unknown-type"), body)
                }
            },
        };
        let id = if kind.is_empty() { None } else { id };
        self.asked.push_back(Asked { kind, id, what });
        framed(body.as_bytes())
    }

    /// Takes in what the broker sent.
    pub fn hear(&mut self, bytes: &[u8], truth: &Truth) {
        self.bytes.extend_from_slice(bytes);
        if self.mood == Mood::Hello {
            let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') else {
                return;
            };
            let line = String::from_utf8(self.bytes.drain(..=end).collect()).unwrap();
            self.mood = if line.starts_with("ok session=s-") {
                Mood::Frames
            } else {
                assert!(line == "ok\n" || line.starts_with("declined reason="), "{line}");
                Mood::Over
            };
        }
        let mut at = 0;
        while let Some((head, rest)) = self.bytes[at..].split_first_chunk::<4>() {
            let length = u32::from_be_bytes(*head) as usize;
            let Some(body) = rest.get(..length) else {
                break;
            };
            let body = body.to_vec();
            at += 4 + length;
            self.frame(&body, truth);
        }
        self.bytes.drain(..at);
    }

    fn frame(&mut self, body: &[u8], truth: &Truth) {
        assert_eq!(self.mood, Mood::Frames, "a frame without a session");
        assert_eq!(self.closed, None, "a frame after the close");
        if let Some(rest) = body.strip_prefix(b"{\"type\":\"publish\",") {
            return self.delivery(&[b"{", rest].concat(), truth);
        }
        let value: Value = serde_json::from_slice(body).unwrap();
        match value["type"].as_str().unwrap() {
            "ack" => self.ack(&value, truth),
            "gap" => self.gap(
                value["from"].as_u64().unwrap(),
                value["to"].as_u64().unwrap(),
                truth,
            ),
            "close" => self.closed = Some(value["reason"].as_str().unwrap().to_owned()),
            other => panic!("a frame of type {other}"),
        }
    }

    fn ack(&mut self, ack: &Value, truth: &Truth) {
        let asked = self.asked.pop_front();
        let Asked { kind, id, what } = asked.unwrap_or_else(|| panic!("nobody asked for {ack}"));
        self.answered += 1;
        let expected = if kind.is_empty() { Value::Null } else { kind.into() };
        assert_eq!(ack["ack"], expected, "out of turn: {ack}, asked was {what:?}");
        assert_eq!(
            ack["id"].as_u64(),
            id,
            "another one's id: {ack}, asked was {what:?}"
        );
        let refused = match ack["status"].as_str().unwrap() {
            "ok" => None,
            _ => Some(ack["reason"].as_str().unwrap()),
        };
        match what {
            What::Bad(reason) => assert_eq!(refused, Some(reason)),
            What::Heartbeat => assert_eq!(refused, None),
            What::Unsubscribe => {
                assert_eq!(refused, None);
                self.remove(ack["topic"].as_str().unwrap(), truth);
            }
            What::Publish { number, topic } => {
                let known = truth.by_payload.get(&number);
                let ghost = known.is_some_and(|seq| truth.messages[seq].ghost);
                match refused {
                    None => {
                        assert_eq!(
                            known.copied(),
                            ack["seq"].as_u64(),
                            "acked, not in the log: {ack}"
                        );
                        assert!(!ghost);
                    }
                    Some(reason) => {
                        assert!(known.is_none() || ghost, "refused, yet in the log: {ack}");
                        let why = match topic {
                            "castra/mine" => "forbidden",
                            "no topic" | "vm:-" => "bad-topic",
                            _ if reason == "rate-limit" && self.peer == Peer::Guest => reason,
                            _ => "storage-error",
                        };
                        assert_eq!(reason, why);
                    }
                }
            }
            What::Subscribe { pattern, terms } => {
                let spelled = ack["topic"].as_str().unwrap();
                assert!(spelled.eq_ignore_ascii_case(&pattern), "{ack}");
                let allowed = pattern.contains('*') || self.may_read(&pattern);
                let others = self.subs.keys().chain(self.shares.keys());
                let full = others.filter(|known| *known != spelled).count() >= SUBSCRIPTIONS;
                let works = self.shares.keys().any(|known| known != spelled);
                let why = match (allowed, full) {
                    (false, _) => Some("forbidden"),
                    (true, true) => Some("subscription-limit"),
                    (true, false) if works && terms.replays() => Some("forbidden"),
                    (true, false) => None,
                };
                // Whether its session is behind just now nobody here can know.
                let is_behind = why.is_none() && terms.group.is_some() && refused == Some("forbidden");
                assert!(refused == why || is_behind, "{ack}: {why:?} {terms:?}");
                if refused.is_none() {
                    let given = ack["seq"].as_u64().unwrap();
                    let first = terms.from.unwrap_or(given + 1);
                    let pattern: Pattern = spelled.parse().unwrap();
                    self.remove(spelled, truth);
                    if let Some(group) = terms.group {
                        let share = Share {
                            pattern,
                            group,
                            first,
                        };
                        self.shares.insert(spelled.to_owned(), share);
                        return;
                    }
                    if terms.last {
                        self.awaits_newest(&pattern, first.max(1).min(given + 1), truth);
                    }
                    let sub = Sub {
                        pattern,
                        first,
                        cursor: first,
                        either: BTreeSet::new(),
                    };
                    self.subs.insert(spelled.to_owned(), sub);
                }
            }
        }
    }

    /// The newest messages before this number are to come now.
    fn awaits_newest(&mut self, pattern: &Pattern, first: u64, truth: &Truth) {
        let mut found: BTreeMap<&str, Newest> = BTreeMap::new();
        let past = truth.messages.range(..first);
        let past = past.filter(|(_, kept)| self.may_read(&kept.topic) && pattern.matches(&kept.topic));
        for (seq, kept) in past {
            let newest = Newest {
                pattern: pattern.as_str().to_owned(),
                topic: kept.topic.clone(),
                seq: *seq,
                // A ghost may be delivered or not, and then the one before it; what rotation has taken
                // by now may have come before.
                may_stay: kept.ghost || !kept.in_log,
            };
            found.insert(&kept.topic, newest);
        }
        let found: Vec<Newest> = found.into_values().collect();
        for mut newest in found {
            // Asked for together with another subscription it comes once, the newest of all.
            for before in self
                .newest
                .iter_mut()
                .filter(|before| before.topic == newest.topic)
            {
                if before.seq <= newest.seq {
                    before.may_stay = true;
                } else {
                    newest.may_stay |= !before.may_stay;
                }
            }
            self.newest.push(newest);
        }
    }

    /// Whether this is a message that was asked for as the newest of its topic. `owed`: it is to come
    /// anyway.
    fn is_newest(&mut self, seq: u64, topic: &str, owed: bool, truth: &Truth) -> bool {
        let is_gone = |seq: u64| {
            let kept = truth.messages.get(&seq);
            kept.is_none_or(|kept| !kept.in_log || kept.ghost)
        };
        let must = |newest: &Newest| {
            !newest.may_stay && (newest.seq == seq || (seq < newest.seq && is_gone(newest.seq)))
        };
        let may = |newest: &Newest| newest.may_stay && seq <= newest.seq && !owed;
        let mut on_topic = (0..)
            .zip(&self.newest)
            .filter(|(_, newest)| newest.topic == topic);
        let found = on_topic.clone().find(|(_, newest)| must(newest));
        let Some((at, _)) = found.or_else(|| on_topic.find(|(_, newest)| may(newest))) else {
            return false;
        };
        self.newest.remove(at);
        self.newest_told += 1;
        true
    }

    /// Something else has come: nothing that was to come first is missing.
    fn has_the_newest(&mut self, truth: &Truth) {
        for newest in self.newest.iter_mut().filter(|newest| !newest.may_stay) {
            let kept = &truth.messages.get(&newest.seq);
            let is_there = kept.is_some_and(|kept| kept.in_log && !kept.ghost);
            assert!(!is_there, "{newest:?} didn't come");
            newest.may_stay = true;
        }
    }

    fn remove(&mut self, pattern: &str, truth: &Truth) {
        self.shares.remove(pattern);
        for newest in &mut self.newest {
            newest.may_stay |= newest.pattern == pattern;
        }
        let Some(old) = self.subs.remove(pattern) else {
            return;
        };
        for sub in self.subs.values_mut().filter(|sub| sub.cursor < old.cursor) {
            let dealt_with = truth
                .messages
                .range(sub.cursor.max(old.first).min(old.cursor)..old.cursor);
            let shared = dealt_with.filter(|(_, kept)| old.pattern.matches(&kept.topic));
            sub.either.extend(shared.map(|(seq, _)| *seq));
        }
    }

    /// The subscriptions that a message is for.
    fn wanting(&self, seq: u64, topic: &str) -> impl Iterator<Item = &Sub> {
        let topic = topic.to_owned();
        self.subs
            .values()
            .filter(move |sub| seq >= sub.first && sub.pattern.matches(&topic))
    }

    fn delivery(&mut self, line: &[u8], truth: &Truth) {
        self.delivered += 1;
        let seq = seq_of(line).unwrap();
        let kept = truth
            .messages
            .get(&seq)
            .unwrap_or_else(|| panic!("{seq} was delivered and isn't in the log"));
        assert_eq!(
            String::from_utf8_lossy(line),
            String::from_utf8_lossy(&kept.line),
            "delivered is what is in the log"
        );
        assert!(self.may_read(&kept.topic), "{} gets {}", self.key, kept.topic);
        let late = self.wanting(seq, &kept.topic).any(|sub| sub.cursor > seq);
        let wanted = self.wanting(seq, &kept.topic).next().is_some();
        let owed = wanted && !late && self.missing_before(seq, truth).is_none();
        if self.is_newest(seq, &kept.topic, owed, truth) {
            return;
        }
        self.has_the_newest(truth);
        if self.wanting(seq, &kept.topic).next().is_none() {
            let by: Vec<&Share> = self
                .shares
                .values()
                .filter(|share| seq >= share.first && share.pattern.matches(&kept.topic))
                .collect();
            if let [share] = by[..] {
                let group = format!("{:?} {} {}", self.peer, share.group, share.pattern);
                self.taken.push((group, seq));
            }
            if !by.is_empty() {
                return;
            }
        }
        assert!(
            self.wanting(seq, &kept.topic).next().is_some(),
            "{seq} on {} to the unsubscribed: {:?}",
            kept.topic,
            self.subs
        );
        if !kept.ghost {
            let twice = self.wanting(seq, &kept.topic).find(|sub| sub.cursor > seq);
            assert!(
                twice.is_none(),
                "{seq} on {} again or too late: {:?}",
                kept.topic,
                self.subs
            );
        }
        self.owes_nothing_before(seq, truth);
        for sub in self.subs.values_mut() {
            sub.cursor = sub.cursor.max(seq + 1);
        }
    }

    /// A message before this number that should have come by now.
    fn missing_before(&self, seq: u64, truth: &Truth) -> Option<u64> {
        let from = self.subs.values().map(|sub| sub.cursor).min().unwrap_or(seq);
        if from >= seq {
            return None;
        }
        let is_missing = |(missing, kept): &(&u64, &Kept)| {
            let told = self.gaps.iter().any(|(from, to)| (from..=to).contains(missing));
            if kept.ghost || told || !self.may_read(&kept.topic) {
                return false;
            }
            let owed = self
                .wanting(**missing, &kept.topic)
                .any(|sub| !sub.either.contains(missing));
            let had = self
                .wanting(**missing, &kept.topic)
                .any(|sub| sub.cursor > **missing);
            owed && !had
        };
        truth
            .messages
            .range(from..seq)
            .find(is_missing)
            .map(|(seq, _)| *seq)
    }

    /// Fails if a message before this number should have come by now.
    pub fn owes_nothing_before(&self, seq: u64, truth: &Truth) {
        if let Some(missing) = self.missing_before(seq, truth) {
            let kept = &truth.messages[&missing];
            panic!(
                "{missing} on {} is missing before {seq} (in the log: {}): {:?}",
                kept.topic, kept.in_log, self.subs
            );
        }
    }

    fn gap(&mut self, from: u64, to: u64, truth: &Truth) {
        self.has_the_newest(truth);
        assert!(0 < from && from <= to, "gap {from} to {to}");
        for (seq, kept) in truth.messages.range(from..=to) {
            assert!(
                !kept.in_log || kept.ghost,
                "gap {from} to {to}, but {seq} is there"
            );
        }
        self.owes_nothing_before(from, truth);
        self.gaps.push((from, to));
    }

    /// How many gaps it was told of.
    pub fn gaps_told(&self) -> u64 {
        self.gaps.len() as u64
    }

    /// It has come to rest: nothing is to come any more.
    pub fn owes_nothing(&mut self, truth: &Truth) {
        self.has_the_newest(truth);
        self.owes_nothing_before(u64::MAX, truth);
    }

    /// The stream ended in order: everything it asked was answered.
    pub fn was_answered(&self) {
        assert!(self.asked.is_empty(), "unanswered: {:?}", self.asked);
        assert!(self.bytes.is_empty(), "the end within a frame");
    }
}

/// A frame of this body.
pub fn framed(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    [&length.to_be_bytes(), body].concat()
}
