//! Whether the guest's SSH server answers: the search for its banner.
//!
//! Here: connecting and reading the first line, again and again, cheaply. Not here: what a banner proves
//! (`bootstrap::wait_for_guest`, `bootstrap::steps`).
//!
//! User-mode networking accepts a forwarded connection before the guest listens, so only the banner counts.
//! Until the guest's network is up, a connection hangs; while nobody listens, it is reset at once. So several
//! attempts overlap, and each is given up after a while: soon while the guest is young, later the older it
//! is. If attempts were always given up soon, a guest so slow that its server needs many seconds for a banner
//! would never be noticed, and every attempt costs it a process.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Attempts under way at once. Some servers (dropbear) allow five unauthenticated connections from one address.
const AT_ONCE: usize = 4;
/// An attempt without a banner is given up after a quarter of the guest's age, within these bounds. The lower
/// one finds a guest whose network has just come up, the upper one a slow server.
const GIVE_UP_FIRST: Duration = Duration::from_secs(2);
const GIVE_UP_LAST: Duration = Duration::from_secs(20);
/// The pause after a reset; and the same once the guest is known to live.
const AFTER_RESET: Duration = Duration::from_millis(100);
const AFTER_RESET_EAGER: Duration = Duration::from_millis(20);
/// Limit for the TCP connection itself. On the loopback it takes microseconds or hangs.
const CONNECT: Duration = Duration::from_millis(250);
/// How often the thread checks whether the search was cancelled.
const SLICE: Duration = Duration::from_millis(50);
/// Servers may send other lines before the banner (RFC 4253, 4.2), but castra reads only so many bytes of
/// them.
const MAX_BYTES: usize = 4096;

/// A search under way in a thread of its own.
pub struct BannerSearch {
    found: Receiver<String>,
    seen: Option<String>,
    wanted: Arc<AtomicBool>,
    eager: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl BannerSearch {
    /// Starts a search at this address, for a guest that was launched this long ago.
    pub fn start(host: &str, port: u16, label: &str, age: Duration) -> io::Result<BannerSearch> {
        let (tell, found) = bounded(1);
        let wanted = Arc::new(AtomicBool::new(true));
        let eager = Arc::new(AtomicBool::new(false));
        let thread = {
            let (wanted, eager, host) = (Arc::clone(&wanted), Arc::clone(&eager), host.to_owned());
            thread::Builder::new()
                .name(format!("banner {label}"))
                .spawn(move || {
                    if let Some(banner) = search(&host, port, age, &wanted, &eager) {
                        let _ = tell.send(banner);
                    }
                })?
        };
        Ok(BannerSearch {
            found,
            seen: None,
            wanted,
            eager,
            thread: Some(thread),
        })
    }

    /// The guest is known to live: attempts come more often from now on.
    pub fn retry_faster(&self) {
        self.eager.store(true, Ordering::Relaxed);
    }

    /// The banner, if it was seen; waits for it at most this long.
    pub fn wait(&mut self, limit: Duration) -> Option<&str> {
        if self.seen.is_none() {
            // A thread that ended without a banner leaves a closed channel, which doesn't wait.
            self.seen = self.found.recv_timeout(limit).ok();
        }
        self.seen.as_deref()
    }
}

impl Drop for BannerSearch {
    fn drop(&mut self) {
        self.wanted.store(false, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Attempt {
    stream: TcpStream,
    until: Instant,
    got: Vec<u8>,
}

/// What one look at an attempt found.
enum AttemptState {
    Waiting,
    Closed,
    Banner(String),
}

fn search(host: &str, port: u16, age: Duration, wanted: &AtomicBool, eager: &AtomicBool) -> Option<String> {
    let mut attempts: Vec<Attempt> = Vec::new();
    let began = Instant::now();
    let mut next = began;
    let mut address = None;
    let mut was_eager = false;
    while wanted.load(Ordering::Relaxed) {
        let now = Instant::now();
        let is_eager = eager.load(Ordering::Relaxed);
        if is_eager && !was_eager {
            // An attempt that began before the guest's network was up may hang for seconds more.
            was_eager = true;
            attempts.clear();
            next = now;
        }
        attempts.retain(|attempt| now < attempt.until);
        if now >= next && attempts.len() < AT_ONCE {
            address = address.or_else(|| resolve(host, port));
            match address.map(connect) {
                Some(Ok(stream)) => {
                    let patience = attempt_timeout(age + now.duration_since(began), is_eager);
                    attempts.push(Attempt {
                        stream,
                        until: now + patience,
                        got: Vec::new(),
                    });
                    // Attempts are spread evenly, so that one of them is always recent.
                    next = now + patience / AT_ONCE as u32;
                }
                _ => next = now + AFTER_RESET,
            }
        }
        let pause = next.saturating_duration_since(Instant::now()).min(SLICE);
        wait_readable(&attempts, pause);
        let mut banner = None;
        attempts.retain_mut(|attempt| match look_at(attempt) {
            AttemptState::Waiting => true,
            AttemptState::Closed => {
                let again = if is_eager { AFTER_RESET_EAGER } else { AFTER_RESET };
                next = next.min(Instant::now() + again);
                false
            }
            AttemptState::Banner(text) => {
                banner = Some(text);
                false
            }
        });
        if banner.is_some() {
            return banner;
        }
    }
    None
}

/// How long an attempt may stay without a banner. If the guest is known to live, its network is up, and an
/// attempt that hangs has reached a slow server.
fn attempt_timeout(age: Duration, is_eager: bool) -> Duration {
    if is_eager {
        return GIVE_UP_LAST;
    }
    (age / 4).clamp(GIVE_UP_FIRST, GIVE_UP_LAST)
}

fn resolve(host: &str, port: u16) -> Option<SocketAddr> {
    (host, port).to_socket_addrs().ok()?.next()
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, CONNECT)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

fn wait_readable(attempts: &[Attempt], pause: Duration) {
    let mut descriptors: Vec<PollFd<'_>> = attempts
        .iter()
        .map(|attempt| PollFd::new(attempt.stream.as_fd(), PollFlags::POLLIN))
        .collect();
    // Rounded up: a pause of half a millisecond must not become a busy loop.
    let millis = u16::try_from(pause.as_millis() + 1).unwrap_or(u16::MAX);
    let _ = poll(&mut descriptors, PollTimeout::from(millis));
}

fn look_at(attempt: &mut Attempt) -> AttemptState {
    let mut buffer = [0; 512];
    loop {
        match attempt.stream.read(&mut buffer) {
            Ok(0) => return AttemptState::Closed,
            Ok(count) => {
                attempt.got.extend_from_slice(&buffer[..count]);
                if let Some(banner) = banner_in(&attempt.got) {
                    return AttemptState::Banner(banner);
                }
                if attempt.got.len() > MAX_BYTES {
                    return AttemptState::Closed;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return AttemptState::Waiting,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return AttemptState::Closed,
        }
    }
}

/// The first whole line that is an SSH banner.
fn banner_in(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().rposition(|byte| *byte == b'\n')?;
    bytes[..end]
        .split(|byte| *byte == b'\n')
        .find(|line| line.starts_with(b"SSH-"))
        .map(|line| String::from_utf8_lossy(line).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;

    #[test]
    fn resets_and_silence_are_outlived() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = thread::spawn(move || {
            drop(listener.accept().unwrap());
            let silent = listener.accept().unwrap();
            let mut speaking = listener.accept().unwrap().0;
            speaking.write_all(b"hello there\r\nSSH-2.0-test_1\r\n").unwrap();
            (silent, speaking)
        });
        let mut search = BannerSearch::start("127.0.0.1", port, "test", Duration::ZERO).unwrap();
        search.retry_faster();
        assert_eq!(search.wait(Duration::from_secs(20)), Some("SSH-2.0-test_1"));
        assert_eq!(search.wait(Duration::ZERO), Some("SSH-2.0-test_1"));
        drop(server.join().unwrap());
    }

    #[test]
    fn the_patience_grows_with_the_guest() {
        for (age, expected) in [(0, 2), (7, 2), (40, 10), (80, 20), (1000, 20)] {
            let found = attempt_timeout(Duration::from_secs(age), false);
            assert_eq!(found, Duration::from_secs(expected), "{age}");
        }
        assert_eq!(attempt_timeout(Duration::ZERO, true), Duration::from_secs(20));
    }

    #[test]
    fn a_slow_server_is_not_asked_again_and_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut search = BannerSearch::start("127.0.0.1", port, "test", Duration::ZERO).unwrap();
        search.retry_faster();
        // The stand-in answers the last of the first attempts, later than a young guest's attempts are given
        // up.
        let mut attempts = vec![listener.accept().unwrap().0];
        listener.set_nonblocking(true).unwrap();
        assert_eq!(search.wait(GIVE_UP_FIRST + Duration::from_millis(300)), None);
        attempts.extend(std::iter::from_fn(|| {
            listener.accept().ok().map(|(stream, _)| stream)
        }));
        assert!(attempts.len() <= 2, "{} attempts", attempts.len());
        for stream in &mut attempts {
            let _ = stream.write_all(b"SSH-2.0-slow\r\n");
        }
        assert_eq!(search.wait(Duration::from_secs(20)), Some("SSH-2.0-slow"));
    }

    #[test]
    fn an_open_port_is_no_banner() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut search = BannerSearch::start("127.0.0.1", port, "test", Duration::ZERO).unwrap();
        assert_eq!(search.wait(Duration::from_millis(100)), None);
    }

    #[test]
    fn only_whole_banner_lines_count() {
        for (bytes, banner) in [
            (&b"SSH-2.0-x"[..], None),
            (b"SSH-2.0-x\r\n", Some("SSH-2.0-x")),
            (b"a\nSSH-2.0-x\nrest", Some("SSH-2.0-x")),
            (b"HTTP/1.1 400\r\n\r\n", None),
            (b"", None),
        ] {
            assert_eq!(banner_in(bytes).as_deref(), banner);
        }
    }
}
