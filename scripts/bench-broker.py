#!/usr/bin/env python3
"""Times the broker's handshakes: beside a crowd of bad clients, and beside Mosquitto's connects.

usage: bench-broker.py CASTRA_BINARY [--rounds N] [--load BROKER_LOAD] [--dir DIR] [--json FILE]

Rounds alternate between the things compared, figures are medians over the rounds, and the ratios are
what counts. Both servers keep their state under --dir, which should be on a disk, and their clients do
alike: connect, send one message, wait for the acceptance, close. What they promise differs: castra has written
a guest's first hello down before it says ok, and repeated ones at most four times a second a guest (its log
merges them beyond twenty a second); Mosquitto saves sessions later, and logs every connection. It
is given persistent sessions and set_tcp_nodelay. Without mosquitto that part is left out.
"""
import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_servers import castra, ended_by_signals, found, mosquitto, resident_kib

SCRIPTS = Path(__file__).resolve().parent
CLIENTS = 8
SILENT, DRIPPING, FLOODING = 500, 20, 1
IDLE = 1000
# The crowd must stay connected: no client's time runs out during the measurement.
CONFIG = f'[broker]\nport = 0\nhello_timeout_secs = 600\n[[vms]]\nname = "web"\ncount = {CLIENTS}\n'


class Load:
    """The generator, and the rule that what one measurement left to write doesn't slow the next."""

    def __init__(self, program):
        self.program = program

    def shake(self, kind, port, clients, count):
        os.sync()
        words = [self.program, kind, str(port), str(clients), str(count // clients)]
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    @contextlib.contextmanager
    def crowd(self, port, silent, dripping=0, flooding=0):
        """A crowd that stands while the block runs; none of its quiet members may have been lost."""
        words = [self.program, "crowd", str(port), str(silent), str(dripping), str(flooding)]
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        told = {}
        try:
            if child.stdout.readline() != "ready\n":
                sys.exit("bench-broker: the crowd could not gather")
            yield told
        finally:
            child.stdin.close()
            rest = child.stdout.read()
            child.wait()
        told.update(json.loads(rest))
        if told["kept"] != silent + dripping:
            sys.exit(f"bench-broker: only {told['kept']} of {silent + dripping} quiet connections were kept")


def medians(runs):
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]} | {
        "failed": sum(run["failed"] for run in runs)
    }


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].split("\n")[0])
    parser.add_argument("castra", type=lambda text: str(Path(text).resolve()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=8000, help="handshakes in each part of a round")
    parser.add_argument("--load", help="the load generator; default: examples/broker-load beside castra")
    parser.add_argument("--dir", default=str(SCRIPTS.parent / "target"), help="where both servers keep their state")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    ended_by_signals()
    load = Load(args.load or str(Path(args.castra).parent / "examples" / "broker-load"))
    if not os.access(load.program, os.X_OK):
        sys.exit(f"bench-broker: {load.program} is missing: cargo build --release --example broker-load")

    Path(args.dir).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bench-broker-", dir=args.dir))
    disk = subprocess.run(["stat", "-f", "-c", "%T", work], stdout=subprocess.PIPE, text=True).stdout.strip()
    runs, floods = {}, []
    kept = lambda name, run: runs.setdefault(name, []).append(run)
    try:
        with contextlib.ExitStack() as servers:
            pid, port = servers.enter_context(castra(args.castra, work / "castra", CONFIG))
            other = servers.enter_context(mosquitto(work / "mosquitto"))[1] if found("mosquitto") else None
            before = resident_kib(pid)
            with load.crowd(port, IDLE):
                each = (resident_kib(pid) - before) / IDLE
            load.shake("hello", port, CLIENTS, 800)
            for _ in range(args.rounds):
                kept("hello alone", load.shake("hello", port, 1, args.count))
                with load.crowd(port, SILENT, DRIPPING, FLOODING) as crowd:
                    kept("hello beside a crowd", load.shake("hello", port, 1, args.count))
                floods.append(crowd)
                kept("hello, 8 clients", load.shake("hello", port, CLIENTS, args.count))
                if other:
                    kept("mosquitto, 1 client", load.shake("mqtt", other, 1, args.count))
                    kept("mosquitto, 8 clients", load.shake("mqtt", other, CLIENTS, args.count))
    finally:
        shutil.rmtree(work, ignore_errors=True)

    rows = {name: medians(list_of) for name, list_of in runs.items()}
    ratio = lambda over, under, key: round(rows[over][key] / rows[under][key], 2)
    ratios = {
        "crowd p50 / alone p50 (wanted <= 1.3)": ratio("hello beside a crowd", "hello alone", "p50_us"),
        "crowd p99 / alone p99": ratio("hello beside a crowd", "hello alone", "p99_us"),
    }
    if other:
        ratios |= {
            "8 clients, castra / mosquitto per second (wanted >= 0.6)":
                ratio("hello, 8 clients", "mosquitto, 8 clients", "per_second"),
            "1 client, castra / mosquitto p50": ratio("hello alone", "mosquitto, 1 client", "p50_us"),
            "1 client, castra / mosquitto p99": ratio("hello alone", "mosquitto, 1 client", "p99_us"),
        }
    print(f"handshakes, {args.rounds} alternating rounds of {args.count}, medians, state on {disk}, "
          f"{os.cpu_count()} cores")
    print(f"{'':24}{'per second':>12}{'p50 us':>9}{'p99 us':>9}{'worst us':>10}{'failed':>8}")
    for name, row in rows.items():
        print(f"{name:24}{row['per_second']:12.0f}{row['p50_us']:9.0f}{row['p99_us']:9.0f}{row['worst_us']:10.0f}"
              f"{row['failed']:8}")
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    flooded = statistics.median(crowd["floods"] for crowd in floods)
    print(f"the crowd: {SILENT} silent, {DRIPPING} dripping, all kept; {flooded:.0f} floods a round, each refused")
    print(f"KiB resident per idle connection at {IDLE} (wanted <= 20): {each:.1f}")
    if args.json:
        told = {"rounds": runs, "medians": rows, "ratios": ratios, "crowds": floods, "idle_kib": each, "disk": disk, "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(told, indent=2) + "\n")
    if any(row["failed"] for row in rows.values()):
        sys.exit("bench-broker: handshakes failed")


if __name__ == "__main__":
    main()
