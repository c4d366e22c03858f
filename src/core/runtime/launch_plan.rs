//! The launch plan: everything QEMU needs to know about one VM, decided before anything is started.
//!
//! Here: plain data, and the addresses that guests see. Not here: the command line made of it
//! ([`super::qemu`]), the choice of ports ([`super::forwards`]) or of the accelerator
//! ([`super::accel`]).

use std::ffi::OsString;
use std::path::PathBuf;

use crate::core::arch::Arch;
use crate::core::config::{DirectKernel, Mount, Network};
use crate::core::events::Accel;
use crate::core::name::VmName;
use crate::core::root::records::ForwardRecord;

/// Everything QEMU needs to know about one VM.
#[derive(Clone, Debug, PartialEq)]
pub struct LaunchPlan {
    /// The VM.
    pub vm: VmName,
    /// `vms/<vm>`, absolute: QEMU's working directory, where its sockets and logs are.
    pub dir: PathBuf,
    /// The guest's architecture.
    pub arch: &'static Arch,
    /// The QEMU to run.
    pub binary: PathBuf,
    /// The accelerator.
    pub accel: Accel,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Direct kernel boot; the default guest's kernel too.
    pub kernel: Option<DirectKernel>,
    /// The first disk.
    pub disk: Option<Disk>,
    /// A directory shown as a FAT disk with the label `cidata`; absolute.
    pub seed_dir: Option<PathBuf>,
    /// What the guest's network reaches.
    pub network: PlannedNetwork,
    /// Forwards, every host port already chosen.
    pub forwards: Vec<ForwardRecord>,
    /// What the guest can read by fw_cfg.
    pub fw_cfg: Vec<FwCfg>,
    /// Host directories shared by 9p; the tags are [`mount_tag`]'s.
    pub mounts: Vec<Mount>,
    /// Further arguments, verbatim, at the end.
    pub qemu_args: Vec<String>,
    /// Whose child QEMU is.
    pub mode: VmLaunchMode,
}

/// Whose child QEMU is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VmLaunchMode {
    /// Nobody's: it goes to the background, in a session of its own. The command line uses this.
    #[default]
    Daemonize,
    /// A child of the program that launches it, which gets its exit status ([`super::attached`]).
    /// For programs that embed castra and supervise their VMs. It outlives that program, too,
    /// unless it is stopped.
    Attached,
}

/// The overlay as a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// A qcow2 file, absolute.
    pub path: PathBuf,
    /// It outlives the VM, so the guest's flushes reach the host's disk. A disposable disk only has
    /// to survive QEMU; for that the host's page cache is enough, and much faster.
    pub persist: bool,
}

/// What the guest's network reaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlannedNetwork {
    /// User-mode networking, with access to other networks.
    User,
    /// The broker and nothing else.
    Isolated {
        /// A program and its arguments, run once per connection that the guest opens to
        /// [`ISOLATED_BROKER`], with the connection as stdin, stdout and stderr: `castra broker-pipe PORT`.
        /// Never a shell.
        broker_pipe: Vec<OsString>,
    },
}

/// One item of fw_cfg: the guest reads `/sys/firmware/qemu_fw_cfg/by_name/<name>/raw`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FwCfg {
    /// `opt/castra/vm` and the like.
    pub name: String,
    /// What it says.
    pub value: FwCfgValue,
}

/// What an item of fw_cfg says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FwCfgValue {
    /// A text; every local user can read it on QEMU's command line.
    Text(String),
    /// A file's content, read when QEMU starts. The only way for a secret.
    File(PathBuf),
}

/// The host as a guest on user-mode networking sees it.
pub const GATEWAY: &str = "10.0.2.2";
/// Where an isolated guest finds the broker. Not the gateway's own address: libslirp answers
/// there itself.
pub const ISOLATED_BROKER: &str = "10.0.2.100";
/// … and its port.
pub const ISOLATED_BROKER_PORT: u16 = 7070;

/// The broker's address as the guest must dial it.
pub fn broker_address(network: Network, broker_port: u16) -> String {
    match network {
        Network::User => format!("{GATEWAY}:{broker_port}"),
        Network::Isolated => format!("{ISOLATED_BROKER}:{ISOLATED_BROKER_PORT}"),
    }
}

/// The 9p tag of the mount at this place in the config.
pub fn mount_tag(index: usize) -> String {
    format!("castra{index}")
}

/// The guest's table of mounts: lines of tag, TAB, directory, TAB, `ro` or `rw`. An outer directory
/// comes before one inside it, whatever their order in the config: mounted later it would hide the
/// inner one.
pub fn mounts_table(mounts: &[Mount]) -> String {
    let mut by_depth: Vec<(usize, &Mount)> = mounts.iter().enumerate().collect();
    by_depth.sort_by_key(|(_, mount)| mount.guest.matches('/').count());
    let line = |(index, mount): (usize, &Mount)| {
        let mode = if mount.readonly { "ro" } else { "rw" };
        format!("{}\t{}\t{mode}\n", mount_tag(index), mount.guest)
    };
    by_depth.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outer_folders_are_mounted_before_what_lies_in_them() {
        let mounts: Vec<Mount> = ["/a/b", "/srv", "/a/b/c", "/a"]
            .iter()
            .map(|guest| Mount {
                host: "/x".into(),
                guest: (*guest).to_owned(),
                readonly: *guest != "/a",
            })
            .collect();
        assert_eq!(
            mounts_table(&mounts),
            "castra1\t/srv\tro\ncastra3\t/a\trw\ncastra0\t/a/b\tro\ncastra2\t/a/b/c\tro\n"
        );
    }
}
