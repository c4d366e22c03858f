#!/bin/sh
# What `castra status --json` costs for a fleet, and whether a storm of handshakes slows it down.
#
#   scripts/bench-status.sh CASTRA [VMS [POLLS [JSON_FILE]]]
#
# The fleet is as real as it can be without guests: a broker, a hello by TCP for every VM, and pid
# files that another process holds the record locks of, as QEMU does. Prints
#
#   cpu     user + system time of one call, median, with user and system apart
#   quiet   time of one call from start to end while nobody says anything, p50 and p99
#   storm   the same while every VM shakes hands once a second
#
# Every answer must be whole, with all VMs reachable, none older than the storm allows and nothing on
# stderr; and the quiet calls must have left every file of the project as it was.
set -eu

castra=${1:?usage: scripts/bench-status.sh CASTRA [VMS [POLLS]]}
case $castra in /*) ;; *) castra=$PWD/$castra ;; esac
command -v python3 >/dev/null || { echo "bench-status: python3 is needed" >&2; exit 69; }

exec python3 - "$castra" "${2:-200}" "${3:-500}" "${4:-}" <<'PYTHON'
import fcntl, json, os, shutil, signal, socket, subprocess, sys, tempfile, threading, time

castra, vms, polls, json_file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
# Wide enough that the quiet calls fit: what leaves the window is told in the broker's log.
WINDOW_MS = 600_000
work = tempfile.mkdtemp(prefix="castra-bench-status-")
env = dict(os.environ, CASTRA_HOME=work + "/home")
project = work + "/project"
os.mkdir(project)
with open(project + "/castra.toml", "w") as config:
    config.write('[project]\nname = "bench"\n[broker]\nport = 0\nfreshness_secs = %d\n'
                 '[[vms]]\nname = "web"\ncount = %d\n' % (WINDOW_MS / 1000, vms))


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


def poll(count, oldest_ms):
    """Runs status again and again: seconds (user, system, from start to end) of each call."""
    calls, told, wrong = [], work + "/told", work + "/wrong"
    for _ in range(count):
        began = time.monotonic()
        pid = os.posix_spawn(castra, [castra, "status", "--json", "--config", project], env, file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_OPEN, 2, wrong, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)])
        _, code, usage = os.wait4(pid, 0)
        calls.append((usage.ru_utime, usage.ru_stime, time.monotonic() - began))
        if code or os.path.getsize(wrong):
            raise SystemExit("bench-status: castra status failed, or met a torn record: " + open(wrong).read())
        with open(told) as file:
            for vm in json.load(file)["vms"]:
                if not vm["reachable"] or not 0 <= vm["last_handshake_age_ms"] <= oldest_ms:
                    raise SystemExit("bench-status: what was told of a VM can't be: %s" % json.dumps(vm))
    return calls


def files():
    """What would show that a file was written, replaced, made or removed."""
    seen = {}
    for folder in (project, env["CASTRA_HOME"], root):
        for parent, _, names in os.walk(folder):
            for path in [parent] + [parent + "/" + name for name in names]:
                stat = os.lstat(path)
                seen[path] = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_mode)
    return seen


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

    # The lines of so many hellos at once are merged, and told a second later.
    time.sleep(2.5)
    poll(10, WINDOW_MS)
    before = files()
    quiet = poll(polls, WINDOW_MS)
    changed = [path for path, seen in files().items() if before.pop(path, None) != seen] + list(before)
    if changed:
        raise SystemExit("bench-status: status changed " + ", ".join(changed))
    for name in names:
        hello(port, name)
    stop = threading.Event()
    guests = threading.Thread(target=storm, args=(port, names, stop))
    guests.start()
    # A second between two hellos of a VM, a quarter until a record follows, and slack for two busy cores.
    stormy = poll(polls, 5000)
    stop.set()
    guests.join()

    figures = {"vms": vms, "polls": polls}
    for word, calls in (("quiet", quiet), ("storm", stormy)):
        took = [call[2] for call in calls]
        figures[word] = {"p50_ms": at(0.5, took), "p99_ms": at(0.99, took), "user_ms": at(0.5, [call[0] for call in calls]),
                         "system_ms": at(0.5, [call[1] for call in calls]),
                         "cpu_ms": at(0.5, [call[0] + call[1] for call in calls])}
    calm, busy = figures["quiet"], figures["storm"]
    figures["p50_ratio"] = busy["p50_ms"] / calm["p50_ms"]
    figures["p99_ratio"] = busy["p99_ms"] / calm["p99_ms"]
    print("castra status --json, %d running VMs, %d calls each" % (vms, polls))
    print("cpu    %.2f ms a call (user %.2f, system %.2f)" % (calm["cpu_ms"], calm["user_ms"], calm["system_ms"]))
    for word in ("quiet", "storm"):
        print("%s  p50 %.2f ms, p99 %.2f ms" % (word, figures[word]["p50_ms"], figures[word]["p99_ms"]))
    print("storm / quiet  p50 %.2f, p99 %.2f (wanted <= 2)" % (figures["p50_ratio"], figures["p99_ratio"]))
    print("every answer whole, no file changed by the quiet ones")
    if json_file:
        with open(json_file, "w") as file:
            json.dump(figures, file, indent=2)
finally:
    if broker:
        broker.terminate()
        broker.wait()
    if holder:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    shutil.rmtree(work, ignore_errors=True)
PYTHON
