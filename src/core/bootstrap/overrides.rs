//! `--bootstrap MODE`, `--bootstrap VM=MODE[,VM=MODE…]`: how one invocation steers the bootstrap
//! (spec 3, "Invocation Modes and Overrides").
//!
//! Here: what the values mean together, and every refusal. Not here: the flag itself (`cli`),
//! or what a mode does (`bootstrap::plan`).

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
                    let vm = find_vm(name.trim(), config)?;
                    let mode = parse_mode(mode.trim(), entry)?;
                    if let Some(earlier) = overrides.per_vm.insert(vm.name.key(), mode)
                        && earlier != mode
                    {
                        return Err(conflict(&format!("vm `{}`", vm.name), earlier, mode));
                    }
                }
            }
        }
        Ok(overrides)
    }

    /// The mode of this VM: its own override, else the global one, else the config's.
    pub fn mode_for(&self, vm: &VmConfig) -> BootstrapMode {
        self.per_vm
            .get(&vm.name.key())
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
                format!("--bootstrap {entry:?} names no bootstrap mode"),
            )
            .because(format!("{word:?} is none of auto, skip, always"))
            .advice("write `--bootstrap MODE` for all VMs or `--bootstrap VM=MODE` for one")
        })
}

fn find_vm<'a>(name: &str, config: &'a Config) -> Result<&'a VmConfig> {
    if let Some(vm) = config.vm(name) {
        return Ok(vm);
    }
    let replicas: Vec<&str> = config
        .vms
        .iter()
        .filter(|vm| vm.role.eq_ignore_ascii_case(name))
        .map(|vm| vm.name.as_str())
        .collect();
    let failure = Failure::new(
        Exit::Usage,
        format!("--bootstrap names vm {name:?}, which doesn't exist"),
    );
    if !replicas.is_empty() {
        return Err(failure
            .because("replicas are named one by one")
            .advice(format!("use {}", list(&replicas))));
    }
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
        .advice("use a name that is there, with its number for replicas (`api-0`)"))
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
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::core::bootstrap::plan::tests::config_of;

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
            (&["api=skip"], "use api-0, api-1"),
            (&["skip", "always"], "both `skip` and `always` for all VMs"),
            (&["web=skip,WEB=auto"], "both `skip` and `auto` for vm `web`"),
        ] {
            let text = modes(values);
            assert!(text.contains(word), "{values:?}: {text}");
        }
    }
}
