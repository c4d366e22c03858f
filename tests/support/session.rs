//! A client of the bus at the level of bytes, for tests that say what no proper client would.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::AMPLE;

/// Either kind of socket.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A session.
pub struct Session {
    stream: Stream,
    bytes: Vec<u8>,
    at: usize,
}

impl Session {
    /// A guest's session.
    pub fn guest(port: u16, vm: &str) -> Session {
        Session::try_guest(port, vm).unwrap_or_else(|said| panic!("{vm} was told {said:?}"))
    }

    /// A guest's session, or what the broker said instead.
    pub fn try_guest(port: u16, vm: &str) -> Result<Session, String> {
        let stream = TcpStream::connect(("127.0.0.1", port)).map_err(|error| error.to_string())?;
        stream.set_read_timeout(Some(AMPLE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Session::open(Stream::Tcp(stream), vm)
    }

    /// The host's session.
    pub fn host(socket: &Path) -> Session {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(AMPLE)).unwrap();
        Session::open(Stream::Unix(stream), "host")
            .unwrap_or_else(|said| panic!("the host was told {said:?}"))
    }

    fn open(stream: Stream, vm: &str) -> Result<Session, String> {
        let mut session = Session {
            stream,
            bytes: Vec::new(),
            at: 0,
        };
        session
            .write(format!("hello vm:{vm} capabilities=bus-v1\n").as_bytes())
            .map_err(|error| error.to_string())?;
        let mut said = String::new();
        for _ in 0..2 {
            while !said.ends_with('\n') && session.fill() {
                while session.at < session.bytes.len() && !said.ends_with('\n') {
                    said.push(char::from(session.bytes[session.at]));
                    session.at += 1;
                }
            }
            if said.starts_with("ok session=s-") {
                return Ok(session);
            }
            if !said.starts_with("castra-broker 1 ready") {
                break;
            }
            said.clear();
        }
        Err(said)
    }

    /// Sends bytes as they are.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.stream {
            Stream::Tcp(tcp) => tcp.write_all(bytes),
            Stream::Unix(unix) => unix.write_all(bytes),
        }
    }

    /// Sends a frame of this body.
    pub fn send_raw(&mut self, body: &[u8]) {
        self.write(&framed(body)).unwrap();
    }

    /// Sends a frame.
    pub fn send(&mut self, frame: &Value) {
        self.send_raw(frame.to_string().as_bytes());
    }

    /// No write waits longer than this.
    pub fn write_timeout(&self, limit: Duration) {
        let limit = Some(limit);
        match &self.stream {
            Stream::Tcp(tcp) => tcp.set_write_timeout(limit).unwrap(),
            Stream::Unix(unix) => unix.set_write_timeout(limit).unwrap(),
        }
    }

    /// Nothing more is sent; what comes is still read.
    pub fn half_close(&self) {
        match &self.stream {
            Stream::Tcp(tcp) => tcp.shutdown(Shutdown::Write).unwrap(),
            Stream::Unix(unix) => unix.shutdown(Shutdown::Write).unwrap(),
        }
    }

    /// Reads until there is something; false at the end.
    fn fill(&mut self) -> bool {
        if self.at < self.bytes.len() {
            return true;
        }
        self.read_more()
    }

    fn read_more(&mut self) -> bool {
        if self.at > 0 {
            self.bytes.drain(..self.at);
            self.at = 0;
        }
        let mut piece = [0; 64 * 1024];
        let read = match &mut self.stream {
            Stream::Tcp(tcp) => tcp.read(&mut piece),
            Stream::Unix(unix) => unix.read(&mut piece),
        };
        match read {
            Ok(0) => false,
            Ok(more) => {
                self.bytes.extend_from_slice(&piece[..more]);
                true
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                panic!("waited {AMPLE:?} in vain for the broker to say something")
            }
            // Cut off.
            Err(_) => false,
        }
    }

    /// The body of the next frame; `None` at the end of the stream.
    pub fn body(&mut self) -> Option<Vec<u8>> {
        loop {
            let rest = &self.bytes[self.at..];
            if let Some((head, rest)) = rest.split_first_chunk::<4>() {
                let length = usize::try_from(u32::from_be_bytes(*head)).unwrap();
                if let Some(body) = rest.get(..length) {
                    let body = body.to_vec();
                    self.at += 4 + length;
                    return Some(body);
                }
            }
            if !self.read_more() {
                return None;
            }
        }
    }

    /// The next frame; `None` at the end of the stream.
    pub fn frame(&mut self) -> Option<Value> {
        self.body().map(|body| serde_json::from_slice(&body).unwrap())
    }

    /// The next frame, which must be an ack.
    #[track_caller]
    pub fn ack(&mut self) -> Value {
        let frame = self.frame().expect("an ack, not the end");
        assert_eq!(frame["type"], "ack", "{frame}");
        frame
    }

    /// Publishes and waits for the number.
    #[track_caller]
    pub fn publish(&mut self, topic: &str, payload: &Value) -> u64 {
        self.send(&json!({ "type": "publish", "topic": topic, "payload": payload }));
        let ack = self.ack();
        ack["seq"].as_u64().unwrap_or_else(|| panic!("{ack}"))
    }

    /// Subscribes and waits for the ack.
    #[track_caller]
    pub fn subscribe(&mut self, topic: &str, from: Option<u64>) -> Value {
        let mut frame = json!({ "type": "subscribe", "topic": topic });
        if let Some(from) = from {
            frame["from"] = from.into();
        }
        self.send(&frame);
        let ack = self.ack();
        assert_eq!(ack["status"], "ok", "{ack}");
        ack
    }

    /// It is still there and answered.
    #[track_caller]
    pub fn lives(&mut self) {
        self.send(&json!({ "type": "heartbeat", "id": "alive" }));
        assert_eq!(
            self.ack(),
            json!({ "type": "ack", "ack": "heartbeat", "status": "ok", "id": "alive" })
        );
    }
}

/// A frame of this body.
pub fn framed(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    [&length.to_be_bytes(), body].concat()
}

/// The number of a delivery, without reading all of it.
pub fn seq_of(body: &[u8]) -> u64 {
    let text = std::str::from_utf8(body).unwrap();
    let rest = text
        .strip_prefix("{\"type\":\"publish\",\"seq\":")
        .unwrap_or_else(|| panic!("no delivery: {text}"));
    rest.split(',').next().unwrap().parse().unwrap()
}
