//! The QMP client against scripted partners on a real socket.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use crate::core::scratch::Scratch;

use super::*;

const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";
const SOON: Duration = Duration::from_millis(50);
const AMPLE: Duration = Duration::from_secs(20);

/// Listens as QEMU would; `partner` gets each line and the stream to answer on.
fn partner(
    dir: &Path,
    first: &'static str,
    answer: impl Fn(&Value) -> String + Send + 'static,
) -> JoinHandle<()> {
    let listener = UnixListener::bind(dir.join(vm_file::QMP_SOCK)).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(first.as_bytes()).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        for line in lines.map_while(Result::ok) {
            let asked: Value = serde_json::from_str(&line).unwrap();
            let text = answer(&asked);
            if text == "leave" || stream.write_all(text.as_bytes()).is_err() {
                return;
            }
        }
    })
}

fn ok(asked: &Value, result: &str) -> String {
    format!("{{\"return\": {result}, \"id\": {}}}\r\n", asked["id"])
}

#[test]
fn it_negotiates_asks_and_passes_over_events() {
    let scratch = Scratch::new("qmp");
    let end = partner(scratch.dir(), GREETING, |asked| {
        match asked["execute"].as_str().unwrap() {
            "query-status" => format!(
                "{{\"event\": \"RESUME\"}}\r\n{{\"return\": {{}}, \"id\": \"somebody else's\"}}\r\n{}",
                ok(asked, "{\"status\": \"internal-error\"}")
            ),
            "system_powerdown" => format!(
                "{{\"error\": {{\"desc\": \"no\\u001b such button\"}}, \"id\": {}}}\r\n",
                asked["id"]
            ),
            "quit" => "leave".into(),
            _ => ok(asked, "{}"),
        }
    });
    let mut qmp = Qmp::connect(scratch.dir(), AMPLE).unwrap();
    assert_eq!(qmp.query_status(AMPLE).unwrap(), "internal-error");
    let refused = qmp.system_powerdown(AMPLE).unwrap_err().to_string();
    assert_eq!(refused, "QEMU refused: no\\x1b such button");
    qmp.quit_as("castra-end".into(), AMPLE).unwrap();
    end.join().unwrap();
}

#[test]
fn what_is_not_qmp_is_said_so() {
    let endless: &'static str = Box::leak("x".repeat(MAX_LINE + 8192).into_boxed_str());
    for first in ["SSH-2.0-OpenSSH\r\n", "{\"return\": {}}\r\n", "{\"a\"\n", endless] {
        let scratch = Scratch::new("qmp-not");
        let end = partner(scratch.dir(), first, |_| String::new());
        let error = Qmp::connect(scratch.dir(), AMPLE).unwrap_err();
        assert!(matches!(error, QmpError::NotQmp(_)), "{error}");
        let _ = end.join();
    }
}

#[test]
fn every_wait_has_a_deadline() {
    let scratch = Scratch::new("qmp-mute");
    let end = partner(scratch.dir(), "", |_| String::new());
    let error = Qmp::connect(scratch.dir(), SOON).unwrap_err();
    assert!(
        matches!(
            error,
            QmpError::TimedOut {
                waiting_for: "greeting"
            }
        ),
        "{error}"
    );
    end.join().unwrap();

    // A partner that talks for ever without answering.
    let scratch = Scratch::new("qmp-chatty");
    let end = partner(scratch.dir(), GREETING, |_| {
        "{\"event\": \"RTC_CHANGE\"}\r\n".into()
    });
    let error = Qmp::connect(scratch.dir(), SOON).unwrap_err();
    assert!(
        matches!(
            error,
            QmpError::TimedOut {
                waiting_for: "answer"
            }
        ),
        "{error}"
    );
    end.join().unwrap();
}

#[test]
fn a_missing_socket_is_a_qemu_that_is_gone() {
    let scratch = Scratch::new("qmp-none");
    for dir in [scratch.dir().to_owned(), scratch.path("nowhere")] {
        let error = Qmp::connect(&dir, AMPLE).unwrap_err();
        assert!(matches!(error, QmpError::Gone(_)), "{error}");
    }
}

#[test]
fn a_deep_directory_is_no_obstacle() {
    let scratch = Scratch::new("qmp-deep");
    let deep = (0..6).fold(scratch.dir().to_owned(), |dir, _| dir.join("d".repeat(60)));
    std::fs::create_dir_all(&deep).unwrap();
    assert!(deep.as_os_str().len() > 300);
    // Bound by a short name too: the address is limited, not the file's path.
    let directory = File::open(&deep).unwrap();
    let listener = UnixListener::bind(host::short_path(&directory, vm_file::QMP_SOCK)).unwrap();
    let end = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(GREETING.as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        let asked: Value = serde_json::from_str(&line).unwrap();
        (&stream).write_all(ok(&asked, "{}").as_bytes()).unwrap();
    });
    Qmp::connect(&deep, AMPLE).unwrap();
    end.join().unwrap();
}
