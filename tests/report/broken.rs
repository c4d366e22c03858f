//! Journals and logs that are torn or hostile.

use std::fs;

use castra::core::events::endings::LaunchEnding;
use castra::core::events::{BootstrapStepKind, Event, HandshakeOutcome, Severity};
use castra::core::host::FileLock;
use castra::core::report::model::{Outcome, Report, State};
use serde_json::{Value, json};

use crate::journal::{Journal, NOON};
use crate::page::page;
use crate::{project, told};

#[test]
fn torn_lines_and_a_run_without_end() {
    let castra = project("report-torn");
    let mut journal = Journal::new();
    journal
        .begin("r1", "up", 0)
        .launched(200, "web")
        .end(300, 0, 1, 0);
    journal.lines.push_str("{\"type\":\"bootstrap.st");
    journal.begin("r2", "up", 1_000).launched(400, "web");
    journal.lines.push_str("\u{0}\u{0}garbage\n[1,2]\n{\"type\":\"vm.teleported\",\"v\":1,\"ts\":\"2026-11-21T10:00:02.000Z\",\"offset_ms\":1000,\"seq\":9,\"run\":\"r2\",\"vm\":\"web\"}\n");
    journal.tell(900, Event::message(Severity::Warn, None, "something odd"));
    castra.write("state/logs/events.jsonl", &journal.lines);
    castra.write("state/logs/events-broker.jsonl", "{\"type\":\"broker.handsh");
    castra.write("state/logs/bus/bus.log", "{\"seq\":1,\"ts\":17");
    let report = told(&castra, &[]);
    let [second, first] = report["runs"].as_array().unwrap().as_slice() else {
        panic!("{report}");
    };
    assert_eq!(
        (&first["outcome"], &second["outcome"]),
        (&json!("ok"), &json!("unfinished"))
    );
    assert_eq!(second["vms"][0]["state"], "waiting");
    assert_eq!(second["vms"][0]["phases"][2]["phase"], "unfinished");
    assert_eq!(second["notes"][0]["text"], "something odd");
    assert_eq!(second["exit_status"], Value::Null);
    let left_out = report["left_out"].to_string();
    assert!(
        left_out.contains("invalid lines of the journal were skipped"),
        "{left_out}"
    );
    assert!(page(&castra, &[]).contains("no end known"));
    // Somebody holds its VM: it is under way. So it isn't when a later run is about that VM.
    let lock = castra.write("state/vms/web/lock", "");
    let held = FileLock::try_take(&lock, "test").unwrap();
    let outcomes = |report: Value| {
        [
            report["runs"][0]["outcome"].clone(),
            report["runs"][1]["outcome"].clone(),
        ]
    };
    assert_eq!(outcomes(told(&castra, &[])), ["running", "ok"]);
    assert!(page(&castra, &[]).contains("under way"));
    drop(held);
    assert_eq!(outcomes(told(&castra, &[])), ["unfinished", "ok"]);

    let text = castra.run(&["report"]).exits(0).stdout;
    assert!(
        text.contains("no end known") && text.contains("warning: something odd"),
        "{text}"
    );
}

#[test]
fn what_guests_and_scripts_say_stays_text() {
    let castra = project("report-hostile");
    let nasty = "</style><script>alert('x')</script>\"'><img src=x onerror=alert(1)>&#x3c;\u{1b}[2J\u{0}\u{202e}gnp\u{2066}\u{ffff}]]>";
    let mut journal = Journal::new();
    journal.begin("<b>&\"'", "up", 0).launched(200, "web");
    journal.step(300, "web", BootstrapStepKind::Apply, nasty);
    journal.failed(310, "web", nasty);
    journal.tell(
        320,
        Event::advice(Severity::Blocker, Some(&"web".parse().unwrap()), nasty, nasty),
    );
    journal.tell(
        330,
        Event::CommandFailed {
            command: "up".into(),
            detail: nasty.repeat(1000),
            duration_ms: Some(330),
            exit_status: Some(1),
            source: nasty.into(),
            thread: None,
            turn: None,
        },
    );
    castra.write("state/logs/events.jsonl", &journal.lines);
    let mut broker = Journal::new();
    broker.begin("broker", "none", 0);
    broker.lines.clear();
    broker.tell(
        250,
        Event::BrokerHandshake {
            vm: Some("WEB".parse().unwrap()),
            capabilities: vec![nasty.into()],
            outcome: HandshakeOutcome::Ok,
            reason: None,
            session: Some(nasty.into()),
            remote: nasty.into(),
            repeated: None,
        },
    );
    broker.tell(
        900,
        Event::VmExited {
            vm: "web".parse().unwrap(),
            pid: None,
            reason: nasty.into(),
            outcome: LaunchEnding::Crashed.into(),
            last_words: Some(nasty.into()),
            qemu_words: Some(nasty.into()),
            remediation: Some(nasty.into()),
        },
    );
    castra.write("state/logs/events-broker.jsonl", &broker.lines);
    let bus = format!(
        "{}\n{}\n",
        json!({"seq": 1, "ts": NOON + 400, "vm": nasty, "topic": nasty, "payload": nasty}),
        r#"{"seq":2,"ts":1795255200500,"vm":"<i>","topic":"t","payload":"</pre>"}"#
    );
    castra.write("state/logs/bus/bus.log", &bus);
    let mut output = b"\xff\xfe\x80 not UTF-8 <script>\n".to_vec();
    output.extend(nasty.as_bytes());
    output.extend(b"\r\n\x1b]0;title\x07\n");
    output.extend([b'x'; 100_000]);
    let out = castra.write("state/logs/bootstrap/web-20261121T100000.250Z.out", "");
    fs::write(out, output).unwrap();

    let page = page(&castra, &[]);
    assert!(!page.contains("<script") && !page.contains("<img"), "{page}");
    assert!(page.len() < 200_000, "{}", page.len());
    assert!(
        page.contains("&lt;/style&gt;&lt;script&gt;alert(&#39;x&#39;)"),
        "{page}"
    );
    assert!(page.contains("default-src &#39;none&#39;"), "its policy is there");
    let text = castra.run(&["report"]).exits(0).stdout;
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text}");
    let json = castra.run(&["report", "--json"]).exits(0).stdout;
    assert!(
        !json.trim_end().chars().any(|c| c.is_control() || c == '\u{202e}'),
        "{json}"
    );
    let report: Report = serde_json::from_str(&json).unwrap();
    let vm = &report.runs[0].vms[0];
    assert_eq!(
        (report.runs[0].outcome, vm.state),
        (Outcome::Failed, State::Failed)
    );
    assert_eq!(vm.marks.len(), 3, "launched, a handshake in another case, gone");
    assert_eq!(vm.log.as_ref().unwrap().source, "script");
    assert!(report.runs[0].detail.as_ref().unwrap().len() <= 600);
}
