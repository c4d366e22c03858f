#!/bin/sh
# What relaying a coding agent's stream costs: CPU time, speed and memory of `castra harness relay`
# on a gibibyte, beside `cat`, `wc -l` and `jq` on the same stream in the same run.
#
# Two streams: `session`, as long sessions are (messages, commands with outputs of 200 bytes to
# the 400 KB that were seen), and `small`, the recorded streams of tests/fixtures/codex one after
# another, which are nothing but short lines: as bad as it gets.
#
# usage: bench-harness.sh CASTRA [MEBIBYTES [session|small]]
set -eu
[ $# -ge 1 ] || { echo "usage: bench-harness.sh CASTRA [MEBIBYTES [session|small]]" >&2; exit 64; }
castra=$(realpath "$1")
size=${2:-1024}
stream=${3:-}
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
mkdir "$work/project"
printf 'version = "0.2.0"\n[project]\nname = "bench"\nstate_dir = "state"\n[[vms]]\nname = "web"\n' \
    >"$work/project/castra.toml"
CASTRA_HOME=$work/home
export CASTRA_HOME

python3 - "$castra" "$root" "$work" "$size" "$stream" <<'PYTHON'
import json, os, resource, subprocess, sys, time
from pathlib import Path

castra, root, work, size = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) << 20
OUTPUTS = [200, 2_000, 400, 10_000, 1_000, 40_000, 300, 5_000, 400_000, 600]


def session(number):
    """One thread with ten commands, as lines."""
    words = "the quick brown fox \"jumps\" over\tthe lazy dog, é and all\n"
    yield {"type": "thread.started", "thread_id": "bench-%d" % (number % 8)}
    yield {"type": "turn.started"}
    for item, length in enumerate(OUTPUTS):
        command = {"id": "item_%d" % item, "type": "command_execution", "command": "/bin/bash -lc 'make test'"}
        yield {"type": "item.completed", "item": {"id": "r%d" % item, "type": "reasoning", "text": words * 6}}
        yield {"type": "item.started", "item": dict(command, aggregated_output="", exit_code=None, status="in_progress")}
        output = (words * (length // len(words) + 1))[:length]
        yield {"type": "item.completed", "item": dict(command, aggregated_output=output, exit_code=0, status="completed")}
    yield {"type": "item.completed", "item": {"id": "m", "type": "agent_message", "text": words * 15}}
    yield {"type": "turn.completed", "usage": {"input_tokens": 1000, "cached_input_tokens": 500, "output_tokens": 50}}


def write(path, pieces):
    written = 0
    with open(path, "wb") as file:
        while written < size:
            for piece in pieces:
                file.write(piece)
                written += len(piece)
    return written


def run(argv, stdin, stdout, cwd):
    """Wall time, CPU time and peak memory of one child. The kernel's ru_maxrss would count the
    Python that the child was before its exec, so the peak is read while it runs: it never falls."""
    began = time.monotonic()
    child = subprocess.Popen(argv, stdin=open(stdin, "rb"), stdout=open(stdout, "wb"), stderr=subprocess.DEVNULL, cwd=cwd)
    peak = 0
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        for line in open("/proc/%d/status" % child.pid):
            if line.startswith("VmHWM:"):
                peak = int(line.split()[1]) / 1024
        time.sleep(0.01)
    assert status == 0, (argv, status)
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, peak


def streams():
    lines = [json.dumps(line, ensure_ascii=False).encode() + b"\n" for number in range(8) for line in session(number)]
    yield "session", lines
    recorded = sorted(path for path in (root / "tests/fixtures/codex").glob("*.jsonl"))
    # The last one has to be complete, or the verdict is not.
    recorded.sort(key=lambda path: path.name == "plain_message.jsonl")
    yield "small", [path.read_bytes() for path in recorded]


for name, pieces in streams():
    if sys.argv[5] not in ("", name):
        continue
    path = work / "stream.jsonl"
    length = write(path, pieces)
    lines = int(subprocess.run(["wc", "-l", path], stdout=subprocess.PIPE, text=True).stdout.split()[0])
    print("%s: %d MiB in %d lines, %d bytes each" % (name, length >> 20, lines, length // lines))
    print("  %-34s %8s %8s %10s %8s %8s" % ("", "wall s", "CPU s", "MB/s CPU", "MiB", "x wc -l"))
    null = "/dev/null"
    rows = [
        ("cat", ["cat"], null),
        ("wc -l", ["wc", "-l"], null),
        ("jq -c .type", ["jq", "-c", ".type"], null),
        ("relay --no-record", [castra, "harness", "relay", "--json", "--no-record"], null),
        ("relay --no-record, to a file", [castra, "harness", "relay", "--json", "--no-record"], work / "events"),
        ("relay, transcript and journal", [castra, "harness", "relay", "--json"], null),
    ]
    base = None
    for label, argv, stdout in rows:
        wall, cpu, memory = run(argv, path, stdout, work / "project")
        if label == "wc -l":
            base = cpu
        ratio = "%8.1f" % (cpu / base) if base else "%8s" % ""
        print("  %-34s %8.2f %8.2f %10.0f %8.1f %s" % (label, wall, cpu, length / cpu / 1e6, memory, ratio), flush=True)
        subprocess.run(["rm", "-rf", str(work / "project/state"), str(work / "events")], check=True)
    path.unlink()
PYTHON
