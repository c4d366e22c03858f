//! Numbers as a report shows them, always with their unit.
//!
//! Here: durations, sizes, rates, counts, times of day. Not here: JSON, which has milliseconds and bytes; words
//! for people elsewhere, of fewer digits (`core::human`).

use crate::core::human;

/// `35 ms`, `0.21 s`, `7.5 s`, `1 min 5 s`, `2 h 3 min`, `4 d 1 h`.
pub(super) fn duration(ms: u64) -> String {
    match ms {
        100..9_995 => format!("{:.2} s", ms as f64 / 1000.0),
        9_995..59_950 => format!("{:.1} s", ms as f64 / 1000.0),
        _ => human::duration(ms),
    }
}

/// A time on an axis whose steps are so far apart: in the unit of the step, without one at 0.
pub(super) fn tick(ms: u64, step: u64) -> String {
    match (ms, step) {
        (0, _) => "0".to_owned(),
        (_, ..1_000) if ms < 1_000 => format!("{ms} ms"),
        (_, ..1_000) => format!("{} s", (ms as f64 / 1000.0 * 1000.0).round() / 1000.0),
        _ => human::whole_secs(ms / 1000),
    }
}

/// `512 B`, `3.2 KiB`, `2 GiB`.
pub(super) fn bytes(count: f64) -> String {
    let mut value = count;
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 1023.5 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    format!("{} {unit}", short(value))
}

/// `0.4/s`, `120/s`, `31k/s`.
pub(super) fn rate(per_sec: f64) -> String {
    match per_sec {
        value if value >= 999_500.0 => format!("{}M/s", short(value / 1_000_000.0)),
        value if value >= 999.5 => format!("{}k/s", short(value / 1_000.0)),
        value => format!("{}/s", short(value)),
    }
}

/// Two digits where the number is small, none behind the point where it is not.
fn short(value: f64) -> String {
    let text = match value {
        value if value >= 99.5 => return format!("{value:.0}"),
        value if value >= 9.95 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    };
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// `1 234 567`: thousands apart, by a space that doesn't break.
pub(super) fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) && digits.len() > 4 {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// `1 VM`, `3 VMs`.
pub(super) fn plural(value: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(value), human::ending(&value, noun))
}

/// `2026-11-21 17:19:36 UTC` of an event's time; what is none is shown as it is.
pub(super) fn moment(ts: &str) -> String {
    match (ts.get(0..10), ts.get(10..11), ts.get(11..19), ts.ends_with('Z')) {
        (Some(day), Some("T"), Some(time), true) => format!("{day} {time} UTC"),
        _ => ts.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_ticks() {
        for (ms, text) in [
            (0, "0 ms"),
            (99, "99 ms"),
            (214, "0.21 s"),
            (9_994, "9.99 s"),
            (9_996, "10.0 s"),
            (59_949, "59.9 s"),
            (59_950, "1 min"),
            (65_400, "1 min 5 s"),
            (7_380_000, "2 h 3 min"),
            (90_061_000, "1 d 1 h"),
        ] {
            assert_eq!(duration(ms), text, "{ms}");
        }
        for (ms, step, text) in [
            (0, 500, "0"),
            (500, 500, "500 ms"),
            (1_500, 500, "1.5 s"),
            (2_000, 1_000, "2 s"),
            (90_000, 30_000, "1 min 30 s"),
        ] {
            assert_eq!(tick(ms, step), text);
        }
        assert!(duration(u64::MAX).ends_with('h'));
    }

    #[test]
    fn amounts() {
        assert_eq!(
            [0.0, 512.0, 1024.0, 1536.0, 1e12].map(bytes),
            ["0 B", "512 B", "1 KiB", "1.5 KiB", "931 GiB"]
        );
        assert_eq!(
            [0.0, 0.333, 12.34, 1_000.0, 31_400.0, 2e6].map(rate),
            ["0/s", "0.33/s", "12.3/s", "1k/s", "31.4k/s", "2M/s"]
        );
        assert_eq!(
            [7, 1_234, 12_345, 1_234_567].map(count),
            ["7", "1234", "12\u{202f}345", "1\u{202f}234\u{202f}567"]
        );
        assert_eq!([plural(1, "VM"), plural(0, "VM")], ["1 VM", "0 VMs"]);
        assert_eq!(moment("2026-11-21T17:19:36.123Z"), "2026-11-21 17:19:36 UTC");
        assert_eq!(moment("né"), "né");
    }
}
