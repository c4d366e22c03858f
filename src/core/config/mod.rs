//! `castra.toml`, checked: everything in here is valid, defaults filled in, replicas expanded,
//! paths absolute (docs/CONFIG.md).
//!
//! Here: the types the rest of castra works with. Not here: reading the file or finding it
//! (the submodules), or making anything it describes.

mod bootstrap_tables;
#[cfg(test)]
mod docs;
pub mod launched;
mod load;
mod metadata;
mod path_values;
mod reader;
mod settings;
mod size;
mod source;
mod vm;
mod vms;
pub mod workspace;

pub use load::{CONFIG_FILE, Environment, discover, load, load_in, load_with_home};

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::core::arch::Arch;
use crate::core::events::BootstrapMode;
pub use crate::core::events::Protocol;
use crate::core::lines::journal::Rotation;
use crate::core::name::VmName;
use crate::core::root::paths::StateRoot;
use crate::core::root::records::{SSH_PORT, leads_to_ssh};

/// One project, as its config file describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The config file, canonical.
    pub path: PathBuf,
    /// The directory it lies in; relative paths in it start here.
    pub dir: PathBuf,
    /// `[project].name`, or the folder's name.
    pub project: String,
    /// `<slug>-<hash8>`: what `--workspace` takes.
    pub workspace: String,
    /// Where its state is kept.
    pub state: StateRoot,
    /// Its entry in the registry of projects, `<castra home>/projects/<id>`; `None` without a
    /// castra home.
    pub registry: Option<PathBuf>,
    /// `[qemu]`.
    pub qemu: QemuConfig,
    /// `[broker]`.
    pub broker: BrokerConfig,
    /// `[bus]`.
    pub bus: BusConfig,
    /// `[lifecycle]`.
    pub lifecycle: LifecycleConfig,
    /// `[vizier].enabled`.
    pub vizier_enabled: bool,
    /// All VMs, replicas expanded, in the order of the file.
    pub vms: Vec<VmConfig>,
    /// What is odd but not wrong, each beginning `castra.toml:LINE:COLUMN: `.
    pub warnings: Vec<String>,
}

impl Config {
    /// The VM of this name, compared without case.
    pub fn vm(&self, name: &str) -> Option<&VmConfig> {
        self.vms
            .iter()
            .find(|vm| vm.name.as_str().eq_ignore_ascii_case(name))
    }

    /// Whether this name means this VM: it is the VM's own, or that of its role and of no VM. Compared without case.
    pub fn means(&self, name: &str, vm: &VmConfig) -> bool {
        vm.name.as_str().eq_ignore_ascii_case(name)
            || (vm.role.eq_ignore_ascii_case(name) && self.vm(name).is_none())
    }
}

/// `[qemu]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QemuConfig {
    /// The guests' architecture.
    pub arch: &'static Arch,
    /// Which accelerator to use.
    pub accel: AccelChoice,
    /// A QEMU binary other than `qemu-system-<arch>` on PATH.
    pub binary: Option<PathBuf>,
}

/// What the config says about the accelerator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccelChoice {
    /// By evidence.
    #[default]
    Auto,
    /// KVM or fail.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// Which TCP port the broker listens on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PortChoice {
    /// Unset: 7070 if it is free, else a free one.
    #[default]
    Preferred,
    /// `0`: a free one.
    Free,
    /// Exactly this one or fail.
    Exactly(u16),
}

/// `[broker]`.
#[derive(Clone, Debug, PartialEq)]
pub struct BrokerConfig {
    /// The port.
    pub port: PortChoice,
    /// How long proof of life counts.
    pub freshness: Duration,
    /// Who must show a token.
    pub auth: AuthMode,
    /// For the whole hello, from accept.
    pub hello_timeout: Duration,
    /// Connections at once.
    pub max_connections: usize,
}

/// `[broker].auth`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AuthMode {
    /// A VM that castra gave a token must present it; others may come without.
    #[default]
    Auto,
    /// Everybody needs one.
    Token,
    /// Nobody does.
    Open,
}

impl Default for BrokerConfig {
    fn default() -> BrokerConfig {
        BrokerConfig {
            port: PortChoice::Preferred,
            freshness: Duration::from_secs(45),
            auth: AuthMode::Auto,
            hello_timeout: Duration::from_secs(5),
            max_connections: 2048,
        }
    }
}

/// `[bus]`.
#[derive(Clone, Debug, PartialEq)]
pub struct BusConfig {
    /// Largest frame, bytes.
    pub max_frame_bytes: usize,
    /// No frame for this long closes a session.
    pub session_idle: Duration,
    /// Bytes queued for one session.
    pub outbound_queue_bytes: usize,
    /// Bytes queued for all sessions.
    pub total_queue_bytes: usize,
    /// Sessions of one VM at once.
    pub sessions_per_vm: usize,
    /// Subscriptions of one session.
    pub subscriptions_per_session: usize,
    /// 0: no limit.
    pub publishes_per_sec_per_vm: u32,
    /// Rotation of every log file.
    pub rotation: Rotation,
    /// What an ack promises.
    pub sync: SyncMode,
}

/// `[bus].sync`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SyncMode {
    /// The kernel writes when it likes.
    None,
    /// fdatasync every second.
    #[default]
    Interval,
    /// fdatasync before every ack.
    Batch,
}

impl Default for BusConfig {
    fn default() -> BusConfig {
        BusConfig {
            max_frame_bytes: 65536,
            session_idle: Duration::from_secs(60),
            outbound_queue_bytes: 4_194_304,
            total_queue_bytes: 268_435_456,
            sessions_per_vm: 8,
            subscriptions_per_session: 64,
            publishes_per_sec_per_vm: 0,
            rotation: Rotation::default(),
            sync: SyncMode::Interval,
        }
    }
}

/// `[lifecycle]`: how long each rung of the shutdown ladder may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LifecycleConfig {
    /// After the request to power off.
    pub graceful_shutdown_wait: Duration,
    /// After SIGTERM.
    pub sigterm_wait: Duration,
    /// After SIGKILL.
    pub sigkill_wait: Duration,
}

impl Default for LifecycleConfig {
    fn default() -> LifecycleConfig {
        LifecycleConfig {
            graceful_shutdown_wait: Duration::from_secs(20),
            sigterm_wait: Duration::from_secs(10),
            sigkill_wait: Duration::from_secs(5),
        }
    }
}

/// One VM.
#[derive(Clone, Debug, PartialEq)]
pub struct VmConfig {
    /// Its own name: `api-0`, or `web` without `count`.
    pub name: VmName,
    /// What the guest calls itself in its hello, where that is another name: `handshake_identity` of a
    /// `bootstrap.toml` that is no VM's name. Nobody else's, and no VM's.
    pub second_name: Option<VmName>,
    /// The name of its `[[vms]]` entry.
    pub role: String,
    /// Free text.
    pub description: Option<String>,
    /// What its disk starts from.
    pub base_image: Option<BaseImage>,
    /// Direct kernel boot.
    pub kernel: Option<DirectKernel>,
    /// Where its overlay is; `None`: the default place.
    pub overlay: Option<PathBuf>,
    /// Size the disk is grown to, bytes.
    pub disk_size: Option<u64>,
    /// The overlay survives `down`.
    pub persist: bool,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// What it reaches.
    pub network: Network,
    /// Whether a stock image gets identity and key at boot.
    pub seed: SeedMode,
    /// Cloud-init user data merged into the seed, as written in the config.
    pub user_data: Option<String>,
    /// Further QEMU arguments, verbatim.
    pub qemu_args: Vec<String>,
    /// Forwards to the host's loopback.
    pub port_forwards: Vec<PortForward>,
    /// Shared directories.
    pub mounts: Vec<Mount>,
    /// How it is configured.
    pub bootstrap: BootstrapConfig,
    /// How it is reached by SSH.
    pub ssh: SshConfig,
    /// Where its keys stand, as `castra.toml:LINE:COLUMN`; entries of lists are `mounts.0`, `mounts.1`.
    /// For messages about what only a look at the host, or QEMU, finds wrong.
    pub bases: BTreeMap<String, String>,
}

impl VmConfig {
    /// `castra.toml:4:8: `, where this key stands; nothing where the config doesn't have it.
    pub fn place(&self, key: &str) -> String {
        self.bases
            .get(key)
            .map_or_else(String::new, |place| format!("{place}: "))
    }

    /// Whether it boots castra's own default guest: neither an image nor a kernel is named.
    pub fn is_default_guest(&self) -> bool {
        self.base_image.is_none() && self.kernel.is_none()
    }
}

/// What a disk starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseImage {
    /// Where it comes from.
    pub source: ImageSource,
    /// The digest it must have.
    pub digest: Option<ImageDigest>,
}

/// Where a base image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// A file, absolute.
    Path(PathBuf),
    /// An https URL, fetched once into the shared cache.
    Url(String),
}

/// A pinned digest, lower-case hex.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageDigest {
    /// 64 digits.
    Sha256(String),
    /// 128 digits.
    Sha512(String),
}

/// `kernel`, `initrd`, `cmdline`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectKernel {
    /// bzImage or PVH vmlinux, absolute.
    pub kernel: PathBuf,
    /// initramfs, absolute.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: Option<String>,
}

/// `network`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// User-mode networking with a way out.
    #[default]
    User,
    /// The guest reaches the broker and nothing else.
    Isolated,
}

/// `seed`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SeedMode {
    /// Identity, broker address, token and SSH key are given to the guest.
    #[default]
    Auto,
    /// Nothing is.
    None,
}

/// A forward from the host's loopback to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortForward {
    /// 0: a free one is picked at launch.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

/// These forwards, and one to the guest's SSH port if none of them is.
pub fn with_ssh(wanted: &[PortForward]) -> Vec<PortForward> {
    let mut all = wanted.to_vec();
    let to_ssh = |forward: &PortForward| leads_to_ssh(forward.guest, forward.protocol);
    if !wanted.iter().any(to_ssh) {
        all.push(PortForward {
            host: 0,
            guest: SSH_PORT,
            protocol: Protocol::Tcp,
        });
    }
    all
}

/// A host directory shared with the guest (9p).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Absolute.
    pub host: PathBuf,
    /// Absolute, in the guest.
    pub guest: String,
    /// The guest can't write.
    pub readonly: bool,
}

/// `[bootstrap]` merged with `[vms.bootstrap]` and, from a `bootstrap.toml` beside the script,
/// its overrides.
#[derive(Clone, Debug, PartialEq)]
pub struct BootstrapConfig {
    /// When it runs.
    pub mode: BootstrapMode,
    /// Unset: 60 s, under TCG 240 s.
    pub handshake_timeout: Option<Duration>,
    /// For each step but `wait-handshake` and `apply`.
    pub step_timeout: Duration,
    /// For `apply`.
    pub apply_timeout: Duration,
    /// Where the guest keeps it, absolute.
    pub remote_dir: String,
    /// Variables of the script.
    pub env: BTreeMap<String, String>,
    /// The host script, absolute.
    pub script: Option<PathBuf>,
    /// The host directory copied beside it, absolute.
    pub payload: Option<PathBuf>,
    /// Run in `remote_dir` at the end.
    pub verify_command: Option<String>,
    /// Must exist at the end; relative to `remote_dir`.
    pub verify_path: Option<String>,
    /// `handshake_identity` of `bootstrap.toml`, where it is a VM's name: whose handshake counts; default this
    /// VM's.
    pub handshake_identity: Option<VmName>,
    /// The `bootstrap.toml` that took part.
    pub metadata_path: Option<PathBuf>,
}

/// `[ssh]`, with `bootstrap.toml` overrides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshConfig {
    /// Login name.
    pub user: String,
    /// Set by `bootstrap.toml` alone; otherwise the loopback.
    pub host: Option<String>,
    /// Set by `bootstrap.toml` alone; otherwise the forward to the guest's port 22.
    pub port: Option<u16>,
    /// A private key; unset: the project's own.
    pub identity: Option<PathBuf>,
    /// `Key=value` for `ssh -o`.
    pub options: Vec<String>,
}

impl Default for SshConfig {
    fn default() -> SshConfig {
        SshConfig {
            user: "root".into(),
            host: None,
            port: None,
            identity: None,
            options: Vec::new(),
        }
    }
}
