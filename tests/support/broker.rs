//! A broker inside the test, in a state root of its own: what tests of its sockets share.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use castra::core::broker::{BrokerOptions, Ready, run_announced};
use castra::core::cancel::Cancel;
use castra::core::config::{BrokerConfig, BusConfig, PortChoice};
use castra::core::failure::Failure;
use castra::core::host;
use castra::core::root::handshake_record::{RecordRead, read_record};
use castra::core::root::paths::StateRoot;
use castra::core::root::records::{self, GuestRecord, GuestsRecord};

use super::AMPLE;
use super::journals;
use super::scratch::Scratch;

type Running = (Cancel, JoinHandle<Result<(), Failure>>, Ready);

/// A state root of its own, and the broker in it.
pub struct Fixture {
    dir: Scratch,
    /// Its files.
    pub state: StateRoot,
    /// `[broker]`, for the next start.
    pub config: BrokerConfig,
    /// `[bus]`, for the next start.
    pub bus: BusConfig,
    running: Option<Running>,
}

impl Fixture {
    /// A fresh one.
    pub fn new(label: &str) -> Fixture {
        let dir = Scratch::new(label);
        Fixture {
            state: StateRoot::new(dir.path("state")),
            dir,
            config: BrokerConfig {
                port: PortChoice::Free,
                ..BrokerConfig::default()
            },
            bus: BusConfig::default(),
            running: None,
        }
    }

    fn options(&self) -> BrokerOptions {
        BrokerOptions {
            state: self.state.clone(),
            config: self.config.clone(),
            bus: self.bus.clone(),
            embedded: true,
        }
    }

    /// Starts the broker, or says why it can't.
    pub fn try_start(&mut self) -> Result<(), Failure> {
        let (tell, told) = mpsc::channel();
        let stop = Cancel::new();
        let (options, its_stop) = (self.options(), stop.clone());
        let thread = thread::spawn(move || {
            run_announced(options, its_stop, |ready| tell.send(ready.clone()).unwrap())
        });
        match told.recv_timeout(AMPLE) {
            Ok(ready) => {
                self.running = Some((stop, thread, ready));
                Ok(())
            }
            Err(_) => Err(thread.join().unwrap().unwrap_err()),
        }
    }

    /// Starts the broker; its port.
    pub fn start(&mut self) -> u16 {
        self.try_start().unwrap();
        self.port()
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.running.as_ref().unwrap().2.port
    }

    /// Stops it in order.
    pub fn stop(&mut self) {
        if let Some((stop, thread, _)) = self.running.take() {
            stop.request();
            thread.join().unwrap().unwrap();
        }
    }

    /// Writes `guests.json`: names and tokens.
    pub fn guests(&self, names: &[(&str, Option<&str>)]) {
        use sha2::{Digest, Sha256};
        host::ensure_private_dir(self.state.dir()).unwrap();
        let guests = names
            .iter()
            .map(|(name, token)| GuestRecord {
                closed: false,
                name: name.parse().unwrap(),
                second_name: None,
                launch_id: None,
                launched_boottime_ms: None,
                boot_id: None,
                token_sha256: token.map(|token| host::hex(&Sha256::digest(token))),
            })
            .collect();
        records::save(&self.state.guests(), &GuestsRecord { guests }).unwrap();
    }

    /// A new connection.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port())).unwrap();
        stream.set_read_timeout(Some(AMPLE)).unwrap();
        stream
    }

    /// All that the broker says to a client who sends this and then only listens.
    pub fn say(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        let _ = stream.write_all(bytes);
        answer(stream)
    }

    /// The answer to a hello.
    pub fn hello(&self, vm: &str) -> String {
        self.say(format!("hello vm:{vm}\n").as_bytes())
    }

    /// The broker's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.state.broker_log()).unwrap_or_default()
    }

    /// How many of its lines have this in them.
    pub fn lines(&self, needle: &str) -> usize {
        self.log().lines().filter(|line| line.contains(needle)).count()
    }

    /// The record of a VM.
    pub fn record(&self, vm: &str) -> RecordRead {
        read_record(&self.state.handshake(&vm.parse().unwrap()))
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some((stop, thread, _)) = self.running.take() {
            stop.request();
            let _ = thread.join();
        }
        journals::check_below(self.dir.dir());
    }
}

/// What comes until the end, without the greeting.
pub fn answer(mut stream: impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).unwrap();
    text.strip_prefix("castra-broker 1 ready\n")
        .unwrap_or_else(|| panic!("no greeting in {text:?}"))
        .to_owned()
}
