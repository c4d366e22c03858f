//! `transfer`: script and payload into the guest, in one stream through the master.
//!
//! Here: sending and progress. Not here: the stream's format (`bootstrap::archive`), or the guest's side
//! (`bootstrap::guest_scripts::unpack`).

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::core::bootstrap::archive::{self, PAYLOAD_NAME};
use crate::core::bootstrap::context::Context;
use crate::core::bootstrap::guest_scripts;
use crate::core::bootstrap::ssh::channel::{self, Exec, ExecError, Limit};
use crate::core::bootstrap::ssh::master::Master;
use crate::core::bootstrap::step_failure::StepFailure;
use crate::core::bootstrap::watch::Watch;
use crate::core::escape::escape_line;
use crate::core::events::{Event, Severity};
use crate::core::human;
use crate::core::id::RunId;
use crate::core::process::Tail;

/// How often a long transfer reports its progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// A shorter transfer reports no progress.
const QUIET: Duration = Duration::from_secs(2);

/// The last lines of GNU tar, which follow the line with the reason.
const GIVING_UP: [&str; 2] = [
    "Exiting with failure status due to previous errors",
    "Error is not recoverable: exiting now",
];

/// Counts the bytes that have gone into the pipe.
struct Counted<'a> {
    inner: &'a mut dyn Write,
    sent: &'a AtomicU64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.sent.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Sends script and payload; returns what to report.
pub(super) fn transfer(
    context: &Context<'_, '_>,
    watch: &Watch<'_>,
    master: &mut Master,
    run: &RunId,
    expected: Option<u64>,
) -> Result<String, StepFailure> {
    let bootstrap = &context.vm.bootstrap;
    let (script, payload) = (bootstrap.script.as_deref(), bootstrap.payload.as_deref());
    let name = script.and_then(|script| script.file_name());
    let sent = AtomicU64::new(0);
    let top = guest_scripts::incoming(run);
    let counter = &sent;
    let exec = Exec {
        command: guest_scripts::unpack(&bootstrap.remote_dir, run, name, payload.is_some()),
        feed: Box::new(move |stdin| {
            let mut counted = Counted {
                inner: stdin,
                sent: counter,
            };
            archive::write(&mut counted, &top, script, payload)
        }),
        hold_stdin: false,
        limit: Limit::Idle(bootstrap.step_timeout, &sent),
        begin_mark: None,
        end_mark: None,
    };
    let began = Instant::now();
    let mut said = began;
    let mut tail = Tail::default();
    let mut tick = || {
        if began.elapsed() >= QUIET && said.elapsed() >= PROGRESS_INTERVAL {
            said = Instant::now();
            emit_progress(context, sent.load(Ordering::Relaxed), expected);
        }
    };
    let code = channel::run(
        master,
        exec,
        watch,
        &mut |_, line| {
            if !GIVING_UP.iter().any(|words| line.ends_with(words)) {
                tail.push(&escape_line(line, channel::LINE_BYTES));
            }
        },
        &mut tick,
    )
    .map_err(|error| match error {
        ExecError::TimedOut(after) => StepFailure::because(format!(
            "the transfer made no progress for {} s, so castra ended it",
            after.as_secs()
        ))
        .with_tail(&tail.text())
        .with_advice(format!(
            "check whether the guest or its disk hangs: castra logs {}",
            context.vm.name
        )),
        error => StepFailure::of_exec(error, &tail.text(), "the transfer", master.target()),
    })?;
    if code != 0 {
        let failure = StepFailure::because(format!(
            "the guest could not unpack into {}",
            bootstrap.remote_dir
        ))
        .with_tail(&tail.text());
        return Err(match advice_for(&tail.text()) {
            Some(advice) => failure.with_advice(advice),
            None => failure,
        });
    }
    context.emitter.count_sent(sent.load(Ordering::Relaxed));
    Ok(format!(
        "{} of {}",
        human::bytes_to_a_tenth(sent.load(Ordering::Relaxed)),
        match (name, payload) {
            (Some(name), Some(_)) =>
                format!("{} and {PAYLOAD_NAME}", escape_line(&name.to_string_lossy(), 100)),
            (Some(name), None) => escape_line(&name.to_string_lossy(), 100),
            (None, _) => PAYLOAD_NAME.to_owned(),
        }
    ))
}

fn advice_for(complaint: &str) -> Option<&'static str> {
    if complaint.contains("No space left") {
        Some("free some space in the guest, or give it a larger `disk_size`")
    } else if complaint.contains("tar: not found") || complaint.contains("tar: command not found") {
        Some("install `tar` in the guest")
    } else {
        None
    }
}

fn emit_progress(context: &Context<'_, '_>, sent: u64, expected: Option<u64>) {
    let vm = &context.vm.name;
    let text = match expected.filter(|expected| *expected > 0) {
        Some(expected) => format!(
            "{} of {} sent ({} %)",
            human::bytes_to_a_tenth(sent.min(expected)),
            human::bytes_to_a_tenth(expected),
            (sent.saturating_mul(100) / expected).min(100)
        ),
        None => format!("{} sent", human::bytes_to_a_tenth(sent)),
    };
    let mut event = Event::message(Severity::Progress, Some(vm), text);
    if let Event::Message { source, data, .. } = &mut event {
        *source = Some("bootstrap".to_owned());
        *data = Some(serde_json::json!({ "sent_bytes": sent, "total_bytes": expected }));
    }
    context.emitter.emit(event);
}
