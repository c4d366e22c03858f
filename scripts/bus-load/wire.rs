//! What all systems have in common: a connection, bytes read in big pieces, numbered payloads, and
//! the words a dialect has to know.
//!
//! Not here: any protocol. A dialect turns payloads into bytes and bytes into counts; it is called
//! once for all that one read brought, so that no system pays for a call per message.

use std::io::{self, ErrorKind, Read};
use std::net::TcpStream;
use std::time::Duration;

/// Beyond this without any answer a server has failed.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes of every payload; as JSON a string of 198 characters.
pub const PAYLOAD: usize = 200;

/// One client's side of a protocol.
pub trait Dialect: Send + Sized {
    /// Connects and is granted a session. Clients of different numbers may be different guests.
    fn open(port: u16, client: usize) -> io::Result<(TcpStream, Self)>;

    /// Leaves the server as if nobody had published, where that is something a client asks for.
    fn reset(_port: u16) -> io::Result<()> {
        Ok(())
    }

    /// Appends one durable publish.
    fn publish(&mut self, payload: &[u8; PAYLOAD], out: &mut Vec<u8>);

    /// Counts whole acks; anything but an acceptance is an error. Returns bytes used and acks found.
    fn acks(&mut self, bytes: &[u8], answer: &mut Vec<u8>) -> io::Result<(usize, usize)>;

    /// Subscribes; when it returns the server has said that it stands, if it ever says so.
    fn subscribe(&mut self, stream: &mut TcpStream) -> io::Result<()>;

    /// Hands each whole delivery's payload on and returns the bytes used. `answer` is sent back
    /// once everything in hand has been looked at.
    fn deliveries(
        &mut self,
        bytes: &[u8],
        answer: &mut Vec<u8>,
        each: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<usize>;
}

pub fn connect(port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// An answer nobody asked for: told with its beginning, because the whole may be a megabyte.
pub fn unexpected(answer: &[u8]) -> io::Error {
    let start = &answer[..answer.len().min(200)];
    io::Error::other(format!("answered {:?}", String::from_utf8_lossy(start)))
}

/// Reads until `whole` says how long the answer is; the bytes after it stay unread by construction,
/// because nothing follows an answer that the client waits for.
pub fn answer(stream: &mut TcpStream, whole: impl Fn(&[u8]) -> bool) -> io::Result<Vec<u8>> {
    let mut inbox = Inbox::with_room(4096);
    while !whole(inbox.bytes()) {
        inbox.read(stream)?;
    }
    Ok(inbox.bytes().to_vec())
}

/// Bytes read and not yet used.
pub struct Inbox {
    held: Vec<u8>,
    filled: usize,
}

impl Inbox {
    pub fn new() -> Self {
        Self::with_room(256 * 1024)
    }

    fn with_room(room: usize) -> Self {
        Inbox {
            held: vec![0; room],
            filled: 0,
        }
    }

    /// One read; the end of the stream is an error.
    pub fn read(&mut self, mut stream: &TcpStream) -> io::Result<()> {
        match stream.read(&mut self.held[self.filled..])? {
            0 => Err(io::Error::new(
                ErrorKind::UnexpectedEof,
                "the server closed the connection",
            )),
            more => {
                self.filled += more;
                Ok(())
            }
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.held[..self.filled]
    }

    /// Forgets what was used; the rest is the beginning of a message and short.
    pub fn used(&mut self, count: usize) {
        self.held.copy_within(count..self.filled, 0);
        self.filled -= count;
    }
}

/// A payload with a number that counts up and the moment it was sent:
/// `"0000000001 000000000000002a xxx…"`, a JSON string and harmless everywhere else.
pub struct Payload([u8; PAYLOAD]);

const NUMBER: std::ops::Range<usize> = 1..11;
const MOMENT: std::ops::Range<usize> = 12..28;

impl Payload {
    /// The one before the first.
    pub fn new() -> Self {
        let mut bytes = [b'x'; PAYLOAD];
        (bytes[0], bytes[PAYLOAD - 1]) = (b'"', b'"');
        bytes[NUMBER].fill(b'0');
        bytes[MOMENT].fill(b'0');
        (bytes[NUMBER.end], bytes[MOMENT.end]) = (b' ', b' ');
        Payload(bytes)
    }

    /// The next number, by counting in decimal: cheaper than formatting it.
    pub fn count(&mut self) -> &[u8; PAYLOAD] {
        for digit in self.0[NUMBER].iter_mut().rev() {
            if *digit < b'9' {
                *digit += 1;
                break;
            }
            *digit = b'0';
        }
        &self.0
    }

    pub fn stamp(&mut self, nanos: u64) {
        for (place, digit) in self.0[MOMENT].iter_mut().rev().enumerate() {
            *digit = b"0123456789abcdef"[(nanos >> (4 * place)) as usize & 15];
        }
    }

    /// Counts up and insists that the delivery is that very one: nothing lost, doubled or reordered.
    pub fn expect(&mut self, delivered: &[u8]) -> io::Result<()> {
        self.count();
        if delivered.len() == PAYLOAD && delivered[NUMBER] == self.0[NUMBER] {
            return Ok(());
        }
        let wanted = String::from_utf8_lossy(&self.0[NUMBER]).into_owned();
        Err(io::Error::other(format!(
            "wanted message {wanted}, but was given {:?}",
            String::from_utf8_lossy(&delivered[..delivered.len().min(30)])
        )))
    }

    /// When this delivery was sent.
    pub fn moment(delivered: &[u8]) -> u64 {
        delivered[MOMENT].iter().fold(0, |nanos, digit| {
            let value = if *digit < b'a' {
                digit - b'0'
            } else {
                digit - b'a' + 10
            };
            nanos << 4 | u64::from(value)
        })
    }
}
