#!/bin/sh
# Automation by handshake evidence: boots a VM, waits until the guest itself has shown that it
# lives, then bootstraps it. No port, pid or time since the launch would prove that.
#
# usage: on-reachable.sh [VM] [PATIENCE_SECONDS]    (needs jq)
set -eu
vm=${1:-web} patience=${2:-240}

castra up "$vm" --bootstrap skip
until=$(($(date +%s) + patience))
# `reachable` is true exactly while the newest proof of life is within the freshness window.
until castra status --json |
    jq -e --arg vm "$vm" '.vms[] | select(.name == $vm) | .reachable' >/dev/null; do
    if [ "$(date +%s)" -ge "$until" ]; then
        echo "error: $vm did not shake hands within $patience s; the end of its console:" >&2
        castra logs "$vm" --tail 20 >&2
        exit 1
    fi
    sleep 2
done
castra bootstrap "$vm"
