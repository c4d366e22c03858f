//! The live block's contents: one line for each VM that an operation works on.
//!
//! Here: deriving the lines from events. Not here: the terminal (`screen`), bars (`meter`), the sentences
//! above the block (`sentence`).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use castra::core::escape::escape_line;
use castra::core::events::stage::Stage;
use castra::core::events::{
    BootstrapPlan, BootstrapPlanAction, BootstrapStepKind, BootstrapStepStatus, Event, HandshakeOutcome,
    Severity,
};
use castra::core::host;
use castra::core::runtime::launch::LAUNCH_DEADLINE;
use serde_json::Value;

use super::human;
use super::meter::Meter;
use super::screen::Line;
use super::sentence::is_own;
use super::style::Style;
use super::terminal::Size;
use super::width;

/// The activity of a VM that was launched and not heard yet.
const BOOTING: &str = "booting";
/// How many bytes of a VM's last output are kept.
const EVIDENCE_BYTES: usize = 400;
/// Shorter names are padded to this width, so that lines align.
pub const NAME_COLUMN: usize = 8;
/// Terminals of this width or more show the full columns.
const ROOMY: usize = 75;
/// A deadline nearer than this is coloured.
const NEAR: Duration = Duration::from_secs(10);

/// The state of the live block.
#[derive(Debug, Default)]
pub struct Activity {
    /// Work for all VMs, shown while no VM has work of its own.
    general: Option<Work>,
    vms: Vec<VmActivity>,
    /// The largest widths so far: columns don't shrink, so that lines don't jump.
    widest: Widest,
}

#[derive(Clone, Copy, Debug, Default)]
struct Widest {
    doing: usize,
    limit: usize,
}

#[derive(Debug)]
struct VmActivity {
    vm: String,
    /// It is one of the operation's VMs.
    expected: bool,
    state: State,
    /// When its QEMU was launched, if this run did that.
    launched: Option<Instant>,
    limits: Limits,
    /// Its latest sign of progress: a console line, a handshake, a line of its script.
    evidence: Option<(Instant, String)>,
}

#[derive(Debug)]
enum State {
    /// It waits for its turn.
    Waits,
    Works(Work),
    Done,
}

/// The deadlines of a bootstrap's steps.
#[derive(Clone, Copy, Debug, Default)]
struct Limits {
    handshake: Option<Duration>,
    step: Option<Duration>,
    apply: Option<Duration>,
}

/// A piece of work with a beginning and perhaps a limit.
#[derive(Debug)]
struct Work {
    what: String,
    since: Instant,
    until: Option<Instant>,
    meter: Option<Meter>,
}

impl Work {
    fn new(what: impl Into<String>, now: Instant, limit: Option<Duration>) -> Work {
        Work {
            what: what.into(),
            since: now,
            until: limit.map(|limit| now + limit),
            meter: None,
        }
    }

    fn count(&mut self, now: Instant, bytes: u64, total: Option<u64>) {
        match &mut self.meter {
            Some(meter) => meter.note(now, bytes, total),
            meter => *meter = Some(Meter::new(now, bytes, total)),
        }
    }
}

impl Limits {
    fn of(plan: &BootstrapPlan) -> Limits {
        Limits {
            handshake: plan.handshake_timeout_secs.map(Duration::from_secs),
            step: plan.step_timeout_secs.map(Duration::from_secs),
            apply: plan.apply_timeout_secs.map(Duration::from_secs),
        }
    }

    fn step(&self, step: BootstrapStepKind, now: Instant) -> Work {
        let (what, limit) = match step {
            BootstrapStepKind::WaitHandshake => (BOOTING, self.handshake),
            BootstrapStepKind::VizierInstall => ("installing Vizier", self.step),
            BootstrapStepKind::VizierEnable => ("starting Vizier", self.step),
            BootstrapStepKind::VizierHandshake => ("waiting for Vizier", self.step),
            BootstrapStepKind::Connect => ("connecting over SSH", self.step),
            BootstrapStepKind::Transfer => ("copying files", self.step),
            BootstrapStepKind::Apply => ("running its script", self.apply),
            BootstrapStepKind::Verify => ("verifying", self.step),
        };
        Work::new(what, now, limit)
    }
}

impl Activity {
    /// Announces the operation's VMs, in this order.
    pub fn expecting(vms: impl IntoIterator<Item = String>) -> Activity {
        Activity {
            vms: vms.into_iter().map(|vm| VmActivity::new(&vm, true)).collect(),
            ..Activity::default()
        }
    }

    /// Updates the state from an event.
    pub fn note(&mut self, event: &Event, now: Instant) {
        match event {
            // A script's output is printed above the block.
            Event::Message { data: Some(data), .. } if data.get("stream").is_some() => {}
            event if Stage::ended_by(event).is_some() => self.general = None,
            Event::Message {
                severity: Severity::Progress,
                text,
                vm: None,
                data,
                ..
            } => self.note_general(text, data.as_ref(), now),
            Event::Message {
                severity: Severity::Progress,
                text,
                vm: Some(vm),
                // castra's own messages say how long it waits; the line shows that already.
                source: Some(_),
                data,
                ..
            } => self.note_progress(vm.as_str(), text, data.as_ref(), now),
            // The VM failed.
            Event::Message {
                severity: Severity::Error,
                vm: Some(vm),
                ..
            } => self.vm(vm.as_str()).state = State::Done,
            Event::OverlayPrepared { vm, .. } => {
                let work = Work::new("starting QEMU", now, Some(LAUNCH_DEADLINE));
                self.begin(vm.as_str(), work);
            }
            Event::VmLaunched { vm, .. } => {
                let doing = self.vm(vm.as_str());
                doing.launched = Some(now);
                doing.evidence = None;
                doing.begin(Limits::default().step(BootstrapStepKind::WaitHandshake, now));
            }
            Event::BootstrapPlanned(plan) => self.note_plan(plan, now),
            Event::BootstrapStep {
                vm,
                step,
                status: BootstrapStepStatus::Success | BootstrapStepStatus::Skipped,
                detail,
                ..
            } => self.note_step(vm.as_str(), *step, detail.as_deref(), now),
            Event::BootstrapCompleted { vm, .. } | Event::BootstrapFailed { vm, .. } => {
                self.vm(vm.as_str()).state = State::Done;
            }
            Event::ShutdownComplete { vm, .. } => {
                let doing = self.vm(vm.as_str());
                // A restart continues with this VM.
                doing.state = if doing.expected { State::Waits } else { State::Done };
            }
            Event::BrokerHandshake {
                vm: Some(vm),
                outcome: HandshakeOutcome::Ok,
                ..
            } => self.note_evidence(vm.as_str(), "handshake accepted", now),
            Event::BrokerFreshness {
                vm, reachable: true, ..
            } => self.note_evidence(vm.as_str(), "reachable", now),
            Event::ShutdownRequested { vm, .. } => {
                self.begin(vm.as_str(), Work::new("shutting down", now, None));
            }
            Event::CooperativeAttempted { vm, timeout_ms, .. } => {
                let limit = Duration::from_millis(*timeout_ms);
                let work = Work::new("powering off", now, Some(limit));
                self.begin(vm.as_str(), work);
            }
            Event::CooperativeTimedOut { vm, elapsed_ms, .. } => {
                let text = format!("didn't power off in {}", human::duration(*elapsed_ms));
                self.note_evidence(vm.as_str(), &text, now);
            }
            Event::Escalated {
                vm,
                signal,
                timeout_ms,
                ..
            } => {
                let limit = Duration::from_millis(*timeout_ms);
                let work = Work::new(format!("{signal} sent"), now, Some(limit));
                self.begin(vm.as_str(), work);
            }
            Event::CommandCompleted { source, .. } | Event::CommandFailed { source, .. } => {
                self.general = None;
                if is_own(source) {
                    self.vms.clear();
                }
            }
            _ => {}
        }
    }

    fn note_general(&mut self, text: &str, data: Option<&Value>, now: Instant) {
        let (bytes, total) = bytes_of(data);
        let label = data.and_then(|data| data["label"].as_str()).unwrap_or(text);
        let what = escape_line(label, 200);
        if self.general.as_ref().is_none_or(|work| work.what != what) {
            self.general = Some(Work::new(what, now, None));
        }
        if let (Some(work), Some(bytes)) = (&mut self.general, bytes) {
            work.count(now, bytes, total);
        }
    }

    fn note_progress(&mut self, vm: &str, text: &str, data: Option<&Value>, now: Instant) {
        let (bytes, total) = bytes_of(data);
        match (bytes, &mut self.vm(vm).state) {
            (Some(bytes), State::Works(work)) => work.count(now, bytes, total),
            _ => self.note_evidence(vm, text, now),
        }
    }

    fn note_plan(&mut self, plan: &BootstrapPlan, now: Instant) {
        let doing = self.vm(plan.vm.as_str());
        if plan.action != BootstrapPlanAction::Run {
            doing.state = State::Done;
            return;
        }
        doing.limits = Limits::of(plan);
        // The wait for the first proof of life is counted from the launch.
        let since = doing.launched.unwrap_or(now);
        doing.begin(doing.limits.step(BootstrapStepKind::WaitHandshake, since));
    }

    fn note_step(&mut self, vm: &str, step: BootstrapStepKind, detail: Option<&str>, now: Instant) {
        if let (BootstrapStepKind::WaitHandshake, Some(life)) = (step, detail) {
            self.note_evidence(vm, life, now);
        }
        let doing = self.vm(vm);
        let next = BootstrapStepKind::ALL
            .iter()
            .skip_while(|known| **known != step)
            .nth(1);
        doing.state = match next {
            Some(next) => State::Works(doing.limits.step(*next, now)),
            None => State::Works(Work::new("disconnecting", now, None)),
        };
    }

    fn vm(&mut self, vm: &str) -> &mut VmActivity {
        let index = self.vms.iter().position(|known| known.vm == vm);
        let index = index.unwrap_or_else(|| {
            // Events of VMs come in any order; `web-2` is shown before `web-10`.
            let place = self
                .vms
                .iter()
                .rposition(|known| by_number(&known.vm) <= by_number(vm));
            let index = place.map_or(0, |place| place + 1);
            self.vms.insert(index, VmActivity::new(vm, false));
            index
        });
        &mut self.vms[index]
    }

    fn begin(&mut self, vm: &str, work: Work) {
        self.vm(vm).begin(work);
    }

    fn note_evidence(&mut self, vm: &str, text: &str, now: Instant) {
        // A tab would be wider than counted.
        let text = escape_line(text, EVIDENCE_BYTES).replace('\t', " ");
        if !text.trim().is_empty() {
            self.vm(vm).evidence = Some((now, text.trim().to_owned()));
        }
    }

    /// The VMs that boot: only their consoles say anything yet.
    pub fn booting(&self) -> Vec<String> {
        let boots = |vm: &&VmActivity| matches!(&vm.state, State::Works(work) if work.what == BOOTING);
        self.vms.iter().filter(boots).map(|vm| vm.vm.clone()).collect()
    }

    /// Notes the last console line of a booting VM.
    pub fn note_console(&mut self, vm: &str, line: &str, now: Instant) {
        if self.vms.iter().any(|known| known.vm == vm) {
            self.note_evidence(vm, line, now);
        }
    }

    /// Whether there is nothing to show.
    pub fn is_idle(&self) -> bool {
        let works = |vm: &VmActivity| matches!(vm.state, State::Works(_));
        self.general.is_none() && !self.vms.iter().any(works)
    }

    /// The block's lines: fewer than the terminal has, each narrower than it.
    pub fn lines(&mut self, now: Instant, size: Size, style: Style) -> Vec<Line> {
        // Some terminals wrap as soon as the last column is written.
        let columns = size.columns.saturating_sub(1);
        let rows = size.rows.saturating_sub(1).max(1);
        let (mut working, mut waiting) = (Vec::new(), Vec::new());
        for vm in &self.vms {
            match &vm.state {
                State::Works(work) => working.push((vm, Some(work))),
                State::Waits => waiting.push((vm, None)),
                State::Done => {}
            }
        }
        if working.is_empty() {
            return self.general_line(now, columns, style).into_iter().collect();
        }
        let mut left_out = Vec::new();
        if working.len() + waiting.len() <= rows {
            working.append(&mut waiting);
        } else {
            // A quarter of the terminal is left for the sentences above the block, which report failures.
            let rows = rows.min(size.rows * 3 / 4).max(1);
            left_out = working.split_off(working.len().min(rows - 1));
            left_out.append(&mut waiting);
        }
        let shape = Shape::of(&working, now, columns, &mut self.widest);
        let mut lines: Vec<Line> = working
            .iter()
            .map(|(vm, work)| vm.line(*work, &shape, now, style))
            .collect();
        if !left_out.is_empty() {
            let mut line = LineBuilder::new(columns);
            line.push(&more(&left_out), |text| style.dim(text));
            lines.push(line.line);
        }
        lines
    }

    fn general_line(&self, now: Instant, columns: usize, style: Style) -> Option<Line> {
        let work = self.general.as_ref()?;
        let mut line = LineBuilder::new(columns);
        let Some(meter) = &work.meter else {
            let since = human::whole_secs(now.duration_since(work.since).as_secs());
            let label = width::cut(&work.what, columns.saturating_sub(width::of(&since) + 2));
            line.push(&label, str::to_owned);
            line.gap(2);
            line.push(&since, |text| style.dim(text));
            return Some(line.line);
        };
        // The figures are more useful than the end of a long name.
        let label = width::cut(&work.what, (columns / 2).max(NAME_COLUMN));
        line.push(&label, str::to_owned);
        line.gap(2);
        let (text, taken) = meter.render(now, line.left(), style);
        line.push_painted(&text, taken);
        Some(line.line)
    }
}

impl VmActivity {
    fn new(vm: &str, expected: bool) -> VmActivity {
        VmActivity {
            vm: vm.to_owned(),
            expected,
            state: State::Waits,
            launched: None,
            limits: Limits::default(),
            evidence: None,
        }
    }

    fn begin(&mut self, work: Work) {
        self.state = State::Works(work);
    }

    fn line(&self, work: Option<&Work>, shape: &Shape, now: Instant, style: Style) -> Line {
        let mut line = LineBuilder::new(shape.columns);
        let name = width::cut(&self.vm, shape.name);
        line.push(&name, |text| style.bold(text));
        line.gap(shape.name.saturating_sub(width::of(&name)) + 2);
        let Some(work) = work else {
            let text = match host::cores() {
                1 => "waiting: 1 VM boots at a time here".to_owned(),
                at_once => format!("waiting: {at_once} VMs boot at a time here"),
            };
            line.push(&text, |text| style.dim(text));
            return line.line;
        };
        let doing = work.doing(now);
        line.push(&doing, str::to_owned);
        line.gap(shape.doing.saturating_sub(width::of(&doing)) + 1);
        if let Some(limit) = work.limit(now) {
            // Without room for the whole limit, it is left out.
            if line.left() < width::of(&limit) {
                return line.line;
            }
            let near = work.is_near(now);
            line.push(&limit, |text| {
                if near {
                    style.warning(text)
                } else {
                    style.dim(text)
                }
            });
            line.gap(shape.limit.saturating_sub(width::of(&limit)) + 2);
        } else {
            line.gap(1);
        }
        if let Some(meter) = &work.meter {
            let (text, taken) = meter.render(now, line.left(), style);
            line.push_painted(&text, taken);
        } else if let Some((_, text)) = self.evidence.as_ref().filter(|(at, _)| *at >= work.since) {
            line.push(text, str::to_owned);
        }
        line.line
    }
}

impl Work {
    /// The time left; nothing for a transfer that makes progress.
    fn left(&self, now: Instant) -> Option<Duration> {
        let mut until = self.until?;
        if let Some(meter) = &self.meter {
            // The limit counts from the last progress.
            until = meter.stalled_since(now)? + until.duration_since(self.since);
        }
        Some(until.saturating_duration_since(now))
    }

    /// The work and its duration: `booting, 3 s`.
    fn doing(&self, now: Instant) -> String {
        let since = human::whole_secs(now.duration_since(self.since).as_secs());
        format!("{}, {since}", self.what)
    }

    /// Whether its limit is near.
    fn is_near(&self, now: Instant) -> bool {
        let worked = now.duration_since(self.since);
        self.left(now).is_some_and(|left| left <= NEAR && worked > NEAR)
    }

    /// `(gives up after 4 min)`, or near the end how soon.
    fn limit(&self, now: Instant) -> Option<String> {
        let left = self.left(now)?;
        let secs = |time: Duration| human::whole_secs(time.as_millis().div_ceil(1000) as u64);
        let is_stalled = self.meter.is_some();
        if is_stalled || self.is_near(now) {
            return Some(format!("(gives up in {})", secs(left)));
        }
        let limit = self.until?.duration_since(self.since);
        Some(format!("(gives up after {})", secs(limit)))
    }
}

/// The widths of the columns.
struct Shape {
    columns: usize,
    name: usize,
    doing: usize,
    limit: usize,
}

impl Shape {
    fn of(vms: &[(&VmActivity, Option<&Work>)], now: Instant, columns: usize, before: &mut Widest) -> Shape {
        let widest = |widths: &mut dyn Iterator<Item = usize>| widths.max().unwrap_or(0);
        let works = || vms.iter().filter_map(|(_, work)| *work);
        let name = widest(&mut vms.iter().map(|(vm, _)| width::of(&vm.vm)));
        // A long name must leave room for the activity.
        let most = (columns / 3).max(NAME_COLUMN / 2);
        let limits = || works().filter_map(|work| work.limit(now));
        let mut found = Widest {
            doing: widest(&mut works().map(|work| width::of(&work.doing(now)))),
            limit: widest(&mut limits().map(|limit| width::of(&limit))),
        };
        // A narrow terminal shows no limit.
        if columns >= ROOMY {
            found.doing = found.doing.max(before.doing);
            found.limit = found.limit.max(before.limit);
            *before = found;
        }
        Shape {
            columns,
            name: name.max(NAME_COLUMN).min(most),
            doing: found.doing,
            limit: found.limit,
        }
    }
}

/// Splits a name before the number at its end.
fn by_number(vm: &str) -> (&str, Option<u64>) {
    let role = vm.trim_end_matches(|c: char| c.is_ascii_digit());
    (role, vm[role.len()..].parse().ok())
}

/// `and 29 more: 9 booting, 20 waiting`.
fn more(left_out: &[(&VmActivity, Option<&Work>)]) -> String {
    let mut waiting = 0;
    let mut works: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, work) in left_out {
        match work {
            Some(work) => *works.entry(&work.what).or_default() += 1,
            None => waiting += 1,
        }
    }
    let mut parts: Vec<String> = works
        .iter()
        .map(|(what, count)| format!("{count} {what}"))
        .collect();
    if waiting > 0 {
        parts.push(format!("{waiting} waiting"));
    }
    format!("and {} more: {}", left_out.len(), parts.join(", "))
}

/// The bytes done and the total, from a progress message.
pub fn bytes_of(data: Option<&Value>) -> (Option<u64>, Option<u64>) {
    let Some(data) = data else {
        return (None, None);
    };
    let bytes = data["bytes"].as_u64().or_else(|| data["sent_bytes"].as_u64());
    (bytes, data["total_bytes"].as_u64())
}

/// A line of bounded width without trailing spaces.
struct LineBuilder {
    line: Line,
    columns: usize,
    /// Adds spaces before the next text.
    owed: usize,
}

impl LineBuilder {
    fn new(columns: usize) -> LineBuilder {
        LineBuilder {
            line: Line::default(),
            columns,
            owed: 0,
        }
    }

    fn left(&self) -> usize {
        self.columns.saturating_sub(self.line.width + self.owed)
    }

    fn push(&mut self, text: &str, paint: impl FnOnce(&str) -> String) {
        let text = width::cut(text, self.left());
        let taken = width::of(&text);
        self.push_painted(&paint(&text), taken);
    }

    fn gap(&mut self, columns: usize) {
        self.owed += columns.min(self.left());
    }

    fn push_painted(&mut self, text: &str, taken: usize) {
        if taken == 0 {
            return;
        }
        let gap = std::mem::take(&mut self.owed);
        self.line.text.extend(std::iter::repeat_n(' ', gap));
        self.line.text.push_str(text);
        self.line.width += gap + taken;
    }
}

#[cfg(test)]
mod tests;
