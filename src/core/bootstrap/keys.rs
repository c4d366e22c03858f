//! SSH key pairs: the project's own, and the public half of a configured identity.
//!
//! Here: making and reading them with `ssh-keygen`. Not here: how a guest is given the public
//! half (`runtime::seed`), or how ssh is told of the private one (`bootstrap::ssh`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::core::cancel::Cancel;
use crate::core::config::{Config, VmConfig};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::process::{Job, JobError};

/// The package that has `ssh` and `ssh-keygen` on Debian and Ubuntu.
pub const SSH_PACKAGE: &str = "openssh-client";

/// Makes the project's key pair if it isn't there; returns the private key's path. Safe to
/// repeat, and safe beside another castra that does the same.
pub fn ensure_project_key(config: &Config, cancel: &Cancel) -> Result<PathBuf> {
    let key = config.state.ssh_key();
    let public = public_path(&key);
    if host::is_there(&key) && host::is_there(&public) {
        return Ok(key);
    }
    host::ensure_private_dir(config.state.dir())
        .map_err(|error| Failure::io("create", config.state.dir(), &error))?;
    if !host::is_there(&key) {
        make_key(&key, &format!("castra-{}", config.workspace), cancel)?;
    }
    // The public half is always made from the private key, also if an earlier castra was killed between the
    // two.
    if !host::is_there(&public) {
        let text = derive_public(&key, cancel)?;
        host::replace_file(&public, format!("{text}\n").as_bytes())
            .map_err(|error| Failure::io("create", &public, &error))?;
    }
    Ok(key)
}

/// The public key that a guest must accept for this VM's connection, one line.
pub fn public_key(vm: &VmConfig, config: &Config, cancel: &Cancel) -> Result<String> {
    let identity = match &vm.ssh.identity {
        Some(identity) => identity.clone(),
        None => ensure_project_key(config, cancel)?,
    };
    let public = public_path(&identity);
    match fs::read_to_string(&public) {
        Ok(text) => first_key(&text).ok_or_else(|| {
            Failure::new(
                Exit::Config,
                format!("{} holds no SSH public key", public.display()),
            )
            .advice("remove that file, or make it anew with `ssh-keygen -y`")
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => derive_public(&identity, cancel),
        Err(error) => Err(Failure::io("read", &public, &error)),
    }
}

fn public_path(key: &Path) -> PathBuf {
    let mut name = key.as_os_str().to_owned();
    name.push(".pub");
    name.into()
}

/// Makes a key under a temporary name and links it into place: `link` refuses to replace a key
/// that another castra has put there meanwhile, so both go on with the same one.
fn make_key(key: &Path, comment: &str, cancel: &Cancel) -> Result<()> {
    let folder = host::temporary_beside(key)
        .map_err(|error| Failure::io("read", Path::new("/dev/urandom"), &error))?;
    host::ensure_private_dir(&folder).map_err(|error| Failure::io("create", &folder, &error))?;
    // ssh-keygen runs inside the folder, so that no part of the state root's name is in an argument.
    let made = keygen(["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", "key"])
        .dir(&folder)
        .cancel(cancel)
        .run()
        .map_err(|error| keygen_failure(error, "can't make the project's SSH key"))
        .and_then(|_| match fs::hard_link(folder.join("key"), key) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(Failure::io("create", key, &error))
            }
            _ => Ok(()),
        });
    let _ = fs::remove_dir_all(&folder);
    made
}

fn derive_public(identity: &Path, cancel: &Cancel) -> Result<String> {
    if let Err(error) = fs::metadata(identity) {
        return Err(Failure::new(
            Exit::Config,
            format!("SSH identity {} can't be read", identity.display()),
        )
        .because(error)
        .advice("correct `identity` under [ssh], or leave it out: castra then makes a key for the project"));
    }
    let ended = keygen(["-y", "-P", "", "-f"])
        .arg(identity)
        .cancel(cancel)
        .run()
        .map_err(|error| match error {
            JobError::NotStarted { .. } | JobError::Cancelled => {
                keygen_failure(error, "can't read an SSH key")
            }
            _ => Failure::new(
                Exit::Config,
                format!(
                    "castra can't find the public key of SSH identity {}",
                    identity.display()
                ),
            )
            .because(error)
            .advice(format!(
                "write the output of `ssh-keygen -y` to {}; a key with a passphrase must be in the agent",
                public_path(identity).display()
            )),
        })?;
    first_key(&String::from_utf8_lossy(&ended.stdout)).ok_or_else(|| {
        Failure::new(
            Exit::Config,
            format!("ssh-keygen shows no public key for {}", identity.display()),
        )
    })
}

/// The first line that is a key: type, a blank, base64.
fn first_key(text: &str) -> Option<String> {
    text.lines()
        .map(str::trim)
        .find(|line| {
            let mut words = line.split_whitespace();
            let kind = words.next().unwrap_or_default();
            (kind.starts_with("ssh-") || kind.starts_with("ecdsa-") || kind.starts_with("sk-"))
                && words.next().is_some()
        })
        .map(str::to_owned)
}

fn keygen<'a>(args: impl IntoIterator<Item = &'a str>) -> Job<'static> {
    Job::new("ssh-keygen").args(args).env("LC_ALL", "C")
}

fn keygen_failure(error: JobError, what: &str) -> Failure {
    let missing = matches!(error, JobError::NotStarted { .. });
    let failure = error.into_failure(what, Exit::CantCreate);
    if missing {
        failure.advice(format!("install the package {SSH_PACKAGE}"))
    } else {
        failure
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::bootstrap::bootstrap_plan::tests::config_of;
    use crate::core::root::paths::StateRoot;
    use crate::core::scratch::Scratch;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn racing_makers_end_with_one_private_pair() {
        let scratch = Scratch::new("keys race % $HOME");
        let mut config = config_of(&["web"]);
        config.state = StateRoot::new(scratch.path("state root"));
        let publics: Vec<String> = std::thread::scope(|scope| {
            let makers: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| public_key(&config.vms[0], &config, &Cancel::new()).unwrap()))
                .collect();
            makers.into_iter().map(|maker| maker.join().unwrap()).collect()
        });
        assert!(publics.iter().all(|public| public == &publics[0]));
        assert!(publics[0].starts_with("ssh-ed25519 ") && publics[0].ends_with(" castra-demo-1a2b3c4d"));
        let key = config.state.ssh_key();
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        let names = fs::read_dir(config.state.dir()).unwrap().count();
        assert_eq!(names, 2, "nothing but the pair is left");

        let derived = derive_public(&key, &Cancel::new()).unwrap();
        fs::remove_file(public_path(&key)).unwrap();
        ensure_project_key(&config, &Cancel::new()).unwrap();
        assert_eq!(derived, publics[0]);
        assert_eq!(
            public_key(&config.vms[0], &config, &Cancel::new()).unwrap(),
            publics[0]
        );
    }

    #[test]
    fn a_configured_identity_is_read_not_made() {
        let scratch = Scratch::new("keys-identity");
        let mut config = config_of(&["web"]);
        config.state = StateRoot::new(scratch.path("state"));
        config.vms[0].ssh.identity = Some(scratch.path("mine"));
        let failure = public_key(&config.vms[0], &config, &Cancel::new()).unwrap_err();
        assert_eq!(failure.exit, Exit::Config);
        make_key(&scratch.path("mine"), "me", &Cancel::new()).unwrap();
        let derived = public_key(&config.vms[0], &config, &Cancel::new()).unwrap();
        assert!(derived.starts_with("ssh-ed25519 "), "{derived}");
        fs::write(scratch.path("mine.pub"), "# note\nssh-ed25519 AAAA me\n").unwrap();
        assert_eq!(
            public_key(&config.vms[0], &config, &Cancel::new()).unwrap(),
            "ssh-ed25519 AAAA me"
        );
        assert!(!config.state.ssh_key().exists());
    }
}
