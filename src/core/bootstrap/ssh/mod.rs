//! How castra calls `ssh`: one master connection per bootstrap, everything else through it.
//!
//! Here: the target, the command lines, what ssh's messages mean (`error`), a user's own connection to a VM
//! (`login`). Not here: the keys (`bootstrap::keys`), or what runs in the guest (`bootstrap::guest_scripts`).
//!
//! ssh runs with `vms/<vm>` as working directory and names its socket and `known_hosts` relative
//! to it, so that no state root is too long for a Unix socket (ssh: 90 bytes). The user's own
//! `~/.ssh/config` takes no part: a `Host *` in it must not change what a bootstrap does.

pub mod channel;
pub mod command;
pub mod error;
pub mod login;
pub mod master;

use std::ffi::OsString;
use std::io;
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::core::config::{Config, VmConfig};
use crate::core::events::BootstrapPlanSsh;
use crate::core::name::VmName;
use crate::core::root::paths::vm_file;

/// Limit for one attempt to connect, from name look-up to banner.
const CONNECT_TIMEOUT_SECS: u32 = 30;
/// A guest that answers nothing for four times this long is gone. Sixteen guests under TCG on two
/// cores can stall for many seconds, so it is generous.
const ALIVE_INTERVAL_SECS: u32 = 15;
const ALIVE_COUNT: u32 = 4;

/// A server that says nothing for a minute is given up, also during the login, where ConnectTimeout no longer
/// counts: for a key exchange and an authentication, ssh waits this long for each answer. ssh reports the
/// reason of such an end, and of a connection closed during the login, only at LogLevel INFO, among messages
/// that nobody needs; so LogVerbose enables this one function. OpenSSH before 8.5 doesn't know LogVerbose.
pub fn alive_options() -> [String; 4] {
    [
        format!("ServerAliveInterval={ALIVE_INTERVAL_SECS}"),
        format!("ServerAliveCountMax={ALIVE_COUNT}"),
        "IgnoreUnknown=LogVerbose".to_owned(),
        format!("LogVerbose={FATAL_WORDS}*:*"),
    ]
}

/// Begins the lines that LogVerbose adds: file and function.
const FATAL_WORDS: &str = "packet.c:sshpkt_vfatal";

/// Everything ssh needs to reach one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshTarget {
    /// The VM, which names its host key: ports change with every launch.
    pub vm: VmName,
    /// Login name.
    pub user: String,
    /// Address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// The private key.
    pub identity: PathBuf,
    /// The project's own key: no agent is asked for it.
    pub own_key: bool,
    /// `Key=value` from the config; before castra's own wherever the bootstrap allows it.
    pub options: Vec<String>,
    /// `vms/<vm>`.
    pub dir: PathBuf,
}

impl SshTarget {
    /// The target a plan has resolved; `None` while its port isn't allocated.
    pub fn new(vm: &VmConfig, config: &Config, ssh: &BootstrapPlanSsh) -> Option<SshTarget> {
        let own = config.state.ssh_key();
        let identity = ssh.identity.clone().unwrap_or_else(|| own.clone());
        Some(SshTarget {
            vm: vm.name.clone(),
            user: ssh.user.clone(),
            host: ssh.host.clone(),
            port: ssh.port?,
            own_key: identity == own,
            identity,
            options: ssh.options.clone(),
            dir: config.state.vm(&vm.name).dir().to_owned(),
        })
    }

    /// Arguments of the master connection, which runs `command` and carries all channels.
    pub fn master_argv(&self, command: &str) -> Vec<OsString> {
        self.argv(&["-M"], &["ControlPersist=no"], command)
    }

    /// Arguments of one channel through the master. It can't connect by itself: without a master
    /// its connection is the program `false`, so that a dead master is an error and never a
    /// silent second connection.
    pub fn channel_argv(&self, command: &str) -> Vec<OsString> {
        self.argv(&[], &["ControlMaster=no", "ProxyCommand=false"], command)
    }

    /// Starts ssh in the VM's directory, away from the terminal's signals, with pipes for all three streams.
    fn spawn(&self, argv: Vec<OsString>) -> io::Result<Child> {
        Command::new("ssh")
            .args(argv)
            .current_dir(&self.dir)
            .env("LC_ALL", "C")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    }

    /// `Key=value` for an `ssh`, `scp` or ssh_config of the user's own, whatever its working
    /// directory: same key, same host key, same options. User, host and port are beside it.
    pub fn client_options(&self) -> Vec<String> {
        let known_hosts = self.dir.join(vm_file::KNOWN_HOSTS);
        [
            self.identity_options(),
            self.options.clone(),
            self.host_key_options(&option_path(&known_hosts)),
            self.key_exchange(),
        ]
        .concat()
    }

    fn argv(&self, flags: &[&str], control: &[&str], command: &str) -> Vec<OsString> {
        let mut argv: Vec<OsString> = Vec::new();
        let mut word = |text: &str| argv.push(text.into());
        // An empty config file, so that neither the user's nor the system's counts.
        for text in ["-F", "/dev/null", "-T"] {
            word(text);
        }
        flags.iter().for_each(|flag| word(flag));
        word("-S");
        word(vm_file::SSH_CTL);
        // ssh takes the first value of each option: what the pipeline relies on comes first, then
        // the user's, then the defaults.
        let fixed = control
            .iter()
            .copied()
            .chain(["BatchMode=yes", "RemoteCommand=none", "SessionType=default"])
            .map(str::to_owned);
        let defaults = [
            format!("ConnectTimeout={CONNECT_TIMEOUT_SECS}"),
            "PreferredAuthentications=publickey".to_owned(),
            "ForwardAgent=no".to_owned(),
            "LogLevel=ERROR".to_owned(),
        ];
        let options = fixed
            .chain(self.identity_options())
            .chain(self.options.clone())
            .chain(self.host_key_options(vm_file::KNOWN_HOSTS))
            .chain(self.key_exchange())
            .chain(alive_options())
            .chain(defaults);
        for option in options {
            word("-o");
            word(&option);
        }
        word("-l");
        word(&self.user);
        word("-p");
        word(&self.port.to_string());
        word("--");
        word(&self.host);
        word(command);
        argv
    }

    fn identity_options(&self) -> Vec<String> {
        let mut options = vec![
            format!("IdentityFile={}", option_path(&self.identity)),
            "IdentitiesOnly=yes".to_owned(),
        ];
        if self.own_key {
            options.push("IdentityAgent=none".to_owned());
        }
        options
    }

    /// On the loopback nobody records traffic to decipher it in twenty years, and the key exchange that
    /// guards against that (sntrup761) costs ssh 90 ms of a core at each connection, instead of 15 ms. A
    /// guest that has no other key exchange still gets it.
    fn key_exchange(&self) -> Vec<String> {
        let own = self.host == "localhost"
            || self
                .host
                .parse::<IpAddr>()
                .is_ok_and(|address| address.is_loopback());
        if !own {
            return Vec::new();
        }
        vec!["KexAlgorithms=^curve25519-sha256".to_owned()]
    }

    fn host_key_options(&self, known_hosts: &str) -> Vec<String> {
        vec![
            "StrictHostKeyChecking=accept-new".to_owned(),
            format!("UserKnownHostsFile={known_hosts}"),
            "GlobalKnownHostsFile=/dev/null".to_owned(),
            format!("HostKeyAlias=castra-{}", self.vm),
            "HashKnownHosts=no".to_owned(),
            "UpdateHostKeys=no".to_owned(),
            "CheckHostIP=no".to_owned(),
        ]
    }
}

/// A path as the value of an ssh option: quoted against blanks, `%` doubled against tokens.
fn option_path(path: &Path) -> String {
    let text = path
        .to_string_lossy()
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('%', "%%");
    format!("\"{text}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> SshTarget {
        SshTarget {
            vm: "web-0".parse().unwrap(),
            user: "root".into(),
            host: "127.0.0.1".into(),
            port: 2222,
            identity: "/state root/50%/id_ed25519".into(),
            own_key: true,
            options: vec!["ServerAliveInterval=3".into()],
            dir: "/state root/vms/web-0".into(),
        }
    }

    fn shown(argv: &[OsString]) -> String {
        argv.iter()
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>()
            .join("\n")
            .replace("-o\n", "-o ")
    }

    #[test]
    fn the_master_command_line() {
        let expected = r#"-F
/dev/null
-T
-M
-S
ssh.ctl
-o ControlPersist=no
-o BatchMode=yes
-o RemoteCommand=none
-o SessionType=default
-o IdentityFile="/state root/50%%/id_ed25519"
-o IdentitiesOnly=yes
-o IdentityAgent=none
-o ServerAliveInterval=3
-o StrictHostKeyChecking=accept-new
-o UserKnownHostsFile=known_hosts
-o GlobalKnownHostsFile=/dev/null
-o HostKeyAlias=castra-web-0
-o HashKnownHosts=no
-o UpdateHostKeys=no
-o CheckHostIP=no
-o KexAlgorithms=^curve25519-sha256
-o ServerAliveInterval=15
-o ServerAliveCountMax=4
-o IgnoreUnknown=LogVerbose
-o LogVerbose=packet.c:sshpkt_vfatal*:*
-o ConnectTimeout=30
-o PreferredAuthentications=publickey
-o ForwardAgent=no
-o LogLevel=ERROR
-l
root
-p
2222
--
127.0.0.1
true"#;
        assert_eq!(shown(&target().master_argv("true")), expected);
    }

    #[test]
    fn only_the_own_loopback_does_without_the_dear_key_exchange() {
        let mut target = target();
        for (host, cheap) in [
            ("127.0.0.1", true),
            ("::1", true),
            ("localhost", true),
            ("10.0.0.7", false),
        ] {
            target.host = host.into();
            let options = target.client_options();
            assert_eq!(
                options.iter().any(|option| option.starts_with("Kex")),
                cheap,
                "{host}"
            );
        }
    }

    #[test]
    fn a_channel_never_connects_by_itself() {
        let argv = shown(&target().channel_argv("sh"));
        assert!(
            argv.contains("-S\nssh.ctl\n-o ControlMaster=no\n-o ProxyCommand=false\n"),
            "{argv}"
        );
        assert!(!argv.contains("-M\n"));
    }
}
