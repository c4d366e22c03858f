//! The reporters of the command line: sentences on stderr, or contract lines on stdout.
//!
//! Here: which events people see, and the NDJSON stream. Not here: the words (`sentence`), the live block
//! (`live`), the terminal (`screen`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use castra::core::events::contract::Stamped;
use castra::core::events::{
    Accel, BootstrapPlanAction, BootstrapStepKind, BootstrapStepStatus, Event, HandshakeOutcome, Severity,
};
use castra::core::host;
use castra::core::id::RunId;
use castra::core::name::VmName;
use castra::core::reporter::{COMMAND_LINE, Reporter};
use castra::core::root::paths::{StateRoot, vm_file};
use castra::core::time::millis;

use super::human::duration;
use super::live::{Activity, NAME_COLUMN, bytes_of};
use super::output::Output;
use super::screen::{LiveBlock, Screen};
use super::sentence::{Sentence, is_own, sentence};
use super::style::Style;

/// How often the consoles of booting guests are read.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How many bytes of a console's end are searched for its last line.
const CONSOLE_BYTES: u64 = 1024;
/// The note for guests that are emulated although nobody chose that.
const EMULATED: &str = "note: guests run emulated (TCG), not under KVM; `castra doctor` says why";
/// Without a live block a download prints a line at every tenth, or every so many bytes if its length is
/// unknown.
const LINE_EVERY: u64 = 64 << 20;

/// How much is printed for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verbosity {
    /// `--quiet`: warnings and errors.
    Quiet,
    /// The main events of each VM, and its script's output.
    Usual,
    /// `--verbose`: every step.
    Verbose,
}

/// Prints sentences on stderr.
pub struct HumanReporter {
    screen: Screen,
    style: Style,
    detail: Verbosity,
    column: usize,
    doing: Arc<Mutex<Activity>>,
    /// Dropped with the reporter; that removes the block from the terminal.
    live: Option<LiveBlock>,
    /// Reasons of failed steps; the bootstrap then fails with the same words.
    told: BTreeMap<VmName, String>,
    /// VMs that this run shuts down and that haven't sent anything since.
    stopping: BTreeSet<VmName>,
    /// When this run launched them.
    launched: BTreeMap<VmName, Instant>,
    /// VMs whose last reported state is reachable.
    reached: BTreeSet<VmName>,
    /// The note about emulated guests was printed or isn't needed.
    knows_emulation: bool,
    /// The last printed number of bytes of a download.
    said: u64,
}

/// What is known of the VMs before any event: their order, and where their files are.
#[derive(Clone, Debug)]
pub struct Expected {
    /// The VMs of the operation, in order.
    pub vms: Vec<VmName>,
    /// The state root of their project.
    pub state: StateRoot,
    /// The config asks for emulated guests.
    pub wants_emulation: bool,
}

impl HumanReporter {
    /// A reporter; on a terminal it has a live block as long as it lives.
    pub fn new(screen: Screen, style: Style, detail: Verbosity, expected: Option<Expected>) -> HumanReporter {
        let knows_emulation = expected.as_ref().is_some_and(|expected| expected.wants_emulation);
        let names = expected
            .iter()
            .flat_map(|expected| &expected.vms)
            .map(VmName::to_string);
        let doing = Arc::new(Mutex::new(Activity::expecting(names)));
        let live = match detail {
            Verbosity::Quiet => None,
            Verbosity::Usual | Verbosity::Verbose => {
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
        HumanReporter {
            screen,
            style,
            detail,
            column: NAME_COLUMN,
            doing,
            live,
            told: BTreeMap::new(),
            stopping: BTreeSet::new(),
            launched: BTreeMap::new(),
            reached: BTreeSet::new(),
            knows_emulation,
            said: 0,
        }
    }

    /// Whether this is the failure of a bootstrap whose failed step was just printed.
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

    /// Whether this reports that a guest fell silent while this run shuts it down: not worth printing.
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

    /// An event as a default run prints it: the main events of each VM in a few words. `None`: nothing.
    fn short_sentence<'e>(&mut self, event: &'e Event) -> Option<Sentence<'e>> {
        match event {
            Event::VmLaunched { vm, elapsed_ms, .. } => Some(Sentence::info(
                vm,
                format!("launched in {}", duration(*elapsed_ms)),
            )),
            Event::BrokerFreshness {
                vm, reachable: true, ..
            }
            | Event::BootstrapStep {
                vm,
                step: BootstrapStepKind::WaitHandshake,
                status: BootstrapStepStatus::Success,
                ..
            } => {
                // The handshake and the step that waited for it report the same.
                let is_news = self.reached.insert(vm.clone());
                let after = self
                    .launched
                    .get(vm)
                    .map(|at| format!(" after {}", duration(millis(at.elapsed()))));
                is_news.then(|| Sentence::info(vm, format!("reachable{}", after.unwrap_or_default())))
            }
            event => is_milestone(event).then(|| sentence(event)),
        }
    }

    /// Remembers what the printing of later events depends on.
    fn remember(&mut self, event: &Event) {
        match event {
            Event::VmLaunched { vm, .. } => {
                self.launched.insert(vm.clone(), Instant::now());
                self.reached.remove(vm);
            }
            Event::BrokerFreshness {
                vm, reachable: false, ..
            } => {
                self.reached.remove(vm);
            }
            _ => {}
        }
    }

    /// Once a run: a note that its guests are emulated although nobody chose that.
    fn note_emulation(&mut self, event: &Event) -> Option<String> {
        let is_emulated = matches!(
            event,
            Event::VmLaunched {
                accel: Accel::Tcg,
                ..
            }
        );
        let is_news = is_emulated && !std::mem::replace(&mut self.knows_emulation, true);
        is_news.then(|| EMULATED.to_owned())
    }

    /// The lines printed for an event, above the live block.
    fn lines(&mut self, event: &Event) -> Vec<String> {
        self.remember(event);
        if !is_shown(event) || self.is_repeated(event) || self.is_expected_silence(event) {
            return Vec::new();
        }
        let told = match self.detail {
            Verbosity::Verbose => Some(sentence(event)),
            Verbosity::Quiet | Verbosity::Usual => self.short_sentence(event),
        };
        let Some(sentence) = told else {
            return Vec::new();
        };
        if self.detail == Verbosity::Quiet && sentence.severity < Severity::Warn {
            return Vec::new();
        }
        // The live block shows progress, which the next progress replaces; a script's output has to stay
        // readable.
        if sentence.severity == Severity::Progress
            && !is_printed(event)
            && (self.live.is_some() || !self.is_far_enough(event))
        {
            return Vec::new();
        }
        if let Some(vm) = sentence.vm {
            self.column = self.column.max(vm.as_str().len());
        }
        let note = match self.detail {
            Verbosity::Usual => self.note_emulation(event),
            Verbosity::Quiet | Verbosity::Verbose => None,
        };
        let line = render(&sentence, self.style, self.column);
        note.into_iter().chain([line]).collect()
    }

    /// Whether this progress gets a line: a log doesn't need every second of a download.
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

fn locked(doing: &Mutex<Activity>) -> MutexGuard<'_, Activity> {
    doing.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the consoles of booting guests, which emit no events yet.
struct Consoles {
    state: Option<StateRoot>,
    looked: Option<Instant>,
}

impl Consoles {
    fn new(state: Option<StateRoot>) -> Consoles {
        Consoles { state, looked: None }
    }

    fn look(&mut self, doing: &Mutex<Activity>) {
        let Some(state) = &self.state else { return };
        if self.looked.is_some_and(|at| at.elapsed() < POLL_INTERVAL) {
            return;
        }
        self.looked = Some(Instant::now());
        // Without the lock, which reporting an event needs.
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

/// The last line that isn't blank, without colours.
fn last_line(console: &str) -> Option<String> {
    let plain = without_sequences(console);
    let mut lines = plain.split(['\n', '\r']).map(str::trim);
    lines.rfind(|line| !line.is_empty()).map(str::to_owned)
}

/// Removes escape sequences: `ESC [ … letter`.
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

impl Reporter for HumanReporter {
    fn report(&mut self, stamped: &Stamped) {
        locked(&self.doing).note(&stamped.event, Instant::now());
        for line in self.lines(&stamped.event) {
            self.screen.say(&line);
        }
    }

    fn source(&self) -> &'static str {
        COMMAND_LINE
    }
}

/// One sentence: the VM, two spaces, the text; below it the advice.
pub fn render(sentence: &Sentence<'_>, style: Style, column: usize) -> String {
    let mut line = String::new();
    if let Some(vm) = sentence.vm {
        line.push_str(&style.bold(&format!("{:<column$}", vm.as_str())));
        line.push_str("  ");
    }
    match sentence.severity {
        Severity::Info => line.push_str(&sentence.text),
        Severity::Progress => line.push_str(&style.dim(&sentence.text)),
        Severity::Warn => {
            line.push_str(&style.warning("warning: "));
            line.push_str(&sentence.text);
        }
        Severity::Error | Severity::Blocker => {
            line.push_str(&style.error("error: "));
            line.push_str(&sentence.text);
        }
    }
    if let Some(advice) = &sentence.advice {
        line.push_str("\n  try: ");
        line.push_str(advice);
    }
    line
}

/// Whether a default run prints this event: a step that went well is seen in the live block and in the
/// result.
fn is_milestone(event: &Event) -> bool {
    match event {
        Event::OverlayPrepared { .. }
        | Event::OverlayDiscarded { .. }
        | Event::BrokerStarted { .. }
        | Event::BrokerStopped { .. }
        | Event::ShutdownRequested { .. }
        | Event::CooperativeAttempted { .. }
        | Event::CooperativeSucceeded { .. }
        | Event::BootstrapStarted { .. } => false,
        Event::BootstrapPlanned(plan) => plan.action == BootstrapPlanAction::Error,
        Event::BootstrapStep { status, .. } => *status == BootstrapStepStatus::Failed,
        _ => true,
    }
}

/// Whether this is a line of a script's output.
fn is_printed(event: &Event) -> bool {
    matches!(event, Event::Message { source: Some(_), data: Some(data), .. } if data.get("stream").is_some())
}

/// Not printed: the frame of an operation, whose beginning and end people see anyway; accepted hellos, which
/// repeat every few seconds and whose meaning `BrokerFreshness` reports; steps with nothing to do, except the
/// connection, which every bootstrap needs; a blocker, which the operation then fails with, with cause and
/// advice.
fn is_shown(event: &Event) -> bool {
    if let Event::BootstrapPlanned(plan) = event {
        return plan.action != BootstrapPlanAction::Run;
    }
    // Each turn of an agent reports the sum so far.
    if matches!(event, Event::Usage { scope, .. } if scope == "thread") {
        return false;
    }
    // What an agent runs is what it does.
    if let Event::CommandAccepted { source, .. }
    | Event::CommandCompleted { source, .. }
    | Event::CommandFailed { source, .. } = event
        && !is_own(source)
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

/// What the NDJSON stream has had so far, for a refusal that must fit behind it.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// Envelope of the last event: run, seq, offset.
    pub last: Option<(RunId, u64, u64)>,
    /// Whether `command.rejected` was among them.
    pub rejected: bool,
}

/// Prints contract lines on stdout.
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
        // The broker's events, which pass through here, have a run of their own.
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

    fn source(&self) -> &'static str {
        COMMAND_LINE
    }
}

#[cfg(test)]
mod tests {
    use castra::core::events::BootstrapTrigger;
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
        let mut reporter = HumanReporter::new(Screen, Style::PLAIN, Verbosity::Quiet, None);
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

    fn step(step: BootstrapStepKind, status: BootstrapStepStatus) -> Event {
        Event::BootstrapStep {
            vm: "web".parse().expect("a name"),
            step,
            status,
            duration_ms: 1_300,
            detail: Some("root@127.0.0.1:2222".to_owned()),
        }
    }

    /// What `up` tells of one VM, and of a second.
    fn story() -> Vec<Event> {
        let vm = |name: &str| -> VmName { name.parse().expect("a name") };
        let launched = |name: &str| Event::VmLaunched {
            vm: vm(name),
            pid: 7,
            accel: Accel::Tcg,
            accel_reason: "no /dev/kvm".to_owned(),
            elapsed_ms: 60,
        };
        let mut printed = Event::message(Severity::Progress, Some(&vm("web")), "step 1 of 3");
        if let Event::Message { source, data, .. } = &mut printed {
            *source = Some("bootstrap".to_owned());
            *data = Some(json!({"stream": "stdout"}));
        }
        vec![
            Event::OverlayPrepared {
                vm: vm("web"),
                path: "web.qcow2".into(),
                base: None,
                reused: false,
                elapsed_ms: 3,
            },
            launched("web"),
            Event::BootstrapStarted {
                vm: vm("web"),
                base_hash: None,
                artifact_hash: None,
                trigger: BootstrapTrigger::Auto,
            },
            Event::BrokerFreshness {
                vm: vm("web"),
                reachable: true,
                last_handshake_age_ms: Some(1),
            },
            step(BootstrapStepKind::WaitHandshake, BootstrapStepStatus::Success),
            step(BootstrapStepKind::Connect, BootstrapStepStatus::Success),
            launched("db"),
            printed,
            Event::BootstrapCompleted {
                vm: vm("web"),
                noop: false,
                duration_ms: 5_400,
                stamp: None,
            },
        ]
    }

    fn told(detail: Verbosity, events: &[Event]) -> Vec<String> {
        let mut reporter = HumanReporter::new(Screen, Style::PLAIN, Verbosity::Quiet, None);
        reporter.detail = detail;
        events.iter().flat_map(|event| reporter.lines(event)).collect()
    }

    #[test]
    fn a_vm_has_three_lines_and_those_of_its_script() {
        let usual = told(Verbosity::Usual, &story());
        assert!(usual[2].starts_with("web       reachable after "), "{usual:?}");
        let usual: Vec<&str> = usual.iter().map(String::as_str).collect();
        assert_eq!(usual[..2], [EMULATED, "web       launched in 60 ms"]);
        assert_eq!(
            usual[3..],
            [
                "db        launched in 60 ms",
                "web       | step 1 of 3",
                "web       bootstrapped in 5.4 s",
            ]
        );
        assert_eq!(told(Verbosity::Quiet, &story()), Vec::<String>::new());
        let failed = [step(BootstrapStepKind::Connect, BootstrapStepStatus::Failed)];
        for detail in [Verbosity::Quiet, Verbosity::Usual, Verbosity::Verbose] {
            assert_eq!(told(detail, &failed).len(), 1);
        }
    }

    #[test]
    fn verbose_tells_every_step_and_why_kvm_isnt_used() {
        let verbose = told(Verbosity::Verbose, &story());
        assert_eq!(verbose.len(), story().len(), "{verbose:#?}");
        assert_eq!(
            verbose[1],
            "web       launched in 60 ms, pid 7, tcg (no /dev/kvm)"
        );
    }

    #[test]
    fn silence_while_a_vm_is_shut_down_is_no_news() {
        let web: VmName = "web".parse().expect("a name");
        let freshness = |reachable| Event::BrokerFreshness {
            vm: web.clone(),
            reachable,
            last_handshake_age_ms: Some(6_700),
        };
        for detail in [Verbosity::Quiet, Verbosity::Usual, Verbosity::Verbose] {
            let mut reporter = HumanReporter::new(Screen, Style::PLAIN, detail, None);
            assert_eq!(reporter.lines(&freshness(false)).len(), 1);
            reporter.lines(&Event::ShutdownRequested {
                vm: web.clone(),
                pid: 1,
            });
            assert_eq!(reporter.lines(&freshness(false)), [""; 0]);
            // It is back, and from now on its silence is a warning again.
            reporter.lines(&freshness(true));
            assert_eq!(reporter.lines(&freshness(false)).len(), 1);
        }
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
