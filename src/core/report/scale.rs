//! Axes: from a number to a place, and where to put the numbers that people read.
//!
//! Here: round steps of time and of amounts. Not here: drawing (`super::timeline`, `super::chart`).

/// Steps of time that people count in, milliseconds.
const TIME_STEPS: [u64; 27] = [
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 15_000, 30_000, 60_000, 120_000,
    300_000, 600_000, 900_000, 1_800_000, 3_600_000, 7_200_000, 10_800_000, 21_600_000, 43_200_000,
    86_400_000,
];

/// An axis of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct TimeAxis {
    /// Its beginning, milliseconds.
    from: u64,
    /// Its end; later than the beginning.
    to: u64,
    /// Where it lies.
    left: f64,
    width: f64,
}

impl TimeAxis {
    pub(super) fn new(from: u64, to: u64, left: f64, width: f64) -> TimeAxis {
        TimeAxis {
            from,
            to: to.max(from.saturating_add(1)),
            left,
            width,
        }
    }

    /// Where a time lies.
    pub(super) fn x(&self, ms: u64) -> f64 {
        let within = ms.clamp(self.from, self.to) - self.from;
        self.left + self.width * within as f64 / (self.to - self.from) as f64
    }

    /// Whether a time lies on it.
    pub(super) fn holds(&self, ms: u64) -> bool {
        (self.from..=self.to).contains(&ms)
    }

    /// Whether anything that ends then is seen.
    pub(super) fn reaches(&self, ms: u64) -> bool {
        ms > self.from || self.from == 0
    }

    /// Round times on it, at most so many, and the step between them.
    pub(super) fn ticks(&self, most: u64) -> (u64, Vec<u64>) {
        let span = self.to - self.from;
        let wanted = span.div_ceil(most.max(1));
        let day = TIME_STEPS[TIME_STEPS.len() - 1];
        let step = match TIME_STEPS.iter().find(|step| **step >= wanted) {
            Some(step) => *step,
            None => nice(wanted.div_ceil(day)).saturating_mul(day),
        };
        let first = self.from.div_ceil(step);
        let ticks = (first..=self.to / step).map(|number| number * step).collect();
        (step, ticks)
    }
}

/// The next of 1, 2, 5, 10, 20, 50, …
pub(super) fn nice(least: u64) -> u64 {
    let mut scale = 1_u64;
    loop {
        for factor in [1, 2, 5] {
            let step = scale.saturating_mul(factor);
            if step >= least || step == u64::MAX {
                return step;
            }
        }
        scale = scale.saturating_mul(10);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_few_and_on_the_axis() {
        for (to, most, step, count) in [
            (7_500, 8, 1_000, 8),
            (23_000, 8, 5_000, 5),
            (90, 8, 20, 5),
            (61_000, 8, 10_000, 7),
            (240_000, 8, 30_000, 9),
            (5_400_000, 6, 900_000, 7),
            (0, 8, 1, 2),
        ] {
            let (found, ticks) = TimeAxis::new(0, to, 0.0, 100.0).ticks(most);
            assert_eq!((found, ticks.len()), (step, count), "{to}");
        }
        for shift in 0..62 {
            let to = 3_u64 << shift;
            let axis = TimeAxis::new(to / 3, to, 10.0, 100.0);
            let (_, ticks) = axis.ticks(8);
            assert!(ticks.len() <= 9, "{to}: {ticks:?}");
            assert!(ticks.iter().all(|tick| axis.holds(*tick)), "{to}");
        }
    }

    #[test]
    fn a_time_beyond_the_axis_stays_on_it() {
        let axis = TimeAxis::new(1_000, 2_000, 10.0, 100.0);
        assert_eq!(
            [0, 1_000, 1_500, 2_000, u64::MAX].map(|ms| axis.x(ms)),
            [10.0, 10.0, 60.0, 110.0, 110.0]
        );
    }

    #[test]
    fn nice_numbers() {
        assert_eq!(
            [0, 1, 3, 6, 11, 201, u64::MAX].map(nice),
            [1, 1, 5, 10, 20, 500, u64::MAX]
        );
    }
}
