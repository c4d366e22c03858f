//! `castra.toml` as users write it: what loads, what is refused and with which words.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use castra::core::config::{
    self, AccelChoice, AuthMode, Config, ImageDigest, ImageSource, Network, PortChoice, Protocol, SeedMode,
    SyncMode,
};
use castra::core::events::BootstrapMode;
use castra::core::failure::{Exit, Failure};

/// A fresh project directory with a castra home of its own, removed at the end.
struct Project(PathBuf);

impl Project {
    fn new(config: &str) -> Project {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("castra-config-{}-{number}", std::process::id()));
        fs::create_dir_all(dir.join("demo")).unwrap();
        let project = Project(fs::canonicalize(dir).unwrap());
        project.write("castra.toml", config);
        project
    }

    fn dir(&self) -> PathBuf {
        self.0.join("demo")
    }

    fn home(&self) -> PathBuf {
        self.0.join("home")
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.dir().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn load(&self) -> Result<Config, Failure> {
        config::load_with_home(&self.dir().join("castra.toml"), Some(&self.home()))
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn load(config: &str) -> Config {
    Project::new(config)
        .load()
        .unwrap_or_else(|failure| panic!("{config}\n{failure}"))
}

fn refuse(config: &str) -> String {
    let failure = Project::new(config).load().expect_err(config);
    assert_eq!(failure.exit, Exit::Config, "{config}\n{failure}");
    failure.to_string()
}

/// Everything DESIGN §5 shows, each key written.
const FULL: &str = r##"
version = "0.2.0"

[project]
name = "demo"
state_dir = ".castra/state"

[qemu]
accel = "tcg"
binary = "/usr/bin/qemu-system-x86_64"

[broker]
port = 7071
freshness_secs = 30
auth = "token"
hello_timeout_secs = 4
max_connections = 100

[bus]
max_frame_bytes = 32768
session_idle_secs = 50
outbound_queue_bytes = 1048576
total_queue_bytes = 16777216
sessions_per_vm = 4
subscriptions_per_session = 32
publishes_per_sec_per_vm = 100
log_max_bytes = 1048576
log_keep = 2
sync = "batch"

[lifecycle]
graceful_shutdown_wait_secs = 5
sigterm_wait_secs = 4
sigkill_wait_secs = 3

[bootstrap]
mode = "always"
handshake_timeout_secs = 90
step_timeout_secs = 30
apply_timeout_secs = 600
remote_dir = "/opt/castra"
env = { STAGE = "test", APP = "none" }

[ssh]
user = "admin"
identity = "keys/id"
options = ["ServerAliveInterval=5"]

[vizier]
enabled = false

[[vms]]
name = "api"
description = "answers"
count = 2
base_image = "images/debian.qcow2"
base_image_sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789ABCDEF"
disk_size = "20 GiB"
persist = true
cpus = 2
memory = "2 GiB"
network = "isolated"
seed = "none"
user_data = "#cloud-config\n"
qemu_args = ["-device", "virtio-rng-pci"]

  [[vms.port_forwards]]
  host = 0
  guest = 22
  protocol = "tcp"

  [[vms.mounts]]
  host = "."
  guest = "/work"
  readonly = false

  [[vms.instances]]
  id = "api-1"
  cpus = 4
  overlay = "one.qcow2"

    [[vms.instances.port_forwards]]
    host = 5353
    guest = 53
    protocol = "udp"

  [vms.bootstrap]
  script = "bootstrap/api/run.sh"
  payload = "bootstrap/api/payload"
  verify_command = "test -f state/ready"
  verify_path = "state/ready"
  env = { APP = "demo" }

[[vms]]
name = "raw"
kernel = "vmlinuz"
initrd = "initrd.img"
cmdline = "console=ttyS0"
base_image = "https://example.org/x.qcow2"
base_image_sha512 = "00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"

[workflows]
init = ["make", "thing"]
"##;

#[test]
fn every_key_reaches_its_place() {
    let project = Project::new(FULL);
    let config = project.load().unwrap();
    let dir = project.dir();
    assert_eq!(config.warnings, Vec::<String>::new());
    assert_eq!(config.path, dir.join("castra.toml"));
    assert_eq!(config.dir, dir);
    assert_eq!(config.project, "demo");
    assert_eq!(config.state.dir(), dir.join(".castra/state"));
    assert_eq!(
        config.registry,
        Some(project.home().join("projects").join(&config.workspace))
    );
    assert_eq!(config.qemu.accel, AccelChoice::Tcg);
    assert_eq!(config.qemu.binary, Some("/usr/bin/qemu-system-x86_64".into()));
    assert_eq!(config.broker.port, PortChoice::Exactly(7071));
    assert_eq!(config.broker.freshness, Duration::from_secs(30));
    assert_eq!(config.broker.auth, AuthMode::Token);
    assert_eq!(config.broker.hello_timeout, Duration::from_secs(4));
    assert_eq!(config.broker.max_connections, 100);
    assert_eq!(config.bus.max_frame_bytes, 32768);
    assert_eq!(config.bus.session_idle, Duration::from_secs(50));
    assert_eq!(config.bus.outbound_queue_bytes, 1 << 20);
    assert_eq!(config.bus.total_queue_bytes, 1 << 24);
    assert_eq!(config.bus.sessions_per_vm, 4);
    assert_eq!(config.bus.subscriptions_per_session, 32);
    assert_eq!(config.bus.publishes_per_sec_per_vm, 100);
    assert_eq!(config.bus.rotation.max_bytes, 1 << 20);
    assert_eq!(config.bus.rotation.keep, 2);
    assert_eq!(config.bus.sync, SyncMode::Batch);
    assert_eq!(config.lifecycle.graceful_shutdown_wait, Duration::from_secs(5));
    assert_eq!(config.lifecycle.sigterm_wait, Duration::from_secs(4));
    assert_eq!(config.lifecycle.sigkill_wait, Duration::from_secs(3));
    assert!(!config.vizier_enabled);

    let names: Vec<&str> = config.vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, ["api-0", "api-1", "raw"]);
    let api = config.vm("API-0").unwrap();
    assert_eq!(api.role, "api");
    assert_eq!(api.description.as_deref(), Some("answers"));
    let image = api.base_image.as_ref().unwrap();
    assert_eq!(image.source, ImageSource::Path(dir.join("images/debian.qcow2")));
    assert_eq!(
        image.digest,
        Some(ImageDigest::Sha256("0123456789abcdef".repeat(4)))
    );
    assert_eq!(api.disk_size, Some(20 << 30));
    assert!(api.persist);
    assert_eq!((api.cpus, api.memory_bytes), (2, 2 << 30));
    assert_eq!(api.network, Network::Isolated);
    assert_eq!(api.seed, SeedMode::None);
    assert_eq!(api.user_data.as_deref(), Some("#cloud-config\n"));
    assert_eq!(api.qemu_args, ["-device", "virtio-rng-pci"]);
    assert_eq!(api.port_forwards.len(), 1);
    assert_eq!((api.port_forwards[0].host, api.port_forwards[0].guest), (0, 22));
    assert_eq!(api.mounts[0].host, dir);
    assert_eq!(api.mounts[0].guest, "/work");
    assert!(!api.mounts[0].readonly);
    assert_eq!(api.overlay, None);
    let bootstrap = &api.bootstrap;
    assert_eq!(bootstrap.mode, BootstrapMode::Always);
    assert_eq!(bootstrap.handshake_timeout, Some(Duration::from_secs(90)));
    assert_eq!(bootstrap.step_timeout, Duration::from_secs(30));
    assert_eq!(bootstrap.apply_timeout, Duration::from_secs(600));
    assert_eq!(bootstrap.remote_dir, "/opt/castra");
    assert_eq!(bootstrap.script, Some(dir.join("bootstrap/api/run.sh")));
    assert_eq!(bootstrap.payload, Some(dir.join("bootstrap/api/payload")));
    assert_eq!(bootstrap.verify_command.as_deref(), Some("test -f state/ready"));
    assert_eq!(bootstrap.verify_path.as_deref(), Some("state/ready"));
    let env: Vec<(&str, &str)> = bootstrap
        .env
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    assert_eq!(env, [("APP", "demo"), ("STAGE", "test")]);
    assert_eq!(bootstrap.metadata_path, None);
    assert_eq!(api.ssh.user, "admin");
    assert_eq!(api.ssh.identity, Some(dir.join("keys/id")));
    assert_eq!(api.ssh.options, ["ServerAliveInterval=5"]);

    let one = config.vm("api-1").unwrap();
    assert_eq!((one.cpus, one.memory_bytes), (4, 2 << 30));
    assert_eq!(one.overlay, Some(dir.join("one.qcow2")));
    assert_eq!(one.port_forwards.len(), 1);
    assert_eq!(
        (one.port_forwards[0].host, one.port_forwards[0].protocol),
        (5353, Protocol::Udp)
    );

    let raw = config.vm("raw").unwrap();
    let kernel = raw.kernel.as_ref().unwrap();
    assert_eq!(kernel.kernel, dir.join("vmlinuz"));
    assert_eq!(kernel.initrd, Some(dir.join("initrd.img")));
    assert_eq!(kernel.cmdline.as_deref(), Some("console=ttyS0"));
    let image = raw.base_image.as_ref().unwrap();
    assert_eq!(
        image.source,
        ImageSource::Url("https://example.org/x.qcow2".into())
    );
    assert!(raw.bootstrap.script.is_none());
    assert_eq!(raw.bootstrap.env["APP"], "none");
}

#[test]
fn defaults_are_the_documented_ones() {
    let project = Project::new("[[vms]]\nname = \"web\"\n");
    let config = project.load().unwrap();
    assert_eq!(config.project, "demo");
    assert!(config.workspace.starts_with("demo-"), "{}", config.workspace);
    assert_eq!(config.workspace.len(), "demo-".len() + 8);
    assert_eq!(
        config.state.dir(),
        project.home().join("projects").join(&config.workspace)
    );
    assert_eq!(config.broker, config::BrokerConfig::default());
    assert_eq!(config.bus, config::BusConfig::default());
    assert_eq!(config.lifecycle, config::LifecycleConfig::default());
    assert!(config.vizier_enabled);
    let web = &config.vms[0];
    assert!(web.is_default_guest());
    assert_eq!((web.cpus, web.memory_bytes), (1, 256 << 20));
    assert_eq!(web.network, Network::User);
    assert_eq!(web.seed, SeedMode::Auto);
    assert_eq!(web.bootstrap.mode, BootstrapMode::Auto);
    assert_eq!(web.bootstrap.handshake_timeout, None);
    assert_eq!(web.bootstrap.step_timeout, Duration::from_secs(60));
    assert_eq!(web.bootstrap.apply_timeout, Duration::from_secs(1800));
    assert_eq!(web.bootstrap.remote_dir, "/var/tmp/castra");
    assert_eq!(web.ssh, config::SshConfig::default());
    assert!(!project.home().exists(), "loading wrote something");
    let imaged = load("[[vms]]\nname = \"web\"\nbase_image = \"a.qcow2\"\n");
    assert_eq!(imaged.vms[0].memory_bytes, 1 << 30);
}

#[test]
fn the_idle_window_follows_the_freshness_window() {
    for (freshness, idle) in [(45, 60), (60, 60), (300, 300)] {
        let config = load(&format!(
            "[broker]\nfreshness_secs = {freshness}\n[[vms]]\nname = \"a\"\n"
        ));
        assert_eq!(config.bus.session_idle, Duration::from_secs(idle));
    }
}

#[test]
fn names_of_replicas() {
    for (count, names) in [
        ("", vec!["a"]),
        ("count = 1", vec!["a-0"]),
        ("count = 3", vec!["a-0", "a-1", "a-2"]),
    ] {
        let config = load(&format!("[[vms]]\nname = \"a\"\n{count}\n"));
        let found: Vec<&str> = config.vms.iter().map(|vm| vm.name.as_str()).collect();
        assert_eq!(found, names);
    }
}

#[test]
fn one_line_of_a_vm_valid() {
    for line in [
        "memory = \"512 MiB\"",
        "memory = \"1.5g\"",
        "disk_size = \"20GB\"",
        "cpus = 0x2",
        "base_image = \"/abs/a.qcow2\"",
        "qemu_args = []",
        "port_forwards = [{ guest = 22 }, { host = 8080, guest = 80, protocol = \"TCP\" }]",
        "port_forwards = [{ host = 53, guest = 53, protocol = \"udp\" }, { host = 53, guest = 53 }]",
        "mounts = [{ host = \"..\", guest = \"/work\" }]",
        "overlay = \"../a.qcow2\"",
        "bootstrap = { mode = \"skip\" }",
        "bootstrap = { mode = \"disabled\" }",
        "bootstrap = { remote_dir = \"/root/\" }",
        "bootstrap.env.PORT = \"80\"",
        "instances = [{ id = \"web\", cpus = 2 }]",
        "instances = [{ id = \"web-0\", cpus = 2 }]",
        "network = \"Isolated\"",
        "description = \"\"",
    ] {
        let config = load(&format!("[[vms]]\nname = \"web\"\n{line}\n"));
        assert_eq!(config.warnings, Vec::<String>::new(), "{line}");
    }
}

#[test]
fn errors_begin_with_their_place_and_say_what_to_write() {
    let text = refuse("[[vms]]\nname = \"web\"\nmemory = \"lots\"\n");
    assert_eq!(
        text,
        "castra.toml:3:10: `memory = \"lots\"` is no size (write `memory = \"2 GiB\"`)"
    );
}
