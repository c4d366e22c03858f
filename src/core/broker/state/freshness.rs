//! Freshness: proofs of life, the freshness window, and when a handshake record is written.
//!
//! Here: everything the state does about guests once they are admitted. Not here: connections and
//! admission (`broker::state`), the guests' own fields (`broker::guests`).

use serde_json::Value;

use crate::core::broker::attempts::log_prefix;
use crate::core::broker::guests::{Guest, GuestTable, MAX_UNLISTED, RECORD_EVERY_MS};
use crate::core::events::Event;
use crate::core::name::VmName;
use crate::core::reporter::wall_clock;
use crate::core::root::freshness::{OfLaunch, is_of_launch, stale_at};
use crate::core::root::handshake_record::HandshakeRecord;
use crate::core::time::of_unix_ms;

use super::{Effect, State, Timestamp};

/// What a burst of frames changes in its guest's record.
#[derive(Default)]
pub struct BusActivity {
    /// It held a publish that was accepted.
    pub published: bool,
    /// It held a heartbeat, with these metrics.
    pub heartbeat: Option<Option<Value>>,
    /// The number of its last `ack`.
    pub acked: Option<u64>,
}

impl State {
    /// The record after this hello. What the guest reported over the bus in this launch stays; a
    /// new launch begins empty.
    pub(super) fn next_record(
        &self,
        at: Timestamp,
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
        let before = before.filter(|record| self.is_of_current_launch(&key, record));
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
    pub(super) fn is_of_current_launch(&self, key: &str, record: &HandshakeRecord) -> bool {
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
    pub(super) fn note_handshake(
        &mut self,
        at: Timestamp,
        record: HandshakeRecord,
        written: bool,
        out: &mut Vec<Effect>,
    ) {
        let window = self.rules.freshness_ms;
        let vm = record.vm.clone();
        let is_over = self.launch_has_ended(&vm.key());
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
        let (stale_at, writable_at) = (stale_at(&guest.record, window), guest.writable_at());
        guest.fresh = !is_over;
        self.freshness_due = Some(self.freshness_due.map_or(stale_at, |due| due.min(stale_at)));
        if !written {
            self.write_due = Some(self.write_due.map_or(writable_at, |due| due.min(writable_at)));
        }
        if entered {
            report_freshness(at, &vm, true, 0, out);
        }
    }

    /// Notes that a session sent frames, which proves life as a hello does. The record is written a
    /// few times a second.
    pub(super) fn note_bus_activity(
        &mut self,
        at: Timestamp,
        key: &str,
        activity: BusActivity,
        out: &mut Vec<Effect>,
    ) {
        let window = self.rules.freshness_ms;
        let is_over = self.launch_has_ended(key);
        let Some(guest) = self.guests.get_mut(key) else {
            return;
        };
        guest.record.heard_boottime_ms = at.boot_ms;
        guest.heard_wall_ms = at.wall_ms;
        if activity.published {
            guest.record.last_publish_boottime_ms = Some(at.boot_ms);
        }
        if activity.acked.is_some() {
            guest.record.last_acked_seq = activity.acked;
        }
        if let Some(metrics) = activity.heartbeat {
            guest.record.last_heartbeat_boottime_ms = Some(at.boot_ms);
            if metrics.is_some() {
                guest.record.guest_metrics = metrics;
            }
        }
        let (entered, stale_at) = (!is_over && !guest.fresh, stale_at(&guest.record, window));
        guest.fresh = !is_over;
        self.mark_dirty(key);
        if entered {
            self.freshness_due = Some(self.freshness_due.map_or(stale_at, |due| due.min(stale_at)));
            if let Some(guest) = self.guests.get(key) {
                report_freshness(at, &guest.record.vm, true, 0, out);
            }
        }
    }

    /// Updates what a record says of the bus.
    pub(super) fn refresh_record(&mut self, at: Timestamp, key: &str) {
        let (session, subscribed) = self.bus_flags(key);
        let Some(guest) = self.guests.get_mut(key) else {
            return;
        };
        debug_assert!(guest.record.heard_boottime_ms <= at.boot_ms);
        if (guest.record.bus_session, guest.record.bus_subscribed) != (session, subscribed) {
            guest.record.bus_session = session;
            guest.record.bus_subscribed = subscribed;
            self.mark_dirty(key);
        }
    }

    fn mark_dirty(&mut self, key: &str) {
        if let Some(guest) = self.guests.get_mut(key)
            && !guest.dirty
        {
            guest.dirty = true;
            let writable_at = guest.writable_at();
            self.write_due = Some(self.write_due.map_or(writable_at, |due| due.min(writable_at)));
        }
    }

    pub(super) fn on_record_lost(&mut self, at: Timestamp, vm: &VmName, out: &mut Vec<Effect>) {
        if let Some(guest) = self.guests.get_mut(&vm.key()) {
            guest.written_ms = None;
            guest.dirty = false;
            out.push(Effect::Log(format!(
                "{} record of vm:{vm} was removed; the broker made it again",
                log_prefix(at.wall_ms, "WARN")
            )));
            out.push(Effect::Record {
                record: Box::new(guest.record_to_write()),
                asked_by: None,
            });
        }
    }

    pub(super) fn on_guests(&mut self, at: Timestamp, table: Option<GuestTable>, out: &mut Vec<Effect>) {
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
        self.ended_launches.retain(|key, over| same_launch(key, over));
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
            self.mark_unreachable(at, &key, out);
        }
        for key in gone {
            self.mark_unreachable(at, &key, out);
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
            .filter(|(key, guest)| guest.fresh && !self.is_of_current_launch(key, &guest.record))
            .map(|(key, _)| key.clone())
            .collect();
        for key in stale {
            self.mark_unreachable(at, &key, out);
        }
    }

    /// A handshake outlives its broker. The VM became unreachable when that broker stopped, and
    /// becomes reachable again.
    pub(super) fn on_restored(
        &mut self,
        at: Timestamp,
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
        let counts = self.is_of_current_launch(&key, &record);
        let heard_wall_ms = at.wall_ms.saturating_sub(at.boot_ms - record.heard_boottime_ms);
        let guest = Guest {
            record,
            heard_wall_ms,
            fresh: false,
            written_ms: Some(at.boot_ms.saturating_sub(RECORD_EVERY_MS)),
            dirty: false,
        };
        let stale_at = stale_at(&guest.record, self.rules.freshness_ms);
        let fresh = alive && counts && !self.launch_has_ended(&key) && at.boot_ms < stale_at;
        let (vm, age) = (guest.record.vm.clone(), guest.age_ms(at.boot_ms));
        self.guests.insert(key, Guest { fresh, ..guest });
        if fresh {
            report_freshness(at, &vm, true, age, out);
            self.freshness_due = Some(self.freshness_due.map_or(stale_at, |due| due.min(stale_at)));
        }
    }

    pub(super) fn on_vm_gone(&mut self, at: Timestamp, vm: &VmName, out: &mut Vec<Effect>) {
        let key = vm.key();
        if let Some(listed) = self.table.as_ref().and_then(|table| table.get(&key)) {
            self.ended_launches
                .insert(key.clone(), listed.launched_boottime_ms);
        }
        self.mark_unreachable(at, &key, out);
    }

    /// Whether a VM's current launch has ended, or the VM has none and isn't expected to have one.
    fn launch_has_ended(&self, key: &str) -> bool {
        let listed = self.table.as_ref().and_then(|table| table.get(key));
        self.ended_launches.contains_key(key) || listed.is_some_and(|listed| listed.closed)
    }

    /// The broker stops: delayed records are written, and no guest is reachable any more.
    pub(super) fn on_finish(&mut self, at: Timestamp, out: &mut Vec<Effect>) {
        self.on_tick(at, true, out);
        let fresh = self.guests.iter().filter(|(_, guest)| guest.fresh);
        let fresh: Vec<String> = fresh.map(|(key, _)| key.clone()).collect();
        for key in fresh {
            self.mark_unreachable(at, &key, out);
        }
    }

    pub(super) fn mark_unreachable(&mut self, at: Timestamp, key: &str, out: &mut Vec<Effect>) {
        if let Some(guest) = self.guests.get_mut(key)
            && guest.fresh
        {
            guest.fresh = false;
            let age = guest.age_ms(at.boot_ms);
            report_freshness(at, &guest.record.vm, false, age, out);
        }
    }

    pub(super) fn on_tick(&mut self, at: Timestamp, at_once: bool, out: &mut Vec<Effect>) {
        for report in self.attempts.flush(at.boot_ms, at.wall_ms, at_once) {
            if let Some(vm) = &report.known {
                self.publish_own(at, "handshake", vm, &report.event);
            }
            out.push(Effect::Log(report.line));
            out.push(Effect::Emit(report.event));
        }
        self.flush_merged(at, at_once, out);
        self.end_idle(at, out);
        if self.freshness_due.is_some_and(|due| at.boot_ms >= due) {
            let window = self.rules.freshness_ms;
            let late: Vec<String> = self
                .guests
                .iter()
                .filter(|(_, guest)| guest.fresh && at.boot_ms >= stale_at(&guest.record, window))
                .map(|(key, _)| key.clone())
                .collect();
            for key in late {
                self.mark_unreachable(at, &key, out);
            }
            let fresh = self.guests.values().filter(|guest| guest.fresh);
            self.freshness_due = fresh.map(|guest| stale_at(&guest.record, window)).min();
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

fn wall(at: Timestamp) -> String {
    wall_clock(of_unix_ms(at.wall_ms))
}

/// One log line and one event whenever a VM enters or leaves the freshness window.
fn report_freshness(at: Timestamp, vm: &VmName, reachable: bool, age_ms: u64, out: &mut Vec<Effect>) {
    out.push(Effect::Log(format!(
        "{} freshness of vm:{vm} reachable={reachable} last_handshake_age_ms={age_ms}",
        log_prefix(at.wall_ms, "INFO")
    )));
    out.push(Effect::Emit(Event::BrokerFreshness {
        vm: vm.clone(),
        reachable,
        last_handshake_age_ms: Some(age_ms),
    }));
}
