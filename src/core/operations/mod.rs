//! The verbs: one function for each thing castra does, and the way in for programs that embed it.
//!
//! Here: `pub fn NAME(options, reporter) -> Result<outcome, Failure>`, one module each, and all of
//! them by one path: `operations::up` is the function, `operations::up::UpOutcome` what its module
//! defines. Not here: how any of it is asked for (`cli`) or shown (`app`), or keeping what an
//! operation tells (`core::outcome`).
//!
//! No operation prints, exits, reads the command line, or changes the working directory, the
//! environment or the signal handlers of the program it runs in. Whoever calls one decides who hears
//! of it (`core::reporter::Reporter`), what stops it (`core::cancel::Cancel`) and how a broker is
//! started ([`BrokerLauncher`]).
//!
//! ```no_run
//! use castra::core::config;
//! use castra::core::events::contract::Stamped;
//! use castra::core::operations::{self, DownOptions, ThreadBrokerLauncher, UpOptions};
//! use castra::core::reporter::Reporter;
//!
//! struct Lines;
//!
//! impl Reporter for Lines {
//!     fn report(&mut self, event: &Stamped) {
//!         eprintln!("{}", event.contract_line());
//!     }
//! }
//!
//! # fn main() -> Result<(), castra::core::failure::Failure> {
//! let config = config::load("castra.toml".as_ref())?;
//! let broker = ThreadBrokerLauncher::new();
//! let options = UpOptions::new(config.clone(), "/var/lib/me/castra");
//! let outcome = operations::up_with_launcher(options, &broker, &mut Lines)?;
//! for vm in &outcome.vms {
//!     println!("{}: {:?}", vm.vm, vm.forwards);
//! }
//! operations::down(DownOptions::of(&config), &mut Lines)?;
//! broker.stop();
//! # Ok(())
//! # }
//! ```

pub mod bootstrap;
pub mod bus;
pub mod clean;
mod clean_project;
pub mod doctor;
pub mod down;
pub mod events;
pub(crate) mod fleet;
pub mod harness;
pub mod image;
pub mod init;
pub mod logs;
pub mod lost;
pub mod ports;
pub mod report;
pub mod restart;
mod run;
mod select;
pub mod status;
pub mod up;
mod verdict;
pub mod wait;

pub use crate::core::broker::launcher::{BrokerLauncher, ProcessBrokerLauncher, ThreadBrokerLauncher};
pub use crate::core::outcome::{OperationOutput, collect, collect_with};
pub use crate::core::runtime::launch_plan::VmLaunchMode;
pub use bootstrap::{BootstrapOptions, bootstrap, bootstrap_with_launcher};
pub use bus::{bus_bench, bus_publish, bus_request, bus_subscribe, bus_tail};
pub use clean::{CleanOptions, CleanOutcome, CleanTarget, clean};
pub use doctor::{DoctorOptions, DoctorProject, doctor};
pub use down::{DownOptions, DownOutcome, down};
pub use events::{EventsOptions, EventsOutcome, events};
pub use image::{ImageOptions, ImageOutcome, image};
pub use init::{InitOptions, InitOutcome, init};
pub use logs::{LogsOptions, LogsOutcome, logs};
pub use ports::{PortsOptions, ports};
pub use report::{ReportOptions, report, save_page};
pub use restart::{RestartOptions, restart, restart_with_launcher};
pub use status::{StatusOptions, status};
pub use up::{UpOptions, UpOutcome, up, up_with_launcher};
pub use verdict::FleetVerdict;
pub use wait::{WaitFor, WaitOptions, WaitOutcome, wait};
