//! A user's own `ssh` or rsync to a running VM: the same connection as the bootstrap's.
//!
//! Here: where a running VM's sshd answers, as `run.json` has it, and the block of an ssh_config
//! that says so. It only reads. Not here: the options themselves (`bootstrap::ssh`), or becoming
//! such a program (`app`).

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;

use crate::core::bootstrap::ssh::{CONNECT_TIMEOUT_SECS, SshTarget, alive_options, option_path};
use crate::core::failure::{Exit, Failure, Result};
use crate::core::name::VmName;
use crate::core::root::alive::find_qemu_pid;
use crate::core::root::paths::{StateRoot, vm_file};
use crate::core::root::records::{self, RunRecord};
use crate::core::runtime::{lost, pause, restart_advice};

/// ssh binds its control socket under this name and 17 characters first, and a Unix socket's name has 108 bytes at most.
const MAX_CONTROL_PATH_BYTES: usize = 90;

/// Where a VM's sshd answers now. A paused VM is a failure that says why it is paused.
pub fn running_target(state: &StateRoot, vm: &VmName) -> Result<SshTarget> {
    let target = target(state, vm)?;
    let paths = state.vm(vm);
    match pause::read(&paths) {
        Some(pause) => {
            let run: Option<RunRecord> = records::load(&paths.run())?;
            Err(pause.failure(vm, run.and_then(|run| run.overlay).as_deref()))
        }
        None => Ok(target),
    }
}

/// Where a VM's sshd answers while it runs, paused or not.
pub fn target(state: &StateRoot, vm: &VmName) -> Result<SshTarget> {
    let paths = state.vm(vm);
    let not_running = || {
        let lost = lost::of_roots(&[state.dir().to_owned()]);
        match lost.iter().find(|qemu| qemu.vm == *vm) {
            Some(qemu) => qemu.failure(Exit::Failed),
            None => Failure::new(Exit::Failed, format!("vm `{vm}` is not running"))
                .advice(restart_advice::advice(&paths, vm)),
        }
    };
    if find_qemu_pid(&paths)?.is_none() {
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

impl SshTarget {
    /// Arguments of an `ssh` that runs this command and never prompts.
    pub fn exec_argv(&self, line: &OsStr) -> Vec<OsString> {
        let mut argv: Vec<OsString> = ["-F", "/dev/null", "-T"].map(OsString::from).to_vec();
        let mut options = self.client_options();
        options.extend([
            "BatchMode=yes".to_owned(),
            format!("ConnectTimeout={CONNECT_TIMEOUT_SECS}"),
            "LogLevel=ERROR".to_owned(),
        ]);
        options.extend(alive_options());
        for option in options {
            argv.extend(["-o".into(), option.into()]);
        }
        argv.extend(["-l".into(), self.user.as_str().into()]);
        argv.extend(["-p".into(), self.port.to_string().into()]);
        argv.extend(["--".into(), self.host.as_str().into(), line.to_owned()]);
        argv
    }

    /// `Key=value` options for a program that gets the VM's name as its host.
    fn address_options(&self) -> Vec<String> {
        vec![
            format!("HostName={}", self.host),
            format!("Port={}", self.port),
            format!("User={}", self.user),
        ]
    }

    /// [`SshTarget::client_options`] for an ssh that also reads the user's own config, whose `Host *` must
    /// not change the connection: a control socket named after user and host would be the same for all VMs,
    /// which are all root's on the loopback; a proxy can't reach this machine's loopback; a forwarded agent
    /// would serve whoever is root in the guest.
    pub fn config_options(&self) -> Vec<String> {
        let mut options = self.client_options();
        let control = self.dir.join(vm_file::CLIENT_CTL);
        options.push(if control.as_os_str().len() <= MAX_CONTROL_PATH_BYTES {
            format!("ControlPath={}", option_path(&control))
        } else {
            "ControlPath=none".to_owned()
        });
        options.extend(["ProxyCommand=none".to_owned(), "ForwardAgent=no".to_owned()]);
        options
    }

    /// The VM as a block of an ssh_config, its name behind this prefix the host's.
    pub fn config_block(&self, prefix: &str) -> String {
        let mut block = format!("Host {prefix}{}\n", self.vm);
        for option in self.address_options().into_iter().chain(self.config_options()) {
            // ssh accepts both spellings; people write this one.
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
mod tests {
    use super::*;
    use crate::core::scratch::{RecordLock, Scratch};
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
        let more = "Host *\n  ControlMaster auto\n  ControlPath /tmp/cm-%r-%h\n  ProxyJump bastion\n  ForwardAgent yes\n";
        std::fs::write(&file, format!("{}{more}", target.config_block("demo-"))).unwrap();
        let output = Command::new("ssh")
            .arg("-G")
            .arg("-F")
            .arg(&file)
            .arg("demo-web-0")
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
            "forwardagent no",
        ] {
            assert!(has(line), "{line}\n{text}");
        }
        let known = target.dir.join("known_hosts");
        assert!(text.contains(&known.display().to_string()), "{text}");
        let control = target.dir.join("client.ctl").display().to_string();
        assert!(has(&format!("controlpath {control}")), "{text}");
        assert!(
            !text.contains("bastion") && !text.contains("proxycommand"),
            "{text}"
        );
    }

    #[test]
    fn no_control_socket_is_too_long_and_the_config_may_name_another() {
        let scratch = Scratch::new("ssh config control");
        let mut target = target(&scratch);
        for (length, own) in [(90, true), (91, false)] {
            let root = "/".to_owned() + &"d".repeat(length - "/client.ctl".len() - 1);
            target.dir = root.into();
            let block = target.config_block("");
            assert_eq!(block.contains("ControlPath none"), !own, "{block}");
            assert_eq!(block.contains("/client.ctl"), own, "{block}");
        }
        target.options = vec!["ControlPath=/mine".into(), "ProxyJump=bastion".into()];
        let block = target.config_block("");
        assert!(block.find("/mine") < block.find("ControlPath none"), "{block}");
        assert!(block.find("bastion") < block.find("ProxyCommand none"), "{block}");
    }

    #[test]
    fn a_line_end_begins_no_option() {
        let scratch = Scratch::new("ssh config lines");
        let mut target = target(&scratch);
        target.options = vec!["Compression=yes\nProxyCommand touch here".into()];
        let block = target.config_block("");
        assert!(
            !block
                .lines()
                .any(|line| line.trim().starts_with("ProxyCommand touch")),
            "{block}"
        );
    }

    #[test]
    fn only_a_running_vm_has_a_target() {
        let scratch = Scratch::new("ssh client");
        let state = StateRoot::new(scratch.dir());
        let vm: VmName = "web".parse().unwrap();
        std::fs::create_dir_all(state.vm(&vm).dir()).unwrap();
        let failure = running_target(&state, &vm).unwrap_err();
        assert!(failure.to_string().contains("not running"), "{failure}");
        let _qemu = RecordLock::hold(&state.vm(&vm).qemu_pid());
        assert!(
            running_target(&state, &vm).is_err(),
            "without run.json nobody knows the port"
        );
    }
}
