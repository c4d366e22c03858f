//! The flags of the table, global ones first.
//!
//! Here: each flag's row and how its value is typed. Not here: what it does (`app`).

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use castra::core::arch::Arch;
use castra::core::harness::{agent_named, agent_names};
use castra::core::operations::events::parse_since;
use castra::core::operations::wait::WaitFor;
use castra::core::report::MAX_RUNS;

use super::per_command::BY_COMMAND;
use super::{BadValue, Command, Complete, Flag, LogSource, Scope, color_choice};
use crate::cli::raw::HelpKind;

/// Longest wait a flag may ask for, seconds: a day. More is a typing mistake.
const MAX_WAIT_SECS: u64 = 86_400;

/// Longest time an agent may be given: more is a typing mistake.
const MAX_TIME: Duration = Duration::from_secs(30 * 86_400);

const BOOTSTRAPPING: Scope = Scope::Only(&[Command::Up, Command::Restart, Command::Bootstrap]);
const PLANNING: Scope = Scope::Only(&[Command::Up, Command::Bootstrap]);
const STOPPING: Scope = Scope::Only(&[Command::Down, Command::Restart]);
const UP: Scope = Scope::Only(&[Command::Up]);
const STATUS: Scope = Scope::Only(&[Command::Status]);
const CLEAN: Scope = Scope::Only(&[Command::Clean]);
const PORTS: Scope = Scope::Only(&[Command::Ports]);
const SSH_CONFIG: Scope = Scope::Only(&[Command::SshConfig]);
const MAN: Scope = Scope::Only(&[Command::Man]);
const INIT: Scope = Scope::Only(&[Command::Init]);
const LOGS: Scope = Scope::Only(&[Command::Logs]);
const HARNESS_RUN: Scope = Scope::Only(&[Command::HarnessRun]);
const REPORT: Scope = Scope::Only(&[Command::Report]);
const EVENTS: Scope = Scope::Only(&[Command::Events]);
const BUS_PUBLISH: Scope = Scope::Only(&[Command::BusPublish]);
const BUS_SUBSCRIBE: Scope = Scope::Only(&[Command::BusSubscribe]);
const BUS_TAIL: Scope = Scope::Only(&[Command::BusTail]);
const BUS_BENCH: Scope = Scope::Only(&[Command::BusBench]);

/// What most flags have in common; a row says only what is its own.
const PLAIN: Flag = Flag {
    long: "",
    short: None,
    value: None,
    scope: Scope::Global,
    brief: "",
    manual: "",
    complete: Complete::Nothing,
    apply: |_, _| Ok(()),
};

/// All flags.
pub const FLAGS: &[Flag] = &[
    Flag {
        long: "config",
        value: Some("PATH"),
        brief: "use this castra.toml, or the one in this directory",
        manual: "Without it castra looks for castra.toml in the current directory and those above it.",
        complete: Complete::Path,
        apply: |raw, value| set(&mut raw.config, path(value)),
        ..PLAIN
    },
    Flag {
        long: "workspace",
        value: Some("ID"),
        brief: "use the project with this id, wherever its folder is",
        manual: "`castra workspaces` lists the ids. Works even if the project's folder was moved or removed: \
                 you can still look at its VMs and stop them.",
        apply: |raw, value| set(&mut raw.workspace, text(value)),
        ..PLAIN
    },
    Flag {
        long: "json",
        brief: "print results and events as JSON, one object per line",
        manual: "Commands that change something print their events, other commands print what was asked for. \
                 A refusal (exit codes 64 to 75) is one `command.rejected` object.",
        apply: |raw, _| on(&mut raw.json),
        ..PLAIN
    },
    Flag {
        long: "quiet",
        short: Some('q'),
        brief: "print only results, warnings and errors",
        apply: |raw, _| on(&mut raw.quiet),
        ..PLAIN
    },
    Flag {
        long: "color",
        value: Some("WHEN"),
        brief: "colour the text: auto, always or never (default: auto)",
        manual: "`auto` colours on a terminal, unless NO_COLOR is set or TERM is `dumb`.",
        complete: Complete::OneOf(&["auto", "always", "never"]),
        apply: |raw, value| {
            let value = text(value)?;
            raw.color =
                color_choice(&value).ok_or_else(|| BadValue("use auto, always or never".to_owned()))?;
            Ok(())
        },
        ..PLAIN
    },
    Flag {
        long: "help",
        short: Some('h'),
        brief: "print help; -h in short, --help in full",
        // The parser sets Short where it saw the letter.
        apply: |raw, _| set(&mut raw.help, Ok(HelpKind::Long)),
        ..PLAIN
    },
    Flag {
        long: "version",
        short: Some('V'),
        brief: "print the version",
        apply: |raw, _| on(&mut raw.version),
        ..PLAIN
    },
    Flag {
        long: "force",
        scope: Scope::Only(&[
            Command::Init,
            Command::Up,
            Command::Restart,
            Command::ImageBuild,
            Command::Clean,
            Command::BusPublish,
            Command::BusRequest,
        ]),
        brief: BY_COMMAND,
        apply: |raw, _| on(&mut raw.force),
        ..PLAIN
    },
    Flag {
        long: "arch",
        value: Some("NAME"),
        scope: Scope::Only(&[Command::ImageBuild, Command::ImagePath]),
        brief: "the guest's architecture: x86_64 or aarch64 (default: the host's)",
        complete: Complete::OneOf(&["x86_64", "aarch64"]),
        apply: |raw, value| {
            let unknown = || BadValue("use x86_64 or aarch64".to_owned());
            raw.arch = Some(Arch::named(&text(value)?).ok_or_else(unknown)?);
            Ok(())
        },
        ..PLAIN
    },
    Flag {
        long: "mounts",
        scope: Scope::Only(&[Command::ImageBuild, Command::ImagePath]),
        brief: BY_COMMAND,
        apply: |raw, _| on(&mut raw.mounts),
        ..PLAIN
    },
    Flag {
        long: "project-name",
        value: Some("NAME"),
        scope: INIT,
        brief: "name the project (default: the folder's name)",
        apply: |raw, value| set(&mut raw.project_name, text(value)),
        ..PLAIN
    },
    Flag {
        long: "prefix",
        value: Some("TEXT"),
        scope: SSH_CONFIG,
        brief: "put this before the VMs' names, as in demo-web",
        manual: "Many projects have names such as `web`. The text may have A-Z a-z 0-9 . _ and -.",
        apply: |raw, value| {
            let text = value.to_string_lossy().into_owned();
            let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            if text.is_empty() || text.starts_with('-') || !text.chars().all(allowed) {
                return Err(BadValue(
                    "use A-Z a-z 0-9 . _ and -, and begin with another character than -".to_owned(),
                ));
            }
            set(&mut raw.prefix, Ok(text))
        },
        ..PLAIN
    },
    Flag {
        long: "dir",
        value: Some("DIR"),
        scope: MAN,
        brief: "write all pages into this directory",
        complete: Complete::Path,
        apply: |raw, value| set(&mut raw.dir, path(value)),
        ..PLAIN
    },
    Flag {
        long: "output",
        value: Some("PATH"),
        scope: INIT,
        brief: "write this file instead of castra.toml",
        complete: Complete::Path,
        apply: |raw, value| set(&mut raw.output, path(value)),
        ..PLAIN
    },
    Flag {
        long: "bootstrap",
        value: Some("MODE|VM=MODE"),
        scope: BOOTSTRAPPING,
        brief: "override when VMs are bootstrapped: auto, skip, always",
        manual: "MODE alone applies to every VM, VM=MODE to one, and wins. Separate several by commas, or give \
                 the flag several times.",
        complete: Complete::OneOf(&["auto", "skip", "always"]),
        apply: |raw, value| {
            let value = text(value)?;
            for part in value.split(',') {
                check_override(part)?;
                raw.bootstrap.push(part.to_owned());
            }
            Ok(())
        },
        ..PLAIN
    },
    Flag {
        long: "plan",
        scope: PLANNING,
        brief: BY_COMMAND,
        apply: |raw, _| on(&mut raw.plan),
        ..PLAIN
    },
    Flag {
        long: "recreate",
        scope: UP,
        brief: "restart VMs whose settings in castra.toml have changed",
        manual: "Only a launch applies some settings: memory, cpus, network, forwards, mounts, base image and \
                 the like. Without this flag `up` names the settings in which a running VM differs from \
                 castra.toml, and leaves that VM as it is. With it `up` restarts such a VM, which keeps its \
                 disk, as `castra restart` does. VMs that don't differ keep running.",
        apply: |raw, _| on(&mut raw.recreate),
        ..PLAIN
    },
    Flag {
        long: "broker-only",
        scope: UP,
        brief: "start the broker and no VM",
        manual: "Needs neither QEMU nor ssh. Guests that you start yourself may then say hello with the names in \
                 the config. `castra down` stops the broker.",
        apply: |raw, _| on(&mut raw.broker_only),
        ..PLAIN
    },
    Flag {
        long: "graceful-wait-secs",
        value: Some("SECS"),
        scope: STOPPING,
        brief: "how long a guest may take to power off",
        manual: "Default: [lifecycle].graceful_shutdown_wait_secs, 20 unless set. With 0 castra asks the guest, \
                 but doesn't wait.",
        apply: |raw, value| set(&mut raw.graceful_wait, seconds(value)),
        ..PLAIN
    },
    Flag {
        long: "sigterm-wait-secs",
        value: Some("SECS"),
        scope: STOPPING,
        brief: "how long QEMU may take after SIGTERM",
        manual: "Default: [lifecycle].sigterm_wait_secs, 10 unless set.",
        apply: |raw, value| set(&mut raw.sigterm_wait, seconds(value)),
        ..PLAIN
    },
    Flag {
        long: "sigkill-wait-secs",
        value: Some("SECS"),
        scope: STOPPING,
        brief: "how long QEMU may take after SIGKILL",
        manual: "Default: [lifecycle].sigkill_wait_secs, 5 unless set.",
        apply: |raw, value| set(&mut raw.sigkill_wait, seconds(value)),
        ..PLAIN
    },
    Flag {
        long: "discard",
        scope: STOPPING,
        brief: BY_COMMAND,
        apply: |raw, _| on(&mut raw.discard),
        ..PLAIN
    },
    Flag {
        long: "watch",
        scope: STATUS,
        brief: "print again every 2 s until Ctrl-C",
        manual: "A terminal is redrawn in place. Otherwise the tables follow each other, with --json one \
                 object per line.",
        apply: |raw, _| on(&mut raw.watch),
        ..PLAIN
    },
    Flag {
        long: "wide",
        scope: STATUS,
        brief: "show every column, and what guests measure",
        manual: "Without it a terminal gets the columns that fit into its width, the most useful first. A \
                 pipe always gets every column.",
        apply: |raw, _| on(&mut raw.wide),
        ..PLAIN
    },
    Flag {
        long: "legend",
        scope: STATUS,
        brief: "explain the columns below the table",
        apply: |raw, _| on(&mut raw.legend),
        ..PLAIN
    },
    Flag {
        long: "all",
        scope: Scope::Only(&[Command::Status, Command::Ports, Command::Doctor]),
        brief: "show every project castra knows",
        apply: |raw, _| on(&mut raw.all),
        ..PLAIN
    },
    Flag {
        long: "dry-run",
        scope: CLEAN,
        brief: "show what would be removed, and remove nothing",
        apply: |raw, _| on(&mut raw.dry_run),
        ..PLAIN
    },
    Flag {
        long: "global",
        scope: CLEAN,
        brief: "clean every project, and what all projects share",
        apply: |raw, _| on(&mut raw.global),
        ..PLAIN
    },
    Flag {
        long: "state-root",
        value: Some("PATH"),
        scope: CLEAN,
        brief: "clean the project with this state root",
        manual: "For a project that `castra workspaces` doesn't know any more.",
        complete: Complete::Path,
        apply: |raw, value| set(&mut raw.state_root, path(value)),
        ..PLAIN
    },
    Flag {
        long: "no-logs",
        scope: CLEAN,
        brief: "keep the logs",
        apply: |raw, _| on(&mut raw.no_logs),
        ..PLAIN
    },
    Flag {
        long: "no-handshakes",
        scope: CLEAN,
        brief: "keep the guests' handshake records",
        apply: |raw, _| on(&mut raw.no_handshakes),
        ..PLAIN
    },
    Flag {
        long: "active",
        scope: PORTS,
        brief: "show only ports that are in use now",
        apply: |raw, _| on(&mut raw.active),
        ..PLAIN
    },
    Flag {
        long: "verbose",
        short: Some('v'),
        scope: Scope::Only(&[
            Command::Up,
            Command::Down,
            Command::Restart,
            Command::Bootstrap,
            Command::Ports,
        ]),
        brief: BY_COMMAND,
        apply: |raw, _| on(&mut raw.verbose),
        ..PLAIN
    },
    Flag {
        long: "raw",
        scope: Scope::Only(&[Command::Console]),
        brief: "pass on everything that the guest writes",
        apply: |raw, _| on(&mut raw.raw),
        ..PLAIN
    },
    Flag {
        long: "source",
        value: Some("SOURCE"),
        scope: LOGS,
        brief: "show only this log: serial, qemu, bootstrap, broker or bus",
        manual: "May be given several times. Without it castra shows all logs, but the broker's only if no VM \
                 is named.",
        complete: Complete::OneOf(&["serial", "qemu", "bootstrap", "broker", "bus"]),
        apply: |raw, value| {
            let source = match text(value)?.as_str() {
                "serial" => Ok(LogSource::Serial),
                "qemu" => Ok(LogSource::Qemu),
                "bootstrap" => Ok(LogSource::Bootstrap),
                "broker" => Ok(LogSource::Broker),
                "bus" => Ok(LogSource::Bus),
                _ => Err(BadValue("use serial, qemu, bootstrap, broker or bus".to_owned())),
            };
            add(&mut raw.sources, source)
        },
        ..PLAIN
    },
    Flag {
        long: "tail",
        value: Some("N"),
        scope: Scope::Only(&[Command::Logs, Command::Events, Command::BusTail]),
        brief: BY_COMMAND,
        apply: |raw, value| {
            set(
                &mut raw.tail,
                number(value, "use a whole number of lines, such as 50"),
            )
        },
        ..PLAIN
    },
    Flag {
        long: "type",
        value: Some("PATTERN"),
        scope: EVENTS,
        brief: "show only events of this type; `*` matches any letters",
        manual: "May be given several times, such as --type vm.lifecycle --type 'bootstrap.*'. `?` matches any \
                 one letter.",
        apply: |raw, value| add(&mut raw.types, text(value)),
        ..PLAIN
    },
    Flag {
        long: "vm",
        value: Some("VM"),
        scope: Scope::Only(&[Command::Events, Command::BusTail]),
        brief: BY_COMMAND,
        complete: Complete::VmName,
        apply: |raw, value| add(&mut raw.vms, text(value)),
        ..PLAIN
    },
    Flag {
        long: "run",
        value: Some("ID"),
        scope: EVENTS,
        brief: "show only events of this run",
        manual: "Each operation is a run, and so is the broker; the id is `run` of its events.",
        apply: |raw, value| set(&mut raw.run, text(value)),
        ..PLAIN
    },
    Flag {
        long: "after",
        value: Some("SEQ"),
        scope: EVENTS,
        brief: "show only events of --run with a higher number than this",
        manual: "A reader that was cut off gives the number of the last event it has seen.",
        apply: |raw, value| {
            set(
                &mut raw.after,
                number(value, "use the `seq` of an event, such as 12"),
            )
        },
        ..PLAIN
    },
    Flag {
        long: "since",
        value: Some("WHEN"),
        scope: Scope::Only(&[Command::Events, Command::Logs, Command::Report]),
        brief: "show only what is newer: 10m ago, or 2026-11-21T10:00:00Z",
        manual: "A time span such as 90s, 10m, 2h or 1day, or a time in RFC 3339 form, with Z or an offset such \
                 as +02:00. Older lines aren't read, so this is quick even on large journals.",
        apply: |raw, value| {
            let since = parse_since(&text(value)?, SystemTime::now());
            raw.since = Some(since.ok_or_else(|| {
                BadValue("use a span such as 10m or 2h, or a time such as 2026-11-21T10:00:00Z".to_owned())
            })?);
            Ok(())
        },
        ..PLAIN
    },
    Flag {
        long: "html",
        value: Some("FILE"),
        scope: REPORT,
        brief: "write a page for a browser to this file; `-`: to stdout",
        manual: "castra writes the file completely or not at all, and replaces an existing file.",
        complete: Complete::Path,
        apply: |raw, value| set(&mut raw.html, path(value)),
        ..PLAIN
    },
    Flag {
        long: "last",
        value: Some("N"),
        scope: REPORT,
        brief: "show the last N runs (default: 5, with --since up to 100)",
        manual: "At most 100.",
        apply: |raw, value| {
            let runs = text(value)?
                .parse()
                .ok()
                .filter(|runs| (1..=MAX_RUNS).contains(runs));
            raw.last =
                Some(runs.ok_or_else(|| BadValue(format!("use a whole number from 1 to {MAX_RUNS}")))?);
            Ok(())
        },
        ..PLAIN
    },
    Flag {
        long: "follow",
        short: Some('f'),
        scope: Scope::Only(&[Command::Events, Command::Logs, Command::BusTail]),
        brief: BY_COMMAND,
        apply: |raw, _| on(&mut raw.follow),
        ..PLAIN
    },
    Flag {
        long: "no-follow",
        scope: BUS_TAIL,
        brief: "end after the last messages",
        manual: "For scripts that want only the messages so far.",
        apply: |raw, _| on(&mut raw.no_follow),
        ..PLAIN
    },
    Flag {
        long: "agent",
        value: Some("NAME"),
        scope: Scope::Only(&[Command::HarnessRun, Command::HarnessRelay]),
        brief: "the agent (default: codex)",
        complete: Complete::Agent,
        apply: |raw, value| {
            let name = text(value)?;
            if agent_named(&name).is_none() {
                return Err(BadValue(format!("castra knows {}", agent_names().join(", "))));
            }
            set(&mut raw.agent, Ok(name))
        },
        ..PLAIN
    },
    Flag {
        long: "codex",
        value: Some("PATH"),
        scope: HARNESS_RUN,
        brief: "the Codex to run (default: `codex` from PATH)",
        manual: "With --in castra looks for it in the VM.",
        complete: Complete::Path,
        apply: |raw, value| set(&mut raw.codex, path(value)),
        ..PLAIN
    },
    Flag {
        long: "codex-arg",
        value: Some("ARG"),
        scope: HARNESS_RUN,
        brief: "give Codex this argument too, as in --codex-arg=--skip-git-repo-check",
        manual: "May be given several times; castra puts the arguments before the prompt, in this order.",
        apply: |raw, value| add(&mut raw.codex_args, not_empty(value)),
        ..PLAIN
    },
    Flag {
        long: "model",
        value: Some("MODEL"),
        scope: HARNESS_RUN,
        brief: "the model that Codex uses",
        apply: |raw, value| set(&mut raw.model, text(value)),
        ..PLAIN
    },
    Flag {
        long: "resume",
        value: Some("THREAD"),
        scope: HARNESS_RUN,
        brief: "continue this thread",
        manual: "An id that `castra harness list` shows, or a name that Codex knows. If Codex doesn't know \
                 the name, it begins a new thread, and castra warns you.",
        apply: |raw, value| set(&mut raw.resume, text(value)),
        ..PLAIN
    },
    Flag {
        long: "cwd",
        value: Some("DIR"),
        scope: HARNESS_RUN,
        brief: "the directory Codex works in (default: this one)",
        manual: "With --in a directory of the VM.",
        complete: Complete::Path,
        apply: |raw, value| set(&mut raw.cwd, path(value)),
        ..PLAIN
    },
    Flag {
        long: "in",
        value: Some("VM"),
        scope: HARNESS_RUN,
        brief: "run Codex inside this VM, so that the host only relays",
        manual: "Codex runs over SSH, with the same connection as `castra exec`; it has to be installed and \
                 logged in there.",
        complete: Complete::VmName,
        apply: |raw, value| set(&mut raw.inside, text(value)),
        ..PLAIN
    },
    Flag {
        long: "timeout",
        value: Some("TIME"),
        scope: Scope::Only(&[Command::HarnessRun, Command::Wait]),
        brief: BY_COMMAND,
        apply: |raw, value| set(&mut raw.time_limit, time(value)),
        ..PLAIN
    },
    Flag {
        long: "idle-timeout",
        value: Some("TIME"),
        scope: HARNESS_RUN,
        brief: "end Codex after this long without output (default: 30m)",
        manual: "Takes the same values as --timeout. Codex is silent while one of its commands runs, and while it \
                 waits for a server that doesn't answer.",
        apply: |raw, value| set(&mut raw.idle_limit, time(value)),
        ..PLAIN
    },
    Flag {
        long: "no-preamble",
        scope: HARNESS_RUN,
        brief: "pass Codex only the prompt",
        manual: "Without this flag castra tells Codex which VMs are running and how to reach them.",
        apply: |raw, _| on(&mut raw.no_preamble),
        ..PLAIN
    },
    Flag {
        long: "no-record",
        scope: Scope::Only(&[Command::HarnessRelay]),
        brief: "keep neither transcript nor events",
        apply: |raw, _| on(&mut raw.no_record),
        ..PLAIN
    },
    Flag {
        long: "topic",
        value: Some("TOPIC"),
        scope: Scope::Only(&[Command::BusPublish, Command::BusTail]),
        brief: BY_COMMAND,
        apply: |raw, value| add(&mut raw.topics, text(value)),
        ..PLAIN
    },
    Flag {
        long: "payload",
        value: Some("JSON"),
        scope: BUS_PUBLISH,
        brief: "the payload, as JSON; `-` reads one message per line",
        manual: "Any JSON. A JSON string needs its own quotes inside the shell's: --payload '\"reload\"'. \
                 Without it the payload is null.",
        apply: |raw, value| {
            let payload = value.into_string();
            set(
                &mut raw.payload,
                payload.map_err(|_| BadValue("JSON is UTF-8 text".to_owned())),
            )
        },
        ..PLAIN
    },
    Flag {
        long: "for",
        value: Some("STATE"),
        scope: Scope::Only(&[Command::Wait]),
        brief: "what to wait for: reachable (default), bootstrapped or stopped",
        manual: "`reachable`: as in `castra status`. `bootstrapped`: the last bootstrap of this launch has \
                 succeeded, or its mode is `skip`. `stopped`: QEMU doesn't run, however it ended.",
        complete: Complete::OneOf(&["reachable", "bootstrapped", "stopped"]),
        apply: |raw, value| {
            let value = text(value)?;
            let known = WaitFor::ALL.into_iter().find(|known| known.as_str() == value);
            raw.wait_for =
                Some(known.ok_or_else(|| BadValue("use reachable, bootstrapped or stopped".to_owned()))?);
            Ok(())
        },
        ..PLAIN
    },
    Flag {
        long: "wait",
        value: Some("SPAN"),
        scope: Scope::Only(&[Command::BusPublish, Command::BusRequest, Command::BusSubscribe]),
        brief: "wait up to this long for a broker, such as 30s",
        manual: "Without this flag the command fails at once if no broker runs and castra can't start one. A \
                 plain number means seconds.",
        apply: |raw, value| set(&mut raw.wait, time(value)),
        ..PLAIN
    },
    Flag {
        long: "from",
        value: Some("SEQ"),
        scope: BUS_SUBSCRIBE,
        brief: "begin with the message of this number",
        manual: "Messages are numbered from 1 on. A reader that was cut off gives the number after the last \
                 one it has seen; 1 means all messages in the log.",
        apply: |raw, value| {
            set(
                &mut raw.from,
                number(value, "use the number of a message, such as 12"),
            )
        },
        ..PLAIN
    },
    Flag {
        long: "last",
        scope: BUS_SUBSCRIBE,
        brief: "print the newest message of each topic first",
        manual: "These messages come from the log of the bus, so a restart of the broker doesn't lose them; new \
                 messages follow. At most 256 topics and 256 KiB of one sender.",
        apply: |raw, _| on(&mut raw.last_values),
        ..PLAIN
    },
    Flag {
        long: "group",
        value: Some("NAME"),
        scope: BUS_SUBSCRIBE,
        brief: "share the messages with other members of this group",
        manual: "Each message goes to one of the clients that are subscribed to the same topic with the same \
                 group, by turns. If a client dies, its messages are lost; use `bus request` if you need to \
                 know. Guests and the host never share a group.",
        apply: |raw, value| set(&mut raw.shared_by, text(value)),
        ..PLAIN
    },
    Flag {
        long: "timeout",
        value: Some("SPAN"),
        scope: Scope::Only(&[Command::BusRequest]),
        brief: "wait this long for an answer (default: 5s)",
        manual: "A plain number means seconds. If no answer comes in that time, the exit code is 1.",
        apply: |raw, value| set(&mut raw.time_limit, time(value)),
        ..PLAIN
    },
    Flag {
        long: "count",
        value: Some("N"),
        scope: BUS_SUBSCRIBE,
        brief: "end after N messages",
        apply: |raw, value| set(&mut raw.count, number(value, "use a whole number, such as 1")),
        ..PLAIN
    },
    Flag {
        long: "shared",
        scope: BUS_TAIL,
        brief: "read the log of the whole bus (the default)",
        apply: |raw, _| on(&mut raw.shared),
        ..PLAIN
    },
    Flag {
        long: "messages",
        value: Some("N"),
        scope: BUS_BENCH,
        brief: "number of messages (default: 50000)",
        manual: "At most 5000 of them are sent one by one.",
        apply: |raw, value| {
            set(
                &mut raw.messages,
                number(value, "use a whole number, such as 50000"),
            )
        },
        ..PLAIN
    },
    Flag {
        long: "size",
        value: Some("BYTES"),
        scope: BUS_BENCH,
        brief: "size of each payload in bytes (default: 200)",
        apply: |raw, value| {
            set(
                &mut raw.size,
                number(value, "use a whole number of bytes, such as 200"),
            )
        },
        ..PLAIN
    },
    Flag {
        long: "in-flight",
        value: Some("N"),
        scope: BUS_BENCH,
        brief: "unacknowledged messages per publisher (default: 64)",
        apply: |raw, value| {
            set(
                &mut raw.in_flight,
                number(value, "use a whole number, such as 64"),
            )
        },
        ..PLAIN
    },
    Flag {
        long: "publishers",
        value: Some("N"),
        scope: BUS_BENCH,
        brief: "number of publishers at once (default: 1)",
        apply: |raw, value| {
            set(
                &mut raw.publishers,
                number(value, "use a whole number, such as 8"),
            )
        },
        ..PLAIN
    },
];

/// A switch is given.
fn on(place: &mut bool) -> Result<(), BadValue> {
    *place = true;
    Ok(())
}

/// A value takes its place, if it is a good one; the last one given wins.
fn set<T>(place: &mut Option<T>, value: Result<T, BadValue>) -> Result<(), BadValue> {
    *place = Some(value?);
    Ok(())
}

/// One more value of a flag that may be given several times.
fn add<T>(places: &mut Vec<T>, value: Result<T, BadValue>) -> Result<(), BadValue> {
    places.push(value?);
    Ok(())
}

fn text(value: OsString) -> Result<String, BadValue> {
    let text = not_empty(value)?.into_string();
    text.map_err(|_| BadValue("it has to be UTF-8 text".to_owned()))
}

fn not_empty(value: OsString) -> Result<OsString, BadValue> {
    if value.is_empty() {
        return Err(BadValue("it can't be empty".to_owned()));
    }
    Ok(value)
}

fn path(value: OsString) -> Result<PathBuf, BadValue> {
    Ok(not_empty(value)?.into())
}

fn seconds(value: OsString) -> Result<Duration, BadValue> {
    text(value)?
        .parse::<u64>()
        .ok()
        .filter(|secs| *secs <= MAX_WAIT_SECS)
        .map(Duration::from_secs)
        .ok_or_else(|| {
            BadValue(format!(
                "use a whole number of seconds from 0 to {MAX_WAIT_SECS}, such as 20"
            ))
        })
}

/// Seconds, or a number with a unit.
fn time(value: OsString) -> Result<Duration, BadValue> {
    let text = text(value)?;
    let parsed = match text.parse() {
        Ok(secs) => Some(Duration::from_secs(secs)),
        Err(_) => humantime::parse_duration(&text).ok(),
    };
    parsed.filter(|time| *time <= MAX_TIME).ok_or_else(|| {
        BadValue("use seconds or a time such as 90s, 30m or 2h, of at most 30 days".to_owned())
    })
}

fn number<T: std::str::FromStr>(value: OsString, expected: &str) -> Result<T, BadValue> {
    text(value)?.parse().map_err(|_| BadValue(expected.to_owned()))
}

/// Form only: whether the VM exists is asked once a config is read.
fn check_override(part: &str) -> Result<(), BadValue> {
    let (vm, mode) = part
        .split_once('=')
        .map_or((None, part), |(vm, mode)| (Some(vm), mode));
    if vm == Some("") || !matches!(mode, "auto" | "skip" | "always") {
        return Err(BadValue(
            "use auto, skip or always, or VM=MODE, such as web-0=always".to_owned(),
        ));
    }
    Ok(())
}
