//! QEMU and the other programs castra calls: whether they are there, and which.
//!
//! Not here: what they are called for (`core::runtime`, `core::bootstrap`, `core::images`). All of
//! them are asked at once, each with a deadline, for none of them is known to answer.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::{Finding, text_of};
use crate::core::arch::Arch;
use crate::core::bootstrap::keys::SSH_PACKAGE;
use crate::core::cancel::Cancel;
use crate::core::config::{Config, ImageSource, QemuConfig, SeedMode};
use crate::core::escape::escape_line;
use crate::core::events::BootstrapMode;
use crate::core::process::{Job, JobError};
use crate::core::runtime::binary::{find_qemu, find_tool};
use crate::core::threads;

/// All of them answer within 0.1 s; longer, and something is wrong with the program or the machine.
const DEADLINE: Duration = Duration::from_secs(5);

/// Longest version shown, bytes.
const VERSION_LIMIT: usize = 120;

/// What the configs at hand ask of the host's tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Some VM is bootstrapped, so `ssh` is needed.
    pub ssh: bool,
    /// Some image comes from a URL.
    pub curl: bool,
    /// Some VM mounts a folder of the host.
    pub mounts: bool,
    /// Some stock image is given a seed.
    pub seed: bool,
}

impl Needs {
    /// What these configs need; without any, what `castra init` would write.
    pub fn of<'c>(configs: impl IntoIterator<Item = &'c Config>) -> Needs {
        let mut none = true;
        let mut needs = Needs {
            ssh: false,
            curl: false,
            mounts: false,
            seed: false,
        };
        for vm in configs.into_iter().flat_map(|config| &config.vms) {
            none = false;
            needs.ssh |= vm.bootstrap.mode != BootstrapMode::Skip;
            needs.mounts |= !vm.mounts.is_empty();
            if let Some(image) = &vm.base_image {
                needs.curl |= matches!(image.source, ImageSource::Url(_));
                needs.seed |= vm.seed == SeedMode::Auto;
            }
        }
        needs.ssh |= none;
        needs
    }
}

/// Looks at each QEMU of these configs, and at everything else.
pub fn check(qemus: &[QemuConfig], needs: &Needs, cancel: &Cancel) -> Vec<Finding> {
    let of_qemus = || {
        threads::map_parallel(
            qemus,
            |_| "doctor qemu".to_owned(),
            |qemu| qemu_findings(qemu, needs, cancel),
        )
    };
    let tools = tools(needs);
    let of_tools = || {
        threads::map_parallel(
            &tools,
            |tool| format!("doctor {}", tool.name),
            |tool| tool_finding(tool, cancel),
        )
    };
    let (of_qemus, of_tools) = threads::run_both("doctor qemus", of_qemus, of_tools);
    let mut findings: Vec<Finding> = of_qemus.into_iter().flatten().flatten().collect();
    findings.extend(of_tools.into_iter().flatten());
    findings
}

// --- QEMU -------------------------------------------------------------------------------------

fn qemu_findings(config: &QemuConfig, needs: &Needs, cancel: &Cancel) -> Vec<Finding> {
    let binary = match find_qemu(config) {
        Ok(binary) => binary,
        Err(failure) => {
            let remedy = failure.next.clone().unwrap_or_default();
            return vec![
                Finding::error("qemu.binary", failure.cause(), remedy)
                    .data(json!({"path": config.binary, "version": null})),
            ];
        }
    };
    let (version, features) = threads::run_both(
        "doctor version",
        || version_of(&binary, &["--version"], cancel),
        || missing_features(config.arch, &binary, needs, cancel),
    );
    let mut findings = vec![version_finding(&binary, version)];
    findings.extend(features.map(|missing| features_finding(&binary, &missing)));
    findings
}

fn version_finding(binary: &Path, version: Result<String, String>) -> Finding {
    const ID: &str = "qemu.binary";
    let shown = binary.display();
    let remedy = "set `binary` under [qemu] to a qemu-system program, or leave it out";
    match version {
        Ok(line) => match number_in(line.split_once("version ").map_or("", |(_, rest)| rest)) {
            Some(version) => Finding::ok(ID, format!("QEMU {version}, {shown}"))
                .data(json!({"path": text_of(binary), "version": version})),
            None => Finding::error(ID, format!("{shown} isn't QEMU: it prints {line:?}"), remedy)
                .data(json!({"path": text_of(binary), "version": null})),
        },
        Err(why) => Finding::error(ID, format!("{shown} doesn't report its version: {why}"), remedy)
            .data(json!({"path": text_of(binary), "version": null})),
    }
}

/// Something that castra asks of QEMU, and how it is asked whether it is there.
struct Feature {
    name: &'static str,
    question: [&'static str; 2],
    /// The first word of a line of the answer.
    word: &'static str,
}

/// What this QEMU lacks; `None`: it can't be asked, which its version has told already.
fn missing_features(
    arch: &'static Arch,
    binary: &Path,
    needs: &Needs,
    cancel: &Cancel,
) -> Option<Vec<&'static str>> {
    let mut wanted = vec![
        Feature {
            name: arch.machine,
            question: ["-machine", "help"],
            word: arch.machine,
        },
        Feature {
            name: "user networking (slirp)",
            question: ["-netdev", "help"],
            word: "user",
        },
    ];
    if needs.mounts {
        wanted.push(Feature {
            name: "shared folders (virtio-9p-pci)",
            question: ["-device", "help"],
            word: "virtio-9p-pci",
        });
    }
    let asked = threads::map_parallel(
        &wanted,
        |feature| format!("doctor {}", feature.word),
        |feature| has(binary, feature, cancel),
    );
    let answers: Vec<Option<bool>> = asked.into_iter().map(|answer| answer.ok().flatten()).collect();
    if answers.contains(&None) {
        return None;
    }
    let missing = wanted.iter().zip(answers).filter(|(_, has)| *has == Some(false));
    Some(missing.map(|(feature, _)| feature.name).collect())
}

fn has(binary: &Path, feature: &Feature, cancel: &Cancel) -> Option<bool> {
    let ended = Job::new(binary)
        .args(feature.question)
        .deadline(DEADLINE)
        .cancel(cancel)
        .run()
        .ok()?;
    let text = String::from_utf8_lossy(&ended.stdout);
    // Devices are listed as `name "virtio-9p-pci", bus PCI, …`.
    let first = |line: &str| {
        let line = line.trim_start().trim_start_matches("name ");
        line.split([' ', ','])
            .next()
            .unwrap_or_default()
            .trim_matches('"')
            == feature.word
    };
    Some(text.lines().any(first))
}

fn features_finding(binary: &Path, missing: &[&str]) -> Finding {
    const ID: &str = "qemu.features";
    let finding = match missing {
        [] => Finding::ok(ID, "QEMU has the machine, network and devices castra uses"),
        missing => Finding::error(
            ID,
            format!("{} was built without {}", binary.display(), missing.join(", ")),
            "install your distribution's full QEMU, or set `binary` under [qemu] to one that has it",
        ),
    };
    finding.data(json!({"path": text_of(binary), "missing": missing}))
}

// --- the others -------------------------------------------------------------------------------

/// A program castra calls.
struct Tool {
    id: &'static str,
    name: &'static str,
    package: &'static str,
    /// What makes it tell its version; none: it can't.
    asks: &'static [&'static str],
    /// What it is called for.
    purpose: &'static str,
    needed: bool,
    /// A word its answer must hold, and what it can't do without.
    capable: Option<(&'static str, &'static str)>,
}

fn tools(needs: &Needs) -> Vec<Tool> {
    let tool = |id, name, package, asks, purpose, needed| Tool {
        id,
        name,
        package,
        asks,
        purpose,
        needed,
        capable: None,
    };
    vec![
        Tool {
            capable: needs.seed.then_some(("vvfat", "seeds for stock images (vvfat)")),
            ..tool(
                "tool.qemu-img",
                "qemu-img",
                "qemu-utils",
                &["--help"] as &[&str],
                "makes the disks of VMs",
                true,
            )
        },
        tool(
            "tool.ssh",
            "ssh",
            SSH_PACKAGE,
            &["-V"],
            "reaches guests",
            needs.ssh,
        ),
        tool(
            "tool.ssh-keygen",
            "ssh-keygen",
            SSH_PACKAGE,
            &[],
            "makes the project's key",
            needs.ssh,
        ),
        tool(
            "tool.curl",
            "curl",
            "curl",
            &["--version"],
            "fetches images by URL",
            needs.curl,
        ),
        tool(
            "tool.tar",
            "tar",
            "tar",
            &["--version"],
            "is needed to build the default guest",
            false,
        ),
    ]
}

fn tool_finding(tool: &Tool, cancel: &Cancel) -> Finding {
    let missing = match tool.needed {
        true => Finding::error,
        false => Finding::warn,
    };
    let install = format!("install it: `apt install {}` (Debian, Ubuntu)", tool.package);
    let data = |path: Option<PathBuf>, version: Option<&str>| json!({"path": path.as_deref().map(text_of), "version": version, "needed": tool.needed});
    let Some(path) = find_tool(tool.name) else {
        let text = format!("there is no `{}` on PATH; it {}", tool.name, tool.purpose);
        return missing(tool.id, text, install).data(data(None, None));
    };
    if tool.asks.is_empty() {
        let text = format!("{}, {}", tool.name, path.display());
        return Finding::ok(tool.id, text).data(data(Some(path), None));
    }
    let answer = match answer_of(&path, tool.asks, cancel) {
        Ok(answer) => answer,
        Err(why) => {
            let text = format!("{} doesn't report its version: {why}", path.display());
            let remedy = format!(
                "`{} {}` shows what is wrong with it",
                path.display(),
                tool.asks.join(" ")
            );
            return missing(tool.id, text, remedy).data(data(Some(path), None));
        }
    };
    let first = answer.lines().next().unwrap_or_default();
    let version = number_in(first).map(|version| escape_line(version, VERSION_LIMIT));
    let shown = version.as_deref().unwrap_or("of unknown version");
    let text = format!("{} {shown}, {}", tool.name, path.display());
    let lacks = tool
        .capable
        .filter(|(word, _)| !answer.split_whitespace().any(|found| found == *word));
    match lacks {
        Some((_, what)) => {
            let text = format!("{text}, was built without {what}");
            let remedy = "install your distribution's full QEMU, or set `seed = \"none\"` for those VMs";
            Finding::warn(tool.id, text, remedy)
        }
        None => Finding::ok(tool.id, text),
    }
    .data(data(Some(path), version.as_deref()))
}

/// The first line of what a program says of itself, escaped.
fn version_of(binary: &Path, asks: &[&str], cancel: &Cancel) -> Result<String, String> {
    let answer = answer_of(binary, asks, cancel)?;
    Ok(escape_line(
        answer.lines().next().unwrap_or_default(),
        VERSION_LIMIT,
    ))
}

/// All that it says; `ssh -V` says it on stderr.
fn answer_of(binary: &Path, asks: &[&str], cancel: &Cancel) -> Result<String, String> {
    let ended = Job::new(binary)
        .args(asks)
        .deadline(DEADLINE)
        .cancel(cancel)
        .run()
        .map_err(why)?;
    let stdout = String::from_utf8_lossy(&ended.stdout);
    Ok(match stdout.trim() {
        "" => ended.stderr_tail,
        _ => stdout.into_owned(),
    })
}

fn why(error: JobError) -> String {
    match error {
        JobError::NotStarted { error, .. } => format!("it can't be run: {error}"),
        JobError::TimedOut { after, .. } => format!("no answer within {} s", after.as_secs()),
        JobError::Cancelled => "interrupted".to_owned(),
        JobError::Failed(ended) => {
            let last = ended.stderr_tail.lines().last().unwrap_or_default();
            let status = crate::core::process::show_status(ended.status);
            escape_line(&format!("{status} {last}"), VERSION_LIMIT)
        }
    }
}

/// The first word that reads like a version: `7.2.22` in `QEMU emulator version 7.2.22 (Debian …)`,
/// `9.2p1` in `OpenSSH_9.2p1 Debian-2, OpenSSL …`.
fn number_in(line: &str) -> Option<&str> {
    line.split([' ', '_', ',', '(', ')'])
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::doctor::Level;
    use crate::core::scratch::Scratch;

    /// Written by a child: a descriptor of ours that another test's child inherits would make it
    /// "busy".
    fn program(path: &Path, body: &str) {
        Job::new("sh")
            .args(["-c", "cat >\"$0\" && chmod 755 \"$0\""])
            .arg(path)
            .stdin(format!("#!/bin/sh\n{body}\n"))
            .run()
            .unwrap();
    }

    fn qemu(name: &str, body: &str, mounts: bool) -> Vec<Finding> {
        let scratch = Scratch::new(name);
        program(&scratch.path("qemu"), body);
        let config = QemuConfig {
            binary: Some(scratch.path("qemu")),
            ..QemuConfig::default()
        };
        let needs = Needs {
            mounts,
            ..Needs::of([])
        };
        qemu_findings(&config, &needs, &Cancel::new())
    }

    #[test]
    fn versions_are_found_in_what_programs_say() {
        for (line, version) in [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)", Some("7.2.22")),
            ("OpenSSH_9.2p1 Debian-2+deb12u10, OpenSSL 3.0.19", Some("9.2p1")),
            ("tar (GNU tar) 1.34", Some("1.34")),
            ("curl 7.88.1 (x86_64-pc-linux-gnu) libcurl/7.88.1", Some("7.88.1")),
            ("BusyBox", None),
        ] {
            assert_eq!(number_in(line), version, "{line}");
        }
    }

    #[test]
    fn a_qemu_without_what_castra_uses_is_an_error_that_names_it() {
        let body = "case $1 in --version) echo 'QEMU emulator version 8.2.0' ;; -machine) echo q35 is; echo virt is ;;\n\
                    -netdev) echo socket ;; -device) echo 'name \"virtio-9p-pci\", bus PCI' ;; esac";
        let findings = qemu("doctor-qemu", body, true);
        assert_eq!(findings[0].data["version"], "8.2.0");
        let features = &findings[1];
        assert_eq!(features.level, Level::Error);
        assert_eq!(features.data["missing"], json!(["user networking (slirp)"]));
    }

    #[test]
    fn what_is_no_qemu_says_so() {
        let findings = qemu("doctor-no-qemu", "echo hello", false);
        assert!(findings[0].text.contains("isn't QEMU"), "{findings:?}");
        let findings = qemu("doctor-bad-qemu", "echo 'libfoo is missing' >&2; exit 127", false);
        assert!(findings[0].text.contains("libfoo is missing"), "{findings:?}");
        assert_eq!(findings.len(), 1, "castra can't list its features: {findings:?}");
        let none = QemuConfig {
            binary: Some("/nowhere/qemu".into()),
            ..QemuConfig::default()
        };
        let findings = qemu_findings(&none, &Needs::of([]), &Cancel::new());
        assert!(findings[0].level == Level::Error && findings[0].text.contains("no such file"));
    }

    #[test]
    fn a_tool_that_is_missing_is_as_bad_as_it_is_needed() {
        for (needed, level) in [(true, Level::Error), (false, Level::Warn)] {
            let tool = Tool {
                id: "tool.none",
                name: "castra-no-such-tool",
                package: "none",
                asks: &[],
                purpose: "does nothing",
                needed,
                capable: None,
            };
            let finding = tool_finding(&tool, &Cancel::new());
            assert_eq!(finding.level, level);
            assert!(finding.remediation.unwrap().contains("apt install none"));
        }
    }
}
