#!/usr/bin/env python3
"""Holds record locks as QEMU does on its pid file: "hold PATH" or "free PATH" a line, each answered by "done"."""

import fcntl
import sys

held = {}
for line in sys.stdin:
    word, path = line.rstrip("\n").split(" ", 1)
    if word == "hold":
        held[path] = open(path, "r+")
        fcntl.lockf(held[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        held.pop(path).close()
    print("done", flush=True)
