//! Times as numbers.
//!
//! Here: milliseconds of a duration, of the wall clock and of an event's time. Not here: CLOCK_BOOTTIME
//! (`core::host`), text for people (`core::human`).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A duration in whole milliseconds.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The wall clock, ms since 1970.
pub fn wall_ms() -> u64 {
    unix_ms(SystemTime::now()).unwrap_or(0)
}

/// Milliseconds since 1970; `None` before that.
pub fn unix_ms(time: SystemTime) -> Option<u64> {
    time.duration_since(UNIX_EPOCH).ok().map(millis)
}

/// The last time that RFC 3339 can spell, ms since 1970.
pub const LAST_MS: u64 = 253_402_300_799_999;

/// The time of so many milliseconds since 1970.
pub fn of_unix_ms(ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(ms)
}

/// Milliseconds since 1970 of a time in RFC 3339.
pub fn parse_ms(text: &str) -> Option<u64> {
    humantime::parse_rfc3339(text).ok().and_then(unix_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_become_milliseconds() {
        assert_eq!(millis(Duration::from_micros(1_999)), 1);
        assert_eq!(millis(Duration::MAX), u64::MAX);
        assert_eq!(unix_ms(UNIX_EPOCH - Duration::from_secs(1)), None);
        for ms in [0, LAST_MS, u64::MAX] {
            assert_eq!(unix_ms(of_unix_ms(ms)), Some(ms));
        }
        assert_eq!(parse_ms("1970-01-01T00:00:01.250Z"), Some(1_250));
        assert_eq!(parse_ms("yesterday"), None);
    }
}
