#!/bin/sh
# What an event costs, and what it takes to find the end of a large journal, beside doing the same
# by hand. It needs 1 GiB of room under TMPDIR for a while.
#
# usage: bench-events.sh PATH_TO_CASTRA [EVENTS [ROUNDS [MEBIBYTES]]]
set -eu

[ $# -ge 1 ] || { echo "usage: bench-events.sh PATH_TO_CASTRA [EVENTS [ROUNDS [MEBIBYTES]]]" >&2; exit 64; }
castra=$(CDPATH='' cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
# Cargo puts examples beside the binary they were built with.
load=$(dirname "$castra")/examples/events-load
if [ ! -x "$load" ]; then
    echo "error: there is no $load" >&2
    echo "  try: cargo build --release --bins --examples" >&2
    exit 69
fi
exec "$load" "$castra" "$@"
