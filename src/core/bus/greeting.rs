//! Opening a session: the connection, the hello, the answer (docs/PROTOCOL.md).
//!
//! Here: everything before the first frame, under one deadline. Not here: frames
//! (`bus::client_frame`), the session itself (`bus::client`).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::core::host;

use super::error::BusError;

/// The hello line of a client of this version.
pub(super) const HELLO: &str = "hello vm:host capabilities=bus-v1\n";

/// Longest line before the frames, bytes (docs/PROTOCOL.md).
const LINE_BYTES: usize = 512;

/// What the broker has granted.
#[derive(Debug)]
pub(super) struct Granted {
    /// The session's public id.
    pub session: String,
    /// The heartbeat interval that the broker expects.
    pub heartbeat: Duration,
    /// Bytes received after the answer, which belong to frames.
    pub heard: Vec<u8>,
}

/// Sends the hello and reads the answer.
pub(super) fn greet(stream: &mut UnixStream, until: Instant) -> Result<Granted, BusError> {
    stream.set_nonblocking(true).map_err(broken)?;
    // The hello may be sent before the greeting was read, which saves a round trip.
    match stream.write_all(HELLO.as_bytes()) {
        Ok(()) => {}
        // The broker has closed the connection; its first line says why.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(error) => return Err(broken(error)),
    }
    let mut heard = Vec::new();
    let greeting = line(stream, &mut heard, until, "greeting")?;
    match greeting.split_whitespace().collect::<Vec<_>>()[..] {
        ["castra-broker", "1", ..] => {}
        ["castra-broker", version, ..] => {
            return Err(BusError::Stranger(format!(
                "it speaks version {version:?} of the protocol, and this castra speaks version 1"
            )));
        }
        _ => return Err(BusError::Stranger(format!("it greets with {greeting:?}"))),
    }
    let reply = line(stream, &mut heard, until, "answer to the hello")?;
    let (session, heartbeat) = parse_reply(&reply)?;
    Ok(Granted {
        session,
        heartbeat,
        heard,
    })
}

/// Connects in a thread of its own: with a broker that has stopped accepting, `connect` would block
/// for ever, and std has no timeout for Unix sockets. The socket is named relative to its
/// directory, so no path is too long.
pub(super) fn open(socket: &Path, within: Duration) -> Result<UnixStream, BusError> {
    let unusable = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => BusError::NoBroker(socket.to_owned()),
        _ => BusError::Socket(socket.to_owned(), error.to_string()),
    };
    let (Some(directory), Some(name)) = (socket.parent(), socket.file_name().and_then(|name| name.to_str()))
    else {
        return Err(BusError::Socket(
            socket.to_owned(),
            "it doesn't name a file".to_owned(),
        ));
    };
    let directory = File::open(directory).map_err(unusable)?;
    let name = name.to_owned();
    let (tell, told) = crossbeam_channel::bounded(1);
    thread::Builder::new()
        .name("bus-connect".to_owned())
        .spawn(move || {
            let connected = UnixStream::connect(host::short_path(&directory, &name));
            // The waiting thread may have given up.
            let _ = tell.send(connected);
        })
        .map_err(broken)?;
    match told.recv_timeout(within) {
        Ok(connected) => connected.map_err(unusable),
        Err(_) => Err(BusError::TimedOut("connection")),
    }
}

/// Reads one line; the bytes after it stay in `heard`.
fn line(
    stream: &mut UnixStream,
    heard: &mut Vec<u8>,
    until: Instant,
    what: &'static str,
) -> Result<String, BusError> {
    loop {
        if let Some(end) = heard.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = heard.drain(..=end).collect();
            return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
        if heard.len() > LINE_BYTES {
            return Err(BusError::Stranger(format!(
                "it sent more than {LINE_BYTES} bytes without a line end"
            )));
        }
        let mut piece = [0; LINE_BYTES];
        match stream.read(&mut piece) {
            Ok(0) => return Err(BusError::Ended),
            Ok(count) => heard.extend_from_slice(&piece[..count]),
            Err(error) if is_nothing(&error) => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(BusError::TimedOut(what));
                }
                let mut watched = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut watched, timeout(left));
            }
            Err(error) => return Err(broken(error)),
        }
    }
}

/// The answer to a hello: the session's id and its heartbeat.
fn parse_reply(reply: &str) -> Result<(String, Duration), BusError> {
    let mut words = reply.split_whitespace();
    let verdict = words.next();
    let value = |key: &str| {
        reply
            .split_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    };
    match verdict {
        Some("declined") => Err(BusError::Declined(
            value("reason").unwrap_or("no reason given").to_owned(),
        )),
        Some("ok") => match value("session") {
            Some(session) => {
                let secs = value("heartbeat_secs").and_then(|secs| secs.parse::<u64>().ok());
                // A day is longer than every sensible window; without a number the default applies.
                let secs = secs.unwrap_or(15).clamp(1, 86_400);
                Ok((session.to_owned(), Duration::from_secs(secs)))
            }
            None => Err(BusError::NoBus),
        },
        _ => Err(BusError::Stranger(format!("it answers {reply:?}"))),
    }
}

/// Rounded up: a wait that ends a little early would be repeated in a busy loop.
pub(super) fn timeout(limit: Duration) -> PollTimeout {
    let millis = limit.as_nanos().div_ceil(1_000_000);
    i32::try_from(millis)
        .ok()
        .and_then(|millis| PollTimeout::try_from(millis).ok())
        .unwrap_or(PollTimeout::MAX)
}

/// Whether this error only means that nothing came.
pub(super) fn is_nothing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::TimedOut
    )
}

/// A failed connection.
pub(super) fn broken(error: io::Error) -> BusError {
    BusError::Broken(error.to_string())
}
