#!/usr/bin/env python3
"""A stand-in for qemu-system-*: no guest, but all that castra relies on around one.

Here: -daemonize, the record lock on -pidfile, -D, QMP and the console with their log files, forwarded
ports bound for real, exit by signal, power button and quit. Not here: a guest. Faults are asked for
by `-fake WORD,WORD`, which a test passes as `qemu_args`, or by CASTRA_FAKE_QEMU.
SECS count from the end of its launch.

  refuse=TEXT         says TEXT and doesn't start        snatch=N        N starts find a port taken
  refuse-kvm          doesn't start under KVM            hang            never gets ready
  die                 gone before it answers             mute            QMP never greets
  die-greeted         gone during the negotiation        die-after=SECS  gone later, without a word
  internal-error      stopped by the accelerator at once, or `=SECS` later
  panic               the guest panics, then ends        panic-after=SECS  later
  ignore-powerdown    as a guest without ACPI            ignore-term     as a QEMU that hangs
  console=TEXT        written to the console             off-after=SECS  the guest powers itself off
  busy                uses a whole core                  disk-full        while `disk-full` is there its disk is
  prelaunch           waits for `cont`, as with -S      reset-every=SECS the guest reboots again and again
  resets              reboots for each file `reset`; one that holds `panic` is a panic that QEMU isn't told of

QMP takes `stop` and `cont`. With `disk-full` the guest is stopped over a write for as long as a file of that
name lies in vms/<vm>: `cont` alone doesn't help it.

A client of the console hears what is written to it from then on. A line that it sends is answered by
`you said LINE`; `poweroff` powers off, `colours` answers with sequences of all sorts.
"""

import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import time


def options(argv):
    """Every option with its values; one without a value is there with ''."""
    found, index = {}, 1
    while index < len(argv):
        value = ""
        if index + 1 < len(argv) and not argv[index + 1].startswith("-"):
            value = argv[index + 1]
        found.setdefault(argv[index], []).append(value)
        index += 2 if value else 1
    return found


OPTIONS = options(sys.argv)
FAKE = dict(
    word.split("=", 1) if "=" in word else (word, "")
    for text in OPTIONS.get("-fake", []) + [os.environ.get("CASTRA_FAKE_QEMU", "")]
    for word in text.split(",")
    if word
)


def chardev(name):
    for text in OPTIONS.get("-chardev", []):
        if f"id={name}," in text:
            return dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    return None


def refuse(text):
    log = OPTIONS.get("-D")
    if log and "-daemonize" in OPTIONS:
        with open(log[0], "a") as file:
            file.write(f"qemu-system-fake: {text}\n")
    else:
        sys.stderr.write(f"qemu-system-fake: {text}\n")
    sys.exit(1)


def bind_forwards():
    sockets = []
    for part in ",".join(OPTIONS.get("-netdev", [])).split(","):
        if not part.startswith("hostfwd="):
            continue
        rule = part[len("hostfwd="):]
        kind, host, rest = rule.split(":", 2)
        port = int(rest.split("-:")[0])
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            if kind == "tcp":
                sock.listen(1)
        except OSError:
            refuse(f"-netdev user: Could not set up host forwarding rule '{rule}'")
        sockets.append(sock)
        if "snatch" in FAKE and int(FAKE["snatch"]) > count("snatched"):
            refuse(f"-netdev user: Could not set up host forwarding rule '{rule}'")
    return sockets


def count(name):
    """How often it was asked before; kept beside the pid file, over several starts."""
    with open(name, "a+") as file:
        file.seek(0)
        before = len(file.read())
        file.write("x")
    return before


PANIC = "[    0.9] Kernel panic - not syncing: fake"


class Machine:
    def __init__(self):
        self.pid_path = os.path.abspath(OPTIONS["-pidfile"][0]) if "-pidfile" in OPTIONS else None
        self.qmp = chardev("qmp")
        self.serial = chardev("serial")
        self.qmp_log = open(self.qmp["logfile"], "w") if self.qmp else open(os.devnull, "w")
        self.console = open(self.serial["logfile"], "w") if self.serial else open(os.devnull, "w")
        self.log = os.fdopen(os.dup(2), "w")
        self.client = None
        self.watcher, self.typed = None, b""
        self.negotiated = False
        self.status = "prelaunch" if "prelaunch" in FAKE else "running"
        self.full = os.path.abspath("disk-full")
        self.reset_asked, self.resets = os.path.abspath("reset"), 0

    def write(self):
        """A guest that always has something to write."""
        if "disk-full" in FAKE and self.status == "running" and os.path.exists(self.full):
            self.event("BLOCK_IO_ERROR", device="", operation="write", action="stop", nospace=True,
                       reason="No space left on device")
            self.status = "io-error"
            self.event("STOP")

    def reset(self):
        """As Linux does it: one way after another."""
        self.resets += 1
        for _ in range(2):
            self.event("RESET", guest=True, reason="guest-reset")
        self.say("fake guest boots again")

    def listen(self, device):
        sock = socket.socket(socket.AF_UNIX)
        if os.path.exists(device["path"]):
            os.unlink(device["path"])
        sock.bind(device["path"])
        sock.listen(1)
        return sock

    def send(self, message):
        line = json.dumps(message) + "\r\n"
        self.qmp_log.write(line)
        self.qmp_log.flush()
        if self.client:
            try:
                self.client.sendall(line.encode())
            except OSError:
                self.client = None

    def event(self, name, **data):
        if self.negotiated:
            now = time.time()
            stamp = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
            self.send({"timestamp": stamp, "event": name, "data": data})

    def say(self, text):
        self.console.write(text + "\r\n")
        self.console.flush()
        if self.watcher:
            try:
                self.watcher.sendall(text.encode() + b"\r\n")
            except OSError:
                self.watcher = None

    def on_typed(self, data):
        *lines, self.typed = (self.typed + data).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            if line == b"poweroff":
                self.say("going down")
                self.end("guest-shutdown", True)
            elif line == b"colours":
                self.say("\x1b]0;title\x07\x1b[31mred\x1b[0m\x1b[6n\x1b[?25lhidden\x1b]52;c;eA==\x07")
            else:
                self.say("you said " + line.decode(errors="replace"))

    def end(self, reason, guest):
        self.event("SHUTDOWN", guest=guest, reason=reason)
        if self.pid_path:
            os.unlink(self.pid_path)
        os._exit(0)

    def on_term(self, number):
        if "ignore-term" not in FAKE:
            self.log.write(f"qemu-system-fake: terminating on signal {number} from pid 1 (somebody)\n")
            self.log.flush()
            self.end("host-signal", False)

    def internal_error(self):
        if self.status == "running":
            self.log.write("KVM internal error. Suberror: 1\nemulation failure\n")
            self.log.flush()
            self.status = "internal-error"
            self.event("STOP")

    def on_command(self, text):
        asked = json.loads(text)
        command, answer = asked["execute"], {}
        if command == "qmp_capabilities":
            if "die-greeted" in FAKE:
                os._exit(1)
            self.negotiated = True
        elif command == "query-status":
            answer = {"status": self.status, "running": self.status == "running"}
        elif command == "stop" and self.status == "running":
            self.status = "paused"
            self.event("STOP")
        elif command == "cont" and self.status != "running":
            self.status = "running"
            self.event("RESUME")
            self.write()
        self.send({"return": answer, "id": asked.get("id")})
        if command == "qmp_capabilities" and FAKE.get("internal-error") == "":
            self.internal_error()
        elif command == "quit":
            self.end("host-qmp-quit", False)
        elif command == "system_powerdown":
            self.event("POWERDOWN")
            if "ignore-powerdown" not in FAKE:
                self.end("guest-shutdown", True)

    def run(self, ready):
        listener = self.listen(self.qmp) if self.qmp else None
        console = self.listen(self.serial) if self.serial else None
        self.say(FAKE.get("console", "fake guest boots"))
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wake)
        if "hang" in FAKE:
            signal.pause()
        ready()
        if "die" in FAKE:
            os._exit(1)
        # When whoever launched it was done with QMP: what comes later comes after its launch, however slow that is.
        launched, pending = None, b""
        while True:
            after = time.monotonic() - launched if launched else -1
            if "die-after" in FAKE and after >= float(FAKE["die-after"]):
                os._exit(1)
            if "off-after" in FAKE and after >= float(FAKE["off-after"]) and self.negotiated:
                self.end("guest-shutdown", True)
            if self.negotiated and FAKE.get("internal-error") and after >= float(FAKE["internal-error"]):
                self.internal_error()
            if self.negotiated:
                self.write()
            panics = "panic" in FAKE or after >= float(FAKE.get("panic-after", "inf"))
            if panics and self.negotiated:
                self.say(PANIC)
                self.event("GUEST_PANICKED", action="poweroff")
                self.end("guest-panic", True)
            if "reset-every" in FAKE and after >= (self.resets + 1) * float(FAKE["reset-every"]):
                self.reset()
            if "resets" in FAKE and os.path.exists(self.reset_asked):
                with open(self.reset_asked, encoding="utf-8") as file:
                    if "panic" in file.read():
                        self.say(PANIC)
                os.unlink(self.reset_asked)
                self.reset()
            watched = [woken] + ([self.client] if self.client else [listener] if listener else [])
            # As QEMU: a second client waits until the first is gone.
            watched += [self.watcher] if self.watcher else [console] if console else []
            timed = {"die-after", "off-after", "panic", "panic-after", "internal-error", "disk-full", "reset-every",
                     "resets"}
            wait = 0 if "busy" in FAKE else 0.02 if timed & FAKE.keys() else None
            for got in select.select(watched, [], [], wait)[0]:
                if got is woken:
                    self.on_term(os.read(woken, 1)[0])
                elif got is console:
                    self.watcher, _ = console.accept()
                elif got is self.watcher:
                    try:
                        data = got.recv(4096)
                    except OSError:
                        data = b""
                    if not data:
                        self.watcher.close()
                        self.watcher = None
                    self.on_typed(data)
                elif got is listener:
                    self.client, _ = listener.accept()
                    pending = b""
                    self.negotiated = False
                    if "mute" not in FAKE:
                        version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "fake"}
                        self.send({"QMP": {"version": version, "capabilities": []}})
                else:
                    try:
                        data = got.recv(4096)
                    except OSError:  # it left without reading all
                        data = b""
                    if not data:
                        self.client = None
                        launched = launched or time.monotonic()
                        continue
                    *lines, pending = (pending + data).split(b"\n")
                    for line in lines:
                        self.on_command(line)


def take_pid_file(path):
    """As QEMU: a record lock for life, on the whole file, then the pid."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    except OSError:
        refuse(f"cannot create PID file: Cannot lock pid file: Resource temporarily unavailable")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())


def main():
    if "--version" in OPTIONS or "-version" in OPTIONS:
        print("QEMU emulator version 7.2.0 (fake)")
        return
    for option, answer in (("-machine", "q35 is\nvirt is"), ("-netdev", "user"), ("-device", 'name "virtio-9p-pci"')):
        if OPTIONS.get(option) == ["help"]:
            print(answer)
            return
    if "refuse" in FAKE:
        refuse(FAKE["refuse"])
    if "refuse-kvm" in FAKE and any(text.startswith("kvm") for text in OPTIONS.get("-accel", [])):
        refuse("-accel kvm: failed to initialize kvm: Permission denied")
    forwards = bind_forwards()
    ready = lambda: None
    if "-daemonize" in OPTIONS:
        told, tell = os.pipe()
        if os.fork():
            os.close(tell)
            os._exit(0 if os.read(told, 1) == b"0" else 1)
        os.close(told)
        os.setsid()
        if os.fork():
            os._exit(0)
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(OPTIONS["-D"][0], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

        def ready():
            os.chdir("/")
            for target, source in ((0, null), (1, null), (2, log)):
                os.dup2(source, target)
            os.write(tell, b"0")
            os.close(tell)

    if "-pidfile" in OPTIONS:
        take_pid_file(OPTIONS["-pidfile"][0])
    machine = Machine()
    if "-daemonize" in OPTIONS:
        machine.log = os.fdopen(os.dup(log), "w")
    machine.forwards = forwards
    machine.run(ready)


main()
