#!/bin/sh
# Runs cargo for the release and says how long that takes: before it begins where BINARY is not there
# yet, and as long as it goes on, because the last crate alone takes most of the time and says
# nothing meanwhile. At a terminal one line counts the seconds; elsewhere cargo's own lines stand,
# and a line of ours now and then.
#
# usage: compile.sh BINARY CARGO ARGUMENT...
set -eu

[ $# -ge 2 ] || { echo "usage: compile.sh BINARY CARGO ARGUMENT..." >&2; exit 64; }
binary=$1
shift

[ -e "$binary" ] || echo "compiling castra takes about two minutes on two cores" >&2
every=15 line='\n'
if [ -t 2 ]; then
    # The cursor goes back to the start of the line, so that whatever cargo says takes its place.
    every=1 line='\033[K\r'
    # Cargo's bar would stand still at the last crate; warnings and errors are shown all the same.
    export CARGO_TERM_QUIET=true
fi
began=$(date +%s)
# In the background is the counter, not cargo: that gets Ctrl-C. Its last sleep holds no pipe open.
while sleep "$every" >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
    printf "compiling castra, %s s so far$line" $(($(date +%s) - began)) >&2
done &
counter=$!
trap 'kill "$counter" 2>/dev/null; [ "$every" != 1 ] || printf "\033[K" >&2' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
"$@"
