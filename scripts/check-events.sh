#!/bin/sh
# Validates events that tests have left in a directory (CASTRA_TEST_EVENTS) against
# docs/events.schema.json, and the samples of the documentation too, with a validator that isn't
# castra's. `install-deps.sh test` has put it into target/venv.
#
# usage: check-events.sh DIRECTORY
set -eu

if [ $# -ne 1 ]; then
    echo "usage: check-events.sh DIRECTORY" >&2
    exit 64
fi
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=$root/target/venv/bin/python
if ! "$python" -c 'import jsonschema' 2>/dev/null; then
    echo "error: there is no validator in $root/target/venv" >&2
    echo "  try: scripts/install-deps.sh test" >&2
    exit 69
fi
exec "$python" "$root/tests/support/validate_events.py" "$root/docs/events.schema.json" \
    "$root/tests/golden/events.jsonl" "$root/docs/EVENTS.md" "$1"
