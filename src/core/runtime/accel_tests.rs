//! The decision, with a stand-in for QEMU whose guest speaks or not, and any file as `/dev/kvm`.

use std::os::unix::fs::PermissionsExt;

use crate::core::arch::PROBE_TEXT;
use crate::core::scratch::Scratch;

use super::*;

/// A host: its device, a home, and a QEMU that notes each start and behaves as told per
/// accelerator.
struct Host {
    scratch: Scratch,
}

impl Host {
    /// `kvm` and `tcg` are what the stand-in does under each: shell commands.
    fn new(kvm: &str, tcg: &str) -> Host {
        let host = Host {
            scratch: Scratch::new("accel"),
        };
        fs::write(host.device(), "").unwrap();
        fs::write(host.kernel(), "").unwrap();
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in\n--version) echo 'QEMU emulator version 7.2.1'; exit;;\n\
             *'-accel kvm'*) echo kvm >>'{log}'; {kvm};;\n*) echo tcg >>'{log}'; {tcg};;\nesac\n",
            log = host.scratch.path("starts").display()
        );
        fs::write(host.binary(), script).unwrap();
        fs::set_permissions(host.binary(), fs::Permissions::from_mode(0o755)).unwrap();
        host
    }

    fn device(&self) -> PathBuf {
        self.scratch.path("kvm")
    }

    fn binary(&self) -> PathBuf {
        self.scratch.path("qemu-system-test")
    }

    fn kernel(&self) -> PathBuf {
        self.scratch.path("vmlinux")
    }

    fn decide(&self, choice: AccelChoice, known_good: bool) -> Result<Decision> {
        let (binary, device, kernel) = (self.binary(), self.device(), self.kernel());
        let question = AccelQuestion {
            choice,
            arch: Arch::host(),
            binary: &binary,
            kernel: Some(ProbeKernel {
                path: &kernel,
                known_good,
            }),
            home: Some(self.scratch.dir()),
            device: &device,
        };
        decide(&question, &Cancel::new())
    }

    fn starts(&self) -> String {
        fs::read_to_string(self.scratch.path("starts"))
            .unwrap_or_default()
            .replace('\n', " ")
    }
}

/// What the stand-in does when its guest lives.
fn speaks() -> String {
    format!("printf '{PROBE_TEXT}' >serial.log; exec sleep 100")
}

#[test]
fn a_guest_that_ran_is_the_proof_and_is_remembered() {
    let host = Host::new(&speaks(), "");
    for _ in 0..2 {
        let decision = host.decide(AccelChoice::Auto, true).unwrap();
        assert_eq!(decision.accel, Accel::Kvm, "{decision:?}");
        assert!(
            decision.proven && decision.reason.contains("ran under KVM"),
            "{decision:?}"
        );
    }
    assert_eq!(host.starts(), "kvm ", "it was probed again");
    assert_eq!(host.decide(AccelChoice::Kvm, true).unwrap().accel, Accel::Kvm);
    assert_eq!(host.decide(AccelChoice::Tcg, true).unwrap().accel, Accel::Tcg);
}

#[test]
fn a_qemu_that_refuses_or_stops_means_tcg() {
    for (kvm, words) in [
        ("echo 'qemu: failed to initialize kvm: nope' >&2; exit 1", "nope"),
        (
            "echo 'KVM internal error. Suberror: 1' >&2; exec sleep 100",
            "internal error",
        ),
        ("exit 0", "ended and printed nothing"),
    ] {
        let host = Host::new(kvm, "");
        let decision = host.decide(AccelChoice::Auto, true).unwrap();
        assert_eq!(decision.accel, Accel::Tcg);
        assert!(decision.reason.contains(words), "{decision:?}");
        let failure = host.decide(AccelChoice::Kvm, true).unwrap_err();
        assert_eq!(failure.exit, Exit::Unavailable);
        assert!(failure.to_string().contains(words), "{failure}");
        assert_eq!(host.starts(), "kvm ", "the answer was forgotten");
    }
}

#[test]
fn a_guest_that_gets_stuck_means_tcg_with_a_known_kernel() {
    let host = Host::new("exec sleep 100", "");
    let decision = host.decide(AccelChoice::Auto, true).unwrap();
    assert_eq!(decision.accel, Accel::Tcg);
    assert!(
        decision.reason.contains("got stuck and wrote nothing"),
        "{decision:?}"
    );
}

#[test]
fn silence_of_an_unknown_kernel_counts_only_against_a_control() {
    let speaking = Host::new("exit 0", &speaks());
    let decision = speaking.decide(AccelChoice::Auto, false).unwrap();
    assert_eq!(decision.accel, Accel::Tcg);
    assert!(decision.proven);
    assert_eq!(speaking.starts(), "kvm tcg ");
    let mute = Host::new("exit 0", "exit 0");
    let decision = mute.decide(AccelChoice::Auto, false).unwrap();
    assert!(decision.reason.contains("couldn't try it"), "{decision:?}");
    assert!(!file(mute.scratch.dir()).exists(), "an unproven answer was kept");
}

#[test]
fn without_a_device_nothing_is_started() {
    let host = Host::new(&speaks(), "");
    fs::remove_file(host.device()).unwrap();
    let decision = host.decide(AccelChoice::Auto, true).unwrap();
    assert_eq!(decision.accel, Accel::Tcg);
    assert!(decision.reason.starts_with("there is no "), "{decision:?}");
    let failure = host.decide(AccelChoice::Kvm, true).unwrap_err();
    assert!(failure.next.unwrap().contains("virtualisation"));
    assert_eq!(host.starts(), "");
}

#[test]
fn answers_of_another_boot_or_another_qemu_are_not_believed() {
    let host = Host::new(&speaks(), "");
    host.decide(AccelChoice::Auto, true).unwrap();
    let path = file(host.scratch.dir());
    let kept = fs::read_to_string(&path).unwrap();
    fs::write(&path, kept.replace(host::boot_id().as_str(), "another boot")).unwrap();
    host.decide(AccelChoice::Auto, true).unwrap();
    assert_eq!(host.starts(), "kvm kvm ");
    let mut script = fs::read_to_string(host.binary()).unwrap();
    script.push_str("# upgraded\n");
    fs::write(host.binary(), script).unwrap();
    host.decide(AccelChoice::Auto, true).unwrap();
    assert_eq!(host.starts(), "kvm kvm kvm ");
    fs::write(&path, "{ torn").unwrap();
    host.decide(AccelChoice::Auto, true).unwrap();
    assert_eq!(host.starts(), "kvm kvm kvm kvm ");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn what_real_guests_did_is_remembered_too() {
    let host = Host::new(&speaks(), "");
    note_failure(
        host.scratch.dir(),
        &host.binary(),
        "internal-error",
        &Cancel::new(),
    );
    let decision = host.decide(AccelChoice::Auto, true).unwrap();
    assert_eq!(decision.accel, Accel::Tcg);
    note_proof(host.scratch.dir(), &host.binary(), &Cancel::new());
    assert_eq!(host.decide(AccelChoice::Auto, true).unwrap().accel, Accel::Kvm);
    assert_eq!(host.starts(), "");
}

#[test]
fn an_interrupted_probe_decides_nothing() {
    let host = Host::new("exec sleep 100", "");
    let (binary, device, kernel) = (host.binary(), host.device(), host.kernel());
    let cancel = Cancel::new();
    cancel.request();
    let question = AccelQuestion {
        choice: AccelChoice::Auto,
        arch: Arch::host(),
        binary: &binary,
        kernel: Some(ProbeKernel {
            path: &kernel,
            known_good: true,
        }),
        home: Some(host.scratch.dir()),
        device: &device,
    };
    assert_eq!(decide(&question, &cancel).unwrap_err().exit, Exit::Interrupted);
    assert!(!file(host.scratch.dir()).exists());
}

#[test]
fn guests_of_another_architecture_are_emulated() {
    let question = AccelQuestion {
        choice: AccelChoice::Kvm,
        arch: crate::core::arch::KNOWN
            .iter()
            .find(|arch| arch.is_foreign())
            .unwrap(),
        binary: Path::new("/qemu"),
        kernel: None,
        home: None,
        device: Path::new("/dev/null"),
    };
    let refused = check(&question).unwrap_err();
    assert!(refused.to_string().contains("always emulated"), "{refused}");
    assert!(refused.next.unwrap().contains("accel = \"auto\""));
}
