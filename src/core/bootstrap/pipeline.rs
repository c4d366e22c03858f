//! One VM's bootstrap from its plan to its outcome (docs/BOOTSTRAP.md).
//!
//! Here: the order of the steps, their events and records. Not here: what each step does (`bootstrap::steps`,
//! `transfer`, `wait_for_guest`), the record of the end (`bootstrap::result`), or running several VMs at once
//! (`core::operations`).

use std::thread;
use std::time::{Duration, Instant};

use crate::core::bootstrap::announce::Announcer;
use crate::core::bootstrap::banner::BannerSearch;
use crate::core::bootstrap::context::Context;
use crate::core::bootstrap::mounts;
pub use crate::core::bootstrap::result::{BootstrapError, BootstrapOutcome};
use crate::core::bootstrap::result::{finish, has_outcome, record_of, save_outcome};
use crate::core::bootstrap::ssh::SshTarget;
use crate::core::bootstrap::ssh::master::Master;
use crate::core::bootstrap::step_failure::StepFailure;
use crate::core::bootstrap::steps::{self, Connected};
use crate::core::bootstrap::transfer;
use crate::core::bootstrap::vizier::{self, Installed};
use crate::core::bootstrap::wait_for_guest::{self, ProofOfLife};
use crate::core::bootstrap::watch::Watch;
use crate::core::events::endings::BootstrapStatus;
use crate::core::events::{
    BootstrapMode, BootstrapPlan, BootstrapPlanAction, BootstrapStepKind, BootstrapStepStatus,
    BootstrapTrigger, Event, Severity,
};
use crate::core::failure::Result as Done;
use crate::core::id::RunId;
use crate::core::reporter::new_run_id;
use crate::core::root::run_log::{self, OpenLog, StepRecord};
use crate::core::runtime::pause::PauseWatch;
use crate::core::threads;
use crate::core::time::millis;

/// The default of `handshake_timeout_secs` if the accelerator is unknown: that of TCG.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(240);

/// The result of a step that didn't fail.
enum StepEnd {
    Success(Option<String>),
    /// Likewise, with a duration that the step measured.
    Took(String, Duration),
    Skipped(String),
}

/// Runs the pipeline of a plan. `BootstrapPlanned` is emitted here, once, before anything else
/// of this VM; a failure is an outcome, not an error.
pub fn run(plan: BootstrapPlan, context: &Context<'_, '_>) -> BootstrapOutcome {
    run_log::close_abandoned_and_emit(&context.config.state, &context.vm.name, context.emitter);
    match plan.action {
        BootstrapPlanAction::Run => {}
        BootstrapPlanAction::Skip => {
            context.emitter.emit(Event::BootstrapPlanned(Box::new(plan)));
            // The result of an earlier bootstrap of this launch still holds.
            let skipped = record_of(BootstrapStatus::Skipped, false, None);
            if !has_outcome(context) {
                save_outcome(context, &skipped);
            }
            return BootstrapOutcome {
                end: Ok(skipped),
                steps: Vec::new(),
                log: None,
            };
        }
        BootstrapPlanAction::Error => {
            let reason = plan.reason.clone();
            // The plan was valid before the VM was launched.
            let trigger = plan.trigger.unwrap_or(match plan.mode {
                BootstrapMode::Always => BootstrapTrigger::Always,
                BootstrapMode::Auto | BootstrapMode::Skip => BootstrapTrigger::Auto,
            });
            context.emitter.emit(Event::BootstrapPlanned(Box::new(plan)));
            let log = begin_log(context, &new_run_id(), trigger);
            if let Err(failure) = &log {
                let text = format!("the bootstrap's log can't be kept: {failure}");
                context
                    .emitter
                    .emit(Event::message(Severity::Warn, Some(&context.vm.name), text));
            }
            return finish(
                context,
                log.ok(),
                Err(StepFailure::because(reason)),
                Instant::now(),
            );
        }
    }
    save_outcome(context, &record_of(BootstrapStatus::Running, false, None));
    let began = Instant::now();
    let run_id = new_run_id();
    let vm_paths = context.config.state.vm(&context.vm.name);
    let watch = Watch::new(
        context.cancel,
        &vm_paths,
        &context.launch.launch_id,
        context.why_ended,
    );
    let trigger = plan.trigger.expect("a plan to run has a trigger");
    let log = begin_log(context, &run_id, trigger);
    let announcer = Announcer::new(plan.clone(), context.emitter);
    let compute = || {
        for job in [&context.artifact_hash, &context.base_hash] {
            let job = job
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .take();
            announcer.hashed(job.map_or_else(|| Ok(String::new()), |job| job()));
        }
    };
    let (log, result) = thread::scope(|scope| {
        let log = match log {
            Ok(log) => log,
            Err(failure) => {
                context.emitter.emit(Event::BootstrapPlanned(Box::new(plan)));
                return (None, Err(StepFailure::because(failure.to_string())));
            }
        };
        // Without a second thread the hashes are computed first.
        if threads::spawn_scoped(scope, &format!("hash {}", context.vm.name), compute).is_err() {
            compute();
        }
        let mut pipeline = Pipeline {
            context,
            plan,
            watch,
            run_id,
            log,
            pauses: PauseWatch::new(&vm_paths),
            announcer: &announcer,
            master: None,
            noop: false,
        };
        let result = pipeline.steps();
        pipeline.disconnect();
        (Some(pipeline.log), result)
    });
    finish(context, log, result, began)
}

/// How long the guest's boot may take.
fn handshake_limit(plan: &BootstrapPlan) -> Duration {
    plan.handshake_timeout_secs
        .map_or(HANDSHAKE_TIMEOUT, Duration::from_secs)
}

fn begin_log(context: &Context<'_, '_>, run_id: &RunId, trigger: BootstrapTrigger) -> Done<OpenLog> {
    let (vm, launch) = (&context.vm.name, &context.launch.launch_id);
    OpenLog::begin(&context.config.state, vm, run_id, launch, trigger)
}

/// The connection to the guest's SSH server.
struct SshRoute {
    target: Option<SshTarget>,
    banner: Option<BannerSearch>,
    /// If no server answers, that is an error and not a reason to skip steps.
    required: bool,
    /// It answered an earlier bootstrap or a user's ssh, with the guest's present disk.
    answered_before: bool,
    /// Why no server answered.
    no_answer: Option<String>,
    /// What the step `connect` reports.
    connected: Option<String>,
}

struct Pipeline<'a, 'c, 'e> {
    context: &'a Context<'c, 'e>,
    plan: BootstrapPlan,
    watch: Watch<'a>,
    run_id: RunId,
    log: OpenLog,
    pauses: PauseWatch,
    announcer: &'a Announcer<'c, 'e>,
    master: Option<Box<Master>>,
    noop: bool,
}

impl Pipeline<'_, '_, '_> {
    /// Runs all steps in order; returns whether the script had nothing to change.
    fn steps(&mut self) -> Result<bool, StepFailure> {
        let context = self.context;
        let has_script = context.vm.bootstrap.script.is_some();
        let target = self
            .plan
            .ssh
            .as_ref()
            .and_then(|ssh| SshTarget::new(context.vm, context.config, ssh));
        // If the guest is known to live, no banner is needed.
        let lives = wait_for_guest::is_alive(context);
        let mut banner = match &target {
            Some(target) if !lives => Some(steps::start_banner_search(context, target)?),
            _ => None,
        };

        let mut reached_by_ssh = false;
        self.step(BootstrapStepKind::WaitHandshake, |pipeline| {
            let limit = handshake_limit(&pipeline.plan);
            let life = match lives {
                true => ProofOfLife::Handshake,
                false => wait_for_guest::wait_for_proof_of_life(context, &mut banner, limit, &mut || {
                    pipeline.check_guest()
                })?,
            };
            (context.on_alive)();
            Ok(StepEnd::Success(Some(match life {
                ProofOfLife::Handshake => "handshake".to_owned(),
                ProofOfLife::Banner(text) => {
                    reached_by_ssh = true;
                    format!("SSH banner {text}")
                }
            })))
        })?;
        let answered_before = steps::has_answered(context);
        let mut route = SshRoute {
            target,
            banner,
            required: has_script || reached_by_ssh || answered_before,
            answered_before,
            no_answer: None,
            connected: None,
        };
        self.vizier_steps(&mut route)?;
        let mut skip_rest = (!has_script).then(|| "there is no script".to_owned());
        self.step(BootstrapStepKind::Connect, |pipeline| {
            pipeline.open_master(&mut route)?;
            let Some(master) = &mut pipeline.master else {
                skip_rest.clone_from(&route.no_answer);
                return Ok(StepEnd::Skipped(route.no_answer.take().unwrap_or_default()));
            };
            steps::check(context, master)?;
            let limit = handshake_limit(&pipeline.plan);
            mounts::check(context, &pipeline.watch, master, limit)?;
            Ok(StepEnd::Success(route.connected.take()))
        })?;
        drop(route);
        self.step(BootstrapStepKind::Transfer, |pipeline| {
            match (&skip_rest, &mut pipeline.master) {
                (None, Some(master)) => {
                    let expected = pipeline.plan.payload_bytes;
                    transfer::transfer(context, &pipeline.watch, master, &pipeline.run_id, expected)
                        .map(|detail| StepEnd::Success(Some(detail)))
                }
                (why, _) => Ok(StepEnd::Skipped(why.clone().unwrap_or_default())),
            }
        })?;
        // The script's output is reported at once, so the start must have been reported.
        self.await_hashes().inspect_err(|_| self.announcer.close())?;
        self.step(BootstrapStepKind::Apply, |pipeline| {
            match (&skip_rest, &mut pipeline.master) {
                (None, Some(master)) => {
                    let applied = steps::apply(
                        context,
                        &pipeline.watch,
                        master,
                        &pipeline.run_id,
                        &mut pipeline.log,
                    )?;
                    pipeline.noop = applied.noop;
                    Ok(StepEnd::Success(applied.detail))
                }
                (why, _) => Ok(StepEnd::Skipped(why.clone().unwrap_or_default())),
            }
        })?;
        self.step(BootstrapStepKind::Verify, |pipeline| {
            match (&skip_rest, &mut pipeline.master) {
                (None, Some(_)) if pipeline.plan.verify.is_none() => Ok(StepEnd::Skipped(
                    "neither verify_command nor verify_path is set".to_owned(),
                )),
                (None, Some(master)) => steps::verify(context, &pipeline.watch, master, &pipeline.run_id)
                    .map(|detail| StepEnd::Success(Some(detail))),
                (why, _) => Ok(StepEnd::Skipped(why.clone().unwrap_or_default())),
            }
        })?;
        Ok(self.noop)
    }

    /// Opens the connection that all steps over SSH share, unless it is open or no server answers.
    fn open_master(&mut self, route: &mut SshRoute) -> Result<(), StepFailure> {
        if self.master.is_some() || route.no_answer.is_some() {
            return Ok(());
        }
        let Some(target) = &route.target else {
            return Err(
                StepFailure::because("no host port is forwarded to the guest's SSH server")
                    .with_advice("forward its port 22, or give [ssh] `port` in bootstrap.toml"),
            );
        };
        let context = self.context;
        match steps::connect(context, &self.watch, target.clone(), &mut route.banner)? {
            Connected::Open(master, detail) => {
                self.master = Some(master);
                route.connected = Some(detail);
            }
            Connected::NoBanner => {
                let waited = context.vm.bootstrap.step_timeout.as_secs();
                let words = format!("no SSH server answered within {waited} s");
                if route.required {
                    let vm = &context.vm.name;
                    let (though, advice) = match route.answered_before {
                        true => (
                            "one answered before",
                            "other clients may use all connections that it allows: try again later, or castra restart",
                        ),
                        false => (
                            "the guest is up",
                            "see whether an SSH server runs in the guest: castra logs",
                        ),
                    };
                    return Err(StepFailure::because(format!("{words}, though {though}"))
                        .with_advice(format!("{advice} {vm}")));
                }
                route.no_answer = Some(words);
            }
        }
        Ok(())
    }

    /// The steps that install and enable Vizier and wait for its hello.
    fn vizier_steps(&mut self, route: &mut SshRoute) -> Result<(), StepFailure> {
        let context = self.context;
        let mut skip = match (&context.broker_address, context.config.vizier_enabled) {
            (_, false) => Some("`enabled` under [vizier] is false".to_owned()),
            (None, _) => Some("there is no broker that Vizier could reach".to_owned()),
            _ => None,
        };
        let mut installed: Option<Installed> = None;
        self.step(BootstrapStepKind::VizierInstall, |pipeline| {
            if let Some(why) = &skip {
                return Ok(StepEnd::Skipped(why.clone()));
            }
            let began = Instant::now();
            pipeline.open_master(route)?;
            let opening = began.elapsed();
            let (Some(master), Some(broker)) = (&mut pipeline.master, &context.broker_address) else {
                let why = route.no_answer.clone().unwrap_or_default();
                skip = Some(why.clone());
                return Ok(StepEnd::Skipped(why));
            };
            let done = vizier::install(context, &pipeline.watch, master, broker)?;
            let end = StepEnd::Took(done.detail.clone(), opening + done.took);
            installed = Some(done);
            Ok(end)
        })?;
        self.step(BootstrapStepKind::VizierEnable, |_| match &mut installed {
            Some(done) => {
                let took = done.enabling;
                let detail = std::mem::replace(&mut done.enabled, Ok(String::new()))?;
                Ok(StepEnd::Took(detail, took))
            }
            None => Ok(StepEnd::Skipped(skip.clone().unwrap_or_default())),
        })?;
        self.step(BootstrapStepKind::VizierHandshake, |pipeline| match &installed {
            Some(done) => vizier::await_hello(context, &pipeline.watch, done)
                .map(|detail| StepEnd::Success(Some(detail))),
            None => Ok(StepEnd::Skipped(skip.clone().unwrap_or_default())),
        })
    }

    /// Ends the connection; if the guest has Vizier, its log is copied first.
    fn disconnect(&mut self) {
        if let Some(mut master) = self.master.take()
            && self.context.config.vizier_enabled
            && self.watch.look().is_none()
        {
            vizier::take_log(self.context, &mut master);
        }
    }

    /// Runs one step and reports how it ended.
    fn step(
        &mut self,
        kind: BootstrapStepKind,
        work: impl FnOnce(&mut Self) -> Result<StepEnd, StepFailure>,
    ) -> Result<(), StepFailure> {
        let began = Instant::now();
        let result = match self.watch.look() {
            Some(stop) => Err(StepFailure::Stopped(stop)),
            None => work(self),
        };
        // One command may do the work of two steps.
        let duration_ms = match &result {
            Ok(StepEnd::Took(_, took)) => millis(*took),
            _ => millis(began.elapsed()),
        };
        let (status, detail) = match &result {
            Ok(StepEnd::Took(detail, _)) => (BootstrapStepStatus::Success, Some(detail.clone())),
            Ok(StepEnd::Success(detail)) => (BootstrapStepStatus::Success, detail.clone()),
            Ok(StepEnd::Skipped(why)) => (BootstrapStepStatus::Skipped, Some(why.clone())),
            Err(failure) => (BootstrapStepStatus::Failed, Some(failure.detail())),
        };
        (self.log.log.artifact_hash, self.log.log.base_hash) = self.announcer.hashes();
        self.log.step(StepRecord {
            step: kind.as_str().to_owned(),
            status,
            duration_ms,
            detail: detail.clone(),
        });
        self.announcer.step(Event::BootstrapStep {
            vm: self.context.vm.name.clone(),
            step: kind,
            status,
            duration_ms,
            detail,
        });
        let hashed = self.announcer.check();
        if hashed.is_err() || result.is_err() {
            self.announcer.close();
        }
        hashed?;
        result.map(|_| ())
    }

    /// What the first wait checks in every turn.
    fn check_guest(&mut self) -> Result<(), StepFailure> {
        if let Some(stop) = self.watch.look() {
            return Err(StepFailure::Stopped(stop));
        }
        // A paused guest gives no sign of life, however long castra waits.
        if let Some(pause) = self.pauses.look() {
            let disk = self.context.config.state.overlay(&self.context.vm.name);
            let failure = pause.failure(&self.context.vm.name, Some(&disk));
            let step_failure = StepFailure::because(failure.cause());
            return Err(step_failure.with_advice(failure.next.unwrap_or_default()));
        }
        self.announcer.check()
    }

    /// Waits for missing hashes.
    fn await_hashes(&mut self) -> Result<(), StepFailure> {
        loop {
            let started = self.announcer.wait_started(Duration::from_millis(20));
            if let Some(stop) = self.watch.look() {
                return Err(StepFailure::Stopped(stop));
            }
            self.announcer.check()?;
            if started {
                break;
            }
        }
        (self.log.log.artifact_hash, self.log.log.base_hash) = self.announcer.hashes();
        Ok(())
    }
}
