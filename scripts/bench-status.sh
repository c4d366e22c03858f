#!/bin/sh
# What `castra status --json` costs for a fleet, and whether a storm of hand-shakes slows it down.
#
#   scripts/bench-status.sh CASTRA [VMS [POLLS]]
#
# The fleet is as real as it can be without guests: a broker, a hello by TCP for every VM, and pid
# files that another process holds the record locks of, as QEMU does. Prints
#
#   cpu     user + system time of one call, median, with user and system apart
#   quiet   time of one call from start to end while nobody says anything, p50 and p99
#   storm   the same while every VM shakes hands once a second
set -eu

castra=${1:?usage: scripts/bench-status.sh CASTRA [VMS [POLLS]]}
case $castra in /*) ;; *) castra=$PWD/$castra ;; esac
command -v python3 >/dev/null || { echo "bench-status: python3 is needed" >&2; exit 69; }

exec python3 - "$castra" "${2:-200}" "${3:-500}" <<'PYTHON'
import fcntl, json, os, shutil, signal, socket, subprocess, sys, tempfile, threading, time

castra, vms, polls = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
work = tempfile.mkdtemp(prefix="castra-bench-status-")
env = dict(os.environ, CASTRA_HOME=work + "/home")
project = work + "/project"
os.mkdir(project)
with open(project + "/castra.toml", "w") as config:
    config.write('[project]\nname = "bench"\n[broker]\nport = 0\n[[vms]]\nname = "web"\ncount = %d\n' % vms)


def status():
    return json.loads(subprocess.check_output([castra, "status", "--json"], cwd=project, env=env))


def boottime_ms():
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000)


def launch(root, names):
    """Run files and locked pid files; returns the process that holds the locks."""
    boot_id = open("/proc/sys/kernel/random/boot_id").read().strip()
    for index, name in enumerate(names):
        folder = "%s/vms/%s" % (root, name)
        os.makedirs(folder, 0o700)
        ssh = {"user": "root", "host": "127.0.0.1", "port": 20000 + index, "identity": root + "/id_ed25519",
               "options": []}
        run = {"vm": name, "role": "web", "launch_id": "%032x" % index, "phase": "running",
               "launched_boottime_ms": boottime_ms(), "launched_at": "2026-11-21T10:00:00.000Z",
               "boot_id": boot_id, "accel": "tcg", "accel_reason": "bench", "cpus": 1,
               "memory_bytes": 256 << 20, "forwards": [{"host": 20000 + index, "guest": 22, "protocol": "tcp"}],
               "ssh": ssh, "overlay": "%s/overlays/%s.qcow2" % (root, name), "persist": False,
               "bootstrap": {"status": "success", "noop": False, "duration_ms": 8421}}
        with open(folder + "/run.json", "w") as file:
            json.dump(run, file, indent=2)
    ready, told = os.pipe()
    holder = os.fork()
    if holder == 0:
        held = []
        for name in names:
            file = open("%s/vms/%s/qemu.pid" % (root, name), "w")
            fcntl.lockf(file, fcntl.LOCK_EX)
            file.write("%d\n" % os.getpid())
            file.flush()
            held.append(file)
        os.write(told, b".")
        signal.pause()
        os._exit(0)
    os.read(ready, 1)
    return holder


def hello(port, name):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"hello vm:%s\n" % name.encode())
        answer = b""
        while not answer.endswith(b"ok\n"):
            piece = connection.recv(256)
            if not piece:
                raise SystemExit("bench-status: %s was answered %r" % (name, answer))
            answer += piece


def poll(count):
    """Runs status again and again: seconds (user, system, from start to end) of each call."""
    calls = []
    for _ in range(count):
        began = time.monotonic()
        pid = os.posix_spawn(castra, [castra, "status", "--json", "--config", project], env,
                             file_actions=[(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)])
        _, code, usage = os.wait4(pid, 0)
        if code:
            raise SystemExit("bench-status: castra status failed")
        calls.append((usage.ru_utime, usage.ru_stime, time.monotonic() - began))
    return calls


def at(part, values):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * part))] * 1000


def storm(port, names, stop):
    while not stop.is_set():
        round_ends = time.monotonic() + 1
        for index, name in enumerate(names):
            hello(port, name)
            # Spread over the second, as guests are.
            rest = round_ends - 1 + (index + 1) / len(names) - time.monotonic()
            if rest > 0:
                time.sleep(rest)


holder = broker = None
try:
    root = status()["state_root"]
    names = [vm["name"] for vm in status()["vms"]]
    holder = launch(root, names)
    broker = subprocess.Popen([castra, "broker"], cwd=project, env=env, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while status()["broker"]["port"] is None:
        if time.monotonic() > deadline:
            raise SystemExit("bench-status: the broker did not start")
        time.sleep(0.05)
    port = status()["broker"]["port"]
    for name in names:
        hello(port, name)
    deadline = time.monotonic() + 10
    while sum(vm["reachable"] for vm in status()["vms"]) < vms:
        if time.monotonic() > deadline:
            raise SystemExit("bench-status: not every VM became reachable")
        time.sleep(0.05)

    poll(10)
    quiet = poll(polls)
    stop = threading.Event()
    guests = threading.Thread(target=storm, args=(port, names, stop))
    guests.start()
    stormy = poll(polls)
    stop.set()
    guests.join()

    cpu = at(0.5, [user + system for user, system, _ in quiet])
    print("castra status --json, %d running VMs, %d calls each" % (vms, polls))
    print("cpu    %.2f ms a call (user %.2f, system %.2f)"
          % (cpu, at(0.5, [call[0] for call in quiet]), at(0.5, [call[1] for call in quiet])))
    for word, calls in (("quiet", quiet), ("storm", stormy)):
        took = [call[2] for call in calls]
        print("%s  p50 %.2f ms, p99 %.2f ms" % (word, at(0.5, took), at(0.99, took)))
    print("storm / quiet  p50 %.2f, p99 %.2f" % (
        at(0.5, [call[2] for call in stormy]) / at(0.5, [call[2] for call in quiet]),
        at(0.99, [call[2] for call in stormy]) / at(0.99, [call[2] for call in quiet])))
finally:
    if broker:
        broker.terminate()
        broker.wait()
    if holder:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    shutil.rmtree(work, ignore_errors=True)
PYTHON
