//! The default guest's builder and the files it puts into the guest, carried inside the binary.
//!
//! Here: the table of them and the hash over it. Not here: running the builder
//! (`images::default_guest`). The files lie in `scripts/` and also run from there.

use sha2::{Digest, Sha256};

use crate::core::host;

/// `scripts/build-guest.sh`.
pub const BUILD_SCRIPT: &str = include_str!("../../../scripts/build-guest.sh");

/// The agent that shakes hands with the broker; seeds of stock images have it, too.
pub const CASTRA_HELLO: &str = include_str!("../../../scripts/guest/castra-hello");

/// Publishes and subscribes on the bus.
pub const CASTRA_BUS: &str = include_str!("../../../scripts/guest/castra-bus");

/// The in-guest service, which the bootstrap installs.
pub const CASTRA_VIZIER: &str = include_str!("../../../scripts/guest/castra-vizier");

/// Mounts shared folders in a stock image; not part of the default guest.
pub const CASTRA_MOUNTS: &str = include_str!("../../../scripts/guest/castra-mounts");

/// The files of `scripts/guest/` that go into the default guest, by name.
pub const GUEST_FILES: [(&str, &str); 14] = [
    ("acpid", include_str!("../../../scripts/guest/acpid")),
    ("castra-bus", CASTRA_BUS),
    ("castra-hello", CASTRA_HELLO),
    (
        "castra-port-aarch64",
        include_str!("../../../scripts/guest/castra-port-aarch64"),
    ),
    (
        "castra-port-x86_64",
        include_str!("../../../scripts/guest/castra-port-x86_64"),
    ),
    ("hello", include_str!("../../../scripts/guest/hello")),
    ("inittab", include_str!("../../../scripts/guest/inittab")),
    ("late", include_str!("../../../scripts/guest/late")),
    ("power", include_str!("../../../scripts/guest/power")),
    ("profile", include_str!("../../../scripts/guest/profile")),
    ("rcS", include_str!("../../../scripts/guest/rcS")),
    ("sshd", include_str!("../../../scripts/guest/sshd")),
    ("sshd_config", include_str!("../../../scripts/guest/sshd_config")),
    ("template", include_str!("../../../scripts/guest/template")),
];

/// What a default guest is built from: the builder script and its input files.
#[derive(Clone, Copy, Debug)]
pub struct Recipe<'a> {
    /// The builder.
    pub script: &'a str,
    /// Name and contents.
    pub files: &'a [(&'a str, &'a str)],
}

/// The recipe of this castra.
pub const RECIPE: Recipe<'static> = Recipe {
    script: BUILD_SCRIPT,
    files: &GUEST_FILES,
};

impl Recipe<'_> {
    /// Twelve hex digits that change when the script or any file does, so that the guests of two
    /// castras can be kept side by side. Each part is hashed with its length, so one part never
    /// reads as two.
    pub fn id(&self) -> String {
        let mut hasher = Sha256::new();
        let mut add = |bytes: &[u8]| {
            hasher.update((bytes.len() as u64).to_be_bytes());
            hasher.update(bytes);
        };
        add(self.script.as_bytes());
        for (name, contents) in self.files {
            add(name.as_bytes());
            add(contents.as_bytes());
        }
        host::hex(&hasher.finalize()[..6])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builder_is_given_exactly_the_files_it_asks_for() {
        let line = BUILD_SCRIPT
            .lines()
            .find_map(|line| line.strip_prefix("guest_files='"))
            .and_then(|line| line.strip_suffix('\''));
        let mut asked: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
        asked.sort_unstable();
        let mut carried: Vec<&str> = GUEST_FILES.iter().map(|(name, _)| *name).collect();
        carried.sort_unstable();
        assert_eq!(asked, carried);
    }

    #[test]
    fn the_builder_and_the_table_agree_on_architectures() {
        for arch in &crate::core::arch::KNOWN {
            let row = format!(
                "{})\n    debian={} console={} kernel_file={} ",
                arch.name, arch.debian, arch.console, arch.kernel_file
            );
            assert!(BUILD_SCRIPT.contains(&row), "{row}");
        }
    }

    #[test]
    fn the_id_changes_with_every_part() {
        let files = [("a", "1"), ("b", "2")];
        let of = |script, files| Recipe { script, files }.id();
        let id = of("x", &files);
        assert_eq!(id.len(), 12);
        assert_eq!(id, of("x", &files));
        assert_ne!(id, of("y", &files));
        assert_ne!(id, of("x", &[("a", "1"), ("b", "3")]));
        assert_ne!(id, of("x", &[("a", "1b"), ("", "2")]));
    }
}
