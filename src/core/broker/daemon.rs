//! The broker as a process of its own: what `castra broker` does before and after its life.
//!
//! Here: leaving the starter's session, the word to whoever started it, signals. Not here: the
//! starter's side (`broker::launcher`), the broker itself (`broker::serve`).
//!
//! A starter gives the broker one end of a socket pair as its stdin and stderr. On it comes one
//! JSON line: `{"ready":{…}}` or `{"failed":{…}}`; then the broker lets go of it. So the starter
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
use crate::core::threads::{is_no_room, none_to_be_had};
use crate::core::time::wall_ms;

use super::attempts::line_head;
use super::serve::{BrokerOptions, Ready, run_announced};
use super::signals::Signals;

/// The one line a starting broker says to its starter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Announcement {
    /// It listens.
    Ready(Ready),
    /// It can't.
    Failed(Failure),
}

/// Runs the broker of a process that was started for it: leaves the starter's session, stops in
/// order on SIGTERM, SIGINT and SIGHUP, and tells the starter how the start went. Call it from
/// the main thread before any other is started.
pub fn run_process(options: BrokerOptions) -> Result<()> {
    // Fails for the leader of a process group, as when somebody runs it by hand in a shell:
    // then it stays where it can be seen.
    let _ = nix::unistd::setsid();
    let stop = Cancel::new();
    let mut starter = starter();
    let log = options.state.broker_log();
    let rotation = options.bus.rotation;
    let unwanted = stop.clone();
    let outcome = Signals::watch(stop.clone())
        .map_err(|error| match is_no_room(&error) {
            true => none_to_be_had("broker", &error),
            false => Failure::new(Exit::Internal, "can't wait for signals").because(error),
        })
        .and_then(|_signals| {
            run_announced(options, stop, |ready| {
                if let Some(starter) = starter.take() {
                    // Whoever wanted it was killed before it listened: nobody may know of it.
                    if say(&starter, &Announcement::Ready(ready.clone())).is_err() {
                        unwanted.request();
                    }
                    log_panics(log, rotation);
                    let_go();
                }
            })
        });
    if let (Err(failure), Some(starter)) = (&outcome, &starter) {
        // A starter that has gone away needs no answer.
        let _ = say(starter, &Announcement::Failed(failure.clone()));
    }
    outcome
}

/// The socket a starter gave us as stdin; `None` if stdin is anything else.
fn starter() -> Option<File> {
    let stdin = File::from(io::stdin().as_fd().try_clone_to_owned().ok()?);
    stdin
        .metadata()
        .is_ok_and(|meta| meta.file_type().is_socket())
        .then_some(stdin)
}

fn say(mut starter: &File, announcement: &Announcement) -> io::Result<()> {
    let mut line = serde_json::to_string(announcement).expect("announcements are plain data");
    line.push('\n');
    starter.write_all(line.as_bytes())
}

/// From now on nobody reads stderr: a fault of ours must be found in the log.
fn log_panics(log: PathBuf, rotation: Rotation) {
    std::panic::set_hook(Box::new(move |fault| {
        let text = format!("internal error: {fault}").replace('\n', " ");
        let line = format!("{} {text}", line_head(wall_ms(), "ERROR"));
        // Only where its folder is: nothing that was removed is made anew.
        let is_there = log.parent().is_some_and(Path::is_dir);
        if let Some(Ok(mut journal)) = is_there.then(|| Journal::open(&log, rotation)) {
            let _ = journal.append(&line);
        }
    }));
}

/// Closes our ends of the starter's socket: it must not wait for a broker that lives on.
fn let_go() {
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stderr(&null);
    }
    // A directory that is somebody's working directory can't be unmounted.
    let _ = std::env::set_current_dir("/");
}
