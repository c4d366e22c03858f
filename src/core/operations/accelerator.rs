//! Which accelerator this project's guests run under.

use crate::core::config::{AccelChoice, Config};
use crate::core::events::Accel;

/// The choice, and why.
#[derive(Clone, Debug)]
pub(crate) struct AccelDecision {
    /// The accelerator.
    pub accel: Accel,
    /// In a few words.
    pub reason: String,
}

/// What the config says; where it leaves the choice, the one that runs everywhere.
pub(crate) fn decide(config: &Config) -> AccelDecision {
    match config.qemu.accel {
        AccelChoice::Kvm => AccelDecision {
            accel: Accel::Kvm,
            reason: "set in castra.toml".to_owned(),
        },
        AccelChoice::Tcg => AccelDecision {
            accel: Accel::Tcg,
            reason: "set in castra.toml".to_owned(),
        },
        AccelChoice::Auto => AccelDecision {
            accel: Accel::Tcg,
            reason: "runs on every host".to_owned(),
        },
    }
}
