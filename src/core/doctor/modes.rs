//! Who else may read what castra keeps.
//!
//! Directories that castra makes have mode 0700 and files 0600 (docs/SECURITY.md), but one that was there
//! already keeps its mode. What lies in a directory that only its owner may enter is safe whatever
//! its own mode, as QEMU's sockets are; so the ways in are looked at, and what is secret in itself.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;
use serde_json::json;

use super::{Finding, text_of};
use crate::core::host;
use crate::core::root::alive::launched_vms;
use crate::core::root::paths::StateRoot;

const ID: &str = "security.modes";

/// Looks at a castra home: the shared parts of it.
pub fn of_home(home: &Path) -> Vec<Finding> {
    judge(
        &format!("castra's home {}", home.display()),
        &[home.to_owned()],
        &[],
    )
}

/// Looks at a project's state root.
pub fn of_state(state: &StateRoot) -> Vec<Finding> {
    if !host::is_there(state.dir()) {
        return Vec::new();
    }
    let mut secrets = vec![state.ssh_key()];
    for vm in launched_vms(state).unwrap_or_default() {
        secrets.extend(files_in(&state.vm(&vm).seed()));
    }
    let what = format!("the state root {}", state.dir().display());
    judge(&what, &[state.dir().to_owned()], &secrets)
}

fn files_in(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Directories must be closed to others; secrets too, for ssh refuses a key that isn't.
fn judge(what: &str, dirs: &[PathBuf], secrets: &[PathBuf]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    for path in dirs.iter().chain(secrets) {
        let Ok(meta) = fs::symlink_metadata(path) else {
            continue;
        };
        if meta.is_symlink() {
            continue;
        }
        let mode = meta.mode() & 0o777;
        let data = json!({"path": text_of(path), "mode": format!("{mode:04o}"), "uid": meta.uid()});
        let shown = path.display();
        if mode & 0o077 != 0 {
            let (right, may) = match meta.is_dir() {
                true => ("700", "enter"),
                false => ("600", "read"),
            };
            findings.push(
                Finding::warn(
                    ID,
                    format!("others may {may} {shown} (mode {mode:04o})"),
                    format!("`chmod {right} {shown}`"),
                )
                .data(data),
            );
        } else if meta.uid() != Uid::effective().as_raw() {
            findings.push(
                Finding::warn(
                    ID,
                    format!("{shown} belongs to another user (uid {})", meta.uid()),
                    "run castra as that user, or give yourself another CASTRA_HOME or `state_dir`",
                )
                .data(data),
            );
        }
    }
    if findings.is_empty() && dirs.iter().any(|dir| dir.exists()) {
        findings.push(Finding::ok(ID, format!("{what} is yours alone")).data(json!({"path": dirs.first()})));
    }
    findings
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::core::doctor::Level;
    use crate::core::scratch::Scratch;

    #[test]
    fn what_others_may_enter_or_read_is_named() {
        let scratch = Scratch::new("doctor-modes");
        let state = StateRoot::new(scratch.path("state"));
        assert_eq!(of_state(&state), []);
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        fs::create_dir_all(state.dir().join("vms/web/seed")).unwrap();
        let token = state.dir().join("vms/web/seed/token");
        fs::write(&token, "x").unwrap();
        fs::write(state.ssh_key(), "x").unwrap();
        set(state.dir(), 0o700);
        set(&token, 0o600);
        set(&state.ssh_key(), 0o600);
        let fine = of_state(&state);
        assert_eq!((fine.len(), fine[0].level), (1, Level::Ok), "{fine:?}");
        set(state.dir(), 0o755);
        set(&token, 0o644);
        let found = of_state(&state);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].text.contains("may enter") && found[0].text.contains("0755"));
        assert!(
            found[1]
                .remediation
                .as_deref()
                .unwrap()
                .starts_with("`chmod 600 ")
        );
    }
}
