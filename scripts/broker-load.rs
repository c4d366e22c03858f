//! Load for `bench-broker.py`: handshakes as fast as they are answered, and crowds of bad clients.
//!
//! Here: the clients of castra's broker and, equally built, of an MQTT broker; they print one JSON
//! object. Not here: the servers, the rounds and the ratios, which the script owns. Std alone, and
//! in Rust because a load written in Python would measure Python.
//!
//! usage: broker-load hello|mqtt PORT CLIENTS COUNT      each client shakes hands COUNT times
//!        broker-load crowd PORT SILENT DRIPPING FLOODING  until its stdin ends

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Beyond this a handshake has failed.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let numbers: Option<Vec<usize>> = words.iter().skip(1).map(|word| word.parse().ok()).collect();
    let port = |number: usize| u16::try_from(number).ok();
    match (words.first().map(String::as_str), numbers.as_deref()) {
        (Some("hello"), Some(&[to, clients, count])) if let Some(to) = port(to) => {
            shake(to, clients, count, hello)
        }
        (Some("mqtt"), Some(&[to, clients, count])) if let Some(to) = port(to) => {
            shake(to, clients, count, mqtt)
        }
        (Some("crowd"), Some(&[to, silent, dripping, flooding])) if let Some(to) = port(to) => {
            crowd(to, silent, dripping, flooding)
        }
        _ => Err(io::Error::new(
            ErrorKind::InvalidInput,
            "broker-load hello|mqtt PORT CLIENTS COUNT, or crowd PORT SILENT DRIPPING FLOODING",
        )),
    }
}

/// One handshake of the client of this number; an answer that is no acceptance is an error.
type HandShake = fn(u16, usize) -> io::Result<()>;

fn connect(port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn hello(port: u16, client: usize) -> io::Result<()> {
    let mut stream = connect(port)?;
    stream.write_all(format!("hello vm:web-{client}\n").as_bytes())?;
    let (mut said, mut held) = ([0; 256], 0);
    // Greeting and answer: two lines, in however many pieces.
    while said[..held].iter().filter(|byte| **byte == b'\n').count() < 2 {
        match stream.read(&mut said[held..])? {
            0 => break,
            more => held += more,
        }
    }
    if said[..held].ends_with(b" ready\nok\n") {
        return Ok(());
    }
    Err(refused(&said[..held]))
}

/// MQTT 3.1.1 with a session the server has to keep, as castra keeps a record.
fn mqtt(port: u16, client: usize) -> io::Result<()> {
    let mut stream = connect(port)?;
    let id = format!("web-{client}");
    let mut packet = vec![0x10, u8::try_from(12 + id.len()).map_err(io::Error::other)?];
    packet.extend(b"\0\x04MQTT\x04\0\0\x3c\0");
    packet.push(u8::try_from(id.len()).map_err(io::Error::other)?);
    packet.extend(id.as_bytes());
    stream.write_all(&packet)?;
    let mut acknowledged = [0; 4];
    stream.read_exact(&mut acknowledged)?;
    if acknowledged[0] == 0x20 && acknowledged[3] == 0 {
        return Ok(());
    }
    Err(refused(&acknowledged))
}

fn refused(answer: &[u8]) -> io::Error {
    io::Error::other(format!("answered {:?}", String::from_utf8_lossy(answer)))
}

/// All clients at once, each one handshake after the other.
fn shake(port: u16, clients: usize, count: usize, hand_shake: HandShake) -> io::Result<()> {
    let failed = AtomicU64::new(0);
    let began = Instant::now();
    let mut took: Vec<u64> = std::thread::scope(|scope| {
        let failed = &failed;
        let running: Vec<_> = (0..clients)
            .map(|client| scope.spawn(move || one_client(port, client, count, hand_shake, failed)))
            .collect();
        running
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_default())
            .collect()
    });
    let seconds = began.elapsed().as_secs_f64();
    took.sort_unstable();
    let at = |share: f64| {
        let index = (took.len() as f64 * share) as usize;
        took.get(index.min(took.len().saturating_sub(1)))
            .copied()
            .unwrap_or(0)
    };
    writeln!(
        io::stdout(),
        "{{\"done\":{},\"failed\":{},\"per_second\":{:.1},\"p50_us\":{},\"p99_us\":{},\"worst_us\":{}}}",
        took.len(),
        failed.load(Ordering::Relaxed),
        took.len() as f64 / seconds,
        at(0.5),
        at(0.99),
        at(1.0),
    )
}

fn one_client(port: u16, client: usize, count: usize, hand_shake: HandShake, failed: &AtomicU64) -> Vec<u64> {
    let mut took = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        match hand_shake(port, client) {
            Ok(()) => took.push(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX)),
            Err(error) => {
                if failed.fetch_add(1, Ordering::Relaxed) == 0 {
                    eprintln!("broker-load: {error}");
                }
            }
        }
    }
    took
}

/// Silent connections, some that drip a byte a second, some that flood, until stdin ends. Says
/// `ready` once they stand; at the end how many of the quiet ones the server still kept.
fn crowd(port: u16, silent: usize, dripping: usize, flooding: usize) -> io::Result<()> {
    let open = |count: usize| -> io::Result<Vec<TcpStream>> {
        let mut held = Vec::with_capacity(count);
        for _ in 0..count {
            let mut stream = connect(port)?;
            // The greeting proves that the server has taken this one in.
            stream.read_exact(&mut [0; 22])?;
            held.push(stream);
        }
        Ok(held)
    };
    let silent = open(silent)?;
    let mut drips = open(dripping)?;
    let over = AtomicBool::new(false);
    let (floods, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| -> io::Result<()> {
        scope.spawn(|| {
            // Never a whole hello, never one that can't become one.
            for byte in b"hello vm:".iter().chain(std::iter::repeat(&b'd')) {
                for drip in &mut drips {
                    let _ = drip.write_all(&[*byte]);
                }
                for _ in 0..20 {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        });
        for _ in 0..flooding {
            scope.spawn(|| {
                let garbage = [b'x'; 65_536];
                while !over.load(Ordering::Relaxed) {
                    let Ok(mut stream) = connect(port) else { continue };
                    floods.fetch_add(1, Ordering::Relaxed);
                    while let Ok(more) = stream.write(&garbage) {
                        bytes.fetch_add(more as u64, Ordering::Relaxed);
                    }
                }
            });
        }
        writeln!(io::stdout(), "ready")?;
        let waited = io::copy(&mut io::stdin(), &mut io::sink());
        over.store(true, Ordering::Relaxed);
        waited.map(|_| ())
    })?;
    let kept = silent
        .iter()
        .chain(&drips)
        .filter(|stream| is_open(stream))
        .count();
    writeln!(
        io::stdout(),
        "{{\"kept\":{kept},\"floods\":{},\"flood_bytes\":{}}}",
        floods.into_inner(),
        bytes.into_inner()
    )
}

/// Nothing has come since the greeting, the end least of all.
fn is_open(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).is_ok()
        && matches!(stream.peek(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
}
