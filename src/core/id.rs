//! The ids of what castra starts, each a type of its own, so that none can be taken for another.
//!
//! Here: ids of runs, launches and host boots. Not here: who draws them (`core::reporter`, `core::operations::fleet`, the
//! kernel), names of VMs (`core::name`).

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$about:meta])* $name:ident) => {
        $(#[$about])*
        ///
        /// It may be any text: ids are only compared, and what another version of castra wrote can be compared, too.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> $name {
                $name(text)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> $name {
                $name(text.to_owned())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

id! {
    /// Id of one run: of a command, of the broker, of a bootstrap.
    RunId
}

id! {
    /// Id of one launch of a VM.
    LaunchId
}

id! {
    /// The kernel's id of one boot of the host.
    BootId
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_string_in_json_whatever_it_holds() {
        for text in ["\"0123abcd\"", "\"\"", "\"web \\u001b[0m/é\""] {
            let id: LaunchId = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&id).unwrap(), text);
        }
        assert!(serde_json::from_str::<LaunchId>("7").is_err());
    }
}
