#!/bin/sh
# Automation that waits for handshakes: boots a VM, waits until it is reachable, then bootstraps it.
# No open port, pid or time since the launch would prove that the guest is alive.
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
        echo "error: $vm was not reachable within $patience s; the end of its console:" >&2
        castra logs "$vm" --tail 20 >&2
        exit 1
    fi
    sleep 2
done
castra bootstrap "$vm"
