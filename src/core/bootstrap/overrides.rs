//! `--bootstrap MODE`, `--bootstrap VM=MODE[,VM=MODE…]`: how one invocation steers the bootstrap
//! (docs/BOOTSTRAP.md).
//!
//! Here: the meaning of all values together, and every refusal. Not here: the flag itself (`cli`), or what a
//! mode does (`bootstrap::bootstrap_plan`).

use std::collections::BTreeMap;

use crate::core::config::{Config, VmConfig};
use crate::core::events::BootstrapMode;
use crate::core::failure::{Exit, Failure, Result};

/// Names beyond this many are counted instead of listed.
const NAMES_SHOWN: usize = 20;

/// The modes one invocation asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    global: Option<BootstrapMode>,
    /// By [`crate::core::name::VmName::key`].
    per_vm: BTreeMap<String, BootstrapMode>,
    /// By role, in lower case.
    per_role: BTreeMap<String, BootstrapMode>,
}

impl Overrides {
    /// Understands the values of all `--bootstrap` flags together. Nothing has run when it
    /// refuses: a mode or VM that doesn't exist, and two different modes for the same target.
    pub fn parse(values: &[String], config: &Config) -> Result<Overrides> {
        let mut overrides = Overrides::default();
        for entry in values.iter().flat_map(|value| value.split(',')).map(str::trim) {
            match entry.split_once('=') {
                None => {
                    let mode = parse_mode(entry, entry)?;
                    if let Some(earlier) = overrides.global.replace(mode)
                        && earlier != mode
                    {
                        return Err(conflict("all VMs", earlier, mode));
                    }
                }
                Some((name, mode)) => {
                    let target = find_target(name.trim(), config)?;
                    let mode = parse_mode(mode.trim(), entry)?;
                    let (earlier, what) = match target {
                        Target::Vm(vm) => (
                            overrides.per_vm.insert(vm.name.key(), mode),
                            format!("vm `{}`", vm.name),
                        ),
                        Target::Role(role) => (
                            overrides.per_role.insert(role.to_ascii_lowercase(), mode),
                            format!("the VMs of role `{role}`"),
                        ),
                    };
                    if let Some(earlier) = earlier.filter(|earlier| *earlier != mode) {
                        return Err(conflict(&what, earlier, mode));
                    }
                }
            }
        }
        Ok(overrides)
    }

    /// The mode of this VM: its own override, else its role's, else the global one, else the config's.
    pub fn mode_for(&self, vm: &VmConfig) -> BootstrapMode {
        self.per_vm
            .get(&vm.name.key())
            .or_else(|| self.per_role.get(&vm.role.to_ascii_lowercase()))
            .copied()
            .or(self.global)
            .unwrap_or(vm.bootstrap.mode)
    }
}

/// The word for a mode, as config and command line spell it.
pub fn mode_word(mode: BootstrapMode) -> &'static str {
    match mode {
        BootstrapMode::Auto => "auto",
        BootstrapMode::Skip => "skip",
        BootstrapMode::Always => "always",
    }
}

fn parse_mode(word: &str, entry: &str) -> Result<BootstrapMode> {
    [BootstrapMode::Auto, BootstrapMode::Skip, BootstrapMode::Always]
        .into_iter()
        .find(|mode| mode_word(*mode) == word)
        .ok_or_else(|| {
            Failure::new(
                Exit::Usage,
                format!("--bootstrap {entry:?} doesn't name a bootstrap mode"),
            )
            .because(format!("{word:?} is none of auto, skip, always"))
            .advice("write `--bootstrap MODE` for all VMs or `--bootstrap VM=MODE` for one")
        })
}

/// The target of an entry.
enum Target<'a> {
    Vm(&'a VmConfig),
    /// All replicas of this role.
    Role(&'a str),
}

fn find_target<'a>(name: &str, config: &'a Config) -> Result<Target<'a>> {
    if let Some(vm) = config.vm(name) {
        return Ok(Target::Vm(vm));
    }
    let replica = config.vms.iter().find(|vm| vm.role.eq_ignore_ascii_case(name));
    if let Some(vm) = replica {
        return Ok(Target::Role(&vm.role));
    }
    let failure = Failure::new(
        Exit::Usage,
        format!("--bootstrap names vm {name:?}, which doesn't exist"),
    );
    let all: Vec<&str> = config.vms.iter().map(|vm| vm.name.as_str()).collect();
    Err(failure
        .because(format!(
            "{} has {}",
            config.path.display(),
            if all.is_empty() {
                "no VMs".to_owned()
            } else {
                list(&all)
            }
        ))
        .advice("name a VM or a role of castra.toml"))
}

fn list(names: &[&str]) -> String {
    let shown = names
        .iter()
        .take(NAMES_SHOWN)
        .copied()
        .collect::<Vec<_>>()
        .join(", ");
    match names.len().checked_sub(NAMES_SHOWN) {
        Some(more) if more > 0 => format!("{shown} and {more} more"),
        _ => shown,
    }
}

fn conflict(target: &str, one: BootstrapMode, other: BootstrapMode) -> Failure {
    Failure::new(
        Exit::Usage,
        format!(
            "--bootstrap asks for both `{}` and `{}` for {target}",
            mode_word(one),
            mode_word(other)
        ),
    )
    .advice("give each target one mode")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::bootstrap::bootstrap_plan::tests::config_of;

    fn modes(values: &[&str]) -> String {
        let config = config_of(&["web", "api-0", "api-1"]);
        let values: Vec<String> = values.iter().map(|value| (*value).to_owned()).collect();
        match Overrides::parse(&values, &config) {
            Ok(overrides) => config
                .vms
                .iter()
                .map(|vm| mode_word(overrides.mode_for(vm)))
                .collect::<Vec<_>>()
                .join(" "),
            Err(failure) => {
                assert_eq!(failure.exit, Exit::Usage);
                failure.to_string()
            }
        }
    }

    #[test]
    fn the_nearest_word_counts() {
        assert_eq!(modes(&[]), "auto auto auto");
        assert_eq!(modes(&["skip"]), "skip skip skip");
        assert_eq!(modes(&["web=always"]), "always auto auto");
        assert_eq!(modes(&["web=always,api-1=skip"]), "always auto skip");
        assert_eq!(modes(&["web=always", "skip"]), "always skip skip");
        assert_eq!(modes(&["api=skip"]), "auto skip skip");
        assert_eq!(modes(&["api-1=auto", "Api=skip", "always"]), "always skip auto");
        assert_eq!(modes(&["skip,API-0=auto", "web=skip"]), "skip auto skip");
        assert_eq!(modes(&["skip", "skip", "web=auto", "web=auto"]), "auto skip skip");
    }

    #[test]
    fn refusals_name_what_exists() {
        for (values, word) in [
            (&["sometimes"][..], "auto, skip, always"),
            (&["web=on"], "auto, skip, always"),
            (&[""], "auto, skip, always"),
            (&["web=skip,"], "auto, skip, always"),
            (&["db=skip"], "web, api-0, api-1"),
            (&["=skip"], "web, api-0, api-1"),
            (&["skip", "always"], "both `skip` and `always` for all VMs"),
            (
                &["api=skip,API=auto"],
                "both `skip` and `auto` for the VMs of role `api`",
            ),
            (&["web=skip,WEB=auto"], "both `skip` and `auto` for vm `web`"),
        ] {
            let text = modes(values);
            assert!(text.contains(word), "{values:?}: {text}");
        }
    }
}
