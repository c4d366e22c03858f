//! The broker as a process of its own: what `castra broker` does before and after it serves.
//!
//! Here: leaving the starter's session, the announcement to the starter, signals. Not here: the
//! starter's side (`broker::launcher`), the broker itself (`broker::serve`).
//!
//! A starter gives the broker one end of a socket pair as its stdin and stderr. The broker writes
//! one JSON line, `{"ready":{…}}` or `{"failed":{…}}`, and closes the socket. So the starter
//! neither polls nor guesses, and sees at once when the broker dies before it is ready.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::core::cancel::Cancel;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::lines::journal::{Journal, Rotation};
use crate::core::threads::{is_out_of_resources, no_thread_failure};
use crate::core::time::wall_ms;

use super::attempts::log_prefix;
use super::serve::{BrokerOptions, Ready, run_announced};
use super::signals::Signals;

/// The one line that a starting broker sends to its starter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Announcement {
    /// It listens.
    Ready(Ready),
    /// It can't start.
    Failed(Failure),
}

/// Runs the broker in a process of its own: leaves the starter's session, stops in order on
/// SIGTERM, SIGINT and SIGHUP, and tells the starter how the start went. Call it from the main
/// thread before any other thread is started.
pub fn run_process(options: BrokerOptions) -> Result<()> {
    // Fails for the leader of a process group, for example when a user runs it in a shell: then it
    // stays in that session.
    let _ = nix::unistd::setsid();
    let stop = Cancel::new();
    let mut starter = starter();
    let log = options.state.broker_log();
    let rotation = options.bus.rotation;
    let unwanted = stop.clone();
    let outcome = Signals::watch(stop.clone())
        .map_err(|error| match is_out_of_resources(&error) {
            true => no_thread_failure("broker", &error),
            false => Failure::new(Exit::Internal, "can't wait for signals").because(error),
        })
        .and_then(|_signals| {
            run_announced(options, stop, |ready| {
                if let Some(starter) = starter.take() {
                    // The starter was killed before the broker listened, so perhaps nobody knows of
                    // this broker.
                    if send_announcement(&starter, &Announcement::Ready(ready.clone())).is_err() {
                        unwanted.request();
                    }
                    log_panics(log, rotation);
                    release_starter();
                }
            })
        });
    if let (Err(failure), Some(starter)) = (&outcome, &starter) {
        // A starter that has gone away needs no answer.
        let _ = send_announcement(starter, &Announcement::Failed(failure.clone()));
    }
    outcome
}

/// The starter's socket, which is stdin; `None` if stdin is anything else.
fn starter() -> Option<File> {
    let stdin = File::from(io::stdin().as_fd().try_clone_to_owned().ok()?);
    stdin
        .metadata()
        .is_ok_and(|meta| meta.file_type().is_socket())
        .then_some(stdin)
}

fn send_announcement(mut starter: &File, announcement: &Announcement) -> io::Result<()> {
    let mut line = serde_json::to_string(announcement).expect("announcements are plain data");
    line.push('\n');
    starter.write_all(line.as_bytes())
}

/// Logs panics from now on, because nobody reads stderr any more.
fn log_panics(log: PathBuf, rotation: Rotation) {
    std::panic::set_hook(Box::new(move |fault| {
        let text = format!("internal error: {fault}").replace('\n', " ");
        let line = format!("{} {text}", log_prefix(wall_ms(), "ERROR"));
        // Only if its folder exists: nothing that was removed is made again.
        let is_there = log.parent().is_some_and(Path::is_dir);
        if let Some(Ok(mut journal)) = is_there.then(|| Journal::open(&log, rotation)) {
            let _ = journal.append(&line);
        }
    }));
}

/// Closes this end of the starter's socket, so that the starter doesn't wait for the broker's end.
fn release_starter() {
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stderr(&null);
    }
    // A file system that holds a process's working directory can't be unmounted.
    let _ = std::env::set_current_dir("/");
}
