#!/usr/bin/env python3
"""CPU time of commands that only print: what a shell pays for `castra --help` at a key press.

Prints the median and the largest of some runs, user and system time together, beside `true`, which
does nothing: the rest is the kernel's, for starting a process.

usage: bench-help.py PATH_TO_CASTRA [RUNS]
"""

import os
import shutil
import statistics
import sys

GOAL_MS = 2.0


def cpu_ms(argv):
    """CPU time of one run, as the kernel accounts for it."""
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
    pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=actions)
    os.close(null)
    _, status, used = os.wait4(pid, 0)
    if status != 0:
        sys.exit(f"error: {' '.join(argv)} ended with {os.waitstatus_to_exitcode(status)}")
    return 1000 * (used.ru_utime + used.ru_stime)


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__.strip().splitlines()[-1])
    castra = os.path.abspath(sys.argv[1])
    runs = int(sys.argv[2]) if len(sys.argv) == 3 else 100
    lines = [
        ("true", [shutil.which("true")]),
        ("castra --version", [castra, "--version"]),
        ("castra --help", [castra, "--help"]),
        ("castra up --help", [castra, "up", "--help"]),
        ("castra completions bash", [castra, "completions", "bash"]),
    ]
    print(f"CPU time of commands that only print, {runs} runs each (goal: under {GOAL_MS:.0f} ms)")
    for name, argv in lines:
        cpu_ms(argv)
        times = [cpu_ms(argv) for _ in range(runs)]
        print(f"  {name:<24} median {statistics.median(times):5.2f} ms   largest {max(times):5.2f} ms")


if __name__ == "__main__":
    main()
