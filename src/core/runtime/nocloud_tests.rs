//! The text cloud-init gets, word for word.

use super::*;
use crate::core::name::VmName;

fn inputs(vm: &VmName) -> SeedInputs<'_> {
    SeedInputs {
        vm,
        launch_id: "0011223344556677",
        broker: "10.0.2.2:7070",
        token: Some("00112233445566778899aabbccddeeff"),
        heartbeat_secs: 15,
        authorized_keys: "ssh-ed25519 AAAA castra\n",
        user: "root",
        mounts: &[],
        user_data: None,
    }
}

/// The scripts' texts are left out.
fn without_scripts(text: &str) -> String {
    let mut text = text.to_owned();
    for (script, name) in [
        (CASTRA_HELLO, "HELLO"),
        (CASTRA_MOUNTS, "MOUNTS"),
        (START, "START"),
        (SERVICE, "SERVICE"),
    ] {
        let entry = write_file("/x", "0", script);
        let block = entry.split_once("content: ").unwrap().1;
        text = text.replace(block, &format!("{name}\n"));
    }
    text
}

#[test]
fn meta_data_names_launch_and_host() {
    let vm = "web_1.eu".parse().unwrap();
    assert_eq!(
        meta_data(&inputs(&vm)),
        "instance-id: \"castra-0011223344556677\"\nlocal-hostname: \"web-1.eu\"\n"
    );
}

#[test]
fn the_whole_of_a_plain_seed() {
    let vm = "web-0".parse().unwrap();
    let expected = r##"#cloud-config
# Written by castra for one launch of this VM; the next one replaces it.
disable_root: false
ssh_authorized_keys:
  - "ssh-ed25519 AAAA castra"
ssh_deletekeys: false
ssh_genkeytypes: ["ed25519"]
write_files:
  - path: "/etc/castra/vm"
    permissions: "0644"
    content: |
      web-0
  - path: "/etc/castra/broker"
    permissions: "0644"
    content: |
      10.0.2.2:7070
  - path: "/etc/castra/heartbeat_secs"
    permissions: "0644"
    content: |
      15
  - path: "/etc/castra/token"
    permissions: "0600"
    content: |
      00112233445566778899aabbccddeeff
  - path: "/usr/local/lib/castra/castra-hello"
    permissions: "0755"
    content: HELLO
  - path: "/etc/systemd/system/castra-hello.service"
    permissions: "0644"
    content: SERVICE
  - path: "/var/lib/cloud/scripts/per-boot/castra-start"
    permissions: "0755"
    content: START
"##;
    assert_eq!(without_scripts(&user_data(&inputs(&vm), "").unwrap()), expected);
}

#[test]
fn users_and_mounts_are_added() {
    let vm = "web-0".parse().unwrap();
    let more = SeedInputs {
        user: "de\"ploy",
        token: None,
        ..inputs(&vm)
    };
    let text = without_scripts(&user_data(&more, "castra0\t/work\tro\n").unwrap());
    assert!(
        text.contains(
            "users:\n  - default\n  - name: \"de\\\"ploy\"\n    sudo: \"ALL=(ALL) NOPASSWD:ALL\"\n    \
             lock_passwd: true\n    ssh_authorized_keys:\n      - \"ssh-ed25519 AAAA castra\"\n"
        ),
        "{text}"
    );
    assert!(
        text.contains(
            "  - path: \"/etc/castra/mounts\"\n    permissions: \"0644\"\n    content: |\n      castra0\t/work\tro\n  \
             - path: \"/usr/local/lib/castra/castra-mounts\"\n    permissions: \"0755\"\n    content: MOUNTS\n"
        ),
        "{text}"
    );
    assert!(!text.contains("/etc/castra/token"), "{text}");
}

#[test]
fn the_users_data_comes_first_and_whole() {
    let vm = "web-0".parse().unwrap();
    let text = |user_data| {
        let inputs = SeedInputs {
            user_data: Some(user_data),
            ..inputs(&vm)
        };
        super::user_data(&inputs, "").unwrap()
    };
    let merged = text("\n#cloud-config\npackages: [jq]\n");
    let head = "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=\"castra-seed\"\n\n--castra-seed\n\
                Content-Type: text/cloud-config; charset=\"us-ascii\"\n\n#cloud-config\npackages: [jq]\n\n\
                --castra-seed\nContent-Type: text/cloud-config;";
    assert!(merged.starts_with(head), "{merged}");
    assert!(merged.contains("\nX-Merge-Type: list(append)+dict(no_replace,recurse_list)+str()\n"));
    assert!(merged.ends_with("\n--castra-seed--\n"));
    for (given, kind) in [
        ("#!/bin/bash\ntrue\n", "text/x-shellscript"),
        ("#cloud-boothook\n", "text/cloud-boothook"),
        ("#include-once\nhttps://x\n", "text/x-include-once-url"),
        ("#include\nhttps://x\n", "text/x-include-url"),
        ("#cloud-config-archive\n[]\n", "text/cloud-config-archive"),
        ("## template: jinja\n#cloud-config\n", "text/jinja2"),
    ] {
        assert!(
            text(given).contains(&format!("Content-Type: {kind}; charset")),
            "{given}"
        );
    }
    // A MIME message goes in as a part, and its text may hold our boundary.
    let nested = "Content-Type: multipart/mixed; boundary=\"castra-seed\"\n\n--castra-seed\n";
    assert!(text(nested).contains(&format!("--castra-seedx\n{nested}")));
    // Blank user data counts as none.
    assert_eq!(text(" \n"), user_data(&inputs(&vm), "").unwrap());
}

#[test]
fn text_beyond_ascii_is_wrapped() {
    let vm = "web-0".parse().unwrap();
    let inputs = SeedInputs {
        user_data: Some("#!/bin/sh\necho grüße\n"),
        ..inputs(&vm)
    };
    let text = user_data(&inputs, "").unwrap();
    assert!(
        text.contains(
            "charset=\"utf-8\"\nContent-Transfer-Encoding: base64\n\nIyEvYmluL3NoCmVjaG8gZ3LDvMOfZQo=\n"
        ),
        "{text}"
    );
    assert!(text.is_ascii());
}

#[test]
fn base64_is_the_known_one() {
    for (plain, coded) in [
        ("", ""),
        ("f", "Zg=="),
        ("fo", "Zm8="),
        ("foo", "Zm9v"),
        ("foob", "Zm9vYg=="),
        ("fooba", "Zm9vYmE="),
        ("foobar", "Zm9vYmFy"),
    ] {
        assert_eq!(base64(plain.as_bytes()), coded);
    }
    let long = base64(&[0xff; 58]);
    assert_eq!(long.lines().map(str::len).collect::<Vec<_>>(), [76, 4]);
}

#[test]
fn scalars_hold_anything() {
    assert_eq!(
        quoted("a\"b\\c\n\u{7f}\u{2028}é"),
        "\"a\\\"b\\\\c\\n\\u007f\\u2028é\""
    );
    // A block loses leading blanks and double line ends, so those are quoted.
    for odd in [" x\n", "x", "x\n\n", "x\r\n"] {
        assert!(write_file("/x", "0644", odd).contains("content: \""), "{odd:?}");
    }
    assert_eq!(
        write_file("/x", "0644", "a\n\n  b\n"),
        "  - path: \"/x\"\n    permissions: \"0644\"\n    content: |\n      a\n\n        b\n"
    );
}
