//! A person's own `ssh`, `scp` or rsync to a running VM: the same connection as the bootstrap's.
//!
//! Here: where a running VM's sshd answers, as `run.json` has it, and the block of an ssh_config
//! that says so. It only reads. Not here: the options themselves (`bootstrap::ssh`), or becoming
//! such a program (`app`).

use std::fmt::Write as _;

use crate::core::bootstrap::ssh::SshTarget;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host::{self, Holder};
use crate::core::name::VmName;
use crate::core::paths::StateRoot;
use crate::core::records::{self, RunRecord};

/// Where a running VM's sshd answers.
pub fn running_target(state: &StateRoot, vm: &VmName) -> Result<SshTarget> {
    let paths = state.vm(vm);
    let not_running =
        || Failure::new(Exit::Failed, format!("vm `{vm}` is not running")).advice(format!("castra up {vm}"));
    if !ask_whether_runs(state, vm)? {
        return Err(not_running());
    }
    let run: RunRecord = records::load(&paths.run())?.ok_or_else(not_running)?;
    let own = state.ssh_key();
    let identity = run.ssh.identity.unwrap_or_else(|| own.clone());
    Ok(SshTarget {
        port: run.ssh.port.ok_or_else(|| {
            Failure::new(Exit::Failed, format!("vm `{vm}` has no port for SSH")).advice("castra status")
        })?,
        vm: run.vm,
        user: run.ssh.user,
        host: run.ssh.host,
        own_key: identity == own,
        identity,
        options: run.ssh.options,
        dir: paths.dir().to_owned(),
    })
}

/// Whether a VM has a QEMU.
pub fn runs(state: &StateRoot, vm: &VmName) -> bool {
    ask_whether_runs(state, vm).unwrap_or(true)
}

/// The same; that it can't be told is a failure.
fn ask_whether_runs(state: &StateRoot, vm: &VmName) -> Result<bool> {
    let path = state.vm(vm).qemu_pid();
    match host::ask_lock_holder(&path) {
        Ok(holder) => Ok(holder != Holder::Nobody),
        Err(error) => Err(Failure::io("read", &path, &error)),
    }
}

impl SshTarget {
    /// `Key=value` for a program that is told the VM's name as its host: address, port and user,
    /// then [`SshTarget::client_options`].
    pub fn named_options(&self) -> Vec<String> {
        let mut options = vec![
            format!("HostName={}", self.host),
            format!("Port={}", self.port),
            format!("User={}", self.user),
        ];
        options.extend(self.client_options());
        options
    }

    /// The VM as a block of an ssh_config, its name the host's.
    pub fn config_block(&self) -> String {
        let mut block = format!("Host {}\n", self.vm);
        for option in self.named_options() {
            // Both spellings are ssh's own; this is the one that people write.
            let line = match option.split_once('=') {
                Some((key, value)) if !key.contains(char::is_whitespace) => format!("{key} {value}"),
                _ => option,
            };
            // A line end within an option would begin another one.
            let _ = writeln!(block, "    {}", line.replace(['\n', '\r'], " "));
        }
        block
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::core::host::FileLock;
    use crate::core::scratch::Scratch;
    use std::process::Command;

    fn target(scratch: &Scratch) -> SshTarget {
        SshTarget {
            vm: "web-0".parse().unwrap(),
            user: "root".into(),
            host: "127.0.0.1".into(),
            port: 2222,
            identity: scratch.path("state 50%/id_ed25519"),
            own_key: true,
            options: vec!["ServerAliveInterval=3".into(), "Compression yes".into()],
            dir: scratch.path("state 50%/vms/web-0"),
        }
    }

    #[test]
    fn ssh_reads_the_block_as_it_was_meant() {
        let scratch = Scratch::new("ssh config");
        let target = target(&scratch);
        let file = scratch.path("config");
        std::fs::write(&file, target.config_block()).unwrap();
        let output = Command::new("ssh")
            .arg("-G")
            .arg("-F")
            .arg(&file)
            .arg("web-0")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let has = |line: &str| text.lines().any(|found| found == line);
        for line in [
            "hostname 127.0.0.1",
            "port 2222",
            "user root",
            "serveraliveinterval 3",
            "compression yes",
            "identitiesonly yes",
            "hostkeyalias castra-web-0",
            "identityagent none",
        ] {
            assert!(has(line), "{line}\n{text}");
        }
        let known = target.dir.join("known_hosts");
        assert!(text.contains(&known.display().to_string()), "{text}");
    }

    #[test]
    fn a_line_end_begins_no_option() {
        let scratch = Scratch::new("ssh config lines");
        let mut target = target(&scratch);
        target.options = vec!["Compression=yes\nProxyCommand touch here".into()];
        let block = target.config_block();
        assert!(
            !block.lines().any(|line| line.trim().starts_with("ProxyCommand")),
            "{block}"
        );
    }

    #[test]
    fn only_a_running_vm_has_a_target() {
        let scratch = Scratch::new("ssh client");
        let state = StateRoot::new(scratch.dir());
        let vm: VmName = "web".parse().unwrap();
        std::fs::create_dir_all(state.vm(&vm).dir()).unwrap();
        assert!(!runs(&state, &vm));
        let failure = running_target(&state, &vm).unwrap_err();
        assert!(failure.to_string().contains("not running"), "{failure}");
        let _lock = FileLock::try_take(&state.vm(&vm).qemu_pid(), "qemu").unwrap();
        assert!(runs(&state, &vm));
        assert!(
            running_target(&state, &vm).is_err(),
            "without run.json nobody knows the port"
        );
    }
}
