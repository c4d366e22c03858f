//! The CPU load of a QEMU: whether its guest still boots or is idle.
//!
//! Here: the rule, as a pure function of samples. Not here: taking samples (`host::cpu_time`), who
//! waits for the answer (`operations::fleet::bring_up`).

use std::time::Duration;

/// A guest is idle if its QEMU has used less than this share of a core, in percent …
const QUIET_PERCENT: u128 = 20;
/// … over at least this long.
const QUIET_FOR: Duration = Duration::from_secs(1);

/// Samples of one QEMU's CPU time.
#[derive(Clone, Debug, Default)]
pub struct CpuLoad {
    window: Vec<(Duration, Duration)>,
}

impl CpuLoad {
    /// No sample yet.
    pub fn new() -> CpuLoad {
        CpuLoad::default()
    }

    /// Adds a sample: `at` on any monotonic clock, `used` the CPU time so far. True if QEMU was
    /// idle during the whole second before `at`.
    pub fn is_idle(&mut self, at: Duration, used: Duration) -> bool {
        self.window.push((at, used));
        // The window begins with the newest sample that is at least a second old.
        let begin = self
            .window
            .iter()
            .rposition(|(then, _)| at.saturating_sub(*then) >= QUIET_FOR);
        let Some(begin) = begin else {
            return false;
        };
        self.window.drain(..begin);
        let (then, used_then) = self.window[0];
        let span = at.saturating_sub(then).as_micros();
        used.saturating_sub(used_then).as_micros() * 100 < span * QUIET_PERCENT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_second_under_a_fifth_of_a_core_is_rest() {
        let mut busy = CpuLoad::new();
        // Boots at full speed for two seconds, looked at every 100 ms, then uses 10 %.
        for step in 0..=20 {
            assert!(!busy.is_idle(ms(step * 100), ms(step * 100)), "at {step}");
        }
        let first = (21..60).find(|step| busy.is_idle(ms(step * 100), ms(2000 + (step - 20) * 10)));
        // A tenth of a second at full speed may remain in the window: that is 19 %.
        assert!(matches!(first, Some(29..=30)), "{first:?}");
    }

    #[test]
    fn too_short_a_look_proves_nothing() {
        let mut busy = CpuLoad::new();
        assert!(!busy.is_idle(ms(0), ms(0)));
        assert!(!busy.is_idle(ms(999), ms(0)));
        assert!(busy.is_idle(ms(1000), ms(0)));
        assert!(!CpuLoad::new().is_idle(ms(5000), ms(0)));
    }

    #[test]
    fn exactly_a_fifth_is_busy() {
        let mut busy = CpuLoad::new();
        busy.is_idle(ms(0), ms(0));
        assert!(!busy.is_idle(ms(1000), ms(200)));
    }
}
