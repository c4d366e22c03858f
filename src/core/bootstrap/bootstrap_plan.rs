//! The plan of one VM's bootstrap: what would run, from what, over which connection.
//!
//! Here: the decision and its preflight checks. It looks at the host's files and changes
//! nothing. Not here: running it (`bootstrap::pipeline`), or hashing what it names
//! (`images::artifact`): a payload of a gigabyte must not delay the start of its VM.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use crate::core::bootstrap::archive::{self, PAYLOAD_NAME};
use crate::core::bootstrap::vizier;
use crate::core::config::{AccelChoice, Config, VmConfig};
use crate::core::events::{
    Accel, BootstrapMode, BootstrapPlan, BootstrapPlanAction, BootstrapPlanSsh, BootstrapPlanVerify,
    BootstrapTrigger,
};

/// `handshake_timeout_secs` where the config names none (docs/CONFIG.md).
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);
const HANDSHAKE_TIMEOUT_TCG: Duration = Duration::from_secs(240);
/// A first line longer than this has no interpreter in it.
const FIRST_LINE_BYTES: u64 = 4096;

/// What is known of the VM when its bootstrap is planned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastLaunch {
    /// The host port that leads to the guest's SSH, once allocated.
    pub ssh_port: Option<u16>,
    /// The accelerator it runs or will run under.
    pub accel: Option<Accel>,
}

/// Plans the bootstrap of one VM under this mode.
pub fn plan(vm: &VmConfig, config: &Config, mode: BootstrapMode, known: LastLaunch) -> BootstrapPlan {
    let bootstrap = &vm.bootstrap;
    let trigger = match mode {
        BootstrapMode::Skip => return skipped(vm),
        BootstrapMode::Auto => BootstrapTrigger::Auto,
        BootstrapMode::Always => BootstrapTrigger::Always,
    };
    let mut warnings = Vec::new();
    let mut error = None;
    let mut refuse = |reason: String| {
        error.get_or_insert(reason);
    };

    match (&bootstrap.script, mode) {
        (Some(script), _) => {
            if let Err(reason) = check_script(script, bootstrap.payload.is_some()) {
                refuse(reason);
            }
        }
        (None, BootstrapMode::Always) => refuse(format!(
            "mode `always` needs a script: set `script` under [vms.bootstrap] of `{}`, or use mode `auto`",
            vm.role
        )),
        (None, _) => {
            if bootstrap.payload.is_some() {
                warnings.push("the payload isn't copied, because there is no script to use it".to_owned());
            }
            if bootstrap.verify_command.is_some() || bootstrap.verify_path.is_some() {
                warnings.push("nothing is verified, because there is no script".to_owned());
            }
        }
    }
    let mut payload_bytes = None;
    if let Some(payload) = &bootstrap.payload {
        match archive::scan_payload(payload) {
            Ok(survey) => {
                payload_bytes = Some(survey.bytes);
                warnings.extend(survey.warnings());
            }
            Err(found) => refuse(format!(
                "payload {} {}: it must be a readable directory",
                payload.display(),
                describe(&found)
            )),
        }
    }
    for (key, value) in &bootstrap.env {
        if !is_variable_name(key) {
            refuse(format!(
                "{key:?} under `env` can't be a variable's name: use letters, digits and _, and begin with no digit"
            ));
        } else if value.contains('\0') {
            refuse(format!(
                "the value of `{key}` under `env` holds a NUL, which no variable can hold"
            ));
        } else if RESERVED_KEYS.contains(&key.as_str()) {
            warnings.push(format!("`{key}` under `env` has no effect: castra sets it"));
        }
    }
    if !bootstrap.remote_dir.starts_with('/') || bootstrap.remote_dir.contains(['\0', '\n']) {
        refuse(format!(
            "remote_dir {:?} must be an absolute path on one line",
            bootstrap.remote_dir
        ));
    }

    let (vizier_status, vizier_remediation) = vizier::expected(vm, config);
    let (action, reason) = match error {
        Some(reason) => (BootstrapPlanAction::Error, reason),
        None => (BootstrapPlanAction::Run, reason_to_run(vm, mode)),
    };
    BootstrapPlan {
        vm: vm.name.clone(),
        mode,
        action,
        reason,
        trigger: Some(trigger),
        script_path: bootstrap.script.clone(),
        payload_path: bootstrap.payload.clone(),
        payload_bytes,
        handshake_timeout_secs: handshake_timeout(vm, config, known.accel).map(|wait| wait.as_secs()),
        step_timeout_secs: Some(bootstrap.step_timeout.as_secs()),
        apply_timeout_secs: Some(bootstrap.apply_timeout.as_secs()),
        remote_dir: Some(bootstrap.remote_dir.clone()),
        ssh: Some(ssh_plan(vm, config, known.ssh_port)),
        env_keys: bootstrap.env.keys().cloned().collect(),
        verify: verify_plan(vm),
        artifact_hash: None,
        metadata_path: bootstrap.metadata_path.clone(),
        warnings,
        vizier_status: Some(vizier_status),
        vizier_log_path: config.vizier_enabled.then(|| config.state.vizier_log(&vm.name)),
        vizier_remediation,
        machine: None,
    }
}

/// Variables that castra itself sets for script and verify (docs/BOOTSTRAP.md).
pub const RESERVED_KEYS: [&str; 4] = [
    "CASTRA_VM",
    "CASTRA_RUN_ID",
    "CASTRA_PAYLOAD_DIR",
    "CASTRA_BROKER",
];

/// Limit for the first proof of life; `None` while it depends on an accelerator that isn't known.
pub fn handshake_timeout(vm: &VmConfig, config: &Config, accel: Option<Accel>) -> Option<Duration> {
    vm.bootstrap
        .handshake_timeout
        .or(match (accel, config.qemu.accel) {
            (Some(Accel::Tcg), _) | (None, AccelChoice::Tcg) => Some(HANDSHAKE_TIMEOUT_TCG),
            (Some(Accel::Kvm), _) | (None, AccelChoice::Kvm) => Some(HANDSHAKE_TIMEOUT),
            (None, AccelChoice::Auto) => None,
        })
}

/// The connection as the config has it; `port` null until a forward is allocated.
pub fn ssh_plan(vm: &VmConfig, config: &Config, forwarded: Option<u16>) -> BootstrapPlanSsh {
    BootstrapPlanSsh {
        user: vm.ssh.user.clone(),
        host: vm.ssh.host.clone().unwrap_or_else(|| "127.0.0.1".to_owned()),
        port: vm.ssh.port.or(forwarded),
        identity: Some(vm.ssh.identity.clone().unwrap_or_else(|| config.state.ssh_key())),
        options: vm.ssh.options.clone(),
    }
}

fn verify_plan(vm: &VmConfig) -> Option<BootstrapPlanVerify> {
    let bootstrap = &vm.bootstrap;
    if bootstrap.verify_command.is_none() && bootstrap.verify_path.is_none() {
        return None;
    }
    Some(BootstrapPlanVerify {
        command: bootstrap.verify_command.clone(),
        path: bootstrap.verify_path.clone(),
    })
}

fn reason_to_run(vm: &VmConfig, mode: BootstrapMode) -> String {
    match (mode, &vm.bootstrap.script) {
        (BootstrapMode::Always, _) => "mode `always` runs it on every `up`".to_owned(),
        (_, Some(_)) => "mode `auto` runs it on every `up`".to_owned(),
        (_, None) => {
            "mode `auto` without a script waits until the guest is reachable and connects".to_owned()
        }
    }
}

fn skipped(vm: &VmConfig) -> BootstrapPlan {
    BootstrapPlan {
        vm: vm.name.clone(),
        mode: BootstrapMode::Skip,
        action: BootstrapPlanAction::Skip,
        reason: "mode `skip`".to_owned(),
        trigger: None,
        script_path: None,
        payload_path: None,
        payload_bytes: None,
        handshake_timeout_secs: None,
        step_timeout_secs: None,
        apply_timeout_secs: None,
        remote_dir: None,
        ssh: None,
        env_keys: Vec::new(),
        verify: None,
        artifact_hash: None,
        metadata_path: None,
        warnings: Vec::new(),
        vizier_status: None,
        vizier_log_path: None,
        vizier_remediation: None,
        machine: None,
    }
}

/// Whether every shell accepts this name for a variable.
fn is_variable_name(key: &str) -> bool {
    let starts_well = key
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    starts_well && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn check_script(script: &Path, has_payload: bool) -> Result<(), String> {
    let shown = script.display();
    let name = script
        .file_name()
        .ok_or_else(|| format!("script {shown} has no file name"))?;
    if has_payload && name == PAYLOAD_NAME {
        return Err(format!(
            "script {shown} would lie where the payload goes: give it another name than `{PAYLOAD_NAME}`"
        ));
    }
    let meta = fs::metadata(script).map_err(|error| format!("script {shown} {}", describe(&error)))?;
    if meta.is_dir() {
        return Err(format!(
            "script {shown} is a directory: name the file in it that is to run"
        ));
    }
    if !meta.is_file() {
        return Err(format!("script {shown} is no regular file"));
    }
    if meta.len() == 0 {
        return Err(format!(
            "script {shown} is empty: write it, or remove the key `script`"
        ));
    }
    let head = head_of(script).map_err(|error| format!("script {shown} {}", describe(&error)))?;
    let first = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    if first.ends_with(b"\r") {
        // The guest would look for an interpreter called "sh\r" and report the script itself as
        // missing, so this is an error and not a warning.
        return Err(format!(
            "script {shown} has CRLF line ends, with which no Unix shell can run it: convert it, for example with `sed -i 's/\\r$//' {shown}`"
        ));
    }
    Ok(())
}

/// The beginning of a script.
fn head_of(script: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    File::open(script)?
        .take(FIRST_LINE_BYTES)
        .read_to_end(&mut head)?;
    Ok(head)
}

/// Whether the kernel can execute the script: it names an interpreter or is a program. Any other script is
/// run by `sh`, as shells do.
pub fn names_interpreter(script: &Path) -> io::Result<bool> {
    let head = head_of(script)?;
    Ok(head.starts_with(b"#!") || head.starts_with(b"\x7fELF"))
}

fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "doesn't exist".to_owned(),
        io::ErrorKind::PermissionDenied => "can't be read (permission denied)".to_owned(),
        io::ErrorKind::NotADirectory => "is no directory".to_owned(),
        _ => format!("can't be read ({error})"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::core::config::*;
    use crate::core::root::paths::StateRoot;
    use crate::core::scratch::Scratch;
    use std::collections::BTreeMap;

    pub(crate) fn config_of(names: &[&str]) -> Config {
        Config {
            path: "/project/castra.toml".into(),
            dir: "/project".into(),
            project: "demo".into(),
            workspace: "demo-1a2b3c4d".into(),
            registry: None,
            state: StateRoot::new("/state"),
            qemu: QemuConfig::default(),
            broker: BrokerConfig::default(),
            bus: BusConfig::default(),
            lifecycle: LifecycleConfig::default(),
            vizier_enabled: true,
            vms: names.iter().map(|name| vm_of(name)).collect(),
            warnings: Vec::new(),
        }
    }

    fn vm_of(name: &str) -> VmConfig {
        VmConfig {
            name: name.parse().unwrap(),
            second_name: None,
            role: name.split('-').next().unwrap().to_owned(),
            description: None,
            base_image: None,
            kernel: None,
            overlay: None,
            disk_size: None,
            persist: false,
            cpus: 1,
            memory_bytes: 256 << 20,
            network: Network::User,
            seed: SeedMode::Auto,
            user_data: None,
            qemu_args: Vec::new(),
            port_forwards: Vec::new(),
            mounts: Vec::new(),
            bootstrap: BootstrapConfig {
                mode: BootstrapMode::Auto,
                handshake_timeout: None,
                step_timeout: Duration::from_secs(60),
                apply_timeout: Duration::from_secs(1800),
                remote_dir: "/var/tmp/castra".into(),
                env: BTreeMap::new(),
                script: None,
                payload: None,
                verify_command: None,
                verify_path: None,
                handshake_identity: None,
                metadata_path: None,
            },
            ssh: SshConfig::default(),
            bases: BTreeMap::new(),
        }
    }

    fn plan_with(mode: BootstrapMode, change: impl FnOnce(&mut BootstrapConfig)) -> BootstrapPlan {
        let mut config = config_of(&["web"]);
        change(&mut config.vms[0].bootstrap);
        plan(&config.vms[0], &config, mode, LastLaunch::default())
    }

    #[test]
    fn modes_decide() {
        let plain = plan_with(BootstrapMode::Auto, |_| ());
        assert_eq!(plain.action, BootstrapPlanAction::Run);
        assert_eq!(plain.trigger, Some(BootstrapTrigger::Auto));
        assert_eq!(
            plain.handshake_timeout_secs, None,
            "nobody knows the accelerator yet"
        );
        let ssh = plain.ssh.unwrap();
        assert_eq!(
            (ssh.user.as_str(), ssh.host.as_str(), ssh.port),
            ("root", "127.0.0.1", None)
        );
        assert_eq!(ssh.identity, Some("/state/id_ed25519".into()));

        let always = plan_with(BootstrapMode::Always, |_| ());
        assert_eq!(always.action, BootstrapPlanAction::Error);
        assert!(always.reason.contains("needs a script"), "{}", always.reason);

        let skip = plan_with(BootstrapMode::Skip, |_| ());
        assert_eq!(
            (skip.action, skip.trigger, skip.ssh),
            (BootstrapPlanAction::Skip, None, None)
        );
    }

    #[test]
    fn the_accelerator_decides_the_patience() {
        let config = config_of(&["web"]);
        for (accel, secs) in [(Accel::Tcg, 240), (Accel::Kvm, 60)] {
            let known = LastLaunch {
                ssh_port: Some(2222),
                accel: Some(accel),
            };
            let plan = plan(&config.vms[0], &config, BootstrapMode::Auto, known);
            assert_eq!(plan.handshake_timeout_secs, Some(secs));
            assert_eq!(plan.ssh.unwrap().port, Some(2222));
        }
    }

    #[test]
    fn scripts_good_and_bad() {
        let scratch = Scratch::new("plan-script");
        let write = |name: &str, text: &str| {
            let path = scratch.path(name);
            fs::write(&path, text).unwrap();
            path
        };
        fs::create_dir(scratch.path("folder")).unwrap();
        for (path, reason) in [
            (write("good", "#!/bin/sh\ntrue\n"), None),
            (write("no interpreter", "true"), None),
            (write("crlf later", "#!/bin/sh\necho 'a\r\n'\n"), None),
            (write("crlf", "#!/bin/sh\r\ntrue\r\n"), Some("CRLF")),
            (write("empty", ""), Some("is empty")),
            (write("payload", "true"), None),
            (scratch.path("folder"), Some("is a directory")),
            (scratch.path("missing"), Some("doesn't exist")),
            (scratch.path("good/under"), Some("is no directory")),
            ("/dev/null".into(), Some("no regular file")),
        ] {
            let plan = plan_with(BootstrapMode::Always, |bootstrap| {
                bootstrap.script = Some(path.clone())
            });
            match reason {
                None => assert_eq!(plan.action, BootstrapPlanAction::Run, "{path:?}: {}", plan.reason),
                Some(word) => {
                    assert_eq!(plan.action, BootstrapPlanAction::Error, "{path:?}");
                    assert!(plan.reason.contains(word), "{}", plan.reason);
                }
            }
        }
        let clash = plan_with(BootstrapMode::Auto, |bootstrap| {
            bootstrap.script = Some(scratch.path("payload"));
            bootstrap.payload = Some(scratch.path("folder"));
        });
        assert!(clash.reason.contains("another name"), "{}", clash.reason);
    }

    #[test]
    fn payload_and_environment_are_checked() {
        let scratch = Scratch::new("plan-payload");
        let script = scratch.path("run.sh");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        let folder = scratch.path("payload dir");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("a"), "12345").unwrap();
        let with = |change: &dyn Fn(&mut BootstrapConfig)| {
            plan_with(BootstrapMode::Auto, |bootstrap| {
                bootstrap.script = Some(script.clone());
                change(bootstrap);
            })
        };
        let good = with(&|bootstrap| {
            bootstrap.payload = Some(folder.clone());
            bootstrap.env = [("APP", "a'b\n\"c"), ("CASTRA_VM", "x")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into();
            bootstrap.verify_path = Some("state/ready".into());
        });
        assert_eq!(good.action, BootstrapPlanAction::Run, "{}", good.reason);
        assert_eq!(good.payload_bytes, Some(5));
        assert_eq!(good.env_keys, ["APP", "CASTRA_VM"]);
        assert!(good.warnings.iter().any(|text| text.contains("CASTRA_VM")));
        assert_eq!(good.verify.unwrap().path.as_deref(), Some("state/ready"));

        for (missing, word) in [("nothing", "doesn't exist"), ("run.sh", "is no directory")] {
            let plan = with(&|bootstrap| bootstrap.payload = Some(scratch.path(missing)));
            assert!(plan.reason.contains(word), "{}", plan.reason);
            assert_eq!(plan.action, BootstrapPlanAction::Error);
        }
        for (key, value) in [("A=B", ""), ("", ""), ("1A", ""), ("Ä", ""), ("A", "\0")] {
            let plan = with(&|bootstrap| {
                bootstrap.env = [(key.to_owned(), value.to_owned())].into();
            });
            assert_eq!(plan.action, BootstrapPlanAction::Error, "{key:?}");
        }
        let relative = with(&|bootstrap| bootstrap.remote_dir = "tmp".into());
        assert_eq!(relative.action, BootstrapPlanAction::Error);
    }
}
