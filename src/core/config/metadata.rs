//! `bootstrap.toml` beside a script: what it overrides in the castra.toml that names the script.
//!
//! Here: finding and reading it. Not here: the tables it shares with castra.toml (`bootstrap`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use super::bootstrap_tables::{self, RawBootstrap, RawSsh};
use super::path_values::PathBases;
use super::reader::{Located, Section, quoted};
use super::source::Source;
use super::{BootstrapConfig, SshConfig, VmConfig};
use crate::core::failure::Exit;
use crate::core::name::VmName;

/// The file's name.
pub(super) const FILE: &str = "bootstrap.toml";

/// What one `bootstrap.toml` says.
#[derive(Clone, Debug, Default)]
pub(super) struct Metadata {
    path: PathBuf,
    pub(super) handshake_identity: Option<Located<VmName>>,
    ssh: RawSsh,
    over: RawBootstrap,
}

impl Metadata {
    /// Lays it over what castra.toml says.
    pub(super) fn apply(&self, bootstrap: RawBootstrap, ssh: &mut SshConfig) -> BootstrapConfig {
        self.ssh.apply(ssh);
        let mut config = bootstrap.overlaid(&self.over).resolved();
        config.handshake_identity = self
            .handshake_identity
            .as_ref()
            .map(|identity| identity.value.clone());
        config.metadata_path = Some(self.path.clone());
        config
    }
}

/// The `bootstrap.toml` files of one config; each is read once however many VMs share it.
#[derive(Default)]
pub(super) struct MetadataFiles {
    read: BTreeMap<PathBuf, Option<Metadata>>,
    pub(super) errors: Vec<String>,
    pub(super) warnings: Vec<String>,
    #[cfg(test)]
    pub(super) keys: std::collections::BTreeSet<String>,
    /// The sources, for errors that only the whole project shows.
    sources: BTreeMap<PathBuf, Source>,
}

impl MetadataFiles {
    /// The `bootstrap.toml` beside this script, if there is one. An error about an unreadable file
    /// is placed at the script's value in `asker`.
    pub(super) fn beside(
        &mut self,
        asker: &Source,
        script: &Located<PathBuf>,
        home: Option<&Path>,
    ) -> Option<&Metadata> {
        let path = script.value.parent()?.join(FILE);
        if !self.read.contains_key(&path) {
            let metadata = match Source::read(&path) {
                Ok(source) => {
                    let metadata = parse(&source, &path, home);
                    self.sources.insert(path.clone(), source);
                    Some(metadata)
                }
                Err(failure) if failure.exit == Exit::NoInput && !path.exists() => None,
                Err(failure) if failure.exit == Exit::Config => {
                    // It begins with its own file's name and place.
                    self.errors.push(failure.to_string());
                    None
                }
                Err(failure) => {
                    asker.error(script.at, failure.what, failure.why.unwrap_or_default());
                    None
                }
            };
            self.read.insert(path.clone(), metadata);
        }
        self.read.get(&path)?.as_ref()
    }

    /// Resolves each identity to a VM, then returns the tables.
    pub(super) fn finish(&mut self, vms: &mut [VmConfig]) {
        self.give_second_names(vms);
        for source in self.sources.values() {
            self.errors.extend(source.errors());
            self.warnings.extend(source.warnings());
            #[cfg(test)]
            self.keys.extend(source.keys());
        }
    }
}

impl MetadataFiles {
    /// An identity that is no VM's name is what the guest calls itself in its hello: the second name of
    /// the VM that the file is about. Two VMs can't have the same one.
    fn give_second_names(&self, vms: &mut [VmConfig]) {
        let names: BTreeSet<String> = vms.iter().map(|vm| vm.name.key()).collect();
        let mut given: BTreeMap<String, VmName> = BTreeMap::new();
        for vm in vms {
            let is_second = |identity: &VmName| !names.contains(&identity.key());
            let Some(identity) = vm
                .bootstrap
                .handshake_identity
                .take_if(|identity| is_second(identity))
            else {
                continue;
            };
            let path = vm.bootstrap.metadata_path.as_ref();
            let source = path.and_then(|path| self.sources.get(path));
            let at =
                path.and_then(|path| Some(self.read.get(path)?.as_ref()?.handshake_identity.as_ref()?.at));
            let wrong = |text: String, fix: &str| {
                if let (Some(source), Some(at)) = (source, at) {
                    source.error(at, format!("`handshake_identity`: {text}"), fix);
                }
            };
            if identity.is_reserved() {
                let text = format!("the name {} is castra's own", quoted(identity.as_str()));
                wrong(
                    text,
                    "name one of the project's VMs, or what the guest calls itself",
                );
            } else if let Some(first) = given.insert(identity.key(), vm.name.clone()) {
                let text = format!(
                    "{} would be a second name of both {} and {}, and castra couldn't tell which VM a hello comes from",
                    quoted(identity.as_str()),
                    quoted(first.as_str()),
                    quoted(vm.name.as_str())
                );
                wrong(
                    text,
                    "give each VM a script in a folder of its own, or leave the key out",
                );
            }
            vm.second_name = Some(identity);
        }
    }
}

fn parse(source: &Source, path: &Path, home: Option<&Path>) -> Metadata {
    let mut metadata = Metadata {
        path: path.to_owned(),
        ..Metadata::default()
    };
    let (table, errors) = DeTable::parse_recoverable(&source.text);
    if !errors.is_empty() {
        source.syntax_errors(&errors);
        return metadata;
    }
    let bases = PathBases {
        dir: path.parent().map(Path::to_owned).unwrap_or_default(),
        home: home.map(Path::to_owned),
    };
    let mut root = Section::root(source, table.get_ref());
    metadata.handshake_identity = root.line("handshake_identity", "web-0").and_then(|identity| {
        let name = identity.value.trim();
        // Upstream castra wrote identities as guests say them in their hello.
        match name.strip_prefix("vm:").unwrap_or(name).parse() {
            Ok(name) => Some(Located {
                value: name,
                at: identity.at,
            }),
            Err(error) => {
                source.error(
                    identity.at,
                    format!("`handshake_identity`: {error}"),
                    "write a VM's name",
                );
                None
            }
        }
    });
    let mut ssh = root.section("ssh");
    metadata.ssh = RawSsh::read(&mut ssh, &bases);
    metadata.ssh.read_address(&mut ssh);
    ssh.finish();
    metadata.over.env = bootstrap_tables::env(&mut root);
    metadata.over.remote_dir = bootstrap_tables::remote_dir(&mut root);
    let mut verify = root.section("verify");
    metadata.over.verify_command = bootstrap_tables::command(&mut verify, "command");
    metadata.over.verify_path = verify.line("path", "state/ready").map(|path| path.value);
    verify.finish();
    root.finish();
    metadata
}
