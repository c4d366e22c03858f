//! How bootstraps, launches and shutdowns end: one enum each, spelled as the JSON of castra spells it.
//!
//! Here: the enums, and the field that holds one in a file or event that another version of castra may have
//! written. Not here: the states of a VM that runs (`core::root::ending`), or how an operation as a whole ended
//! (`core::failure`).

use std::fmt;

use serde::{Deserialize, Serialize};

/// An enum whose variants are words.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$doc])* #[serde(rename = $word)] $variant,)*
        }

        impl $name {
            /// All of them.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];

            /// The word in JSON and messages.
            pub fn as_str(self) -> &'static str {
                match self {
                    $($name::$variant => $word,)*
                }
            }
        }

        impl From<$name> for &'static str {
            fn from(word: $name) -> &'static str {
                word.as_str()
            }
        }
    };
}

words! {
    /// How a bootstrap stands or ended.
    BootstrapStatus {
        /// It is at work.
        Running = "running",
        /// All steps ended well.
        Success = "success",
        /// It didn't run: mode `skip`.
        Skipped = "skipped",
        /// A step failed, or somebody asked to stop.
        Failed = "failed",
    }
}

words! {
    /// How the launch of a VM ended.
    LaunchEnding {
        /// In order.
        Stopped = "stopped",
        /// Unexpectedly.
        Crashed = "crashed",
    }
}

words! {
    /// How a VM was stopped.
    ShutdownEnding {
        /// There was nothing to stop.
        AlreadyStopped = "already-stopped",
        /// The guest powered itself off.
        Graceful = "graceful",
        /// SIGTERM ended QEMU.
        Terminated = "terminated",
        /// SIGKILL did.
        Killed = "killed",
        /// QEMU outlived even that.
        Failed = "failed",
    }
}

/// A word of the enum `T` in a file or event. A word that only another version of castra knows is kept as it is:
/// the rest of the file or event still counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OpenEnum<T> {
    /// A word of this version.
    Known(T),
    /// Another word.
    Other(String),
}

impl<T: Copy + Into<&'static str>> OpenEnum<T> {
    /// The word.
    pub fn as_str(&self) -> &str {
        match self {
            OpenEnum::Known(word) => (*word).into(),
            OpenEnum::Other(word) => word,
        }
    }

    /// The variant, if this version knows the word.
    pub fn known(&self) -> Option<T> {
        match self {
            OpenEnum::Known(word) => Some(*word),
            OpenEnum::Other(_) => None,
        }
    }
}

impl<T> From<T> for OpenEnum<T> {
    fn from(word: T) -> OpenEnum<T> {
        OpenEnum::Known(word)
    }
}

impl<T: PartialEq> PartialEq<T> for OpenEnum<T> {
    fn eq(&self, other: &T) -> bool {
        matches!(self, OpenEnum::Known(word) if word == other)
    }
}

impl<T: Copy + Into<&'static str>> fmt::Display for OpenEnum<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The `status` of `bootstrap.completed`, which has words of its own.
pub(super) mod noop_status {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    enum Status {
        Success,
        NoOp,
    }

    pub fn serialize<S: Serializer>(noop: &bool, to: S) -> Result<S::Ok, S::Error> {
        if *noop { Status::NoOp } else { Status::Success }.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
        Ok(matches!(Status::deserialize(from)?, Status::NoOp))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fmt::Debug;

    use serde::de::DeserializeOwned;
    use serde_json::json;

    use super::*;
    use crate::core::events::Event;
    use crate::core::events::contract::Stamped;

    fn check<T>(all: &[T])
    where
        T: Copy + Debug + PartialEq + Into<&'static str> + Serialize + DeserializeOwned,
    {
        for word in all.iter().copied() {
            let spelled: &str = word.into();
            let read: OpenEnum<T> = serde_json::from_value(json!(spelled)).unwrap();
            assert_eq!(read, OpenEnum::Known(word));
            assert_eq!(serde_json::to_value(&read).unwrap(), spelled);
            assert_eq!(serde_json::to_value(word).unwrap(), spelled);
            assert!(read == word && read.known() == Some(word) && read.as_str() == spelled);
        }
        let other: OpenEnum<T> = serde_json::from_value(json!("teleported")).unwrap();
        assert_eq!((other.known(), other.as_str()), (None, "teleported"));
        assert_eq!(serde_json::to_value(&other).unwrap(), "teleported");
        assert!(serde_json::from_value::<OpenEnum<T>>(json!(7)).is_err());
    }

    #[test]
    fn every_word_is_read_as_it_is_written_and_an_unknown_one_is_kept() {
        check(BootstrapStatus::ALL);
        check(LaunchEnding::ALL);
        check(ShutdownEnding::ALL);
    }

    /// An event with these fields, read and written again.
    fn passed(kind: &str, fields: &str) -> Option<String> {
        let line = format!(
            r#"{{"type":"{kind}","v":1,"ts":"t","offset_ms":0,"seq":0,"run":"r","vm":"web",{fields}}}"#
        );
        let again = Stamped::from_contract_line(&line)?.contract_line();
        assert_eq!(again, line);
        Some(again)
    }

    #[test]
    fn an_event_of_another_version_keeps_its_word() {
        for outcome in ["crashed", "teleported"] {
            let fields = format!(
                r#""phase":"exited","pid":1,"reason":"r","outcome":"{outcome}","last_words":null,"qemu_words":null,"remediation":null"#
            );
            assert!(passed("vm.lifecycle", &fields).is_some());
            let fields =
                format!(r#""phase":"shutdown-complete","outcome":"{outcome}","elapsed_ms":1,"changed":true"#);
            assert!(passed("vm.lifecycle", &fields).is_some());
        }
    }

    #[test]
    fn a_completed_bootstrap_says_whether_it_changed_anything() {
        for (noop, status) in [(false, "Success"), (true, "NoOp")] {
            let event = Event::BootstrapCompleted {
                vm: "web".parse().unwrap(),
                noop,
                duration_ms: 1,
                stamp: None,
            };
            let value = serde_json::to_value(&event).unwrap();
            assert_eq!(value["BootstrapCompleted"]["status"], status);
            assert_eq!(serde_json::from_value::<Event>(value).unwrap(), event);
        }
        assert_eq!(
            passed(
                "bootstrap.completed",
                r#""status":"Odd","duration_ms":1,"stamp":null"#
            ),
            None
        );
    }
}
