//! `handshakes/<vm>.json`: the last handshake of one guest, as `status` reads it (docs/STATUS.md).
//!
//! Here: the record's format, its reader and its writer. Not here: when one is written
//! (`broker::state`), or what it means for a VM (`core::status`).
//!
//! A record is a JSON object of exactly 1 KiB, padded with spaces and rewritten in place by one
//! `pwrite`, so a full disk doesn't stop it and no rename costs 100 µs. A reader beside a writer
//! can see half of each: 33,111 of 2,000,000 reads were such mixtures, and mixtures of digits
//! parse. So the same counter stands at both ends, and a checksum of everything but itself
//! covers the rare reader that is overtaken by the writer and overtakes it again.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::core::host;
use crate::core::id::{BootId, RunId};
use crate::core::name::VmName;

/// Length of every record, bytes.
pub const RECORD_BYTES: usize = 1024;

/// How often a reader tries again before it calls a record unreadable. A write takes under a
/// microsecond, so two tries in a row rarely meet one.
const READ_TRIES: u32 = 16;

/// How many bytes of a heartbeat's payload are kept at most (docs/PROTOCOL.md).
pub const GUEST_METRICS_BYTES: usize = 512;

/// What the broker knows about one guest. Times are CLOCK_BOOTTIME ms of the host boot `boot_id`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HandshakeRecord {
    /// The guest.
    pub vm: VmName,
    /// The host boot in which the times below were taken.
    pub boot_id: BootId,
    /// Id of the broker run that wrote it: `bus_session` of an earlier run counts as false.
    pub broker_run: RunId,
    /// The last accepted hello.
    pub handshake_boottime_ms: u64,
    /// The newest proof of life: the last accepted hello or the last frame of an open session.
    pub heard_boottime_ms: u64,
    /// Wall clock of `heard_boottime_ms`, RFC 3339. For display, and for ages after a reboot.
    pub heard_at: String,
    /// The capabilities of the last accepted hello, sorted, without repeats, as many as fit.
    pub capabilities: Vec<String>,
    /// It has an open bus session.
    pub bus_session: bool,
    /// One of its sessions has a subscription.
    pub bus_subscribed: bool,
    /// Its last accepted publish.
    pub last_publish_boottime_ms: Option<u64>,
    /// Its last heartbeat.
    pub last_heartbeat_boottime_ms: Option<u64>,
    /// The number of its last `ack`: how far it has come by its own account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_acked_seq: Option<u64>,
    /// Payload of its last heartbeat that was short enough.
    pub guest_metrics: Option<Value>,
}

/// What a reader found.
#[derive(Clone, Debug, PartialEq)]
pub enum RecordRead {
    /// There is no record: the guest never shook hands.
    Absent,
    /// A whole record.
    Record(HandshakeRecord),
    /// There is a file, but not a complete record; why.
    Unreadable(String),
}

/// The record as it lies on disk: `begin` first, `sum` and `end` last.
#[derive(Serialize)]
struct Laid<'a> {
    begin: &'a str,
    #[serde(flatten)]
    record: &'a HandshakeRecord,
}

/// Reads a record. It takes no lock, never waits for a writer, and never returns a mixture of two
/// records.
pub fn read_record(path: &Path) -> RecordRead {
    let file = match open_regular(path, false) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return RecordRead::Absent,
        Err(error) => return RecordRead::Unreadable(error.to_string()),
    };
    let mut why = "";
    for attempt in 0..READ_TRIES {
        if attempt > 0 {
            std::thread::yield_now();
        }
        // One byte more than a record has: a longer file isn't a record.
        let mut bytes = [0; RECORD_BYTES + 1];
        match file.read_at(&mut bytes, 0) {
            Ok(RECORD_BYTES) => match parse(&bytes[..RECORD_BYTES]) {
                Ok(record) => return RecordRead::Record(record),
                Err(reason) => why = reason,
            },
            Ok(_) => why = "it isn't 1024 bytes long",
            Err(error) => return RecordRead::Unreadable(error.to_string()),
        }
    }
    RecordRead::Unreadable(why.to_owned())
}

/// Opens a regular file. A FIFO that somebody put there must not block, and a link must not be
/// followed.
fn open_regular(path: &Path, write: bool) -> io::Result<File> {
    let file = host::private_file()
        .read(true)
        .write(write)
        .custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_NOFOLLOW)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it isn't a regular file",
        ));
    }
    Ok(file)
}

const BEGIN: &[u8] = b"{\"begin\":\"";
/// `,"sum":"01234567","end":"01234567"}` and a line feed.
const TAIL_BYTES: usize = 36;

/// Parses a record; both counters and the checksum must be right.
fn parse(bytes: &[u8]) -> Result<HandshakeRecord, &'static str> {
    const TORN: &str = "it is only partly written";
    let (body, tail) = bytes.split_at(RECORD_BYTES - TAIL_BYTES);
    let begin = body
        .strip_prefix(BEGIN)
        .and_then(|rest| rest.get(..8))
        .ok_or(TORN)?;
    let sum = tail
        .strip_prefix(b",\"sum\":\"")
        .and_then(|rest| rest.get(..8))
        .ok_or(TORN)?;
    let end = tail
        .get(16..)
        .and_then(|rest| rest.strip_prefix(b"\",\"end\":\""))
        .and_then(|rest| rest.get(..8))
        .ok_or(TORN)?;
    if begin != end || sum != format!("{:08x}", checksum(body)).as_bytes() {
        return Err(TORN);
    }
    serde_json::from_slice(bytes).map_err(|_| "it isn't a handshake record")
}

/// FNV-1a, 32 bits: it detects mixtures of two records, not forged ones.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// The bytes of a record. If it is too long, first the metrics are left out, then the last
/// capabilities; `bus-*` and `vizier-*` stay longest, because a bootstrap waits for them.
fn lay_out(record: &HandshakeRecord, counter: u32) -> [u8; RECORD_BYTES] {
    let begin = format!("{counter:08x}");
    let mut fitting = record.clone();
    loop {
        let laid = Laid {
            begin: &begin,
            record: &fitting,
        };
        let mut body = serde_json::to_vec(&laid).expect("records are plain data with text keys");
        body.pop();
        if body.len() <= RECORD_BYTES - TAIL_BYTES {
            body.resize(RECORD_BYTES - TAIL_BYTES, b' ');
            let sum = checksum(&body);
            body.extend_from_slice(format!(",\"sum\":\"{sum:08x}\",\"end\":\"{begin}\"}}\n").as_bytes());
            return body.try_into().expect("the tail has TAIL_BYTES bytes");
        }
        if fitting.guest_metrics.take().is_some() {
            continue;
        }
        let needed = |word: &String| word.starts_with("bus-") || word.starts_with("vizier-");
        let victim = fitting
            .capabilities
            .iter()
            .rposition(|word| !needed(word))
            .or_else(|| fitting.capabilities.len().checked_sub(1))
            .expect("a record without capabilities and metrics has under 600 bytes");
        fitting.capabilities.remove(victim);
    }
}

/// Writes the record of one guest. It keeps no descriptor: to open the file costs 2 µs, the next
/// write notices that the file was removed, and a thousand guests take no thousand descriptors.
#[derive(Debug)]
pub struct RecordWriter {
    path: PathBuf,
    counter: u32,
}

impl RecordWriter {
    /// A writer for the record at `path`. Touches nothing yet.
    pub fn new(path: PathBuf) -> RecordWriter {
        // Any number will do, except the one that an earlier run may have left in the file.
        let counter = host::boottime().subsec_nanos();
        RecordWriter { path, counter }
    }

    /// Whether the record still exists and has its full length.
    pub fn is_there(&self) -> bool {
        std::fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| meta.is_file() && meta.len() == RECORD_BYTES as u64)
    }

    /// Writes the record in place, or makes the file if it is missing or invalid.
    pub fn write(&mut self, record: &HandshakeRecord) -> io::Result<()> {
        self.counter = self.counter.wrapping_add(1);
        let bytes = lay_out(record, self.counter);
        let in_place = open_regular(&self.path, true).and_then(|file| {
            if file.metadata()?.len() != RECORD_BYTES as u64 {
                return Err(io::ErrorKind::InvalidData.into());
            }
            // The file doesn't grow, so a full disk doesn't matter.
            let written = file.write_at(&bytes, 0)?;
            if written == RECORD_BYTES {
                Ok(())
            } else {
                Err(io::ErrorKind::WriteZero.into())
            }
        });
        match in_place {
            Ok(()) => Ok(()),
            Err(_) => self.make(&bytes),
        }
    }

    /// It is made under another name first: a reader must never see a short record.
    fn make(&self, bytes: &[u8]) -> io::Result<()> {
        match host::replace_file(&self.path, bytes) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(dir) = self.path.parent() {
                    host::ensure_private_dir(dir)?;
                }
                host::replace_file(&self.path, bytes)
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::scratch::Scratch;
    use std::fs;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    fn record(number: u64) -> HandshakeRecord {
        HandshakeRecord {
            vm: "web-0".parse().unwrap(),
            boot_id: "6b2f0d5e-9d7a-4a40-8d6b-1d1d1d1d1d1d".into(),
            broker_run: format!("{number:016x}").into(),
            handshake_boottime_ms: number,
            heard_boottime_ms: number,
            heard_at: "2026-11-21T10:00:00.123Z".into(),
            capabilities: vec!["bus-v1".into(), format!("x-{number}")],
            bus_session: number.is_multiple_of(2),
            bus_subscribed: number.is_multiple_of(2),
            last_publish_boottime_ms: Some(number),
            last_heartbeat_boottime_ms: (number.is_multiple_of(3)).then_some(number),
            last_acked_seq: (number.is_multiple_of(5)).then_some(number),
            guest_metrics: (number.is_multiple_of(2)).then(|| serde_json::json!({ "load": number })),
        }
    }

    #[test]
    fn a_record_comes_back_and_is_json_of_one_kib() {
        let scratch = Scratch::new("record");
        let path = scratch.path("handshakes/web-0.json");
        assert_eq!(read_record(&path), RecordRead::Absent);
        let mut writer = RecordWriter::new(path.clone());
        for number in [7, 8, 1_795_000_000_000] {
            writer.write(&record(number)).unwrap();
            assert_eq!(read_record(&path), RecordRead::Record(record(number)));
            let bytes = fs::read(&path).unwrap();
            assert_eq!(bytes.len(), RECORD_BYTES);
            let value: Value = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(value["heard_boottime_ms"], number);
            assert_eq!(value["begin"], value["end"]);
        }
        assert!(writer.is_there());
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let scratch = Scratch::new("record-fit");
        let path = scratch.path("x.json");
        let mut full = record(u64::MAX);
        full.vm = "n".repeat(64).parse().unwrap();
        full.capabilities = vec!["bus-v1".into(), "vizier-v1".into()];
        full.handshake_boottime_ms = 9_999_999_999_999;
        full.heard_boottime_ms = full.handshake_boottime_ms;
        full.last_publish_boottime_ms = Some(full.handshake_boottime_ms);
        full.last_heartbeat_boottime_ms = full.last_publish_boottime_ms;
        full.last_acked_seq = None;
        full.guest_metrics = Some(Value::String("m".repeat(GUEST_METRICS_BYTES - 2)));
        let mut writer = RecordWriter::new(path.clone());
        writer.write(&full).unwrap();
        assert_eq!(
            read_record(&path),
            RecordRead::Record(full.clone()),
            "the longest name, usual capabilities and 512 bytes of metrics fit"
        );

        full.capabilities = (0..60).map(|n| format!("a-{n:06}")).collect();
        full.capabilities.push("vizier-v1".into());
        writer.write(&full).unwrap();
        let RecordRead::Record(kept) = read_record(&path) else {
            panic!("unreadable");
        };
        assert_eq!(kept.guest_metrics, None);
        assert!(kept.capabilities.len() > 20 && kept.capabilities.contains(&"vizier-v1".to_owned()));
    }

    #[test]
    fn foreign_files_are_unreadable_and_made_anew() {
        let scratch = Scratch::new("record-foreign");
        let path = scratch.path("x.json");
        let mut whole = lay_out(&record(1), 1);
        whole[500] ^= 1;
        let torn = whole.to_vec();
        let long = [lay_out(&record(1), 1).as_slice(), b" "].concat();
        for bytes in [b"".to_vec(), b"{}".to_vec(), vec![b' '; RECORD_BYTES], torn, long] {
            fs::write(&path, &bytes).unwrap();
            assert!(matches!(read_record(&path), RecordRead::Unreadable(_)));
            RecordWriter::new(path.clone()).write(&record(2)).unwrap();
            assert_eq!(read_record(&path), RecordRead::Record(record(2)));
        }
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(matches!(read_record(&path), RecordRead::Unreadable(_)));
        RecordWriter::new(path.clone()).write(&record(3)).unwrap();
        assert_eq!(read_record(&path), RecordRead::Record(record(3)));
    }

    #[test]
    fn readers_beside_a_writer_never_take_a_mixture() {
        let scratch = Scratch::new("record-race");
        let path = scratch.path("x.json");
        let mut writer = RecordWriter::new(path.clone());
        writer.write(&record(0)).unwrap();
        let stop = AtomicBool::new(false);
        let reads = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut last = 0;
                    while !stop.load(Ordering::Relaxed) {
                        if let RecordRead::Record(read) = read_record(&path) {
                            let number = read.heard_boottime_ms;
                            assert_eq!(read, record(number), "a mixture");
                            assert!(number >= last, "a reader went back in time");
                            last = number;
                            reads.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            for number in 1..40_000 {
                writer.write(&record(number)).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(reads.load(Ordering::Relaxed) > 0);
    }
}
