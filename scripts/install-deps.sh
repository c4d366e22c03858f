#!/bin/sh
# Installs the Debian or Ubuntu packages that castra, its default guest or its tests need and
# this machine lacks: with apt as root or through a sudo that asks nothing; otherwise it names
# them and stops. All in one transaction, which is tried without effect first: no package is
# removed or replaced by an older one unless somebody at a terminal says yes. At the end it looks
# again.
# For tests it also makes target/venv, a Python environment with a JSON Schema validator, and
# target/codex, the Codex CLI.
#
# usage: install-deps.sh run|test|bench
set -eu

usage() {
    echo "usage: install-deps.sh run|test|bench" >&2
    exit 64
}
[ $# -eq 1 ] || usage
purpose=$1

# COMMAND=PACKAGE: the package is wanted if the command is missing.
run='qemu-system-x86_64=qemu-system-x86 qemu-img=qemu-utils ssh=openssh-client ssh-keygen=openssh-client
     curl=curl tar=tar gzip=gzip xz=xz-utils zstd=zstd dpkg-deb=dpkg apt-get=apt cpio=cpio'
test="$run qemu-system-aarch64=qemu-system-arm sshd=openssh-server busybox=busybox-static python3=python3 jq=jq socat=socat ncat=ncat
      nc.openbsd=netcat-openbsd nc.traditional=netcat-traditional groff=groff-base bash=bash
      cc=gcc make=make zsh=zsh fish=fish node=nodejs npm=npm mmdebstrap=mmdebstrap mkfs.ext4=e2fsprogs"
bench="$test mosquitto=mosquitto mosquitto_pub=mosquitto-clients nats-server=nats-server redis-server=redis-server
       taskset=util-linux valgrind=valgrind"

case $purpose in
run) wanted=$run ;;
test) wanted=$test ;;
bench) wanted=$bench ;;
*) usage ;;
esac

PATH=$PATH:/usr/sbin:/sbin
export LC_ALL=C

say() { printf '%s\n' "$@" >&2; }
refuse() {
    say "$@"
    exit 69
}

# has WORD LIST
has() {
    case " $2 " in
    *" $1 "*) return 0 ;;
    *) return 1 ;;
    esac
}

want() {
    lacking="$lacking $2"
    has "$1" "$missing" || missing="$missing $1"
}

# What the machine lacks now: the commands in $lacking, their packages in $missing.
look() {
    missing='' lacking=''
    hash -r
    # Debian's python3 has no venv without this.
    if [ "$purpose" != run ] && ! python3 -c 'import ensurepip' 2>/dev/null; then
        want python3-venv python3-venv
    fi
    # A Debian is built for the tests; Ubuntu doesn't bring what it is signed with.
    if [ "$purpose" != run ] && [ ! -e /usr/share/keyrings/debian-archive-keyring.gpg ]; then
        want debian-archive-keyring debian-archive-keyring
    fi
    for pair in $wanted; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || want "${pair#*=}" "${pair%%=*}"
    done
}

# The validator of events: from the Python package index, into a directory of the build alone.
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=$root/target/venv
python_environment() {
    [ "$purpose" = test ] || return 0
    "$venv/bin/python" -c 'import jsonschema' 2>/dev/null && return 0
    log=$(mktemp)
    if ! { python3 -m venv --clear "$venv" &&
        "$venv/bin/pip" --disable-pip-version-check install -q 'jsonschema>=4.18,<5'; } >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        refuse "error: the JSON Schema validator could not be put into $venv" \
            "  try: look at pip's message above; tests need the Python package \`jsonschema\` there"
    fi
    rm -f "$log"
}

# The coding agent that the harness is tested with: an npm package with a program for this machine
# inside, into a directory of the build alone.
codex=$root/target/codex
codex_version=0.169.0
coding_agent() {
    [ "$purpose" = test ] || return 0
    [ "$("$codex/node_modules/.bin/codex" --version 2>/dev/null)" = "codex-cli $codex_version" ] && return 0
    log=$(mktemp)
    mkdir -p "$codex"
    if ! npm install --prefix "$codex" --no-audit --no-fund --no-update-notifier \
        "@openai/codex@$codex_version" >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        refuse "error: the Codex CLI could not be put into $codex" \
            "  try: look at npm's message above; tests need the npm package \`@openai/codex\` there"
    fi
    rm -f "$log"
}

beside_packages() {
    python_environment
    coding_agent
}

look
if [ -z "$missing" ]; then
    beside_packages
    exit 0
fi

command -v apt-get >/dev/null 2>&1 ||
    refuse "error: these Debian packages, or what your distribution calls them, are missing:$missing" \
        "  try: install them with your package manager, then run this again"
may_install=yes as_root=
if [ "$(id -u)" -ne 0 ]; then
    as_root='sudo -n'
    $as_root true 2>/dev/null || may_install=
fi

work=$(mktemp -d)
policy=
clean_up() {
    rm -rf "$work"
    [ -z "$policy" ] || $as_root rm -f "$policy"
}
trap clean_up EXIT
trap 'exit 130' INT TERM
log=$work/log
options='-q'

# What apt would do if told to install these: the packages it would remove in $removed, those it
# would replace by an older version in $downgraded. Fails where apt sees no way.
simulate() {
    # shellcheck disable=SC2086
    apt-get $options -s install --no-install-recommends "$@" >"$work/plan" 2>&1 </dev/null || return 1
    removed=$(awk '$1 == "Remv" { print $2 }' "$work/plan" | tr '\n' ' ')
    downgraded=$(awk '/DOWNGRADED:/ { on = 1; next } /^[^ ]/ { on = 0 } on' "$work/plan" | tr -s ' \n' ' ')
    removed=${removed% } downgraded=${downgraded# } downgraded=${downgraded% }
}

changes_nothing_else() { [ -z "$removed$downgraded" ]; }

codename() { (. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME:-}"); }

# The release that an installed package is of, by apt's lists, else by its version.
release_of() {
    release=$(apt-cache policy "$1" | awk '
        $1 == "***" { on = 1; next }
        on && !/^        / { exit }
        on && $2 ~ /:/ { sub("/.*", "", $3); print $3; exit }')
    if [ -z "$release" ]; then
        case $(dpkg-query -W -f '${Version}' "$1" 2>/dev/null) in
        *~bpo[0-9]*) release=$(codename)-backports ;;
        esac
    fi
    echo "$release"
}

# Backports of Debian that a package was taken from though apt no longer lists them: a source for
# this once, beside apt's own and from the same mirror.
lend_source() {
    # shellcheck disable=SC2086
    apt-get $options indextargets --format '$(RELEASE) $(CODENAME) ' 2>/dev/null | grep -qF "$1 " && return 0
    [ -n "$may_install" ] || return 1
    case $1 in
    *-backports) ;;
    *) return 1 ;;
    esac
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI)' 'Identifier: Packages' |
        awk -v codename="${1%-backports}" '$1 == "Debian" && $2 == codename { print $3; exit }')
    [ -n "$mirror" ] || return 1
    eval "$(apt-config shell parts Dir::Etc::SourceParts/d)"
    mkdir -p "$work/sources"
    [ ! -d "$parts" ] || cp "$parts"/* "$work/sources/" 2>/dev/null || :
    key=/usr/share/keyrings/debian-archive-keyring.gpg
    [ ! -e "$key" ] || signed="[signed-by=$key] "
    echo "deb ${signed:-}$mirror $1 main" >"$work/sources/castra-once.list"
    chmod -R a+rX "$work"
    # shellcheck disable=SC2086
    if $as_root apt-get $options -o "Dir::Etc::SourceParts=$work/sources" update >"$log" 2>&1 </dev/null; then
        options="$options -o Dir::Etc::SourceParts=$work/sources"
        say "note: $2 is of $1, which is no source of apt here; it is one for this once"
    else
        return 1
    fi
}

# Those of our packages that are here from another release than the distribution's own: PACKAGE=RELEASE.
from_other_releases() {
    own=$(codename)
    for pair in $wanted; do
        package=${pair#*=}
        ! has "$package" "$missing $seen" || continue
        seen="$seen $package"
        release=$(release_of "$package")
        case $release in
        '' | "$own" | "$own-updates" | "$own-security") ;;
        *) echo "$package=$release" ;;
        esac
    done
}

# $missing as arguments for apt: what apt can't install beside package $1 comes from its release $2,
# with all that it needs from there.
from_same_release() {
    for package in $missing; do
        if simulate "$package" && changes_nothing_else; then
            echo "$package"
            continue
        fi
        # Inst NAME [OLD] (VERSION ORIGIN [ARCHITECTURE])
        # shellcheck disable=SC2086
        apt-get $options -t "$2" -s install --no-install-recommends "$package" "$1" 2>/dev/null </dev/null |
            sed -n 's/^Inst \([^ ]*\) \(\[[^]]*\] \)\{0,1\}(\([^ ]*\) \(.*\) \[[a-z0-9]*\]).*/\1 \3 \4/p' |
            awk -v package="$package" '
                { name[NR] = $1; version[NR] = $2; sub(/^[^ ]* [^ ]* /, ""); origin[NR] = $0 }
                name[NR] == package { wanted = $0 }
                END { for (i = 1; i <= NR; i++) if (origin[i] == wanted) print name[i] "=" version[i] }'
    done
    echo "$1"
}

# How all of $missing comes onto the machine: the arguments for apt in $request. Where nothing else
# has to go, the first way that apt sees; else $removed or $downgraded say what has to.
plan() {
    request=$missing
    # shellcheck disable=SC2086
    if simulate $missing; then
        changes_nothing_else && return 0
        # What is named is kept: apt looks for another way.
        request="$missing $removed"
        # shellcheck disable=SC2086
        simulate $request && changes_nothing_else && return 0
    fi
    # QEMU's packages, say, stand side by side only if they are of one release.
    seen='' others=$(from_other_releases)
    for other in $others; do
        lend_source "${other#*=}" "${other%%=*}" || continue
        request=$(from_same_release "${other%%=*}" "${other#*=}")
        # shellcheck disable=SC2086
        simulate $request && changes_nothing_else && return 0
    done
    # The distribution's own version of them is older, but fits.
    request=$missing
    for other in $others; do
        request="$request ${other%%=*}/$(codename)"
    done
    # shellcheck disable=SC2086
    simulate --allow-downgrades $request && [ -z "$removed" ] && return 0
    request=$missing
    # shellcheck disable=SC2086
    simulate $missing
}

if [ -n "$may_install" ]; then
    $as_root apt-get -q update >"$log" 2>&1 </dev/null || {
        tail -n 20 "$log" >&2
        refuse "error: apt could not read its package sources, and these packages are missing:$missing" \
            "  try: sudo apt-get update, until it succeeds; then run this again"
    }
fi
if ! plan; then
    # Without rights apt's lists may be old or missing.
    [ -n "$may_install" ] || refuse "error: packages are missing, and this is neither root nor a sudo without password" \
        "  try: sudo apt-get update && sudo apt-get install$missing"
    grep -E '^(E:|W:|N:| [^ ]+ : )' "$work/plan" >&2 || tail -n 20 "$work/plan" >&2
    refuse "error: apt sees no way to install:$missing" \
        "  try: sudo apt-get install$missing, which says more; nothing was changed"
fi

consent=--no-remove
if ! changes_nothing_else; then
    [ -z "$removed" ] || say "apt would remove: $removed"
    [ -z "$downgraded" ] || say "apt would replace by an older version: $downgraded"
    [ -z "$downgraded" ] || consent="$consent --allow-downgrades"
    [ -z "$removed" ] || consent=${consent#--no-remove}
    answer=
    if [ -n "$may_install" ] && [ -t 0 ] && [ -t 2 ]; then
        printf 'Go on? [y/N] ' >&2
        read -r answer || :
    fi
    case $answer in
    [yY] | [yY][eE][sS]) ;;
    *)
        refuse "error: nothing was installed, because that takes something away; missing:$missing" \
            "  try: sudo apt-get install --no-install-recommends${downgraded:+ --allow-downgrades} $(echo $request), which asks; then run this again"
        ;;
    esac
fi
[ -n "$may_install" ] || refuse "error: packages are missing, and this is neither root nor a sudo without password" \
    "  try: sudo apt-get install $(echo $request)"

say "installing: $(echo $request)"
# A server that a test package brings along (sshd, mosquitto) must not be started for it.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    policy=/usr/sbin/policy-rc.d
    printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
    $as_root chmod 755 "$policy"
fi
# shellcheck disable=SC2086
if ! $as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get $options install -y --no-install-recommends $consent $request >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    refuse "error: apt could not install: $(echo $request)" \
        "  try: see apt's message above; sudo apt-get install $(echo $request) says all of it"
fi

look
if [ -n "$missing" ]; then
    refuse "error: apt says that it installed everything, but these commands are still missing:$lacking" \
        "  try: sudo apt-get install --reinstall$missing, then run this again"
fi
beside_packages
