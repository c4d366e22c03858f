//! `wait-handshake`: until the guest has given its first proof of life.
//!
//! Here: a fresh handshake in the broker's record, or an SSH banner, whichever comes first. Not
//! here: who writes the record (`core::broker`), how a banner is found (`bootstrap::banner`).
//!
//! The wait decides how much time `up` adds to the guest's own boot. A record costs microseconds to read, so
//! it is read often.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::core::bootstrap::banner::BannerSearch;
use crate::core::bootstrap::context::Context;
use crate::core::bootstrap::step_failure::StepFailure;
use crate::core::cancel::POLL_INTERVAL;
use crate::core::escape::escape_line;
use crate::core::events::{Event, Severity};
use crate::core::host;
use crate::core::name::VmName;
use crate::core::root::freshness::{OfLaunch, has_been_heard};
use crate::core::root::paths::vm_file;

/// How often a longer wait reports what it waits for.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
/// How many bytes of the console's end are searched for a guest's last words.
const CONSOLE_BYTES: u64 = 2048;

/// The first proof of life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ProofOfLife {
    /// The guest has shaken hands with the broker.
    Handshake,
    /// Its SSH server has answered; with its banner.
    Banner(String),
}

/// Whether the guest has proved its life already, by a handshake.
pub(super) fn is_alive(context: &Context<'_, '_>) -> bool {
    let identity = identity(context);
    is_proof(&context.config.state.handshake(identity), identity, context)
}

/// The identity whose handshake counts.
fn identity<'a>(context: &'a Context<'_, '_>) -> &'a VmName {
    let vm = context.vm;
    vm.bootstrap.handshake_identity.as_ref().unwrap_or(&vm.name)
}

/// Waits for the first proof of life; `banner` is searched for meanwhile, and `each` is called in every turn
/// to decide whether to go on.
pub(super) fn wait_for_proof_of_life(
    context: &Context<'_, '_>,
    banner: &mut Option<BannerSearch>,
    limit: Duration,
    each: &mut dyn FnMut() -> Result<(), StepFailure>,
) -> Result<ProofOfLife, StepFailure> {
    let vm = &context.vm.name;
    let identity = identity(context);
    let record = context.config.state.handshake(identity);
    let began = Instant::now();
    let deadline = began + left_of(limit, context);
    let mut said = began;
    loop {
        if is_proof(&record, identity, context) {
            return Ok(ProofOfLife::Handshake);
        }
        let pause = POLL_INTERVAL.min(deadline.saturating_duration_since(Instant::now()));
        match banner {
            Some(search) => {
                if let Some(text) = search.wait(pause) {
                    return Ok(ProofOfLife::Banner(escape_line(text, 100)));
                }
            }
            None => std::thread::sleep(pause),
        }
        each()?;
        if Instant::now() >= deadline {
            return Err(no_proof_of_life(context, identity, limit));
        }
        if said.elapsed() >= PROGRESS_INTERVAL {
            said = Instant::now();
            let text = format!(
                "waiting for a handshake of {identity} or an SSH banner for {} s",
                began.elapsed().as_secs()
            );
            context
                .emitter
                .emit(Event::message(Severity::Progress, Some(vm), text));
        }
    }
}

/// The time left: the limit counts from the launch if this run launched the VM.
fn left_of(limit: Duration, context: &Context<'_, '_>) -> Duration {
    if !context.launch.started_now {
        return limit;
    }
    let since = host::boottime_ms().saturating_sub(context.launch.launched_boottime_ms);
    limit.saturating_sub(Duration::from_millis(since))
}

fn is_proof(path: &Path, identity: &VmName, context: &Context<'_, '_>) -> bool {
    let launch = OfLaunch {
        vm: identity,
        since_ms: (*identity == context.vm.name).then_some(context.launch.launched_boottime_ms),
    };
    has_been_heard(path, launch, context.config.broker.freshness)
}

fn no_proof_of_life(context: &Context<'_, '_>, identity: &VmName, limit: Duration) -> StepFailure {
    let vm = &context.vm.name;
    let console = host::tail_of(
        &context.config.state.vm(vm).file(vm_file::SERIAL_LOG),
        CONSOLE_BYTES,
    );
    let last = console.lines().map(str::trim).rfind(|line| !line.is_empty());
    let words = match last {
        Some(line) => format!("last on its console: {}", escape_line(line, 200)),
        None => "its console shows nothing".to_owned(),
    };
    StepFailure::because(format!(
        "no proof of life within {} s: neither a handshake of {identity} nor an SSH banner came",
        limit.as_secs()
    ))
    .with_tail(&words)
    .with_advice(format!(
        "look at `castra logs {vm}`, or raise `handshake_timeout_secs`"
    ))
}
