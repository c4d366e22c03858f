//! Vizier's three steps: the in-guest service is installed, enabled, and heard (docs/BOOTSTRAP.md).
//!
//! Here: Vizier's expected state before a bootstrap, what the guest reports, what castra sends, and the wait
//! for Vizier's hello. Not here: the shell texts (`bootstrap::vizier_remote`), the service
//! (`scripts/guest/castra-vizier`), when the steps run (`bootstrap::pipeline`), the broker's lines in the
//! service's log.
//!
//! A guest that has this Vizier costs no command: the master's first command reports what runs there.
//! Otherwise one command installs and enables it.

use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::core::bootstrap::context::Context;
use crate::core::bootstrap::ssh::channel::{self, Exec, Limit, Stream};
use crate::core::bootstrap::ssh::master::Master;
use crate::core::bootstrap::step_failure::StepFailure;
use crate::core::bootstrap::vizier_remote::{self as remote, Parcel};
use crate::core::bootstrap::watch::Watch;
use crate::core::broker::protocol::heartbeat_secs;
use crate::core::cancel::POLL_INTERVAL;
use crate::core::config::{Config, VmConfig};
use crate::core::escape::escape_line;
use crate::core::events::{Event, Severity, VizierPlanStatus};
use crate::core::host;
use crate::core::id::{LaunchId, RunId};
use crate::core::images::embedded::{CASTRA_BUS, CASTRA_HELLO, CASTRA_VIZIER};
use crate::core::logs;
use crate::core::process::Tail;
use crate::core::root::alive::may_live;
use crate::core::root::freshness::{Now, OfLaunch, is_fresh, is_of_launch};
use crate::core::root::handshake_record::{RecordRead, read_record};
use crate::core::root::paths::vm_file;
use crate::core::root::records::{self, BrokerRecord, RunRecord};

/// The capability in Vizier's hello.
const CAPABILITY: &str = "vizier-v1";
/// How long the guest may take to show its log at the end.
const LOG_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest text of a line in a detail.
const DETAIL_BYTES: usize = 400;

/// The scripts that make up Vizier, by name.
const SCRIPTS: [(&str, &str); 3] = [
    ("castra-hello", CASTRA_HELLO),
    ("castra-bus", CASTRA_BUS),
    ("castra-vizier", CASTRA_VIZIER),
];

/// Twelve hex digits that change when any of the scripts does, or how they are started.
static VERSION: LazyLock<String> = LazyLock::new(|| {
    let parcel = Parcel {
        scripts: &SCRIPTS,
        stamp: "",
        settings: &[],
        mark: "mark",
    };
    digest([remote::install(&parcel).as_bytes()])
});

/// Twelve hex digits of a hash over these parts. Each part is hashed with its length, so that no two lists
/// give the same bytes.
fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_be_bytes());
        hasher.update(part);
    }
    let mut text = host::hex(&hasher.finalize());
    text.truncate(12);
    text
}

/// `vms/<vm>/vizier.json`: what was last enabled in a guest.
#[derive(Debug, Serialize, Deserialize)]
struct Enabled {
    launch_id: LaunchId,
    version: String,
}

/// Vizier in the plan: its expected state, and advice if it isn't healthy. Only the host's files are read.
pub(super) fn expected(vm: &VmConfig, config: &Config) -> (VizierPlanStatus, Option<String>) {
    if !config.vizier_enabled {
        let advice =
            "set `enabled = true` under [vizier] to have guests report their load, memory and uptime";
        return (VizierPlanStatus::Disabled, Some(advice.to_owned()));
    }
    let paths = config.state.vm(&vm.name);
    let enabled: Option<Enabled> = records::load(&paths.file(vm_file::VIZIER)).ok().flatten();
    let run: Option<RunRecord> = records::load(&paths.run()).ok().flatten();
    let runs = may_live(&paths);
    let this_launch =
        |enabled: &Enabled| runs && run.as_ref().is_some_and(|run| run.launch_id == enabled.launch_id);
    // A Vizier on a kept disk is still there after the next launch; the default guest lives in memory.
    let stays = vm.persist && !vm.is_default_guest();
    let status = match &enabled {
        Some(enabled) if (stays || this_launch(enabled)) && enabled.version == *VERSION => {
            VizierPlanStatus::Current
        }
        Some(enabled) if stays || this_launch(enabled) => VizierPlanStatus::Update,
        // A kept disk may have a Vizier that another castra installed.
        _ if stays || (runs && run.is_none()) => VizierPlanStatus::Unknown,
        _ => VizierPlanStatus::Install,
    };
    let log = config.state.vizier_log(&vm.name);
    let advice = format!(
        "if a Vizier step fails, read {} and `castra logs {}`; `enabled = false` under [vizier] turns Vizier off",
        log.display(),
        vm.name
    );
    (status, Some(advice))
}

/// The result of bringing the guest's Vizier up to date.
pub(super) struct Installed {
    /// What `vizier-install` reports.
    pub detail: String,
    /// How long that part took.
    pub took: Duration,
    /// The result of `vizier-enable`, and how long it took.
    pub enabled: Result<String, StepFailure>,
    pub enabling: Duration,
    /// CLOCK_BOOTTIME before the guest was told to start the service: Vizier's hello may come before the
    /// guest's answer. `None`: the right Vizier ran already.
    started_ms: Option<u64>,
}

/// What the guest has, as it reported when the master was opened.
struct Answer<'a> {
    has: Option<&'a str>,
    runs: Option<(&'a str, &'a str)>,
}

impl<'a> Answer<'a> {
    fn of(lines: &'a [String]) -> Answer<'a> {
        let behind = |word: &str| {
            let found = lines.iter().find_map(|line| line.strip_prefix(word));
            found.and_then(|rest| rest.strip_prefix(' '))
        };
        Answer {
            has: behind(remote::HAS).and_then(|rest| rest.split(' ').next()),
            runs: behind(remote::RUNS).and_then(|rest| rest.rsplit_once(' ')),
        }
    }
}

/// The VM's token; empty where it was given none.
fn read_token(path: &Path) -> Result<String, StepFailure> {
    match host::read_state_file(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if host::is_absent_error(&error) => Ok(String::new()),
        Err(error) => Err(StepFailure::because(format!(
            "can't read {}: {error}",
            path.display()
        ))),
    }
}

/// Brings the guest's Vizier up to date and starts it, unless the right one runs already.
pub(super) fn install(
    context: &Context<'_, '_>,
    watch: &Watch<'_>,
    master: &mut Master,
    broker: &str,
) -> Result<Installed, StepFailure> {
    let began = Instant::now();
    let vm = &context.vm.name;
    let config = context.config;
    let token = read_token(&config.state.vm(vm).seed().join("token"))?;
    let token = token.trim();
    let heartbeat = heartbeat_secs(config.broker.freshness, config.bus.session_idle).to_string();
    let mut settings = vec![
        ("vm", vm.as_str()),
        ("broker", broker),
        ("heartbeat_secs", &heartbeat),
    ];
    if !token.is_empty() {
        settings.push(("token", token));
    }
    let parts = settings
        .iter()
        .flat_map(|(key, value)| [key.as_bytes(), value.as_bytes()]);
    let stamp = format!("{} {}", *VERSION, digest(parts));
    let lines = master.greeting_lines().to_vec();
    let answer = Answer::of(&lines);
    if let Some((running, process)) = answer.runs
        && running == stamp
    {
        save_enabled(context);
        return Ok(Installed {
            detail: format!("current (version {})", *VERSION),
            took: began.elapsed(),
            enabled: Ok(format!("runs already, as process {}", escape_line(process, 20))),
            enabling: Duration::ZERO,
            started_ms: None,
        });
    }
    let has_it = answer.has == Some(VERSION.as_str());
    let random = host::random_hex(8)
        .map_err(|error| StepFailure::because(format!("can't read random bytes: {error}")))?;
    let mark = format!("castra-vizier-{random}");
    let text = remote::install(&Parcel {
        scripts: if has_it { &[] } else { &SCRIPTS },
        stamp: &stamp,
        settings: &settings,
        mark: &mark,
    });
    let exec = Exec {
        command: remote::install_command(),
        feed: Box::new(move |stdin| stdin.write_all(text.as_bytes())),
        hold_stdin: false,
        limit: Limit::Total(context.vm.bootstrap.step_timeout),
        begin_mark: None,
        end_mark: Some(mark.clone()),
    };
    let mut told = InstallOutput::default();
    let mut tail = Tail::default();
    let started_ms = host::boottime_ms();
    let code = channel::run(
        master,
        exec,
        watch,
        &mut |stream, line| match line.strip_prefix(&mark).filter(|_| stream == Stream::Out) {
            Some(words) => told.line(words.trim_start()),
            None => tail.push(&escape_line(line, DETAIL_BYTES)),
        },
        &mut || (),
    )
    .map_err(|error| StepFailure::of_exec(error, &tail.text(), "the installation", master.target()))?;
    let failed = told.failed.map(|why| {
        StepFailure::because(why)
            .with_tail(&tail.text())
            .with_advice("fix that in the guest, or set `enabled = false` under [vizier]")
    });
    let Some((place, installed)) = told.installed else {
        return Err(failed.unwrap_or_else(|| {
            StepFailure::because(format!("the installation ended with exit status {code}"))
                .with_tail(&tail.text())
        }));
    };
    let how = if has_it { "version" } else { "copied version" };
    let enabled = match (told.enabled, failed) {
        (Some(init), None) => Ok(format!("started under {init}")),
        (_, Some(failure)) => Err(failure),
        (None, None) => Err(StepFailure::because(format!(
            "starting castra-vizier failed with exit status {code}"
        ))
        .with_tail(&tail.text())),
    };
    if enabled.is_ok() {
        save_enabled(context);
    }
    Ok(Installed {
        detail: format!("{how} {} to {place}", *VERSION),
        took: installed.duration_since(began),
        enabled,
        enabling: installed.elapsed(),
        started_ms: Some(started_ms),
    })
}

/// What the installation has reported so far.
#[derive(Default)]
struct InstallOutput {
    installed: Option<(String, Instant)>,
    enabled: Option<String>,
    failed: Option<String>,
}

impl InstallOutput {
    fn line(&mut self, words: &str) {
        if let Some(place) = words.strip_prefix("installed ") {
            let place = escape_line(place, DETAIL_BYTES);
            self.installed = Some((place, Instant::now()));
        } else if let Some(how) = words.strip_prefix("enabled ") {
            self.enabled = Some(escape_line(how, DETAIL_BYTES));
        } else if let Some(why) = words.strip_prefix("failed ") {
            self.failed = Some(escape_line(why, DETAIL_BYTES));
        }
    }
}

/// Saves what is enabled, for the next plan. Without this file a plan says `unknown`, so a failure is
/// ignored.
fn save_enabled(context: &Context<'_, '_>) {
    let path = context.config.state.vm(&context.vm.name).file(vm_file::VIZIER);
    let enabled = Enabled {
        launch_id: context.launch.launch_id.clone(),
        version: VERSION.clone(),
    };
    let _ = records::save(&path, &enabled);
}

/// Waits for Vizier's hello. For a Vizier that ran already, an open session or a proof of life within the
/// freshness window is enough.
pub(super) fn await_hello(
    context: &Context<'_, '_>,
    watch: &Watch<'_>,
    installed: &Installed,
) -> Result<String, StepFailure> {
    let vm = &context.vm.name;
    let state = &context.config.state;
    let path = state.handshake(vm);
    let limit = context.vm.bootstrap.step_timeout;
    let since = |ms| OfLaunch {
        vm,
        since_ms: Some(ms),
    };
    let mut run = None;
    let mut look = || {
        let RecordRead::Record(record) = read_record(&path) else {
            return None;
        };
        let is_heard = match installed.started_ms {
            _ if !record.capabilities.iter().any(|word| word == CAPABILITY) => false,
            Some(started) => is_of_launch(&record, since(started), host::boot_id()),
            None => {
                let run = run.get_or_insert_with(|| broker_run(&state.broker_json()));
                let launch = since(context.launch.launched_boottime_ms);
                run.as_ref() == Some(&record.broker_run)
                    && is_fresh(&record, launch, context.config.broker.freshness, Now::read())
            }
        };
        let how = match record.bus_session {
            true => "in a session",
            false => "by repeated handshakes",
        };
        is_heard.then(|| format!("{CAPABILITY}, {how}"))
    };
    let heard = watch.wait_for(limit, POLL_INTERVAL, &mut look);
    heard.map_err(StepFailure::Stopped)?.ok_or_else(|| {
        let log = state.vizier_log(vm);
        StepFailure::because(format!(
            "no handshake with {CAPABILITY} came from {vm} within {} s",
            limit.as_secs()
        ))
        .with_advice(format!(
            "read {} and `castra logs {vm}`: can the guest reach the broker?",
            log.display()
        ))
    })
}

fn broker_run(path: &Path) -> Option<RunId> {
    let record: Option<BrokerRecord> = records::load(path).ok().flatten();
    record.map(|record| record.run)
}

/// Copies the end of the service's log from the guest, at the end of a bootstrap. The broker writes the same
/// lines as they come, so only missing lines are added.
pub(super) fn take_log(context: &Context<'_, '_>, master: &mut Master) {
    let lines = master.read_closing_output(remote::LOG, LOG_TIMEOUT);
    if lines.is_empty() {
        return;
    }
    let rotation = context.config.bus.rotation;
    let path = context.config.state.vizier_log(&context.vm.name);
    if let Err(error) = logs::fill_in(&path, rotation, &lines) {
        context.emitter.emit(Event::message(
            Severity::Warn,
            Some(&context.vm.name),
            format!("Vizier's log {} can't be written: {error}", path.display()),
        ));
    }
}

#[cfg(test)]
#[path = "vizier_tests.rs"]
mod tests;
