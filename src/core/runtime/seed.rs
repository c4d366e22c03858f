//! What a guest learns at boot: its name, the broker's address, its token, the SSH keys that may log in.
//!
//! Here: which channel a VM takes, the files under `vms/<vm>/seed/`, tokens, and fw_cfg, the default guest's
//! channel. Not here: the text for cloud-init (`runtime::nocloud`), QEMU's arguments (`runtime::qemu`), or
//! who gets a token (`operations::fleet::identity` asks [`takes_token`]).
//!
//! Secrets are passed in files of mode 0600 in a directory of mode 0700: QEMU's command line is public.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::core::config::{Mount, SeedMode, VmConfig};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::images::digest::sha256_hex;
use crate::core::name::VmName;
use crate::core::runtime::launch_plan::{FwCfg, FwCfgValue, mounts_table};
use crate::core::runtime::nocloud;

/// Bytes of randomness in a token (docs/PROTOCOL.md).
const TOKEN_BYTES: usize = 16;
/// vvfat shows a FAT disk of 504 MiB; a seed beyond this is a mistake, not a seed.
const MAX_NOCLOUD_BYTES: usize = 8 << 20;
/// vvfat keeps its directory's path in a buffer of 1024 bytes.
const MAX_VVFAT_PATH: usize = 1000;

/// What one launch passes to QEMU. Empty: the guest gets nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seed {
    /// `-fw_cfg` entries, in this order.
    pub fw_cfg: Vec<FwCfg>,
    /// A directory to show as a FAT disk with the label `cidata`.
    pub nocloud_dir: Option<PathBuf>,
}

/// The channel by which a VM gets its seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeedKind {
    /// It gets none.
    Nothing,
    /// QEMU's fw_cfg: the default guest, and VMs with a kernel of the user's and no image.
    FwCfg,
    /// A NoCloud disk for cloud-init: stock images.
    NoCloud,
}

impl SeedKind {
    /// The channel of this VM.
    pub fn of(vm: &VmConfig) -> SeedKind {
        match (vm.seed, &vm.base_image) {
            (SeedMode::None, _) => SeedKind::Nothing,
            (SeedMode::Auto, Some(_)) => SeedKind::NoCloud,
            (SeedMode::Auto, None) => SeedKind::FwCfg,
        }
    }
}

/// Whether castra can give this VM a token and may therefore ask for it (docs/PROTOCOL.md). A kernel of the
/// user's gets the rest of the seed, but castra can't know whether that guest reads fw_cfg.
pub fn takes_token(vm: &VmConfig) -> bool {
    vm.seed == SeedMode::Auto && (vm.is_default_guest() || vm.base_image.is_some())
}

/// A fresh token: 128 random bits as hex.
pub fn new_token() -> Result<String> {
    host::random_hex(TOKEN_BYTES).map_err(|error| {
        Failure::new(Exit::Io, "can't make a token").because(format!("/dev/urandom: {error}"))
    })
}

/// A token as `guests.json` has it: the hash of its hex digits.
pub fn token_sha256(token: &str) -> String {
    sha256_hex(token.as_bytes())
}

/// Everything that goes into a seed.
#[derive(Clone, Copy, Debug)]
pub struct SeedInputs<'a> {
    /// The VM.
    pub vm: &'a VmName,
    /// The launch id, by which cloud-init tells a new boot from an old one.
    pub launch_id: &'a str,
    /// `HOST:PORT` as the guest reaches the broker.
    pub broker: &'a str,
    /// The token of this launch.
    pub token: Option<&'a str>,
    /// How often a guest without a session says hello.
    pub heartbeat_secs: u64,
    /// Public keys that may log in, a line each.
    pub authorized_keys: &'a str,
    /// The login name they are for.
    pub user: &'a str,
    /// Shared folders; their tags are `launch_plan::mount_tag`'s.
    pub mounts: &'a [Mount],
    /// The user's own cloud-init data.
    pub user_data: Option<&'a str>,
}

/// Writes the seed of one launch into `dir` (`VmPaths::seed`), replacing that of the last one. The
/// VM's lock is held and its QEMU isn't running.
pub fn write_seed(kind: SeedKind, dir: &Path, inputs: &SeedInputs<'_>) -> Result<Seed> {
    discard_seed(dir)?;
    match kind {
        SeedKind::Nothing => Ok(Seed::default()),
        SeedKind::FwCfg => write_fw_cfg(dir, inputs),
        SeedKind::NoCloud => {
            let seed = write_nocloud(&nocloud_dir(dir), inputs)?;
            // Beside the disk, for the bootstrap: Vizier gets it from there.
            if let Some(token) = inputs.token {
                write_private(&dir.join("token"), format!("{token}\n").as_bytes())?;
            }
            Ok(seed)
        }
    }
}

/// Removes a seed and its secrets, if there is one.
pub fn discard_seed(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Failure::io("remove", dir, &error)),
        _ => Ok(()),
    }
}

fn write_fw_cfg(dir: &Path, inputs: &SeedInputs<'_>) -> Result<Seed> {
    make_dir(dir)?;
    let mounts = mounts_text(inputs.vm, inputs.mounts)?;
    let text = |key: &str, value: String| FwCfg {
        name: format!("opt/castra/{key}"),
        value: FwCfgValue::Text(value),
    };
    let mut fw_cfg = vec![
        text("vm", inputs.vm.to_string()),
        text("broker", inputs.broker.to_owned()),
        text("heartbeat_secs", inputs.heartbeat_secs.to_string()),
    ];
    let files = [
        ("token", inputs.token.map(|token| format!("{token}\n"))),
        ("authorized_keys", Some(with_newline(inputs.authorized_keys))),
        ("mounts", Some(mounts)),
    ];
    for (key, contents) in files {
        // QEMU refuses an empty file.
        let Some(contents) = contents.filter(|contents| !contents.trim().is_empty()) else {
            continue;
        };
        let path = dir.join(key);
        write_private(&path, contents.as_bytes())?;
        fw_cfg.push(FwCfg {
            name: format!("opt/castra/{key}"),
            value: FwCfgValue::File(path),
        });
    }
    Ok(Seed {
        fw_cfg,
        nocloud_dir: None,
    })
}

/// Checks a seed without making it; `inputs` may hold placeholders for what only a launch knows.
pub fn check_seed(kind: SeedKind, dir: &Path, inputs: &SeedInputs<'_>) -> Result<()> {
    match kind {
        SeedKind::Nothing => Ok(()),
        SeedKind::FwCfg => mounts_text(inputs.vm, inputs.mounts).map(drop),
        SeedKind::NoCloud => nocloud_text(&nocloud_dir(dir), inputs).map(drop),
    }
}

fn nocloud_dir(dir: &Path) -> PathBuf {
    dir.join("nocloud")
}

/// The user data that is to lie in `dir`.
fn nocloud_text(dir: &Path, inputs: &SeedInputs<'_>) -> Result<String> {
    let refused = |why: String| {
        Failure::new(Exit::Config, format!("can't make the seed of {}", inputs.vm)).because(why)
    };
    if dir.as_os_str().len() > MAX_VVFAT_PATH {
        return Err(refused(format!(
            "QEMU takes at most {MAX_VVFAT_PATH} bytes of path for it: {}",
            dir.display()
        ))
        .advice("put the state elsewhere with `state_dir` under [project] or CASTRA_HOME"));
    }
    let mounts = mounts_text(inputs.vm, inputs.mounts)?;
    let user_data = nocloud::user_data(inputs, &mounts).map_err(|error| {
        refused(error.to_string()).advice(
            "begin `user_data` with `#cloud-config` for YAML or `#!` for a script, or set `seed = \"none\"`",
        )
    })?;
    if user_data.len() > MAX_NOCLOUD_BYTES {
        return Err(
            refused(format!("`user_data` makes it {} bytes long", user_data.len())).advice(format!(
                "keep it under {MAX_NOCLOUD_BYTES} bytes; a payload goes under [vms.bootstrap]"
            )),
        );
    }
    Ok(user_data)
}

fn write_nocloud(dir: &Path, inputs: &SeedInputs<'_>) -> Result<Seed> {
    let user_data = nocloud_text(dir, inputs)?;
    make_dir(dir)?;
    write_private(&dir.join("meta-data"), nocloud::meta_data(inputs).as_bytes())?;
    write_private(&dir.join("user-data"), user_data.as_bytes())?;
    Ok(Seed {
        fw_cfg: Vec::new(),
        nocloud_dir: Some(dir.to_owned()),
    })
}

/// The guest's table of mounts; a path that would break it is refused.
fn mounts_text(vm: &VmName, mounts: &[Mount]) -> Result<String> {
    match mounts.iter().find(|mount| mount.guest.contains(['\t', '\n'])) {
        None => Ok(mounts_table(mounts)),
        Some(mount) => Err(
            Failure::new(Exit::Config, format!("can't share a folder with {vm}"))
                .because(format!(
                    "{:?} holds a tab or line feed, which mark the end of a name",
                    mount.guest
                ))
                .advice("choose another `guest` path under [[vms.mounts]]"),
        ),
    }
}

fn with_newline(text: &str) -> String {
    format!("{}\n", text.trim_end())
}

fn make_dir(dir: &Path) -> Result<()> {
    host::ensure_private_dir(dir).map_err(|error| Failure::io("create", dir, &error))
}

fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    host::private_file()
        .write(true)
        .create_new(true)
        .open(path)
        .and_then(|mut file| file.write_all(bytes))
        .map_err(|error| Failure::io("create", path, &error))
}

#[cfg(test)]
#[path = "seed_tests.rs"]
mod tests;
