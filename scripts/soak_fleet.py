#!/usr/bin/env python3
"""Brings a fleet of default guests up and down again and again, and looks for what is left.

usage: soak_fleet.py CASTRA_BINARY [--guests 16] [--rounds 3] [--home DIR] [--json FILE]

Each round: `up`, every guest reachable, `down`. After it no process, socket, overlay, pid file or
half-written file of the project may be left, no forwarded port be bound, and no file be there that
the first round has not left too. The last round takes all guests but one down first: the broker must
then have as many descriptors as when that one was alone. Ends with 1 at the first leftover.
"""
import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def fail(text):
    sys.exit(f"error: {text}")


class Fleet:
    def __init__(self, castra, directory, home, guests):
        self.castra, self.dir, self.guests = castra, directory, guests
        self.state = directory / "state"
        self.env = dict(os.environ, CASTRA_HOME=str(home))
        (directory / "castra.toml").write_text(
            'version = "0.2.0"\n[project]\nname = "soak"\nstate_dir = "state"\n[broker]\nport = 0\n'
            f'[[vms]]\nname = "vm"\ncount = {guests}\n'
        )

    def run(self, *args):
        began = time.monotonic()
        done = subprocess.run([self.castra, "--json", *args], cwd=self.dir, env=self.env, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode != 0:
            fail(f"castra {' '.join(args)}: {done.returncode}\n{done.stderr}\n{done.stdout[-3000:]}")
        return [json.loads(line) for line in done.stdout.splitlines()], time.monotonic() - began

    def up(self):
        events, took = self.run("up")
        (status,), _ = self.run("status")
        silent = [vm["name"] for vm in status["vms"] if not vm["reachable"]]
        if silent:
            fail(f"not reachable: {silent}")
        started = sum(event.get("phase") == "launched" for event in events)
        return status, started, took

    def descriptors(self):
        """Of the broker, without the senders' own logs, some of which it keeps open."""
        (status,), _ = self.run("status")
        found = []
        for entry in Path(f"/proc/{status['broker']['pid']}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except OSError:
                continue
            if not target.startswith(str(self.state / "logs/bus/vm-")):
                found.append(target.split(":")[0])
        return sorted(found)

    def processes(self):
        mine = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                cwd = os.readlink(entry / "cwd")
            except OSError:
                continue
            if str(self.dir) in line or cwd.startswith(str(self.dir)):
                mine.append(line)
        return mine

    def left(self, ports):
        """What may not outlive a `down`."""
        found = []
        until = time.monotonic() + 5
        while (running := self.processes()) and time.monotonic() < until:
            time.sleep(0.01)
        found += running
        bad = ("qemu.pid", "ssh.ctl")
        for path in self.files():
            name = Path(path).name
            if name.endswith((".sock", ".qcow2", ".new")) or ".tmp-" in name or name in bad:
                found.append(path)
        found += [line for line in Path("/proc/net/unix").read_text().splitlines() if str(self.dir) in line]
        for port in ports:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    found.append(f"port {port}")
        return found

    def files(self):
        """Run logs bear the time in their names: each bootstrap leaves one."""
        everything = (str(path.relative_to(self.state)) for path in self.state.rglob("*"))
        return {path for path in everything if not path.startswith("logs/bootstrap/")}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("castra")
    parser.add_argument("--guests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--home", default=os.environ.get("CASTRA_HOME"))
    parser.add_argument("--json")
    args = parser.parse_args()
    castra = str(Path(args.castra).resolve())
    with tempfile.TemporaryDirectory(prefix="castra-soak-") as directory:
        fleet = Fleet(castra, Path(directory).resolve(), args.home or f"{directory}/home", args.guests)
        try:
            report = soak(fleet, args.rounds)
        finally:
            subprocess.run([castra, "--quiet", "down"], cwd=fleet.dir, env=fleet.env)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


def soak(fleet, rounds):
    report = {"guests": fleet.guests, "rounds": []}
    whole, alone = None, None
    available = memory_available()
    for number in range(rounds):
        last = number + 1 == rounds
        if last and fleet.guests > 1:
            fleet.run("up", "vm-0")
            alone = fleet.descriptors()
        status, started, up = fleet.up()
        taken = (available - memory_available()) // 1024
        ports = [forward["host"] for vm in status["vms"] for forward in vm["forwards"]]
        if last and alone is not None:
            fleet.run("down", *(vm["name"] for vm in status["vms"] if vm["name"] != "vm-0"))
            until = time.monotonic() + 10
            while (now := fleet.descriptors()) != alone and time.monotonic() < until:
                time.sleep(0.05)
            if now != alone:
                fail(f"the broker has {now} open, and had {alone} beside the same one guest")
        _, down = fleet.run("down")
        left = fleet.left(ports)
        files = fleet.files()
        whole = whole or files
        left += sorted(files - whole)
        if left:
            fail("is left:\n  " + "\n  ".join(left))
        row = {"started": started, "up_s": round(up, 2), "down_s": round(down, 2), "memory_mib": taken}
        report["rounds"].append(row)
        print(f"round {number + 1}: {started} started, {fleet.guests} of {fleet.guests} reachable in {up:.1f} s, "
              f"down in {down:.2f} s, {taken // fleet.guests} MiB a guest, nothing left", flush=True)
    ups = [row["up_s"] for row in report["rounds"]]
    print(f"median up {statistics.median(ups):.1f} s; the broker's descriptors: {len(alone or [])}, before and after the others")
    return report


def memory_available():
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1])
    return 0


if __name__ == "__main__":
    main()
