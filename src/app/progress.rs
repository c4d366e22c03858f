//! The reporters of the command line: sentences on stderr, or contract lines on stdout.
//!
//! Here: which events people are told, and the NDJSON stream. Not here: the words (`sentence`), what
//! goes on meanwhile (`live`), the terminal (`screen`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use castra::core::events::contract::Stamped;
use castra::core::events::{
    BootstrapPlanAction, BootstrapStepKind, BootstrapStepStatus, Event, HandshakeOutcome, Severity,
};
use castra::core::host;
use castra::core::name::VmName;
use castra::core::paths::{StateRoot, vm_file};
use castra::core::reporter::Reporter;

use super::live::{Doing, NAME_COLUMN, bytes_of};
use super::output::Output;
use super::screen::{LiveBlock, Screen};
use super::sentence::{OWN, Sentence, sentence};
use super::style::Style;

/// Between two looks at the consoles of guests that boot.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// As much of a console as is looked at for its last line.
const CONSOLE_BYTES: u64 = 1024;
/// Of a download that nobody watches a line is said at every tenth; without a known length, at
/// every so many bytes.
const LINE_EVERY: u64 = 64 << 20;

/// Tells people, on stderr.
pub struct PeopleReporter {
    screen: Screen,
    style: Style,
    quiet: bool,
    column: usize,
    doing: Arc<Mutex<Doing>>,
    /// Dropped with the reporter, which takes the block off the terminal.
    live: Option<LiveBlock>,
    /// Why steps failed; the bootstrap then fails with the same words.
    told: BTreeMap<VmName, String>,
    /// VMs that this run shuts down and that haven't been heard since.
    stopping: BTreeSet<VmName>,
    /// How far what is counted in bytes was said to be.
    said: u64,
}

/// What is known of a fleet before its events: the VMs in their order, and where their files are.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Those that will be worked on.
    pub vms: Vec<VmName>,
    /// Of their project.
    pub state: StateRoot,
}

impl PeopleReporter {
    /// A reporter; on a terminal it has a live block as long as it lives.
    pub fn new(screen: Screen, style: Style, quiet: bool, expected: Option<Expected>) -> PeopleReporter {
        let names = expected
            .iter()
            .flat_map(|expected| &expected.vms)
            .map(VmName::to_string);
        let doing = Arc::new(Mutex::new(Doing::expecting(names)));
        let live = match quiet {
            true => None,
            false => {
                let doing = Arc::clone(&doing);
                let mut consoles = Consoles::new(expected.map(|expected| expected.state));
                LiveBlock::start(move |size| {
                    if locked(&doing).is_idle() {
                        return Vec::new();
                    }
                    consoles.look(&doing);
                    let size = size();
                    locked(&doing).lines(Instant::now(), size, style)
                })
            }
        };
        PeopleReporter {
            screen,
            style,
            quiet,
            column: NAME_COLUMN,
            doing,
            live,
            told: BTreeMap::new(),
            stopping: BTreeSet::new(),
            said: 0,
        }
    }

    /// Whether this is the failure of a bootstrap whose step has just told why.
    fn is_repeated(&mut self, event: &Event) -> bool {
        match event {
            Event::BootstrapStep {
                vm,
                status: BootstrapStepStatus::Failed,
                detail: Some(why),
                ..
            } => {
                self.told.insert(vm.clone(), why.clone());
                false
            }
            Event::BootstrapFailed { vm, error, .. } => {
                let told = self.told.remove(vm);
                told.is_some_and(|why| why.contains(error.as_str()))
            }
            _ => false,
        }
    }

    /// Whether a guest falls silent that is just being shut down, which is no news.
    fn is_expected_silence(&mut self, event: &Event) -> bool {
        match event {
            Event::ShutdownRequested { vm, .. } => {
                self.stopping.insert(vm.clone());
                false
            }
            Event::BrokerFreshness { vm, reachable, .. } => match *reachable {
                true => {
                    self.stopping.remove(vm);
                    false
                }
                false => self.stopping.contains(vm),
            },
            _ => false,
        }
    }

    /// Whether this progress is worth a line of its own: nobody reads a download's every second in a
    /// log.
    fn is_far_enough(&mut self, event: &Event) -> bool {
        let Event::Message { data, .. } = event else {
            return true;
        };
        let (Some(bytes), total) = bytes_of(data.as_ref()) else {
            return true;
        };
        let step = total.map_or(LINE_EVERY, |total| (total / 10).max(1));
        if bytes < self.said {
            self.said = 0;
        }
        let far = bytes / step > self.said / step;
        if far {
            self.said = bytes;
        }
        far
    }
}

fn locked(doing: &Mutex<Doing>) -> MutexGuard<'_, Doing> {
    doing.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks at the consoles of guests that boot, which say nothing otherwise.
struct Consoles {
    state: Option<StateRoot>,
    looked: Option<Instant>,
}

impl Consoles {
    fn new(state: Option<StateRoot>) -> Consoles {
        Consoles { state, looked: None }
    }

    fn look(&mut self, doing: &Mutex<Doing>) {
        let Some(state) = &self.state else { return };
        if self.looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return;
        }
        self.looked = Some(Instant::now());
        // Not under the lock: whoever reports an event waits for it.
        let booting = locked(doing).booting();
        for vm in booting {
            let Ok(name) = vm.parse::<VmName>() else { continue };
            let tail = host::tail_of(&state.vm(&name).file(vm_file::SERIAL_LOG), CONSOLE_BYTES);
            if let Some(line) = last_line(&tail) {
                locked(doing).note_console(&vm, &line, Instant::now());
            }
        }
    }
}

/// The last line with anything to read, without the colours that boot messages have.
fn last_line(console: &str) -> Option<String> {
    let plain = without_sequences(console);
    let mut lines = plain.split(['\n', '\r']).map(str::trim);
    lines.rfind(|line| !line.is_empty()).map(str::to_owned)
}

/// Drops what moves the cursor or paints: `ESC [ … letter`.
fn without_sequences(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\x1b' {
            plain.push(c);
            continue;
        }
        if chars.next() == Some('[') {
            chars.find(|c| ('@'..='~').contains(c));
        }
    }
    plain
}

impl Reporter for PeopleReporter {
    fn report(&mut self, stamped: &Stamped) {
        locked(&self.doing).note(&stamped.event, Instant::now());
        let sentence = sentence(&stamped.event);
        if self.quiet && sentence.severity < Severity::Warn {
            return;
        }
        let event = &stamped.event;
        if !is_told(event) || self.is_repeated(event) || self.is_expected_silence(event) {
            return;
        }
        // The live block shows progress, and the next overwrites it.
        if sentence.severity == Severity::Progress
            && (self.live.is_some() || !self.is_far_enough(&stamped.event))
        {
            return;
        }
        if let Some(vm) = sentence.vm {
            self.column = self.column.max(vm.as_str().len());
        }
        self.screen.say(&render(&sentence, self.style, self.column));
    }
}

/// One sentence as people see it: the VM, two spaces, the text; below it what to do.
pub fn render(sentence: &Sentence<'_>, style: Style, column: usize) -> String {
    let mut line = String::new();
    if let Some(vm) = sentence.vm {
        line.push_str(&style.strong(&format!("{:<column$}", vm.as_str())));
        line.push_str("  ");
    }
    match sentence.severity {
        Severity::Info => line.push_str(&sentence.text),
        Severity::Progress => line.push_str(&style.faint(&sentence.text)),
        Severity::Warn => {
            line.push_str(&style.odd("warning: "));
            line.push_str(&sentence.text);
        }
        Severity::Error | Severity::Blocker => {
            line.push_str(&style.bad("error: "));
            line.push_str(&sentence.text);
        }
    }
    if let Some(advice) = &sentence.advice {
        line.push_str("\n  try: ");
        line.push_str(advice);
    }
    line
}

/// The frame of an operation is for scripts; people see its beginning and end by themselves.
/// Accepted hellos repeat every few seconds: what they mean is told by `BrokerFreshness`. Steps with
/// nothing to do are no news, except the connection, which every bootstrap needs. A blocker is what
/// the operation then fails with, and that is shown at its end with cause and advice.
fn is_told(event: &Event) -> bool {
    if let Event::BootstrapPlanned(plan) = event {
        return plan.action != BootstrapPlanAction::Run;
    }
    // The sum of its turns comes with each of them.
    if matches!(event, Event::Usage { scope, .. } if scope == "thread") {
        return false;
    }
    // What an agent runs is what it does.
    if let Event::CommandAccepted { source, .. }
    | Event::CommandCompleted { source, .. }
    | Event::CommandFailed { source, .. } = event
        && source != OWN
    {
        return true;
    }
    !matches!(
        event,
        Event::Message {
            severity: Severity::Blocker,
            ..
        } | Event::CommandAccepted { .. }
            | Event::CommandRejected { .. }
            | Event::CommandCompleted { .. }
            | Event::CommandFailed { .. }
            | Event::Summary { .. }
            | Event::Cleanup { .. }
            | Event::BrokerSession { .. }
            | Event::BootstrapStep {
                step: BootstrapStepKind::VizierInstall
                    | BootstrapStepKind::VizierEnable
                    | BootstrapStepKind::VizierHandshake
                    | BootstrapStepKind::Transfer
                    | BootstrapStepKind::Apply
                    | BootstrapStepKind::Verify,
                status: BootstrapStepStatus::Skipped,
                ..
            }
            | Event::BrokerHandshake {
                outcome: HandshakeOutcome::Ok,
                ..
            }
    )
}

/// What the NDJSON stream has carried, for a refusal that must fit behind it.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// Envelope of the last event: run, seq, offset.
    pub last: Option<(String, u64, u64)>,
    /// Whether `command.rejected` was among them.
    pub rejected: bool,
}

/// Tells scripts, on stdout.
pub struct JsonReporter<'a> {
    output: &'a mut Output,
    trace: &'a mut Trace,
}

impl<'a> JsonReporter<'a> {
    /// A reporter that prints each event as it comes.
    pub fn new(output: &'a mut Output, trace: &'a mut Trace) -> JsonReporter<'a> {
        JsonReporter { output, trace }
    }
}

impl Reporter for JsonReporter<'_> {
    fn report(&mut self, stamped: &Stamped) {
        self.report_line(stamped, &stamped.contract_line());
    }

    fn report_line(&mut self, stamped: &Stamped, line: &str) {
        // The broker's events pass through in between; they are of another run.
        let own = self
            .trace
            .last
            .as_ref()
            .is_none_or(|(run, _, _)| *run == stamped.run);
        if own {
            self.trace.last = Some((stamped.run.clone(), stamped.seq, stamped.offset_ms));
        }
        self.trace.rejected |= matches!(stamped.event, Event::CommandRejected { .. });
        self.output.json_line(line);
        self.output.flush();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn bytes(bytes: u64, total: Option<u64>) -> Event {
        let mut event = Event::message(Severity::Progress, None, "fetching");
        if let Event::Message { data, .. } = &mut event {
            *data = Some(json!({"bytes": bytes, "total_bytes": total}));
        }
        event
    }

    #[test]
    fn a_download_that_nobody_watches_is_told_at_every_tenth() {
        let mut reporter = PeopleReporter::new(Screen, Style::PLAIN, true, None);
        let mut told = |bytes_now, total| reporter.is_far_enough(&bytes(bytes_now, total));
        for (now, expected) in [
            (5, false),
            (10, true),
            (19, false),
            (45, true),
            (49, false),
            (100, true),
        ] {
            assert_eq!(told(now, Some(100)), expected, "{now} %");
        }
        // Another one begins.
        assert!(!told(3, Some(100)) && told(12, Some(100)));
        assert!(!told(LINE_EVERY - 1, None) && told(LINE_EVERY, None));
        assert!(!told(0, Some(0)));
        assert!(reporter.is_far_enough(&Event::message(Severity::Progress, None, "trying KVM")));
    }

    #[test]
    fn silence_while_a_vm_is_shut_down_is_no_news() {
        let web: VmName = "web".parse().expect("a name");
        let freshness = |reachable| Event::BrokerFreshness {
            vm: web.clone(),
            reachable,
            last_handshake_age_ms: Some(6_700),
        };
        let mut reporter = PeopleReporter::new(Screen, Style::PLAIN, true, None);
        assert!(!reporter.is_expected_silence(&freshness(false)));
        reporter.is_expected_silence(&Event::ShutdownRequested {
            vm: web.clone(),
            pid: 1,
        });
        assert!(reporter.is_expected_silence(&freshness(false)));
        // It is back, and from now on its silence is a warning again.
        assert!(!reporter.is_expected_silence(&freshness(true)));
        assert!(!reporter.is_expected_silence(&freshness(false)));
    }

    #[test]
    fn the_last_line_of_a_console() {
        for (console, line) in [
            ("", None),
            ("\r\n \r\n", None),
            ("one\r\ntwo\r\n\r\n", Some("two")),
            (
                "[  \x1b[32mOK\x1b[0m  ] Reached target\n",
                Some("[  OK  ] Reached target"),
            ),
            ("10 %\r20 %\r", Some("20 %")),
            ("login: \x1b", Some("login:")),
        ] {
            assert_eq!(last_line(console).as_deref(), line, "{console:?}");
        }
    }
}
