//! Which QEMU to run.
//!
//! Here: finding the binary, and what to install where there is none. Not here: which accelerator
//! it will use ([`super::accel`]).

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::core::cancel::Cancel;
use crate::core::config::QemuConfig;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::process::Job;

/// Where Red Hat's distributions keep the host architecture's, outside PATH.
const RED_HAT: &str = "/usr/libexec/qemu-kvm";

/// `[qemu].binary`, or the QEMU for `[qemu].arch` on PATH. Absolute.
pub fn find_qemu(config: &QemuConfig) -> Result<PathBuf> {
    find_in(config, env::var_os("PATH").as_deref().unwrap_or_default())
}

fn find_in(config: &QemuConfig, path: &OsStr) -> Result<PathBuf> {
    if let Some(binary) = &config.binary {
        if is_executable(binary) {
            return std::path::absolute(binary).map_err(|error| Failure::io("find", binary, &error));
        }
        let why = if binary.exists() {
            "it isn't an executable program"
        } else {
            "there is no such file"
        };
        return Err(
            Failure::new(Exit::Unavailable, format!("can't run {}", binary.display()))
                .because(why)
                .advice("set `binary` under [qemu] to a qemu-system program, or leave it out"),
        );
    }
    let name = format!("qemu-system-{}", config.arch.name);
    let red_hat = (!config.arch.is_foreign()).then(|| PathBuf::from(RED_HAT));
    let found = env::split_paths(path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(&name))
        .chain(red_hat)
        .find(|candidate| is_executable(candidate));
    found.ok_or_else(|| {
        Failure::new(Exit::Unavailable, format!("can't find {name}"))
            .because("it is not on PATH")
            .advice(format!("install QEMU: {}", config.arch.qemu_packages))
    })
}

/// Where a program is on PATH.
pub fn find_tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|candidate| is_executable(candidate))
}

/// Fails unless a program is on PATH; `package` has it on Debian and Ubuntu.
pub fn require_tool(name: &str, package: &str) -> Result<()> {
    if find_tool(name).is_some() {
        return Ok(());
    }
    Err(Failure::new(Exit::Unavailable, format!("can't find {name}"))
        .because("it is not on PATH")
        .advice(format!("install it: `apt install {package}` (Debian, Ubuntu)")))
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The version a QEMU reports: `7.2.22`.
pub fn qemu_version(binary: &Path, cancel: &Cancel) -> Result<String> {
    let what = || format!("can't find out the version of {}", binary.display());
    let ended = Job::new(binary)
        .arg("--version")
        .deadline(Duration::from_secs(10))
        .cancel(cancel)
        .run()
        .map_err(|error| error.into_failure(what(), Exit::Unavailable))?;
    let text = String::from_utf8_lossy(&ended.stdout);
    let version = text
        .split_whitespace()
        .skip_while(|word| *word != "version")
        .nth(1)
        .filter(|version| version.starts_with(|c: char| c.is_ascii_digit()));
    version.map(str::to_owned).ok_or_else(|| {
        Failure::new(Exit::Unavailable, what())
            .because("it doesn't answer `--version` as QEMU does")
            .advice("set `binary` under [qemu] to a qemu-system program")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::arch::Arch;
    use crate::core::scratch::Scratch;

    fn program(path: &Path, mode: u32) {
        fs::write(
            path,
            "#!/bin/sh\necho 'QEMU emulator version 9.1.2 (Somebody 1:9.1)'\n",
        )
        .unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn path_is_searched_in_its_order() {
        let scratch = Scratch::new("binary");
        let name = format!("qemu-system-{}", Arch::host().name);
        for (dir, mode) in [("a", 0o644), ("b", 0o755), ("c", 0o755)] {
            fs::create_dir(scratch.path(dir)).unwrap();
            program(&scratch.path(dir).join(&name), mode);
        }
        let path = env::join_paths(["a", "b", "c"].map(|dir| scratch.path(dir))).unwrap();
        let found = find_in(&QemuConfig::default(), &path).unwrap();
        assert_eq!(found, scratch.path("b").join(&name));
        assert_eq!(qemu_version(&found, &Cancel::new()).unwrap(), "9.1.2");
    }

    #[test]
    fn a_missing_qemu_names_its_packages() {
        if Path::new(RED_HAT).exists() {
            return; // There it is never missing.
        }
        let failure = find_in(&QemuConfig::default(), OsStr::new("/nowhere:relative")).unwrap_err();
        assert_eq!(failure.exit, Exit::Unavailable);
        assert!(failure.to_string().contains("install QEMU"), "{failure}");
        let config = QemuConfig {
            arch: Arch::named("aarch64").unwrap(),
            ..QemuConfig::default()
        };
        let failure = find_in(&config, OsStr::new("/nowhere")).unwrap_err().to_string();
        assert!(failure.contains("can't find qemu-system-aarch64"), "{failure}");
        assert!(failure.contains("apt install qemu-system-arm"), "{failure}");
    }

    #[test]
    fn a_configured_binary_must_be_a_program() {
        let scratch = Scratch::new("binary-set");
        let config = |name: &str| QemuConfig {
            binary: Some(scratch.path(name)),
            ..QemuConfig::default()
        };
        let none = find_in(&config("none"), OsStr::new("")).unwrap_err().to_string();
        assert!(none.contains("no such file"), "{none}");
        program(&scratch.path("text"), 0o644);
        let text = find_in(&config("text"), OsStr::new("")).unwrap_err().to_string();
        assert!(text.contains("executable program"), "{text}");
        program(&scratch.path("good"), 0o755);
        assert_eq!(
            find_in(&config("good"), OsStr::new("")).unwrap(),
            scratch.path("good")
        );
        fs::write(scratch.path("good"), "#!/bin/sh\necho hello\n").unwrap();
        let other = qemu_version(&scratch.path("good"), &Cancel::new()).unwrap_err();
        assert_eq!(other.exit, Exit::Unavailable);
    }
}
