//! `castra status`: the facts of the status contract in human units.
//!
//! Here: the command, and [`render`], which makes text from an outcome and nothing else. Not here:
//! the contract itself (`core::status`), what the columns mean (`legend`), what guests measure
//! (`metrics`).

use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::Duration;

use castra::core::cancel::Cancel;
use castra::core::config::Protocol;
use castra::core::config::launched::keeps_disk;
use castra::core::config::workspace::{project_on_record, unreadable_workspaces};
use castra::core::escape::{escape_line, escape_text};
use castra::core::events::endings::BootstrapStatus;
use castra::core::failure::{Exit, Result};
use castra::core::operations::lost;
use castra::core::operations::status::{StatusAllOutcome, StatusOptions, status, status_all};
use castra::core::reporter::Silent;
use castra::core::root::paths::castra_home;
use castra::core::status::{BrokerState, GuestState, StatusOutcome, VmState, VmStatus};

use super::context::Context;
use super::style::Style;
use super::{find_project, human, terminal};
use crate::cli::Raw;

mod legend;
mod metrics;

/// The interval of `--watch`, and how often scripts should ask (docs/STATUS.md).
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// Shows the status, with `--watch` again and again.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    // No signal handlers: an interrupted `status` leaves nothing half done.
    let never = Cancel::new();
    let in_place = raw.watch && !context.json && io::stdout().is_terminal();
    loop {
        let answer = Answer::get(raw, &never)?;
        if context.json {
            answer.print_json(context);
        } else {
            let size = io::stdout().is_terminal().then(terminal::size);
            let layout = Layout {
                width: size.map(|size| size.columns),
                style: context.style,
                wide: raw.wide,
                legend: raw.legend,
                hints: !raw.watch && !context.quiet,
            };
            let text = match &answer {
                Answer::One(status) => render(status, layout),
                Answer::All(all) => render_all(&all.projects, layout),
            };
            match size.filter(|_| in_place) {
                Some(size) => context.out.verbatim(frame(&escape_text(&text), size)),
                None => context.out.text(text),
            }
        }
        context.out.flush();
        if !raw.watch || !context.out.is_open() {
            return Ok(Exit::Done);
        }
        never.pause(WATCH_INTERVAL);
    }
}

/// The wanted projects.
enum Answer {
    /// The selected project.
    One(Box<StatusOutcome>),
    /// `--all`.
    All(StatusAllOutcome),
}

impl Answer {
    fn get(raw: &Raw, cancel: &Cancel) -> Result<Answer> {
        if raw.all {
            let home = castra_home();
            let records = home.as_deref().map(lost::workspaces).unwrap_or_default();
            let unreadable = home.as_deref().map(unreadable_workspaces).unwrap_or_default();
            if let Some(failure) = unreadable.into_iter().next().filter(|_| records.is_empty()) {
                return Err(failure);
            }
            let projects = records.iter().map(project_on_record).collect();
            return Ok(Answer::All(status_all(projects, &mut Silent)));
        }
        let options = StatusOptions {
            project: find_project::project(raw)?.project(),
            cancel: cancel.clone(),
        };
        // The outcome's notes say what couldn't be read; they are shown with it.
        Ok(Answer::One(Box::new(status(options, &mut Silent)?)))
    }

    /// The JSON on one line of stdout, and errors of reading on stderr.
    fn print_json(&self, context: &mut Context) {
        // Metrics come from the guest: characters that could fool a terminal are written as `\u202e`.
        let projects = match self {
            Answer::One(status) => {
                context.out.json(status);
                std::slice::from_ref(&**status)
            }
            Answer::All(all) => {
                context.out.json(all);
                all.projects.as_slice()
            }
        };
        for note in projects.iter().flat_map(|status| &status.notes) {
            let about = note.vm.as_ref().map(|vm| format!("{vm}: ")).unwrap_or_default();
            context.warn(&format!("{about}{}", note.text));
        }
    }
}

/// How a status is shown.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// Columns of the terminal; `None`: it is no terminal, and lines may be as long as they are.
    width: Option<usize>,
    /// Colours.
    style: Style,
    /// `--wide`: every column and the guests' metrics, even where lines wrap.
    wide: bool,
    /// `--legend`.
    legend: bool,
    /// On a terminal, name the flags that show more.
    hints: bool,
}

impl Layout {
    /// The width that the table has to fit into.
    fn room(self) -> Option<usize> {
        self.width.filter(|_| !self.wide)
    }
}

/// The lines of one project's status.
fn render(status: &StatusOutcome, layout: Layout) -> String {
    let mut text = header(status, layout);
    text.push('\n');
    if status.vms.is_empty() {
        text.push_str("no VM was launched here, and no config names one\n");
    } else {
        text.push_str(&table(status, layout));
    }
    let details = details(status, layout);
    if !details.is_empty() {
        text.push('\n');
        text.push_str(&details);
    }
    text.push_str(&closing(status, layout));
    text
}

/// Several projects, one below the other; the closing text is printed once, at the end.
fn render_all(projects: &[StatusOutcome], layout: Layout) -> String {
    let Some(last) = projects.last() else {
        return "no project has any state on this machine\n".to_owned();
    };
    let mut text = String::new();
    for (index, status) in projects.iter().enumerate() {
        if index > 0 {
            text.push('\n');
        }
        text.push_str(&header(status, layout));
        if !status.vms.is_empty() {
            text.push('\n');
            text.push_str(&table(status, layout));
        }
        let details = details(status, layout);
        if !details.is_empty() {
            text.push('\n');
            text.push_str(&details);
        }
    }
    text.push_str(&closing(last, layout));
    text
}

/// The legend if it was asked for; else, on a terminal, one line that names the flags that show more.
fn closing(status: &StatusOutcome, layout: Layout) -> String {
    let mut text = String::new();
    if layout.legend {
        let window = human::duration(status.freshness_window_ms);
        text.push('\n');
        for line in legend::paragraphs(&window) {
            text.push_str(&wrap(&line, Some(layout.width.unwrap_or(100).min(100)), 11));
        }
    } else if layout.hints && layout.width.is_some() {
        let hint = match layout.wide {
            true => "--legend explains the columns",
            false => "--wide shows more, --legend explains the columns",
        };
        text.push('\n');
        text.push_str(&paint(hint, Tone::Dim, layout));
        text.push('\n');
    }
    text
}

/// One update of `--watch` on a terminal: drawn over the last one without clearing it, so that nothing
/// flickers. Lines are cut at the terminal's width, and lines that don't fit are counted.
fn frame(text: &str, size: terminal::Size) -> String {
    const HOME: &str = "\x1b[H";
    const TO_LINE_END: &str = "\x1b[K\n";
    const REST: &str = "\x1b[J";
    let lines: Vec<&str> = text.lines().collect();
    // The last row is for the cursor.
    let room = size.rows.saturating_sub(1).max(1);
    let mut frame = HOME.to_owned();
    let shown = if lines.len() > room { room - 1 } else { lines.len() };
    for line in &lines[..shown] {
        frame.push_str(&cut(line, size.columns));
        frame.push_str(TO_LINE_END);
    }
    if shown < lines.len() {
        let more = format!("… {} more lines; the terminal is too small", lines.len() - shown);
        frame.push_str(&cut(&more, size.columns));
        frame.push_str(TO_LINE_END);
    }
    frame.push_str(REST);
    frame
}

/// The first `columns` characters of a line, with all colour codes.
fn cut(line: &str, columns: usize) -> String {
    let mut shown = 0;
    let mut in_color = false;
    line.chars()
        .filter(|c| {
            if *c == '\x1b' {
                in_color = true;
            }
            if in_color {
                in_color = *c != 'm';
                return true;
            }
            shown += 1;
            shown <= columns
        })
        .collect()
}

// --- header -----------------------------------------------------------------------------------

fn header(status: &StatusOutcome, layout: Layout) -> String {
    let broker = match (status.broker.pid, status.broker.port) {
        (Some(pid), Some(port)) => format!("running, pid {pid}, 127.0.0.1:{port}"),
        (Some(pid), None) => format!("starting, pid {pid}"),
        (None, _) => "offline".to_owned(),
    };
    let reachable = status.vms.iter().filter(|vm| vm.reachable).count();
    let mut guests = format!("{reachable} of {} reachable", status.vms.len());
    if let (Some(vm), Some(age)) = (&status.last_handshake_vm, status.last_handshake_age_ms) {
        guests.push_str(&format!("; {vm} was heard {} ago", human::duration(age)));
    }
    let unattended = status.broker.state == BrokerState::Offline
        && status.vms.iter().any(|vm| vm.pid.is_some() && vm.lost.is_none());
    let path = |path: &Path| escape_line(&path.to_string_lossy(), 4096);
    let mut text = String::new();
    for (word, value) in [
        (
            "project",
            format!("{} ({})", escape_line(&status.project, 256), status.workspace),
        ),
        ("config", path(&status.config_path)),
        ("state", path(&status.state_root)),
        ("broker", broker),
        ("guests", guests),
        (
            "accel",
            status.accel.map_or("-", |accel| accel.as_str()).to_owned(),
        ),
    ] {
        let line = format!("{word:<9}{value}");
        // Paths aren't cut, because people copy them.
        let is_path = matches!(word, "config" | "state");
        text.push_str(&wrap(&line, layout.width.filter(|_| !is_path), 9));
        if word == "broker" && unattended {
            let remedy = "VMs run without a broker: `castra up` starts one and leaves the VMs alone";
            text.push_str(&wrap(
                &format!("         {}", paint(remedy, Tone::Warning, layout)),
                None,
                9,
            ));
        }
    }
    text
}

// --- table ------------------------------------------------------------------------------------

/// One column: its head, its cell for a VM, and whether it is left out on a narrow terminal.
struct Column {
    head: &'static str,
    cell: fn(&VmStatus) -> String,
    tone: fn(&VmStatus) -> Tone,
    /// `None`: always shown. Otherwise columns with lower numbers get room first.
    goes: Option<u8>,
    /// On a terminal left out if it is empty for every VM.
    only_if_used: bool,
}

impl Column {
    const fn new(head: &'static str, goes: Option<u8>, cell: fn(&VmStatus) -> String) -> Column {
        Column {
            head,
            cell,
            tone: |_| Tone::Plain,
            goes,
            only_if_used: false,
        }
    }

    const fn if_used(mut self) -> Column {
        self.only_if_used = true;
        self
    }

    const fn toned(mut self, tone: fn(&VmStatus) -> Tone) -> Column {
        self.tone = tone;
        self
    }
}

/// An empty cell.
const NOTHING: &str = "-";

/// `2 min` of `2 min 5 s`: the table has many columns, and --json every millisecond.
fn roughly(ms: u64) -> String {
    let text = human::duration(ms);
    text.splitn(3, ' ').take(2).collect::<Vec<_>>().join(" ")
}

fn or_nothing(value: Option<String>) -> String {
    value.unwrap_or_else(|| NOTHING.to_owned())
}

const COLUMNS: [Column; 16] = [
    Column::new("VM", None, |vm| vm.name.to_string()),
    Column::new("ROLE", Some(13), role_cell).if_used(),
    Column::new("STATE", None, |vm| vm.state.as_str().to_owned()).toned(state_tone),
    Column::new("BROKER", Some(1), |vm| vm.broker.as_str().to_owned()).toned(broker_tone),
    Column::new("AGE", Some(2), |vm| {
        or_nothing(vm.last_handshake_age_ms.map(roughly))
    }),
    Column::new("UPTIME", Some(3), |vm| or_nothing(vm.uptime_ms.map(roughly))),
    Column::new("PID", Some(10), |vm| {
        or_nothing(vm.pid.map(|pid| pid.to_string()))
    }),
    Column::new("CPUS", Some(9), |vm| {
        or_nothing(vm.cpus.map(|cpus| cpus.to_string()))
    }),
    Column::new("MEMORY", Some(8), |vm| {
        or_nothing(vm.memory_bytes.map(human::bytes))
    }),
    Column::new("SSH", Some(4), ssh_cell).if_used(),
    Column::new("FORWARDS", Some(7), forwards_cell).if_used(),
    Column::new("BOOTSTRAP", Some(5), bootstrap_cell)
        .if_used()
        .toned(bootstrap_tone),
    Column::new("BUS", Some(6), bus_cell).if_used(),
    Column::new("PUBLISH", Some(12), |vm| {
        or_nothing(vm.last_publish_age_ms.map(roughly))
    })
    .if_used(),
    Column::new("HEARTBEAT", Some(11), |vm| {
        or_nothing(vm.last_heartbeat_age_ms.map(roughly))
    })
    .if_used(),
    Column::new("CAPABILITIES", Some(14), |vm| {
        if vm.capabilities.is_empty() {
            NOTHING.to_owned()
        } else {
            escape_line(&vm.capabilities.join(","), 512)
        }
    })
    .if_used(),
];

/// Only if the name doesn't show the role: `web` and its replicas `web-0`, `web-1` do.
fn role_cell(vm: &VmStatus) -> String {
    let name = vm.name.as_str();
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    if vm.role == name || stem.strip_suffix('-') == Some(vm.role.as_str()) {
        return NOTHING.to_owned();
    }
    escape_line(&vm.role, 64)
}

fn ssh_cell(vm: &VmStatus) -> String {
    let ssh = vm.ssh.as_ref().and_then(|ssh| Some((ssh, ssh.port?)));
    or_nothing(ssh.map(|(ssh, port)| escape_line(&format!("{}@{}:{port}", ssh.user, ssh.host), 256)))
}

fn forwards_cell(vm: &VmStatus) -> String {
    // SSH's forward has a column of its own.
    let ssh = vm.ssh.as_ref().and_then(|ssh| ssh.port);
    let forwards: Vec<String> = vm
        .forwards
        .iter()
        .filter(|forward| forward.protocol != Protocol::Tcp || Some(forward.host) != ssh)
        .map(|forward| {
            let protocol = match forward.protocol {
                Protocol::Tcp => "",
                Protocol::Udp => "/udp",
            };
            format!("{}→{}{protocol}", forward.host, forward.guest)
        })
        .collect();
    if forwards.is_empty() {
        NOTHING.to_owned()
    } else {
        forwards.join(" ")
    }
}

fn bootstrap_cell(vm: &VmStatus) -> String {
    let Some(bootstrap) = &vm.bootstrap else {
        return NOTHING.to_owned();
    };
    let status = if bootstrap.noop {
        "no-op"
    } else {
        bootstrap.status.as_str()
    };
    match bootstrap.duration_ms {
        Some(ms) => format!("{status} {}", roughly(ms)),
        None => status.to_owned(),
    }
}

fn bus_cell(vm: &VmStatus) -> String {
    match (vm.bus_session, vm.bus_subscribed) {
        (false, _) => NOTHING,
        (true, false) => "session",
        (true, true) => "subscribed",
    }
    .to_owned()
}

fn table(status: &StatusOutcome, layout: Layout) -> String {
    let mut columns: Vec<(&Column, Vec<String>)> = COLUMNS
        .iter()
        .map(|column| (column, status.vms.iter().map(column.cell).collect::<Vec<_>>()))
        // In a pipe every column is written, for scripts that count them.
        .filter(|(column, cells)| {
            layout.width.is_none() || !column.only_if_used || cells.iter().any(|cell| cell != NOTHING)
        })
        .collect();
    fit(&mut columns, layout.room());
    let widths: Vec<usize> = columns
        .iter()
        .map(|(column, cells)| column_width(column, cells))
        .collect();
    let mut text = String::new();
    let heads = columns.iter().map(|(column, _)| (column.head, Tone::Head));
    push_row(&mut text, heads, &widths, layout);
    for (index, vm) in status.vms.iter().enumerate() {
        let cells = columns
            .iter()
            .map(|(column, cells)| (cells[index].as_str(), (column.tone)(vm)));
        push_row(&mut text, cells, &widths, layout);
    }
    text
}

fn column_width(column: &Column, cells: &[String]) -> usize {
    let cells = cells.iter().map(|cell| cell.chars().count());
    cells.chain([column.head.len()]).max().unwrap_or(0)
}

/// The gap between two columns.
const GAP: usize = 2;
/// If a column up to this number has no room, the columns after it aren't shown either.
const FIRST: u8 = 3;
/// A name is shortened down to this width, or a third of the line, before a column is left out.
const LONG_NAME: usize = 16;

/// Keeps the columns that fit, the most important first; if even the required ones don't fit, long names are
/// shortened in the middle.
fn fit(columns: &mut Vec<(&Column, Vec<String>)>, width: Option<usize>) {
    let Some(width) = width else {
        return;
    };
    let mut wishes: Vec<usize> = (0..columns.len()).collect();
    wishes.sort_by_key(|index| columns[*index].0.goes);
    let mut kept = vec![false; columns.len()];
    let mut taken = 0;
    for index in wishes {
        let (column, cells) = &columns[index];
        let mut needs = column_width(column, cells) + if taken == 0 { 0 } else { GAP };
        if index == 0 {
            // Long names are shortened in favour of the other columns.
            needs = needs.min(LONG_NAME.max(width / 3));
        }
        if column.goes.is_none() || taken + needs <= width {
            kept[index] = true;
            taken += needs;
        } else if column.goes <= Some(FIRST) {
            // The other columns are of little use without these.
            break;
        }
    }
    let mut kept = kept.into_iter();
    columns.retain(|_| kept.next() == Some(true));
    let others: usize = columns
        .iter()
        .skip(1)
        .map(|(column, cells)| column_width(column, cells) + GAP)
        .sum();
    if let Some((_, names)) = columns.first_mut() {
        let room = width.saturating_sub(others).max(2);
        for name in names {
            *name = without_middle(name, room);
        }
    }
}

/// A name of at most `room` characters. Its end is kept, because replicas differ there.
fn without_middle(name: &str, room: usize) -> String {
    let length = name.chars().count();
    if length <= room {
        return name.to_owned();
    }
    let tail = (room - 1) / 2;
    let head: String = name.chars().take(room - 1 - tail).collect();
    let tail: String = name.chars().skip(length - tail).collect();
    format!("{head}…{tail}")
}

fn push_row<'a>(
    text: &mut String,
    cells: impl Iterator<Item = (&'a str, Tone)>,
    widths: &[usize],
    layout: Layout,
) {
    let mut line = String::new();
    // Padding is written before the next cell, so that no line ends in spaces.
    let mut owed = 0;
    for ((cell, tone), width) in cells.zip(widths) {
        line.extend(std::iter::repeat_n(' ', owed));
        line.push_str(&paint(cell, tone, layout));
        owed = width.saturating_sub(cell.chars().count()) + GAP;
    }
    text.push_str(&line);
    text.push('\n');
}

// --- what doesn't fit a table -----------------------------------------------------------------

fn details(status: &StatusOutcome, layout: Layout) -> String {
    let mut text = String::new();
    for vm in &status.vms {
        if let Some(ended) = &vm.ended {
            let mut line = format!(
                "{} {} ({})",
                vm.name,
                vm.state.as_str(),
                escape_line(&ended.reason, 64)
            );
            if let Some(at) = &ended.at {
                line.push_str(&format!(" at {}", escape_line(at, 64)));
            }
            for (who, words) in [("console", &ended.last_words), ("QEMU", &ended.qemu_words)] {
                if let Some(words) = words {
                    line.push_str(&format!("; {who}: {}", escape_line(words, 512)));
                }
            }
            text.push_str(&wrap(&line, layout.width, 4));
            if let Some(remediation) = &ended.remediation {
                let line = format!("  try: {}", escape_line(remediation, 512));
                text.push_str(&wrap(&line, layout.width, 4));
            }
        }
        let try_this = |next: &str| wrap(&format!("  try: {}", escape_line(next, 512)), layout.width, 4);
        if let Some(paused) = &vm.paused {
            let since = paused.at.as_ref().map(|at| format!(" since {at}"));
            let why = paused.detail.as_ref().map(|why| format!(": {why}"));
            let (since, why) = (since.unwrap_or_default(), why.unwrap_or_default());
            let line = format!("{} paused ({}){since}{why}", vm.name, paused.reason);
            text.push_str(&wrap(&escape_line(&line, 2048), layout.width, 4));
            text.push_str(&try_this(&paused.remediation));
        }
        if !vm.stale_config.is_empty() {
            let line = format!(
                "{} runs with other settings than the config has now: {}",
                vm.name,
                vm.stale_config.join(", ")
            );
            text.push_str(&wrap(&escape_line(&line, 2048), layout.width, 4));
            let discard = match keeps_disk(&vm.stale_config) {
                true => "",
                false => " --discard",
            };
            let next = format!("castra restart{discard} {} applies them", vm.name);
            text.push_str(&try_this(&next));
        }
        if let Some(metrics) = vm.guest_metrics.as_ref().filter(|_| layout.wide) {
            let line = format!("{}: {}", vm.name, escape_line(&metrics::in_words(metrics), 1024));
            text.push_str(&wrap(&line, layout.width, 4));
        }
    }
    for note in &status.notes {
        let about = note.vm.as_ref().map(|vm| format!("{vm}: ")).unwrap_or_default();
        text.push_str(&paint("warning:", Tone::Warning, layout));
        text.push_str(&format!(" {about}{}\n", escape_line(&note.text, 1024)));
        if let Some(advice) = &note.advice {
            text.push_str(&format!("  try: {advice}\n"));
        }
    }
    text
}

/// Lines of at most `width` characters, broken at spaces; all but the first are indented. A word
/// longer than a line stays whole.
fn wrap(line: &str, width: Option<usize>, indent: usize) -> String {
    let Some(width) = width else {
        return format!("{line}\n");
    };
    let lead: String = line.chars().take_while(|c| *c == ' ').collect();
    let mut text = lead.clone();
    let mut column = lead.len();
    let mut first = true;
    for word in line[lead.len()..].split(' ') {
        let length = word.chars().count();
        if !first && column + 1 + length > width && column > indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent));
            column = indent;
        } else if !first {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += length;
        first = false;
    }
    text.push('\n');
    text
}

// --- colour -----------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tone {
    Plain,
    Head,
    Success,
    Warning,
    Error,
    Dim,
}

fn paint(text: &str, tone: Tone, layout: Layout) -> String {
    match tone {
        Tone::Plain => text.to_owned(),
        Tone::Head => layout.style.bold(text),
        Tone::Success => layout.style.success(text),
        Tone::Warning => layout.style.warning(text),
        Tone::Error => layout.style.error(text),
        Tone::Dim => layout.style.dim(text),
    }
}

fn state_tone(vm: &VmStatus) -> Tone {
    match vm.state {
        VmState::Running | VmState::External => Tone::Success,
        VmState::Starting | VmState::Stopping => Tone::Warning,
        VmState::Paused => Tone::Error,
        VmState::Stopped => Tone::Dim,
        VmState::Crashed => Tone::Error,
    }
}

fn broker_tone(vm: &VmStatus) -> Tone {
    match vm.broker {
        GuestState::Reachable => Tone::Success,
        GuestState::Waiting => Tone::Warning,
        GuestState::Offline => Tone::Dim,
    }
}

fn bootstrap_tone(vm: &VmStatus) -> Tone {
    match vm
        .bootstrap
        .as_ref()
        .and_then(|bootstrap| bootstrap.status.known())
    {
        Some(BootstrapStatus::Failed) => Tone::Error,
        Some(BootstrapStatus::Running) => Tone::Warning,
        _ => Tone::Plain,
    }
}

#[cfg(test)]
mod tests;
