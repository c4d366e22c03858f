//! `[bootstrap]`, `[vms.bootstrap]` and `[ssh]`: what is written, and how one overrides another.
//!
//! Here: reading these tables and merging them. Not here: `bootstrap.toml` (`metadata`), or running
//! a bootstrap (`core::bootstrap`).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::path_values::PathBases;
use super::reader::{Located, Section, quoted, shown};
use super::settings::MAX_SECS;
use super::source::Source;
use super::{BootstrapConfig, SshConfig};
use crate::core::events::BootstrapMode;

/// Directories of the guest's system, into which no payload may be copied.
const SYSTEM_DIRS: [&str; 14] = [
    "/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/proc", "/run", "/sbin", "/sys", "/tmp", "/usr",
    "/var",
];

/// A bootstrap table as written; missing keys are inherited.
#[derive(Clone, Debug, Default)]
pub(super) struct RawBootstrap {
    mode: Option<BootstrapMode>,
    handshake_timeout: Option<Duration>,
    step_timeout: Option<Duration>,
    apply_timeout: Option<Duration>,
    pub(super) remote_dir: Option<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) script: Option<Located<PathBuf>>,
    payload: Option<PathBuf>,
    pub(super) verify_command: Option<String>,
    pub(super) verify_path: Option<String>,
}

/// Whose table it is: the project's has only the keys that make sense for all VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    Project,
    Vm,
}

impl RawBootstrap {
    pub(super) fn read(mut section: Section<'_>, bases: &PathBases, scope: Scope) -> RawBootstrap {
        let mode = section.choice_or(
            "mode",
            &[
                ("auto", BootstrapMode::Auto),
                ("skip", BootstrapMode::Skip),
                ("always", BootstrapMode::Always),
            ],
            // Upstream castra understood these.
            &[
                ("automatic", BootstrapMode::Auto),
                ("enabled", BootstrapMode::Auto),
                ("disabled", BootstrapMode::Skip),
                ("off", BootstrapMode::Skip),
                ("force", BootstrapMode::Always),
            ],
        );
        let mut raw = RawBootstrap {
            mode: mode.map(|mode| mode.value),
            handshake_timeout: timeout(&mut section, "handshake_timeout_secs", 60),
            step_timeout: timeout(&mut section, "step_timeout_secs", 60),
            apply_timeout: timeout(&mut section, "apply_timeout_secs", 1800),
            remote_dir: remote_dir(&mut section),
            env: env(&mut section),
            ..RawBootstrap::default()
        };
        if scope == Scope::Vm {
            let source = section.source;
            raw.script = section.line("script", "bootstrap/web/run.sh").and_then(|script| {
                let at = script.at;
                bases.resolve(source, script).map(|value| Located { value, at })
            });
            raw.payload = section
                .line("payload", "bootstrap/web/payload")
                .and_then(|payload| bases.resolve(source, payload));
            raw.verify_command = command(&mut section, "verify_command");
            raw.verify_path = section.line("verify_path", "state/ready").map(|path| path.value);
        }
        section.finish();
        raw
    }

    /// Overrides this table with another one; in `env` each key by itself.
    pub(super) fn overlaid(mut self, over: &RawBootstrap) -> RawBootstrap {
        let RawBootstrap {
            mode,
            handshake_timeout,
            step_timeout,
            apply_timeout,
            remote_dir,
            env,
            script,
            payload,
            verify_command,
            verify_path,
        } = over.clone();
        self.mode = mode.or(self.mode);
        self.handshake_timeout = handshake_timeout.or(self.handshake_timeout);
        self.step_timeout = step_timeout.or(self.step_timeout);
        self.apply_timeout = apply_timeout.or(self.apply_timeout);
        self.remote_dir = remote_dir.or(self.remote_dir);
        self.env.extend(env);
        self.script = script.or(self.script);
        self.payload = payload.or(self.payload);
        self.verify_command = verify_command.or(self.verify_command);
        self.verify_path = verify_path.or(self.verify_path);
        self
    }

    /// With the defaults of the missing keys.
    pub(super) fn resolved(self) -> BootstrapConfig {
        BootstrapConfig {
            mode: self.mode.unwrap_or(BootstrapMode::Auto),
            handshake_timeout: self.handshake_timeout,
            step_timeout: self.step_timeout.unwrap_or(Duration::from_secs(60)),
            apply_timeout: self.apply_timeout.unwrap_or(Duration::from_secs(1800)),
            remote_dir: self.remote_dir.unwrap_or_else(|| "/var/tmp/castra".to_owned()),
            env: self.env,
            script: self.script.map(|script| script.value),
            payload: self.payload,
            verify_command: self.verify_command,
            verify_path: self.verify_path,
            handshake_identity: None,
            metadata_path: None,
        }
    }
}

/// An `[ssh]` table as written.
#[derive(Clone, Debug, Default)]
pub(super) struct RawSsh {
    user: Option<String>,
    pub(super) host: Option<String>,
    pub(super) port: Option<u16>,
    identity: Option<PathBuf>,
    options: Option<Vec<String>>,
}

impl RawSsh {
    pub(super) fn read(section: &mut Section<'_>, bases: &PathBases) -> RawSsh {
        let user = section.line("user", "root");
        let user = user.and_then(|user| ssh_word(section, "user", user, "root"));
        let source = section.source;
        let identity = section
            .line("identity", "~/.ssh/id_ed25519")
            .and_then(|identity| bases.resolve(source, identity));
        let options = section.texts("options", "ServerAliveInterval=5").map(|options| {
            options
                .value
                .into_iter()
                .filter_map(|option| ssh_option(section, option))
                .collect()
        });
        RawSsh {
            user,
            identity,
            options,
            host: None,
            port: None,
        }
    }

    /// `host` and `port`, which only a `bootstrap.toml` may name.
    pub(super) fn read_address(&mut self, section: &mut Section<'_>) {
        let host = section.line("host", "127.0.0.1");
        self.host = host.and_then(|host| ssh_word(section, "host", host, "127.0.0.1"));
        let port = section.number("port", 1..=65535, 2222);
        self.port = port.map(|port| u16::try_from(port.value).expect("the range was checked"));
    }

    pub(super) fn apply(&self, config: &mut SshConfig) {
        if let Some(user) = &self.user {
            config.user.clone_from(user);
        }
        if let Some(identity) = &self.identity {
            config.identity = Some(identity.clone());
        }
        if let Some(options) = &self.options {
            config.options.clone_from(options);
        }
        config.host = self.host.clone().or(config.host.take());
        config.port = self.port.or(config.port);
    }
}

pub(super) fn remote_dir(section: &mut Section<'_>) -> Option<String> {
    const EXAMPLE: &str = "/var/tmp/castra";
    let dir = section.line("remote_dir", EXAMPLE)?;
    let parts: Vec<&str> = dir
        .value
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect();
    let tidy = format!("/{}", parts.join("/"));
    let reason = if !dir.value.starts_with('/') {
        "is not absolute"
    } else if parts.contains(&"..") {
        "leads through `..`"
    } else if SYSTEM_DIRS.contains(&tidy.as_str()) {
        "belongs to the guest's system"
    } else {
        return Some(tidy);
    };
    let text = format!("`remote_dir = {}` {reason}", shown(&dir.value));
    section.wrong(dir.at, text, "remote_dir", &quoted(EXAMPLE));
    None
}

/// Variables of the script. Shells can set no other names than these.
pub(super) fn env(section: &mut Section<'_>) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    for (name, value) in section.text_table("env", "{ APP = \"demo\" }") {
        if check_variable(section.source, &name, &value) {
            env.insert(name, value.value);
        }
    }
    env
}

pub(super) fn check_variable(source: &Source, name: &str, value: &Located<String>) -> bool {
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if !starts_well || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        source.error(
            value.at,
            format!("{} can't be a variable's name", shown(name)),
            "use letters, digits and `_`, the first no digit, as in `APP_MODE`",
        );
        return false;
    }
    if value.value.contains('\0') {
        source.error(
            value.at,
            format!("the value of `{name}` holds a NUL"),
            "leave it out",
        );
        return false;
    }
    if [
        "CASTRA_VM",
        "CASTRA_RUN_ID",
        "CASTRA_PAYLOAD_DIR",
        "CASTRA_BROKER",
    ]
    .contains(&name)
    {
        source.error(
            value.at,
            format!("castra itself sets `{name}`"),
            "choose another name",
        );
        return false;
    }
    true
}

/// A command for the guest's shell: any text that isn't empty, several lines too.
pub(super) fn command(section: &mut Section<'_>, key: &'static str) -> Option<String> {
    const EXAMPLE: &str = "test -f state/ready";
    let text = section.text(key, EXAMPLE)?;
    if text.value.trim().is_empty() || text.value.contains('\0') {
        section.wrong(text.at, format!("`{key}` is no command"), key, &quoted(EXAMPLE));
        return None;
    }
    Some(text.value)
}

fn timeout(section: &mut Section<'_>, key: &'static str, usual: u64) -> Option<Duration> {
    let secs = section.number(key, 1..=MAX_SECS, usual)?;
    Some(Duration::from_secs(secs.value))
}

/// A user or host: ssh would take a leading `-` for a flag.
fn ssh_word(section: &Section<'_>, key: &str, text: Located<String>, example: &str) -> Option<String> {
    if text.value.starts_with('-')
        || text
            .value
            .contains(|c: char| c.is_whitespace() || "@/'\"\\".contains(c))
    {
        let what = format!("`{key}` can't be {}", shown(&text.value));
        section.wrong(text.at, what, key, &quoted(example));
        return None;
    }
    Some(text.value)
}

/// One `Key=value`; an `-o` before it, as on ssh's command line, is taken off.
fn ssh_option(section: &Section<'_>, option: Located<String>) -> Option<String> {
    let text = option.value.trim();
    let text = text.strip_prefix("-o").unwrap_or(text).trim();
    if text.is_empty() && option.value.trim() == "-o" {
        return None;
    }
    let name_length = text.bytes().take_while(u8::is_ascii_alphanumeric).count();
    let (name, value) = text.split_at(name_length);
    let value = value.trim_start_matches(|c: char| c == '=' || c.is_whitespace());
    let separated = text.len() > name.len() + value.len();
    if name.is_empty() || value.is_empty() || !separated || text.chars().any(char::is_control) {
        section.source.error(
            option.at,
            format!("{} is no ssh option", shown(&option.value)),
            "write `Key=value` as in ssh_config(5), for example \"ServerAliveInterval=5\"",
        );
        return None;
    }
    Some(format!("{name}={value}"))
}
