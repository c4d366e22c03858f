//! bus-v1 as docs/PROTOCOL.md has it; the bare relay speaks it too.

use std::io::{self, Write};
use std::net::TcpStream;

use crate::wire::{Dialect, PAYLOAD, answer, connect, unexpected};

/// Guests in the config that the script writes: eight sessions each, a thousand in all.
const GUESTS: usize = 128;
const PUBLISH: &[u8] = br#"{"type":"publish","topic":"bench","payload":"#;
const SUBSCRIBE: &[u8] = br#"{"type":"subscribe","topic":"bench"}"#;
const OK: &[u8] = br#""status":"ok""#;

/// The frames of one session.
pub struct Bus {
    /// Where `"status":"ok"` stood in the last ack: it stands there in the next one too, and one
    /// comparison is cheaper than a search. Where it doesn't, a search decides.
    ok_at: usize,
}

impl Dialect for Bus {
    fn open(port: u16, client: usize) -> io::Result<(TcpStream, Self)> {
        let mut stream = connect(port)?;
        let hello = format!("hello vm:web-{} capabilities=bus-v1\n", client % GUESTS);
        stream.write_all(hello.as_bytes())?;
        let lines = |said: &[u8]| said.iter().filter(|byte| **byte == b'\n').count();
        let said = answer(&mut stream, |said| {
            lines(said) == 2 || said.windows(8).any(|word| word == b"declined")
        })?;
        if !said.windows(12).any(|word| word == b"\nok session=") {
            return Err(unexpected(&said));
        }
        Ok((stream, Bus { ok_at: 0 }))
    }

    fn publish(&mut self, payload: &[u8; PAYLOAD], out: &mut Vec<u8>) {
        frame(&[PUBLISH, payload, b"}"], out);
    }

    fn acks(&mut self, bytes: &[u8], _answer: &mut Vec<u8>) -> io::Result<(usize, usize)> {
        let (mut used, mut acks) = (0, 0);
        while let Some(body) = first(&bytes[used..]) {
            used += 4 + body.len();
            if body.get(self.ok_at..self.ok_at + OK.len()) != Some(OK) {
                self.ok_at = body
                    .windows(OK.len())
                    .position(|word| word == OK)
                    .ok_or_else(|| unexpected(body))?;
            }
            acks += 1;
        }
        Ok((used, acks))
    }

    fn subscribe(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        let mut out = Vec::new();
        frame(&[SUBSCRIBE], &mut out);
        stream.write_all(&out)?;
        let said = answer(stream, |said| first(said).is_some())?;
        self.acks(&said, &mut Vec::new()).map(|_| ())
    }

    fn deliveries(
        &mut self,
        bytes: &[u8],
        _answer: &mut Vec<u8>,
        each: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<usize> {
        let mut used = 0;
        while let Some(body) = first(&bytes[used..]) {
            used += 4 + body.len();
            // The payload is the last member of a delivery.
            let end = body.len().saturating_sub(1);
            each(&body[end.saturating_sub(PAYLOAD)..end])?;
        }
        Ok(used)
    }
}

fn frame(parts: &[&[u8]], out: &mut Vec<u8>) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&(length as u32).to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// The body of the first frame, if it is whole.
pub fn first(bytes: &[u8]) -> Option<&[u8]> {
    let (length, rest) = bytes.split_first_chunk()?;
    rest.get(..u32::from_be_bytes(*length) as usize)
}
