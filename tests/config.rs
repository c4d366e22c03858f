//! `castra.toml` as users write it: what loads, what is refused and with which words.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use castra::core::config::{
    self, AccelChoice, AuthMode, Config, ImageDigest, ImageSource, Network, PortChoice, Protocol, SeedMode,
    SyncMode,
};
use castra::core::events::BootstrapMode;
use castra::core::failure::{Exit, Failure};

use support::Scratch;

/// A fresh project directory with a castra home of its own, removed at the end.
struct Project(Scratch);

impl Project {
    fn new(config: &str) -> Project {
        let project = Project(Scratch::new("config"));
        fs::create_dir(project.dir()).unwrap();
        project.write("castra.toml", config);
        project
    }

    fn dir(&self) -> PathBuf {
        self.0.path("demo")
    }

    fn home(&self) -> PathBuf {
        self.0.path("home")
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

/// Every key of docs/CONFIG.md, written once.
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

const DIGEST: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Each mistake with its place and what must be said about it. `^` stands for the VM's lines.
#[test]
fn one_mistake_each() {
    for (config, said) in [
        // Syntax
        (
            "",
            "castra.toml:1:1: no VM is declared (add one: a line `[[vms]]`",
        ),
        (
            "[[vms]]\nname = web",
            "castra.toml:2:8: \"web\" stands without quotes (write \"web\")",
        ),
        (
            "^memory = 2 GiB # much",
            "castra.toml:3:10: \"2 GiB\" stands without quotes (write \"2 GiB\")",
        ),
        (
            "^network = isolated",
            "castra.toml:3:11: \"isolated\" stands without quotes (write \"isolated\")",
        ),
        ("[[vms]]\nname = node", "\"node\" stands without quotes"),
        ("[[vms]]\nname = test", "\"test\" stands without quotes"),
        ("[[vms]]\nname = frontend", "\"frontend\" stands without quotes"),
        ("[[vms]]\nname = 1web", "\"1web\" stands without quotes"),
        (
            "^qemu_args = [nodefaults]",
            "\"nodefaults\" stands without quotes (write \"nodefaults\")",
        ),
        (
            "^[vms.bootstrap]\nenv = { STAGE = dev }",
            "\"dev\" stands without quotes (write \"dev\")",
        ),
        (
            "^persist = True",
            "3:11: \"True\" isn't a TOML value (write `true`, or \"True\" for a text)",
        ),
        ("^persist = no", "(write `false`, or \"no\" for a text)"),
        ("^cpus = 1..5", "castra.toml:3:10: invalid fraction"),
        (
            "^name = \"b\"",
            "castra.toml:3:1: \"name\" is there twice (leave one of the two out)",
        ),
        (
            "[broker]\n[broker]\n^",
            "castra.toml:2:2: \"broker\" is there twice",
        ),
        (
            "[[vms]\nname = \"a\"",
            "castra.toml:1:7: unclosed array table, expected `]` (close it with `]]`)",
        ),
        ("^memory = \"2 GiB", "castra.toml:3:16: invalid basic string"),
        (
            "^port_forwards = [{ host = 1 guest = 2 }]",
            "(put a comma between the two)",
        ),
        ("^\u{0}", "castra.toml:3:2: "),
        // Types
        (
            "^cpus = \"4\"",
            "castra.toml:3:8: `cpus` is a string, it must be a whole number (write `cpus = 4`)",
        ),
        (
            "^cpus = 1.5",
            "castra.toml:3:8: `cpus` is a decimal number, it must be a whole number (write `cpus = 2`)",
        ),
        (
            "^persist = \"no\"",
            "3:11: `persist` is a string, it must be true or false (write `persist = false`)",
        ),
        (
            "^name2 = 1\nqemu_args = \"-s\"",
            "4:13: `qemu_args` is a string, it must be a list of strings",
        ),
        (
            "^qemu_args = [\"-s\", 3]",
            "3:20: `qemu_args` is a whole number, it must be a list of strings",
        ),
        (
            "^bootstrap = 3",
            "3:13: `bootstrap` is a whole number, it must be a table (write `[vms.bootstrap]`",
        ),
        (
            "vms = 3",
            "1:7: `vms` is a whole number, it must be a list of tables (write `[[vms]]`",
        ),
        (
            "[vms]\nname = \"a\"",
            "1:1: `vms` is a table, it must be a list of tables (write `[[vms]]`",
        ),
        (
            "^bootstrap.env.PORT = 80",
            "3:22: `PORT` in `env` is a whole number, it must be a string (write it in quotes: \"80\")",
        ),
        (
            "^description = 2026-01-01",
            "`description` is a date, it must be a string",
        ),
        (
            "vms = [{ description = \"ünï→\", name = 3 }]",
            "castra.toml:1:39: `name` is a whole number",
        ),
        ("\u{feff}vms = 3", "castra.toml:1:7: `vms`"),
        (
            "[[vms]]\r\nname = \"a\"\r\ncpus = 0\r\n",
            "castra.toml:3:8: `cpus = 0`",
        ),
        // Ranges
        (
            "^cpus = 0",
            "castra.toml:3:8: `cpus = 0`: it must be from 1 to 255 (write `cpus = 2`)",
        ),
        ("^cpus = -1", "`cpus = -1`: it must be from 1 to 255"),
        (
            "^cpus = 99999999999999999999",
            "`cpus = 99999999999999999999`: it must be from 1 to 255",
        ),
        ("^count = 0", "`count = 0`: it must be from 1 to 1000"),
        ("^count = 1000000000", "it must be from 1 to 1000"),
        (
            "[broker]\nfreshness_secs = 2\n^",
            "2:18: `freshness_secs = 2`: it must be from 3 to 31536000",
        ),
        (
            "[bus]\nsession_idle_secs = 2\n^",
            "2:21: `session_idle_secs = 2`: it must be from 3",
        ),
        (
            "[bus]\nmax_frame_bytes = 0\n^",
            "2:19: `max_frame_bytes = 0`: it must be from 1024",
        ),
        (
            "[bus]\noutbound_queue_bytes = 2048\n^",
            "2:24: `outbound_queue_bytes` is smaller than one frame",
        ),
        (
            "[broker]\nport = 65536\n^",
            "2:8: `port = 65536`: it must be from 0 to 65535",
        ),
        (
            "[lifecycle]\nsigkill_wait_secs = 0\n^",
            "2:21: `sigkill_wait_secs = 0`: it must be from 1",
        ),
        (
            "[bootstrap]\nstep_timeout_secs = 0\n^",
            "2:21: `step_timeout_secs = 0`",
        ),
        // Sizes
        (
            "^memory = \"lots\"",
            "castra.toml:3:10: `memory = \"lots\"` is no size (write `memory = \"2 GiB\"`)",
        ),
        (
            "^memory = 2048",
            "castra.toml:3:10: `memory = 2048` has no unit (write `memory = \"2048 MiB\"`)",
        ),
        (
            "^memory = 1.5",
            "`memory = 1.5` has no unit (write `memory = \"1.5 MiB\"`)",
        ),
        (
            "^memory = \"2 KiB\"",
            "`memory = \"2 KiB\"` is too small (write `memory = \"2 GiB\"`)",
        ),
        ("^memory = \"9000 TiB\"", "is too large"),
        ("^memory = \"-1 GiB\"", "is no size"),
        (
            "^disk_size = \"0.3 KiB\"",
            "is no size (write `disk_size = \"20 GiB\"`)",
        ),
        // Words
        (
            "^network = \"usr\"",
            "3:11: `network` can't be \"usr\": it is one of \"user\", \"isolated\" (write `network = \"user\"`)",
        ),
        ("^seed = \"non\"", "(write `seed = \"none\"`)"),
        (
            "[qemu]\naccel = \"hvf\"\n^",
            "`accel` can't be \"hvf\": it is one of \"auto\", \"kvm\", \"tcg\"",
        ),
        ("[broker]\nauth = \"tokens\"\n^", "(write `auth = \"token\"`)"),
        ("[bus]\nsync = \"batched\"\n^", "(write `sync = \"batch\"`)"),
        (
            "[bootstrap]\nmode = \"sometimes\"\n^",
            "it is one of \"auto\", \"skip\", \"always\"",
        ),
        (
            "version = \"two\"\n^",
            "1:11: `version` can't be \"two\" (write `version = \"0.2.0\"`)",
        ),
        (
            "version = 0.2\n^",
            "1:11: `version` is a decimal number, it must be a string",
        ),
        // Names
        (
            "[[vms]]\ncpus = 1",
            "castra.toml:1:1: a VM has no name (write `name = \"web\"`",
        ),
        (
            "[[vms]]\nname = \"a b\"",
            "castra.toml:2:8: \"a b\" is no VM name: use 1 to 64",
        ),
        ("[[vms]]\nname = \"\"", "2:8: \"\" is no VM name"),
        ("[[vms]]\nname = \"..\"", "2:8: \"..\" is no VM name"),
        (
            "[[vms]]\nname = \"Host\"",
            "2:8: the name \"Host\" is castra's own (write any but host, bus",
        ),
        (
            "^[[vms]]\nname = \"A\"",
            "castra.toml:4:8: VM \"A\" is there twice (first on line 2); upper and lower case don't differ",
        ),
        (
            "^count = 2\n[[vms]]\nname = \"a-1\"",
            "5:8: VM \"a-1\" is there twice (first on line 2)",
        ),
        (
            "[project]\nname = \" \"\n^",
            "2:8: `name` is empty (write `name = \"demo\"`)",
        ),
        (
            "[project]\nname = \"a\\nb\"\n^",
            "`name` holds a control character",
        ),
        // Instances
        (
            "^count = 2\n[[vms.instances]]\nid = \"a-2\"",
            "5:6: \"a\" has no replica \"a-2\" (write one of \"a-0\" to \"a-1\")",
        ),
        (
            "^[[vms.instances]]\nid = \"b\"",
            "4:6: \"a\" has no replica \"b\" (write `id = \"a\"`)",
        ),
        ("^[[vms.instances]]\ncpus = 3", "3:1: an instance has no `id`"),
        (
            "^count = 2\n[[vms.instances]]\nid = \"a-1\"\n[[vms.instances]]\nid = \"A-1\"",
            "7:6: instance \"a-1\" is there twice (first on line 5)",
        ),
        // Ports
        (
            "^count = 2\nport_forwards = [{ host = 80, guest = 80 }]",
            "4:27: several replicas can't share the host port 80 (write `host = 0`",
        ),
        (
            "^port_forwards = [{ host = 80, guest = 80 }]\n[[vms]]\nname = \"b\"\nport_forwards = [{ host = 80, guest = 8080 }]",
            "6:27: host port 80 is taken by \"a\" (line 3) (write another one",
        ),
        (
            "[broker]\nport = 7070\n^port_forwards = [{ host = 7070, guest = 80 }]",
            "5:27: host port 7070 is taken by the broker (line 2)",
        ),
        (
            "^port_forwards = [{ host = 80 }]",
            "3:18: a port forward has no `guest` (write `guest = 22`",
        ),
        (
            "^port_forwards = [{ host = 80, guest = 0 }]",
            "`guest = 0`: it must be from 1 to 65535",
        ),
        (
            "^port_forwards = [{ host = \"80\", guest = 80 }]",
            "`host` is a string, it must be a whole number (write `host = 80`)",
        ),
        (
            "^port_forwards = [{ guest = 80, protocol = \"sctp\" }]",
            "it is one of \"tcp\", \"udp\"",
        ),
        // Disks and images
        (
            "^count = 2\noverlay = \"a.qcow2\"",
            "4:11: several replicas can't share one `overlay`",
        ),
        (
            "^overlay = \"x.qcow2\"\n[[vms]]\nname = \"b\"\noverlay = \"./x.qcow2\"",
            "6:11: \"a\" has the same `overlay`",
        ),
        (
            "^base_image = \"x.qcow2\"\noverlay = \"./y/../x.qcow2\"",
            "4:11: `overlay` is the base image of \"a\"",
        ),
        (
            "^base_image = \"http://example.org/x\"",
            "3:14: `base_image` can't be \"http://example.org/x\": anybody on the way can replace what http fetches \
             (write `base_image = \"https://example.org/x\"`)",
        ),
        ("^base_image = \"ftp://example.org/x\"", "only https is fetched"),
        (
            "^base_image = \"file:///x.qcow2\"",
            "(write `base_image = \"/x.qcow2\"`)",
        ),
        (
            "^base_image = \"https://u:p@example.org/x\"",
            "an address with a password in it",
        ),
        ("^base_image = \"https:///x\"", "it isn't a valid URL"),
        ("^base_image = \"\"", "`base_image` is empty"),
        (
            "^base_image = \"x\"\nbase_image_sha256 = \"abc\"",
            "4:21: `base_image_sha256`: it has 3 digits (write the 64 digits that `sha256sum` prints",
        ),
        (
            "^base_image = \"x\"\nbase_image_sha512 = \"xyz\"",
            "\"x\" is no hexadecimal digit",
        ),
        ("^kernel = \"k\"\ninitrd = 3", "`initrd` is a whole number"),
        (
            "^initrd = \"i\"",
            "3:10: `initrd` without `kernel` (write `kernel = \"…\"` beside it",
        ),
        ("^cmdline = \"quiet\"", "3:11: `cmdline` without `kernel`"),
        (
            "^overlay = \"x.qcow2\"\n[[vms]]\nname = \"b\"\nbase_image = \"x.qcow2\"",
            "castra.toml:3:11: `overlay` is the base image of \"b\"",
        ),
        (
            "[project]\nstate_dir = \".\"\n^",
            "2:13: `state_dir` would hold the project itself (write `state_dir = \".castra/state\"`)",
        ),
        (
            "[project]\nstate_dir = \"..\"\n^",
            "`state_dir` would hold the project itself",
        ),
        (
            "[project]\nstate_dir = \"/\"\n^",
            "`state_dir` would hold the project itself",
        ),
        // Mounts
        (
            "^mounts = [{ host = \".\" }]",
            "a mount has no `guest` (write `guest = \"/work\"`)",
        ),
        (
            "^mounts = [{ host = \".\", guest = \"work\" }]",
            "`guest = \"work\"` is not absolute (write `guest = \"/work\"`)",
        ),
        (
            "^mounts = [{ host = \".\", guest = \"/a/../b\" }]",
            "leads through `..`",
        ),
        (
            "^mounts = [{ host = \".\", guest = \"/\" }]",
            "is the guest's root",
        ),
        (
            "^mounts = [{ host = \".\", guest = \"/a\" }, { host = \"..\", guest = \"/a/\" }]",
            "two mounts have the same `guest` \"/a\"",
        ),
        // Bootstrap and ssh
        (
            "[bootstrap]\nremote_dir = \"castra\"\n^",
            "2:14: `remote_dir = \"castra\"` is not absolute",
        ),
        (
            "^bootstrap.remote_dir = \"/\"",
            "`remote_dir = \"/\"` belongs to the guest's system",
        ),
        (
            "^bootstrap.remote_dir = \"//usr/./\"",
            "belongs to the guest's system",
        ),
        ("^bootstrap.remote_dir = \"/opt/../etc\"", "leads through `..`"),
        (
            "^bootstrap.env.\"A=B\" = \"x\"",
            "3:15: \"A=B\" can't be a variable's name",
        ),
        ("^bootstrap.env.\"\" = \"x\"", "\"\" can't be a variable's name"),
        ("^bootstrap.env.A = \"x\\u0000\"", "the value of `A` holds a NUL"),
        (
            "^bootstrap.env.CASTRA_VM = \"x\"",
            "castra itself sets `CASTRA_VM`",
        ),
        (
            "^bootstrap.verify_command = \" \"",
            "`verify_command` is no command",
        ),
        (
            "[ssh]\nuser = \"-oProxyCommand=x\"\n^",
            "2:8: `user` can't be \"-oProxyCommand=x\"",
        ),
        (
            "[ssh]\noptions = [\"Nonsense\"]\n^",
            "2:12: \"Nonsense\" is no ssh option",
        ),
        (
            "[ssh]\nidentity = \"~/.ssh/id\"\n^",
            "starts at the home directory, and HOME isn't set",
        ),
    ] {
        let text = refuse(&config.replace('^', "[[vms]]\nname = \"a\"\n"));
        assert!(
            text.starts_with("castra.toml:") && text.contains(said),
            "{config}\n said: {text}\n  not: {said}"
        );
    }
    let both = format!(
        "[[vms]]\nname = \"a\"\nbase_image = \"x\"\nbase_image_sha256 = \"{DIGEST}\"\nbase_image_sha512 = \"{DIGEST}{DIGEST}\"\n"
    );
    assert!(refuse(&both).contains("5:21: both `base_image_sha256` and `base_image_sha512`"));
    let lone = format!("[[vms]]\nname = \"a\"\nbase_image_sha256 = \"{DIGEST}\"\n");
    assert!(refuse(&lone).contains("3:21: a digest is given, but no `base_image`"));
}

#[test]
fn all_mistakes_are_told_in_the_order_of_the_file() {
    let failure = Project::new(
        "[broker]\nfreshness_secs = 1\n[[vms]]\nname = \"host\"\ncpus = 0\nmemory = \"lots\"\n[[vms]]\nname = \"b\"\ncount = 2\nport_forwards = [{ host = 1, guest = 1 }]\n",
    )
    .load()
    .unwrap_err();
    assert_eq!(failure.what, "castra.toml has several mistakes");
    let why = failure.why.unwrap();
    let places: Vec<&str> = why.lines().map(|line| line.split(": ").next().unwrap()).collect();
    assert_eq!(
        places,
        [
            "castra.toml:2:18",
            "castra.toml:4:8",
            "castra.toml:5:8",
            "castra.toml:6:10",
            "castra.toml:10:27"
        ]
    );
    let many: String = (0..50)
        .map(|n| format!("[[vms]]\nname = \"a{n}\"\ncpus = 0\n"))
        .collect();
    let text = refuse(&many);
    assert!(
        text.starts_with("castra.toml has several mistakes") && text.contains("\ncastra.toml: … and 30 more"),
        "{text}"
    );
}

#[test]
fn warnings_name_the_nearest_key() {
    for (config, said) in [
        (
            "[broker]\nprot = 1\n^",
            "castra.toml:2:1: unknown key `prot` in [broker]; did you mean `port`?",
        ),
        (
            "^memroy = \"1 GiB\"",
            "castra.toml:3:1: unknown key `memroy` in [[vms]]; did you mean `memory`?",
        ),
        (
            "^bootstrap.skript = \"x\"",
            "castra.toml:3:11: unknown key `skript` in [vms.bootstrap]; did you mean `script`?",
        ),
        (
            "[brokr]\n^",
            "castra.toml:1:2: unknown key `brokr`; did you mean `broker`?",
        ),
        (
            "[bootstrap]\nscript = \"x\"\n^",
            "castra.toml:2:1: unknown key `script` in [bootstrap]; it belongs under [vms.bootstrap]; here it is ignored",
        ),
        (
            "[qemu]\nmemory = \"1 GiB\"\n^",
            "castra.toml:2:1: unknown key `memory` in [qemu]; it belongs under [[vms]]; here it is ignored",
        ),
        (
            "^\"weird key\" = 1",
            "castra.toml:3:1: unknown key \"weird key\" in [[vms]]; it is ignored",
        ),
        (
            "^port_forwards = [{ guest = 1, hots = 2 }]",
            "castra.toml:3:31: unknown key `hots` in [[vms.port_forwards]]; did you mean `host`?",
        ),
        (
            "version = \"0.3.0\"\n^",
            "castra.toml:1:11: the file was written for castra 0.3.0, and this is 0.2.0; castra ignores keys that it doesn't know",
        ),
        (
            "^memory = \"2048\"",
            "castra.toml:3:10: `memory = \"2048\"` has no unit and was taken as MiB; write `memory = \"2048 MiB\"`",
        ),
        (
            "^base_image = \"https://example.org/x\"",
            "castra.toml:3:14: nothing verifies this download; write the digest",
        ),
        (
            "[project.features]\nenable_vm_vizier = true\n^",
            "castra.toml:1:10: `features` is no longer used",
        ),
        (
            "^managed_image = { name = \"alpine\" }",
            "castra.toml:3:1: `managed_image` is no longer used",
        ),
    ] {
        let config = load(&config.replace('^', "[[vms]]\nname = \"a\"\n"));
        assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
        assert!(config.warnings[0].starts_with(said), "{:?}", config.warnings);
    }
}

/// Written for upstream castra 0.2.0, whose keys these are.
#[test]
fn a_key_that_has_to_be_there_is_known_by_what_was_typed() {
    for (config, said) in [
        (
            "[[vm]]\nname = \"web\"\n",
            "castra.toml:1:3: no VM is declared: `vm` is no key (did you mean `vms`?)",
        ),
        (
            "[broker]\nport = 0\n[[VMS]]\nname = \"web\"\n",
            "castra.toml:3:3: no VM is declared: `VMS` is no key (did you mean `vms`?)",
        ),
        (
            "[machines.web]\ncpus = 1\n",
            "castra.toml:1:2: no VM is declared: `machines` is no key (did you mean `vms`?)",
        ),
        (
            "[[vms]]\nnmae = \"web\"\n",
            "castra.toml:2:1: a VM has no name: `nmae` is no key (did you mean `name`?)",
        ),
        (
            "[[vms]]\nname = \"web\"\nmounts = [{ hots = \".\", guest = \"/a\" }]\n",
            "castra.toml:3:13: a mount has no `host`: `hots` is no key (did you mean `host`?)",
        ),
        (
            "[[vms]]\nname = \"web\"\nport_forwards = [{ gest = 22 }]\n",
            "castra.toml:3:20: a port forward has no `guest`: `gest` is no key (did you mean `guest`?)",
        ),
        ("x = 1\n", "castra.toml:1:1: no VM is declared (add one"),
    ] {
        let words = refuse(config);
        assert!(words.starts_with(said), "{config}\n{words}");
    }
    // What other tools call it, where nothing is nearer.
    let config =
        load("[[vms]]\nname = \"web\"\nimage = \"a.qcow2\"\nram = \"1 GiB\"\nvolumes = []\ncpu = 2\n");
    for (warning, key) in config
        .warnings
        .iter()
        .zip(["base_image", "memory", "mounts", "cpus"])
    {
        assert!(warning.ends_with(&format!("did you mean `{key}`?")), "{warning}");
    }
    assert_eq!(config.warnings.len(), 4);
}

#[test]
fn upstream_configs_load_unchanged() {
    let upstream = r#"
version = "0.2.0"
[project]
name = "bootstrap-demo"
[broker]
port = 7070
[lifecycle]
graceful_shutdown_wait_secs = 20
sigterm_wait_secs = 0
sigkill_wait_secs = 5
[bootstrap]
handshake_timeout_secs = 45
remote_dir = "/tmp/castra-bootstrap"
[bootstrap.env]
DEPLOY_ENV = "dev"
[[vms]]
name = "devbox"
description = "Minimal"
base_image = "alpine-x86_64.qcow2"
overlay = ".castra/devbox/overlay.qcow2"
cpus = 2
memory = "2048 MiB"
  [[vms.port_forwards]]
  host = 2222
  guest = 22
  protocol = "tcp"
  [vms.bootstrap]
  mode = "Disabled"
  script = "bootstrap/run.sh"
  payload = "bootstrap/payload"
  verify_command = "test -f state/user"
  verify_path = "state/user"
  handshake_timeout_secs = 30
    [vms.bootstrap.env]
    APP_NAME = "demo"
[[vms]]
name = "worker"
count = 2
  [[vms.instances]]
  id = "worker-1"
  memory = "1024 MB"
[workflows]
init = ["qemu-img create"]
later = 3
"#;
    let config = load(upstream);
    assert_eq!(config.warnings, Vec::<String>::new());
    assert_eq!(config.vms.len(), 3);
    assert_eq!(config.vms[0].bootstrap.mode, BootstrapMode::Skip);
    assert_eq!(config.vms[0].bootstrap.env.len(), 2);
    assert_eq!(config.vms[2].memory_bytes, 1 << 30);
}

#[test]
fn line_ends_of_windows_reach_no_guest() {
    let text = "[[vms]]\nname = \"web\"\nbase_image = \"a.qcow2\"\nuser_data = \"\"\"\n#!/bin/sh\necho hi\n\"\"\"\n\
                [vms.bootstrap]\nscript = \"s.sh\"\nverify_command = '''\ntest 1 = 1\ntest -d /tmp\n'''\n\
                env = { A = \"\"\"one\ntwo\"\"\", B = \"kept\\r\\n\" }\nflavour = 1\n";
    let project = Project::new(&text.replace('\n', "\r\n"));
    project.write("s.sh", "#!/bin/sh\n");
    project.write("bootstrap.toml", "[env]\r\nC = '''one\r\ntwo'''\r\n");
    let config = project.load().unwrap();
    let vm = &config.vms[0];
    assert_eq!(vm.user_data.as_deref(), Some("#!/bin/sh\necho hi\n"));
    let bootstrap = &vm.bootstrap;
    assert_eq!(
        bootstrap.verify_command.as_deref(),
        Some("test 1 = 1\ntest -d /tmp\n")
    );
    assert_eq!(bootstrap.env["A"], "one\ntwo");
    assert_eq!(bootstrap.env["B"], "kept\r\n", "what is written out is meant");
    assert_eq!(bootstrap.env["C"], "one\ntwo");
    // Places are those of the file.
    let warning = &config.warnings[0];
    assert!(
        warning.starts_with("castra.toml:16:1: unknown key `flavour`"),
        "{warning}"
    );
}

#[test]
fn the_broker_leaves_its_usual_port_to_a_vm_that_was_promised_it() {
    let config = load("[[vms]]\nname = \"a\"\nport_forwards = [{ host = 7070, guest = 80 }]\n");
    assert_eq!(config.broker.port, PortChoice::Free);
    let config = load("[broker]\nport = 0\n[[vms]]\nname = \"a\"\n");
    assert_eq!(config.broker.port, PortChoice::Free);
}

#[test]
fn files_that_are_no_config() {
    let project = Project::new("[[vms]]\nname = \"a\"\n");
    let load =
        |name: &str| config::load_with_home(&project.dir().join(name), Some(&project.home())).unwrap_err();
    project.write("latin1.toml", b"[[vms]]\nname = \"\xe9\"\n");
    project.write("large.toml", "#".repeat(10 << 20));
    project.write("just.toml", format!("#{}", "#".repeat((1 << 20) - 1)));
    project.write("deep.toml", format!("x = {}", "[".repeat(500_000)));
    for (name, exit, said) in [
        ("missing.toml", Exit::NoInput, "there is no "),
        ("missing/castra.toml", Exit::NoInput, "there is no "),
        (".", Exit::NoInput, "is a directory, not a config file"),
        (
            "latin1.toml",
            Exit::Config,
            "latin1.toml:2:9: not UTF-8 from here on",
        ),
        (
            "large.toml",
            Exit::Config,
            "large.toml:1:1: larger than 1048576 bytes",
        ),
        ("just.toml", Exit::Config, "just.toml:1:1: no VM is declared"),
        ("deep.toml", Exit::Config, "deep.toml:1:85: "),
    ] {
        let failure = load(name);
        assert_eq!(failure.exit, exit, "{name}: {failure}");
        assert!(failure.to_string().contains(said), "{name}: {failure}");
    }
    let device =
        config::load_with_home(std::path::Path::new("/dev/null"), Some(&project.home())).unwrap_err();
    assert_eq!(device.exit, Exit::NoInput);
    assert!(device.to_string().contains("is not a regular file"), "{device}");
}

#[test]
fn the_nearest_config_up_the_tree_is_found() {
    let project = Project::new("[[vms]]\nname = \"a\"\n");
    fs::create_dir_all(project.dir().join("src/deep/castra.toml")).unwrap();
    let found = config::discover(&project.dir().join("src/deep")).unwrap();
    assert_eq!(
        found,
        project.dir().join("castra.toml"),
        "a directory of that name was taken"
    );
    assert_eq!(config::discover(&project.dir().join("missing")), None);
    let inner = project.dir().join("src/castra.toml");
    fs::write(&inner, "").unwrap();
    assert_eq!(config::discover(&project.dir().join("src/deep")), Some(inner));
}

/// A link to a shared config makes a project of its own, where the link is.
#[test]
fn a_linked_config_belongs_to_the_project_it_is_found_in() {
    let project = Project::new("[[vms]]\nname = \"a\"\nbase_image = \"a.qcow2\"\n");
    let other = project.dir().join("other");
    fs::create_dir(&other).unwrap();
    std::os::unix::fs::symlink("../castra.toml", other.join("castra.toml")).unwrap();
    // The directory's own links are resolved, so that one project has one id.
    std::os::unix::fs::symlink(&other, project.dir().join("alias")).unwrap();
    let config =
        config::load_with_home(&project.dir().join("alias/castra.toml"), Some(&project.home())).unwrap();
    assert_eq!(config.path, other.join("castra.toml"));
    assert_eq!(config.project, "other");
    let image = config.vms[0].base_image.as_ref().unwrap();
    assert_eq!(image.source, ImageSource::Path(other.join("a.qcow2")));
}

#[test]
fn without_a_home_the_state_needs_a_place() {
    let project = Project::new("[[vms]]\nname = \"a\"\n");
    let path = project.dir().join("castra.toml");
    let failure = config::load_with_home(&path, None).unwrap_err();
    assert_eq!(failure.exit, Exit::Config);
    assert!(failure.next.unwrap().contains("state_dir"));
    project.write(
        "castra.toml",
        "[project]\nstate_dir = \"state\"\n[[vms]]\nname = \"a\"\n",
    );
    let config = config::load_with_home(&path, None).unwrap();
    assert_eq!(config.state.dir(), project.dir().join("state"));
    assert_eq!(config.registry, None);
    let environment = config::Environment {
        castra_home: None,
        user_home: Some("/home/somebody".into()),
    };
    project.write(
        "castra.toml",
        "[project]\nstate_dir = \"~/state\"\n[[vms]]\nname = \"a\"\n",
    );
    let config = config::load_in(&path, &environment).unwrap();
    assert_eq!(config.state.dir(), std::path::Path::new("/home/somebody/state"));
}

/// Mistakes without number: bounded in what is said and in the time it takes.
#[test]
fn a_large_heap_of_mistakes_is_told_at_once() {
    let began = std::time::Instant::now();
    let unknown: String = (0..20_000).map(|n| format!("k{n} = 1\n")).collect();
    let config = load(&format!("{unknown}[[vms]]\nname = \"a\"\n"));
    assert_eq!(config.warnings.len(), 21);
    let entries = "[[vms]]\nname=\"a\"\ncount=1000\n".repeat(10_000);
    assert!(refuse(&entries).contains("10000000 VMs"));
    let one_line = format!(
        "[[vms]]\nname = \"a\"\nport_forwards = [{}]\n",
        "{host=1},".repeat(30_000)
    );
    assert!(refuse(&one_line).contains("… and "));
    let instances = "[[vms.instances]]\nid=\"a-999\"\n".repeat(5_000);
    assert!(refuse(&format!("[[vms]]\nname=\"a\"\ncount=1000\n{instances}")).contains("… and "));
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
}

mod bootstrap_toml {
    use super::*;

    const USER: &str = "[ssh]\nuser = \"admin\"\noptions = [\"A=b\"]\n[bootstrap.env]\nA = \"castra\"\nB = \"castra\"\n\
        [[vms]]\nname = \"web\"\ncount = 2\nbootstrap.script = \"boot/run.sh\"\n[[vms]]\nname = \"db\"\n";

    #[test]
    fn overrides_what_castra_toml_says() {
        let project = Project::new(USER);
        project.write(
            "boot/bootstrap.toml",
            "handshake_identity = \"vm:db\"\nremote_dir = \"/opt/web\"\n[env]\nB = \"meta\"\n[verify]\ncommand = \"true\"\npath = \"ok\"\n\
             [ssh]\nuser = \"root\"\nhost = \"10.1.2.3\"\nport = 2022\nidentity = \"key\"\noptions = [\"-o C=d\", \"E f\"]\n",
        );
        let config = project.load().unwrap();
        assert_eq!(config.warnings, Vec::<String>::new());
        for name in ["web-0", "web-1"] {
            let web = config.vm(name).unwrap();
            assert_eq!(web.bootstrap.handshake_identity.as_ref().unwrap().as_str(), "db");
            assert_eq!(web.bootstrap.remote_dir, "/opt/web");
            assert_eq!(web.bootstrap.env["A"], "castra");
            assert_eq!(web.bootstrap.env["B"], "meta");
            assert_eq!(web.bootstrap.verify_command.as_deref(), Some("true"));
            assert_eq!(web.bootstrap.verify_path.as_deref(), Some("ok"));
            assert_eq!(
                web.bootstrap.metadata_path,
                Some(project.dir().join("boot/bootstrap.toml"))
            );
            assert_eq!(web.ssh.user, "root");
            assert_eq!(web.ssh.host.as_deref(), Some("10.1.2.3"));
            assert_eq!(web.ssh.port, Some(2022));
            assert_eq!(web.ssh.identity, Some(project.dir().join("boot/key")));
            assert_eq!(web.ssh.options, ["C=d", "E=f"]);
        }
        let db = config.vm("db").unwrap();
        assert_eq!(db.ssh.user, "admin");
        assert_eq!(db.ssh.host, None);
        assert_eq!(db.bootstrap.metadata_path, None);
    }

    #[test]
    fn an_empty_one_changes_nothing() {
        let project = Project::new(USER);
        project.write("boot/bootstrap.toml", "# nothing\n");
        let config = project.load().unwrap();
        let web = config.vm("web-0").unwrap();
        assert_eq!(web.ssh.user, "admin");
        assert_eq!(web.ssh.options, ["A=b"]);
        assert!(web.bootstrap.metadata_path.is_some());
    }

    #[test]
    fn an_identity_that_is_no_vms_name_is_a_second_name() {
        let project = Project::new(
            "[[vms]]\nname = \"web\"\nbootstrap.script = \"web/run.sh\"\n\
             [[vms]]\nname = \"db\"\nbootstrap.script = \"db/run.sh\"\n[[vms]]\nname = \"api\"\nbootstrap.script = \"db/run.sh\"\n",
        );
        project.write("web/bootstrap.toml", "handshake_identity = \"alpine\"\n");
        let config = project.load().unwrap();
        assert_eq!(config.warnings, Vec::<String>::new());
        let second = |name: &str| {
            config
                .vm(name)
                .unwrap()
                .second_name
                .clone()
                .map(|name| name.to_string())
        };
        assert_eq!((second("web").as_deref(), second("db")), (Some("alpine"), None));
        assert_eq!(config.vm("web").unwrap().bootstrap.handshake_identity, None);
        assert!(config.vm("alpine").is_none(), "commands go by the VM's name");
        // Another file, another spelling: still the same name.
        project.write("db/bootstrap.toml", "\nhandshake_identity = \"vm:Alpine\"\n");
        let failure = project.load().unwrap_err();
        assert_eq!(failure.exit, Exit::Config);
        let words = failure.to_string();
        assert!(
            words.contains("bootstrap.toml:2:22: `handshake_identity`: \"Alpine\" would be a second name of both \"web\" and \"db\""),
            "{words}"
        );
        // A name of one of the project's VMs means that VM, whichever VM waits for it.
        project.write("db/bootstrap.toml", "handshake_identity = \"WEB\"\n");
        let config = project.load().unwrap();
        let api = config.vm("api").unwrap();
        assert_eq!(
            (
                api.second_name.as_ref(),
                api.bootstrap.handshake_identity.as_ref().unwrap().as_str()
            ),
            (None, "WEB")
        );
    }

    #[test]
    fn its_errors_name_its_own_lines() {
        let project = Project::new(USER);
        for (text, said) in [
            (
                "handshake_identity = \"nobody\"",
                "bootstrap.toml:1:22: `handshake_identity`: \"nobody\" would be a second name of both \"web-0\" and \"web-1\"",
            ),
            (
                "handshake_identity = \"Broker\"",
                "bootstrap.toml:1:22: `handshake_identity`: the name \"Broker\" is castra's own",
            ),
            (
                "handshake_identity = \"a b\"",
                "bootstrap.toml:1:22: `handshake_identity`: \"a b\" is no VM name",
            ),
            (
                "[ssh]\nport = 0",
                "bootstrap.toml:2:8: `port = 0`: it must be from 1 to 65535",
            ),
            ("[ssh\n", "bootstrap.toml:1:5: unclosed table"),
            (
                "remote_dir = \"x\"",
                "bootstrap.toml:1:14: `remote_dir = \"x\"` is not absolute",
            ),
            ("env = 3", "bootstrap.toml:1:7: `env` is a whole number"),
        ] {
            project.write("boot/bootstrap.toml", text);
            let failure = project.load().unwrap_err();
            assert_eq!(failure.exit, Exit::Config);
            assert!(failure.what.starts_with(said), "{failure}");
        }
        project.write("boot/bootstrap.toml", "[ssh]\nusr = \"x\"\n");
        let warnings = project.load().unwrap().warnings;
        assert_eq!(
            warnings,
            ["bootstrap.toml:2:1: unknown key `usr` in [ssh]; did you mean `user`?"]
        );
        project.write("boot/bootstrap.toml", b"\xff");
        assert!(
            project
                .load()
                .unwrap_err()
                .what
                .starts_with("bootstrap.toml:1:1: not UTF-8")
        );
        fs::remove_file(project.dir().join("boot/bootstrap.toml")).unwrap();
        fs::create_dir(project.dir().join("boot/bootstrap.toml")).unwrap();
        let failure = project.load().unwrap_err();
        assert!(failure.to_string().contains("is a directory"), "{failure}");
    }
}

mod workspaces {
    use castra::core::config::workspace::{
        find_workspace, forget_workspace, id, list_workspaces, project_on_record, record_workspace, slug,
    };

    use super::*;

    #[test]
    fn ids_are_readable_and_differ_by_directory() {
        for (name, slugged) in [
            ("demo", "demo"),
            ("My Demo (2)", "my-demo-2"),
            ("--x--", "x"),
            ("名前", "project"),
            ("", "project"),
            ("../..", "project"),
            ("Ünï", "n"),
        ] {
            assert_eq!(slug(name), slugged, "{name}");
        }
        assert!(slug(&"x".repeat(500)).len() <= 40);
        // `printf /tmp/a | sha256sum`; a change would lose everybody's state.
        assert_eq!(id("Demo", std::path::Path::new("/tmp/a")), "demo-d9b741ea");
        assert_ne!(
            id("demo", std::path::Path::new("/a")),
            id("demo", std::path::Path::new("/b"))
        );
    }

    #[test]
    fn a_config_that_became_another_projects_says_nothing_of_the_one_on_record() {
        let text = |name: &str| {
            format!("[project]\nname = \"{name}\"\nstate_dir = \"state\"\n[[vms]]\nname = \"a\"\n")
        };
        let project = Project::new(&text("demo"));
        let home = project.home();
        let config = config::load_with_home(&project.dir().join("castra.toml"), Some(&home)).unwrap();
        record_workspace(&config).unwrap();
        let record = find_workspace(&home, "demo").unwrap();
        assert!(project_on_record(&record).vms.is_some());
        project.write("castra.toml", text("other"));
        let found = project_on_record(&record);
        assert_eq!((found.workspace, found.vms), (record.id, None));
    }

    #[test]
    fn a_project_is_found_wherever_its_state_is() {
        let here = Project::new("[[vms]]\nname = \"a\"\n");
        let there =
            Project::new("[project]\nname = \"other\"\nstate_dir = \"state\"\n[[vms]]\nname = \"a\"\n");
        let home = here.home();
        assert!(list_workspaces(&home).is_empty());
        for project in [&here, &there] {
            let config = config::load_with_home(&project.dir().join("castra.toml"), Some(&home)).unwrap();
            record_workspace(&config).unwrap();
            record_workspace(&config).unwrap();
            let found = find_workspace(&home, &config.workspace).unwrap();
            assert_eq!(found.state_root, config.state.dir());
            assert_eq!(found.config_path, config.path);
            assert_eq!(
                found,
                castra::core::root::records::load(&config.state.workspace())
                    .unwrap()
                    .unwrap()
            );
            assert_eq!(find_workspace(&home, &config.project).unwrap(), found);
            use std::os::unix::fs::PermissionsExt;
            let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode(config.state.dir()), 0o700);
            assert_eq!(mode(&config.state.workspace()), 0o600);
        }
        assert_eq!(list_workspaces(&home).len(), 2);

        // A damaged record hides no other project.
        let projects = home.join("projects");
        for (name, content) in [
            ("broken-00000000", "{"),
            ("empty-00000000", ""),
            ("other-11111111", "[]"),
        ] {
            fs::create_dir_all(projects.join(name)).unwrap();
            fs::write(projects.join(name).join("workspace.json"), content).unwrap();
        }
        fs::create_dir_all(projects.join("dir-00000000/workspace.json")).unwrap();
        fs::write(projects.join("a-file"), "").unwrap();
        assert_eq!(list_workspaces(&home).len(), 2);

        let failure = find_workspace(&home, "othr").unwrap_err();
        assert_eq!(failure.exit, Exit::NoInput);
        assert!(failure.next.unwrap().contains("--workspace other"));
        assert!(find_workspace(&home, "../../etc").is_err());

        // One name, two projects.
        fs::create_dir_all(here.dir().join("demo")).unwrap();
        here.write("demo/castra.toml", "[[vms]]\nname = \"a\"\n");
        let twin = config::load_with_home(&here.dir().join("demo/castra.toml"), Some(&home)).unwrap();
        assert_eq!(twin.project, "demo");
        record_workspace(&twin).unwrap();
        let failure = find_workspace(&home, "demo").unwrap_err();
        assert!(failure.next.unwrap().contains(&twin.workspace));

        // A project whose state root is gone isn't listed.
        let config = config::load_with_home(&there.dir().join("castra.toml"), Some(&home)).unwrap();
        fs::remove_dir_all(config.state.dir()).unwrap();
        assert_eq!(list_workspaces(&home).len(), 2);
        forget_workspace(&home, &config.workspace).unwrap();
        forget_workspace(&home, &config.workspace).unwrap();
        assert!(!projects.join(&config.workspace).exists());
        assert_eq!(
            forget_workspace(&home, "../../demo").unwrap_err().exit,
            Exit::NoInput
        );
    }
}

/// The registry isn't required: a project with a state root of its own works without it.
#[test]
fn an_unwritable_registry_is_worth_a_warning() {
    let project = Project::new("[project]\nstate_dir = \"state\"\n[[vms]]\nname = \"a\"\n");
    fs::write(project.home(), "a file in the way").unwrap();
    let config = project.load().unwrap();
    let warning = config::workspace::record_workspace(&config).unwrap();
    assert_eq!(warning.unwrap().exit, Exit::CantCreate);
    assert!(config.state.workspace().is_file());
    project.write("castra.toml", "[[vms]]\nname = \"a\"\n");
    let failure = config::workspace::record_workspace(&project.load().unwrap()).unwrap_err();
    assert_eq!(failure.exit, Exit::CantCreate);
}

/// Whatever the file holds: an answer, never a panic. Seeded, so a failure can be repeated.
#[test]
fn no_file_content_panics() {
    let project = Project::new(FULL);
    project.write(
        "bootstrap/api/bootstrap.toml",
        "[ssh]\nport = 22\n[env]\nA = \"b\"\n",
    );
    let snippets: &[&[u8]] = &[
        b"\"",
        b"[",
        b"]]",
        b"=",
        b"\n",
        b"'''",
        b"\"\"\"",
        b"{",
        b"}",
        b"0",
        b"-",
        b"9999999999999999999",
        b"\xff",
        b"\0",
        b"\xe2\x82\xac",
        b"[[vms]]",
        b"count = 1000\n",
        b"[vms]",
        b"1e400",
        b"\\u0000",
        b".",
        b"#",
        b"\r",
        b"nan",
    ];
    let mut seed: u64 = 0x5eed;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below.max(1) as u64) as usize
    };
    for round in 0..1000 {
        let mut bytes = FULL.as_bytes().to_vec();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            match random(5) {
                0 => bytes[at] ^= 1 << random(8),
                1 => {
                    let lines: Vec<&[u8]> = bytes.split(|&b| b == b'\n').collect();
                    let dropped = random(lines.len());
                    let kept = lines
                        .iter()
                        .enumerate()
                        .filter(|(n, _)| *n != dropped)
                        .map(|(_, line)| *line);
                    bytes = kept.collect::<Vec<_>>().join(&b'\n');
                }
                2 => bytes.truncate(at),
                3 => {
                    let end = (at + random(40)).min(bytes.len());
                    bytes.drain(at..end);
                }
                _ => {
                    let snippet = snippets[random(snippets.len())];
                    bytes.splice(at..at, snippet.iter().copied());
                }
            }
            if bytes.is_empty() {
                bytes.push(b'x');
            }
        }
        let name = if round % 4 == 0 {
            "bootstrap/api/bootstrap.toml"
        } else {
            "castra.toml"
        };
        project.write(name, &bytes);
        if name != "castra.toml" {
            project.write("castra.toml", FULL);
        }
        let outcome = std::panic::catch_unwind(|| project.load());
        match outcome {
            Err(_) => panic!("round {round} panicked on\n{}", String::from_utf8_lossy(&bytes)),
            Ok(Err(failure)) => assert_eq!(failure.exit, Exit::Config, "round {round}: {failure}"),
            Ok(Ok(config)) => assert!(!config.vms.is_empty() && config.vms.len() <= 1000),
        }
        project.write("bootstrap/api/bootstrap.toml", "[ssh]\nport = 22\n");
    }
}
