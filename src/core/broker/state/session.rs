//! Sessions of the bus: their VM, their subscriptions, how they end (docs/PROTOCOL.md).
//!
//! Here: a session's own state, opening and ending one, idle and superseded ones. Not here: what
//! its frames do (`super::publishing`), what it gets (`super::commit`).

use std::collections::{BTreeMap, BTreeSet};

use crate::core::broker::frame;
use crate::core::bus::topic::Pattern;
use crate::core::name::VmName;

use super::batch::{Op, sender_fields};
use super::input::{Delivery, ReplayPlan, ReplaySubscription};
use super::notices::SessionChange;
use super::topics::Reader;
use super::{ConnId, ConnPhase, Effect, Peer, State, Timestamp};

/// Why a session ended; log, event and `close` frame use the same word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CloseReason {
    /// Its client closed the connection.
    Disconnected,
    /// It sent no frame for too long.
    Idle,
    /// It broke the protocol, so nothing that follows can be understood.
    ProtocolError,
    /// The broker stops.
    ShuttingDown,
    /// It reads too slowly.
    SlowConsumer,
    /// The project removed the VM or launched it again, or another session of the same VM replaced
    /// it.
    Superseded,
}

impl CloseReason {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            CloseReason::Disconnected => "disconnected",
            CloseReason::Idle => "idle",
            CloseReason::ProtocolError => "protocol-error",
            CloseReason::ShuttingDown => "shutting-down",
            CloseReason::SlowConsumer => "slow-consumer",
            CloseReason::Superseded => "superseded",
        }
    }

    /// Whether a `close` frame is sent. It can't be where a delivery was cut off in the middle.
    fn sends_close_frame(self) -> bool {
        matches!(
            self,
            CloseReason::Idle | CloseReason::ProtocolError | CloseReason::ShuttingDown
        )
    }
}

/// A session that has sent nothing but its hello for this long may be replaced by another one of
/// its VM: a client can send a frame together with the hello.
const FIRST_FRAME_MS: u64 = 1000;

/// A session that has missed this many heartbeats may be replaced, too.
const STALE_BEATS: u64 = 2;

/// Why a session may be replaced by another one of its VM, the best reason first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum EvictionRank {
    /// Its hello showed no token, and the new one's did.
    Unauthenticated,
    /// It has never sent a frame.
    Silent,
    /// It has stopped sending frames.
    Stale,
}

/// One subscription.
#[derive(Clone, Debug, PartialEq)]
pub struct Subscription {
    /// Its number, unique in its session.
    pub number: u64,
    /// The first message it is for.
    pub first: u64,
    /// The first number that it hasn't dealt with, as of the moment its session fell behind.
    pub next: u64,
    /// If set, the newest message of each topic up to this number was asked for.
    pub last: Option<u64>,
    /// The group it shares the subscription with.
    pub group: Option<String>,
}

/// A granted session.
#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    /// Its public id.
    pub id: String,
    /// Its VM, as the project spells the name.
    pub vm: VmName,
    /// What it may read.
    pub reader: Reader,
    /// What its hello offered.
    pub capabilities: Vec<String>,
    /// When its hello came.
    pub since_ms: u64,
    /// When its last frame came.
    pub heard_ms: u64,
    /// Its hello showed the token of this launch.
    pub authenticated: bool,
    /// It has sent a frame.
    pub has_sent_frame: bool,
    pub(super) line_fields: Vec<u8>,
    pub(super) subs: BTreeMap<Pattern, Subscription>,
    pub(super) subs_made: u64,
    /// Its own thread delivers from the log.
    pub(super) behind: bool,
    /// Its thread waits to be told how it gets its messages.
    pub(super) awaits_delivery: bool,
}

impl Session {
    /// A session that has sent no frame yet.
    pub fn new(id: String, vm: VmName, peer: Peer, since_ms: u64, capabilities: Vec<String>) -> Session {
        Session {
            id,
            capabilities,
            line_fields: sender_fields(vm.as_str()),
            reader: Reader {
                peer,
                key: vm.key(),
                second: None,
            },
            vm,
            since_ms,
            heard_ms: since_ms,
            authenticated: false,
            has_sent_frame: false,
            subs: BTreeMap::new(),
            subs_made: 0,
            behind: false,
            awaits_delivery: false,
        }
    }

    /// Whether it has any subscription.
    pub fn is_subscribed(&self) -> bool {
        !self.subs.is_empty()
    }

    pub(super) fn plan(&self, upto: u64) -> ReplayPlan {
        // Messages for a group are assigned when they come, and never read from the log.
        let plain = self.subs.iter().filter(|(_, sub)| sub.group.is_none());
        let wanted = plain.map(|(pattern, sub)| ReplaySubscription {
            pattern: pattern.clone(),
            number: sub.number,
            first: sub.first,
            next: sub.next,
            last: sub.last,
        });
        ReplayPlan {
            upto,
            reader: self.reader.clone(),
            subscriptions: wanted.collect(),
        }
    }
}

impl State {
    pub(super) fn session(&self, conn: ConnId) -> Option<&Session> {
        match &self.conns.get(&conn)?.phase {
            ConnPhase::Session(session) => Some(session),
            _ => None,
        }
    }

    pub(super) fn session_mut(&mut self, conn: ConnId) -> Option<&mut Session> {
        match &mut self.conns.get_mut(&conn)?.phase {
            ConnPhase::Session(session) => Some(session),
            _ => None,
        }
    }

    /// The open sessions of a VM.
    pub(super) fn sessions_of(&self, key: &str) -> usize {
        self.vm_sessions.get(key).map_or(0, BTreeSet::len)
    }

    /// Makes sure that a VM may have one more session. At the limit the session with the best
    /// reason to go is closed, so that a program that holds them all can't keep the VM out. False:
    /// none may be closed.
    pub(super) fn ensure_session_slot(
        &mut self,
        at: Timestamp,
        key: &str,
        proven: bool,
        out: &mut Vec<Effect>,
    ) -> bool {
        if self.sessions_of(key) < self.rules.bus.sessions_per_vm {
            return true;
        }
        let stale_ms = self.rules.bus.heartbeat_secs.saturating_mul(STALE_BEATS * 1000);
        let known = self.vm_sessions.get(key).into_iter().flatten();
        let known = known.filter_map(|conn| Some((*conn, self.session(*conn)?)));
        let worth = |session: &Session| {
            let silent_ms = at.boot_ms.saturating_sub(session.heard_ms);
            if proven && !session.authenticated {
                return Some(EvictionRank::Unauthenticated);
            }
            let equal = proven == session.authenticated;
            match session.has_sent_frame {
                false if equal && silent_ms >= FIRST_FRAME_MS => Some(EvictionRank::Silent),
                true if equal && silent_ms >= stale_ms => Some(EvictionRank::Stale),
                _ => None,
            }
        };
        let victim = known
            .filter_map(|(conn, session)| Some((worth(session)?, session.heard_ms, conn)))
            .min();
        let Some((_, _, conn)) = victim else {
            return false;
        };
        self.close_session(at, conn, CloseReason::Superseded, out);
        true
    }

    /// Whether a VM has a session, and one with a subscription.
    pub(super) fn bus_flags(&self, key: &str) -> (bool, bool) {
        let Some(conns) = self.vm_sessions.get(key) else {
            return (false, false);
        };
        let subscribed = |conn: &ConnId| self.session(*conn).is_some_and(Session::is_subscribed);
        (!conns.is_empty(), conns.iter().any(subscribed))
    }

    pub(super) fn open_session(
        &mut self,
        at: Timestamp,
        conn: ConnId,
        session: Session,
        out: &mut Vec<Effect>,
    ) {
        let Some(known) = self.conns.get_mut(&conn) else {
            return;
        };
        let change = SessionChange {
            vm: session.vm.clone(),
            session: session.id.clone(),
            remote: known.remote.clone(),
            closed: None,
        };
        let (key, peer) = (session.reader.key.clone(), known.peer);
        known.phase = ConnPhase::Session(Box::new(session));
        self.vm_sessions.entry(key).or_default().insert(conn);
        let places = self.occupancy(peer);
        places.waiting.remove(&conn);
        places.sessions += 1;
        let idle = at.boot_ms + self.rules.bus.idle_ms;
        self.idle_due = Some(self.idle_due.map_or(idle, |due| due.min(idle)));
        self.report_change(at, change, out);
    }

    /// Ends a session: removes its subscriptions and reports its end. The connection is the
    /// caller's business.
    pub(super) fn end_session(
        &mut self,
        at: Timestamp,
        conn: ConnId,
        reason: CloseReason,
        out: &mut Vec<Effect>,
    ) {
        let Some(known) = self.conns.get_mut(&conn) else {
            return;
        };
        if !matches!(known.phase, ConnPhase::Session(_)) {
            return;
        }
        let ConnPhase::Session(session) = std::mem::replace(&mut known.phase, ConnPhase::Answered) else {
            return;
        };
        let (peer, remote) = (known.peer, known.remote.clone());
        let places = self.occupancy(peer);
        places.sessions -= 1;
        places.answered.insert(conn);
        for pattern in session.subs.keys() {
            self.index.remove(conn, pattern);
        }
        let key = &session.reader.key;
        if let Some(conns) = self.vm_sessions.get_mut(key) {
            conns.remove(&conn);
            if conns.is_empty() {
                self.vm_sessions.remove(key);
            }
        }
        self.refresh_record(at, key);
        let change = SessionChange {
            vm: session.vm,
            session: session.id,
            remote,
            closed: Some(reason),
        };
        self.report_change(at, change, out);
    }

    /// Ends a session and its connection.
    pub(super) fn close_session(
        &mut self,
        at: Timestamp,
        conn: ConnId,
        reason: CloseReason,
        out: &mut Vec<Effect>,
    ) {
        if self.session(conn).is_none() {
            return;
        }
        self.end_session(at, conn, reason, out);
        out.push(match reason {
            CloseReason::SlowConsumer | CloseReason::Superseded => Effect::Drop { conn },
            _ => Effect::End {
                conn,
                last: if reason.sends_close_frame() {
                    frame::close(reason.as_str())
                } else {
                    Vec::new()
                },
            },
        });
    }

    /// The client sends nothing more: its earlier frames are answered, then the session ends.
    pub(super) fn on_half_closed(&mut self, conn: ConnId) {
        if self.session(conn).is_some() {
            let reason = CloseReason::Disconnected;
            self.batch.ops.push(Op::End { conn, cause: reason });
        }
    }

    /// A session that was behind has replayed all that it was told of.
    pub(super) fn on_replay_done(&mut self, conn: ConnId, next: u64, out: &mut Vec<Effect>) {
        let kept = self.last_kept_seq;
        let Some(session) = self.session_mut(conn) else {
            return;
        };
        let delivery = if next > kept {
            session.behind = false;
            session.awaits_delivery = false;
            // The newest messages are sent once, also if the session falls behind again.
            session.subs.values_mut().for_each(|sub| sub.last = None);
            Delivery::Live
        } else {
            Delivery::Replay(session.plan(kept))
        };
        out.push(Effect::SetDelivery { conn, delivery });
    }

    /// Ends sessions of VMs that were removed or launched again.
    pub(super) fn end_superseded(&mut self, at: Timestamp, out: &mut Vec<Effect>) {
        let Some(table) = self.table.as_ref() else {
            return;
        };
        let mut gone = Vec::new();
        for (key, conns) in &self.vm_sessions {
            if key == "host" {
                continue;
            }
            let listed = table.get(key);
            for conn in conns {
                let since = self.session(*conn).map_or(0, |session| session.since_ms);
                if listed.is_none_or(|listed| {
                    listed
                        .launched_boottime_ms
                        .is_some_and(|launched| since < launched)
                }) {
                    gone.push(*conn);
                }
            }
        }
        for conn in gone {
            self.close_session(at, conn, CloseReason::Superseded, out);
        }
    }

    /// Closes sessions that were silent for too long.
    pub(super) fn end_idle(&mut self, at: Timestamp, out: &mut Vec<Effect>) {
        if self.idle_due.is_none_or(|due| at.boot_ms < due) {
            return;
        }
        let limit = self.rules.bus.idle_ms;
        let mut next: Option<u64> = None;
        let mut idle = Vec::new();
        for conn in self.vm_sessions.values().flatten() {
            let Some(session) = self.session(*conn) else {
                continue;
            };
            let due = session.heard_ms + limit;
            if at.boot_ms >= due {
                idle.push(*conn);
            } else {
                next = Some(next.map_or(due, |known| known.min(due)));
            }
        }
        self.idle_due = next;
        for conn in idle {
            self.close_session(at, conn, CloseReason::Idle, out);
        }
        // An allowance that is full again needn't be remembered.
        self.allowances
            .retain(|_, allowance| at.boot_ms < allowance.at_ms + 1000);
    }

    pub(super) fn end_all(&mut self, at: Timestamp, out: &mut Vec<Effect>) {
        let open: Vec<ConnId> = self.vm_sessions.values().flatten().copied().collect();
        for conn in open {
            self.close_session(at, conn, CloseReason::ShuttingDown, out);
        }
    }
}
