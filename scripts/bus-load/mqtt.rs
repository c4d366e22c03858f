//! MQTT 3.1.1, publishing and subscribing with QoS 1.

use std::io::{self, Write};
use std::net::TcpStream;

use crate::wire::{Dialect, PAYLOAD, answer, connect, unexpected};

const TOPIC: &[u8] = b"\0\x05bench";
/// Topic, packet id and payload: what follows the fixed header of a publish.
const BODY: usize = TOPIC.len() + 2 + PAYLOAD;
/// `BODY` as MQTT's variable-length number; it takes two bytes from 128 to 16,383.
const LENGTH: [u8; 2] = [(BODY % 128) as u8 | 0x80, (BODY / 128) as u8];
const PUBLISH: u8 = 0x32;
const PUBACK: [u8; 2] = [0x40, 2];

/// One client's packet ids.
pub struct Mqtt {
    published: u16,
    acked: u16,
}

/// Ids are 1 to 65535 and come back; there are never that many in flight.
fn next(id: &mut u16) -> [u8; 2] {
    *id = id.checked_add(1).unwrap_or(1);
    id.to_be_bytes()
}

impl Dialect for Mqtt {
    fn open(port: u16, client: usize) -> io::Result<(TcpStream, Self)> {
        let mut stream = connect(port)?;
        let id = format!("bench-{client:05}");
        // Clean session, no keep-alive.
        let mut packet = vec![0x10, (12 + id.len()) as u8];
        packet.extend(b"\0\x04MQTT\x04\x02\0\0\0");
        packet.push(id.len() as u8);
        packet.extend(id.as_bytes());
        stream.write_all(&packet)?;
        let said = answer(&mut stream, |said| said.len() >= 4)?;
        if said != [0x20, 2, 0, 0] {
            return Err(unexpected(&said));
        }
        Ok((
            stream,
            Mqtt {
                published: 0,
                acked: 0,
            },
        ))
    }

    fn publish(&mut self, payload: &[u8; PAYLOAD], out: &mut Vec<u8>) {
        out.extend([PUBLISH, LENGTH[0], LENGTH[1]]);
        out.extend_from_slice(TOPIC);
        out.extend_from_slice(&next(&mut self.published));
        out.extend_from_slice(payload);
    }

    fn acks(&mut self, bytes: &[u8], _answer: &mut Vec<u8>) -> io::Result<(usize, usize)> {
        let mut acks = 0;
        for ack in bytes.chunks_exact(4) {
            if ack[..2] != PUBACK || ack[2..] != next(&mut self.acked) {
                return Err(unexpected(ack));
            }
            acks += 1;
        }
        Ok((acks * 4, acks))
    }

    fn subscribe(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        let mut packet = vec![0x82, (2 + TOPIC.len() + 1) as u8, 0, 1];
        packet.extend(TOPIC);
        packet.push(1);
        stream.write_all(&packet)?;
        let said = answer(stream, |said| said.len() >= 5)?;
        if said != [0x90, 3, 0, 1, 1] {
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
        let packet = 3 + BODY;
        let mut used = 0;
        for delivery in bytes.chunks_exact(packet) {
            // QoS 1, whatever the other flags: each delivery is to be acknowledged.
            if delivery[0] & 0xf6 != PUBLISH || delivery[1..3] != LENGTH {
                return Err(unexpected(delivery));
            }
            each(&delivery[packet - PAYLOAD..])?;
            let id = 3 + TOPIC.len();
            answer.extend_from_slice(&PUBACK);
            answer.extend_from_slice(&delivery[id..id + 2]);
            used += packet;
        }
        Ok(used)
    }
}
