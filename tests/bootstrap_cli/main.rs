//! The real binary, a stand-in for QEMU and a real sshd in the place of the guest: everything of a
//! bootstrap and of `ssh`, `exec`, `cp` and `ssh-config` but the guest itself.
#![allow(clippy::unwrap_used)]

mod clients;
mod commands;
mod killed;
mod plans;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::path::PathBuf;

use support::project::Project;
use support::sshd::Sshd;

/// A running VM `web` whose SSH server is this machine's.
struct Guest {
    project: Project,
    sshd: Sshd,
}

impl Guest {
    /// `up --bootstrap skip` of a project whose script this is; `more` goes below
    /// [vms.bootstrap].
    fn up(label: &str, script: &str, more: &str) -> Guest {
        // The guest's stand-in is this machine, which gets no in-guest service.
        let vms = format!(
            "[vizier]\nenabled = false\n[[vms]]\nname = \"web\"\nkernel = \"vmlinuz\"\n[vms.bootstrap]\nmode = \"auto\"\nscript = \"boot/run.sh\"\n{more}"
        );
        let project = Project::new(label, &vms);
        let castra = project.castra();
        castra.write("boot/run.sh", script);
        let public = project.state("id_ed25519.pub");
        let sshd = Sshd::start(&castra.dir().join("sshd"), &public);
        let metadata = sshd.metadata(&castra.dir().join("guest's dir"));
        castra.write("boot/bootstrap.toml", &metadata);
        project.run(&["up", "--bootstrap", "skip"]).exits(0);
        Guest { project, sshd }
    }

    /// What `remote_dir` is.
    fn remote(&self) -> PathBuf {
        self.project.castra().dir().join("guest's dir")
    }

    /// Names of run logs.
    fn logs(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.project.state("logs/bootstrap"))
            .map(|entries| {
                entries
                    .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                    .collect()
            })
            .unwrap_or_default();
        names.sort();
        names
    }
}
