//! The progress of a transfer: bytes done, total, rate.
//!
//! Here: a bar, a rate, the time left. Not here: who counts the bytes (`core`), where this is shown
//! (`live`).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::human;
use super::style::Style;
use super::width;

/// How many reports the rate is taken from; they come about once a second.
const SAMPLES: usize = 10;
/// A transfer without progress for this long counts as stalled.
const STALLED: Duration = Duration::from_secs(3);
/// Columns of the longest bar.
const WIDEST: usize = 24;
/// A shorter bar isn't shown.
const NARROWEST: usize = 6;

/// Counts bytes as they are reported.
#[derive(Clone, Debug)]
pub struct Meter {
    total: Option<u64>,
    samples: VecDeque<(Instant, u64)>,
}

impl Meter {
    /// A meter that begins with these bytes.
    pub fn new(now: Instant, bytes: u64, total: Option<u64>) -> Meter {
        Meter {
            total: total.filter(|total| *total > 0),
            samples: VecDeque::from([(now, bytes)]),
        }
    }

    /// Takes a report.
    pub fn note(&mut self, now: Instant, bytes: u64, total: Option<u64>) {
        if bytes < self.bytes() {
            // The transfer began again, so the rate does too.
            self.samples.clear();
        }
        self.total = total.filter(|total| *total > 0);
        self.samples.push_back((now, bytes));
        if self.samples.len() > SAMPLES {
            self.samples.pop_front();
        }
    }

    /// How long there was no progress, if that is long enough to show.
    pub fn stalled_since(&self, now: Instant) -> Option<Instant> {
        self.moved_at()
            .filter(|at| now.saturating_duration_since(*at) >= STALLED)
    }

    fn moved_at(&self) -> Option<Instant> {
        let last = self.bytes();
        let first_with = self.samples.iter().find(|(_, bytes)| *bytes == last);
        first_with.map(|(at, _)| *at)
    }

    fn bytes(&self) -> u64 {
        self.samples.back().map_or(0, |(_, bytes)| *bytes)
    }

    /// Bytes per second; `None` until there are two reports.
    fn rate(&self) -> Option<f64> {
        let ((first, from), (last, to)) = (self.samples.front()?, self.samples.back()?);
        let secs = last.duration_since(*first).as_secs_f64();
        (secs > 0.0).then(|| to.saturating_sub(*from) as f64 / secs)
    }

    /// The time left at this rate.
    fn left(&self) -> Option<Duration> {
        let rate = self.rate().filter(|rate| *rate >= 1.0)?;
        let missing = self.total?.saturating_sub(self.bytes()) as f64;
        Some(Duration::from_secs((missing / rate).min(1e6) as u64))
    }

    /// The figures, with a bar before them if the total is known and `columns` leave room for it; and their
    /// width.
    pub fn render(&self, now: Instant, columns: usize, style: Style) -> (String, usize) {
        let mut figures = match self.total {
            Some(total) => format!(
                "{} of {}",
                human::bytes(self.bytes().min(total)),
                human::bytes(total)
            ),
            None => human::bytes(self.bytes()),
        };
        if let Some(at) = self.stalled_since(now) {
            let idle = now.saturating_duration_since(at).as_secs();
            figures.push_str(&format!(", nothing more for {}", human::whole_secs(idle)));
        } else {
            if let Some(rate) = self.rate() {
                figures.push_str(&format!(", {}/s", human::bytes(rate as u64)));
            }
            if let Some(left) = self.left().filter(|left| !left.is_zero()) {
                figures.push_str(&format!(", {} left", human::whole_secs(left.as_secs())));
            }
        }
        let figures = width::cut(&figures, columns);
        let taken = width::of(&figures);
        let room = columns.saturating_sub(taken + 1).min(WIDEST);
        match self.total {
            Some(total) if room >= NARROWEST => {
                let share = self.bytes().min(total) as f64 / total as f64;
                let full = (share * room as f64) as usize;
                let bar = format!(
                    "{}{} {figures}",
                    style.success(&"█".repeat(full)),
                    style.dim(&"░".repeat(room - full))
                );
                (bar, room + 1 + taken)
            }
            _ => (figures, taken),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(began: Instant, steps: &[(u64, u64)], total: Option<u64>) -> Meter {
        let mut meter = Meter::new(began, 0, total);
        for (secs, bytes) in steps {
            meter.note(began + Duration::from_secs(*secs), *bytes, total);
        }
        meter
    }

    #[test]
    fn what_is_shown() {
        const MIB: u64 = 1 << 20;
        for (steps, total, columns, shown) in [
            (&[][..], None, 60, "0 bytes"),
            (&[(2, 4 * MIB)], None, 60, "4 MiB, 2 MiB/s"),
            (
                &[(1, 5 * MIB)],
                Some(10 * MIB),
                60,
                "████████████░░░░░░░░░░░░ 5 MiB of 10 MiB, 5 MiB/s, 1 s left",
            ),
            (
                &[(1, 5 * MIB)],
                Some(10 * MIB),
                44,
                "████░░░░░ 5 MiB of 10 MiB, 5 MiB/s, 1 s left",
            ),
            (&[(1, 5 * MIB)], Some(10 * MIB), 20, "5 MiB of 10 MiB, 5 …"),
            (&[(1, 12 * MIB)], Some(10 * MIB), 20, "10 MiB of 10 MiB, 1…"),
            (
                &[(1, 5 * MIB), (9, 5 * MIB)],
                Some(10 * MIB),
                60,
                "███████████░░░░░░░░░░░ 5 MiB of 10 MiB, nothing more for 8 s",
            ),
            // A length of nothing is none.
            (&[], Some(0), 60, "0 bytes"),
            // Another attempt began from nothing.
            (
                &[(1, 9 * MIB), (2, MIB), (3, 2 * MIB)],
                None,
                60,
                "2 MiB, 1 MiB/s",
            ),
        ] {
            let began = Instant::now();
            let now = began + Duration::from_secs(steps.last().map_or(0, |(secs, _)| *secs));
            let (text, width) = at(began, steps, total).render(now, columns, Style::PLAIN);
            assert_eq!(text, shown);
            assert_eq!(width, width::of(&text));
            assert!(width <= columns);
        }
    }
}
