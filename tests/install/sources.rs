//! `tests/support/debian-sources.sh`: where the Debian of the tests comes from, by a stand-in of apt.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::support::Castra;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/debian-sources.sh");
const FAKE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/fake-apt.sh");

/// What the script makes of these index targets; `@` is the directory of apt's files.
fn lines(dir: &Path, targets: &str) -> String {
    let bin = dir.join("bin");
    fs::create_dir_all(&bin).unwrap();
    fs::write(bin.join("targets"), targets.replace('@', dir.to_str().unwrap())).unwrap();
    // May be there from the case before.
    let _ = symlink(FAKE, bin.join("apt-get"));
    let output = Command::new(SCRIPT)
        .arg("bookworm")
        .env(
            "PATH",
            format!("{}:{}", bin.display(), std::env::var("PATH").unwrap()),
        )
        .env("FAKE_CASE", "plain")
        .env("FAKE_LOG", dir.join("calls"))
        .env("FAKE_BIN", &bin)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn debian_comes_from_where_apt_takes_it_whatever_file_says_so() {
    let castra = Castra::new("sources");
    castra.write(
        "any.list",
        "# ours\ndeb [arch=amd64 signed-by=/keys/own.gpg] http://mirror.example/debian bookworm main\n\
         deb http://plain.example/debian bookworm-updates main\n",
    );
    castra.write(
        "any.sources",
        "# One of somebody else's.\nTypes: deb\nSigned-By: /keys/other.gpg\n\n\
         # The second.\nTypes: deb\nURIs: http://mirror.example/security\nSuites: stable-security\nSigned-By: /keys/security.gpg\n",
    );
    let targets = "\
Debian|bookworm|http://mirror.example/debian/|bookworm|main|@/any.list:2
Debian|bookworm|http://mirror.example/debian/|bookworm|main|@/any.list:2
Debian|bookworm-updates|http://plain.example/debian/|bookworm-updates|main|@/any.list:3
Debian|bookworm-security|http://mirror.example/security/|stable-security|main|@/any.sources:2
Debian|trixie|http://mirror.example/debian/|trixie|main|@/any.list:4
Debian Backports|bookworm-backports|http://mirror.example/debian/|bookworm-backports|main|@/any.list:5
Other|bookworm|http://other.example/|bookworm|main|@/any.sources:1
";
    let found = lines(&castra.project(), targets);
    let mut found: Vec<_> = found.lines().collect();
    found.sort_unstable();
    assert_eq!(
        found,
        [
            "deb [signed-by=/keys/own.gpg] http://mirror.example/debian/ bookworm main",
            "deb [signed-by=/keys/security.gpg] http://mirror.example/security/ stable-security main",
            "deb http://plain.example/debian/ bookworm-updates main",
        ]
    );
    // Nothing known: Debian's own mirror, which mmdebstrap takes by itself.
    assert_eq!(lines(&castra.project(), ""), "");
}
