//! Plan and start of a bootstrap, told as soon as their hashes are known, and its steps behind them.
//!
//! Here: the order in which these go out, whoever brings the last piece: the thread that computes the
//! hashes, or the one that does the steps. Not here: the steps (`bootstrap::pipeline`), or how a hash
//! is computed (`core::images`).
//!
//! A step waits here only while a hash is missing; it carries its own time and says nothing of the
//! work that went on meanwhile.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::core::bootstrap::step_failure::StepFailure;
use crate::core::events::{BootstrapPlan, Event, Severity};
use crate::core::failure::{Failure, Result as Done};
use crate::core::reporter::Emitter;

/// What one bootstrap has told so far.
pub(super) struct Announcer<'a, 'e> {
    emitter: &'a Emitter<'e>,
    told: Mutex<Announced>,
    changed: Condvar,
}

struct Announced {
    plan: BootstrapPlan,
    planned: bool,
    started: bool,
    base_hash: Option<String>,
    /// Steps that ended before plan and start could be told.
    waiting: Vec<Event>,
    /// Why a hash can't be known.
    failure: Option<Failure>,
}

impl<'a, 'e> Announcer<'a, 'e> {
    /// Nothing told yet.
    pub(super) fn new(plan: BootstrapPlan, emitter: &'a Emitter<'e>) -> Announcer<'a, 'e> {
        Announcer {
            emitter,
            told: Mutex::new(Announced {
                plan,
                planned: false,
                started: false,
                base_hash: None,
                waiting: Vec::new(),
                failure: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// The next hash: the artifact's, which completes the plan, then the base's, with which it starts.
    pub(super) fn hashed(&self, hash: Done<String>) {
        let mut told = self.lock();
        match hash {
            Ok(hash) => self.announce(&mut told, Some(hash).filter(|hash| !hash.is_empty())),
            Err(failure) => {
                self.announce(&mut told, None);
                told.failure.get_or_insert(failure);
            }
        }
        self.changed.notify_all();
    }

    /// A step that ended.
    pub(super) fn step(&self, event: Event) {
        let mut told = self.lock();
        match told.started {
            true => self.emitter.emit(event),
            false => told.waiting.push(event),
        }
    }

    /// The run is over, or can't go on: what isn't known yet stays unknown.
    pub(super) fn close(&self) {
        let mut told = self.lock();
        while !told.started {
            self.announce(&mut told, None);
        }
    }

    /// Whether the hashes let the run go on.
    pub(super) fn check(&self) -> Result<(), StepFailure> {
        match &self.lock().failure {
            Some(failure) => Err(StepFailure::because(failure.to_string())),
            None => Ok(()),
        }
    }

    /// Waits for the start, at most so long; whether it was told.
    pub(super) fn wait_started(&self, limit: Duration) -> bool {
        let told = self.lock();
        let waited = self
            .changed
            .wait_timeout_while(told, limit, |told| !told.started && told.failure.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.started
    }

    /// The hashes as far as they are known: of the artifact and of the base.
    pub(super) fn hashes(&self) -> (Option<String>, Option<String>) {
        let told = self.lock();
        (told.plan.artifact_hash.clone(), told.base_hash.clone())
    }

    fn announce(&self, told: &mut Announced, hash: Option<String>) {
        if !told.planned {
            told.planned = true;
            told.plan.artifact_hash = hash;
            let plan = Box::new(told.plan.clone());
            self.emitter.emit(Event::BootstrapPlanned(plan));
            for warning in &told.plan.warnings {
                let vm = Some(&told.plan.vm);
                self.emitter
                    .emit(Event::message(Severity::Warn, vm, warning.clone()));
            }
            return;
        }
        if told.started {
            return;
        }
        told.started = true;
        told.base_hash = hash;
        self.emitter.emit(Event::BootstrapStarted {
            vm: told.plan.vm.clone(),
            base_hash: told.base_hash.clone(),
            artifact_hash: told.plan.artifact_hash.clone(),
            trigger: told.plan.trigger.expect("a plan to run has a trigger"),
        });
        for event in told.waiting.drain(..) {
            self.emitter.emit(event);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Announced> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
