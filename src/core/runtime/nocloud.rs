//! The text cloud-init reads in a stock image: meta-data and user-data.
//!
//! Here: pure functions from a seed's inputs to those two files, the user's own data merged in.
//! Not here: files and directories (`runtime::seed`), what runs in the guest
//! (`scripts/guest/castra-hello`, `castra-mounts`).
//!
//! There is no network-config on purpose: with one that matches by name the interface stayed down
//! where netplan is missing, and images bring up DHCP by themselves.

use std::fmt;

use crate::core::images::embedded::{CASTRA_HELLO, CASTRA_MOUNTS};
use crate::core::runtime::seed::SeedInputs;

/// Where the agent and its start script lie in the guest.
const LIB: &str = "/usr/local/lib/castra";

/// Starts the agent. This is a per-boot script of cloud-init and not `runcmd`, because the user's commands
/// run together with `runcmd`, and one that takes an hour would keep the guest silent for that long. The
/// service isn't enabled: cloud-init starts it at every launch, when the new token is in place. An enabled
/// service of a kept disk would start before that, with the old token.
const START: &str = "\
#!/bin/sh
[ ! -s /etc/castra/mounts ] || sh /usr/local/lib/castra/castra-mounts >/dev/console 2>&1
if command -v systemctl >/dev/null 2>&1 && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    exec systemctl --no-block restart castra-hello.service
fi
nohup sh /usr/local/lib/castra/castra-hello --loop </dev/null >/var/log/castra-hello.log 2>&1 &
";

const SERVICE: &str = "\
[Unit]
Description=Proof of life for the host's castra broker
After=network.target

[Service]
ExecStart=/bin/sh /usr/local/lib/castra/castra-hello --loop
Restart=always
RestartSec=5
";

/// User data that cloud-init couldn't make sense of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownUserData {
    first_line: String,
}

impl fmt::Display for UnknownUserData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cloud-init doesn't know `{}`, the first line of `user_data`",
            self.first_line
        )
    }
}

/// `meta-data`. A new launch is a new instance, so that everything is applied again to a disk that
/// was kept.
pub fn meta_data(inputs: &SeedInputs<'_>) -> String {
    // An underscore is valid in a VM's name and in no host name.
    let hostname = inputs.vm.as_str().replace('_', "-");
    format!(
        "instance-id: {}\nlocal-hostname: {}\n",
        quoted(&format!("castra-{}", inputs.launch_id)),
        quoted(&hostname)
    )
}

/// `user-data`: castra's part, or a MIME message of the user's part and castra's. `mounts` is the
/// text of `/etc/castra/mounts`.
pub fn user_data(inputs: &SeedInputs<'_>, mounts: &str) -> Result<String, UnknownUserData> {
    let ours = cloud_config(inputs, mounts);
    // cloud-init goes by the first line, so blank lines before it are removed.
    let theirs = inputs.user_data.unwrap_or_default().trim_start();
    if theirs.is_empty() {
        return Ok(ours);
    }
    let theirs = user_part(theirs)?;
    let ours = part(
        "text/cloud-config",
        // Merged into the user's part: lists are appended to, all other keys of the user's part stay.
        "X-Merge-Type: list(append)+dict(no_replace,recurse_list)+str()\n",
        &ours,
    );
    let mut boundary = "castra-seed".to_owned();
    while theirs.contains(&boundary) || ours.contains(&boundary) {
        boundary.push('x');
    }
    Ok(format!(
        "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=\"{boundary}\"\n\n\
         --{boundary}\n{theirs}\n--{boundary}\n{ours}\n--{boundary}--\n"
    ))
}

/// The user's data as a MIME part.
fn user_part(text: &str) -> Result<String, UnknownUserData> {
    // cloud-init's own table of first lines, longest before its prefixes.
    const KINDS: [(&str, &str); 9] = [
        ("#cloud-config-archive", "text/cloud-config-archive"),
        ("#cloud-config-jsonp", "text/cloud-config-jsonp"),
        ("#cloud-config", "text/cloud-config"),
        ("#cloud-boothook", "text/cloud-boothook"),
        ("#include-once", "text/x-include-once-url"),
        ("#include", "text/x-include-url"),
        ("#part-handler", "text/part-handler"),
        ("## template: jinja", "text/jinja2"),
        ("#!", "text/x-shellscript"),
    ];
    let lower = text.get(..16).unwrap_or(text).to_ascii_lowercase();
    if lower.starts_with("mime-version:") || lower.starts_with("content-type:") {
        // A MIME message is a MIME part already.
        return Ok(text.to_owned());
    }
    match KINDS.iter().find(|(first, _)| text.starts_with(first)) {
        Some((_, kind)) => Ok(part(kind, "", text)),
        None => Err(UnknownUserData {
            first_line: text.lines().next().unwrap_or_default().chars().take(60).collect(),
        }),
    }
}

fn part(kind: &str, headers: &str, body: &str) -> String {
    if body.is_ascii() {
        return format!("Content-Type: {kind}; charset=\"us-ascii\"\n{headers}\n{body}");
    }
    // Python's e-mail parser, which cloud-init uses, mangles anything beyond ASCII sent as it is.
    format!(
        "Content-Type: {kind}; charset=\"utf-8\"\nContent-Transfer-Encoding: base64\n{headers}\n{}",
        base64(body.as_bytes())
    )
}

/// castra's part.
fn cloud_config(inputs: &SeedInputs<'_>, mounts: &str) -> String {
    let keys: Vec<&str> = inputs
        .authorized_keys
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let mut text = String::from(
        "#cloud-config\n\
         # Written by castra for one launch of this VM; the next one replaces it.\n\
         disable_root: false\n",
    );
    if !keys.is_empty() {
        // Keys at the top level are for the image's own user and for root.
        text.push_str(&format!("ssh_authorized_keys:\n{}", list(&keys, 2)));
    }
    if inputs.user != "root" {
        text.push_str(&format!(
            "users:\n  - default\n  - name: {}\n    sudo: \"ALL=(ALL) NOPASSWD:ALL\"\n    lock_passwd: true\n",
            quoted(inputs.user)
        ));
        if !keys.is_empty() {
            text.push_str(&format!("    ssh_authorized_keys:\n{}", list(&keys, 6)));
        }
    }
    // An RSA key takes seconds to make under emulation. Existing keys stay, so that at its next launch a kept
    // disk is the same machine to ssh.
    text.push_str("ssh_deletekeys: false\nssh_genkeytypes: [\"ed25519\"]\nwrite_files:\n");
    let line = |value: &str| format!("{value}\n");
    let mut file = |path: &str, mode: &str, contents: &str| {
        if !contents.is_empty() {
            text.push_str(&write_file(path, mode, contents));
        }
    };
    file("/etc/castra/vm", "0644", &line(inputs.vm.as_str()));
    file("/etc/castra/broker", "0644", &line(inputs.broker));
    file(
        "/etc/castra/heartbeat_secs",
        "0644",
        &line(&inputs.heartbeat_secs.to_string()),
    );
    file(
        "/etc/castra/token",
        "0600",
        &inputs.token.map(line).unwrap_or_default(),
    );
    if !mounts.is_empty() {
        file("/etc/castra/mounts", "0644", mounts);
        file(&format!("{LIB}/castra-mounts"), "0755", CASTRA_MOUNTS);
    }
    file(&format!("{LIB}/castra-hello"), "0755", CASTRA_HELLO);
    file("/etc/systemd/system/castra-hello.service", "0644", SERVICE);
    file("/var/lib/cloud/scripts/per-boot/castra-start", "0755", START);
    text
}

/// One entry of `write_files`. The contents stand there as they are, indented; what a block of
/// YAML can't hold is quoted instead.
fn write_file(path: &str, mode: &str, contents: &str) -> String {
    let head = format!(
        "  - path: {}\n    permissions: \"{mode}\"\n    content: ",
        quoted(path)
    );
    let block_can_hold = contents.ends_with('\n')
        && !contents.ends_with("\n\n")
        && !contents.starts_with([' ', '\n'])
        && contents
            .chars()
            .all(|c| matches!(c, '\n' | '\t') || !needs_escape(c));
    if !block_can_hold {
        return format!("{head}{}\n", quoted(contents));
    }
    let indented: String = contents
        .lines()
        .map(|line| {
            if line.is_empty() {
                "\n".to_owned()
            } else {
                format!("      {line}\n")
            }
        })
        .collect();
    format!("{head}|\n{indented}")
}

fn list(items: &[&str], indent: usize) -> String {
    items
        .iter()
        .map(|item| format!("{:indent$}- {}\n", "", quoted(item)))
        .collect()
}

/// A scalar in double quotes. A JSON string is a YAML string, except for a few characters that only YAML
/// wants escaped.
fn quoted(text: &str) -> String {
    serde_json::to_string(text)
        .expect("text is always valid JSON")
        .chars()
        .map(|c| match needs_escape(c) {
            true => format!("\\u{:04x}", u32::from(c)),
            false => c.to_string(),
        })
        .collect()
}

/// What YAML takes for a line end or for not printable.
fn needs_escape(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}')
}

/// RFC 2045 base64, lines of 76.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for (index, three) in bytes.chunks(3).enumerate() {
        if index > 0 && index % 19 == 0 {
            text.push('\n');
        }
        let bits = three
            .iter()
            .chain([0u8; 2].iter())
            .take(3)
            .fold(0usize, |bits, byte| bits << 8 | usize::from(*byte));
        for place in 0..4 {
            match place <= three.len() {
                true => text.push(char::from(DIGITS[bits >> (18 - 6 * place) & 63])),
                false => text.push('='),
            }
        }
    }
    text
}

#[cfg(test)]
#[path = "nocloud_tests.rs"]
mod tests;
