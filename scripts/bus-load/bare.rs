//! What the systems are compared with: a relay that keeps nothing, and appends to a file.
//!
//! The relay has bus-v1's hello and framing, so the load for castra fits it unchanged. It reads no
//! JSON, logs nothing, numbers nothing and has no state but who subscribed: the least that loopback
//! TCP between separate processes can cost. Like castra it writes once for all that one read
//! brought, deliveries before acks.

use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::castra::first;
use crate::measure::{Told, nanos, share};
use crate::wire::Inbox;

const ACK: &[u8] = br#"{"type":"ack","ack":"publish","status":"ok","topic":"bench","seq":1234567}"#;
/// Where the frames of publish and subscribe first differ: `{"type":"p` and `{"type":"s`.
const KIND: usize = 9;

type Subscribers = Mutex<Vec<Arc<TcpStream>>>;

/// Serves a free port, which it prints, until its stdin ends.
pub fn relay() -> io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    writeln!(io::stdout(), "{}", listener.local_addr()?.port())?;
    let subscribers: Arc<Subscribers> = Arc::default();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let subscribers = Arc::clone(&subscribers);
            thread::spawn(move || {
                let stream = Arc::new(stream);
                // The end of a connection is no failure of the relay.
                let _ = serve(&stream, &subscribers);
                let mut all = subscribers.lock().unwrap_or_else(PoisonError::into_inner);
                all.retain(|one| !Arc::ptr_eq(one, &stream));
            });
        }
    });
    io::copy(&mut io::stdin(), &mut io::sink()).map(|_| ())
}

fn serve(stream: &Arc<TcpStream>, subscribers: &Subscribers) -> io::Result<()> {
    stream.set_nodelay(true)?;
    (&**stream).write_all(b"castra-broker 1 ready\n")?;
    BufReader::with_capacity(64, &**stream).read_until(b'\n', &mut Vec::new())?;
    (&**stream).write_all(b"ok session=s-0 heartbeat_secs=15\n")?;
    let mut inbox = Inbox::new();
    let (mut publishes, mut acks) = (Vec::new(), Vec::new());
    loop {
        inbox.read(stream)?;
        let mut used = 0;
        publishes.clear();
        acks.clear();
        while let Some(body) = first(&inbox.bytes()[used..]) {
            let whole = 4 + body.len();
            if body.get(KIND) == Some(&b'p') {
                publishes.extend_from_slice(&inbox.bytes()[used..used + whole]);
            } else {
                subscribers
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(Arc::clone(stream));
            }
            acks.extend_from_slice(&(ACK.len() as u32).to_be_bytes());
            acks.extend_from_slice(ACK);
            used += whole;
        }
        inbox.used(used);
        if !publishes.is_empty() {
            let to = subscribers.lock().unwrap_or_else(PoisonError::into_inner);
            for subscriber in to.iter() {
                // A subscriber that went is forgotten by its own thread.
                let _ = (&**subscriber).write_all(&publishes);
            }
        }
        (&**stream).write_all(&acks)?;
    }
}

/// Groups of so many lines appended to one file, each group synced before the next: as fast as this
/// disk can promise anything.
pub fn appends(file: &str, lines: usize, time: Duration) -> io::Result<Told> {
    // As long as castra's line for a payload of 200 bytes.
    let mut line = vec![b'x'; 276];
    line.push(b'\n');
    let group = line.repeat(lines);
    let mut log = OpenOptions::new().create(true).append(true).open(file)?;
    let mut took = Vec::new();
    let began = Instant::now();
    while began.elapsed() < time {
        let started = Instant::now();
        log.write_all(&group)?;
        log.sync_data()?;
        took.push(nanos(started.elapsed()));
    }
    let seconds = began.elapsed().as_secs_f64();
    took.sort_unstable();
    Ok(Told::new()
        .with("per_second", (took.len() * lines) as f64 / seconds)
        .with("groups", took.len() as f64)
        .with("p50_us", share(&took, 0.5))
        .with("p99_us", share(&took, 0.99)))
}
