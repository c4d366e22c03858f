//! castra-mounts as a stock image runs it, with stand-ins for `mount` and `modprobe`.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use support::{Castra, program};

#[test]
fn the_guest_tells_what_became_of_each_folder() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/guest/castra-mounts");
    // Not BusyBox: its shell takes its own `mount` before any on PATH.
    for shell in ["dash", "bash"] {
        let castra = Castra::new("guest-mounts");
        let dir = castra.dir();
        let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        for folder in ["bin", "etc"] {
            fs::create_dir(dir.join(folder)).unwrap();
        }
        fs::write(dir.join("file"), "").unwrap();
        program(&dir.join("bin/modprobe"), "#!/bin/sh\nexit 1\n");
        // As mount(8): the tag is the last but one argument.
        program(
            &dir.join("bin/mount"),
            "#!/bin/sh\ncase \" $* \" in *\" castra1 \"*) printf 'mount: no such\\tdevice\\nsee dmesg\\n' >&2; exit 32;; esac\n",
        );
        fs::write(
            dir.join("etc/mounts"),
            format!(
                "castra0\t{}\tro\ncastra1\t{}\trw\ncastra2\t{}\tro",
                at("a b"),
                at("c"),
                at("file/x")
            ),
        )
        .unwrap();
        let path = format!("{}:{}", at("bin"), std::env::var("PATH").unwrap());
        let ran = Command::new(shell)
            .arg(&script)
            .env("PATH", path)
            .env("CASTRA_RUN_DIR", at("run"))
            .env("CASTRA_ETC_DIR", at("etc"))
            .output()
            .unwrap();
        assert!(ran.status.success(), "{shell:?}: {ran:?}");
        let told = fs::read_to_string(dir.join("run/mounts")).unwrap();
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(lines[0], format!("ok\t{}", at("a b")), "{shell:?}");
        assert_eq!(
            lines[1],
            format!("failed\t{}\tmount: no such device see dmesg", at("c")),
            "{shell:?}"
        );
        let (start, why) = lines[2].rsplit_once('\t').unwrap();
        assert_eq!(start, format!("failed\t{}", at("file/x")), "{shell:?}");
        assert!(why.contains("Not a directory"), "{shell:?}: {why}");
        assert_eq!(lines.len(), 3, "{shell:?}");
        // What tells of it is whole once it is there.
        assert!(!dir.join("run/mounts.new").exists(), "{shell:?}");
    }
}
