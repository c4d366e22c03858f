#!/bin/sh
# All figures that docs/PERFORMANCE.md tells about, each beside its baseline of the same run.
#
# usage: bench.sh PATH_TO_CASTRA [ROUNDS]
set -eu
[ $# -ge 1 ] || { echo "usage: bench.sh PATH_TO_CASTRA [ROUNDS]" >&2; exit 64; }
castra=$1 rounds=${2:-5}
here=$(CDPATH='' cd "$(dirname "$0")" && pwd)

# Guest images are kept between runs, apart from anybody's home directory.
export CASTRA_HOME="${CASTRA_TEST_HOME:-$here/../target/castra-home}"
"$castra" image build
python3 "$here/bench_up.py" "$castra" --rounds "$rounds"
python3 "$here/bench_bootstrap.py" "$castra" --rounds "$rounds"
python3 "$here/bench-broker.py" "$castra" --rounds "$rounds"
"$here/bench-bus.sh" "$castra" --rounds "$rounds"
python3 "$here/bench-help.py" "$castra"
"$here/bench-status.sh" "$castra" 200 2000
"$here/bench-events.sh" "$castra"
"$here/bench-harness.sh" "$castra" 256
