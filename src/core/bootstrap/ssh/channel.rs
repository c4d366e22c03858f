//! One command in the guest, through the master connection.
//!
//! Here: starting it, feeding it, its output line by line, its deadline, its exit code. Not here:
//! what the command is (`bootstrap::guest_scripts`).
//!
//! A command may hold its stdin open: in the guest, `guest_scripts::session` takes the end of stdin as the
//! order to end its program. So a deadline, Ctrl-C, a killed castra and a broken connection all end a script
//! with its children in the same way.

use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, ExitStatus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::core::bootstrap::bounded_lines::LineCutter;
use crate::core::bootstrap::ssh::error::SshError;
use crate::core::bootstrap::ssh::master::{Master, spawn_reader};
use crate::core::bootstrap::watch::{StopReason, Watch};
use crate::core::process::{Tail, end_group, ended_within, show_status};
use crate::core::threads;

/// How often a wait checks the VM and requests to stop.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How long the guest may take to end a script once its stdin is closed; the guest sends SIGKILL after about
/// 2 s.
const ORDERLY_END: Duration = Duration::from_secs(6);
/// How long output may still come after the end mark. Only a process that the script left in the background
/// holds the channel open longer, and castra doesn't wait for it.
const AFTER_MARK: Duration = Duration::from_millis(300);
/// How long after a channel's end a broken master may take to end.
const MASTER_TIMEOUT: Duration = Duration::from_millis(500);
/// Longest line passed on in one piece.
pub const LINE_BYTES: usize = 4096;
/// Lines buffered between the readers and the pipeline; a full queue slows the guest down.
const QUEUE_LINES: usize = 1024;

/// Where a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// What goes to a command's stdin.
pub type Feed<'a> = Box<dyn FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'a>;

/// How long a command may take.
#[derive(Clone, Copy, Debug)]
pub enum Limit<'a> {
    /// In total.
    Total(Duration),
    /// Without a change of this counter.
    Idle(Duration, &'a AtomicU64),
}

/// A command to run.
pub struct Exec<'a> {
    /// The command line for the login shell of the guest's user.
    pub command: String,
    /// Written to its stdin.
    pub feed: Feed<'a>,
    /// Keep stdin open after that until the command ends or must end.
    pub hold_stdin: bool,
    /// How long it may take.
    pub limit: Limit<'a>,
    /// A line of its stdout that begins its output; earlier lines come from the login shell's start-up files
    /// and are ignored.
    pub begin_mark: Option<String>,
    /// A word in its stdout that is followed by a blank and the exit code. The line end before it isn't part
    /// of the output.
    pub end_mark: Option<String>,
}

/// Why a command has no exit code.
#[derive(Debug)]
pub enum ExecError {
    /// The connection failed.
    Ssh(SshError),
    /// The limit was reached; the command was ended.
    TimedOut(Duration),
    /// The operation was stopped; the command was ended.
    Stopped(StopReason),
    /// Its input can't be read.
    Feed(io::Error),
}

enum OutputLine {
    Line(Stream, String),
    Eof,
    Fed(io::Result<()>),
}

/// Runs a command and passes on each line of its output; returns its exit code. `tick` is called some fifty
/// times a second.
pub fn run(
    master: &mut Master,
    exec: Exec<'_>,
    watch: &Watch<'_>,
    on_line: &mut dyn FnMut(Stream, &str),
    tick: &mut dyn FnMut(),
) -> Result<i32, ExecError> {
    let target = master.target().clone();
    let mut child = target
        .spawn(target.channel_argv(&exec.command))
        .map_err(|error| ExecError::Ssh(SshError::NoTool(error)))?;
    let stdin = child.stdin.take().expect("stdin is piped");
    let stdout = child.stdout.take().expect("stdout is piped");
    let stderr = child.stderr.take().expect("stderr is piped");
    let (tell, heard) = bounded(QUEUE_LINES);
    let (release, released) = bounded::<()>(0);
    let (feed, hold) = (exec.feed, exec.hold_stdin);
    let vm = &target.vm;
    let (tell_out, tell_err) = (tell.clone(), tell.clone());
    let readers = [
        spawn_reader(&format!("ssh-out {vm}"), move || {
            read_lines(stdout, Stream::Out, &tell_out)
        }),
        spawn_reader(&format!("ssh-err {vm}"), move || {
            read_lines(stderr, Stream::Err, &tell_err)
        }),
    ];
    for reader in readers {
        match reader {
            Ok(reader) => master.add_readers([reader]),
            Err(error) => return Err(abandon(&mut child, error)),
        }
    }
    thread::scope(|scope| {
        let name = format!("ssh-feed {vm}");
        let feeder = threads::spawn_scoped(scope, &name, move || {
            feed_stdin(stdin, feed, hold, &released, &tell);
        });
        if let Err(failure) = feeder {
            return Err(abandon(&mut child, SshError::Lost(failure.cause())));
        }
        let mut conversation = RunningCommand {
            child: &mut child,
            heard,
            release: Some(release),
            eofs: 0,
            code: None,
            fed: None,
            begin: exec.begin_mark.as_deref(),
            before: Tail::default(),
            mark: exec.end_mark.as_deref(),
            empty_line: false,
        };
        let result = match conversation.wait(exec.limit, watch, on_line, tick) {
            Ok(()) => conversation.finish(),
            Err(why) => {
                let guest_is_gone = matches!(
                    why,
                    ExecError::Stopped(StopReason::VmEnded(_) | StopReason::Stopped(_))
                );
                conversation.end(hold && !guest_is_gone && !watch.is_forced(), on_line);
                Err(why)
            }
        };
        conversation.flush_login_output(on_line);
        let (code, fed) = (conversation.code, conversation.fed.take());
        drop(conversation);
        let result = result.and_then(|status| result_of(master, code, status, fed));
        if result.is_err() {
            // The master holds this channel's pipes: while it lives, writing input that the guest doesn't
            // read would block. A pipeline never goes on after this.
            master.end();
        }
        result
    })
}

/// Ends a command whose pipes can't be served.
fn abandon(child: &mut Child, error: SshError) -> ExecError {
    let _ = child.kill();
    let _ = child.wait();
    ExecError::Ssh(error)
}

/// Interprets the end of a command.
fn result_of(
    master: &mut Master,
    code: Option<i32>,
    status: ExitStatus,
    fed: Option<io::Result<()>>,
) -> Result<i32, ExecError> {
    if let Some(Err(error)) = fed
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        // If a file can't be read, the guest reports a cut stream, which isn't the cause. With a broken pipe
        // the guest's report is the cause.
        return Err(ExecError::Feed(error));
    }
    match code.or(status.code()) {
        // ssh uses this code for its own failures, but a remote command may end with it too.
        Some(255) if code.is_none() => match master.lost(MASTER_TIMEOUT) {
            Some(lost) => Err(ExecError::Ssh(lost)),
            None => Ok(255),
        },
        Some(code) => Ok(code),
        None => Err(ExecError::Ssh(master.lost(MASTER_TIMEOUT).unwrap_or_else(|| {
            SshError::Lost(format!("ssh ended with {}", show_status(status)))
        }))),
    }
}

/// One command under way.
struct RunningCommand<'a> {
    child: &'a mut Child,
    heard: Receiver<OutputLine>,
    /// Dropped: stdin is closed.
    release: Option<Sender<()>>,
    eofs: u8,
    code: Option<i32>,
    fed: Option<io::Result<()>>,
    /// Until the line that begins the output.
    begin: Option<&'a str>,
    /// The last lines before it.
    before: Tail,
    mark: Option<&'a str>,
    /// An empty line of stdout that may belong to the end mark.
    empty_line: bool,
}

impl RunningCommand<'_> {
    /// Reads until both outputs have ended, or until a little after the end mark.
    fn wait(
        &mut self,
        limit: Limit<'_>,
        watch: &Watch<'_>,
        on_line: &mut dyn FnMut(Stream, &str),
        tick: &mut dyn FnMut(),
    ) -> Result<(), ExecError> {
        let mut since = Instant::now();
        let mut progress = 0;
        let mut looked = Instant::now();
        let mut marked = None;
        while self.eofs < 2 {
            let pause = match marked {
                Some(_) => Duration::from_millis(5),
                None => POLL_INTERVAL,
            };
            self.receive(pause, on_line);
            if self.code.is_some() {
                let at = *marked.get_or_insert_with(Instant::now);
                // The command no longer reads stdin; closing it lets the guest's side end sooner.
                self.release = None;
                if at.elapsed() >= AFTER_MARK {
                    return Ok(());
                }
                continue;
            }
            // With a flood of lines the watch must not be checked for each line.
            if looked.elapsed() < POLL_INTERVAL {
                continue;
            }
            looked = Instant::now();
            tick();
            if let Some(stop) = watch.look() {
                return Err(ExecError::Stopped(stop));
            }
            let allowed = match limit {
                Limit::Total(allowed) => allowed,
                Limit::Idle(allowed, counter) => {
                    let now = counter.load(Ordering::Relaxed);
                    if now != progress {
                        progress = now;
                        since = Instant::now();
                    }
                    allowed
                }
            };
            if since.elapsed() >= allowed {
                return Err(ExecError::TimedOut(allowed));
            }
        }
        Ok(())
    }

    fn receive(&mut self, pause: Duration, on_line: &mut dyn FnMut(Stream, &str)) {
        match self.heard.recv_timeout(pause) {
            Ok(OutputLine::Line(Stream::Out, line)) => self.out_line(&line, on_line),
            Ok(OutputLine::Line(stream, line)) => on_line(stream, &line),
            Ok(OutputLine::Eof) => self.eofs += 1,
            Ok(OutputLine::Fed(result)) => self.fed = Some(result),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.eofs = 2,
        }
    }

    fn out_line(&mut self, line: &str, on_line: &mut dyn FnMut(Stream, &str)) {
        let marked = self.marked_code(line);
        if let Some(begin) = self.begin {
            if line == begin {
                (self.begin, self.before) = (None, Tail::default());
                return;
            }
            if marked.is_none() {
                self.before.push(line);
                return;
            }
        }
        if std::mem::take(&mut self.empty_line) && marked.is_none() {
            on_line(Stream::Out, "");
        }
        match marked {
            Some((before, code)) => {
                if !before.is_empty() {
                    on_line(Stream::Out, before);
                }
                self.code = Some(code);
            }
            None if line.is_empty() && self.mark.is_some() => self.empty_line = true,
            None => on_line(Stream::Out, line),
        }
    }

    /// Output before the beginning may explain why a command never began, for example a login shell that
    /// refuses.
    fn flush_login_output(&mut self, on_line: &mut dyn FnMut(Stream, &str)) {
        if std::mem::take(&mut self.empty_line) && self.code.is_none() {
            on_line(Stream::Out, "");
        }
        for line in self.before.text().lines() {
            on_line(Stream::Out, line);
        }
    }

    /// The text before the end mark and the code after it.
    fn marked_code<'l>(&self, line: &'l str) -> Option<(&'l str, i32)> {
        let mark = self.mark?;
        let (before, after) = line.split_once(mark)?;
        Some((before, after.trim().parse().ok()?))
    }

    /// Reaps ssh after the command has ended.
    fn finish(&mut self) -> Result<ExitStatus, ExecError> {
        self.release = None;
        if self.eofs == 2
            && let Some(status) = ended_within(self.child, Duration::from_secs(1))
        {
            return Ok(status);
        }
        end_group(self.child);
        self.child
            .wait()
            .map_err(|error| ExecError::Ssh(SshError::Lost(error.to_string())))
    }

    /// Ends a command: by closing its stdin if the guest obeys that, then by ending ssh.
    fn end(&mut self, orderly: bool, on_line: &mut dyn FnMut(Stream, &str)) {
        self.release = None;
        let until = Instant::now() + ORDERLY_END;
        while orderly && self.eofs < 2 && self.code.is_none() && Instant::now() < until {
            self.receive(POLL_INTERVAL, on_line);
        }
        end_group(self.child);
    }
}

fn feed_stdin(
    mut stdin: ChildStdin,
    feed: Feed<'_>,
    hold: bool,
    released: &Receiver<()>,
    tell: &Sender<OutputLine>,
) {
    let fed = feed(&mut stdin).and_then(|()| stdin.flush());
    let _ = tell.send(OutputLine::Fed(fed));
    if hold {
        let _ = released.recv();
    }
}

fn read_lines(mut pipe: impl Read, stream: Stream, tell: &Sender<OutputLine>) {
    let mut cutter = LineCutter::new(LINE_BYTES);
    let mut buffer = [0; 16 * 1024];
    let mut each = |line: &str| {
        let _ = tell.send(OutputLine::Line(stream, line.to_owned()));
    };
    while let Ok(count) = pipe.read(&mut buffer) {
        if count == 0 {
            break;
        }
        cutter.push(&buffer[..count], &mut each);
    }
    cutter.finish(&mut each);
    let _ = tell.send(OutputLine::Eof);
}
