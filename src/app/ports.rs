//! `castra ports`.

use castra::core::config::Protocol;
use castra::core::failure::{Exit, Result};
use castra::core::operations::ports::{PortsOptions, ports, ports_all};
use castra::core::ports::{PortOwner, PortRow, PortState, PortsOutcome};
use castra::core::reporter::Silent;

use super::context::Context;
use super::find_project::{self, Selected};
use super::style::Style;
use crate::cli::Raw;

/// Shows the ports of the project, or of all.
pub fn run(context: &mut Context, raw: &Raw) -> Result<Exit> {
    let home = find_project::home()?;
    if raw.all {
        let all = ports_all(home, raw.active, &mut Silent)?;
        if context.json {
            context.out.json(&all);
        }
        show(context, raw, &all.projects);
        return Ok(Exit::Done);
    }
    let project = find_project::project(raw)?;
    if let Selected::Config(config) = &project {
        for warning in &config.warnings {
            context.warn(warning);
        }
    }
    let options = PortsOptions {
        project: project.project(),
        home,
        active: raw.active,
    };
    let outcome = ports(options, &mut Silent)?;
    if context.json {
        context.out.json(&outcome);
    }
    show(context, raw, std::slice::from_ref(&outcome));
    Ok(Exit::Done)
}

fn show(context: &mut Context, raw: &Raw, projects: &[PortsOutcome]) {
    if context.json {
        return;
    }
    for (number, outcome) in projects.iter().enumerate() {
        if raw.all {
            let gap = if number == 0 { "" } else { "\n" };
            let name = context.style.bold(&outcome.workspace);
            context.out.line(format!("{gap}{name}"));
        }
        let text = render(outcome, raw.verbose, context.style);
        context.out.text(text);
    }
    context.out.flush();
    let conflicts: usize = projects.iter().map(|outcome| outcome.conflicts).sum();
    if projects.iter().all(|outcome| outcome.ports.is_empty()) {
        context.say(match raw.active {
            true => "no port is in use",
            false => "no port is declared or in use",
        });
    } else if conflicts > 0 {
        context.say("next: free the port, or set `host = 0` in that forward, and castra chooses a free port");
    }
}

/// One line a port, behind a heading.
fn render(outcome: &PortsOutcome, verbose: bool, style: Style) -> String {
    if outcome.ports.is_empty() {
        return String::new();
    }
    let mut lines = vec![(["PORT", "GUEST", "VM", "STATE"].map(str::to_owned), None)];
    lines.extend(outcome.ports.iter().map(|row| (cells(row), Some(row))));
    let mut widths = [0; 4];
    for (cells, _) in &lines {
        for (width, cell) in widths.iter_mut().zip(cells) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for (cells, row) in &lines {
        let [port, guest, vm, state] = cells;
        let [a, b, c, d] = widths;
        let state = format!("{state:<d$}");
        let state = match row.map(|row| (row.state, row.owner.is_some())) {
            None => state,
            Some((_, true)) => style.error(&state),
            Some((PortState::Active, _)) => style.success(&state),
            Some((PortState::BrokerReserved, _)) => style.bold(&state),
            Some(_) => style.dim(&state),
        };
        let notes = row.map(|row| notes(row, verbose)).unwrap_or_default();
        let line = format!("{port:<a$}  {guest:<b$}  {vm:<c$}  {state}  {notes}");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn cells(row: &PortRow) -> [String; 4] {
    let protocol = match row.protocol {
        Protocol::Tcp => "",
        Protocol::Udp => "/udp",
    };
    [
        row.port
            .map_or_else(|| "auto".to_owned(), |port| format!("{port}{protocol}")),
        row.guest
            .map_or_else(|| "-".to_owned(), |port| format!("{port}{protocol}")),
        row.vm
            .as_ref()
            .map_or_else(|| "(broker)".to_owned(), |vm| vm.as_str().to_owned()),
        row.state.as_str().to_owned(),
    ]
}

fn notes(row: &PortRow, verbose: bool) -> String {
    let mut notes: Vec<String> = row.owner.iter().map(|owner| format!("{owner} has it")).collect();
    if verbose {
        notes.extend(row.pid.map(|pid| match row.vm {
            Some(_) => format!("QEMU is pid {pid}"),
            None => format!("the broker is pid {pid}"),
        }));
        if row.port.is_none() {
            notes.push("a free port is chosen at launch".to_owned());
        }
        let also: Vec<String> = row.also_declared_by.iter().map(PortOwner::to_string).collect();
        if !also.is_empty() {
            notes.push(format!("also wanted by {}", also.join(", ")));
        }
    }
    notes.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(vm: Option<&str>, port: Option<u16>, state: PortState) -> PortRow {
        PortRow {
            vm: vm.map(|vm| vm.parse().unwrap()),
            port,
            guest: vm.map(|_| 22),
            protocol: Protocol::Tcp,
            state,
            pid: None,
            owner: None,
            also_declared_by: Vec::new(),
        }
    }

    #[test]
    fn the_table_lines_up_and_names_who_is_in_the_way() {
        let owner = |vm: &str, pid| PortOwner::Vm {
            vm: vm.parse().unwrap(),
            project: "other".into(),
            workspace: "other-1".into(),
            pid,
        };
        let outcome = PortsOutcome {
            schema: String::new(),
            project: "demo".into(),
            workspace: "demo-1".into(),
            config_path: "/demo/castra.toml".into(),
            state_root: "/state".into(),
            conflicts: 1,
            ports: vec![
                PortRow {
                    pid: Some(3),
                    ..row(None, Some(7070), PortState::BrokerReserved)
                },
                PortRow {
                    pid: Some(4),
                    ..row(Some("web-0"), Some(2222), PortState::Active)
                },
                PortRow {
                    owner: Some(owner("api", Some(9))),
                    protocol: Protocol::Udp,
                    ..row(Some("db"), Some(5353), PortState::Conflicting)
                },
                PortRow {
                    also_declared_by: vec![owner("api", None)],
                    ..row(Some("db"), Some(8080), PortState::Declared)
                },
                row(Some("db"), None, PortState::Declared),
            ],
        };
        assert_eq!(
            render(&outcome, false, Style::PLAIN),
            "PORT      GUEST   VM        STATE\n\
             7070      -       (broker)  broker-reserved\n\
             2222      22      web-0     active\n\
             5353/udp  22/udp  db        conflicting      vm `api` of castra project `other` (pid 9) has it\n\
             8080      22      db        declared\n\
             auto      22      db        declared\n"
        );
        let verbose = render(&outcome, true, Style::PLAIN);
        for note in [
            "broker-reserved  the broker is pid 3\n",
            "QEMU is pid 4\n",
            "also wanted by vm `api` of castra project `other`\n",
            "a free port is chosen at launch\n",
        ] {
            assert!(verbose.contains(note), "{verbose}");
        }
    }
}
