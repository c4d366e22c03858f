//! Load for `bench-bus.sh`: the same publishes and subscriptions against castra's bus, MQTT, NATS
//! JetStream, Redis streams and a bare relay.
//!
//! Here: the command line and the JSON it answers with. Not here: what is measured (`measure`), how
//! each server is spoken to (`castra`, `mqtt`, `nats`, `redis`), what it is compared with (`bare`),
//! nor the servers, the rounds and the ratios, which the script owns. Std alone, and in Rust because
//! a load written in Python would measure Python.
//!
//! usage: bus-load throughput SYSTEM PORT PUBLISHERS IN_FLIGHT MILLISECONDS
//!        bus-load exactly    SYSTEM PORT IN_FLIGHT COUNT
//!        bus-load fan-out    SYSTEM PORT SUBSCRIBERS MILLISECONDS
//!        bus-load latency    SYSTEM PORT PER_SECOND MILLISECONDS SUBSCRIBERS STALLED
//!        bus-load handshake SYSTEM PORT COUNT
//!        bus-load idle       SYSTEM PORT COUNT          until its stdin ends
//!        bus-load relay                                 until its stdin ends
//!        bus-load appends    FILE LINES MILLISECONDS
//! SYSTEM is castra, mosquitto, jetstream, redis or raw.

mod bare;
mod castra;
mod measure;
mod mqtt;
mod nats;
mod redis;
mod wire;

use std::io::{self, ErrorKind, Write};
use std::time::Duration;

use measure::Told;
use wire::Dialect;

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let told = match words.as_slice() {
        ["relay"] => return bare::relay(),
        ["appends", file, rest @ ..] => match numbers(rest)?.as_slice() {
            [lines, time] => bare::appends(file, *lines, millis(*time))?,
            _ => return Err(usage()),
        },
        [what, system, port, rest @ ..] => {
            let port = port.parse().map_err(|_| usage())?;
            let numbers = numbers(rest)?;
            match *system {
                "castra" | "raw" => measured::<castra::Bus>(what, port, &numbers)?,
                "mosquitto" => measured::<mqtt::Mqtt>(what, port, &numbers)?,
                "jetstream" => measured::<nats::JetStream>(what, port, &numbers)?,
                "redis" => measured::<redis::Redis>(what, port, &numbers)?,
                _ => return Err(usage()),
            }
        }
        _ => return Err(usage()),
    };
    writeln!(io::stdout(), "{}", told.json())
}

fn measured<D: Dialect>(what: &str, port: u16, numbers: &[usize]) -> io::Result<Told> {
    D::reset(port)?;
    let told = match (what, numbers) {
        ("throughput", &[publishers, in_flight, time]) => {
            measure::throughput::<D>(port, publishers, in_flight, measure::Until::Passed(millis(time)))
        }
        ("exactly", &[in_flight, count]) => {
            measure::throughput::<D>(port, 1, in_flight, measure::Until::Published(count))
        }
        ("fan-out", &[subscribers, time]) => measure::fan_out::<D>(port, subscribers, millis(time)),
        ("latency", &[per_second, time, subscribers, stalled]) if per_second > 0 => {
            measure::latency::<D>(port, per_second, millis(time), subscribers, stalled)
        }
        ("handshake", &[count]) => measure::hand_shake::<D>(port, count),
        ("idle", &[count]) => measure::idle::<D>(port, count),
        _ => Err(usage()),
    }?;
    D::reset(port)?;
    Ok(told)
}

fn numbers(words: &[&str]) -> io::Result<Vec<usize>> {
    words
        .iter()
        .map(|word| word.parse().map_err(|_| usage()))
        .collect()
}

fn millis(number: usize) -> Duration {
    Duration::from_millis(number as u64)
}

fn usage() -> io::Error {
    io::Error::new(
        ErrorKind::InvalidInput,
        "usage: see the head of scripts/bus-load/main.rs",
    )
}
