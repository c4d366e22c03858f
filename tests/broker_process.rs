//! The broker as a process of its own: started, raced for, killed, short of descriptors, stopped.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use castra::core::broker::{
    BrokerLauncher, BrokerStop, ProcessBrokerLauncher, ThreadBrokerLauncher, ensure_broker, stop_broker,
};
use castra::core::cancel::Cancel;
use castra::core::config::{Config, load};
use castra::core::failure::Exit;
use castra::core::host::{self, Holder};
use castra::core::root::alive::find_broker;
use castra::core::root::handshake_record::{RecordRead, read_record};
use castra::core::root::records::{self, BrokerRecord};

use support::{AMPLE, CASTRA, Scratch, eventually, until};

/// A project in a directory of its own; its broker is stopped at the end.
struct Project {
    dir: Scratch,
    config: Config,
}

impl Project {
    fn new(label: &str, broker: &str) -> Project {
        let dir = Scratch::new(label);
        let path = dir.path("castra.toml");
        let text = format!(
            "[project]\nname = \"demo\"\nstate_dir = \"state\"\n[broker]\n{broker}\n[[vms]]\nname = \"web\"\n"
        );
        fs::write(&path, text).unwrap();
        Project {
            config: load(&path).unwrap(),
            dir,
        }
    }

    fn launcher() -> ProcessBrokerLauncher {
        ProcessBrokerLauncher {
            cli: PathBuf::from(CASTRA),
        }
    }

    fn start(&self) -> u16 {
        let broker = ensure_broker(&self.config, &Project::launcher(), AMPLE, &Cancel::new()).unwrap();
        assert!(broker.started);
        broker.port
    }

    fn pid(&self) -> u32 {
        find_broker(&self.config.state).unwrap().0
    }

    fn log(&self) -> String {
        fs::read_to_string(self.config.state.broker_log()).unwrap_or_default()
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        let _ = stop_broker(&self.config.state, AMPLE);
        support::journals::check_below(self.dir.dir());
    }
}

/// What the broker answers; an error where the connection or the broker is gone.
fn hello(port: u16, vm: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(AMPLE))?;
    stream.write_all(format!("hello vm:{vm}\n").as_bytes())?;
    let mut reader = BufReader::new(stream);
    let (mut greeting, mut line) = (String::new(), String::new());
    reader.read_line(&mut greeting)?;
    reader.read_line(&mut line)?;
    Ok(line)
}

#[test]
fn started_found_and_stopped() {
    let project = Project::new("life", "port = 0");
    let state = &project.config.state;
    assert!(find_broker(state).is_none());
    let port = project.start();
    let again = ensure_broker(&project.config, &Project::launcher(), AMPLE, &Cancel::new()).unwrap();
    assert_eq!((again.port, again.started), (port, false));
    assert_eq!(hello(port, "web").unwrap(), "ok\n");
    let pid = project.pid();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session: u32 = stat
        .rsplit_once(") ")
        .unwrap()
        .1
        .split(' ')
        .nth(3)
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(session, pid, "it leads a session of its own");
    for descriptor in 0..3 {
        let target = fs::read_link(format!("/proc/{pid}/fd/{descriptor}")).unwrap();
        assert_eq!(
            target,
            Path::new("/dev/null"),
            "descriptor {descriptor} is nobody's"
        );
    }
    let began = Instant::now();
    assert_eq!(stop_broker(state, AMPLE).unwrap(), BrokerStop::Stopped { pid });
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?} to stop",
        began.elapsed()
    );
    assert_eq!(stop_broker(state, AMPLE).unwrap(), BrokerStop::NotRunning);
    let record: BrokerRecord = records::load(&state.broker_json()).unwrap().unwrap();
    assert!(record.clean_stop);
    until("the process to be reaped", || {
        !Path::new(&format!("/proc/{pid}")).exists()
    });
}

#[test]
fn who_waits_is_told_when_it_stops() {
    let project = Project::new("waiting", "port = 0\nhello_timeout_secs = 60");
    let port = project.start();
    let mut silent: Vec<TcpStream> = (0..100)
        .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
        .collect();
    let mut half = TcpStream::connect(("127.0.0.1", port)).unwrap();
    half.write_all(b"hello vm:we").unwrap();
    let mut greeting = [0; 22];
    for stream in silent.iter_mut().chain([&mut half]) {
        stream.set_read_timeout(Some(AMPLE)).unwrap();
        stream.read_exact(&mut greeting).unwrap();
    }
    let began = Instant::now();
    stop_broker(&project.config.state, AMPLE).unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?} to stop",
        began.elapsed()
    );
    for mut stream in silent.into_iter().chain([half]) {
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        assert_eq!(said, "declined reason=shutting-down\n");
    }
    let log = project.log();
    assert_eq!(
        log.matches("hello from").count(),
        1,
        "only who had begun is an attempt: {log}"
    );
    assert!(log.contains("vm:- outcome=declined reason=shutting-down"));
}

#[test]
fn two_starters_end_with_one_broker() {
    let project = Project::new("race", "port = 0");
    let handles: Vec<_> = thread::scope(|scope| {
        let starters: Vec<_> = (0..6)
            .map(|_| {
                scope.spawn(|| {
                    ensure_broker(&project.config, &Project::launcher(), AMPLE, &Cancel::new()).unwrap()
                })
            })
            .collect();
        starters
            .into_iter()
            .map(|starter| starter.join().unwrap())
            .collect()
    });
    assert!(
        handles
            .iter()
            .all(|handle| handle.pid == handles[0].pid && handle.port == handles[0].port)
    );
    assert_eq!(handles.iter().filter(|handle| handle.started).count(), 1);
    assert_eq!(project.log().matches("broker started").count(), 1);
}

#[test]
fn who_starts_it_sees_why_it_does_not() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let project = Project::new("why", &format!("port = {port}"));
    let failure = ensure_broker(&project.config, &Project::launcher(), AMPLE, &Cancel::new()).unwrap_err();
    assert_eq!(failure.exit, Exit::Busy);
    let why = failure.why.unwrap();
    assert!(why.contains(&format!("(pid {})", std::process::id())), "{why}");
    assert!(
        project.log().contains("ERROR broker didn't start: "),
        "{}",
        project.log()
    );

    fs::write(&project.config.path, "[[vms]\n").unwrap();
    let failure = ensure_broker(&project.config, &Project::launcher(), AMPLE, &Cancel::new()).unwrap_err();
    assert!(
        failure.why.as_deref().unwrap().contains("castra.toml:1:"),
        "{failure}"
    );

    let missing = ProcessBrokerLauncher {
        cli: project.dir.path("no-castra"),
    };
    assert_eq!(
        missing.launch(&project.config).unwrap_err().exit,
        Exit::Unavailable
    );
}

#[test]
fn killed_in_a_burst_and_started_again() {
    let project = Project::new("kill", "port = 0");
    let state = &project.config.state;
    for round in 0..5 {
        let port = project.start();
        let pid = project.pid();
        let stop = AtomicBool::new(false);
        let accepted = AtomicU64::new(0);
        thread::scope(|scope| {
            for client in 0..4 {
                let (stop, accepted) = (&stop, &accepted);
                scope.spawn(move || {
                    let vm = format!("vm-{client}");
                    while !stop.load(Ordering::Relaxed) {
                        match hello(port, &vm) {
                            Ok(line) if line == "ok\n" => accepted.fetch_add(1, Ordering::Relaxed),
                            Ok(line) if !line.is_empty() => panic!("{line:?}"),
                            // Killed before or while it answered.
                            _ => return,
                        };
                    }
                });
            }
            until("a burst", || accepted.load(Ordering::Relaxed) > 200 * (round + 1));
            kill(pid, "KILL");
            until("the lock to be free", || {
                host::lock_holder(&state.broker_pid()) == Holder::Nobody
            });
            stop.store(true, Ordering::Relaxed);
        });
        for client in 0..4 {
            let vm = format!("vm-{client}");
            match read_record(&state.handshake(&vm.parse().unwrap())) {
                RecordRead::Record(record) => assert_eq!(record.vm.as_str(), vm, "two guests mixed up"),
                other => panic!("{vm}: {other:?}"),
            }
        }
    }
    let port = project.start();
    assert_eq!(hello(port, "vm-0").unwrap(), "ok\n");
    assert!(
        project
            .log()
            .lines()
            .all(|line| line.starts_with("[host-broker] 2")),
        "a torn line"
    );
    for line in fs::read_to_string(state.broker_events()).unwrap().lines() {
        assert!(
            serde_json::from_str::<serde_json::Value>(line).is_ok(),
            "{line:?}"
        );
    }
}

#[test]
fn a_hand_shake_outlives_its_broker() {
    let project = Project::new("outlive", "port = 0\nfreshness_secs = 3");
    let port = project.start();
    assert_eq!(hello(port, "web").unwrap(), "ok\n");
    kill(project.pid(), "KILL");
    until("the broker's end", || {
        find_broker(&project.config.state).is_none()
    });
    project.start();
    until("the guest to leave the window", || {
        project.log().contains("freshness of vm:web reachable=false")
    });
    // The killed broker couldn't report that nobody is reachable through it any more; the next one reports
    // whom it believes.
    let log = project.log();
    let told: Vec<bool> = log
        .lines()
        .filter(|line| line.contains("freshness of vm:web"))
        .map(|line| line.contains("reachable=true"))
        .collect();
    assert_eq!(told, [true, true, false], "{log}");
}

fn kill(pid: u32, signal: &str) {
    let done = Command::new("kill")
        .args([&format!("-{signal}"), &pid.to_string()])
        .status()
        .unwrap();
    assert!(done.success());
}

/// An innocent process, as a recycled pid would name one.
struct Bystander(Child);

impl Bystander {
    fn new() -> Bystander {
        Bystander(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_pid_file_alone_proves_nothing() {
    let project = Project::new("pid", "port = 0");
    let state = &project.config.state;
    let mut bystander = Bystander::new();
    host::ensure_private_dir(state.dir()).unwrap();
    for text in [
        bystander.0.id().to_string(),
        "1".into(),
        "0".into(),
        "-1".into(),
        "x".into(),
        String::new(),
    ] {
        fs::write(state.broker_pid(), &text).unwrap();
        assert!(find_broker(state).is_none(), "{text:?}");
        assert_eq!(
            stop_broker(state, AMPLE).unwrap(),
            BrokerStop::NotRunning,
            "{text:?}"
        );
    }
    // Locked by a process that wrote another process's number into it.
    let lock = host::FileLock::try_take(&state.broker_pid(), "castra broker forged").unwrap();
    for text in [
        format!("{} castra broker x", bystander.0.id()),
        "1 castra broker x".into(),
        "-1".into(),
    ] {
        fs::write(state.broker_pid(), &text).unwrap();
        assert_eq!(
            stop_broker(state, AMPLE).unwrap_err().exit,
            Exit::Failed,
            "{text:?}"
        );
    }
    drop(lock);
    assert!(bystander.lives());
    let port = project.start();
    assert_eq!(hello(port, "web").unwrap(), "ok\n");
}

#[test]
fn an_embedded_broker_is_signalled_by_nobody() {
    let project = Project::new("embedded", "port = 0");
    let launcher = ThreadBrokerLauncher::new();
    let broker = ensure_broker(&project.config, &launcher, AMPLE, &Cancel::new()).unwrap();
    assert_eq!(broker.pid, std::process::id());
    assert_eq!(hello(broker.port, "web").unwrap(), "ok\n");
    assert_eq!(
        stop_broker(&project.config.state, AMPLE).unwrap(),
        BrokerStop::Embedded { pid: broker.pid }
    );
    fs::remove_file(project.config.state.broker_json()).unwrap();
    assert_eq!(
        stop_broker(&project.config.state, AMPLE).unwrap(),
        BrokerStop::Embedded { pid: broker.pid },
        "whatever became of broker.json"
    );
    launcher.stop();
    assert!(find_broker(&project.config.state).is_none());
}

/// A broker under a limit of the shell's, as a plain child.
fn limited(project: &Project, limit: &str) -> (Child, u16) {
    let script = format!("ulimit {limit} && exec \"$0\" broker --quiet --config \"$1\"");
    let child = Command::new("sh")
        .args(["-c", &script, CASTRA])
        .arg(&project.config.path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let port = eventually("the broker to listen", || {
        find_broker(&project.config.state)
            .and_then(|(_, record)| record)
            .map(|record| record.port)
    });
    (child, port)
}

#[test]
fn at_the_limit_of_descriptors_the_broker_goes_on() {
    let project = Project::new("descriptors", "port = 0");
    let (mut child, port) = limited(&project, "-n 180");
    let held: Vec<TcpStream> = (0..400)
        .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
        .collect();
    for _ in 0..20 {
        assert_eq!(hello(port, "web").unwrap(), "ok\n");
    }
    // The evicted client was told the reason.
    let mut first = &held[0];
    first.set_read_timeout(Some(AMPLE)).unwrap();
    let mut said = String::new();
    first.read_to_string(&mut said).unwrap();
    assert!(said.ends_with("declined reason=session-limit\n"), "{said:?}");
    assert!(
        project.log().contains("WARN max_connections="),
        "{}",
        project.log()
    );
    let pid = project.pid();
    assert_eq!(
        stop_broker(&project.config.state, AMPLE).unwrap(),
        BrokerStop::Stopped { pid }
    );
    assert!(child.wait().unwrap().success());
}

#[test]
fn at_the_limit_of_file_size_the_broker_goes_on() {
    let project = Project::new("size", "port = 0");
    // In blocks of 512 bytes: room for records, soon none for lines.
    let (mut child, port) = limited(&project, "-f 8");
    let mut filling = || {
        assert_eq!(hello(port, "web").unwrap(), "ok\n");
        let length = fs::metadata(project.config.state.broker_log()).unwrap().len();
        (length > 3800).then_some(())
    };
    eventually("the log to be full", &mut filling);
    for _ in 0..100 {
        filling();
    }
    assert!(fs::metadata(project.config.state.broker_log()).unwrap().len() <= 4096);
    stop_broker(&project.config.state, AMPLE).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_thousand_idle_connections_fit_into_20_mib() {
    let project = Project::new("memory", "port = 0");
    let port = project.start();
    hello(port, "web").unwrap();
    let status = format!("/proc/{}/status", project.pid());
    let resident = || {
        let text = fs::read_to_string(&status).unwrap();
        let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<i64>().unwrap()
    };
    let before = resident();
    let mut held: Vec<TcpStream> = (0..1000)
        .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
        .collect();
    let mut greeting = [0; 22];
    for stream in &mut held {
        stream.read_exact(&mut greeting).unwrap();
    }
    let each = (resident() - before) as f64 / 1000.0;
    println!("{each:.1} KiB an idle connection");
    assert!(each <= 20.0, "{each:.1} KiB an idle connection");
}

#[test]
fn the_client_in_the_manual_works() {
    let project = Project::new("manual", "port = 0");
    let port = project.start();
    let manual = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/PROTOCOL.md")).unwrap();
    let client = manual
        .split("```python\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let script = format!("{client}\nprint(hello('web', ('127.0.0.1', {port}), capabilities=['b', 'a']))");
    let ended = Command::new("python3")
        .args(["-c", &script])
        .output()
        .expect("python3 runs the manual's client");
    assert_eq!(
        String::from_utf8_lossy(&ended.stdout),
        "ok\n",
        "{}",
        String::from_utf8_lossy(&ended.stderr)
    );
    assert!(
        project
            .log()
            .contains("hello from vm:web outcome=ok session=none capabilities=a,b")
    );
}

/// Room for a file system of our own needs root; the rest is tried without.
#[test]
fn a_full_disk_declines_new_guests_and_keeps_the_old() {
    let project = Project::new("full", "port = 0");
    let state = &project.config.state;
    host::ensure_private_dir(state.dir()).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"])
        .arg(state.dir())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !mounted {
        println!("no tmpfs without root; tests/broker.rs shows the same with /dev/full");
        return;
    }
    let mounted = Mounted(state.dir());
    let port = project.start();
    assert_eq!(hello(port, "old").unwrap(), "ok\n");
    let mut filler = File::create(state.dir().join("filler")).unwrap();
    while filler.write_all(&[0; 512]).is_ok() {}
    assert_eq!(hello(port, "new").unwrap(), "declined reason=storage-error\n");
    assert_eq!(
        hello(port, "old").unwrap(),
        "ok\n",
        "its record has its room already"
    );
    drop(filler);
    fs::remove_file(state.dir().join("filler")).unwrap();
    assert_eq!(hello(port, "new").unwrap(), "ok\n");
    stop_broker(state, AMPLE).unwrap();
    let log = project.log();
    drop(mounted);
    assert!(log.contains("No space left on device"), "{log}");
}

/// A test's file system, unmounted at the end even if it is still in use.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}
