//! How a launch ended, read from what QEMU and the guest left behind.
//!
//! Here: the ends of `qmp.log` and `serial.log` and what they say (docs/STATUS.md). Not here: whether
//! the VM has ended at all, or whether `down` asked for it (`core::status`).

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::core::escape::escape_line;
use crate::core::events::endings::LaunchEnding;
use crate::core::host;
use crate::core::reporter::wall_clock;
use crate::core::root::paths::{VmPaths, vm_file};
use crate::core::time::{LAST_MS, of_unix_ms};

/// How many bytes of the end of `qmp.log` are read. Every message is far shorter, and no log is
/// longer before QMP was first answered.
const QMP_TAIL: u64 = 16 * 1024;

/// How many bytes of the end of the console are searched for a panic, whose trace takes some 4 KiB.
const CONSOLE_TAIL: u64 = 16 * 1024;

/// How many bytes of the end of `qemu.log` are read for its last line.
const QEMU_TAIL: u64 = 4096;

/// Longest excerpt of the console or of `qemu.log`, bytes.
const LAST_WORDS: usize = 300;

/// The state of a VM's process. The first that matches counts (docs/STATUS.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// It is being launched: QEMU hasn't answered yet.
    Starting,
    /// `castra down` or `restart` has asked it to stop, and it hasn't yet.
    Stopping,
    /// QEMU runs.
    Running,
    /// QEMU runs, but executes nothing of the guest.
    Paused,
    /// It never ran, or it ended in order.
    Stopped,
    /// It ended unexpectedly.
    Crashed,
    /// castra didn't launch it, but it shakes hands with the broker: a user started it.
    External,
}

impl From<LaunchEnding> for VmState {
    fn from(ending: LaunchEnding) -> VmState {
        match ending {
            LaunchEnding::Stopped => VmState::Stopped,
            LaunchEnding::Crashed => VmState::Crashed,
        }
    }
}

impl VmState {
    /// The word in JSON and table.
    pub fn as_str(self) -> &'static str {
        match self {
            VmState::Starting => "starting",
            VmState::Stopping => "stopping",
            VmState::Running => "running",
            VmState::Paused => "paused",
            VmState::Stopped => "stopped",
            VmState::Crashed => "crashed",
            VmState::External => "external",
        }
    }
}

/// How a launch ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedStatus {
    /// The reason, as QEMU calls it (`guest-shutdown`, `guest-panic`, …), `host-reboot`, or
    /// `unknown`.
    pub reason: String,
    /// Wall clock, RFC 3339. Null: the time is unknown.
    pub at: Option<String>,
    /// The panic on its console, else its last line, escaped. Null: it wrote nothing.
    pub last_words: Option<String>,
    /// The last line QEMU wrote about itself, escaped. Null: it wrote none, or the VM didn't crash.
    #[serde(default)]
    pub qemu_words: Option<String>,
    /// What to do about it. Null: it didn't crash.
    #[serde(default)]
    pub remediation: Option<String>,
}

/// A reason that nobody gave.
const UNKNOWN: &str = "unknown";
/// The reason where a launch ended with its host's boot.
pub const HOST_REBOOT: &str = "host-reboot";

impl EndedStatus {
    /// Of a launch that left nothing to read.
    pub fn unknown() -> EndedStatus {
        EndedStatus {
            reason: UNKNOWN.to_owned(),
            ..EndedStatus::default()
        }
    }
}

/// How a launch ended, by what it left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// In order or not.
    pub outcome: LaunchEnding,
    /// Why, when, and the last words.
    pub ended: EndedStatus,
}

/// What every Linux kernel prints when it gives up.
pub const PANIC: &str = "Kernel panic - not syncing";

/// The prefix of the id of the QMP command `quit` by which castra ends a guest; the reason follows
/// it. QEMU repeats the id in `qmp.log`.
const ENDED: &str = "castra-ended-";

/// Why castra ends a guest on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// Its kernel has panicked, as its console shows.
    Panic,
    /// It resets again and again.
    BootLoop,
}

impl EndReason {
    /// The reason in status and events.
    pub fn as_str(self) -> &'static str {
        match self {
            EndReason::Panic => "guest-panic",
            EndReason::BootLoop => "boot-loop",
        }
    }

    /// The id of the `quit` command that ends a guest for this reason.
    pub fn quit_id(self) -> String {
        format!("{ENDED}{}", self.as_str())
    }

    /// The reason in the id of an answer in `qmp.log`, if castra ended the guest.
    pub fn of_answer(message: &Value) -> Option<EndReason> {
        message.get("return")?;
        let word = message["id"].as_str()?.strip_prefix(ENDED)?;
        [EndReason::Panic, EndReason::BootLoop]
            .into_iter()
            .find(|end_reason| end_reason.as_str() == word)
    }
}

/// Reads how the last launch of a VM ended. `None`: QMP was never answered, so QEMU hardly started.
pub fn read(paths: &VmPaths) -> Option<Ending> {
    let qmp = host::tail_of(&paths.file(vm_file::QMP_LOG), QMP_TAIL);
    let console = host::tail_of(&paths.file(vm_file::SERIAL_LOG), CONSOLE_TAIL);
    let mut ending = parse(&qmp, &console)?;
    if ending.outcome == LaunchEnding::Crashed {
        let vm = paths.dir().file_name().unwrap_or_default().to_string_lossy();
        let said = host::tail_of(&paths.file(vm_file::QEMU_LOG), QEMU_TAIL);
        ending.ended.qemu_words = last_line(&said);
        ending.ended.remediation = Some(remediation(&ending.ended.reason, &vm));
    }
    Some(ending)
}

/// What to do about a crash, by QEMU's reason.
fn remediation(reason: &str, vm: &str) -> String {
    let look = match reason {
        "guest-panic" | "guest-reset" => format!("castra logs {vm} --source serial shows the panic"),
        "boot-loop" => {
            format!("it was reset again and again: castra logs {vm} --source serial shows its boots")
        }
        "host-signal" => "somebody ended its QEMU by a signal".to_owned(),
        UNKNOWN => {
            "its QEMU was killed or broke down: `dmesg` tells whether the kernel ended it for lack of \
                      memory"
                .to_owned()
        }
        _ => format!("castra logs {vm} --source qemu shows what QEMU said"),
    };
    format!("{look}; castra restart {vm} starts it again with its disk")
}

/// Parses the ends of the two logs.
fn parse(qmp: &str, console: &str) -> Option<Ending> {
    let messages: Vec<Value> = qmp
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    // An event doesn't show that QEMU answered: QEMU 7.2 logs the first RESUME even before its
    // greeting.
    let answered = messages.iter().any(|message| message.get("return").is_some());
    let is_cut = qmp.len() as u64 >= QMP_TAIL;
    if !answered && !is_cut {
        return None;
    }
    let shutdown = messages
        .iter()
        .rev()
        .find(|message| message["event"] == "SHUTDOWN");
    // castra's own reason for the `quit` counts more than QEMU's, which is `host-qmp-quit`.
    let end_reason = messages
        .iter()
        .find_map(EndReason::of_answer)
        .map(EndReason::as_str);
    let reason = end_reason.or(shutdown.and_then(|message| message["data"]["reason"].as_str()));
    let panicked = console.contains(PANIC);
    let outcome = match reason {
        Some("guest-shutdown" | "host-qmp-quit") => LaunchEnding::Stopped,
        // With `-no-reboot` among its `qemu_args` a panic under `panic=-1` looks like a reboot.
        Some("guest-reset") if !panicked => LaunchEnding::Stopped,
        _ => LaunchEnding::Crashed,
    };
    Some(Ending {
        outcome,
        ended: EndedStatus {
            reason: reason.unwrap_or(UNKNOWN).to_owned(),
            at: shutdown.and_then(qmp_time).map(|ms| wall_clock(of_unix_ms(ms))),
            last_words: last_words(console),
            ..EndedStatus::default()
        },
    })
}

/// The time that QEMU gives for a message, ms since 1970.
pub fn qmp_time(message: &Value) -> Option<u64> {
    let stamp = &message["timestamp"];
    let ms = stamp["seconds"].as_u64()?.checked_mul(1000)?;
    let micros = stamp["microseconds"].as_u64().unwrap_or(0).min(999_999);
    Some(ms.saturating_add(micros / 1000)).filter(|ms| *ms <= LAST_MS)
}

/// The line of the panic if there is one, else the last line that isn't empty.
fn last_words(console: &str) -> Option<String> {
    let panic = console.lines().rfind(|line| line.contains(PANIC));
    last_line(panic.unwrap_or(console))
}

/// The last line that isn't empty, escaped.
fn last_line(text: &str) -> Option<String> {
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty())?;
    Some(escape_line(line, LAST_WORDS))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n";
    const ANSWER: &str = "{\"return\": {}}\r\n";

    fn shutdown(reason: &str) -> String {
        format!(
            "{{\"timestamp\": {{\"seconds\": 1795255200, \"microseconds\": 123456}}, \"event\": \"SHUTDOWN\", \
             \"data\": {{\"guest\": true, \"reason\": \"{reason}\"}}}}\r\n"
        )
    }

    #[test]
    fn the_last_shutdown_decides() {
        let panic = "[    1.0] Kernel panic - not syncing: VFS\n[    1.1] ---[ end Kernel panic ]---\n";
        for (reason, console, outcome) in [
            (Some("guest-shutdown"), "", LaunchEnding::Stopped),
            (Some("host-qmp-quit"), "", LaunchEnding::Stopped),
            (Some("guest-reset"), "Restarting system\n", LaunchEnding::Stopped),
            (Some("guest-reset"), panic, LaunchEnding::Crashed),
            (Some("guest-panic"), panic, LaunchEnding::Crashed),
            (Some("host-error"), "", LaunchEnding::Crashed),
            (Some("host-signal"), "", LaunchEnding::Crashed),
            (None, "login: ", LaunchEnding::Crashed),
        ] {
            let event = reason.map(shutdown).unwrap_or_default();
            let ending = parse(&format!("{GREETING}{ANSWER}{event}"), console).unwrap();
            assert_eq!(ending.outcome, outcome, "{reason:?} {console:?}");
            assert_eq!(ending.ended.reason, reason.unwrap_or("unknown"));
            let at = reason.map(|_| "2026-11-21T10:00:00.123Z");
            assert_eq!(ending.ended.at.as_deref(), at);
        }
        let twice = format!(
            "{ANSWER}{}{}",
            shutdown("guest-reset"),
            shutdown("guest-shutdown")
        );
        assert_eq!(parse(&twice, "").unwrap().ended.reason, "guest-shutdown");
    }

    #[test]
    fn a_verdict_of_castras_goes_before_qemus_word() {
        for reason in ["boot-loop", "guest-panic"] {
            let answer = format!("{{\"return\": {{}}, \"id\": \"castra-ended-{reason}\"}}\r\n");
            let ending = parse(&format!("{ANSWER}{answer}{}", shutdown("host-qmp-quit")), "").unwrap();
            assert_eq!(
                (ending.outcome, ending.ended.reason.as_str()),
                (LaunchEnding::Crashed, reason)
            );
            assert!(remediation(reason, "web").contains("castra restart web"));
        }
    }

    #[test]
    fn without_an_answer_it_never_began() {
        let resumed = format!("{{\"timestamp\": {{}}, \"event\": \"RESUME\"}}\r\n{GREETING}");
        for qmp in ["", GREETING, &resumed, "no JSON at all\n"] {
            assert_eq!(parse(qmp, "Kernel panic - not syncing"), None);
        }
        // The answer itself may lie before the part that is read.
        let events = shutdown("guest-reset").repeat(200) + &shutdown("host-error");
        let tail = &events[events.len() - usize::try_from(QMP_TAIL).unwrap()..];
        assert_eq!(parse(tail, "").unwrap().ended.reason, "host-error");
    }

    #[test]
    fn a_time_that_is_none_is_left_out() {
        for stamp in [
            "{}",
            "{\"seconds\": 18446744073709551615, \"microseconds\": 0}",
            "7",
        ] {
            let event = format!("{{\"event\": \"SHUTDOWN\", \"timestamp\": {stamp}, \"data\": 1}}");
            let ended = parse(&format!("{ANSWER}{event}"), "").unwrap().ended;
            assert_eq!((ended.at, ended.reason.as_str()), (None, "unknown"), "{stamp}");
        }
    }

    #[test]
    fn a_crash_has_qemus_words_and_a_remedy() {
        let scratch = crate::core::scratch::Scratch::new("ending");
        let paths = VmPaths::at(scratch.path("web"));
        std::fs::create_dir_all(paths.dir()).unwrap();
        let write = |name: &str, text: &str| std::fs::write(paths.file(name), text).unwrap();
        write(
            vm_file::QEMU_LOG,
            "warning: x\nqemu: terminating on signal 15 from pid 7 (kill)\n\n",
        );
        for (reason, words) in [
            ("host-signal", "by a signal"),
            ("host-error", "castra logs web --source qemu"),
            ("guest-panic", "castra logs web --source serial"),
        ] {
            write(vm_file::QMP_LOG, &format!("{ANSWER}{}", shutdown(reason)));
            let ended = read(&paths).unwrap().ended;
            let remediation = ended.remediation.unwrap();
            assert!(
                remediation.contains(words) && remediation.contains("castra restart web"),
                "{remediation}"
            );
            let said = ended.qemu_words.unwrap();
            assert_eq!(said, "qemu: terminating on signal 15 from pid 7 (kill)");
        }
        write(vm_file::QMP_LOG, ANSWER);
        let ended = read(&paths).unwrap().ended;
        assert!(ended.remediation.unwrap().contains("dmesg"));
        write(
            vm_file::QMP_LOG,
            &format!("{ANSWER}{}", shutdown("guest-shutdown")),
        );
        let ended = read(&paths).unwrap().ended;
        assert_eq!((ended.remediation, ended.qemu_words), (None, None));
    }

    #[test]
    fn last_words_are_the_panic_or_the_last_line() {
        assert_eq!(last_words(""), None);
        assert_eq!(last_words("\r\n \r\n"), None);
        assert_eq!(last_words("one\r\ntwo\r\n\r\n").as_deref(), Some("two"));
        let panic = "[ 1.0] Kernel panic - not syncing: Attempted to kill init!\n[ 1.1] CPU: 0\n";
        assert!(last_words(panic).unwrap().contains("Attempted to kill init!"));
        assert_eq!(last_words(&"x".repeat(1000)).unwrap().len(), LAST_WORDS);
        assert_eq!(last_words("\u{1b}[2Jgone\n").as_deref(), Some("\\x1b[2Jgone"));
    }
}
