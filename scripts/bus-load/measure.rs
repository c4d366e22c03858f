//! The measurements, each for any dialect: publishes until their acks, deliveries to many, the time
//! from a publish to its subscriber, handshakes, idle sessions.
//!
//! Every delivery is checked for its number, in order and without a hole; every ack for acceptance.
//! An error ends the measurement, and with it the benchmark: no figure stands on lost messages.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::wire::{Dialect, Inbox, PATIENCE, Payload};

/// Publishes in flight while deliveries are counted.
const FAN_OUT_FLIGHT: usize = 256;
/// How far the publisher may be ahead of the slowest subscriber, in messages: about a megabyte.
/// Acks follow the log, not the subscribers, so without this a server would cut some of them off.
const FAN_OUT_AHEAD: u64 = 4096;
/// Subscribers are other guests than publishers.
const FIRST_SUBSCRIBER: usize = 8;
/// How often a waiting subscriber looks whether all is over.
const LOOK: Duration = Duration::from_millis(100);

/// Figures by name, in the order told.
pub struct Told(Vec<(&'static str, f64)>);

impl Told {
    pub fn new() -> Self {
        Told(Vec::new())
    }

    pub fn with(mut self, name: &'static str, figure: f64) -> Self {
        self.0.push((name, figure));
        self
    }

    pub fn json(&self) -> String {
        let members: Vec<String> = self
            .0
            .iter()
            .map(|(name, figure)| format!("\"{name}\":{figure:.3}"))
            .collect();
        format!("{{{}}}", members.join(","))
    }

    fn with_latencies(self, nanos: &mut [u64]) -> Self {
        nanos.sort_unstable();
        self.with("p50_us", share(nanos, 0.5))
            .with("p99_us", share(nanos, 0.99))
            .with("p999_us", share(nanos, 0.999))
            .with("worst_us", share(nanos, 1.0))
            .with("samples", nanos.len() as f64)
    }
}

/// The smallest of the sorted times that so many aren't above, in microseconds.
pub fn share(sorted: &[u64], part: f64) -> f64 {
    let index = (sorted.len() as f64 * part) as usize;
    let nanos = sorted.get(index.min(sorted.len().saturating_sub(1)));
    nanos.copied().unwrap_or(0) as f64 / 1000.0
}

pub fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// When publishers stop.
#[derive(Clone, Copy)]
pub enum Until {
    Passed(Duration),
    Published(usize),
}

/// Publishers at once, each with so many publishes whose ack hasn't come: one write for all that may
/// be sent, one read for all acks that are there.
pub fn throughput<D: Dialect>(
    port: u16,
    publishers: usize,
    in_flight: usize,
    until: Until,
) -> io::Result<Told> {
    let connections = (0..publishers)
        .map(|client| D::open(port, client))
        .collect::<io::Result<Vec<_>>>()?;
    let began = Instant::now();
    let acked = thread::scope(|scope| {
        let running: Vec<_> = connections
            .into_iter()
            .map(|(stream, dialect)| scope.spawn(move || publisher(&stream, dialect, in_flight, until)))
            .collect();
        running
            .into_iter()
            .map(joined)
            .try_fold(0, |sum, acked| acked.map(|acked| sum + acked))
    })?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(Told::new()
        .with("per_second", acked as f64 / seconds)
        .with("acked", acked as f64))
}

fn publisher<D: Dialect>(
    stream: &TcpStream,
    mut dialect: D,
    in_flight: usize,
    until: Until,
) -> io::Result<usize> {
    let mut wire = stream;
    let (mut inbox, mut out, mut payload) = (Inbox::new(), Vec::new(), Payload::new());
    let (mut sent, mut acked) = (0, 0);
    let began = Instant::now();
    loop {
        let room = match until {
            Until::Passed(time) if began.elapsed() >= time => 0,
            Until::Passed(_) => in_flight - (sent - acked),
            Until::Published(count) => (in_flight - (sent - acked)).min(count - sent),
        };
        for _ in 0..room {
            dialect.publish(payload.count(), &mut out);
        }
        sent += room;
        if sent == acked {
            return Ok(acked);
        }
        if !out.is_empty() {
            wire.write_all(&out)?;
            out.clear();
        }
        inbox.read(stream)?;
        let (used, acks) = dialect.acks(inbox.bytes(), &mut out)?;
        inbox.used(used);
        acked += acks;
    }
}

/// One publisher, many subscribers to its topic: deliveries per second over all of them.
pub fn fan_out<D: Dialect>(port: u16, subscribers: usize, time: Duration) -> io::Result<Told> {
    let crowd = Crowd::<D>::gather(port, subscribers)?;
    let (stream, mut dialect) = D::open(port, 0)?;
    let began = Instant::now();
    let sent = crowd.receiving(
        |_, _| {},
        |crowd| {
            let mut wire = &stream;
            let (mut inbox, mut out, mut payload) = (Inbox::new(), Vec::new(), Payload::new());
            let (mut sent, mut acked) = (0_u64, 0_u64);
            let mut progress = Instant::now();
            while sent > acked || began.elapsed() < time {
                let behind = sent - crowd.slowest();
                let room = if began.elapsed() >= time {
                    0
                } else {
                    (FAN_OUT_FLIGHT as u64 - (sent - acked)).min(FAN_OUT_AHEAD - behind)
                };
                for _ in 0..room {
                    dialect.publish(payload.count(), &mut out);
                }
                sent += room;
                if !out.is_empty() {
                    wire.write_all(&out)?;
                    out.clear();
                }
                if sent > acked {
                    inbox.read(&stream)?;
                    let (used, acks) = dialect.acks(inbox.bytes(), &mut out)?;
                    inbox.used(used);
                    acked += acks as u64;
                } else {
                    crowd.check(progress)?;
                    thread::sleep(Duration::from_micros(20));
                }
                if room > 0 {
                    progress = Instant::now();
                }
            }
            Ok(sent)
        },
    )?;
    let seconds = began.elapsed().as_secs_f64();
    let deliveries = (sent * subscribers as u64) as f64;
    Ok(Told::new()
        .with("per_second", deliveries / seconds)
        .with("published_per_second", sent as f64 / seconds)
        .with("deliveries", deliveries))
}

/// Publishes at a steady rate, whatever the answers do: the time from just before each write until
/// every subscriber has read it. Stalled subscribers never read; what they do to the others is seen
/// by comparing with a run without them.
pub fn latency<D: Dialect>(
    port: u16,
    per_second: usize,
    time: Duration,
    subscribers: usize,
    stalled: usize,
) -> io::Result<Told> {
    let crowd = Crowd::<D>::gather(port, subscribers)?;
    let idlers = (0..stalled)
        .map(|one| subscriber::<D>(port, FIRST_SUBSCRIBER + subscribers + one).map(|(stream, _)| stream))
        .collect::<io::Result<Vec<_>>>()?;
    let (stream, mut dialect) = D::open(port, 0)?;
    // So that acks can be taken in passing, and no thread wakes for them between publish and delivery.
    stream.set_nonblocking(true)?;
    let count = (per_second as u128 * time.as_millis() / 1000) as u64;
    let interval = Duration::from_secs(1) / u32::try_from(per_second).map_err(io::Error::other)?;
    let epoch = Instant::now();
    let took: Vec<_> = (0..subscribers)
        .map(|_| std::sync::Mutex::new(Vec::with_capacity(count as usize)))
        .collect();
    crowd.receiving(
        |index, delivered| {
            // No other thread wants it before the end, so this never waits.
            if let Ok(mut took) = took[index].lock() {
                took.push(nanos(epoch.elapsed()).saturating_sub(Payload::moment(delivered)));
            }
        },
        |crowd| {
            let (mut inbox, mut out, mut payload) = (Inbox::new(), Vec::new(), Payload::new());
            let mut acked = 0;
            for number in 0..count {
                let due = epoch + interval * u32::try_from(number).map_err(io::Error::other)?;
                thread::sleep(due.saturating_duration_since(Instant::now()));
                acked += take_acks(&stream, &mut inbox, &mut dialect, &mut out)?;
                payload.stamp(nanos(epoch.elapsed()));
                dialect.publish(payload.count(), &mut out);
                write_whole(&stream, &mut out)?;
            }
            let last = Instant::now();
            while acked < count {
                crowd.check(last)?;
                thread::sleep(Duration::from_millis(1));
                acked += take_acks(&stream, &mut inbox, &mut dialect, &mut out)?;
                write_whole(&stream, &mut out)?;
            }
            Ok(count)
        },
    )?;
    let cut_off = idlers.iter().filter(|stream| has_ended(stream)).count();
    let mut all: Vec<u64> = took
        .into_iter()
        .flat_map(|one| one.into_inner().unwrap_or_default())
        .collect();
    Ok(Told::new()
        .with_latencies(&mut all)
        .with("published", count as f64)
        .with("stalled_cut_off", cut_off as f64))
}

fn take_acks<D: Dialect>(
    stream: &TcpStream,
    inbox: &mut Inbox,
    dialect: &mut D,
    out: &mut Vec<u8>,
) -> io::Result<u64> {
    match inbox.read(stream) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
        other => other?,
    }
    let (used, acks) = dialect.acks(inbox.bytes(), out)?;
    inbox.used(used);
    Ok(acks as u64)
}

fn write_whole(mut stream: &TcpStream, out: &mut Vec<u8>) -> io::Result<()> {
    let mut written = 0;
    let began = Instant::now();
    while written < out.len() {
        match stream.write(&out[written..]) {
            Ok(more) => written += more,
            Err(error) if error.kind() == ErrorKind::WouldBlock && began.elapsed() < PATIENCE => {
                thread::yield_now()
            }
            Err(error) => return Err(error),
        }
    }
    out.clear();
    Ok(())
}

/// Reads on what lies there; the end or a reset says that the server cut this one off.
fn has_ended(mut stream: &TcpStream) -> bool {
    if stream.set_nonblocking(true).is_err() {
        return true;
    }
    let mut sink = vec![0; 1 << 20];
    loop {
        match stream.read(&mut sink) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != ErrorKind::WouldBlock,
        }
    }
}

/// Subscribers that stand, and how far each is.
struct Crowd<D> {
    members: Vec<(TcpStream, D)>,
    progress: Progress,
}

struct Progress {
    received: Vec<Counter>,
    /// What everybody is to receive; not known while the publisher is at work.
    total: AtomicU64,
    failed: AtomicBool,
}

/// A line of the cache each, for they are counted by different cores.
#[repr(align(128))]
#[derive(Default)]
struct Counter(AtomicU64);

impl Progress {
    fn slowest(&self) -> u64 {
        self.received
            .iter()
            .map(|counter| counter.0.load(Ordering::Acquire))
            .min()
            .unwrap_or(0)
    }

    /// Fails if a subscriber did, or if nothing has moved since then for too long.
    fn check(&self, since: Instant) -> io::Result<()> {
        if self.failed.load(Ordering::Relaxed) {
            return Err(io::Error::other("a subscriber failed"));
        }
        if since.elapsed() > PATIENCE {
            return Err(io::Error::new(
                ErrorKind::TimedOut,
                "no ack and no delivery any more",
            ));
        }
        Ok(())
    }
}

fn subscriber<D: Dialect>(port: u16, client: usize) -> io::Result<(TcpStream, D)> {
    let (mut stream, mut dialect) = D::open(port, client)?;
    dialect.subscribe(&mut stream)?;
    Ok((stream, dialect))
}

impl<D: Dialect> Crowd<D> {
    fn gather(port: u16, count: usize) -> io::Result<Self> {
        let members = (0..count)
            .map(|index| subscriber(port, FIRST_SUBSCRIBER + index))
            .collect::<io::Result<Vec<_>>>()?;
        let progress = Progress {
            received: (0..count).map(|_| Counter::default()).collect(),
            total: AtomicU64::new(u64::MAX),
            failed: AtomicBool::new(false),
        };
        Ok(Crowd { members, progress })
    }

    /// Lets every subscriber receive while `publish` runs and until all it sent has come.
    fn receiving(
        self,
        each: impl Fn(usize, &[u8]) + Sync,
        publish: impl FnOnce(&Progress) -> io::Result<u64>,
    ) -> io::Result<u64> {
        let Crowd { members, progress } = self;
        thread::scope(|scope| {
            let (progress, each) = (&progress, &each);
            let running: Vec<_> = members
                .into_iter()
                .enumerate()
                .map(|(index, (stream, dialect))| {
                    scope.spawn(move || {
                        let done = receive(&stream, dialect, progress, index, each);
                        if done.is_err() {
                            progress.failed.store(true, Ordering::Relaxed);
                        }
                        done
                    })
                })
                .collect();
            let published = publish(progress);
            // Without a total nobody is waited for: what went wrong is told instead.
            let total = *published.as_ref().unwrap_or(&0);
            progress.total.store(total, Ordering::Release);
            let received: io::Result<Vec<()>> = running.into_iter().map(joined).collect();
            // What a subscriber says is nearer to the cause than that one failed.
            received.and(published)
        })
    }
}

fn receive<D: Dialect>(
    stream: &TcpStream,
    mut dialect: D,
    progress: &Progress,
    index: usize,
    each: &impl Fn(usize, &[u8]),
) -> io::Result<()> {
    let mut wire = stream;
    let (mut inbox, mut answer, mut wanted) = (Inbox::new(), Vec::new(), Payload::new());
    let counter = &progress.received[index].0;
    let (mut received, mut heard) = (0, Instant::now());
    stream.set_read_timeout(Some(LOOK))?;
    while received < progress.total.load(Ordering::Acquire) {
        match inbox.read(stream) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if progress.total.load(Ordering::Acquire) != u64::MAX && heard.elapsed() > PATIENCE {
                    return Err(io::Error::new(
                        ErrorKind::TimedOut,
                        format!("lost: {received} deliveries, then none"),
                    ));
                }
                continue;
            }
            other => other?,
        }
        heard = Instant::now();
        let used = dialect.deliveries(inbox.bytes(), &mut answer, &mut |delivered| {
            wanted.expect(delivered)?;
            received += 1;
            each(index, delivered);
            Ok(())
        })?;
        inbox.used(used);
        counter.store(received, Ordering::Release);
        if !answer.is_empty() {
            wire.write_all(&answer)?;
            answer.clear();
        }
    }
    Ok(())
}

/// A thread's own word; a panic of it is one of this program.
fn joined<T>(thread: thread::ScopedJoinHandle<'_, io::Result<T>>) -> io::Result<T> {
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("a thread of the load panicked")))
}

/// Sessions granted and closed, one after the other.
pub fn hand_shake<D: Dialect>(port: u16, count: usize) -> io::Result<Told> {
    let mut took = Vec::with_capacity(count);
    for client in 0..count {
        let began = Instant::now();
        let granted = D::open(port, client)?;
        took.push(nanos(began.elapsed()));
        drop(granted);
    }
    Ok(Told::new().with_latencies(&mut took))
}

/// Sessions that do nothing, until stdin ends. Says `ready` once all are granted.
pub fn idle<D: Dialect>(port: u16, count: usize) -> io::Result<Told> {
    let held = (0..count)
        .map(|client| D::open(port, client))
        .collect::<io::Result<Vec<_>>>()?;
    writeln!(io::stdout(), "ready")?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    let kept = held.iter().filter(|(stream, _)| !has_ended(stream)).count();
    Ok(Told::new().with("kept", kept as f64))
}
