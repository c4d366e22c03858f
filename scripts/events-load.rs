//! What events cost: 100,000 of them through reporter, `--json` and journal, beside the same bytes
//! written and appended by hand; and what `castra events` takes to find the end of a large journal,
//! beside reading it all.
//!
//! Rounds alternate, medians count. The figure that stays true from machine to machine is the
//! ratio to the baseline of the same run; times are printed beside it.
//!
//! usage: events-load CASTRA [EVENTS [ROUNDS [MEBIBYTES]]]
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use castra::core::events::contract::Stamped;
use castra::core::events::{BootstrapStepKind, BootstrapStepStatus, Event, Severity};
use castra::core::lines::journal::{Journal, Rotation};
use castra::core::reporter::{Emitter, Reporter, wall_clock};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

fn main() {
    let mut args = std::env::args().skip(1);
    let castra = PathBuf::from(
        args.next()
            .expect("usage: events-load CASTRA [EVENTS [ROUNDS [MEBIBYTES]]]"),
    );
    let mut numbers = args.map(|arg| arg.parse::<usize>().unwrap());
    let events = numbers.next().unwrap_or(100_000);
    let rounds = numbers.next().unwrap_or(5);
    let mebibytes = numbers.next().unwrap_or(1024);
    let dir = std::env::temp_dir().join(format!("castra-events-load-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    each_event(events, rounds, &dir);
    large_journal(&castra, mebibytes, rounds, &dir);
    let _ = fs::remove_dir_all(&dir);
}

fn each_event(events: usize, rounds: usize, dir: &Path) {
    let mut costs: [Vec<Cost>; 3] = Default::default();
    for round in 0..rounds {
        let path = dir.join(format!("{round}.jsonl"));
        // Making an event is the work of whoever has something to tell.
        let made: Vec<Event> = (0..events).map(event).collect();
        costs[0].push(measure(events, || told(made, &path)));
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
    let [told, bare, journaled] = costs.map(median);
    println!("{events} events, medians of {rounds} rounds, per event:");
    println!("  reporter, --json and journal   {told}");
    println!("  the same bytes, two writes     {bare}");
    println!("  the same bytes, journal alone  {journaled}");
    println!("  ratio of CPU, all to bare      {:.2}", told.cpu / bare.cpu);
}

/// A journal of a day; its last ten minutes and its last ten lines are asked for.
fn large_journal(castra: &Path, mebibytes: usize, rounds: usize, dir: &Path) {
    fs::create_dir_all(dir.join("state/logs")).unwrap();
    let config = format!(
        "[project]\nstate_dir = \"state\"\n[bus]\nlog_max_bytes = {}\n[[vms]]\nname = \"web\"\n",
        (mebibytes as u64 + 1) << 20
    );
    fs::write(dir.join("castra.toml"), config).unwrap();
    let journal = dir.join("state/logs/events.jsonl");
    let lines = write_day(&journal, (mebibytes as u64) << 20);
    let ask = |args: &[&str]| {
        let began = Instant::now();
        let output = Command::new(castra)
            .args(["events", "--json"])
            .args(args)
            .current_dir(dir)
            .env("CASTRA_HOME", dir.join("home"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let told = output.stdout.iter().filter(|byte| **byte == b'\n').count();
        (told, began.elapsed())
    };
    let mut times: [Vec<Duration>; 3] = Default::default();
    let mut since = 0;
    for _ in 0..rounds {
        let (told, time) = ask(&["--since", "10m"]);
        times[0].push(time);
        since = told;
        let (told, time) = ask(&["--tail", "10"]);
        times[1].push(time);
        assert_eq!(told, 10);
        let began = Instant::now();
        let all = Command::new("wc").arg("-l").arg(&journal).output().unwrap();
        times[2].push(began.elapsed());
        assert!(String::from_utf8_lossy(&all.stdout).starts_with(&lines.to_string()));
    }
    let [found, last, all] = times.map(|mut times| {
        times.sort();
        times[times.len() / 2].as_secs_f64()
    });
    println!("a journal of {mebibytes} MiB, {lines} lines, medians of {rounds} rounds, seconds:");
    println!("  castra events --since 10m      {found:.3} ({since} events)");
    println!("  castra events --tail 10        {last:.3}");
    println!("  wc -l of the same file         {all:.3}");
    println!("  ratio, --since to wc           {:.3}", found / all);
}

/// Lines of one day until now, as many as fit.
fn write_day(path: &Path, bytes: u64) -> usize {
    let line = |number: usize, ts: SystemTime| {
        let stamped = Stamped {
            ts: wall_clock(ts),
            offset_ms: number as u64,
            seq: number as u64 % 1000,
            run: format!("{:016x}", number / 1000).into(),
            event: event(number),
        };
        stamped.contract_line() + "\n"
    };
    let now = SystemTime::now();
    let count = bytes as usize / (line(1_000_000, now).len() + 1);
    let mut file = std::io::BufWriter::new(File::create(path).unwrap());
    for number in 0..count {
        let ago = Duration::from_secs(86_400).mul_f64(1.0 - number as f64 / count as f64);
        file.write_all(line(number, now - ago).as_bytes()).unwrap();
    }
    file.into_inner().unwrap().sync_all().unwrap();
    count
}

/// As `castra … --json` does it: stamped, one write a line into a pipe, one append.
fn told(events: Vec<Event>, path: &Path) {
    let mut reader = Drain::start();
    let mut reporter = Lines(reader.pipe(), Vec::new());
    let emitter = Emitter::new(&mut reporter);
    let rotation = Rotation {
        max_bytes: u64::MAX,
        keep: 1,
    };
    emitter.attach_journal(Journal::open(path, rotation).unwrap());
    for event in events {
        emitter.emit(event);
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
