//! A state root like that of running VMs, without QEMU: run files, handshake records, and pid files that
//! another process holds the record locks of, as QEMU does.

use std::fs;
use std::path::Path;

use castra::core::config::Protocol;
use castra::core::events::endings::BootstrapStatus;
use castra::core::events::{Accel, BootstrapPlanSsh};
use castra::core::host::{self, FileLock};
use castra::core::root::handshake_record::{HandshakeRecord, RecordWriter};
use castra::core::root::paths::StateRoot;
use castra::core::root::records::{self, BootstrapRecord, BrokerRecord, ForwardRecord, RunPhase, RunRecord};

use super::holder::Holder;
use super::scratch::Scratch;

/// The broker run that wrote the fleet's records.
pub const BROKER_RUN: &str = "0123456789abcdef";

/// A state root in a fresh directory, removed at the end with the process that holds its locks.
pub struct Fleet {
    dir: Scratch,
    pub state: StateRoot,
    holder: Holder,
    broker: Option<FileLock>,
}

impl Fleet {
    /// An empty state root.
    pub fn new() -> Fleet {
        let dir = Scratch::new("fleet");
        let state = StateRoot::new(dir.path("state"));
        fs::create_dir_all(state.dir()).unwrap();
        Fleet {
            dir,
            state,
            holder: Holder::start(),
            broker: None,
        }
    }

    /// A directory beside the state root, for a config.
    pub fn dir(&self) -> &Path {
        self.dir.dir()
    }

    /// The pid that all of this fleet's VMs have.
    pub fn qemu_pid(&self) -> u32 {
        self.holder.pid()
    }

    /// A VM that was launched `ago_ms` ago and runs.
    pub fn launch(&mut self, vm: &str, ago_ms: u64) {
        self.run(vm, ago_ms, |_| {});
        self.hold(vm);
    }

    /// The `run.json` of a VM launched `ago_ms` ago, after `change`.
    pub fn run(&self, vm: &str, ago_ms: u64, change: impl FnOnce(&mut RunRecord)) {
        let mut run = RunRecord {
            vm: vm.parse().unwrap(),
            role: vm.rsplit_once('-').map_or(vm, |(role, _)| role).to_owned(),
            launch_id: format!("launch-of-{vm}").into(),
            phase: RunPhase::Running,
            launched_boottime_ms: host::boottime_ms().saturating_sub(ago_ms),
            launched_at: "2026-11-21T10:00:00.000Z".into(),
            boot_id: host::boot_id().clone(),
            accel: Accel::Tcg,
            accel_reason: "no /dev/kvm".into(),
            cpus: 2,
            memory_bytes: 256 << 20,
            forwards: vec![ForwardRecord {
                host: 2222,
                guest: 22,
                protocol: Protocol::Tcp,
            }],
            ssh: BootstrapPlanSsh {
                user: "root".into(),
                host: "127.0.0.1".into(),
                port: Some(2222),
                identity: Some(self.state.ssh_key()),
                options: Vec::new(),
            },
            overlay: Some(self.state.overlay(&vm.parse().unwrap())),
            persist: false,
            base: None,
            bootstrap: Some(BootstrapRecord {
                status: BootstrapStatus::Success.into(),
                noop: false,
                duration_ms: Some(8_421),
            }),
            settings: Default::default(),
        };
        change(&mut run);
        let paths = self.state.vm(&run.vm);
        fs::create_dir_all(paths.dir()).unwrap();
        records::save(&paths.run(), &run).unwrap();
    }

    /// From now on the VM's QEMU runs.
    pub fn hold(&mut self, vm: &str) {
        let path = self.state.vm(&vm.parse().unwrap()).qemu_pid();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        self.holder.hold(&path);
    }

    /// The VM's QEMU is gone, as after SIGKILL: the pid file stays.
    pub fn kill(&mut self, vm: &str) {
        let path = self.state.vm(&vm.parse().unwrap()).qemu_pid();
        self.holder.free(&path);
    }

    /// A broker runs since `ago_ms`.
    pub fn start_broker(&mut self, ago_ms: u64) {
        self.broker = Some(
            FileLock::try_take(&self.state.broker_pid(), &format!("castra broker {BROKER_RUN}")).unwrap(),
        );
        let record = BrokerRecord {
            port: 7070,
            run: BROKER_RUN.into(),
            started_boottime_ms: host::boottime_ms().saturating_sub(ago_ms),
            started_at: "2026-11-21T10:00:00.000Z".into(),
            boot_id: host::boot_id().clone(),
            clean_stop: false,
            embedded: false,
            freshness_window_ms: 45_000,
            bus_seq: 0,
        };
        records::save(&self.state.broker_json(), &record).unwrap();
    }

    /// The broker is gone, as after SIGKILL.
    pub fn kill_broker(&mut self) {
        self.broker = None;
    }

    /// The record of a guest last heard `ago_ms` ago.
    pub fn heard(&self, vm: &str, ago_ms: u64) -> HandshakeRecord {
        let at = host::boottime_ms().saturating_sub(ago_ms);
        let record = HandshakeRecord {
            vm: vm.parse().unwrap(),
            boot_id: host::boot_id().clone(),
            broker_run: BROKER_RUN.into(),
            handshake_boottime_ms: at,
            heard_boottime_ms: at,
            heard_at: "2026-11-21T10:00:00.000Z".into(),
            capabilities: vec!["bus-v1".into()],
            bus_session: true,
            bus_subscribed: false,
            last_publish_boottime_ms: None,
            last_heartbeat_boottime_ms: Some(at),
            last_acked_seq: None,
            guest_metrics: None,
        };
        let path = self.state.handshake(&record.vm);
        RecordWriter::new(path).write(&record).unwrap();
        record
    }
}
