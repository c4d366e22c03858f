#!/bin/sh
# What somebody without castra would write for one VM: a ControlMaster, tar through it, the script,
# the check. Prints how many seconds the transfer took.
#
# usage: bench-bootstrap-hand.sh WORK_DIRECTORY USER HOST PORT IDENTITY REMOTE_DIRECTORY SCRIPT PAYLOAD
set -eu
cd "$1"
user=$2 host=$3 port=$4 identity=$5 remote=$6 script=$7 payload=$8
shared='-F /dev/null -o BatchMode=yes -o ControlPath=hand.ctl -o StrictHostKeyChecking=accept-new
        -o UserKnownHostsFile=hand.known -o LogLevel=ERROR'

in_guest() {
    # shellcheck disable=SC2086
    ssh $shared -o ControlMaster=no -l "$user" -p "$port" "$host" "$@"
}

# shellcheck disable=SC2086
ssh $shared -o IdentitiesOnly=yes -i "$identity" -l "$user" -p "$port" -M -N -f "$host"
# shellcheck disable=SC2086
trap 'ssh $shared -O exit "$host" 2>/dev/null' EXIT
in_guest "mkdir -p '$remote'"
began=$(date +%s.%N)
tar -C "$(dirname "$script")" -cf - "$(basename "$script")" -C "$(dirname "$payload")" "$(basename "$payload")" |
    in_guest "cd '$remote' && rm -rf payload && tar -xf - && mv '$(basename "$payload")' payload"
ended=$(date +%s.%N)
in_guest "cd '$remote' && chmod 755 run.sh && CASTRA_VM=vm GREETING='good day' ./run.sh"
in_guest "test -e '$remote/greeted'"
echo "$began $ended" | awk '{ printf "%.3f\n", $2 - $1 }'
