//! Freshness: proofs of life, the freshness window, and when a handshake record is written.
//!
//! Here: everything the state does about guests once they are admitted. Not here: connections and
//! admission (`broker::state`), the guests' own fields (`broker::guests`).

use serde_json::Value;

use crate::core::broker::attempts::line_head;
use crate::core::broker::guests::{Guest, GuestTable, MAX_UNLISTED, RECORD_EVERY_MS};
use crate::core::events::Event;
use crate::core::name::VmName;
use crate::core::reporter::wall_clock;
use crate::core::root::freshness::{OfLaunch, is_of_launch, leaves_at};
use crate::core::root::handshake_record::HandshakeRecord;

use super::{At, Effect, State};

/// What a burst of frames changes in its guest's record.
#[derive(Default)]
pub struct Said {
    /// It held a publish that was accepted.
    pub published: bool,
    /// It held a heartbeat, with these metrics.
    pub beat: Option<Option<Value>>,
    /// The number of its last `ack`.
    pub acked: Option<u64>,
}

impl State {
    /// The record after this hello. What the guest reported over the bus in this launch stays; a
    /// new launch begins empty.
    pub(super) fn next_record(
        &self,
        at: At,
        vm: VmName,
        mut capabilities: Vec<String>,
        session: bool,
    ) -> HandshakeRecord {
        let key = vm.key();
        // The capabilities of its open sessions stay: another hello takes none away.
        let open = self.vm_sessions.get(&key).into_iter().flatten();
        capabilities.extend(
            open.filter_map(|conn| self.session(*conn))
                .flat_map(|session| session.capabilities.clone()),
        );
        capabilities.sort_unstable();
        capabilities.dedup();
        let before = self.guests.get(&key).map(|guest| &guest.record);
        let before = before.filter(|record| self.counts(&key, record));
        let (has_session, subscribed) = self.bus_flags(&key);
        HandshakeRecord {
            vm,
            boot_id: self.rules.boot_id.clone(),
            broker_run: self.rules.run.clone(),
            handshake_boottime_ms: at.boot_ms,
            heard_boottime_ms: at.boot_ms,
            heard_at: wall(at),
            capabilities,
            bus_session: session || has_session,
            bus_subscribed: subscribed,
            last_publish_boottime_ms: before.and_then(|record| record.last_publish_boottime_ms),
            last_heartbeat_boottime_ms: before.and_then(|record| record.last_heartbeat_boottime_ms),
            last_acked_seq: before.and_then(|record| record.last_acked_seq),
            guest_metrics: before.and_then(|record| record.guest_metrics.clone()),
        }
    }

    /// Whether a record is of the current launch: an older handshake was another launch's.
    pub(super) fn counts(&self, key: &str, record: &HandshakeRecord) -> bool {
        let launch = OfLaunch {
            vm: &record.vm,
            since_ms: self
                .table
                .as_ref()
                .and_then(|table| table.get(key)?.launched_boottime_ms),
        };
        is_of_launch(record, launch, &self.rules.boot_id)
    }

    /// Notes a proof of life; `written`: the record is on disk already.
    pub(super) fn heard(&mut self, at: At, record: HandshakeRecord, written: bool, out: &mut Vec<Effect>) {
        let window = self.rules.freshness_ms;
        let vm = record.vm.clone();
        let is_over = self.is_over(&vm.key());
        let guest = self.guests.entry(vm.key()).or_insert_with(|| Guest {
            record: record.clone(),
            fresh: false,
            written_ms: None,
            dirty: false,
            heard_wall_ms: at.wall_ms,
        });
        guest.record = record;
        guest.heard_wall_ms = at.wall_ms;
        if written {
            guest.written_ms = Some(at.boot_ms);
        }
        guest.dirty = !written;
        let entered = !is_over && !guest.fresh;
        let (leaves_at, writable_at) = (leaves_at(&guest.record, window), guest.writable_at());
        guest.fresh = !is_over;
        self.leave_due = Some(self.leave_due.map_or(leaves_at, |due| due.min(leaves_at)));
        if !written {
            self.write_due = Some(self.write_due.map_or(writable_at, |due| due.min(writable_at)));
        }
        if entered {
            tell_freshness(at, &vm, true, 0, out);
        }
    }

    /// Notes that a session sent frames, which proves life as a hello does. The record is written a
    /// few times a second.
    pub(super) fn heard_on_bus(&mut self, at: At, key: &str, said: Said, out: &mut Vec<Effect>) {
        let window = self.rules.freshness_ms;
        let is_over = self.is_over(key);
        let Some(guest) = self.guests.get_mut(key) else {
            return;
        };
        guest.record.heard_boottime_ms = at.boot_ms;
        guest.heard_wall_ms = at.wall_ms;
        if said.published {
            guest.record.last_publish_boottime_ms = Some(at.boot_ms);
        }
        if said.acked.is_some() {
            guest.record.last_acked_seq = said.acked;
        }
        if let Some(metrics) = said.beat {
            guest.record.last_heartbeat_boottime_ms = Some(at.boot_ms);
            if metrics.is_some() {
                guest.record.guest_metrics = metrics;
            }
        }
        let (entered, leaves_at) = (!is_over && !guest.fresh, leaves_at(&guest.record, window));
        guest.fresh = !is_over;
        self.note_dirty(key);
        if entered {
            self.leave_due = Some(self.leave_due.map_or(leaves_at, |due| due.min(leaves_at)));
            if let Some(guest) = self.guests.get(key) {
                tell_freshness(at, &guest.record.vm, true, 0, out);
            }
        }
    }

    /// Updates what a record says of the bus.
    pub(super) fn refresh_record(&mut self, at: At, key: &str) {
        let (session, subscribed) = self.bus_flags(key);
        let Some(guest) = self.guests.get_mut(key) else {
            return;
        };
        debug_assert!(guest.record.heard_boottime_ms <= at.boot_ms);
        if (guest.record.bus_session, guest.record.bus_subscribed) != (session, subscribed) {
            guest.record.bus_session = session;
            guest.record.bus_subscribed = subscribed;
            self.note_dirty(key);
        }
    }

    fn note_dirty(&mut self, key: &str) {
        if let Some(guest) = self.guests.get_mut(key)
            && !guest.dirty
        {
            guest.dirty = true;
            let writable_at = guest.writable_at();
            self.write_due = Some(self.write_due.map_or(writable_at, |due| due.min(writable_at)));
        }
    }

    pub(super) fn on_record_lost(&mut self, at: At, vm: &VmName, out: &mut Vec<Effect>) {
        if let Some(guest) = self.guests.get_mut(&vm.key()) {
            guest.written_ms = None;
            guest.dirty = false;
            out.push(Effect::Log(format!(
                "{} record of vm:{vm} was taken away, made anew",
                line_head(at.wall_ms, "WARN")
            )));
            out.push(Effect::Record {
                record: Box::new(guest.record_to_write()),
                asked_by: None,
            });
        }
    }

    pub(super) fn on_guests(&mut self, at: At, table: Option<GuestTable>, out: &mut Vec<Effect>) {
        self.table = table;
        // This comes before guests are forgotten, so that no record goes on naming a session.
        self.end_superseded(at, out);
        let Some(table) = self.table.as_ref() else {
            return;
        };
        let same_launch = |key: &str, over: &Option<u64>| {
            table
                .get(key)
                .is_some_and(|listed| listed.launched_boottime_ms == *over)
        };
        self.over.retain(|key, over| same_launch(key, over));
        let (mut gone, mut closed) = (Vec::new(), Vec::new());
        for (key, guest) in &mut self.guests {
            match table.get(key) {
                None => gone.push(key.clone()),
                Some(listed) if listed.closed && guest.fresh => closed.push(key.clone()),
                // The name's spelling is in the file name of the record.
                Some(listed) if listed.name != guest.record.vm => {
                    guest.record.vm = listed.name.clone();
                    guest.written_ms = None;
                }
                Some(_) => {}
            }
        }
        for key in closed {
            self.leave(at, &key, out);
        }
        for key in gone {
            self.leave(at, &key, out);
            if let Some(guest) = self.guests.remove(&key)
                && guest.dirty
            {
                out.push(Effect::Record {
                    record: Box::new(guest.record_to_write()),
                    asked_by: None,
                });
            }
        }
        let stale: Vec<String> = self
            .guests
            .iter()
            .filter(|(key, guest)| guest.fresh && !self.counts(key, &guest.record))
            .map(|(key, _)| key.clone())
            .collect();
        for key in stale {
            self.leave(at, &key, out);
        }
    }

    /// A handshake outlives its broker. The VM became unreachable when that broker stopped, and
    /// becomes reachable again.
    pub(super) fn on_restored(
        &mut self,
        at: At,
        record: HandshakeRecord,
        alive: bool,
        out: &mut Vec<Effect>,
    ) {
        let key = record.vm.key();
        let unwanted = match &self.table {
            Some(table) => table.get(&key).is_none_or(|listed| listed.name != record.vm),
            None => self.guests.len() >= MAX_UNLISTED || self.guests.contains_key(&key),
        };
        if unwanted || record.boot_id != self.rules.boot_id || record.heard_boottime_ms > at.boot_ms {
            return;
        }
        let counts = self.counts(&key, &record);
        let heard_wall_ms = at.wall_ms.saturating_sub(at.boot_ms - record.heard_boottime_ms);
        let guest = Guest {
            record,
            heard_wall_ms,
            fresh: false,
            written_ms: Some(at.boot_ms.saturating_sub(RECORD_EVERY_MS)),
            dirty: false,
        };
        let leaves_at = leaves_at(&guest.record, self.rules.freshness_ms);
        let fresh = alive && counts && !self.is_over(&key) && at.boot_ms < leaves_at;
        let (vm, age) = (guest.record.vm.clone(), guest.age_ms(at.boot_ms));
        self.guests.insert(key, Guest { fresh, ..guest });
        if fresh {
            tell_freshness(at, &vm, true, age, out);
            self.leave_due = Some(self.leave_due.map_or(leaves_at, |due| due.min(leaves_at)));
        }
    }

    pub(super) fn on_vm_gone(&mut self, at: At, vm: &VmName, out: &mut Vec<Effect>) {
        let key = vm.key();
        if let Some(listed) = self.table.as_ref().and_then(|table| table.get(&key)) {
            self.over.insert(key.clone(), listed.launched_boottime_ms);
        }
        self.leave(at, &key, out);
    }

    /// Whether a VM's current launch has ended, or the VM has none and isn't expected to have one.
    fn is_over(&self, key: &str) -> bool {
        let listed = self.table.as_ref().and_then(|table| table.get(key));
        self.over.contains_key(key) || listed.is_some_and(|listed| listed.closed)
    }

    /// The broker stops: delayed records are written, and no guest is reachable any more.
    pub(super) fn on_finish(&mut self, at: At, out: &mut Vec<Effect>) {
        self.on_tick(at, true, out);
        let fresh = self.guests.iter().filter(|(_, guest)| guest.fresh);
        let fresh: Vec<String> = fresh.map(|(key, _)| key.clone()).collect();
        for key in fresh {
            self.leave(at, &key, out);
        }
    }

    pub(super) fn leave(&mut self, at: At, key: &str, out: &mut Vec<Effect>) {
        if let Some(guest) = self.guests.get_mut(key)
            && guest.fresh
        {
            guest.fresh = false;
            let age = guest.age_ms(at.boot_ms);
            tell_freshness(at, &guest.record.vm, false, age, out);
        }
    }

    pub(super) fn on_tick(&mut self, at: At, at_once: bool, out: &mut Vec<Effect>) {
        for evidence in self.attempts.flush(at.boot_ms, at.wall_ms, at_once) {
            if let Some(vm) = &evidence.known {
                self.announce(at, "handshake", vm, &evidence.event);
            }
            out.push(Effect::Log(evidence.line));
            out.push(Effect::Tell(evidence.event));
        }
        self.flush_merged(at, at_once, out);
        self.end_idle(at, out);
        if self.leave_due.is_some_and(|due| at.boot_ms >= due) {
            let window = self.rules.freshness_ms;
            let late: Vec<String> = self
                .guests
                .iter()
                .filter(|(_, guest)| guest.fresh && at.boot_ms >= leaves_at(&guest.record, window))
                .map(|(key, _)| key.clone())
                .collect();
            for key in late {
                self.leave(at, &key, out);
            }
            let fresh = self.guests.values().filter(|guest| guest.fresh);
            self.leave_due = fresh.map(|guest| leaves_at(&guest.record, window)).min();
        }
        if self.write_due.is_some_and(|due| at_once || at.boot_ms >= due) {
            let mut next: Option<u64> = None;
            for guest in self.guests.values_mut().filter(|guest| guest.dirty) {
                let writable_at = guest.writable_at();
                if !at_once && writable_at > at.boot_ms {
                    next = Some(next.map_or(writable_at, |due| due.min(writable_at)));
                    continue;
                }
                guest.dirty = false;
                guest.written_ms = Some(at.boot_ms);
                out.push(Effect::Record {
                    record: Box::new(guest.record_to_write()),
                    asked_by: None,
                });
            }
            self.write_due = next;
        }
    }
}

fn wall(at: At) -> String {
    wall_clock(std::time::UNIX_EPOCH + std::time::Duration::from_millis(at.wall_ms))
}

/// One log line and one event whenever a VM enters or leaves the freshness window.
fn tell_freshness(at: At, vm: &VmName, reachable: bool, age_ms: u64, out: &mut Vec<Effect>) {
    out.push(Effect::Log(format!(
        "{} freshness of vm:{vm} reachable={reachable} last_handshake_age_ms={age_ms}",
        line_head(at.wall_ms, "INFO")
    )));
    out.push(Effect::Tell(Event::BrokerFreshness {
        vm: vm.clone(),
        reachable,
        last_handshake_age_ms: Some(age_ms),
    }));
}
