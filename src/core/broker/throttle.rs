//! Limits log lines per second: those beyond the limit are merged, counted and logged once.
//!
//! Here: counting and merging. Not here: what is logged (`broker::attempts`, `broker::state`).

use std::collections::BTreeMap;

/// How many lines a second are logged one by one.
const ONE_BY_ONE: u32 = 20;
const SECOND_MS: u64 = 1000;

/// Lets 20 values a second through and merges the others by key, so that no client can fill the
/// log.
#[derive(Debug)]
pub struct Throttle<K, V> {
    /// When the current second began, and how many it let through.
    second: Option<(u64, u32)>,
    merged: BTreeMap<K, (V, u64)>,
}

impl<K, V> Default for Throttle<K, V> {
    fn default() -> Throttle<K, V> {
        Throttle {
            second: None,
            merged: BTreeMap::new(),
        }
    }
}

impl<K: Ord, V> Throttle<K, V> {
    /// Adds a value; it is returned if it is to be logged at once. Of merged values with the same
    /// key the last one is kept.
    pub fn note(&mut self, boot_ms: u64, value: V, key: impl FnOnce(&mut V) -> K) -> Option<V> {
        let (_, told) = self.second.get_or_insert((boot_ms, 0));
        if *told < ONE_BY_ONE {
            *told += 1;
            return Some(value);
        }
        let mut value = value;
        let key = key(&mut value);
        match self.merged.get_mut(&key) {
            Some(slot) => *slot = (value, slot.1 + 1),
            None => {
                self.merged.insert(key, (value, 1));
            }
        }
        None
    }

    /// When [`Throttle::flush`] is next worth a call.
    pub fn due(&self) -> Option<u64> {
        self.second.map(|(began, _)| began + SECOND_MS)
    }

    /// The merged values of the last second, each with its count; with `at_once` also those of the
    /// current second.
    pub fn flush(&mut self, boot_ms: u64, at_once: bool) -> Vec<(V, u64)> {
        if !at_once && self.due().is_none_or(|due| boot_ms < due) {
            return Vec::new();
        }
        self.second = None;
        std::mem::take(&mut self.merged).into_values().collect()
    }
}
