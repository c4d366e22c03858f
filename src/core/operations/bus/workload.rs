//! The load of `bus bench`: publishers and subscribers of its own, and their clocks.
//!
//! Here: the phases, percentiles. Not here: the operation and what it tells (`bench`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::bench::{LatencyMicros, Load, Measured};
use super::{ANSWER_LIMIT, POLL_INTERVAL};
use crate::core::bus::client::WaitEnd;
use crate::core::bus::client_frame::{Frame, Request};
use crate::core::bus::topic::Pattern;
use crate::core::bus::{BusError, Client};
use crate::core::cancel::Cancel;
use crate::core::failure::Failure;
use crate::core::threads;

/// Digits of a payload's number.
pub(super) const NUMBER_DIGITS: usize = 10;

/// Longest time of a phase; what was measured until then is reported.
const PHASE_LIMIT: Duration = Duration::from_secs(20);

/// Why a phase has no result.
pub(super) enum BenchError {
    Interrupted,
    Bus(BusError),
    /// No thread can be started.
    NoThread(Failure),
}

impl From<Failure> for BenchError {
    fn from(failure: Failure) -> BenchError {
        BenchError::NoThread(failure)
    }
}

impl From<BusError> for BenchError {
    fn from(error: BusError) -> BenchError {
        BenchError::Bus(error)
    }
}

/// One run, on a topic of its own.
pub(super) struct Bench<'a> {
    pub topic: String,
    pub size: usize,
    pub cancel: &'a Cancel,
}

/// One publisher's measurements.
#[derive(Default)]
struct Sent {
    latencies: Vec<u64>,
    first_seq: Option<u64>,
    cut_short: bool,
}

impl Bench<'_> {
    /// One publisher, one message at a time, and a subscriber that hears all of them.
    pub(super) fn one_by_one(
        &self,
        publisher: Client,
        mut subscriber: Client,
        messages: u64,
    ) -> Result<(Measured, Measured, bool), BenchError> {
        subscriber.subscribe(&self.pattern(), None, ANSWER_LIMIT)?;
        let began = Instant::now();
        // When each was sent, nanoseconds since then.
        let sent_at: Vec<AtomicU64> = (0..messages).map(|_| AtomicU64::new(0)).collect();
        let published = AtomicU64::new(u64::MAX);
        let (sent, elapsed, heard) = thread::scope(|scope| {
            let hearing = threads::spawn_scoped(scope, "bench subscriber", || {
                self.receive(&mut subscriber, began, &sent_at, &published)
            })?;
            let sent = self.publish(publisher, 0..messages, 1, |number| {
                sent_at[number as usize].store(nanos(began), Ordering::Release);
            });
            let elapsed = began.elapsed();
            // The subscriber waits only for messages that were acked.
            let acked = sent.as_ref().map_or(0, |sent| sent.latencies.len() as u64);
            published.store(acked, Ordering::Release);
            let heard = hearing.join().unwrap_or(Err(BenchError::Bus(BusError::Ended)));
            Ok::<_, BenchError>((sent, elapsed, heard))
        })?;
        let (sent, heard) = (sent?, heard?);
        let acks = self.measured(&sent.latencies, elapsed, 1, 1);
        let deliveries = self.measured(&heard, elapsed, 1, 1);
        Ok((acks, deliveries, sent.cut_short))
    }

    /// All publishers at once, each with so many in flight.
    pub(super) fn throughput(
        &self,
        publishers: Vec<Client>,
        messages: u64,
        in_flight: usize,
    ) -> Result<(Measured, u64, bool), BenchError> {
        let count = publishers.len();
        let began = Instant::now();
        let results: Vec<Result<Sent, BenchError>> = thread::scope(|scope| {
            let threads: Vec<_> = publishers
                .into_iter()
                .enumerate()
                .map(|(index, client)| {
                    // The first publishers take the remainder.
                    let (each, more) = (messages / count as u64, messages % count as u64);
                    let share = each + u64::from((index as u64) < more);
                    threads::spawn_scoped(scope, &format!("bench publisher {index}"), move || {
                        self.publish(client, 0..share, in_flight, |_| {})
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread?.join().unwrap_or(Err(BenchError::Bus(BusError::Ended))))
                .collect()
        });
        let elapsed = began.elapsed();
        let mut all = Sent::default();
        for sent in results {
            let sent = sent?;
            all.latencies.extend(sent.latencies);
            all.first_seq = match (all.first_seq, sent.first_seq) {
                (Some(one), Some(other)) => Some(one.min(other)),
                (one, other) => one.or(other),
            };
            all.cut_short |= sent.cut_short;
        }
        let measured = self.measured(&all.latencies, elapsed, in_flight, count);
        Ok((measured, all.first_seq.unwrap_or(0), all.cut_short))
    }

    /// The messages from this number on, once more, as somebody gets them who comes back.
    pub(super) fn replay(
        &self,
        mut client: Client,
        first: u64,
        messages: u64,
    ) -> Result<Measured, BenchError> {
        let began = Instant::now();
        client.subscribe(&self.pattern(), Some(first), ANSWER_LIMIT)?;
        let (mut heard, mut missing) = (0_u64, 0_u64);
        let mut patience = Instant::now() + ANSWER_LIMIT;
        while missing.saturating_add(heard) < messages && Instant::now() < patience {
            if self.cancel.is_requested() {
                return Err(BenchError::Interrupted);
            }
            match client.next_frame(Instant::now() + POLL_INTERVAL)? {
                Some(Frame::Delivery(_)) => {
                    heard += 1;
                    if heard % 1024 == 0 {
                        patience = Instant::now() + ANSWER_LIMIT;
                    }
                }
                // Rotation has removed the first messages.
                Some(Frame::Gap { from, to }) => missing += to.saturating_sub(from) + 1,
                _ => {}
            }
        }
        let load = Load {
            messages: heard,
            size: self.size,
            in_flight: 0,
            publishers: 0,
        };
        Ok(rates(load, began.elapsed(), None))
    }

    /// Publishes these numbers with at most so many in flight; the time each took to its ack, in
    /// nanoseconds.
    fn publish(
        &self,
        mut client: Client,
        numbers: std::ops::Range<u64>,
        in_flight: usize,
        before_sending: impl Fn(u64),
    ) -> Result<Sent, BenchError> {
        let began = Instant::now();
        let mut sent = Sent::default();
        sent.latencies.reserve(numbers.clone().count());
        // Acks come in the order of the publishes, which the ids make sure of.
        let mut waiting: std::collections::VecDeque<(u64, u64)> = std::collections::VecDeque::new();
        let mut left = numbers;
        let mut ack_by = Instant::now() + ANSWER_LIMIT;
        loop {
            let mut heard = false;
            while let Some(frame) = client.buffered_frame()? {
                heard |= note_ack(frame, &mut waiting, &mut sent, nanos(began))?;
            }
            if heard {
                ack_by = Instant::now() + ANSWER_LIMIT;
            }
            if began.elapsed() > PHASE_LIMIT && !left.is_empty() {
                sent.cut_short = true;
                left = 0..0;
            }
            while waiting.len() < in_flight {
                let Some(number) = left.next() else {
                    break;
                };
                let payload = payload_of(number, self.size);
                let id = client.new_id();
                before_sending(number);
                waiting.push_back((id, nanos(began)));
                client.queue(Request::Publish {
                    topic: &self.topic,
                    payload: &payload,
                    reply: None,
                    id,
                });
            }
            if waiting.is_empty() {
                return Ok(sent);
            }
            if self.cancel.is_requested() {
                return Err(BenchError::Interrupted);
            }
            if Instant::now() >= ack_by {
                return Err(BenchError::Bus(BusError::TimedOut("ack")));
            }
            match client.wait(Instant::now() + POLL_INTERVAL, None)? {
                WaitEnd::Frame(frame) => {
                    if note_ack(frame, &mut waiting, &mut sent, nanos(began))? {
                        ack_by = Instant::now() + ANSWER_LIMIT;
                    }
                }
                WaitEnd::Other | WaitEnd::Timeout => {}
            }
        }
    }

    /// Receives all messages; returns the time from publish to delivery of each, in nanoseconds.
    fn receive(
        &self,
        client: &mut Client,
        began: Instant,
        sent_at: &[AtomicU64],
        published: &AtomicU64,
    ) -> Result<Vec<u64>, BenchError> {
        let mut latencies = Vec::with_capacity(sent_at.len());
        let mut patience = Instant::now() + ANSWER_LIMIT;
        while (latencies.len() as u64) < published.load(Ordering::Acquire) {
            if self.cancel.is_requested() {
                return Err(BenchError::Interrupted);
            }
            match client.next_frame(Instant::now() + POLL_INTERVAL)? {
                Some(Frame::Delivery(message)) => {
                    let at = nanos(began);
                    let number = number_in(message.payload.get());
                    let Some(sent) = number.and_then(|number| sent_at.get(number)) else {
                        continue;
                    };
                    latencies.push(at.saturating_sub(sent.load(Ordering::Acquire)));
                    patience = Instant::now() + ANSWER_LIMIT;
                }
                _ if Instant::now() >= patience => {
                    return Err(BenchError::Bus(BusError::TimedOut("delivery")));
                }
                _ => {}
            }
        }
        Ok(latencies)
    }

    fn pattern(&self) -> Pattern {
        self.topic.parse().expect("the topic of a run is made of letters")
    }

    fn measured(&self, nanos: &[u64], elapsed: Duration, in_flight: usize, publishers: usize) -> Measured {
        let load = Load {
            messages: nanos.len() as u64,
            size: self.size,
            in_flight,
            publishers,
        };
        rates(load, elapsed, percentiles(nanos.to_vec()))
    }
}

/// Records an ack's time; false for other frames.
fn note_ack(
    frame: Frame,
    waiting: &mut std::collections::VecDeque<(u64, u64)>,
    sent: &mut Sent,
    at: u64,
) -> Result<bool, BusError> {
    let Frame::Ack(ack) = frame else {
        return Ok(false);
    };
    if let Some(reason) = ack.refused {
        return Err(BusError::Refused(reason));
    }
    match waiting.pop_front() {
        Some((id, sent_at)) if ack.id == Some(id) => {
            sent.latencies.push(at.saturating_sub(sent_at));
            sent.first_seq = sent.first_seq.or(ack.seq);
            Ok(true)
        }
        _ => Err(BusError::Garbled("acks don't come in order".to_owned())),
    }
}

fn rates(load: Load, elapsed: Duration, latency_us: Option<LatencyMicros>) -> Measured {
    let secs = elapsed.as_secs_f64().max(1e-9);
    let per_sec = load.messages as f64 / secs;
    Measured {
        load,
        elapsed_ms: rounded(secs * 1000.0),
        messages_per_sec: rounded(per_sec),
        megabytes_per_sec: rounded(per_sec * load.size as f64 / 1e6),
        latency_us,
    }
}

fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// One digit behind the point: more would be noise.
fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn percentiles(mut nanos: Vec<u64>) -> Option<LatencyMicros> {
    nanos.sort_unstable();
    let last = nanos.len().checked_sub(1)?;
    // The smallest value that so many of a thousand don't exceed.
    let at = |per_mille: usize| {
        let rank = (nanos.len() * per_mille).div_ceil(1000).clamp(1, nanos.len());
        rounded(nanos[rank - 1] as f64 / 1000.0)
    };
    Some(LatencyMicros {
        p50: at(500),
        p99: at(990),
        p99_9: at(999),
        max: rounded(nanos[last] as f64 / 1000.0),
    })
}

fn payload_of(number: u64, size: usize) -> String {
    let mut payload = format!("\"{number:0>width$}", width = NUMBER_DIGITS);
    payload.extend(std::iter::repeat_n('x', size.saturating_sub(NUMBER_DIGITS + 2)));
    payload.push('"');
    payload
}

fn number_in(payload: &str) -> Option<usize> {
    payload.get(1..=NUMBER_DIGITS)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::super::bench::{MAX_MESSAGES, MIN_SIZE};
    use super::*;

    #[test]
    fn payloads_have_their_size_and_number() {
        for (number, size) in [(0, MIN_SIZE), (7, 200), (MAX_MESSAGES, 13)] {
            let payload = payload_of(number, size);
            assert_eq!(payload.len(), size);
            assert_eq!(number_in(&payload), Some(number as usize));
            serde_json::from_str::<String>(&payload).unwrap();
        }
        for odd in ["", "1", "null", "\"0000\"", "\"é00000000000\""] {
            assert_eq!(number_in(odd), None, "{odd}");
        }
    }

    #[test]
    fn percentiles_are_values_that_were_seen() {
        assert_eq!(percentiles(Vec::new()), None);
        let one = percentiles(vec![1500]).unwrap();
        assert_eq!((one.p50, one.p99_9, one.max), (1.5, 1.5, 1.5));
        let thousand = percentiles((1..=1000).rev().map(|us| us * 1000).collect()).unwrap();
        assert_eq!(
            (thousand.p50, thousand.p99, thousand.p99_9, thousand.max),
            (500.0, 990.0, 999.0, 1000.0)
        );
    }
}
