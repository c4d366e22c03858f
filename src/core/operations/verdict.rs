//! How a fleet fared: all of it, some, or none.
//!
//! Here: the word, as outcomes and `summary` events have it. Not here: what counts as a failure
//! (each operation), or the exit code, which is the same for some and none (docs/CLI.md).

use serde::{Deserialize, Serialize};

use crate::core::events::VmCounts;

/// Which of the VMs an operation was about are as asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FleetVerdict {
    /// All of them; also where there were none.
    All,
    /// Some, and some not.
    Some,
    /// None of them.
    None,
}

impl FleetVerdict {
    /// By how many failed.
    pub fn of(total: usize, failed: usize) -> FleetVerdict {
        match failed {
            0 => FleetVerdict::All,
            failed if failed < total => FleetVerdict::Some,
            _ => FleetVerdict::None,
        }
    }

    /// The word in `summary`; nothing for an operation that was about no VM.
    pub(crate) fn in_summary(vms: &VmCounts) -> Option<&'static str> {
        (vms.total > 0).then(|| FleetVerdict::of(vms.total, vms.failed).as_str())
    }

    /// The word in events.
    pub fn as_str(self) -> &'static str {
        match self {
            FleetVerdict::All => "all",
            FleetVerdict::Some => "some",
            FleetVerdict::None => "none",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_some_and_none_are_told_apart() {
        for (total, failed, word) in [
            (0, 0, "all"),
            (3, 0, "all"),
            (3, 1, "some"),
            (3, 2, "some"),
            (3, 3, "none"),
            (1, 1, "none"),
        ] {
            assert_eq!(
                FleetVerdict::of(total, failed).as_str(),
                word,
                "{failed} of {total}"
            );
        }
    }
}
