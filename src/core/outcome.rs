//! What an operation yields to a program that doesn't want to write a reporter: its value, and what
//! it told on the way.
//!
//! Here: [`OperationOutput`], and collecting one. Not here: the operations and their outcomes
//! (`core::operations`), or receiving events as they happen (`core::reporter`).
//!
//! Operations take a reporter and return their outcome, because what they tell can be long, comes
//! while they run, and is mostly wanted then. Collecting is one more reporter, so it is one function
//! over all of them and not a second form of each. What was told before a failure is often the
//! reason for it; so the collected output holds the whole result, and [`OperationOutput::transpose`]
//! is for those who want only the good case.

use std::collections::VecDeque;

use crate::core::diagnostics::Diagnostic;
use crate::core::events::contract::Stamped;
use crate::core::reporter::{Reporter, Silent};

/// So many events are kept; of more the oldest go first. A script in a guest can print for ever,
/// and every line is an event.
pub const MAX_EVENTS: usize = 65_536;
/// So many diagnostics are kept, the first ones: what follows is mostly their consequence.
pub const MAX_DIAGNOSTICS: usize = 4096;

/// What an operation returned and told.
#[derive(Clone, Debug, PartialEq)]
pub struct OperationOutput<T> {
    /// What it returned.
    pub value: T,
    /// What somebody should look at, in order.
    pub diagnostics: Vec<Diagnostic>,
    /// Everything it told, in order: the last [`MAX_EVENTS`].
    pub events: Vec<Stamped>,
    /// How many events came before those.
    pub dropped: u64,
}

impl<T, E> OperationOutput<Result<T, E>> {
    /// The output of an operation that went well, or its failure alone.
    pub fn transpose(self) -> Result<OperationOutput<T>, E> {
        Ok(OperationOutput {
            value: self.value?,
            diagnostics: self.diagnostics,
            events: self.events,
            dropped: self.dropped,
        })
    }
}

/// Runs an operation and keeps what it tells.
///
/// ```no_run
/// use castra::core::config;
/// use castra::core::operations::{self, UpOptions};
/// use castra::core::outcome::collect;
///
/// # fn main() -> Result<(), castra::core::failure::Failure> {
/// let config = config::load("castra.toml".as_ref())?;
/// let mut options = UpOptions::new(config, "/var/lib/me/castra");
/// options.plan = true;
/// let output = collect(|reporter| operations::up(options, reporter));
/// for diagnostic in &output.diagnostics {
///     eprintln!("{diagnostic}");
/// }
/// println!("{} bootstraps planned", output.value?.plans.len());
/// # Ok(())
/// # }
/// ```
pub fn collect<T>(operation: impl FnOnce(&mut dyn Reporter) -> T) -> OperationOutput<T> {
    collect_with(&mut Silent, operation)
}

/// Runs an operation, hands on what it tells as it happens, and keeps it too.
pub fn collect_with<T>(
    live: &mut dyn Reporter,
    operation: impl FnOnce(&mut dyn Reporter) -> T,
) -> OperationOutput<T> {
    let mut collector = Collector {
        live,
        diagnostics: Vec::new(),
        events: VecDeque::new(),
        dropped: 0,
    };
    let value = operation(&mut collector);
    OperationOutput {
        value,
        diagnostics: collector.diagnostics,
        events: collector.events.into(),
        dropped: collector.dropped,
    }
}

struct Collector<'l> {
    live: &'l mut dyn Reporter,
    diagnostics: Vec<Diagnostic>,
    events: VecDeque<Stamped>,
    dropped: u64,
}

impl Reporter for Collector<'_> {
    fn report(&mut self, event: &Stamped) {
        self.live.report(event);
        if self.diagnostics.len() < MAX_DIAGNOSTICS {
            self.diagnostics.extend(Diagnostic::of(&event.event));
        }
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
            self.dropped += 1;
        }
        self.events.push_back(event.clone());
    }

    fn source(&self) -> &'static str {
        self.live.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::events::{Event, Severity};
    use crate::core::failure::{Exit, Failure};
    use crate::core::reporter::Emitter;

    fn tell(reporter: &mut dyn Reporter, count: usize) {
        let emitter = Emitter::new(reporter);
        for number in 0..count {
            emitter.emit(Event::message(Severity::Warn, None, number.to_string()));
        }
    }

    #[test]
    fn a_failure_keeps_what_was_told_before_it() {
        let mut live: Vec<Stamped> = Vec::new();
        let output = collect_with(&mut live, |reporter| {
            tell(reporter, 2);
            Err::<(), _>(Failure::new(Exit::Failed, "no"))
        });
        assert_eq!(
            (output.events.len(), output.diagnostics.len(), output.dropped),
            (2, 2, 0)
        );
        assert_eq!(live, output.events);
        assert_eq!(output.transpose().unwrap_err().what, "no");
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let output = collect(|reporter| tell(reporter, MAX_EVENTS + 3));
        assert_eq!((output.events.len(), output.dropped), (MAX_EVENTS, 3));
        assert_eq!(output.events[0].seq, 3, "the oldest went first");
        assert_eq!(output.diagnostics.len(), MAX_DIAGNOSTICS);
        assert_eq!(output.diagnostics[0].text, "0");
    }
}
