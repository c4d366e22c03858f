"""The servers that benchmarks compare, each started in a scratch folder on a free port and ended with the block.

Here: how each is configured and when it counts as started. Not here: load, rounds, figures. Every
server is a context manager; what it started is stopped and reaped however the block ends.
"""
import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = Path(sys.argv[0]).stem
# Where Debian keeps servers, and a user's PATH may not lead.
SEARCHED = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def eventually(what, look):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.02)
    sys.exit(f"{PROGRAM}: waited 20 s for {what}")


def ended_by_signals():
    """Ctrl-C, SIGTERM and SIGHUP unwind, so that what was started is stopped."""
    def unwind(number, _frame):
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, unwind)


@contextlib.contextmanager
def undisturbed():
    """Signals wait: a second Ctrl-C must not leave servers behind."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def stop(child):
    with undisturbed():
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def found(program):
    return shutil.which(program, path=SEARCHED)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def listening(words, port, folder):
    """A child that listens; its output goes to a file that is shown if it doesn't."""
    told = folder / "output"
    with told.open("w") as output:
        # A group of its own, so that Ctrl-C reaches it through us alone.
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)

    def listens():
        if child.poll() is not None:
            sys.exit(f"{PROGRAM}: {words[0]} ended with {child.returncode}:\n{told.read_text()[-2000:]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True

    try:
        eventually(words[0], listens)
        yield child.pid
    finally:
        stop(child)


@contextlib.contextmanager
def castra(binary, folder, config):
    """castra's broker, started as a user starts one without VMs; yields its process id and port.

    `config` follows `[project]` in castra.toml and has to leave the port to the system.
    """
    project = folder / "project"
    project.mkdir(parents=True)
    (project / "castra.toml").write_text(f'[project]\nname = "bench"\nstate_dir = "state"\n{config}')
    # For the registry of projects alone; the state lies in the project.
    env = dict(os.environ, CASTRA_HOME=str(folder / "home"))
    run = lambda *words: subprocess.run([binary, *words], cwd=project, env=env, stdin=subprocess.DEVNULL, check=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        run("up", "--broker-only")
        broker = json.loads(run("status", "--json").stdout)["broker"]
        yield broker["pid"], broker["port"]
    except subprocess.CalledProcessError as failed:
        sys.exit(f"{PROGRAM}: castra failed: {failed.stderr.decode()}")
    finally:
        with undisturbed(), contextlib.suppress(subprocess.CalledProcessError):
            run("down")


@contextlib.contextmanager
def mosquitto(folder):
    """Persistence on, Nagle off, and no limit that a window of ours or a subscriber could meet."""
    folder.mkdir()
    port = free_port()
    (folder / "mosquitto.conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence true\n"
        f"persistence_location {folder}/\nset_tcp_nodelay true\nlog_dest file {folder}/log\nuser {getpass.getuser()}\n"
        "max_inflight_messages 0\nmax_queued_messages 0\n"
    )
    with listening([found("mosquitto"), "-c", str(folder / "mosquitto.conf")], port, folder) as pid:
        yield pid, port


@contextlib.contextmanager
def jetstream(folder):
    """The streams that clients make lie in files; all else is NATS's own default."""
    folder.mkdir()
    port = free_port()
    (folder / "nats.conf").write_text(
        f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{folder}/streams", max_file_store: 16GB }}\n'
    )
    with listening([found("nats-server"), "-c", str(folder / "nats.conf")], port, folder) as pid:
        yield pid, port


@contextlib.contextmanager
def redis(folder):
    """Append-only file, synced every second as by default; no snapshots and no rewrites beside it."""
    folder.mkdir()
    port = free_port()
    words = [found("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--appendonly", "yes",
             "--appendfsync", "everysec", "--save", "", "--auto-aof-rewrite-percentage", "0"]
    with listening(words, port, folder) as pid:
        yield pid, port


def resident_kib(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0
