//! What holds for every command: variables, files, the first steps.

/// One line each.
pub const TAGLINE: &str = "throw-away QEMU VMs from one file";

/// The first paragraph of help and man page.
pub const ABOUT: &str = "castra starts the QEMU VMs that one castra.toml describes, shows which of them are really alive, \
    configures them over SSH, and reports everything as one stream of events.";

/// Variables of the environment.
pub const ENVIRONMENT: &[(&str, &str)] = &[
    (
        "CASTRA_HOME",
        "where castra keeps state and images instead of ~/.castra",
    ),
    (
        "CASTRA_LOG",
        "castra's own log on stderr, such as `debug`; off if unset",
    ),
    (
        "NO_COLOR",
        "if set and not empty, no colour unless --color always",
    ),
    ("TERM", "`dumb` turns off colours and lines that change in place"),
];

/// Files people meet.
pub const FILES: &[(&str, &str)] = &[
    (
        "castra.toml",
        "the project: its VMs and how they are bootstrapped",
    ),
    (
        "~/.castra/projects/ID",
        "a project's state root, unless it sets state_dir",
    ),
    ("~/.castra/images", "images, shared by all projects"),
];

/// From nothing to a shell in a VM.
pub const FIRST_STEPS: &[(&str, &str)] = &[
    ("castra init", "write a castra.toml"),
    ("castra up", "boot its VM and bootstrap it"),
    ("castra status", "see that it is alive"),
    ("castra ssh", "work in it"),
    ("castra down", "stop it and discard its disk"),
];
