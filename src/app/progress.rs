//! The reporters of the command line: sentences on stderr, or contract lines on stdout.
//!
//! Here: which events people are told, what each VM waits for meanwhile, and the NDJSON stream.
//! Not here: the words (`sentence`), the terminal (`screen`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use castra::core::escape::escape_line;
use castra::core::events::contract::Stamped;
use castra::core::events::{
    BootstrapPlanAction, BootstrapStepKind, BootstrapStepStatus, Event, HandshakeOutcome, Severity,
};
use castra::core::reporter::Reporter;

use super::human;
use super::output::Output;
use super::screen::{LiveLine, Screen};
use super::sentence::{OWN, Sentence, sentence};
use super::style::Style;

/// Of a script's last line so much is shown beside its step.
const HEARD_BYTES: usize = 40;
/// Narrower names are padded to this, so that lines begin alike.
const NAME_COLUMN: usize = 8;

/// Tells people, on stderr.
pub struct PeopleReporter {
    screen: Screen,
    style: Style,
    quiet: bool,
    column: usize,
    doing: Arc<Mutex<Doing>>,
    /// Dropped with the reporter, which takes the line off the terminal.
    live: Option<LiveLine>,
}

/// What goes on right now, for the live line.
#[derive(Default)]
struct Doing {
    general: Option<String>,
    vms: BTreeMap<String, Task>,
}

/// What one VM does.
struct Task {
    what: String,
    since: Instant,
    /// The last that was heard of it: a line of its script, as a rule.
    heard: Option<String>,
}

impl PeopleReporter {
    /// A reporter; on a terminal it has a live line as long as it lives.
    pub fn new(screen: &Screen, style: Style, quiet: bool) -> PeopleReporter {
        let doing = Arc::new(Mutex::new(Doing::default()));
        let live = if quiet {
            None
        } else {
            let doing = Arc::clone(&doing);
            LiveLine::start(screen, move || {
                live_text(&doing.lock().unwrap_or_else(PoisonError::into_inner))
            })
        };
        PeopleReporter {
            screen: screen.clone(),
            style,
            quiet,
            column: NAME_COLUMN,
            doing,
            live,
        }
    }
}

impl Reporter for PeopleReporter {
    fn report(&mut self, stamped: &Stamped) {
        self.doing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .note(&stamped.event);
        let sentence = sentence(&stamped.event);
        if self.quiet && sentence.severity < Severity::Warn {
            return;
        }
        if !is_told(&stamped.event) {
            return;
        }
        // The live line shows progress, and the next overwrites it.
        if sentence.severity == Severity::Progress && self.live.is_some() {
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

impl Doing {
    fn note(&mut self, event: &Event) {
        match event {
            Event::Message {
                severity: Severity::Progress,
                text,
                vm: None,
                ..
            } => self.general = Some(escape_line(text, 200)),
            Event::Message {
                severity: Severity::Progress,
                text,
                vm: Some(vm),
                ..
            } => {
                if let Some(task) = self.vms.get_mut(vm.as_str()) {
                    task.heard = Some(escape_line(text, HEARD_BYTES));
                }
            }
            Event::OverlayPrepared { vm, .. } => self.set(vm.as_str(), "starts QEMU".to_owned()),
            Event::VmLaunched { vm, .. } => self.end(vm.as_str()),
            Event::BootstrapStarted { vm, .. } => {
                self.set(vm.as_str(), BootstrapStepKind::WaitHandshake.as_str().to_owned());
            }
            Event::BootstrapStep {
                vm,
                step,
                status: BootstrapStepStatus::Success | BootstrapStepStatus::Skipped,
                ..
            } => match step_after(*step) {
                Some(next) => self.set(vm.as_str(), next.as_str().to_owned()),
                None => self.end(vm.as_str()),
            },
            Event::BootstrapCompleted { vm, .. }
            | Event::BootstrapFailed { vm, .. }
            | Event::VmExited { vm, .. }
            | Event::ShutdownComplete { vm, .. } => self.end(vm.as_str()),
            Event::ShutdownRequested { vm, .. } => self.set(vm.as_str(), "shuts down".to_owned()),
            Event::CooperativeAttempted { vm, timeout_ms, .. } => self.set(
                vm.as_str(),
                format!("powers off, at most {}", human::duration(*timeout_ms)),
            ),
            Event::Escalated {
                vm,
                signal,
                timeout_ms,
                ..
            } => self.set(
                vm.as_str(),
                format!("ends after {signal}, at most {}", human::duration(*timeout_ms)),
            ),
            Event::CommandCompleted { .. } | Event::CommandFailed { .. } => self.general = None,
            _ => {}
        }
    }

    fn set(&mut self, vm: &str, what: String) {
        let task = Task {
            what,
            since: Instant::now(),
            heard: None,
        };
        self.vms.insert(vm.to_owned(), task);
    }

    fn end(&mut self, vm: &str) {
        self.vms.remove(vm);
    }
}

fn step_after(step: BootstrapStepKind) -> Option<BootstrapStepKind> {
    let at = BootstrapStepKind::ALL.iter().position(|known| *known == step)?;
    BootstrapStepKind::ALL.get(at + 1).copied()
}

fn live_text(doing: &Doing) -> String {
    let parts: Vec<String> = doing
        .vms
        .iter()
        .map(|(vm, task)| {
            // Whole seconds: a line that changes ten times a second can't be read.
            let secs = task.since.elapsed().as_secs();
            let heard = task
                .heard
                .as_deref()
                .map(|heard| format!(" ({heard})"))
                .unwrap_or_default();
            format!("{vm} {} {secs} s{heard}", task.what)
        })
        .collect();
    match (parts.is_empty(), &doing.general) {
        (false, _) => format!("… {}", parts.join(" · ")),
        (true, Some(general)) => format!("… {general}"),
        (true, None) => String::new(),
    }
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
        self.output.line(line);
        self.output.flush();
    }
}
