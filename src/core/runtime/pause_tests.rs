//! What the end of `qmp.log` says of a QEMU that lives.

use super::*;
use crate::core::scratch::Scratch;

fn event(name: &str, data: &str) -> String {
    format!(
        "{{\"timestamp\": {{\"seconds\": 1795255200, \"microseconds\": 1}}, \"event\": \"{name}\", \
         \"data\": {data}}}\r\n"
    )
}

fn status(word: &str, runs: bool) -> String {
    format!("{{\"return\": {{\"status\": \"{word}\", \"running\": {runs}}}, \"id\": \"castra-1\"}}\r\n")
}

fn full() -> String {
    event(
        "BLOCK_IO_ERROR",
        r#"{"device": "", "node-name": "disk", "reason": "No space left on device", "operation": "write", "action": "stop", "nospace": true}"#,
    )
}

#[test]
fn the_last_word_counts() {
    let (stop, resume, running) = (
        event("STOP", "{}"),
        event("RESUME", "{}"),
        status("running", true),
    );
    let broken = full()
        .replace("true", "false")
        .replace("No space left", "I/O error");
    let reported = full().replace("stop", "report");
    let panicked = event("GUEST_PANICKED", r#"{"action": "pause"}"#);
    let run_on = event("GUEST_PANICKED", r#"{"action": "run"}"#);
    for (log, reason) in [
        (String::new(), None),
        (resume.clone(), None),
        (running.clone(), None),
        (format!("{running}{}{stop}", full()), Some(("io-error", true))),
        (format!("{running}{broken}{stop}"), Some(("io-error", false))),
        (format!("{running}{reported}"), None),
        (format!("{running}{reported}{stop}"), Some(("paused", false))),
        (format!("{}{stop}{resume}", full()), None),
        (format!("{}{stop}{resume}{stop}", full()), Some(("paused", false))),
        (format!("{}{stop}{}", full(), full()), Some(("io-error", true))),
        (
            format!("{}{stop}{}", full(), status("io-error", false)),
            Some(("io-error", true)),
        ),
        (format!("{panicked}{stop}"), Some(("guest-panicked", false))),
        (format!("{run_on}{stop}"), Some(("paused", false))),
        (status("prelaunch", false), Some(("prelaunch", false))),
        (status("inmigrate", false), Some(("inmigrate", false))),
        (format!("{}{resume}", status("prelaunch", false)), None),
        (
            format!("{stop}{}", status("internal-error", false)),
            Some(("internal-error", false)),
        ),
        (format!("{stop}{}", running), None),
        (
            format!("a torn line\n{stop}{{\"event\": \"RES"),
            Some(("paused", false)),
        ),
    ] {
        let pause = parse(&log);
        let found = pause
            .as_ref()
            .map(|pause| (pause.reason.as_str(), pause.no_space));
        assert_eq!(found, reason, "{log}");
    }
    assert_eq!(parse(&stop).unwrap().at.unwrap(), "2026-11-21T10:00:00.000Z");
}

#[test]
fn only_what_nobody_asked_for_waits_for_room() {
    let vm: VmName = "web".parse().unwrap();
    for (reason, no_space, resumes, waits, next) in [
        ("io-error", true, true, true, "make room"),
        ("io-error", false, true, false, "castra up web"),
        ("paused", false, true, false, "castra up web"),
        ("internal-error", false, false, false, "castra restart web"),
        ("guest-panicked", false, false, false, "castra restart web"),
        ("prelaunch", false, false, false, "-S"),
        ("inmigrate", false, false, false, "-incoming"),
        ("something-new", false, false, false, "castra restart web"),
    ] {
        let pause = Pause {
            reason: reason.to_owned(),
            no_space,
            at: None,
        };
        assert_eq!(
            (pause.can_resume(), pause.waits_for_space()),
            (resumes, waits),
            "{reason}"
        );
        let failure = pause.failure(&vm, Some(Path::new("/d/web.qcow2")));
        assert!(failure.next.unwrap().contains(next), "{reason}");
        if reason == "io-error" {
            assert!(failure.why.unwrap().contains("/d/web.qcow2"));
        }
    }
}

#[test]
fn the_accelerators_fault_stands_in_qemus_own_log_and_a_watch_sees_changes() {
    let scratch = Scratch::new("pause");
    let paths = VmPaths::at(scratch.path("web"));
    fs::create_dir_all(paths.dir()).unwrap();
    let watch = PauseWatch::new(&paths);
    assert_eq!(watch.look(), None);
    fs::write(paths.file(vm_file::QMP_LOG), event("STOP", "{}")).unwrap();
    assert_eq!(watch.look().unwrap().reason, "paused");
    fs::write(paths.file(vm_file::QEMU_LOG), "KVM internal error. Suberror: 1\n").unwrap();
    assert_eq!(read(&paths).unwrap().reason, "internal-error");
    let resumed = event("STOP", "{}") + &event("RESUME", "{}");
    fs::write(paths.file(vm_file::QMP_LOG), resumed).unwrap();
    assert_eq!(watch.look(), None);
}
