#!/bin/sh
# The bus beside Mosquitto, NATS JetStream, Redis streams, a bare relay and a bare disk, in one run:
# installs what is missing, builds what was not named, and leaves the rest to bench_bus.py.
#
# usage: bench-bus.sh [PATH_TO_CASTRA] [--quick] [--rounds N] [--callgrind] [--only WORD] [--json FILE]
#                     [--svg FILE] [--markdown FILE] [--load FILE] [--dir DIR]
set -eu
here=$(CDPATH='' cd "$(dirname "$0")" && pwd)

case ${1:-} in
'' | --*)
    (cd "$here/.." && cargo build --release --locked --bins --example bus-load) || exit
    castra=$here/../target/release/castra
    ;;
*)
    castra=$1
    shift
    ;;
esac
"$here/install-deps.sh" bench
exec python3 "$here/bench_bus.py" "$castra" "$@"
