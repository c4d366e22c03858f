//! Whether the guest has mounted the folders that the host shares with it.
//!
//! Here: the question, asked over the connection of a bootstrap, and what an answer means. Not here: the
//! mounting (`scripts/guest/late`, `scripts/guest/castra-mounts`), which folders there are
//! (`runtime::launch_plan::mounts_table`).
//!
//! The default guest mounts all folders before anybody can log in. A stock image mounts them at the end of
//! its boot, long after its SSH server answers; castra waits for it, so that no script finds a folder empty.

use std::time::Duration;

use crate::core::bootstrap::context::Context;
use crate::core::bootstrap::guest_scripts;
use crate::core::bootstrap::ssh::channel::{self, Exec, Limit};
use crate::core::bootstrap::ssh::master::Master;
use crate::core::bootstrap::step_failure::StepFailure;
use crate::core::bootstrap::watch::Watch;
use crate::core::config::VmConfig;
use crate::core::escape::escape_line;
use crate::core::runtime::seed::SeedKind;

/// Time for the answer beyond the guest's own limit.
const SLACK: Duration = Duration::from_secs(20);
/// Longest answer that is looked at, lines: a VM has few mounts.
const LINES: usize = 1000;
/// Longest reason that is shown, bytes.
const REASON: usize = 200;

/// Fails unless all folders are mounted; `limit` is how long the guest may take. A VM whose guest doesn't
/// take instructions from castra isn't asked.
pub(super) fn check(
    context: &Context<'_, '_>,
    watch: &Watch<'_>,
    master: &mut Master,
    limit: Duration,
) -> Result<(), StepFailure> {
    let vm = context.vm;
    if vm.mounts.is_empty() || !takes_mounts(vm) {
        return Ok(());
    }
    // A VM that runs already was asked at its start, unless an older castra started it.
    let limit = if context.launch.started_now {
        limit
    } else {
        Duration::ZERO
    };
    let mark = "castra-mounts-end".to_owned();
    let exec = Exec {
        command: guest_scripts::mounts(limit.as_secs(), &mark),
        feed: Box::new(|_| Ok(())),
        hold_stdin: false,
        limit: Limit::Total(limit + SLACK),
        begin_mark: None,
        end_mark: Some(mark),
    };
    let mut lines = Vec::new();
    channel::run(
        master,
        exec,
        watch,
        &mut |_, line| {
            if lines.len() < LINES {
                lines.push(line.to_owned());
            }
        },
        &mut || (),
    )
    .map_err(|error| StepFailure::of_exec(error, "", "the question about mounts", master.target()))?;
    match complaint(vm, &lines, context.launch.started_now, limit) {
        None => Ok(()),
        Some(words) => Err(StepFailure::because(words).with_advice(format!(
            "castra logs {} --source serial shows what the guest said",
            vm.name
        ))),
    }
}

/// Whether the guest mounts what castra tells it to: a kernel of the user's own may not.
fn takes_mounts(vm: &VmConfig) -> bool {
    match SeedKind::of(vm) {
        SeedKind::Nothing => false,
        SeedKind::FwCfg => vm.is_default_guest(),
        SeedKind::NoCloud => true,
    }
}

/// What is wrong according to these lines of /run/castra/mounts; no line: the guest has no such file.
fn complaint(vm: &VmConfig, lines: &[String], started_now: bool, limit: Duration) -> Option<String> {
    let mut failed = Vec::new();
    for mount in &vm.mounts {
        let told = lines.iter().find_map(|line| {
            let (how, rest) = line.split_once('\t')?;
            let (place, why) = rest.split_once('\t').unwrap_or((rest, ""));
            (place == mount.guest).then_some((how, why.trim()))
        });
        match told {
            Some(("ok", _)) => {}
            Some((_, why)) => failed.push(format!("{} ({})", mount.guest, escape_line(why, REASON))),
            // The mount was added to castra.toml since the VM was started: its next start mounts it.
            None if !started_now => {}
            None if lines.is_empty() => {
                return Some(format!(
                    "the guest didn't say within {} s whether it has mounted {}",
                    limit.as_secs(),
                    mount.guest
                ));
            }
            None => failed.push(format!("{} (it didn't try)", mount.guest)),
        }
    }
    (!failed.is_empty()).then(|| format!("the guest couldn't mount {}", failed.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::bootstrap::bootstrap_plan::tests::config_of;
    use crate::core::config::Mount;

    fn judged(lines: &[&str], started_now: bool) -> String {
        let mut config = config_of(&["web"]);
        config.vms[0].mounts = ["/a", "/a/b"]
            .iter()
            .map(|guest| Mount {
                host: "/x".into(),
                guest: (*guest).to_owned(),
                readonly: true,
            })
            .collect();
        let lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        complaint(&config.vms[0], &lines, started_now, Duration::from_secs(60)).unwrap_or_default()
    }

    #[test]
    fn what_the_guest_says_decides() {
        assert_eq!(judged(&["ok\t/a", "ok\t/a/b"], true), "");
        assert_eq!(
            judged(&["ok\t/a", "failed\t/a/b\tRead-only\u{1b} file system "], true),
            "the guest couldn't mount /a/b (Read-only\\x1b file system)"
        );
        assert_eq!(
            judged(&["failed\t/a/b\tx", "failed\t/a\ty"], true),
            "the guest couldn't mount /a (y), /a/b (x)"
        );
        assert_eq!(
            judged(&["ok\t/a"], true),
            "the guest couldn't mount /a/b (it didn't try)"
        );
        assert_eq!(
            judged(&[], true),
            "the guest didn't say within 60 s whether it has mounted /a"
        );
        // An older castra's guest, and a mount added since the start.
        assert_eq!(judged(&[], false), "");
        assert_eq!(judged(&["ok\t/a"], false), "");
        assert_eq!(
            judged(&["failed\t/a\ty"], false),
            "the guest couldn't mount /a (y)"
        );
    }
}
