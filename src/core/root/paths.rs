//! The paths of all files under a state root, each spelled once, with its writer.
//!
//! Here: paths only. Not here: making, locking or reading the files.

use std::env;
use std::path::{Path, PathBuf};

use crate::core::failure::{Exit, Failure, Result};
use crate::core::name::VmName;

/// `$CASTRA_HOME`, else `~/.castra`; `None` without either variable.
pub fn castra_home() -> Option<PathBuf> {
    let absolute = |value: std::ffi::OsString| {
        let path = PathBuf::from(value);
        path.is_absolute().then_some(path)
    };
    if let Some(home) = env::var_os("CASTRA_HOME").filter(|value| !value.is_empty()) {
        return std::path::absolute(home).ok();
    }
    env::var_os("HOME")
        .and_then(absolute)
        .map(|home| home.join(".castra"))
}

/// Refuses a path that isn't UTF-8. castra writes paths into JSON files, events and `--json`
/// output, which can't hold other ones. So such a path is refused before anything is made, and no
/// other code has to deal with it.
pub fn check_utf8(path: &Path, what: &str) -> Result<()> {
    match path.to_str() {
        Some(_) => Ok(()),
        None => Err(Failure::new(
            Exit::Config,
            format!("castra can't use {what} {}", path.display()),
        )
        .because("its name is no UTF-8, and castra writes paths into JSON")
        .advice("rename that folder, or use another one")),
    }
}

/// The directory that holds everything castra knows about one project. Always absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateRoot(PathBuf);

impl StateRoot {
    /// A state root at this absolute path.
    pub fn new(path: impl Into<PathBuf>) -> StateRoot {
        StateRoot(path.into())
    }

    /// The directory itself.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// Project name, id, config path, version. Written by operations that change something.
    pub fn workspace(&self) -> PathBuf {
        self.0.join("workspace.json")
    }

    /// Advisory lock, held only while files and processes are made or removed.
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// Locked by the broker as long as it runs; holds its pid.
    pub fn broker_pid(&self) -> PathBuf {
        self.0.join("broker.pid")
    }

    /// The broker's Unix socket for the host, mode 0600, made by the broker.
    pub fn broker_sock(&self) -> PathBuf {
        self.0.join("broker.sock")
    }

    /// Port, run id, start time, boot id, whether the last stop was clean. Written by the broker.
    pub fn broker_json(&self) -> PathBuf {
        self.0.join("broker.json")
    }

    /// Per VM: name, launch id, launch time, SHA-256 of its token. Replaced by `up`.
    pub fn guests(&self) -> PathBuf {
        self.0.join("guests.json")
    }

    /// The project's own SSH key pair (`id_ed25519`, `id_ed25519.pub`), made by `up`.
    pub fn ssh_key(&self) -> PathBuf {
        self.0.join("id_ed25519")
    }

    /// All files of one VM.
    pub fn vm(&self, vm: &VmName) -> VmPaths {
        VmPaths(self.vms().join(vm.as_str()))
    }

    /// The folder of the VMs' folders.
    pub fn vms(&self) -> PathBuf {
        self.0.join("vms")
    }

    /// The disposable layer over a VM's base image, unless the config names another place.
    pub fn overlay(&self, vm: &VmName) -> PathBuf {
        self.0.join("overlays").join(format!("{vm}.qcow2"))
    }

    /// Verified digests of this project's images.
    pub fn images(&self) -> PathBuf {
        self.0.join("images")
    }

    /// The folder of the handshake records.
    pub fn handshakes(&self) -> PathBuf {
        self.0.join("handshakes")
    }

    /// Last handshake and bus state of one guest. Written by the broker alone.
    pub fn handshake(&self, vm: &VmName) -> PathBuf {
        self.handshakes().join(format!("{vm}.json"))
    }

    /// The folder of all logs.
    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    /// `[host-broker]` lines.
    pub fn broker_log(&self) -> PathBuf {
        self.logs().join("broker.log")
    }

    /// The journal of the operators' commands.
    pub fn events(&self) -> PathBuf {
        self.logs().join("events.jsonl")
    }

    /// The journal of the broker. It is a file of its own, so that a guest can't push the commands'
    /// events out.
    pub fn broker_events(&self) -> PathBuf {
        self.logs().join("events-broker.jsonl")
    }

    /// The folder of the logs of the bus.
    pub fn bus_logs(&self) -> PathBuf {
        self.logs().join("bus")
    }

    /// The log of the bus: all messages.
    pub fn bus_log(&self) -> PathBuf {
        self.bus_logs().join("bus.log")
    }

    /// The messages of one sender: a VM, `host` or `broker`.
    pub fn bus_log_of(&self, sender: &str) -> PathBuf {
        self.bus_logs().join(format!("{sender}.log"))
    }

    /// The folder of the bootstrap run logs.
    pub fn bootstrap_logs(&self) -> PathBuf {
        self.logs().join("bootstrap")
    }

    /// The folder of the agents' transcripts (`<thread>.jsonl`, `<thread>.json`), written by
    /// `castra harness`.
    pub fn harness_logs(&self) -> PathBuf {
        self.logs().join("harness")
    }

    /// The in-guest service's log, mirrored to the host.
    pub fn vizier_log(&self, vm: &VmName) -> PathBuf {
        self.0.join("state/vizier").join(vm.as_str()).join("service.log")
    }
}

/// The files of one VM under `vms/<vm>/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmPaths(PathBuf);

/// Names inside `vms/<vm>/` that QEMU and ssh are given relative to it, so that no state root is
/// too long for a Unix socket (108 bytes; ssh: 90).
pub mod vm_file {
    /// QEMU's `-pidfile`; QEMU holds a POSIX record lock on it as long as it runs.
    pub const QEMU_PID: &str = "qemu.pid";
    /// QEMU's stderr (`-D`).
    pub const QEMU_LOG: &str = "qemu.log";
    /// Every QMP message; QEMU writes it, and each launch empties it first.
    pub const QMP_LOG: &str = "qmp.log";
    /// The QMP control socket.
    pub const QMP_SOCK: &str = "qmp.sock";
    /// The guest's console.
    pub const SERIAL_LOG: &str = "serial.log";
    /// The console's socket.
    pub const SERIAL_SOCK: &str = "serial.sock";
    /// The control socket of the ssh master connection.
    pub const SSH_CTL: &str = "ssh.ctl";
    /// The control socket of a person's own ssh, where the user's ssh_config asks for one.
    pub const CLIENT_CTL: &str = "client.ctl";
    /// The host keys this VM's sshd has shown.
    pub const KNOWN_HOSTS: &str = "known_hosts";
    /// Which Vizier was last enabled in the guest.
    pub const VIZIER: &str = "vizier.json";
}

impl VmPaths {
    /// The files of the VM whose directory this is.
    pub fn at(dir: impl Into<PathBuf>) -> VmPaths {
        VmPaths(dir.into())
    }

    /// `vms/<vm>` itself, the working directory of QEMU and ssh.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// The path of one of the names in [`vm_file`].
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Phase, launch time, boot id, forwards, overlay, last bootstrap. Written by the launcher
    /// and the bootstrap, before QEMU starts.
    pub fn run(&self) -> PathBuf {
        self.0.join("run.json")
    }

    /// Who asked this launch to stop, and when. Written by `down` alone.
    pub fn stop(&self) -> PathBuf {
        self.0.join("stop.json")
    }

    /// Held by whoever launches, bootstraps or stops this VM.
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// Held by whoever is attached to the console.
    pub fn console_lock(&self) -> PathBuf {
        self.0.join("console.lock")
    }

    /// QEMU's pid file.
    pub fn qemu_pid(&self) -> PathBuf {
        self.file(vm_file::QEMU_PID)
    }

    /// Files handed to the guest at boot (token, key, seed); mode 0600, replaced at each launch.
    pub fn seed(&self) -> PathBuf {
        self.0.join("seed")
    }
}
