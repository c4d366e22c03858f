//! What `--plan` prints: the problems, then how each VM would be launched and bootstrapped.
//!
//! Here: the text. Not here: the checks (`core::operations::fleet::preflight`), or the events of `--plan
//! --json`, which the operation itself emits.

use castra::core::config::Protocol;
use castra::core::events::contract::Stamped;
use castra::core::events::{BootstrapPlan, BootstrapPlanAction, Event, PlannedForward, Severity, VmPlan};
use castra::core::operations::up::UpOutcome;

use super::context::Context;
use super::human;
use super::progress::render;
use super::sentence::sentence;

/// Errors and warnings go to stderr, the plans to stdout.
pub fn show(context: &mut Context, outcome: &UpOutcome, told: &[Stamped]) {
    for plan in &outcome.plans {
        let action = match plan.action {
            BootstrapPlanAction::Run => context.style.success("run"),
            BootstrapPlanAction::Skip => context.style.dim("skip"),
            BootstrapPlanAction::Error => context.style.error("error"),
        };
        let name = context.style.bold(plan.vm.as_str());
        context.out.line(format!("{name}: {action}, {}", plan.reason));
        let machine = plan.machine.as_ref().map(machine_rows).unwrap_or_default();
        for (word, value) in machine.into_iter().chain(details(plan)) {
            context.out.line(format!("  {word:<12} {value}"));
        }
    }
    context.out.flush();
    for stamped in told {
        if let Event::Message { severity, .. } = &stamped.event
            && matches!(severity, Severity::Warn | Severity::Error)
        {
            let text = render(&sentence(&stamped.event), context.err_style, 0);
            context.screen.say(&text);
        }
    }
    context.say("nothing was changed");
}

fn machine_rows(machine: &VmPlan) -> Vec<(&'static str, String)> {
    let mut rows = vec![("image", image(machine))];
    rows.extend(
        machine
            .kernel
            .as_ref()
            .map(|kernel| ("kernel", kernel.display().to_string())),
    );
    let cpus = human::plural(machine.cpus, "CPU");
    let disk = match (machine.disk_bytes, machine.persist) {
        (None, _) => String::new(),
        (Some(size), false) => format!(", disk of {}", human::bytes(size)),
        (Some(size), true) => format!(", disk of {}, kept by `persist`", human::bytes(size)),
    };
    let memory = human::bytes(machine.memory_bytes);
    rows.push(("machine", format!("{cpus}, {memory} of memory{disk}")));
    rows.push(("network", machine.network.clone()));
    let ports: Vec<String> = machine.forwards.iter().map(forward).collect();
    rows.push(("ports", ports.join(", ")));
    rows.extend(machine.mounts.iter().map(|mount| {
        let mode = if mount.readonly { "read-only" } else { "writable" };
        (
            "mount",
            format!("{} → {} ({mode})", mount.host.display(), mount.guest),
        )
    }));
    rows
}

fn image(machine: &VmPlan) -> String {
    let image = match machine.image.as_str() {
        "none" => "none, an empty disk",
        image => image,
    };
    match (machine.running, machine.pending) {
        (true, _) => format!("{image}; already running"),
        (false, false) => image.to_owned(),
        (false, true) if image.starts_with("default guest") => format!("{image}, built first"),
        (false, true) if image.starts_with("https://") => format!("{image}, downloaded first"),
        (false, true) => image.to_owned(),
    }
}

fn forward(forward: &PlannedForward) -> String {
    let protocol = match forward.protocol {
        Protocol::Tcp => "",
        Protocol::Udp => "/udp",
    };
    match forward.host {
        Some(host) => format!("127.0.0.1:{host} → guest port {}{protocol}", forward.guest),
        None => format!("a free port → guest port {}{protocol}", forward.guest),
    }
}

fn details(plan: &BootstrapPlan) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    let mut row = |word, value: Option<String>| rows.extend(value.map(|value| (word, value)));
    row(
        "script",
        plan.script_path.as_ref().map(|path| path.display().to_string()),
    );
    row(
        "payload",
        plan.payload_path.as_ref().map(|path| match plan.payload_bytes {
            Some(size) => format!("{} ({})", path.display(), human::bytes(size)),
            None => path.display().to_string(),
        }),
    );
    row("into", plan.remote_dir.clone());
    row(
        "ssh",
        plan.ssh.as_ref().map(|ssh| match ssh.port {
            Some(port) => format!("{}@{}:{port}", ssh.user, ssh.host),
            None => format!("{}@{}, port chosen at launch", ssh.user, ssh.host),
        }),
    );
    row(
        "variables",
        (!plan.env_keys.is_empty()).then(|| plan.env_keys.join(", ")),
    );
    if let Some(verify) = &plan.verify {
        row("verify", verify.command.clone());
        row("verify path", verify.path.clone());
    }
    row(
        "waits",
        plan.handshake_timeout_secs.map(|secs| {
            format!(
                "{} for the first handshake or SSH banner",
                human::duration(secs * 1000)
            )
        }),
    );
    row(
        "metadata",
        plan.metadata_path.as_ref().map(|path| path.display().to_string()),
    );
    row("artifact", plan.artifact_hash.clone());
    for warning in &plan.warnings {
        row("warning", Some(warning.clone()));
    }
    rows
}
