//! `doctor`: checks everything that could keep VMs from running well.
//!
//! Here: what is checked, for which projects. Not here: the single checks and their words (`core::doctor`).
//!
//! Only reads files, and runs a few programs for their versions; writes no file, takes no lock.

use std::path::{Path, PathBuf};

use crate::core::cancel::Cancel;
use crate::core::config::{AccelChoice, BrokerConfig, Config, QemuConfig, VmConfig, workspace};
use crate::core::doctor::{
    DoctorOutcome, Finding, acceleration, capacity, config_findings as by_config, images, leftovers, modes,
    tools,
};
use crate::core::events::Event;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::images::{cache as image_cache, images_dir};
use crate::core::operations::fleet::{core_shortage, memory_shortage};
use crate::core::operations::ports::{PortsOptions, ports};
use crate::core::reporter::{Reporter, Silent};
use crate::core::root::alive::qemu_pid;
use crate::core::root::project::Project;
use crate::core::root::records::WorkspaceRecord;
use crate::core::runtime::binary::find_qemu;
use crate::core::status::assemble::assemble;
use crate::core::status::read::read;
use crate::core::threads;

/// A project to be checked.
#[derive(Clone, Debug)]
pub enum DoctorProject {
    /// With its config.
    Config(Box<Config>),
    /// Its config is gone or another project's.
    Record(WorkspaceRecord),
    /// Its config can't be used; why.
    Broken(Failure),
}

/// What is checked.
#[derive(Clone, Debug)]
pub struct DoctorOptions {
    /// `CASTRA_HOME`: images, and what is remembered of accelerators and projects. `None`: there is none.
    pub home: Option<PathBuf>,
    /// The projects; none: only the host and what projects share.
    pub projects: Vec<DoctorProject>,
    /// Raised to stop early.
    pub cancel: Cancel,
}

/// Runs the checks. A problem is a finding, never a failure.
pub fn doctor(options: DoctorOptions, _reporter: &mut dyn Reporter) -> Result<DoctorOutcome> {
    let DoctorOptions {
        home,
        projects,
        cancel,
    } = options;
    let configs: Vec<&Config> = projects
        .iter()
        .filter_map(|project| match project {
            DoctorProject::Config(config) => Some(config.as_ref()),
            _ => None,
        })
        .collect();
    let home = home.as_deref();
    // The slow checks run in parallel: versions of programs, digests.
    let asked = || {
        tools::check(
            &distinct_qemus(&configs),
            &tools::Needs::of(configs.iter().copied()),
            &cancel,
        )
    };
    let guests = || {
        let wanted = images::UsedGuests::of(configs.iter().copied());
        home.map(|home| images::guests(home, &wanted, &cancel))
            .unwrap_or_default()
    };
    let others = || {
        let mut findings = accelerators(&configs, home);
        findings.extend(host_findings(&configs, home));
        for project in &projects {
            findings.extend(project_findings(project, home));
        }
        findings
    };
    let (asked, (guests, mut findings)) = threads::run_both("doctor tools", asked, || {
        threads::run_both("doctor guests", guests, others)
    });
    findings.extend(asked);
    // Before what else lies in the cache.
    let at = findings
        .iter()
        .position(|finding| finding.id == "image.cache")
        .unwrap_or(findings.len());
    findings.splice(at..at, guests);
    if cancel.is_requested() {
        return Err(Failure::new(Exit::Interrupted, "interrupted"));
    }
    Ok(DoctorOutcome::of(findings))
}

/// The QEMUs of all configs, each once; without a config the one on PATH.
fn distinct_qemus(configs: &[&Config]) -> Vec<QemuConfig> {
    let mut found: Vec<QemuConfig> = Vec::new();
    for config in configs {
        let same = |qemu: &QemuConfig| (qemu.arch, &qemu.binary) == (config.qemu.arch, &config.qemu.binary);
        if !found.iter().any(same) {
            found.push(config.qemu.clone());
        }
    }
    if found.is_empty() {
        found.push(QemuConfig::default());
    }
    found
}

/// The accelerator for each choice and QEMU; findings that are the same for all appear once.
fn accelerators(configs: &[&Config], home: Option<&Path>) -> Vec<Finding> {
    let default = QemuConfig::default();
    let mut asked: Vec<&QemuConfig> = Vec::new();
    for qemu in configs.iter().map(|config| &config.qemu) {
        if !asked.contains(&qemu) {
            asked.push(qemu);
        }
    }
    if asked.is_empty() {
        asked.push(&default);
    }
    // The strictest choice decides how bad a missing KVM is.
    asked.sort_by_key(|qemu| match qemu.accel {
        AccelChoice::Kvm => 0,
        AccelChoice::Auto => 1,
        AccelChoice::Tcg => 2,
    });
    let mut findings: Vec<Finding> = Vec::new();
    for qemu in asked {
        let binary = find_qemu(qemu).ok();
        for finding in acceleration::check(qemu, binary.as_deref(), home) {
            let once = finding.id != "accel.choice";
            if !(once && findings.iter().any(|other| other.id == finding.id)) {
                findings.push(finding);
            }
        }
    }
    findings
}

fn host_findings(configs: &[&Config], home: Option<&Path>) -> Vec<Finding> {
    let mut findings = vec![capacity::memory()];
    let wanted = configs
        .iter()
        .map(|config| config.broker.max_connections)
        .max()
        .unwrap_or(BrokerConfig::default().max_connections);
    findings.extend(capacity::descriptors(wanted));
    let Some(home) = home else {
        return findings;
    };
    findings.extend(capacity::directory("disk.home", &images_dir(home), "images"));
    match image_cache::list(home) {
        Ok(cached) => findings.extend(images::cache(home, &cached)),
        Err(failure) => findings.push(unreadable(&failure)),
    }
    findings.extend(modes::of_home(home));
    findings.extend(leftovers::registry(home, &workspace::list_workspaces(home)));
    findings
}

fn project_findings(project: &DoctorProject, home: Option<&Path>) -> Vec<Finding> {
    let (project, config) = match project {
        DoctorProject::Broken(failure) => return vec![by_config::broken(failure)],
        DoctorProject::Config(config) => (Project::from(config.as_ref()), Some(config)),
        DoctorProject::Record(record) => (Project::from(record), None),
    };
    let mut findings = Vec::new();
    let state = project.state.clone();
    findings.extend(capacity::directory("disk.state", state.dir(), "the disks of VMs"));
    if let Some(config) = config {
        findings.extend(by_config::config(config));
        findings.extend(capacity_for(config));
        findings.extend(images::of_config(config, home));
        findings.extend(by_config::security(config));
    }
    if let Some(home) = home {
        let options = PortsOptions {
            project: project.clone(),
            home: home.to_owned(),
            active: false,
        };
        if let Ok(outcome) = ports(options, &mut Silent) {
            findings.extend(by_config::ports(&outcome));
        }
    }
    match read(project) {
        Ok(snapshot) => findings.extend(leftovers::check(&snapshot, &assemble(&snapshot))),
        Err(failure) => findings.push(unreadable(&failure)),
    }
    findings.extend(modes::of_state(&state));
    findings
}

/// Memory and cores for the VMs of a project that don't run: as `up` judges them.
fn capacity_for(config: &Config) -> Vec<Finding> {
    let idle: Vec<&VmConfig> = config
        .vms
        .iter()
        .filter(|vm| qemu_pid(&config.state.vm(&vm.name)).is_none())
        .collect();
    let wanted = idle.iter().map(|vm| vm.memory_bytes).fold(0, u64::saturating_add);
    let memory = |finding: Finding| {
        let finding = finding.field("workspace", config.workspace.as_str());
        finding.field("vms", idle.len()).field("wanted_bytes", wanted)
    };
    let short = memory_shortage(&idle);
    let mut findings = Vec::new();
    let id = "memory.fleet";
    match (&short.refusal, short.warnings.first().and_then(advice_of)) {
        (Some(failure), _) => {
            let remedy = failure.next.clone().unwrap_or_default();
            findings.push(memory(Finding::error(id, failure.cause(), remedy)));
        }
        (None, Some((text, remedy))) => findings.push(memory(Finding::warn(id, text, remedy))),
        (None, None) if !idle.is_empty() => {
            let text = match idle.as_slice() {
                [vm] => format!("enough for vm `{}`, which doesn't run", vm.name),
                vms => format!(
                    "enough for the {} VMs of `{}` that don't run",
                    vms.len(),
                    config.project
                ),
            };
            findings.push(memory(Finding::ok(id, text)));
        }
        (None, None) => {}
    }
    for event in core_shortage(&idle) {
        if let Event::Message { vm: Some(vm), .. } = &event
            && let Some((text, remedy)) = advice_of(&event)
        {
            let text = format!("vm `{vm}`: {text}");
            let finding = Finding::warn("limits.cores", text, remedy);
            findings.push(
                finding
                    .field("workspace", config.workspace.as_str())
                    .field("vm", vm.as_str()),
            );
        }
    }
    findings
}

/// A warning's text and its remedy.
fn advice_of(event: &Event) -> Option<(String, String)> {
    match event {
        Event::Message {
            text, remediation, ..
        } => Some((
            text.to_string(),
            remediation.as_deref().unwrap_or_default().to_owned(),
        )),
        _ => None,
    }
}

fn unreadable(failure: &Failure) -> Finding {
    Finding::error(
        "state.unreadable",
        failure.cause(),
        failure
            .next
            .clone()
            .unwrap_or_else(|| "look at that directory".to_owned()),
    )
}
