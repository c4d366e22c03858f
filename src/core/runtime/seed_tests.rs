//! Seeds on disk: which files, which modes, what QEMU is told.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::core::scratch::Scratch;

fn mounts() -> Vec<Mount> {
    let mount = |guest: &str, readonly| Mount {
        host: "/srv/x".into(),
        guest: guest.into(),
        readonly,
    };
    vec![mount("/work", true), mount("/var/out put", false)]
}

fn inputs<'a>(vm: &'a VmName, mounts: &'a [Mount]) -> SeedInputs<'a> {
    SeedInputs {
        vm,
        launch_id: "0011223344556677",
        broker: "10.0.2.2:7070",
        token: Some("00112233445566778899aabbccddeeff"),
        heartbeat_secs: 15,
        authorized_keys: "ssh-ed25519 AAAA castra",
        user: "root",
        mounts,
        user_data: None,
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Every file below a directory: name, mode, contents.
fn files(dir: &Path) -> Vec<(String, u32, String)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, mode(&path), fs::read_to_string(&path).unwrap())
        })
        .collect();
    files.sort();
    files
}

#[test]
fn the_default_guest_is_told_by_fw_cfg() {
    let scratch = Scratch::new("seed-fw");
    let dir = scratch.path("seed");
    let (vm, mounts) = ("web-0".parse().unwrap(), mounts());
    let seed = write_seed(SeedKind::FwCfg, &dir, &inputs(&vm, &mounts)).unwrap();
    let entry = |key: &str, value| FwCfg {
        name: format!("opt/castra/{key}"),
        value,
    };
    let text = |key, value: &str| entry(key, FwCfgValue::Text(value.into()));
    let file = |key| entry(key, FwCfgValue::File(dir.join(key)));
    assert_eq!(
        seed.fw_cfg,
        [
            text("vm", "web-0"),
            text("broker", "10.0.2.2:7070"),
            text("heartbeat_secs", "15"),
            file("token"),
            file("authorized_keys"),
            file("mounts"),
        ]
    );
    assert_eq!(seed.nocloud_dir, None);
    assert_eq!(mode(&dir), 0o700);
    let all = |name: &str, contents: &str| (name.to_owned(), 0o600, contents.to_owned());
    assert_eq!(
        files(&dir),
        [
            all("authorized_keys", "ssh-ed25519 AAAA castra\n"),
            all("mounts", "castra0\t/work\tro\ncastra1\t/var/out put\trw\n"),
            all("token", "00112233445566778899aabbccddeeff\n"),
        ]
    );
}

#[test]
fn what_there_is_nothing_to_say_about_is_left_out() {
    let scratch = Scratch::new("seed-less");
    let dir = scratch.path("seed");
    let vm = "web".parse().unwrap();
    let bare = SeedInputs {
        token: None,
        authorized_keys: "\n",
        ..inputs(&vm, &[])
    };
    let seed = write_seed(SeedKind::FwCfg, &dir, &bare).unwrap();
    assert_eq!(seed.fw_cfg.len(), 3);
    assert_eq!(files(&dir), []);
    assert_eq!(
        write_seed(SeedKind::Nothing, &dir, &bare).unwrap(),
        Seed::default()
    );
    assert!(!dir.exists(), "the secrets of the last launch are gone");
}

#[test]
fn a_new_seed_replaces_all_of_the_old_one() {
    let scratch = Scratch::new("seed-again");
    let dir = scratch.path("seed");
    let (vm, mounts) = ("web".parse().unwrap(), mounts());
    write_seed(SeedKind::FwCfg, &dir, &inputs(&vm, &mounts)).unwrap();
    let seed = write_seed(SeedKind::NoCloud, &dir, &inputs(&vm, &mounts)).unwrap();
    assert_eq!(seed.fw_cfg, []);
    let nocloud = seed.nocloud_dir.unwrap();
    let names: Vec<_> = files(&nocloud)
        .into_iter()
        .map(|(name, mode, _)| (name, mode))
        .collect();
    assert_eq!(
        names,
        [("meta-data".to_owned(), 0o600), ("user-data".to_owned(), 0o600)]
    );
    assert_eq!(mode(&nocloud), 0o700);
    // Beside the seed only the token is kept, for the service that a bootstrap installs.
    assert_eq!(mode(&dir.join("token")), 0o600);
    assert!(!dir.join("authorized_keys").exists());
}

#[test]
fn what_can_not_be_told_is_refused() {
    let scratch = Scratch::new("seed-refuse");
    let vm = "web".parse().unwrap();
    let refusal = |kind, dir: &Path, inputs: &SeedInputs<'_>, why: &str| {
        let failure = write_seed(kind, dir, inputs).unwrap_err();
        assert_eq!(failure.exit, Exit::Config, "{failure}");
        assert!(failure.why.clone().unwrap().contains(why), "{failure}");
        assert!(failure.next.is_some(), "{failure}");
    };
    let dir = scratch.path("seed");
    let odd = [Mount {
        host: "/srv".into(),
        guest: "/a\tb".into(),
        readonly: true,
    }];
    for kind in [SeedKind::FwCfg, SeedKind::NoCloud] {
        refusal(kind, &dir, &inputs(&vm, &odd), "tab or line feed");
    }
    let unknown = SeedInputs {
        user_data: Some("packages: [jq]\n"),
        ..inputs(&vm, &[])
    };
    refusal(SeedKind::NoCloud, &dir, &unknown, "doesn't know `packages: [jq]`");
    let long = format!("#cloud-config\n#{}\n", "x".repeat(MAX_NOCLOUD_BYTES));
    let too_long = SeedInputs {
        user_data: Some(&long),
        ..inputs(&vm, &[])
    };
    refusal(SeedKind::NoCloud, &dir, &too_long, "bytes long");
    let deep = scratch.path(&"d/".repeat(600));
    refusal(SeedKind::NoCloud, &deep, &inputs(&vm, &[]), "bytes of path");
}

#[test]
fn tokens_are_random_and_kept_as_hashes() {
    let (one, two) = (new_token().unwrap(), new_token().unwrap());
    assert_ne!(one, two);
    assert_eq!(one.len(), 32);
    assert_eq!(
        token_sha256("abc"),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
}
