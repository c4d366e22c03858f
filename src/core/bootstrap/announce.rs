//! The events for plan and start of a bootstrap, emitted as soon as their hashes are known, and the steps'
//! events after them.
//!
//! Here: the order of these events, whichever thread brings the last missing part: the one that computes the
//! hashes, or the one that does the steps. Not here: the steps (`bootstrap::pipeline`), or how a hash is
//! computed (`core::images`).
//!
//! A step's event waits here while a hash is missing; it has its own time, so the delay doesn't show.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::core::bootstrap::step_failure::StepFailure;
use crate::core::events::{BootstrapPlan, Event, Severity};
use crate::core::failure::{Failure, Result as Done};
use crate::core::reporter::Emitter;

/// The events that one bootstrap has emitted so far.
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
    /// Steps that ended before plan and start could be emitted.
    waiting: Vec<Event>,
    /// Why a hash can't be known.
    failure: Option<Failure>,
}

impl<'a, 'e> Announcer<'a, 'e> {
    /// Nothing emitted yet.
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

    /// Takes the next hash: first the artifact's, which completes the plan, then the base's, which the start
    /// needs.
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

    /// The run is over, or can't go on: missing hashes stay unknown.
    pub(super) fn close(&self) {
        let mut told = self.lock();
        while !told.started {
            self.announce(&mut told, None);
        }
    }

    /// Whether no hash has failed.
    pub(super) fn check(&self) -> Result<(), StepFailure> {
        match &self.lock().failure {
            Some(failure) => Err(StepFailure::because(failure.to_string())),
            None => Ok(()),
        }
    }

    /// Waits for the start, at most this long; returns whether it was emitted.
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
