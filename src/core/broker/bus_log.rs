//! `logs/bus/bus.log`: all messages of the bus, appended in batches (docs/PROTOCOL.md).
//!
//! Here: appending all or nothing, rotation, syncing, repair after an earlier broker. Not here:
//! what a line says (`broker::state`), replay (`broker::replay`), the senders' own logs
//! (`broker::effects`).

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Sender, bounded};

use crate::core::bus::line::{MAX_SEQ, seq_of};
use crate::core::bus::log::MAX_LINE_BYTES;
use crate::core::config::SyncMode;
use crate::core::host;
use crate::core::lines::journal::{Rotation, end_of_last_line, rotate};
use crate::core::lines::rotated_log::RotatedLog;

use super::log_scan::scan_log;

/// The log of the bus, as the state thread writes it.
#[derive(Debug)]
pub struct BusLog {
    path: PathBuf,
    rotation: Rotation,
    sync: SyncMode,
    file: Option<File>,
    /// Length of the complete lines in it.
    length: u64,
    unsynced: bool,
    rotated: bool,
    syncer: Option<Syncer>,
}

/// What opening found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The last number in it; 0: none.
    pub last: u64,
    /// Bytes of a torn tail that were cut off.
    pub cut_bytes: u64,
    /// Every number is higher than the one before it.
    pub ascending: bool,
}

impl BusLog {
    /// A log at `path`. Touches nothing yet.
    pub fn new(path: PathBuf, rotation: Rotation, sync: SyncMode) -> BusLog {
        BusLog {
            path,
            rotation,
            sync,
            file: None,
            length: 0,
            unsynced: false,
            rotated: false,
            syncer: None,
        }
    }

    /// Whether it can take lines.
    pub fn is_open(&self) -> bool {
        self.file.is_some()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes or opens the file, cuts off a torn tail and finds the highest number in the log.
    pub fn open(&mut self) -> io::Result<Opened> {
        let cut_bytes = self.open_file()?;
        let found = match scan_log(&self.path) {
            Ok(found) => found,
            Err(error) => {
                self.file = None;
                return Err(error);
            }
        };
        Ok(Opened {
            last: found.highest,
            cut_bytes,
            ascending: found.ascending,
        })
    }

    /// Makes or opens the file and cuts off a torn tail; returns how many bytes were cut off.
    fn open_file(&mut self) -> io::Result<u64> {
        if let Some(dir) = self.path.parent() {
            host::ensure_private_dir(dir)?;
        }
        let mut file = host::private_file()
            .read(true)
            .append(true)
            .create(true)
            .open(&self.path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it isn't a regular file",
            ));
        }
        let length = file.metadata()?.len();
        let whole = end_of_last_line(&mut file, length)?;
        if whole < length {
            file.set_len(whole)?;
        }
        self.length = whole;
        self.file = Some(file);
        Ok(length - whole)
    }

    /// Whether the next append begins a new file.
    pub fn is_full(&self) -> bool {
        self.length >= self.rotation.max_bytes
    }

    /// Appends whole lines: all of them, or none and why. With `sync = "batch"` they are on disk
    /// when this returns.
    pub fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.is_full() {
            self.rotate()?;
        }
        let file = self.file.as_mut().ok_or(io::ErrorKind::NotFound)?;
        let mut written = file.write_all(lines);
        if written.is_ok() && self.sync == SyncMode::Batch {
            written = file.sync_data();
        }
        match written {
            Ok(()) => {
                self.length += lines.len() as u64;
                self.unsynced = true;
                Ok(())
            }
            Err(error) => {
                // A partial write was never acked and must not be read by anybody.
                if file.set_len(self.length).is_err() {
                    self.file = None;
                }
                Err(error)
            }
        }
    }

    /// Called once a second: has a thread write to disk what isn't there yet, so that a slow disk
    /// delays nobody.
    pub fn sync_soon(&mut self) {
        if self.sync == SyncMode::Interval && std::mem::take(&mut self.unsynced) {
            self.sync_now_or_soon();
        }
    }

    fn sync_now_or_soon(&mut self) {
        let Some(copy) = self.file.as_ref().and_then(|file| file.try_clone().ok()) else {
            return;
        };
        if self.syncer.is_none() {
            self.syncer = Syncer::start();
        }
        if let Some(syncer) = &self.syncer {
            // The thread is busy with the last sync: the next one covers this one too.
            self.unsynced |= syncer.to_sync.try_send(copy).is_err();
        }
    }

    /// True once after each rotation: the last number must be saved elsewhere, in case no message
    /// follows.
    pub fn take_rotated(&mut self) -> bool {
        std::mem::take(&mut self.rotated)
    }

    /// Whether the path still leads to the open file; if not, the log must be opened again.
    pub fn check(&mut self) -> bool {
        let named = self
            .file
            .as_ref()
            .is_some_and(|file| host::names_this_file(&self.path, file));
        if !named {
            self.file = None;
        }
        named
    }

    fn rotate(&mut self) -> io::Result<()> {
        if self.sync == SyncMode::Interval && self.unsynced {
            self.sync_now_or_soon();
        }
        rotate(&self.path, self.rotation.keep)?;
        self.rotated = true;
        self.file = None;
        self.open_file().map(|_| ())
    }
}

/// The number after which numbering goes on: the last one in the log, or the last one saved
/// elsewhere. `lossy`: a loss of power may have taken the last lines and with them numbers that
/// were given; then numbering goes on far beyond all numbers that can have been given.
pub fn resume_after(in_log: u64, noted: u64, lossy: bool) -> u64 {
    let noted = Some(noted).filter(|noted| *noted <= MAX_SEQ).unwrap_or(0);
    let last = in_log.max(noted);
    if lossy && last > 0 {
        (((last >> 32) + 1) << 32).min(MAX_SEQ)
    } else {
        last
    }
}

/// The thread that syncs the file.
#[derive(Debug)]
struct Syncer {
    to_sync: Sender<File>,
    thread: Option<JoinHandle<()>>,
}

impl Syncer {
    fn start() -> Option<Syncer> {
        let (to_sync, files) = bounded::<File>(2);
        let sync = move || {
            for file in files {
                if let Err(error) = file.sync_data() {
                    log::error!("can't sync the log of the bus: {error}");
                }
            }
        };
        let spawned = thread::Builder::new()
            .name("broker-sync".to_owned())
            .stack_size(64 * 1024)
            .spawn(sync);
        Some(Syncer {
            to_sync,
            thread: Some(spawned.ok()?),
        })
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        let (closed, _) = bounded(0);
        drop(std::mem::replace(&mut self.to_sync, closed));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The last number in a log and its rotated files; `None`: they hold none. A torn tail is ignored.
pub fn last_kept(path: &Path) -> io::Result<Option<u64>> {
    let log = RotatedLog::open(path, MAX_LINE_BYTES)?;
    let mut lines = log.backward(true)?;
    while let Some((_, line)) = lines.next_line()? {
        if let Some(seq) = seq_of(line) {
            return Ok(Some(seq));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::core::lines::journal::rotated;
    use crate::core::scratch::Scratch;

    fn line(seq: u64) -> String {
        format!("{{\"seq\":{seq},\"ts\":1,\"vm\":\"web-0\",\"topic\":\"a/b\",\"payload\":\"x\"}}\n")
    }

    fn small(keep: u32) -> Rotation {
        Rotation { max_bytes: 100, keep }
    }

    #[test]
    fn numbers_are_found_again_across_rotation_and_torn_tails() {
        let scratch = Scratch::new("buslog");
        let path = scratch.path("logs/bus/bus.log");
        let mut log = BusLog::new(path.clone(), small(3), SyncMode::Batch);
        assert!(!log.is_open());
        assert_eq!(
            log.open().unwrap(),
            Opened {
                last: 0,
                cut_bytes: 0,
                ascending: true
            }
        );
        for seq in 1..=7 {
            log.append(line(seq).as_bytes()).unwrap();
        }
        assert!(log.take_rotated() && !log.take_rotated());
        // Two lines a file: 7 | 5 6 | 3 4 | 1 2.
        assert_eq!(fs::read_to_string(rotated(&path, 3)).unwrap(), line(1) + &line(2));
        let reopened = |tail: &str| {
            let mut file = File::options().append(true).open(&path).unwrap();
            file.write_all(tail.as_bytes()).unwrap();
            BusLog::new(path.clone(), small(3), SyncMode::None)
                .open()
                .unwrap()
        };
        assert_eq!(
            reopened(""),
            Opened {
                last: 7,
                cut_bytes: 0,
                ascending: true
            }
        );
        assert_eq!(
            reopened("{\"seq\":8,\"ts"),
            Opened {
                last: 7,
                cut_bytes: 12,
                ascending: true
            }
        );
        assert_eq!(
            reopened("somebody's line\n"),
            Opened {
                last: 7,
                cut_bytes: 0,
                ascending: true
            }
        );
        fs::write(&path, "").unwrap();
        assert_eq!(reopened("").last, 6, "the rotated files count too");
    }

    #[test]
    fn numbering_goes_on_where_nobody_can_have_been() {
        assert_eq!(resume_after(0, 0, true), 0);
        assert_eq!(resume_after(7, 0, false), 7);
        assert_eq!(resume_after(7, 9, false), 9);
        assert_eq!(resume_after(7, 9, true), 1 << 32);
        assert_eq!(resume_after((1 << 32) - 1, 0, true), 1 << 32);
        assert_eq!(resume_after(1 << 32, 0, true), 2 << 32);
    }

    #[test]
    fn a_failed_append_leaves_nothing() {
        let scratch = Scratch::new("buslog-full");
        let path = scratch.path("bus.log");
        let mut log = BusLog::new(path.clone(), Rotation::default(), SyncMode::None);
        log.open().unwrap();
        log.append(line(1).as_bytes()).unwrap();
        // A descriptor that can't be written stands for a disk that is full.
        log.file = Some(File::open(&path).unwrap());
        assert!(log.append(line(2).as_bytes()).is_err());
        assert!(!log.is_open(), "what can't be cut back is opened anew");
        assert_eq!(log.open().unwrap().last, 1);
        log.append(line(2).as_bytes()).unwrap();
        assert!(log.check());
        fs::remove_file(&path).unwrap();
        assert!(!log.check());
        assert_eq!(log.open().unwrap().last, 0);
    }
}
