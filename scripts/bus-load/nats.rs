//! NATS with JetStream: asynchronous publishes with an acknowledgement each, push consumers that
//! acknowledge nothing, as castra's subscribers don't.

use std::io::{self, Write};
use std::net::TcpStream;

use crate::wire::{Dialect, PAYLOAD, answer, connect, unexpected};

const CONNECT: &[u8] = b"CONNECT {\"verbose\":false,\"pedantic\":false,\"lang\":\"bench\",\"version\":\"1\",\"protocol\":1}\r\nPING\r\n";
const STREAM: &str = r#"{"name":"BENCH","subjects":["bench"],"storage":"file","retention":"limits","discard":"old","num_replicas":1,"max_consumers":-1,"max_msgs":-1,"max_bytes":-1,"max_age":0}"#;
const ACK: &[u8] = br#"{"stream":"BENCH""#;

/// One connection's inbox.
pub struct JetStream {
    client: usize,
    subscribed: bool,
    publish: Vec<u8>,
}

impl JetStream {
    fn request(&self, stream: &mut TcpStream, subject: &str, body: &str) -> io::Result<Vec<u8>> {
        let client = self.client;
        stream.write_all(
            format!(
                "SUB _REPLY.{client} 9\r\nPUB {subject} _REPLY.{client} {}\r\n{body}\r\n",
                body.len()
            )
            .as_bytes(),
        )?;
        let said = answer(stream, |said| matches!(message(said), Ok(Some(_))))?;
        stream.write_all(b"UNSUB 9\r\n")?;
        match message(&said)? {
            Some((_, body)) => Ok(body.to_vec()),
            None => Err(unexpected(&said)),
        }
    }
}

impl Dialect for JetStream {
    fn open(port: u16, client: usize) -> io::Result<(TcpStream, Self)> {
        let mut stream = connect(port)?;
        stream.write_all(CONNECT)?;
        let said = answer(&mut stream, |said| said.ends_with(b"PONG\r\n"))?;
        if !said.starts_with(b"INFO ") || said.windows(4).any(|word| word == b"-ERR") {
            return Err(unexpected(&said));
        }
        let publish = format!("PUB bench _ACK.{client} {PAYLOAD}\r\n").into_bytes();
        Ok((
            stream,
            JetStream {
                client,
                subscribed: false,
                publish,
            },
        ))
    }

    fn reset(port: u16) -> io::Result<()> {
        let (mut stream, dialect) = Self::open(port, 99_999)?;
        // The first time there is none to delete, and the answer says so.
        dialect.request(&mut stream, "$JS.API.STREAM.DELETE.BENCH", "")?;
        let said = dialect.request(&mut stream, "$JS.API.STREAM.CREATE.BENCH", STREAM)?;
        if said.windows(7).any(|word| word == b"\"error\"") {
            return Err(unexpected(&said));
        }
        Ok(())
    }

    fn publish(&mut self, payload: &[u8; PAYLOAD], out: &mut Vec<u8>) {
        if !self.subscribed {
            out.extend(format!("SUB _ACK.{} 1\r\n", self.client).as_bytes());
            self.subscribed = true;
        }
        out.extend_from_slice(&self.publish);
        out.extend_from_slice(payload);
        out.extend_from_slice(b"\r\n");
    }

    fn acks(&mut self, bytes: &[u8], answer: &mut Vec<u8>) -> io::Result<(usize, usize)> {
        let (mut used, mut acks) = (0, 0);
        while let Some(line) = control(&bytes[used..], answer)? {
            used += line;
            let Some((length, body)) = message(&bytes[used..])? else {
                break;
            };
            if !body.starts_with(ACK) {
                return Err(unexpected(body));
            }
            used += length;
            acks += 1;
        }
        Ok((used, acks))
    }

    fn subscribe(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        stream.write_all(format!("SUB _DELIVER.{} 2\r\n", self.client).as_bytes())?;
        let consumer = format!(
            r#"{{"stream_name":"BENCH","config":{{"deliver_subject":"_DELIVER.{}","deliver_policy":"all","ack_policy":"none","replay_policy":"instant"}}}}"#,
            self.client
        );
        let said = self.request(stream, "$JS.API.CONSUMER.CREATE.BENCH", &consumer)?;
        if said.windows(7).any(|word| word == b"\"error\"") {
            return Err(unexpected(&said));
        }
        Ok(())
    }

    fn deliveries(
        &mut self,
        bytes: &[u8],
        answer: &mut Vec<u8>,
        each: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<usize> {
        let mut used = 0;
        while let Some(line) = control(&bytes[used..], answer)? {
            used += line;
            let Some((length, body)) = message(&bytes[used..])? else {
                break;
            };
            each(body)?;
            used += length;
        }
        Ok(used)
    }
}

/// Passes over lines that are no message and answers a ping. `None` if no whole line is there.
fn control(bytes: &[u8], answer: &mut Vec<u8>) -> io::Result<Option<usize>> {
    let mut passed = 0;
    loop {
        let rest = &bytes[passed..];
        if rest.starts_with(b"MSG ") {
            return Ok(Some(passed));
        }
        let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
            return Ok(None);
        };
        match &rest[..end] {
            b"PING\r" => answer.extend_from_slice(b"PONG\r\n"),
            line if line.starts_with(b"INFO ") => {}
            line => return Err(unexpected(line)),
        }
        passed += end + 1;
    }
}

/// The first message, if it is whole: its length and its body.
fn message(bytes: &[u8]) -> io::Result<Option<(usize, &[u8])>> {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return Ok(None);
    };
    let line = bytes[..end].trim_ascii_end();
    if !line.starts_with(b"MSG ") {
        return Err(unexpected(line));
    }
    let mut length = 0;
    for digit in &line[line
        .iter()
        .rposition(|byte| *byte == b' ')
        .map_or(0, |space| space + 1)..]
    {
        length = length * 10 + usize::from(digit.wrapping_sub(b'0'));
    }
    let start = end + 1;
    match bytes.get(start..start + length + 2) {
        Some(body) => Ok(Some((start + length + 2, &body[..length]))),
        None => Ok(None),
    }
}
