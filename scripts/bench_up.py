#!/usr/bin/env python3
"""Times `castra up` against the same guests started by hand, in one run.

usage: bench_up.py CASTRA_BINARY [--rounds N] [--guests 1,4,16] [--json FILE]

For each number of default guests, rounds alternate between castra and the baseline
(`bench-baseline.sh`: the very QEMU argv castra used, read back from /proc, started one after
another by a shell script). Figures are medians; the ratios are what counts.
"""
import argparse
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
TRIVIAL = "#!/bin/sh\necho ready >bench-ready\n"


def now_ms():
    return time.time_ns() // 1_000_000


def stamp_ms(text):
    return int(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000)


class Project:
    """One throw-away project with `count` default guests."""

    def __init__(self, castra, root, count):
        self.castra, self.dir, self.count = castra, root / f"fleet-{count}", count
        self.dir.mkdir()
        (self.dir / "run.sh").write_text(TRIVIAL)
        (self.dir / "castra.toml").write_text(
            f'version = "0.2.0"\n[project]\nname = "bench-{count}"\nstate_dir = "state"\n'
            f'[broker]\nport = 0\n'
            f'[[vms]]\nname = "vm"\ncount = {count}\n[vms.bootstrap]\nscript = "run.sh"\n'
        )
        self.state = self.dir / "state"

    def run(self, *args, **kwargs):
        return subprocess.run([self.castra, "--config", str(self.dir / "castra.toml"), *args], **kwargs)

    def up(self):
        """Milliseconds from the start of `castra up` to each hello, each bootstrap's end, and memory."""
        began = now_ms()
        done = self.run("up", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        ended = now_ms()
        if done.returncode != 0:
            sys.exit(f"castra up failed ({done.returncode}):\n{done.stderr}\n{done.stdout[-2000:]}")
        hello, finished, accel = {}, {}, None
        for line in done.stdout.splitlines():
            event = json.loads(line)
            kind = event["type"]
            if kind == "broker.handshake" and event["outcome"] == "ok":
                hello.setdefault(event["vm"], stamp_ms(event["ts"]) - began)
            elif kind == "bootstrap.completed":
                finished[event["vm"]] = stamp_ms(event["ts"]) - began
            elif event.get("phase") == "launched":
                accel = event["accel"]
        assert len(hello) == len(finished) == self.count, (hello, finished)
        return {"hello": sorted(hello.values()), "done": sorted(finished.values()), "all": ended - began, "accel": accel}

    def down(self):
        done = self.run("down", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"castra down failed:\n{done.stderr}")

    def vms(self):
        out = self.run("status", "--json", stdout=subprocess.PIPE, text=True, check=True).stdout
        return json.loads(out)["vms"]


def memory_kib(pid):
    """Proportional set size: pages shared with others are counted once in all."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


class HelloServer:
    """Stands in for the broker in the baseline: answers each hello, notes when it came."""

    def __init__(self, port, directory):
        self.directory = directory
        self.socket = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        with connection:
            connection.sendall(b"castra-broker 1 ready\n")
            line = connection.makefile("rb").readline(512).decode()
            match = re.match(r"hello vm:(\S+)", line)
            if match:
                path = self.directory / match[1]
                if not path.exists():
                    temporary = path.with_suffix(".tmp")
                    temporary.write_text(str(now_ms()))
                    temporary.rename(path)
                connection.sendall(b"ok\n")

    def close(self):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Baseline:
    """The guests of a project that is up, remembered so that they can be started by hand."""

    def __init__(self, project):
        self.project, self.guests = project, []
        record = json.loads((project.state / "broker.json").read_text())
        self.port = record["port"]
        for vm in project.vms():
            argv = Path(f"/proc/{vm['pid']}/cmdline").read_bytes().decode().split("\0")[:-1]
            directory = project.state / "vms" / vm["name"]
            overlay = json.loads((directory / "run.json").read_text())["overlay"]
            ssh = vm["ssh"]
            self.guests.append((vm["name"], directory, argv, overlay or "-", ssh["port"], ssh["identity"]))
            shutil.copytree(directory / "seed", directory / "seed.kept", dirs_exist_ok=True)

    def run(self):
        hellos = Path(tempfile.mkdtemp(dir=self.project.dir))
        server = HelloServer(self.port, hellos)
        script = self.project.dir / "run.sh"
        began, hello, done, memory = now_ms(), [], [], []
        try:
            for name, directory, argv, overlay, port, key in self.guests:
                shutil.copytree(directory / "seed.kept", directory / "seed", dirs_exist_ok=True)
                argv_file = directory / "baseline.argv"
                argv_file.write_text("".join(arg + "\n" for arg in argv))
                out = subprocess.run(
                    ["sh", str(SCRIPTS / "bench-baseline.sh"), str(directory), str(argv_file), overlay,
                     str(hellos / name), str(port), key, str(script)],
                    stdout=subprocess.PIPE, text=True, check=True, timeout=300,
                ).stdout
                times = dict(line.split() for line in out.splitlines())
                hello.append(int(times["hello"]) - began)
                done.append(int(times["done"]) - began)
            memory = [memory_kib(int((directory / "qemu.pid").read_text())) for _, directory, *_ in self.guests]
        finally:
            server.close()
            for _, directory, _, overlay, *_ in self.guests:
                kill(directory / "qemu.pid")
                if overlay != "-":
                    Path(overlay).unlink(missing_ok=True)
            shutil.rmtree(hellos)
        return {"hello": hello, "done": done, "all": now_ms() - began, "memory": memory}


def kill(pid_file):
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
    except (OSError, ValueError):
        pass


def measure(castra, root, count, rounds):
    project = Project(castra, root, count)
    first = project.up()
    memory = [memory_kib(vm["pid"]) for vm in project.vms()]
    project.down()
    castra_runs, baseline_runs = [], []
    for number in range(rounds):
        # The order alternates, so that neither side always comes second. The baseline starts what castra
        # started last.
        if number % 2 == 1:
            baseline_runs.append(baseline.run())
            subprocess.run(["sync"], check=True)
        # A broker that runs already, as the baseline's stand-in does.
        project.run("up", "--broker-only", "--quiet", check=True, stdout=subprocess.DEVNULL)
        castra_runs.append(project.up())
        memory = [memory_kib(vm["pid"]) for vm in project.vms()]
        baseline = Baseline(project)
        project.down()
        subprocess.run(["sync"], check=True)
        if number % 2 == 0:
            baseline_runs.append(baseline.run())
            subprocess.run(["sync"], check=True)

    def median(runs, key, pick):
        return statistics.median(pick(run[key]) for run in runs)

    middle = statistics.median
    figures = {"guests": count, "accel": first["accel"], "first_up_ms": first["all"],
               "memory_kib": middle(memory), "baseline_memory_kib": middle(m for run in baseline_runs for m in run["memory"])}
    for key in ("hello", "done"):
        for name, pick in (("median", middle), ("last", max)):
            figures[f"{key}_{name}_ms"] = median(castra_runs, key, pick)
            figures[f"baseline_{key}_{name}_ms"] = median(baseline_runs, key, pick)
    return figures


def show(figures):
    for f in figures:
        n = f["guests"]
        print(f"\n{n} default guest{'s' if n > 1 else ''}, accelerator {f['accel']}; seconds, medians")
        print(f"  {'':34}{'castra':>9}{'baseline':>10}{'ratio':>8}")
        rows = [("last handshake", "hello_last_ms"), ("median handshake", "hello_median_ms"),
                ("last bootstrap done", "done_last_ms"), ("median bootstrap done", "done_median_ms")]
        for label, key in rows[:: 2 if n == 1 else 1]:
            ours, theirs = f[key], f["baseline_" + key]
            print(f"  {label:34}{ours / 1000:9.2f}{theirs / 1000:10.2f}{ours / theirs:8.2f}")
        ours, theirs = f["memory_kib"] / 1024, f["baseline_memory_kib"] / 1024
        print(f"  {'memory per guest, MiB':34}{ours:9.0f}{theirs:10.0f}{ours / theirs:8.2f}")
        print(f"  {'first-ever up, whole command':34}{f['first_up_ms'] / 1000:9.2f}")
        if n == 1:
            for label, key in (("handshake", "hello_last_ms"), ("bootstrap", "done_last_ms")):
                goal = max(0.05 * f["baseline_" + key], 60)
                print(f"  castra's own share until the {label}: {f[key] - f['baseline_' + key]:.0f} ms (goal: at most {goal:.0f} ms)")
        else:
            sooner = f["baseline_hello_last_ms"] / f["hello_last_ms"]
            print(f"  last reachable {sooner:.2f} times sooner than one after the other;"
                  f" median guest at {f['hello_median_ms'] / f['hello_last_ms']:.2f} of the last"
                  + (" (goals for 16 on 2 cores: 1.40, 0.65)" if n == 16 else ""))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("castra")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--guests", default="1,4,16")
    parser.add_argument("--json")
    options = parser.parse_args()
    castra = str(Path(options.castra).resolve())
    with tempfile.TemporaryDirectory(prefix="castra-bench-") as root:
        figures = [measure(castra, Path(root), int(n), options.rounds) for n in options.guests.split(",")]
    show(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
