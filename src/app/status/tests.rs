//! Golden files of the status contract and its table: tests/golden/status. `CASTRA_BLESS=1`
//! rewrites them.

#[path = "../../core/golden.rs"]
mod golden;

use castra::core::config::Protocol;
use castra::core::escape::escape_json;
use castra::core::events::endings::BootstrapStatus;
use castra::core::status::{
    Accel, BootstrapPlanSsh, BootstrapRecord, BrokerState, BrokerStatus, EndedStatus, ForwardRecord,
    GuestState, Note, SCHEMA, StatusOutcome, VmState, VmStatus,
};
use serde_json::{Value, json};

use super::{COLUMNS, Layout, cut, frame, legend, render, render_all, without_middle, wrap};
use crate::app::style::Style;
use crate::app::terminal::Size;
use crate::cli::{self, ColorChoice, Command, HelpKind};

const PIPE: Layout = Layout {
    width: None,
    style: Style::PLAIN,
    wide: false,
    legend: false,
    hints: true,
};

fn terminal(width: usize) -> Layout {
    Layout {
        width: Some(width),
        ..PIPE
    }
}

/// A VM that never ran.
fn vm(name: &str, role: &str) -> VmStatus {
    VmStatus {
        name: name.parse().unwrap(),
        role: role.into(),
        state: VmState::Stopped,
        pid: None,
        cpus: Some(1),
        memory_bytes: Some(256 << 20),
        uptime_ms: None,
        broker: GuestState::Waiting,
        reachable: false,
        last_handshake_age_ms: None,
        capabilities: Vec::new(),
        bus_session: false,
        bus_subscribed: false,
        last_publish_age_ms: None,
        last_heartbeat_age_ms: None,
        last_acked_seq: None,
        guest_metrics: None,
        forwards: Vec::new(),
        ssh: None,
        bootstrap: None,
        ended: None,
        paused: None,
        boots: Some(1),
        last_reset: None,
        stale_config: Vec::new(),
        lost: None,
    }
}

fn running(name: &str, role: &str, port: u16) -> VmStatus {
    VmStatus {
        state: VmState::Running,
        pid: Some(4712),
        uptime_ms: Some(125_300),
        forwards: vec![
            ForwardRecord {
                host: port,
                guest: 22,
                protocol: Protocol::Tcp,
            },
            ForwardRecord {
                host: 5353,
                guest: 53,
                protocol: Protocol::Udp,
            },
        ],
        ssh: Some(BootstrapPlanSsh {
            user: "root".into(),
            host: "127.0.0.1".into(),
            port: Some(port),
            identity: Some("/home/u/.castra/projects/demo-1a2b3c4d/id_ed25519".into()),
            options: Vec::new(),
        }),
        bootstrap: Some(BootstrapRecord {
            status: BootstrapStatus::Success.into(),
            noop: false,
            duration_ms: Some(8_421),
        }),
        ..vm(name, role)
    }
}

/// One VM in every state.
fn fleet() -> StatusOutcome {
    let reachable = VmStatus {
        cpus: Some(2),
        memory_bytes: Some(3 << 29),
        broker: GuestState::Reachable,
        reachable: true,
        last_handshake_age_ms: Some(412),
        capabilities: vec!["bus-v1".into(), "vizier-v1".into()],
        bus_session: true,
        last_heartbeat_age_ms: Some(412),
        guest_metrics: Some(json!({ "load": 0.4, "note": "\u{1b}[31m\u{202e}red" })),
        ..running("web-0", "web", 2222)
    };
    let stale = VmStatus {
        pid: Some(4713),
        last_handshake_age_ms: Some(125_000),
        bootstrap: Some(BootstrapRecord {
            status: BootstrapStatus::Failed.into(),
            noop: false,
            duration_ms: Some(60_210),
        }),
        ..running("web-1", "edge", 2223)
    };
    let starting = VmStatus {
        state: VmState::Starting,
        ..vm("db", "db")
    };
    let stopping = VmStatus {
        state: VmState::Stopping,
        pid: Some(4714),
        last_handshake_age_ms: Some(3_900),
        broker: GuestState::Reachable,
        reachable: true,
        bootstrap: Some(BootstrapRecord {
            status: BootstrapStatus::Success.into(),
            noop: true,
            duration_ms: Some(1_020),
        }),
        ..running("cache", "cache", 2224)
    };
    let stopped = VmStatus {
        last_handshake_age_ms: Some(7_260_000),
        ended: Some(EndedStatus {
            reason: "guest-shutdown".into(),
            at: Some("2026-11-21T08:00:00.120Z".into()),
            last_words: Some("[  121.402117] reboot: Power down".into()),
            ..EndedStatus::default()
        }),
        ..vm("batch", "batch")
    };
    let crashed = VmStatus {
        state: VmState::Crashed,
        last_handshake_age_ms: Some(61_000),
        ended: Some(EndedStatus {
            reason: "guest-reset".into(),
            at: Some("2026-11-21T09:59:00.871Z".into()),
            last_words: Some(
                "[   52.118225] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100"
                    .into(),
            ),
            qemu_words: Some("qemu-system-x86_64: warning: guest said so".into()),
            remediation: Some(
                "castra logs fuzz --source serial shows the panic; castra restart fuzz starts it again with its disk".into(),
            ),
        }),
        ..vm("fuzz", "fuzz")
    };
    StatusOutcome {
        schema: SCHEMA.into(),
        project: "demo".into(),
        workspace: "demo-1a2b3c4d".into(),
        config_path: "/home/u/demo/castra.toml".into(),
        state_root: "/home/u/.castra/projects/demo-1a2b3c4d".into(),
        broker: BrokerStatus {
            state: BrokerState::Running,
            pid: Some(4711),
            port: Some(7070),
        },
        accel: Some(Accel::Tcg),
        reachable: true,
        all_reachable: false,
        last_handshake_vm: Some("web-0".parse().unwrap()),
        last_handshake_age_ms: Some(412),
        freshness_window_ms: 45_000,
        vms: vec![
            reachable,
            stale,
            starting,
            stopping,
            stopped,
            crashed,
            vm("spare", "spare"),
        ],
        notes: vec![Note {
            vm: Some("web-1".parse().unwrap()),
            text: "can't read the handshake record /s/handshakes/web-1.json: it is only partly written"
                .into(),
            advice: Some("the broker writes it anew when it next hears the guest".into()),
        }],
    }
}

/// Two VMs and no broker; no guest was ever heard.
fn offline() -> StatusOutcome {
    let mut status = fleet();
    status.broker = BrokerStatus {
        state: BrokerState::Offline,
        pid: None,
        port: None,
    };
    status.reachable = false;
    status.last_handshake_vm = None;
    status.last_handshake_age_ms = None;
    status.notes.clear();
    status.vms = vec![running("web", "web", 2222), vm("db", "db")];
    status
        .vms
        .iter_mut()
        .for_each(|vm| vm.broker = GuestState::Offline);
    status
}

fn golden(name: &str, text: &str) {
    golden::check(&format!("status/{name}"), text);
}

fn pretty(status: &StatusOutcome) -> String {
    let text = serde_json::to_string_pretty(status).unwrap();
    format!("{}\n", escape_json(&text))
}

#[test]
fn json_is_the_contract() {
    golden("fleet.json", &pretty(&fleet()));
    golden("offline.json", &pretty(&offline()));
    for status in [fleet(), offline()] {
        let mut back: StatusOutcome = serde_json::from_str(&pretty(&status)).unwrap();
        back.notes.clone_from(&status.notes);
        assert_eq!(back, status, "what was written reads back");
    }
}

/// The fields of docs/STATUS.md, in their order.
#[test]
fn fields_and_their_order() {
    let keys = |text: &str| -> Vec<String> {
        // serde_json's map sorts its keys; the printed text keeps their order.
        let mut positions: Vec<(usize, String)> =
            serde_json::from_str::<serde_json::Map<String, Value>>(text)
                .unwrap()
                .into_iter()
                .map(|(key, _)| (text.find(&format!("\"{key}\":")).unwrap(), key))
                .collect();
        positions.sort();
        positions.into_iter().map(|(_, key)| key).collect()
    };
    let status = fleet();
    let mut top = status.clone();
    top.vms.clear();
    assert_eq!(
        keys(&serde_json::to_string(&top).unwrap()).join(" "),
        "schema project workspace config_path state_root broker accel reachable all_reachable \
         last_handshake_vm last_handshake_age_ms freshness_window_ms vms"
    );
    // Without values that hold keys of the same names.
    let plain = vm("web-0", "web");
    assert_eq!(
        keys(&serde_json::to_string(&plain).unwrap()).join(" "),
        "name role state pid cpus memory_bytes uptime_ms broker reachable last_handshake_age_ms capabilities \
         bus_session bus_subscribed last_publish_age_ms last_heartbeat_age_ms last_acked_seq guest_metrics forwards ssh \
         bootstrap ended paused boots last_reset stale_config lost"
    );
}

#[test]
fn tables() {
    golden("fleet.txt", &render(&fleet(), PIPE));
    golden("fleet-100.txt", &render(&fleet(), terminal(100)));
    golden("fleet-60.txt", &render(&fleet(), terminal(60)));
    golden("offline.txt", &render(&offline(), PIPE));
    golden("all.txt", &render_all(&[fleet(), offline()], terminal(100)));
    golden("none.txt", &render_all(&[], PIPE));
    let mut empty = offline();
    empty.vms.clear();
    golden("empty.txt", &render(&empty, PIPE));
    let colored = Layout {
        style: Style::decide(ColorChoice::Always, &std::io::stdout()),
        ..PIPE
    };
    golden("fleet-color.txt", &render(&fleet(), colored));
    let all = Layout {
        wide: true,
        legend: true,
        ..terminal(80)
    };
    golden("fleet-wide-legend.txt", &render(&fleet(), all));
}

/// The table of a rendered status: its head and rows.
fn table_of(text: &str) -> Vec<&str> {
    let lines = text.lines().skip_while(|line| !line.starts_with("VM "));
    lines.take_while(|line| !line.is_empty()).collect()
}

#[test]
fn a_table_never_wraps_and_the_most_useful_columns_stay() {
    for (width, heads) in [
        (24, "VM STATE"),
        (40, "VM STATE BROKER AGE"),
        (60, "VM STATE BROKER AGE UPTIME BOOTSTRAP"),
        (80, "VM STATE BROKER AGE UPTIME SSH BOOTSTRAP"),
        (100, "VM STATE BROKER AGE UPTIME SSH FORWARDS BOOTSTRAP BUS"),
        (
            120,
            "VM STATE BROKER AGE UPTIME PID CPUS MEMORY SSH FORWARDS BOOTSTRAP BUS",
        ),
        (
            200,
            "VM ROLE STATE BROKER AGE UPTIME PID CPUS MEMORY SSH FORWARDS BOOTSTRAP BUS HEARTBEAT CAPABILITIES",
        ),
    ] {
        let text = render(&fleet(), terminal(width));
        let found: Vec<&str> = table_of(&text)[0].split_whitespace().collect();
        assert_eq!(found.join(" "), heads, "{width}");
    }
    for width in 20..220 {
        let text = render(&fleet(), terminal(width));
        for line in table_of(&text) {
            assert!(line.chars().count() <= width, "{width}: {line}");
        }
    }
}

/// Scripts that read the table find every column, whatever the VMs have to say.
#[test]
fn a_pipe_has_a_stable_table_and_nothing_else() {
    let text = render(&fleet(), PIPE);
    let other = render(&offline(), PIPE);
    let heads: Vec<&str> = COLUMNS.iter().map(|column| column.head).collect();
    for text in [&text, &other] {
        let found: Vec<&str> = table_of(text)[0].split_whitespace().collect();
        assert_eq!(found, heads);
    }
    assert!(!text.contains("--legend") && !text.contains("metrics"), "{text}");
}

#[test]
fn every_column_that_needs_words_is_in_the_legend() {
    let text = legend::paragraphs("45 s").join("\n");
    for head in [
        "STATE",
        "BROKER",
        "AGE",
        "UPTIME",
        "FORWARDS",
        "BOOTSTRAP",
        "BUS",
        "PUBLISH",
        "HEARTBEAT",
    ] {
        assert!(text.contains(head), "{head}");
    }
}

#[test]
fn long_names_lose_their_middle_only_where_there_is_no_room() {
    let mut status = offline();
    let name = format!("{}-{}", "n".repeat(61), 17);
    status.vms = vec![vm(&name, "n"), vm("db", "db")];
    golden("long-names-60.txt", &render(&status, terminal(60)));
    let text = render(&status, terminal(200));
    assert!(text.contains(&name));
    assert_eq!(without_middle("web-0", 8), "web-0");
    assert_eq!(without_middle("production-web-17", 9), "prod…b-17");
}

#[test]
fn nothing_of_a_guest_reaches_the_terminal_raw() {
    let mut status = fleet();
    status.project = "de\u{1b}[2Jmo".into();
    status.vms[0].capabilities = vec!["\u{202e}x".into()];
    status.vms[4].ended = Some(EndedStatus {
        reason: "x\r\n".into(),
        at: Some("\u{9b}31m".into()),
        last_words: Some("\u{1b}]0;title\u{7}\nbroker   running".into()),
        qemu_words: Some("\u{1b}[1m".into()),
        remediation: Some("\u{1b}[1m".into()),
    });
    let text = render(&status, PIPE);
    assert!(
        text.chars()
            .all(|c| c == '\n' || (!c.is_control() && c != '\u{202e}'))
    );
    assert_eq!(text.lines().filter(|line| line.starts_with("broker ")).count(), 1);
}

#[test]
fn no_line_is_wider_than_the_terminal() {
    for width in [50, 60, 79, 100, 132] {
        for line in render(&fleet(), terminal(width)).lines() {
            let word = line.split(' ').map(str::len).max().unwrap_or(0);
            // Paths and notes aren't broken: people copy them.
            let is_whole = line.starts_with("config")
                || line.starts_with("state")
                || line.starts_with("warning")
                || line.starts_with("  try");
            assert!(
                line.chars().count() <= width.max(word) || is_whole,
                "{width}: {line}"
            );
        }
    }
    assert_eq!(wrap("one two three", Some(8), 2), "one two\n  three\n");
    assert_eq!(
        wrap("        indented words here", Some(18), 8),
        "        indented\n        words here\n"
    );
    assert_eq!(
        wrap("a-word-longer-than-the-line x", Some(8), 2),
        "a-word-longer-than-the-line\n  x\n"
    );
}

#[test]
fn a_frame_fits_the_screen() {
    let text = "a\nb\nc\nd\n";
    let size = |rows| Size { rows, columns: 30 };
    assert_eq!(
        frame(text, size(24)),
        "\x1b[Ha\x1b[K\nb\x1b[K\nc\x1b[K\nd\x1b[K\n\x1b[J"
    );
    assert_eq!(frame(text, size(5)).matches('\n').count(), 4);
    let low = frame(text, size(4));
    assert!(low.contains("b\x1b[K\n… 2 more lines"), "{low:?}");
    assert_eq!(low.matches('\n').count(), 3);
    assert_eq!(cut("a\x1b[32mbcd\x1b[0me", 3), "a\x1b[32mbc\x1b[0m");
    assert_eq!(cut("名前名前", 3), "名前名");
}

/// docs/STATUS.md and `--help` define every field there is.
#[test]
fn document_and_help_name_every_field() {
    let document = include_str!("../../../docs/STATUS.md");
    let value = serde_json::to_value(fleet()).unwrap();
    let mut keys: Vec<String> = Vec::new();
    for object in [
        &value,
        &value["vms"][0],
        &value["vms"][4]["ended"],
        &value["vms"][0]["ssh"],
    ] {
        keys.extend(object.as_object().unwrap().keys().cloned());
    }
    let help = cli::help(Command::Status, HelpKind::Long);
    for key in &keys {
        assert!(
            help.contains(&format!("`{key}`")),
            "--help doesn't define `{key}`"
        );
    }
    keys.extend(
        value["broker"]
            .as_object()
            .unwrap()
            .keys()
            .map(|key| format!("broker.{key}")),
    );
    for key in keys {
        assert!(
            document.contains(&format!("`{key}`")),
            "docs/STATUS.md doesn't define `{key}`"
        );
    }
}
