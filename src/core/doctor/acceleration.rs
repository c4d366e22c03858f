//! KVM: the device, the module behind it, and what guests will run under, as far as that is known
//! without starting one.
//!
//! Not here: the evidence itself and the memory of it (`core::runtime::accel`).

use std::path::Path;

use serde_json::json;

use super::Finding;
use crate::core::arch::Arch;
use crate::core::config::{AccelChoice, QemuConfig};
use crate::core::events::Accel;
use crate::core::runtime::accel::{self, AccelQuestion, Decision, KVM_DEVICE};

/// The module that gives KVM no real hardware support.
const PARAVIRTUAL: &str = "kvm_pvm";

/// What can be said about KVM for this choice and, if there is one, this QEMU.
pub fn check(config: &QemuConfig, binary: Option<&Path>, home: Option<&Path>) -> Vec<Finding> {
    let modules = loaded(Path::new("/sys/module"));
    look_at(Path::new(KVM_DEVICE), &modules, config, binary, home)
}

/// Which of the modules that matter are loaded.
fn loaded(sys_module: &Path) -> Vec<&'static str> {
    let hardware = Arch::host().kvm_modules.iter().copied();
    hardware
        .chain([PARAVIRTUAL])
        .filter(|module| sys_module.join(module).exists())
        .collect()
}

fn look_at(
    device: &Path,
    modules: &[&'static str],
    config: &QemuConfig,
    binary: Option<&Path>,
    home: Option<&Path>,
) -> Vec<Finding> {
    let choice = config.accel;
    let trouble = accel::device_trouble(device);
    if config.arch.is_foreign() {
        // KVM is nothing to its guests.
        return binary.map(|_| foreign_finding(config)).into_iter().collect();
    }
    let mut findings = vec![device_finding(device, trouble.as_ref(), choice)];
    let question = binary.map(|binary| AccelQuestion {
        choice,
        arch: config.arch,
        binary,
        kernel: None,
        home,
        device,
    });
    let known = question.as_ref().and_then(accel::known);
    if trouble.is_none() && !Arch::host().kvm_modules.is_empty() {
        // Whatever the module: a guest has run under it.
        let proven = known.as_ref().is_some_and(|known| known.accel == Accel::Kvm);
        findings.push(module_finding(
            modules,
            if proven { AccelChoice::Tcg } else { choice },
        ));
    }
    if let Some(question) = question {
        findings.push(choice_finding(&question, known, trouble.as_ref(), modules));
    }
    findings
}

/// The level that something wrong with KVM has.
fn severity(choice: AccelChoice) -> fn(&str, String, String) -> Finding {
    match choice {
        AccelChoice::Kvm => Finding::error,
        AccelChoice::Auto => Finding::warn,
        AccelChoice::Tcg => |id, text, remedy| Finding::ok(id, text).hint(remedy),
    }
}

fn device_finding(device: &Path, trouble: Option<&(String, String)>, choice: AccelChoice) -> Finding {
    let data = json!({"device": device, "exists": device.exists(), "opens": trouble.is_none()});
    match trouble {
        None => Finding::ok("kvm.device", format!("{} opens", device.display())),
        Some((why, remedy)) => severity(choice)("kvm.device", why.clone(), remedy.clone()),
    }
    .data(data)
}

fn module_finding(modules: &[&'static str], choice: AccelChoice) -> Finding {
    let hardware = modules
        .iter()
        .find(|module| Arch::host().kvm_modules.contains(module));
    let finding = |text: String, remedy: &str| severity(choice)("kvm.module", text, remedy.to_owned());
    let other = "note: `castra up` tries KVM with a test guest, and uses TCG if that fails; on a host with kvm_intel or \
                 kvm_amd guests run several times as fast";
    match hardware {
        Some(module) => Finding::ok("kvm.module", format!("{module} is loaded")),
        None if modules.contains(&PARAVIRTUAL) => finding(
            format!("this KVM is a paravirtual one ({PARAVIRTUAL}), under which stock kernels hang or die"),
            other,
        ),
        None => finding(
            "neither kvm_intel nor kvm_amd is loaded as a module".to_owned(),
            other,
        ),
    }
    .data(json!({"modules": modules}))
}

fn foreign_finding(config: &QemuConfig) -> Finding {
    let id = "accel.choice";
    let text = format!("guests run under TCG: {}", accel::foreign_reason(config.arch));
    let remedy = "set `accel = \"auto\"` under [qemu]";
    match config.accel {
        AccelChoice::Kvm => Finding::error(id, text, remedy),
        _ => Finding::ok(id, text),
    }
    .data(json!({"accel": "tcg", "arch": config.arch.name}))
}

fn choice_finding(
    question: &AccelQuestion<'_>,
    known: Option<Decision>,
    trouble: Option<&(String, String)>,
    modules: &[&'static str],
) -> Finding {
    const ID: &str = "accel.choice";
    let data = json!({
        "accel": known.as_ref().map(|decision| decision.accel.as_str()),
        "reason": known.as_ref().map(|decision| decision.reason.as_str()),
        "choice": match question.choice {
            AccelChoice::Auto => "auto",
            AccelChoice::Kvm => "kvm",
            AccelChoice::Tcg => "tcg",
        },
        "qemu": question.binary,
    });
    let slower = "guests run several times slower than under KVM";
    let finding = match (known, trouble) {
        (Some(decision), _) if decision.accel == Accel::Kvm => {
            Finding::ok(ID, format!("guests run under KVM: {}", decision.reason))
        }
        (Some(decision), _) if question.choice == AccelChoice::Tcg => {
            Finding::ok(ID, format!("guests run under TCG: {}", decision.reason))
        }
        (Some(decision), Some((_, remedy))) => severity(question.choice)(
            ID,
            format!("guests run under TCG: {}; {slower}", decision.reason),
            remedy.clone(),
        ),
        (Some(decision), None) => severity(question.choice)(
            ID,
            format!("guests run under TCG: {}; {slower}", decision.reason),
            match question.home {
                Some(home) => format!(
                    "remove {} to try KVM again before the host boots again",
                    home.join("accel.json").display()
                ),
                None => "run on a host whose KVM works".to_owned(),
            },
        ),
        (None, _) => {
            let text =
                "KVM wasn't tried since the host booted: the next `castra up` tries it with a test guest";
            match modules
                .iter()
                .any(|module| Arch::host().kvm_modules.contains(module))
            {
                true => Finding::ok(ID, text),
                false => Finding::ok(ID, text).hint("`castra up` says which accelerator it takes"),
            }
        }
    };
    finding.data(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::doctor::Level;
    use crate::core::scratch::Scratch;

    fn levels(findings: &[Finding]) -> Vec<(&str, Level)> {
        findings
            .iter()
            .map(|finding| (finding.id.as_str(), finding.level))
            .collect()
    }

    #[test]
    fn a_missing_device_is_as_bad_as_kvm_was_wished_for() {
        let scratch = Scratch::new("doctor-kvm");
        let qemu = scratch.path("qemu");
        std::fs::write(&qemu, "").unwrap();
        for (choice, level) in [
            (AccelChoice::Auto, Level::Warn),
            (AccelChoice::Kvm, Level::Error),
            (AccelChoice::Tcg, Level::Ok),
        ] {
            let config = QemuConfig {
                accel: choice,
                ..QemuConfig::default()
            };
            let findings = look_at(&scratch.path("none"), &[], &config, Some(&qemu), None);
            assert_eq!(
                levels(&findings),
                [("kvm.device", level), ("accel.choice", level)],
                "{choice:?}"
            );
            assert!(findings[0].text.starts_with("there is no "), "{findings:?}");
        }
    }

    #[test]
    fn guests_of_another_architecture_need_no_kvm() {
        let arch = crate::core::arch::KNOWN
            .iter()
            .find(|arch| arch.is_foreign())
            .unwrap();
        for (accel, level) in [(AccelChoice::Auto, Level::Ok), (AccelChoice::Kvm, Level::Error)] {
            let config = QemuConfig {
                arch,
                accel,
                binary: None,
            };
            let findings = look_at(Path::new("/none"), &[], &config, Some(Path::new("/qemu")), None);
            assert_eq!(levels(&findings), [("accel.choice", level)]);
        }
    }

    #[test]
    fn a_device_that_opens_proves_nothing_yet() {
        let scratch = Scratch::new("doctor-kvm-opens");
        for name in ["kvm", "qemu"] {
            std::fs::write(scratch.path(name), "").unwrap();
        }
        let findings = |modules: &[&'static str]| {
            look_at(
                &scratch.path("kvm"),
                modules,
                &QemuConfig::default(),
                Some(&scratch.path("qemu")),
                Some(scratch.dir()),
            )
        };
        let hardware = findings(&["kvm_intel"]);
        assert!(
            hardware.iter().all(|finding| finding.level == Level::Ok),
            "{hardware:?}"
        );
        assert_eq!(hardware.last().unwrap().data["accel"], serde_json::Value::Null);
        if !Arch::host().kvm_modules.is_empty() {
            let paravirtual = findings(&["kvm_pvm"]);
            assert_eq!(levels(&paravirtual)[1], ("kvm.module", Level::Warn));
        }
        let cancel = crate::core::cancel::Cancel::new();
        accel::note_failure(scratch.dir(), &scratch.path("qemu"), "it died", &cancel);
        let remembered = findings(&["kvm_intel"]);
        let last = remembered.last().unwrap();
        assert_eq!((last.level, &last.data["accel"]), (Level::Warn, &"tcg".into()));
        assert!(last.text.contains("it died"), "{last:?}");
    }
}
