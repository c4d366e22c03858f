//! Numbers as people say them.
//!
//! Here: durations, sizes, counts. Not here: JSON, which has milliseconds and bytes; the digits of a report (`core::report`).

use std::fmt::Display;
use std::time::Duration;

/// `35 ms`, `0.2 s`, `12 s`, `1 min 5 s`, `2 h 3 min`, `4 d 1 h`.
pub fn duration(ms: u64) -> String {
    match ms {
        0..100 => format!("{ms} ms"),
        100..9_950 => format!("{:.1} s", ms as f64 / 1000.0),
        _ => {
            let secs = ms.saturating_add(500) / 1000;
            match secs {
                0..60 => format!("{secs} s"),
                60..3_600 => two(secs / 60, "min", secs % 60, "s"),
                3_600..86_400 => two(secs / 3_600, "h", secs % 3_600 / 60, "min"),
                _ => two(secs / 86_400, "d", secs % 86_400 / 3_600, "h"),
            }
        }
    }
}

/// `0 s`, `12 s`, `1 min 5 s`: for a line that is drawn again and again, where tenths can't be read.
pub fn whole_secs(secs: u64) -> String {
    match secs {
        0..60 => format!("{secs} s"),
        _ => duration(secs.saturating_mul(1000)),
    }
}

/// `90 s`, `0.3 s`: a limit as whoever set it wrote it.
pub fn limit(limit: Duration) -> String {
    format!("{} s", limit.as_secs_f64())
}

fn two(large: u64, large_unit: &str, small: u64, small_unit: &str) -> String {
    if small == 0 {
        format!("{large} {large_unit}")
    } else {
        format!("{large} {large_unit} {small} {small_unit}")
    }
}

/// `512 bytes`, `3.2 MiB`, `2 GiB`.
pub fn bytes(count: u64) -> String {
    in_unit(count, |value, exact| usize::from(!exact && value < 99.95))
}

/// `512 bytes`, `3.2 MiB`, `2.0 GiB`: for sizes side by side, or one that grows.
pub fn bytes_to_a_tenth(count: u64) -> String {
    in_unit(count, |_, _| 1)
}

fn in_unit(count: u64, digits: impl Fn(f64, bool) -> usize) -> String {
    const UNITS: [(u64, &str); 4] = [
        (1 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
    ];
    let Some((size, unit)) = UNITS.into_iter().find(|(size, _)| count >= *size) else {
        return plural(count, "byte");
    };
    let value = count as f64 / size as f64;
    let digits = digits(value, count.is_multiple_of(size));
    format!("{value:.digits$} {unit}")
}

/// `1 VM`, `3 VMs`, `2 processes`.
pub fn plural<N: Display + PartialEq + From<u8>>(count: N, noun: &str) -> String {
    let ending = ending(&count, noun);
    format!("{count} {noun}{ending}")
}

/// What the noun takes behind it for this number.
pub fn ending<N: PartialEq + From<u8>>(count: &N, noun: &str) -> &'static str {
    match noun {
        _ if *count == N::from(1) => "",
        _ if noun.ends_with('s') => "es",
        _ => "s",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (ms, text) in [
            (0, "0 ms"),
            (99, "99 ms"),
            (200, "0.2 s"),
            (9_949, "9.9 s"),
            (9_950, "10 s"),
            (59_499, "59 s"),
            (59_500, "1 min"),
            (65_000, "1 min 5 s"),
            (3_600_000, "1 h"),
            (90_061_000, "1 d 1 h"),
        ] {
            assert_eq!(duration(ms), text, "{ms}");
        }
        assert_eq!(whole_secs(0), "0 s");
        assert_eq!(whole_secs(9), "9 s");
        assert_eq!(whole_secs(65), "1 min 5 s");
        assert!(duration(u64::MAX).ends_with('h'));
        assert_eq!(limit(Duration::from_secs(90)), "90 s");
        assert_eq!(limit(Duration::from_millis(5_100)), "5.1 s");
    }

    #[test]
    fn sizes_and_counts() {
        for (count, text) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (2 << 30, "2 GiB"),
            (300 << 20 | 5, "300 MiB"),
        ] {
            assert_eq!(bytes(count), text, "{count}");
        }
        for (count, text) in [
            (512, "512 bytes"),
            (2048, "2.0 KiB"),
            (1_572_864, "1.5 MiB"),
            (300 << 20 | 5, "300.0 MiB"),
        ] {
            assert_eq!(bytes_to_a_tenth(count), text);
        }
        assert_eq!(plural(1, "VM"), "1 VM");
        assert_eq!(plural(0_u64, "VM"), "0 VMs");
        assert_eq!(plural(2, "process"), "2 processes");
    }
}
