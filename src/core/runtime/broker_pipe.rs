//! The connection of a guest on an isolated network to the broker.
//!
//! Here: what `castra broker-pipe PORT` does, which QEMU starts once per connection that the guest
//! opens to the broker's address. It must print nothing itself: libslirp connects stdin, stdout
//! *and* stderr to the guest. Not here: how QEMU is told to start it ([`super::qemu`]).

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

/// The broker is on this host's loopback: it answers at once or not at all.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Copies `from_guest` to the broker on this port of the loopback and its answers to `to_guest`
/// until the broker has closed. The end of the guest's half is passed on.
pub fn broker_pipe(
    port: u16,
    mut from_guest: impl Read + Send + 'static,
    mut to_guest: impl Write,
) -> io::Result<()> {
    let mut broker = TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, port).into(), CONNECT_LIMIT)?;
    broker.set_nodelay(true)?;
    let mut upward = broker.try_clone()?;
    // Never joined: a guest that keeps its half open must not keep this process alive after the
    // broker has closed.
    thread::Builder::new().name("to-broker".into()).spawn(move || {
        let _ = copy(&mut from_guest, &mut upward);
        let _ = upward.shutdown(Shutdown::Write);
    })?;
    copy(&mut broker, &mut to_guest)
}

/// As `io::copy`, but each piece goes out at once: stdout may be buffered by lines.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                to.write_all(&buffer[..count])?;
                to.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn both_directions_and_their_ends_pass() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let broker = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"castra-broker 1 ready\n").unwrap();
            let mut hello = Vec::new();
            stream.read_to_end(&mut hello).unwrap();
            stream.write_all(b"ok\n").unwrap();
            hello
        });
        let mut answers = Vec::new();
        broker_pipe(port, &b"hello vm:web-0\n"[..], &mut answers).unwrap();
        assert_eq!(answers, b"castra-broker 1 ready\nok\n");
        assert_eq!(broker.join().unwrap(), b"hello vm:web-0\n");
    }

    #[test]
    fn a_guest_that_stays_silent_doesnt_hold_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let broker = thread::spawn(move || drop(listener.accept().unwrap()));
        let (silent, _kept_open) = io::pipe().unwrap();
        broker_pipe(port, silent, Vec::new()).unwrap();
        broker.join().unwrap();
    }
}
