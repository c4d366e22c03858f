//! The bus under a seeded simulator: `step`, the real log, replay and queues, and everything
//! around them made up; time moves only when the schedule says so.
//!
//! Here: schedules and seeds. In the submodules: the broker's outside (`world`), connections
//! and their threads (`thread`), clients and what they must be told (`client`).
//!
//! A seed that fails is printed. `CASTRA_SIM_SEED=17 cargo test --lib simulation` runs it alone,
//! `CASTRA_SIM_SEEDS=100000` runs that many.

mod model_client;
mod thread;
mod world;

use std::panic::catch_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::scope;

use world::{Totals, World};

/// Seeds of a run of all tests.
const SEEDS: u64 = 3000;

/// Things that happen in one schedule, before everything comes to rest.
const STEPS: u64 = 150;

/// xorshift64*: enough to make schedules, small enough to read.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `sides`.
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) % sides.max(1)
    }

    /// Once in so many times.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.roll(times) == 0
    }
}

fn schedule(seed: u64) -> Totals {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.happen();
    }
    world.come_to_rest();
    world.end()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn whatever_happens_the_bus_keeps_its_promises() {
    if let Some(seed) = number("CASTRA_SIM_SEED") {
        println!("{:?}", schedule(seed));
        return;
    }
    let seeds = number("CASTRA_SIM_SEEDS").unwrap_or(SEEDS);
    let next = AtomicU64::new(1);
    let run = || {
        let mut sum = Totals::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed > seeds {
                return sum;
            }
            match catch_unwind(|| schedule(seed)) {
                Ok(totals) => sum.add(&totals),
                Err(_) => panic!("seed {seed} fails: CASTRA_SIM_SEED={seed} runs it alone"),
            }
        }
    };
    let mut sum = Totals::default();
    scope(|scope| {
        let workers: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
        for worker in workers {
            let totals = worker.join().unwrap_or_else(|why| std::panic::resume_unwind(why));
            sum.add(&totals);
        }
    });
    println!("{seeds} seeds: {sum:?}");
    // A simulator in which nothing happens would pass as well.
    assert!(sum.did_everything(), "{sum:?}");
}
