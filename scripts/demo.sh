#!/bin/sh
# The main job, from nothing to nothing: builds the default guest once, brings two VMs up, shows
# that they are alive and configured, takes them down, and says how long each part took.
#
# usage: demo.sh PATH_TO_CASTRA
set -eu

[ $# -eq 1 ] || { echo "usage: demo.sh PATH_TO_CASTRA" >&2; exit 64; }
castra=$(CDPATH='' cd "$(dirname "$1")" && pwd)/$(basename "$1")
config=$(CDPATH='' cd "$(dirname "$0")/../docs/examples/demo" && pwd)/castra.toml

now() { date +%s%3N; }
seconds() { awk "BEGIN { printf \"%.1f s\", ($2 - $1) / 1000 }"; }
step() { printf '\n$ castra %s\n' "$*"; "$castra" --config "$config" "$@"; }

# Whatever happens, nothing of the demo stays behind.
trap '"$castra" --config "$config" --quiet down >/dev/null 2>&1 || :' EXIT
trap 'exit 130' INT TERM

t0=$(now)
step image build
t1=$(now)
step up
t2=$(now)
step status

printf '\n# what the bootstrap left in the guests\n'
step exec db -- cat /var/tmp/castra/state/ready
port=$("$castra" --config "$config" status --json | sed 's/.*"host":\([0-9]*\),"guest":80[,}].*/\1/')
printf '\n$ curl http://127.0.0.1:%s/\n' "$port"
curl -sS --max-time 10 "http://127.0.0.1:$port/"
t3=$(now)
step down
t4=$(now)
trap - EXIT

printf '\ndemo done: default guest %s, up and bootstrapped %s, a look around %s, down %s\n' \
    "$(seconds "$t0" "$t1")" "$(seconds "$t1" "$t2")" "$(seconds "$t2" "$t3")" "$(seconds "$t3" "$t4")"
