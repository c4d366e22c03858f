//! Redis streams: pipelined XADD, and XREAD BLOCK that asks for what came after the last entry.

use std::io::{self, Write};
use std::net::TcpStream;

use crate::wire::{Dialect, PAYLOAD, answer, connect, unexpected};

const ADD: &[u8] = b"*5\r\n$4\r\nXADD\r\n$5\r\nbench\r\n$1\r\n*\r\n$1\r\np\r\n$200\r\n";
const DELETE: &[u8] = b"*2\r\n$3\r\nDEL\r\n$5\r\nbench\r\n";
const PING: &[u8] = b"*1\r\n$4\r\nPING\r\n";
/// An entry as XREAD tells it: id, then the field `p` and its value.
const FIELD: &[u8] = b"*2\r\n$1\r\np\r\n$200\r\n";

/// How far one reader is.
pub struct Redis {
    /// Entries of the current reply still to come.
    expected: usize,
    /// The id of the last entry seen.
    last: Vec<u8>,
}

impl Redis {
    fn ask(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(
            b"*6\r\n$5\r\nXREAD\r\n$5\r\nBLOCK\r\n$1\r\n0\r\n$7\r\nSTREAMS\r\n$5\r\nbench\r\n",
        );
        out.extend_from_slice(format!("${}\r\n", self.last.len()).as_bytes());
        out.extend_from_slice(&self.last);
        out.extend_from_slice(b"\r\n");
    }
}

impl Dialect for Redis {
    fn open(port: u16, _client: usize) -> io::Result<(TcpStream, Self)> {
        let mut stream = connect(port)?;
        stream.write_all(PING)?;
        let said = answer(&mut stream, |said| said.ends_with(b"\n"))?;
        if said != b"+PONG\r\n" {
            return Err(unexpected(&said));
        }
        Ok((
            stream,
            Redis {
                expected: 0,
                last: b"0-0".to_vec(),
            },
        ))
    }

    fn reset(port: u16) -> io::Result<()> {
        let (mut stream, _) = Self::open(port, 0)?;
        stream.write_all(DELETE)?;
        let said = answer(&mut stream, |said| said.ends_with(b"\n"))?;
        if !said.starts_with(b":") {
            return Err(unexpected(&said));
        }
        Ok(())
    }

    fn publish(&mut self, payload: &[u8; PAYLOAD], out: &mut Vec<u8>) {
        out.extend_from_slice(ADD);
        out.extend_from_slice(payload);
        out.extend_from_slice(b"\r\n");
    }

    fn acks(&mut self, bytes: &[u8], _answer: &mut Vec<u8>) -> io::Result<(usize, usize)> {
        let (mut used, mut acks) = (0, 0);
        while let Some((length, _)) = bulk(&bytes[used..])? {
            used += length;
            acks += 1;
        }
        Ok((used, acks))
    }

    /// From the beginning of the stream, which is empty: nothing between this and the first publish
    /// can be missed, so there is nothing to wait for.
    fn subscribe(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        let mut out = Vec::new();
        self.ask(&mut out);
        stream.write_all(&out)
    }

    fn deliveries(
        &mut self,
        bytes: &[u8],
        answer: &mut Vec<u8>,
        each: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<usize> {
        let mut used = 0;
        loop {
            let mut rest = &bytes[used..];
            if self.expected == 0 {
                // One stream, its name, then how many entries.
                const HEAD: &[u8] = b"*1\r\n*2\r\n$5\r\nbench\r\n*";
                let head = rest.len().min(HEAD.len());
                if rest[..head] != HEAD[..head] {
                    return Err(unexpected(rest));
                }
                let Some((length, entries)) = number(rest.get(HEAD.len()..).unwrap_or_default()) else {
                    return Ok(used);
                };
                self.expected = entries;
                used += HEAD.len() + length;
                continue;
            }
            // An entry: `*2`, its id, its fields.
            let entry = rest.len();
            let Some(more) = rest.get(4..) else {
                return Ok(used);
            };
            rest = more;
            let Some((length, id)) = bulk(rest)? else {
                return Ok(used);
            };
            rest = &rest[length..];
            let Some(value) = rest.get(FIELD.len()..FIELD.len() + PAYLOAD + 2) else {
                return Ok(used);
            };
            if !rest.starts_with(FIELD) {
                return Err(unexpected(rest));
            }
            each(&value[..PAYLOAD])?;
            used += entry - rest.len() + FIELD.len() + PAYLOAD + 2;
            self.expected -= 1;
            if self.expected == 0 {
                self.last.clear();
                self.last.extend_from_slice(id);
                self.ask(answer);
            }
        }
    }
}

/// Digits up to the end of their line: how long they are with it, and what they say.
fn number(bytes: &[u8]) -> Option<(usize, usize)> {
    let mut value = 0;
    for (index, byte) in bytes.iter().enumerate() {
        match byte {
            b'0'..=b'9' => value = value * 10 + usize::from(byte - b'0'),
            b'\n' => return Some((index + 1, value)),
            _ => {}
        }
    }
    None
}

/// A bulk string, if it is whole: its length with head and end, and its text.
fn bulk(bytes: &[u8]) -> io::Result<Option<(usize, &[u8])>> {
    match bytes.first() {
        Some(b'$') => {}
        None => return Ok(None),
        Some(_) => return Err(unexpected(bytes)),
    }
    let Some((head, length)) = number(&bytes[1..]) else {
        return Ok(None);
    };
    let start = 1 + head;
    match bytes.get(start..start + length + 2) {
        Some(text) => Ok(Some((start + length + 2, &text[..length]))),
        None => Ok(None),
    }
}
