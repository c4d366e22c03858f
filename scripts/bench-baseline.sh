#!/bin/sh
# What castra is measured against: the same QEMU command line started by hand, the same
# handshake waited for, the same script run over plain ssh. One VM.
#
# usage: bench-baseline.sh VM_DIR ARGV_FILE OVERLAY HELLO_FILE PORT KEY SCRIPT
#   VM_DIR      the working directory of QEMU
#   ARGV_FILE   one QEMU argument a line, as castra would start it
#   OVERLAY     made anew with qemu-img (`-` for none)
#   HELLO_FILE  appears when the guest has shaken hands
#   PORT KEY    of the guest's sshd
#   SCRIPT      run in the guest; the baseline ends when it has
# Prints "hello MS" and "done MS", milliseconds since the epoch.
set -eu
vm_dir=$1 argv_file=$2 overlay=$3 hello=$4 port=$5 key=$6 script=$7

cd "$vm_dir"
[ "$overlay" = - ] || qemu-img create -q -f qcow2 "$overlay" 4G
set --
while IFS= read -r arg; do
    set -- "$@" "$arg"
done <"$argv_file"
"$@"
while [ ! -e "$hello" ]; do
    sleep 0.01
done
echo "hello $(cat "$hello")"
until ssh -F none -i "$key" -p "$port" -o BatchMode=yes -o StrictHostKeyChecking=no \
    -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectTimeout=10 root@127.0.0.1 sh <"$script" >/dev/null 2>&1; do
    sleep 0.05
done
echo "done $(date +%s%3N)"
