#!/usr/bin/env python3
"""Times the bootstrap pipeline against a hand-written shell script that does the same, in one run.

usage: bench_bootstrap.py CASTRA_BINARY [--rounds N] [--where sshd,guest] [--fleet N] [--json FILE]

`sshd`: this machine's own OpenSSH server in the place of the guests, and the tests' stand-in for
QEMU; what remains is castra's and ssh's own work, and the servers', which here share the cores.
`guest`: warm default guests. Rounds alternate between castra and the script
(`bench-bootstrap-hand.sh`: a ControlMaster of its own, tar, the script, the check). Vizier is off,
because the script has none; with guests one more figure has it on. Figures are medians; the ratios
are what counts. CPU time is that of castra and every ssh, and that of the guests (the servers with
all they start, or QEMU), per VM.
"""
import argparse
import getpass
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
HAND = SCRIPTS / "bench-bootstrap-hand.sh"
FAKE_QEMU = SCRIPTS.parent / "tests/support/fake-qemu.py"
TRIVIAL = "#!/bin/sh\necho \"$GREETING\" >greeted\n"
SMALL = 1 << 20
# A guest under emulation deciphers a MiB or two in a second.
LARGE = {"sshd": 256 << 20, "guest": 32 << 20}


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
            # An empty home, as a guest has: the user's own ~/.bashrc would run at every command.
            f"SetEnv HOME={folder}\n"
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
        out = self.run("status", "--json", stdout=subprocess.PIPE, text=True, check=True).stdout
        status = json.loads(out)
        self.ssh = {vm["name"]: vm["ssh"] for vm in status["vms"]}
        self.broker = f"127.0.0.1:{status['broker']['port']}"
        if where == "guest":
            # Warm: every guest has shaken hands and answered over SSH once.
            self.run("bootstrap", "--quiet", check=True, stdout=subprocess.DEVNULL)

    def configure(self, size, vizier=False):
        """The bootstraps' payload has this size from now on, and Vizier is on or off."""
        shared = self.dir / f"payload-{size}"
        if not shared.exists():
            payload(shared, size)
        qemu = f'[qemu]\nbinary = "{FAKE_QEMU}"\naccel = "tcg"\n' if self.where == "sshd" else ""
        text = (
            f'version = "0.2.0"\n[project]\nname = "bench-bootstrap"\nstate_dir = "state"\n[broker]\nport = 0\n'
            f'[vizier]\nenabled = {str(vizier).lower()}\n{qemu}'
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

    def shake_hands(self, names):
        """What the stand-ins' guests would do: warm ones are known to live."""
        if not self.sshd:
            return
        agents = [
            subprocess.Popen(["sh", SCRIPTS / "guest/castra-hello", "--vm", name, "--broker", self.broker],
                             stderr=subprocess.PIPE, text=True)
            for name in names
        ]
        for agent in agents:
            said = agent.communicate()[1]
            if agent.returncode != 0:
                sys.exit(f"no handshake: {said}")

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

    def hand_argv(self, name):
        """The script's command line for a VM."""
        ssh = self.ssh[name]
        arguments = [self.state / "vms" / name, ssh["user"], ssh["host"], ssh["port"], ssh["identity"],
                     self.remote(name), self.dir / name / "run.sh", self.shared]
        return ["sh", HAND, *map(str, arguments)]

    def by_hand(self, names):
        """The same by the script, all VMs at once: seconds for all, and for each transfer."""
        commands = [self.hand_argv(name) for name in names]
        outputs = [None] * len(commands)

        def work(index):
            done = subprocess.run(commands[index], stdout=subprocess.PIPE, text=True)
            outputs[index] = done.stdout if done.returncode == 0 else None

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(commands))]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
        if None in outputs:
            sys.exit("the hand-written script failed")
        return took, [float(output.split()[-1]) for output in outputs]

    def guest_cpu(self):
        """Seconds of CPU time that the guests have used so far, all together."""
        if self.sshd:
            pids = [self.sshd.process.pid]
        else:
            pids = [int((self.state / "vms" / name / "qemu.pid").read_text()) for name in self.names]
        ticks = 0
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def costed(self, work, names):
        """Seconds of a run, and CPU seconds a VM on the host's side and the guests'."""
        self.shake_hands(names)
        guests, host = self.guest_cpu(), children_cpu()
        took = work(names)[0]
        # The servers' processes are counted when they have been reaped.
        time.sleep(0.2 if self.sshd else 0)
        return took, (children_cpu() - host) / len(names), (self.guest_cpu() - guests) / len(names)

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


def children_cpu():
    """Seconds of CPU time of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(castra, root, where, rounds, count):
    """Figures by name: castra and by hand; for several VMs with the CPU time of each."""
    fleet = Fleet(castra, root, where, count)
    try:
        first = fleet.names[:1]
        one = alternating(
            rounds, lambda: fleet.costed(fleet.bootstrap, first), lambda: fleet.costed(fleet.by_hand, first)
        )
        figures = {"pipeline": tuple(median(ran, 0) for ran in one)}
        if count > 1:
            every = alternating(
                rounds, lambda: fleet.costed(fleet.bootstrap, fleet.names), lambda: fleet.costed(fleet.by_hand, fleet.names)
            )
            figures["fleet"] = {
                who: {
                    "one": median(alone, 0),
                    "all": median(together, 0),
                    "host_cpu": median(together, 1),
                    "guest_cpu": median(together, 2),
                }
                for who, alone, together in zip(("castra", "hand"), one, every)
            }
        if where == "guest":
            fleet.configure(SMALL, vizier=True)
            fleet.bootstrap(first)
            figures["vizier"] = statistics.median(fleet.bootstrap(first)[0] for _ in range(rounds))
        figures["large"] = LARGE[where] >> 20
        fleet.configure(LARGE[where])
        mine, hand = alternating(rounds, lambda: fleet.bootstrap(first)[1][0], lambda: fleet.by_hand(first)[1][0])
        figures["transfer"] = (median(mine), median(hand))
    finally:
        fleet.close()
    return figures


def show(figures, count):
    """The figures of one place, for people."""
    mine, hand = figures["pipeline"]
    print(f"  whole pipeline, 1 MiB payload   castra {mine:7.3f}  by hand {hand:7.3f}  ratio {mine / hand:5.2f} (goal: at most 1.2)")
    if "vizier" in figures:
        print(f"  the same with Vizier            castra {figures['vizier']:7.3f}")
    mine, hand = figures["transfer"]
    print(f"  {figures['large']:3} MiB payload                 castra {mine:7.3f}  by hand {hand:7.3f}  speed {hand / mine:5.2f} (goal: at least 0.9)")
    cores = len(os.sched_getaffinity(0))
    for who, ran in figures.get("fleet", {}).items():
        words = "castra " if who == "castra" else "by hand"
        goal = " (goal for 8 on 2 cores: at most 2)" if who == "castra" else ""
        # Less than this the cores can't take, however well they are used.
        bound = count * (ran["host_cpu"] + ran["guest_cpu"]) / cores / ran["one"]
        print(
            f"  {count} VMs at once        {words}  all {ran['all']:7.3f}  one {ran['one']:7.3f}  ratio {ran['all'] / ran['one']:5.2f}{goal}\n"
            f"    CPU a VM: host {ran['host_cpu']:.3f}, guest {ran['guest_cpu']:.3f}; {cores} cores can't do better than {bound:.2f}"
        )
    sys.stdout.flush()


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
            show(figures, options.fleet)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if options.json:
        Path(options.json).write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
