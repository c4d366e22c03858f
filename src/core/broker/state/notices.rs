//! Log lines and events of the bus: sessions, refused frames, slow clients (docs/PROTOCOL.md).
//!
//! Here: these lines and events, merged beyond 20 a second. Not here: those of hellos
//! (`broker::attempts`) and freshness (`super::freshness`).

use crate::core::broker::attempts::log_prefix;
use crate::core::broker::frame::RefusalReason;
use crate::core::events::{Event, SessionPhase};
use crate::core::name::VmName;

use super::session::CloseReason;
use super::{ConnId, Effect, State, Timestamp};

/// A refused frame, for log and event.
#[derive(Clone, Debug)]
pub struct FrameRefusal {
    pub(super) vm: VmName,
    pub(super) session: String,
    pub(super) kind: String,
    pub(super) reason: RefusalReason,
}

/// A session that was opened or closed, for log and event.
#[derive(Clone, Debug)]
pub struct SessionChange {
    pub(super) vm: VmName,
    pub(super) session: String,
    pub(super) remote: String,
    pub(super) closed: Option<CloseReason>,
}

impl State {
    pub(super) fn report_refusal(
        &mut self,
        at: Timestamp,
        conn: ConnId,
        kind: &str,
        reason: RefusalReason,
        out: &mut Vec<Effect>,
    ) {
        let Some(session) = self.session(conn) else {
            return;
        };
        let refusal = FrameRefusal {
            vm: session.vm.clone(),
            session: session.id.clone(),
            kind: kind.to_owned(),
            reason,
        };
        let told = self.refusals.note(at.boot_ms, refusal, |refusal| {
            (refusal.vm.clone(), refusal.reason)
        });
        if let Some(refusal) = told {
            log_refusal(at, &refusal, None, out);
        }
    }

    pub(super) fn report_change(&mut self, at: Timestamp, change: SessionChange, out: &mut Vec<Effect>) {
        let told = self
            .changes
            .note(at.boot_ms, change, |change| (change.vm.clone(), change.closed));
        if let Some(change) = told {
            self.log_change(at, &change, None, out);
        }
    }

    pub(super) fn log_change(
        &mut self,
        at: Timestamp,
        change: &SessionChange,
        repeated: Option<u64>,
        out: &mut Vec<Effect>,
    ) {
        let SessionChange {
            vm,
            session,
            remote,
            closed,
        } = change;
        let phase = if closed.is_some() {
            SessionPhase::Closed
        } else {
            SessionPhase::Opened
        };
        let mut line = format!(
            "{} session of vm:{vm} session={session}",
            log_prefix(at.wall_ms, "INFO")
        );
        line.push_str(match phase {
            SessionPhase::Opened => " phase=opened",
            SessionPhase::Closed => " phase=closed",
        });
        if let Some(cause) = closed {
            line.push_str(&format!(" reason={}", cause.as_str()));
        }
        line.push_str(&format!(" remote={remote}"));
        if let Some(count) = repeated {
            line.push_str(&format!(" repeated={count}"));
        }
        let event = Event::BrokerSession {
            vm: vm.clone(),
            session: session.clone(),
            phase,
            reason: closed.map(|cause| cause.as_str().to_owned()),
            repeated,
        };
        self.publish_own(at, "session", vm, &event);
        out.push(Effect::Log(line));
        out.push(Effect::Emit(event));
    }

    /// Logs what was merged because there was too much of it.
    pub(super) fn flush_merged(&mut self, at: Timestamp, at_once: bool, out: &mut Vec<Effect>) {
        for (change, count) in self.changes.flush(at.boot_ms, at_once) {
            self.log_change(at, &change, Some(count), out);
        }
        for (refusal, count) in self.refusals.flush(at.boot_ms, at_once) {
            log_refusal(at, &refusal, Some(count), out);
        }
    }

    /// A session whose queue is full is cut off, so that nobody else waits for it.
    pub(super) fn on_queue_full(
        &mut self,
        at: Timestamp,
        conn: ConnId,
        queued_bytes: u64,
        out: &mut Vec<Effect>,
    ) {
        let Some(session) = self.session(conn) else {
            return;
        };
        let (vm, id) = (session.vm.clone(), session.id.clone());
        let reason = CloseReason::SlowConsumer.as_str();
        out.push(Effect::Log(format!(
            "{} backpressure of vm:{vm} session={id} reason={reason} queued_bytes={queued_bytes}",
            log_prefix(at.wall_ms, "WARN")
        )));
        out.push(Effect::Emit(Event::BrokerBackpressure {
            vm: Some(vm),
            session: Some(id),
            reason: reason.to_owned(),
            queued_bytes: Some(queued_bytes),
            repeated: None,
        }));
        self.close_session(at, conn, CloseReason::SlowConsumer, out);
    }
}

fn log_refusal(at: Timestamp, refusal: &FrameRefusal, repeated: Option<u64>, out: &mut Vec<Effect>) {
    let FrameRefusal {
        vm,
        session,
        kind,
        reason,
    } = refusal;
    let kind = if kind.is_empty() { "null" } else { kind };
    let mut line = format!(
        "{} refused vm:{vm} session={session} ack={kind} reason={}",
        log_prefix(at.wall_ms, "WARN"),
        reason.as_str()
    );
    if let Some(count) = repeated {
        line.push_str(&format!(" repeated={count}"));
    }
    out.push(Effect::Log(line));
    if matches!(
        reason,
        RefusalReason::RateLimit | RefusalReason::SubscriptionLimit | RefusalReason::StorageError
    ) {
        out.push(Effect::Emit(Event::BrokerBackpressure {
            vm: Some(vm.clone()),
            session: Some(session.clone()),
            reason: reason.as_str().to_owned(),
            queued_bytes: None,
            repeated,
        }));
    }
}
