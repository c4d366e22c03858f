#!/usr/bin/env python3
"""Measures castra's bus beside Mosquitto, NATS JetStream, Redis streams, a bare relay and a bare disk.

usage: bench_bus.py CASTRA_BINARY [--quick] [--rounds N] [--callgrind] [--only WORD] [--json FILE] [--svg FILE]
                    [--markdown FILE] [--load BUS_LOAD] [--dir DIR]

All systems are measured in one run with the same generator. Rounds begin with fresh servers, and each
figure is taken of all systems in turn, another one first every round. Figures are medians over the
rounds; the ratios are what counts. State lies under --dir, which should be on a disk; what one
measurement left to write is synced before the next. Figures "on one core" have server and generator
pinned to the same core, which takes the luck of wake-ups across cores out of them.

--only takes the figures whose name contains WORD. --callgrind also counts the broker's instructions
per publish, which depends on no clock. With --markdown the text goes between the lines
`<!-- bench-bus -->` and `<!-- /bench-bus -->` of a FILE that has them, else it becomes the FILE.
"""
import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_bus_report as report
import bench_servers as servers

SCRIPTS = Path(__file__).resolve().parent
IDLE = 1000
# Eight sessions a guest, as many as castra allows one: room for 1024.
CONFIG = '[broker]\nport = 0\n{bus}[[vms]]\nname = "web"\ncount = 128\n'
# The latencies' publish rate while one consumer is stalled, and how many others there are.
BUSY_RATE, OTHERS = 10_000, 2


class Figure:
    """One thing measured: for which systems, by which words to the generator, on how many cores."""

    def __init__(self, name, title, words, systems=report.SYSTEMS, pinned=False):
        self.name, self.title, self.words, self.systems, self.pinned = name, title, words, systems, pinned


def figures(quick):
    """All of them, in the order of the tables."""
    time = "300" if quick else "1500"
    steady = "1000" if quick else "5000"
    disk = ("castra-batch", "disk")
    # The relay has one thread per publisher that would wait for the stalled one, too.
    queued = tuple(system for system in report.SYSTEMS if system != "raw")
    return [
        # This comes first, while the servers are fresh: later their allocators have room for the sessions at
        # hand.
        Figure("idle", f"{IDLE} idle sessions", ("idle", str(IDLE))),
        Figure("publish 1x1", "1 publisher x 1 in flight, one core", ("throughput", "1", "1", time), pinned=True),
        Figure("publish 1x64", "1 x 64", ("throughput", "1", "64", time)),
        Figure("publish 1x1024", "1 x 1024", ("throughput", "1", "1024", time)),
        Figure("publish 8x64", "8 x 64", ("throughput", "8", "64", time)),
        Figure("publish 1x64 on disk", "1 x 64, on disk before the ack", ("throughput", "1", "64", time), disk),
        Figure("fan-out 8", "1 publisher, 8 subscribers", ("fan-out", "8", time)),
        Figure("fan-out 64", "1 publisher, 64 subscribers", ("fan-out", "64", time)),
        Figure("latency 200", "200 publishes/s, one core", ("latency", "200", steady, "1", "0"), pinned=True),
        Figure("latency 10000", "10,000 publishes/s, one core", ("latency", "10000", steady, "1", "0"), pinned=True),
        Figure("others", f"{OTHERS} subscribers at {BUSY_RATE:,}/s", ("latency", str(BUSY_RATE), "5000", str(OTHERS), "0"), queued),
        Figure("others beside a stalled one", "the same beside one that never reads",
               ("latency", str(BUSY_RATE), "5000", str(OTHERS), "1"), queued),
        Figure("handshake", "session granted, one core", ("handshake", "200" if quick else "2000"), pinned=True),
    ]


class Bench:
    def __init__(self, args):
        self.args = args
        self.load = args.load or str(Path(args.castra).parent / "examples" / "bus-load")
        if not os.access(self.load, os.X_OK):
            sys.exit(f"bench-bus: {self.load} is missing: cargo build --release --example bus-load")
        self.core = max(os.sched_getaffinity(0))

    @contextlib.contextmanager
    def relay(self, folder):
        """The bare relay; it ends when its stdin does."""
        folder.mkdir()
        child = subprocess.Popen([self.load, "relay"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                 start_new_session=True)
        try:
            yield child.pid, int(child.stdout.readline())
        finally:
            servers.stop(child)

    @contextlib.contextmanager
    def file(self, folder):
        """No server: a file to append to, in the port's place."""
        folder.mkdir()
        yield None, folder / "log"

    def castra(self, folder, bus=""):
        return servers.castra(self.args.castra, folder, CONFIG.format(bus=bus))

    def start(self, system, folder):
        """A context manager that yields the server's process id and port, or None where there is none to start."""
        peers = {"mosquitto": ("mosquitto", servers.mosquitto), "jetstream": ("nats-server", servers.jetstream),
                 "redis": ("redis-server", servers.redis)}
        if system in peers:
            program, start = peers[system]
            return start(folder) if servers.found(program) else None
        return {
            "castra": lambda: self.castra(folder),
            "castra-batch": lambda: self.castra(folder, '[bus]\nsync = "batch"\n'),
            "raw": lambda: self.relay(folder),
            "disk": lambda: self.file(folder),
        }[system]()

    def measure(self, figure, system, server):
        """One measurement of one system: what the generator tells, as a dictionary."""
        pid, port = server
        words = [self.load, figure.words[0], {"castra-batch": "castra"}.get(system, system), str(port), *figure.words[1:]]
        if system == "disk":
            # Lines and groups have the sizes that castra's had.
            words = [self.load, "appends", str(port), figure.words[2], figure.words[3]]
        if figure.pinned:
            words = ["taskset", "-c", str(self.core), *words]
        os.sync()
        if figure.name == "idle":
            return self.idle(words, pid)
        with pinned(pid, self.core) if figure.pinned else contextlib.nullcontext():
            done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  timeout=120)
        if done.returncode:
            sys.exit(f"bench-bus: {' '.join(words)}: {done.stderr.decode()}")
        return json.loads(done.stdout)

    def idle(self, words, pid):
        """Resident memory per session, by the difference that all of them make."""
        before = servers.resident_kib(pid)
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            if child.stdout.readline() != "ready\n":
                sys.exit(f"bench-bus: {' '.join(words)}: the sessions were not granted")
            each = (servers.resident_kib(pid) - before) / IDLE
            told = json.loads(child.communicate(timeout=60)[0])
        finally:
            servers.stop(child)
        if told["kept"] != IDLE:
            sys.exit(f"bench-bus: only {told['kept']} of {IDLE} idle sessions were kept")
        return {"kib_each": each}

    def round(self, number, chosen, runs, work):
        with contextlib.ExitStack() as stack:
            running = {}
            for system in sorted({system for figure in chosen for system in figure.systems}):
                server = self.start(system, work / system)
                if server:
                    running[system] = stack.enter_context(server)
            for figure in chosen:
                present = [system for system in figure.systems if system in running]
                turn = number % len(present) if present else 0
                for system in present[turn:] + present[:turn]:
                    told = self.measure(figure, system, running[system])
                    runs.setdefault(figure.name, {}).setdefault(system, []).append(told)
        for system in running:
            shutil.rmtree(work / system)

    def instructions(self, work):
        """User instructions of the broker per publish, 64 in flight: the difference between two runs that
        differ only in how much they publish."""
        counted = []
        few, many = 5_000, 25_000
        for count in (few, many):
            folder = work / f"callgrind-{count}"
            project = folder / "project"
            project.mkdir(parents=True)
            port = servers.free_port()
            (project / "castra.toml").write_text(
                '[project]\nname = "bench"\nstate_dir = "state"\n' + CONFIG.format(bus="").replace("port = 0", f"port = {port}"))
            env = dict(os.environ, CASTRA_HOME=str(folder / "home"))
            output = folder / "callgrind.out"
            words = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={output}", self.args.castra, "broker"]
            os.chdir(project)
            os.environ["CASTRA_HOME"] = env["CASTRA_HOME"]
            with servers.listening(words, port, folder):
                done = subprocess.run([self.load, "exactly", "castra", str(port), "64", str(count)], timeout=300,
                                      stdout=subprocess.PIPE, check=True)
                if json.loads(done.stdout)["acked"] != count:
                    sys.exit("bench-bus: acks are missing under callgrind")
            counted += [int(line.split()[1]) for line in output.read_text().splitlines() if line.startswith("summary:")]
        return (counted[1] - counted[0]) / (many - few)


@contextlib.contextmanager
def pinned(pid, core):
    """All threads of a server on one core; threads they start meanwhile inherit it."""
    def put(cores):
        for thread in os.listdir(f"/proc/{pid}/task"):
            # A thread may have ended since it was listed.
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cores)

    everywhere = os.sched_getaffinity(pid)
    put({core})
    try:
        yield
    finally:
        put(everywhere)


def machine(args, work):
    """What the figures were taken on."""
    said = lambda *words: subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    system = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    versions = {"castra": said(args.castra, "--version").split()[-1]}
    for name, program, flag in (("mosquitto", "mosquitto", "-h"), ("jetstream", "nats-server", "--version"),
                                ("redis", "redis-server", "--version")):
        if servers.found(program):
            words = said(servers.found(program), flag).splitlines()[0].replace("v=", "v").split()
            versions[name] = next(word.lstrip("v") for word in words if word.lstrip("v")[0].isdigit())
    return {
        "cores": os.cpu_count(),
        "cpu": model,
        "kernel": platform.release(),
        "system": system.get("PRETTY_NAME", "").strip('"'),
        "filesystem": said("stat", "-f", "-c", "%T", str(work)).strip(),
        "versions": versions,
    }


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].split("\n\n")[0])
    parser.add_argument("castra", type=lambda text: str(Path(text).resolve()))
    parser.add_argument("--quick", action="store_true", help="one short round: shows that all works, proves nothing")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--callgrind", action="store_true")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--load", help="the load generator; default: examples/bus-load beside castra")
    parser.add_argument("--dir", default=str(SCRIPTS.parent / "target"), help="where all servers keep their state")
    for flag in ("--json", "--svg", "--markdown"):
        parser.add_argument(flag, metavar="FILE", type=lambda text: Path(text).resolve())
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds wants at least one")
    rounds = args.rounds or (1 if args.quick else 5)
    chosen = [figure for figure in figures(args.quick) if args.only in figure.name]
    servers.ended_by_signals()
    bench = Bench(args)

    Path(args.dir).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bench-bus-", dir=Path(args.dir).resolve()))
    runs, instructions = {}, None
    try:
        named = machine(args, work)
        for number in range(rounds):
            if sys.stderr.isatty():
                print(f"round {number + 1} of {rounds}", file=sys.stderr)
            bench.round(number, chosen, runs, work)
        if args.callgrind:
            instructions = bench.instructions(work)
    finally:
        with servers.undisturbed():
            os.chdir(SCRIPTS)
            shutil.rmtree(work, ignore_errors=True)

    result = report.Result(named, rounds, args.quick, {figure.name: figure.title for figure in chosen}, runs, instructions)
    print(result.text())
    if args.json:
        args.json.write_text(json.dumps(result.data(), indent=2) + "\n")
    if args.svg:
        args.svg.write_text(result.svg())
    if args.markdown:
        result.put_markdown(args.markdown, args.svg)


if __name__ == "__main__":
    main()
