#!/bin/sh
# Installs the Debian or Ubuntu packages that castra, its default guest or its tests need and
# this machine lacks: with apt as root or through a sudo that asks nothing; otherwise it names
# them and stops.
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

# COMMAND=PACKAGE: the package is wanted if the command is missing.
run='qemu-system-x86_64=qemu-system-x86 qemu-img=qemu-utils ssh=openssh-client ssh-keygen=openssh-client
     curl=curl tar=tar gzip=gzip xz=xz-utils zstd=zstd dpkg-deb=dpkg apt-get=apt cpio=cpio'
test="$run sshd=openssh-server busybox=busybox-static python3=python3 jq=jq socat=socat ncat=ncat
      nc.openbsd=netcat-openbsd nc.traditional=netcat-traditional groff=groff-base bash=bash
      cc=gcc make=make zsh=zsh fish=fish node=nodejs npm=npm mmdebstrap=mmdebstrap mkfs.ext4=e2fsprogs"
bench="$test mosquitto=mosquitto mosquitto_pub=mosquitto-clients nats-server=nats-server redis-server=redis-server
       taskset=util-linux valgrind=valgrind"

case $1 in
run) wanted=$run ;;
test) wanted=$test ;;
bench) wanted=$bench ;;
*) usage ;;
esac

# The validator of events: from the Python package index, into a directory of the build alone.
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=$root/target/venv
python_environment() {
    [ "$1" = test ] || return 0
    "$venv/bin/python" -c 'import jsonschema' 2>/dev/null && return 0
    log=$(mktemp)
    if ! { python3 -m venv --clear "$venv" &&
        "$venv/bin/pip" --disable-pip-version-check install -q 'jsonschema>=4.18,<5'; } >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        echo "error: the JSON Schema validator could not be put into $venv" >&2
        echo "  try: look at pip's message above; tests need the Python package \`jsonschema\` there" >&2
        exit 69
    fi
    rm -f "$log"
}

# The coding agent that the harness is tested with: an npm package with a program for this machine
# inside, into a directory of the build alone.
codex=$root/target/codex
codex_version=0.169.0
coding_agent() {
    [ "$1" = test ] || return 0
    [ "$("$codex/node_modules/.bin/codex" --version 2>/dev/null)" = "codex-cli $codex_version" ] && return 0
    log=$(mktemp)
    mkdir -p "$codex"
    if ! npm install --prefix "$codex" --no-audit --no-fund --no-update-notifier \
        "@openai/codex@$codex_version" >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        echo "error: the Codex CLI could not be put into $codex" >&2
        echo "  try: look at npm's message above; tests need the npm package \`@openai/codex\` there" >&2
        exit 69
    fi
    rm -f "$log"
}

PATH=$PATH:/usr/sbin:/sbin
missing=
# Debian's python3 has no venv without this.
if [ "$1" != run ] && ! python3 -c 'import ensurepip' 2>/dev/null; then
    missing=' python3-venv'
fi
for pair in $wanted; do
    command -v "${pair%%=*}" >/dev/null 2>&1 && continue
    package=${pair#*=}
    case " $missing " in
    *" $package "*) ;;
    *) missing="$missing $package" ;;
    esac
done
if [ -z "$missing" ]; then
    python_environment "$1"
    coding_agent "$1"
    exit 0
fi

if ! command -v apt-get >/dev/null 2>&1; then
    echo "error: these Debian packages, or what your distribution calls them, are missing:$missing" >&2
    echo "  try: install them with your package manager, then run this again" >&2
    exit 69
fi
if [ "$(id -u)" -eq 0 ]; then
    as_root=
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as_root='sudo -n'
else
    echo "error: packages are missing, and this is neither root nor a sudo without password" >&2
    echo "  try: sudo apt-get install$missing" >&2
    exit 69
fi

echo "installing:$missing" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A server that a test package brings along (sshd, mosquitto) must not be started for it.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
    $as_root chmod 755 "$policy"
    trap '$as_root rm -f "$policy"; rm -f "$log"' EXIT
fi
# shellcheck disable=SC2086
if ! { $as_root apt-get -q update &&
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $missing; } >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    echo "error: apt could not install:$missing" >&2
    exit 69
fi
rm -f "$log"
python_environment "$1"
coding_agent "$1"
