//! The settings of a VM that only a launch applies, as they are compared with those of its last one.
//!
//! Here: which settings these are, their names as castra.toml spells them, their values in a form that
//! is the same for the same launch, and what a difference leaves open. Not here: who keeps them
//! (`core::root::records`), or what is said about a difference (`core::status`, `core::operations`).
//!
//! What a running VM takes at once isn't among them: everything of its bootstrap, and how it is
//! reached by SSH.

use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::core::host;
use crate::core::root::records::LaunchSettings;

use super::{AccelChoice, BaseImage, Config, ImageSource, Network, SeedMode, VmConfig};

/// Settings whose change a kept disk can't follow.
const OF_THE_DISK: [&str; 2] = ["base_image", "overlay"];

/// Those of one VM.
pub fn launch_settings(config: &Config, vm: &VmConfig) -> LaunchSettings {
    let path = |path: &Path| Value::from(path.to_string_lossy());
    let kernel = vm.kernel.as_ref();
    let mut forwards: Vec<Value> = vm
        .port_forwards
        .iter()
        .map(|forward| json!({"host": forward.host, "guest": forward.guest, "protocol": forward.protocol}))
        .collect();
    forwards.sort_by_key(Value::to_string);
    let mut mounts: Vec<Value> = vm
        .mounts
        .iter()
        .map(|mount| json!({"host": path(&mount.host), "guest": mount.guest, "readonly": mount.readonly}))
        .collect();
    mounts.sort_by_key(Value::to_string);
    let image = |image: &BaseImage| match &image.source {
        ImageSource::Path(file) => path(file),
        ImageSource::Url(url) => Value::from(url.as_str()),
    };
    let settings = [
        ("cpus", json!(vm.cpus)),
        ("memory", json!(vm.memory_bytes)),
        ("network", json!(word_of(vm.network))),
        ("port_forwards", json!(forwards)),
        ("mounts", json!(mounts)),
        ("base_image", json!(vm.base_image.as_ref().map(image))),
        ("kernel", json!(kernel.map(|kernel| path(&kernel.kernel)))),
        (
            "initrd",
            json!(kernel.and_then(|kernel| kernel.initrd.as_deref()).map(path)),
        ),
        ("cmdline", json!(kernel.and_then(|kernel| kernel.cmdline.clone()))),
        ("overlay", json!(vm.overlay.as_deref().map(path))),
        ("disk_size", json!(vm.disk_size)),
        ("persist", json!(vm.persist)),
        ("seed", json!(vm.seed == SeedMode::Auto)),
        // It may hold secrets.
        (
            "user_data",
            json!(vm.user_data.as_ref().map(|data| host::hex(&Sha256::digest(data)))),
        ),
        ("qemu_args", json!(vm.qemu_args)),
        ("arch", json!(config.qemu.arch.name)),
        (
            "accel",
            json!(match config.qemu.accel {
                AccelChoice::Auto => "auto",
                AccelChoice::Kvm => "kvm",
                AccelChoice::Tcg => "tcg",
            }),
        ),
        ("binary", json!(config.qemu.binary.as_deref().map(path))),
    ];
    let named = settings.into_iter();
    named.map(|(name, value)| (name.to_owned(), value)).collect()
}

fn word_of(network: Network) -> &'static str {
    match network {
        Network::User => "user",
        Network::Isolated => "isolated",
    }
}

/// The names of the settings in which these two differ. A setting that only one of them has doesn't
/// count: that one comes from another version of castra.
pub fn differing(launched: &LaunchSettings, declared: &LaunchSettings) -> Vec<String> {
    let differs = |(name, value): (&String, &Value)| {
        let now = declared.get(name)?;
        (now != value).then(|| name.clone())
    };
    launched.iter().filter_map(differs).collect()
}

/// Whether a VM with its present disk can be launched with these settings.
pub fn keeps_disk(differing: &[String]) -> bool {
    !differing.iter().any(|name| OF_THE_DISK.contains(&name.as_str()))
}

/// What is open in the launched VM and closed in the declared one, in words.
pub fn still_open(launched: &LaunchSettings, declared: &LaunchSettings) -> Vec<String> {
    let mut open = Vec::new();
    let is = |settings: &LaunchSettings, word: &str| settings.get("network").is_some_and(|is| is == word);
    if is(launched, "user") && is(declared, "isolated") {
        open.push("it is not isolated: it still reaches the network and this host's loopback".to_owned());
    }
    let list = |settings: &LaunchSettings, name: &str| {
        let list = settings.get(name).and_then(Value::as_array);
        list.cloned().unwrap_or_default()
    };
    let gone = |name: &str| {
        let now = list(declared, name);
        let before = list(launched, name);
        before.into_iter().filter(move |one| !now.contains(one))
    };
    // A forward that only got another host port is as open as before.
    let leads = |forward: &Value| (forward["guest"].clone(), forward["protocol"].clone());
    let wanted: Vec<(Value, Value)> = list(declared, "port_forwards").iter().map(leads).collect();
    for forward in gone("port_forwards").filter(|forward| !wanted.contains(&leads(forward))) {
        open.push(format!("its port {} is still forwarded", forward["guest"]));
    }
    for mount in gone("mounts") {
        let text = |key: &str| mount[key].as_str().unwrap_or_default().to_owned();
        let (host, guest) = (text("host"), text("guest"));
        let same = |now: &Value| now["host"] == mount["host"] && now["guest"] == mount["guest"];
        let still = list(declared, "mounts").into_iter().find(same);
        match (still, mount["readonly"] == true) {
            (Some(_), false) => open.push(format!("it can still write {host}")),
            (Some(_), true) => {}
            (None, _) => open.push(format!("it still has {host} at {guest}")),
        }
    }
    open
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::bootstrap::bootstrap_plan::tests::config_of;
    use crate::core::config::{Mount, PortForward, Protocol};

    type Change = fn(&mut VmConfig);

    /// Names of what differs, and what stays open, after a change to a VM with some of everything.
    fn after(change: Change) -> (Vec<String>, Vec<String>) {
        let mut config = config_of(&["web"]);
        let forward = |guest| PortForward {
            host: 0,
            guest,
            protocol: Protocol::Tcp,
        };
        let mount = |at: &str| Mount {
            host: format!("/src{at}").into(),
            guest: at.to_owned(),
            readonly: false,
        };
        config.vms[0].port_forwards = vec![forward(22), forward(80)];
        config.vms[0].mounts = vec![mount("/a"), mount("/b")];
        let launched = launch_settings(&config, &config.vms[0]);
        change(&mut config.vms[0]);
        let declared = launch_settings(&config, &config.vms[0]);
        (differing(&launched, &declared), still_open(&launched, &declared))
    }

    #[test]
    fn every_difference_has_its_settings_name() {
        let cases: [(Change, &[&str], &[&str]); 14] = [
            (|_| {}, &[], &[]),
            (|vm| vm.memory_bytes += 1, &["memory"], &[]),
            (|vm| vm.cpus += 1, &["cpus"], &[]),
            (
                |vm| vm.network = Network::Isolated,
                &["network"],
                &["not isolated"],
            ),
            (
                |vm| vm.port_forwards.truncate(1),
                &["port_forwards"],
                &["port 80 is still forwarded"],
            ),
            (|vm| vm.port_forwards[1].host = 8080, &["port_forwards"], &[]),
            (|vm| vm.port_forwards.reverse(), &[], &[]),
            (
                |vm| vm.mounts[1].readonly = true,
                &["mounts"],
                &["still write /src/b"],
            ),
            (
                |vm| vm.mounts.truncate(1),
                &["mounts"],
                &["still has /src/b at /b"],
            ),
            (|vm| vm.mounts.reverse(), &[], &[]),
            (|vm| vm.qemu_args.push("-S".into()), &["qemu_args"], &[]),
            (
                |vm| vm.user_data = Some("#cloud-config".into()),
                &["user_data"],
                &[],
            ),
            (
                |vm| {
                    vm.persist = true;
                    vm.disk_size = Some(1 << 40);
                },
                &["disk_size", "persist"],
                &[],
            ),
            (
                |vm| {
                    vm.description = Some("taken at once".into());
                    vm.ssh.user = "me".into();
                },
                &[],
                &[],
            ),
        ];
        for (number, (change, names, open)) in cases.into_iter().enumerate() {
            let (found, left) = after(change);
            assert_eq!(found, names, "case {number}");
            assert_eq!(left.len(), open.len(), "case {number}: {left:?}");
            for (text, word) in left.iter().zip(open) {
                assert!(text.contains(word), "case {number}: {text}");
            }
        }
    }

    #[test]
    fn what_one_version_does_not_know_tells_nothing() {
        let config = config_of(&["web"]);
        let now = launch_settings(&config, &config.vms[0]);
        assert_eq!(differing(&LaunchSettings::new(), &now), [""; 0]);
        let mut later = now.clone();
        later.insert("teleport".into(), json!(true));
        assert_eq!(differing(&later, &now), [""; 0]);
        let disk = ["base_image".to_owned()];
        assert!(!keeps_disk(&disk) && keeps_disk(&["memory".to_owned()]));
    }
}
