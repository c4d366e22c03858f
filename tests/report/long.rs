//! Journals and logs that are long.

use std::fs;
use std::io::{BufWriter, Write};
use std::process::Command;

use castra::core::events::{Event, Severity};
use castra::core::report::model::Report;
use serde_json::json;

use crate::journal::{Journal, NOON};
use crate::page::check;
use crate::project;

#[test]
fn long_logs_take_no_memory_and_are_read_from_the_right_place() {
    let castra = project("report-long");
    let path = castra.write("state/logs/events.jsonl", "");
    let mut file = BufWriter::new(fs::File::create(path).unwrap());
    // Old runs, a long one full of what its script has printed, and a short one.
    let mut journal = Journal::new();
    for number in 0..2_000 {
        journal
            .begin(&format!("old-{number}"), "down", number)
            .end(1, 0, 0, 0);
    }
    journal.begin("long", "up", 10_000).launched(100, "web");
    file.write_all(std::mem::take(&mut journal.lines).as_bytes())
        .unwrap();
    let line = Event::Message {
        severity: Severity::Progress,
        text: "unpacking ".repeat(3),
        vm: Some("web".parse().unwrap()),
        remediation: None,
        source: Some("bootstrap".into()),
        thread: None,
        turn: None,
        data: Some(json!({"stream": "stdout"})),
    };
    for number in 0..100_000 {
        journal.tell(200 + number, line.clone());
        file.write_all(std::mem::take(&mut journal.lines).as_bytes())
            .unwrap();
    }
    for number in 0..150 {
        let vm = format!("vm-{number}");
        journal.launched(100_300, &vm);
        if number == 149 {
            journal.failed(100_400, &vm, "the last one fails");
        }
    }
    for number in 0..1_000 {
        journal.tell(
            100_500,
            Event::message(Severity::Warn, None, format!("warning {number}")),
        );
    }
    journal
        .end(100_600, 1, 151, 1)
        .begin("short", "down", 200_000)
        .end(5, 0, 0, 0);
    file.write_all(journal.lines.as_bytes()).unwrap();
    file.flush().unwrap();
    let path = castra.write("state/logs/bus/bus.log", "");
    let mut bus = BufWriter::new(fs::File::create(path).unwrap());
    for seq in 0..220_000_u64 {
        let ts = NOON + seq;
        writeln!(
            bus,
            r#"{{"seq":{seq},"ts":{ts},"vm":"web","topic":"t","payload":"{:0>60}"}}"#,
            seq
        )
        .unwrap();
    }
    bus.flush().unwrap();

    // 100 MB of logs in an address space of 64 MB, most of which is the program itself.
    let bounded = |args: &[&str]| -> String {
        let mut command = castra.command(&[""; 0]);
        let program = command.get_program().to_owned();
        command = {
            let mut shell = Command::new("sh");
            shell
                .args(["-c", "ulimit -v 65536 && exec \"$0\" \"$@\""])
                .arg(program)
                .args(args);
            shell
                .current_dir(castra.project())
                .env("CASTRA_HOME", castra.home());
            shell
        };
        let ended = command.output().unwrap();
        assert!(
            ended.status.success(),
            "{}",
            String::from_utf8_lossy(&ended.stderr)
        );
        String::from_utf8(ended.stdout).unwrap()
    };
    let report: Report = serde_json::from_str(&bounded(&["report", "--json", "--last", "2"])).unwrap();
    let [short, long] = report.runs.as_slice() else {
        panic!("{:?}", report.runs.len());
    };
    assert_eq!((short.run.as_str(), long.run.as_str()), ("short", "long"));
    assert_eq!(
        (long.vms.len(), long.vms_left_out, long.vms_total),
        (100, 51, 151)
    );
    // One that failed is never left out before others.
    assert!(long.vms.iter().any(|vm| vm.vm == "vm-149"));
    assert_eq!((long.notes.len(), long.notes_left_out), (20, 980));
    assert_eq!(long.bus.as_ref().unwrap().messages, 190_000);
    assert_eq!(short.bus.as_ref().unwrap().messages, 20_000);
    let page = bounded(&["report", "--html", "-", "--last", "2"]);
    check(&page);
    assert!(page.len() < 500_000, "{}", page.len());
}
