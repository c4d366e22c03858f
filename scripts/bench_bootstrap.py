#!/usr/bin/env python3
"""Times the bootstrap pipeline against a hand-written shell script that does the same, in one run.

usage: bench_bootstrap.py CASTRA_BINARY [--rounds N] [--where sshd,guest] [--fleet N] [--json FILE]

`sshd`: this machine's own OpenSSH server in the place of the guests, and the tests' stand-in for
QEMU; what remains is castra's and ssh's own work. `guest`: warm default guests. Rounds alternate
between castra and the script (`bench-bootstrap-hand.sh`: a ControlMaster of its own, tar, the
script, the check). Figures are medians; the ratios are what counts.
"""
import argparse
import getpass
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
HAND = SCRIPTS / "bench-bootstrap-hand.sh"
FAKE_QEMU = SCRIPTS.parent / "tests/support/fake-qemu.py"
TRIVIAL = "#!/bin/sh\necho \"$GREETING\" >greeted\n"
SMALL, LARGE = 1 << 20, 256 << 20


def payload(folder, size):
    """`size` bytes that don't compress, in sixteen files."""
    folder.mkdir(parents=True)
    for number in range(16):
        (folder / f"part {number}").write_bytes(os.urandom(size // 16))


class Sshd:
    """This machine's OpenSSH server on a free port."""

    def __init__(self, folder, public):
        folder.mkdir()
        program = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
        if program is None:
            sys.exit("sshd is needed: install the package openssh-server")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host"], check=True)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        (folder / "config").write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {folder}/host\nAuthorizedKeysFile {public}\n"
            "StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nUseDNS no\nMaxStartups 200\n"
            "PrintMotd no\nPrintLastLog no\nLogLevel ERROR\n"
        )
        self.process = subprocess.Popen([program, "-D", "-e", "-f", folder / "config"], stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.02)
        sys.exit("sshd doesn't listen")

    def close(self):
        self.process.terminate()
        self.process.wait()


class Fleet:
    """A project with `count` VMs that run, each with a bootstrap of its own."""

    def __init__(self, castra, root, where, count):
        self.castra, self.dir, self.where, self.count = castra, root / where, where, count
        self.dir.mkdir()
        self.state, self.sshd = self.dir / "state", None
        self.names = [f"vm-{number}" for number in range(count)]
        self.configure(SMALL)
        if where == "sshd":
            # The key is made here, so that the server knows it before castra first connects.
            self.state.mkdir(mode=0o700)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.state / "id_ed25519"], check=True)
            self.sshd = Sshd(self.dir / "sshd", self.state / "id_ed25519.pub")
            self.configure(SMALL)
        self.run("up", "--bootstrap", "skip", "--quiet", check=True, stdout=subprocess.DEVNULL)
        if where == "guest":
            # Warm: every guest has shaken hands and answered over SSH once.
            self.run("bootstrap", "--quiet", check=True, stdout=subprocess.DEVNULL)

    def configure(self, size):
        """The bootstraps' payload has this size from now on."""
        shared = self.dir / f"payload-{size}"
        if not shared.exists():
            payload(shared, size)
        qemu = f'[qemu]\nbinary = "{FAKE_QEMU}"\naccel = "tcg"\n' if self.where == "sshd" else ""
        text = (
            f'version = "0.2.0"\n[project]\nname = "bench-bootstrap"\nstate_dir = "state"\n[broker]\nport = 0\n'
            f'[vizier]\nenabled = false\n{qemu}'
        )
        (self.dir / "kernel").write_text("no kernel")
        for name in self.names:
            folder = self.dir / name
            folder.mkdir(exist_ok=True)
            (folder / "run.sh").write_text(TRIVIAL)
            remote = self.remote(name)
            metadata = f'remote_dir = "{remote}"\n'
            if self.sshd:
                metadata += f'[ssh]\nuser = "{getpass.getuser()}"\nport = {self.sshd.port}\n'
            (folder / "bootstrap.toml").write_text(metadata)
            kernel = 'kernel = "kernel"\n' if self.where == "sshd" else 'disk_size = "2 GiB"\n'
            text += (
                f'[[vms]]\nname = "{name}"\n{kernel}[vms.bootstrap]\nmode = "auto"\nscript = "{name}/run.sh"\n'
                f'payload = "{shared.name}"\nverify_path = "greeted"\nenv = {{ GREETING = "good day" }}\n'
            )
        (self.dir / "castra.toml").write_text(text)
        self.shared = shared

    def remote(self, name):
        return self.dir / "remote" / name if self.where == "sshd" else f"/var/tmp/{name}"

    def run(self, *args, **kwargs):
        return subprocess.run([self.castra, "--config", self.dir / "castra.toml", *args], **kwargs)

    def bootstrap(self, names):
        """Seconds for the whole command, and for each VM's transfer."""
        began = time.perf_counter()
        done = self.run("bootstrap", *names, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        took = time.perf_counter() - began
        if done.returncode != 0:
            sys.exit(f"castra bootstrap failed ({done.returncode}):\n{done.stderr}\n{done.stdout[-3000:]}")
        events = [json.loads(line) for line in done.stdout.splitlines()]
        steps = [event for event in events if event["type"] == "bootstrap.step"]
        transfers = [step["duration_ms"] / 1000 for step in steps if step["step"] == "transfer"]
        assert len(transfers) == len(names), steps
        return took, transfers

    def by_hand(self, name):
        """The same by the script: seconds for all, and for the transfer."""
        out = self.run("status", "--json", stdout=subprocess.PIPE, text=True, check=True).stdout
        ssh = next(vm["ssh"] for vm in json.loads(out)["vms"] if vm["name"] == name)
        arguments = [self.state / "vms" / name, ssh["user"], ssh["host"], ssh["port"], ssh["identity"],
                     self.remote(name), self.dir / name / "run.sh", self.shared]
        began = time.perf_counter()
        done = subprocess.run(["sh", HAND, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True)
        took = time.perf_counter() - began
        return took, float(done.stdout.split()[-1])

    def close(self):
        self.run("down", "--quiet", stdout=subprocess.DEVNULL)
        if self.sshd:
            self.sshd.close()


def alternating(rounds, one, other):
    """Runs both in every round, each as often first as second."""
    ones, others = [], []
    for number in range(rounds):
        pair = [(one, ones), (other, others)]
        for work, kept in pair if number % 2 == 0 else reversed(pair):
            subprocess.run(["sync"], check=True)
            kept.append(work())
    return ones, others


def median(values, index=None):
    return statistics.median(value if index is None else value[index] for value in values)


def measure(castra, root, where, rounds, count):
    fleet = Fleet(castra, root, where, count)
    try:
        first = fleet.names[0]
        mine, hand = alternating(rounds, lambda: fleet.bootstrap([first]), lambda: fleet.by_hand(first))
        figures = {"pipeline": (median(mine, 0), median(hand, 0))}
        if count > 1:
            one, all_of_them = alternating(
                rounds, lambda: fleet.bootstrap([first])[0], lambda: fleet.bootstrap(fleet.names)[0]
            )
            figures["fleet"] = (median(all_of_them), median(one))
        fleet.configure(LARGE)
        mine, hand = alternating(rounds, lambda: fleet.bootstrap([first])[1][0], lambda: fleet.by_hand(first)[1])
        figures["transfer"] = (median(mine), median(hand))
    finally:
        fleet.close()
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("castra")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--where", default="sshd,guest")
    parser.add_argument("--fleet", type=int, default=8)
    parser.add_argument("--json")
    options = parser.parse_args()
    castra = str(Path(options.castra).resolve())
    root = Path(tempfile.mkdtemp(prefix="castra-bench-bootstrap-"))
    kept = {}
    try:
        for where in options.where.split(","):
            words = {"sshd": "this machine's sshd", "guest": "warm default guests"}[where]
            print(f"bootstrap of {words}; seconds, medians of {options.rounds}")
            figures = kept[where] = measure(castra, root, where, options.rounds, options.fleet)
            mine, hand = figures["pipeline"]
            print(f"  whole pipeline, 1 MiB payload   castra {mine:7.3f}  by hand {hand:7.3f}  ratio {mine / hand:5.2f} (goal: at most 1.2)")
            mine, hand = figures["transfer"]
            print(f"  256 MiB payload                 castra {mine:7.3f}  by hand {hand:7.3f}  speed {hand / mine:5.2f} (goal: at least 0.9)")
            if "fleet" in figures:
                many, one = figures["fleet"]
                print(f"  {options.fleet} VMs at once                   all    {many:7.3f}  one     {one:7.3f}  ratio {many / one:5.2f} (goal for 8 on 2 cores: at most 2)")
            sys.stdout.flush()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if options.json:
        Path(options.json).write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
