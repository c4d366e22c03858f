//! What a config itself gives reason to say: warnings, ports, who may pose as whom, what guests reach.
//!
//! Not here: what of the project runs (`leftovers`), its images, or room for it.

use serde_json::json;

use super::Finding;
use crate::core::config::{AuthMode, Config, Network};
use crate::core::failure::Failure;
use crate::core::human::plural;
use crate::core::ports::{PortOwner, PortState, PortsOutcome};

/// A config that can't be used.
pub fn broken(failure: &Failure) -> Finding {
    let remedy = failure
        .next
        .clone()
        .unwrap_or_else(|| "correct that file; `castra man castra.toml` has every key".to_owned());
    Finding::error("config.invalid", failure.cause(), remedy)
}

/// That it is there and valid, and what is odd about it.
pub fn config(config: &Config) -> Vec<Finding> {
    let data = json!({"workspace": config.workspace, "path": config.path, "vms": config.vms.len()});
    let mut findings = vec![
        Finding::ok(
            "config.valid",
            format!(
                "{} is valid: project `{}` with {}",
                config.path.display(),
                config.project,
                plural(config.vms.len(), "VM")
            ),
        )
        .data(data),
    ];
    findings.extend(config.warnings.iter().map(|warning| {
        Finding::warn(
            "config.odd",
            warning.clone(),
            "correct or remove that key; castra ignores it",
        )
        .data(json!({"workspace": config.workspace, "path": config.path}))
    }));
    findings
}

/// Ports of the project that somebody else has or wants.
pub fn ports(outcome: &PortsOutcome) -> Vec<Finding> {
    let mut findings = Vec::new();
    for row in &outcome.ports {
        let (Some(port), Some(owner)) = (row.port, &row.owner) else {
            continue;
        };
        let (who, remedy) = match &row.vm {
            Some(vm) => (
                format!("vm `{vm}` wants"),
                format!(
                    "{}, or set `host = 0` in that forward, and castra chooses a free port",
                    owner.how_to_free()
                ),
            ),
            None => (
                "its broker wants".to_owned(),
                format!("{}, or leave `port` under [broker] out", owner.how_to_free()),
            ),
        };
        findings.push(
            Finding::error(
                "ports.conflict",
                format!("{who} port {port} of 127.0.0.1, which {owner} has"),
                remedy,
            )
            .data(json!({
                "workspace": outcome.workspace, "vm": row.vm.as_ref().map(|vm| vm.as_str()), "port": port,
                "protocol": row.protocol, "owner": owner,
            })),
        );
    }
    for row in outcome.ports.iter().filter(|row| row.owner.is_none()) {
        let (Some(vm), Some(port), [_, ..]) = (&row.vm, row.port, row.also_declared_by.as_slice()) else {
            continue;
        };
        let others: Vec<String> = row.also_declared_by.iter().map(PortOwner::to_string).collect();
        findings.push(
            Finding::warn(
                "ports.shared",
                format!("vm `{vm}` wants port {port}, and so does {}", others.join(", ")),
                "the VM that starts first gets it: give one of them another port, or `host = 0`",
            )
            .data(json!({
                "workspace": outcome.workspace, "vm": vm.as_str(), "port": port, "protocol": row.protocol,
                "also_declared_by": row.also_declared_by,
            })),
        );
    }
    if findings.is_empty() {
        let active = outcome
            .ports
            .iter()
            .filter(|row| row.state == PortState::Active)
            .count();
        let fixed = outcome
            .ports
            .iter()
            .filter(|row| row.vm.is_some() && row.port.is_some())
            .count();
        let text = match (active, fixed) {
            (0, 0) => format!(
                "no port of `{}` is fixed: castra chooses free ones",
                outcome.project
            ),
            (0, fixed) => format!("{} of `{}` free", plural(fixed, "fixed port"), outcome.project),
            (active, _) => format!(
                "{} of `{}` in use by its VMs, none in conflict",
                plural(active, "port"),
                outcome.project
            ),
        };
        findings.push(
            Finding::ok("ports.free", text).data(json!({"workspace": outcome.workspace, "active": active})),
        );
    }
    findings
}

/// Who may pose as whom, and what guests reach.
pub fn security(config: &Config) -> Vec<Finding> {
    let data = |finding: Finding| finding.field("workspace", config.workspace.as_str());
    let auth = match config.broker.auth {
        AuthMode::Open => Finding::warn(
            "security.auth",
            format!(
                "`auth = \"open\"` in `{}`: every local user and every guest can pose as any VM",
                config.project
            ),
            "remove it from [broker]: a VM with a token must then present the token",
        )
        .field("auth", "open"),
        AuthMode::Auto => Finding::ok(
            "security.auth",
            format!(
                "VMs of `{}` that castra gives a token must present it",
                config.project
            ),
        )
        .field("auth", "auto"),
        AuthMode::Token => Finding::ok(
            "security.auth",
            format!("only VMs of `{}` with a token are believed", config.project),
        )
        .field("auth", "token"),
    };
    let mut findings = vec![data(auth)];
    let open: Vec<&str> = config
        .vms
        .iter()
        .filter(|vm| vm.network == Network::User)
        .map(|vm| vm.name.as_str())
        .collect();
    if !open.is_empty() {
        let text = format!(
            "{} of `{}` with `network = \"user\"` {} every service on your localhost, at 10.0.2.2",
            plural(open.len(), "VM"),
            config.project,
            if open.len() == 1 { "reaches" } else { "reach" }
        );
        findings.push(data(
            Finding::ok("security.network", text)
                .hint("`network = \"isolated\"` lets a guest reach the broker and nothing else (`castra man 7 security`)")
                .field("vms", open),
        ));
    }
    findings
}
