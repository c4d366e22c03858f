//! What an event costs: 100,000 of them through reporter, `--json` and journal, and the same bytes
//! written and appended by hand.
//!
//! Rounds alternate, medians count. The figure that stays true from machine to machine is the
//! ratio to the bare writes of the same run; microseconds are printed beside it.
//!
//! usage: events-load [EVENTS [ROUNDS]]
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use castra::core::events::contract::Stamped;
use castra::core::events::{BootstrapStepKind, BootstrapStepStatus, Event, Severity};
use castra::core::journal::{Journal, Rotation};
use castra::core::reporter::{Emitter, Reporter};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<usize>().unwrap());
    let events = args.next().unwrap_or(100_000);
    let rounds = args.next().unwrap_or(5);
    let dir = std::env::temp_dir().join(format!("castra-events-load-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let mut costs: [Vec<Cost>; 3] = Default::default();
    for round in 0..rounds {
        let path = dir.join(format!("{round}.jsonl"));
        costs[0].push(measure(events, || told(events, &path)));
        let lines = fs::read_to_string(&path).unwrap();
        assert_eq!(
            lines.lines().count(),
            events,
            "an event is missing in the journal"
        );
        costs[1].push(measure(events, || bare(&lines, &path.with_extension("bare"))));
        costs[2].push(measure(events, || {
            journaled(&lines, &path.with_extension("plain"))
        }));
        let _ = fs::remove_file(path);
    }
    let _ = fs::remove_dir_all(&dir);
    let [told, bare, journaled] = costs.map(median);
    println!("{events} events, medians of {rounds} rounds, per event:");
    println!("  reporter, --json and journal   {told}");
    println!("  the same bytes, two writes     {bare}");
    println!("  the same bytes, journal alone  {journaled}");
    println!("  ratio of CPU, all to bare      {:.2}", told.cpu / bare.cpu);
}

/// As `castra … --json` does it: stamped, one write a line into a pipe, one append.
fn told(events: usize, path: &Path) {
    let mut reader = Drain::start();
    let mut reporter = Lines(reader.pipe(), Vec::new());
    let emitter = Emitter::new(&mut reporter);
    let rotation = Rotation {
        max_bytes: u64::MAX,
        keep: 1,
    };
    emitter.attach_journal(Journal::open(path, rotation).unwrap());
    for number in 0..events {
        emitter.emit(event(number));
    }
}

/// A stream as operations tell it: mostly lines of scripts, some steps.
fn event(number: usize) -> Event {
    let vm = "web-0".parse().unwrap();
    if number.is_multiple_of(10) {
        return Event::BootstrapStep {
            vm,
            step: BootstrapStepKind::Apply,
            status: BootstrapStepStatus::Success,
            duration_ms: number as u64,
            detail: Some("root@127.0.0.1:43815; its SSH server answered after 736 ms".into()),
        };
    }
    Event::Message {
        severity: Severity::Progress,
        text: format!("Setting up libexample{number} (1.2.3-4) …"),
        vm: Some(vm),
        remediation: None,
        source: Some("bootstrap".into()),
        thread: None,
        turn: None,
        data: Some(serde_json::json!({ "stream": "stdout" })),
    }
}

/// Two `write`s a line, nothing else.
fn bare(lines: &str, path: &Path) {
    let mut reader = Drain::start();
    let mut pipe = reader.pipe();
    let mut file = File::options().append(true).create(true).open(path).unwrap();
    for line in lines.split_inclusive('\n') {
        pipe.write_all(line.as_bytes()).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }
    fs::remove_file(path).unwrap();
}

/// The journal's locks and looks, without making the lines.
fn journaled(lines: &str, path: &Path) {
    let rotation = Rotation {
        max_bytes: u64::MAX,
        keep: 1,
    };
    let mut journal = Journal::open(path, rotation).unwrap();
    for line in lines.lines() {
        journal.append(line).unwrap();
    }
    fs::remove_file(path).unwrap();
}

/// Prints contract lines, each at once.
struct Lines<W>(W, Vec<u8>);

impl<W: Write + Send> Reporter for Lines<W> {
    fn report(&mut self, event: &Stamped) {
        self.report_line(event, &event.contract_line());
    }

    fn report_line(&mut self, _event: &Stamped, line: &str) {
        self.1.clear();
        self.1.extend_from_slice(line.as_bytes());
        self.1.push(b'\n');
        self.0.write_all(&self.1).unwrap();
    }
}

/// Somebody who reads the stream, in a process of their own so that their time isn't ours.
struct Drain(Child);

impl Drain {
    fn start() -> Drain {
        let child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        Drain(child.unwrap())
    }

    fn pipe(&mut self) -> impl Write + Send + use<> {
        self.0.stdin.take().unwrap()
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        let _ = self.0.wait();
    }
}

/// Microseconds per event.
#[derive(Clone, Copy)]
struct Cost {
    cpu: f64,
    wall: f64,
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:6.2} µs of CPU, {:6.2} µs", self.cpu, self.wall)
    }
}

fn measure(events: usize, work: impl FnOnce()) -> Cost {
    let (cpu, began) = (cpu_time(), Instant::now());
    work();
    let each = |time: Duration| time.as_secs_f64() * 1e6 / events as f64;
    Cost {
        cpu: each(cpu_time() - cpu),
        wall: each(began.elapsed()),
    }
}

fn cpu_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(micros as u64)
}

fn median(mut costs: Vec<Cost>) -> Cost {
    costs.sort_by(|one, other| one.cpu.total_cmp(&other.cpu));
    costs[costs.len() / 2]
}
