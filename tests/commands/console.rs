//! `castra console`, on a terminal and through pipes. The terminal is a real one: a pty, whose other
//! end this test holds through python3.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::project::{ONE, Project};
use crate::support::{Ran, eventually, eventually_in, spawn_piped};

fn up(name: &str) -> Project {
    let project = Project::new(name, ONE);
    project.run(&["up"]).exits(0);
    project
}

/// A castra on a terminal of its own.
struct OnTerminal {
    child: Child,
    keys: Option<ChildStdin>,
    seen: Arc<Mutex<Vec<u8>>>,
}

/// Runs its arguments on a pty and hands on both directions; then prints how the terminal was left
/// and the exit code.
const PTY: &str = r#"
import os, pty, select, sys, termios
master, slave = os.openpty()
before = termios.tcgetattr(slave)
pid = os.fork()
if pid == 0:
    os.setsid()
    import fcntl
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2):
        os.dup2(slave, fd)
    os.closerange(3, 64)
    os.execv(sys.argv[1], sys.argv[1:])
print(f"pid {pid}", flush=True)
stdin, open_ = 0, True
while True:
    ready, _, _ = select.select([master] + ([stdin] if open_ else []), [], [], 0.05)
    if master in ready:
        os.write(1, os.read(master, 65536))
        continue
    if stdin in ready:
        keys = os.read(stdin, 65536)
        open_ = bool(keys)
        os.write(master, keys)
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        break
while select.select([master], [], [], 0.05)[0]:
    os.write(1, os.read(master, 65536))
left = "as it was" if termios.tcgetattr(slave) == before else "changed"
code = os.waitstatus_to_exitcode(status)
os.write(1, f"\n[terminal {left}, exit {code}]\n".encode())
"#;

impl OnTerminal {
    fn start(project: &Project, args: &[&str]) -> OnTerminal {
        let mut command: Command = project.castra().command(&[] as &[&str]);
        let binary = command.get_program().to_owned();
        // Only for its surroundings: the program on the terminal is castra.
        let environment: Vec<_> = command
            .get_envs()
            .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
            .collect();
        command = Command::new("python3");
        let mut child = command
            .args(["-c", PTY])
            .arg(binary)
            .args(args)
            .env_clear()
            .envs(environment)
            .env("TERM", "xterm")
            .current_dir(project.castra().project())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let keys = child.stdin.take();
        let mut screen = child.stdout.take().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&seen);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut buffer) {
                kept.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        OnTerminal { child, keys, seen }
    }

    fn types(&mut self, keys: &str) {
        self.keys.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    /// All that was shown, once this is in it.
    #[track_caller]
    fn shows(&self, what: &str) -> String {
        let shown = || Some(self.text()).filter(|text| text.contains(what));
        eventually_in(what, || self.text(), shown)
    }

    /// The pid of castra on it.
    fn pid(&self) -> Pid {
        let text = self.shows("\n");
        let pid = text.lines().next().unwrap().strip_prefix("pid ").unwrap();
        Pid::from_raw(pid.trim().parse().unwrap())
    }

    /// All that was shown, to its end: the terminal must be as it was.
    #[track_caller]
    fn ends(self, code: i32) -> String {
        self.shows(&format!("[terminal as it was, exit {code}]"))
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        self.keys = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_terminal_is_attached_and_left_as_it_was() {
    let project = up("console-terminal");
    let mut terminal = OnTerminal::start(&project, &["console", "web"]);
    let begin = terminal.shows("fake guest boots\r\n");
    assert!(
        begin.contains("attached to the console of vm `web`: Ctrl-] leaves it"),
        "{begin:?}"
    );
    terminal.types("hello\r");
    terminal.shows("you said hello\r\n");
    // Keys that would otherwise mean something to castra go to the guest.
    terminal.types("\x03\x1a\r");
    terminal.shows("you said \r\n");
    let log = fs::read_to_string(project.state("vms/web/serial.log")).unwrap();
    assert!(log.contains("you said \x03\x1a"), "{log:?}");
    terminal.types("colours\r");
    let text = terminal.shows("hidden\r\n");
    assert!(text.contains("\x1b[31mred\x1b[0m\x1b[?25lhidden\r\n"), "{text:?}");
    assert!(!text.contains("\x1b]") && !text.contains("\x1b[6n"), "{text:?}");

    // A second client is refused, and learns which process has the console.
    let refusal = project.refused(75, &["console", "web"]);
    refusal
        .tells(&[
            "console of vm `web` is in use",
            &format!("castra console (pid {})", terminal.pid()),
        ])
        .advises("castra logs");

    terminal.types("\x1d");
    let text = terminal.ends(0);
    assert!(
        text.contains("left the console of vm `web`, which keeps running"),
        "{text:?}"
    );
    assert!(text.contains("\x1b[?25h"), "the cursor stays hidden: {text:?}");
    assert_eq!(project.vm("web")["state"], "running");
    project.down();
}

#[test]
fn a_signal_or_the_guests_end_leaves_the_terminal_as_it_was() {
    let project = up("console-ends");
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        let terminal = OnTerminal::start(&project, &["console", "web"]);
        terminal.shows("fake guest boots\r\n");
        kill(terminal.pid(), signal).unwrap();
        terminal.ends(130);
    }
    let mut terminal = OnTerminal::start(&project, &["console", "web"]);
    terminal.shows("fake guest boots\r\n");
    terminal.types("poweroff\r");
    let text = terminal.ends(0);
    assert!(
        text.contains("going down\r\n") && text.contains("vm `web` has ended"),
        "{text:?}"
    );
    project.down();
}

/// Sends this through a pipe and closes it once the answer is there; all that was written.
fn talk(project: &Project, args: &[&str], sent: &str, answer: &str) -> Ran {
    let mut child = spawn_piped(project.castra().command(args).stdin(Stdio::piped()));
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(sent.as_bytes()).unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut heard = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&heard).contains(answer) {
        let count = stdout.read(&mut buffer).unwrap();
        assert!(
            count > 0,
            "it ended before {answer:?}: {:?}",
            String::from_utf8_lossy(&heard)
        );
        heard.extend_from_slice(&buffer[..count]);
    }
    drop(stdin);
    stdout.read_to_end(&mut heard).unwrap();
    let output = child.wait_with_output().unwrap();
    Ran {
        args: args.join(" "),
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&heard).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

#[test]
fn through_pipes_commands_go_in_and_answers_come_out() {
    let project = up("console-pipe");
    let ran = talk(&project, &["console", "web"], "one\ntwo\n", "two\r\n").exits(0);
    assert_eq!(ran.stdout, "you said one\r\nyou said two\r\n");
    assert_eq!(ran.stderr, "");
    let ran = talk(&project, &["console", "web"], "colours\n", "hidden\r\n").exits(0);
    assert_eq!(
        ran.stdout,
        "\x1b[31mred\x1b[0m\x1b[?25lhidden\r\n\x1b[?25h\x1b[4l\x1b7\x1b[r\x1b8\x1b[0m\x1b(B\x0f\x1b>"
    );
    let ran = talk(&project, &["console", "--raw", "web"], "colours\n", "hidden").exits(0);
    assert_eq!(
        ran.stdout,
        "\x1b]0;title\x07\x1b[31mred\x1b[0m\x1b[6n\x1b[?25lhidden\x1b]52;c;eA==\x07\r\n"
    );
    let ran = talk(&project, &["console", "web"], "poweroff\n", "going down\r\n").exits(0);
    assert_eq!(ran.stdout, "going down\r\n");
    ran.tells("vm `web` has ended");

    let stopped = project.run(&["console", "web"]).exits(1);
    stopped.tells("vm `web` is not running");
    stopped.tells("castra up web");
    project.run(&["console", "wbe"]).exits(64);
    project.down();
    project.run(&["clean"]).exits(0);
    assert!(!project.state("vms").exists(), "its lock file stays");
}

#[test]
fn a_client_that_isnt_castra_is_noticed() {
    let project = up("console-foreign");
    let socket: PathBuf = project.state("vms/web/serial.sock");
    let foreign = UnixStream::connect(&socket).unwrap();
    // QEMU must have taken it.
    eventually("the refusal", || {
        let ran = project.run(&["--json", "console", "web"]);
        (ran.code == Some(75)).then_some(ran)
    });
    project
        .refused(75, &["console", "web"])
        .tells(&["a program that isn't castra is attached"]);
    drop(foreign);
    talk(&project, &["console", "web"], "x\n", "you said x\r\n").exits(0);
    // Whatever became of the lock's holder: a lock nobody holds is no lock.
    fs::write(project.state("vms/web/console.lock"), "1 castra console\n").unwrap();
    project.castra().run_with_stdin(&["console", "web"], b"").exits(0);
    project.down();
}
