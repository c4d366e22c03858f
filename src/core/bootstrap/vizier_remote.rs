//! The shell texts for a guest's Vizier: small POSIX scripts, decided from data alone.
//!
//! Here: asking whether it runs, installing and enabling it under whatever init the guest has, showing its log. Not
//! here: when that is done and what it means (`bootstrap::vizier`), or the service itself
//! (`scripts/guest/castra-vizier`).
//!
//! `CASTRA_ROOT`, set in the guest, is put before every path: tests have a guest in a directory.

use crate::core::process::shell_quote;

/// Begins [`PROBE`]'s line about a Vizier that runs: version, settings, process.
pub const RUNS: &str = "castra-vizier-runs";
/// Begins [`PROBE`]'s line about the installed Vizier: version, settings.
pub const HAS: &str = "castra-vizier-has";
/// The line that [`LOG_TAIL`] prints before the log.
pub const LOG: &str = "castra-vizier-log";

/// Reports what is installed and what runs, without starting a program. Every user of the guest sees root's
/// Vizier.
pub const PROBE: &str = r#"r=${CASTRA_ROOT:-}; u=$HOME/.castra/vizier; for d in "$r/usr/local/lib/castra" "$u"; do x=; { IFS= read -r x <"$d/vizier.version"; } 2>/dev/null; [ -z "$x" ] || { printf "\n%s\n" "castra-vizier-has $x"; break; }; done; for a in "$r/run/castra/vizier.active" "$u/vizier.active"; do p= x= c=; { { IFS= read -r p; IFS= read -r x; } <"$a"; } 2>/dev/null; case $p in ""|*[!0-9]*) continue;; esac; { IFS= read -r c <"/proc/$p/cmdline"; } 2>/dev/null; case $c in *castra-vizier*) printf "\n%s\n" "castra-vizier-runs $x $p"; break;; esac; done; "#;

/// Shows the last lines of the service's log.
pub const LOG_TAIL: &str = r#"for f in "${CASTRA_ROOT:-}/var/log/castra-vizier.log" "$HOME/.castra/vizier/vizier.log"; do [ ! -r "$f" ] || { printf "\n%s\n" castra-vizier-log; exec tail -n 100 "$f"; }; done"#;

/// The command line that runs an [`install`] from its stdin: as root if it can (directly, or by a sudo that
/// asks for no password), else as the login user.
pub fn install_command() -> String {
    let choose = "if [ \"$(id -u)\" != 0 ] && command -v sudo >/dev/null 2>&1 && sudo -n true </dev/null 2>/dev/null; \
                  then exec sudo -n sh; else exec sh; fi";
    format!("exec sh -c {}", shell_quote(choose))
}

/// What is installed in a guest.
pub struct Parcel<'a> {
    /// The scripts by name; none if the guest has this version.
    pub scripts: &'a [(&'a str, &'a str)],
    /// Version and settings in one line, in the form that the running service reports.
    pub stamp: &'a str,
    /// The files of /etc/castra: key and value.
    pub settings: &'a [(&'a str, &'a str)],
    /// Begins the lines of the answer, and ends the here-documents: a random word.
    pub mark: &'a str,
}

/// Installs, then enables and starts. It answers, each on a line behind the mark: `installed WHERE`, then `enabled HOW`;
/// or `failed WHY` in place of either; last the exit code alone.
///
/// One compound command: the shell has read all of it before it runs any.
pub fn install(parcel: &Parcel<'_>) -> String {
    let mark = parcel.mark;
    let mut text = String::from("{\n");
    text.push_str(&format!("mark={mark}\n"));
    text.push_str(PLACES);
    for (name, contents) in parcel.scripts {
        text.push_str(&here(
            &format!("put 755 \"$lib/{name}\""),
            contents.trim_end(),
            mark,
        ));
    }
    for (key, value) in parcel.settings {
        let mode = if *key == "token" { "600" } else { "644" };
        text.push_str(&here(&format!("put {mode} \"$etc/{key}\""), value, mark));
    }
    text.push_str(&here("put 644 \"$lib/vizier.version\"", parcel.stamp, mark));
    text.push_str("say \"$mark installed $lib${why:+ ($why)}\"\n");
    text.push_str(&format!("unit='{UNIT}'\n"));
    text.push_str(ENABLE);
    text.push_str("}\n");
    text
}

/// A command whose stdin is this text.
fn here(command: &str, contents: &str, mark: &str) -> String {
    format!("{command} <<'{mark}' || fail \"no room, or no right to write\"\n{contents}\n{mark}\n")
}

/// Where things go, for root and for others; helpers.
const PLACES: &str = r#"umask 022
r=${CASTRA_ROOT:-}
say() { printf "\n%s\n" "$1"; }
fail() { say "$mark failed $1"; say "$mark 1"; exit 1; }
put() { (umask 077; cat >"$2.new") && chmod "$1" "$2.new" && mv -f "$2.new" "$2"; }
have() { command -v "$1" >/dev/null 2>&1; }
if [ "$(id -u)" = 0 ]; then
    who=root why= lib=$r/usr/local/lib/castra etc=$r/etc/castra run=$r/run/castra
else
    who=user why="for this user alone: neither root nor a sudo without a password"
    lib=$HOME/.castra/vizier etc=$HOME/.castra/vizier/etc run=$HOME/.castra/vizier
fi
for d in "$lib" "$etc" "$run"; do mkdir -p "$d" || fail "$d can't be made"; done
missing=
for x in mkfifo mktemp od dd tr; do have $x || missing="$missing $x"; done
[ -z "$missing" ] || fail "the guest lacks programs:$missing"
found=
for x in busybox nc ncat socat bash python3 perl; do ! have $x || found=yes; done
[ -n "$found" ] || fail "nothing to connect with: none of busybox, nc, ncat, socat, bash, python3, perl"
"#;

/// For systemd, the system's or a user's.
const UNIT: &str = "[Unit]
Description=castra: keeps in touch with the host
After=network.target

[Service]
ExecStart=/bin/sh @LIB@/castra-vizier run
@ENVIRONMENT@
Restart=always
RestartSec=1
SuccessExitStatus=143
Nice=5

[Install]
WantedBy=@TARGET@";

/// Enables and starts it under the running init system. An older Vizier is ended first.
const ENABLE: &str = r#"export CASTRA_VIZIER_ACTIVE=$run/vizier.active CASTRA_ETC_DIR=$etc
if [ $who = root ]; then
    CASTRA_VIZIER_LOG=$r/var/log/castra-vizier.log
else
    CASTRA_VIZIER_LOG=$lib/vizier.log
fi
export CASTRA_VIZIER_LOG
env=
[ $who = root ] && [ -z "$r" ] || env="Environment=CASTRA_VIZIER_ACTIVE=$CASTRA_VIZIER_ACTIVE CASTRA_ETC_DIR=$etc CASTRA_VIZIER_LOG=$CASTRA_VIZIER_LOG"
start=$lib/castra-vizier
# Whoever started the one before, it makes room. A supervisor may be quicker than us and start the new one already.
[ ! -e "$CASTRA_VIZIER_ACTIVE" ] || sh "$start" stop
write_unit() { # where, target
    mkdir -p "$1" || fail "$1 can't be made"
    new=$(printf '%s\n' "$unit" | sed -e "s|@LIB@|$lib|" -e "s|@ENVIRONMENT@|$env|" -e "s|@TARGET@|$2|")
    [ -f "$1/castra-vizier.service" ] && [ "$(cat "$1/castra-vizier.service")" = "$new" ] ||
        printf '%s\n' "$new" >"$1/castra-vizier.service"
}
exe=
[ $who != root ] || exe=$(readlink "$r/proc/1/exe")
runsv=
if [ $who = root ] && have sv; then
    for d in "$r/etc/service" "$r/var/service" "$r/service"; do [ -n "$runsv" ] || [ ! -d "$d" ] || runsv=$d; done
fi
if [ $who = root ] && [ -d "$r/run/systemd/system" ] && have systemctl; then
    write_unit "$r/etc/systemd/system" multi-user.target
    how=systemd
    { systemctl daemon-reload && systemctl -q enable castra-vizier.service && systemctl restart castra-vizier.service; } ||
        fail "systemctl can't start castra-vizier.service"
elif [ $who = root ] && [ -d "$r/run/openrc" ] && have rc-service && have rc-update; then
    how=OpenRC
    printf '%s\n' '#!/sbin/openrc-run' 'description="castra: keeps in touch with the host"' 'supervisor=supervise-daemon' \
        'command=/bin/sh' "command_args=\"$lib/castra-vizier run\"" 'depend() { use net; }' >"$r/etc/init.d/castra-vizier" &&
        chmod 755 "$r/etc/init.d/castra-vizier" && rc-update -q add castra-vizier default >/dev/null &&
        rc-service -q castra-vizier restart >/dev/null || fail "OpenRC can't start castra-vizier"
elif [ -n "$runsv" ]; then
    how=runit
    mkdir -p "$r/etc/sv/castra-vizier" &&
        printf '%s\n' '#!/bin/sh' "exec /bin/sh $lib/castra-vizier run 2>&1" >"$r/etc/sv/castra-vizier/run" &&
        chmod 755 "$r/etc/sv/castra-vizier/run" || fail "$r/etc/sv/castra-vizier can't be written"
    if [ -e "$runsv/castra-vizier" ]; then
        sv restart castra-vizier >/dev/null || fail "sv can't restart castra-vizier"
    else
        ln -s "$r/etc/sv/castra-vizier" "$runsv/castra-vizier" || fail "$runsv can't be written"
    fi
elif case $exe in *busybox*) [ -w "$r/etc/inittab" ] ;; *) false ;; esac; then
    how="BusyBox init"
    if ! grep -q castra-vizier "$r/etc/inittab"; then
        echo "::respawn:/bin/sh $lib/castra-vizier run" >>"$r/etc/inittab" && kill -HUP "${CASTRA_INIT_PID:-1}" ||
            fail "init can't be told"
    fi
else
    how= but=
    if [ $who = user ] && have systemctl && systemctl --user show-environment >/dev/null 2>&1; then
        # Without linger a user's systemd ends with the user's last login, perhaps the bootstrap's own.
        loginctl enable-linger >/dev/null 2>&1
        if [ "$(loginctl show-user "$(id -un)" -p Linger --value 2>/dev/null)" = yes ]; then
            write_unit "$HOME/.config/systemd/user" default.target
            if systemctl --user daemon-reload && systemctl --user -q enable castra-vizier.service &&
                systemctl --user restart castra-vizier.service; then
                how="systemd --user"
            fi
        else
            but=" (systemd --user would end it at the last logout: no linger)"
        fi
    fi
    if [ -z "$how" ]; then
        how="nohup, not started again after a reboot$but"
        sh "$start" start || fail "it can't be started"
    fi
fi
say "$mark enabled $how"
say "$mark 0"
"#;
